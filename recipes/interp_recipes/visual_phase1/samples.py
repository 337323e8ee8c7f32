"""Samples of the recipe `visual_phase1`: pilots and further questions, each with its blind images, as tokens on demand.

random    another sample's image: a derangement within images of equal grids, else resized
black     black, as large;  mean: the mean colour of all images of the samples
blank     as black; what single tokens of nothing at all do is the noise floor of what tokens do
reencoded the same image through JPEG: what it shows is left, so that effects of it are noise
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interp_plugins.questions import Question, Questions

import interp_core as ic
from interp_core import vision

from ..visual_data import Asking, Row, demand_one_image, question_tokens, readable

Mode = Literal["random", "black", "mean"]
REENCODED, BLANK = "reencoded", "blank"
QUALITY = 95


@dataclass(frozen=True, eq=False)
class Sample:
    """A question with one image.

    Attributes:
        question: as it was read.
        image: a label, the same for questions about the same image.
        picture: decoded.
        pilot: whether it takes part in τ alone.
        blind: pictures that stand in for its own, by mode.
        donor: name of the sample whose image is the random one.
    """

    question: Question
    image: str
    picture: Any
    pilot: bool
    blind: Mapping[str, Any]
    donor: str = ""

    @property
    def name(self) -> str:
        """Of the question."""
        return self.question.name

    @property
    def answer(self) -> str:
        """The answer that is teacher-forced: the first."""
        return self.question.answers[0]

    def shown(self, mode: str) -> Any:
        """Its picture, or what stands in for it."""
        if mode == REENCODED:
            return _reencoded(self.picture)
        if mode == BLANK:
            return vision.blind_images([self.picture], "black").images[0]
        return self.blind[mode] if mode else self.picture

    def tokens(self, model: ic.Model, asking: Asking, mode: str = "", *, answer: bool | str = True) -> ic.Tokens:
        """The question as a row of tokens, with its own image or another; with its answer, or another text as such."""
        text = self.answer if answer is True else answer or None
        return question_tokens(
            model, self.question, [self.shown(mode)], text, prompt=asking.prompt,
            max_model_len=asking.max_model_len, more=0 if answer else asking.max_new_tokens,
        )  # fmt: skip

    def row(self) -> Row:
        """As plain data, without images."""
        q = self.question
        return {"sample": q.name, "question": q.question, "answer": self.answer, "answers": list(q.answers),
                "kind": q.kind, "difficulty": q.difficulty, "image": self.image, "pilot": self.pilot,
                "donor": self.donor}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Samples:
    """All that can be used.

    Attributes:
        pilots, others: the samples.
        skipped: rows `sample`, `where`, `reason` of those that cannot.
        resized: samples whose donor has another grid and was resized.
        collisions: samples whose donor has the same answer.
    """

    pilots: tuple[Sample, ...]
    others: tuple[Sample, ...]
    skipped: tuple[Row, ...]
    resized: tuple[str, ...]
    collisions: int

    @property
    def every(self) -> tuple[Sample, ...]:
        """Pilots first."""
        return self.pilots + self.others

    def record(self) -> Row:
        """As plain data."""
        return {"samples": [sample.row() for sample in self.every], "skipped": list(self.skipped),
                "resized": list(self.resized), "donors_with_the_same_answer": self.collisions}  # fmt: skip


def drawn(
    model: ic.Model, pilots: Questions, others: Questions, modes: Sequence[Mode], asking: Asking, seed: int
) -> Samples:
    """The samples of questions that the model's processor takes. A pilot that cannot be used is replaced by the first
    further question.

    Raises:
        PlanError: fewer than two pilots or two further samples are left, or all are about one image.
        InterpError: a sample that cannot be used, if the run is strict.
    """
    skipped = {(row.where, row.field, row.detail) for part in (pilots, others) for row in part.skipped}
    bad: list[Row] = [{"sample": where, "where": field, "reason": why} for where, field, why in sorted(skipped)]
    usable = readable((*pilots, *others), lambda question: (question, _picture(model, question, asking)), asking, bad)
    if len(usable) < len(pilots) + 2:
        why = f"; the first that cannot: {bad[0]['sample']}: {bad[0]['reason']}" if bad else ""
        raise ic.PlanError(
            f"{len(usable)} of {len(pilots) + len(others)} questions can be used, {len(pilots)} pilots and two "
            f"further samples are needed{why}"
        )
    labels = [question.image for question, _ in usable]
    names = {label: f"image {number}" for number, label in enumerate(dict.fromkeys(labels))}
    pictures = [picture for _, picture in usable]
    # always drawn, also where `blind` has other modes: the truncation's chance level answers to a random image
    random = vision.blind_images(pictures, "random", processor=model.processor, groups=labels, seed=seed)
    plain = {mode: vision.blind_images(pictures, mode, seed=seed).images for mode in modes if mode != "random"}
    samples = [
        Sample(
            question, names[labels[i]], picture, i < len(pilots),
            {"random": random.images[i]} | {mode: images[i] for mode, images in plain.items()},
            usable[random.donors[i]][0].name,
        )
        for i, (question, picture) in enumerate(usable)
    ]  # fmt: skip
    same = sum(usable[donor][0].answers[0] == usable[i][0].answers[0] for i, donor in enumerate(random.donors))
    return Samples(
        tuple(samples[: len(pilots)]), tuple(samples[len(pilots) :]), tuple(bad),
        tuple(samples[i].name for i in random.resized), same,
    )  # fmt: skip


def _picture(model: ic.Model, question: Question, asking: Asking) -> Any:
    """The picture of a question that can be used."""
    demand_one_image(question)
    # answers that the scorer cannot read are refused now, not after the model has run
    asking.scorer("", question.answers)
    picture = question.pictures()[0]
    sample = Sample(question, "", picture, False, {})
    # both must be short enough: the row with its answer, and the one behind which an answer is generated
    sample.tokens(model, asking)
    sample.tokens(model, asking, answer=False)
    return picture


def _reencoded(picture: Any) -> Any:
    from PIL import Image

    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return Image.open(file).convert("RGB")
