"""Vocabulary, induction, attention between slots, published files, templates, number of heads, natural text."""

from __future__ import annotations

import pickle
from pathlib import Path

import fv_golden as golden
import pytest
import torch
from conftest import tiny_model, toy_model
from fv_golden import FAMILIES
from interp_plugins.function_vectors import studies
from interp_plugins.function_vectors.effects import top_heads
from interp_plugins.function_vectors.evaluate import evaluate, questions
from interp_plugins.function_vectors.files.published import read_effects, read_means, read_vector
from interp_plugins.function_vectors.induction import prefix_matching, slot_attention
from interp_plugins.function_vectors.means import mean_layer_activations
from interp_plugins.function_vectors.tasks import Pair, Task
from interp_plugins.function_vectors.template import PREFIXES, SEPARATORS, Template
from interp_plugins.function_vectors.trials import legacy_trials
from interp_plugins.function_vectors.vectors import FunctionVector, function_vector
from interp_plugins.function_vectors.vocab import decoded, reconstructed, words
from safetensors.torch import load_file

import interp_core as ic


@pytest.mark.parametrize("family", FAMILIES)
def test_vocabulary(family: str) -> None:
    """Words and probabilities as published, of the vector (Llama only, there) and of a corrupted prompt's answer."""
    model, table = golden.model(family), golden.table(family, "vocab")
    probabilities = torch.softmax(golden.tensors(family)["inject_corrupted_clean_logits"][0], -1)
    found = [[(words(model, probabilities, 5), 5), table["decode_to_vocab_clean_trial0"]]]
    if "fv_to_vocab" in table:
        found.append([(words(model, decoded(model, golden.vector(family))), 4), table["fv_to_vocab"]])
    for (rows, digits), wanted in found:
        assert [word.strip() for word, _ in rows] == [word.strip() for word, _ in wanted]
        assert [p for _, p in rows] == pytest.approx([p for _, p in wanted], abs=0.6 * 10**-digits)


def test_reconstruction() -> None:
    """It decodes as the vector does, has its length, and is another vector."""
    model, vector = golden.model("tiny-llama3-8b"), golden.vector("tiny-llama3-8b")
    made = reconstructed(model, vector, top=100, steps=300)
    assert made.vector.norm == pytest.approx(vector.norm, rel=1e-5) and made.kl < 0.02
    start = reconstructed(model, vector, steps=1)
    assert start.kl > 10 * made.kl and abs(start.cosine) < 0.4 < made.cosine < 0.9999
    assert [w for w, _ in words(model, decoded(model, made.vector), 3)] == [
        w for w, _ in words(model, decoded(model, vector), 3)
    ]
    assert torch.equal(
        reconstructed(model, vector, steps=3).vector.vector, reconstructed(model, vector, steps=3).vector.vector
    )
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    whole = reconstructed(model, vector, top=None, steps=300)
    assert whole.kl < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_matching(family: str) -> None:
    found = prefix_matching(golden.model(family), length=50, ids=(10, 1400))
    torch.testing.assert_close(found.T, golden.tensors(family)["prefix_matching_score"], atol=1e-6, rtol=0)


def test_induction_heads_of_the_toy() -> None:
    """The toy repeats sequences: some heads look at what came next, more than ten times as much as the median head."""
    found = prefix_matching(toy_model(), length=40).flatten()
    assert found.max() > 0.3 and found.max() > 10 * found.median()
    with pytest.raises(ic.PlanError, match="ids 0 to 9999 are not those of a vocabulary of 1469"):
        prefix_matching(toy_model(), ids=(0, 9999))
    hybrid = prefix_matching(tiny_model("qwen3_next"), length=5)
    assert hybrid[0].isnan().all() and not hybrid[1:].isnan().any()


@pytest.mark.parametrize("family", ["gpt2-xl", "tiny-llama2-7b"])
def test_attention_between_slots(family: str) -> None:
    model, wanted = golden.model(family), load_file(golden.FOLDER / family / "attention.safetensors")
    trial = legacy_trials(golden.task(), model.tokenizer, n_shots=2, seed=0, shuffle=False, queries=[0])[0]
    found = slot_attention(model, [trial.clean])
    torch.testing.assert_close(found.pattern, wanted["slot_attention"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.weighted, wanted["slot_attention_weighted"], atol=5e-5, rtol=0)


def test_attention_between_slots_with_grouped_queries() -> None:
    """Which the published code cannot; all that a query sees is somewhere, so rows sum to one."""
    family = "tiny-llama3-8b"
    found = slot_attention(golden.model(family), golden.prompts(family, "clean")[:1])
    assert found.pattern.shape == found.weighted.shape == (1, 4, 8, 87, 87)
    torch.testing.assert_close(found.pattern.sum(-1), torch.ones(1, 4, 8, 87), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_files(family: str) -> None:
    model, folder = golden.model(family), golden.FOLDER / family
    assert read_means(folder / "antonym_mean_head_activations_FIXED.pt", model).shape[:2] == (4, 8)
    assert read_effects(folder / "antonym_indirect_effect.pt", model).shape == (10, 4, 8)
    assert read_effects(folder / "antonym_indirect_effect_all_classes.pt", model).shape == (3, 4, 8, 10)
    vector = read_vector(folder / "src_fv.pt", model, task="antonym")
    assert vector.vector.shape == (128,) and vector.task == "antonym"


def test_files_of_others_and_axes_that_were_dropped(tmp_path: Path) -> None:
    model, path = golden.model("gpt2-xl"), tmp_path / "x.pt"
    torch.save(torch.arange(32.0).reshape(4, 8), path)  # one trial: the published code squeezes it away
    assert torch.equal(read_effects(path, model), torch.arange(32.0).reshape(1, 4, 8))
    torch.save(torch.zeros(3, 8, 4), path)
    for read, message in (
        (lambda: read_effects(path, model), r"holds \[3, 8, 4\]; effects of this model are \[trial, layer 4, head 8\]"),
        (lambda: read_means(path, model), r"holds \[3, 8, 4\]; means of this model are"),
        (lambda: read_vector(path, model), r"holds \[3, 8, 4\], the residual stream has 128"),
        (lambda: read_means(tmp_path / "none.pt", model), "there is no file"),
    ):
        with pytest.raises(ic.LoadError, match=message):
            read()
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ic.LoadError, match="holds a dict, not a tensor of numbers"):
        read_means(path, model)
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ic.LoadError, match="cannot be read as a tensor"):
        read_means(path, model)


