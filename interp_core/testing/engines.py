"""What every engine must keep: the battery of `interp check` on a small model, against engine `torch`.

testing.check_engine("nnsight").raise_if_failed()
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

from ..batteries.sites import USES, Battery, Cell, check_model
from ..model import Model, load
from ..plugins import registry, status_of
from .families import SHOWN, all_hold, findings
from .models import tiny
from .report import Failed, NotReached, Report, Tell, reported


def check_engine(engine: Any, model: Any = None, *, tell: Tell | None = None) -> Report:
    """Run every check on an engine.

    Args:
        engine: the class, or its registered name.
        model: a small model, or what `ic.load` takes; by default a tiny Llama.
        tell: gets each row as soon as its check is done.

    Raises:
        PluginError: no engine of this name.
    """
    engines = registry("engines")
    kind = engines.get(engine) if isinstance(engine, str) else engine
    _, why = status_of("engines", getattr(kind, "name", ""), kind)
    case = _Case(kind, why, tiny("llama") if model is None else model)
    checks: list[tuple[str, Callable[[], str], str | None]] = [("made", case.made, None)]
    checks += [("self_check", case.self_check, None)]
    checks += [(use, partial(case.use, use), None) for use in USES]
    name = getattr(kind, "name", None) or ""
    lend = not why and not (name in engines and engines.find(name).value is kind)
    with engines.lent(name, kind) if lend else nullcontext():
        return reported(f"engine {name!r}", checks, tell)


class _Case:
    """One engine on one model; each method is a check, and its docstring says what must hold."""

    def __init__(self, kind: Any, fault: str, source: Any) -> None:
        self.kind, self.fault, self.source = kind, fault, source
        self.on: Model | None = None

    @cached_property
    def model(self) -> Model:
        """The model on engine `torch`."""
        return self.source if isinstance(self.source, Model) else load(self.source)

    @property
    def _there(self) -> Model:
        if self.on is None:
            raise NotReached("needs an engine on a model")
        return self.on

    @cached_property
    def _battery(self) -> Battery:
        return check_model(self.model, [self._there.engine.name])

    def made(self) -> str:
        """A class with `name` and `compile`, made with a Hugging Face model alone."""
        if self.fault or not self.kind.name:
            raise Failed(self.fault or f"it has no name: write name = … in class {self.kind.__name__}")
        try:
            self.on = self.model.on(self.kind.name)
        except Exception as error:  # the plugin's own
            raise Failed(f"on {self.model!r} it raised {type(error).__name__}: {error}") from error
        return f"on {self.on!r}"

    def self_check(self) -> str:
        """The self-check at load holds on it: what the engine cannot do it refuses itself, in `adapt`, with the
        reason."""
        return all_hold(findings(self._there))

    def use(self, use: str) -> str:
        """Every site in one use: as engine `torch` has it, or refused with a reason."""
        cells = [cell for cell in self._battery.cells if cell.use == use]
        if failed := [cell for cell in cells if cell.status == "failed"]:
            raise Failed("; ".join(f"{cell.site}: {cell.reason}" for cell in failed[:SHOWN]))
        working, refused = [cell for cell in cells if cell.ok], [cell for cell in cells if not cell.ok]
        if not working:
            raise NotReached(f"refused for every site: {refused[0].reason if refused else 'there is none'}")
        return f"{len(working)} sites, {_worst(working):.0e} apart at most{_listed(refused)}"


def _worst(cells: list[Cell]) -> float:
    return max(cell.error or 0.0 for cell in cells)


def _listed(refused: list[Cell]) -> str:
    return f"; refused: {', '.join(cell.site for cell in refused)}" if refused else ""
