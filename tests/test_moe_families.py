"""Routers of every family with experts: what is executed is what the sites say, and what was asked for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import sampled, tiny_model
from mixtures import ALONE, MIXTURES, PASSING, SHARING, STREAMS, Mixture, by_hand, shared_by_hand
from packaging.version import Version
from parity import IDS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.architectures.family import Family
from interp_core.architectures.rerouting import selected
from interp_core.architectures.routing import BANNED, dense
from interp_core.architectures.undescribed import UNDESCRIBED
from interp_core.testing.types import types, visual

FAST = {
    "phimoe": "a softmax for each slot",
    "minimax_m2": "the bias is handed to the router",
    "gemma4": "the router gives probabilities, and a norm follows",
    "jetmoe": "slots sorted by expert",
    "deepseek_v4": "hash routers",
    "dbrx": "the block selects",
    "inkling_text": "shared experts are weighed along",
    "zaya": "some tokens pass by all experts",
}
"""Families that stand for the kinds, and the kind."""
ALL, FEWER = sampled(MIXTURES, FAST), sampled(MIXTURES, ("minimax_m2", "gemma4", "dbrx"))
WITHDRAWN: dict[str, tuple[str, ...]] = {
    "deepseek_v4": ("resid_pre", "resid_post", "attn_out", "mixer_out", "resid_mid", "mlp_out"),
}
"""What the self-check takes out: sites of several streams."""
FLOAT32_ALONE = (
    "Inkling2ForConditionalGeneration", "Inkling2LoopForConditionalGeneration", "inkling2_text", "inkling2_loop_text",
)  # fmt: skip
"""transformers runs their routers in float32 alone, whose weights stay so."""
IN_FLOAT32 = ("nemotron_h", "hy_v3", "inkling_text", "zaya", *FLOAT32_ALONE)
"""Families that add experts up in float32, whatever the model's dtype."""
UNSUMMED = ("jetmoe", "MuseSparkForConditionalGeneration")
"""Whose experts' outputs are no site."""


def tolerance(family: str) -> float:
    return 1e-4 if family in FLOAT32_ALONE else 1e-5 if family in IN_FLOAT32 else 1e-8


def dtypes(family: str) -> tuple[torch.dtype, ...]:
    """In half precision Zaya's routers keep float32, which a model that is cast as a whole does not."""
    return (torch.float32,) if family == "zaya" else (torch.float32, torch.bfloat16)


def routed(family: str, dtype: torch.dtype) -> ic.Model:
    """A tiny model in a dtype that it runs in."""
    return tiny_model(family, torch.float32 if family in FLOAT32_ALONE else dtype)


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(torch.Tensor)


def test_every_family_has_a_rule() -> None:
    assert set(testing.mixtures()) <= set(MIXTURES)
    assert set(MIXTURES) - set(testing.mixtures()) <= {*types(), *visual()}
    assert set(FAST) <= set(MIXTURES)


def with_experts() -> dict[str, str]:
    """Model types of transformers whose code has experts, with the class that `Auto` would take."""
    found = {}
    for kinds in KINDS:
        for kind, name in getattr(modeling_auto, f"MODEL_FOR_{kinds}_MAPPING_NAMES").items():
            module = model_type_to_module_name(kind)
            code = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
            if code.exists() and re.search(r"^class \w*(Experts|TopKGating|CDMoE)\(", code.read_text(), re.M):
                found[kind] = name if isinstance(name, str) else name[0]
    return found


ROOT = Path(__file__).parent.parent
KINDS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


