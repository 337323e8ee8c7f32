"""Engine `transformer_lens`: caches with TransformerLens' names, folded weights, refusals; nothing is installed."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, BrokenBarrierError

import pytest
import torch
from conftest import tiny_model, toy_model

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines import transformer_lens as engine

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])
READS = [
    S.embed,
    S.resid_pre,
    S.resid_mid,
    S.resid_post,
    S.attn_out,
    S.mlp_out,
    S.mlp_act,
    S.q,
    S.k,
    S.v,
    S.z,
    S.pattern,
]


@cache
def bridged(family: str, *, fold: bool = False) -> ic.Model:
    hf = testing.tiny(family)
    hf.set_attn_implementation("eager")
    return ic.load(hf, engine="transformer_lens", engine_options={"fold": fold})


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_a_cache_holds_what_the_bridges_own_cache_holds(family: str) -> None:
    model = bridged(family)
    ours = model.run(IDS, read=READS).to_cache()
    _, theirs = model.engine.bridge.run_with_cache(IDS)
    names = set(ours.keys()) & set(theirs.keys())
    assert {"hook_embed", "blocks.1.hook_resid_mid", "blocks.2.attn.hook_z", "ln_final.hook_scale"} <= names
    for name in names:
        found, wanted = ours[name], theirs[name]
        torch.testing.assert_close(found, wanted.reshape(found.shape), atol=2e-5, rtol=1e-5, msg=name)


def test_its_analysis_tools_run_on_our_runs() -> None:
    model = bridged("gpt2")
    edits = [S.z[1, 2].zero()]
    cache = model.run(IDS, read=READS, edits=edits).to_cache()
    streams, labels = cache.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "pos_embed", "0_attn_out"]
    torch.testing.assert_close(streams.sum(0), cache["resid_post", 2], atol=1e-4, rtol=1e-4)
    lens = cache.accumulated_resid(apply_ln=True)
    assert lens.shape[1:] == (2, 7, 64)
    found = lens[-1] @ model.engine.bridge.W_U
    logits = model.run(IDS, edits=edits).logits.as_subclass(torch.Tensor)
    assert torch.corrcoef(torch.stack([found.flatten(), logits.flatten()]))[0, 1] > 0.99


def test_runs_of_other_engines_give_caches_too() -> None:
    run = tiny_model("llama", attention="eager").run(IDS, read=[S.resid_post, S.z[1]])
    plain = run.to_cache()
    assert set(plain.keys()) == {*(f"blocks.{i}.hook_resid_post" for i in range(3)), "blocks.1.attn.hook_z"}
    assert "ln_final.hook_scale" in set(run.to_cache(bridged("llama").engine.bridge).keys())


def test_a_cache_of_nothing_is_refused() -> None:
    run = tiny_model("llama").run(IDS, read=S.resid_post[1].at(-1))
    with pytest.raises(ic.ReadError, match="no site of this run has a name in a cache"):
        run.to_cache()


def test_folded_weights_are_named_and_give_the_same_predictions() -> None:
    plain, folded = bridged("gpt2"), bridged("gpt2", fold=True)
    assert "weights folded" in repr(folded)
    logprobs = [torch.log_softmax(m.run(IDS).logits.as_subclass(torch.Tensor), -1) for m in (plain, folded)]
    torch.testing.assert_close(*logprobs, atol=1e-4, rtol=1e-4)
    streams = [m.run(IDS, read=S.resid_post[2])[S.resid_post[2]] for m in (plain, folded)]
    assert (streams[0] - streams[1]).abs().max() > 1e-3
    assert torch.equal(plain.hf.transformer.h[0].ln_1.weight, testing.tiny("gpt2").transformer.h[0].ln_1.weight)


def test_what_it_cannot_do_is_refused_before_anything_runs() -> None:
    with pytest.raises(ic.CapabilityError, match="has no option 'folded'. Did you mean 'fold'"):
        ic.load(testing.tiny("llama"), engine="transformer_lens", engine_options={"folded": True})
    with pytest.raises(ic.CapabilityError, match="a hook at the router sees one tensor"):
        bridged("qwen3_moe").run(IDS, edits=S.router_logits[0].mask(experts=[1]))
    with pytest.raises(ic.CapabilityError, match="builds no bridge around a Linear"):
        engine.build_bridge(torch.nn.Linear(2, 2))


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {args}")

    for name in ("check_call", "run", "Popen", "call"):
        monkeypatch.setattr(subprocess, name, refuse)
    for family in ("qwen3_vl", "llama"):
        ic.load(testing.tiny(family), engine="transformer_lens")


def test_the_toy_on_the_bridge_answers_as_on_the_model() -> None:
    toy = toy_model()
    on_bridge = ic.load("toy:text", engine="transformer_lens")
    prompt = "Q: big\nA: small\n\nQ: hot\nA:"
    texts = [m.generate(prompt, max_new_tokens=3).texts for m in (toy, on_bridge)]
    assert texts[0] == texts[1]


def test_two_threads_that_build_bridges_leave_the_library_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources import _bridge_builder

    build, inside = _bridge_builder.build_bridge_from_module, Barrier(2)

    def both_at_once(*args: object, **kwargs: object) -> object:
        try:
            inside.wait(0.3)  # were there no lock, the other would be in here too, and leave after the first
        except BrokenBarrierError:
            pass
        return build(*args, **kwargs)

    monkeypatch.setattr(_bridge_builder, "build_bridge_from_module", both_at_once)
    check = ArchitectureAdapter._check_required_libraries
    with ThreadPoolExecutor(2) as pool:
        bridges = [pool.submit(engine.build_bridge, testing.tiny("gpt2")) for _ in range(2)]
        assert all(len(bridge.result().blocks) for bridge in bridges)
    assert ArchitectureAdapter._check_required_libraries is check
    assert inside.broken, "both were inside at once"


def test_a_receipt_leaves_the_sink_its_share() -> None:
    """What a knockout took is a part of all probability, with that of gpt-oss' sinks in it."""
    model = bridged("gpt_oss")
    with torch.no_grad():
        model.hf.model.layers[1].self_attn.sinks.fill_(1.5)
    pattern = model.run(IDS, read=S.pattern[1])[S.pattern[1]].plain
    run = model.run(IDS, edits=S.pattern[1].knockout(query=[-1, -2], key=-3))
    assert pattern.sum(-1).min() < 0.5
    assert run.receipts[0].norm == pytest.approx(float(pattern[:, :, [-1, -2], -3].norm()), rel=1e-4)
