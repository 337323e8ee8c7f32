"""The conformance kit: a good method passes on several families, and every check catches a method that breaks it.

Source: these tests.
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import tiny_model, toy_model
from jaxtyping import Float
from pydantic import Field
from test_vision import inputs
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.plugins import Plugin
from interp_core.plugins.sandbox import inspect_here
from interp_core.testing.case import MethodCase, stacked
from interp_core.testing.checks import CHECKS, undescribed
from interp_core.testing.report import NotReached

SITE = S.resid_post[1]


class ProbeConfig(ic.Config):
    """Settings.

    Attributes:
        power: of the norm.
    """

    power: int = 1


@dataclass(frozen=True, eq=False)
class Norms(ic.Result):
    """Norms of the residual stream."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"norm": ("batch", "pos"), "total": ("batch",)}
    norm: Float[Tensor, "batch pos"]
    total: Float[Tensor, "batch"]  # noqa: F821, UP037 (jaxtyping's)


@dataclass(frozen=True, eq=False)
class Longest(Norms):
    """What all prompts give together, joined by the wrong rule."""

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {**Norms.AXES, "longest": ()}
    JOINS: ClassVar[Mapping[str, str]] = {"longest": "sum"}
    longest: Float[Tensor, ""]


class Good(ic.Method):
    """Norms of the residual stream, and their sum over real tokens."""

    name = "good"
    requires = frozenset({"resid_post"})
    Config = ProbeConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> Any:
        norm = self.norm(model, tokens) ** config.power
        return Norms(norm, (norm * tokens.mask).sum(-1))

    def norm(self, model: ic.Model, tokens: ic.Tokens) -> Tensor:
        return model.run(tokens, read=SITE, logits=False)[SITE].norm(dim=-1)

    def conserved(self, model: ic.Model, tokens: ic.Tokens, result: Norms) -> dict[str, tuple[Tensor, Tensor]]:
        return {"the sum of the norms is the total": ((result.norm * tokens.mask).sum(-1), result.total)}


class HangingConfig(ic.Config):
    """Settings.

    Attributes:
        power: takes for ever.
    """

    power: int = Field(default_factory=functools.partial(time.sleep, 3600))  # type: ignore[arg-type]


class Hanging(Good):
    """Its defaults never come."""

    name = "hanging"
    Config = HangingConfig


def variant(**changes: Any) -> type[ic.Method]:
    """A method that differs from the good one."""
    return type("Bad", (Good,), {"__doc__": "Bad.", "__module__": __name__, **changes})


