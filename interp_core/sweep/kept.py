"""Variants in a folder: edits as data, their tensors beside them; of a function its name alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InterpError, LoadError, PlanError
from ..files import folder_of, safetensors_bytes
from ..plan import FORMAT as PLAN
from ..plan import Plan
from ..sites import Edit, Site
from ..tensors import digest

FORMAT = "interp-variants/1"
HEAD, TENSORS = "variants.json", "variants.safetensors"


@dataclass(frozen=True)
class Unsaved:
    """What stands for a function that was not saved: its name."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            PlanError: always.
        """
        raise PlanError(f"this edit was read from a folder, which has the name of its function ({self.name}) alone")

    def __repr__(self) -> str:
        return self.name


def variants_files(variants: Sequence[Sequence[Edit]]) -> dict[str, str | bytes]:
    """What is written of variants, by the names of the files."""
    tensors: dict[str, Tensor] = {}
    listed = [[_data(edit, tensors) for edit in edits] for edits in variants]
    head = json.dumps({"format": FORMAT, "variants": listed}, ensure_ascii=False)
    return {HEAD: head, **({TENSORS: safetensors_bytes(tensors)} if tensors else {})}


def _data(edit: Edit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if edit.op == "apply":
        return {"site": str(edit.site), "op": "apply", "function": str(edit).partition(" apply ")[2]}
    plan = Plan((), (edit,))
    tensors |= plan.tensors()
    data: dict[str, Any] = plan.to_json()["edits"][0]
    return data


def read_variants(folder: str | Path) -> tuple[tuple[Edit, ...], ...]:
    """What `variants_files` gave.

    Raises:
        LoadError: it is not there, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder_of("load", folder) / HEAD
    stored = path.with_name(TENSORS)
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(stored) if stored.is_file() else {}
        if head["format"] != FORMAT:
            raise LoadError(f"{path} is of format {head['format']}, not {FORMAT}")
        if any(digest(tensor) != name for name, tensor in tensors.items()):
            raise LoadError(f"{stored} is damaged: its numbers are not those that were saved")
        return tuple(tuple(_edit(data, tensors) for data in edits) for edits in head["variants"])
    except LoadError:
        raise
    # In a file that somebody has changed anything may be wrong.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, InterpError) as error:
        raise LoadError(f"{folder} holds no readable variants of a sweep ({type(error).__name__}: {error})") from error


def _edit(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    if "function" in data:
        return Edit(Site.parse(data["site"]), "apply", Unsaved(str(data["function"])))
    return Plan.from_json({"format": PLAN, "edits": [data]}, tensors).edits[0]
