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

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..engines.operations import write_point
from ..engines.selection import Selection
from ..engines.tower import Tower
from ..errors import PlanError, PositionError, ReadError, nearest, wrong
from ..plan import Plan
from ..progress import Progress
from ..provenance import provenance
from ..replacing import demand_own
from ..result import Result
from ..runs import RunFolder
from ..score import Score
from ..session import Input, Session
from ..sites import ROUTING, TENSOR_OPS, Edit, Site
from ..views import Shown, View
from .choose import cheapest_strategy
from .kept import read_variants, variants_files
from .keys import Effect, Key, Parts, by_key, cells, number_of, part_names, words
from .kinds import scores_of, variants_of
from .looks import BARS, bar_chart, failed_words, grid_chart, is_grid, label, lines, said_by_edits, spot_words, view
from .place import Placer
from .plan import STRATEGIES, SweepPlan, named_edits
from .runner import Runner
from .shared import swept
from .store import SweepStore, opened

if TYPE_CHECKING:
    from ..report import Chart
    from ..text import Tokens

Variant = Edit | Sequence[Edit]


APART: dict[str, Any] = {"apart": True}
"""Of fields that `Result.save` leaves to the class."""


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Shown, Result):
    """What a sweep gives back: the score of every variant, under the variant's key.

    Attributes:
        values: scores per variant and example.
        clean: scores without edits.
        moved: norm of what the edits of a variant changed, per example.
        score: name of the score.
        measured: the score in words; "": its name.
        labels: tokens of the examples as text; empty where they are not known.
        variants: the edits.
        keys: what the variants are called: the keys of a mapping, else 0, 1, 2, …
        explain: how it was carried out, in words.
        plan: how it was carried out; of a sweep that was loaded, `explain` alone is left of it.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": ("variant", "batch"), "clean": ("batch",), "moved": ("variant", "batch"),
    }  # fmt: skip
    values: Float[Tensor, "variant batch"]
    clean: Float[Tensor, " batch"]
    moved: Float[Tensor, "variant batch"]
    score: str
    variants: tuple[tuple[Edit, ...], ...] = field(default=(), metadata=APART)
    keys: tuple[Key, ...] = field(default=(), metadata={"names": "variant"})
    explain: str = field(default="", compare=False)
    _plan: SweepPlan | None = field(default=None, compare=False, metadata=APART)
    measured: str = field(default="", compare=False)
    labels: tuple[tuple[str, ...], ...] = field(default=(), compare=False)
    _repr_html_ = Result._repr_html_

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keys:
            object.__setattr__(self, "keys", tuple(range(len(self.values))))
        object.__setattr__(self, "measured", self.measured or self.score)
        if len(self.keys) != len(self.values):
            raise ValueError(f"Sweep has {len(self.keys)} keys for {len(self.values)} variants")

    @property
    def plan(self) -> SweepPlan:
        """How it was carried out.

        Raises:
            ReadError: the sweep was loaded from a folder.
        """
        if self._plan is None:
            raise ReadError("a sweep from a folder has its plan in words alone: sweep.explain")
        return self._plan

    @property
    def effects(self) -> Float[Tensor, "variant batch"]:
        """Scores minus those without edits."""
        return self.values - self.clean

    @property
    def failed(self) -> list[str]:
        """Variants whose score is not a number in some example."""
        bad = torch.isnan(self.values).any(-1).tolist()
        return [named_edits(edits) for edits, is_bad in zip(self.variants, bad, strict=True) if is_bad]

    @cached_property
    def _plain(self) -> bool:
        return said_by_edits(self.keys, self.variants)

    @cached_property
    def _index(self) -> dict[Key, int]:
        return {key: number for number, key in enumerate(self.keys)}

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __contains__(self, key: object) -> bool:
        try:
            return key in self._index
        except TypeError:  # it has no hash
            return False

    def __getitem__(self, key: Key) -> Float[Tensor, " batch"]:
        """The effect of one variant on every example.

        Raises:
            ReadError: there is no variant of that key.
        """
        number = number_of(self._index, key)
        return self.values[number] - self.clean

    @staticmethod
    def planned(
        model: Session,
        x: Input,
        variants: Iterable[Variant] | Mapping[Any, Variant],
        score: Score,
        *,
        strategy: str = "auto",
        memory_budget: int | None = None,
    ) -> SweepPlan:
        """What `model.sweep` with these arguments would do, and its price; nothing is swept.

        Raises:
            SiteError, PositionError, PlanError, CapabilityError: as `model.sweep`.
        """
        variants, scores = checked(by_key(variants)[1], score, memory_budget, None)
        with torch.inference_mode(False):
            with model.turn:
                model.renew()
            tokens, listed, scores = _ready(model, x, variants, scores, strategy)
            return _planned(Placer(model, tokens, listed, scores, memory_budget), strategy)

    def top(self, k: int = 10, example: int | None = None) -> list[Effect]:
        """The variants that move the score most: `(key, edits, effect)`, averaged over examples or of one."""
        mean = self._of(self.effects, example)
        order = mean.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:k].tolist()
        return [Effect(self.keys[i], self.variants[i], float(mean[i])) for i in order]

    def grid(self, rows: Parts = 0, columns: Parts = 1, *, example: int | None = None) -> Float[Tensor, "row column"]:
        """Effects by two parts of the keys, averaged over examples or of one.

        Args:
            rows, columns: which part of the keys goes along a side, in the order in which the keys have its values; or
                a list of these values.

        Raises:
            PlanError: keys without these parts, or a cell that has no variant or several.
            PositionError: there is no such example.
        """
        numbers = cells(self.keys, rows, columns).numbers
        return self._of(self.effects, example)[torch.tensor(numbers)]

    def table(self, example: int | None = None) -> list[dict[str, Any]]:
        """A row per variant: its key, its edits in words, effect, score, score without edits and norm of the change,
        averaged over examples or of one."""
        names = part_names(self.keys, self.variants)
        measured = [self._of(tensor, example).tolist() for tensor in (self.effects, self.values, self.moved)]
        clean = float(self._of(self.clean[None], example))
        rows = []
        for key, edits, effect, scored, moved in zip(self.keys, self.variants, *measured, strict=True):
            parts = key if isinstance(key, tuple) and names != ["key"] else (key,)
            said = {"edits": words(edits), "effect": effect, "value": scored, "clean": clean, "moved": moved}
            rows.append({**dict(zip(names, parts, strict=True)), **said})
        return rows

    def to_dataframe(self, example: int | None = None) -> Any:
        """`table` as a `pandas.DataFrame`.

        Raises:
            CapabilityError: pandas is not installed.
        """
        from ..pandas import frame

        return frame(self.table(example))

    def chart(self, rows: Parts = 0, columns: Parts = 1, *, example: int | None = None) -> Chart:
        """The picture: the grid where keys are pairs that fill one (or rows or columns are given), else the strongest
        variants as bars.

        Raises:
            PlanError, PositionError: as `grid`.
        """
        said = f"without edits {self._clean(example)}{self._whose(example)}"
        if (rows, columns) != (0, 1) or is_grid(self.keys):
            effects = self._of(self.effects, example).tolist()
            return grid_chart(
                effects, self.keys, self.variants, rows, columns, self.score, self.measured, said, self.labels
            )
        top = [effect for effect in self.top(BARS, example) if math.isfinite(effect.effect)]
        return bar_chart(top, len(self), self._plain, self.measured, said)

    def charts(self) -> list[Chart]:
        """`chart`, where some score is a number."""
        return [self.chart()] if bool(self.effects.mean(-1).isfinite().any()) else []

    @property
    def heading(self) -> str:
        """How many variants."""
        return f"Sweep of {len(self):,} variants"

    @property
    def finding(self) -> str:
        """The variant that moves the score most, and those whose score is no number."""
        best, *_ = self.top(1)
        where = f"{label(*best[:2], self._plain)}{spot_words(best.edits, self.labels)}"
        said = f"The largest change of {self.measured}: {best.effect:+.4g} by {where}, "
        moved = (
            f"{said}from {self._clean(None)} without edits{self._whose(None)}." if math.isfinite(best.effect) else ""
        )
        return " ".join([moved, *([f"{failed_words(self.failed)}."] if self.failed else [])]).strip()

    def details(self) -> dict[str, str]:
        """How it was carried out."""
        return {"What it cost": self.explain}

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes, by the names of the files."""
        return super().files() | variants_files(self.variants)

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """Read what `save` wrote. Functions of `apply` come back as their names alone.

        Raises:
            LoadError: nothing there, damaged, or of another class.
        """
        loaded = super().load(folder)
        return replace(loaded, variants=read_variants(folder)).with_provenance(loaded.provenance)

    def _view(self) -> View:
        return view(self._title(), lines(self.top(6), len(self), self._plain), self.failed, self.explain)

    def _title(self) -> str:
        return f"Sweep of {len(self):,} variants: {self.score}, without edits {self._clean(None)}{self._whose(None)}"

    def _clean(self, example: int | None) -> str:
        return f"{float(self._of(self.clean[None], example)):.4g}"

    def _whose(self, example: int | None) -> str:
        if example is not None:
            return f", example {example}"
        return f", mean of {len(self.clean)} examples" if len(self.clean) > 1 else ""

    def _of(self, numbers: Float[Tensor, "variant batch"], example: int | None) -> Float[Tensor, " variant"]:
        """The mean over examples, or one example."""
        if example is None:
            return numbers.mean(-1)
        if (
            isinstance(example, bool)
            or not isinstance(example, int)
            or not -len(self.clean) <= example < len(self.clean)
        ):
            raise PositionError(wrong("example=", f"an example of the sweep, 0 to {len(self.clean) - 1}", example))
        return numbers[:, example]


