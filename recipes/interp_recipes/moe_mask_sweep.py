"""Masks of experts, more and more of them: what the best of a points file do, beside the worst and beside chance.

    interp run moe_mask_sweep --model_path M --points last_token_agentic_minus_assisted_points.json
        --pair_tokens_json pair_tokens.json --out_dir O --sizes 15,20,25 --mode replace_topk

bans the first N points for every N of `sizes`, in their order, in the reverse order, and in random orders that ban as
many experts in every layer; and writes

    figures/mask_sweep/nll_{all,last}_{agentic,assisted}_{mode}.png    rise of the NLL against N, with bands
    figures/mask_sweep/score_{agentic,assisted}_{mode}.png             of a scorer, if one is given
    tables/mask_sweep.csv, mask_sweep.json     a row per mode, order and N; skipped ones with the reason
    tables/mask_sweep_areas.csv                area between the descending order and the others
    tables/mask_sweep_samples.jsonl            a row per sample, context and mask
    tables/mask_sweep_usage.json               by which usage_random draws
    mask_sweep_report.html                     all of it as a page

Modes, scopes, orders and statistics: docs/moe_mask_sweep.md. The same command goes on where it was stopped.

Source: Geuan666/XAI4Agent (2026), whose masks have no effect on transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from interp_plugins.pairs import Pair, read_pairs
from interp_plugins.pairs.pair import SIDES, Layout
from interp_plugins.pairs.routing import routed_targets
from interp_plugins.router.points import LayerIndex, Points, Shape, read_points

import interp_core as ic
from interp_core import runs

from .attribution_eval import told
from .mask_findings import Findings
from .mask_orders import ORDERS, Variant, modes_of, orders, sizes_of, variants
from .mask_report import write
from .mask_runs import SCOPES, Row, Scope, edits_of, measured, positions_of, row_key
from .mask_scores import Scorer, answered, scorer_of

SAMPLES, USAGE = "tables/mask_sweep_samples.jsonl", "tables/mask_sweep_usage.json"


def moe_mask_sweep(
    model_path: str,
    points: Path,
    pair_tokens_json: Path,
    out_dir: Path | None = None,
    sizes: list[int] | str | None = None,
    mode: list[str] | str = "replace",
    order: list[str] | str = "descending,reversed,random,usage_random",
    random_orders: int = 5,
    scope: Scope = "all",
    segment: list[int] | None = None,
    layout: Layout | None = None,
    layer_index: LayerIndex | None = None,
    super_experts: Path | None = None,
    scorer: str | None = None,
    problems: Path | None = None,
    execute_code: bool = False,
    code_seconds: float = 10.0,
    code_megabytes: int = 1024,
    max_new_tokens: int | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
    device: str | None = None,
    dtype: str | None = None,
    strict: bool = False,
) -> Path:
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
    modes, kinds = modes_of(_words(mode)), _kinds(_words(order))
    _check(random_orders, scope, segment, scorer, resamples)
    judge = None if scorer is None else scorer_of(scorer, problems, execute_code, code_seconds, code_megabytes)
    pairs, dropped = _pairs(pair_tokens_json, layout, max_samples, strict)
    model = ic.load(model_path, device=device, dtype=dtype)
    shape = Shape.of(model)
    listed = read_points(points, shape, layer_index=layer_index)
    wanted = sizes_of(_numbers(sizes), listed)
    places = [[positions_of(pair, side, scope, segment) for side in SIDES] for pair in pairs]
    if judge is not None:
        _check_writing(model)
    warned = _super(listed, max(wanted), super_experts)
    _demand_some(variants(orders(listed, shape, kinds, random_orders, seed), modes, wanted, shape))
    settings = {
        "points": [[p.layer, p.expert] for p in listed.points], "sizes": wanted, "modes": modes, "orders": kinds,
        "random_orders": random_orders, "scope": scope, "segment": segment, "scorer": scorer, "seed": seed,
        "max_new_tokens": max_new_tokens, "problems": problems and runs.digest(problems.read_text(encoding="utf-8")),
        "pairs": runs.digest([_identity(pair) for pair in pairs]), "resamples": resamples,
    }  # fmt: skip
    dataset = Path(pair_tokens_json).stem
    named: dict[str, Any] = {"recipe": "moe_mask_sweep", "dataset": dataset, "free": ("resamples",)}
    with runs.open(out_dir, settings, model=model, **named) as run:
        usage = run.stage(USAGE, lambda: _usage(model, pairs)) if "usage_random" in kinds else None
        made = variants(orders(listed, shape, kinds, random_orders, seed, usage), modes, wanted, shape)
        work = Work(run, model, pairs, places, made, judge, max_new_tokens)
        findings = Findings(made, [pair.name for pair in pairs], work.rows(), wanted, kinds, modes, seed, resamples)
        told_of = {
            "model": model.source, "points": str(points), "statistic": listed.statistic, "pairs": str(pair_tokens_json),
            "scope": scope, "segment": segment, "scorer": scorer, "dropped": dropped, "super_experts": warned,
        }  # fmt: skip
        return write(run, findings, told_of)


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
        with self.run.rows(SAMPLES, key="id") as rows:
            for number, (pair, side, at) in told("mask sweep, contexts", contexts):
                left = [mask for mask in masks if row_key(pair.name, side, mask) not in rows]
                measures = measured(self.model, pair, side, left, at, check=number == 0)
                for mask, row in zip(left, measures, strict=True):
                    rows.add(row | self._score(pair, side, mask))
            return list(rows)

    def _score(self, pair: Pair, side: Literal["agentic", "assisted"], mask: Variant) -> dict[str, Any]:
        if self.scorer is None:
            return {}
        answer = answered(self.model, pair, side, edits_of(mask), self.max_new_tokens)
        score = float(self.scorer(answer))
        if not np.isfinite(score):
            raise ic.PlanError(f"the scorer gives {score} for sample {pair.name!r}, {side}; a score is a finite number")
        return {"score": score, "text": answer.text}


def _demand_some(made: Sequence[Variant]) -> None:
    """Refuse a sweep of which the guard leaves out everything. How many experts a random order bans in a layer does not
    depend on its draw.

    Raises:
        PlanError: naming the first layer.
    """
    if all(variant.skipped for variant in made):
        raise ic.PlanError(f"no mask can be run: {made[0].skipped}; give smaller sizes, or mode keep or drop")


def _usage(model: ic.Model, pairs: Sequence[Pair]) -> list[list[float]]:
    """Share of the selections of all targets, both contexts, `[layer expert]`."""
    total: Any = 0
    for _, (pair, side) in told("usage of experts", [(pair, side) for pair in pairs for side in SIDES]):
        layers = routed_targets(model, pair, side)
        total = total + np.stack([layers[layer].chosen.sum(0).double().cpu().numpy() for layer in sorted(layers)])
    shares: list[list[float]] = (total / total.sum(-1, keepdims=True)).tolist()
    return shares


def _pairs(
    path: Path, layout: Layout | None, max_samples: int | None, strict: bool
) -> tuple[list[Pair], list[dict[str, str]]]:
    """The samples, and those that cannot be used."""
    dropped: list[dict[str, str]] = []

    def bad(name: str, error: ic.InterpError) -> None:
        print(f"  left out {name}: {error}")
        dropped.append({"sample": name, "reason": str(error)})

    pairs = read_pairs(path, layout=layout, max_samples=max_samples, bad=None if strict else bad)
    if not pairs:
        raise ic.LoadError(f"{path}: no sample can be used; the first: {dropped[0]['reason'] if dropped else 'none'}")
    return pairs, dropped


def _identity(pair: Pair) -> list[Any]:
    """All that a number of a pair depends on."""
    contexts = [[pair.tokens(side).ids.tolist(), pair.tokens(side).mask.tolist()] for side in SIDES]
    return [pair.name, contexts, list(pair.agentic_positions), list(pair.assisted_positions)]


def _super(listed: Points, most: int, path: Path | None) -> list[list[int]]:
    """Super experts among the first points, said on standard output too."""
    if path is None:
        return []
    try:
        cells = {(int(layer), int(expert)) for layer, expert in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise ic.LoadError(f"{path}: super experts are a JSON list of [layer, expert]: {error}") from error
    hit = [[p.layer, p.expert] for p in listed.points[:most] if (p.layer, p.expert) in cells]
    if hit:
        print(f"  among the first {most} points are super experts {hit}: a mask of one alone may ruin the model")
    return hit


def _words(value: Sequence[str] | str) -> list[str]:
    return [word.strip() for part in ([value] if isinstance(value, str) else value) for word in part.split(",") if word]


def _numbers(value: Sequence[int] | str | None) -> list[int] | None:
    """Sizes, given one by one or joined by commas."""
    if value is None or not isinstance(value, str):
        return None if value is None else list(value)
    words = _words(value)
    if not all(word.isdigit() for word in words):
        raise ic.PlanError(f"sizes are whole numbers from 1, as 15,20,25, not {value!r}; N = 0 is always run")
    return [int(word) for word in words]


def _kinds(words: Sequence[str]) -> list[str]:
    for word in words:
        if word not in ORDERS:
            raise ic.PlanError(f"there is no order {word!r}. {ic.errors.nearest(word, ORDERS)}")
    if not words:
        raise ic.PlanError(f"give an order: {', '.join(ORDERS)}")
    return [kind for kind in ORDERS if kind in words]


def _check(draws: int, scope: str, segment: Sequence[int] | None, scorer: str | None, resamples: int) -> None:
    if draws < 5:
        raise ic.PlanError(f"random_orders is {draws}: give 5 at least, or leave random orders out with --order")
    if scope not in SCOPES:
        raise ic.PlanError(f"there is no scope {scope!r}. {ic.errors.nearest(scope, SCOPES)}")
    if (scope == "segment") != (segment is not None) or (segment is not None and len(segment) != 2):
        raise ic.PlanError(f"segment is {segment} and scope {scope!r}: scope segment takes --segment START STOP")
    if scorer is not None and scope != "all":
        raise ic.PlanError(f"a scorer reads what the model writes, which scope {scope!r} does not mask; give scope all")
    if resamples < 100:
        raise ic.PlanError(f"resamples is {resamples}: give 100 at least")


def _check_writing(model: ic.Model) -> None:
    if model.tokenizer is None:
        raise ic.TextError("a scorer reads text: load the model with its tokenizer, or leave --scorer out")