def test_no_family_of_transformers_is_silently_without_routers() -> None:
    """Each model type with experts has a family with a router, or a reason why not; no reason is out of date, by the
    release that tests pass with (earlier ones lack some)."""
    families = {row.name for row in ic.registry("architectures").rows}
    kinds = with_experts()
    assert len(kinds) > 60 and {"mixtral", "deepseek_v3", "gemma4_text", "switch_transformers"} <= set(kinds)
    described = set()
    for kind in kinds:
        names = families & {kind, kind.removesuffix("_text")}
        if any(ic.registry("architectures").get(name, Family).router for name in names):
            described.add(kind.removesuffix("_text"))
        else:
            assert UNDESCRIBED.get(kind, UNDESCRIBED.get(kind.removesuffix("_text"))), kind
    assert not described & set(UNDESCRIBED)
    (pinned,) = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    if Version(transformers.__version__) >= Version(pinned):
        assert set(UNDESCRIBED) <= {kind.removesuffix("_text") for kind in kinds}


def test_a_family_without_a_described_router_says_so(ids: torch.Tensor) -> None:
    from transformers import Qwen3MoeForCausalLM

    hf = testing.tiny("qwen3_moe")
    assert isinstance(hf, Qwen3MoeForCausalLM)
    hf.config.model_type = "ernie4_5_vl_moe"
    with pytest.raises(
        ic.CapabilityError, match="router_logits.*text and images have routers and experts of their own"
    ):
        ic.load(hf, check=False).run(ids, read=S.router_logits)
    hf.config.model_type = "novel"
    with pytest.raises(
        ic.CapabilityError, match=r"no family file says how it selects experts \(model.layers.0.mlp.exp"
    ):
        ic.load(hf, check=False).run(ids, read=S.router_logits)


@pytest.mark.parametrize("family", FEWER)
def test_the_self_check_leaves_every_router_its_sites(family: str) -> None:
    """In bfloat16 too; and what it takes out of the stream and of heads is what is known to be so."""
    for dtype in dtypes(family):
        atlas = routed(family, dtype).atlas
        for name in ("router_logits", "router_probs", "router_weights", "router_indices", "expert_out"):
            if name != "expert_out" or family not in UNSUMMED:
                assert set(atlas.layers(name)) >= set(MIXTURES[family].layers)
        assert all(atlas.entries["router_weights", layer].write for layer in MIXTURES[family].layers)
        if family in testing.mixtures():  # what else types have is in the matrix
            withdrawn = {name for (name, _), why in atlas.withdrawn.items() if why.startswith("self-check")}
            assert withdrawn == set(WITHDRAWN.get(family, ()))


@pytest.mark.parametrize("family", ALL)
def test_routers_select_as_by_hand(family: str, ids: torch.Tensor) -> None:
    """In float64: the model's own choice, and that for any logits, with bans down to a single expert."""
    model, mixture = routed(family, torch.float64), MIXTURES[family]
    assert tuple(model.atlas.layers("router_logits")) == mixture.layers
    layer = mixture.layers[-1]
    logits, weights = S.router_logits[layer], S.router_weights[layer]
    run = model.run(ids, read=[logits, weights, S.router_probs[layer], S.router_indices[layer]])
    torch.testing.assert_close(
        plain(run[weights]).double(), by_hand(family, model.hf, layer, run[logits], ids), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        plain(run[S.router_probs[layer]]).sum(-1).double(), torch.ones(2, 7).double(), atol=1e-5, rtol=0
    )
    if family not in PASSING:
        assert (plain(run[weights]).gather(-1, plain(run[S.router_indices[layer]])) != 0).all()
    generator = torch.Generator().manual_seed(3)
    for n_banned in range(model.sizes(logits)["expert"]):
        wanted = torch.randn(run[logits].shape, generator=generator)
        banned = torch.rand(wanted.shape, generator=generator).argsort(-1) < n_banned
        wanted = wanted.masked_fill(banned, float("-inf"))
        edited = model.run(ids, read=weights, edits=logits.set(wanted.to(run[logits].dtype)))
        found = plain(edited[weights]).double()
        torch.testing.assert_close(found, by_hand(family, model.hf, layer, wanted, ids), atol=1e-6, rtol=1e-5)
        assert not found[banned].any()


