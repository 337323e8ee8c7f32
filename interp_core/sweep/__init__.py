"""Sweeps: many variants of a text, each with something else changed, for the price of what they change.

For a text of n tokens and L layers, one full forward pass costs n × L token-layers. A variant whose edits first touch
layer l and column c differs from the clean pass only in layers from l on and columns from c on, so it costs
(n - c) × (L - l), and the clean pass is paid once:

    cost = n × L + sum over variants of (n - c) × (L - l)         against        variants × n × L

Variants that run equally many columns go together in passes of many rows, also those of several texts of about one
length, each row joining at its layer (`staircase.py`). Numbers equal those of one full forward pass per
variant, up to rounding: this is tried on the model itself before the first sweep, and where it does not hold a coarser
strategy takes over and says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..engines.operations import write_point
from ..engines.selection import Selection
from ..engines.tower import Tower
from ..errors import PlanError, nearest, wrong
from ..plan import Plan
from ..progress import Progress
from ..replacing import demand_own
from ..score import Score
from ..session import Input, Session
from ..sites import ROUTING, TENSOR_OPS, Edit, Site
from .choose import cheapest_strategy
from .kinds import scores_of, variants_of
from .place import Placer
from .plan import STRATEGIES, SweepPlan, named_edits
from .runner import Runner
from .store import SweepStore, opened

if TYPE_CHECKING:
    from ..text import Tokens

Variant = Edit | Sequence[Edit]


@dataclass
class Sweep:
    """What a sweep gives back.

    Attributes:
        values: scores per variant and example.
        clean: scores without edits.
        moved: norm of what the edits of a variant changed, per example.
        variants: the edits.
        score: name of the score.
        plan: how it was carried out.
    """

    values: Float[Tensor, "variant batch"]
    clean: Float[Tensor, " batch"]
    moved: Float[Tensor, "variant batch"]
    variants: tuple[tuple[Edit, ...], ...]
    score: str
    plan: SweepPlan

    @property
    def effects(self) -> Float[Tensor, "variant batch"]:
        """Scores minus those without edits."""
        return self.values - self.clean

    @property
    def failed(self) -> list[str]:
        """Variants whose score is not a number in some example."""
        bad = torch.isnan(self.values).any(-1).tolist()
        return [named_edits(edits) for edits, is_bad in zip(self.variants, bad, strict=True) if is_bad]

    @staticmethod
    def planned(
        model: Session,
        x: Input,
        variants: Iterable[Variant],
        score: Score,
        *,
        strategy: str = "auto",
        memory_budget: int | None = None,
    ) -> SweepPlan:
        """What `model.sweep` with these arguments would do, and its price; nothing is swept.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError: as `model.sweep`.
        """
        variants, scores = checked(variants, score, memory_budget, None)
        with torch.inference_mode(False):
            with model.turn:
                model.renew()
            tokens, listed, scores = _ready(model, x, variants, scores, strategy)
            return _planned(Placer(model, tokens, listed, scores, memory_budget), strategy)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The variants that move the score most, averaged over examples: `(edits, effect)`."""
        mean = self.effects.mean(-1)
        order = mean.abs().nan_to_num(0).argsort(descending=True)[:k].tolist()
        return [(named_edits(self.variants[i]), float(mean[i])) for i in order]


def checked(variants: Any, score: Any, memory_budget: Any, out: Any) -> tuple[tuple[Variant, ...], tuple[Score, ...]]:
    """Variants and scores as they were given to `Model.sweep`, if all its arguments are of their kinds.

    Raises:
        PlanError: naming the first that is not.
    """
    listed, scores = variants_of(variants), scores_of(score)
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise PlanError(wrong("memory_budget=", "a number of bytes", memory_budget))
    if out is not None and not isinstance(out, (str, Path)):
        raise PlanError(wrong("out=", "a folder", out))
    return listed, scores


