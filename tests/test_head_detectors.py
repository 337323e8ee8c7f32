"""Head detectors: stripes against matrices written by hand, TransformerLens' scores, eigenvalues of the whole matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.head_detectors import KINDS, looked_for, pattern_scores, random_repeats
from studying import IDS, tokens
from tolerances import close
from torch import Tensor
from transformer_lens.head_detector import (
    compute_head_attention_similarity_score,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

REPEATED = torch.tensor([0, *range(1, 11), *range(1, 11)])  # ten tokens twice, after a BOS


def detect(model: ic.Model, x: Any = None, **settings: Any) -> Any:
    return ic.method("head_detectors")(model, tokens(IDS) if x is None else x, **settings)


def attention(n: int, heads: int = 3, seed: int = 0) -> Tensor:
    scores = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def test_perfect_heads_score_one() -> None:
    """A head that looks only where it should, and at itself where there is no such place."""
    for kind, place in zip(KINDS, looked_for(REPEATED), strict=True):
        perfect = torch.where(place.any(-1, keepdim=True), place.double(), torch.eye(21).double())
        stripe, mul = (pattern_scores(perfect[None], place[None], score)[0, 0] for score in ("stripe", "mul"))
        # TransformerLens divides by all rows, so that no head reaches 1
        assert stripe == 1 and mul == pytest.approx({"previous": 20 / 21}.get(kind, 10 / 21)), kind


def test_stripes_are_diagonals() -> None:
    a, n = attention(21), 10
    own = torch.arange(1, 21)
    second = torch.arange(11, 21)
    found = pattern_scores(a, looked_for(REPEATED))
    torch.testing.assert_close(found[0], a[:, own, own - 1].mean(-1))
    torch.testing.assert_close(found[1], a[:, second, second - n].mean(-1))
    torch.testing.assert_close(found[2], a[:, second, second - (n - 1)].mean(-1))


@pytest.mark.parametrize("exclude", [(False, False), (True, False), (False, True)])
def test_mul_and_abs_are_transformer_lens(exclude: tuple[bool, bool]) -> None:
    ids = torch.tensor([3, 7, 3, 9, 7, 3, 3, 1])
    makers = (
        get_previous_token_head_detection_pattern,
        get_duplicate_token_head_detection_pattern,
        get_induction_head_detection_pattern,
    )
    a, places = attention(8), looked_for(ids)
    for score in ("mul", "abs"):
        found = pattern_scores(a, places, score, *exclude)
        for kind, make in enumerate(makers):
            wanted = make(ids[None])
            assert torch.equal(wanted.bool(), places[kind])
            for head in range(3):
                theirs = compute_head_attention_similarity_score(
                    a[head].clone(), wanted, exclude_bos=exclude[0], exclude_current_token=exclude[1],
                    error_measure=score,
                )  # fmt: skip
                # theirs rounds the difference to three digits
                limit = 1e-6 if score == "mul" else 5.1e-4
                assert float(found[kind, head]) == pytest.approx(theirs, abs=limit), (score, kind)


def test_prompts_and_random_tokens_by_hand() -> None:
    """The toy's own patterns, multiplied here; padded rows are what they are alone."""
    model = toy_model()
    texts = [" moon tree dog moon tree", "Q: big\nA: small\n\nQ: hot\nA:", " dog"]
    found = detect(model, texts, sequences=3, length=6, seed=5, copying=False)
    drawn = random_repeats(model, 6, 3, 5)
    run = model.run(drawn, read=S.pattern)
    for layer in range(model.n_layers):
        a = run[S.pattern[layer]].plain
        second = torch.arange(6, 12)
        close(found.random[2, layer], a[:, :, second, second - 5].mean((0, -1)), model)
        close(found.random[1, layer], a[:, :, second, second - 6].mean((0, -1)), model)
    own = model.run(texts[0], read=S.pattern[2])[S.pattern[2]].plain[0]
    ids = model.tokens(texts[0]).ids[0].tolist()
    pairs = [(i, j + 1) for i in range(len(ids)) for j in range(i) if ids[i] == ids[j]]
    assert len(pairs) == 2
    close(found.prompts[0, 2, 2], torch.stack([own[:, i, j] for i, j in pairs]).mean(0), model)
    assert found.prompts[2, 1:].isnan().all() and not found.prompts[0].isnan().any()  # " dog" repeats nothing
    assert found.chance[2] == pytest.approx(sum(1 / (i + 1) for i in range(6, 12)) / 6)
    for row, text in enumerate(texts):
        alone = detect(model, text, sequences=0, copying=False)
        close(found.prompts[row].nan_to_num(), alone.prompts[0].nan_to_num(), model)