def test_a_token_that_passes_by_all_experts_says_so(ids: torch.Tensor) -> None:
    """Zaya: the last number of a router. No banned expert stands in for none, and the next router reads what it did."""
    model, layer = tiny_model("zaya", torch.float64), 1
    logits, weights, indices = S.router_logits[layer], S.router_weights[layer], S.router_indices[layer]
    chosen = plain(model.run(ids, read=indices)[indices])
    for edit in (logits.at([1, 4]).add(60 * torch.eye(9)[8]), logits.at([2, 3]).force(8), logits.mask([0, 1, 2])):
        run = model.run(ids, read=[logits, weights, indices], edits=edit, allow_noop=True)
        wanted = by_hand("zaya", model.hf, layer, plain(run[logits]), ids)
        past = plain(run[indices]) == 8
        if edit.op == "force":
            assert past[:, [2, 3]].all() and torch.equal(past[:, :2], chosen[:, :2] == 8)
        else:
            torch.testing.assert_close(plain(run[weights]).double(), wanted, atol=1e-6, rtol=1e-5)
            assert torch.equal(past[..., 0], (wanted == 0).all(-1))
        assert past.any() or edit.op == "mask"
        assert torch.equal(plain(run[weights]).sum(-1) == 0, past[..., 0])


@pytest.mark.parametrize("family", [f for f in FEWER if f.values[0] not in UNSUMMED])
def test_experts_are_called_with_the_weights_and_add_up(family: str, ids: torch.Tensor) -> None:
    model, mixture = routed(family, torch.float64), MIXTURES[family]
    layer = mixture.layers[-1]
    experts = mixture.block(model.hf, layer).get_submodule(mixture.experts)
    called: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_hook(lambda _m, args, output: called.append((*args, output)))
    try:
        for edits in ((), S.router_logits[layer].mask([0, 5])):
            run = model.run(ids, read=S.router_weights[layer], edits=edits, allow_noop=True)
            _, chosen, weights, _ = called.pop()
            dense = plain(run[S.router_weights[layer]]).flatten(0, 1)
            assert torch.equal(torch.zeros_like(dense).scatter_add(-1, chosen, weights.to(dense.dtype)), dense)
            assert ((weights != 0).sum(-1) == (dense != 0).sum(-1)).all()
        called.clear()
        parts = plain(model.run(ids, read=S.expert_out[layer])[S.expert_out[layer]])
        added = called[0][-1].reshape(-1, parts.shape[-1])
        torch.testing.assert_close(parts.flatten(0, 1).sum(1), added, atol=tolerance(family), rtol=1e-6)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FEWER)
def test_experts_and_shared_experts_are_what_the_mlp_adds(family: str, ids: torch.Tensor) -> None:
    """By the modules' own outputs: what `mlp_out` is, or between `resid_mid` and `resid_post` where it does not exist."""
    model, mixture = routed(family, torch.float64), MIXTURES[family]
    layer = mixture.layers[-1]
    if family in UNSUMMED:
        assert re.search("no module gives one|add up in moe_hidden_size", model.can("expert_out", "read") or "")
        return
    block = mixture.block(model.hf, layer)
    beside = [block.get_submodule(name) for name in mixture.shared]
    given: list[torch.Tensor] = []
    of_mlp: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _a, output: given.append(output)) for module in beside]
    if family in STREAMS:  # no site for what is added
        handles.append(block.mlp.register_forward_hook(lambda _m, _a, out: of_mlp.append(first(out))))
    streams = () if family in STREAMS else ("resid_pre", "resid_mid", "mlp_out", "resid_post")
    whole = [name for name in streams if layer in model.atlas.layers(name)]
    try:
        gated = layer in model.atlas.layers("shared_expert_gate") and family not in SHARING
        named = ["expert_out", *whole, *(["shared_expert_gate"] if gated else [])]
        run = model.run(ids, read=[S.named(name)[layer] for name in named])
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        total = plain(run[S.expert_out[layer]]).sum(2)
        total = total * (getattr(block.mlp, mixture.after) if mixture.after else 1)
        if gated:
            given = [x.view_as(total) * plain(run[S.shared_expert_gate[layer]]) for x in given]
        total = total + sum(x.view_as(total) for x in given)
        if family == "gemma4":
            dense = block.post_feedforward_layernorm_1(
                block.mlp(block.pre_feedforward_layernorm(plain(run[S.resid_mid[layer]])))
            )
            total = dense + block.post_feedforward_layernorm_2(total)
        for norm in ("post_mlp_layernorm", "mlp.post_mlp_layernorm", "post_feedforward_layernorm"):
            total = modules[norm](total) if (modules := dict(block.named_modules())).get(norm) else total
        total = total * getattr(block, "mlp_beta_factor", 1) * getattr(block, "residual_multiplier", 1)
        total = total * getattr(block, "mlp_residual_add_idx", 1) ** -0.5
    if "mlp_out" in whole:
        added = plain(run[S.mlp_out[layer]])
    elif of_mlp:
        added = of_mlp[0]
    else:
        added = plain(run[S.resid_post[layer]]) - plain(run[S.resid_mid[layer]])
    torch.testing.assert_close(total, added, atol=tolerance(family), rtol=1e-6)


