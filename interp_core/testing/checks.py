"""The checks of the conformance kit, in the order in which they are reported. Each docstring says what must hold."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..batches import padded_on
from ..errors import nearest
from ..inputs import undivided
from ..methods import CAPABILITIES, Method
from ..plugins import status_of
from ..plugins.sandbox import address, inspect_here, inspect_plugin
from ..result import Result
from ..sites import SITES
from ..text import Tokens
from .state import State
from .trial import CLOSE, Failed, NotReached, Trial, apart, as_singles, failing, stacked, unequal

CHECKS: dict[str, Callable[[Trial], str]] = {}


def check(function: Callable[[Trial], str]) -> Callable[[Trial], str]:
    """Add a check under the function's name. It returns a remark, and raises `Failed`."""
    CHECKS[function.__name__.strip("_")] = function
    return function


@check
def class_(trial: Trial) -> str:
    """A subclass of `Method`, complete, named, for this interface; `requires` names sites and capabilities."""
    method = trial.method
    _, why = status_of("methods", getattr(method, "name", ""), method)
    if why:
        raise Failed(why)
    if not method.name:
        raise Failed("it has no name")
    for need in method.requires:
        if need not in SITES and need not in CAPABILITIES:
            raise Failed(f"requires {need!r}, which is no site or capability. {nearest(need, [*SITES, *CAPABILITIES])}")
    return ""


@check
def documented_(trial: Trial) -> str:
    """The module's docstring names a source; method, settings and result say what they are."""
    page = sys.modules[trial.method.__module__].__doc__ or ""
    documented(page, trial.method.__doc__ or "", plugin=trial.method.__name__)
    kinds: list[type] = [trial.method.Config]
    if isinstance(trial.outcome.result, Result):
        kinds.append(type(trial.outcome.result))
    for kind in kinds:
        doc = vars(kind).get("__doc__") or ""
        if not doc or doc.startswith(f"{kind.__name__}("):  # the latter is what dataclass writes
            raise Failed(f"{kind.__name__} has no docstring")
    return ""


@check
def config(trial: Trial) -> str:
    """Settings are read in time, in another process; defaults hold, unknown ones are refused, each is described; a
    JSON schema can be written."""
    where = address(trial.method)
    try:
        named = where is not None
        seen = inspect_plugin("methods", trial.method.name, where, trial.limit) if where else _examined(trial.method)
    except Exception as error:  # the plugin's own
        raise Failed(f"{type(error).__name__}: {error}") from error
    if seen.error:
        raise Failed(seen.error.strip())
    if faults := [*seen.faults, *undescribed(seen.settings)]:
        raise Failed("; ".join(faults))
    return "" if named else "read in this process: the class cannot be imported by name"


@check
def result(trial: Trial) -> str:
    """A run returns a frozen `Result`."""
    found = trial.outcome
    if found.error:
        raise Failed(f"the run raised {_last(found.error)}\n{found.error.strip()}")
    kind = type(found.result)
    if not isinstance(found.result, Result):
        raise Failed(f"it returned a {kind.__name__}, not an interp_core.Result")
    if "__dataclass_fields__" not in vars(kind) or "__eq__" in vars(kind):
        raise Failed(f"write @dataclass(frozen=True, eq=False) over {kind.__name__}, so that it can be compared")
    return kind.__name__


