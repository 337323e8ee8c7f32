"""Sparse autoencoders: formulas in float64, files of SAELens in all their dialects, edits by feature, what is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoders import OWN, folder
from conftest import tiny_model, toy_model
from interp_plugins.sae import SAE, load_sae
from interp_plugins.sae import autoencoder as module
from safetensors.torch import save_file
from tolerances import close
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

TEXT = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
KINDS = tuple(OWN)


def by_hand(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstruction of states `[n d_in]`, one state and one feature at a time."""
    w = {name: weight.double() for name, weight in sae.weights.items()}
    features = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    for n, state in enumerate(x.double()):
        u = state - w["b_dec"] if sae.subtract else state
        before = [float(u @ w["W_enc"][:, i]) for i in range(sae.d_sae)]
        if sae.architecture == "gated":
            for i, p in enumerate(before):
                if p + w["b_gate"][i] > 0:
                    features[n, i] = max(p * float(w["r_mag"][i].exp()) + float(w["b_mag"][i]), 0)
            continue
        before = [p + float(w["b_enc"][i]) for i, p in enumerate(before)]
        cut = sorted(before)[-sae.k] if sae.architecture == "topk" else 0
        for i, p in enumerate(before):
            threshold = float(w["threshold"][i]) if sae.architecture == "jumprelu" else 0
            if p > threshold and p >= cut:
                features[n, i] = max(p, 0)
    return features, features @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_errors_equal_the_formulas(kind: str, subtract: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float64)
    made = folder(tmp_path, kind, d_in=model.d_model, apply_b_dec_to_input=subtract)
    sae = load_sae(made)
    assert (sae.d_in, sae.d_sae, sae.subtract, sae.architecture) == (model.d_model, 48, subtract, kind)
    ids = torch.tensor([[5, 17, 33, 8, 2, 41], [9, 9, 1, 30, 12, 7]])
    found = ic.method("sae")(model, ids, sae=made, top_k=48)
    x = model.run(ids, read=S.resid_pre[2])[S.resid_pre[2]].plain
    features, reconstruction = (part.view(2, 6, -1) for part in by_hand(sae, x.flatten(0, 1)))
    dense = torch.zeros(2, 6, 49, dtype=torch.float64)
    dense.scatter_(2, found.features.where(found.features >= 0, 48), found.activations)
    close(dense[..., :48], features, model)
    assert torch.equal(found.l0, (features > 0).sum(-1)) and (found.activations.diff(dim=-1) <= 0).all()
    assert kind != "topk" or int(found.l0.max()) <= 7
    close(found.error, (x - reconstruction).pow(2).sum(-1), model)
    spread = (x - x.mean(1, keepdim=True)).pow(2).sum(-1)
    close(found.spread, spread, model)
    close(found.unexplained, found.error / spread, model)
    close(sae.reconstruct(x), reconstruction, model)
    # the same at one position, whose spread is still that of the whole text
    last = ic.method("sae")(model, ids, sae=sae, at=-1, top_k=3)
    assert last.features.shape == (2, 1, 3) and torch.equal(last.features[:, 0], found.features[:, -1, :3])
    close(last.spread[:, 0], spread[:, -1], model)


def test_few_positions_at_a_time_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path)
    whole = ic.method("sae")(toy_model(), TEXT, sae=made)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * 48 * 3)
    sae = load_sae(made)
    assert [len(part) for part in sae.chunks(torch.zeros(1, 7, 128))] == [3, 3, 1]
    again = ic.method("sae")(toy_model(), TEXT, sae=made)
    assert torch.equal(again.features, whole.features)
    torch.testing.assert_close(again.error, whole.error)


