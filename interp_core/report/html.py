"""Self-contained HTML: one file, no network, everything escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .colors import DARK, SERIES, css, limits_of

_LIGHT = {"ink": "#1b1f24", "soft": "#667085", "line": "#e4e7ec", "card": "#fff", "back": "#f2f4f7", "code": "#f6f7f9"}
_NIGHT = {
    "ink": "#e6e9ee",
    "soft": "#9aa4b2",
    "line": "#3a424d",
    "card": "#1c2128",
    "back": "#12161b",
    "code": "#262d36",
}


def _colours(named: Mapping[str, str], series: Sequence[str]) -> str:
    """Style sheet variables."""
    return ";".join(
        f"--{name}:{value}" for name, value in {**named, **{f"s{i}": c for i, c in enumerate(series)}}.items()
    )


STYLE = (
    f"""
.ic{{{_colours(_LIGHT, SERIES)};color-scheme:light dark}}
@media(prefers-color-scheme:dark){{.ic{{{_colours(_NIGHT, DARK)}}}}}
"""
    + """.ic{background:var(--back);font:15px/1.55 system-ui,sans-serif;color:var(--ink)}
.ic h1{font-size:1.7rem;margin:0 0 .3rem;letter-spacing:-.02em}.ic h2{font-size:1.15rem;margin:0 0 .4rem}
.ic p{margin:.3rem 0 .8rem;max-width:46rem}.ic .soft{color:var(--soft)}
.ic section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.3rem;margin:1.1rem 0}
.ic .scroll{overflow-x:auto}.ic table{border-collapse:separate;border-spacing:2px;font-size:12.5px}
.ic th{font-weight:500;color:var(--soft);padding:.1rem .45rem;text-align:left;white-space:pre}
.ic thead th{vertical-align:bottom}.ic td{padding:.2rem .45rem;white-space:pre;border-radius:4px}
.ic table.grid thead th{text-align:center}.ic table.grid tbody th{position:sticky;left:0;background:var(--card)}
.ic table.grid td{text-align:center;font-family:ui-monospace,monospace;min-width:2.2rem;cursor:default}
.ic table.fine{border-spacing:1px}.ic table.fine td{min-width:.55rem;height:.6rem;padding:0;border-radius:1px}
.ic table.fine th{padding:0 .3rem 0 0;font-size:10px;line-height:1}.ic table.fine thead th{max-width:0;text-align:left}
.ic table.rows td{border-bottom:1px solid var(--line);border-radius:0;white-space:pre-wrap}
.ic code,.ic pre{font-family:ui-monospace,monospace;font-size:12.5px}
.ic pre{background:var(--code);border-radius:8px;padding:.7rem .9rem;overflow-x:auto;white-space:pre-wrap;margin:.4rem 0}
.ic .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:.8rem}.ic .pair pre{margin:0}
.ic .tokens{line-height:1.9}.ic .tokens span{font-family:ui-monospace,monospace;white-space:pre-wrap;border-radius:3px;padding:.08rem 0}
.ic form.layers{display:flex;flex-wrap:wrap;gap:.35rem;margin:0}.ic form.layers>.layer{order:1;flex:0 0 100%;display:none}
.ic form.layers>input:checked+.layer{display:block}
.ic form.layers>input{appearance:none;-webkit-appearance:none;width:auto;height:auto;margin:0;padding:.05rem .6rem;cursor:pointer;
border:1px solid var(--line);border-radius:999px;font:13px/1.6 system-ui,sans-serif;color:var(--soft);background:none}
.ic form.layers>input::after{content:attr(aria-label)}.ic form.layers>input:checked{color:var(--ink);border-color:currentColor}
.ic form.layers>input:focus-visible{outline:2px solid var(--s0);outline-offset:1px}
.ic details{margin:.5rem 0}.ic summary{cursor:pointer;color:var(--soft);font-size:13px}.ic .whole{user-select:all}
.ic .spans b{font-weight:500;border-bottom:3px solid;margin-right:.8rem;color:inherit}
.ic figcaption{color:var(--soft);font-size:13px;margin-top:.5rem}.ic figure{margin:.4rem 0}
.ic .bar{display:inline-block;width:9rem;height:.7rem;border-radius:3px;vertical-align:middle;margin:0 .4rem}
.ic-tip{position:fixed;z-index:9;pointer-events:none;background:#1b1f24;color:#fff;border-radius:7px;padding:.45rem .65rem;
font:12px/1.45 ui-monospace,monospace;white-space:pre;max-width:30rem;opacity:0;transition:opacity .08s}
"""
)
_PAGE_STYLE = (
    "body{margin:0}main.ic{min-height:100vh;box-sizing:border-box;padding:2rem max(1.2rem,(100vw - 61.6rem)/2)}"
)
_SCRIPT = """
(()=>{if(window.icTip)return;const t=window.icTip=document.createElement('div');t.className='ic-tip';
document.body.append(t);document.addEventListener('mousemove',e=>{const c=e.target.closest&&e.target.closest('[data-tip]');
if(!c){t.style.opacity=0;return}t.textContent=c.dataset.tip;t.style.opacity=1;
t.style.left=Math.min(e.clientX+14,innerWidth-t.offsetWidth-8)+'px';
t.style.top=Math.min(e.clientY+14,innerHeight-t.offsetHeight-8)+'px'})})()
"""


FINE = 40
"""Columns of cells without text from which on a matrix is drawn finely."""
TURNING = frozenset("\u202a\u202b\u202d\u202e\u2066\u2067\u2068")
"""Letters that turn the direction of what follows them, up to the end of the line or of what isolates them."""


class Section(NamedTuple):
    """A titled part of a page: `text` is plain, `body` is HTML."""

    title: str
    text: str
    body: str


def script() -> str:
    """The few lines of JavaScript that show tooltips."""
    return f"<script>{_SCRIPT}</script>"


def fragment(body: str) -> str:
    """A piece of a page that stands by itself, for notebooks."""
    return f"<style>{STYLE}</style><div class='ic'>{body}</div>{script()}"


def page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """A whole page."""
    parts = [f"<h1>{escape(title)}</h1>" + (f"<p class='soft'>{escape(intro)}</p>" if intro else "")]
    for section in sections:
        head = f"<h2>{escape(section.title)}</h2>" if section.title else ""
        text = f"<p>{escape(section.text)}</p>" if section.text else ""
        parts.append(f"<section>{head}{text}{section.body}</section>")
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<style>{_PAGE_STYLE}{STYLE}</style></head><body><main class='ic'>{body}</main>{script()}</body></html>\n"
    )


def escape(text: object) -> str:
    """Text made safe, also inside attributes."""
    return html.escape(str(text), quote=True)


def visible(token: str) -> str:
    """A token with its white space made visible at the ends, and control characters by their numbers."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda letter: f"\\x{ord(letter[0]):02x}", shown)
    return "·" + shown[1:] if shown.startswith(" ") else shown or "∅"


