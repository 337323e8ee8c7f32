"""Which questions about images a visual recipe asks, of which model, and in which words.

questions   of a published data set, of a folder of one's own, or drawn for toy:vision
model       with a processor for images, on one device or laid over several
prompt      a turn of the user with image and question, through the model's chat template where it has one
scorer      that of the data set
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from interp_plugins.answers import Scorer, scorer
from interp_plugins.questions import Question, Questions, read_questions

import interp_core as ic
from interp_core import runs, toys

from .configs import DeviceConfig, balanced

T = TypeVar("T")
Row = dict[str, Any]
Dataset = Literal["toy", "chartqa", "docvqa", "vqav2", "pope", "plain"]
TOY = "toy:vision"
QUESTION = "{question}"
SHORT = "{question}\nAnswer the question using a single word or phrase."
PROMPTS: dict[str, str] = {
    "toy": QUESTION, "plain": QUESTION, "chartqa": SHORT, "docvqa": SHORT, "vqav2": SHORT, "pope": SHORT,
}  # fmt: skip
"""The words that a question is asked in, by data set."""
SCORER: dict[str, str] = {"toy": "chartqa", "plain": "chartqa"}
"""Scorers of data sets whose own name is not that of one."""


def _drawn(question: Any) -> Question:
    """A question of the toy, with an image of Pillow."""
    from PIL import Image

    images = tuple(Image.fromarray(picture) for picture in question.images)
    meta = {key: [list(x) if isinstance(x, tuple) else x for x in question.meta[key]] for key in ("boxes", "tokens")}
    return Question(question.name, images, question.question, question.answers, question.kind, meta)


def digest_of(questions: Sequence[Question]) -> str:
    """What the questions are, their images' contents included."""
    return runs.digest([[q.name, q.question, list(q.answers), [_image(x) for x in q.images]] for q in questions])


def _image(image: Any) -> str:
    data = image.read_bytes() if isinstance(image, Path) else repr(image.size).encode() + image.tobytes()
    return hashlib.sha256(data).hexdigest()


def question_tokens(
    model: ic.Model, question: Question, images: Sequence[Any], answer: str | None = None, *, prompt: str = QUESTION,
    max_model_len: int | None = None, more: int = 0,
) -> ic.Tokens:  # fmt: skip
    """A question about images as one row of tokens.

    Args:
        images: to show: its own, or blind ones.
        answer: behind it; None: none.
        prompt: its words, with `{question}` in them.
        max_model_len: the longest row.
        more: tokens that will be generated behind it.

    Raises:
        TextError: a row that is too long, or what the processor does not take.
    """
    text = prompt.replace("{question}", question.question)
    if getattr(model.tokenizer, "chat_template", None) or getattr(model.processor, "chat_template", None):
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        tokens = model.chat([{"role": "user", "content": parts}], answer)
    else:
        tokens = model.tokens(text, answer, images=list(images))
    if max_model_len is not None and (length := tokens.lengths[0] + more) > max_model_len:
        raise ic.TextError(f"{length} tokens with the answer, max_model_len is {max_model_len}")
    return tokens


@dataclass(frozen=True)
class Asking:
    """How questions are put to the model.

    Attributes:
        prompt, max_model_len: as of `question_tokens`.
        max_new_tokens: how long an answer may be.
        batch_size: questions that run together.
        scorer: of answers.
        strict: the first sample that cannot be used ends the run.
    """

    prompt: str
    max_model_len: int | None
    max_new_tokens: int
    batch_size: int
    scorer: Scorer
    strict: bool


