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
from interp_plugins.pairs import Pair, read_pairs
from interp_plugins.pairs.pair import SIDES, Layout
from interp_plugins.pairs.routing import routed_targets
from interp_plugins.router.points import LayerIndex, Points, Shape, read_points
from interp_plugins.router.usage import Usage

import interp_core as ic
from interp_core import runs

from .mask_findings import Findings
from .mask_orders import Variant, orders, variants
from .mask_report import write
from .mask_runs import Row, Scope, edits_of, measured, positions_of, row_key
from .mask_scores import Scorer, answered
from .mask_settings import Settings

SAMPLES, USAGE = "tables/mask_sweep_samples.jsonl", "tables/mask_sweep_usage.json"


def moe_mask_sweep(
    model_path: str, points: Path, pair_tokens_json: Path, out_dir: Path | None = None,
    sizes: list[int] | str | None = None, mode: list[str] | str = "replace",
    order: list[str] | str = "descending,reversed,random,usage_random", random_orders: int = 5, scope: Scope = "all",
    segment: list[int] | None = None, layout: Layout | None = None, layer_index: LayerIndex | None = None,
    super_experts: Path | None = None, scorer: str | None = None, problems: Path | None = None,
    execute_code: bool = False, code_seconds: float = 10.0, code_megabytes: int = 1024,
    max_new_tokens: int | None = None, max_samples: int | None = None, seed: int = 0, resamples: int = 2000,
    device: str | None = None, dtype: str | None = None, strict: bool = False,
) -> Path:  # fmt: skip
    """Ban more and more experts and measure both contexts; returns the page's path.

    Args:
        model_path: a mixture of experts: toy:moe, a folder, or a hub id.
        points: ranked cells, as `moe_experts` writes them, or the original scripts.
        pair_tokens_json: pairs of contexts that share a target, as docs/moe_pairs.md has them.
        out_dir: folder of the run (None: results/{model}/{dataset}/{timestamp}-moe_mask_sweep-{hash}).
        sizes: how many cells to ban, as 15,20,25 (None: 15 to 100 in steps of 5, as far as there are points).
        mode: replace (others take the slots), keep (the rest of the set, rescaled), drop (not rescaled); also
            replace_topk, keep_topk; several by commas.
        order: descending, reversed, random, usage_random; several by commas.
        random_orders: of each random kind.
        scope: where experts are banned: all tokens, the targets, the positions that predict them, or a segment.
        segment: start and stop of the segment, counted over the context's tokens.
        layout: packed or padded, of the assisted context (None: as the file has it).
        layer_index: how an old points file counts layers, where the model has dense ones: decoder or router.
        super_experts: a JSON list of [layer, expert]; points that are among them are warned of.
        scorer: exact_match, code, or module:function; see `interp_recipes.mask_scores`.
        problems: of the scorer `code`: JSON lines as HumanEval has them.
        execute_code: let the scorer `code` run programs that the model wrote.
        code_seconds, code_megabytes: what such a program may take.
        max_new_tokens: that the model writes for a scorer (None: as many as the targets are).
        max_samples: the first so many samples of the file.
        seed: of random orders and of bootstrap samples.
        resamples: bootstrap samples.
        device, dtype: of the model.
        strict: the first sample that cannot be used ends the run; without it, it is left out and listed.

    Raises:
        CapabilityError: a dense model.
        PlanError: points of another model, layer or number of experts, none at all; settings out of range; no mask that
            could be run. All before the model runs.
        LoadError: points or pairs that cannot be read, naming the field.
    """
    return _sweep(Settings(**dict(locals())))


def _sweep(settings: Settings) -> Path:
    """See `moe_mask_sweep`."""
    settings.check()
    judge = settings.judge()
    pairs, dropped = _pairs(settings)
    places = {
        pair.name: [positions_of(pair, side, settings.scope, settings.segment) for side in SIDES] for pair in pairs
    }
    model = ic.load(settings.model_path, device=settings.device, dtype=settings.dtype)
    listed, masks = _masks(settings, model)
    pairs = _that_fit(settings, model, pairs, dropped)
    supers, sizes = settings.supers(listed), settings.numbers(listed)
    with _opened(settings, model, pairs, listed) as run:
        usage = run.stage(USAGE, lambda: _usage(model, pairs)) if "usage_random" in settings.kinds else None
        made, names = masks(usage), [pair.name for pair in pairs]
        at = [places[name] for name in names]
        rows = Work(run, model, pairs, at, made, judge, settings.max_new_tokens).rows()
        statistics = (settings.kinds, settings.modes, settings.seed, settings.resamples)
        findings = Findings(made, names, rows, sizes, *statistics)
        facts = settings.facts | {"statistic": listed.statistic, "dropped": dropped, "super_experts": supers}
        return write(run, findings, listed, facts)


