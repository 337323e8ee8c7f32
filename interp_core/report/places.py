"""How places in a text are called: `7 ·hot` along an axis, `position 7, ' hot'` in a sentence."""

from __future__ import annotations

import re

from .html import visible


def place_name(position: str, token: str | None) -> str:
    """A position as axes name it, with its token if there is one to tell."""
    return position if token is None else f"{position} {visible(token)}"


def place_words(name: str) -> str:
    """A position's name, `place_name` or any other, as sentences and titles have it."""
    parts = re.fullmatch(r"(-?\d+)(?: (.+))?", name)
    if parts is None:
        return name
    number, token = parts.groups()
    where = "the last position" if number == "-1" else f"position {number}"
    return where if token is None else f"{where}, {_spelled(token)}"


def _spelled(token: str) -> str:
    """A token that `visible` has made, in quotation marks and with its space."""
    return f"'{' ' + token[1:] if token.startswith('·') else '' if token == '∅' else token}'"