def short(text: str, limit: int = 10) -> str:
    """Text cut to fit a cell."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    tips: Sequence[Sequence[str]] | None = None,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    caption: str = "",
) -> str:
    """A matrix as coloured cells with tooltips: `rows` × `columns`, cell text and tips optional. Of many columns whose
    cells say nothing, cells are small and every eighth column is named."""
    low, high = limits or limits_of(values, diverging)
    fine = texts is None and len(columns) > FINE
    named = [c if not fine or j % 8 == 0 else "" for j, c in enumerate(columns)]
    head = "".join(f"<th>{escape(visible(c) if c else c)}</th>" for c in named)
    lines = []
    for i, label in enumerate(rows):
        cells = []
        for j, value in enumerate(values[i]):
            back, ink = css(value, low, high, diverging)
            tip = tips[i][j] if tips else f"{label}, {visible(columns[j])}: {number(value)}"
            text = short(visible(texts[i][j])) if texts else ""
            cells.append(f"<td style='background:{back};color:{ink}' data-tip=\"{escape(tip)}\">{escape(text)}</td>")
        lines.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    bar = scale_bar(low, high, diverging)
    return (
        f"<figure><div class='scroll'><table class='grid{' fine' * fine}'><thead><tr><th></th>{head}</tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table></div><figcaption>{bar}<br>{escape(caption)}</figcaption></figure>"
    )


def tokens(
    labels: Sequence[str],
    layers: Mapping[str, Sequence[float]],
    *,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    spans: Mapping[str, tuple[int, int]] | None = None,
    caption: str = "",
    scale: str = "",
) -> str:
    """A text whose tokens are coloured by a number each; named spans are underlined. Of several layers of numbers the
    first shows, and the reader switches (by style sheet alone)."""
    marks = _marks(spans or {}, len(labels))
    drawn = []
    for values in layers.values():
        low, high = limits or limits_of([values], diverging)
        parts = []
        for label, value, (mark, within) in zip(labels, values, marks, strict=True):
            back, ink = css(value, low, high, diverging)
            tip = escape(f"{visible(label)}: {number(value)}{within}")
            if not TURNING.isdisjoint(label):
                mark += ";unicode-bidi:isolate"
            parts.append(f"<span style='background:{back};color:{ink}{mark}' data-tip=\"{tip}\">{escape(label)}</span>")
        bar = f"<figcaption>{escape(scale)} {scale_bar(low, high, diverging)}</figcaption>"
        drawn.append(f"<div class='tokens'>{''.join(parts)}</div>{bar}")
    named = "".join(f"<b style='border-color:{_span_ink(i)}'>{escape(name)}</b>" for i, name in enumerate(spans or {}))
    legend = f"<div class='spans'>{named}</div>" if named else ""
    below = f"<figcaption>{legend}{escape(caption)}</figcaption>" if legend or caption else ""
    return f"<figure>{drawn[0] if len(drawn) == 1 else switched(list(layers), drawn)}{below}</figure>"


def switched(names: Sequence[str], bodies: Sequence[str]) -> str:
    """Pieces of which the reader sees one. A form of its own keeps its buttons apart from those of other charts."""
    parts = [
        f"<input type='radio' name='layer' aria-label=\"{escape(name)}\"{' checked' * (i == 0)}>"
        f"<div class='layer'>{body}</div>"
        for i, (name, body) in enumerate(zip(names, bodies, strict=True))
    ]
    return f"<form class='layers' autocomplete='off'>{''.join(parts)}</form>"


def _span_ink(i: int) -> str:
    number_of = (i + 1) % len(SERIES)
    return f"var(--s{number_of},{SERIES[number_of]})"


def _marks(spans: Mapping[str, tuple[int, int]], count: int) -> list[tuple[str, str]]:
    """Each token's underline, and the names of the spans that it is in; where spans overlap, the last one's line shows."""
    marks = [("", "")] * count
    for i, (name, (start, stop)) in enumerate(spans.items()):
        for place in range(start, stop):
            line = f";border-bottom:3px solid {_span_ink(i)};border-radius:0"
            marks[place] = (line, f"{marks[place][1]}\n{name}")
    return marks


def scale_bar(low: float, high: float, diverging: bool) -> str:
    """A colour bar between its ends."""
    stops = ",".join(css(low + (high - low) * k / 8, low, high, diverging)[0] for k in range(9))
    return f"{number(low)}<span class='bar' style='background:linear-gradient(90deg,{stops})'></span>{number(high)}"


def copyable(title: str, text: str) -> str:
    """Text behind a title that opens it; a click takes the whole of it, to be copied."""
    return f"<details><summary>{escape(title)}</summary><pre class='whole'>{escape(text)}</pre></details>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; columns are the keys of the first."""
    if not rows:
        return "<p class='soft'>nothing</p>"
    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(number(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<div class='scroll'><table class='rows'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def number(value: Any) -> str:
    """A number in few digits; anything else as text."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.4g}"
    return str(value)