def test_a_model_in_half_precision_has_exact_errors(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    made = folder(tmp_path, d_in=model.d_model)
    ids = torch.tensor([[5, 17, 33, 8]])
    found = ic.method("sae")(model, ids, sae=made)
    x = model.run(ids, read=S.resid_pre[2])[S.resid_pre[2]].plain
    wanted = (x[0] - by_hand(load_sae(made), x[0])[1]).pow(2).sum(-1)
    torch.testing.assert_close(found.error[0].double(), wanted, rtol=1e-5, atol=0)  # sums of float32
    edited = model.run(ids, read=S.resid_pre[2], edits=load_sae(made).replace())[S.resid_pre[2]]
    assert edited.dtype == torch.bfloat16


def test_edits_by_feature(tmp_path: Path) -> None:
    """Steering, scaling and setting act on the site as the directions say, and leave the error alone."""
    model = tiny_model("gpt2", torch.float64)
    sae = load_sae(folder(tmp_path, "jumprelu", "blocks.1.hook_mlp_out", model.d_model))
    ids, site = torch.tensor([[5, 17, 33, 8]]), S.mlp_out[1]
    x = model.run(ids, read=site)[site].plain
    features, reconstruction = (part[None] for part in by_hand(sae, x[0]))
    feature = int(features.sum((0, 1)).argmax())
    active, direction = features[..., feature, None], sae.weights["W_dec"][feature].double()
    assert torch.equal(sae.direction(feature), sae.weights["W_dec"][feature])

    def edited(*edits: ic.Edit, **options: Any) -> Tensor:
        return model.run(ids, read=site, edits=edits, **options)[site].plain

    close(edited(sae.replace()), reconstruction, model)
    close(edited(sae.scale(feature, 0.0)), x - active * direction, model)
    close(edited(sae.scale(feature, 3.0)), x + 2 * active * direction, model)
    close(edited(sae.set(feature, 5.0)), x + (5 - active) * direction, model)
    close(edited(sae.scale(feature, 1.0), allow_noop=True), x, model)
    close(edited(site.add(2 * sae.direction(feature).double())), x + 2 * direction, model)
    moved, fixed = sae.scale(feature, 0.0, at=-1), sae.set(feature, 2.5)
    assert str(moved) == f"mlp_out[1]@-1 apply feature {feature} × 0" and str(fixed).endswith(
        f"feature {feature} := 2.5"
    )
    sweep = model.sweep(ids, {"without": moved, "fixed": fixed}, ic.score.logprob(7))
    for key, edit in (("without", moved), ("fixed", pickle.loads(pickle.dumps(fixed)))):
        close(sweep[key], logprob(model.run(ids, edits=edit)) - logprob(model.run(ids)), model)
    last = edited(sae.replace(at=-1))
    close(last[:, -1], reconstruction[:, -1], model)
    assert torch.equal(last[:, :-1], x[:, :-1])
    for wrong in (-1, sae.d_sae, 1.0, True):
        for act in (sae.direction, lambda n: sae.scale(n, 0.0), lambda n: sae.set(n, 1.0)):
            with pytest.raises(ic.PlanError, match="has 48, from 0 on"):
                act(wrong)


def logprob(run: ic.Run) -> Tensor:
    return run.logits.plain[:, -1].log_softmax(-1)[:, 7]


def test_heads_lie_behind_each_other(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float64)
    width = model.n_heads * model.d_head
    sae = load_sae(folder(tmp_path, "topk", "blocks.1.attn.hook_z", width))
    assert sae.site == S.z[1]
    ids = torch.tensor([[5, 17, 33, 8]])
    z = model.run(ids, read=S.z[1])[S.z[1]].plain
    features, reconstruction = by_hand(sae, z[0].flatten(-2))
    found = ic.method("sae")(model, ids, sae=sae)
    close(found.activations[0, :, 0], features.max(-1).values, model)
    edit = sae.replace()
    close(model.run(ids, read=S.z[1], edits=edit)[S.z[1]].plain[0].flatten(-2), reconstruction, model)
    alone = model.run(ids, read=S.z[1], edits=sae.scale(3, 0.0, at=-1), allow_noop=True)[S.z[1]].plain
    close(alone[0, -1].flatten(), z[0, -1].flatten() - features[-1, 3] * sae.weights["W_dec"][3], model)


def test_losses_are_those_of_runs(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float64)
    made = folder(tmp_path, d_in=model.d_model)
    rows = [torch.tensor([[5, 17, 33, 8, 2]]), torch.tensor([[9, 9, 1, 30, 12]])]
    found = ic.method("sae")(model, torch.cat(rows), sae=made, loss=True)
    sae = load_sae(made)
    for row, ids in enumerate(rows):
        x = model.run(ids, read=S.resid_pre[2])[S.resid_pre[2]].plain
        values = [x, by_hand(sae, x[0])[1][None], torch.zeros_like(x)]
        for i, x_in in enumerate(values):
            logits = model.run(ids, edits=S.resid_pre[2].set(x_in), allow_noop=True).logits.plain
            wanted = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            close(found.losses[row, i], wanted, model)
    clean, built, zero = found.losses.unbind(1)
    close(found.recovered, (zero - built) / (zero - clean), model)
    assert "recovers" in found.finding


def test_every_dialect_of_the_configuration(tmp_path: Path) -> None:
    """The same weights, described as versions 3 to 6 do; factors are folded in; centring as TransformerLens does it."""
    new = folder(tmp_path / "new", "topk", hook="", k=7, activation_fn_kwargs=None, activation_fn_str=None)
    cfg = json.loads((new / "cfg.json").read_text())
    apart = {name: cfg.pop(name) for name in ("model_name", "hook_name", "hook_layer")}
    kwargs = {"center_writing_weights": False}
    cfg["metadata"] = {**apart, "hook_name": "blocks.2.hook_resid_pre", "model_from_pretrained_kwargs": kwargs}
    (new / "cfg.json").write_text(json.dumps(cfg))
    old = folder(tmp_path / "old", "topk", architecture="standard", activation_fn_str="topk")
    (old / "cfg.json").write_text((old / "cfg.json").read_text().replace('"hook_name"', '"hook_point"'))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    first, second = load_sae(new), load_sae(old)
    assert first.site == second.site == S.resid_pre[2] and first.k == second.k == 7
    assert torch.equal(first.reconstruct(x), second.reconstruct(x))

    normed = folder(tmp_path / "normed", normalize_activations="expected_average_only_in")
    with pytest.raises(ic.CapabilityError, match=r"expected_average_only_in.*scale="):
        load_sae(normed)
    plain = load_sae(folder(tmp_path / "plain"))
    scaled = load_sae(normed, scale=0.25)
    torch.testing.assert_close(scaled.encode(x), plain.encode(x * 0.25))
    torch.testing.assert_close(scaled.reconstruct(x), plain.reconstruct(x * 0.25) / 0.25)
    with pytest.raises(ic.PlanError, match="leave scale= out"):
        load_sae(tmp_path / "plain", scale=2.0)

    centring = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    centred = load_sae(folder(tmp_path / "centred", **centring))
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(centred.encode(x), plain.encode(x - mean))
    torch.testing.assert_close(centred.reconstruct(x), plain.reconstruct(x - mean) + mean)
    assert not load_sae(folder(tmp_path / "act", hook="blocks.2.mlp.hook_post", **centring)).centred


HOOKS = [
    ("blocks.6.hook_resid_post", S.resid_post[6]), ("blocks.0.hook_resid_mid", S.resid_mid[0]),
    ("blocks.3.attn.hook_z", S.z[3]), ("blocks.3.hook_mlp_out", S.mlp_out[3]), ("hook_embed", S.embed),
    ("blocks.3.mlp.hook_post", S.mlp_act[3]), ("blocks.3.ln2.hook_normalized", S.mlp_in[3]), ("resid_pre", S.resid_pre),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "site"), HOOKS, ids=[hook for hook, _ in HOOKS])
