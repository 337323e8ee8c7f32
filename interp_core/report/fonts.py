"""Letters of pictures that the usual font lacks: in another font that is installed, or by their numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_FAMILIES: dict[str, str | None] = {}
"""By letter that a default font lacks, the family of an installed font that has it; None: there is none."""


def drawable(text: str) -> str:
    """Text in which letters that no installed font has are written by their numbers, as control characters are."""
    if text.isascii():
        return text
    _look_up(text)
    return "".join(_by_number(letter) if _FAMILIES.get(letter, "") is None else letter for letter in text)


def columns_of(text: str) -> int:
    """How many columns of letters of one width it takes: Chinese, Japanese and Korean ones take two."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def legible(artist: Any) -> None:
    """Give every text within a figure or axes the fonts that it needs. Names of ticks have to be `drawable` before:
    they are written again whenever they are drawn."""
    from matplotlib.text import Text

    for text in artist.findobj(Text):
        if not (said := text.get_text()).isascii():
            text.set_text(drawable(said))
            text.set_fontfamily(_families(said, text.get_fontfamily()))


def _families(text: str, base: Sequence[str]) -> list[str]:
    """Families for a text: its own, and those that have what they lack."""
    own = [base] if isinstance(base, str) else list(base)
    more = {family for letter in text if (family := _FAMILIES.get(letter))}
    return [*own, *sorted(more - set(own))]


def _by_number(letter: str) -> str:
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _look_up(text: str) -> None:
    """Note where letters are that nobody has looked for; in one pass over the installed fonts."""
    try:
        from matplotlib.font_manager import FontProperties, fontManager
    except ImportError:  # whoever draws says so
        return
    usual = [
        fontManager.findfont(FontProperties(family=name), fallback_to_default=True) for name in (None, "monospace")
    ]
    sought = {letter for letter in text if letter not in _FAMILIES and not letter.isascii()}
    # a letter must be in both, the second of which draws coloured texts
    lacking = {letter for letter in sought if not all(_has(path, letter) for path in usual)}
    _FAMILIES.update(dict.fromkeys(lacking))
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        if not lacking:
            break
        if font.style == "normal" and font.weight in (400, "normal", "regular") and not _unusable(font.fname):
            there = {letter for letter in lacking if _has(font.fname, letter)}
            _FAMILIES.update(dict.fromkeys(there, font.name))
            lacking -= there


def _has(path: str, letter: str) -> bool:
    """Whether the font of a file has a letter."""
    from matplotlib.font_manager import get_font

    with suppress(RuntimeError, OSError):  # a font that is damaged, or gone
        return bool(get_font(path).get_char_index(ord(letter)))
    return False


def _unusable(path: str) -> bool:
    """Whether it is one of matplotlib's own for formulas, whose letters stand at other numbers, or one of pictures."""
    return Path(path).name.lower().startswith(("cm", "stix", "lastresort", "notocoloremoji"))