def checked(variants: Any, score: Any, memory_budget: Any, out: Any) -> tuple[tuple[Variant, ...], tuple[Score, ...]]:
    """Variants and scores as they were given to `Model.sweep`, if all its arguments are of their kinds.

    Raises:
        PlanError: naming the first that is not.
    """
    listed, scores = variants_of(variants), scores_of(score)
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise PlanError(wrong("memory_budget=", "a number of bytes", memory_budget))
    if out is not None and not isinstance(out, (str, Path, RunFolder)):
        raise PlanError(wrong("out=", "a folder, or an open run of ic.runs", out))
    return listed, scores


def sweep(
    model: Session,
    x: Input,
    variants: Iterable[Variant],
    scores: tuple[Score, ...],
    strategy: str,
    budget: int | None,
    out: str | Path | RunFolder | None,
    progress: bool,
    keys: tuple[Key, ...] = (),
) -> tuple[Sweep, ...]:
    """See `Model.sweep`, which has the defaults; one sweep per score, of the same passes."""
    tokens, listed, scores = _ready(model, x, variants, scores, strategy)
    placer = Placer(model, tokens, listed, scores, budget)
    run, folder = (out, None) if isinstance(out, RunFolder) else (None, out)
    with opened(folder, model, tokens, listed, scores) as store:
        if run is not None:

            def part(variants: Sequence[tuple[Edit, ...]]) -> SweepStore:
                with opened(None, model, tokens, variants, scores) as own:
                    _fill(Placer(model, tokens, variants, scores, budget), strategy, scores, own, progress)
                return own

            swept(run, tokens, listed, scores, store, part)
        plan = _fill(placer, strategy, scores, store, progress)
    explain, settings = plan.explain(), {"variants": len(listed), "strategy": strategy}
    record = provenance("sweep", "What each of the changes does to ", model, tokens, settings)
    measured = [score.words(model) for score in scores]
    records = [record and {**record, "what": f"{record['what']}{said}."} for said in measured]
    return tuple(
        Sweep(values, clean, store.moved, score.name, listed, keys, explain, plan, said, tokens.labels).with_provenance(
            own
        )
        for values, clean, score, said, own in zip(
            store.values.unbind(-1), store.clean.unbind(-1), scores, measured, records, strict=True
        )
    )


def _fill(placer: Placer, strategy: str, scores: Sequence[Score], store: SweepStore, progress: bool) -> SweepPlan:
    """Work out what a store lacks; how."""
    if store.finished:  # a strategy is not even tried
        return placer.plan(strategy, "all scores are in the folder", {}, store)
    model, tokens = placer.session, placer.tokens
    tower = Tower(model.hf) if tokens.inputs else None
    plan = _planned(placer, strategy, tower, store)
    with Progress("sweep", int((~store.done).sum()), shown=progress) as told:
        Runner(model, tokens, plan, scores, store, tower).run(told)
    return plan


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