def test_random_tokens() -> None:
    model = toy_model()
    drawn = random_repeats(model, 20, 4, 1)
    assert torch.equal(drawn.ids, random_repeats(model, 20, 4, 1).ids)
    assert not torch.equal(drawn.ids, random_repeats(model, 20, 4, 2).ids)
    assert torch.equal(drawn.ids[:, :20], drawn.ids[:, 20:]) and drawn.ids.shape == (4, 40)
    assert all(len(set(row[:20].tolist())) == 20 for row in drawn.ids)
    assert not set(drawn.ids.flatten().tolist()) & set(model.tokenizer.all_special_ids)
    plain = random_repeats(tiny_model("llama"), 90, 1)
    assert plain.ids.max() < tiny_model("llama").d_vocab


def test_the_toys_induction_heads() -> None:
    """The toy continues repeated words by heads of layer 2, which read what heads of layer 1 say came before; with them
    gone it no longer does."""
    model = toy_model()
    found = detect(model, " moon tree dog moon tree", sequences=10, length=12)
    assert (found.random[2, 2] > 0.8).all() and (found.random[2, [0, 1, 4, 5]] < 0.2).all()
    assert found.random[0, 1, :2].min() > 0.9 and (found.copying[2] > 0.7).all()
    assert "induction: z[2," in found.finding and "previous: z[1," in found.finding
    dog = int(model.tokens(" dog", bos=False).ids)
    text = " moon tree dog moon tree"
    gone = model.run(text, edits=S.z[2].zero(), logits=-1).logits.softmax(-1)[0, dog]
    assert model.run(text, logits=-1).logits.softmax(-1)[0, dog] > 0.9 > 0.5 > gone


def test_windows_that_are_too_small_are_no_zeros() -> None:
    model = tiny_model("gemma2")
    window = model.hf.config.sliding_window
    kinds = model.hf.config.layer_types
    assert window < 12 and len(set(kinds)) == 2
    found = detect(model, sequences=2, length=window + 4, copying=False)
    for layer, kind in enumerate(kinds):
        hidden = kind == "sliding_attention"
        assert bool(found.random[1:, layer].isnan().all()) == hidden and not found.random[0, layer].isnan().any()
        assert (f"induction, layer {layer}" in found.unmeasured) == hidden
    near = detect(model, sequences=2, length=window - 1, copying=False)
    assert not near.random.isnan().any() and not near.unmeasured


def llama(**config: Any) -> Any:
    hf = testing.tiny("llama", tie_word_embeddings=True, num_key_value_heads=4, **config)
    for layer in hf.model.layers:
        torch.nn.init.ones_(layer.input_layernorm.weight)
    torch.nn.init.ones_(hf.model.norm.weight)
    return hf