def sweep(
    model: Session,
    x: Input,
    variants: Iterable[Variant],
    scores: tuple[Score, ...],
    strategy: str,
    budget: int | None,
    out: str | Path | None,
    progress: bool,
) -> tuple[Sweep, ...]:
    """See `Model.sweep`, which has the defaults; one sweep per score, of the same passes."""
    tokens, listed, scores = _ready(model, x, variants, scores, strategy)
    placer = Placer(model, tokens, listed, scores, budget)
    with opened(out, model, tokens, listed, scores) as store:
        if store.finished:  # a strategy is not even tried
            plan = placer.plan(strategy, "all scores are in the folder", {}, store)
        else:
            tower = Tower(model.hf) if tokens.inputs else None
            plan = _planned(placer, strategy, tower, store)
            with Progress("sweep", int((~store.done).sum()), shown=progress) as told:
                Runner(model, tokens, plan, scores, store, tower).run(told)
    by_score = zip(store.values.unbind(-1), store.clean.unbind(-1), scores, strict=True)
    return tuple(Sweep(values, clean, store.moved, listed, score.name, plan) for values, clean, score in by_score)


def _planned(placer: Placer, strategy: str, tower: Tower | None = None, store: SweepStore | None = None) -> SweepPlan:
    """The plan by the cheapest strategy that holds, without what the store has already."""
    chosen, why, trial = cheapest_strategy(placer.session, placer.tokens, strategy, tower)
    plan = placer.plan(chosen, why, placer.session.strategy_checks.reliefs, store)
    plan.trial = trial
    return plan


def _ready(
    model: Session, x: Input, variants: Iterable[Variant], scores: tuple[Score, ...], strategy: str
) -> tuple[Tokens, tuple[tuple[Edit, ...], ...], tuple[Score, ...]]:
    """Tokens, variants and scores as a model takes them; what is wrong is found before anything runs."""
    demand_own(model, "a sweep")
    tokens = model.fit(model.input(x))
    scores = tuple(score.on(model, len(tokens)) for score in scores)
    for score in scores:
        score.fits(model.atlas.shape.d_vocab)
    listed = _listed(variants)
    if not scores:
        raise PlanError("a sweep needs a score: score.logprob(target), say")
    if strategy not in STRATEGIES:
        raise PlanError(f"no strategy {strategy!r}. {nearest(strategy, STRATEGIES)}")
    with model.turn:
        # every edit's site by itself; values and positions, and what edits do to each other, once for variants alike
        for edit in {(edit.site, edit.op): edit for edits in listed for edit in edits}.values():
            for entry in model.atlas.select(edit.site):
                write_point(model.atlas, edit, entry)
                Selection(edit.site, entry.n_units)
        for edits in {tuple(map(_kind, edits)): edits for edits in listed}.values():
            model.engine.compile(Plan((), edits), model.atlas).check(tokens.rows, edits)
    return tokens, listed, scores


def _kind(edit: Edit) -> tuple[Any, ...]:
    """Equal for edits of which one fits a batch if the other does."""
    site, units = edit.site, edit.site.units
    shape = (
        (edit.value.shape, edit.value.dtype) if edit.op in TENSOR_OPS else edit.value if edit.op in ROUTING else None
    )
    return site.name, site.layers, "one" if isinstance(units, int) else units, site.pos, site.key, edit.op, shape


def _listed(variants: Iterable[Variant]) -> tuple[tuple[Edit, ...], ...]:
    several_edits = ([variant] if isinstance(variant, (Edit, Site)) else variant for variant in variants)
    listed = tuple(tuple(edits) for edits in several_edits)
    if not listed:
        raise PlanError("a sweep needs variants: a list of edits, or of lists of edits")
    for edits in listed:
        for edit in edits:
            if not isinstance(edit, Edit):
                raise PlanError(f"a variant is edits, not {type(edit).__name__} {edit!r:.60}")
    return listed
