"""Ablations: what a part of a model does, seen by what is lost without it.

    effect(v) = score(text with v := r) - score(text)

    zero        r = 0
    mean        r = mean of v over reference prompts, at the same position or over all their tokens
    resample    r = v of one reference prompt at the same position; mean and spread over draws of the prompt

v runs over layers, heads and positions of a site, or over whole layers. Zero takes away also what v always says, the
mean leaves that; a resampled value is one that the model really has.

Source: zero: Michel et al. (2019), arXiv:1905.10650; mean: Wang et al. (2022), arXiv:2211.00593; resample: Chan et al.
(2022), "Causal Scrubbing"; the three compared: Zhang and Nanda (2023), arXiv:2309.16042.

Cost: that of the sweep over v (times draws), and one forward pass over the reference prompts.
Must equal: one full forward pass per v and draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score as scores
from interp_core import sites as S

from ._contrast import UNITS, answers, said
from ._maps import Grid, MapConfig, MapResult, Values, grid_of, named, patches, swept, values
from ._pictures import Picture
from ._prompts import beside

CHUNK = 16
"""Reference prompts that are run together."""


class AblationConfig(MapConfig):
    """Settings of ablations.

    Attributes:
        kind: what takes the place of v: "zero", "mean" or "resample".
        reference: prompts whose values do, for mean and resample.
        over: of the mean: values at the same "position" of each reference prompt, or at "all" their tokens.
        draws: of resample: how many reference prompts to draw (None: each of them once).
        seed: of the draws.
        score: "logprob", "logit" or "probability" of the answer, "logit_diff" of answer and other, "kl" to the run
            without edits, "nll" of a span, or an `ic.score` of your own.
        span: whose negative log-likelihood "nll" is.
        answer: a token id or a word per row, or one for all (None: what the model says).
        other: the same, for logit_diff.
    """

    kind: Literal["zero", "mean", "resample"] = "zero"
    reference: Any = None
    over: Literal["position", "all"] = "position"
    draws: int | None = None
    seed: int = 0
    score: Literal["logprob", "logit", "probability", "logit_diff", "kl", "nll"] | scores.Score = "logprob"
    span: str = "target"


@dataclass(frozen=True, eq=False)
class AblationResult(MapResult):
    """Effects of ablations.

    Attributes:
        spread: standard deviation over draws; None of fewer than two.
        draws: over how many `effect` is the mean.
        answer: the words that the score is about, per prompt; "" where it is about none.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {**MapResult.AXES, "spread": ("batch", "layer", "head", "pos")}
    JOINS: ClassVar[Mapping[str, str]] = {**MapResult.JOINS, "answer": "rows"}
    spread: Float[Tensor, "batch layer head pos"] | None
    draws: int
    answer: tuple[str, ...] = ()

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Prompts with the answers that are judged."""
        return beside(super().prompt_rows(), {"answer": [word or None for word in self.answer]})

    def table(self) -> list[dict[str, Any]]:
        """One row per patch, averaged over batch rows, with the spread over draws if there is one."""
        rows = super().table()
        spread = [] if self.spread is None else self.spread.mean(0).flatten().tolist()
        return [row | {"spread": value} for row, value in zip(rows, spread, strict=True)] if spread else rows

    def pictures(self) -> list[Picture]:
        """The effects, and their spread over draws if there is one."""
        first = super().pictures()
        if self.spread is None:
            return first
        beside = Picture(
            f"standard deviation over {self.draws} draws", self._folded(self.spread).tolist(), *first[0][2:4]
        )
        return [*first, beside]


class Ablations(ic.Method):
    """What is lost without a head or a layer: set to zero, to its mean, or to its value on other prompts."""

    name = "ablations"
    Config = AblationConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: AblationConfig) -> None:
        """Sites, layers and positions that all prompts have."""
        grid_of(self.name, model, tokens, config)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: AblationConfig) -> AblationResult:
        """Read the reference prompts, sweep over what is ablated."""
        grid = grid_of(self.name, model, tokens, config)
        reference = self._reference(model, grid, config)
        judged = self._judged(model, tokens, config)
        draws = list(self._replacements(model, reference, grid, config, len(tokens)))
        edits = [edits for replacements in draws for edits in patches(grid, replacements)]
        sweep = swept(model, tokens, edits, judged, config)
        effects = torch.stack([grid.shaped(part) for part in sweep.effects.chunk(len(draws))])
        return AblationResult(
            effect=effects.mean(0), base=sweep.clean, kind=f"{config.kind} ablation", score=judged.name,
            unit=UNITS.get(judged.name, judged.name), explain=sweep.plan.explain(), draws=len(draws),
            spread=effects.std(0) if len(draws) > 1 else None, **named(grid),
            answer=_words(model, judged, len(tokens)),
        )  # fmt: skip

    def _reference(self, model: ic.Model, grid: Grid, config: AblationConfig) -> ic.Tokens | None:
        """The reference prompts; of resample, those that are drawn."""
        if (config.kind == "zero") != (config.reference is None):
            wants = "takes no" if config.kind == "zero" else "needs"
            raise ic.PlanError(f"ablations: kind={config.kind!r} {wants} reference=[…] prompts")
        if config.reference is None:
            return None
        prompts = config.reference if isinstance(config.reference, ic.Tokens) else model.tokens(config.reference)
        attention = any("query" in site.info.axes for site in grid.sites)
        if attention and (config.over == "all" or prompts.padded):
            raise ic.PlanError("ablations: attention has a mean by position only, over prompts of one length")
        if config.kind == "mean":
            return prompts
        draws = len(prompts) if config.draws is None else config.draws
        if not 1 <= draws <= len(prompts):
            raise ic.PlanError(f"ablations: {draws} draws of {len(prompts)} reference prompts; give more prompts")
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed))
        return ic.Tokens.stack([prompts.row(int(row)) for row in order[:draws]])

    def _judged(self, model: ic.Model, tokens: ic.Tokens, config: AblationConfig) -> scores.Score:
        if isinstance(config.score, scores.Score):
            return config.score.on(model, len(tokens))
        if config.score == "kl":
            return scores.kl()
        if config.score == "nll":
            return scores.nll(tokens, config.span)
        if config.score == "logit_diff" and config.other is None:
            raise ic.PlanError("ablations: score='logit_diff' needs other=[…], the answer to compare with")
        answer, other = (answers(self.name, model, words, len(tokens)) for words in (config.answer, config.other))
        answer = said(model.run(tokens, logits=-1)) if answer is None else answer
        if config.score == "logit_diff":
            assert other is not None
            return scores.logit_diff(answer, other)
        score: scores.Score = getattr(scores, config.score)(answer)
        return score

    def _replacements(
        self, model: ic.Model, reference: ic.Tokens | None, grid: Grid, config: AblationConfig, rows: int
    ) -> Iterator[Values | None]:
        """What takes the place of v in so many rows, once per draw."""
        if reference is None:
            yield None
        elif config.kind == "mean" and config.over == "all":
            yield _mean_of_tokens(model, reference, grid)
        else:
            parts = [_at_places(model, part, grid) for part in _chunks(reference)]
            joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            drawn = [slice(None)] if config.kind == "mean" else [slice(row, row + 1) for row in range(len(reference))]
            for part in drawn:  # with an axis for rows: without, positions could be taken for them
                yield {key: value[part].mean(0).expand(rows, *value.shape[1:]) for key, value in joined.items()}


def _words(model: ic.Model, judged: scores.Score, rows: int) -> tuple[str, ...]:
    """The tokens that a score is about, of each row; "" of a score of spans or without targets."""
    targets = [torch.as_tensor(target).expand(rows) for target in judged.targets if not isinstance(target, tuple)]
    if judged.span or not targets:
        return ("",) * rows
    return tuple(" - ".join(repr(model.word(token)) for token in row) for row in torch.stack(targets, 1).tolist())


def _chunks(tokens: ic.Tokens) -> Iterator[ic.Tokens]:
    for start in range(0, len(tokens), CHUNK):
        yield ic.Tokens.stack([tokens.row(row) for row in range(start, min(start + CHUNK, len(tokens)))])


def _at_places(model: ic.Model, tokens: ic.Tokens, grid: Grid) -> Values:
    try:
        return values(model.run(tokens, read=grid.reads, logits=False), grid)
    except ic.PositionError as error:
        raise ic.PositionError(
            f"ablations: a reference prompt lacks a position ({error}); give prompts of the same form, or over='all'"
        ) from error


def _mean_of_tokens(model: ic.Model, tokens: ic.Tokens, grid: Grid) -> Values:
    """Means over all tokens of all prompts, the same for every place."""
    sites = [site[layer] for site in grid.sites for layer in grid.layers]
    sums: dict[S.Site, Tensor] = {}
    for part in _chunks(tokens):
        run = model.run(part, read=sites, logits=False)
        for site in sites:
            value = run[site].plain
            # padding has values like any token, and is none
            real = value[part.mask.to(value.device)]
            sums[site] = sums.get(site, 0) + real.sum(0, dtype=torch.promote_types(real.dtype, torch.float32))
    count = int(tokens.mask.sum())
    return {
        (site.name, layer, place): (sums[site[layer]] / count).to(model.dtype)
        for site in grid.sites
        for layer in grid.layers
        for place in range(len(grid.places))
    }
