"""Engine `nnsight`: imported without side effects, its own object at hand, plans that travel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_model

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines.nnsight.base import library
from interp_core.loading import toy_folder

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


def test_backward_works_in_a_file_that_is_no_python(tmp_path: Path) -> None:
    library()
    page = tmp_path / "page.md"
    page.write_text("| `query=…` | a table |\nloss.backward()\n")
    loss = torch.ones(2, requires_grad=True)
    exec(compile("\nloss.sum().backward()", str(page), "exec"), {"loss": loss})
    assert torch.equal(loss.grad, torch.ones(2))


def test_traces_by_hand_on_the_engines_own_object() -> None:
    model = ic.load(testing.tiny("llama"), engine="nnsight")
    traced = model.engine.nnsight
    with torch.no_grad(), traced.trace(input_ids=IDS):
        found = traced.model.layers[1].output.save()
    assert torch.equal(found, model.run(IDS, read=S.resid_post[1])[S.resid_post[1]].as_subclass(torch.Tensor))


READS = [
    S.embed,
    S.resid_pre,
    S.resid_post,
    S.z[1, 2],
    S.q[0],
    S.v[1].at(-1),
    S.k[2, 0].at([0, 3]),
    S.mlp_act[2],
    S.mlp_out,
]
EDITS = [
    S.resid_post[0].at(-2).add(torch.linspace(-1, 1, 64)),
    S.resid_pre[1].at(0).project(torch.linspace(1, 2, 64)),
    S.q[1, [0, 3]].at([2, 4]).scale(2.0),
    S.z[2, 1].zero(),
    S.mlp_out[2].at(-1).set(torch.ones(64)),
]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma2", "qwen3_moe"])
def test_a_plan_travels(family: str) -> None:
    """nnsight's simulation serialises the plan and hides every package that a server would not have."""
    there = ic.load(testing.tiny(family), engine="nnsight", engine_options={"remote": "local"})
    here = tiny_model(family)
    reads = [site for site in READS if here.atlas.layers(site.name) in ([0, 1, 2], [0])]
    runs = [model.run(IDS, read=reads, edits=EDITS) for model in (here, there)]
    assert torch.equal(runs[0].logits.as_subclass(torch.Tensor), runs[1].logits.as_subclass(torch.Tensor))
    for site in reads:
        torch.testing.assert_close(
            runs[0][site].as_subclass(torch.Tensor), runs[1][site].as_subclass(torch.Tensor), rtol=0, atol=0
        )
    for ours, theirs in zip(runs[0].receipts, runs[1].receipts, strict=True):
        assert (ours.fired, ours.positions) == (theirs.fired, theirs.positions)
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-5)
    only = there.run(IDS, read=S.resid_post[0], logits=False)
    assert torch.equal(only[S.resid_post[0]], here.run(IDS, read=S.resid_post[0])[S.resid_post[0]])


