"""Samples of the recipe `visual_probing`: questions with labels and blind images, and a model's states and answers.

original            the question's own image
blind_black         black, as large
blind_mean          the mean colour of all images of the samples, as large
blind_randomimage   another sample's image: a derangement within images of equal grids, else resized
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from interp_plugins.probe.method import read_states
from interp_plugins.probe.places import Pooling, columns_of
from interp_plugins.questions import Question
from torch import Tensor

import interp_core as ic
from interp_core import runs, vision

from ..visual_data import Asking, Row, demand_one_image, each, question_tokens, readable, stacked

ORIGINAL, RANDOM = "original", "blind_randomimage"
BLIND = {"blind_black": "black", "blind_mean": "mean", RANDOM: "random"}
MODES = (ORIGINAL, *BLIND)
BLOCK = 32
"""Samples whose states are kept together: what a stopped run does again at most."""


@dataclass(frozen=True)
class AskingProbes(Asking):
    """How questions are put to the model, and where probes read its states.

    Attributes:
        positions, pooling: as of the plugin `probe`.
    """

    positions: tuple[str, ...]
    pooling: Pooling


def label_of(question: Question, classes: Sequence[str]) -> str | None:
    """The class that the answer is (of several, the commonest), without regard to case; None: none of them."""
    counts = Counter(" ".join(answer.lower().split()).rstrip(".") for answer in question.answers)
    commonest = counts.most_common(1)[0][0]
    return next((name for name in classes if name.lower() == commonest), None)


@dataclass(frozen=True)
class Sample:
    """A question with its label.

    Attributes:
        question: with its one image.
        label: what is to be decoded.
        image: a label of the image, the same for questions about the same one.
        donor: number of the sample whose image stands in for its own in `blind_randomimage`.
    """

    question: Question
    label: str
    image: str
    donor: int = -1

    @property
    def name(self) -> str:
        """Of the question."""
        return self.question.name


@dataclass(frozen=True, eq=False)
class Shown:
    """Samples, and what each is shown in each mode.

    Attributes:
        samples: that can be used.
        skipped: rows `sample`, `where`, `reason` of those that cannot.
        colour: of `blind_mean`.
        resized: names of samples whose donor has another grid and was resized.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[Row, ...]
    colour: tuple[int, int, int]
    resized: tuple[str, ...]

    @cached_property
    def images(self) -> list[Any]:
        """Of the samples, decoded."""
        return [sample.question.pictures()[0] for sample in self.samples]

    def image(self, number: int, mode: str) -> Any:
        """What a sample is shown."""
        image = self.images[number]
        if mode == ORIGINAL:
            return image
        if mode == RANDOM:
            other = self.images[self.samples[number].donor]
            return other.resize(image.size) if self.samples[number].name in self.resized else other
        colour = self.colour if BLIND[mode] == "mean" else None
        return vision.blind_images([image], BLIND[mode], colour=colour).images[0]

    @property
    def collisions(self) -> int:
        """Samples whose donor has the same label."""
        return sum(sample.label == self.samples[sample.donor].label for sample in self.samples)

    def record(self) -> Row:
        """As plain data, without images."""
        rows = [
            {"sample": s.name, "question": s.question.question, "answers": list(s.question.answers), "label": s.label,
             "kind": s.question.kind, "image": s.image, "donor": self.samples[s.donor].name}
            for s in self.samples
        ]  # fmt: skip
        return {"samples": rows, "skipped": list(self.skipped), "mean_colour": list(self.colour),
                "resized": list(self.resized)}  # fmt: skip

    @staticmethod
    def of(record: Mapping[str, Any], questions: Mapping[str, Question]) -> Shown:
        """From what `record` gave."""
        place = {row["sample"]: number for number, row in enumerate(record["samples"])}
        samples = [
            Sample(questions[row["sample"]], row["label"], row["image"], place[row["donor"]])
            for row in record["samples"]
        ]
        red, green, blue = record["mean_colour"]
        return Shown(tuple(samples), tuple(record["skipped"]), (red, green, blue), tuple(record["resized"]))


def shown(
    model: ic.Model, questions: Sequence[Question], classes: Sequence[str], asking: AskingProbes,
    skipped: Sequence[Row], seed: int,
) -> Shown:  # fmt: skip
    """The samples of questions that the model's processor takes, each with a donor.

    Raises:
        PlanError: fewer than two images.
        InterpError: a sample that cannot be used, if the run is strict.
    """
    bad = list(skipped)
    good = readable(questions, lambda question: _sample(model, question, classes, asking), asking, bad)
    if len({sample.image for sample in good}) < 2:
        why = f"; the first that cannot be used: {bad[0]['sample']}: {bad[0]['reason']}" if bad else ""
        raise ic.PlanError(
            f"{len(good)} of {len(questions)} questions can be used, about {len({s.image for s in good})} image(s); "
            f"blind images need two at least{why}"
        )
    images = [sample.question.pictures()[0] for sample in good]
    first = _tokens(model, good[0].question, images[0], asking)
    for place in asking.positions:
        columns_of(first, place)  # one that there is not would be missing in all
    blind = vision.blind_images(images, "random", processor=model.processor, groups=[s.image for s in good], seed=seed)
    drawn = [Sample(s.question, s.label, s.image, donor) for s, donor in zip(good, blind.donors, strict=True)]
    resized = tuple(good[number].name for number in blind.resized)
    return Shown(tuple(drawn), tuple(bad), vision.mean_colour(images), resized)


