"""The method `probe`: places of prompts, states as a run reads them, image modes, batches, files, pages, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from conftest import tiny_model
from interp_plugins.probe.method import read_states, states_of
from interp_plugins.probe.places import columns_of
from interp_plugins.probe.result import ProbeResult

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

WORDS = ("big", "hot", "old", "wet", "small", "cold", "young", "dry")


def questions(n: int = 60) -> tuple[list[str], list[bool]]:
    """Questions of toy:text, and whether the last word is one of the first four."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 8, (n, 3))
    return [f"Q: {WORDS[a]}\nA: {WORDS[b]}\n\nQ: {WORDS[c]}\nA:" for a, b, c in words], (words[:, 2] < 4).tolist()


def test_texts_and_their_labels(toy: ic.Model, tmp_path: Path) -> None:
    """The word before last can be told at the last token once attention has moved it there; joined from batches, too."""
    texts, labels = questions()
    probe = ic.method("probe")
    settings = {"labels": labels, "questions": texts, "repeats": 1, "shuffles": 20}
    result: ProbeResult = probe(toy, texts, **settings)
    assert result.positions == ("answer_token",) and result.states.shape == (60, 1, 1, 7, 128)
    found = result.comparisons["answer_token"]
    assert found.original.accuracy[0] < 0.65 and found.original.accuracy[3:].min() > 0.9
    assert found.verdict() == "inconclusive" and any("60 samples, 100 at least" in flag for flag in found.flags())
    assert result.table()[0]["position"] == "answer_token" and result.table()[1]["mode"] == "words"
    assert "not that the model uses them" in str(result) and "<svg" in result.html()
    parts = probe(toy, texts, batch_size=16, out=tmp_path / "run", **settings)
    torch.testing.assert_close(parts.states, result.states, atol=1e-4, rtol=1e-3)
    assert parts.labels == result.labels and ProbeResult.load(tmp_path / "run") == parts
    acts = toy.collect(texts, S.resid_pre.at(-1), out=tmp_path / "acts")
    torch.testing.assert_close(states_of(acts), result.states[:, 0, 0, :6], atol=1e-4, rtol=1e-3)
    other = result.compare("answer_token", [text[3:6] for text in texts], decoder="means", repeats=1, n_folds=3)
    assert other.original.accuracy.shape == (7,) and len(other.original.classes) > 4


def test_places_of_a_conversation(toy: ic.Model) -> None:
    tokens = toy.tokens(["Q: big\nA: small\n\nQ: hot\nA:", "Q: old\nA:"])
    last = [row[-1] for row in tokens.columns(None)]
    assert columns_of(tokens, "answer_token") == [[column] for column in last]
    named = tokens.name(user=["Q: hot", "Q: old"])
    assert columns_of(named, "text_instruction_token") == [row[-1:] for row in named.columns("user")]
    assert columns_of(named, -2) == [row[-2:-1] for row in tokens.columns(None)]
    with pytest.raises(ic.PositionError, match="which these prompts do not name"):
        columns_of(tokens, "text_instruction_token")
    answered = toy.tokens("Q: big\nA:", " small")
    with pytest.raises(ic.PlanError, match="the prompts hold their answers"):
        columns_of(answered, "answer_token")
    with pytest.raises(ic.PlanError, match="answer_label is the label itself"):
        columns_of(tokens, "answer_label")
    prompt = answered.columns("prompt")[0]
    assert columns_of(answered, "answer_token", allow_leaky=True) == [prompt[-1:]]
    assert columns_of(answered, "answer_label", allow_leaky=True) == [[prompt[-1] + 1]]


def test_a_leak_is_marked(toy: ic.Model) -> None:
    """The answer's own token tells the label at every layer, and the result says that this is no finding."""
    texts, labels = questions(40)
    answered = toy.tokens(texts, [" small" if label else " dry" for label in labels])
    result: ProbeResult = ic.method("probe")(
        toy, answered, labels=labels, allow_leaky=True, positions=("answer_label", "answer_token"), repeats=1
    )
    leak = result.comparisons["answer_label"]
    assert (leak.original.accuracy == 1).all() and leak.verdict() == "error" and "leaky" in leak.flags()[-1]
    assert not result.comparisons["answer_token"].leaky and result.leaky


