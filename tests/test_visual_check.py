"""The battery before visual methods: it holds in every family, and fails where a model does something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_visual_images import MOST, drawn, seeing, user

import interp_core as ic
from interp_core import vision


def pair(model: ic.Model, mode: str = "noise") -> list[ic.Tokens]:
    """Two texts with images, and the same with blind ones."""
    images = drawn()[:3]
    blind = vision.blind_images(images, mode).images
    return [
        model.tokens(["Which shape?", "is it red?"], [" red", " yes"], images=[[shown[0], shown[2]], [shown[1]]])
        for shown in (images, blind)
    ]


@pytest.mark.parametrize("family", MOST)
def test_it_holds_in_every_family(family: str) -> None:
    model = seeing(family)
    found = ic.visual_check(model, *pair(model))
    assert found.ok and not found.failed
    unreached = [name for name, error in found.errors.items() if error is None]
    assert unreached == (["removal"] if family == "qwen3_5_vision" else [])
    assert list(found.errors) == [
        "places",
        "features",
        "elsewhere",
        "identity",
        "blind",
        "removal",
        "end",
        "repeat",
        "score",
    ]
    assert [row.tokens for row in found.rows] == [len(row) for row in model.visual_grid(pair(model)[0])]
    assert [row.length for row in found.rows] == pair(model)[0].lengths


def test_its_table() -> None:
    model = seeing("qwen3_vl")
    lines = str(ic.visual_check(model, *pair(model))).splitlines()
    assert lines[0].split() == ["row", "T", "tokens", "runs", "grid", "pixels", "of", "first", "and", "last"]
    assert lines[1].split(maxsplit=3) == [
        "0",
        "20",
        "12",
        "[1,5) [7,15)             2x2 2x4          (0, 0, 8, 8) … (24, 8, 32, 16)",
    ]
    assert [line.split()[:2] for line in lines[3:5]] == [["ok", "places"], ["ok", "features"]]


def test_without_a_target_and_in_half_precision() -> None:
    model = ic.load(
        ic.testing.tiny("qwen3_vl_moe", dtype=torch.bfloat16), processor=ic.testing.processor("qwen3_vl_moe")
    )
    one, two = (
        model.chat(user({"type": "image", "image": shown}, "Which shape?")) for shown in (drawn()[0], drawn()[1])
    )
    found = ic.visual_check(model, one, two)
    assert found.errors["score"] is None and found.why["score"] == "row 0: the text has no target"
    assert found.limits["blind"] == 5e-2 and found.limits["repeat"] == 0


def _leaking(model: Any) -> Any:
    """Pixels that reach a token of text: the first one."""

    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[:, 0] += embeds[:, 1:5].sum(1)
        return args, {**kwargs, "inputs_embeds": embeds}

    return model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def _scaled(model: Any) -> Any:
    """Features that are changed between the tower and the language model."""

    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 1.5}

    return model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def _trembling(model: Any) -> Any:
    """Another number each time."""

    def hook(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 1e-3 * torch.rand(())

    return model.lm_head.register_forward_hook(hook)


def _mixing(model: Any) -> Any:
    """Rows that reach each other before the end, past attention."""

    def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] + 0.1 * args[0].cumsum(1),)

    return model.model.language_model.norm.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("fault", "names"),
    [(_leaking, {"elsewhere", "blind"}), (_scaled, {"features"}), (_trembling, {"repeat"}), (_mixing, {"end"})],
)
def test_it_refuses_to_go_on(fault: Any, names: set[str]) -> None:
    hf = ic.testing.tiny("qwen3_vl")
    handle = fault(hf)
    model = ic.load(hf, processor=ic.testing.processor("qwen3_vl"), check=False)
    rows = [tokens.row(1) for tokens in pair(model)]
    found = ic.visual_check(model, *rows, strict=False)
    with pytest.raises(ic.CapabilityError, match=r"images do not do in this model .*(?s:.*)FAIL"):
        found.raise_if_failed()
    assert not found.ok and names <= set(found.failed), str(found)
    handle.remove()


def test_bad_input() -> None:
    model = seeing("qwen3_vl")
    one, _ = pair(model)
    with pytest.raises(ic.TextError, match="the other images make another text: their grids differ"):
        ic.visual_check(model, one.row(0), one.row(1))
    with pytest.raises(ic.TextError, match=r"visual_check\(other=…\) takes Tokens"):
        ic.visual_check(model, one, "x")  # type: ignore[arg-type]
    text = model.tokens("red?")
    with pytest.raises(ic.TextError, match="a row has no visual tokens"):
        ic.visual_check(model, text, text)
    with pytest.raises(ic.CapabilityError, match="the other images are the same to the model"):
        ic.visual_check(model, one, one)
