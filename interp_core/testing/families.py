"""What every family file must keep, held against it on a small model of its type.

testing.check_family("llama").raise_if_failed()
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

from torch import nn

from ..architectures.family import Family
from ..batteries.sites import check_model
from ..checks.equations import Finding, Law
from ..errors import InterpError, PluginError
from ..model import Model, load
from ..plugins import registry
from ..sites import SITES
from .models import families, mixtures, tiny
from .report import Failed, NotReached, Report, Tell, reported

LAWS = {
    "reads": Law.VALUE, "sums": Law.SUM, "readout": Law.READOUT, "edits": Law.EDIT, "padding": Law.PADDING,
}  # fmt: skip
"""Checks by the findings of the self-check that they gather."""
SHOWN = 3


def check_family(family: Family | str, model: Any = None, *, tell: Tell | None = None) -> Report:
    """Run every check on what a family file says, on a model of its type.

    Args:
        family: the `Family`, or the model type under which it is registered.
        model: a small model of that type, what `ic.load` takes, or a function that returns a model; by default the
            function `tiny` of the family's module, or the tiny model of this type that `interp_core.testing` has.
        tell: gets each row as soon as its check is done.

    Raises:
        PluginError: no family of this name.
    """
    families_known = registry("architectures")
    kind = families_known.get(family) if isinstance(family, str) else family
    name = family.rpartition(":")[2] if isinstance(family, str) else kind.name
    beside = families_known.find(family).target.partition(":")[0] if isinstance(family, str) else ""
    if model is None:
        model = getattr(sys.modules.get(beside), "tiny", partial(_model, name, beside))
    case = _Case(name, kind, model if callable(model) and not isinstance(model, nn.Module) else lambda: model)
    checks: list[tuple[str, Callable[[], str], str | None]] = [("model", case.model_type, None)]
    checks += [("paths", case.paths, None)]
    checks += [(check, partial(case.law, law), None) for check, law in LAWS.items()]
    checks += [("uses", case.uses, None)]
    known = name in families_known and families_known.find(name).value is kind
    with nullcontext() if known else families_known.lent(name, kind):
        return reported(f"family {name!r}", checks, tell)


def _model(name: str, module: str) -> Any:
    """The tiny model of a type that we have."""
    if name in (*families(), *mixtures()):
        return tiny(name)
    raise NotReached(
        f"there is no small model of type {name!r}: write a function tiny() beside the Family{' in ' * bool(module)}"
        f"{module}, which returns one, or give a model (--model)"
    )


def findings(model: Model) -> tuple[Finding, ...]:
    """What the self-check found when a model was opened."""
    return () if model.check is None else model.check.rows


def all_hold(rows: Sequence[Finding]) -> str:
    """How many findings hold.

    Raises:
        Failed: some do not.
    """
    failed = [f"{', '.join(row.sites)}: '{row.what}' does not hold ({row.detail})" for row in rows if not row.ok]
    if failed:
        more = f"; and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise Failed("; ".join(failed[:SHOWN]) + more)
    return f"{len(rows)} hold"


class _Case:
    """One family on one model; each method is a check, and its docstring says what must hold."""

    def __init__(self, name: str, family: Family, source: Callable[[], Any]) -> None:
        self.name, self.family, self.source = name, family, source
        self.opened: Model | None = None

    @cached_property
    def hf(self) -> Any:
        """The model as it was given: a module, or what `ic.load` takes."""
        try:
            model = self.source()
            return getattr(model, "hf", model)
        except NotReached:
            raise
        except Exception as error:  # the plugin's own
            raise Failed(f"tiny() raised {type(error).__name__}: {error}") from error

    def model_type(self) -> str:
        """There is a small model whose config finds this family."""
        if not isinstance(self.hf, nn.Module):
            return str(self.hf)
        config: Any = self.hf.config
        kinds = dict.fromkeys((str(config.model_type), str(config.get_text_config().model_type).removesuffix("_text")))
        if self.name not in kinds:
            said = " and ".join(map(repr, kinds))
            raise Failed(
                f"the model's type is {said}; a family is looked up by that, so register it so, not as {self.name!r}"
            )
        return f"{type(self.hf).__name__}, {sum(p.numel() for p in self.hf.parameters()):,} parameters"

    def paths(self) -> str:
        """Every path leads to a module; the sites that are there, and those that the language model lacks."""
        if "hf" not in vars(self):
            raise NotReached("needs a model")
        try:
            model = self.opened = load(self.hf)
        except PluginError as error:
            raise Failed(str(error)) from error
        except InterpError as error:
            raise Failed(f"the model cannot be opened with this family file: {error}") from error
        text = [name for name, info in SITES.items() if not info.visual and not name.startswith(("router", "expert"))]
        lacking = [name for name in text if name in model.atlas.lacking and name != "shared_expert_gate"]
        return f"{len(list(model.sites))} sites{'; not there: ' * bool(lacking)}{', '.join(lacking)}"

    def law(self, law: Law) -> str:
        """Of the self-check at load: all that it found of one kind holds."""
        rows = [row for row in findings(self._model()) if row.law is law]
        return all_hold(rows)

    def uses(self) -> str:
        """What sites are said to be able to do they do: `interp_core.batteries.sites` on engine `torch`."""
        cells = check_model(self._model(), ["torch"])
        if cells.failed:
            shown = [f"{cell.site} {cell.use}: {cell.reason}" for cell in cells.failed[:SHOWN]]
            raise Failed("; ".join(shown))
        refused = [f"{cell.site} {cell.use}" for cell in cells.cells if not cell.ok]
        return f"{sum(cell.ok for cell in cells.cells)} work{'; refused: ' * bool(refused)}{', '.join(refused)}"

    def _model(self) -> Model:
        if self.opened is None:
            raise NotReached("needs a model that is open")
        return self.opened
