"""Attention in the open is the model's: for every mask that it builds, on every cache, and where keys are hidden."""

from __future__ import annotations

from typing import Any

import pictures
import pytest
import torch
from conftest import FAMILIES, nth, tiny_model
from test_engine import executed
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures.reach import Reach

LONG = [5, 9, 17, 33, 21, 40, 8, 61, 12, 70]
KINDS = ("llama", "mistral", "gpt_neo", "gptj", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "qwen3_5")
"""Full, windows in all layers, in some, own attention, windows with caps and norms, sinks, chunks, latent, linear."""
SOME = [family if family in KINDS else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def batch(*, left: bool) -> ic.Tokens:
    """Ten tokens, and seven with padding on one side."""
    mask = torch.ones(2, len(LONG), dtype=torch.bool)
    mask[1, :3] = False
    ids = torch.tensor([LONG, LONG[::-1]])
    return ic.Tokens(ids, mask if left else mask.flip(1))


def largest(x: Tensor) -> float:
    return float(x.as_subclass(Tensor).double().abs().max())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_how_far_queries_look_is_known(family: str, left: bool) -> None:
    """Windows and chunks as the atlas has them say where the model's own pattern is not zero."""
    model, tokens = tiny_model(family), batch(left=left)
    run = model.run(tokens, read=S.pattern)
    for layer in model.atlas.layers("pattern"):
        pattern = run[S.pattern[layer]].as_subclass(Tensor)
        for row, real in enumerate(tokens.rows.real):
            for query in real:
                seen = [real[place] for place in model.atlas.reaches[layer].visible(real, query)]
                assert torch.nonzero(pattern[row, :, query].amax(0)).flatten().tolist() == seen, (layer, row, query)


@pytest.mark.parametrize("family", SOME)
def test_a_query_keeps_a_key(family: str) -> None:
    """Hiding all that the last query sees is refused before the pass, hiding all but one leaves that one everything."""
    model, tokens = tiny_model(family), batch(left=True)
    layer = nth(model, "pattern", 0)
    seen = [[*model.atlas.reaches[layer].visible(real, real[-1])] for real in tokens.rows.real]

    def hide(*, spare: int, split: bool = False) -> Any:
        keys = [row[: len(row) - spare] for row in seen]
        parts = [[row[::2] for row in keys], [row[1::2] for row in keys]] if split else [keys]
        return [S.pattern[layer].knockout(query=-1, key=[list(row) for row in part]) for part in parts]

    for split in (False, True) if min(map(len, seen)) > 2 else (False,):

        def refused(split: bool = split) -> None:
            with pytest.raises(ic.PlanError, match="would have nothing left to attend to"):
                model.run(tokens, edits=hide(spare=0, split=split))
            with pytest.raises(ic.PlanError, match="would have nothing left to attend to"):
                model.sweep(tokens, [hide(spare=0, split=split)], ic.score.logit(5))

        assert executed(refused).matmuls == 0
        run = model.run(tokens, edits=hide(spare=1, split=split), read=S.pattern[layer])
        for row, own in enumerate(seen):
            last = run[S.pattern[layer]].as_subclass(Tensor)[row, :, tokens.rows.real[row][-1]]
            assert torch.nonzero(last.amax(0)).flatten().tolist() == [tokens.rows.real[row][own[-1]]]
            if family != "gpt_oss":  # what the sink takes belongs to no key
                torch.testing.assert_close(last.sum(-1), torch.ones(len(last)))


def test_heads_are_counted_apart() -> None:
    model, tokens = tiny_model("llama"), torch.tensor([LONG])
    first, rest = slice(0, 4), slice(4, None)
    apart = [S.pattern[1, 0].knockout(query=-1, key=first), S.pattern[1, 1].knockout(query=-1, key=rest)]
    run = model.run(tokens, edits=apart, read=S.pattern[1])[S.pattern[1]]
    torch.testing.assert_close(run[0, :, -1].sum(-1).as_subclass(Tensor), torch.ones(4))
    with pytest.raises(ic.PlanError, match=r"pattern\[1,0\].* and pattern\[1\].*position 9 of row 0 .*nothing left"):
        model.run(tokens, edits=[apart[0], S.pattern[1].knockout(query=-1, key=rest)])


def test_a_hidden_row_shows_inside_the_pass_where_nothing_tells_before() -> None:
    model, tokens = tiny_model("llama"), torch.tensor([LONG])
    with pytest.raises(ic.PlanError, match="no key left to attend to"):
        model.run(tokens, edits=S.scores[1].at(query=-1).set(torch.full((10,), float("-inf"))))
    with pytest.raises(ic.PlanError, match="no key left to attend to"):
        model.run(tokens, edits=S.scores[1].at(query=3).apply(lambda x: torch.full_like(x, torch.finfo(x.dtype).min)))
    packed = {"input_ids": tokens, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])}
    own = model.run(packed, edits=S.pattern[1].knockout(query=5, key=slice(0, 5)), read=S.pattern[1], allow_noop=True)
    assert float(own[S.pattern[1]][0, 0, 5, 5]) == 1
    with pytest.raises(ic.PlanError, match="no key left to attend to"):  # its text begins there: it sees only itself
        model.run(packed, edits=S.pattern[1].knockout(query=5, key=5))


