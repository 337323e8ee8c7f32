"""The battery: every site in every use on every engine, and what it says when something is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import sampled, tiny_model
from typer.testing import CliRunner

import interp_core as ic
from interp_core import testing
from interp_core.batteries.sites import check_model, coarsest
from interp_core.cli import app


@pytest.mark.parametrize("family", sampled(fast=("gemma2", "deepseek_v3", "qwen3_5")))
def test_families_pass_it_on_every_engine(family: str) -> None:
    found = check_model(tiny_model(family, attention="eager"))
    assert not found.failed, found
    assert {cell.engine for cell in found.cells} == {"torch", "nnsight", "transformer_lens"}
    assert sum(cell.ok for cell in found.cells) > 120


def test_float64_is_held_to_more() -> None:
    """Where the model computes in float64 throughout; Llama's norms and angles are float32 whatever its dtype is."""
    models = {name: tiny_model(name, torch.float64, "eager") for name in ("gpt2", "llama")}
    assert [coarsest(model) for model in models.values()] == [torch.float64, torch.float32]
    assert coarsest(tiny_model("llama", torch.bfloat16)) == torch.bfloat16
    found = check_model(models["gpt2"], ["torch", "nnsight"])
    assert not found.failed, found
    assert max(cell.error or 0 for cell in found.cells) < 1e-9
    assert not check_model(models["llama"], ["torch"]).failed


def test_it_finds_an_engine_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_core.engines.site_access import SiteRead

    model = tiny_model("llama")
    monkeypatch.setattr(ic.Model, "on", lambda self, name: ic.load(testing.tiny("llama", seed=1), check=False))
    wrong = {cell.use for cell in check_model(model, ["nnsight"]).failed}
    assert {"read", "write"} <= wrong
    monkeypatch.undo()
    kept = SiteRead.keep
    monkeypatch.setattr(SiteRead, "keep", lambda self, x, program: kept(self, x.detach(), program))
    assert {cell.use for cell in check_model(model, ["torch"]).failed} == {"grad"}


def test_what_is_refused_shows_why() -> None:
    found = check_model(tiny_model("mixtral"), ["transformer_lens"])
    assert not found.failed
    assert "router_logits read, router_logits write, router_logits grad" in str(found)
    assert "an edit there does not re-route" in str(found)
    with pytest.raises(ic.CapabilityError, match="no engine is called 'nnsite'. Did you mean 'nnsight'"):
        check_model(tiny_model("llama"), ["nnsite"])


def test_from_the_command_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", "toy:text", "--engine", "torch", "--out", f"{tmp_path}/battery.txt"])
    assert result.exit_code == 0, result.output
    assert re.search(r"resid_post +ok +ok", result.output)
    assert (tmp_path / "battery.txt").read_text() in result.output + "\n"
