"""An attribution as a piece of a page: the text with its tokens coloured, the tokens that count most, and both as text
to copy. On plain data, so that results, recipes and notebooks draw alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from interp_core import report

WHOLE = "all hops"
"""Name of the scores where there are vectors of single hops beside them."""


def layers_of(
    scores: Sequence[float], hops: Sequence[Sequence[float]] | None = None, mass: Sequence[float] | None = None
) -> dict[str, Sequence[float]]:
    """Scores and the vectors of hops as layers by name.

    Args:
        mass: what each hop passes on, in parts of what the first was given; goes into the names.
    """
    if hops is None or not len(hops):
        return {"score": scores}
    known = [math.nan] * len(hops) if mass is None else list(mass)
    named = [f"hop {i}" + ("" if math.isnan(m) else f" (passes on {100 * m:.2g} %)") for i, m in enumerate(known)]
    return {WHOLE: scores, **dict(zip(named, hops, strict=True))}


def top_tokens(
    tokens: Sequence[str],
    scores: Sequence[float],
    spans: Mapping[str, tuple[int, int]] | None = None,
    *,
    k: int = 10,
    stop: int | None = None,
) -> list[dict[str, Any]]:
    """The tokens that count most, for or against, those of equal size in the order of the text.

    Args:
        spans: half-open, by name; each row says which hold the token.
        stop: tokens from here on are left out (those of the target).

    Returns:
        rows of position, token, score, share of the mass of all tokens, and spans.
    """
    # fsum, so that shares do not depend on the order of the tokens
    total = math.fsum(abs(score) for score in scores if math.isfinite(score))
    known = [i for i in range(len(tokens) if stop is None else stop) if math.isfinite(scores[i])]
    best = sorted(known, key=lambda i: -abs(scores[i]))[:k]
    return [
        {
            "pos": i,
            "token": tokens[i],
            "score": float(scores[i]),
            "share": abs(scores[i]) / total if total else 0.0,
            "in": ", ".join(name for name, (start, end) in (spans or {}).items() if start <= i < end),
        }
        for i in best
    ]


def strip_page(
    tokens: Sequence[str],
    layers: Mapping[str, Sequence[float]],
    spans: Mapping[str, tuple[int, int]] | None = None,
    *,
    k: int = 10,
    stop: int | None = None,
    title: str = "",
    scale: str = "score",
) -> str:
    """A piece of a page; every text is escaped.

    Args:
        tokens: as text, with their white space.
        layers: numbers by name, each one per token, NaN drawn grey; the first is what tokens are ranked by.
        spans: half-open, by name (prompt, thinking, sink); underlined.
        k, stop: as `top_tokens`.
        title: below the text.
        scale: what the numbers are.

    Raises:
        PlanError: no tokens, another number of values, a span outside the text.
    """
    strip = strip_of(tokens, layers, spans, title=title, scale=scale)
    ranked = top_tokens(tokens, next(iter(strip.layers.values())), spans, k=k, stop=stop)
    rows = [{"token": report.visible(row["token"]), **{n: v for n, v in row.items() if n != "token"}} for row in ranked]
    shown = [{**row, "share": f"{100 * row['share']:.1f} %"} for row in rows]
    return (
        strip.html()
        + report.table(shown)
        + report.copyable("Text to copy", "".join(tokens))
        + report.copyable("Scores to copy (tab-separated; tokens as JSON strings)", _tabbed(tokens, strip.layers))
    )


def strip_of(
    tokens: Sequence[str],
    layers: Mapping[str, Sequence[float]],
    spans: Mapping[str, tuple[int, int]] | None = None,
    *,
    title: str = "",
    scale: str = "score",
) -> report.TokenStrip:
    """The chart alone, for `png`; as `strip_page`. Scales are symmetric about 0 if any number is negative."""
    negative = any(value < 0 for values in layers.values() for value in values)
    return report.TokenStrip(list(tokens), dict(layers), spans=spans, diverging=negative, colorbar=scale, title=title)


def _tabbed(tokens: Sequence[str], layers: Mapping[str, Sequence[float]]) -> str:
    lines = ["\t".join(["pos", "token", *layers])]
    for i, token in enumerate(tokens):
        numbers = [f"{values[i]:.6g}" for values in layers.values()]
        lines.append("\t".join([str(i), json.dumps(token, ensure_ascii=False), *numbers]))
    return "\n".join(lines)
