"""What a causal study writes down: one row per sample, intervention, mode and layer, from which all else is worked out.

    {"sample", "image", "group", "pilot",                 who: name, image (what is drawn), kind of question, pilot
     "intervention", "mode", "layer", "hit", "n_layers",  what: "replace:blind", "random", 5; layers really changed
     "delta", "delta_sum", "delta_first", "delta_foil",   effects in nats: clean - intervened
     "mean", "first", "kl", "p", "clean_p",               scores of the intervened run
     "right", "clean_right", "token", "clean_token", "m"} greedy answer right, its first token, tokens of the answer

Rows of "blind" have no layer (null): the whole image replaced before anything reads it. Curves, τ, cliffs, populations
and gates are functions of these rows (`Records.effects`), so that another τ needs no model.

Source: specification of this project; ρ = 100 (p - p_clean) / p_clean of Zhang et al. (2025), arXiv:2411.18620.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

import interp_core as ic
from interp_core import runs, stats

from .._json_files import json_rows
from .depth import Layers

Row = Mapping[str, Any]
Measure = Literal["delta", "delta_sum", "delta_first", "delta_foil", "kl", "rho", "flip", "right"]
Answers = Literal["all", "single", "generated"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
KEY = ("sample", "intervention", "mode", "layer")
NEEDED = (*KEY, "image", "pilot", "delta", "n_layers")
BLIND = "blind"
"""Intervention of rows without a layer: the whole image replaced at the input."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of one intervention.

    Attributes:
        name: intervention and mode.
        samples, images, groups: of the rows.
        layers: of the columns.
        values: `[sample layer]`.
    """

    name: str
    samples: tuple[str, ...]
    images: tuple[str, ...]
    groups: tuple[str, ...]
    layers: Layers
    values: Float[np.ndarray, "sample layer"]

    def boot(self, resamples: int = 2000, seed: int = 0, *, strata: bool = False) -> stats.Bootstrap:
        """A bootstrap that draws these samples' images.

        Args:
            strata: as many images of each group as there are; an image has one group then.
        """
        groups = self.groups if strata else None
        return stats.Bootstrap(self.images, groups, resamples=resamples, seed=seed)

    def at(self, layer: int) -> Float[np.ndarray, " sample"]:
        """The effects at a layer.

        Raises:
            ReadError: it is not among the records.
        """
        if layer not in self.layers.numbers:
            raise ic.ReadError(f"{self.name} has no layer {layer}, but {list(self.layers.numbers)}; run it there")
        return self.values[:, self.layers.numbers.index(layer)]


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of a causal study."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        seen: set[tuple[Any, ...]] = set()
        for number, row in enumerate(self.rows):
            if missing := [name for name in NEEDED if name not in row]:
                raise ic.PlanError(f"record {number} has no {missing[0]!r}; rows need {', '.join(NEEDED)}")
            key = tuple(row[name] for name in KEY)
            if key in seen:
                raise ic.PlanError(f"two records of {dict(zip(KEY, key, strict=True))}; one study has one of each")
            seen.add(key)

    @staticmethod
    def of(rows: Iterable[Row]) -> Records:
        """From rows."""
        return Records(tuple(rows))

    @staticmethod
    def read(path: str | Path) -> Records:
        """From a JSONL file.

        Raises:
            LoadError: no such file, or a line that is no row.
        """
        return Records(tuple(row for _, row in json_rows(path)))

    def text(self) -> str:
        """As JSONL."""
        return runs.json_lines([dict(row) for row in self.rows])

    @cached_property
    def hash(self) -> str:
        """Sixteen digits of the rows, whatever their order: what a later stage says its boundary came from."""
        return runs.digest(sorted(runs.digest(dict(row)) for row in self.rows))[:16]

    @property
    def interventions(self) -> list[tuple[str, str]]:
        """Interventions with their modes, in the order of the rows."""
        return list(dict.fromkeys((row["intervention"], row["mode"]) for row in self.rows))

    def effects(
        self,
        intervention: str,
        mode: str | None = None,
        *,
        measure: Measure = "delta",
        pilot: bool | None = False,
        answers: Answers = "all",
        where: Callable[[Row], bool] | None = None,
    ) -> Effects:
        """Effects of one intervention as a matrix.

        Args:
            mode: of the intervention; None: the only one.
            measure: what of the rows.
            pilot: pilots alone, all others alone, or None: everyone.
            answers: "single": those of one token; "generated": those of several.
            where: which rows count.

        Raises:
            ReadError: no such intervention or mode, samples without all layers, or nothing left.
        """
        if measure not in MEASURES:
            raise ic.PlanError(f"no measure {measure!r}. {ic.errors.nearest(measure, MEASURES)}")
        mode = self._mode(intervention, mode)
        kept = [
            row for row in self.rows
            if (row["intervention"], row["mode"]) == (intervention, mode)
            and (pilot is None or row["pilot"] is pilot)
            and (answers == "all" or (row["m"] == 1) == (answers == "single"))
            and (where is None or where(row))
        ]  # fmt: skip
        name = f"{intervention} {mode}".strip()
        if not kept:
            who = {True: "pilots", False: "samples that are no pilots", None: "samples"}[pilot]
            raise ic.ReadError(f"no records of {name} for {who} ({answers} answers); {len(self.rows)} records in all")
        return _matrix(name, kept, measure)

    def blind(
        self, effects: Effects, mode: str | None = None, measure: Measure = "delta"
    ) -> Float[np.ndarray, " sample"]:
        """Δ_i(blind) of the same samples: the whole image replaced at the input.

        Raises:
            ReadError: a sample without it.
        """
        mode = self._mode(BLIND, mode)
        rows = {row["sample"]: row for row in self.rows if (row["intervention"], row["mode"]) == (BLIND, mode)}
        if missing := [sample for sample in effects.samples if sample not in rows]:
            raise ic.ReadError(f"{len(missing)} samples have no record of {BLIND} {mode}, such as {missing[0]}")
        return np.array([value_of(rows[sample], measure) for sample in effects.samples])

    def image_dependent(self, mode: str = "random") -> set[str]:
        """Samples whose greedy answer is right with the image and wrong with that blind one.

        Raises:
            ReadError: no blind records of that mode.
        """
        mode = self._mode(BLIND, mode)
        rows = [row for row in self.rows if (row["intervention"], row["mode"]) == (BLIND, mode)]
        return {row["sample"] for row in rows if row["clean_right"] and not row["right"]}

    def _mode(self, intervention: str, mode: str | None) -> str:
        modes = [other for name, other in self.interventions if name == intervention]
        if not modes:
            names = list(dict.fromkeys(name for name, _ in self.interventions))
            raise ic.ReadError(f"no records of {intervention!r}. {ic.errors.nearest(intervention, names)}")
        if mode is None and len(modes) > 1:
            raise ic.ReadError(f"{intervention} has records of modes {', '.join(modes)}; say which: mode={modes[0]!r}")
        if mode is not None and mode not in modes:
            raise ic.ReadError(f"no records of {intervention} in mode {mode!r}. {ic.errors.nearest(mode, modes)}")
        return modes[0] if mode is None else mode


def value_of(row: Row, measure: Measure) -> float:
    """One number of a row; `rho` is the relative change of the first token's probability in per cent, negative for
    harm, `flip` whether the first token that the model says is another."""
    if measure == "rho":
        return 100.0 * (row["p"] - row["clean_p"]) / row["clean_p"]
    if measure == "flip":
        return float(row["token"] != row["clean_token"])
    value = row.get(measure)
    if value is None or not math.isfinite(value):
        raise ic.ReadError(f"the record of {row['sample']} under {row['intervention']} has no {measure}: {value!r}")
    return float(value)


def _matrix(name: str, rows: Sequence[Row], measure: Measure) -> Effects:
    cells = {(row["sample"], row["layer"]): row for row in rows}
    first = {row["sample"]: row for row in reversed(rows)}
    samples = tuple(dict.fromkeys(row["sample"] for row in rows))
    numbers = tuple(sorted({row["layer"] for row in rows if row["layer"] is not None}))
    holes = [(sample, layer) for sample in samples for layer in numbers if (sample, layer) not in cells]
    if holes or not numbers:
        where = f"sample {holes[0][0]} has none at layer {holes[0][1]}" if holes else "they have no layers"
        raise ic.ReadError(f"records of {name} are no matrix: {where} ({len(holes)} missing); run these cells")
    values = np.array([[value_of(cells[sample, layer], measure) for layer in numbers] for sample in samples])
    images = tuple(str(first[sample]["image"]) for sample in samples)
    groups = tuple(str(first[sample].get("group", "")) for sample in samples)
    return Effects(name, samples, images, groups, Layers(numbers, int(rows[0]["n_layers"])), values)