Masks = Callable[[list[list[float]] | None], list[Variant]]
"""All masks, by the usage of experts."""


def _masks(settings: Settings, model: ic.Model) -> tuple[Points, Masks]:
    """The points, and what makes masks of them.

    Raises:
        CapabilityError, PlanError, LoadError: as the recipe; a scorer of text without a tokenizer; masks of which the
            guard leaves out every one (how many experts a random order bans in a layer does not depend on its draw).
    """
    shape = Shape.of(model)
    listed = read_points(settings.points, shape, layer_index=settings.layer_index)
    sizes = settings.numbers(listed)
    if settings.scorer is not None and model.tokenizer is None:
        raise ic.TextError("a scorer reads text: load the model with its tokenizer, or leave --scorer out")

    def masks(usage: list[list[float]] | None) -> list[Variant]:
        drawn = orders(listed, shape, settings.kinds, settings.random_orders, settings.seed, usage)
        return variants(drawn, settings.modes, sizes, shape)

    made = masks(None)
    if all(variant.skipped for variant in made):
        raise ic.PlanError(f"no mask can be run: {made[0].skipped}; give smaller sizes, or mode keep or drop")
    return listed, masks


def _opened(settings: Settings, model: ic.Model, pairs: Sequence[Pair], listed: Points) -> runs.RunFolder:
    """The run's folder; intervals may be worked out with other resamples the next time."""
    resolved = settings.identity | {
        "points": [[p.layer, p.expert] for p in listed.points], "sizes": settings.numbers(listed),
        "pairs": runs.digest([pair.record() for pair in pairs]),
    }  # fmt: skip
    dataset = settings.pair_tokens_json.stem
    return runs.open(
        settings.out_dir, resolved, recipe="moe_mask_sweep", model=model, dataset=dataset, free=("resamples",)
    )


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
        first = self.variants[0]
        clean = Variant(first.mode, first.order, 0, {})
        masks = list({variant.key: variant for variant in (clean, *self.variants) if not variant.skipped}.values())
        contexts = [(pair, side, at) for pair, ats in zip(self.pairs, self.places, strict=True)
                    for side, at in zip(SIDES, ats, strict=True)]  # fmt: skip
        shown = ic.Progress("mask sweep, contexts", len(contexts))
        with self.run.rows(SAMPLES, key="id") as rows, shown as told:
            for pair, side, at in contexts:
                left = [mask for mask in masks if row_key(pair.name, side, mask) not in rows]
                measures = measured(self.model, pair, side, left, at, check=told.count == 0)
                for mask, row in zip(left, measures, strict=True):
                    rows.add(row | self._score(pair, side, mask))
                told.add()
            return list(rows)

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


def _pairs(settings: Settings) -> tuple[list[Pair], list[dict[str, str]]]:
    """The samples, and those that cannot be used."""
    dropped: list[dict[str, str]] = []

    def bad(name: str, error: ic.InterpError) -> None:
        print(f"  left out {name}: {error}")
        dropped.append({"sample": name, "reason": str(error)})

    path, most = settings.pair_tokens_json, settings.max_samples
    pairs = read_pairs(path, layout=settings.layout, max_samples=most, bad=None if settings.strict else bad)
    if not pairs:
        raise ic.LoadError(f"{path}: no sample can be used; the first: {dropped[0]['reason'] if dropped else 'none'}")
    return pairs, dropped


def _that_fit(settings: Settings, model: ic.Model, pairs: Sequence[Pair], dropped: list[dict[str, str]]) -> list[Pair]:
    """The samples whose contexts the model can read; the others are noted.

    Raises:
        TextError: there are none, or the run is strict and one is not.
    """
    fitting = []
    for pair in pairs:
        doing = ""
        try:
            for doing in SIDES:
                tokens = pair.tokens(doing)
                model.tokens({"input_ids": tokens.ids, "attention_mask": tokens.mask.long()})
        except ic.TextError as error:
            said = f"sample {pair.name!r}, {doing}: {error}"
            if settings.strict:
                raise ic.TextError(said) from error
            print(f"  left out {said}")
            dropped.append({"sample": pair.name, "reason": said})
        else:
            fitting.append(pair)
    if not fitting:
        path = settings.pair_tokens_json
        raise ic.TextError(f"{path}: no sample fits the model; the first: {dropped[0]['reason']}")
    return fitting
