"""What studies share: which run is changed, where values come from, and what a change is judged by.

    denoising   base: the corrupted prompt, values from the clean one
    noising     base: the clean prompt, values from the corrupted one
    share(v) = (score(base with v) - score(base)) / (score(source) - score(base))

1 is the whole difference between the prompts, 0 none of it. Without a corrupted prompt values are zero, and an effect
is the plain change of the score.

Source: Heimersheim and Nanda (2024), arXiv:2404.15255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score as scores
from interp_core import sites as S

from ._prompts import beside

UNITS = {
    "logit_diff": "logits",
    "logit": "logits",
    "logprob": "nats",
    "kl": "nats",
    "nll": "nats",
    "probability": "probability",
}
SHARE = "share of the difference"


class JudgedConfig(ic.Config):
    """What every study can be set to.

    Attributes:
        answer, other: a token id or a word per row, or one for all.
        strategy: of the sweep.
        progress: show from the beginning how much of the sweep is done.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"answer", "other"})
    answer: int | str | list[int] | list[str] | None = None
    other: int | str | list[int] | list[str] | None = None
    strategy: str = "auto"
    progress: bool = False


class ContrastConfig(JudgedConfig):
    """What studies of two prompts can be set to.

    Attributes:
        corrupted: the other prompt, or one per row, with as many tokens; without one, what is chosen is set to zero.
        direction: "denoising" puts clean values into the corrupted run, "noising" corrupted ones into the clean run.
        score: "logit_diff" of answer and other, "logit", "logprob" or "probability" of the answer, or an `ic.score` of
            your own (None: logit_diff with a corrupted prompt, else logprob).
        answer, other: a token id or a word per row, or one for all (None: what the model says to the clean and to the
            corrupted prompt).
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"answer", "other", "corrupted"})
    corrupted: Any = None
    direction: Literal["denoising", "noising"] = "denoising"
    score: Literal["logit_diff", "logit", "logprob", "probability"] | scores.Score | None = None


@dataclass(frozen=True)
class Contrast:
    """Two runs and what they are judged by.

    Attributes:
        base: the run that is changed.
        source: the run that gives the values; None: zeros.
        judged: the score.
        low, high: scores of base and source `[batch]`; equal without a source.
        answer, other: token ids `[batch]`; None with a score of the user's own.
        kind: "denoising", "noising" or "zero".
    """

    base: ic.Run
    source: ic.Run | None
    judged: scores.Score
    low: Float[Tensor, " batch"]
    high: Float[Tensor, " batch"]
    answer: Tensor | None
    other: Tensor | None
    kind: str

    def share(self, effects: Float[Tensor, "*any batch"]) -> Float[Tensor, "*any batch"]:
        """Changes of the score as a share of the difference; as they are without a source."""
        return effects if self.source is None else effects / (self.high - self.low).to(effects)

    def named(self) -> dict[str, Any]:
        """The fields of a result that tell what was compared."""
        unit = SHARE if self.source is not None else UNITS.get(self.judged.name, self.judged.name)
        ids = [token for row in (self.answer, self.other) if row is not None for token in row.tolist()]
        return {
            "base": self.low, "source": self.high, "answer": self.answer, "other": self.other, "kind": self.kind,
            "score": self.judged.name, "unit": unit, "vocab": {str(i): self.base.model.word(i) for i in ids},
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Contrasted(ic.Result):
    """What results of two prompts say of them.

    Attributes:
        source: scores of the run that values come from (of zeros: those of the base).
        answer, other: token ids; None with a score of the user's own.
        vocab: text of these ids.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"source": ("batch",), "answer": ("batch",), "other": ("batch",)}
    JOINS: ClassVar[Mapping[str, str]] = {"vocab": "union"}
    _: KW_ONLY
    source: Float[Tensor, " batch"]
    answer: Tensor | None
    other: Tensor | None
    vocab: dict[str, str] = field(default_factory=dict)

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Prompts beside the corrupted ones, with the answer and its rival."""
        rows = super().prompt_rows()
        record = self.provenance or {"settings": {}}
        twin = record["settings"].get("corrupted")
        twins = [twin] * len(rows) if isinstance(twin, str) else twin if isinstance(twin, list) else []
        columns = {"corrupted": twins, "answer": self._words(self.answer), "rival": self._words(self.other)}
        if self.other is not None and self.answer is not None and self.other.equal(self.answer):
            columns["rival"] = []
        return beside(rows, columns)

    def _words(self, ids: Tensor | None) -> list[str]:
        return [] if ids is None else [repr(self.vocab.get(str(token), token)) for token in ids.tolist()]


def contrast(
    owner: str,
    model: ic.Model,
    tokens: ic.Tokens,
    config: ContrastConfig,
    here: Sequence[S.Site] = (),
    there: Sequence[S.Site] = (),
) -> Contrast:
    """The two runs of a study; two forward passes, one without a corrupted prompt.

    Args:
        here, there: sites to read in the base and in the source run.

    Raises:
        PlanError: prompts of different lengths, the same answer to both, equal scores, or a score that needs more.
    """
    twin = None if config.corrupted is None else _twin(owner, model, tokens, config.corrupted)
    noising = twin is None or config.direction == "noising"
    score = config.score.on(model, len(tokens)) if isinstance(config.score, scores.Score) else None
    if score is not None and score.needs_clean:
        raise ic.PlanError(f"{owner}: score {score.name} compares with the run without edits; method ablations has it")
    answer, other = (answers(owner, model, words, len(tokens)) for words in (config.answer, config.other))
    score_sites = () if score is None or score.of is None else (score.of,)
    # a score of a site needs no logits; one of the user's own says at which positions it takes them
    kept = False if score_sites else -1 if score is None else score.at
    clean = model.run(tokens, read=(*(here if noising else there), *score_sites), logits=kept)
    dirty = clean if twin is None else model.run(twin, read=(*(there if noising else here), *score_sites), logits=kept)
    if score is None:
        answer = said(clean) if answer is None else answer
        other = answer if twin is None else said(dirty) if other is None else other
    name = str(config.score or ("logprob" if twin is None else "logit_diff"))
    judged = score or _judged(owner, model, name, answer, other)
    base, source = (clean, dirty) if noising else (dirty, clean)
    low, high = scored(owner, base, judged), scored(owner, source, judged)
    if twin is not None and bool((low == high).any()):
        row = int((low == high).nonzero()[0])
        raise ic.PlanError(
            f"{owner}: both prompts of row {row} have the {judged.name} {float(low[row]):.4g}: there is no difference "
            "to explain; give prompts or answers that differ"
        )
    kind = "zero" if twin is None else config.direction
    said_of = (None, None) if score else (answer, other)
    return Contrast(base, None if twin is None else source, judged, low, high, *said_of, kind)


def _judged(owner: str, model: ic.Model, name: str, answer: Any, other: Any) -> scores.Score:
    if name != "logit_diff":
        score: scores.Score = getattr(scores, name)(answer)
        return score
    if bool((answer == other).any()):
        row = int((answer == other).nonzero()[0])
        raise ic.PlanError(
            f"{owner}: row {row} has the answer {model.word(int(answer[row]))!r} for both prompts; "
            "give answer=[…] and other=[…], or prompts that differ"
        )
    return scores.logit_diff(answer, other)


def said(run: ic.Run) -> Tensor:
    """Ids of what the model says at the end `[batch]`."""
    return run.logits.plain.argmax(-1).cpu()


def answers(owner: str, model: ic.Model, words: Any, rows: int) -> Tensor | None:
    """Ids of the answers that are given `[batch]`.

    Raises:
        PlanError: another number of answers than rows, a word of several tokens, an id that does not exist.
    """
    return None if words is None else scores.token_ids(model, words, rows, owner, "answer")


def scored(owner: str, run: ic.Run, judged: scores.Score) -> Float[Tensor, " batch"]:
    """A run's score in the precision of sweeps, whatever the model's.

    Raises:
        PlanError: a score of spans that differ in length.
    """
    value = (run.logits if judged.of is None else run[judged.of]).plain
    if judged.span and value.ndim != 3:
        raise ic.PlanError(f"{owner}: score {judged.name}: the rows' spans differ in length; run them one by one")
    return judged.rows(value.to(torch.promote_types(value.dtype, torch.float32))).detach().cpu()


def _twin(owner: str, model: ic.Model, tokens: ic.Tokens, corrupted: Any) -> ic.Tokens:
    """The corrupted prompts, one per row."""
    other = corrupted if isinstance(corrupted, ic.Tokens) else model.tokens(corrupted)
    if len(other) == 1 and len(tokens) > 1:
        other = ic.Tokens.stack([other] * len(tokens))
    if other.lengths != tokens.lengths:
        raise ic.PlanError(
            f"{owner}: the prompts have {tokens.lengths} tokens, the corrupted ones {other.lengths}; "
            "positions must mean the same in both"
        )
    return replace(other, spans={**tokens.spans, **other.spans})  # names mean the same tokens in both
