"""Prompts of function vectors: labels and slots of the published code, on every template and tokenizer; refusals."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA
from interp_plugins.function_vectors.files.checks import reference_labels
from interp_plugins.function_vectors.files.trials_json import prompt_data
from interp_plugins.function_vectors.prompts import LAST, Prompt, Slots, build, dummy, target_ids
from interp_plugins.function_vectors.tasks import Pair, Task, load_task
from interp_plugins.function_vectors.template import PREFIXES, SEPARATORS, Template

import interp_core as ic
from interp_core.loading import open_tokenizer
from interp_core.toys.text import relations

FV = DATA / "fv"
GOLDEN = ["gpt2-xl", "tiny-llama2-7b", "tiny-llama3-8b", "tiny-pythia"]
TASKS = ["antonym", "country-capital", "singular-plural", "product-company", "choose_first_of_3"]
TOKENIZERS = {name: str(FV / name / "model") for name in GOLDEN[:3]} | {
    "toy": "toy:text",
    "stories260K": str(DATA / "stories260K"),
}
COUNTS = {  # 280 prompts each: as the reference; its invariants broken by its own dummy only; refused
    "gpt2-xl": (279, 0, 1),
    "tiny-llama2-7b": (219, 60, 1),  # "▁" in front of " a" where the prefix is empty
    "tiny-llama3-8b": (279, 0, 1),
    "toy": (0, 274, 6),  # " a" is two tokens of the toy: the reference counts two slots for every word
    "stories260K": (218, 60, 2),
}
FIXED = "fixed_trials_antonym_t10_s10_seed0.json"
QA = Template()


@cache
def tokenizer(name: str) -> Any:
    return open_tokenizer(TOKENIZERS.get(name, str(FV / name / "model")))


@cache
def task(name: str) -> Task:
    return load_task(name, folder=FV / "tasks")


@pytest.mark.parametrize("family", GOLDEN)
def test_slots_of_the_reference(family: str) -> None:
    """Ids, tokens, labels, idx_map, idx_avg and the map of all tokens, of 20 prompts per family."""
    reader = tokenizer(family)
    slots = dummy(reader, QA, 10)
    assert slots.json() == json.loads((FV / family / "antonym_dummy_labels.json").read_text())
    fixed = json.loads((FV / family / FIXED).read_text())["trials"]
    golden = json.loads(gzip.decompress((FV / family / "slot_maps.json.gz").read_bytes()))
    assert len(golden) == 20
    for row in golden:
        trial = fixed[row["trial_id"]]
        demos = [Pair(pair["input"][1:], pair["output"][1:]) for pair in trial[f"demos_{row['mode']}"]]
        query = Pair(trial["query"]["input"][1:], trial["query"]["output"][1:])
        prompt = build(reader, QA, demos, query, slots)
        assert (prompt.text, list(prompt.ids)) == (row["prompt"], row["input_ids"])
        assert [reader.decode([i]) for i in prompt.ids] == row["tokens"]
        assert list(prompt.labels) == row["labels"]
        assert {str(token): slot for token, slot in prompt.idx_map.items()} == row["idx_map"]
        assert {label: list(ends) for label, ends in prompt.idx_avg.items()} == row["idx_avg"]
        assert {str(token): slot for token, slot in enumerate(prompt.slots)} == row["idx_map_updated"]
        assert (prompt.target, list(prompt.target_ids)) == (trial["target_str"], trial["answer_ids"])


def test_numbers_of_slots_in_the_specification() -> None:
    """87 with Llama 3's split, 96 with GPT-2's (97 with the text of a BOS) and with SentencePiece's, for ten shots."""
    sizes = {name: len(dummy(tokenizer(name), QA, 10)) for name in GOLDEN}
    assert sizes == {"tiny-llama3-8b": 87, "gpt2-xl": 97, "tiny-pythia": 97, "tiny-llama2-7b": 96}
    assert len(dummy(tokenizer("gpt2-xl"), Template(bos=False), 10)) == 96
    inner = dummy(tokenizer("gpt2-xl"), QA, 2).labels
    at = inner.index("end_of_example_token")  # "\n\n": one token at the end of a text, two before more
    assert inner[at : at + 4] == ("end_of_example_token", *["structural_token"] * 3)


