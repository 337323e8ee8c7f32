"""Interventions on visual tokens: truncation is deletion, replacement at layer 0 is the other image, and the laws between
them, over every vision family."""

from __future__ import annotations

from typing import Any

import deletion
import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from layouts import DEEPSTACK, LINEAR, VISUAL
from torch import Tensor

from interp_core import sites as S
from interp_core import visual

FAST = ("qwen3_vl", "qwen3_vl_moe", "gemma3_vision", "llava")
FAMILIES = sampled(VISUAL, FAST)
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-14}
"""Of the largest logit: some forty roundings of each dtype."""


def inputs(family: str, dtype: torch.dtype, *seeds: tuple[int, ...]) -> dict[str, Any]:
    """A batch whose rows have pictures of these seeds."""
    rows = [[pictures.picture(family, seed) for seed in row] for row in seeds]
    made = pictures.inputs(family, rows)
    return {k: v.to(dtype) if k == "pixel_values" else v for k, v in made.items()}


def columns(values: dict[str, Any], row: int = 0) -> list[int]:
    """Columns of a row's visual tokens."""
    return torch.nonzero(values["input_ids"][row] == pictures.IMAGE).flatten().tolist()


def first(family: str) -> int:
    """The first layer from which tokens can be hidden."""
    return max(LINEAR.get(family, [-1])) + 1


def gap(a: Tensor, b: Tensor) -> float:
    a, b = a.as_subclass(Tensor).double(), b.as_subclass(Tensor).double()
    assert a.shape == b.shape and a.numel()
    return float((a - b).abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_is_deletion(family: str, dtype: torch.dtype) -> None:
    """From every layer on; rows of a padded batch as each row alone."""
    model = tiny_model(family, dtype)
    rows = ((0, 1), (2,))
    both = inputs(family, dtype, *rows)
    for layer in range(first(family), model.n_layers + 1):
        run = model.run(both, edits=visual.truncated(model, layer))
        clean = model.run(both).logits
        for i, row in enumerate(rows):
            alone = inputs(family, dtype, row)
            wanted, kept = deletion.logits(family, model.hf, alone, layer, columns(alone))
            n = alone["input_ids"].shape[1]
            assert gap(run.logits[i, -n:][kept], wanted[0]) <= TOLERANCE[dtype] * float(wanted.abs().max()), layer
            if layer < model.n_layers:
                assert gap(clean[i, -1], wanted[0, -1]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_goes_on_while_generating(family: str) -> None:
    """Tokens and logits of every step, with a cache, as of deletion without one."""
    model = tiny_model(family, torch.float64)
    rows = ((0, 1), (2,))
    both = inputs(family, torch.float64, *rows)
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_at_eos": False}
    for layer in (first(family), model.n_layers - 1):
        made = model.generate(both, visual.truncated(model, layer), read=S.logits, **options)
        for i, row in enumerate(rows):
            alone = inputs(family, torch.float64, row)
            ids, logits = deletion.generated(family, model.hf, alone, layer, columns(alone), 4)
            assert made.ids[i, -4:].tolist() == ids
            steps = torch.stack([step[S.logits][i, -1].as_subclass(Tensor) for step in made.steps])
            assert gap(steps, logits) <= 1e-12
        assert made.receipts[0].layers == tuple(range(layer, model.n_layers))


def test_masking_the_prompt_alone_is_another_thing() -> None:
    """The names "text" and "after_vision" hold what is generated too."""
    model = tiny_model("qwen3_vl", torch.float64)
    values = inputs("qwen3_vl", torch.float64, (0,))
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_at_eos": False, "read": S.logits}
    n = values["input_ids"].shape[1]
    prompt = S.pattern.knockout(query=slice(0, n), key="vision")
    every = [S.pattern.knockout(query=name, key="vision") for name in ("text", "after_vision")]
    short, *whole = (model.generate(values, edit, allow_noop=True, **options) for edit in (prompt, *every))
    assert gap(whole[0].steps[2][S.logits], whole[1].steps[2][S.logits]) == 0
    assert gap(short.steps[2][S.logits], whole[0].steps[2][S.logits]) > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_handed_to_the_kernel(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, heads and windows: as attention opened whole, without opening it."""
    from interp_core.engines.attention import LayerTap

    model = tiny_model(family, torch.float64, attention)
    rows = ((0, 1), (2,)) if attention == "sdpa" else ((0, 1),)  # transformers' eager attention gives NaN for padding
    both = inputs(family, torch.float64, *rows)
    layers = range(first(family), model.n_layers)
    last = layers[-1]
    for edits in (
        visual.blocked(model, last),
        visual.blocked(model, layers, heads=[0, 2]),
        visual.blocked(model, last, query="last", heads=1),
        visual.blocked(model, last, query="last", key=[-2]),
        visual.blocked(model, layers, query="text", key="image_0"),
    ):
        found = model.run(both, edits=edits)
        with monkeypatch.context() as patch:
            patch.setattr(LayerTap, "has_kernel", False)
            wanted = model.run(both, edits=edits)
        mask = both["attention_mask"].bool()
        assert gap(found.logits[mask], wanted.logits[mask]) <= 1e-12
        assert found.receipts[0].norm == pytest.approx(wanted.receipts[0].norm, rel=1e-9)
        assert found.receipts[0].positions == wanted.receipts[0].positions


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_at_layer_0_is_the_run_with_it(family: str) -> None:
    for dtype in TOLERANCE:
        model = tiny_model(family, dtype)
        clean, blind = (inputs(family, dtype, *rows) for rows in (((0, 1), (2,)), ((3, 4), (5,))))
        source = model.run(blind, read=visual.reads(model))
        run = model.run(clean, edits=visual.replaced(source, 0))
        assert gap(run.logits, source.logits) == 0
        assert gap(run.logits, model.run(clean).logits) > 1e-3
        if family in DEEPSTACK:
            kept = model.run(clean, edits=visual.replaced(source, 0, "keep"))
            assert gap(kept.logits[:, -1], source.logits[:, -1]) > 1e-5
            # both policies are the same once nothing is added any more
            later = [model.run(clean, edits=visual.replaced(source, 1, policy)) for policy in visual.POLICIES]
            assert gap(later[0].logits, later[1].logits) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_own_rows_change_nothing_and_the_last_ones_nothing_else(family: str) -> None:
    model = tiny_model(family, torch.float64)
    values, other = inputs(family, torch.float64, (0, 1), (2,)), inputs(family, torch.float64, (3, 4), (5,))
    clean, blind = (model.run(x, read=visual.reads(model)) for x in (values, other))
    for layer in range(model.n_layers + 1):
        same = model.run(values, edits=visual.replaced(clean, layer), allow_noop=True)
        assert gap(same.logits, clean.logits) == 0, layer
    run = model.run(values, edits=visual.replaced(blind, model.n_layers))
    text = torch.ones_like(values["input_ids"]).bool() & (values["input_ids"] != pictures.IMAGE)
    assert gap(run.logits[text], clean.logits[text]) == 0
    assert gap(run.logits[~text], clean.logits[~text]) > 1e-3
