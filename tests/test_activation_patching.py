"""Activation patching finds what carries the toy's answer, and equals runs made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from studying import CLEAN, FRENCH, IDS, OTHER, judged, patched, study, tokens
from tolerances import close

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S


def patch(model: ic.Model, *x: Any, **settings: Any) -> Any:
    return study("activation_patching", model, *x, **settings)


def test_it_names_the_heads_that_carry_the_answer() -> None:
    found = patch(toy_model(), CLEAN, corrupted=FRENCH)
    assert found.effect.shape == (1, 6, 4, 1)
    best = found.mean.flatten().topk(2)
    assert {divmod(i, 4) for i in best.indices.tolist()} == {(2, 2), (2, 3)}
    assert best.values.sum() > 0.8
    assert "layer 2 head 2" in str(found).splitlines()[1] and "mean of" not in str(found)
    both = patch(toy_model(), [CLEAN, FRENCH], corrupted=[FRENCH, CLEAN])
    assert "in the mean of 2 prompts" in str(both).splitlines()[0] and "mean of 2" in both.charts()[0].html()


MAPS = [
    ("resid_pre", "each"), ("resid_mid", "each"), ("resid_post", "each"), ("attn_out", "each"), ("mlp_out", "each"),
    ("z", [-1, 2]), ("z", "each"), ("q", -1), ("v", "each"), ("rot_k", [1]), ("pattern", -1), ("pattern", "all"),
    ("scores", [4]), ("mlp_in", [[0, 3], -1]), ("z", "all"), ("head_out", -1), ("mlp_act", [[2, 4]]),
]  # fmt: skip


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(("site", "at"), MAPS, ids=str)
def test_every_map_equals_runs_by_hand(site: str, at: Any, direction: str) -> None:
    """Layers against positions, layers against heads, heads against positions; all places together."""
    model = tiny_model("llama", torch.float64)
    found = patch(model, site=site, at=at, direction=direction)
    base, source = (tokens(ids) for ids in ((IDS, OTHER) if direction == "noising" else (OTHER, IDS)))
    low, high = judged(model, base), judged(model, source)
    places = list(range(7)) if at == "each" else at if isinstance(at, list) else [at]
    heads: list[int | None] = [None] if S.named(site).info.unit is None else list(range(len(found.heads)))
    for layer, head, place in ((0, 0, 0), (1, len(heads) - 1, len(places) - 1), (2, len(heads) // 2, len(places) // 2)):
        wanted = patched(model, base, source, site, layer, heads[head], places[place])
        close(found.effect[:, layer, head, place], (wanted - low) / (high - low), model)
    close(found.base, low, model)
    close(found.source, high, model)
    assert found.effect.abs().max() > 1e-3
    assert (len(found.rows), len(found.columns)) == found.mean.shape


def test_the_stream_between_attention_and_mlp_needs_no_passes_of_its_own() -> None:
    found = patch(tiny_model("llama"), site="resid_mid", at="each")
    assert "0 with one" in found.explain and "staircase" in found.explain


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "granitemoe"])
def test_the_stream_and_its_parts_in_other_families(family: str) -> None:
    model = tiny_model(family, torch.float64)
    low, high = judged(model, tokens(OTHER)), judged(model, tokens(IDS))
    for site in ("resid_mid", "attn_out", "mlp_out"):
        if site in model.atlas.lacking:
            continue
        found = patch(model, site=site, at=[3])
        wanted = patched(model, tokens(OTHER), tokens(IDS), site, 1, None, 3)
        close(found.effect[:, 1, 0, 0], (wanted - low) / (high - low), model)


def test_sites_that_change_together_and_whole_layers() -> None:
    model = tiny_model("llama", torch.float64)
    both = patch(model, site=["attn_out", "mlp_out"], at=[-1, 2])
    run = model.run(tokens(IDS), read=[S.attn_out, S.mlp_out])
    edits = [site[1].at(2).set(run[site[1].at(2)].as_subclass(torch.Tensor)) for site in (S.attn_out, S.mlp_out)]
    low, high = both.base, both.source
    close(both.effect[:, 1, 0, 1], (judged(model, tokens(OTHER), edits) - low) / (high - low), model)
    assert both.site == "attn_out + mlp_out" and both.heads == ("-",)
    layers = patch(model, site="z", by="layer")
    attention = patch(model, site="attn_out")
    close(layers.effect, attention.effect, model)


def test_without_another_prompt_values_are_zero() -> None:
    model = tiny_model("qwen3")
    found = patch(model, tokens(IDS))
    answer = model.run(IDS, logits=-1).logits.as_subclass(torch.Tensor).argmax(-1)
    without = judged(model, tokens(IDS), S.z[1, 3].at(-1).zero(), score.logprob(answer))
    torch.testing.assert_close(found.effect[:, 1, 3, 0], without - found.base, atol=1e-5, rtol=1e-4)
    assert (found.kind, found.unit, found.score) == ("zero", "nats", "logprob") and torch.equal(found.answer, answer)
    mid = patch(model, tokens(IDS), site="resid_mid", at=[2])
    without = judged(model, tokens(IDS), S.resid_mid[1].at(2).zero(), score.logprob(answer))
    torch.testing.assert_close(mid.effect[:, 1, 0, 0], without - mid.base, atol=1e-5, rtol=1e-4)


def test_the_streams_at_one_layer_make_the_whole_difference() -> None:
    """At the last layer's output, the last position is all that is left; at the first input, all positions together."""
    model = toy_model()
    found = patch(model, CLEAN, corrupted=FRENCH, site="resid_post", layers=[5], at="each")
    assert float(found.mean[0, -1]) == pytest.approx(1, abs=1e-4)
    assert float(found.mean[0, :-1].abs().max()) < 1e-4
    whole = patch(model, CLEAN, corrupted=FRENCH, site="resid_pre", layers=[0], at="all")
    assert float(whole.mean) == pytest.approx(1, abs=1e-5)


