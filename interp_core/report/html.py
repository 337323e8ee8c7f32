"""Self-contained HTML: one file, no network, everything escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..columns import shortened
from .colors import DARK, SERIES, at_night, below_zero, css, limits_of

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
@media(prefers-color-scheme:dark){{.ic{{{_colours(_NIGHT, DARK)}}}
.ic [style*='--d:']{{background:var(--d)!important;fill:var(--d)!important;color:var(--ink)!important}}}}
"""
    + """.ic{background:var(--back);font:15px/1.55 system-ui,sans-serif;color:var(--ink)}
.ic h1{font-size:1.7rem;margin:0 0 .3rem;letter-spacing:-.02em}.ic h2{font-size:1.15rem;margin:0 0 .4rem}
.ic h3{font-size:.95rem;font-weight:600;margin:1.1rem 0 .2rem}.ic p{margin:.3rem 0 .8rem;max-width:46rem}.ic ul{margin:.8rem 0;padding-left:1.2rem;max-width:44.8rem}.ic li{margin:.2rem 0}.ic .soft{color:var(--soft)}
.ic section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.3rem;margin:1.1rem 0}
.ic .scroll{overflow-x:auto}.ic .scroll>svg{min-width:34rem}.ic table{border-collapse:separate;border-spacing:2px;font-size:12.5px}
.ic th{font-weight:500;color:var(--soft);padding:.1rem .45rem;text-align:left;white-space:pre}
.ic thead th{vertical-align:bottom}.ic td{padding:.2rem .45rem;white-space:pre;border-radius:4px}
.ic table.grid thead th{text-align:center}.ic table.grid tbody th{position:sticky;left:0;z-index:1;background:var(--card)}
.ic table.grid td{text-align:center;font-family:ui-monospace,monospace;min-width:2.2rem;cursor:default}
.ic table.fine{border-spacing:1px}.ic table.fine td{min-width:.55rem;height:.6rem;padding:0;border-radius:1px}
.ic table.fine th{padding:0 .3rem 0 0;font-size:10px;line-height:1}.ic table.fine thead th{max-width:0;text-align:left}
.ic table.rows{border-collapse:collapse}.ic table.rows td{vertical-align:top;border-bottom:1px solid var(--line);border-radius:0;white-space:pre-wrap}
.ic table.rows td.long{min-width:13rem}
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
.ic .minus{position:relative}.ic .minus::after{content:'';position:absolute;left:30%;right:30%;top:calc(50% - .5px);
border-top:1px solid currentColor}.ic .tokens .minus::after{left:calc(50% - .25em);right:calc(50% - .25em);top:auto;bottom:1px}
.ic details{margin:.5rem 0}.ic summary{cursor:pointer;color:var(--soft);font-size:13px}.ic .whole{user-select:all}
.ic .spans b{font-weight:500;border-bottom:3px solid;margin-right:.8rem;color:inherit}
.ic [data-tip]:focus-visible{outline:2px solid var(--s0);outline-offset:1px}
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
t.setAttribute('role','status');document.body.append(t);
const at=e=>e.target.closest&&e.target.closest('.ic [data-tip]');
const show=(c,x,y)=>{if(!c){t.style.opacity=0;return}if(t.textContent!==c.dataset.tip)t.textContent=c.dataset.tip;
t.style.opacity=1;t.style.left=Math.max(8,Math.min(x+14,innerWidth-t.offsetWidth-8))+'px';
t.style.top=Math.max(8,Math.min(y+14,innerHeight-t.offsetHeight-8))+'px'};
document.addEventListener('pointermove',e=>show(at(e),e.clientX,e.clientY));
document.addEventListener('pointerdown',e=>show(at(e),e.clientX,e.clientY));
document.addEventListener('focusin',e=>{const c=at(e),r=c&&c.getBoundingClientRect();show(c,r?r.left:0,r?r.bottom:0)});
document.addEventListener('keydown',e=>{const c=at(e);if(e.key==='Escape')show(null);if(!c)return;
const all=[...c.closest('figure').querySelectorAll('[data-tip]')],i=all.indexOf(c),row=c.closest('tr');
const step=row?row.querySelectorAll('[data-tip]').length:1;
const n=all[i+({ArrowLeft:-1,ArrowRight:1,ArrowUp:-step,ArrowDown:step}[e.key]||0)];
if(!n||n===c)return;e.preventDefault();c.tabIndex=-1;n.tabIndex=0;n.focus()})})()
"""
"""Shows what a cell holds when it is pointed at, touched, or reached by the keyboard: tab leads into a chart, the arrow
keys from cell to cell. Screen readers are told by the role of the tip."""