def _sample(model: ic.Model, question: Question, classes: Sequence[str], asking: Asking) -> Sample:
    label = label_of(question, classes)
    if label is None:
        raise ic.TextError(f"its answer {question.answers[0]!r} is none of {', '.join(classes)}")
    demand_one_image(question)
    asking.scorer("", question.answers)
    _tokens(model, question, question.pictures()[0], asking)
    return Sample(question, label, question.image)


def _tokens(model: ic.Model, question: Question, image: Any, asking: Asking) -> ic.Tokens:
    return question_tokens(
        model, question, [image], prompt=asking.prompt, max_model_len=asking.max_model_len, more=asking.max_new_tokens
    )


# States

States = dict[str, Tensor]
"""By position: `[sample layer d_model]`."""
Block = tuple[States, Row]
"""States of some samples; their names, and what was left out."""


def read_block(model: ic.Model, data: Shown, mode: str, numbers: Sequence[int], asking: AskingProbes) -> Block:
    """States of some samples in a mode, float32: `resid_pre` of every layer and `resid_post` of the last."""
    bad: list[Row] = []
    read = _each(data, mode, numbers, asking, bad, lambda rows: _states(model, data, mode, rows, asking))
    states = {place: torch.stack([states[i] for states in read.values()]) for i, place in enumerate(asking.positions)
              if read}  # fmt: skip
    return states, {"samples": list(read), "skipped": bad}


def _states(model: ic.Model, data: Shown, mode: str, numbers: Sequence[int], asking: AskingProbes) -> list[Tensor]:
    tokens = _batch(model, data, mode, numbers, asking)
    states = read_states(model, tokens, asking.positions, asking.pooling)
    if not bool(torch.isfinite(states).all()):
        raise ic.ReadError("its states are not finite; another dtype may do")
    return list(states)


def _batch(model: ic.Model, data: Shown, mode: str, numbers: Sequence[int], asking: Asking) -> ic.Tokens:
    return stacked([_tokens(model, data.samples[n].question, data.image(n, mode), asking) for n in numbers])


def _each(
    data: Shown, mode: str, numbers: Sequence[int], asking: Asking, bad: list[Row],
    work: Callable[[Sequence[int]], Sequence[Any]],
) -> dict[str, Any]:  # fmt: skip
    """What `work` gives for each sample in a mode, by its name."""
    told_as = f"{mode}, samples {numbers[0]} to {numbers[-1]}"
    return each(told_as, mode, numbers, lambda number: data.samples[number].name, work, asking, bad)


def block_bytes(block: Block) -> bytes:
    """What the file of a block holds."""
    return runs.safetensors_bytes(
        # a file of no tensors cannot be written
        block[0] or {"none": torch.zeros(0)},
        {name: json.dumps(value) for name, value in block[1].items()},
    )


def read_note(path: Path) -> Block:
    """What a file says of its block; states stay in it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        noted: Mapping[str, str] = file.metadata()
    return {}, {name: json.loads(value) for name, value in noted.items()}


def states_at(paths: Sequence[Path], place: str, names: Sequence[str]) -> Tensor:
    """States of samples by name at a position, from the files of a mode."""
    from safetensors import safe_open

    rows: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            there = json.loads(file.metadata()["samples"])
            if there:
                rows |= dict(zip(there, file.get_tensor(place), strict=True))
    return torch.stack([rows[name] for name in names])


# Answers


def answer_rows(model: ic.Model, data: Shown, mode: str, numbers: Sequence[int], asking: Asking) -> list[Row]:
    """The model's own answers of some samples in a mode, and what they are worth; `problem` of those that fail."""
    bad: list[Row] = []
    answers = _each(data, mode, numbers, asking, bad, lambda rows: _answers(model, data, mode, rows, asking))
    failed = {row["sample"]: row["reason"] for row in bad}
    rows = []
    for number in numbers:
        name = data.samples[number].name
        if name in failed:
            rows.append({"sample": name, "failed": failed[name]})
            continue
        text, ended = answers[name]
        score = asking.scorer(text, data.samples[number].question.answers)
        rows.append({"sample": name, "failed": "", "text": text, "ended": ended, "score": score.value,
                     "read": score.read, "gold": score.gold, "problem": score.problem})  # fmt: skip
    return rows


def _answers(model: ic.Model, data: Shown, mode: str, numbers: Sequence[int], asking: Asking) -> list[tuple[str, bool]]:
    generation = model.generate(_batch(model, data, mode, numbers, asking), max_new_tokens=asking.max_new_tokens)
    return [(text, bool(ended)) for text, ended in zip(generation.texts, generation.ended, strict=True)]
