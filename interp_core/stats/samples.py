"""What statistics are made of: numbers that are checked, and the units that resamples draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ..errors import PlanError, wrong

BLOCK = 64
"""Resamples that are worked on together."""


def numbers(what: str, values: Any, *, finite: bool = True, ndim: int | None = 1) -> Float[np.ndarray, " ..."]:
    """Lists, arrays and tensors as float64.

    Args:
        what: the name for messages.
        finite: refuse infinities too; NaN is always refused.
        ndim: how many axes they must have; None: at least one, the first of them samples.

    Raises:
        PlanError: no numbers, none at all, not finite, other axes.
    """
    if hasattr(values, "detach"):  # a tensor; bfloat16 has no numpy dtype
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError(wrong(what, "numbers", values)) from error
    if not array.ndim or (ndim is not None and array.ndim != ndim):
        axes = "at least one axis" if ndim is None else f"{ndim} axis" if ndim == 1 else f"{ndim} axes"
        raise PlanError(f"{what} takes numbers of {axes}, these have shape {array.shape}")
    if not array.size:
        raise PlanError(f"{what} is empty (shape {array.shape}); a statistic needs samples")
    bad = ~np.isfinite(array) if finite else np.isnan(array)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise PlanError(
            f"{what}: {int(bad.sum())} of {array.size} are not finite, the first at {list(place)}: {array[place]}. "
            "Leave samples out yourself, and say how many"
        )
    return array


def aligned(owner: str, **arrays: Float[np.ndarray, " ..."]) -> None:
    """Refuse samples that do not belong together.

    Raises:
        PlanError: of different lengths.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise PlanError(f"{owner}: {told}; they must have one entry per sample each")


def whole(what: str, value: Any, least: int) -> int:
    """A count that is at least so much.

    Raises:
        PlanError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise PlanError(wrong(what, f"a whole number, at least {least}", value))
    return int(value)


def share(what: str, value: Any, *, ends: bool = False) -> float:
    """A number between 0 and 1; without the ends, unless they are allowed.

    Raises:
        PlanError: it is none.
    """
    inside = isinstance(value, (int, float)) and (0 <= value <= 1 if ends else 0 < value < 1)
    if not inside:
        raise PlanError(wrong(what, "a number between 0 and 1", value))
    return float(value)


def one_of(what: str, value: Any, known: Sequence[str]) -> str:
    """A name of a short list.

    Raises:
        PlanError: another one.
    """
    if value not in known:
        raise PlanError(wrong(what, " or ".join(repr(name) for name in known), value))
    return str(value)


@dataclass(frozen=True, eq=False)
class Units:
    """What is drawn again and again: samples, or clusters of them, from one or several strata.

    Attributes:
        of: the unit of each sample.
        strata: the units of each stratum; every one is drawn from by itself, as often as it has units.
    """

    of: Int[np.ndarray, " sample"]
    strata: tuple[Int[np.ndarray, " _"], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.strata))

    def drawn(self, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "resample sample"]]:
        """How often each resample has each sample, in blocks."""
        rng = np.random.default_rng(seed)
        for start in range(0, resamples, BLOCK):
            block = min(BLOCK, resamples - start)
            counts = np.zeros((block, self.count))
            for units in self.strata:
                picks = units[rng.integers(0, len(units), (block, len(units)))]
                flat = picks + np.arange(block)[:, None] * self.count
                counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)
            yield counts[:, self.of]

    def without_each(self) -> Iterator[Float[np.ndarray, "unit sample"]]:
        """Each unit left out once: how often the others' samples are there, in blocks."""
        for start in range(0, self.count, BLOCK):
            left_out = np.arange(start, min(start + BLOCK, self.count))
            yield (self.of != left_out[:, None]).astype(np.float64)


def units_of(owner: str, n: int, clusters: Any = None, strata: Any = None) -> Units:
    """Units of so many samples.

    Raises:
        PlanError: other lengths, fewer than two units, a cluster in two strata.
    """
    of = _numbered(f"{owner}: clusters", n, clusters, np.arange(n))
    layer = _numbered(f"{owner}: strata", n, strata, np.zeros(n, dtype=np.int64))
    count = int(of.max()) + 1
    if count < 2:
        raise PlanError(
            f"{owner}: {n} sample(s) in {count} unit; how much they vary can be told from two units at least"
        )
    stratum = np.zeros(count, dtype=np.int64)
    stratum[of] = layer
    if (stratum[of] != layer).any():
        raise PlanError(f"{owner}: a cluster has samples in two strata; give strata that keep clusters whole")
    return Units(of, tuple(np.flatnonzero(stratum == k) for k in range(int(stratum.max()) + 1)))


def _numbered(what: str, n: int, labels: Any, default: Int[np.ndarray, " sample"]) -> Int[np.ndarray, " sample"]:
    """Labels (ids, names) as numbers from 0, in the order in which they come."""
    if labels is None:
        return default
    items = list(labels.tolist() if hasattr(labels, "tolist") else labels)
    if len(items) != n:
        raise PlanError(f"{what}: {len(items)} labels for {n} samples; give one per sample")
    known: dict[Any, int] = {}
    return np.array([known.setdefault(item, len(known)) for item in items])