LONG = 40
"""Letters of a cell from which on it has a least width."""
FINE = 40
"""Columns of cells without text from which on a matrix is drawn finely."""
MARKS, MINUS = "; – marks what is below 0", " class='minus'"
TAB = " tabindex='0'"
"""Of the first cell of a chart, at which the keyboard comes in."""
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
    return shortened(text, limit)


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str | None]] | None = None,
    tips: Sequence[Sequence[str]] | None = None,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    caption: str = "",
    percent: bool = False,
    across: str = "",
    scale: str = "",
) -> str:
    """A matrix as coloured cells with tooltips: `rows` × `columns`, cell text and tips optional. Of many columns whose
    cells say nothing, cells are small and every eighth column is named. `across` says above the columns what they are,
    `scale` beside the colour bar what the numbers are."""
    low, high = limits or limits_of(values, diverging)
    # A name per column would be wider than its cell, and so would make the whole matrix wide.
    fine = texts is None and len(columns) > FINE
    named = [c if not fine or j % 8 == 0 else "" for j, c in enumerate(columns)]
    head = "".join(f"<th scope='col'>{escape(visible(c) if c else c)}</th>" for c in named)
    lines = []
    for i, label in enumerate(rows):
        cells = []
        for j, value in enumerate(values[i]):
            tip = (
                tips[i][j]
                if tips
                else f"{label}, {visible(columns[j])}: {f'{value:.1%}' if percent else number(value)}"
            )
            said = texts[i][j] if texts else None
            text = "" if said is None else short(visible(said))
            cells.append(
                f"<td{TAB * (i == j == 0)}{_minus(value, high, diverging) if not text else ''} "
                f"style='{hue(value, low, high, diverging)}' data-tip=\"{escape(tip)}\">{escape(text)}</td>"
            )
        lines.append(f"<tr><th scope='row'>{escape(label)}</th>{''.join(cells)}</tr>")
    body = "".join(lines)
    bar = f"{scale_bar(low, high, diverging, percent)} {escape(scale)}{MARKS * (MINUS in body)}"
    above = (
        f"<tr><td></td><th colspan='{len(columns)}' style='text-align:left'>{escape(across)}</th></tr>"
        if across
        else ""
    )
    return (
        f"<figure><div class='scroll'><table class='grid{' fine' * fine}' aria-label=\"{escape(caption)}\"><thead>{above}"
        f"<tr><td></td>{head}</tr></thead><tbody>"
        f"{body}</tbody></table></div><figcaption>{bar}<br>{escape(caption)}</figcaption></figure>"
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
        parts: list[str] = []
        for label, value, (mark, within) in zip(labels, values, marks, strict=True):
            tip = escape(f"{visible(label)}: {number(value)}{within}")
            if not TURNING.isdisjoint(label):
                mark += ";unicode-bidi:isolate"
            parts.append(
                f"<span{TAB * (not parts)}{_minus(value, high, diverging)} "
                f"style='{hue(value, low, high, diverging)}{mark}' data-tip=\"{tip}\">{escape(label)}</span>"
            )
        body = "".join(parts)
        bar = f"<figcaption>{escape(scale)} {scale_bar(low, high, diverging)}{MARKS * (MINUS in body)}</figcaption>"
        drawn.append(f"<div class='tokens'>{body}</div>{bar}")
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


def scale_bar(low: float, high: float, diverging: bool, percent: bool = False) -> str:
    """A colour bar between its ends."""
    ends = [share(end) if percent else number(end) for end in (low, high)]
    steps = [low + (high - low) * k / 8 for k in range(9)]
    day, night = (
        f"linear-gradient(90deg,{','.join(shades)})"
        for shades in (
            [css(step, low, high, diverging)[0] for step in steps], [at_night(s, low, high, diverging) for s in steps]
        )
    )  # fmt: skip
    return f"{ends[0]}<span class='bar' style='background:{day};--d:{night}'></span>{ends[1]}"


def hue(value: float, low: float, high: float, diverging: bool) -> str:
    """The style of a cell: its colours on light and on dark pages."""
    back, ink = css(value, low, high, diverging)
    return f"background:{back};color:{ink};--d:{at_night(value, low, high, diverging)}"


def _minus(value: float, high: float, diverging: bool) -> str:
    """The class of what bears a mark since it is below zero."""
    return MINUS if below_zero(value, high, diverging) else ""


def copyable(title: str, text: str) -> str:
    """Text behind a title that opens it; a click takes the whole of it, to be copied."""
    return f"<details><summary>{escape(title)}</summary><pre class='whole'>{escape(text)}</pre></details>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; columns are the keys of the first."""
    if not rows:
        return "<p class='soft'>nothing</p>"
    head = "".join(f"<th scope='col'>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>" for row in rows)
    return f"<div class='scroll'><table class='rows'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(entry: Any) -> str:
    """A long text keeps a width at which it can be read on a phone: the table scrolls there."""
    text = number(entry)
    return f"<td{' class=long' * (len(text) > LONG)}>{escape(text)}</td>"


def cell_texts(values: Sequence[Sequence[float]], percent: bool = False) -> list[list[str | None]]:
    """Numbers as the cells of a heat map show them: to two digits of the largest; nothing where that is 0, or less than
    1 % of shares, so that what there is stands out."""
    factor, sign = (100, "%") if percent else (1, "")
    top = factor * max((abs(entry) for line in values for entry in line if math.isfinite(entry)), default=0.0)
    digits = min(12, max(0, 1 - math.floor(math.log10(top)))) if top else 0

    def say(entry: float) -> str | None:
        if not math.isfinite(entry):
            return "–"
        rounded = round(factor * entry, digits)
        return f"{rounded:.{digits}f}{sign}" if rounded and not (percent and abs(rounded) < 1) else None

    return [[say(entry) for entry in line] for line in values]


def share(part: float) -> str:
    """A share in per cent: whole ones where that says enough."""
    return "nan" if math.isnan(part) else f"{part:.0%}" if abs(part) >= 0.095 or not part else f"{part:.1%}"


def number(value: Any) -> str:
    """A number in few digits; anything else as text."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.4g}"
    return str(value)
