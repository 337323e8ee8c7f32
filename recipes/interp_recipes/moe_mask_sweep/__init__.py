"""Masks of experts, more and more of them: what the best of a points file do, beside the worst and beside chance.

    interp run moe_mask_sweep --model_path M --points last_token_agentic_minus_assisted_points.json
        --pair_tokens_json pair_tokens.json --out_dir O --sizes 15,20,25 --mode replace_topk

bans the first N points for every N of `sizes`, in their order, in the reverse order, and in random orders that ban as
many experts in every layer; and writes

    figures/mask_sweep/nll_{all,last}_{agentic,assisted}_{mode}.png    rise of the NLL against N, with bands
    figures/mask_sweep/score_{agentic,assisted}_{mode}.png             of a scorer, if one is given
    figures/mask_sweep/points.png              the points by layer and expert
    tables/mask_sweep.csv, mask_sweep.json     a row per mode, order and N; skipped ones with the reason
    tables/mask_sweep_areas.csv                area between the descending order and the others
    tables/mask_sweep_samples.jsonl            a row per sample, context and mask
    tables/mask_sweep_usage.json               by which usage_random draws
    mask_sweep_report.html                     all of it as a page

Modes, scopes, orders and statistics: docs/moe_mask_sweep.md. The same command goes on where it was stopped.

Source: Geuan666/XAI4Agent (2026), whose masks have no effect on transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES
from interp_plugins.pairs.routing import routed_targets
from interp_plugins.router.point_files import read_points
from interp_plugins.router.points import Points, Shape
from interp_plugins.router.usage import Usage

import interp_core as ic
from interp_core import runs

from .config import MoeMaskSweepConfig
from .findings import Findings
from .measures import Row, edits_of, measured, positions_of
from .orders import Variant, orders, variants
from .report import write
from .scores import Scorer, answered

SAMPLES, USAGE = "tables/mask_sweep_samples.jsonl", "tables/mask_sweep_usage.json"


def moe_mask_sweep(config: MoeMaskSweepConfig) -> Path:
    """Ban more and more experts and measure both contexts; returns the page's path.

    Raises:
        CapabilityError: a dense model.
        PlanError: points of another model, layer or number of experts, none at all; settings out of range; no mask that
            could be run. All before the model runs.
        LoadError: points or pairs that cannot be read, naming the field.
    """
    config.check()
    scorer = config.judge()
    pairs, dropped = config.read(config.pair_tokens_json)
    places = {pair.name: [positions_of(pair, side, config.scope, config.segment) for side in SIDES] for pair in pairs}
    model = config.load()
    points, masks = _masks(config, model)
    pairs = _that_fit(config, model, pairs, dropped)
    super_experts, sizes = config.supers(points), config.numbers(points)
    with _opened(config, model, pairs, points) as run:
        usage = run.stage(USAGE, lambda: _usage(model, pairs)) if "usage_random" in config.kinds else None
        banned, names = masks(usage), [pair.name for pair in pairs]
        at = [places[name] for name in names]
        rows = Work(run, model, pairs, at, banned, scorer, config.max_new_tokens).rows()
        findings = Findings(banned, names, rows, sizes, config.kinds, config.modes, config.seed, config.resamples)
        facts = {"statistic": points.statistic, "dropped": dropped, "super_experts": super_experts}
        return write(run, model, findings, points, config.facts | facts)


Masks = Callable[[list[list[float]] | None], list[Variant]]
"""All masks, by the usage of experts."""


def _masks(config: MoeMaskSweepConfig, model: ic.Model) -> tuple[Points, Masks]:
    """The points, and what makes masks of them.

    Raises:
        CapabilityError, PlanError, LoadError: as the recipe; a scorer of text without a tokenizer; masks of which the
            guard leaves out every one (how many experts a random order bans in a layer does not depend on its draw).
    """
    shape = Shape.of(model)
    points = read_points(config.points, shape, layer_index=config.layer_index)
    sizes = config.numbers(points)
    if config.scorer is not None and model.tokenizer is None:
        raise ic.TextError("a scorer reads text: load the model with its tokenizer, or leave --scorer out")

    def masks(usage: list[list[float]] | None) -> list[Variant]:
        drawn = orders(points, shape, config.kinds, config.random_orders, config.seed, usage)
        return variants(drawn, config.modes, sizes, shape)

    drafts = masks(None)
    if all(variant.skipped for variant in drafts):
        raise ic.PlanError(f"no mask can be run: {drafts[0].skipped}; give smaller sizes, or mode keep or drop")
    return points, masks


def _opened(config: MoeMaskSweepConfig, model: ic.Model, pairs: Sequence[Pair], points: Points) -> runs.RunFolder:
    """The run's folder; intervals may be worked out with other resamples the next time."""
    resolved = config.identity | {
        "points": [[p.layer, p.expert] for p in points.points], "sizes": config.numbers(points),
        "pairs": runs.digest([pair.record() for pair in pairs]),
    }  # fmt: skip
    dataset = config.pair_tokens_json.stem
    return runs.open(
        config.out_dir, resolved, recipe="moe_mask_sweep", model=model, dataset=dataset, free=("resamples",)
    )


