"""What the method `probe` returns: states of prompts, and the probes that are fitted to them when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from .capacity import RANKS, Capacity, by_rank
from .compare import INTERPRETATION, ORIGINAL, Comparison, compare
from .places import LEAKY

Labels = tuple[str | int | bool | None, ...]
OF_PROMPTS = ("labels", "groups", "questions", "types", "donors")
"""Settings that a result keeps, one per prompt."""


@dataclass(frozen=True, eq=False)
class ProbeResult(ic.Result):
    """States of prompts, and what probes decode of them.

    Attributes:
        states: of every prompt, mode and position; layer l is `resid_pre[l]`, the last one `resid_post[L-1]`, or what
            `sites` names.
        modes, positions: names along the axes.
        labels, groups, questions, types, donors: of the prompts; None where not given.
        decoder, shuffles, n_folds, repeats, cliff, seed: settings of the probes.
        leaky: the prompts held their answers.
        sites: along `layer`; empty: the stream.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"states": ("batch", "mode", "position", "layer", "d_model")}
    JOINS: ClassVar[Mapping[str, str]] = dict.fromkeys(OF_PROMPTS, "rows")
    states: Float[Tensor, "batch mode position layer d_model"]
    modes: tuple[str, ...]
    positions: tuple[str, ...]
    labels: Labels
    groups: Labels
    questions: Labels
    types: Labels
    donors: Labels
    decoder: str
    shuffles: int
    n_folds: int
    repeats: int
    cliff: int
    seed: int
    leaky: bool = False
    sites: tuple[str, ...] = ()

    def at(self, position: str) -> dict[str, Float[Tensor, "sample layer d_model"]]:
        """States of a position by mode.

        Raises:
            PlanError: no such position.
        """
        if position not in self.positions:
            raise ic.PlanError(f"no position {position!r} here. {ic.errors.nearest(position, self.positions)}")
        place = self.positions.index(position)
        return {mode: self.states[:, number, place] for number, mode in enumerate(self.modes)}

    def compare(self, position: str, labels: Any = None, **settings: Any) -> Comparison:
        """Fit the probes of a position.

        Args:
            position: its name.
            labels: others than those that the method was given.
            settings: of `compare.compare`, in place of the method's.

        Raises:
            PlanError: no labels, no such position, or too few samples for the folds.
        """
        labels = or_none(self.labels) if labels is None else labels
        if labels is None:
            raise ic.PlanError("there are no labels: give labels=[…], one per prompt, to the method or to compare")
        if len(labels) != len(self.states):
            raise ic.PlanError(f"{len(labels)} labels for {len(self.states)} prompts; give one per prompt")
        groups, donors = or_none(self.groups), or_none(self.donors)
        how: dict[str, Any] = {
            "groups": groups, "donors": donors, "questions": or_none(self.questions), "types": or_none(self.types),
            "decoder": self.decoder, "shuffles": self.shuffles, "n_folds": self.n_folds, "repeats": self.repeats,
            "leaky": position == LEAKY, "seed": self.seed,
        }  # fmt: skip
        if donors is not None and groups is not None:
            of = dict(zip(groups, labels, strict=True))
            how["donor_labels"] = [of.get(donor) for donor in donors]
        return compare(self.at(position), labels, **{**how, **settings})

    def by_capacity(self, position: str, ranks: Sequence[int] = RANKS, labels: Any = None, **settings: Any) -> Capacity:
        """Accuracy and selectivity of probes that see so many principal directions of the states; see `capacity`.

        Args:
            position: its name.
            ranks: how many directions.
            labels: others than those that the method was given.
            settings: of `by_rank`, in place of the method's.

        Raises:
            PlanError: no labels or types, or no such position.
        """
        labels = or_none(self.labels) if labels is None else labels
        types = or_none(self.types) or or_none(self.questions)
        if labels is None or types is None:
            raise ic.PlanError("selectivity needs labels=[…], and types=[…] (or types='token') for control tasks")
        how = {"groups": or_none(self.groups), "n_folds": self.n_folds, "repeats": self.repeats, "seed": self.seed,
               "decoder": self.decoder, "places": self.sites}  # fmt: skip
        return by_rank(self.at(position)[ORIGINAL], labels, types, ranks, **{**how, **settings})

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Fitted probes of each position.

        Raises:
            PlanError: as `compare`.
        """
        return {position: self.compare(position) for position in self.positions}

    def table(self) -> list[dict[str, Any]]:
        """One row per position and mode: mean accuracy of the layers after the cliff; without labels, the states."""
        if or_none(self.labels) is None or self.why:
            return super().table()
        return [
            {"position": position} | row | {"verdict": comparison.verdict(self.cliff)}
            for position, comparison in self.comparisons.items()
            for row in comparison.table(self.cliff)
        ]

    @cached_property
    def why(self) -> str:
        """Why no probe can be fitted; empty if one can."""
        if or_none(self.labels) is None:
            return "there are no labels"
        try:
            _ = self.comparisons
        except ic.PlanError as error:
            return str(error)
        return ""

    def __str__(self) -> str:
        n, _, _, n_layers, d = self.states.shape
        head = f"{n} prompts, {n_layers} layers of {d}: {', '.join(self.modes)} at {', '.join(self.positions)}"
        if self.why:
            return f"{head}\n  no probes: {self.why}"
        return "\n".join(
            [head, *(f"{position}: {comparison.text(self.cliff)}" for position, comparison in self.comparisons.items())]
        )

    def html(self) -> str:
        """Accuracy over layers at each position, and what flags there are."""
        if self.why:
            return f"<p>{ic.report.escape(self.why)}</p>"
        parts = [chart.html() for chart in self.charts()]
        flags = [f"{position}: {flag}" for position, c in self.comparisons.items() for flag in c.flags(self.cliff)]
        return "".join(parts) + "".join(f"<p>{ic.report.escape(note)}</p>" for note in [*flags, INTERPRETATION])

    def charts(self) -> list[ic.report.Curves]:
        """Accuracy over layers at each position; nothing without labels."""
        return [] if self.why else [comparison.curves(at, self.sites) for at, comparison in self.comparisons.items()]

    @property
    def heading(self) -> str:
        """What the page is about."""
        return "What probes read from hidden states"

    @property
    def finding(self) -> str:
        """What the probes say at each position."""
        if self.why:
            return ""
        return "; ".join(f"{position}: {one.text(self.cliff)}" for position, one in self.comparisons.items())


def or_none(values: Labels) -> list[Any] | None:
    """Values of the prompts; None where none was given."""
    return None if all(value is None for value in values) else list(values)
