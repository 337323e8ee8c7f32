"""Every error that interp_core raises by itself.

InterpError
├── SiteError        a site, layer, head, expert or neuron that this model does not have
├── PositionError    a position, span or name that this text does not have
├── PlanError        an edit or read that cannot be carried out as written: value shape, dtype, operation
├── TextError        text, tokens or tokenizer that do not fit the model
├── LoadError        a model, tokenizer or file that cannot be loaded
├── CapabilityError  the engine or the model family cannot do what is asked
├── EffectError      an edit that did nothing, or whose value is not a number
├── ReadError        a value that the run does not hold
├── ItemError        items of a run that raised errors, when the others are done
└── PluginError      a plugin that is missing, broken, clashing or incompatible

All are raised before the forward pass, except those that only the run can tell, after which the model is as it was:
`EffectError`; `ReadError`, on access; `ItemError`; and while the pass runs

    PlanError        `apply`: the function returned another shape or dtype; a router edit that leaves a token no expert,
                     or gives weight to more experts than the model takes; a run inside another run's edit
    CapabilityError  a module that was not handed the named input that a site is; a router whose family file
                     selects otherwise than it does

An error in a function of yours (`apply`, `grad=`, a score) is raised as it is.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "CapabilityError", "EffectError", "InterpError", "ItemError", "LoadError", "PlanError", "PluginError",
    "PositionError", "ReadError", "SiteError", "TextError", "nearest", "no_function_of", "several", "wrong",
]  # fmt: skip


class InterpError(Exception):
    """Base of all errors of interp_core."""


class SiteError(InterpError, LookupError):
    """The model has no such site, layer, head, expert or neuron."""


class PositionError(InterpError, LookupError):
    """The text has no such position, span or name."""


class PlanError(InterpError, ValueError):
    """A read or an edit cannot be carried out as written."""


class TextError(InterpError, ValueError):
    """Text, tokens or tokenizer do not fit the model."""


class LoadError(InterpError, OSError):
    """A model, tokenizer or file cannot be loaded."""


class CapabilityError(InterpError, NotImplementedError):
    """The engine or the model family cannot do what is asked."""


class EffectError(InterpError, RuntimeError):
    """An edit did nothing."""


class ReadError(InterpError, LookupError):
    """The run does not hold the value that is asked for."""


class ItemError(InterpError, RuntimeError):
    """Items of a run raised errors; the others are done."""


class PluginError(InterpError, ImportError):
    """A plugin is missing, broken, clashing or incompatible."""


def wrong(what: str, takes: str, value: object) -> str:
    """The message for an argument of the wrong kind: what it is for, what it takes, and what came."""
    shown = " ".join(repr(value).split())
    return f"{what} takes {takes}, not {type(value).__name__} {shown[:60]}{'…' * (len(shown) > 60)}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its class, where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def several(what: str, takes: str, value: Any, error: type[InterpError]) -> tuple[Any, ...]:
    """The items of an argument that takes several.

    Raises:
        InterpError: of the class given, for what cannot be gone through.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise error(wrong(what, takes, value))
    return tuple(value)


def nearest(asked: object, known: Iterable[str], limit: int = 12) -> str:
    """The sentence that ends an unknown-name error: the nearest names, or all of them if none is near."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(asked, names, n=3, cutoff=0.6) if isinstance(asked, str) else []
    # a word of a longer name, such as "patching", is far from it by letters
    close = [name for name in names if asked in name.split("_")][:3] or close
    if close:
        return f"Did you mean {' or '.join(repr(name) for name in close)}?"
    if not names:
        return "There are none."
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"There are: {shown}{f' and {len(names) - limit} more' if len(names) > limit else ''}."


def no_function_of(arguments: str, function: object) -> str:
    """Why something cannot be called with these arguments, as the end of a message; "" if it can, or nobody knows."""
    if not callable(function):
        return f"not {type(function).__name__}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function written in C
        return ""
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        return f"not one of {signature}: write lambda {arguments}: …"
    return ""
