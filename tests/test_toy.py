"""The toy does what it is there for, and its generators know the truth."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import toy_model

import interp_core as ic
from interp_core.toys import evaluate
from interp_core.toys import text as tasks

N = 200


def accuracy(examples: list[tasks.Example]) -> float:
    return evaluate.accuracy(toy_model(), examples)


def fresh(seed: str) -> random.Random:
    """Examples that training did not see: it draws with integer seeds."""
    return random.Random(f"test-{seed}")


@pytest.mark.parametrize("shots", [3, 5, 10])
def test_relations_from_three_shots_on(shots: int) -> None:
    rng = fresh("relation")
    assert accuracy([tasks.relation_example(rng, shots=shots) for _ in range(N)]) >= 0.95


@pytest.mark.parametrize("relation", list(tasks.relations()))
def test_every_relation(relation: str) -> None:
    rng = fresh(relation)
    assert accuracy([tasks.relation_example(rng, relation, 5) for _ in range(50)]) >= 0.95


def test_zero_shots_do_not_say_the_relation() -> None:
    rng = fresh("zero")
    assert accuracy([tasks.relation_example(rng, shots=0) for _ in range(N)]) <= 0.40


@pytest.mark.parametrize(("hops", "chains"), [(0, 8), (1, 5), (2, 4)])
def test_retrieval(hops: int, chains: int) -> None:
    rng = fresh(f"hops-{hops}")
    assert accuracy([tasks.needle_example(rng, rng.randint(2, chains), hops) for _ in range(N)]) >= 0.95


@pytest.mark.parametrize("pool", [tasks.NUMBERS, tasks.words()], ids=["numbers", "words"])
def test_induction(pool: tuple[str, ...]) -> None:
    rng = fresh("induction")
    examples = [tasks.induction_example(rng, rng.randint(3, 20), 48, pool) for _ in range(N)]
    assert accuracy(examples) >= 0.95


def test_the_stated_value_decides_and_others_do_not() -> None:
    """The ground truth of needle examples: change the gold value and the answer follows; another, and it stays."""
    rng = fresh("truth")
    model = toy_model()
    for hops in (0, 1, 2):
        for _ in range(10):
            example = tasks.needle_example(rng, 3, hops)
            a, b = example.evidence["value"]
            assert example.text[a:b] == example.answer
            unused = next(n for n in tasks.NUMBERS if f" {n}" not in example.text)
            changed = example.prompt[:a] + f" {unused}" + example.prompt[b:]
            assert model.generate(changed, max_new_tokens=1).texts == [f" {unused}"]
            other = next(
                w for w in example.prompt.split() if w.rstrip(".").isdigit() and f" {w.rstrip('.')}" != example.answer
            )
            kept = example.prompt.replace(f" {other}", f" {unused}.")
            assert model.generate(kept, max_new_tokens=1).texts == [example.answer]


def test_generators_mark_what_they_say() -> None:
    rng = fresh("spans")
    needle = tasks.needle_example(rng, 3, 2, questions=4)
    names = [needle.text[slice(*needle.evidence[key])].strip() for key in ("hop_1", "hop_2", "query")]
    assert f"VAR {names[1]} {names[0]}." in needle.text and f"VAR {names[2]} {names[1]}." in needle.text
    assert f"VAR {names[0]}{needle.answer}." in needle.text and len(needle.answers) == 4
    shown = tasks.relation_example(rng, "capital", 2, "France")
    assert shown.answer == " Paris" and shown.text[slice(*shown.evidence["query"])] == " France"
    assert "France" not in shown.prompt[: shown.evidence["query"][0]]
    loop = tasks.induction_example(rng, 5, 12)
    assert loop.text[slice(*loop.evidence["source"])] == loop.answer


def test_tables() -> None:
    relations = tasks.relations()
    assert len(relations) == 12 and min(map(len, relations.values())) >= 40
    antonym = relations["antonym"]
    assert all(antonym[other] == word for word, other in antonym.items())
    assert relations["capital"]["Peru"] == "Lima" and relations["plural"]["mouse"] == "mice"


def test_the_tokenizer_is_the_one_that_is_built() -> None:
    saved, built = toy_model().tokenizer, tasks.build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    for text in ("Q: big\nA: small", "VAR V3 84.\n? V3", "Any tëxt — 😀 falls back to bytes\t!"):
        assert saved(text)["input_ids"] == built(text)["input_ids"]
        assert saved.decode(saved(text)["input_ids"]) == text
    for word in (*tasks.words(), *tasks.NUMBERS, *tasks.NAMES):
        assert len(saved(f" {word}")["input_ids"]) == 1


def test_weights_are_small() -> None:
    from interp_core.loading import toy_folder

    assert sum(p.stat().st_size for p in Path(toy_folder("toy:text")).iterdir()) < 10 * 2**20


def test_few_steps_of_training_lower_the_loss() -> None:
    """The training script runs and learns; the whole of it takes a quarter of an hour."""
    from interp_core.toys.train_text import STAGES, batch, build, step_loss

    tokenizer = tasks.build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(tokenizer)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        ids, answers = batch(tokenizer, [make(rng) for _, make in STAGES[-1].values() for _ in range(3)])
        assert answers.any(-1).all()
        loss, _ = step_loss(model, ids, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


def test_toys_are_listed() -> None:
    with pytest.raises(ic.LoadError, match="there is no toy 'toy:audio'"):
        ic.load("toy:audio")


@pytest.mark.slow
def test_training_from_scratch(tmp_path: Path) -> None:
    """The whole script, as docs/toys.md says: a quarter of an hour on one core."""
    from interp_core.toys.train_text import train

    train(tmp_path, seed=1)
    model = ic.load(str(tmp_path))
    for name, make in evaluate.battery().items():
        rng = fresh(name)
        score = evaluate.accuracy(model, [make(rng) for _ in range(N)])
        few = name.startswith("in-context") and int(name.split()[2]) < 3
        assert score >= 0.95 or few, f"{name}: {score}"
