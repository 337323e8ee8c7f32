"""Positions as a setting, which files and command lines give too."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

import interp_core as ic


class PlacesConfig(ic.Config):
    """Settings that say which tokens count.

    Attributes:
        at: positions, as `Site.at` takes them; lists in a list are positions per row.
    """

    at: Any = None

    @field_validator("at")
    @classmethod
    def _per_row(cls, at: Any) -> Any:
        """Lists in a list are positions per row."""
        nested = isinstance(at, list) and at and all(isinstance(row, list) for row in at)
        return ic.PerRow(tuple(map(tuple, at))) if nested else at

    def places(self, work: ic.Work) -> int:
        """How many positions of a row are meant; of names and spans all, the most that they can be."""
        if isinstance(self.at, int):
            return 1
        if isinstance(self.at, slice):
            return len(range(*self.at.indices(work.tokens)))
        return len(self.at) if isinstance(self.at, list) else work.tokens