def test_encoders_look_ahead() -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=64, num_attention_heads=4)
    reach = Reach.of(BertSelfAttention(config), config, 0)
    assert reach == Reach(causal=False) and reach.visible([2, 3, 5], 2) == range(3)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_looking_changes_no_step(family: str, cache: str) -> None:
    """Reads of everything inside attention leave each step's logits, also where a static cache hands over empty places."""
    model = tiny_model(family)
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_at_eos": False, "suppress_tokens": [pictures.IMAGE]}
    if cache == "static":
        options["cache_implementation"] = "static"
    inside = [S.named(name) for name in ("rot_q", "rot_k", "scores", "pattern", "v") if model.atlas.layers(name)]
    x = torch.tensor([LONG[:6]])
    plain, looked = (model.generate(x, read=[S.logits, *more], **options) for more in ((), inside))
    for a, b in zip(plain.steps, looked.steps, strict=True):
        scale = largest(a[S.logits])
        assert largest(a[S.logits] - b[S.logits]) <= 1e-4 * scale
    assert plain.ids.tolist() == looked.ids.tolist()
    layer = nth(model, "pattern", 0)
    whole = model.run(looked.tokens.ids[:, :-1], read=[S.pattern[layer]])[S.pattern[layer]].as_subclass(Tensor)
    for number, step in enumerate(looked.steps):
        pattern = step[S.pattern[layer]].as_subclass(Tensor)
        at = 5 + number  # the last query of the step
        keys = pattern.shape[-1]
        assert keys <= at + 1
        torch.testing.assert_close(pattern[0, :, -1], whole[0, :, at, at + 1 - keys : at + 1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "k"), ("llama", "rot_k"), ("llama", "v"), ("deepseek_v3", "v"), ("deepseek_v3", "rot_k"),
     ("mistral", "rot_k"), ("gpt_oss", "rot_k"), ("gemma3", "v")],
)  # fmt: skip
def test_edited_keys_and_values_stay_edited(family: str, name: str, cache: str) -> None:
    """What an edit does to a token's keys and values is what later tokens attend to, as in one pass over all of them."""
    model, n = tiny_model(family, torch.float64), 6
    site, watched = S.named(name)[1], S.resid_post[2]
    options = {"cache_implementation": "static"} if cache == "static" else {}
    for place, again in (
        (-1, slice(n - 1, None)),
        ("generated", slice(n, None)),
        ([1, n + 1], [1, n + 1]),
        (None, None),
    ):
        edit = site if place is None else site.at(place)
        made = model.generate(
            torch.tensor([LONG[:n]]),
            edits=edit.scale(-1.5),
            read=[watched, site],
            max_new_tokens=5,
            stop_at_eos=False,
            **options,
        )
        full = made.tokens.ids[:, :-1]
        one = model.run(full, edits=(site if again is None else site.at(again)).scale(-1.5), read=[watched, site])
        for read in (watched, site):
            gap = made[read] - one[read]
            assert largest(gap) <= 1e-6 * largest(one[read]), (place, read)


def test_rotated_keys_stay_edited_on_every_engine() -> None:
    x, n = torch.tensor([LONG[:6]]), 6
    for engine in ("nnsight", "transformer_lens"):
        model = tiny_model("llama", attention="eager").on(engine)
        for name in ("k", "rot_k", "v"):
            if model.can(name, "generate") or model.can(name, "write"):
                continue
            site = S.named(name)[1]
            made = model.generate(
                x, edits=site.at(-1).zero(), read=S.resid_post[2], max_new_tokens=4, stop_at_eos=False
            )
            one = model.run(made.tokens.ids[:, :-1], edits=site.at(slice(n - 1, None)).zero(), read=S.resid_post[2])
            gap = made[S.resid_post[2]] - one[S.resid_post[2]]
            assert largest(gap) <= 1e-4 * largest(one[S.resid_post[2]]), (engine, name)
