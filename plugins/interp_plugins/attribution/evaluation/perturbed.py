"""How likely a target stays when tokens of the prompt are replaced: the one thing that all deletion metrics ask.

    log p(gone)     Σ over scored target tokens of log p(token | everything before it, the tokens in `gone` replaced)
    odds(gone)      the same sum of log p - log (1 - p), the 1 - p from all other tokens' logits, so that it is exact
                    where p is near 1

The unperturbed text and every set of deleted tokens run once, whoever asks for them: vectors with one ordering, the
ends of all curves, tie orders that change nothing. Only positions that predict a scored token reach the unembedding.
What stands before the first deleted token is not taken from a key/value cache: deletion soon reaches the prompt's
beginning (with 20 steps of 512 tokens in random order, 0.3 % of the positions would be saved).

Cost: a forward pass per different text, several at a time within a budget of tokens and of logits.
Must equal: one whole forward pass per text, and its log-softmax (float32 rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic

from .orders import checked_count

TOKENS = {"cpu": 1024}
"""Tokens of all rows of one pass, by kind of device: more than a processor's caches hold makes passes slower."""
TOKENS_ELSEWHERE = 16_384
LOGITS = 2**28
"""Bytes of one pass's logits."""


@dataclass(frozen=True)
class Cost:
    """What was run.

    Attributes:
        asked: perturbed texts that the metrics asked for.
        passes: texts that ran, each counted as a forward pass.
        batches: calls of the model.
        logits: positions whose logits were computed.
    """

    asked: int = 0
    passes: int = 0
    batches: int = 0
    logits: int = 0

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Places(NamedTuple):
    """Where things stand in one row, in absolute positions."""

    prompt: list[int]
    target: range
    scored: list[int]


class Perturbed:
    """One text, and its scores under deletions.

    Attributes:
        model, tokens: the text, one row without padding.
        places: its prompt, target and scored tokens.
        replace_id: the id that stands for a deleted token.
        cost: what has run so far.
    """

    def __init__(
        self,
        model: ic.Model,
        tokens: ic.Tokens,
        *,
        replace_id: int | None = None,
        scored: Any = "target",
        odds: bool = False,
        tokens_at_once: int | None = None,
    ) -> None:
        """A text with the spans `prompt` and `target`.

        Args:
            replace_id: None: the tokenizer's or the model's end of text, as the reference has it.
            scored: a position (as `Site.at` takes it) of target tokens: those whose probability counts; a name such as
                "sink", or the whole target.
            odds: also keep log-odds.
            tokens_at_once: of all rows of one pass (default: by the kind of device).

        Raises:
            PlanError, PositionError: no such spans, more than a row, no token to replace with.
        """
        self.model, self.tokens = model, single(tokens)
        rows_at_once(model, self.tokens, 1, tokens_at_once)  # refuses it now, not when it first runs
        self.places = places_of(self.tokens, scored)
        self.replace_id = replacement(model, replace_id)
        self.odds, self.tokens_at_once, self.cost = odds, tokens_at_once, Cost()
        self._known: dict[bytes, Float[Tensor, " kind"]] = {}

    @property
    def size(self) -> int:
        """Number of prompt tokens."""
        return len(self.places.prompt)

    def log_prob(self, gone: Bool[Tensor, "text prompt"]) -> Float[Tensor, " text"]:
        """Summed log-probability of the scored tokens, with these prompt tokens replaced, in float64."""
        return self._scores(gone)[:, 0]

    def log_odds(self, gone: Bool[Tensor, "text prompt"]) -> Float[Tensor, " text"]:
        """Summed log-odds of the scored tokens, with these prompt tokens replaced, in float64."""
        if not self.odds:
            raise ic.PlanError("Perturbed keeps no log-odds; make it with odds=True")
        return self._scores(gone)[:, 1]

    def _scores(self, gone: Bool[Tensor, "text prompt"]) -> Float[Tensor, "text kind"]:
        if gone.ndim != 2 or gone.shape[1] != self.size or gone.dtype != torch.bool:
            raise ic.PlanError(
                f"deleted tokens are a boolean [text, {self.size}], one column per prompt token, not {gone.dtype} "
                f"{list(gone.shape)}"
            )
        # the set of deleted tokens itself is the key: vectors, curves and tie orders share what they have in common
        keys = [row.numpy().tobytes() for row in gone.cpu()]
        missing = {key: row for key, row in zip(keys, gone.cpu(), strict=True) if key not in self._known}
        self.cost = replace(self.cost, asked=self.cost.asked + len(keys))
        rows = list(missing.items())
        size = rows_at_once(self.model, self.tokens, len(self.places.scored), self.tokens_at_once)
        with ic.Progress("perturbed texts", len(rows)) as progress:
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]
                scores = self._run(torch.stack([row for _, row in batch]))
                self._known |= {key: score for (key, _), score in zip(batch, scores, strict=True)}
                progress.add(len(batch))
        return torch.stack([self._known[key] for key in keys])

    def _run(self, gone: Bool[Tensor, "text prompt"]) -> Float[Tensor, "text kind"]:
        """One pass of several perturbed texts."""
        ids = self.tokens.ids.repeat(len(gone), 1)
        ids[:, self.places.prompt] = ids[:, self.places.prompt].masked_fill(gone, self.replace_id)
        logits = predicting(self.model, repeated(self.tokens, ids), self.places)
        count = len(gone), len(self.places.scored)
        self.cost = Cost(
            self.cost.asked, self.cost.passes + count[0], self.cost.batches + 1, self.cost.logits + count[0] * count[1]
        )
        wanted = self.tokens.ids[0, self.places.scored].to(logits.device)
        kinds = (log_probs, log_odds) if self.odds else (log_probs,)
        return torch.stack([torch.stack([kind(row, wanted).sum() for kind in kinds]) for row in logits]).cpu()