@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_that_copies_by_construction(sign: int) -> None:
    """W_O = ± W_Vᵀ and tied embeddings: the matrix of tokens is positive, or negative, semidefinite."""
    hf = llama()
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight.data = sign * layer.self_attn.v_proj.weight.data.T.clone()
    found = detect(ic.load(hf), sequences=0)
    torch.testing.assert_close(found.copying, torch.full_like(found.copying, sign), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("folded", [True, False])
def test_copying_is_that_of_the_whole_matrix(family: str, folded: bool) -> None:
    """[d_vocab d_vocab], with gains and centring written out; grouped heads read their group's values."""
    model = tiny_model(family, torch.float64)
    found = detect(model, sequences=0, folded=folded)
    d = model.d_model
    take = torch.eye(d).double() - (1 / d if family == "gpt2" else 0)
    embed, unembed = model.weights(S.embed), model.weights(S.logits)
    for layer in range(model.n_layers):
        first, last, post = (torch.eye(d).double() for _ in range(3))
        if folded:
            first, last = (take @ torch.diag(model.weights(site)) for site in (S.attn_in[layer], S.final_norm))
            post = torch.diag(model.weights(S.attn_out[layer])) if family == "gemma2" else post
        for head in range(model.n_heads):
            v = model.weights(S.v[layer])[head // (model.n_heads // model.n_kv_heads)]
            whole = embed @ first @ v @ model.weights(S.z[layer, head]) @ post @ last @ unembed
            eigenvalues = torch.linalg.eigvals(whole)
            wanted = eigenvalues.real.sum() / eigenvalues.abs().sum()
            # the many eigenvalues that are 0 come out as rounding, which the square root of it stands for
            assert float(found.copying[layer, head]) == pytest.approx(float(wanted), abs=1e-4), (layer, head)


def test_effective_embeddings() -> None:
    """Those of layers above the first, with what the first MLP adds."""
    model = toy_model()
    both = [detect(model, " dog", sequences=0, embeddings=kind) for kind in ("token", "effective")]
    assert torch.equal(both[0].copying[0], both[1].copying[0])
    embed = model.weights(S.embed)
    block = model.hf.model.layers[0]
    with torch.no_grad():
        effective = embed + block.mlp(block.post_attention_layernorm(embed))
    last = model.weights(S.final_norm)[:, None] * model.weights(S.logits)
    v = model.weights(S.attn_in[3])[:, None] * model.weights(S.v[3])[1]
    eigenvalues = torch.linalg.eigvals((model.weights(S.z[3, 2]) @ last @ effective @ v).double())
    wanted = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
    assert float(both[1].copying[3, 2]) == pytest.approx(wanted, abs=1e-4)


def test_what_has_no_such_weights_says_why() -> None:
    found = detect(tiny_model("deepseek_v3"), sequences=0)
    assert found.copying.isnan().all() and "one linear map" in found.unmeasured["copying, layer 1"]
    assert "one linear map" in found.details()["Not measured"]


@pytest.mark.usefixtures("rough_figures")
def test_many_prompts_pages_and_files(tmp_path: Path) -> None:
    model = toy_model()
    texts = ["Q: big\nA: small\n\nQ: big\nA:", " moon tree moon", "Q: wet\nA:"]
    whole, parts = (detect(model, texts, sequences=2, length=8, **how) for how in ({}, {"batch_size": 2}))
    close(parts.prompts.nan_to_num(), whole.prompts.nan_to_num(), model)
    assert torch.equal(parts.random, whole.random) and torch.equal(parts.copying, whole.copying)
    titles = [chart.title for chart in whole.charts()]
    assert (
        titles[0] == "How far each head attends to the token before, on random tokens" and "by its weights" in titles[3]
    )
    assert len(titles) == 4 and whole.png(tmp_path / "map.png").stat().st_size > 1_000
    page = whole.to_html(tmp_path / "page.html").read_text()
    assert "Heads with the highest scores on 16 random tokens" in page and "Scores of even attention" in page
    assert type(whole).load(whole.save(tmp_path / "saved")) == whole and len(whole.table()) == 24
    assert "on prompts, in the mean of 3 prompts" in detect(model, texts, sequences=0, copying=False).finding


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
def test_it_passes_the_kit(family: str) -> None:
    settings = {"sequences": 2, "length": 5}
    testing.check_method("head_detectors", tiny_model(family), settings=settings).raise_if_failed()


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"length": 5000}, "length=5000 different tokens of"),
        ({"bos": True}, "this tokenizer has no BOS"),
        ({"sequences": -1}, "sequences"),
        ({"score": "dot"}, "score"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            detect(model, " dog", **settings)
