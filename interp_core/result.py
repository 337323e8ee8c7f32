"""Results: what methods return. Frozen, typed, with named axes; they save, load, print and draw themselves.

A page of a result answers, in this order: what was asked, of which prompts, what came out in one sentence, the picture,
the table, and folded away how it was made. A class says of these what it knows (`question`, `finding`, `prompt_rows`,
`html`, `table`, `details`), and the record of the method that made it (`provenance`) says the rest.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from . import differing
from .errors import LoadError, PlanError, PluginError, wrong
from .files import folder_of, safetensors_bytes, write
from .foreign import RESULT, Abroad, Answering
from .result_files import FORMAT, check_fields, head_of, tensors_of, tupled
from .views import Part, Shown, View

if TYPE_CHECKING:
    from .report import Answer, Chart
    from .report.subtracted import Pair

HOMES = {"Sweep": "interp_core.sweep"}
"""Modules of results that no method returns; by address, since they stand above this one."""
SIDES = ("first", "second")
"""Folders of the two sides of a saved difference."""
R = TypeVar("R", bound="Result")


@dataclass(frozen=True)
class Result(Answering):
    """Base of all results: a frozen dataclass whose tensor fields are listed, with their axes, in `AXES`.

    Subclasses add fields and override `charts` and `table` where they have something to show, and `finding`, which says
    in a sentence what the numbers are. `JOINS` says how
    fields without the axis `batch` are put together from those of batches: one of "sum", "mean", "same", "rows",
    "union" and "first"; see docs/plugins.md.

    Raises:
        ValueError: tensors whose shapes contradict the axes.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    JOINS: ClassVar[Mapping[str, str]] = {}
    _abroad = Abroad("a Result", own=RESULT)

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        cls._abroad = Abroad(f"{'an' if cls.__name__[0] in 'AEIO' else 'a'} {cls.__name__}", own=RESULT)

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, axes in self.AXES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != len(axes):
                raise ValueError(f"{type(self).__name__}.{name} has {value.ndim} axes, not {' '.join(axes)}")
            for axis, size in zip(axes, value.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise ValueError(f"{type(self).__name__}.{name}: {axis} is {size}, elsewhere {sizes[axis]}")

    def table(self) -> list[dict[str, Any]]:
        """The result as rows."""
        return [
            {"name": name, "axes": " ".join(axes), "shape": list(getattr(self, name).shape)}
            for name, axes in self.AXES.items()
            if getattr(self, name) is not None
        ]

    def to_dataframe(self) -> Any:
        """`table` as a `pandas.DataFrame`.

        Raises:
            CapabilityError: pandas is not installed.
        """
        from .pandas import frame

        return frame(self.table())

    def show(self) -> None:
        """Print the result."""
        print(self)

    def charts(self) -> Sequence[Chart]:
        """What pictures and pages show: a chart per prompt, or one for all."""
        return ()

    def html(self) -> str:
        """The result as a piece of HTML."""
        from .report.html import table

        return "".join(chart.html() for chart in self.charts()) or table(self.table())

    def png(self, path: str | Path, row: int | None = None, *, width: float | None = None) -> Path:
        """The result as a picture: `.png`, `.pdf` or `.svg`, as the name ends.

        Args:
            row: which of the charts, that is which prompt (None: all of them, below each other).
            width: of the figure in inches, such as 3.3 for a column of a paper; see `Chart.png`.

        Returns:
            the path of the file.

        Raises:
            PlanError: there is no such chart.
            CapabilityError: matplotlib is not installed.
        """
        from .report.png import save

        return save(path, self._charts() if row is None else [self._chart(row)], width)

    def plot(
        self, ax: Any = None, row: int = 0, *, title: str | None = None, figsize: tuple[float, float] | None = None
    ) -> Any:
        """Draw one of the charts with matplotlib, on `ax` or a new figure; returns the axes. See `Chart.plot`.

        Raises:
            PlanError: there is no such chart.
            CapabilityError: matplotlib is not installed.
        """
        return self._chart(row).plot(ax, title=title, figsize=figsize)

    def _charts(self) -> Sequence[Chart]:
        if charts := self.charts():
            return charts
        raise PlanError(f"{type(self).__name__} has no picture; its numbers are in table()")

    def _chart(self, row: int) -> Chart:
        charts = self._charts()
        if not -len(charts) <= row < len(charts):
            raise PlanError(f"there is no picture {row}: {type(self).__name__} has {len(charts)}, from 0 on")
        return charts[row]

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """What made the result: `name` and `what` it asks, `model`, `prompts`, `settings`, `versions`, `command` and
        `date`. It is saved with the result and is no part of what `==` compares; None where nothing has noted it."""
        return self.__dict__.get("_provenance")

    def with_provenance(self: R, record: Mapping[str, Any] | None) -> R:
        """The same result with a record of where it comes from."""
        # No field: results are made, compared and joined by fields, and where one comes from is none of its numbers.
        new = copy.copy(self)
        object.__setattr__(new, "_provenance", record)
        return new

    @property
    def heading(self) -> str:
        """The title of the page."""
        name = self.provenance["name"] if self.provenance else _spaced(type(self).__name__.removesuffix("Result"))
        return str(name).replace("_", " ").capitalize()

    @property
    def question(self) -> str:
        """What was asked, in words."""
        return self.provenance["what"] if self.provenance else ""

    @property
    def finding(self) -> str:
        """What came out, in one sentence that the numbers support; "" where a class has none."""
        return ""

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Prompts as rows of a table, with what belongs to each, such as the answer and its rival."""
        texts = self.provenance["prompts"]["texts"] if self.provenance else ()
        return [{"prompt": text} for text in texts]

    def details(self) -> dict[str, str]:
        """Further texts by title, folded away on the page: how it was carried out, and what it cost."""
        return {}

    def page(self) -> Answer:
        """What its page says, part by part; a recipe that has more to say adds to it, and writes it by `run.page`."""
        from .report.answer import Answer

        return Answer(
            self.heading, self.question, self.finding, self.prompt_rows(), self.html(), rows=self.table(),
            details=self.details(), provenance=self.provenance,
        )  # fmt: skip

    def to_html(self, path: str | Path) -> Path:
        """Write the result as one self-contained page."""
        from .report.answer import answer_page

        out = Path(path)
        write(out, answer_page(self.page()))
        return out

    def _repr_html_(self) -> str:
        from .report.html import escape, fragment

        said = f"<p><b>{escape(self.finding)}</b></p>" if self.finding else ""
        return fragment(f"<section>{said}{self.html()}</section>")

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes, by the names of the files."""
        tensors = {name: getattr(self, name) for name in self.AXES if getattr(self, name) is not None}
        plain = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in self.AXES and not f.metadata.get("apart")
        }
        head = {"format": FORMAT, "class": type(self).__name__, "fields": plain, "provenance": self.provenance}
        return {
            "result.safetensors": safetensors_bytes(tensors, {name: " ".join(self.AXES[name]) for name in tensors}),
            "result.json": json.dumps(head, indent=1, ensure_ascii=False),
        }

    def save(self, folder: str | Path) -> Path:
        """Write `result.safetensors` and `result.json` into a folder; `load` reads them back."""
        out = folder_of("save", folder)
        for name, content in self.files().items():
            write(out / name, content)
        return out

    @classmethod
    def load(cls: type[R], folder: str | Path) -> R:
        """Read what `save` wrote. `ic.Result.load` reads results of any class that an installed method has.

        Raises:
            LoadError: nothing there, damaged, or of another class.
        """
        head = head_of(folder)
        if cls is Result and head.get("format") == FORMAT:
            return _kind_of(head, folder).load(folder)  # type: ignore[return-value]
        cls._demand(head, folder)
        plain, tensors = head["fields"], tensors_of(folder)
        check_fields(cls, folder, plain, tensors)
        missing = {name: None for name in cls.AXES if name not in tensors}
        try:
            loaded = cls(**{k: tupled(v) for k, v in plain.items()}, **tensors, **missing)
            record = head.get("provenance")
            return loaded.with_provenance(record if isinstance(record, dict) else None)
        except (TypeError, ValueError) as error:
            raise LoadError(f"{folder} holds a damaged {cls.__name__}: {error}") from error

    @classmethod
    def _demand(cls, head: Mapping[str, Any], folder: str | Path) -> None:
        """Refuse what another class or version of the format wrote."""
        if head.get("format") != FORMAT or head.get("class") != cls.__name__:
            raise LoadError(f"{folder} holds a {head.get('class')} ({head.get('format')}), not a {cls.__name__}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)

    __hash__ = None  # type: ignore[assignment]

    def __sub__(self, other: Any) -> Difference:
        """What this result has more than another of its class; see `Difference`.

        Raises:
            PlanError: they cannot be compared, naming the axis, field or setting that differs.
        """
        if not isinstance(other, Result):
            raise PlanError(wrong(f"`-` of a {type(self).__name__}", "another of its class", other))
        return Difference((self, other))

    def _public(self) -> list[str]:
        """Its own names: fields, then what its class adds, then what every result has."""
        added = [name for name in dir(type(self)) if not name.startswith("_") and not hasattr(Result, name)]
        return [*dict.fromkeys([*(f.name for f in fields(self) if f.name[0] != "_"), *added, *super().__dir__()])]


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Shown, Result):
    """What one result has more than another of the same class. It draws, prints and saves itself as results do.

    A name of the two results' own gives the difference where it is a tensor of floating point (`difference.kl`), else
    what both have; what they do not share is in `sides`.

    Attributes:
        sides: the two results, the second of which is subtracted from the first.

    Raises:
        PlanError: they cannot be compared, naming what differs.
    """

    sides: tuple[Result, Result]
    _repr_html_ = Result._repr_html_

    def __post_init__(self) -> None:
        here, there = map(type, self.sides)
        if here is not there:
            raise PlanError(f"a {here.__name__} minus a {there.__name__}: results of one class are subtracted")
        if here is Difference:
            raise PlanError("differences are not subtracted again: subtract their sides as you need them")
        if why := differing.unlike(*self.sides):
            raise PlanError(f"a {here.__name__} minus another: {why}{self._settings()}")

    def _settings(self) -> str:
        """The settings that differ, as the end of a message."""
        said = [f"{name} {text}" for name, text in self._apart.items() if name.startswith(differing.SETTING)]
        return f" (what differs: {'; '.join(said)})" if said else ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "sides" or hasattr(type(self), name):
            return object.__getattribute__(self, name)
        here, there = (getattr(side, name) for side in self._alike)
        if callable(here):
            raise AttributeError(f"{name} is a method of both sides: call it of difference.sides[0] and of .sides[1]")
        if isinstance(here, Tensor) and here.is_floating_point() and here.shape == there.shape:
            return here - there.to(here.device)
        if same(here, there) if isinstance(here, Tensor) else differing.equal(here, there):
            return here
        raise AttributeError(
            f"{name} is no number to subtract, and differs: see it of difference.sides[0] and of .sides[1]"
        )

    def _public(self) -> list[str]:
        return [*self.sides[0]._public(), *super()._public()]

    def __dir__(self) -> list[str]:
        return self._public()

    def __neg__(self) -> Difference:
        return Difference((self.sides[1], self.sides[0]))

    @cached_property
    def _alike(self) -> tuple[Result, Result]:
        """Both, with names that prompts give of both."""
        return differing.named_alike(*self.sides)

    @cached_property
    def _rows(self) -> differing.Rows:
        return differing.rows_beside(*(side.table() for side in self._alike))

    @cached_property
    def _apart(self) -> dict[str, str]:
        return differing.told_apart(*self.sides)

    def table(self) -> list[dict[str, Any]]:
        """The rows that both tables have, numbers with a fraction subtracted; of what else differs two columns. Of
        tables without such numbers a row per field."""
        rows = self._rows
        return rows.subtracted if rows.numbers else differing.field_rows(*self._alike)

    def charts(self) -> Sequence[Chart]:
        """The charts of both, subtracted; for those that do not show the same names (the strongest of many) the rows of
        the table that differ most."""
        from .report.subtracted import drawn

        here, there = (side.charts() for side in self._alike)
        return drawn(here, there, self._rows.numbers)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """What is looked through for the largest difference: what the charts show, scale by scale, the first numbers of
        the table, the fields; the first of these that differ."""
        from .report.subtracted import by_scale, largest

        here, there = (side.charts() for side in self._alike)
        scales = [*by_scale(here, there), self._rows.numbers, *differing.field_pairs(*self._alike)]
        apart = [pairs for pairs in scales if (best := largest(pairs)) and best.difference]
        return next(iter([*apart, *filter(None, scales)]), [])

    @property
    def heading(self) -> str:
        """The title of the page."""
        return f"{self.sides[0].heading}: difference"

    @property
    def question(self) -> str:
        """What was asked of both, and what they differ in."""
        apart = ", ".join(self._apart)
        shown = f"Shown is the first result minus the second{f'; they differ in {apart}' if apart else ''}."
        return f"{self.sides[0].question} {shown}".strip()

    @property
    def finding(self) -> str:
        """Where the two lie furthest apart."""
        from .report.subtracted import largest

        best = largest(self._pairs)
        if best is None:
            return ""
        if not best.difference:
            return "There is no difference."
        of = f" ({best.what})" if best.what else ""
        return f"The largest difference{of} is {best}."

    def prompt_rows(self) -> list[dict[str, Any]]:
        """The prompts of both, with what belongs to each."""
        here, there = (side.prompt_rows() for side in self.sides)
        if len(here) != len(there):
            return [*here, *there]
        return differing.Rows((), [(a, {**a, **b}) for a, b in zip(here, there, strict=True)], 0).beside

    def details(self) -> dict[str, str]:
        """What the two differ in, and which rows of their tables have no twin."""
        left = self._rows.left
        rows = f"{left:,} rows of the two tables are of what the other has not; their numbers are in sides"
        return {"What differs": differing.in_words(self._apart)} | ({"Left out": rows} if left else {})

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """The records of both as one, with what differs beside each other; each whole in `sides`."""
        here, there = (side.provenance for side in self.sides)
        return differing.records(here, there) if here and there else None

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes: a head, and both results in folders of their own."""
        named = zip(SIDES, self.sides, strict=True)
        files = {f"{name}/{file}": held for name, side in named for file, held in side.files().items()}
        head = {"format": FORMAT, "class": "Difference", "fields": {}, "provenance": self.provenance}
        return files | {"result.json": json.dumps(head, indent=1, ensure_ascii=False)}

    @classmethod
    def load(cls, folder: str | Path) -> Difference:
        """Read what `save` wrote.

        Raises:
            LoadError: nothing there, damaged, or of another class.
        """
        cls._demand(head_of(folder), folder)
        try:
            first, second = (Result.load(Path(folder) / name) for name in SIDES)
            return cls((first, second))
        except PlanError as error:
            raise LoadError(f"{folder} holds a damaged Difference: {error}") from error

    def _view(self) -> View:
        far = sorted(self._pairs, key=lambda pair: -abs(pair.difference) if pair.difference == pair.difference else 1)
        apart = [f"{name}: {said}" for name, said in self._apart.items()]
        title = f"{self.heading}, the first minus the second"
        return View(
            title, [Part("largest", [str(pair) for pair in far[:6]], more=len(far[6:])), Part("differ in", apart)]
        )


def _kind_of(head: Mapping[str, Any], folder: str | Path) -> type[Result]:
    """The class that a saved result is of: that of the method that made it, or one that is known already. A name in a
    file is looked up among installed methods; nothing is imported because a file says so.

    Raises:
        LoadError: no method here has such a class.
    """
    from .plugins import registry

    methods, name = registry("methods"), (head.get("provenance") or {}).get("name")
    # A class is looked for where its record says that it was made; without a record, all methods have to be asked.
    if head.get("class") in HOMES:
        importlib.import_module(HOMES[head["class"]])
    else:
        for each in [name] if name in methods.names() else methods.names():
            with suppress(PluginError):  # a broken plugin is told by `interp plugins`
                methods.get(each)
    kinds = [kind for kind in _subclasses(Result) if kind.__name__ == head.get("class")]
    if not kinds:
        raise LoadError(
            f"{folder} holds a {head.get('class')}, which no method here returns; install the package whose method "
            f"{'made it' if name is None else f'{name!r} made it'}, or read it with its own class"
        )
    return kinds[0]


def _subclasses(kind: type[Result]) -> Iterator[type[Result]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def same(a: Any, b: Any) -> bool:
    """Whether two fields of results are equal; not-a-number equals itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)


def _spaced(name: str) -> str:
    """The words of a class's name."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
