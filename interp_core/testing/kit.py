"""The conformance kit: what every method must keep, held against it on a model.

testing.check_method(MyMethod, ic.load(testing.tiny("llama"))).raise_if_failed()
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import PlanError, PluginError, nearest
from ..methods import Method
from ..model import Model, load
from ..plugins import Plugin, registry
from ..plugins.sandbox import LIMIT, PluginInfo, inspect_plugin
from ..progress import Progress
from ..sites import SITES
from ..text import Tokens
from .case import Failed, MethodCase, NotReached, Refused
from .checks import CHECKS, documented, undescribed
from .processors import pictures

TEXTS = ("Q: big\nA: small\n\nQ: hot\nA:", "Q: hot\nA: cold\n\nQ: big\nA:", "Q: wet\nA:")
LENGTHS = (7, 7, 4)
TOYS = ("toy:text", "toy:moe", "toy:vision")
VISUAL = frozenset(name for name, info in SITES.items() if info.visual)


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: its name.
        ok: whether it holds; None where it could not be reached.
        detail: what was found, in a sentence.
    """

    check: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'FAIL', None: '-'}[self.ok]:4}  {self.check:14}  {self.detail}".rstrip()


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

    def raise_if_failed(self) -> None:
        """For tests.

        Raises:
            PluginError: something failed; the message is the table.
        """
        if self.failed:
            raise PluginError(f"{', '.join(self.failed)} failed.\n{self}")

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.rows)])


def check_method(
    method: type[Method] | str,
    model: Model | str | None = None,
    *,
    rows: Sequence[Tokens | str] = (),
    settings: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    limit: float = LIMIT,
    told: Callable[[Row | str], object] = lambda line: None,
) -> Report:
    """Run every check on a method. It runs a dozen times; a small model is enough, and the random state is restored.

    Args:
        method: the class, or its registered name.
        model: a loaded model, or what `ic.load` takes; by default the first toy that has all that it requires.
        rows: what to run it on: texts or single rows, two of them equally long; short ones by default, each with a
            picture for a method that requires visual tokens.
        settings: of the method.
        expected_failures: check to reason. They are strict: one that passes is a failure.
        limit: seconds that reading its settings may take.
        told: is called with the title, and with every row as soon as it is there.

    Raises:
        PlanError: an expected failure without a reason, or of no check.
        PluginError: no method of this name.
    """
    expected = dict(expected_failures or {})
    for check, reason in expected.items():
        if check not in CHECKS:
            raise PlanError(f"no check is called {check!r}. {nearest(check, CHECKS)}")
        if not reason.strip():
            raise PlanError(f"the expected failure of {check!r} needs a reason")
    kind = registry("methods").get(method) if isinstance(method, str) else method
    required = frozenset(getattr(kind, "requires", ()))
    on = _toy_with(required) if model is None else load(model) if isinstance(model, str) else model
    case = MethodCase(kind, on, dict(settings or {}), _singles(on, rows, VISUAL & required), limit)
    title, verdicts = f"method {getattr(kind, 'name', kind)!r} on {on!r}", list[Row]()
    told(title)
    with _random_state_restored(), Progress("checks", len(CHECKS)) as progress:
        for check in CHECKS:
            verdicts.append(_row(check, case, expected.get(check)))
            told(verdicts[-1])
            progress.add()
    return Report(title, tuple(verdicts))


def check_plugin(plugin: Plugin, limit: float = LIMIT) -> Report:
    """What can be said of any plugin without running it: it loads in time, is what its kind must be, is documented.

    Reads it in another process; nothing of it is imported here.
    """
    title = f"{plugin.label} ({plugin.target})"
    if plugin.state in ("broken", "incompatible"):
        return Report(title, (Row("class", False, plugin.error),))
    seen = inspect_plugin(plugin.kind, plugin.name, plugin.target, limit)
    if seen.error:
        return Report(title, (Row("class", False, seen.error.strip()),))
    rows = Row("class", True, ""), _documented(plugin.kind, seen)
    return Report(title, (*rows, _settings(seen)) if plugin.kind in ("methods", "recipes") else rows)


def _documented(kind: str, seen: PluginInfo) -> Row:
    try:
        if kind == "methods":
            documented(seen.page, seen.doc, plugin="the class")
        elif not seen.page:
            raise Failed("its module has no docstring")
    except Failed as error:
        return Row("documented", False, str(error))
    return Row("documented", True, "")


def _settings(seen: PluginInfo) -> Row:
    faults = [*seen.faults, *undescribed(seen.settings)]
    return Row("config", not faults, "; ".join(faults) or f"{len(seen.settings)} settings")


def _row(check: str, case: MethodCase, reason: str | None) -> Row:
    try:
        ok: bool | None = True
        detail = CHECKS[check](case)
    except Failed as error:
        ok, detail = False, str(error)
    except NotReached as error:
        ok, detail = None, str(error)
    except Refused as error:
        detail = f"refused: {error}"
    except Exception as error:  # the plugin's own, in a later run
        ok, detail = False, f"{type(error).__name__}: {error}"
    if reason is None or ok is None:
        return Row(check, ok, detail)
    if ok:
        return Row(check, False, f"passes, although it was expected to fail ({reason}): take the expectation out")
    return Row(check, True, f"fails as expected ({reason}): {detail}")


def _toy_with(required: Set[str]) -> Model:
    """The first toy that has these sites; the last one if none has them, whose refusals then say why."""
    for toy in TOYS:
        model = load(toy)
        if not required & model.atlas.lacking.keys():
            break
    return model


def _singles(model: Model, rows: Sequence[Tokens | str], with_pictures: Set[str] = frozenset()) -> list[Tokens]:
    if rows:
        return [model.input(row) for row in rows]
    if with_pictures and model.processor is not None:
        shown = pictures(len(TEXTS), seed=0)
        return [model.tokens(text, images=[picture]) for text, picture in zip(TEXTS, shown, strict=True)]
    if model.tokenizer is not None:
        return [model.tokens(text) for text in TEXTS]
    pick, size = torch.Generator().manual_seed(0), model.atlas.shape.d_vocab
    ids = [torch.randint(min(3, size - 1), size, (1, length), generator=pick) for length in LENGTHS]
    return [Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in ids]


@contextmanager
def _random_state_restored() -> Iterator[None]:
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
