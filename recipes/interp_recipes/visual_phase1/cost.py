"""What the recipe `visual_phase1` runs, at most: stage by stage, as `stages` and `horizon` run it, without the tower.

What is not known before the run is taken as that of which most runs: images on which the answers depend (else it stops
at the pilots), a cliff that the truncation grid lacks, answers as long as they may be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from interp_plugins.visual.interventions import Intervention

import interp_core as ic

from ..visual_data import Asking
from .plan import Plan
from .stages import ATTRIBUTION

BATTERY = 13
"""Passes of `ic.visual_check` with two images and a target, in a model of three layers or more."""


def phase_cost(work: ic.Work, plan: Plan, asking: Asking, pilots: int, samples: int) -> ic.Cost:
    """All stages; prompts of `work` are not looked at, its `visual` is where the text behind the image begins."""
    every, rest = pilots + samples, min(plan.horizon_samples, samples)
    grid = plan.grid(work.layers, plan.cliff_boundary)
    if plan.cliff_boundary is None and (missing := {*range(1, work.layers)} - {*grid}):
        grid = sorted({*grid, min(missing)})  # the lower it is, the more layers run
    known = f"the cliff is layer {plan.cliff_boundary}"
    assumed = known if plan.cliff_boundary is not None else "a cliff is found, at a layer that the grid lacks"
    behind = f"behind {work.visual:,} tokens of the image the text begins" if work.visual else (
        "changes reach every token (--visual says how many an image has)"
    )  # fmt: skip
    assumes = (
        f"{pilots} pilots and {samples} samples, by the settings, whose answers depend on the image; {assumed}",
        f"answers have {asking.max_new_tokens} tokens, the most that may be; {behind}",
    )
    single, question = replace(work, prompts=1), work.tokens - work.target
    prompts = replace(single, prompts=samples, tokens=question, target=0, visual=0, batch=asking.batch_size)
    said = replace(single, tokens=question + asking.max_new_tokens, target=asking.max_new_tokens)
    parts = (
        single.forward(read_out=work.tokens) * (BATTERY * every),
        _curves(single, plan, True) * pilots,
        _curves(single, plan, False) * samples,
        prompts.generate(asking.max_new_tokens) * (len(grid) + 1 + len(plan.bands(work.layers))),
        _removals(said, plan, grid[:-1]) * rest,
        prompts.forward(read_out=0) + prompts.forward(read_out=0, batch=1),  # geometry
        _overlay(single),
    )
    return sum(parts, ic.Cost(assumes=assumes))


def _curves(work: ic.Work, plan: Plan, pilot: bool) -> ic.Cost:
    """Of one sample: clean and other images, and a sweep for every intervention and mode."""
    names = dict.fromkeys((*plan.interventions, *(["replace:swap"] if pilot and plan.null_image == "jpeg" else ())))
    changes = [Intervention.parse(name) for name in names]
    modes = {"blind": len(plan.blind), "swap": int("replace:swap" in names), "": 1}
    read = work.forward(read_out=max(work.target, 1)) * (modes["blind"] + modes["swap"] + 1)
    layers = range(work.layers) if plan.layers is None else plan.layers
    cost = read
    for each in changes:
        # rows of the image change where neither text is replaced nor attention cut: from the first token on
        position = 0 if each.kind == "replace" and not each.sources else work.visual
        back = plan.window // 2 if each.kind == "knockout" else 0
        draws = 5 if each.what == "noise" else 1
        starts = ((max(layer - back, 0), position) for layer in layers for _ in range(draws))
        cost += _swept(work, starts) * modes[each.sources]
    return cost


def _removals(work: ic.Work, plan: Plan, layers: list[int]) -> ic.Cost:
    """Of one sample: single tokens of the image and of a black one, the ranking, and subsets."""
    there = work.visual or work.tokens - work.target
    looked = min(plan.horizon_tokens or there, there)
    subsets = len(plan.keep_fractions) * (1 + plan.random_subsets)
    # of tokens of an image, the first one that sees the place-th of them stands at that place at the soonest
    single = _swept(work, ((layer, place) for layer in layers for place in range(looked)))
    ranks = work.forward(stop=max(layers) + 1, read_out=0)
    return single * 2 + ranks + _swept(work, ((layer, 0) for layer in layers for _ in range(subsets)))


def _overlay(work: ic.Work) -> ic.Cost:
    """Of one sample: its visual tokens hidden from all text, one by one, and an attribution."""
    attributed = ic.method(ATTRIBUTION).configured({}).cost(work) or work.forward()
    return attributed + _swept(work, ((0, 0) for _ in range(work.visual or work.tokens)))


def _swept(work: ic.Work, starts: Iterable[tuple[int, int]]) -> ic.Cost:
    """A sweep of one text, each of whose variants reads all positions of the answer."""
    counts: dict[tuple[int, int], int] = {}
    for start in starts:
        counts[start] = counts.get(start, 0) + 1
    more = max(work.target - 1, 0) * (1 + sum(counts.values()))
    return work.swept(counts) + work.reading_out(more)
