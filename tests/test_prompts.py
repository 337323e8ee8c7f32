"""Pairs of prompts: what a tokenizer can score, the same for a seed, and right on a model that does the tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import the_real_model, tiny_model, toy_model

import interp_core as ic
from interp_core import prompts, score
from interp_core.toys.text import build_tokenizer, relations

TOKENIZERS = Path(__file__).parent / "data/tokenizers"
DIGITS = [f" {century}" for century in range(11, 18)] + [f"{year:02}" for year in range(100)]


def of_whole_words() -> Any:
    """A byte-level tokenizer in which the words of these tasks are one token each, and years two."""
    texts = [*prompts.GIVING, prompts.PERIOD, *(text for forms in prompts.FACTS.values() for text in forms), "year"]
    known = [*prompts.NAMES, *prompts.PLACES, *prompts.OBJECTS, *prompts.EVENTS]
    known += [word for text in [*texts, *prompts.LANDMARKS, *prompts.LANDMARKS.values()] for word in text.split()]
    known += [
        word for name in ("capital", "language", "continent") for pair in relations()[name].items() for word in pair
    ]
    tokenizer = build_tokenizer([*(f" {word}" for word in dict.fromkeys(known)), *DIGITS])
    core = tokenizer.backend_tokenizer
    from tokenizers import Regex, pre_tokenizers

    two_digits = pre_tokenizers.Split(Regex(r" ?\d\d"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([two_digits, core.pre_tokenizer])
    return tokenizer


WORDS = of_whole_words()
DRAWN = [
    (prompts.indirect_objects, {}), (prompts.indirect_objects, {"corrupted": "other_names"}), (prompts.greater_than, {}),
    *((prompts.facts, {"relation": name}) for name in prompts.FACTS),
]  # fmt: skip


def real(name: str) -> Any:
    return ic.open_tokenizer(TOKENIZERS / name)


def demand_scorable(tokenizer: Any, data: prompts.Pairs, count: int) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(data) == count == len(set(data.clean)) == len(data.answer) == len(data.kind)
    for clean, corrupted, answer, other in zip(data.clean, data.corrupted, data.answer, data.other, strict=True):
        assert clean != corrupted and answer != other
        assert len(ids(clean)) == len(ids(corrupted))
        for word in (answer, other):
            (token,) = ids(word)
            # "Paris" of SentencePiece is the token that " Paris" is within a text
            assert any(ids(clean + space + word) == [*ids(clean), token] for space in ("", " "))
    for name, places in data.places.items():
        assert len(places) == count, name
        assert all(0 <= start < stop <= len(text) for (start, stop), text in zip(places, data.clean, strict=True))


@pytest.mark.parametrize(("task", "settings"), DRAWN, ids=lambda one: getattr(one, "__name__", str(one)))
def test_pairs_can_be_scored_and_come_again_with_their_seed(task: Any, settings: dict[str, Any]) -> None:
    data = task(WORDS, 14, **settings)
    demand_scorable(WORDS, data, 14)
    assert data == task(WORDS, 14, **settings)
    assert data.clean != task(WORDS, 14, seed=1, **settings).clean
    assert task(WORDS, 5, **settings).clean == data.clean[:5]  # more pairs are more of the same


@pytest.mark.parametrize("tokenizer", ["toy:text", "gpt2", "qwen2.5", "phi3"])
def test_real_tokenizers_keep_what_they_can_score(tokenizer: str) -> None:
    """Of the words of these cut-down vocabularies."""
    opened = ic.open_tokenizer(tokenizer) if ":" in tokenizer else real(tokenizer)
    copied = prompts.induction(opened, 20, period=5)
    demand_scorable(opened, copied, 20)
    assert sum(copied.dropped.values()) > 200 or tokenizer == "toy:text"
    if tokenizer == "toy:text":
        demand_scorable(opened, prompts.in_context(opened, 20, against="french"), 20)
        demand_scorable(opened, prompts.facts(opened, 40), 40)
        return
    names = ["Paris", "Rome", "France", "hot", "cold", "city", "dog", "big"]
    for corrupted in ("swapped", "other_names"):
        data = prompts.indirect_objects(opened, 12, corrupted=corrupted, names=[*names, "Xerxes"])
        demand_scorable(opened, data, 12)
        assert data.dropped and "Xerxes" not in "".join(data.answer)


def test_names_are_in_either_order_as_often() -> None:
    data = prompts.indirect_objects(WORDS, 40)
    assert Counter(data.kind) == {"ABBA": 20, "BABA": 20}
    named = {name: [text[a:b] for text, (a, b) in zip(data.clean, at, strict=True)] for name, at in data.places.items()}
    assert [f" {name}" for name in named["io"]] == data.answer
    assert [f" {name}" for name in named["s1"]] == [f" {name}" for name in named["s2"]] == data.other
    for i, kind in enumerate(data.kind):
        assert (data.places["io"][i] < data.places["s1"][i]) == (kind == "ABBA")
        assert data.clean[i].count(named["s1"][i]) == 2
        a, b = data.places["s2"][i]
        assert data.corrupted[i] == data.clean[i][:a] + named["io"][i] + data.clean[i][b:]
    apart = prompts.indirect_objects(WORDS, 40, corrupted="other_names")
    for corrupted, answer, other in zip(apart.corrupted, apart.answer, apart.other, strict=True):
        assert answer not in corrupted and other not in corrupted


def test_facts_are_those_of_the_subject() -> None:
    capitals = relations()["capital"]
    data = prompts.facts(WORDS, 20)
    subjects = [text[a:b] for text, (a, b) in zip(data.clean, data.places["subject"], strict=True)]
    assert [f" {capitals[subject]}" for subject in subjects] == data.answer
    assert all(any(country in text and city[1:] == capitals[country] for country in capitals)
               for text, city in zip(data.corrupted, data.other, strict=True))  # fmt: skip
    assert {"Paris", "Rome"} <= set(prompts.LANDMARKS.values())


def test_years_are_judged_by_all_that_can_follow() -> None:
    """Against the sum over years by hand; the corrupted prompt begins in a year before all others."""
    data = prompts.greater_than(WORDS, 12)
    assert data.score is not None
    for clean, corrupted, answer, other, year in zip(
        data.clean, data.corrupted, data.answer, data.other, data.kind, strict=True
    ):
        assert int(other) < int(year) < int(answer) and int(answer) - int(year) == int(year) - int(other)
        assert f"{clean[-2:]}{year} to" in clean and corrupted == clean.replace(f"{year} to", "01 to")
    logits = torch.randn(12, len(WORDS), dtype=torch.float64)
    (limits,) = data.score.targets
    ids = [WORDS(f"{year:02}")["input_ids"][0] for year in range(100)]
    likely = logits.softmax(-1)
    wanted = [
        sum(likely[row, ids[year]] * (1 if year > int(data.kind[row]) else -1) for year in range(100))
        for row in range(12)
    ]
    judged = data.score.fn(logits, torch.tensor(limits))
    torch.testing.assert_close(judged, torch.stack(wanted))
    variants = logits[:1].repeat(3, 1)
    assert torch.equal(data.score.fn(variants, torch.tensor(limits[:1])), judged[:1].expand(3))


def test_a_study_is_one_line_and_the_toy_is_right() -> None:
    """The heads that carry the relation come out; positions by name; the clean answer wins in clean prompts alone."""
    model = toy_model()
    data = prompts.in_context(model, 8, against="french")
    study = ic.method("activation_patching")
    heads = study(model, data.clean, corrupted=data.corrupted, answer=data.answer, other=data.other)
    assert {divmod(i, 4) for i in heads.mean.flatten().topk(2).indices.tolist()} == {(2, 2), (2, 3)}
    assert bool((heads.source > 0).all()) and bool((heads.base < 0).all())
    copied = prompts.induction(model, 8)
    named = model.tokens(copied.clean).name(**copied.places)
    judged = {"answer": copied.answer, "other": copied.other}
    places = study(model, named, corrupted=copied.corrupted, site="resid_pre", at=["source"], layers=[0], **judged)
    assert places.mean.item() == pytest.approx(1, abs=1e-4)  # the pair differs there alone
    assert "answers" in repr(data) and "cold" in data._repr_html_()


REFUSED = [
    (lambda: prompts.indirect_objects(real("gpt2"), 4), ic.PlanError, ["0 different pairs, not 4", "of several tokens"]),
    (lambda: prompts.facts(WORDS, 2000), ic.PlanError, ["different pairs, not 2000", "or fewer"]),
    (lambda: prompts.facts(WORDS, 0), ic.PlanError, ["1 or more"]),
    (lambda: prompts.facts(WORDS, 4, relation="captial"), ic.PlanError, ["Did you mean 'capital'"]),
    (lambda: prompts.in_context(WORDS, 4, against="frensh"), ic.PlanError, ["Did you mean 'french'"]),
    (lambda: prompts.in_context(real("gpt2"), 4), ic.PlanError, ["of them with answers of one token"]),
    (lambda: prompts.indirect_objects(WORDS, 4, corrupted="swap"), ic.PlanError, ["Did you mean 'swapped'"]),
    (lambda: prompts.indirect_objects(WORDS, 4, names=["Ann"]), ic.PlanError, ["five different names"]),
    (lambda: prompts.greater_than(real("qwen2.5"), 4), ic.PlanError, ["not one token after", "GPT-2"]),
    (lambda: prompts.in_context(WORDS, 4, shots=0), ic.PlanError, ["1 or more"]),
    (lambda: prompts.induction(WORDS, 4, period=2), ic.PlanError, ["period of 3 or more"]),
    (lambda: prompts.facts(tiny_model("gpt2"), 4), ic.TextError, ["without a tokenizer"]),
    (lambda: prompts.facts("gpt2", 4), ic.TextError, ["ic.open_tokenizer"]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "kind", "parts"), REFUSED)
def test_what_cannot_be_drawn_says_why(mistake: Any, kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        mistake()
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


@pytest.mark.real
def test_the_real_model_does_the_tasks() -> None:
    """In both prompts of nearly all pairs; prints the table of docs/prompts.md."""
    model = the_real_model()
    tasks = [(prompts.indirect_objects, {}), *((prompts.facts, {"relation": name}) for name in prompts.FACTS)]
    tasks += [(prompts.in_context, {}), (prompts.induction, {})]
    for task, settings in tasks:
        data = task(model, 16, **settings)
        clean, corrupted = (
            score.logit_diff(data.answer, data.other).on(model, 16)(model.run(texts, logits=-1))
            for texts in (data.clean, data.corrupted)
        )
        right = [int((clean > 0).sum()), int((corrupted < 0).sum())]
        print(f"| `{task.__name__}` {' '.join(settings.values())} | {right[0]} | {right[1]} |")
        assert bool((clean > corrupted).all()) and min(right) >= 10
