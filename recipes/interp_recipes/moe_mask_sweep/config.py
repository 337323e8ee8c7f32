"""Settings of the recipe `moe_mask_sweep`, and what can be said of them before anything is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_plugins.router.point_files import LayerIndex
from interp_plugins.router.points import Points

import interp_core as ic
from interp_core import runs

from ..configs import PairsConfig, words
from .measures import Scope
from .orders import ORDERS, Mode, modes_of, sizes_of
from .scores import Scorer, scorer_of


class MoeMaskSweepConfig(PairsConfig):
    """Which experts are banned, in which order, where, and what is measured.

    Attributes:
        points: ranked cells, as `moe_experts` writes them, or the original scripts.
        pair_tokens_json: pairs of contexts that share a target, as docs/moe_pairs.md has them.
        out_dir: folder of the run (None: results/{model}/{dataset}/{timestamp}-moe_mask_sweep-{hash}).
        sizes: how many cells to ban, as 15,20,25 (None: 15 to 100 in steps of 5, as far as there are points).
        mode: replace (others take the slots), keep (the rest of the set, rescaled), drop (not rescaled); also
            replace_topk, keep_topk; several by commas.
        order: descending, reversed, random, usage_random; several by commas.
        random_orders: how many orders each random kind has, 5 at least.
        scope: where experts are banned: all tokens, the targets, the positions that predict them, or a segment.
        segment: start and stop of the segment, counted over the context's tokens.
        layer_index: how an old points file counts layers, where the model has dense ones: decoder or router.
        super_experts: a JSON list of [layer, expert]; points that are among them are warned of.
        scorer: exact_match, code, or module:function; see `interp_recipes.moe_mask_sweep.scores`.
        problems: of the scorer `code`: JSON lines as HumanEval has them.
        execute_code: let the scorer `code` run programs that the model wrote.
        code_seconds: what such a program may take of time.
        code_megabytes: what such a program may take of memory.
        max_new_tokens: that the model writes for a scorer (None: as many as the targets are).
        seed: of random orders and of bootstrap samples.
        resamples: bootstrap samples of the intervals.
    """

    points: Path
    pair_tokens_json: Path
    out_dir: Path | None = None
    sizes: list[int] | str | None = None
    mode: list[str] | str = "replace"
    order: list[str] | str = "descending,reversed,random,usage_random"
    random_orders: int = 5
    scope: Scope = "all"
    segment: list[int] | None = None
    layer_index: LayerIndex | None = None
    super_experts: Path | None = None
    scorer: str | None = None
    problems: Path | None = None
    execute_code: bool = False
    code_seconds: float = 10.0
    code_megabytes: int = 1024
    max_new_tokens: int | None = None
    seed: int = 0
    resamples: int = 2000

    def cost(self, work: ic.Work) -> ic.Cost | None:
        """A pass per mask and context, of which a sample has two; what each mask writes for a scorer; and the usage by
        which `usage_random` draws. Masks that ban the same experts run once, which makes it less. Of narrow scopes it
        does not say: how much a mask changes depends on where its experts are."""
        if self.scope != "all":
            return None
        orders = sum(self.random_orders if "random" in kind else 1 for kind in self.kinds)
        sizes = words(self.sizes) if isinstance(self.sizes, str) else self.sizes or range(15, 101, 5)
        runs_of_masks = 2 * work.prompts * (1 + len(self.modes) * orders * len(list(sizes)))
        target = max(work.target, 1)
        cost = work.forward(runs_of_masks, read_out=target, batch=1)
        if self.scorer is not None:
            written = replace(work, prompts=runs_of_masks, tokens=work.tokens - work.target, target=0, batch=1)
            cost += written.generate(self.max_new_tokens or target)
        routed = max((layer for layer, count in enumerate(work.experts) if count), default=-1)
        usage = 2 * work.prompts * ("usage_random" in self.kinds)
        return cost + work.forward(usage, stop=routed + 1, read_out=0, batch=1)

    @property
    def modes(self) -> list[Mode]:
        """Modes of masks, each once."""
        return modes_of(words(self.mode))

    @property
    def kinds(self) -> list[str]:
        """Kinds of orders.

        Raises:
            PlanError: no such order, or none.
        """
        names = words(self.order)
        for name in names:
            if name not in ORDERS:
                raise ic.PlanError(f"there is no order {name!r}. {ic.errors.nearest(name, ORDERS)}")
        if not names:
            raise ic.PlanError(f"give an order: {', '.join(ORDERS)}")
        return [kind for kind in ORDERS if kind in names]

    def numbers(self, points: Points) -> list[int]:
        """How many cells are banned at a time.

        Raises:
            PlanError: as `sizes_of`.
        """
        if not isinstance(self.sizes, str):
            return sizes_of(self.sizes, points)
        sizes = words(self.sizes)
        if not all(size.isdigit() for size in sizes):
            raise ic.PlanError(f"sizes are whole numbers from 1, as 15,20,25, not {self.sizes!r}; N = 0 is always run")
        return sizes_of([int(size) for size in sizes], points)

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
