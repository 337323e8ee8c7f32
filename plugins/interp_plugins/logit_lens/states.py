"""Streams in files: only the rows that predict targets, so that a lens can be read again without the model's passes.

    {folder}/{sample}.{agentic|assisted}.safetensors
        layer.-1, layer.0, …      [target d_model]      one tensor per layer, -1 the embedding, before the final norm
        metadata "lens_states"    JSON: format, sample, side, layers, positions, ids, final, context, model

A layer is read by itself without the others. Size: layers · targets · d_model numbers, in the model's dtype: 49 layers,
100 targets and 2,048 numbers of bfloat16 are 20 MB, where all positions of a text of 2,500 tokens would take 490.

Refused, naming sample and field: states of other weights, config or dtype; layers that are missing; numbers that are
not finite (float16 ends at 65,504, below the massive activations of many models); shapes, positions, ids, texts or a
layout that are not the pair's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import runs
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES, Side

from .aligned import EMBEDDING, States, context_of

FORMAT = "interp-lens-states/1"
HEADER = "lens_states"
TOLD_BY = ("model", "config and modules", "weights", "dtype")
"""Parts of a model's record in which the states of one are not those of another."""


def state_file(folder: Path, sample: str, side: str) -> Path:
    """Where the states of a context lie."""
    return folder / f"{runs.safe_name(sample)}.{side}.safetensors"


class StateStore:
    """A folder of contexts' states, of one model.

    Attributes:
        folder: where they are.
        model: whose they must be.
    """

    def __init__(self, folder: str | Path, model: ic.Model) -> None:
        self.folder, self.model = Path(folder), model

    @cached_property
    def identity(self) -> dict[str, str]:
        """The parts of the model's record in which its states would be others.

        Raises:
            CapabilityError: they cannot be told.
        """
        parts = runs.model_record(self.model)["parts"]
        return {name: parts[name] for name in TOLD_BY}

    def write(self, states: Iterable[States]) -> list[Path]:
        """Write contexts' states, each file whole or not at all.

        Raises:
            PlanError: states that are not finite, or already normed.
            CapabilityError: a model whose fingerprint cannot be told.
        """
        return [self._write(each) for each in states]

    def claim(self, pairs: Iterable[Pair]) -> None:
        """Refuse now to write over states that are not of this model and these pairs.

        Raises:
            PlanError: a file of others, or of something else; a damaged one may be written again.
        """
        from safetensors import SafetensorError, safe_open

        for pair, side in itertools.product(pairs, SIDES):
            path = state_file(self.folder, pair.name, side)
            if not path.exists():
                continue
            with contextlib.suppress(SafetensorError):
                try:
                    with safe_open(path, "pt") as file:
                        head = _header(file.metadata(), path.name)
                except ic.LoadError as error:
                    raise ic.PlanError(f"{path} is there, and holds no states; give another folder") from error
                if why := _differs(head, self.identity, pair, side):
                    raise ic.PlanError(f"{path} is there: {why[0]}; give another folder, or move it away")

    def _write(self, states: States) -> Path:
        where = f"{states.sample} {states.side}"
        for layer, rows in zip(states.layers, states.stream, strict=True):
            if states.normed_last and layer == states.layers[-1]:
                raise ic.PlanError(f"{where}: layer {layer} is normed already; a store holds streams before the norm")
            check_finite(where, layer, rows)
        head = {
            "format": FORMAT, "sample": states.sample, "side": states.side, "layers": list(states.layers),
            "positions": list(states.positions), "ids": states.ids.tolist(), "final": states.final,
            "context": states.context, "model": self.identity,
        }  # fmt: skip
        tensors = {f"layer.{layer}": rows for layer, rows in zip(states.layers, states.stream, strict=True)}
        path = state_file(self.folder, states.sample, states.side)
        runs.write(path, runs.safetensors_bytes(tensors, {HEADER: json.dumps(head)}))
        return path

    def read(self, pair: Pair, side: Side, layers: Sequence[int] | None = None) -> States:
        """The states of a context, checked against model and pair.

        Args:
            layers: these alone, the last among them; None: all.

        Raises:
            LoadError: no such file, damaged, or of another model, of other targets, with missing layers or numbers that
                are not finite; it names sample and field.
        """
        from safetensors import SafetensorError, safe_open

        path, where = state_file(self.folder, pair.name, side), f"{pair.name} {side}"
        if not path.is_file():
            raise ic.LoadError(f"{where}: no file {path.name} in {self.folder}; write it with StateStore.write")
        wanted = [EMBEDDING, *range(self.model.n_layers)] if layers is None else list(layers)
        try:
            with safe_open(path, "pt") as file:
                head = _header(file.metadata(), where)
                if why := _differs(head, self.identity, pair, side):
                    raise ic.LoadError(f"{where}: {why[0]}; {why[1]}")
                _check_layers(where, file.keys(), wanted)
                rows = [file.get_tensor(f"layer.{layer}") for layer in wanted]
        except SafetensorError as error:
            raise ic.LoadError(f"{where}: {path} is damaged: {error}; write it again") from error
        for layer, value in zip(wanted, rows, strict=True):
            _check_rows(where, layer, value, len(pair), self.model.d_model)
        final = None if head.get("final") is None else (float(head["final"][0]), float(head["final"][1]))
        positions, ids = tuple(head["positions"]), torch.tensor(head["ids"])
        return States(
            pair.name, side, tuple(wanted), positions, ids, torch.stack(rows), final, context=head["context"]
        )  # fmt: skip

    def pair(self, pair: Pair) -> tuple[States, States]:
        """Both contexts of a pair; as `read`."""
        agentic, assisted = (self.read(pair, side) for side in SIDES)
        return agentic, assisted


