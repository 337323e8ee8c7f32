"""What a sweep has done so far, in a folder, so that a stopped one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .edits import TENSOR_OPS, Edit, digest
from .errors import LoadError, PlanError
from .result import write
from .score import Score
from .text import Tokens

if TYPE_CHECKING:
    from .model import Model

FORMAT = "interp-sweep/2"
SAMPLE = 64
"""How many numbers of each weight tell a model from another of the same name."""


class Store:
    """Scores of a sweep `[variant batch score]`, kept in a folder if there is one.

    Attributes:
        values: scores; not a number where there is none yet.
        moved: norms of what was changed.
        done: which are there.
    """

    def __init__(self, folder: Path | None, key: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.folder, self.key = folder, key
        self.values = torch.full(shape, float("nan"), dtype=dtype)
        self.moved = torch.zeros(shape[:2])
        self.done = torch.zeros(shape[:2], dtype=torch.bool)
        if folder is not None and (folder / "sweep.json").exists():
            self._load(folder)

    def _load(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            head = json.loads((folder / "sweep.json").read_text())
            found = load_file(folder / "sweep.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise LoadError(
                f"{folder} holds a sweep that cannot be read ({error}); delete it, or give another"
            ) from error
        if head.get("format") != FORMAT or head.get("key") != self.key:
            raise PlanError(
                f"{folder} holds another sweep (of another model, text, score or other variants); give another folder"
            )
        self.values, self.moved, self.done = found["values"], found["moved"], found["done"]

    def put(self, numbers: list[int], row: int, values: Tensor, moved: Tensor) -> None:
        """Note the scores `[variant score]` of some variants on a row, and the norms of what was changed."""
        self.values[numbers, row], self.moved[numbers, row] = values, moved.to(self.moved.dtype)
        self.done[numbers, row] = True

    def save(self) -> None:
        """Write what is there, whole or not at all."""
        from safetensors.torch import save

        if self.folder is not None:
            tensors: dict[str, Tensor] = {"values": self.values, "moved": self.moved, "done": self.done}
            write(self.folder / "sweep.safetensors", save(tensors))
            write(self.folder / "sweep.json", json.dumps({"format": FORMAT, "key": self.key}))


def key_of(model: Model, tokens: Tokens, variants: Sequence[Sequence[Edit]], scores: Sequence[Score]) -> str:
    """What makes two sweeps the same: model by name, size and some of its weights, tokens, edits with their tensors,
    scores and targets."""
    judged = [f"{score.name} {score.at} {score.of}" for score in scores]
    made = hashlib.sha256(f"{model.source} {model.atlas.shape} {model.dtype} {judged}".encode())
    given = [target for score in scores for target in score.targets]
    targets = [part for target in given for part in (target if isinstance(target, tuple) else (target,))]
    weights = [weight.detach().flatten()[:SAMPLE] for weight in model.hf.parameters()]
    for tensor in (tokens.ids, tokens.mask, *map(torch.as_tensor, targets), *weights):
        made.update(digest(tensor).encode())
    for edits in variants:
        made.update(
            "|".join(f"{edit} {digest(edit.value) if edit.op in TENSOR_OPS else ''}" for edit in edits).encode()
        )
    return made.hexdigest()
