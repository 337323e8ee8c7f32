"""Settings of the recipe `moe_mask_sweep`, and what can be said of them before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_plugins.pairs.pair import Layout
from interp_plugins.router.points import LayerIndex, Points

import interp_core as ic
from interp_core import runs

from .mask_orders import ORDERS, Mode, modes_of, sizes_of
from .mask_runs import SCOPES, Scope
from .mask_scores import Scorer, scorer_of


@dataclass(frozen=True)
class Settings:
    """What `moe_mask_sweep` was given; see there."""

    model_path: str
    points: Path
    pair_tokens_json: Path
    out_dir: Path | None
    sizes: Sequence[int] | str | None
    mode: Sequence[str] | str
    order: Sequence[str] | str
    random_orders: int
    scope: Scope
    segment: Sequence[int] | None
    layout: Layout | None
    layer_index: LayerIndex | None
    super_experts: Path | None
    scorer: str | None
    problems: Path | None
    execute_code: bool
    code_seconds: float
    code_megabytes: int
    max_new_tokens: int | None
    max_samples: int | None
    seed: int
    resamples: int
    device: str | None
    dtype: str | None
    strict: bool

    @property
    def modes(self) -> list[Mode]:
        """Modes of masks, each once."""
        return modes_of(_words(self.mode))

    @property
    def kinds(self) -> list[str]:
        """Kinds of orders.

        Raises:
            PlanError: no such order, or none.
        """
        words = _words(self.order)
        for word in words:
            if word not in ORDERS:
                raise ic.PlanError(f"there is no order {word!r}. {ic.errors.nearest(word, ORDERS)}")
        if not words:
            raise ic.PlanError(f"give an order: {', '.join(ORDERS)}")
        return [kind for kind in ORDERS if kind in words]

    def numbers(self, points: Points) -> list[int]:
        """How many cells are banned at a time.

        Raises:
            PlanError: as `sizes_of`.
        """
        if not isinstance(self.sizes, str):
            return sizes_of(self.sizes, points)
        words = _words(self.sizes)
        if not all(word.isdigit() for word in words):
            raise ic.PlanError(f"sizes are whole numbers from 1, as 15,20,25, not {self.sizes!r}; N = 0 is always run")
        return sizes_of([int(word) for word in words], points)

    @property
    def identity(self) -> dict[str, Any]:
        """What numbers depend on, beside model, points and pairs."""
        named = ("random_orders", "scope", "segment", "scorer", "seed", "max_new_tokens", "resamples")
        problems = self.problems and runs.digest(Path(self.problems).read_text(encoding="utf-8"))
        limits = [self.code_seconds, self.code_megabytes] if self.scorer == "code" else None
        kept = {name: getattr(self, name) for name in named}
        return kept | {"modes": self.modes, "orders": self.kinds, "problems": problems, "code_limits": limits}

    @property
    def facts(self) -> dict[str, Any]:
        """What files and page say of the run."""
        named = {"model": self.model_path, "points": str(self.points), "pairs": str(self.pair_tokens_json)}
        return named | {"scope": self.scope, "segment": self.segment, "scorer": self.scorer}

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            PlanError: naming it.
        """
        _ = self.modes
        if {"random", "usage_random"} & set(self.kinds) and self.random_orders < 5:
            raise ic.PlanError(f"random_orders is {self.random_orders}: give 5 at least, or leave random orders out")
        if self.scope not in SCOPES:
            raise ic.PlanError(f"there is no scope {self.scope!r}. {ic.errors.nearest(self.scope, SCOPES)}")
        whole = self.segment is None or len(self.segment) == 2
        if (self.scope == "segment") != (self.segment is not None) or not whole:
            raise ic.PlanError(
                f"segment is {self.segment} and scope {self.scope!r}: scope segment takes --segment START STOP"
            )
        if self.scorer is not None and self.scope != "all":
            raise ic.PlanError(
                f"a scorer reads what the model writes, which scope {self.scope!r} does not mask; give scope all"
            )
        for name, least in (("resamples", 100), ("seed", 0), ("max_new_tokens", 1), ("code_megabytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ic.PlanError(f"{name} is {value}: give {least} at least")
        if not 0 < self.code_seconds < math.inf:
            raise ic.PlanError(f"code_seconds is {self.code_seconds}: give more than 0, a finite number")

    def judge(self) -> Scorer | None:
        """The scorer, if there is one."""
        if self.scorer is None:
            return None
        return scorer_of(self.scorer, self.problems, self.execute_code, self.code_seconds, self.code_megabytes)

    def supers(self, points: Points) -> list[list[int]]:
        """Super experts among the cells of the largest mask, said on standard output too.

        Raises:
            LoadError: a file that is no list of them.
        """
        if self.super_experts is None:
            return []
        try:
            rows = json.loads(Path(self.super_experts).read_text(encoding="utf-8"))
            cells = {(int(layer), int(expert)) for layer, expert in rows}
        except (OSError, ValueError, TypeError) as error:
            raise ic.LoadError(
                f"{self.super_experts}: super experts are a JSON list of [layer, expert]: {error}"
            ) from error
        most = max(self.numbers(points))
        hit = [[p.layer, p.expert] for p in points.points[:most] if (p.layer, p.expert) in cells]
        if hit:
            print(f"  among the first {most} points are super experts {hit}: a mask of one alone may ruin the model")
        return hit


def _words(value: Sequence[str] | str) -> list[str]:
    """Names, given one by one or joined by commas."""
    return [word.strip() for part in ([value] if isinstance(value, str) else value) for word in part.split(",") if word]
