"""What a sweep has done so far, in a run folder, so that a stopped one goes on where it was.

The folder says what its scores depend on, part by part (`key_of`), and goes on with a sweep of the same parts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CapabilityError, LoadError, PlanError
from ..identity import NoIdentityError, identity
from ..score import Score
from ..session import Session
from ..sites import Edit
from ..text import Tokens

if TYPE_CHECKING:
    from ..runs import RunFolder

FORMAT = "interp-sweep/5"
FILE = "sweep.safetensors"
OLD = "sweep.json"
"""What the formats before 3 had beside it. The one before this had no clean scores, and named scores in another way."""
TENSORS = ("values", "moved", "done", "clean", "clean_done")
SHOWN = ("texts", "offsets", "labels", "placed")
"""What of `Tokens` is to be looked at, and changes no number."""


class SweepStore:
    """Scores of a sweep `[variant batch score]`, kept in a run folder if there is one.

    Attributes:
        values: scores; not a number where there is none yet.
        moved: norms of what was changed.
        done: which are there.
        clean, clean_done: scores without edits `[batch score]`, and which are there.
    """

    def __init__(
        self, run: RunFolder | None, key: Mapping[str, str], shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.run, self.key = run, key
        self.values = torch.full(shape, float("nan"), dtype=dtype)
        self.moved = torch.zeros(shape[:2])
        self.done = torch.zeros(shape[:2], dtype=torch.bool)
        self.clean = torch.full(shape[1:], float("nan"), dtype=dtype)
        self.clean_done = torch.zeros(shape[1], dtype=torch.bool)
        if run is not None and (run.path / FILE).exists():
            self._load(run.path / FILE)

    def _load(self, path: Path) -> None:
        """Go on with what the folder has.

        Raises:
            LoadError: it cannot be read.
        """
        _, tensors = _read(path)
        for name in TENSORS:
            if name not in tensors or tensors[name].shape != getattr(self, name).shape:
                raise LoadError(f"{path.parent} holds a sweep without its {name}; delete it, or give another")
            setattr(self, name, tensors[name])

    @property
    def finished(self) -> bool:
        """Whether all scores are there."""
        return bool(self.done.all() and self.clean_done.all())

    def put_clean(self, row: int, scores: Tensor) -> None:
        """Note the scores `[score]` of a row without edits."""
        self.clean[row], self.clean_done[row] = scores, True

    def put(self, numbers: list[int], row: int, values: Tensor, moved: Tensor) -> None:
        """Note the scores `[variant score]` of some variants on a row, and the norms of what was changed."""
        self.values[numbers, row], self.moved[numbers, row] = values, moved.to(self.moved.dtype)
        self.done[numbers, row] = True

    def save(self) -> None:
        """Write what is there, whole or not at all."""
        if self.run is not None:
            from ..runs import safetensors_bytes

            tensors = {name: getattr(self, name) for name in TENSORS}
            head = {"format": FORMAT, "key": json.dumps(self.key)}  # so that the file alone says what it is of
            self.run.put({FILE: safetensors_bytes(tensors, head)})


@contextmanager
def opened(
    out: str | Path | None, model: Session, tokens: Tokens, variants: Sequence[Sequence[Edit]], scores: Sequence[Score]
) -> Iterator[SweepStore]:
    """The scores of a sweep, in the run folder `out` if there is one.

    Raises:
        PlanError: the folder is another sweep's or run's, or of a format that does not tell; or something of which it
            cannot be told whether it is the same another time.
        LoadError: it cannot be read.
    """
    shape = len(variants), len(tokens), len(scores)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    if out is None:
        yield SweepStore(None, {}, shape, dtype)
        return
    from .. import runs
    from ..runs.identity import bound_record

    key, folder = key_of(tokens, variants, scores), Path(out)
    record = _told(bound_record, model, "the model", "run without out=")
    _refuse_old(folder)
    run = runs.open(folder, key, recipe="sweep", model=record, say=lambda line: None, kind="sweep")
    store = SweepStore(run, key, shape, dtype)  # one that cannot be read is found before anything is written
    with run:
        yield store


def _refuse_old(folder: Path) -> None:
    """Refuse folders of earlier formats, which have no manifest.

    Raises:
        PlanError: it is one.
        LoadError: it cannot be read.
    """
    if (folder / OLD).exists():
        raise PlanError(
            f"{folder} holds a sweep of an older format, which does not tell by all that scores depend on whether "
            f"it is this one; give another folder, or read its scores from {FILE}"
        )
    if (folder / FILE).exists() and (form := _read(folder / FILE)[0].get("format")) != FORMAT:
        raise PlanError(
            f"{folder} holds a sweep of format {form}, not {FORMAT}; give another folder, or read its scores from "
            f"{FILE}"
        )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file of scores says of itself, and its tensors.

    Raises:
        LoadError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(
            f"{path.parent} holds a sweep that cannot be read ({error}); delete it, or give another"
        ) from error


def key_of(tokens: Tokens, variants: Sequence[Sequence[Edit]], scores: Sequence[Score]) -> dict[str, str]:
    """Everything beside the model that can change a score, part by part, as digests.

    Raises:
        PlanError: something of which it cannot be told whether it is the same another time.
    """
    named = {field.name: getattr(tokens, field.name) for field in fields(tokens) if field.name not in SHOWN}
    return {
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
    except (NoIdentityError, CapabilityError) as error:
        raise PlanError(
            f"{what} cannot be told from another one the next time that this folder is used: {error}. To go on where a "
            f"sweep stopped, {advice}"
        ) from error