def test_what_is_the_same_in_both_prompts_has_no_effect() -> None:
    """Nought, not rounding, where values are the same to the bit."""
    found = patch(toy_model(), CLEAN, corrupted=FRENCH, site="resid_pre", at="each")
    assert not found.effect[:, 0, :, :4].any() and found.effect[:, :3, :, 4].all()
    assert found.effect[..., :4].abs().max() < 1e-6


def test_other_scores() -> None:
    model = tiny_model("llama", torch.float64)
    targets = torch.tensor([3, 7])
    for name in ("logprob", "probability", "logit"):
        by = getattr(score, name)(targets)
        found = patch(model, score=name)
        low, high = (judged(model, tokens(ids), by=by) for ids in (OTHER, IDS))
        value = model.run(IDS, read=S.z[1, 2].at(-1))[S.z[1, 2].at(-1)].as_subclass(torch.Tensor)
        changed = judged(model, tokens(OTHER), S.z[1, 2].at(-1).set(value), by)
        close(found.effect[:, 1, 2, 0], (changed - low) / (high - low), model)
    inner = score.projection(S.resid_post[1].at(-1), torch.linspace(-1, 1, 64, dtype=torch.float64))
    found = patch(model, score=inner, layers=[0, 1])
    values = [model.run(ids, read=inner.of)[inner.of].as_subclass(torch.Tensor) for ids in (OTHER, IDS)]
    close(torch.stack([found.base, found.source]), torch.stack([inner.rows(x) for x in values]), model)
    own = score.Score("norm", lambda x: x.norm(dim=-1), at=4)
    found = patch(model, score=own, at=2)
    low, high = (judged(model, tokens(ids), by=own) for ids in (OTHER, IDS))
    close(torch.stack([found.base, found.source]), torch.stack([low, high]), model)
    assert found.answer is None and found.score == "norm"


def test_answers_are_ids_or_words() -> None:
    words = patch(toy_model(), CLEAN, corrupted=FRENCH, answer=" dry", other=[" wet"])
    assert [toy_model().word(int(ids[0])) for ids in (words.answer, words.other)] == [" dry", " wet"]
    ids = patch(toy_model(), CLEAN, corrupted=FRENCH, answer=words.answer.tolist(), other=int(words.other[0]))
    assert ids == words


def test_one_corrupted_prompt_serves_all_rows() -> None:
    model = tiny_model("llama", torch.float64)
    found = patch(model, corrupted=tokens(OTHER[:1]))
    each = patch(model, corrupted=tokens(OTHER[[0, 0]]))
    assert torch.equal(found.effect, each.effect)


def test_named_positions_and_padding() -> None:
    """A named span is one patch; rows of other lengths are patched where all have the position."""
    model = toy_model()
    named = model.tokens(CLEAN).name(shots=["small"])
    found = patch(model, named, corrupted=FRENCH, site="resid_pre", at=["shots", -1], layers=[0, 3])
    one = patch(model, CLEAN, corrupted=FRENCH, site="resid_pre", at=[4], layers=[0, 3])
    torch.testing.assert_close(found.effect[..., 0], one.effect[..., 0])
    assert found.places == ("shots", "-1 A:")
    short = [CLEAN, "Q: big\nA: small\n\nQ: wet\nA:"]
    padded = patch(model, short, corrupted=[FRENCH, "Q: big\nA: grand\n\nQ: wet\nA:"], site="z", at=-1)
    torch.testing.assert_close(padded.effect[:1], patch(model, CLEAN, corrupted=FRENCH).effect, atol=1e-4, rtol=1e-3)


