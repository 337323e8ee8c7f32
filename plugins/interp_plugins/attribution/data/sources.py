"""Data sets as examples: prompts with the answer that is to come, and needles where the source says where they are.

    kind        rows                                                  prompt
    ruler       input, answer_prefix, outputs, needle_spans           input and prefix
                or prompt, answers, needle_char_spans                 the prompt
    gsm8k       question, answer as "… #### 18"                       the question
    math        problem, solution with a box, answer                  the problem
    morehopqa   question, answer, context of titles and sentences     the paragraphs, a line break, the question

Source: `attribution_datasets.py` and `map_math_mine_to_exp2_cache.py` of FlashTrace at 075e7e4 (kinds `ruler`, `gsm8k`,
`morehopqa`); Hsieh et al. (2024), RULER, arXiv:2404.06654; Cobbe et al. (2021), GSM8K, arXiv:2110.14168; Hendrycks et
al. (2021), MATH, arXiv:2103.03874; Schnitzler et al. (2024), MoreHopQA, arXiv:2406.13397.

Sources give no target: a model writes it (`building`), or, of the two kinds whose answer shows the reasoning, the
answer is mapped: reasoning, a line break, the final answer, which is the sink. Boxes are taken off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import errors
from interp_core.toys.text import NAMES, needle_example

from ..._json_files import json_rows, parsed
from .examples import FIELDS, Example, boxes, example_of, with_spans

Row = Mapping[str, Any]


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(map(repr, row)) or "nothing"
        raise ic.LoadError(f"{where}: {errors.wrong(name, 'a text', value)}; the row has {there}")
    return value


def _example(prompt: str, target: str | None, metadata: Row, where: str) -> Example:
    none = dict.fromkeys(FIELDS)
    return example_of(none | {"prompt": prompt, "target": target, "metadata": metadata}, where)


def _ruler(row: Row, where: str) -> Example:
    published = "input" in row
    text = row.get("input") if published else _text(row, "prompt", where)
    prefix, outputs = row.get("answer_prefix") or "", row.get("outputs" if published else "answers") or []
    if not isinstance(text, str) or not isinstance(outputs, list) or not outputs:
        raise ic.LoadError(f"{where} lacks the answers: {errors.wrong('outputs', 'a list of texts', outputs)}")
    spans = row.get("needle_spans")
    if not published:
        pairs = row.get("needle_char_spans") or []
        spans = [{"span": list(pair), "snippet": text[slice(*pair)]} for pair in pairs]
    metadata = {
        "dataset": "ruler", "length": row.get("length", row.get("tokens_qwen2.5")), "outputs": outputs,
        "answer_prefix": prefix, "needle_spans": spans, "reference_answer": ", ".join(map(str, outputs)),
    }  # fmt: skip
    return _example(text + prefix, None, metadata, where)


def _gsm8k(row: Row, where: str) -> Example:
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    reasoning, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise ic.LoadError(f"{where}: the answer has no '####' with the final answer after it: {answer[-40:]!r}")
    return _solved(question, reasoning, final, "math_mine", {"raw_question": question, "raw_answer": answer}, where)


def _math(row: Row, where: str) -> Example:
    problem, solution, answer = (_text(row, name, where) for name in ("problem", "solution", "answer"))
    for start, stop, inner in reversed(boxes(solution)):
        solution = solution[:start] + inner + solution[stop:]
    return _solved(problem, solution, answer, "math500", {"unique_id": row.get("unique_id")}, where)


def _solved(prompt: str, reasoning: str, answer: str, dataset: str, more: Row, where: str) -> Example:
    """An example with the source's own solution as its target."""
    reasoning, answer = reasoning.strip(), answer.strip()
    metadata = {"dataset": dataset, **more, "reference_answer": answer, "boxed_answer": answer}
    target = f"{reasoning}\n{answer}" if reasoning else answer
    return _example(prompt.strip(), target, metadata, where)


