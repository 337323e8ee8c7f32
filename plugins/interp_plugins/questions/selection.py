"""Selection by a seed: the same questions whatever else the file has, every kind in its share.

Within a kind, questions are ranked by a hash of the seed and their names. The r-th of a kind's m questions stands at
(r - 1/2) / m; all are ranked by that, so that any number of first ones holds each kind in its share, give or take one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence


def ranked(names: Sequence[str], strata: Sequence[Hashable], seed: int) -> list[int]:
    """Indices of names in the order in which they are drawn."""
    members: dict[Hashable, list[int]] = {}
    # a hash of the name, not the place in the file: another row more or less leaves the order of the others
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    for i in sorted(range(len(names)), key=keys.__getitem__):
        members.setdefault(strata[i], []).append(i)
    # each stratum is spread evenly from 0 to 1, so that any first so many have it in its share
    places = {i: (rank + 0.5) / len(part) for part in members.values() for rank, i in enumerate(part)}
    return sorted(places, key=lambda i: (places[i], keys[i]))