@dataclass(frozen=True)
class Context:
    """One of a sample's two contexts.

    Attributes:
        number: among all.
        at: where it is masked; None: everywhere.
    """

    number: int
    pair: Pair
    side: Literal["agentic", "assisted"]
    at: list[int] | None


@dataclass(frozen=True)
class Work:
    """All masks on all contexts.

    Attributes:
        run: where rows go.
        model: that is masked.
        pairs: the samples.
        places: of each sample and context, where it is masked; None: everywhere.
        variants: the masks, skipped ones among them.
        scorer: of what the masked model writes; None: it writes nothing.
        max_new_tokens: of what it writes.
    """

    run: runs.RunFolder
    model: ic.Model
    pairs: Sequence[Pair]
    places: Sequence[Sequence[list[int] | None]]
    variants: Sequence[Variant]
    scorer: Scorer | None
    max_new_tokens: int | None

    def rows(self) -> list[Row]:
        """A row per sample, context and mask: those of a run before, and those that are measured now. Masks that ban
        the same experts are run once."""
        every = (self.variants[0].clean, *self.variants)
        masks = list({variant.key: variant for variant in every if not variant.skipped}.values())
        contexts = [
            Context(number, pair, side, at)
            for number, (pair, side, at) in enumerate(
                (pair, side, at)
                for pair, ats in zip(self.pairs, self.places, strict=True)
                for side, at in zip(SIDES, ats, strict=True)
            )
        ]
        return self.run.map(
            SAMPLES, lambda context: self._rows(context, masks), contexts,
            by=lambda context: f"{context.pair.name} {context.side}", strict=True,
        )  # fmt: skip

    def _rows(self, context: Context, masks: Sequence[Variant]) -> list[Row]:
        """A context's rows; the first context's masks run as passes of their own, too, which its sweep must equal."""
        pair, side = context.pair, context.side
        measures = measured(self.model, pair, side, masks, context.at, check=context.number == 0)
        return [row | self._score(pair, side, mask) for mask, row in zip(masks, measures, strict=True)]

    def _score(self, pair: Pair, side: Literal["agentic", "assisted"], mask: Variant) -> dict[str, Any]:
        if self.scorer is None:
            return {}
        answer = answered(self.model, pair, side, edits_of(mask), self.max_new_tokens)
        score = float(self.scorer(answer))
        if not np.isfinite(score):
            raise ic.PlanError(f"the scorer gives {score} for sample {pair.name!r}, {side}; a score is a finite number")
        return {"score": score, "text": answer.text}


def _usage(model: ic.Model, pairs: Sequence[Pair]) -> list[list[float]]:
    """Share of the selections of all targets, both contexts, `[layer expert]`."""
    usage = Usage()
    contexts = [(pair, side) for pair in pairs for side in SIDES]
    with ic.Progress("usage of experts, contexts", len(contexts)) as told:
        for pair, side in contexts:
            usage.add(routed_targets(model, pair, side))
            told.add()
    shares: list[list[float]] = usage.matrix("count").tolist()
    return shares


def _that_fit(
    config: MoeMaskSweepConfig, model: ic.Model, pairs: Sequence[Pair], dropped: list[dict[str, str]]
) -> list[Pair]:
    """The samples whose contexts the model can read; the others are noted.

    Raises:
        TextError: there are none, or the run is strict and one is not.
    """
    fitting = []
    for pair in pairs:
        side = ""
        try:
            for side in SIDES:
                tokens = pair.tokens(side)
                model.tokens({"input_ids": tokens.ids, "attention_mask": tokens.mask.long()})
        except ic.TextError as error:
            config.leave_out(dropped, pair.name, ic.TextError(f"sample {pair.name!r}, {side}: {error}"))
        else:
            fitting.append(pair)
    if not fitting:
        path = config.pair_tokens_json
        raise ic.TextError(f"{path}: no sample fits the model; the first: {dropped[0]['reason']}")
    return fitting