@contextmanager
def poisoned(hf: torch.nn.Module, mixture: Mixture, experts: Sequence[int]) -> Iterator[None]:
    """NaN in all weights of these experts, in every layer."""
    held = []
    for layer in mixture.layers:
        module = mixture.block(hf, layer).get_submodule(mixture.experts)
        others = [module] if "experts" in mixture.experts else [module, mixture.block(hf, layer).mlp.input_linear]
        held += [
            (weight, weight.data.clone(), each) for each in others for weight in each.parameters() if weight.ndim > 1
        ]
    for weight, _, each in held:
        by_expert = weight.data.view(each.num_experts, -1) if mixture.experts == "ffn.experts" else weight.data
        by_expert[[e for e in experts if e < len(by_expert)]] = float("nan")
    try:
        yield
    finally:
        for weight, before, _ in held:
            weight.data.copy_(before)


@pytest.mark.parametrize("family", ALL)
def test_banned_experts_are_never_executed(family: str, ids: torch.Tensor) -> None:
    """Each expert in turn, then all but one: NaN in the banned ones' weights changes no bit."""
    model, mixture = tiny_model(family), MIXTURES[family]
    layer = mixture.layers[-1]
    n, k = model.sizes(S.router_logits[layer])["expert"], attrgetter(mixture.k)(model.hf.config.get_text_config())
    for banned in [[e] for e in range(n)] + [[e for e in range(n) if e != 3]]:
        ban = [S.router_logits[each].mask(banned) for each in mixture.layers]
        wanted = model.run(ids, edits=ban, allow_noop=True).logits
        with poisoned(model.hf, mixture, banned):
            run = model.run(ids, read=S.router_weights[layer], edits=ban, allow_noop=True)
        assert torch.isfinite(run.logits).all() and torch.equal(run.logits, wanted)
        weights = plain(run[S.router_weights[layer]])
        assert not weights[..., banned].any()
        n_used = (weights != 0).sum(-1) + ((weights == 0).all(-1) if family in PASSING else 0)
        assert (n_used == (min(k, n - len(banned)) if len(banned) == 1 else 1)).all()
    with pytest.raises(ic.PlanError, match="no expert left to go to"):
        model.run(ids, edits=S.router_logits[layer].mask(list(range(n))))