def _morehopqa(row: Row, where: str) -> Example:
    question, answer, context = _text(row, "question", where), str(row.get("answer") or ""), row.get("context")
    if not answer:
        raise ic.LoadError(f"{where} lacks 'answer'; it has {', '.join(map(repr, row))}")
    try:
        paragraphs = ["".join(sentences) for _, sentences in context or ()]
    except (TypeError, ValueError) as error:
        takes = "a list of [title, [sentence, …]]"
        raise ic.LoadError(f"{where}: {errors.wrong('context', takes, context)}") from error
    metadata = {
        "dataset": "morehopqa", "answer": answer, "id": row.get("_id"), "original_context": context,
        "reference_answer": answer,
    }  # fmt: skip
    return _example(" ".join(paragraphs) + "\n" + question, None, metadata, where)


KINDS: dict[str, tuple[frozenset[str], Callable[[Row, str], Example]]] = {
    "ruler": (frozenset({"input", "outputs"}), _ruler),
    "math": (frozenset({"problem", "solution"}), _math),
    "morehopqa": (frozenset({"question", "context"}), _morehopqa),
    "gsm8k": (frozenset({"question", "answer"}), _gsm8k),
    "cache": (frozenset({"prompt", "metadata"}), example_of),
}
"""Kinds of source: the keys by which a row is known, and what makes an example of it."""


def kind_of(row: Row, where: str) -> str:
    """The kind of source that a row is of.

    Raises:
        LoadError: none.
    """
    if {"prompt", "answers"} <= set(row):
        return "ruler"
    for kind, (keys, _) in KINDS.items():
        if keys <= set(row):
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, (keys, _) in KINDS.items())
    raise ic.LoadError(f"{where} has {', '.join(map(repr, row))}, which is no source that is known ({known})")


def source_rows(path: str | Path) -> list[tuple[str, Row]]:
    """The rows of a JSON list or of JSON lines, each with its place for messages.

    Raises:
        LoadError: a file that cannot be read, or that holds anything else.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ic.LoadError(f"{path} cannot be read ({error}); give a .jsonl file, or a .json list of rows") from error
    if not content.lstrip().startswith("["):
        return [(f"{path}, line {number}", row) for number, row in json_rows(path)]
    rows = [(f"{path}, row {number}", row) for number, row in enumerate(parsed(content, str(path), "JSON list"))]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ic.LoadError(f"{where} is a {type(row).__name__}; a row is a JSON object")
    return rows


def read_source(path: str | Path, kind: str | None = None) -> list[Example]:
    """The examples of a data set.

    Args:
        kind: one of `KINDS` (default: told by the first row).

    Raises:
        LoadError: a file that cannot be read, or a row that lacks something, with file, row and what.
        PlanError: no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ic.PlanError(f"there is no kind of source {kind!r}. {errors.nearest(kind, KINDS)}")
    rows = source_rows(path)
    if not rows:
        raise ic.LoadError(f"{path} holds no row")
    make = KINDS[kind or kind_of(rows[0][1], rows[0][0])][1]
    examples = []
    for number, (where, row) in enumerate(rows):
        example = make(row, where)
        if example.metadata.get("dataset") in ("math_mine", "math500"):
            noted = {"dataset": example.metadata["dataset"], "source_path": str(path), "example_idx": number}
            example = replace(example, metadata={**noted, **example.metadata})
        examples.append(example)
    return examples


def mapped(example: Example, tokenizer: Any) -> Example | None:
    """An example of a source that gives the reasoning, with the spans of its final answer: no model is asked. None
    where no token holds the answer.

    Raises:
        TextError: the source gives no reasoning.
    """
    if example.target is None:
        raise ic.TextError(
            f"{example.where} has no solution; let a model write one, or give a source of kind gsm8k or math"
        )
    marked = with_spans(example, tokenizer)
    if marked is None:
        return None
    count = len(tokenizer(example.target, add_special_tokens=False)["input_ids"])
    return replace(marked, metadata={**marked.metadata, "target_tokens": count})


# Made up


NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
    "The river runs past the old mill.", "A cat sleeps on the warm wall.", "Nobody remembers who planted the oak.",
)  # fmt: skip
THINGS = ("apples", "pears", "coins", "stamps", "shells", "marbles", "books", "cards")
PEOPLE = ("Alice", "Bob", "Carol", "Dan", "Erin", "Frank", "Grace", "Heidi", "Ivan", "Judy")
PLACES = ("garden", "bridge", "library", "harbour", "museum", "station", "market", "castle")


def needles(count: int, sentences: int, *, hidden: int = 1, seed: int = 0) -> list[Example]:
    """Prompts in which a number is hidden between other sentences (NIAH: one of `hidden` places is asked for).

    Args:
        count: how many.
        sentences: that are noise, in each; about five tokens per sentence.
        hidden: places with a number.
        seed: of the draws.

    Raises:
        PlanError: more hidden numbers than places or sentences.
    """
    if not 1 <= hidden <= min(len(PLACES), sentences):
        raise ic.PlanError(f"hidden={hidden}: give 1 to {min(len(PLACES), sentences)} for {sentences} sentences")
    rng = random.Random(seed)
    return [_needle(rng, sentences, hidden, f"needle {i}") for i in range(count)]


def _needle(rng: random.Random, sentences: int, hidden: int, where: str) -> Example:
    places = rng.sample(PLACES, hidden)
    numbers = [str(rng.randrange(100, 1000)) for _ in places]
    at = sorted(rng.sample(range(sentences), hidden))
    facts = {
        i: f"The special number of the {place} is {number}."
        for i, place, number in zip(at, places, numbers, strict=True)
    }
    wanted = rng.randrange(hidden)
    prompt, spans = "", []
    for i in range(sentences):
        if i in facts:
            if i == at[wanted]:
                spans.append({"span": [len(prompt), len(prompt) + len(facts[i])], "snippet": facts[i]})
            prompt += facts[i] + " "
        prompt += rng.choice(NOISE) + " "
    prompt += f"\nWhat is the special number of the {places[wanted]}?"
    return _made_up("needles", prompt, numbers[wanted], spans, where)


def two_steps(count: int, *, seed: int = 0) -> list[Example]:
    """Short questions that take two steps: a number of one person, what another has more, and how many that makes."""
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        (a, b), thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
        has, more = rng.randrange(2, 9), rng.randrange(2, 9)
        facts = (f"{a} has {has} {thing}.", f"{b} has {more} more {thing} than {a}.")
        prompt = f"{facts[0]} {facts[1]} How many {thing} does {b} have?"
        spans = [{"span": [prompt.index(fact), prompt.index(fact) + len(fact)], "snippet": fact} for fact in facts]
        examples.append(_made_up("two_steps", prompt, str(has + more), spans, f"question {i}"))
    return examples


def _made_up(dataset: str, prompt: str, answer: str, spans: Sequence[Row], where: str) -> Example:
    metadata = {"dataset": dataset, "reference_answer": answer, "outputs": [answer], "needle_spans": list(spans)}
    return _example(prompt, None, metadata, where)


def toy_needles(count: int, *, hops: int = 0, chains: int = 3, seed: int = 0) -> list[Example]:
    """Prompts of `toy:text` whose next token is a value, with the value and the aliases on the way to it as needles."""
    most = len(NAMES) // chains - 1
    if not 0 <= hops <= most:
        raise ic.PlanError(
            f"hops={hops}: give 0 to {most} for {chains} values, which have {len(NAMES)} names between them"
        )
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        drawn = needle_example(rng, chains, hops)
        ranges = [chars for name, chars in drawn.evidence.items() if name != "query"]
        spans = [{"span": list(chars), "snippet": drawn.prompt[slice(*chars)]} for chars in ranges]
        examples.append(_made_up("toy_needles", drawn.prompt, drawn.answer.strip(), spans, f"toy {i}"))
    return examples


MADE: dict[str, Callable[..., list[Example]]] = {"needles": needles, "two_steps": two_steps, "toy_needles": toy_needles}
"""Sources that are made up, by name."""
