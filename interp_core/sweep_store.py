"""What a sweep has done so far, in a folder, so that a stopped one goes on where it was.

The folder says what its scores depend on, part by part (`key_of`), and goes on with a sweep of the same parts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edits import Edit
from .errors import LoadError, PlanError
from .identity import NoIdentityError, identity, model_parts
from .result import write
from .score import Score
from .text import Tokens

if TYPE_CHECKING:
    from .model import Model

FORMAT = "interp-sweep/3"
FILE = "sweep.safetensors"
OLD = "sweep.json"
"""What the formats before this one had beside it."""
SHOWN = ("texts", "offsets", "labels", "placed")
"""What of `Tokens` is to be looked at, and changes no number."""


class Store:
    """Scores of a sweep `[variant batch score]`, kept in a folder if there is one.

    Attributes:
        values: scores; not a number where there is none yet.
        moved: norms of what was changed.
        done: which are there.
    """

    def __init__(
        self, folder: Path | None, key: Mapping[str, str], shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.folder, self.key = folder, key
        self.values = torch.full(shape, float("nan"), dtype=dtype)
        self.moved = torch.zeros(shape[:2])
        self.done = torch.zeros(shape[:2], dtype=torch.bool)
        if folder is not None and ((folder / FILE).exists() or (folder / OLD).exists()):
            self._load(folder)

    def _load(self, folder: Path) -> None:
        """Go on with what the folder has.

        Raises:
            PlanError: it is another sweep's, or of a format that does not tell.
            LoadError: it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        if (folder / OLD).exists():
            raise PlanError(
                f"{folder} holds a sweep of an older format, which does not tell by all that scores depend on whether "
                f"it is this one; give another folder, or read its scores from {FILE}"
            )
        try:
            with safe_open(folder / FILE, "pt") as file:
                head = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            key = json.loads(head.get("key", "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(
                f"{folder} holds a sweep that cannot be read ({error}); delete it, or give another"
            ) from error
        if head.get("format") != FORMAT:
            raise PlanError(f"{folder} holds a sweep of format {head.get('format')}, not {FORMAT}; give another folder")
        if key != self.key:
            raise PlanError(f"{folder} holds another sweep: {_difference(key, self.key)}; give another folder")
        for name in ("values", "moved", "done"):
            if name not in tensors or tensors[name].shape != getattr(self, name).shape:
                raise LoadError(f"{folder} holds a sweep without its {name}; delete it, or give another")
            setattr(self, name, tensors[name])

    def put(self, numbers: list[int], row: int, values: Tensor, moved: Tensor) -> None:
        """Note the scores `[variant score]` of some variants on a row, and the norms of what was changed."""
        self.values[numbers, row], self.moved[numbers, row] = values, moved.to(self.moved.dtype)
        self.done[numbers, row] = True

    def save(self) -> None:
        """Write what is there, whole or not at all."""
        from safetensors.torch import save

        if self.folder is not None:
            tensors: dict[str, Tensor] = {"values": self.values, "moved": self.moved, "done": self.done}
            write(self.folder / FILE, save(tensors, {"format": FORMAT, "key": json.dumps(self.key)}))


def key_of(model: Model, tokens: Tokens, variants: Sequence[Sequence[Edit]], scores: Sequence[Score]) -> dict[str, str]:
    """Everything that can change a score, part by part: short ones in words, others as digests.

    Raises:
        PlanError: something of which it cannot be told whether it is the same another time.
    """
    named = {field.name: getattr(tokens, field.name) for field in fields(tokens) if field.name not in SHOWN}
    return {
        **_told(model_parts, model, "the model", "run without out="),
        "text": identity((named.pop("ids"), named.pop("mask"))),
        "named spans": identity(named.pop("spans")),
        "further inputs": _told(identity, named, "an input of the text", "leave it out, or run without out="),
        "variants": identity([[_edit(edit) for edit in edits] for edits in variants]),
        "scores": identity([_told(identity, score, f"score {score.name}", _advice("the score")) for score in scores]),
    }


def _edit(edit: Edit) -> tuple[str, ...]:
    return identity(edit.site), edit.op, _told(identity, edit.value, f"edit {edit}", _advice("apply"))


def _advice(owner: str) -> str:
    return f"give {owner} ic.keyed(function, key), with another key whenever the function changes, or run without out="


def _told(identify: Callable[[Any], Any], value: Any, what: str, advice: str) -> Any:
    """The identity of a part, or an error that names it."""
    try:
        return identify(value)
    except NoIdentityError as error:
        raise PlanError(
            f"{what} cannot be told from another one the next time that this folder is used: {error}. To go on where a "
            f"sweep stopped, {advice}"
        ) from error


def _difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Which parts two keys have differently, short ones with what they were."""
    found = []
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was != now:
            digests = len(was or "") == len(now or "") == 64
            found.append(f"other {name}" if digests else f"{name} was {was}, is {now}")
    return ", ".join(found)