@pytest.mark.parametrize("family", FEWER)
def test_edits_carry_their_proof(family: str, ids: torch.Tensor) -> None:
    """In both dtypes: the selection reproduces the router at every token, bans and forces hold, the rest keeps its bits."""
    for dtype in dtypes(family):
        model, layer = routed(family, dtype), MIXTURES[family].layers[-1]
        logits, weights, indices = S.router_logits[layer], S.router_weights[layer], S.router_indices[layer]
        before = model.run(ids, read=[weights, indices])
        chosen = plain(before[indices])
        used, rare = chosen.flatten().mode().values.item(), int((plain(before[weights]) != 0).sum((0, 1)).argmin())
        edits = {mode: logits.at([1, 4]).mask(used, mode=mode) for mode in ("replace", "keep", "drop")}
        edits |= {mode: logits.at([1, 4]).force([rare], mode=mode) for mode in ("own_weight", "steermoe")}
        edits |= {f"boost {on}": weights.at([1, 4]).boost(used, 3.0, renormalise=on) for on in (False, True)}
        for what, edit in edits.items():
            run = model.run(ids, read=[weights, indices], edits=edit, allow_noop=True)
            proof = run.receipts[0].routing
            assert proof is not None and proof.tokens + proof.unmasked == 4, (what, dtype)
            assert (proof.broken, proof.differing, proof.held) == (0, 0, 14), (what, dtype, proof)
            if what in ("own_weight", "steermoe"):
                assert (plain(run[indices])[:, [1, 4]] == rare).any(-1).all(), what
            for site in (weights, indices):
                assert torch.equal(plain(run[site])[:, [0, 2, 3, 5, 6]], plain(before[site])[:, [0, 2, 3, 5, 6]])


@pytest.mark.parametrize("family", [f for f in FEWER if MIXTURES[f.values[0]].bias])
def test_a_correction_bias_brings_no_banned_expert_back(family: str, ids: torch.Tensor) -> None:
    hf, mixture = testing.tiny(family), MIXTURES[family]
    layer = mixture.layers[0]
    *path, name = mixture.bias.split(".")
    bias = getattr(mixture.block(hf, layer).get_submodule(".".join(path)), name).data
    bias[..., 2] = 50.0
    model = ic.load(hf, check=False)
    weights = S.router_weights[layer]
    assert (model.run(ids, read=weights)[weights][..., 2] != 0).all()
    run = model.run(ids, read=weights, edits=S.router_logits[layer].mask(2))
    assert not run[weights][..., 2].any()


