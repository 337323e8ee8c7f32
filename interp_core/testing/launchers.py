"""What every launcher must keep.

testing.check_launcher("local").raise_if_failed()
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from ..errors import InterpError
from ..launch import Job, Launcher, Outcome
from ..launch.trial import failing, timed
from ..plugins import registry, status_of
from .report import Failed, NotReached, Report, Tell, reported

PAUSES = (0.2, 0.0, 0.1)
"""Seconds of jobs that end in another order than they begin, if they run at the same time."""
CAP = 2


def check_launcher(launcher: type[Launcher] | str, *, tell: Tell | None = None) -> Report:
    """Run every check on a launcher: some small jobs, each a function of a module.

    Args:
        launcher: the class, or its registered name.
        tell: gets each row as soon as its check is done.

    Raises:
        PluginError: no launcher of this name.
    """
    kind = registry("launchers").get(launcher) if isinstance(launcher, str) else launcher
    case = _Case(kind)
    checks = (case.made, case.runs, case.order, case.exception, case.cap)
    title = f"launcher {getattr(kind, 'name', kind)!r}"
    return reported(title, [(check.__name__, check, None) for check in checks], tell)


class _Case:
    """One launcher; each method is a check, and its docstring says what must hold."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    @cached_property
    def _plain(self) -> Launcher:
        try:
            return self.kind()
        except Exception as error:  # the plugin's own
            raise Failed(
                f"{self.kind.__name__}() raised {type(error).__name__}: {error}; give every option a default"
            ) from error

    def made(self) -> str:
        """A class with `name` and `run`, made without options."""
        _, why = status_of("launchers", getattr(self.kind, "name", ""), self.kind)
        if why or not self._plain.name:
            raise Failed(why or f"it has no name: write name = … in class {self.kind.__name__}")
        return ""

    def runs(self) -> str:
        """What jobs return comes back; no jobs give no outcomes."""
        outcomes = _outcomes(self._plain, [Job(divmod, (7, 2))])
        if outcomes[0].error or outcomes[0].value != (3, 1):
            raise Failed(f"divmod(7, 2) came back as {outcomes[0]}")
        _outcomes(self._plain, [])
        return ""

    def order(self) -> str:
        """One outcome per job, in the order of the jobs, whichever ends first."""
        outcomes = _outcomes(self._plain, [Job(timed, (i, pause)) for i, pause in enumerate(PAUSES)])
        numbers = [_value(outcome)[0] for outcome in outcomes]
        if numbers != [*range(len(PAUSES))]:
            raise Failed(f"outcomes came in the order {numbers}: keep that of the jobs")
        return ""

    def exception(self) -> str:
        """A job that raises is an outcome with its traceback, and the others run."""
        jobs = [Job(timed, (0, 0.0)), Job(failing), Job(timed, (2, 0.0))]
        try:
            outcomes = _outcomes(self._plain, jobs)
        except Failed:
            raise
        except Exception as error:  # the plugin's own, or the job's
            raise Failed(f"a job's error comes out of run ({type(error).__name__}): make an Outcome of it") from error
        if "ArithmeticError" not in outcomes[1].error:
            raise Failed(f"the error of a job that raised ArithmeticError is {outcomes[1].error!r}: keep its traceback")
        _value(outcomes[0])
        _value(outcomes[2])
        return ""

    def cap(self) -> str:
        """With `cap=2` two jobs at most run at once, and all of them run; less than one is refused."""
        if "cap" not in inspect.signature(self.kind).parameters:
            raise NotReached("it has no option cap")
        outcomes = _outcomes(self.kind(cap=CAP), [Job(timed, (i, 0.2)) for i in range(2 * CAP)])
        spans = [_value(outcome)[1:] for outcome in outcomes]
        at_once = max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)
        if at_once > CAP:
            raise Failed(f"with cap={CAP} {at_once} jobs ran at once")
        try:
            self.kind(cap=0)
        except InterpError:
            return f"{at_once} at once"
        except Exception as error:  # the plugin's own
            raise Failed(f"cap=0 raises {type(error).__name__}: {error}; raise interp_core.PlanError") from error
        raise Failed("cap=0 is taken: refuse it with interp_core.PlanError")


def _outcomes(launcher: Launcher, jobs: list[Job]) -> list[Outcome]:
    outcomes = launcher.run(jobs)
    kinds = {type(outcome).__name__ for outcome in outcomes}
    if len(outcomes) != len(jobs) or kinds - {"Outcome"}:
        raise Failed(
            f"{len(jobs)} jobs gave {len(outcomes)} of {', '.join(sorted(kinds)) or 'nothing'}, not an Outcome each"
        )
    return outcomes


def _value(outcome: Outcome) -> Any:
    """What a job returned.

    Raises:
        Failed: it did not.
    """
    if not outcome.ok:
        raise Failed(f"a job that raises nothing came back as an error: {outcome.error.strip().splitlines()[-1]}")
    return outcome.value
