"""What the columns of a table mean, in words, for pages and terminals.

Source: this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TITLE = "What the columns are"


def legend(words: Mapping[str, str], columns: Iterable[str]) -> str:
    """A line for each of the columns that has words."""
    said = {name: words[name] for name in columns if name in words}
    widest = max(map(len, said), default=0)
    return "\n".join(f"{name:{widest}}  {text}" for name, text in said.items())
