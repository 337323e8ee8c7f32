"""The conformance kit: what every method must keep, held against it on a model.

testing.check_method(MyMethod, ic.load(testing.tiny("llama"))).raise_if_failed()
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import PlanError, nearest
from ..methods import Method
from ..model import Model, load
from ..plugins import Plugin, registry
from ..plugins.sandbox import LIMIT, PluginInfo, inspect_plugin
from ..progress import Progress
from ..sites import SITES
from ..text import Tokens
from .case import MethodCase
from .checks import CHECKS, documented, undescribed
from .processors import pictures
from .report import Failed, Report, Row, Tell, reported

TEXTS = ("Q: big\nA: small\n\nQ: hot\nA:", "Q: hot\nA: cold\n\nQ: big\nA:", "Q: wet\nA:")
LENGTHS = (7, 7, 4)
TOYS = ("toy:text", "toy:moe", "toy:vision")
VISUAL = frozenset(name for name, info in SITES.items() if info.visual)


def check_method(
    method: type[Method] | str,
    model: Model | str | None = None,
    *,
    rows: Sequence[Tokens | str] = (),
    settings: Mapping[str, Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    limit: float = LIMIT,
    tell: Tell | None = None,
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
        tell: gets each row as soon as its check is done.

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
    checks = [(check, partial(CHECKS[check], case), expected.get(check)) for check in CHECKS]
    with _random_state_restored(), Progress("checks", len(CHECKS)) as progress:

        def told(row: Row) -> None:
            progress.add()
            if tell is not None:
                tell(row)

        return reported(f"method {getattr(kind, 'name', kind)!r} on {on!r}", checks, told)


def check_plugin(plugin: Plugin, limit: float = LIMIT, tell: Tell | None = None) -> Report:
    """What can be said of any plugin without running it: it loads in time, is what its kind must be, is documented.

    Reads it in another process; nothing of it is imported here.
    """
    title, infos = f"{plugin.label} ({plugin.target})", list[PluginInfo]()

    def class_() -> str:
        if plugin.state in ("broken", "incompatible"):
            raise Failed(plugin.error)
        infos.append(inspect_plugin(plugin.kind, plugin.name, plugin.target, limit))
        if infos[0].error:
            raise Failed(infos[0].error.strip())
        return ""

    report = reported(title, [("class", class_, None)], tell)
    if not report.ok:
        return report
    more = [("documented", partial(_documented, plugin.kind, infos[0]), None)]
    if plugin.kind in ("methods", "recipes"):
        more.append(("config", partial(_settings, infos[0]), None))
    return Report(title, report.rows + reported(title, more, tell).rows)


def _documented(kind: str, seen: PluginInfo) -> str:
    if kind == "methods":
        documented(seen.page, seen.doc, plugin="the class")
    elif not seen.page:
        raise Failed("its module has no docstring")
    return ""


def _settings(seen: PluginInfo) -> str:
    if faults := [*seen.faults, *undescribed(seen.settings)]:
        raise Failed("; ".join(faults))
    return f"{len(seen.settings)} settings"


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
    pick, size = torch.Generator().manual_seed(0), model.atlas.shape.n_ids
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
