"""Logit lens against a plain computation from the hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import interp_core as ic
from interp_core import sites as S

FAMILIES = ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3_moe", "olmo2"]
TEXT = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"


def plainly(model: ic.Model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[batch layer pos vocab]` from transformers' hidden states: norm and head of the model; the
    last hidden state is already normed."""
    with torch.no_grad():
        out = model.hf(input_ids=ids, output_hidden_states=True, use_cache=False)
        base = model.hf.base_model
        norm = next(getattr(base, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n))
        states = [norm(state) for state in out.hidden_states[:-1]] + [out.hidden_states[-1]]
        logits = torch.stack([model.hf.get_output_embeddings()(state) for state in states], 1)
        if cap := getattr(model.hf.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
    return torch.log_softmax(logits.float(), -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_plain_computation(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    result = ic.method("logit_lens")(model, ids, targets="next")
    wanted = plainly(model, ids)
    final = wanted[:, -1:]
    targets = torch.cat([ids[:, 1:], final[:, 0, -1:].argmax(-1)], 1)
    assert torch.equal(result.target_ids, targets)
    mine = wanted.gather(-1, targets[:, None, :, None].expand(-1, wanted.shape[1], -1, 1))
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(result.target_logprob, mine[..., 0], **close)
    torch.testing.assert_close(result.top_logprob, wanted.topk(5).values, **close)
    torch.testing.assert_close(result.entropy, -(wanted.exp() * wanted).sum(-1), **close)
    torch.testing.assert_close(result.kl, (final.exp() * (final - wanted)).sum(-1), **close)
    assert torch.equal(result.target_rank, (wanted > mine).sum(-1))
    assert torch.equal(result.top_ids[..., 0], wanted.argmax(-1))
    assert not result.kl[:, -1].any()


def test_chosen_positions_and_targets(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    lens = ic.method("logit_lens")
    whole = lens(model, ids)
    for at, columns in ((-1, [6]), ([1, 3], [1, 3]), (slice(2, 5), [2, 3, 4])):
        part = lens(model, ids, at=at)
        torch.testing.assert_close(part.entropy, whole.entropy[:, :, columns], atol=1e-5, rtol=1e-5)
        assert torch.equal(part.target_ids, whole.target_ids[:, columns])
    own = lens(model, ids, at=[0, 6], targets=[[7, 8], [9, 10]])
    assert own.target_ids.tolist() == [[7, 8], [9, 10]]
    with pytest.raises(ic.PlanError, match=r"targets are \[1, 1\], the positions \[2, 2\]"):
        lens(model, ids, at=[0, 6], targets=[[7]])


def test_only_asked_positions_are_unembedded(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    rows = []
    handle = model.hf.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[:-1].numel()))
    try:
        ic.method("logit_lens")(model, ids, at=-1)
    finally:
        handle.remove()
    assert set(rows) == {2, 2 * (model.n_layers + 1)}  # the last layer's for its likeliest, then all layers'


def test_padded_batches(padded: ic.Tokens) -> None:
    model = tiny_model("qwen3")
    lens = ic.method("logit_lens")
    batch = lens(model, padded, at=-1)
    for i, row in enumerate(padded):
        torch.testing.assert_close(
            batch.target_logprob[i], lens(model, row, at=-1).target_logprob[0], atol=1e-4, rtol=1e-4
        )
    with pytest.raises(ic.PlanError, match=r"rows have \[5, 7, 2\] tokens; choose positions"):
        lens(model, padded)


def test_translators(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    lens = ic.method("logit_lens")
    plain = lens(model, ids)
    assert lens(model, ids, translator=lambda layer, resid: resid) == plain
    final = model.run(ids, read=S.resid_post[2])[S.resid_post[2]].flatten(0, 1)
    seen = []
    perfect = lens(model, ids, translator=lambda layer, resid: (seen.append(layer), final)[1])
    assert seen == [-1, 0, 1]
    assert perfect.kl.abs().max() < 1e-5
    with pytest.raises(ic.PlanError, match="setting translator"):
        lens(model, ids, translator=3)


def test_the_toy_decides_in_the_middle(toy: ic.Model, capsys: pytest.CaptureFixture[str]) -> None:
    result = ic.method("logit_lens")(toy, TEXT)
    assert [line[-1] for line in result.tops()][-3:] == [" dry"] * 3
    assert result.target_rank[0, :, -1].tolist()[0] > 100
    result.show()
    shown = capsys.readouterr().out
    assert "·dry" in shown and "embed" in shown and shown.count("\n") == 8
    row = result.table()[-1]
    assert row["top"] == " dry" and row["rank"] == 0 and row["layer"] == "5"
    assert "prompt" not in shown
    both = str(ic.method("logit_lens")(toy, [TEXT] * 2)).splitlines()
    assert [line for line in both if line.startswith("prompt")] == ["prompt 0:", "prompt 1:"] and len(both) == 18


def test_saving_and_pages(toy: ic.Model, tmp_path: Path) -> None:
    result = ic.method("logit_lens")(toy, TEXT, top_k=3)
    result.save(tmp_path)
    assert type(result).load(tmp_path) == result
    assert ic.Result.load(tmp_path) == result
    with pytest.raises(ic.LoadError, match="no readable result"):
        type(result).load(tmp_path / "nowhere")
    page = result.to_html(tmp_path / "lens.html").read_text()
    assert "KL to final" in page and "·dry" in page and "http" not in page.replace("http-equiv", "")
    assert result.png(tmp_path / "lens.png").read_bytes()[:4] == b"\x89PNG"
    assert "<style>" in result._repr_html_()
