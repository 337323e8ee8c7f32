"""Drawings of route graphs: layers from the bottom up, tokens side by side, edges as thick as they are important.

Each block has two rows of nodes: between attention and MLP, and after the MLP. Attention edges rise from the token they
read to the token that reads; the MLP stands beside its token's line. Only tokens that the graph touches have a column.

Source: this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from interp_core import report

from .route_graph import ATTENTION, BIAS, KINDS, MLP, MLP_RESIDUAL, RouteGraph

COLUMN, STEP, LEFT, TOP, FOOT = 46.0, 62.0, 52.0, 18.0, 68.0
"""Pixels: between tokens, between blocks, and around them."""
SERIES = {ATTENTION: 0, MLP: 1}
"""Colours of the page by kind; residual edges and biases are in the colour of soft text."""
PLAIN = ("#2f6fb0", "#c2571a")
GREY = "#667085"


class Stroke(NamedTuple):
    """An edge as a line in pixels."""

    points: tuple[tuple[float, float], ...]
    kind: int
    importance: float
    strength: float
    tip: str


class Picture(NamedTuple):
    """A graph laid out: lines, nodes with their tokens, names of columns and blocks."""

    strokes: list[Stroke]
    tops: list[tuple[float, float]]
    columns: list[tuple[float, str]]
    layers: list[tuple[float, str]]
    width: float
    height: float


def laid_out(graph: RouteGraph, tokens: Sequence[str], n_layers: int) -> Picture:
    """Where everything stands."""
    touched = sorted({*graph.source.tolist(), *graph.target.tolist(), *graph.tops})
    across = {position: LEFT + COLUMN * (i + 0.5) for i, position in enumerate(touched)}
    height = TOP + STEP * n_layers + FOOT

    def level(layer: float) -> float:
        return TOP + STEP * (n_layers - layer)

    columns = [(across[p], f"{report.short(report.visible(tokens[p]), 12)}") for p in touched]
    layers = [(level(layer), "embed" if not layer else str(layer - 1)) for layer in range(n_layers + 1)]
    strokes = list(_strokes(graph, tokens, across, level))
    tops = [(across[p], level(n_layers)) for p in graph.tops]
    return Picture(strokes, tops, columns, layers, LEFT + COLUMN * len(touched) + 12, height)


def _strokes(
    graph: RouteGraph, tokens: Sequence[str], across: Mapping[int, float], level: Callable[[float], float]
) -> Iterator[Stroke]:
    """Edges as lines: MLPs make a bend beside their token's line."""
    columns = (graph.kind, graph.layer, graph.head, graph.source, graph.target, graph.importance, graph.strength)
    for kind, layer, head, source, target, importance, strength in zip(*(c.tolist() for c in columns), strict=True):
        a, b, low, middle, high = across[source], across[target], level(layer), level(layer + 0.55), level(layer + 1)
        side = COLUMN / 4
        beside = 2.0 * (head % 5 - 2) if kind == ATTENTION else 0.0  # heads that read the same token, beside each other
        points: tuple[tuple[float, float], ...] = ((a + beside, low), (b + beside, middle))
        if kind == MLP_RESIDUAL:
            points = ((a, middle), (b, high))
        elif kind == MLP:
            points = ((a, middle), (a + side, (middle + high) / 2), (b, high))
        elif kind == BIAS:
            points = ((a - side, middle), (b, middle))
        name = f"head {layer}.{head}" if kind == ATTENTION else f"{KINDS[kind].replace('_', ' past ')} {layer}"
        way = "" if source == target else f"\n{report.visible(tokens[source])} → {report.visible(tokens[target])}"
        yield Stroke(points, kind, importance, strength, f"{name}{way}\nimportance {importance:.1%}")


