"""Steering vectors: a planted direction comes back, differences are those of runs, and steering does what controls do not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.steering_effects import steering_effects
from interp_plugins.steering_vectors import after_end, direction
from studying import IDS, OTHER, tokens
from tolerances import close
from torch.nn.functional import cosine_similarity

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S
from interp_core.toys.text import relations

ANTONYMS, FRENCH = (dict(relations()[name]) for name in ("antonym", "french"))
WORDS = [word for word in ANTONYMS if word in FRENCH]


def steering(model: ic.Model, x: Any = None, **settings: Any) -> Any:
    if x is None:
        x, settings = tokens(IDS), {"negative": tokens(OTHER), **settings}
    return ic.method("steering_vectors")(model, x, **settings)


def asked(relation: dict[str, str], word: str, seed: int) -> str:
    """A word asked about after three examples of a relation."""
    shots = [shot for shot in random.Random(seed).sample(WORDS, 4) if shot != word][:3]
    return "".join(f"Q: {shot}\nA: {relation[shot]}\n\n" for shot in shots) + f"Q: {word}\nA:"


@pytest.fixture(scope="module")
def antonyms() -> Any:
    """From French to antonyms, of twelve words."""
    pairs = [[asked(relation, word, n) for n, word in enumerate(WORDS[:12])] for relation in (ANTONYMS, FRENCH)]
    return steering(toy_model(), pairs[0], negative=pairs[1], batch_size=5)


def planted(count: int = 24, noise: float = 0.02) -> tuple[ic.Model, ic.Tokens, ic.Tokens, torch.Tensor]:
    """A model in whose embedding token 40 + i is token 10 + i and a direction, as long in every pair but for a little, and
    noise: pairs of texts that end in these."""
    hf, g = testing.tiny("llama"), torch.Generator().manual_seed(3)
    table = hf.get_input_embeddings().weight.data
    d = table.shape[1]
    v = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    ids = torch.arange(count)
    table[40 + ids] = table[10 + ids] + v * (1 + 0.01 * torch.randn(count, 1, generator=g))
    table[40 + ids] += noise * torch.randn(count, d, generator=g)
    texts = [torch.stack([torch.full_like(ids, 5), torch.full_like(ids, 7), start + ids], 1) for start in (40, 10)]
    return ic.load(hf), tokens(texts[0]), tokens(texts[1]), v


def test_a_planted_direction_comes_back() -> None:
    """Uncentred; centring takes it out, since all pairs differ by it."""
    model, positive, negative, v = planted()
    found = steering(model, positive, negative=negative, site="resid_pre", layers=[0])
    cosine = {kind: float(cosine_similarity(found.vector(0, kind), v, 0)) for kind in ("svd", "mean", "pca")}
    assert cosine["svd"] > 0.999 and cosine["mean"] > 0.999 and abs(cosine["pca"]) < 0.6
    assert float(found.vector(0).norm()) == pytest.approx(1, abs=0.05)
    (row,) = found.table()
    assert row["explained"] > 0.9 and row["agree"] == 1
    assert row["cos(svd, pca)"] == pytest.approx(cosine["pca"], abs=0.05)
    back = steering(model, negative, negative=positive, site="resid_pre", layers=[0])
    torch.testing.assert_close(back.vector(0), -found.vector(0))


def test_pca_finds_what_differs_to_both_sides() -> None:
    """Where pairs differ by ± v, the mean loses it and both decompositions have it."""
    g = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(32, generator=g, dtype=torch.float64), dim=0)
    sides = torch.randn(40, 2, 32, generator=g, dtype=torch.float64) * 0.01
    sides[:, 0] += v * torch.tensor([3.0, -3.0, 3.0, 3.0]).repeat(10)[:, None]
    for kind in ("svd", "pca"):
        assert float(cosine_similarity(direction(sides, kind), v, 0)) > 0.999  # and turned to the majority's side
        assert float(direction(sides, kind).norm()) == pytest.approx(3, rel=1e-2)
    assert float(direction(sides, "mean").norm()) == pytest.approx(1.5, rel=1e-2)


def test_states_are_those_of_runs() -> None:
    model = tiny_model("gpt2")
    for site in ("resid_post", "resid_pre", "attn_out", "mlp_out"):
        found = steering(model, site=site, layers=[0, 2], at=3, kind="mean")
        for side, ids in enumerate((IDS, OTHER)):
            run = model.run(tokens(ids), read=S.named(site))
            for k, layer in enumerate((0, 2)):
                close(found.states[:, side, k], run[S.named(site)[layer]].plain[:, 3], model)
        close(found.vector(2), (found.states[:, 0, 1] - found.states[:, 1, 1]).mean(0), model)


def test_answers_are_put_behind_questions() -> None:
    """CAA: at the letter, the mean of differences."""
    model = toy_model()
    questions = ["Q: big\nA:", "Q: hot\nA: cold\n\nQ: old\nA:"]
    answers = [("(A)", "(B)"), ("(B)", "(A)")]
    found = steering(model, questions, answers=answers, kind="mean", batch_size=1)
    whole = [[q + pair[side] for q, pair in zip(questions, answers, strict=True)] for side in (0, 1)]
    by_texts = steering(model, whole[0], negative=whole[1], at=-2, kind="mean")
    close(found.states, by_texts.states, model)
    assert found.positive == tuple(whole[0]) and found.place == "the answers' letters"
    with pytest.raises(ic.PlanError, match=r"both answers to question 0 have '\)'"):
        steering(model, questions, answers=answers, at=-1)


def test_it_steers_and_controls_do_not(antonyms: Any) -> None:
    """French prompts of other words are answered by antonyms once the vector of layer 2 is added."""
    model, test = toy_model(), WORDS[12:20]
    prompts = [asked(FRENCH, word, 50 + n) for n, word in enumerate(test)]

    def right(edits: Any) -> int:
        made = model.generate(prompts, edits=edits, max_new_tokens=1)
        return sum(text.strip() == ANTONYMS[word] for text, word in zip(made.texts, test, strict=True))

    assert right(antonyms.edits(2, at=-1)) >= 7 and right([]) == 0
    for which in ("random", "orthogonal", "shuffled"):
        control = antonyms.control(2, which)
        assert float(control.norm()) == pytest.approx(float(antonyms.vector(2).norm()), rel=1e-4)
        assert right(antonyms.edits(2, at=-1, vector=control)) <= 1, which
    assert abs(float(antonyms.control(2, "orthogonal") @ antonyms.vector(2))) < 1e-2 * float(antonyms.vector(2).norm())
    assert right(antonyms.edits(2, at=-1, vector=antonyms.vector(2, "pca"))) <= 1  # nothing is left of it
    assert "most in common in layer 2" in antonyms.finding and "100% of the pairs" in antonyms.finding


def test_effects_are_those_of_runs(antonyms: Any, tmp_path: Path) -> None:
    model, words = toy_model(), WORDS[12:16]
    prompts = [asked(FRENCH, word, n) for n, word in enumerate(words)]
    neutral = [" moon tree dog moon tree dog", "Q: cat\nA: cats\n\nQ: dog\nA: dogs"]
    judged = score.logit_diff(*([f" {relation[word]}" for word in words] for relation in (ANTONYMS, FRENCH)))
    found = steering_effects(model, antonyms, 2, [0.5, 1, -1], prompts, judged, at=-1, neutral=neutral)
    on = judged.on(model, 4)
    clean = on(model.run(prompts, logits=-1))
    for k, multiplier in enumerate((0.5, 1, -1)):
        for i, vector in enumerate((antonyms.vector(2), antonyms.control(2, "random"))):
            edits = antonyms.edits(2, multiplier, -1, vector=vector)
            steered = on(model.run(prompts, edits=edits, logits=-1))
            close(found.effect[i, k], steered - clean, model, size=30)
    ids = model.tokens(neutral[1]).ids[0]
    logits = model.run(neutral[1], edits=antonyms.edits(2, 1)).logits[0, :-1].log_softmax(-1)
    close(found.nll[0, 1, 1], -logits.gather(-1, ids[1:, None]).mean(), model, size=10)
    means = found.effect[:, 1].mean(-1)
    assert means[0] > 3 * means[1:].abs().max() and len(found.charts()) == 2
    assert "the vector moves logit_diff by" in found.finding and "nats per token" in found.finding
    assert type(found).load(found.save(tmp_path)) == found and len(found.table()) == 9
    with pytest.raises(ic.PlanError, match="none of them 0"):
        steering_effects(model, antonyms, 2, [0, 1], prompts, judged)


def test_only_what_follows_the_instruction_is_steered(antonyms: Any) -> None:
    model = toy_model()
    texts = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: cat"]
    named, at = after_end(model.tokens(texts), "Q: hot")
    assert at == ("after_end", "generated") and named.spans["after_end"] == ((ic.Span(8, 10),), (ic.Span(0, 2),))
    kept, _ = after_end(model.tokens(texts), "Q: hot", with_end=True)
    assert kept.spans["after_end"][0] == (ic.Span(7, 10),)
    made = model.generate(named, edits=antonyms.edits([2, 3], 0.1, at), max_new_tokens=2, read=S.resid_post[2])
    clean = model.generate(named, max_new_tokens=2, read=S.resid_post[2])
    moved = (made.steps[0][S.resid_post[2]] - clean.steps[0][S.resid_post[2]]).norm(dim=-1) > 1e-3
    assert moved.tolist() == [[False] * 8 + [True] * 2] * 2
    assert len(made.receipts) == 4
    assert after_end(model.tokens("Q: big\nA:"), "A:")[1] == ("generated",)


def test_control_vectors_of_llama_cpp(antonyms: Any, tmp_path: Path) -> None:
    install = "control vectors are read back with gguf: pip install -c constraints.txt -e '.[test]'"
    reader = pytest.importorskip("gguf", reason=install).GGUFReader(
        antonyms.to_gguf(tmp_path / "out/antonyms.gguf", "qwen3")
    )
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert list(tensors) == [f"direction.{layer}" for layer in range(1, 6)]
    assert torch.equal(tensors["direction.2"], antonyms.vector(2))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "qwen3"
    with pytest.raises(ic.PlanError, match="llama.cpp adds control vectors to resid_post"):
        steering(tiny_model("gpt2"), site="attn_out").to_gguf(tmp_path / "other.gguf")


@pytest.mark.usefixtures("rough_figures")
def test_pages_and_files(antonyms: Any, tmp_path: Path) -> None:
    page = antonyms.to_html(tmp_path / "page.html").read_text()
    assert "12 pairs have most in common in layer 2" in page and "grand" not in antonyms.finding
    assert antonyms.png(tmp_path / "map.png").stat().st_size > 1_000
    again = type(antonyms).load(antonyms.save(tmp_path / "saved"))
    assert again == antonyms and torch.equal(again.vector(3), antonyms.vector(3))
    assert "cos(svd, pca)" in str(antonyms) and torch.equal(antonyms.vector(-1), antonyms.vector(5))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_it_passes_the_kit(family: str) -> None:
    settings = {"negative": tokens(OTHER[:1])}
    testing.check_method("steering_vectors", tiny_model(family), settings=settings).raise_if_failed()


def test_bad_input(antonyms: Any) -> None:
    model, texts = toy_model(), ["Q: big\nA:", "Q: hot\nA:"]
    for settings, message in (
        ({}, "needs pairs: give negative="),
        ({"negative": texts, "answers": [("(A)", "(B)")] * 2}, "needs pairs"),
        ({"negative": texts[:1]}, "1 prompts for 2"),
        ({"answers": [("(A)", "(B)")]}, "1 pairs for 2 questions"),
        ({"negative": texts, "at": [0, 1]}, "reads one position"),
        ({"negative": texts, "at": 40}, "no position 40"),
        ({"negative": texts, "layers": [9]}, "no layer 9"),
        ({"negative": texts, "kind": "lda"}, "kind"),
        ({"negative": texts, "site": "z"}, "site"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            steering(model, texts, **settings)
    for act, message in (
        (lambda: antonyms.vector(6), "no steering vector of layer 6"),
        (lambda: antonyms.vector(2, "lda"), "no kind of vector 'lda'"),
        (lambda: antonyms.control(2, "none"), "no control 'none'"),
        (
            lambda: steering(model, texts[:1], negative="Q: old\nA:").vector(1, "pca"),
            "of a single pair nothing is left",
        ),
    ):
        with pytest.raises(ic.PlanError, match=message):
            act()
