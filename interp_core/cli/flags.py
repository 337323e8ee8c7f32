"""Settings from a command line and from a file: `--name value`, `--name A B C`, `--config FILE`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from .. import settings
from ..errors import LoadError, PlanError, nearest

SEVERAL = ("--text", "--set")
"""Options of `interp run` itself that may have several values."""


def one_model(positional: str | None, named: str | None, default: str = "") -> str:
    """The model of a command, which takes it with `--model` or without.

    Raises:
        PlanError: none, or two.
    """
    if positional is not None and named is not None:
        raise PlanError(f"the model is named twice, {positional!r} and --model {named!r}; leave one out")
    source = positional or named or default
    if not source:
        raise PlanError("which model? Name it: toy:text, a folder, or a hub id")
    return source


class SeveralCommand(TyperCommand):
    """`interp run`, whose own options may have several values after one flag, as settings have.

    click knows options of one value, or of a fixed number, alone; so the flag is written again before each further
    value: `NAME --text A B` becomes `NAME --text A --text B`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Arguments with those flags repeated."""
        spread: list[str] = []
        flag = ""
        for word in args:
            if word.startswith("--"):
                flag = word if word in SEVERAL and spread else ""
            elif flag and spread[-1] != flag:
                spread.append(flag)
            spread.append(word)
        return super().parse_args(ctx, spread)


def pairs(
    owner: str, config: type[settings.Config], words: Sequence[str], assignments: Sequence[str] | None
) -> list[str]:
    """`--name value` and `--name=value` as `name=value`, several values as a list, then those of `--set`.

    Raises:
        PlanError: a word that belongs to no setting, a setting without a value, or with more than it takes.
    """
    parsed, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise PlanError(f"{owner}: {word!r} belongs to no setting: write --setting value, or --set setting=value")
        key, sign, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not sign:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            value = _joined(owner, config, key, values)
        parsed.append(f"{key}={value}")
    return parsed + list(assignments or [])


def _joined(owner: str, config: type[settings.Config], key: str, values: list[str]) -> str:
    """The values after one flag as one text."""
    known = config.model_fields.get(key)
    if known is None:  # read() says so
        return values[0] if values else ""
    if not values:
        if known.annotation in (bool, bool | None):
            return "true"
        raise PlanError(f"{owner}: --{key} has no value")
    if len(values) == 1:
        return values[0]
    listed = settings.listed(known.annotation, values)
    if listed is None:
        raise PlanError(f"{owner}: --{key} takes one value, not {len(values)}: {' '.join(values)}")
    return json.dumps(listed)


def read_file(path: Path, owner: str, known: Sequence[str]) -> dict[str, Any]:
    """Settings of a JSON or TOML file, by their names as flags have them.

    Raises:
        LoadError: no such file, or one that cannot be read.
        PlanError: it holds no settings, or one that there is not.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except FileNotFoundError as error:
        raise LoadError(f"there is no file {path}; --config takes a .json or .toml file of settings") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read as {path.suffix.lower() or 'JSON'}: {error}") from error
    if not isinstance(data, Mapping):
        raise PlanError(f"{path} holds a {type(data).__name__}, not settings by name")
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in known:
            raise PlanError(f"{path}: {owner} has no setting {key!r}. {nearest(name, known)}")
        if name in values:
            raise PlanError(f"{path} has the setting {name} twice, once with - and once with _; keep one")
        values[name] = value
    return values
