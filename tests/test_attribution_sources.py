"""Data sets as examples, and caches that a model writes: what is read, kept, left out, and gone on with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, the_real_model
from interp_plugins.attribution.data import building
from interp_plugins.attribution.data.building import build, same, split_boxed
from interp_plugins.attribution.data.cache import Example, example_tokens, read_examples
from interp_plugins.attribution.data.sources import mapped, needles, read_source, toy_needles, two_steps
from interp_recipes import build_cache as recipe
from test_cli import invoked

import interp_core as ic

HERE = DATA / "attribution" / "cache"
SOURCES = HERE / "sources"


@cache
def llama() -> Any:
    return ic.open_tokenizer(HERE / "models/llama")


def asked(answer: str, *outputs: str) -> Example:
    return Example("q", metadata={"reference_answer": answer} | ({"outputs": list(outputs)} if outputs else {}))


# Sources


@pytest.mark.parametrize(
    ("name", "count", "ends", "answer"),
    [
        ("gsm8k.jsonl", 2, "at the farmers' market?", "18"),
        ("math500.jsonl", 2, "0 \\le \\theta < 2 \\pi.$", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("morehopqa.json", 2, "?", None),
        ("niah.jsonl", 1, "mentioned in the provided text are", "8995970, 4664860"),
        ("vt_h2.jsonl", 2, "they are: ", "EIZTJ, KGNTR, MBXKK"),
    ],
)
def test_sources_are_read(name: str, count: int, ends: str, answer: str | None) -> None:
    examples = read_source(SOURCES / name)
    assert len(examples) == count and examples[0].prompt.endswith(ends)
    assert answer is None or examples[0].metadata["reference_answer"] == answer
    assert all(one.metadata["reference_answer"] for one in examples)
    for example in examples:
        assert bool(example.needles) == name.startswith(("niah", "vt"))
        assert all(example.prompt[a:b].startswith(("One of", "VAR ")) for a, b in example.needles)
        assert (example.target is not None) == name.startswith(("gsm8k", "math"))


def test_the_published_form_of_ruler(tmp_path: Path) -> None:
    fact = "The special magic number for Alice is: 48."
    row = {"input": f"Text. {fact} What is it?", "answer_prefix": " It is", "outputs": ["48"], "length": 9}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"needle_spans": [{"span": [6, 48], "snippet": fact}]}) + "\n")
    (one,) = read_source(tmp_path / "a.jsonl")
    assert one.prompt.endswith("What is it? It is") and one.target is None and one.needles == ((6, 48),)


def test_solutions_of_the_source_are_mapped() -> None:
    """Reasoning, a line break, the answer, which is the sink; boxes with braces in them are taken off."""
    for name in ("gsm8k.jsonl", "math500.jsonl"):
        for one in read_source(SOURCES / name):
            found = mapped(one, llama())
            assert found is not None and found.sink_span is not None and found.target is not None
            answer = one.metadata["reference_answer"]
            assert found.target.endswith(f"\n{answer}") and "####" not in found.target and "boxed" not in found.target
            assert found.thinking_span == ic.Span(0, found.sink_span.start) and found.metadata["target_tokens"] > 20
            assert "".join(example_tokens(llama(), found).labels_at("sink")[0]).strip() == answer
    with pytest.raises(ic.TextError, match=r"morehopqa\.json, row 0 has no solution"):
        mapped(read_source(SOURCES / "morehopqa.json")[0], llama())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q", "answer": "no mark"}, "the answer has no '####'"),
        ({"question": " ", "answer": "#### 3"}, "question takes a text, not str ' '; the row has 'question', 'answer'"),
        ({"problem": "p", "solution": "s"}, "answer takes a text, not NoneType None"),
        ({"question": "q", "context": [], "_id": 1}, "lacks 'answer'"),
        ({"question": "q", "context": ["a"], "answer": "x"}, "context takes a list"),
        ({"input": "q", "outputs": []}, "lacks the answers"),
        ({"prompt": "q", "answers": ["a"], "needle_char_spans": [[0, 9]]}, "is characters 0:9, the prompt has 1"),
        ({"text": "q"}, "has 'text', which is no source that is known"),
    ],
)
def test_rows_that_lack_something(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(ic.LoadError, match=r"a\.json, row 0.*" + says):
        read_source(tmp_path / "a.json")
    with pytest.raises(ic.PlanError, match="there is no kind of source 'maths'. Did you mean 'math'"):
        read_source(tmp_path / "a.json", "maths")


def test_made_up_prompts_hold_their_needles() -> None:
    for one in (*needles(6, 12, hidden=3), *two_steps(6), *toy_needles(6, hops=2)):
        said = " ".join(one.prompt[a:b] for a, b in one.needles)
        assert one.metadata["dataset"] == "two_steps" or one.metadata["reference_answer"] in said
    assert needles(3, 12) == needles(3, 12) != needles(3, 12, seed=1)
    assert (
        len({len(one.needles) for one in toy_needles(5, hops=2)}) == 1 and len(toy_needles(1, hops=2)[0].needles) == 3
    )
    with pytest.raises(ic.PlanError, match="hidden=9: give 1 to 8"):
        needles(1, 12, hidden=9)


# Answers


@pytest.mark.parametrize(
    ("said", "example", "right"),
    [
        ("The number is 84.", asked("84"), True),
        ("The number is 184.", asked("84"), False),
        ("It is 84, no, 85.", asked("84"), False),
        ("It costs $1,084.", asked("1084"), True),
        ("It is 84.5", asked("84"), False),
        ("EIZTJ and\nKGNTR", asked("x", "KGNTR", "EIZTJ"), True),
        ("EIZTJ", asked("x", "KGNTR", "EIZTJ"), False),
        ("Will SELF, in 1961.", asked("Will Self"), True),
    ],
)
def test_right_answers(said: str, example: Example, right: bool) -> None:
    assert same(said, example) is right


def test_a_box_at_the_end() -> None:
    assert split_boxed("So it is.\n\\boxed{\\frac{1}{2}} ") == ("So it is.", "\\frac{1}{2}")
    for said in ("So it is 3.", "\\box{3}", "So \\box{3}.", "So \\box{}", "So \\box{3"):
        assert split_boxed(said) is None


def test_what_the_toy_answers_right_is_kept(toy: ic.Model) -> None:
    """Right answers are kept with the tokens that were generated; asked for another, none is."""
    examples = toy_needles(6, hops=1)
    made = list(build(toy, examples, max_new_tokens=1, keep_unfinished=True, batch_size=4))
    kept = [one.example for one in made if one.example is not None]
    assert len(kept) >= 5 and {one.reason for one in made} <= {"", "wrong"}
    for example in kept:
        tokens = example_tokens(toy, example)
        answer = f" {example.metadata['reference_answer']}"
        assert tokens.labels_at("sink") == ((answer,),) and tokens.columns("sink") == [[tokens.ids.shape[1] - 1]]
        assert int(toy.run(tokens).logits[0, -2].argmax()) == int(tokens.ids[0, -1])
    others = [replace(one, metadata={**one.metadata, "outputs": ["V1"]}) for one in examples]
    assert {one.reason for one in build(toy, others, max_new_tokens=1, keep_unfinished=True)} == {"wrong"}
    assert {one.reason for one in build(toy, examples, max_new_tokens=1)} == {"unfinished"}
    judged = build(toy, others, max_new_tokens=1, keep_unfinished=True, form="boxed", judge=lambda said, example: True)
    assert {one.reason for one in judged} == {"format"}
    unknown = [replace(examples[0], metadata={})]
    assert next(build(toy, unknown, max_new_tokens=1, keep_unfinished=True)).reason == "no_reference"


def test_a_prompt_that_does_not_fit_is_left_out_alone(toy: ic.Model) -> None:
    few = toy_needles(2)
    long = replace(
        few[0], prompt="VAR V1 84.\n" * 70 + few[0].prompt, metadata={**few[0].metadata, "needle_spans": None}
    )
    made = list(build(toy, [few[0], long, few[1]], max_new_tokens=1, keep_unfinished=True))
    assert [one.reason for one in made] == ["", "too_long", ""]


def test_build_cache_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after five answers, it works out the others alone, and the file is that of a run that was not stopped."""
    words = ["--source", "toy_needles", "--hops", "1", "--count", "8", "--max_new_tokens", "1", "--keep_unfinished"]
    invoked("build_cache", *words, "--out", str(tmp_path / "whole"))
    asked_for: list[int] = []

    def until(stop: int) -> Any:
        def some(model: ic.Model, examples: list[Example], **settings: Any) -> Any:
            asked_for.append(len(examples))
            for i, built in enumerate(build(model, examples, **settings)):
                if i == stop:
                    raise KeyboardInterrupt
                yield built

        return some

    monkeypatch.setattr(recipe, "build", until(5))
    with pytest.raises(KeyboardInterrupt):
        recipe.build_cache(
            recipe.BuildCacheConfig(
                source="toy_needles", out=tmp_path / "again", hops=1, count=8, max_new_tokens=1, keep_unfinished=True
            )
        )
    monkeypatch.setattr(recipe, "build", until(99))
    path = recipe.build_cache(
        recipe.BuildCacheConfig(
            source="toy_needles",
            out=tmp_path / "again",
            hops=1,
            count=8,
            max_new_tokens=1,
            keep_unfinished=True,
            batch_size=2,
        )
    )
    assert asked_for == [8, 3] and path.read_bytes() == (tmp_path / "whole/toy_needles.jsonl").read_bytes()
    counts = json.loads((tmp_path / "again/counts.json").read_text())
    assert counts["examples"] == 8 and counts["kept"] + sum(counts["dropped"].values()) == 8 and counts["kept"] >= 6
    with pytest.raises(ic.PlanError, match="holds another run: count was 8, is 9"):
        recipe.build_cache(
            recipe.BuildCacheConfig(
                source="toy_needles", out=tmp_path / "again", hops=1, count=9, max_new_tokens=1, keep_unfinished=True
            )
        )


