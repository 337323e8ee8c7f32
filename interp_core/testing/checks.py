"""The checks of the conformance kit, in the order in which they are reported. Each docstring says what must hold."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..batches import padded_on
from ..errors import nearest
from ..inputs import undivided
from ..joining import result_kind
from ..methods import CAPABILITIES
from ..plugins import status_of
from ..plugins.sandbox import address, inspect_here, inspect_plugin
from ..result import Result
from ..sites import SITES
from ..text import Tokens
from .case import CLOSE, MethodCase, apart, as_singles, failing, stacked, unequal
from .report import Failed, NotReached
from .state import State

CHECKS: dict[str, Callable[[MethodCase], str]] = {}
FIXES = {
    "weights": ". Compute with copies of weights, or by edits",
    "modes": ". Put back what a run changes, in a `finally`, or leave it alone",
}
"""Ends what is said of a part of the model's state that a run has changed."""


def check(function: Callable[[MethodCase], str]) -> Callable[[MethodCase], str]:
    """Add a check under the function's name. It returns a remark, or raises `Failed`, `NotReached` or `Refused`."""
    CHECKS[function.__name__.strip("_")] = function
    return function


@check
def class_(case: MethodCase) -> str:
    """A subclass of `Method`, complete, named, for this interface; `requires` names sites and capabilities."""
    method = case.method
    _, why = status_of("methods", getattr(method, "name", ""), method)
    if why:
        raise Failed(why)
    if not method.name:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", method.__name__).lower()
        raise Failed(f"it has no name: write name = {name!r} in class {method.__name__}, as its entry point calls it")
    for need in method.requires:
        if need not in SITES and need not in CAPABILITIES:
            raise Failed(f"requires {need!r}, which is no site or capability. {nearest(need, [*SITES, *CAPABILITIES])}")
    return f"on {case.model!r}"


@check
def documented_(case: MethodCase) -> str:
    """The module's docstring names a source; method, settings and result say what they are."""
    page = sys.modules[case.method.__module__].__doc__ or ""
    documented(page, case.method.__doc__ or "", plugin=case.method.__name__)
    kinds: list[type] = [case.method.Config]
    if isinstance(case.outcome.result, Result):
        kinds.append(type(case.outcome.result))
    for kind in kinds:
        doc = vars(kind).get("__doc__") or ""
        if not doc or doc.startswith(f"{kind.__name__}("):  # the latter is what dataclass writes
            raise Failed(f"{kind.__name__} has no docstring")
    return ""


@check
def config(case: MethodCase) -> str:
    """Settings are read in time, in another process; defaults hold, unknown ones are refused, each is described; a
    JSON schema can be written."""
    where = address(case.method)
    try:
        if where is None:
            seen = inspect_here("methods", case.method.name, case.method)
        else:
            seen = inspect_plugin("methods", case.method.name, where, case.limit)
    except Exception as error:  # the plugin's own
        raise Failed(f"{type(error).__name__}: {error}") from error
    if seen.error:
        raise Failed(seen.error.strip())
    if faults := [*seen.faults, *undescribed(seen.settings)]:
        raise Failed("; ".join(faults))
    return "" if where else "read in this process: the class cannot be imported by name"


@check
def result(case: MethodCase) -> str:
    """A run returns a frozen `Result`, of the class that `run` says."""
    outcome = case.outcome
    if outcome.error and "\n" not in outcome.error:
        raise Failed(outcome.error)
    if outcome.error:
        error = outcome.error.strip()
        raise Failed(f"the run raised {error.splitlines()[-1]}\n{error}")
    kind = type(outcome.result)
    if not isinstance(outcome.result, Result):
        raise Failed(f"it returned a {kind.__name__}, not an interp_core.Result")
    if (written := result_kind(case.method.run)) and not isinstance(outcome.result, written):
        raise Failed(
            f"it returned a {kind.__name__}; {case.method.__name__}.run says that it returns a {written.__name__}"
        )
    if "__dataclass_fields__" not in vars(kind) or "__eq__" in vars(kind):
        raise Failed(f"write @dataclass(frozen=True, eq=False) over {kind.__name__}, so that it can be compared")
    return kind.__name__


