"""Files and page of a mask sweep: curves with bands, the table, areas, and sentences that the numbers bear out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_plugins.pairs.pair import SIDES
from interp_plugins.router.points import Points

import interp_core as ic
from interp_core import report, runs

from ..figures import png_bytes
from .findings import RANDOM, Findings

PAGE = "mask_sweep_report.html"
NAMES = {
    "descending": "descending", "reversed": "reversed", "random": "random, matched per layer",
    "usage_random": "random, matched per layer and usage",
}  # fmt: skip
CHANCE = {
    "random": "as many random experts of the same layers",
    "usage_random": "as many random experts of the same layers and usage",
}  # fmt: skip
YLABELS = {
    "nll_all": "rise in nats", "nll_last": "rise in nats",
    "score": "change of the score",
}  # fmt: skip
TITLES = {"nll_all": "NLL of the targets", "nll_last": "NLL of the last target", "score": "score"}
Facts = Mapping[str, Any]


def write(run: runs.RunFolder, model: ic.Model, findings: Findings, points: Points, facts: Facts) -> Path:
    """All files; returns the page's path."""
    lines, areas = findings.lines(), findings.areas()
    charts = {
        f"{metric}_{side}_{mode}": chart(findings, mode, side, metric)
        for mode in findings.modes
        for metric in [name for name in YLABELS if name in findings.metrics]
        for side in SIDES
    }
    said = sentences(findings, areas, facts)
    flat = [{**line, "banned": cells_of(line["banned"])} for line in lines]
    files: dict[str, str | bytes] = {
        "tables/mask_sweep.csv": runs.csv_text(flat, list(flat[0])),
        "tables/mask_sweep.json": runs.json_text({**facts, "summary": said, "rows": lines, "areas": areas}),
        "tables/mask_sweep_areas.csv": runs.csv_text(areas, list(areas[0]) if areas else ["mode"]),
        **{f"figures/mask_sweep/{name}.png": png_bytes(curves) for name, curves in charts.items()},
        "figures/mask_sweep/points.png": png_bytes(map_of(points)),
    }
    run.put(files, stage="tables/mask_sweep.csv")
    run.page(PAGE, answer_of(findings, charts, map_of(points), areas, flat, said, facts), model)
    print(*said, sep="\n")
    return run.path / PAGE


def chart(findings: Findings, mode: str, side: str, metric: str) -> report.Curves:
    """Rise against N, a line per order; masks that the guard left out are points of a line of their own."""
    lines, skipped = [], set()
    for kind in findings.kinds:
        numbers = [(0.0, 0.0, 0.0)]
        for n in findings.sizes:
            numbers.append(findings.interval(findings.rise(mode, kind, n, side, metric)))
            if any(variant.skipped for variant in findings.of(mode, kind, n)):
                skipped.add(n)
        values = [value for value, _, _ in numbers]
        bands = [(low, high) if math.isfinite(low) else (value, value) for value, low, high in numbers]
        lines.append(report.Line(NAMES[kind], values, bands if len(findings.samples) > 1 else None))
    if skipped:
        marks = [0.0 if n in skipped else math.nan for n in (0, *findings.sizes)]
        lines.append(report.Line("left out by the guard (some order)", marks))
    draws = max(variant.order.draw for variant in findings.variants) + 1
    caption = (
        f"{len(findings.samples)} samples, 95 % bootstrap intervals over samples; {draws} random orders, their mean."
    )
    return report.Curves(
        lines, [str(n) for n in (0, *findings.sizes)], xlabel="cells (layer · expert) banned", ylabel=YLABELS[metric],
        title=f"{side}, {mode}: {TITLES[metric]}", caption=caption,
    )  # fmt: skip