def first(act: Callable[[ic.Model, ic.Tokens], Any]) -> type[ic.Method]:
    """The good method, which does something else before."""

    def run(self: Good, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> Any:
        act(model, tokens)
        return Good.run(self, model, tokens, config)

    return variant(run=run)


def then(make: Callable[[ic.Model, ic.Tokens, Norms], Any]) -> type[ic.Method]:
    """The good method, whose result is made into something else."""

    def run(self: Good, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> Any:
        return make(model, tokens, Good.run(self, model, tokens, config))

    return variant(run=run)


def saying(kind: type[ic.Result]) -> type[ic.Method]:
    """The good method, which says that it returns another class."""
    method = first(lambda *_: None)
    method.run.__annotations__["return"] = kind
    return method


def config(doc: str = "Settings.\n\nAttributes:\n    power: of the norm.\n", **members: Any) -> type[ic.Method]:
    """The good method with other settings."""
    kind = type("OtherConfig", (ic.Config,), {"__annotations__": {"power": int}, "__doc__": doc, "power": 1, **members})
    return variant(Config=kind)


def result(axes: Any = None, **members: Any) -> type[ic.Method]:
    """The good method with another kind of result."""
    axes = axes or Norms.AXES
    kind = type("Other", (Norms,), {"AXES": axes, "__doc__": "Other.", "__module__": __name__, **members})
    kind = dataclass(frozen=True, eq=False)(kind)
    return then(lambda _model, _tokens, found: kind(found.norm, found.total))


def hooked(model: ic.Model, tokens: ic.Tokens) -> None:
    """A hook of one's own, gone only if all goes well."""
    handle = model.hf.model.layers[2].register_forward_hook(lambda *_: None)
    model.run(tokens)
    handle.remove()


def swallowed(model: ic.Model, tokens: ic.Tokens) -> Any:
    try:
        return model.run(tokens, read=SITE, logits=False)[SITE].norm(dim=-1)
    except RuntimeError:
        return torch.zeros(tokens.ids.shape)


def patched(model: ic.Model, _: Any) -> None:
    mlp = model.hf.model.layers[0].mlp
    mlp.forward = functools.partial(mlp.forward)


def damaged(model: ic.Model, _: Any) -> None:
    model.hf.lm_head.weight.data[0, 0] += 1e-3


def graded(model: ic.Model, tokens: ic.Tokens) -> None:
    model.hf.lm_head(torch.ones(1, 64)).sum().backward()


def overwritten(_: Any, tokens: ic.Tokens) -> None:
    tokens.ids[0, 0] += 1


def raw(column: int) -> type[ic.Method]:
    """Takes a column of the batch for a position of the text."""

    def make(model: ic.Model, tokens: ic.Tokens, found: Norms) -> Norms:
        stream = model.run(tokens, read=SITE, logits=False)[SITE]
        return Norms(found.norm, stream[:, column].norm(dim=-1))

    return type("Raw", (then(make),), {"__doc__": "Raw.", "conserved": ic.Method.conserved})


def jittered(_m: Any, _t: Any, found: Norms, count: list[int] = []) -> Norms:  # noqa: B006 (it is to remember)
    count.append(1)
    return Norms(found.norm + 1e-6 * len(count), found.total)


def reloaded(cls: type[Norms], folder: str) -> Norms:
    found = Norms.load.__func__(cls, folder)  # type: ignore[attr-defined]
    return cls(found.norm + 1, found.total)


def drawn(_m: Any, _t: Any, found: Norms) -> Norms:
    return Norms(found.norm + float(random.random() + np.random.rand()), found.total)


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("class", lambda: variant(requires=frozenset({"patern"})), "'patern', which is no site.*Did you mean 'pattern'"),
    ("class", lambda: variant(requires="resid_post"), "not a set of names"),
    ("class", lambda: variant(name=""), "it has no name: write name = 'bad' in class Bad"),
    ("class", lambda: variant(api=0), "written for interface 0, this is 1"),
    ("class", lambda: type("Bare", (ic.Method,), {"name": "bare", "__module__": __name__}), "leaves run to be written"),
    ("class", lambda: variant(Config=dict), "not a subclass of interp_core.Config"),
    ("documented", lambda: variant(__doc__=None), "Bad has no docstring"),
    ("documented", lambda: variant(__module__="conftest"), "names no source"),
    ("documented", lambda: config(doc=""), "OtherConfig has no docstring"),
    ("documented", lambda: result(__doc__=None), "Other has no docstring"),
    ("config", lambda: config(doc="Settings."), "no description of power"),
    ("config", lambda: config(model_config={"extra": "allow"}), "extra='allow': leave it at 'forbid'"),
    ("config", lambda: config(power=Field(default="x", validate_default=True)), "the defaults are refused"),
    ("result", lambda: then(lambda *_: {"norm": 1}), "run returned a dict: methods return an interp_core.Result, a frozen dataclass whose .* of its tensors$"),
    ("result", lambda: saying(Longest), r"returned a Norms; Bad\.run says that it returns a Longest"),
    ("result", lambda: first(lambda *_: 1 / 0), "ZeroDivisionError"),
    ("result", lambda: first(lambda *_: exit()), "SystemExit"),
    ("result", lambda: then(lambda _m, _t, r: type("Forgot", (Norms,), {})(r.norm, r.total)), "write @dataclass"),
    ("shapes", lambda: result({"norm": ("batch", "pos")}), r"total is a tensor \[2\], but AXES does not name"),
    ("shapes", lambda: result({"norm": ("pos", "batch"), "total": ("batch",)}, __post_init__=lambda _: None), r"batch is 7, elsewhere 2; are batch and pos swapped in AXES\?"),
    ("shapes", lambda: result({"norm": ("batch", "key"), "total": ("batch",)}), "annotated 'batch pos', AXES says 'batch key'"),
    ("saving", lambda: result(load=classmethod(reloaded)), "after save and load it differs in norm"),
    ("saving", lambda: result(table=lambda self: [{"norm": self.norm}]), "TypeError: Object of type Tensor"),
    ("hooks", lambda: first(lambda m, _: m.hf.lm_head.register_forward_hook(lambda *_: None)), "lm_head._forward_hooks"),
    ("hooks", lambda: first(patched), "layers.0.mlp.forward"),
    ("weights", lambda: first(damaged), "^lm_head.weight has other values. Compute with copies"),
    ("modes", lambda: first(lambda m, _: m.hf.train()), "^LlamaForCausalLM.training was False, is True; .* more. Put back"),
    ("modes", lambda: first(lambda m, _: m.hf.requires_grad_(False)), "requires_grad was True, is False"),
    ("modes", lambda: first(graded), "lm_head.weight.grad was none"),
    ("model_config", lambda: first(lambda m, _: setattr(m.hf.config, "use_cache", False)), "config.use_cache was True"),
    ("model_config", lambda: first(lambda m, _: m.hf.set_attn_implementation("eager")), "attention was sdpa, is eager"),
    ("random_state", lambda: first(lambda *_: torch.rand(1)), r"it draws from torch's global generator, or seeds it; use a generator of your own: torch.Generator\(\)"),
    ("random_state", lambda: first(lambda *_: np.random.rand()), r"numpy's global generator, .* numpy.random.default_rng\(seed\)"),
    ("random_state", lambda: first(lambda *_: random.random()), r"Python's global generator, .* random.Random\(seed\)"),
    ("input", lambda: first(overwritten), "writes into the tokens"),
    ("exception", lambda: first(hooked), r"after an error in module call \d+ of \d+: model.layers.2._forward_hooks"),
    ("exception", lambda: variant(norm=lambda self, model, tokens: swallowed(model, tokens)), "it went on after an error"),
    ("deterministic", lambda: then(jittered), "a second run from the same seed differs in norm"),
    ("batch", lambda: then(lambda _m, _t, r: Norms(r.norm / r.norm.mean(), r.total)), "norm of row 0 differs by up to"),
    ("padding_left", lambda: raw(0), "total of row 2 differs"),
    ("padding_right", lambda: raw(-1), "total of row 2 differs"),
    ("batch_size", lambda: then(lambda _m, _t, r: Longest(r.norm, r.total, r.total.max())), "in batches of one it differs from one batch of 2 in longest"),
    ("conserved", lambda: then(lambda _m, _t, r: Norms(r.norm, r.total * 1.01)), "norms is the total: the sides differ"),
]  # fmt: skip


def fresh() -> ic.Model:
    """A model of one's own: bad methods leave it changed."""
    return ic.load(testing.tiny("llama"), check=False)


@pytest.mark.parametrize(("site", "toy"), [("router_logits", "toy:moe"), ("vision_embed", "toy:vision")])
def test_a_method_is_run_on_the_toy_that_has_what_it_requires(site: str, toy: str) -> None:
    """Routers, and texts with a picture each."""
    seen: list[ic.Tokens] = []

    class Needy(Good):
        requires = frozenset({site})

        def check(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> None:
            seen.append(tokens)

    report = testing.check_method(Needy)
    assert toy in report.title and not set(report.failed) - {"class", "documented"}, report
    assert all(("vision" in tokens.spans) == (site == "vision_embed") for tokens in seen) and seen


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe", "qwen3_vl"])
def test_a_good_method_passes(family: str) -> None:
    told: list[testing.Row] = []
    report = testing.check_method(Good, tiny_model(family), settings={"power": 2}, tell=told.append)
    assert tuple(told) == report.rows and str(report).endswith(f"\n{len(CHECKS)} checks passed")
    assert report.ok and all(row.ok for row in report.rows), str(report)
    assert [row.check for row in report.rows] == list(CHECKS)
    report.raise_if_failed()


@pytest.mark.parametrize(("check", "make", "says"), BAD, ids=[f"{c}-{i}" for i, (c, _, _) in enumerate(BAD)])
def test_a_bad_method_is_caught_and_named(check: str, make: Callable[[], Any], says: str) -> None:
    report = testing.check_method(make(), fresh())
    row = next(row for row in report.rows if row.check == check)
    assert row.ok is False and re.search(says, row.detail), str(report)
    with pytest.raises(ic.PluginError, match=rf"(?s){check}.* failed\..*FAIL  {check}"):
        report.raise_if_failed()


def test_every_check_has_a_bad_method() -> None:
    assert {check for check, _, _ in BAD} == set(CHECKS)


def test_one_fault_is_one_failure() -> None:
    """The checks are apart: a fault shows in its own place."""
    for check in ("shapes", "saving", "random_state", "conserved"):
        make = next(make for name, make, _ in reversed(BAD) if name == check)
        assert testing.check_method(make(), fresh()).failed == [check]


def test_settings_that_hang_are_caught() -> None:
    began = time.perf_counter()
    report = testing.check_method(Hanging, fresh(), limit=2.0, settings={"power": 1})
    row = next(row for row in report.rows if row.check == "config")
    assert row.ok is False and "took more than 2 s" in row.detail and time.perf_counter() - began < 30
    assert report.failed == ["config"]


def test_without_a_result_what_needs_one_is_not_reached() -> None:
    report = testing.check_method(first(lambda *_: 1 / 0), fresh())
    assert report.failed == ["result"]
    assert [row.check for row in report.rows if row.ok is None] == [
        "shapes", "saving", "exception", "deterministic", "batch", "padding_left", "padding_right",
        "batch_size", "conserved",
    ]  # fmt: skip


def test_expected_failures_are_strict() -> None:
    bad, reason = BAD[-1][1](), "the total is rounded up"
    report = testing.check_method(bad, fresh(), expected_failures={"conserved": reason})
    assert report.ok and f"fails as expected ({reason})" in str(report)
    report = testing.check_method(Good, fresh(), expected_failures={"conserved": reason})
    assert report.failed == ["conserved"] and "passes, although it was expected to fail" in str(report)
    with pytest.raises(ic.PlanError, match="no check is called 'conserve'. Did you mean 'conserved'"):
        testing.check_method(Good, fresh(), expected_failures={"conserve": reason})
    with pytest.raises(ic.PlanError, match="expected failure of 'batch' needs a reason"):
        testing.check_method(Good, fresh(), expected_failures={"batch": " "})


def test_the_callers_random_state_is_kept() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    testing.check_method(then(drawn), fresh())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{}, {"at": -1}, {"at": -2, "targets": "next", "top_k": 3}], ids=str)
@pytest.mark.parametrize("family", ["toy:text", "gpt2", "gemma2", "qwen3_moe"])
def test_the_logit_lens_passes(family: str, settings: dict[str, Any]) -> None:
    model = toy_model() if family == "toy:text" else tiny_model(family)
    report = testing.check_method("logit_lens", model, settings=settings)
    report.raise_if_failed()
    padding = [row.detail for row in report.rows if row.check.startswith("padding")]
    assert all(detail.startswith("refused: logit_lens: rows have") != bool(settings) for detail in padding)