def single(tokens: ic.Tokens) -> ic.Tokens:
    """One row without its padding.

    Raises:
        PlanError: several rows.
    """
    if not isinstance(tokens, ic.Tokens) or len(tokens) != 1:
        what = f"{len(tokens)} rows" if isinstance(tokens, ic.Tokens) else type(tokens).__name__
        raise ic.PlanError(f"faithfulness is that of one text, not of {what}; go through a batch: for row in tokens")
    return tokens.row(0) if tokens.padded else tokens


def places_of(tokens: ic.Tokens, scored: Any = "target") -> Places:
    """Where prompt, target and scored tokens stand.

    Raises:
        PlanError: a span is missing or empty, or the target does not follow the prompt.
        PositionError: no such position.
    """
    for name in ("prompt", "target"):
        if name not in tokens.spans:
            has = ", ".join(tokens.spans) or "none"
            raise ic.PlanError(
                f"the text has no span {name!r} (it has: {has}); make it with model.tokens(prompt, target=…), or name "
                f"the span: tokens.name({name}=ic.Span(…))"
            )
    prompt, target = tokens.columns("prompt")[0], tokens.columns("target")[0]
    if not prompt or not target or target != list(range(target[0], target[-1] + 1)) or prompt[-1] >= target[0]:
        raise ic.PlanError(
            f"the prompt ({len(prompt)} tokens) must come before the target ({len(target)} tokens, in one piece), and "
            "both must have tokens"
        )
    chosen = tokens.columns(scored)[0]
    outside = [column for column in chosen if column not in range(target[0], target[-1] + 1)]
    if not chosen or outside:
        what = f"token {outside[0]}, which is not in it" if outside else "none of them"
        raise ic.PlanError(f"scored={scored!r} takes target tokens ({target[0]}:{target[-1] + 1}), and selects {what}")
    return Places(prompt, range(target[0], target[-1] + 1), chosen)


def replacement(model: ic.Model, replace_id: int | None) -> int:
    """The id that stands for a deleted token.

    Raises:
        PlanError: no token of the model, or none known.
    """
    if replace_id is None:
        eos = getattr(model.tokenizer, "eos_token_id", None)
        eos = model.hf.config.get_text_config().eos_token_id if eos is None else eos
        replace_id = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
        if replace_id is None:
            raise ic.PlanError("neither the tokenizer nor the model has an end-of-text token; give replace_id=")
    if isinstance(replace_id, bool) or not isinstance(replace_id, int) or not 0 <= replace_id < model.d_vocab:
        raise ic.PlanError(ic.errors.wrong("replace_id=", f"a token id, 0 to {model.d_vocab - 1}", replace_id))
    return replace_id


def rows_at_once(model: ic.Model, tokens: ic.Tokens, scored: int, tokens_at_once: int | None) -> int:
    """How many variants of a text go into one pass: within the budget of tokens, and of logits.

    Raises:
        PlanError: no such budget.
    """
    if tokens_at_once is None:
        tokens_at_once = TOKENS.get(model.device.type, TOKENS_ELSEWHERE)
    checked_count("tokens_at_once=", tokens_at_once, 1)
    if tokens.inputs:
        # images go with one row, and are not repeated for others (`repeated`)
        return 1
    row = scored * model.d_vocab * model.dtype.itemsize
    return max(1, min(tokens_at_once // tokens.ids.shape[1], LOGITS // row))


def repeated(tokens: ic.Tokens, ids: Int[Tensor, "batch pos"]) -> ic.Tokens:
    """Rows laid out as one text is, with other ids."""
    if tokens.inputs:
        return replace(tokens, ids=ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return ic.Tokens(ids, mask, labels=tokens.labels * len(ids))


def predicting(
    model: ic.Model, tokens: ic.Tokens, places: Places, edits: Sequence[ic.Edit] = ()
) -> Float[Tensor, "batch target vocab"]:
    """Logits at the positions that predict the scored tokens, and at no others."""
    before = [position - 1 for position in places.scored]
    run = model.run(tokens, edits=edits, logits=before, allow_noop=True)
    return run.logits.plain


def log_probs(logits: Float[Tensor, "pos vocab"], ids: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    """Log-probabilities of tokens, in float32 at least, given in float64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    return chosen.double() - logits.logsumexp(-1).double()


def log_odds(logits: Float[Tensor, "pos vocab"], ids: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    """Log p - log (1 - p) of tokens: their logit minus the logsumexp of all others."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, ids[:, None])
    # 1 - p by subtraction has no digits left where p is near 1
    others = logits.scatter(-1, ids[:, None], -torch.inf)
    return chosen[:, 0].double() - others.logsumexp(-1).double()
