"""Figures, tables, sentences and page of the recipe `moe_nll`."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interp_plugins.attribution.files.arrays import npz_bytes
from interp_plugins.logit_lens.aligned import PairScores
from interp_plugins.logit_lens.curves import APART, METRICS, SCOPES, Curves, progress
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES

import interp_core as ic
from interp_core import report, runs
from interp_core.report import Curves as Chart

from .config import Settings

FIGURES, TABLES = "figures/nll_core", "tables"
PAGE = "nll_core.html"
WHOSE = {"all": "all targets", "last": "the last target"}
AXIS = {
    "nll": "NLL, nats", "logitlens": "log-probability, nats", "rank": "rank of the target, log10(1 + rank)",
    "entropy": "entropy, nats", "top1": "targets that are the likeliest token", "js": "Jensen-Shannon, nats",
}  # fmt: skip
JS = {
    "exact": "exact",
    "topk_rest": "a lower bound from the {k} likeliest tokens of either side and one bucket for all others; the other "
    "line is the upper bound that follows from it",
    "topk_renorm": "of the {k} likeliest tokens of either side alone, renormalised: no bound of the exact one",
}


def write_all(
    run: runs.RunFolder, model: ic.Model, pairs: Sequence[Pair], scores: Sequence[PairScores], settings: Settings,
    dropped: Sequence[Mapping[str, str]], about: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Everything that the scores of the samples say, as files; returns the page."""
    curves, walk = Curves.of(scores), progress(scores)
    charts = charts_of(curves, walk, settings)
    assert {f"{FIGURES}/{name}.png" for name in charts} < set(files_of(settings))
    for name, chart in charts.items():
        run.figure(f"{FIGURES}/{name}.png", chart.png)
    run.table(f"{TABLES}/nll_core_layer_metrics.csv", table_of(curves, settings))
    run.put({f"{TABLES}/nll_core_matrices.npz": npz_bytes(matrices_of(curves, walk))})
    layouts = sorted({pair.layout for pair in pairs})
    said = sentences(curves, settings, dropped, layouts)
    summary = {
        "processed_samples": len(scores), "skipped_samples": len(dropped), "dropped": list(dropped),
        "targets": dict(zip(curves.samples, curves.targets, strict=True)),
        "dropped_targets": {pair.name: dict(pair.dropped) for pair in pairs if pair.dropped},
        "layouts": layouts, **vars(settings), "device": model.device.type, "inputs": dict(about),
        "layers": list(curves.layers), "sentences": said,
        "versions": {"interp_core": ic.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    run.json(f"{TABLES}/nll_core_summary.json", summary)
    run.page(PAGE, answer_of(curves, charts, said, layouts, dropped), model)
    print("", *said, "", sep="\n")
    return run.path / PAGE


def files_of(settings: Settings) -> list[str]:
    """What `write_all` writes."""
    curves = [
        name
        for scope in SCOPES
        for metric in ("nll", "logitlens")
        for name in (f"{metric}_{scope}_agentic_vs_assisted", f"delta_{metric}_{scope}")
    ]
    more = ("rank", "entropy", "top1", *(["js"] if settings.js_mode != "none" else []))
    curves += [f"{metric}_{scope}" for metric in more for scope in SCOPES] + ["delta_nll_progress"]
    tables = ("layer_metrics.csv", "matrices.npz", "summary.json")
    return [f"{FIGURES}/{name}.png" for name in curves] + [f"{TABLES}/nll_core_{name}" for name in tables] + [PAGE]


# Numbers


def names_of(curves: Curves, scope: str) -> list[str]:
    """Names of a scope's curves, in the order of the published table, ours after them."""
    published = [f"{metric}_{side}" for metric in ("nll", "logitlens") for side in (*SIDES, "delta")]
    more = [f"{metric}_{side}" for metric in METRICS[2:] for side in (*SIDES, "delta")]
    named = [f"delta_{name.removesuffix('_delta')}" if name.endswith("delta") else name for name in published + more]
    return [f"{name}_{scope}" for name in [*named, *APART] if f"{name}_{scope}" in curves.values]


def table_of(curves: Curves, settings: Settings) -> list[dict[str, Any]]:
    """A row per layer (-1 is the embedding): means over samples, ends of their intervals, means over all targets, and
    which layers differ."""
    names = [name for scope in SCOPES for name in names_of(curves, scope)]
    rows = []
    for i, layer in enumerate(curves.layers):
        row: dict[str, Any] = {"layer": layer} | {name: float(curves.mean(name)[i]) for name in names}
        for name in names:
            if name in curves.bands:
                band = curves.bands[name]
                row |= {f"{name}_low": float(band.low[i]), f"{name}_high": float(band.high[i])}
        row |= {f"micro_{name}": float(curves.micro[name][i]) for name in names if name in curves.micro}
        for scope, test in curves.tests.items():
            row[f"delta_nll_{scope}_p_adjusted"] = float(test.adjusted[i])
        rows.append(row)
    return rows


def matrices_of(curves: Curves, walk: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The file of arrays: every curve `[sample layer]`, its mean `[layer]`, and what names their places."""
    arrays: dict[str, np.ndarray[Any, Any]] = {name: value.astype(np.float64) for name, value in curves.values.items()}
    arrays |= {f"mean_{name}": curves.mean(name) for name in curves.values}
    arrays |= {f"micro_{name}": value for name, value in curves.micro.items()}
    arrays |= {f"{end}_{name}": getattr(band, end) for name, band in curves.bands.items() for end in ("low", "high")}
    named = {"layer": np.array(curves.layers), "samples": np.array(curves.samples), "targets": np.array(curves.targets)}
    return arrays | {"delta_nll_progress": walk} | named


# Pictures


def charts_of(curves: Curves, walk: np.ndarray[Any, Any], settings: Settings) -> dict[str, report.Chart]:
    """Every figure by the name of its file."""
    charts: dict[str, report.Chart] = {}
    for scope in SCOPES:
        for metric, word in (("nll", "NLL"), ("logitlens", "Logit lens")):
            charts[f"{metric}_{scope}_agentic_vs_assisted"] = _two(curves, metric, scope, word)
            charts[f"delta_{metric}_{scope}"] = _delta(curves, metric, scope, word)
        for metric, word in (("rank", "Rank"), ("entropy", "Entropy"), ("top1", "Top-1")):
            charts[f"{metric}_{scope}"] = _two(curves, metric, scope, word)
        if f"js_{scope}" in curves.values:
            charts[f"js_{scope}"] = _apart(curves, scope, settings)
    bins = [f"{100 * i // walk.shape[1]} %" for i in range(walk.shape[1])]
    charts["delta_nll_progress"] = report.Heatmap(
        walk, curves.places, bins, diverging=True, title="NLL agentic - assisted along the target text",
        xlabel="how far the target text has got", ylabel="layer", colorbar="nats",
        caption="Blue: the agentic context predicts better. Means over the samples that have targets there.",
    )  # fmt: skip
    return charts


def _line(curves: Curves, name: str, label: str, base: float | None = None) -> report.Line:
    if name in curves.bands:
        return report.Line.of(label, curves.bands[name], base)
    return report.Line(label, curves.mean(name), None, base)


def _bands(curves: Curves) -> str:
    n = len(curves.samples)
    return f"Means over {n} samples, 95 % intervals." if curves.bands else "One sample: no intervals."


def _two(curves: Curves, metric: str, scope: str, word: str) -> Chart:
    lines = [_line(curves, f"{metric}_{side}_{scope}", side) for side in SIDES]
    return Chart(
        lines, curves.places, xlabel="after layer", ylabel=AXIS[metric], percent=metric == "top1",
        title=f"{word} by layer, {WHOSE[scope]}", caption=_bands(curves),
    )  # fmt: skip


def _delta(curves: Curves, metric: str, scope: str, word: str) -> Chart:
    lines = [_line(curves, f"delta_{metric}_{scope}", "agentic - assisted", 0.0)]
    caption = _bands(curves)
    if metric == "nll" and scope in curves.tests:
        differ = _ranges(curves, _differing(curves, scope))
        caption += f" Layers that differ (sign flips, p ≤ 0.05 for all layers together): {differ or 'none'}."
    return Chart(
        lines, curves.places, xlabel="after layer", ylabel=AXIS[metric], base="no difference",
        title=f"{word} by layer, agentic - assisted, {WHOSE[scope]}", caption=caption,
    )  # fmt: skip


def _apart(curves: Curves, scope: str, settings: Settings) -> Chart:
    lines = [_line(curves, f"js_{scope}", "JS")]
    if f"js_upper_{scope}" in curves.values:
        lines.append(_line(curves, f"js_upper_{scope}", "at most"))
    return Chart(
        lines, curves.places, xlabel="after layer", ylabel=AXIS["js"],
        title=f"How far the two contexts' predictions are apart, {WHOSE[scope]}",
        caption=f"{_bands(curves)} JS is {JS[settings.js_mode].format(k=settings.js_topk)}. At most ln 2 = 0.693.",
    )  # fmt: skip


# Words


def sentences(
    curves: Curves, settings: Settings, dropped: Sequence[Mapping[str, str]], layouts: Sequence[str]
) -> list[str]:
    """What came out; nothing is said that the numbers do not carry."""
    n, targets = len(curves.samples), sum(curves.targets)
    said = [
        f"{n} {_count(n, 'sample')} with {targets} shared targets ({' and '.join(layouts)} layout)"
        + (f"; {len(dropped)} {_count(len(dropped), 'sample')} left out, listed below." if dropped else ".")
    ]
    said += [final(curves, scope) for scope in SCOPES]
    said += [_layers(curves, scope) for scope in SCOPES if scope in curves.tests]
    said.append(_decided(curves))
    if "js_all" in curves.values:
        js = curves.mean("js_all")
        name = {"exact": "", "topk_rest": " at least", "topk_renorm": " by its renormalised stand-in"}[settings.js_mode]
        said.append(
            f"The two contexts' predictions are farthest apart at {_at(curves, int(js.argmax()))}: JS is{name} "
            f"{js.max():.4f} nats, {js[-1]:.4f} in the model's output."
        )
    return said


def final(curves: Curves, scope: str) -> str:
    """In which context the model's output predicts better, if the samples tell it."""
    a, b, d = (curves.mean(f"{name}_{scope}")[-1] for name in ("nll_agentic", "nll_assisted", "delta_nll"))
    text = f"In the model's output the NLL of {WHOSE[scope]} is {a:.4f} nats in the agentic context and {b:.4f} in the "
    text += "assisted one; "
    if not curves.bands:
        return text + f"the difference is {d:+.4f}, and one sample does not tell how sure that is."
    interval = curves.bands[f"delta_nll_{scope}"][-1]
    text += f"the difference is {interval:+.4f}"
    if not interval.excludes(0):
        return text + ", which does not tell them apart."
    return text + f": the {'agentic' if d < 0 else 'assisted'} context predicts better."


def _layers(curves: Curves, scope: str) -> str:
    test, delta = curves.tests[scope], curves.mean(f"delta_nll_{scope}")
    differ = _differing(curves, scope)
    if not differ:
        smallest = 2 / test.arrangements if test.exact else 0.0
        why = (
            f" ({len(curves.samples)} samples cannot tell any: p is {smallest:.2g} at least)" if smallest > 0.05 else ""
        )
        return f"For {WHOSE[scope]} no layer's difference is told from none, taking account of all layers{why}."
    best = max(differ, key=lambda i: abs(delta[i]))
    return (
        f"For {WHOSE[scope]} the contexts differ after {_ranges(curves, differ)} (p ≤ 0.05 for all layers "
        f"together), most at {_at(curves, best)}: {delta[best]:+.4f} nats."
    )


def _decided(curves: Curves) -> str:
    shares = {side: curves.mean(f"top1_{side}_all") for side in SIDES}
    parts = []
    for side, share in shares.items():
        if share[-1] == 0:
            parts.append(f"in the {side} context no target is the model's first choice")
            continue
        layer = int(np.argmax(share >= share[-1] / 2))
        parts.append(
            f"in the {side} context {share[-1]:.0%} of the targets are the model's first choice, half of that share is "
            f"reached at {_at(curves, layer)}"
        )
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _differing(curves: Curves, scope: str) -> list[int]:
    return np.flatnonzero(curves.tests[scope].below(0.05)).tolist()


def _ranges(curves: Curves, rows: Sequence[int]) -> str:
    """Rows as ranges of layers."""
    runs_of = [[i for _, i in group] for _, group in itertools.groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
    name = partial(_at, curves)
    return ", ".join(name(run[0]) if len(run) == 1 else f"{name(run[0])} to {name(run[-1])}" for run in runs_of)


def _at(curves: Curves, row: int) -> str:
    return "the embedding" if curves.layers[row] < 0 else f"layer {curves.layers[row]}"


def _count(n: int, word: str) -> str:
    return word if n == 1 else f"{word}s"


# The page


def answer_of(
    curves: Curves, charts: Mapping[str, report.Chart], said: Sequence[str], layouts: Sequence[str],
    dropped: Sequence[Mapping[str, str]],
) -> report.Answer:  # fmt: skip
    """All of it on one page: first of all targets in the model's output, then by layer and by metric."""
    titles = {
        "nll": "NLL by layer", "js": "How far predictions are apart", "rank": "Rank of the target",
        "entropy": "Entropy", "top1": "First choices",
    }  # fmt: skip
    sections = []
    for name, title in titles.items():
        keys = [key for scope in SCOPES for key in (f"{name}_{scope}", f"{name}_{scope}_agentic_vs_assisted")]
        if drawn := report.titled(charts[key] for key in keys if key in charts):
            sections.append(report.Section(title, "", drawn))
    walk = "Which part of the target text the difference comes from."
    sections.append(report.Section("Along the target text", walk, charts["delta_nll_progress"].html()))
    samples = [
        {"sample": name, "shared targets": count} for name, count in zip(curves.samples, curves.targets, strict=True)
    ]
    return report.Answer(
        "Layer-wise NLL of two contexts",
        "Does the model predict the same target tokens better in the agentic context or in the assisted one, and from "
        f"which layer on? The assisted contexts are {' and '.join(layouts)}.",
        final(curves, "all"), samples, report.titled(charts[f"delta_nll_{scope}"] for scope in SCOPES),
        further=[sentence for sentence in said if sentence != final(curves, "all")], sections=sections,
        left_out=dropped, rows=_shown(curves), whole=f"{TABLES}/nll_core_layer_metrics.csv",
    )  # fmt: skip


def _shown(curves: Curves) -> list[dict[str, Any]]:
    """A row per layer: the NLL of both contexts and their difference, of all targets and of the last ones."""
    names = [name for scope in SCOPES for name in names_of(curves, scope) if "nll_" in name]
    means = {name: curves.mean(name) for name in names}
    return [
        {"after": _at(curves, i)} | {name: float(mean[i]) for name, mean in means.items()}
        for i in range(len(curves.layers))
    ]