def test_build_cache_of_the_sources_solutions(tmp_path: Path) -> None:
    """No model is loaded: a folder of a tokenizer alone will do."""
    words = ["--source", str(SOURCES / "gsm8k.jsonl"), "--model", str(HERE / "models/llama"), "--targets", "source"]
    done = invoked("build_cache", *words, "--out", str(tmp_path / "out"), "--name", "math")
    assert "kept 2 of 2" in done.stdout
    examples = read_examples(tmp_path / "out/math.jsonl")
    assert [one.metadata["boxed_answer"] for one in examples] == ["18", "3"]
    with pytest.raises(ic.LoadError, match="nothing made up of that name. Did you mean 'needles'"):
        invoked("build_cache", "--source", "needle", "--out", str(tmp_path / "none"))
    with pytest.raises(ic.TextError, match="none of 2 examples could be kept: 2 × unfinished"):
        recipe.build_cache(
            recipe.BuildCacheConfig(source="toy_needles", out=tmp_path / "few", count=2, max_new_tokens=1)
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "count is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_examples": -1}, "num_examples is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"hops": 13}, "hops=13: give 0 to 12"),
        ({"hops": -1}, "hops=-1: give 0 to 12"),
        ({"name": "answers"}, "cannot be called 'answers'"),
        ({"name": "record/run"}, "cannot be called 'record/run'"),
        ({"source": "answers.jsonl"}, "cannot be called 'answers'"),
    ],
)
def test_settings_without_sense_are_refused_before_the_model_is_loaded(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """A cache called as the run's own file would have taken its place."""
    with pytest.raises(ic.PlanError, match=says):
        recipe.build_cache(
            recipe.BuildCacheConfig(
                **{"source": "toy_needles", "model": "no/model", "out": tmp_path / "out", **settings}
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_the_real_model_writes_a_cache() -> None:
    """Needle prompts of 256 to 1,024 tokens, and a question of two steps that it writes reasoning for."""
    model = the_real_model()
    examples = [*needles(2, 40, hidden=2), *needles(1, 150), *two_steps(1)]
    lengths = [example_tokens(model, one).ids.shape[1] for one in examples[:3]]
    assert min(lengths) >= 256 and max(lengths) <= 1024
    made = list(build(model, examples, max_new_tokens=60, batch_size=4, keep_unfinished=True))
    kept = Counter(one.example.metadata["dataset"] for one in made if one.example is not None)
    assert kept["needles"] >= 2 and kept["two_steps"] == 1
    for example in (one.example for one in made if one.example is not None):
        tokens = example_tokens(model, example)
        assert example.metadata["reference_answer"] in "".join(tokens.labels_at("sink")[0]) and example.thinking_span
    assert {one.reason for one in made} <= {*building.REASONS, ""}
