"""No attribution method and no metric is silent where it takes long: each says what it is at, and gets to the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from interp_plugins.attribution.evaluation.faithfulness import faithfulness
from interp_plugins.attribution.evaluation.perturbed import Perturbed
from interp_plugins.attribution.evaluation.soft import soft
from interp_plugins.attribution.method import Attribution

import interp_core as ic
from interp_core import progress

PROMPT, TARGET = "Q: big\nA: small\n\nQ: hot\nA:", " cold\n\nQ: up"
INSIDE: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "attention_rollout": ({}, ""),
    "attnlrp": ({"variant": "per_token"}, "rows 6 of 6"),
    "ifr": ({}, ""),
    "ifr_routes": ({}, ""),
    "input_x_gradient": ({"per_token": True}, "rows 6 of 6"),
    "integrated_gradients": ({"steps": 5, "per_token": True, "batch_tokens": 40}, "gradients 35 of 35"),
    "leave_out": ({"units": "word", "convention": "delete_tokens", "batch_tokens": 1}, "ablations 7 of 7"),
    "random_attribution": ({}, ""),
    "surrogate": ({"units": "word", "convention": "replace", "ablations": 8}, "sweep 8 of 8"),
}
"""Settings, and what stands in the line behind the method; nothing where it is one pass."""


@pytest.fixture(scope="module")
def toy() -> ic.Model:
    return ic.load("toy:text")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work counts as long, and says each step."""
    monkeypatch.setattr(progress, "SILENT", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_every_method_is_here() -> None:
    known = ic.registry("methods")
    assert {row.name for row in known if isinstance(ic.method(row.name), Attribution)} == set(INSIDE)


@pytest.mark.parametrize("name", INSIDE)
def test_no_method_is_silent(name: str, toy: ic.Model, capfd: pytest.CaptureFixture[str]) -> None:
    settings, inside = INSIDE[name]
    ic.method(name)(toy, [PROMPT, PROMPT], target=TARGET, **settings)
    said = re.split(r"[\r\n]+", capfd.readouterr().err)
    assert any(line.startswith(f"{name}, prompts 2 of 2") for line in said)
    behind = [line for line in said if line.startswith(f"{name}, prompts 1 of 2") and f" · {inside}" in line]
    assert behind or not inside, said


def by_deletion(text: Perturbed) -> None:
    faithfulness(text, torch.rand(text.size), steps=4)


def by_blur(text: Perturbed) -> None:
    soft(text.model, text.tokens, torch.rand(2, text.size), draws=3)


@pytest.mark.parametrize(
    ("metric", "what"), [(by_deletion, "perturbed texts 5 of 5"), (by_blur, "blurred texts 12 of")]
)
def test_no_metric_is_silent(
    metric: Callable[[Perturbed], None], what: str, toy: ic.Model, capfd: pytest.CaptureFixture[str]
) -> None:
    metric(Perturbed(toy, toy.tokens(PROMPT, TARGET)))
    assert what in capfd.readouterr().err
