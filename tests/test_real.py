"""What must hold on a real language model, SmolLM2-135M-Instruct: engines, generation, chat, sweeps, and known facts.

`make real` gets the model and runs this; so does `pytest -m real` once it is there.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import the_real_model
from tolerances import agreeing, close, rounding
from torch import Tensor

import interp_core as ic
from interp_core import real, score
from interp_core import sites as S
from interp_core.toys.text import relations

pytestmark = pytest.mark.real

STORE = "When Mary and John went to the store, {} gave a drink to"
CLEAN, SWAPPED = STORE.format("John"), STORE.format("Mary")
MARY, JOHN = 5099, 2322


@pytest.fixture
def model() -> ic.Model:
    return the_real_model()


@cache
def clean_run() -> ic.Run:
    return the_real_model().run(CLEAN)


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def test_what_it_is(model: ic.Model) -> None:
    assert model.check is not None and model.check.ok
    assert (model.n_layers, len(model.heads), model.hf.config.num_key_value_heads) == (30, 270, 3)
    assert model.hf.config.hidden_size == 576 and model.hf.config.max_position_embeddings == 8192
    assert model.dtype == torch.float32 and len(model.tokenizer) == 49152
    assert [model.tokenizer.decode([i]) for i in model.tokenizer("In 2024 it's")["input_ids"]] == [
        "In", " ", "2", "0", "2", "4", " it", "'s"
    ]  # fmt: skip
    assert model.tokenizer(" Mary")["input_ids"] == [MARY] and model.tokenizer(" John")["input_ids"] == [JOHN]


def test_its_weights_are_stored_in_half(model: ic.Model) -> None:
    """What `load` gives in float32 are the stored numbers, and `dtype=` gives these."""
    from safetensors import safe_open

    with safe_open(Path(ic.testing.real_model()) / "model.safetensors", "pt") as file:
        for name in ("model.embed_tokens.weight", "model.layers.29.mlp.down_proj.weight"):
            stored = file.get_tensor(name)
            assert stored.dtype == torch.float16 and torch.equal(stored.float(), model.hf.get_parameter(name))
            assert stored.isfinite().all()
    origin = json.loads((Path(ic.testing.real_model()) / "origin.json").read_text())
    assert origin["package"] == real.PACKAGE
    assert ic.load(ic.testing.real_model(), dtype="float16", check=False).dtype == torch.float16


# Engines

READS = [S.resid_post, S.z, S.attn_out, S.mlp_out, S.q[12], S.k[12], S.v[29], S.pattern[23], S.rot_q[3], S.mlp_act[7]]
EDITS = [S.z[23, 3].at(-1).zero(), S.resid_post[10].at(-1).scale(1.5), S.mlp_out[5].at(2).scale(0.5)]


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_engines_agree(model: ic.Model, engine: str) -> None:
    other = model.on(engine)
    assert other.check is not None and other.check.ok
    mine, theirs = (m.run(CLEAN, read=READS, edits=EDITS) for m in (model, other))
    assert (plain(mine.logits) - plain(clean_run().logits)).abs().max() > 1
    for site in READS:
        for one in [site] if site.layers is not None else [site[layer] for layer in range(30)]:
            value = plain(mine[one])
            close(theirs[one], value, model, size=value.abs().max())
    close(theirs.logits, mine.logits, model)
    assert [r.fired for r in theirs.receipts] == [r.fired for r in mine.receipts] == [1, 1, 1]


# Text


def test_generation_is_that_of_transformers(model: ic.Model) -> None:
    """Greedy, one text and a padded batch."""
    chat = model.chat([{"role": "user", "content": "What is the capital of France?"}])
    made = model.generate(chat, max_new_tokens=16)
    assert made.texts == ["The capital of France is Paris."]
    tokens = model.tokens(["The three primary colors are", "Once upon a time, in a small village by the sea,"])
    made = model.generate(tokens, max_new_tokens=10)
    for row, text in enumerate(tokens.texts):
        ids = model.tokenizer(text, return_tensors="pt")
        theirs = model.hf.generate(
            **ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = torch.cat(theirs.logits)
        new = theirs.sequences[0, ids["input_ids"].shape[1] :]
        assert len(new) == 10 and agreeing(made.ids[row], new, logits, rounding(model)) >= 4


def test_spans_of_a_conversation(model: ic.Model) -> None:
    """Its own template, which puts a system message in front that nobody wrote."""
    said = [
        ("user", "What is the user's name?"),
        ("assistant", "The user's name is Ada."),
        ("user", "Thanks. Why 'Ada'?"),
    ]
    tokens = model.chat([{"role": role, "content": content} for role, content in said])
    ids = tokens.ids[0]
    assert model.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    for i, (_, content) in enumerate(said):
        (span,) = tokens.spans[f"message_{i}"][0]
        assert model.tokenizer.decode(ids[span.start : span.stop]) == content
    assert [len(tokens.spans[role][0]) for role in ("user", "assistant")] == [2, 1]
    read = model.run(tokens, read=S.resid_post[3])[S.resid_post[3]]
    (span,) = tokens.spans["assistant"][0]
    assert torch.equal(plain(read.at("assistant")), plain(read)[:, span.start : span.stop])


# Sweeps


def test_a_sweep_is_a_loop(model: ic.Model) -> None:
    """All heads, the first time (with the trial of the strategy) and again; every 45th by a run of its own."""
    variants = [S.z[layer, head].at(-1).zero() for layer, head in model.heads]
    judged = score.logit_diff(MARY, JOHN)
    cold, warm = (model.sweep(CLEAN, variants, judged) for _ in range(2))
    assert "staircase" in cold.plan.explain() and torch.equal(cold.values, warm.values)
    for i in range(0, len(variants), 45):
        logits = plain(model.run(CLEAN, edits=variants[i]).logits)[0, -1]
        close(warm.values[i, 0].squeeze(), logits[MARY] - logits[JOHN], model, size=logits.abs().max())


# Facts


def test_paris_appears_in_the_last_layers(model: ic.Model) -> None:
    lens = ic.method("logit_lens")(model, "The capital of France is", at=-1, top_k=1)
    tops = [words[-1] for words in lens.tops()]
    assert tops[-1] == " Paris" and tops.index(" Paris") >= 28
    ranks = lens.target_rank[0, :, -1].tolist()
    assert ranks[-1] == 0 and min(ranks[:15]) > 100


def test_heads_that_tell_who_is_given_the_drink(model: ic.Model) -> None:
    heads = ic.method("activation_patching")(model, CLEAN, corrupted=SWAPPED)
    effects = heads.mean.flatten()
    assert len(effects) == 270
    largest = {divmod(i, 9): float(effects[i]) for i in effects.abs().topk(5).indices.tolist()}
    known = {(23, 3): 0.551, (29, 1): 0.265, (24, 4): -0.228, (29, 0): -0.203, (20, 0): 0.203}
    assert largest == pytest.approx(known, abs=2e-3)


def test_antonyms_are_answered_from_shots(model: ic.Model) -> None:
    pairs = list(relations()["antonym"].items())
    rng, texts = random.Random(0), []
    for word, _ in pairs[:24]:
        shots = rng.sample([pair for pair in pairs if word not in pair], 5)
        texts.append("".join(f"The opposite of {x} is {y}.\n" for x, y in shots) + f"The opposite of {word} is")
    made = model.generate(texts, max_new_tokens=1)
    right = sum(text.strip() == opposite for text, (_, opposite) in zip(made.texts, pairs[:24], strict=True))
    assert right >= 16, right


def test_a_function_vector_makes_it_answer_without_shots(model: ic.Model) -> None:
    """Seven of nine held-out antonyms by the vector added after layer 15; none without, and none after layer 0."""
    settings = {"task": list(relations()["antonym"].items()), "trials": 6, "layers": [0, 15], "questions": 9}
    found = ic.method("function_vectors")(model, "Q: wet\nA:", **settings)
    assert found.heads[0][:2] == (20, 5)
    answers = found.evaluations["zero-shot"]
    assert answers.accuracy() == answers.accuracies()[0] == 0 and answers.accuracies()[1] >= 0.5
    assert found.vocab[str(int(found.top_ids[0, 2, 0]))] == " dry" != found.vocab[str(int(found.top_ids[0, 0, 0]))]