def test_states_are_those_of_a_run() -> None:
    model = tiny_model("qwen3_vl")
    rows = [[pictures.picture("qwen3_vl", seed)] for seed in range(2)]
    tokens = model.tokens(pictures.inputs("qwen3_vl", rows))
    places = ("visual_token", "answer_token")
    states = {how: read_states(model, tokens, places, how) for how in ("mean", "max", "midpoint")}
    run = model.run(tokens, read=[S.resid_pre, S.resid_post[2]])
    for layer in range(4):
        site = S.resid_pre[layer] if layer < 3 else S.resid_post[2]
        visual = torch.stack([run[site].plain[row][columns] for row, columns in enumerate(tokens.columns("vision"))])
        torch.testing.assert_close(states["mean"][:, 0, layer], visual.mean(1))
        torch.testing.assert_close(states["max"][:, 0, layer], visual.amax(1))
        torch.testing.assert_close(states["midpoint"][:, 0, layer], visual[:, visual.shape[1] // 2])
        torch.testing.assert_close(states["mean"][:, 1, layer], run[site].plain[:, -1])


def test_image_modes(tmp_path: Path) -> None:
    """Brightness of the image is in its visual rows; a black one has none of it, another image that of its own."""
    model, n = tiny_model("qwen3_vl"), 40
    made = [pictures.picture("qwen3_vl", seed) + (seed % 2) for seed in range(n)]
    donors = [(number + 1) % n for number in range(n)]

    def prompts(images: list[torch.Tensor]) -> list[ic.Tokens]:
        return [model.tokens(pictures.inputs("qwen3_vl", [[image]])) for image in images]

    batch = model.tokens(pictures.inputs("qwen3_vl", [[image] for image in made]))
    result: ProbeResult = ic.method("probe")(
        model, batch, labels=[seed % 2 for seed in range(n)], groups=list(range(n)), donors=donors, cliff_boundary=1,
        blind_black=prompts([torch.zeros_like(image) for image in made]),
        blind_random=prompts([made[donor] for donor in donors]), shuffles=20, repeats=1,
    )  # fmt: skip
    assert result.modes == ("original", "blind_black", "blind_random")
    assert result.positions == ("visual_token", "answer_token")
    found = result.comparisons["visual_token"]
    assert found.original.accuracy[1:].min() > 0.95 and found.collisions == 0
    assert found.modes["blind_black"].accuracy.max() < 0.6
    assert found.after(1, minus="blind_black").low > 0.3
    row = result.table()[0]
    assert row["value"] == pytest.approx(found.after(1).value) and row["verdict"] in ("inconclusive", "error")
    result.save(tmp_path)
    assert ProbeResult.load(tmp_path) == result


def test_conformance() -> None:
    testing.check_method("probe", ic.load(testing.tiny("gpt2"))).raise_if_failed()


def test_what_is_refused(toy: ic.Model) -> None:
    texts, labels = questions(20)
    probe = ic.method("probe")
    for settings, error, message in (
        ({"labels": labels[:5]}, ic.PlanError, "labels has 5 items for 20 prompts"),
        ({"labels": "yes"}, ic.PlanError, "labels has 3 items"),
        ({"labels": labels, "donors": labels}, ic.PlanError, "give both"),
        ({"positions": ("answer_token", "answer_token")}, ic.PlanError, "each once"),
        ({"positions": ("visual_token",)}, ic.PositionError, "no positions called 'vision'"),
        ({"blind_black": texts[:3]}, ic.PlanError, "has 3 prompts for 20"),
        ({"blind_mean": [text + " big" for text in texts]}, ic.PlanError, "tokens, .* in blind_mean"),
        ({"cliff_boundary": 9}, ic.PlanError, "cliff_boundary 9 of 6 layers"),
        ({"decoder": "svm"}, ic.PlanError, "decoder"),
    ):
        with pytest.raises(error, match=message):
            probe(toy, texts, **settings)
    states: ProbeResult = probe(toy, texts)
    assert "no probes: there are no labels" in str(states) and states.table()[0]["name"] == "states"
    with pytest.raises(ic.PlanError, match="there are no labels"):
        states.compare("answer_token")
    with pytest.raises(ic.PlanError, match="no position 'answer' here"):
        states.compare("answer", labels)
    with pytest.raises(ic.PlanError, match="3 labels for 20 prompts"):
        states.compare("answer_token", labels[:3])
    few: ProbeResult = probe(toy, texts[:4], labels=labels[:4])
    assert "class" in few.why and few.why in str(few)