def test_other_engines_give_the_same() -> None:
    hf = testing.tiny("llama")
    both = [patch(ic.load(hf, engine=engine), site="attn_out", at=[2, -1]) for engine in ("torch", "nnsight")]
    torch.testing.assert_close(both[0].effect, both[1].effect, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["toy:text", "gpt2", "llama", "qwen3_moe"])
def test_it_passes_the_kit(family: str) -> None:
    model = toy_model() if ":" in family else tiny_model(family)
    other = "Q: dog\nA: cats\n\nQ: hot\nA:" if ":" in family else tokens(OTHER[:1])
    for settings in ({}, {"corrupted": other}, {"corrupted": other, "site": "resid_pre", "at": "each"}):
        testing.check_method("activation_patching", model, settings=settings).raise_if_failed()


def test_pictures_and_pages(tmp_path: Path) -> None:
    found = patch(toy_model(), CLEAN, corrupted=FRENCH, site="resid_pre", at="each")
    assert found.png(tmp_path / "map.png").stat().st_size > 10_000
    page = found.to_html(tmp_path / "map.html").read_text()
    assert (
        "layer 5" in page and "token-layers" in page and "% share of the difference<br>denoising of resid_pre" in page
    )
    assert 'data-tip="layer 3, 15 A:: 98.9%"' in page and ">99%<" in page
    assert type(found).load(found.save(tmp_path)) == found
    assert len(found.table()) == 6 * 16
    both = patch(toy_model(), CLEAN, corrupted=FRENCH, at="each", layers=[1, 2])
    assert both.rows[5] == "layer 2 head 1" and both.columns[4] == "4 ·small" and both.mean.shape == (8, 16)
    assert float(both.mean[6, 15]) == float(both.effect[0, 1, 2, 15])


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"corrupted": FRENCH[:20]}, r"the prompts have \[16\] tokens, the corrupted ones"),
        ({"corrupted": CLEAN}, "row 0 has the answer ' dry' for both prompts"),
        ({"corrupted": CLEAN, "answer": 3, "other": 5}, "both prompts of row 0 have the logit_diff .* no difference"),
        ({"corrupted": FRENCH, "score": score.kl()}, "compares with the run without edits; method ablations"),
        ({"site": "zz"}, "no site is called 'zz'. Did you mean 'z'"),
        ({"site": []}, "names nothing"),
        ({"site": "embed"}, "takes sites of a layer along pos"),
        ({"site": ["z", "mlp_out"]}, "need the same heads, here z 4, mlp_out 1; by='layer'"),
        ({"site": "router_logits"}, "has no mixture-of-experts router"),
        ({"layers": [9]}, "no layer 9"),
        ({"answer": [1, 2]}, "2 answers for 1 rows"),
        ({"answer": 5000}, "the answer 5000 is no token id: the model has 1469"),
        ({"answer": " dry wet"}, r"is 2 tokens \(' dry', ' wet'\)"),
        ({"at": 40}, "no position 40"),
        ({"at": []}, "selects nothing"),
        ({"at": "ech"}, "no positions called 'ech'"),
        ({"direction": "sideways"}, "direction"),
        ({"by": "gradient"}, "'head' or 'layer'"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            patch(model, CLEAN, **settings)
    rows = [CLEAN, CLEAN[:30]]
    for settings, message in (
        ({"at": "each"}, "choose positions that all have"),
        ({"at": "all"}, "the rows have .* positions; run them one by one"),
        ({"site": "pattern"}, "attention of padded rows"),
    ):
        with pytest.raises(ic.PlanError, match=message):
            patch(model, rows, **settings)


def test_what_is_asked_wrongly_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are judged before the model runs."""
    model = tiny_model("qwen3_moe")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "run", never)
    for settings in (
        {"answer": 900}, {"answer": [1, 2, 3]}, {"at": 40}, {"at": "each", "layers": [7]}, {"score": score.kl()},
        {"site": ["mlp_act", "router_logits"]}, {"corrupted": tokens(OTHER[:, :4])},
    ):  # fmt: skip
        with pytest.raises(ic.InterpError):
            patch(model, tokens(IDS), **settings)
