"""Attention that is opened for few queries only: as all of it opened, and nothing else of the pass is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nth, sampled, tiny_model
from test_attention_masks import batch
from test_engine import executed
from tolerances import close
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.engines.attention import AttentionHook

FEW = ("llama", "mistral", "gpt2", "gemma2", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "qwen3_5", "qwen3_vl")
CASES: dict[str, Any] = {
    "knockout": lambda layer: S.pattern[layer].knockout(query=-1, key=-2),
    "knockout of a head, two queries": lambda layer: S.pattern[layer, 1].knockout(query=[-1, -2], key=-3),
    "knockout, other queries per row": lambda layer: S.pattern[layer].knockout(query=[[3], [4, 5]], key=[[2], [3]]),
    "two knockouts": lambda layer: [
        S.pattern[layer, 0].knockout(query=4, key=3), S.pattern[layer, 1].knockout(query=[3, 4], key=2)
    ],
    "patterns": lambda layer: S.pattern[layer].at([2, -1]).scale(0.5),
    "scores": lambda layer: S.scores[layer].at(query=[3, -1], key=2).scale(3.0),
    "scores and patterns": lambda layer: [
        S.scores[layer, 0].at(query=-1, key=-2).scale(2.0), S.pattern[layer, [0, 2]].at(query=3, key=slice(1, 3)).zero()
    ],
    "keys and patterns": lambda layer: [S.rot_k[layer].at(3).scale(2.0), S.pattern[layer].at(-1).scale(0.5)],
}  # fmt: skip


def same(found: ic.Run, wanted: ic.Run, model: ic.Model, tokens: ic.Tokens, *reads: ic.Site) -> None:
    close(found.logits[tokens.mask], wanted.logits[tokens.mask], model)
    for site in reads:
        close(found[site], wanted[site], model)
    for one, other in zip(found.receipts, wanted.receipts, strict=True):
        assert (one.fired, one.positions) == (other.fired, other.positions)
        close(torch.tensor(one.norm), torch.tensor(other.norm), model)


def editable(model: ic.Model) -> list[str]:
    """The cases that a family can do."""
    lacks = {name for name in ("pattern", "scores", "rot_k") if model.can(name, "write")}
    return [case for case, make in CASES.items() if not lacks & names(make)]


def names(make: Any) -> set[str]:
    edits = make(0)
    return {edit.site.name for edit in (edits if isinstance(edits, list) else [edits])}


@pytest.mark.parametrize("family", sampled(fast=FEW))
def test_few_queries_equal_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits of every kind, with reads beside them, in batches that are padded on either side."""
    model = tiny_model(family, torch.float64)
    layer = nth(model, "pattern", 0)
    cases, read = editable(model), S.pattern[layer].at(query=[-1, -2])
    assert "patterns" in cases
    sides = [side for side in ("left", "right") if f"{side} padding" not in model.atlas.lacking]
    assert sides
    for side in sides:
        tokens = batch(left=side == "left")
        for case in cases:
            edits = CASES[case](layer)
            found = model.run(tokens, read=read, edits=edits, allow_noop=True)
            with monkeypatch.context() as patch:
                patch.setattr(AttentionHook, "has_kernel", False)
                wanted = model.run(tokens, read=read, edits=edits, allow_noop=True)
            same(found, wanted, model, tokens, read)


@pytest.mark.parametrize("family", sampled(fast=FEW))
def test_reading_few_queries_changes_no_bit(family: str) -> None:
    """Unlike patterns of all queries, which leave the layer without its kernel."""
    model = tiny_model(family)
    layers, tokens = model.atlas.layers("pattern"), batch(left="left padding" not in model.atlas.lacking)
    plain = model.run(tokens)
    read = model.run(tokens, read=[S.pattern[layer].at(query=-1) for layer in layers])
    assert torch.equal(read.logits, plain.logits)
    whole = model.run(tokens, read=S.pattern)
    for layer in layers:
        close(read[S.pattern[layer].at(query=-1)], whole[S.pattern[layer].at(query=-1)], model)


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_engines_and_gradients(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by patterns of few queries are those of all, and edits act the same on every engine."""
    model = tiny_model("llama", torch.float64)
    model = model if engine == "torch" else model.on(engine)
    tokens, site = batch(left=False), S.pattern[1].at(query=[3, -1])
    edit = S.pattern[0].knockout(query=-1, key=-2)

    def run() -> tuple[ic.Run, Tensor]:
        made = model.run(tokens, read=site, edits=edit, grad=lambda logits: logits[tokens.mask].pow(2).sum())
        return made, made.grad[site]

    found, slope = run()
    with monkeypatch.context() as patch:
        patch.setattr(AttentionHook, "has_kernel", False)
        wanted, steep = run()
    same(found, wanted, model, tokens, site)
    assert float(steep.abs().max()) > 0
    close(slope, steep, model, size=steep.abs().max())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_of_generations(family: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(family, torch.float64), batch(left=True)
    options = {"max_new_tokens": 5, "stop_at_eos": False, "cache_implementation": cache}
    edits = [S.pattern[1].knockout(query=-1, key=-2), S.pattern[2, 0].at(3).scale(0.25)]
    read = S.pattern[0].at(query=-1)
    found = model.generate(tokens, edits, read, **options)
    with monkeypatch.context() as patch:
        patch.setattr(AttentionHook, "has_kernel", False)
        wanted = model.generate(tokens, edits, read, **options)
    assert found.ids.tolist() == wanted.ids.tolist()
    assert [r.positions for r in found.receipts] == [r.positions for r in wanted.receipts]
    for one, other in zip(found.steps, wanted.steps, strict=True):
        close(one[read], other[read], model)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_nothing_of_all_queries_is_held_or_computed(family: str) -> None:
    """Beside the kernel's own: a knockout at one query makes tensors of that query only. The layer runs its kernel, for
    the one query once more; where a knockout is at most queries, it runs once for all."""
    model, n = tiny_model(family, max_position_embeddings=256), 256
    ids = torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(0))
    layer = nth(model, "pattern", 0)
    edit = S.pattern[layer].knockout(query=-1, key=-2)
    all_queries = S.pattern[layer].knockout(query=slice(20, None), key=slice(18, 20))
    plain = executed(lambda: model.run(ids, logits=-1))
    one = executed(lambda: model.run(ids, edits=edit, logits=-1))
    many = executed(lambda: model.run(ids, edits=all_queries, logits=-1))
    square = (model.atlas.entries["z", layer].n_units or 0) * n * n * 4
    assert one.fresh - plain.fresh < square / 2
    assert many.fresh - plain.fresh > 2 * square
    by_kernel = plain.attentions > 0  # families that run in eager attention have none to count
    assert one.attentions == plain.attentions + by_kernel and many.attentions == plain.attentions
