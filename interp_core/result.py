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
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .errors import LoadError, PlanError, PluginError
from .files import folder_of, safetensors_bytes, write

if TYPE_CHECKING:
    from .report import Answer, Chart

FORMAT = "interp-result/1"
HOMES = {"Sweep": "interp_core.sweep"}
"""Modules of results that no method returns; by address, since they stand above this one."""
R = TypeVar("R", bound="Result")


@dataclass(frozen=True)
class Result:
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
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder_of("load", folder) / "result.json"
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(path.with_name("result.safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(f"{folder} holds no readable result: {error}") from error
        plain = head.get("fields") if isinstance(head, dict) else None
        if not isinstance(plain, dict):
            raise LoadError(f"{folder} holds no result: result.json has no fields")
        if cls is Result and head.get("format") == FORMAT:
            return _kind_of(head, folder).load(folder)  # type: ignore[return-value]
        if head.get("format") != FORMAT or head.get("class") != cls.__name__:
            raise LoadError(f"{folder} holds a {head.get('class')} ({head.get('format')}), not a {cls.__name__}")
        cls._check_fields(folder, plain, tensors)
        missing = {name: None for name in cls.AXES if name not in tensors}
        try:
            loaded = cls(**{k: _tupled(v) for k, v in plain.items()}, **tensors, **missing)
            record = head.get("provenance")
            return loaded.with_provenance(record if isinstance(record, dict) else None)
        except (TypeError, ValueError) as error:
            raise LoadError(f"{folder} holds a damaged {cls.__name__}: {error}") from error

    @classmethod
    def _check_fields(cls, folder: str | Path, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Refuse a saved result whose fields are not those of this class."""
        known = {f.name: f for f in fields(cls)}
        numbers = {name for name in plain if name in cls.AXES} | {name for name in tensors if name not in cls.AXES}
        if foreign := sorted(({*plain, *tensors} - set(known)) | numbers):
            raise LoadError(
                f"{folder} holds a {cls.__name__} of another version: it has a field {foreign[0]!r}, this one has "
                f"{', '.join(known)}. Load it with the version that saved it, or run the method again."
            )
        for name, f in known.items():
            optional = f.default is not MISSING or f.default_factory is not MISSING
            may_lack = "None" in str(f.type) if name in cls.AXES else optional
            if name not in plain and name not in tensors and not may_lack:
                raise LoadError(
                    f"{folder} holds a {cls.__name__} of another version: it lacks the field {name!r}. Load it with "
                    "the version that saved it, or run the method again."
                )

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)

    __hash__ = None  # type: ignore[assignment]


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


def _tupled(value: Any) -> Any:
    """JSON's lists as the tuples that frozen results hold."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
