"""The atlas: what it says of families it knows, of those it does not, and how the self-check takes out what is wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import FAMILIES, tiny_model
from layouts import DEEPSTACK, DENSE, LACKS, LINEAR, SHARED, VISUAL

import interp_core as ic
from interp_core import sites as S
from interp_core.architectures import conventions, gpt2, hook_points, qwen3_moe
from interp_core.architectures.atlas import ROUTED
from interp_core.architectures.family import Family, fused_per_head
from interp_core.architectures.locate import known_paths
from interp_core.checks.selfcheck import check_atlas
from interp_core.sites import SITES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_self_check(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, dtype)
        assert model.check is not None and model.check.ok, f"{dtype}\n{model.check}"
    assert {row[1].split(" in layer")[0] for row in model.check.rows} >= {"has the declared shape", "an edit"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_lacks_is_said(family: str) -> None:
    model = tiny_model(family)
    router = set() if family in DENSE else set(ROUTED)
    router |= set() if SHARED.get(family, ("", None))[1] else {"shared_expert_gate"}
    visual = ({"vision_embed"} if family not in VISUAL else set()) | (
        {"deepstack"} if family not in DEEPSTACK else set()
    )
    tower = {name for name, info in SITES.items() if info.tower}
    visual |= {"vision_pre_merger"} if family == "llava" else set() if family in VISUAL else tower
    mixers = {"ssm_state"} | (set() if family in LINEAR and family != "qwen3_next" else {"mixer_gate"})
    assert set(model.atlas.lacking) == LACKS.get(family, set()) | router | visual | mixers
    table = repr(model.sites).partition("not in this model:")[2].splitlines()
    for name, why in model.atlas.lacking.items():
        assert any(name in line.partition(": ")[0] and line.endswith(f": {why}") for line in table)
    assert "resid_post" in model.sites and "resid_post" in model.sites._repr_html_()


def test_table_shows_axes_and_layers() -> None:
    table = repr(tiny_model("qwen3_moe").sites)
    assert "z               batch pos head=4 d_head=16" in table
    assert "0,2     router logits" in table
    assert "k               batch pos head=2 d_head=16" in table


def test_parallel_blocks_by_config() -> None:
    sequential = ic.load(ic.testing.tiny("gpt_neox", use_parallel_residual=False))
    assert sequential.atlas.layers("resid_mid") == [0, 1, 2]
    with pytest.raises(ic.CapabilityError, match="gpt_neox blocks are parallel"):
        tiny_model("gpt_neox").run(torch.tensor([[1, 2]]), read=S.resid_mid)


def test_head_width_apart_from_model_width(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    assert model.atlas.entries["z", 0].sizes == {"head": 4, "d_head": 24}
    run = model.run(ids, read=[S.head_out[0], S.attn_out[0]])
    bias = model.hf.model.layers[0].self_attn.o_proj.bias
    torch.testing.assert_close(
        run[S.head_out[0]].sum(2) + bias, run[S.attn_out[0]].as_subclass(torch.Tensor), atol=1e-5, rtol=1e-4
    )


def _unknown(monkeypatch: pytest.MonkeyPatch, family: str) -> ic.Model:
    """A model whose class TransformerLens' table does not have."""
    hf = ic.testing.tiny(family)
    kind = type(hf)
    hf.__class__ = type("Novel" + kind.__name__, (kind,), {"__module__": kind.__module__})
    hf.config.model_type = "novel"
    monkeypatch.setattr(ic.registry("architectures"), "rows", [])
    return ic.load(hf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_5_vl"])
def test_an_unknown_family_gets_what_its_modules_show(
    family: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tiny_model(family)  # while families are registered
    model = _unknown(monkeypatch, family)
    assert {"resid_pre", "resid_post", "attn_in", "mlp_in", "logits", "embed"} <= set(model.sites)
    assert "nobody has described the family 'novel'" in repr(model.sites)
    lost = {name for name in set(known.sites) - set(model.sites) if not name.startswith("vision_")}
    assert lost == ({"q", "k", "v"} if family in ("gpt2", "gpt_neox") else set())  # how they lie in one projection
    assert set(model.sites) - set(known.sites) == ({"rot_q", "rot_k"} if family == "gpt2" else set())
    for name in (name for name in known.sites if name in model.sites and not SITES[name].visual):
        site = S.Site(name)
        assert torch.equal(model.run(ids, read=site)[site], known.run(ids, read=site)[site]), name


def test_a_model_without_blocks_is_refused() -> None:
    hf = ic.testing.tiny("llama")
    hf.model.layers = torch.nn.Sequential(*hf.model.layers)
    hf.__class__ = type("Unheard", (type(hf),), {})
    hf.config.model_type = "unheard"
    with pytest.raises(ic.LoadError, match="shows no list of transformer blocks"):
        ic.load(hf)


def _with_family(monkeypatch: pytest.MonkeyPatch, name: str, family: Family, hf: torch.nn.Module) -> ic.Model:
    monkeypatch.setattr(sys.modules[f"interp_core.architectures.{name}"], "FAMILY", family)
    rows = ic.registry("architectures").rows
    for row in rows:
        if row.name == name:
            monkeypatch.setattr(row, "value", family)
            monkeypatch.setattr(row, "state", "ok")
    return ic.load(hf)


def test_the_self_check_drops_a_wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family file that splits GPT-2's projection head by head: every shape fits, every edit acts."""
    assert gpt2.FAMILY.fused is not fused_per_head
    wrong = Family("gpt2", fused=fused_per_head, refuse=gpt2.FAMILY.refuse)
    model = _with_family(monkeypatch, "gpt2", wrong, ic.testing.tiny("gpt2"))
    assert model.check is not None and not model.check.ok
    assert "self-check: is what attention mixes" in model.atlas.lacking["v"]
    assert "self-check: gives the scores of the first position" in model.atlas.lacking["q"]
    assert "resid_post" in model.sites and "z" in model.sites
    with pytest.raises(ic.CapabilityError, match="self-check: is what attention mixes"):
        model.run(torch.tensor([[1, 2]]), read=S.v)


def test_the_self_check_finds_a_router_edit_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest fault of the field: logits replaced, weights and indices left as they were."""

    original = hook_points.router_logits

    def silent(module: str, router: object, *sizes: int) -> hook_points.HookPoint:
        point = original(module, router, *sizes)  # type: ignore[arg-type]

        def put(call: hook_points.Call, _old: torch.Tensor, new: torch.Tensor) -> None:
            call.output = (new.reshape(-1, new.shape[-1]), *call.output[1:])

        return hook_points.HookPoint(point.module, point.side, get=point.get, put=put)

    assert qwen3_moe.FAMILY.router is not None
    monkeypatch.setattr(hook_points, "router_logits", silent)
    model = ic.load(ic.testing.tiny("qwen3_moe"))
    with pytest.raises(ic.CapabilityError, match="self-check: an edit in layer 0 changes the logits"):
        model.run(torch.tensor([[1, 2]]), edits=S.router_logits[0].mask(0))


def test_the_self_check_finds_streams_that_do_not_add_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    hf = GraniteForCausalLM(
        GraniteConfig(**config, intermediate_size=96, residual_multiplier=0.3, logits_scaling=2.0)
    ).eval()
    model = _with_family(monkeypatch, "granite", Family("granite"), hf)
    assert model.atlas.notes == caplog.messages[0].split(": ", 1)[1:] and len(caplog.messages) == 1
    assert model.atlas.notes[0].startswith("attn_out, resid_mid, mlp_out withdrawn: they do not add up (")
    for site in (S.attn_out, S.resid_mid, S.mlp_out):
        with pytest.raises(ic.CapabilityError, match=rf"{site}: self-check: adds up: .* fails \(\d"):
            model.run(torch.tensor([[1, 2]]), read=site)
    assert "readout" not in model.atlas.lacking  # logits_scaling is known
    assert {"resid_pre", "resid_post", "z", "head_out", "pattern", "mlp_in"} <= set(model.sites)


def test_a_readout_that_is_not_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_core import readout

    monkeypatch.setattr(readout, "unembed", lambda model, normed: model.get_output_embeddings()(normed))
    model = ic.load(ic.testing.tiny("gemma2"))
    assert "gives the model's logits" in model.atlas.lacking["readout"]
    with pytest.raises(ic.CapabilityError, match="gives the model's logits"):
        model.readout(torch.zeros(1, 64))
    with pytest.raises(ic.CapabilityError, match="logit_lens needs readout"):
        ic.method("logit_lens")(model, torch.tensor([[1, 2]]))


def test_check_costs_five_short_passes() -> None:
    model = tiny_model("llama")
    calls = []
    original = model.hf.model.forward
    model.hf.model.forward = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    try:
        check_atlas(model)
    finally:
        del model.hf.model.forward
    assert len(calls) == 5


def test_unchecked_models_work(ids: torch.Tensor) -> None:
    model = ic.load(ic.testing.tiny("qwen2"), check=False)
    assert model.check is None and model.run(ids, read=S.z[0])[S.z[0]].shape == (2, 7, 4, 16)


def test_paths_cover_the_families_of_the_field() -> None:
    assert len(known_paths()) > 120
    assert known_paths()["LlamaForCausalLM"]["blocks.attn.o"] == "o_proj"
    assert conventions.discover({}) == {}