def test_hooks_are_sites(hook: str, site: S.Site) -> None:
    assert S.from_hook(hook) == site


@pytest.mark.parametrize("hook", ["blocks.3.hook_resid_pree", "blocks.3.mlp.hook_pre", "", 3])
def test_hooks_that_are_no_sites(hook: Any) -> None:
    with pytest.raises(ic.SiteError, match="no site is called"):
        S.from_hook(hook)


def drop(path: Path, name: str) -> Path:
    """A folder without one of its tensors."""
    from safetensors.torch import load_file

    weights = load_file(path / "sae_weights.safetensors")
    del weights[name]
    save_file(weights, path / "sae_weights.safetensors")
    return path


REFUSED = [
    ({"architecture": "jumprelo"}, ic.CapabilityError, "Did you mean 'jumprelu'"),
    ({"architecture": "skip_transcoder"}, ic.CapabilityError, "no architecture 'skip_transcoder'"),
    ({"activation_fn_str": "tanh-relu"}, ic.CapabilityError, "no activation 'tanh-relu'"),
    ({"normalize_activations": "layer_norm"}, ic.CapabilityError, "normalize_activations 'layer_norm'"),
    ({"finetuning_scaling_factor": True}, ic.CapabilityError, "finetuning_scaling_factor"),
    ({"hook_head_index": 3}, ic.CapabilityError, "head 3 alone"),
    ({"hook_name": None}, ic.LoadError, "no hook_name"),
    ({"hook_name": "hook_resid_pre"}, ic.LoadError, "names no layer"),
    ({"hook_name": "blocks.2.hook_nothing"}, ic.SiteError, "hook_nothing"),
    ({"hook_name": "blocks.99.hook_resid_pre"}, ic.SiteError, "99"),
    ({"architecture": "topk"}, ic.LoadError, "topk needs k"),
    ({"architecture": "topk", "k": 49}, ic.LoadError, "k is 49"),
    ({"d_sae": 40}, ic.LoadError, r"W_enc is \[128, 48\], cfg.json says \[128, 40\]"),
    ({"architecture": "jumprelu"}, ic.LoadError, "has threshold, and the file holds W_dec, W_enc, b_dec, b_enc"),
]