def svg(graph: RouteGraph, tokens: Sequence[str], n_layers: int) -> str:
    """The graph as a figure of a page, with a slider that filters it."""
    drawn = laid_out(graph, tokens, n_layers)
    parts = [
        f"<text x='{LEFT - 10}' y='{y + 4:.1f}' text-anchor='end'>{name}</text>"
        f"<path d='M{LEFT} {y:.1f}H{drawn.width - 8:.1f}' style='stroke:var(--line,#e4e7ec)'/>"
        for y, name in drawn.layers
    ]
    for stroke in sorted(drawn.strokes, key=lambda each: each.importance):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in stroke.points)
        parts.append(
            f"<polyline points='{line}' fill='none' style='stroke:{_ink(stroke.kind)}' data-s='{stroke.strength:.6f}' "
            f"stroke-width='{_thick(stroke.importance):.2f}' opacity='{_dense(stroke.importance):.2f}' "
            f"stroke-linecap='round' data-tip=\"{report.escape(stroke.tip)}\"/>"
        )
    parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' style='fill:var(--ink,#1b1f24)'/>" for x, y in drawn.tops]
    foot = drawn.height - FOOT + 14
    parts += [
        f"<text x='{x:.1f}' y='{foot:.1f}' text-anchor='end' transform='rotate(-50 {x:.1f} {foot:.1f})'>"
        f"{report.escape(label)}</text>"
        for x, label in drawn.columns
    ]
    box = f"viewBox='0 0 {drawn.width:.0f} {drawn.height:.0f}' width='{drawn.width:.0f}'"
    legend = "".join(
        f"<b style='font-weight:500;margin-right:.8rem;color:{_ink(kind)}'>{name}</b>"
        for kind, name in ((ATTENTION, "heads"), (MLP, "MLPs"), (MLP_RESIDUAL, "residual stream"))
    )
    return (
        f"<figure><div class='scroll'><svg {box} style='font-size:11px;fill:var(--soft,#667085)'>{''.join(parts)}</svg>"
        f"</div><figcaption>{legend}<br>{_slider(graph)}</figcaption></figure>"
    )


def _slider(graph: RouteGraph) -> str:
    """Hides the edges that a threshold would drop."""
    finite = graph.strength[graph.strength.isfinite()]
    low = float(finite.min()) if len(finite) else 0.0
    script = (
        "const f=this.closest('figure');f.querySelector('output').textContent=(+this.value).toFixed(3);"
        "f.querySelectorAll('[data-s]').forEach(e=>e.style.display=+e.dataset.s>+this.value?'':'none')"
    )
    return (
        f"<label>shares above <input type='range' min='0' max='1' step='0.005' value='0' oninput=\"{script}\"> "
        f"<output>{low:.3f}</output></label>"
    )


@dataclass(frozen=True, eq=False)
class GraphChart(report.Chart):
    """A graph as a chart.

    Attributes:
        graph, tokens, n_layers: what is drawn.
        title: above the file.
    """

    graph: RouteGraph
    tokens: Sequence[str]
    n_layers: int
    title: str = ""

    def html(self) -> str:
        """The graph, with a slider that filters it."""
        return svg(self.graph, self.tokens, self.n_layers)

    def frame(self, width: float | None = None) -> report.Frame:
        """As wide as its tokens, unless a width is asked for."""
        drawn = laid_out(self.graph, self.tokens, self.n_layers)
        return report.Frame(width or max(drawn.width, 260) / 90, drawn.height / 90)

    def draw(self, axes: Sequence[Any]) -> None:
        """The graph on axes."""
        (place,), drawn = axes, laid_out(self.graph, self.tokens, self.n_layers)
        for y, _ in drawn.layers:
            place.axhline(y, color="#e4e7ec", linewidth=0.6, zorder=0)
        for stroke in sorted(drawn.strokes, key=lambda each: each.importance):
            place.plot(
                *zip(*stroke.points, strict=True), color=PLAIN[SERIES[stroke.kind]] if stroke.kind in SERIES else GREY,
                linewidth=_thick(stroke.importance) * 0.8, alpha=_dense(stroke.importance), solid_capstyle="round",
            )  # fmt: skip
        place.plot(*zip(*drawn.tops, strict=True), "o", color="#1b1f24", markersize=5)
        place.set_xlim(LEFT, drawn.width)
        place.set_ylim(drawn.layers[0][0] + 6, TOP - 10)
        place.set_xticks(*_split(drawn.columns), rotation=50, ha="right", fontsize=7)
        place.set_yticks(*_split(drawn.layers), fontsize=7)
        place.tick_params(length=0)
        for side in place.spines.values():
            side.set_visible(False)
        place.set_title(self.title, fontsize=8)


def _split(named: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [at for at, _ in named], [name.replace("$", r"\$") for _, name in named]


def _thick(importance: float) -> float:
    return 0.6 + 5.4 * importance


def _dense(importance: float) -> float:
    return 0.35 + 0.6 * importance


def _ink(kind: int) -> str:
    if kind not in SERIES:
        return "var(--soft,#667085)"
    return f"var(--s{SERIES[kind]},{PLAIN[SERIES[kind]]})"