@check
def shapes(case: MethodCase) -> str:
    """Every tensor has named axes in `AXES`, of sizes that agree; the axes of an annotation are the same."""
    result = case.result
    sizes: dict[str, int] = {"batch": len(case.whole)}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tensor) and field.name not in result.AXES:
            raise Failed(f"{field.name} is a tensor {list(value.shape)}, but AXES does not name its axes")
    written = _annotations(type(result))
    for name, axes in result.AXES.items():
        value = getattr(result, name, None)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.ndim != len(axes):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Failed(f"{name} is {shape}, AXES says {' '.join(axes)}")
        for axis, size in zip(axes, value.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise Failed(f"{name}: {axis} is {size}, elsewhere {sizes[axis]}{_swapped(axis, axes, value, sizes)}")
        if name in written and written[name] != " ".join(axes):
            raise Failed(f"{name} is annotated {written[name]!r}, AXES says {' '.join(axes)!r}")
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def _swapped(axis: str, axes: tuple[str, ...], tensor: Tensor, sizes: dict[str, int]) -> str:
    """For an axis of the wrong size: the question whether its name stands at another's place, if one has its size."""
    others = [other for other, size in zip(axes, tensor.shape, strict=True) if other != axis and size == sizes[axis]]
    return f"; are {axis} and {others[0]} swapped in AXES?" if others else ""


@check
def saving(case: MethodCase) -> str:
    """What `save` wrote, `load` reads back the same; the table is plain data, the page is text."""
    result = case.result
    with tempfile.TemporaryDirectory() as folder:
        try:
            result.save(folder)
            again = type(result).load(folder)
            same = again == result
            json.dumps(result.table())
            page = result.html()
        except Exception as error:  # the plugin's own
            raise Failed(f"{type(error).__name__}: {error}") from error
    if not same:
        raise Failed(
            f"after save and load it differs in {', '.join(unequal(result, again)) or 'nothing that is a field'}"
        )
    if not isinstance(page, str):
        raise Failed(f"html() gives a {type(page).__name__}")
    return ""


def _part(part: str, must: str) -> None:
    def compare(case: MethodCase) -> str:
        if changes := case.outcome.before.changes(part, case.outcome.after):
            raise Failed(f"{changes}{FIXES.get(part, '')}")
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
def input_(case: MethodCase) -> str:
    """The tokens that it was given are as before."""
    if case.outcome.changed:
        raise Failed(case.outcome.changed)
    return ""


@check
def exception(case: MethodCase) -> str:
    """An error inside the model, in the middle and at the end of the run, comes out and leaves nothing behind; the next
    run gives the same."""
    wanted = case.result
    with failing(case.model.hf, 0) as calls:
        case.run(case.whole)
    if not calls:
        raise NotReached("it never calls the model")
    for at in sorted({len(calls) // 2 + 1, len(calls)}):
        before = State.of(case.model.hf)
        try:
            with failing(case.model.hf, at):
                case.run(case.whole)
        except Exception:  # what it makes of the error is its own
            pass
        else:
            raise Failed(f"it went on after an error inside the model (module call {at} of {len(calls)})")
        after = State.of(case.model.hf)
        for part in ("hooks", "weights", "modes", "config"):
            if changes := before.changes(part, after):
                raise Failed(f"after an error in module call {at} of {len(calls)}: {changes}")
    if differ := unequal(wanted, case.run(case.whole)):
        raise Failed(f"after an error inside the model the next run differs in {', '.join(differ)}")
    return f"raised in module call {len(calls) // 2 + 1} and {len(calls)}"


@check
def deterministic(case: MethodCase) -> str:
    """From the same random state it gives the same numbers, to the bit."""
    if differ := unequal(case.result, case.run(case.whole)):
        raise Failed(f"a second run from the same seed differs in {', '.join(differ)}")
    return ""


@check
def batch(case: MethodCase) -> str:
    """Rows of one length give in a batch what they give alone, within 1e-4."""
    if undivided(case.whole):
        raise NotReached("rows with such inputs cannot be stacked")
    whole = case.whole if len(case.whole) > 1 else Tokens.stack([case.rows[0], case.rows[0]])
    return as_singles(case, whole, list(whole))


@check
def padding_left(case: MethodCase) -> str:
    """Rows padded on the left give what they give alone. On `pos`, `query` and `key` as wide as the batch, only real
    tokens count; refusing padded rows before the run is as good."""
    return as_singles(case, stacked(case), case.rows)


@check
def padding_right(case: MethodCase) -> str:
    """The same, padded on the right."""
    return as_singles(case, padded_on(stacked(case), "right")[0], case.rows)


@check
def batch_size(case: MethodCase) -> str:
    """Split into batches by `batch_size=`, rows give what they give alone, and what all give together is what it is
    unsplit; refusing to be split is as good."""
    rows, whole = case.rows, case.whole
    if len(rows) == 1 or any(undivided(row) for row in rows):
        raise NotReached("there is one row, or rows that cannot be stacked")
    remark = as_singles(case, Tokens.stack(rows), rows, batch_size=2)
    if len(whole) > 1 and (differ := apart(case.result, case.run(whole, batch_size=1))):
        raise Failed(f"in batches of one it differs from one batch of {len(whole)} in {', '.join(differ)}")
    return remark


@check
def conserved(case: MethodCase) -> str:
    """What the method promises in `conserved` adds up, within 1e-4 of the larger side."""
    laws = case.method().conserved(case.model, case.whole, case.result)
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


def _annotations(kind: type) -> dict[str, str]:
    """Axes that jaxtyping annotations name, where they are plain names."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        return {}
    named = {name: getattr(hint, "dim_str", None) for name, hint in hints.items()}
    return {name: text for name, text in named.items() if text and re.fullmatch(r"[a-z_ ]+", text)}