def test_receipts_from_elsewhere_do_not_count_padding(padded: ic.Tokens) -> None:
    there = ic.load(testing.tiny("llama"), engine="nnsight", engine_options={"remote": "local"})
    edits = [S.z[1, 2].scale(0.5), S.resid_post[0].scale(2.0)]
    norms = [[r.norm for r in m.run(padded, edits=edits).receipts] for m in (there, tiny_model("llama"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_what_does_not_travel_is_refused_before_anything_is_sent() -> None:
    model = ic.load(testing.tiny("llama"), engine="nnsight", engine_options={"remote": "local"}, check=False)
    for ask in (
        lambda: model.run(IDS, read=S.pattern[0]),
        lambda: model.run(IDS, read=S.head_out[0]),
        lambda: model.run(IDS, edits=S.resid_mid[0].scale(2.0)),
        lambda: model.run(IDS, edits=S.resid_post[0].apply(lambda x: x)),
        lambda: model.run(IDS, read=S.z, grad=lambda logits: logits.sum()),
        lambda: model.generate(IDS, edits=S.resid_post[0].scale(2.0)),
    ):
        with pytest.raises(ic.CapabilityError, match="not travel; remotely a plan is plain data"):
            ask()


def test_a_server_wants_an_id_a_key_and_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = testing.tiny("llama")
    with pytest.raises(ic.CapabilityError, match=r"hub id, and this one has none \(a model in memory\)"):
        ic.load(hf, engine="nnsight", engine_options={"remote": True})
    hf.config._name_or_path = "someone/model"
    config = library().CONFIG
    monkeypatch.setattr(config.API, "APIKEY", None)
    with pytest.raises(ic.CapabilityError, match="set NDIF_API_KEY"):
        ic.load(hf, engine="nnsight", engine_options={"remote": True})
    monkeypatch.setattr(config.API, "APIKEY", "not-a-key")
    model = ic.load(hf, engine="nnsight", engine_options={"remote": "http://127.0.0.1:9"}, check=False)
    with pytest.raises(ic.CapabilityError, match=r"127\.0\.0\.1:9 cannot be reached"):
        model.run(IDS, read=S.resid_post[0])


def test_a_plan_travels_from_where_no_weights_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model that is larger than this machine: the hub's files without the weights, which the server has."""
    snapshot = tmp_path / "models--someone--toy" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--toy" / "refs").mkdir()
    (tmp_path / "models--someone--toy" / "refs" / "main").write_text("abc")
    for file in Path(toy_folder("toy:text")).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(library().CONFIG.API, "APIKEY", "not-a-key")
    thin = ic.load("someone/toy", engine="nnsight", engine_options={"remote": True}, device="meta")
    there = ic.load("toy:text", engine="nnsight", engine_options={"remote": "local"})
    assert thin.check is None and there.atlas.entries.keys() == thin.atlas.entries.keys()
    with pytest.raises(ic.CapabilityError, match="is on the meta device, which holds no numbers"):
        thin.weights(S.z[1])
    with pytest.raises(ic.CapabilityError, match="the weights are where plans run, and not here"):
        thin.readout(torch.ones(1, thin.d_model))
    with pytest.raises(ic.LoadError, match="which is enough for plans that run elsewhere alone"):
        ic.load("toy:text", device="meta")
    # what was worked out without weights is sent to the simulation, which has them
    thin.engine.nnsight, thin.engine.remote = there.engine.nnsight, "local"
    tokens = thin.tokens("Q: big\nA: small\n\nQ: hot\nA:")
    edits = [S.z[2, 1].zero(), S.resid_post[0].at(-2).add(torch.linspace(-1, 1, thin.d_model))]
    ours, wanted = (m.run(tokens, read=[S.z[1, 2], S.resid_post], edits=edits) for m in (thin, ic.load("toy:text")))
    assert torch.equal(ours.logits.plain, wanted.logits.plain)
    for site in (S.z[1, 2], S.resid_post):
        assert torch.equal(ours[site].plain, wanted[site].plain)


def test_what_needs_numbers_is_refused_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in float32 do not say what they give on the meta device."""
    config = testing.tiny("qwen3_moe").config
    config._name_or_path = "someone/model"
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(library().CONFIG.API, "APIKEY", "not-a-key")
    with pytest.raises(ic.CapabilityError, match="on the meta device, which holds no numbers; load the weights"):
        ic.load(hf, engine="nnsight", engine_options={"remote": "local"})
    model = ic.load(hf, engine="nnsight", engine_options={"remote": True})
    with pytest.raises(ic.CapabilityError, match="Qwen3MoeForCausalLM cannot be gone through without weights"):
        model.run(IDS, read=S.resid_post[0])


def test_a_plan_needs_no_source_of_the_caller() -> None:
    """A trace by hand is read from its file; code from a string has none."""
    names = {"model": ic.load(testing.tiny("llama"), engine="nnsight"), "S": S, "ids": IDS}
    exec("run = model.run(ids, read=[S.z[2], S.resid_pre[0]], edits=S.mlp_out[1].scale(2.0))", names)
    wanted = tiny_model("llama").run(IDS, read=S.z[2], edits=S.mlp_out[1].scale(2.0))[S.z[2]]
    assert torch.equal(names["run"][S.z[2]], wanted)


def test_modules_that_are_called_like_what_nnsight_serves() -> None:
    """BERT's layers have submodules called `output`, which is what nnsight calls a module's output."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    hf = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=96, **sizes)).eval()
    plain, model = ic.load(hf), ic.load(hf, engine="nnsight")
    assert list(model.sites) == list(plain.sites)
    plan = {"read": [S.resid_post, S.attn_out[1], S.z[0]], "edits": [S.attn_out[0].at(2).scale(2.0), S.z[1, 2].zero()]}
    found, wanted = model.run(IDS, **plan), plain.run(IDS, **plan)
    assert torch.equal(found.logits, wanted.logits)
    for site in plan["read"]:
        assert torch.equal(found[site], wanted[site]), site