@check
def shapes(trial: Trial) -> str:
    """Every tensor has named axes in `AXES`, of sizes that agree; the axes of an annotation are the same."""
    found = trial.result
    sizes: dict[str, int] = {"batch": len(trial.whole)}
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, Tensor) and field.name not in found.AXES:
            raise Failed(f"{field.name} is a tensor {list(value.shape)}, but AXES does not name its axes")
    written = _annotations(type(found))
    for name, axes in found.AXES.items():
        value = getattr(found, name, None)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.ndim != len(axes):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Failed(f"{name} is {shape}, AXES says {' '.join(axes)}")
        for axis, size in zip(axes, value.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise Failed(f"{name}: {axis} is {size}, elsewhere {sizes[axis]}")
        if name in written and written[name] != " ".join(axes):
            raise Failed(f"{name} is annotated {written[name]!r}, AXES says {' '.join(axes)!r}")
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


@check
def saving(trial: Trial) -> str:
    """What `save` wrote, `load` reads back the same; the table is plain data, the page is text."""
    found = trial.result
    with tempfile.TemporaryDirectory() as folder:
        try:
            found.save(folder)
            again = type(found).load(folder)
            same = again == found
            json.dumps(found.table())
            page = found.html()
        except Exception as error:  # the plugin's own
            raise Failed(f"{type(error).__name__}: {error}") from error
    if not same:
        raise Failed(
            f"after save and load it differs in {', '.join(unequal(found, again)) or 'nothing that is a field'}"
        )
    if not isinstance(page, str):
        raise Failed(f"html() gives a {type(page).__name__}")
    return ""


def _part(part: str, must: str) -> None:
    def compare(trial: Trial) -> str:
        if changes := trial.outcome.before.changes(part, trial.outcome.after):
            raise Failed(changes)
        return ""

    compare.__doc__ = must
    compare.__name__ = {"config": "model_config", "random": "random_state"}.get(part, part)
    check(compare)


_part(
    "hooks",
    "No hook stays behind, no module or forward is replaced, no class or function of the model's code is patched.",
)
_part("weights", "Parameters and buffers are the same objects, bit by bit.")
_part("modes", "Training mode, `requires_grad`, gradients and torch's global modes are as before.")
_part("config", "The model's config, cache settings and attention implementation are as before.")
_part("random", "The random states of torch, numpy and Python are as before.")


@check
def input_(trial: Trial) -> str:
    """The tokens that it was given are as before."""
    if trial.outcome.changed:
        raise Failed(trial.outcome.changed)
    return ""


@check
def exception(trial: Trial) -> str:
    """An error inside the model, in the middle and at the end of the run, comes out and leaves nothing behind; the next
    run gives the same."""
    wanted = trial.result
    with failing(trial.model.hf, 0) as calls:
        trial.run(trial.whole)
    if not calls:
        raise NotReached("it never calls the model")
    for at in sorted({len(calls) // 2 + 1, len(calls)}):
        before = State.of(trial.model.hf)
        try:
            with failing(trial.model.hf, at):
                trial.run(trial.whole)
        except Exception:  # what it makes of the error is its own
            pass
        else:
            raise Failed(f"it went on after an error inside the model (module call {at} of {len(calls)})")
        after = State.of(trial.model.hf)
        for part in ("hooks", "weights", "modes", "config"):
            if changes := before.changes(part, after):
                raise Failed(f"after an error in module call {at} of {len(calls)}: {changes}")
    if differ := unequal(wanted, trial.run(trial.whole)):
        raise Failed(f"after an error inside the model the next run differs in {', '.join(differ)}")
    return f"raised in module call {len(calls) // 2 + 1} and {len(calls)}"


@check
def deterministic(trial: Trial) -> str:
    """From the same random state it gives the same numbers, to the bit."""
    if differ := unequal(trial.result, trial.run(trial.whole)):
        raise Failed(f"a second run from the same seed differs in {', '.join(differ)}")
    return ""


@check
def batch(trial: Trial) -> str:
    """Rows of one length give in a batch what they give alone, within 1e-4."""
    if undivided(trial.whole):
        raise NotReached("rows with such inputs cannot be stacked")
    whole = trial.whole if len(trial.whole) > 1 else Tokens.stack([trial.rows[0], trial.rows[0]])
    return as_singles(trial, whole, list(whole))


@check
def padding_left(trial: Trial) -> str:
    """Rows padded on the left give what they give alone. On `pos`, `query` and `key` as wide as the batch, only real
    tokens count; refusing padded rows before the run is as good."""
    return as_singles(trial, stacked(trial), trial.rows)


@check
def padding_right(trial: Trial) -> str:
    """The same, padded on the right."""
    return as_singles(trial, padded_on(stacked(trial), "right")[0], trial.rows)


@check
def batch_size(trial: Trial) -> str:
    """Split into batches by `batch_size=`, rows give what they give alone, and what all give together is what it is
    unsplit; refusing to be split is as good."""
    rows, whole = trial.rows, trial.whole
    if len(rows) == 1 or any(undivided(row) for row in rows):
        raise NotReached("there is one row, or rows that cannot be stacked")
    remark = as_singles(trial, Tokens.stack(rows), rows, batch_size=2)
    if remark.startswith("refused") or not isinstance(trial.outcome.result, Result):
        return remark
    if len(whole) > 1 and (differ := apart(trial.outcome.result, trial.run(whole, batch_size=1))):
        raise Failed(f"in batches of one it differs from one batch of {len(whole)} in {', '.join(differ)}")
    return remark


@check
def conserved(trial: Trial) -> str:
    """What the method promises in `conserved` adds up, within 1e-4 of the larger side."""
    laws = trial.method().conserved(trial.model, trial.whole, trial.result)
    for law, (left, right) in laws.items():
        a, b = left.detach().double().cpu(), right.detach().double().cpu()
        if a.shape != b.shape:
            raise Failed(f"{law}: the sides are {list(a.shape)} and {list(b.shape)}")
        if not torch.allclose(a, b, rtol=CLOSE, atol=CLOSE * float(torch.maximum(a.abs(), b.abs()).max())):
            raise Failed(
                f"{law}: the sides differ by up to {float((a - b).abs().max()):.3g} of {float(b.abs().max()):.3g}"
            )
    return "; ".join(laws) or "nothing promised"


# What several checks share


def documented(page: str, doc: str, plugin: str) -> None:
    """Refuse a module without a source, or a plugin without docstring.

    Raises:
        Failed: saying which.
    """
    if not re.search(r"(?i)\bsources?\b|arxiv|doi[.:]|https?://", page):
        raise Failed("the module's docstring names no source: a paper, a link, or `Source: this package`")
    if not doc:
        raise Failed(f"{plugin} has no docstring")


def undescribed(settings: list[dict[str, str]]) -> list[str]:
    """The settings that nothing is said of, as a sentence."""
    names = [row["setting"] for row in settings if not row["description"]]
    return [f"no description of {', '.join(names)}: add an Attributes (or Args) section"] if names else []


def _examined(method: type[Method]) -> Any:
    return inspect_here("methods", method.name, method)


def _last(error: str) -> str:
    return error.strip().splitlines()[-1]


def _annotations(kind: type) -> dict[str, str]:
    """Axes that jaxtyping annotations name, where they are plain names."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        return {}
    found = {name: getattr(hint, "dim_str", None) for name, hint in hints.items()}
    return {name: text for name, text in found.items() if text and re.fullmatch(r"[a-z_ ]+", text)}
