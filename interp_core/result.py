"""Results: what methods return. Frozen, typed, with named axes; they save, load, print and draw themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .errors import LoadError
from .files import folder_of, safetensors_bytes, write

FORMAT = "interp-result/1"
R = TypeVar("R", bound="Result")


@dataclass(frozen=True)
class Result:
    """Base of all results: a frozen dataclass whose tensor fields are listed, with their axes, in `AXES`.

    Subclasses add fields and override `table`, `html` and `png` where they have something to show. `JOINS` says how
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

    def show(self) -> None:
        """Print the result."""
        print(self)

    def html(self) -> str:
        """The result as a piece of HTML."""
        from .report.html import table

        return table(self.table())

    def to_html(self, path: str | Path) -> Path:
        """Write the result as one self-contained page."""
        from .report.html import Section, page

        out = Path(path)
        write(out, page(type(self).__name__, "", [Section("", "", self.html())]))
        return out

    def _repr_html_(self) -> str:
        from .report.html import fragment

        return fragment(self.html())

    def files(self) -> dict[str, str | bytes]:
        """What `save` writes, by the names of the files."""
        tensors = {name: getattr(self, name) for name in self.AXES if getattr(self, name) is not None}
        plain = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in self.AXES and not f.metadata.get("apart")
        }
        head = {"format": FORMAT, "class": type(self).__name__, "fields": plain}
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
        """Read what `save` wrote.

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
        if head.get("format") != FORMAT or head.get("class") != cls.__name__:
            raise LoadError(f"{folder} holds a {head.get('class')} ({head.get('format')}), not a {cls.__name__}")
        cls._check_fields(folder, plain, tensors)
        missing = {name: None for name in cls.AXES if name not in tensors}
        try:
            return cls(**{k: _tupled(v) for k, v in plain.items()}, **tensors, **missing)
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


def same(a: Any, b: Any) -> bool:
    """Whether two fields of results are equal; not-a-number equals itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)


def _tupled(value: Any) -> Any:
    """JSON's lists as the tuples that frozen results hold."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