@pytest.mark.parametrize(("cfg", "kind", "match"), REFUSED, ids=[match for *_, match in REFUSED])
def test_what_cannot_be_read_is_refused_before_the_model_runs(
    cfg: dict[str, Any], kind: type[Exception], match: str, tmp_path: Path
) -> None:
    made = folder(tmp_path)
    (made / "cfg.json").write_text(
        json.dumps({k: v for k, v in ({**json.loads((made / "cfg.json").read_text()), **cfg}).items() if v is not None})
    )
    refuses(kind, match, sae=made)


def refuses(kind: type[Exception], match: str, text: Any = TEXT, **settings: Any) -> None:
    """The method raises this, and no module of the model has been called."""
    model = toy_model()
    calls: list[int] = []
    handle = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(kind, match=match):
            ic.method("sae")(model, text, **settings)
    finally:
        handle.remove()
    assert not calls


def test_other_mistakes_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    made = folder(tmp_path / "made")
    refuses(
        ic.PlanError,
        "reads 32 numbers, resid_pre.2. of this model has d_model 128",
        sae=folder(tmp_path / "a", d_in=32),
    )
    refuses(ic.PlanError, "reads 32 numbers", sae=load_sae(tmp_path / "a"))
    refuses(ic.LoadError, "cfg.json", sae=tmp_path / "nowhere")
    refuses(ic.LoadError, "a standard autoencoder has W_dec", sae=drop(folder(tmp_path / "b"), "W_dec"))
    (folder(tmp_path / "c") / "sae_weights.safetensors").write_bytes(b"cut off")
    refuses(ic.LoadError, "cannot be read", sae=tmp_path / "c")
    (folder(tmp_path / "d") / "cfg.json").write_text("[]")
    refuses(ic.LoadError, "a JSON object", sae=tmp_path / "d")
    refuses(ic.PlanError, "takes a folder as SAELens saves it")
    refuses(ic.PlanError, "takes a folder as SAELens saves it", sae=3)
    refuses(ic.PlanError, "choose positions that all have", [TEXT, "Q: big\nA:"], sae=made)
    refuses(ic.PlanError, "one token alone", "Q:", sae=made, loss=True)
    refuses(ic.PlanError, "top_k", sae=made, top_k=0)


@pytest.mark.usefixtures("rough_figures")
def test_pages_tables_and_batches(tmp_path: Path) -> None:
    made = folder(tmp_path / "made", "jumprelu")
    texts = [TEXT, TEXT.replace("big", "old"), "Q: big\nA:"]
    found = ic.method("sae")(toy_model(), texts, sae=made, at=-1, loss=True)
    again = ic.method("sae")(toy_model(), texts, sae=made, at=-1, loss=True, batch_size=1, out=tmp_path / "out")
    assert torch.equal(found.features, again.features)
    torch.testing.assert_close(found.losses, again.losses)
    assert type(found).load(found.save(tmp_path / "saved")) == found
    rows = found.table()
    assert {row["row"] for row in rows} == {0, 1, 2} and all(row["activation"] > 0 for row in rows)
    assert found.top(0)[0] == int(found.features[0, 0, 0])
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "Of 48 features" in page and f"feature {found.top(0)[0]}" in page
    assert found.png(tmp_path / "map.png", row=0).stat().st_size > 1_000
    assert "prompt 2:" in str(found) and found.tokens[0] == ("A:",)
    silent = replace(load_sae(made), weights={**load_sae(made).weights, "threshold": torch.full((48,), 1e9)})
    nothing = ic.method("sae")(toy_model(), TEXT, sae=silent)
    assert int(nothing.l0.sum()) == 0 and (nothing.features == -1).all() and nothing.table() == []
    assert nothing.finding.endswith("unexplained.") and "none is active" in nothing.charts()[0].html()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_it_passes_the_kit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    made = folder(tmp_path, "topk", "blocks.1.hook_resid_post", model.d_model)
    testing.check_method("sae", model, settings={"sae": str(made), "at": -1, "loss": True}).raise_if_failed()
