"""What a kit of checks says: a row per check, as soon as it is known, and a table in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..errors import PluginError

WORDS = {True: "ok", False: "FAIL", None: "-"}
"""How a table says that a check holds, does not, or could not be reached."""
Tell = Callable[["Row"], None]


class Failed(Exception):
    """A check does not hold."""


class NotReached(Exception):
    """A check needs what an earlier one did not give."""


class Refused(Exception):
    """The plugin refuses what a check asks of it, before the run, which is as good as doing it."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: its name.
        ok: whether it holds; None where it could not be reached.
        detail: what was found, in a sentence.
        seconds: how long it took.
    """

    check: str
    ok: bool | None
    detail: str
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        first, *further = (f"{self.detail}  " if self.detail else "").split("\n")
        return "\n".join([f"{WORDS[self.ok]:4}  {self.check:14}  {first}({self.seconds:.1f} s)", *further])


@dataclass(frozen=True)
class Report:
    """What the kit found about one plugin; prints as a table.

    Attributes:
        title: the plugin, and on what it was checked.
        rows: one per check.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [row.check for row in self.rows if row.ok is False]

    @property
    def summary(self) -> str:
        """How many checks passed; which failed, and how many could not be reached, if any."""
        passed = sum(row.ok is True for row in self.rows)
        parts = [f"{passed} {'check' if passed == 1 else 'checks'} passed"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed: {', '.join(self.failed)}")
        if unreached := [row.check for row in self.rows if row.ok is None]:
            parts.append(f"{len(unreached)} could not be reached: {', '.join(unreached)}")
        return "; ".join(parts)

    def raise_if_failed(self) -> None:
        """For tests.

        Raises:
            PluginError: something failed; the message is the table.
        """
        if self.failed:
            raise PluginError(f"{', '.join(self.failed)} failed.\n{self}")

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.rows), self.summary])


def judged(check: str, call: Callable[[], str], expected: str | None = None) -> Row:
    """The row of a check, which returns a remark or raises `Failed`, `NotReached` or `Refused`.

    Args:
        expected: why it is expected to fail, if it is.
    """
    began = time.perf_counter()
    ok: bool | None = True
    try:
        detail = call()
    except Failed as error:
        ok, detail = False, str(error)
    except NotReached as error:
        ok, detail = None, str(error)
    except Refused as error:
        detail = f"refused: {error}"
    except Exception as error:  # the plugin's own, in a later run
        ok, detail = False, f"{type(error).__name__}: {error}"
    if expected is not None and ok:
        ok, detail = False, f"passes, although it was expected to fail ({expected}): take the expectation out"
    elif expected is not None and ok is False:
        ok, detail = True, f"fails as expected ({expected}): {detail}"
    return Row(check, ok, detail, time.perf_counter() - began)


def reported(
    title: str, checks: Iterable[tuple[str, Callable[[], str], str | None]], tell: Tell | None = None
) -> Report:
    """The report of checks that are done one after the other.

    Args:
        checks: name, check, and why it is expected to fail, if it is.
        tell: gets each row as soon as its check is done.
    """
    rows = []
    for check, call, expected in checks:
        rows.append(judged(check, call, expected))
        if tell is not None:
            tell(rows[-1])
    return Report(title, tuple(rows))