def examples(seed: int, n: int) -> tuple[list[Pair], Pair]:
    """Demonstrations and a query from all test tasks in turn."""
    pick = random.Random(seed)
    pairs = [task(TASKS[(seed + i) % len(TASKS)]).pairs for i in range(n + 1)]
    *demos, query = [pick.choice(rows) for rows in pairs]
    return demos, query


def reference(reader: Any, template: Template, slots: Slots, demos: list[Pair], query: Pair) -> tuple[list[str], bool]:
    """Labels by the reference's procedure, and whether its own invariants hold (with its own dummy)."""

    def example(pair: Pair) -> dict[str, str]:
        return {"input": f" {pair.input}", "output": f" {pair.output}"}

    def labels_of(pairs: list[Pair], asked: Pair) -> tuple[list[str], str]:
        data = prompt_data(template, slots.front.text, [example(p) for p in pairs], example(asked))
        return reference_labels(reader, data, slots.front.added), data

    known, _ = labels_of([Pair("a", "a")] * slots.n_shots, Pair("a", "a"))
    labels, _ = labels_of(demos, query)
    kept = [label for i, label in enumerate(labels) if "demo" not in label or label not in labels[:i]]
    return labels, kept == known and labels[-1] == LAST


def check_characters(reader: Any, slots: Slots, prompt: Prompt, demos: list[Pair], query: str) -> int:
    """Tokens inside a word have its label, tokens so labelled touch it; returns tokens shared with other text."""
    owners = [part.label for part in slots.template.parts(demos, query, slots.front.text) for _ in part.text]
    assert len(owners) == len(prompt.text)
    offsets = reader(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    shared = 0
    for (start, stop), label in zip(offsets, prompt.labels, strict=True):
        touched = {owners[i] for i in range(start, stop) if not prompt.text[i].isspace()}
        words = {owner for owner in touched if "demo" in owner}
        if "demo" in label and touched:
            assert label in touched
        elif words:
            assert len({owners[i] for i in range(start, stop)}) > 1, (prompt.text[start:stop], label)
            shared += 1
    return shared


@pytest.mark.parametrize("name", [*TOKENIZERS])
def test_every_template_aligns_or_is_refused(name: str) -> None:
    """Equal to the reference where its invariants hold; right where only a word's slot in the dummy broke them."""
    reader, seen, shared = tokenizer(name), Counter[str](), 0
    for prefixes, separators in itertools.product([*PREFIXES, ("Q:", "A:"), ("", "")], SEPARATORS):
        template = Template.of(prefixes, separators)
        slots = dummy(reader, template, 3)
        for seed in range(2):
            demos, query = examples(seed + 7 * len(str(template)), 3)
            labels, holds = reference(reader, template, slots, demos, query)
            try:
                prompt = build(reader, template, demos, query, slots)
            except ic.TextError:
                seen["refused"] += 1
                assert not holds and not separators[1] and prefixes[0][:1].isalpha()
                continue
            assert list(prompt.labels) == labels
            assert [slots.labels[slot] for slot in prompt.idx_map.values()] == [labels[t] for t in prompt.idx_map]
            assert sorted(prompt.idx_map.values()) == list(range(len(slots))) == [*prompt.idx_map.values()]
            assert prompt.slots[-1] == len(slots) - 1 and prompt.labels[-1] == LAST
            seen["as the reference" if holds else "one slot a word"] += 1
            shared += check_characters(reader, slots, prompt, demos, query.input)
    assert (seen["as the reference"], seen["one slot a word"], seen["refused"]) == COUNTS[name] and shared <= 2


def test_the_two_slots_of_issue_19() -> None:
    """SentencePiece, empty prefixes: the reference's dummy has 54 slots where prompts have 53."""
    template = Template.of(("", ""), ("\n", "\n\n"))
    reader = tokenizer("tiny-llama2-7b")
    slots = dummy(reader, template, 10)
    word = {"input": " a", "output": " a"}
    theirs = reference_labels(reader, prompt_data(template, "", [word] * 10, word), True)
    assert (len(theirs), len(slots)) == (54, 53)
    demos, query = examples(0, 10)
    assert build(reader, template, demos, query, slots).slots[-1] == 52


def test_instructions_and_words_without_spaces() -> None:
    template = Template(
        {"input": "<", "output": "<", "instructions": "Task:"},
        {"input": ">\n", "output": ">\n\n", "instructions": "\n"},
        instructions=" Say the opposite.",
        prepend_space=False,
    )
    reader, demos, query = tokenizer("gpt2-xl"), [Pair("big", "small")], Pair("hot", "cold")
    prompt = build(reader, template, demos, query, dummy(reader, template, 1))
    assert prompt.text == "<|endoftext|>Task: Say the opposite.\n<big>\n<small>\n\n<hot>\n<"
    assert {"bos_token", "instructions_token", "predictive_token", "end_of_example_token"} < {*prompt.labels}
    assert prompt.labels[0] == "bos_token" and prompt.target == "cold"
    assert reader.decode(prompt.target_ids) == "cold"
    assert str(template) == "<{}>\n<{}>\n\n" and hash(template) == hash(Template(**vars(template)))
    blank = Template({"input": "Q: ", "output": "A: "}, prepend_space=False)
    with pytest.raises(ic.TextError, match="ends in a blank, which words take along: leave it out, and"):
        build(reader, blank, demos, query, dummy(reader, blank, 1))


def test_prompts_without_slots() -> None:
    """Zero-shot and evaluation prompts need no alignment: any template will do."""
    template = Template.of(("x:", "y:"), (" ", ""))
    reader = tokenizer("tiny-llama3-8b")
    demos, query = examples(4, 4)
    prompt = build(reader, template, demos, query, None)
    assert prompt.labels == prompt.slots == () and prompt.ids == tuple(reader(prompt.text)["input_ids"])
    alone = build(reader, QA, [], "hot", dummy(reader, QA, 0))
    assert alone.text == "Q: hot\nA:" and alone.target is None and alone.target_ids == ()
    assert set(alone.labels) == {
        "bos_token", "query_structural_token", "query_demonstration_token", "query_separator_token", LAST,
    }  # fmt: skip


def test_toy_relations() -> None:
    reader = tokenizer("toy")
    for bos, size in ((None, 1), (False, 0)):
        slots = dummy(reader, Template(bos=bos), 5)
        assert len(slots) == size + 5 * 6 + 4
        for name, pairs in relations().items():
            found = Task.of(name, pairs.items())
            demos = [found.pairs[i] for i in found.train[:5]]
            prompt = build(reader, Template(bos=bos), demos, found.pairs[found.test[0]], slots)
            assert prompt.slots == tuple(range(len(slots))) and len(prompt.target_ids) == 1


def test_begin_of_sequence() -> None:
    added, text = tokenizer("tiny-llama3-8b"), tokenizer("gpt2-xl")
    for bos in (None, True):
        assert Template(bos=bos).front(added) == (True, "") and Template(bos=bos).front(text) == (
            False,
            "<|endoftext|>",
        )
    for reader in (added, text):
        prompt = build(reader, Template(bos=False), [], "hot", dummy(reader, Template(bos=False), 0))
        assert prompt.text == "Q: hot\nA:" and prompt.labels[0] == "query_structural_token"
    bare = tiny_tokenizer({"a": 0, "b": 1, " ": 2, "\n": 3, ":": 4, "Q": 5, "A": 6}, [])
    assert Template().front(bare) == (False, "")
    with pytest.raises(ic.TextError, match=r"a BOS is asked for, but \w+ adds none .* pass Template\(bos=None\)"):
        build(bare, Template(bos=True), [], "a", None)
    bare.add_special_tokens({"bos_token": "<s>"})
    assert Template(bos=True).front(bare) == (False, "<s>")
    with pytest.raises(ic.TextError, match=r"makes \['<s>', 'a', '<s>'\] of 'a'; .* know one special token in front"):
        dummy(tiny_tokenizer({"a": 0, "<s>": 1}, [], around=("<s>", 1)), QA, 1)


def tiny_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], around: tuple[str, int] | None = None) -> Any:
    """A BPE tokenizer of a few characters."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if around is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{around[0]} $A {around[0]}", special_tokens=[around]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def test_targets() -> None:
    reader = tokenizer("gpt2-xl")
    prompt = "<|endoftext|>Q: hot\nA:"
    ids = tuple(reader(f"{prompt} cold")["input_ids"])
    cold = ids[len(reader(prompt)["input_ids"]) :]
    for boundary in ("strict", "recompute", "recompute-strict", "reference"):
        assert target_ids(reader, prompt, " cold", boundary=boundary) == cold
    for boundary in ("recompute", "recompute-strict"):  # the blank goes to the answer
        assert target_ids(reader, f"{prompt} ", "cold", boundary=boundary) == cold
    with pytest.raises(
        ic.TextError, match="is no continuation of the prompt: token 8 is 'Ġ' without it, 'Ġcol' with it"
    ):
        target_ids(reader, f"{prompt} ", "cold")
    assert target_ids(reader, f"{prompt} ", "cold", boundary="reference") == cold[1:]
    with pytest.raises(ic.TextError, match="trial 3, clean prompt: the answer '' adds no tokens"):
        target_ids(reader, prompt, "", where="trial 3, clean prompt")
    with pytest.raises(ic.TextError, match=r"'n' adds no tokens to the prompt \(3 tokens, 3 with it\)"):
        target_ids(reader, "Q: i", "n", boundary="reference")  # "i" and "n" become one
    llama = tokenizer("tiny-llama2-7b")
    assert target_ids(llama, "Q: hot\nA:", " cold") == target_ids(llama, "Q: hot\nA:", " cold", special=False)


def test_refusals_name_the_prompt_the_label_and_the_token() -> None:
    reader = tokenizer("tiny-llama3-8b")
    merging = Template.of(("x:", "y:"), (" ", ""))
    demos = [Pair("left", "ta"), Pair("old", "new"), Pair("up", "down")]
    says = (
        r"trial 3, clean prompt: \d+ tokens for \d+ slots: token \d+ \('.*'\) is labelled \w+, slot \d+ is \w+\. The slots "
        r"of template 'x:\{\} y:\{\}' do not align with .*tiny-llama3-8b.*Its output separator is empty"
    )
    with pytest.raises(ic.TextError, match=says):
        slots = dummy(reader, merging, 3)
        for pair in task("antonym").pairs[:50]:
            build(reader, merging, [*demos[:2], pair], Pair("hot", "cold"), slots, where="trial 3, clean prompt")
    with pytest.raises(ic.TextError, match="labelled query_demonstration_token.*nothing stands between the query and"):
        dummy(reader, Template.of(("Q:", ""), ("", "\n")), 1)
    with pytest.raises(ic.PlanError, match="the slots are of template .* 2 demonstrations .* the prompt is of .* 3 "):
        build(reader, QA, demos, "hot", dummy(reader, QA, 2))
    with pytest.raises(ic.PlanError, match="tokenizer .*tiny-llama3-8b.* the prompt is of .*gpt2-xl"):
        build(tokenizer("gpt2-xl"), QA, demos, "hot", dummy(reader, QA, 3))
    with pytest.raises(ic.PlanError, match="0 or more demonstrations, not -1"):
        dummy(reader, QA, -1)
    with pytest.raises(ic.TextError, match="do not fit the 256 of .*take fewer demonstrations"):
        build(tokenizer("toy"), QA, [*task("antonym").pairs[:40]], "hot", None)
    shrinks = tiny_tokenizer(
        {"a": 0, "b": 1, "c": 2, "d": 3, "cd": 4, "bcd": 5, " ": 6}, [("c", "d"), ("b", "cd")]
    )  # "bc" is two tokens, "bcd" one
    template = Template.of(("b", ""), ("d", "d"), prepend_space=False)
    with pytest.raises(ic.TextError, match="trial 1, corrupted prompt: 6 labels for 4 tokens: appending"):
        slots = dummy(shrinks, template, 1)
        build(shrinks, template, [Pair("c", "a")], "c", slots, where="trial 1, corrupted prompt")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"prefixes": {"inputs": "Q:", "output": "A:"}},
            "prefixes of a template have no 'inputs'. Did you mean 'input'",
        ),
        ({"separators": {"input": "\n"}}, "separators of a template lack 'output'"),
        ({"prefixes": {"input": 1, "output": "A:"}}, r"prefixes\['input'\] of a template is text, not 1"),
        ({"boundary": "strickt"}, "no boundary 'strickt'. Did you mean 'strict'"),
    ],
)
def test_templates_that_are_none(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ic.PlanError, match=says):
        Template(**given)


def test_splits() -> None:
    """Published sizes; `test_fv_trials` compares the rows."""
    sizes = {name: (len(t.train), len(t.valid), len(t.test)) for name in TASKS if (t := task(name))}
    assert sizes["antonym"] == (1678, 216, 504) and sum(sizes["country-capital"]) == 197
    for name in TASKS:
        found = task(name)
        assert sorted([*found.train, *found.valid, *found.test]) == list(range(len(found)))
    small = Task.of("small", {"a": "b", "c": "d", "e": "f", "g": "h"}.items())
    assert (len(small.train), len(small.valid), len(small.test)) == (2, 1, 1)
    assert small != Task.of("small", small.pairs, seed=1) and small == Task.of("small", list(small.pairs))
    assert task("product-company").repeated and not task("antonym").repeated
    assert "2398 pairs (1678 training, 216 validation, 504 test; seed 0)" in str(task("antonym"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not JSON"),
        ("{}", "holds a dict, not a list of objects"),
        ("[]", "holds an empty list"),
        ('[["a", "b"]]', r"row 0 is \['a', 'b'\], not an object"),
        ('[{"input": "a", "output": "b"}, {"input": "c"}]', "row 1 has no 'output'. There are: 'input'"),
        ('[{"inputs": "a", "output": "b"}]', "row 0 has no 'input'. Did you mean 'inputs'"),
        ('[{"input": "a", "output": 4}]', r"row 0: output is 4 \(int\), not text; write \"4\""),
        ('[{"input": "a", "output": null}]', r"row 0: output is None \(NoneType\), not text"),
        ('[{"input": " ", "output": "b"}]', "row 0: input is empty"),
    ],
)
def test_task_files_that_are_none(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(content)
    with pytest.raises(ic.InterpError, match=says):
        load_task(path)


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match="no task 'antonyms' .* Did you mean 'antonym'"):
        load_task("antonyms", folder=FV / "tasks")
    with pytest.raises(ic.LoadError, match=r"no task file .*antonyn\.json\. Did you mean 'antonym'"):
        load_task(FV / "tasks/abstractive/antonyn.json")
    for group in ("abstractive", "extractive"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "twice.json").write_text('[{"input": "a", "output": "b"}]')
    with pytest.raises(ic.LoadError, match="twice is ambiguous: .*abstractive.* and .*extractive"):
        load_task("twice", folder=tmp_path)
    with pytest.raises(ic.PlanError, match="test_split is a share between 0 and 1, not 1"):
        Task.of("t", [("a", "b")], test_split=1)
    with pytest.raises(ic.PlanError, match="task t has no pairs"):
        Task.of("t", [])
    with pytest.raises(ic.PlanError, match="no split 'vaild'. Did you mean 'valid'"):
        task("antonym").rows("vaild")