def test_rows_of_ones_own(toy: ic.Model) -> None:
    report = testing.check_method(Good, toy, rows=["Q: big\nA: small", toy.tokens("Q: hot\nA:")])
    assert report.ok, str(report)
    alone = testing.check_method(Good, toy, rows=["Q: big\nA:"])
    assert alone.ok and [row.check for row in alone.rows if row.ok is None] == [
        "padding_left",
        "padding_right",
        "batch_size",
    ]


def test_rows_with_images() -> None:
    """They are stacked like others; what needs a batch is not reached where it is not known what is whose."""
    model = tiny_model("qwen3_vl")
    report = testing.check_method(Good, model, rows=[model.input(inputs()), model.input(inputs(2))])
    assert report.ok and not [row for row in report.rows if row.ok is None], str(report)
    whole = [replace(model.input(inputs(n)), shares={}) for n in (1, 2)]
    with pytest.raises(NotReached, match="rows with such inputs cannot be stacked"):
        stacked(MethodCase(Good, model, {}, whole, 1.0))


@pytest.mark.parametrize("row", [*ic.registry("methods"), *ic.registry("recipes")], ids=lambda row: row.name)
def test_our_own_are_described(row: Plugin) -> None:
    seen = inspect_here(row.kind, row.name, row.load())
    assert not seen.error and not seen.faults and not undescribed(seen.settings), seen


def test_every_check_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs/plugins.md").read_text()
    for name, check in CHECKS.items():
        assert f"| `{name}` | {' '.join((check.__doc__ or '').split())} |" in page, name


@pytest.mark.parametrize("place", ["class", "function"])
def test_a_class_or_a_function_that_stays_patched_is_found(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What published attribution code does (LlamaRMSNorm.forward = …, modeling_llama.rotate_half = …) reaches every
    model of the process, and shows in no module."""
    from transformers.models.llama import modeling_llama

    holder, name = {"class": (modeling_llama.LlamaRMSNorm, "forward"), "function": (modeling_llama, "rotate_half")}[
        place
    ]
    own = getattr(holder, name)

    def patch(*_: Any) -> None:
        monkeypatch.setattr(holder, name, lambda *given: own(*given))

    report = testing.check_method(first(patch), ic.load(testing.tiny("llama")))
    (row,) = [row for row in report.rows if row.check == "hooks"]
    assert not row.ok and f"{name} was <function" in row.detail
