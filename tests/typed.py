"""What type checkers say of a method's call: read by mypy in `scripts/check`, run by nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

from interp_plugins.activation_patching import ActivationPatching, PatchingResult
from interp_plugins.attribution.ifr import IFR
from interp_plugins.attribution.method import AttributionResult
from interp_plugins.attribution.routes import Routes, RoutesResult
from interp_plugins.logit_lens import LensConfig, LogitLens, LogitLensResult

import interp_core as ic


@dataclass(frozen=True, eq=False)
class Theirs(ic.Result):
    """The result of a method that another package brings."""


class Their(ic.Method):
    """A method that another package brings: it says nothing but what `run` returns."""

    def run(self, model: ic.Model, tokens: ic.Tokens, config: ic.Config) -> Theirs:
        return Theirs()


class Untyped(ic.Method):
    """One that says nothing at all."""

    def run(self, model, tokens, config):  # type: ignore[no-untyped-def]
        return Theirs()


def classes(model: ic.Model) -> None:
    assert_type(LogitLens()(model, "Q: big", top_k=3), LogitLensResult)
    assert_type(LogitLens()(model, ["Q: big"], batch_size=2, progress=True, out="out/lens"), LogitLensResult)
    assert_type(ActivationPatching()(model, "Q: big", corrupted="Q: hot"), PatchingResult)
    assert_type(IFR()(model, "Q: big", target=" small", batch_size=1), AttributionResult)
    assert_type(Routes()(model, "Q: big"), RoutesResult)
    assert_type(Their()(model, "Q: big"), Theirs)
    assert_type(Untyped()(model, "Q: big"), Any)


def names(model: ic.Model) -> None:
    method = ic.method("logit_lens")
    assert_type(method, ic.Method)
    assert_type(method(model, "Q: big", batch_size=2), Any)


def refused(model: ic.Model) -> None:
    ActivationPatching()(model, "Q: big", "Q: hot")  # type: ignore[call-arg, arg-type]
    LensConfig(topk=3)  # type: ignore[call-arg]
    LensConfig(top_k="many")  # type: ignore[arg-type]
