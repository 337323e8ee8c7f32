"""The benchmark does what it says in every tool, and takes a user's own function."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from peers import installed

import interp_core as ic
from interp_core import bench
from interp_core.bench import OPERATIONS, benchmark, measure
from interp_core.bench.tools import ready

IDS = torch.randint(3, 1400, (1, 12), generator=torch.Generator().manual_seed(0))


def logits(result: Any) -> torch.Tensor:
    return (result[0] if isinstance(result, tuple) else result).as_subclass(torch.Tensor)


def test_the_tools_do_the_same_thing() -> None:
    tools = ready(installed(), toy_model(), IDS)
    assert {"bare", "by hand", "interp_core", "nnsight", "TransformerLens bridge"} <= tools.keys()
    with torch.no_grad():
        plain = tools["bare"].plain()  # type: ignore[attr-defined]
        for operation in ("plain", "resid", "z", "ablate", "patch"):
            want = logits(tools["by hand"].__getattribute__(operation)()) if operation != "plain" else plain
            for name, tool in tools.items():
                if (function := getattr(tool, operation, None)) and name not in ("pyvene", "interp-engine"):
                    torch.testing.assert_close(
                        logits(function()), want, atol=2e-5, rtol=2e-5, msg=f"{name} {operation}"
                    )
        assert not torch.allclose(logits(tools["interp_core"].ablate()), plain)  # type: ignore[attr-defined]
        made = {
            name: tool.generate() for name, tool in tools.items() if getattr(tool, "generate", None) and name != "bare"
        }
    want = made["by hand"][0, 12:]
    for name, ids in made.items():
        assert torch.equal(ids[0, -len(want) :], want), name


def test_table_and_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, failed = measure(
        toy_model(),
        rounds=2,
        n_tokens=8,
        operations=["plain", "resid"],
        only=["interp_core", "by hand"],
        extra=["test_bench:mine", "logit_lens"],
    )
    assert {(row.operation, row.tool) for row in rows} == {
        ("plain", "bare"), ("plain", "interp_core"), ("resid", "by hand"), ("resid", "interp_core"), ("test_bench:mine", "mine"), ("logit_lens", "logit_lens"),
    }  # fmt: skip
    assert not failed and all(row.seconds > 0 for row in rows)
    text = benchmark(toy_model(), rounds=1, n_tokens=8, operations=["plain"], only=["interp_core"])
    assert "| forward pass without hooks | interp_core |" in text
    for bad in ({"operations": ["fly"]}, {"only": ["nnsite"]}, {"extra": ["nowhere"]}):
        with pytest.raises(ic.PlanError):
            measure(toy_model(), rounds=1, **bad)  # type: ignore[arg-type]
    assert set(OPERATIONS) > {"plain", "generate"}


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = tiny_model("llama"), itertools.cycle([1.0, 1.0, 1.5, 1.0, 1.6, 1.0])
    monkeypatch.setattr(bench, "_seconds", lambda run, device: next(clock) * 1e-3)
    assert "This machine was busy: the bare pass itself varied by ±" in bench.benchmark(
        model, rounds=6, n_tokens=4, operations=["plain"], only=["interp_core"]
    )
    monkeypatch.setattr(bench, "_seconds", lambda run, device: 1e-3)
    assert "busy" not in bench.benchmark(model, rounds=6, n_tokens=4, operations=["plain"], only=["interp_core"])


def test_an_error_without_words_is_a_line_of_the_table() -> None:
    _, failed = measure(toy_model(), rounds=1, operations=["plain"], only=["interp_core"], extra=["test_bench:silent"])
    assert failed == [("test_bench:silent", "silent", "ValueError: ValueError")]


def silent(model: ic.Model, ids: torch.Tensor) -> Any:
    """A function that fails and does not say why."""

    def fail() -> None:
        raise ValueError

    return fail


def mine(model: ic.Model, ids: torch.Tensor) -> Any:
    """What a user would write for `--extra`."""
    return lambda: model.run(ids.cpu(), read="resid_post[0]", logits=False)


def test_our_plans_on_other_engines_cost_what_their_own_code_costs() -> None:
    """Python calls per pass; the time is in docs/overhead.md."""
    pairs = {"nnsight": "interp_core on nnsight", "TransformerLens bridge": "interp_core on the bridge"}
    operations = ["resid", "z", "ablate", "patch"]
    rows, failed = measure(
        toy_model(),
        rounds=1,
        n_tokens=8,
        operations=["plain", *operations],
        only=[*pairs, *pairs.values()],
        tools=installed(),
    )
    calls = {(row.operation, row.tool): row.calls for row in rows}
    assert not failed
    for native, ours in pairs.items():
        for operation in operations:
            assert calls[operation, ours] <= 1.1 * calls[operation, native], (operation, ours)