# Checks


def _header(metadata: Mapping[str, str] | None, where: str) -> dict[str, Any]:
    try:
        head = json.loads((metadata or {})[HEADER])
        assert head["format"] == FORMAT and isinstance(head["positions"], list) and isinstance(head["ids"], list)
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise ic.LoadError(f"{where}: metadata {HEADER!r} is missing or no {FORMAT}; write the states again") from error
    return head


def _differs(head: Mapping[str, Any], now: Mapping[str, str], pair: Pair, side: Side) -> tuple[str, str] | None:
    """Why a file's states are not a context's, and what to do about it."""
    before = head.get("model") or {}
    if other := [name for name in TOLD_BY if before.get(name) != now[name]]:
        short = ", ".join(_told(name, before.get(name), now[name]) for name in other)
        return f"states of another model ({short})", "load that one, or write them again"
    if (head["sample"], head["side"]) != (pair.name, side):
        return f"sample and side of the file are {head['sample']} {head['side']}", "it was renamed"
    for field, wanted in (("positions", list(pair.positions(side))), ("ids", pair.target_ids().tolist())):
        if head[field] != wanted:
            n = next((i for i, (a, b) in enumerate(zip(head[field], wanted, strict=False)) if a != b), None)
            first = "" if n is None else f", the first that differs is {head[field][n]} where the pair has {wanted[n]}"
            told = f"{field} are {len(head[field])}, the pair's {len(wanted)}{first}"
            return told, "the states are of other targets: write them again from these pairs"
    if head.get("context") != context_of(pair.tokens(side)):
        told = "states of another context: other tokens before its targets, or another layout"
        return told, "write them again from these pairs"
    return None


def _told(name: str, was: Any, now: str) -> str:
    return f"other {name}" if name in ("weights", "config and modules") else f"{name} was {was}, is {now}"


def _check_layers(where: str, names: Iterable[str], wanted: Sequence[int]) -> None:
    missing = [layer for layer in wanted if f"layer.{layer}" not in set(names)]
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ic.LoadError(f"{where}: layers {shown} are missing; the lens reads every layer: write the states again")


def _check_rows(where: str, layer: int, rows: Tensor, n: int, d_model: int) -> None:
    if tuple(rows.shape) != (n, d_model) or not rows.is_floating_point():
        raise ic.LoadError(
            f"{where}: layer {layer} is {rows.dtype} {list(rows.shape)}; the pair has {n} targets and the model "
            f"d_model {d_model}, so it is [{n}, {d_model}]"
        )
    check_finite(where, layer, rows, ic.LoadError)


def check_finite(where: str, layer: int, rows: Tensor, error: type[ic.InterpError] = ic.PlanError) -> None:
    """Refuse infinities, which are what float16 makes of large numbers."""
    finite = rows.isfinite()
    if not bool(finite.all()):
        target = int((~finite).any(-1).nonzero()[0])
        why = (
            "float16 ends at 65,504 and this stream goes beyond; work in bfloat16 or float32"
            if rows.dtype == torch.float16
            else "the model's own pass gave them"
        )
        raise error(
            f"{where}: layer {layer} has {int((~finite).sum())} numbers that are not finite, the first at target "
            f"{target}: {why}"
        )