def map_of(points: Points) -> report.Heatmap:
    """The points by layer and expert, with their ranks; cells that the file does not have are grey."""
    assert points.shape is not None
    layers, experts = points.shape.moe_layers, range(points.shape.n_experts)
    ranks = {(point.layer, point.expert): (rank, point.value) for rank, point in enumerate(points.points, 1)}
    values = [[ranks.get((layer, e), (0, math.nan))[1] for e in experts] for layer in layers]
    tips = [[_tip(layer, e, ranks.get((layer, e))) for e in experts] for layer in layers]
    signed = any(value < 0 for _, value in ranks.values())
    return report.Heatmap(
        values, [f"layer {layer}" for layer in layers], [str(e) for e in experts], tips=tips, diverging=signed,
        title="Points", caption="Values of the points file by layer and expert; grey: not in it.", xlabel="expert",
        colorbar=points.statistic or "value",
    )  # fmt: skip


def _tip(layer: int, expert: int, ranked: tuple[int, float] | None) -> str:
    said = "not among the points" if ranked is None else f"{ranked[1]:.4g}, rank {ranked[0]}"
    return report.escape(f"layer {layer}, expert {expert}: {said}")


def sentences(findings: Findings, areas: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    """What the numbers say, no more."""
    said = []
    for mode in findings.modes:
        for side in SIDES:
            said += [_at_most(findings, mode, side)] if "descending" in findings.kinds else []
        for area in areas:
            if area["mode"] == mode and area["metric"] == "nll_all" and area["area"] is not None:
                said.append(_area(area))
        left_out = [v for v in findings.variants if v.mode == mode and v.skipped]
        if left_out:
            said.append(
                f"{len(left_out)} of {sum(v.mode == mode for v in findings.variants)} masks ({mode}) were left out: "
                f"{left_out[0].skipped} (first: {left_out[0].order.kind}, N = {left_out[0].n})."
            )
    if facts["super_experts"]:
        cells = ", ".join(f"layer {layer} expert {expert}" for layer, expert in facts["super_experts"])
        said.append(f"Among the points are super experts ({cells}); a mask of one alone may ruin the model.")
    if 1 < len(findings.samples) < 10:
        said.append(f"There are {len(findings.samples)} samples: intervals of so few are too narrow.")
    if facts["dropped"]:
        n = len(facts["dropped"])
        first = facts["dropped"][0]["reason"]
        said.append(f"{n} sample{'s' * (n > 1)} could not be used{', the first' * (n > 1)}: {first}")
    return said


def _at_most(findings: Findings, mode: str, side: str, kind: str = "descending") -> str:
    """The largest mask of an order that was run, beside chance."""
    done = [n for n in findings.sizes if not any(v.skipped for v in findings.of(mode, kind, n))]
    if not done:
        return f"{side}, {mode}: every mask of the {kind} order was left out."
    n = done[-1]
    first = f"first {f'{n} cells' if n > 1 else 'cell'}{'' if kind == 'descending' else f' of the {kind} order'}"
    parts = [f"{side}, {mode}: banning the {first} changes the NLL of the targets by "
             f"{_nats(findings.interval(findings.rise(mode, kind, n, side, 'nll_all')))}"]  # fmt: skip
    for chance in [k for k in findings.kinds if k in RANDOM and k != kind]:
        values = findings.interval(findings.rise(mode, chance, n, side, "nll_all"))
        if math.isfinite(values[0]):
            parts.append(f"{NAMES[chance]} by {_nats(values)}")
    return "; ".join(parts) + "."


def _area(area: Mapping[str, Any]) -> str:
    """What the area between two curves says, and whether it says anything."""
    where, chance = f"{area['context']}, {area['mode']}: over all N, ", NAMES[area["against"]]
    if area["low"] is None:
        return (
            f"{where}{area['order']} minus {chance} is {area['area']:+.4f} nats on average (one sample, no interval)."
        )
    number = f"{area['area']:+.4f} nats on average [{area['low']:+.4f}, {area['high']:+.4f}]"
    if not area["excludes_0"]:
        return f"{where}{area['order']} and {chance} are not told apart ({number})."
    return f"{where}{area['order']} costs {'more' if area['area'] > 0 else 'less'} than {chance} ({number})."


def _nats(values: tuple[float, float, float]) -> str:
    value, low, high = values
    return f"{value:+.4f} nats" + (f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else "")


def cells_of(banned: Mapping[str, Sequence[int]]) -> str:
    """Banned experts in one cell of a table."""
    return "; ".join(f"{layer}: {' '.join(map(str, experts))}" for layer, experts in banned.items())


def answer_of(
    findings: Findings, charts: Mapping[str, report.Curves], points: report.Heatmap,
    areas: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], said: Sequence[str], facts: Facts,
) -> report.Answer:  # fmt: skip
    """All of it on one page: the first context's curve, then the others, the points, the areas."""
    where = {"all": "at all tokens", "targets": "at the targets", "predicting": "where targets are predicted"}
    place = where.get(facts["scope"], f"at tokens {facts['segment']}")
    first, *others = charts.values()
    sections = [report.Section(curves.title, "", curves.html()) for curves in others]
    sections.append(report.Section("Points", "", points.html()))
    if areas:
        shown = [{name: "" if value is None else value for name, value in area.items()} for area in areas]
        text = "Area between two curves over N, divided by the largest N: nats on average over the curve."
        sections.append(report.Section("Areas", text, report.table(shown)))
    columns = ("mode", "order", "draw", "n", "nll_all_agentic", "nll_all_assisted", "top1_agentic", "top1_assisted",
               "exact_agentic", "exact_assisted", "score_agentic", "score_assisted", "slots_changed_agentic",
               "slots_changed_assisted", "tokens_unmasked_agentic", "tokens_unmasked_assisted", "skipped")  # fmt: skip
    every = [{c: "" if line[c] is None else line[c] for c in columns if c in line} for line in lines]
    proof = (
        "Every mask that was run is proved: banned experts executed nowhere, and the family's selection gives the "
        "router's own choice without the mask. Slots changed: share of the token-slots in masked layers that went to "
        "another expert, or to none."
    )
    statistic = f" ({facts['statistic']})" if facts["statistic"] else ""
    finding, targets = finding_of(findings, areas), {row["sample"]: row["targets"] for row in findings.rows}
    return report.Answer(
        "Masks of experts",
        f"What does the model lose when the experts of {Path(facts['points']).name}{statistic} are banned {place}, the "
        f"highest points first and then more, and is it more than chance? {len(findings.samples)} samples of "
        f"{Path(str(facts['pairs'])).name}.",
        finding, [{"sample": name, "targets": targets.get(name, "")} for name in findings.samples],
        report.titled([first]), further=[sentence for sentence in said if sentence != finding],
        sections=sections, left_out=facts["dropped"], rows=every, details={"What a mask is held to": proof},
        whole="tables/mask_sweep.csv",
    )  # fmt: skip


def finding_of(findings: Findings, areas: Sequence[Mapping[str, Any]]) -> str:
    """What the first context's curve says: against chance over all N where there is a random order, else by itself."""
    mode, few = findings.modes[0], len(findings.samples)
    told = [a for a in areas if a["metric"] == "nll_all" and a["mode"] == mode and a["area"] is not None]
    if not told:
        kind = findings.kinds[0] if "descending" not in findings.kinds else "descending"
        return _at_most(findings, mode, SIDES[0], kind)
    area = told[0]
    where = f"In the {area['context']} context, banning the listed experts ({area['order']}, {mode})"
    number = f"{area['area']:+.4f} nats of NLL on average over all N"
    if area["low"] is None:
        return f"{where} changes the NLL beside {CHANCE[area['against']]} by {number}; one sample has no interval."
    number += f", 95 % interval {area['low']:+.4f} to {area['high']:+.4f}"
    number += f", too narrow for {few} samples" if few < 10 else ""
    if not area["excludes_0"]:
        return f"{where} is not told from banning {CHANCE[area['against']]} ({number})."
    return f"{where} costs {'more' if area['area'] > 0 else 'less'} than banning {CHANCE[area['against']]} ({number})."
