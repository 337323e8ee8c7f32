"""Cached examples: files byte for byte, text and tokens as published, spans moved between tokenizers, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA
from interp_plugins.attribution.data.cache import (
    Example,
    boxed,
    cache_text,
    closed,
    example_of,
    example_tokens,
    load_examples,
    migrated,
    read_examples,
    sha1,
    with_spans,
)
from interp_plugins.attribution.data.span_moves import moved
from interp_plugins.attribution.layout import is_stop

import interp_core as ic

HERE = DATA / "attribution" / "cache"
FILES = [HERE / "tiny_mixed.jsonl", HERE / "gen_llama.jsonl", *sorted(HERE.glob("exp5/**/*.jsonl"))]


@cache
def tokenizer(name: str) -> Any:
    return ic.open_tokenizer(name if name.startswith("toy:") else HERE / name)


def example(k: int) -> Example:
    return read_examples(HERE / ("tiny_mixed.jsonl" if k < 3 else "gen_llama.jsonl"))[k if k < 3 else k - 3]


def row(**fields: Any) -> dict[str, Any]:
    return example(0).row() | fields


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_read_and_written_is_the_same(path: Path) -> None:
    assert len(FILES) == 5
    assert cache_text(read_examples(path)) == path.read_text()


def test_fields_of_others_and_their_order_stay() -> None:
    there = {"target": "a b", "prompt": "q", "note": {"x": 1}, "metadata": {"é": "ü"}, "thinking_span": None}
    assert json.dumps(example_of(there).row()) == json.dumps(there)
    spanned = replace(example_of(there), sink_span=ic.Span(0, 1))
    assert list(spanned.row()) == [*there, "sink_span"] and spanned.row()["sink_span"] == [0, 0]


def test_spans_are_half_open_inside() -> None:
    first = example(0)
    assert first.sink_span == ic.Span(35, 48) and first.thinking_span == ic.Span(0, 35) and closed(None) is None
    assert [first.prompt[a:b][:7] for a, b in first.needles] == ["One of "] * 2
    assert (
        first.target is not None and first.target_sha1 == sha1(first.target) and first.prompt_sha1 != first.target_sha1
    )


def test_digests_are_those_of_the_published_traces() -> None:
    assert example(3).prompt_sha1 == "6f751efd35ce9658bae42cf4932d2dbe5fa06d0e"
    assert example(3).target_sha1 == "b3c3e5b30d4b7ba393a816a0f2aa2f8654d96c97"


def test_samples_are_drawn_as_published(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n\n".join(json.dumps({"prompt": f"p{i}"}) for i in range(9)) + "\n")
    names = [one.prompt for one in read_examples(path)]
    shuffled = list(names)
    random.Random(42).shuffle(shuffled)
    drawn = [one.prompt for one in load_examples(path, 3, sample=5)]
    assert drawn == shuffled[:3] != names[:3]
    assert [one.prompt for one in load_examples(path, sample=9)] == names  # not fewer: not shuffled
    assert [one.prompt for one in load_examples(path, 100)] == names
    with pytest.raises(ic.PlanError, match="num_examples is 0"):
        load_examples(path, 0)


@pytest.mark.parametrize("golden", sorted(HERE.glob("tokens/*.json")), ids=lambda path: path.stem)
def test_the_reference_profile_is_the_published_text(golden: Path) -> None:
    wanted, asked = json.loads(golden.read_text()), example(int(golden.stem[-1]))
    assert wanted["positions_match"] and len(wanted["prompt_ids"]) > 50
    tokens = example_tokens(tokenizer("models/llama"), asked, "reference")
    ids, labels, start = tokens.ids[0].tolist(), tokens.labels[0], len(wanted["prompt_ids"])
    assert ids == wanted["prompt_ids"] + wanted["generation_ids"]
    assert list(labels) == wanted["prompt_tokens"] + wanted["generation_tokens"]
    assert tokens.texts is not None and asked.target is not None
    assert tokens.texts[0] == wanted["formatted_prompt"] + asked.target + "<|im_end|>"
    user = tokens.columns("prompt")[0]
    assert user == wanted["user_prompt_indices"] and [ids[i] for i in user] == wanted["user_prompt_ids"]
    assert [labels[i] for i in user] == wanted["user_prompt_tokens"]
    gold = tokens.columns("gold")[0] if "gold" in tokens.spans else []
    assert [user.index(i) for i in gold] == wanted["gold_prompt_token_indices"]
    assert [n for n, i in enumerate(user) if not is_stop(labels[i])] == wanted["keep_prompt_token_indices"]
    for name, field in (("sink", "sink_span"), ("thinking", "thinking_span"), ("explained", "sink_span")):
        (span,) = tokens.spans[name][0]
        assert [span.start - start, span.stop - start - 1] == wanted[field]


@pytest.mark.parametrize("k", range(5))
def test_the_sound_profile_shows_the_prompt_as_it_is(k: int) -> None:
    """Through the template, without space or words around; the spans read as in the reference profile."""
    asked = example(k)
    tokens = example_tokens(tokenizer("models/llama"), asked, eos=True)
    assert tokens.texts is not None and asked.target is not None
    assert tokens.texts[0].startswith(f"<|im_start|>user\n{asked.prompt}<|im_end|>")
    assert tokens.texts[0].endswith(f"</think>\n\n{asked.target}")
    said = {name: "".join(tokens.labels_at(name)[0]) for name in tokens.spans}
    published = example_tokens(tokenizer("models/llama"), asked, "reference")
    for name in set(published.spans) - {"prompt"}:
        assert said[name] == "".join(published.labels_at(name)[0]), name
    assert said["prompt"] == asked.prompt and said["target"] == asked.target + "<|im_end|>"
    assert tokens.ids[0, -1] == 2
    without = example_tokens(tokenizer("models/llama"), asked)
    assert without.ids[0].tolist() == tokens.ids[0, :-1].tolist()


def test_without_a_chat_template_text_is_as_it_is(toy: ic.Model) -> None:
    asked = Example(
        "VAR V3 84.\n? V3", " 84", ic.Span(0, 1), ic.Span(0, 1), metadata={"needle_spans": [{"span": [6, 9]}]}
    )
    tokens = example_tokens(toy, asked)
    assert tokens.texts == ("VAR V3 84.\n? V3 84",) and tokens.ids.tolist() == toy.tokens(tokens.texts[0]).ids.tolist()
    assert tokens.labels_at("gold") == ((" 84",),) and tokens.columns("sink") == [[6]]
    assert toy.run(tokens).logits.shape[1] == 7
    open_prompt = example_tokens(toy, replace(asked, target=None, sink_span=None, indices_to_explain=None))
    assert set(open_prompt.spans) == {"prompt", "gold"} and open_prompt.columns("prompt") == [[0, 1, 2, 3, 4, 5]]


def test_stop_tokens() -> None:
    assert [one for one in (",", " .", "\n", " ", "", ";", ".5", "a") if is_stop(one)] == [",", " .", "\n", " ", ""]


def test_the_answer_is_looked_for_from_the_end() -> None:
    asked = Example("q", "It is 16. So 16 is right: \\boxed{\\frac{1}{16}} 16", metadata={"boxed_answer": "16"})
    found = with_spans(asked, tokenizer("models/llama"))
    assert found is not None and found.sink_span is not None and found.target is not None
    tokens = example_tokens(tokenizer("models/llama"), found)
    assert "".join(tokens.labels_at("sink")[0]) == " 16" and tokens.columns("sink")[0][-1] == tokens.ids.shape[1] - 1
    assert found.thinking_span == ic.Span(0, found.sink_span.start)
    assert boxed(asked.target or "") == "\\frac{1}{16}"
    first = with_spans(Example("q", "16 apples"), tokenizer("models/llama"), "16")
    assert first is not None and first.thinking_span is None
    assert with_spans(asked, tokenizer("models/llama"), "17") is None


def test_sentence_indices_of_older_caches() -> None:
    old = example_of(row(indices_to_explain=[-2], sink_span=None, thinking_span=None))
    assert old.sentences == (-2,) and old.row()["indices_to_explain"] == [-2]
    new = migrated(old, tokenizer("models/llama"))
    assert new.row() == row() and migrated(new, tokenizer("models/llama")) is new
    assert migrated(example_of(row(indices_to_explain=[0])), tokenizer("models/llama")).row() == row()
    assert example_tokens(tokenizer("models/llama"), old).spans == example_tokens(tokenizer("models/llama"), new).spans
    lost = example_of(row(indices_to_explain=[0], sink_span=None, thinking_span=None, metadata={}))
    with pytest.raises(ic.TextError, match="counts sentences.*give sink_span, or metadata.boxed_answer"):
        migrated(lost, tokenizer("models/llama"))


# Refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, "prompt takes the text of the prompt, not str ''"),
        ({"target": 3}, "target takes the text of the answer, or null, not int 3"),
        ({"sink_span": [5, 4]}, r"sink_span is \[5, 4\], which is empty"),
        ({"sink_span": [5]}, r"sink_span takes \[first, last\].* not list \[5\]"),
        ({"sink_span": [True, 4]}, "sink_span takes a list of integers"),
        ({"thinking_span": [-1, 4]}, r"thinking_span takes \[first, last\]"),
        ({"thinking_span": [0, 35]}, r"thinking_span \[0, 35\] reaches into the sink \[35, 47\].*give \[0, 34\]"),
        ({"target": None}, "has spans of a target, but no target"),
        ({"metadata": []}, "metadata takes a JSON object"),
        ({"metadata": {"needle_spans": {}}}, "metadata.needle_spans takes a list"),
        ({"metadata": {"needle_spans": [[3, 4]]}}, r"metadata.needle_spans\[0\] takes"),
        ({"metadata": {"needle_spans": [{"span": [3, 999]}]}}, "is characters 3:999, the prompt has 423"),
        (
            {"metadata": {"needle_spans": [{"span": [87, 123], "snippet": "The garden of Oslo was built in 1432."}]}},
            "it stands at 86:123",
        ),
    ],
)
def test_rows_that_contradict_themselves(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(cache_text([example(1)]) + json.dumps(row(**fields)) + "\n")
    with pytest.raises(ic.LoadError, match=r"a\.jsonl, line 2.*" + says):
        read_examples(path)
    bad: list[tuple[int, str]] = []
    assert read_examples(path, bad=lambda line, error: bad.append((line, str(error)))) == [example(1)]
    assert [line for line, _ in bad] == [2]


def test_a_mark_of_byte_order_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + cache_text([example(1)]), encoding="utf-8")
    assert read_examples(path) == [example(1)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no example"),
        ('{"prompt": "a"}\n{"pro', "line 2, is no JSON"),
        ("[1]\n", "is a list"),
        ("[" * 100_000 + "\n", "line 1, is no JSON"),
        ('{"prompt": "\\ud800 x"}\n', "line 1, holds half a character"),
        ('{"prompt": "a", "target": "b", "sink_span": [0, 1' + "0" * 30 + "]}\n", "sink_span takes a list of integers"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ic.LoadError, match=says):
        read_examples(tmp_path / "a.jsonl")
    with pytest.raises(ic.LoadError, match="cannot be read"):
        read_examples(tmp_path / "b.jsonl")


def test_spans_of_another_tokenizer(toy: ic.Model) -> None:
    llama, new = tokenizer("models/llama"), tokenizer("exp5/tok_new")
    far = example_of(row(sink_span=[400, 405]))
    for profile in ("sound", "reference"):
        with pytest.raises(
            ic.TextError, match=r"sink_span \[400, 405\] ends at token 405.* makes \d\d tokens.*remap_spans"
        ):
            example_tokens(llama, far, profile)
    with pytest.warns(UserWarning, match="the sink is .*, the answer in metadata is .*remap_spans"):
        example_tokens(new, example(0))
    count = len(llama(example(0).target)["input_ids"])
    noted = replace(example(0), metadata={**example(0).metadata, "target_tokens": count})
    example_tokens(llama, noted)
    with pytest.raises(ic.TextError, match=f"makes {count} tokens of the target, and this one makes 74"):
        example_tokens(new, noted)
    end = replace(example(0), sink_span=ic.Span(35, count + 1), metadata={})
    assert example_tokens(llama, end, eos=True).labels_at("sink")[0][-1] == "<|im_end|>"
    with pytest.raises(ic.TextError, match="ends at token"):
        example_tokens(llama, end)


def test_text_that_does_not_go_together(toy: ic.Model) -> None:
    with pytest.raises(ic.TextError, match=r"the tokens of the prompt change when the target follows \('\? V3 \|84'\)"):
        example_tokens(toy, Example("? V3 ", "84"))
    with pytest.raises(ic.TextError, match="this tokenizer has none; set"):
        example_tokens(toy, Example("? V3", " 84"), "reference")
    with pytest.raises(ic.PlanError, match="there is no profile 'refrence'. Did you mean 'reference'"):
        example_tokens(toy, Example("? V3", " 84"), "refrence")  # type: ignore[arg-type]
    with pytest.raises(ic.TextError, match="do not fit the model's context of 256"):
        toy.run(example_tokens(toy, Example("VAR" * 300, " 84")))


def test_a_prompt_that_is_not_where_it_is_looked_for() -> None:
    """Words of the template are found by characters; what the published search takes for the prompt is said to be none."""
    asked = Example("user", "Rome")
    llama = tokenizer("models/llama")
    sound = example_tokens(llama, asked)
    assert sound.texts is not None and sound.texts[0][slice(*sound.chars(sound.spans["prompt"][0][0]))] == "user"
    assert sound.columns("prompt")[0][0] > 2
    with pytest.warns(UserWarning, match="are not where their first one is first found, token 6"):
        example_tokens(llama, Example("What is it?\n", "Rome"), "reference")


# Other tokenizers


def remapped(folder: Path, *more: str, monkeypatch: pytest.MonkeyPatch, out: str) -> Any:
    from test_cli import invoked

    if not (folder / "exp5").exists():
        shutil.copytree(HERE / "exp5", folder / "exp5")
        shutil.copytree(HERE / "models", folder / "models")
    monkeypatch.chdir(folder)
    words = ["--old_tokenizer_model", "models/llama", "--new_tokenizer_model", "exp5/tok_new", *more]
    return invoked("remap_spans", "--in_jsonl", "exp5/in.jsonl", "--out_dir", out, *words)


@pytest.mark.parametrize(("name", "flag"), [("out_default", []), ("out_fallback", ["--allow_fallback_answer"])])
def test_remap_spans_is_the_published_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flag: list[str]
) -> None:
    wanted = (HERE / "exp5" / name / "in.jsonl").read_bytes()
    shutil.copytree(HERE / "exp5", tmp_path / "exp5", ignore=shutil.ignore_patterns("out_*"))
    shutil.copytree(HERE / "models", tmp_path / "models")
    for _ in range(2):
        done = remapped(tmp_path, *flag, monkeypatch=monkeypatch, out=f"exp5/{name}")
        assert done.stdout == (HERE / "exp5" / f"{name}.stdout").read_text()
        assert [path.name for path in (tmp_path / "exp5" / name).iterdir()] == ["in.jsonl"]
        assert (tmp_path / "exp5" / name / "in.jsonl").read_bytes() == wanted
    assert ("line 4: old_span_to_char_failed" in done.stderr) == (not flag)


def test_what_remap_spans_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ic.TextError, match="line 4: old_span_to_char_failed: .*400, 405.*Leave --strict out"):
        remapped(tmp_path, "--strict", monkeypatch=monkeypatch, out="fresh")
    assert not list((tmp_path / "fresh").glob("*"))
    with pytest.raises(ic.PlanError, match="give --overwrite"):  # a person's file
        remapped(tmp_path, monkeypatch=monkeypatch, out="exp5/out_fallback")
    remapped(tmp_path, "--overwrite", monkeypatch=monkeypatch, out="exp5/out_fallback")
    there = (tmp_path / "exp5/out_fallback/in.jsonl").read_bytes()
    assert there == (HERE / "exp5/out_default/in.jsonl").read_bytes()
    with pytest.raises(ic.PlanError, match="allow_fallback_answer was False, is True"):  # another run's
        remapped(tmp_path, "--allow_fallback_answer", monkeypatch=monkeypatch, out="exp5/out_fallback")
    with pytest.raises(ic.PlanError, match=r"two files are called in\.jsonl"):
        remapped(tmp_path, "--in_jsonl", "exp5/in.jsonl,models/in.jsonl", monkeypatch=monkeypatch, out="two")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target": None}, "missing_target"),
        ({"indices_to_explain": [-2], "sink_span": None}, "missing_old_span"),
        ({"indices_to_explain": [400, 405]}, "old_span_to_char_failed"),
    ],
)
def test_why_a_row_is_not_moved(fields: dict[str, Any], reason: str) -> None:
    llama, new = tokenizer("models/llama"), tokenizer("exp5/tok_new")
    assert moved(row(**fields), llama, new) == (None, reason)
    nowhere = row(indices_to_explain=[400, 405], metadata={"boxed_answer": "another"})
    assert moved(nowhere, llama, new, allow_fallback_answer=True) == (None, "fallback_answer_failed")


@pytest.mark.parametrize("other", ["exp5/tok_new", "../../tokenizers/gpt2", "../../tokenizers/qwen2.5", "toy:text"])
def test_there_and_back_covers_the_span(other: str) -> None:
    """Of every span of a target with accents, an emoji of several bytes, runs of spaces and a line break."""
    target = "Réponse:  the naïve 👩‍🔬 said\n\n 3 × 4 = 12, so   twelve."
    llama, there = tokenizer("models/llama"), tokenizer(other)
    count = len(llama(target)["input_ids"])
    assert count > 30
    for start in range(count):
        for stop in (start, min(start + 3, count - 1)):
            before = {"prompt": "q", "target": target, "sink_span": [start, stop]}
            away, _ = moved(before, llama, there)
            assert away is not None
            back, _ = moved(away, there, llama)
            assert back is not None and back["sink_span"][0] <= start and back["sink_span"][1] >= stop
            assert len(there(target, add_special_tokens=False)["input_ids"]) > away["sink_span"][1]
