"""What makes two runs the same: settings as plain data, a model's parts, and in words how two of them differ."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ..errors import CapabilityError, PlanError
from ..files import sha256

if TYPE_CHECKING:
    from ..structure import Structure

LONG = 300
"""Characters of a difference that is told; of longer ones the name is."""
_HEX = re.compile(r"[0-9a-f]{64}")
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")


def plain(value: Any, name: str = "settings") -> Any:
    """A value as JSON holds it: paths, slices and enums as text, tuples as lists, configs and dataclasses by fields.

    Raises:
        PlanError: something that JSON cannot hold, by name.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, enum.Enum):
        return plain(value.value, name)
    if isinstance(value, (PurePath, slice)):
        return str(value)
    if hasattr(value, "model_dump"):
        value = {key: getattr(value, key) for key in type(value).model_fields}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, name) for item in value), key=str)
    raise PlanError(
        f"{name} is a {type(value).__name__}, which a run's manifest cannot hold; give it as text, a number or a digest"
    )


def plain_fields(config: Any, otherwise: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A config's settings as JSON holds them; of what JSON cannot hold, what a function of name and setting gives."""
    held = {}
    for name in type(config).model_fields:
        setting = getattr(config, name)
        try:
            held[name] = plain(setting, name)
        except PlanError:
            held[name] = otherwise(name, setting)
    return held


def digest(value: Any) -> str:
    """SHA-256 of plain data; the order of a mapping's keys does not matter."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False))


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str] = (), shown: Callable[[Any], str] = repr
) -> str:
    """What two records have differently, in words: short values with what they were, others by name; "" if nothing."""
    words = []
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if name in free or json.dumps(was, sort_keys=True) == json.dumps(now, sort_keys=True):
            continue
        hidden = all(isinstance(value, str) and _HEX.fullmatch(value) for value in (was, now))
        said = f"{name} was {shown(was)}, is {shown(now)}"
        words.append(f"other {name}" if hidden or len(said) > LONG else said)
    return "; ".join(words)


def model_record(model: Structure) -> dict[str, Any]:
    """A model and its tokenizer as a manifest has them: source, fingerprint, and the parts that this stands for.

    Raises:
        CapabilityError: its fingerprint cannot be told.
    """
    from ..identity import NoIdentityError, identity, model_parts, tokenizer_digest

    try:
        parts = model_parts(model)
        tokenizer = tokenizer_digest(model.tokenizer)
    except NoIdentityError as error:
        raise CapabilityError(f"this model has no fingerprint: {error}") from error
    return {"source": model.source, "fingerprint": identity(parts)[:16], "tokenizer": tokenizer, "parts": parts}


def bound_record(model: Structure) -> dict[str, Any]:
    """The record of a model whose numbers go into a folder.

    Raises:
        CapabilityError: its fingerprint cannot be told.
        PlanError: it is shared out between processes.
    """
    if model.atlas.processes is not None:
        raise PlanError(
            "a model with tp_plan runs in several processes at once, which would write into one folder, and could be "
            "stopped at different places of it; run without a folder, and save the result in one of them"
        )
    return model_record(model)


def model_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two models' records have differently; where they came from is free."""
    parts = difference(old.get("parts", {}), new.get("parts", {}), shown=str)
    tokenizer = difference({"tokenizer": old.get("tokenizer")}, {"tokenizer": new.get("tokenizer")})
    return "; ".join(text for text in (parts, tokenizer) if text)


def safe_name(text: str) -> str:
    """A text as the name of a folder or file: itself where that is short and plain, else with a digest of it.

    Letters, digits, `.`, `_` and `-` are plain, up to 64, neither begun nor ended by a full stop.
    """
    if _SAFE.fullmatch(text):
        return text
    short = re.sub(r"[^A-Za-z0-9]+", "_", text)[:40].strip("_") or "x"
    return f"{short}-{sha256(text)[:10]}"


def slug(text: str) -> str:
    """A text as a part of a path that is only to be recognised: what is not plain becomes `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:64] or "none"
