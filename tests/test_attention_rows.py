"""Rows of patterns that are made after the pass: `run(attention=True)`."""

from __future__ import annotations

import pytest
import torch
from conftest import sampled, tiny_model
from sweeping import tokens
from tolerances import close

import interp_core as ic
from interp_core import sites as S
from interp_core import testing


def kept(model: ic.Model, batch: ic.Tokens, edits: ic.Edit | tuple[()] = ()) -> dict[int, ic.AttentionRows]:
    """Each layer's attention, after the run."""
    layers: dict[int, ic.AttentionRows] = {}
    model.run(
        batch, read=S.attn_out, edits=edits, logits=False, attention=True,
        each=lambda layer, values: layers.update({layer: values.attention})
        if layer in model.layers(S.pattern)
        else None,
    )  # fmt: skip
    return layers


@pytest.mark.parametrize("family", sampled())
def test_rows_are_those_that_a_run_reads(family: str) -> None:
    """Every family, a padded batch: soft caps, sliding windows, chunks, sinks, grouped and latent queries."""
    model = tiny_model(family)
    if why := model.can("pattern", "rows"):
        with pytest.raises(ic.CapabilityError, match="does not go through transformers' attention interface"):
            model.run("x" if model.tokenizer else tokens(), read=S.attn_out, each=print, attention=True)
        assert family in ("gpt_neo", "gptj"), why
        return
    batch = tokens() if "left padding" not in model.atlas.lacking else tokens().row(0)
    batch_size, width = batch.ids.shape
    run, layers = model.run(batch, read=S.pattern, logits=False), kept(model, batch)
    assert list(layers) == model.layers(S.pattern)
    few = [width - 1, 1, width - 2]
    weights = torch.rand(batch_size, len(few), generator=torch.Generator().manual_seed(0)).to(model.dtype)
    even = torch.full((batch_size, width), 1 / width, dtype=model.dtype)
    real = batch.mask[:, None, :, None]  # what padding looks at is nobody's
    for layer, attention in layers.items():
        pattern = run[S.pattern[layer]].plain
        assert not attention.pattern([0]).requires_grad and not attention.mixed([0], weights[:, :1]).requires_grad
        close(attention.pattern(range(width)) * real, pattern * real, model)
        close(attention.at(few).pattern(few[1:]) * real[:, :, few[1:]], (pattern * real)[:, :, few[1:]], model)
        if not batch.padded:
            wanted = torch.einsum("bq,bhqk->bhk", weights, pattern[:, :, few])
            close(attention.at(few).mixed(few, weights, chunk=2), wanted, model)
            close(attention.mixed(range(width), even, chunk=3), pattern.mean(2), model)  # rows that follow each other
            close(attention.mixed(range(width), even), pattern.mean(2), model)
            held = attention.at(sorted(few)).held()
            close(held.mixed(few, weights), wanted, model)
            close(
                held.mixed(few[1:], weights[:, 1:]), wanted - weights[:, :1, None, None] * pattern[:, :, few[0]], model
            )


def test_biases_by_position() -> None:
    """What a family hands its attention for each query and key (here a rule does), as ALiBi."""
    model, batch = tiny_model("llama"), tokens().row(0)
    bias = torch.randn(1, 4, batch.ids.shape[1], batch.ids.shape[1], generator=torch.Generator().manual_seed(0))
    with model.replacing(
        attention=lambda module, kernel, *rest, **named: kernel(module, *rest, position_bias=bias, **named)
    ):
        run, layers = model.run(batch, read=S.pattern), kept(model, batch)
    plain = model.run(batch, read=S.pattern[0])[S.pattern[0]]
    assert float((plain - run[S.pattern[0]]).abs().max()) > 0.1
    for layer, attention in layers.items():
        close(attention.pattern(range(batch.ids.shape[1])), run[S.pattern[layer]], model)
        close(attention.at([3, 2]).pattern([2]), run[S.pattern[layer]].plain[:, :, [2]], model)


def test_edits_and_other_reads_go_with_it() -> None:
    """An edit of keys shows; a read of few queries in the same layer stays what it is; nothing is left behind."""
    model = tiny_model("llama")
    edit, batch = S.rot_k[1].at(2).scale(2.0), tokens().row(0)
    run = model.run(batch, read=S.pattern, edits=edit)
    layers = kept(model, batch, edit)
    close(layers[1].pattern([4]), run[S.pattern[1]].plain[:, :, [4]], model)
    seen: list[torch.Tensor] = []

    def each(layer: int, values: ic.LayerReadings) -> None:
        close(values.attention.pattern([4]), values[S.pattern.at(query=[4])], model)
        seen.append(values[S.pattern.at(query=[4])])

    again = model.run(batch, read=[S.pattern.at(query=[4]), S.attn_out], edits=edit, each=each, attention=True)
    assert len(seen) == 3 and torch.equal(again.logits, model.run(batch, edits=edit).logits)
    assert not any("interp_hook" in module.__dict__ for module in model.hf.modules())


def test_on_nnsight() -> None:
    model = ic.load(testing.tiny("llama"), engine="nnsight")
    run = model.run(tokens(), read=S.pattern)
    real = tokens().mask[:, None, :, None]
    for layer, attention in kept(model, tokens()).items():
        wanted = run[S.pattern[layer]].plain * real
        close(attention.pattern([3, 4]) * real[:, :, [3, 4]], wanted[:, :, [3, 4]], model)


def test_what_is_refused() -> None:
    model, batch = tiny_model("llama"), tokens().row(0)
    with pytest.raises(ic.PlanError, match="there is none: pass each="):
        model.run(batch, read=S.attn_out, attention=True)
    with pytest.raises(ic.PlanError, match="before such an edit"):
        model.run(batch, read=S.attn_out, edits=S.pattern[0].zero(), each=print, attention=True)
    with pytest.raises(ic.ReadError, match="such as S.attn_out"):
        model.run(batch, read=S.resid_pre, each=lambda layer, values: values.attention, attention=True)
    with pytest.raises(ic.ReadError, match="attention=True"):
        model.run(batch, read=S.attn_out, each=lambda layer, values: values.attention)
    attention = kept(model, batch)[0]
    with pytest.raises(ic.PositionError, match="no query in column 99: there are 0 to"):
        attention.pattern([99])
    with pytest.raises(ic.PositionError, match="no query in column 3: there are 1 kept ones"):
        attention.at([2]).pattern([3])
    assert "rows are made of patterns, not of scores" in model.can("scores", "rows")
    with pytest.raises(ic.CapabilityError, match=r"engine transformer_lens .*read S.pattern.at"):
        model.on("transformer_lens").run(batch, read=S.attn_out, each=print, attention=True)
