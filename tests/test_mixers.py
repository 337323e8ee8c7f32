"""Layers that are not attention: state space models, recurrences, convolutions, linear attention, alone and in hybrids.

Where a family's layers mix tokens is written out here by hand, module by module; what passes there is seen and changed
by plain PyTorch hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from type_layouts import GATES

import interp_core as ic
from interp_core import sites as S


@dataclass(frozen=True)
class Mixing:
    """Where a tiny model mixes tokens.

    Attributes:
        mixers: module in the block, by layer ("": the layer has an MLP alone).
        attention: layers that mix by attention, linear attention included, and by nothing else.
        out: module in the block that gives what is added, where that is not the mixer.
        reads: module in the block that gives what the mixer reads, where that is not simply its input.
        scale: what the block multiplies what is added by.
        beside: module in the block of a second mixer, and what its output is multiplied by.
        blocks: the list of blocks.
        plain: whether the stream is the plain sum.
    """

    mixers: tuple[str, ...]
    attention: tuple[int, ...] = ()
    out: tuple[str, ...] = ()
    reads: str = ""
    scale: float = 1.0
    beside: tuple[str, float] | None = None
    blocks: str = "model.layers"
    plain: bool = True


_MAMBA = Mixing(("mixer",) * 3, blocks="backbone.layers")
_ZAMBA = Mixing(("mamba", "mamba_decoder.mamba") * 2)
_LINEAR = Mixing(("linear_attn", "self_attn", "self_attn"), (0, 1, 2))
_ATTENTION = Mixing(("self_attn",) * 3, (0, 1, 2))
_CONV = ("conv", "self_attn", "self_attn")
MIXING: dict[str, Mixing] = {
    "mamba": _MAMBA, "mamba2": _MAMBA, "falcon_mamba": _MAMBA, "zamba": _ZAMBA, "zamba2": _ZAMBA,
    "xlstm": Mixing(("mlstm_layer",) * 3, blocks="backbone.blocks"),
    "recurrent_gemma": Mixing(("temporal_block",) * 3, (2,)),
    "rwkv": Mixing(("attention",) * 3, (0, 1, 2), blocks="rwkv.blocks", plain=False),
    "lfm2": Mixing(_CONV, (1, 2)), "lfm2_moe": Mixing(_CONV, (1, 2)),
    "lfm3": Mixing(_CONV, (1, 2), ("post_operator_norm",) * 3),
    "jamba": Mixing(("mamba", "mamba", "self_attn"), (2,)),
    "bamba": Mixing(("mamba", "self_attn", "mamba"), (1,)),
    "granitemoehybrid": Mixing(("mamba", "self_attn", "self_attn"), (1, 2), scale=0.4),
    "nemotron_h": Mixing(("", "mixer", "mixer", "", ""), (2,)),
    "falcon_h1": Mixing(("self_attn",) * 3, reads="input_layernorm", scale=0.6, beside=("mamba", 1.7)),
    "qwen3_next": _LINEAR, "qwen3_5": _LINEAR, "qwen3_5_moe": _LINEAR,
    "lara_mini": Mixing(("linear_attn", "self_attn", "linear_attn"), (0, 1, 2)),
    "kimi_linear": _ATTENTION, "bailing_hybrid": _ATTENTION,
    "minimax": Mixing(("self_attn",) * 3, (0, 1, 2), plain=False),
    "olmo_hybrid": Mixing(
        ("linear_attn", "linear_attn", "self_attn"), (0, 1, 2), ("linear_attn", "linear_attn", "post_attention_layernorm")
    ),
}  # fmt: skip
CONFIG: dict[str, dict[str, Any]] = {"falcon_h1": {"attention_out_multiplier": 0.6, "ssm_out_multiplier": 1.7}}
FEW = ("mamba", "jamba", "lfm3", "recurrent_gemma", "falcon_h1", "zamba")
SOME = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in MIXING]
VECTOR = torch.linspace(-1, 1, 64)
Change = Callable[[Tensor], Tensor]


def loaded(name: str) -> ic.Model:
    return tiny_model(name, **CONFIG.get(name, {}))


def mixing_layers(name: str) -> list[int]:
    return [layer for layer, mixer in enumerate(MIXING[name].mixers) if mixer]


@contextmanager
def by_hand(name: str, site: str, layer: int, fn: Change) -> Iterator[None]:
    """`fn` sees and replaces what a mixer reads or adds."""
    where, hf = MIXING[name], loaded(name).hf
    block = f"{where.blocks}.{layer}"
    mixer = hf.get_submodule(f"{block}.{where.mixers[layer]}")
    given: list[Tensor] = []

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def again(output: Any, new: Tensor) -> Any:
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def into(_m: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"])}

    def out(_m: nn.Module, _args: Any, output: Any) -> Any:
        rest = given[0] if given else 0.0
        return again(output, (fn(first(output) * where.scale + rest) - rest) / where.scale)

    handles = []
    if site == "mixer_in" and where.reads:
        norm = hf.get_submodule(f"{block}.{where.reads}")
        handles.append(norm.register_forward_hook(lambda _m, _a, output: fn(output)))
    elif site == "mixer_in":
        handles.append(mixer.register_forward_pre_hook(into, with_kwargs=True))
    else:
        if where.beside:
            module, factor = where.beside
            beside = hf.get_submodule(f"{block}.{module}")
            handles.append(beside.register_forward_hook(lambda _m, _a, output: given.append(first(output) * factor)))
        gives = hf.get_submodule(f"{block}.{where.out[layer]}") if where.out else mixer
        handles.append(gives.register_forward_hook(out))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_by_hand(name: str, ids: Tensor, site: str, layer: int, fn: Change) -> Tensor:
    with torch.no_grad(), by_hand(name, site, layer, fn):
        return loaded(name).hf(input_ids=ids, use_cache=False).logits


def close(a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    a, b = a.as_subclass(Tensor), b.as_subclass(Tensor)
    torch.testing.assert_close(a, b, atol=factor * 2e-5 * float(b.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_mixers_agree_with_hooks_by_hand(name: str, ids: Tensor) -> None:
    """Reads, and the logits after an edit, in every layer."""
    model, minimax = loaded(name), name == "minimax"
    assert model.layers(S.mixer_in) == model.layers(S.mixer_out) == mixing_layers(name)
    for layer in mixing_layers(name):
        for site in (S.mixer_in[layer], S.mixer_out[layer]):
            seen: list[Tensor] = []
            logits_by_hand(name, ids, site.name, layer, lambda x, seen=seen: seen.append(x.clone()) or x)
            scale = float(getattr(model.module("block", layer), "attn_beta_factor", 1.0)) if minimax else 1.0
            scale = scale if site.name == "mixer_out" else 1.0
            close(model.run(ids, read=site)[site], seen[0] * scale)
            wanted = logits_by_hand(name, ids, site.name, layer, lambda x, scale=scale: x * 1.5 + VECTOR / scale)
            found = model.run(ids, edits=[site.scale(1.5), site.add(VECTOR)]).logits
            close(found, wanted)
            assert not torch.allclose(found.as_subclass(Tensor), model.run(ids).logits.as_subclass(Tensor), atol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_the_stream_is_what_layers_add(name: str, ids: Tensor) -> None:
    """resid_pre + mixer_out (+ mlp_out) = resid_post, and `attn_out` is `mixer_out` where there is attention alone."""
    model, where = loaded(name), MIXING[name]
    run = model.run(
        ids, read=[site for site in (S.resid_pre, S.resid_post, S.mixer_out, S.mlp_out) if model.layers(site)]
    )
    for layer in range(len(where.mixers)):
        parts = [site[layer] for site in (S.mixer_out, S.mlp_out) if layer in model.layers(site)]
        assert parts
        if where.plain:
            close(
                sum(run[part].as_subclass(Tensor) for part in parts) + run[S.resid_pre[layer]], run[S.resid_post[layer]]
            )
    assert model.layers(S.attn_out) == list(where.attention)
    if where.attention:
        layer = where.attention[0]
        both = model.run(ids, read=[S.attn_out[layer], S.mixer_out[layer]], edits=S.attn_out[layer].add(VECTOR))
        assert torch.equal(both[S.attn_out[layer]], both[S.mixer_out[layer]])
        close(both[S.attn_out[layer]], run[S.mixer_out[layer]] + VECTOR)


def test_what_has_no_attention_says_so(ids: Tensor) -> None:
    with pytest.raises(ic.CapabilityError, match="no layer of this mamba is softmax attention.* mixer_in, mixer_out"):
        loaded("mamba").run(ids, read=S.attn_out)
    with pytest.raises(ic.SiteError, match="layer 0 has no attn_out.*layers 2 have"):
        loaded("jamba").run(ids, read=S.attn_out[0])
    with pytest.raises(ic.CapabilityError, match="one part of what a block of falcon_h1 adds.*mixer_out is their sum"):
        loaded("falcon_h1").run(ids, read=S.attn_out)
    with pytest.raises(ic.CapabilityError, match="nothing of it is added to the stream"):
        loaded("zamba").run(ids, read=S.attn_out)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_those_of_the_tensor_that_passes(name: str, ids: Tensor) -> None:
    model, where, layer = loaded(name), MIXING[name], mixing_layers(name)[0]
    site = S.mixer_in[layer]
    run = model.run(ids, read=site, grad=lambda logits: logits[:, -1, 7].sum())
    held: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        held.append(x.detach().requires_grad_())
        return held[0]

    with by_hand(name, "mixer_in", layer, keep):
        score = model.hf(input_ids=ids, use_cache=False).logits[:, -1, 7].sum()
    (wanted,) = torch.autograd.grad(score, held[0])
    close(run.grad[site], wanted)
    if where.beside:
        with pytest.raises(ic.CapabilityError, match="computed of what several modules give"):
            model.run(ids, read=S.mixer_out[layer], grad=lambda logits: logits[:, -1, 7].sum())


@pytest.mark.parametrize("name", SOME)
def test_generation_with_edits_is_the_teacher_forced_run(name: str) -> None:
    """Token by token with the state that the model carries along, and all at once."""
    model = loaded(name)
    prompt = torch.tensor([[5, 17, 33, 8, 61, 40, 22]])
    layers = mixing_layers(name)
    edits = [
        S.mixer_out[layers[0]].scale(1.5),
        S.mixer_in[layers[-1]].at(2).add(VECTOR),
        S.resid_post[1].at(4).scale(0.5),
    ]
    reads = [S.mixer_out[layers[-1]], S.resid_post[0]]
    made = model.generate({"input_ids": prompt}, edits, reads, max_new_tokens=5, stop_at_eos=False)
    assert made.ids.shape == (1, 5)
    forced = model.run(torch.cat([prompt, made.ids.cpu()], 1)[:, :-1], read=reads, edits=edits)
    assert forced.logits[0, -5:].argmax(-1).tolist() == made.ids[0].tolist()
    for site in reads:
        close(made[site], forced[site], 50)


@pytest.mark.parametrize("name", SOME)
def test_padding_is_nothing_or_refused(name: str) -> None:
    """The load says in one sentence which side does not leave a row as it is; the other does."""
    model, row = loaded(name), torch.tensor([[5, 17, 33, 8]])
    alone = model.run(row).logits[0].as_subclass(Tensor)
    full = torch.tensor([9, 54, 12, 70, 3, 28, 45])
    for side, real in (("left", slice(3, None)), ("right", slice(0, 4))):
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[1] = False
        mask[1, real] = True
        ids = torch.stack([full, torch.full((7,), 11)])
        ids[1, real] = row[0]
        if f"{side} padding" in model.atlas.lacking:
            assert any(f"{side} padding refused" in note for note in model.atlas.notes)
            with pytest.raises(ic.CapabilityError, match=f"padded on the {side} gets other numbers"):
                model.run(ic.Tokens(ids, mask))
        else:
            close(model.run(ic.Tokens(ids, mask)).logits[1, real], alone, 50)


@pytest.mark.parametrize("name", SOME)
def test_parts_add_up_to_the_logit(name: str, ids: Tensor) -> None:
    """Direct logit attribution leaves no layer out, whatever mixes tokens there."""
    model = loaded(name)
    if not MIXING[name].plain:
        with pytest.raises(ic.CapabilityError, match="is not the sum of its embeddings"):
            ic.method("direct_logit_attribution")(model, ids)
        return
    split = ic.method("direct_logit_attribution")(model, ids)
    mixers = [name for name in split.names if name.startswith(("mixer_out", "attn_out"))]
    assert len(mixers) == len(mixing_layers(name))
    assert float(split.rest.abs().max()) <= 1e-4 * float(split.parts.abs().sum(1).max())
    close(split.parts.sum(1), split.logit_diff, 10)


GATED = [name for name in SOME if getattr(name, "values", (name,))[0] in GATES]


@pytest.mark.parametrize("name", GATED)
def test_a_gate_far_below_zero_lets_nothing_through(name: str, ids: Tensor) -> None:
    """`mixer_gate` is what the projection gives; without it the mixer adds its bias and no more."""
    model, (module, part) = loaded(name), GATES[name]
    for layer in model.layers(S.mixer_gate):
        held: list[Tensor] = []
        beside = MIXING[name].beside
        mixer = model.module("block", layer).get_submodule(beside[0]) if beside else model.module("mixer", layer)
        projection = mixer.get_submodule(module)
        handle = projection.register_forward_hook(lambda _m, _a, output, held=held: held.append(output.clone()))
        run = model.run(ids, read=[S.mixer_gate[layer], S.mixer_out[layer]])
        handle.remove()
        assert torch.equal(run[S.mixer_gate[layer]].as_subclass(Tensor), part(held[0]))
        closed = 0.0 if "conv" in MIXING[name].mixers[layer] else -1e4
        shut = model.run(
            ids,
            read=S.mixer_out[layer],
            edits=S.mixer_gate[layer].apply(lambda x, closed=closed: torch.full_like(x, closed)),
        )
        added = shut[S.mixer_out[layer]].as_subclass(Tensor)
        if beside:  # what is left is attention's part
            heads = model.run(ids, read=S.head_out[layer])[S.head_out[layer]].as_subclass(Tensor).sum(2)
            added = added - heads * MIXING[name].scale
            assert float(added.abs().max()) < 1e-4 * float(heads.abs().max())
        else:
            close(added, added[:1, :1].expand_as(added), 50)
        assert float((run[S.mixer_out[layer]] - added).abs().max()) > 1e-3


def test_sites_are_met_in_the_order_of_the_forward_pass(ids: Tensor) -> None:
    """A pass ends with the last site that is read: a gate that comes before heads, and a mixer behind them."""
    for name, layer in (("falcon_h1", 1), ("zamba", 1)):
        model = loaded(name)
        reads = [S.mixer_gate[layer], S.q[layer], S.z[layer], S.mixer_in[layer], S.mixer_out[layer]]
        whole = model.run(ids, read=reads)
        for first in reads:
            for second in reads:
                pair = model.run(ids, read=[first, second], logits=False)
                assert all(torch.equal(pair[site], whole[site]) for site in (first, second))


def test_gates_and_states_that_are_not_there_say_why(ids: Tensor) -> None:
    for name, says in (
        ("mamba", "stays inside its scan: no module"),
        ("falcon_h1", "stays inside"),
        ("bloom", "keeps a state"),
    ):
        with pytest.raises(ic.CapabilityError, match=says):
            tiny_model(name).run(ids, read=S.ssm_state)
    with pytest.raises(ic.CapabilityError, match="no mixer of this qwen3_next has a projection"):
        tiny_model("qwen3_next").run(ids, read=S.mixer_gate)
    model = tiny_model("recurrent_gemma")
    with pytest.raises(ic.CapabilityError, match="ssm_state.*only read"):
        model.run(ids, edits=S.ssm_state[0].zero())


def test_the_state_of_a_recurrent_unit_is_its_recurrence(ids: Tensor) -> None:
    """RecurrentGemma: each position's state is the last one's, decayed, and what the position brings."""
    model = loaded("recurrent_gemma")
    assert model.layers(S.ssm_state) == [0, 1]
    held: list[Tensor] = []
    unit = model.hf.model.layers[0].temporal_block.rg_lru
    handle = unit.register_forward_hook(lambda _m, args, _output: held.append(args[0].detach()))
    state = model.run(ids, read=S.ssm_state[0])[S.ssm_state[0]].as_subclass(Tensor)
    handle.remove()
    x = held[0].unflatten(-1, (unit.num_attention_heads, -1))
    with torch.no_grad():
        into, forget = (
            torch.sigmoid(torch.einsum("bphd,hde->bphe", x, weight) + bias).flatten(2)
            for weight, bias in (
                (unit.input_gate_weight, unit.input_gate_bias), (unit.recurrent_gate_weight, unit.recurrent_gate_bias)
            )
        )  # fmt: skip
        decay = torch.exp(-8.0 * forget * nn.functional.softplus(unit.recurrent_param))
        now = torch.zeros_like(state[:, 0])
        for position in range(state.shape[1]):
            brought = held[0][:, position] * into[:, position]
            now = (
                brought if position == 0 else decay[:, position] * now + (1 - decay[:, position] ** 2).sqrt() * brought
            )
            close(state[:, position], now, 10)


def test_methods_that_need_patterns_say_which_layer_has_none(ids: Tensor) -> None:
    with pytest.raises(
        ic.CapabilityError, match="layer 0 of .* mixes tokens by JambaMambaMixer without v and z and pattern"
    ):
        ic.method("ifr")(loaded("jamba"), ids[:1])


@pytest.mark.parametrize(("name", "plain"), [("jamba", [0, 1]), ("zamba", [0, 1, 2, 3]), ("lfm2", [0]), ("llama", [])])
def test_relevance_goes_through_recurrences_by_their_gradient(name: str, plain: list[int], ids: Tensor) -> None:
    """And says in which layers."""
    (notes,) = ic.method("attnlrp")(tiny_model(name), ids[:1]).notes
    assert notes["unruled_layers"] == plain