PAIRS = (
    ("big", "small"), ("hot", "cold"), ("wet", "dry"), ("old", "young"), ("rich", "poor"), ("fast", "slow"),
    ("hard", "soft"), ("dark", "light"), ("full", "empty"), ("high", "low"), ("early", "late"), ("clean", "dirty"),
    ("strong", "weak"), ("happy", "sad"),
)  # fmt: skip


def few() -> Task:
    return Task.of("antonym", [Pair(*pair) for pair in PAIRS])


def test_templates() -> None:
    drawn = studies.templates(20, seed=1)
    assert len(drawn) == len(set(drawn)) == 20 and drawn == studies.templates(20, seed=1) != studies.templates(20)
    assert len(set(studies.templates(len(PREFIXES) * len(SEPARATORS)))) == 120
    with pytest.raises(ic.PlanError, match="121 templates; there are 120"):
        studies.templates(121)


def test_portability() -> None:
    """Under the template that the toy knows it answers; rows are what evaluations give."""
    model, control = toy_model(), FunctionVector(torch.zeros(128) + 1e-3, task="nothing")
    over = [Template(), Template({"input": "x:", "output": "y:"}, {"input": "\n", "output": "\n\n"})]
    found = studies.portability(model, few(), control, 2, over=over, shots=4)
    assert [row["template"] for row in found] == [str(template) for template in over]
    assert found[0]["few-shot"] >= 0.5 and found[0]["questions"] >= 1
    made = questions(few(), model.tokenizer, shots=4, template=over[1])
    assert found[1]["few-shot"] == evaluate(model, made).accuracy()
    assert found[0]["zero-shot"] == found[0]["zero-shot + vector"]  # a vector of no length moves nothing
    every = studies.portability(model, few(), control, 2, over=over[1:], shots=4, filtered=False)
    assert every[0]["questions"] == len(few().test)


def test_number_of_heads() -> None:
    """One sweep over vectors of k heads equals an evaluation of each."""
    family = "tiny-llama2-7b"
    model, mean, aie = golden.model(family), golden.tensors(family)["mean"], golden.tensors(family)["aie"]
    prompts = questions(golden.task(), model.tokenizer, rows=range(4))
    found = studies.heads_curve(model, mean, aie, prompts, 1, counts=(0, 1, 5, 10, 99))
    assert [row["heads"] for row in found] == [0, 1, 5, 10]
    for row in found[1:]:
        vector = function_vector(model, mean, top_heads(aie, row["heads"]))
        assert row["norm"] == pytest.approx(vector.norm)
        assert row["accuracy"] == evaluate(model, prompts, vector, layers=[1]).accuracies()[0]
    assert found[0]["norm"] == 0 and found[0]["accuracy"] == evaluate(model, prompts).accuracy()


def test_mean_hidden_state_baseline() -> None:
    family = "gpt2-xl"
    model = golden.model(family)
    prompts = questions(golden.task(), model.tokenizer, rows=range(2))
    means = mean_layer_activations(model, golden.prompts(family, "clean")[:2])
    found = studies.hidden_state_baseline(model, prompts, means, "antonym")
    assert found.rank is not None and found.rank.shape == (4, 2)
    alone = evaluate(model, prompts, FunctionVector(means[2]), layers=[2])
    assert torch.equal(found.rank[2:3], alone.rank)


def test_natural_text() -> None:
    model = toy_model()
    vector = FunctionVector(1000 * torch.randn(128, generator=torch.Generator().manual_seed(0)), task="noise")
    rows = studies.natural_text(model, [Pair("hot", "cold")], vector, 2, texts=["Q: wet\nA: dry\n\nQ: {}\nA:", "Q: {}"])
    assert [row["text"] for row in rows] == ["Q: wet\nA: dry\n\nQ: hot\nA:", "Q: hot"]
    assert rows[0]["plain hit"] and not rows[0]["hit"] and "cold" in rows[0]["plain"]
    with pytest.raises(ic.PlanError, match="has no {} for the input"):
        studies.natural_text(model, [], vector, 2, texts=["Q:"])