class VisualConfig(DeviceConfig):
    """A study of what a vision-language model reads off its images: which model, which questions, in which words.

    Attributes:
        model: toy:vision, a folder, or a hub id of a vision-language model.
        profile: smoke, for a look at all files within minutes, or full; they set what is not set by its flag.
        out: folder of the run; the same command goes on there (None: one below results/).
        dataset: chartqa, docvqa, vqav2, pope, plain, or toy (drawn).
        data_path: the data set's file or folder.
        images: the folder of the data set's images, where that is another.
        split: of the data set, where it has several (chartqa).
        kinds: only questions of these kinds.
        cliff_boundary: the first layer after a cliff that a causal study found.
        causal_record: where that study recorded it: its file (causal.json), or its hash.
        scorer: of answers (None: that of the data set).
        prompt: words of the question with {question} in them (None: those of the data set).
        max_new_tokens: of an answer.
        max_model_len: samples that are longer than this with their answer are left out (None: none is).
        batch_size: samples that run together; changes no number beyond rounding.
        tp_size: CUDA devices that the layers are laid over, in place of one device.
        seed: of the selection of questions, and of all that is drawn.
        strict: the first sample that cannot be used ends the run; else it is listed and left out.
    """

    model: str = TOY
    profile: Literal["smoke", "full"] = "full"
    out: Path | None = None
    dataset: Dataset | None = None
    data_path: Path | None = None
    images: Path | None = None
    split: str | None = None
    kinds: list[str] | None = None
    cliff_boundary: int | None = None
    causal_record: str | None = None
    scorer: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 16
    max_model_len: int | None = None
    batch_size: int = 8
    tp_size: int = 1
    seed: int = 0
    strict: bool = False

    def named_dataset(self) -> Dataset:
        """The data set that is given; the drawn one where nothing is said and the model is toy:vision.

        Raises:
            PlanError: a data set without a path, or a path without a data set.
        """
        if self.dataset is None and self.data_path is None and self.model == TOY:
            return "toy"
        if self.dataset is None:
            raise ic.PlanError(
                f"which questions? They are drawn for {TOY} alone, and the model is {self.model}: give --dataset "
                "(chartqa, docvqa, vqav2, pope, plain, toy) and --data_path"
            )
        if self.dataset == "toy" and self.data_path is not None:
            raise ic.PlanError("--data_path is for files: toy is drawn, leave it out")
        if self.dataset != "toy" and self.data_path is None:
            raise ic.PlanError(f"--dataset {self.dataset} needs --data_path: its file or folder")
        return self.dataset

    def sizes(self, profiles: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
        """Those that the profile sets, with what the flags set instead."""
        set_by_flags = {name: getattr(self, name) for name in profiles[self.profile]}
        return {**profiles[self.profile], **{name: size for name, size in set_by_flags.items() if size is not None}}

    def asking(self) -> Asking:
        """How questions are put.

        Raises:
            PlanError: a prompt without its place for the question, a scorer that there is not, numbers out of range.
        """
        dataset = self.named_dataset()
        prompt = PROMPTS[dataset] if self.prompt is None else self.prompt
        if prompt.count(QUESTION) != 1:
            raise ic.PlanError(f"prompt: write {QUESTION} once, where the question goes, not {prompt!r}")
        demand_at_least(max_new_tokens=(self.max_new_tokens, 1), batch_size=(self.batch_size, 1))
        if self.causal_record is not None and self.cliff_boundary is None:
            raise ic.PlanError("--causal_record says where a cliff was found; give the layer too: --cliff_boundary")
        judge = scorer(self.scorer or SCORER.get(dataset, dataset))
        return Asking(prompt, self.max_model_len, self.max_new_tokens, self.batch_size, judge, self.strict)

    def questions(self, count: int) -> Questions:
        """All questions of the data set; of the toy, as many as `count`.

        Raises:
            LoadError, PlanError: as `read_questions`; no question of a kind that is given.
        """
        dataset, kinds = self.named_dataset(), self.kinds
        if dataset == "toy":
            return Questions(
                tuple(map(_drawn, toys.vision.questions(random.Random(self.seed), count, kinds))), source=TOY
            )
        assert self.data_path is not None
        more: dict[str, Any] = {} if self.split is None else {"split": self.split}
        every = read_questions(dataset, self.data_path, images=self.images, **more)
        for kind in kinds or ():
            if kind not in every.kinds:
                raise ic.PlanError(
                    f"{self.data_path} has no questions of the kind {kind!r}. {ic.errors.nearest(kind, every.kinds)}"
                )
        return every if kinds is None else every.where(lambda question: question.kind in kinds)

    def load(self) -> ic.Model:
        """The model.

        Raises:
            PlanError: more devices than this machine has.
            CapabilityError: a model that reads no images here, and why.
        """
        model = ic.load(self.model, dtype=self.dtype, **self._placed())
        if model.processor is None:
            raise ic.CapabilityError(
                f"{self.model} reads no images here: {model.no_processor or 'it is a language model'}. Give a "
                "vision-language model with its processor's files"
            )
        return model

    def _placed(self) -> dict[str, Any]:
        if self.tp_size < 1:
            raise ic.PlanError(ic.errors.wrong("tp_size", "how many devices, 1 or more", self.tp_size))
        if self.tp_size == 1:
            return {} if self.device is None else {"device": self.device}
        if self.device is not None:
            raise ic.PlanError("give --device or --tp_size, not both")
        if (count := torch.cuda.device_count()) < self.tp_size:
            raise ic.PlanError(f"--tp_size {self.tp_size}: this machine has {count} CUDA devices")
        return balanced(range(self.tp_size))


def demand_at_least(**numbers: tuple[int, int]) -> None:
    """Refuse settings that are too small; each with the least that it may be.

    Raises:
        PlanError: naming the first.
    """
    for name, (number, least) in numbers.items():
        if number < least:
            raise ic.PlanError(f"{name} is {number}: give at least {least}")


def note_bad(bad: list[Row], sample: str, where: str, error: Exception, strict: bool) -> None:
    """Record and say that a sample is left out.

    Raises:
        PlanError: the run is strict.
    """
    if strict:
        raise ic.PlanError(f"sample {sample!r}, {where}: {error}") from error
    print(f"  left out {sample}, {where}: {error}", file=sys.stderr)
    bad.append({"sample": sample, "where": where, "reason": str(error)})


def demand_one_image(question: Question) -> None:
    """Raises:
    TextError: a question about none, or several, for which no donor is drawn.
    """
    if len(question.images) != 1:
        raise ic.TextError(f"it has {len(question.images)} images; donors are drawn for one")


def readable(questions: Sequence[Question], read: Callable[[Question], T], asking: Asking, bad: list[Row]) -> list[T]:
    """What `read` gives for each question that can be used; the others are noted in `bad`.

    Raises:
        PlanError: one cannot, and the run is strict.
    """
    values: list[T] = []
    with ic.Progress("questions", len(questions)) as told:
        for question in questions:
            try:
                values.append(read(question))
            except ic.InterpError as error:
                note_bad(bad, question.name, "reading it", error, asking.strict)
            told.add()
    return values


def stacked(rows: Sequence[ic.Tokens]) -> ic.Tokens:
    """Rows as a batch."""
    return rows[0] if len(rows) == 1 else ic.Tokens.stack(list(rows))


def each(
    told_as: str, where: str, samples: Sequence[T], name: Callable[[T], str],
    work: Callable[[Sequence[T]], Sequence[Any]], asking: Asking, bad: list[Row],
) -> dict[str, Any]:  # fmt: skip
    """What `work` gives for each sample by its name, batch by batch; a batch with a bad one is done one by one.

    Args:
        told_as: what progress calls it.
        where: what the record of a bad one calls it.
    """
    done: dict[str, Any] = {}
    with ic.Progress(told_as, len(samples)) as told:
        for start in range(0, len(samples), asking.batch_size):
            part = samples[start : start + asking.batch_size]
            # rows of a batch are one tensor: one that does not fit in memory, or cannot be read, takes all with it
            try:
                done |= {name(sample): value for sample, value in zip(part, work(part), strict=True)}
            except (ic.InterpError, torch.OutOfMemoryError):
                for sample in part:
                    try:
                        done[name(sample)] = work([sample])[0]
                    except ic.InterpError as error:
                        note_bad(bad, name(sample), where, error, asking.strict)
            told.add(len(part))
    return done
