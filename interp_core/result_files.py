"""The files of a saved result: a head in JSON and tensors in safetensors, read and held against a class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import LoadError
from .files import folder_of

FORMAT = "interp-result/1"


def head_of(folder: str | Path) -> dict[str, Any]:
    """The head of a saved result.

    Raises:
        LoadError: there is none, or it has no fields.
    """
    try:
        head = json.loads((folder_of("load", folder) / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder} holds no readable result: {error}") from error
    if not isinstance(head, dict) or not isinstance(head.get("fields"), dict):
        raise LoadError(f"{folder} holds no result: result.json has no fields")
    return head


def tensors_of(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved result.

    Raises:
        LoadError: there are none, or they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(Path(folder) / "result.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{folder} holds no readable result: {error}") from error


def check_fields(kind: Any, folder: str | Path, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a saved result whose fields are not those of the class.

    Raises:
        LoadError: naming the first that is not.
    """
    known = {f.name: f for f in fields(kind)}
    numbers = {name for name in plain if name in kind.AXES} | {name for name in tensors if name not in kind.AXES}
    again = "Load it with the version that saved it, or run the method again."
    if foreign := sorted(({*plain, *tensors} - set(known)) | numbers):
        raise LoadError(
            f"{folder} holds a {kind.__name__} of another version: it has a field {foreign[0]!r}, this one has "
            f"{', '.join(known)}. {again}"
        )
    for name, f in known.items():
        optional = f.default is not MISSING or f.default_factory is not MISSING
        may_lack = "None" in str(f.type) if name in kind.AXES else optional
        if name not in plain and name not in tensors and not may_lack:
            raise LoadError(
                f"{folder} holds a {kind.__name__} of another version: it lacks the field {name!r}. {again}"
            )


def tupled(value: Any) -> Any:
    """JSON's lists as the tuples that frozen results hold."""
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value
