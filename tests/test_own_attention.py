"""Attention that models compute by themselves: what a plan sees and changes in it is what the formula says, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_by_hand import OWN, by_hand
from parity import IDS, apart, cell
from reference import Reference
from sweeping import JUDGED, tokens
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.architectures.family import Place
from interp_core.architectures.gemma4 import FAMILY
from interp_core.sites import Site

INSIDE = ("rot_q", "rot_k", "scores", "pattern")
FALCONS: tuple[dict[str, Any], ...] = (
    {},
    {"new_decoder_architecture": True, "num_kv_heads": 2},
    {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False},
    {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "alibi": True},
)
TWO = ("falcon", "mpt")
"""One that calls a kernel, one that does all of it by hand."""


def opened(family: str, **config: Any) -> ic.Model:
    return ic.load(testing.tiny(family, **config))


def padded(side: str) -> tuple[ic.Tokens, slice]:
    """A text beside a longer one, and where it lies."""
    real = slice(2, None) if side == "left" else slice(0, 5)
    ids, mask = IDS.clone(), torch.ones_like(IDS, dtype=torch.bool)
    ids[0, real], mask[0] = IDS[0, :5], False
    mask[0, real] = True
    return ic.Tokens(ids, mask), real


@pytest.mark.parametrize("family", [name for name in OWN if name not in ("falcon", "git", "gptj")])
def test_every_step_is_the_formulas(family: str) -> None:
    model = opened(family)
    reference = Reference(family, model.hf)
    names = [name for name in INSIDE if name in reference.sites()]
    assert names and not any(model.can(name, use) for name in names for use in ("read", "write", "grad", "generate"))
    for name in names:
        assert max(cell(model, reference, name)) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", FALCONS, ids=str)
def test_falcon_in_all_its_kinds(config: dict[str, Any], attention: str) -> None:
    hf = testing.tiny("falcon", **config)
    hf.config._attn_implementation = attention
    model = ic.load(hf)
    reference = Reference("falcon", hf)
    names = ["q", "k", "v", *(name for name in INSIDE if not (config.get("alibi") and name.startswith("rot")))]
    for name in names:
        assert max(cell(model, reference, name)) < 1e-5, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "family", ["bloom", "falcon", "gpt_neo", "gpt_neox_japanese", "mpt", "mvp", "roformer", "xglm"]
)
def test_a_padded_row_is_the_row_alone(family: str, side: str) -> None:
    model = opened(family)
    if f"{side} padding" in model.atlas.lacking:
        assert family in ("mvp", "roformer", "xglm") and side == "left"
        return
    text, real = padded(side)
    names = [name for name in INSIDE if model.atlas.layers(name)]
    together, alone = (
        model.run(text, read=[Site(n) for n in names]),
        model.run(IDS[:1, :5], read=[Site(n) for n in names]),
    )
    for name in names:
        mine, its = together[Site(name)].plain[:, 0], alone[Site(name)].plain[:, 0]
        if name == "pattern":
            assert not mine[..., real, :].sum() - mine[..., real, real].sum()
            assert apart(mine[..., real, real] - its) < 1e-4
        elif name == "scores":  # up to a constant of each query: a bias counts from the last key, padding or not
            differences = (mine[..., real, real] - its).tril()
            assert apart(differences - differences[..., :1].expand_as(differences).tril()) < 2e-4
        elif family != "roformer" or side == "right":
            assert apart(mine[:, real] - its) < 1e-4
    where = [
        S.pattern[1].at(query=-1, key=0).set(torch.full((4,), 0.3)),
        S.scores[0, 1].at(query=-1, key=1).add(torch.tensor(2.0)),
    ]
    assert apart(model.run(text, edits=where).logits[0, real] - model.run(IDS[:1, :5], edits=where).logits[0]) < 1e-4


@pytest.mark.parametrize("family", TWO)
def test_knockouts_and_few_queries(family: str) -> None:
    model = opened(family)
    reference = Reference(family, model.hf)

    def without(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 2, -1, [0, 3]] = torch.finfo(scores.dtype).min
        return scores

    gone = S.pattern[1, 2].at(query=-1, key=[0, 3]).knockout()
    run = model.run(IDS, read=[S.pattern[1].at(query=-1), S.pattern[2].at(query=[1, 2])], edits=gone)
    assert apart(run.logits - reference.logits("scores", 1, {"input_ids": IDS}, without)) < 1e-5
    assert not run[S.pattern[1].at(query=-1)][:, 2, [0, 3]].any()
    whole = model.run(IDS, read=S.pattern, edits=gone)
    assert apart(run[S.pattern[2].at(query=[1, 2])] - whole[S.pattern[2]][:, :, [1, 2]]) < 1e-5
    hides = model.run(IDS, edits=gone)
    assert apart(hides.logits - run.logits) < 1e-5
    assert hides.receipts[0].fired == 1
    # a read alone leaves the numbers as they are
    few = model.run(IDS, read=S.pattern[1].at(query=-1))
    assert torch.equal(few.logits.plain, model.run(IDS).logits.plain)
    with pytest.raises(ic.PlanError, match="nothing left to attend to"):
        model.run(IDS, edits=S.pattern[1].at(query=1, key=[0, 1]).knockout())


@pytest.mark.parametrize("family", TWO)
def test_gradients_are_those_by_hand(family: str) -> None:
    model = ic.load(testing.tiny(family, dtype=torch.float64))
    names = [name for name in INSIDE if model.atlas.layers(name)]
    reference = Reference(family, model.hf)
    reference.shape = IDS.shape
    run = model.run(IDS, read=[Site(name, 1) for name in names], grad=lambda logits: logits[:, -1, 5].sum())
    for name in names:
        zero = torch.zeros_like(run[Site(name, 1)].plain, requires_grad=True)
        with torch.enable_grad(), reference.hooked(name, 1, lambda x, zero=zero: x + zero):
            (wanted,) = torch.autograd.grad(model.hf(IDS, use_cache=False).logits[:, -1, 5].sum(), zero)
        assert wanted.any() and apart(run.grad[Site(name, 1)].plain - wanted) < 1e-5  # softmax in float32


@pytest.mark.parametrize("family", TWO)
def test_generation_does_what_whole_texts_do(family: str) -> None:
    model = opened(family)
    edits = [S.pattern[1].at(key=0).set(torch.tensor(2.0)), S.scores[2, 1].at(key=1).add(torch.tensor(0.5))]
    edits += [S.rot_k[0].at(1).scale(0.7), S.rot_q[2].scale(1.1)] if family == "falcon" else []
    gone = S.pattern[0, 1].at(query="generated", key=2).knockout()
    whole = model.generate(IDS[:1], max_new_tokens=5, edits=[*edits, gone])
    forced = model.run(whole.tokens, edits=[*edits, gone])
    text = whole.tokens.ids
    assert forced.logits[0, 6:-1].argmax(-1).tolist() == text[0, 7:].tolist()
    assert text[0, 7:].tolist() != model.generate(IDS[:1], max_new_tokens=5).tokens.ids[0, 7:].tolist()


@pytest.mark.parametrize("family", TWO)
def test_sweeps_are_runs_one_by_one(family: str) -> None:
    model = opened(family)
    heads = [S.pattern[layer, 1].at(query=-1, key=key).scale(0.2) for layer in range(3) for key in (0, 4)]
    edits = [*heads, S.resid_pre[1].at(3).scale(0.5), S.pattern[1, 2].at(query=-1, key=2).knockout()]
    wanted = model.sweep(tokens(), edits, JUDGED, strategy="full")
    swept = model.sweep(tokens(), edits, JUDGED)
    assert "no attention that can take keys of earlier positions" in swept.plan.why
    torch.testing.assert_close(swept.values, wanted.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["torch", "nnsight"])
def test_what_hooks_compute_inside_a_layer_is_not_the_layers(engine: str) -> None:
    model = ic.load(testing.tiny("mpt"), engine=engine)
    reference = Reference("mpt", model.hf)

    def busy(x: Tensor) -> Tensor:
        torch.softmax(x @ x.mT, -1)
        return x

    read = [S.scores[1], S.pattern[1]]
    run = model.run(IDS, read=read, edits=[S.q[1].apply(busy), S.z[1].apply(busy)], allow_noop=True)
    for site in read:
        wanted = reference.value(site.name, 1, {"input_ids": IDS})
        assert apart((run[site].plain - wanted).tril()) < 1e-5


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind_and_nothing_is_entered_for_other_plans(stop: type[BaseException]) -> None:
    model = opened("mpt")
    attention = [block.attn for block in model.hf.transformer.blocks]
    seen: list[tuple[int, bool]] = []

    def looking(x: Tensor) -> Tensor:
        seen.append((len(_get_current_function_mode_stack()), any("forward" in vars(m) for m in attention)))
        return x

    def failing(x: Tensor) -> Tensor:
        looking(x)
        raise stop

    model.run(IDS, read=S.resid_post, edits=S.q[1].apply(looking), allow_noop=True)
    assert seen == [(0, False)]
    model.run(IDS, read=S.pattern[2], edits=S.q[1].apply(looking), allow_noop=True)
    assert seen[1:] == [(0, True)]  # the opened layer is another one
    with pytest.raises(stop):
        model.run(IDS, edits=[S.q[1].apply(failing), S.pattern[1].scale(0.5)])
    assert seen[2:] == [(1, True)]
    model.run(IDS, read=S.scores[1], logits=False)  # a pass that ends inside attention
    assert not any("forward" in vars(module) for module in attention) and not _get_current_function_mode_stack()


def test_replaced_softmax_and_opened_attention_go_together() -> None:
    model = opened("mpt")
    with model.replacing(operations={"softmax": lambda op, x, **kwargs: op(x * 0, **kwargs)}):
        pattern = model.run(IDS, read=S.pattern[1])[S.pattern[1]]
    assert apart(pattern.plain - 1 / IDS.shape[1]) < 1e-6


def test_by_hand_is_not_what_it_is_held_against() -> None:
    model = opened("mpt")
    reference = Reference("mpt", model.hf)
    reference.at(1)
    with by_hand(reference, 1, "scores", lambda x: x * 1.01), torch.no_grad():
        reference.shape = IDS.shape
        other = model.hf(IDS).logits
    assert apart(other - model.run(IDS).logits.plain) > 1e-4


def test_two_calls_of_attention_with_the_same_queries_are_one() -> None:
    """DiffLlama calls it for each half of the values."""
    model = ic.load(testing.tiny("diffllama"))
    reference = Reference("diffllama", model.hf)
    calls: list[int] = []

    def halved(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 0.5

    edit = S.pattern[1, 2].at(query=[4, 6]).apply(halved)
    run = model.run(IDS, edits=edit, read=S.pattern[1])
    assert len(calls) == 1 and run.receipts[0].fired == 1

    def by_half(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 2, [4, 6]] *= 0.5
        return x

    model.hf.set_attn_implementation("eager")
    wanted = reference.logits("pattern", 1, {"input_ids": IDS}, by_half)
    assert apart(run.logits - wanted) < 1e-4
    gone = S.pattern[1, 2].at(query=-1, key=0).knockout()
    wanted = reference.logits("scores", 1, {"input_ids": IDS}, lambda x: _hidden(x, 2))
    assert apart(model.run(IDS, edits=gone).logits - wanted) < 1e-4
    with pytest.raises(ValueError, match="halfway"):
        model.run(IDS, edits=S.z[1].apply(_failing), read=S.pattern)
    assert apart(model.run(IDS, edits=edit, read=S.pattern[1]).logits - run.logits) < 1e-4
    few = S.pattern[1, 2].at(query=[2, 4]).apply(lambda x: x * 0.5)
    variants = [few, gone, S.resid_pre[1].at(3).scale(0.5)]
    wanted = model.sweep(tokens(), variants, JUDGED, strategy="full").values
    torch.testing.assert_close(model.sweep(tokens(), variants, JUDGED).values, wanted, atol=1e-4, rtol=1e-4)


def _hidden(scores: Tensor, head: int) -> Tensor:
    scores = scores.clone()
    scores[:, head, -1, 0] = torch.finfo(scores.dtype).min
    return scores


def _failing(_x: Tensor) -> Tensor:
    raise ValueError("halfway")


def test_what_gemma_4_adds_before_per_layer_inputs_and_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = testing.tiny("gemma4_text")
    for block in hf.model.layers:
        block.layer_scalar.fill_(0.6)
    assert not ic.load(hf).can("mlp_out", "write")
    monkeypatch.setitem(vars(FAMILY), "summed", Place("post_per_layer_input_norm", "in"))
    assert "adds up" in ic.load(hf).can("mlp_out", "read")