@pytest.mark.parametrize("family", ALONE)
def test_routers_of_models_that_are_not_built_small_select_as_by_hand(family: str) -> None:
    """The router's class alone, of models with images that are too large or need more than a config to be built."""
    kind, of, _ = ALONE[family]
    home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(transformers, of)()
    sizes = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8)
    sizes |= {"hidden_size": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    for name, setting in {**sizes, "topk_method": "group_limited_greedy"}.items():
        setattr(config, name, setting)
    hf = torch.nn.Module()
    hf.model, hf.config = torch.nn.Module(), config
    block = torch.nn.Module()
    block.mlp = torch.nn.Module()
    hf.model.layers = torch.nn.ModuleList([block])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        gate = block.mlp.gate = getattr(home, kind)(config)
        for x in [*gate.parameters(), *gate.buffers()]:
            torch.nn.init.normal_(x, std=0.5)
        wanted = [torch.randn(1, 40, 8).masked_fill(torch.rand(1, 40, 8).argsort(-1) < n, BANNED) for n in range(4)]
        with torch.no_grad():
            output = gate(torch.randn(1, 40, 16))
    router = ic.registry("architectures").get(family, Family).router
    assert router is not None and (router.module, router.sizes(gate)) == ("mlp.gate", (8, 3))
    held = router.weights(output, 8)
    torch.testing.assert_close(held[None].double(), by_hand(family, hf, 0, output[0][None], IDS), atol=1e-6, rtol=1e-5)
    for logits in (output[0][None], *wanted):
        weights, chosen = selected(router.selection, router.rule(gate, (None,)), logits[0], torch.float32)
        found = dense(weights, chosen, 8)[None].double()
        torch.testing.assert_close(found, by_hand(family, hf, 0, logits, IDS), atol=1e-6, rtol=1e-5)
        assert not found[logits == BANNED].any()


def test_hash_routers_have_no_logits(ids: torch.Tensor) -> None:
    model = tiny_model("deepseek_v4")
    assert model.atlas.layers("router_weights") == [0, 1, 2]
    run = model.run(ids, read=S.router_indices[0])
    table = model.hf.model.layers[0].mlp.gate.tid2eid
    assert torch.equal(plain(run[S.router_indices[0]]), table[ids])
    boosted = model.run(ids, edits=S.router_weights[0].boost(1, 2.0))
    proof = boosted.receipts[0].routing
    assert proof is not None and (proof.held, proof.differing) == (14, 0)
    with pytest.raises(ic.SiteError, match="layer 0 has no router_logits .*a hash router: token ids choose"):
        model.run(ids, edits=S.router_logits[0].mask(1))


def test_shared_experts_get_what_edits_leave_them(ids: torch.Tensor) -> None:
    """Inkling weighs routed and shared experts together: a set chosen anew changes both, one that is kept neither."""
    model, layer = tiny_model("inkling_text", torch.float64), 2
    experts = model.hf.model.layers[layer].mlp.shared_experts
    logits, weights, gate = S.router_logits[layer], S.router_weights[layer], S.shared_expert_gate[layer]
    handed: list[torch.Tensor] = []
    handle = experts.register_forward_pre_hook(lambda _m, _a, kwargs: handed.append(kwargs["gammas"]), with_kwargs=True)
    try:
        plain_run = model.run(ids, read=[weights, gate])
        runs = {op: model.run(ids, read=[logits, weights, gate], edits=edit, allow_noop=True) for op, edit in {
            "mask": logits.mask(1), "force": logits.at(3).force([0, 1]), "add": logits.add(torch.linspace(-2, 2, 8)),
            "keep": logits.mask(1, mode="keep"), "boost": weights.boost(1, 2.0),
        }.items()}  # fmt: skip
    finally:
        handle.remove()
    before = plain(plain_run[gate])
    assert before.shape == (2, 7, 2)
    for (op, run), passed in zip(runs.items(), handed[1:], strict=True):
        got = plain(run[gate])
        assert torch.equal(passed.view_as(got), got), op
        if op in ("keep", "boost"):
            assert torch.equal(got, before), op
            continue
        wanted = shared_by_hand("inkling_text", model.hf, layer, plain(run[logits]), plain(run[weights]), ids)
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.equal(got, before), op


@pytest.mark.parametrize("p", [None, 2.0])
def test_dbrx_divides_by_the_norm_that_its_config_says(p: float | None, ids: torch.Tensor) -> None:
    ffn = {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 3, "moe_normalize_expert_weights": p}
    model = ic.load(testing.tiny("dbrx", ffn_config=ffn))
    run = model.run(ids, read=S.router_weights[1], edits=S.router_logits[1].mask(2))
    weights = plain(run[S.router_weights[1]])
    assert run.receipts[0].routing.differing == 0 and not weights[..., 2].any()
    assert (weights.sum(-1) < 1).all() if p is None else torch.allclose(weights.norm(dim=-1), torch.ones(2, 7))


def test_axk2_without_groups_chooses_among_all(ids: torch.Tensor) -> None:
    model = tiny_model("axk2", n_group=None, topk_group=None)
    run = model.run(ids, read=[S.router_logits[2], S.router_weights[2]], edits=S.router_logits[2].mask(1))
    wanted = by_hand("axk2", model.hf, 2, plain(run[S.router_logits[2]]), ids)
    torch.testing.assert_close(plain(run[S.router_weights[2]]).double(), wanted, atol=1e-6, rtol=1e-5)


def test_product_keys_have_no_router_and_dense_models_no_reason() -> None:
    keys = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3}
    why = tiny_model("doge", **keys).can("router_logits", "read") or ""
    assert "sums of two keys' scores inside the MLP" in why
    assert "has no mixture-of-experts router" in (tiny_model("doge").can("router_logits", "read") or "")
