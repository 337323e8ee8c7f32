r"""Cached examples made of a data set: a model answers, right answers are kept with the spans of the answer.

    interp run build_cache --source needles --count 50 --sentences 80 --model smollm2 --out data/needles
    interp run build_cache --source test.jsonl --model qwen3-8b --form boxed --out data/gsm8k \
        --instruction 'Put the answer in \boxed{}.'
    interp run build_cache --source test.jsonl --targets source --model qwen3-8b --out data/gsm8k

`<out>/<name>.jsonl` holds what is kept, `<out>/answers.jsonl` every answer with what became of it, `<out>/counts.json`
how many of each. A run that was stopped goes on at the first example without an answer. See docs/attribution_caches.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from interp_plugins.attribution.data.building import REASONS, Form, build
from interp_plugins.attribution.data.cache import Example, Profile
from interp_plugins.attribution.data.sources import MADE, mapped, read_source

import interp_core as ic
from interp_core import errors, runs

ANSWERS = "answers.jsonl"


class BuildCacheConfig(ic.Config):
    """Which examples are answered by which model, and what is kept of the answers.

    Attributes:
        source: a data set's file, or needles, two_steps or toy_needles, which are made up.
        model: who answers, and whose tokens the spans count.
        out: folder of the run (default: one below results/).
        name: of the cache (default: the source's).
        kind: of the source: ruler, gsm8k, math, morehopqa or cache (default: told by its first row).
        targets: the model's answers, or the source's own solutions (gsm8k and math), for which no model is run.
        form: boxed (reasoning and one box at the end) or contains (the reference answer stands in it).
        instruction: what the model is told, on a line after every prompt; it becomes part of the cached prompt.
        num_examples: stop when so many are kept.
        max_new_tokens: for an answer.
        keep_unfinished: also take answers that did not come to an end.
        profile: how prompts are shown to the model, sound or reference.
        batch_size: prompts in a pass.
        count: how many examples are made up.
        seed: of what is made up.
        sentences: of needles: how much of the text is noise.
        hidden: of needles: how many numbers are hidden in it.
        hops: of toy_needles: how many aliases lead to the answer.
    """

    source: str
    model: str = "toy:text"
    out: Path | None = None
    name: str | None = None
    kind: str | None = None
    targets: Literal["model", "source"] = "model"
    form: Form = "contains"
    instruction: str = ""
    num_examples: int | None = None
    max_new_tokens: int = 128
    keep_unfinished: bool = False
    profile: Profile = "sound"
    batch_size: int = 8
    count: int = 20
    sentences: int = 40
    hidden: int = 1
    hops: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuse what asks for nothing.

        Raises:
            PlanError: naming it.
        """
        for name in ("count", "batch_size", "max_new_tokens", "num_examples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ic.PlanError(f"{name} is {number}: give at least 1")


def build_cache(config: BuildCacheConfig) -> Path:
    """Build cached examples; returns the file.

    Raises:
        LoadError: a source or model that cannot be read.
        PlanError: settings that contradict each other, or a folder of another run.
        TextError: nothing could be kept.
    """
    config.check()
    cache = _cache(config.name or Path(config.source).stem)
    examples = _examples(config)
    digest = runs.digest([example.row() for example in examples])
    model = ic.load(config.model) if config.targets == "model" else None
    # how many are kept, and how many run together, changes none of them
    identity = config.model_dump(exclude={"out", "batch_size", "num_examples"})
    with runs.open(config.out, identity, recipe="build_cache", model=model, dataset=cache) as run:
        if run.shards is not None and config.num_examples is None:
            listed = run.map(
                ANSWERS, lambda some: _some(model, examples, some, config), range(len(examples)), by=lambda i: i,
                inputs={"source": digest}, batch=config.batch_size, strict=True,
            )  # fmt: skip
            return _written(run, cache, listed, None)
        # how many are answered until enough are kept depends on all answers before
        with run.rows(ANSWERS, key="example", inputs={"source": digest}) as rows:
            todo = [i for i in range(len(examples)) if i not in rows]
            answers = _rows(model, [examples[i] for i in todo], config)
            _answer(rows, zip(todo, answers, strict=False), len(examples), config.num_examples)
            listed = sorted(rows, key=lambda row: int(row["example"]))
        return _written(run, cache, listed, config.num_examples)


def _cache(name: str) -> str:
    """A cache's name, as long as its file takes no other's place."""
    if name == "answers" or Path(name).name != name:
        raise ic.PlanError(
            f"a cache cannot be called {name!r}: give --name, a plain one; answers.jsonl is the run's own"
        )
    return name


def _answer(
    rows: runs.Rows, answers: Iterator[tuple[int, dict[str, Any]]], count: int, num_examples: int | None
) -> None:
    """Add what becomes of the examples, until enough are kept."""
    kept = sum(row["row"] is not None for row in rows)
    with ic.Progress("examples answered", count) as told:
        told.add(len(rows))
        while num_examples is None or kept < num_examples:
            i, row = next(answers, (None, {}))
            if i is None:
                return
            rows.add({"example": i, **row})
            kept += row["row"] is not None
            told.add()


def _examples(config: BuildCacheConfig) -> list[Example]:
    """The source's examples."""
    source = config.source
    if Path(source).suffix in (".json", ".jsonl") or Path(source).exists():
        return read_source(source, config.kind)
    if source not in MADE:
        raise ic.LoadError(
            f"there is no file {source}, and nothing made up of that name. {errors.nearest(source, MADE)}"
        )
    takes = {"needles": ("sentences", "hidden"), "toy_needles": ("hops",)}.get(source, ())
    return MADE[source](config.count, seed=config.seed, **{name: getattr(config, name) for name in takes})


def _some(
    model: ic.Model | None, examples: list[Example], numbers: Sequence[int], config: BuildCacheConfig
) -> list[dict[str, Any]]:
    """Rows of some examples."""
    answers = _rows(model, [examples[i] for i in numbers], config)
    return [{"example": i, **row} for i, row in zip(numbers, answers, strict=True)]


def _rows(model: ic.Model | None, examples: list[Example], config: BuildCacheConfig) -> Iterator[dict[str, Any]]:
    """What became of each example: the row of the cache or None, why, and what was written."""
    if model is None:
        tokenizer = ic.open_tokenizer(config.model)
        for example in examples:
            solved = mapped(example, tokenizer)
            reason = "" if solved is not None else "no_span"
            yield {"row": solved and solved.row(), "reason": reason, "answer": example.target}
        return
    how = {name: getattr(config, name) for name in ("form", "instruction", "max_new_tokens", "keep_unfinished")}
    for built in build(model, examples, **how, profile=config.profile, batch_size=config.batch_size):
        row = built.example.row() if built.example is not None else None
        yield {"row": row, "reason": built.reason, "answer": built.answer}


def _written(run: runs.RunFolder, name: str, rows: list[dict[str, Any]], num_examples: int | None) -> Path:
    """The cache and its counts.

    Raises:
        TextError: nothing was kept.
    """
    kept = [row["row"] for row in rows if row["row"] is not None][:num_examples]
    reasons = Counter(row["reason"] for row in rows if row["row"] is None)
    words = "; ".join(f"{number} × {reason}: {REASONS[reason]}" for reason, number in reasons.most_common())
    run.put({f"{name}.jsonl": runs.json_lines(kept)}, after=[ANSWERS])
    run.json("counts.json", {"examples": len(rows), "kept": len(kept), "dropped": dict(reasons)})
    if not kept:
        raise ic.TextError(f"none of {len(rows)} examples could be kept: {words}; {run.path / ANSWERS} has the answers")
    print(f"kept {len(kept)} of {len(rows)}" + (f"; left out {words}" if words else ""))
    return run.path / f"{name}.jsonl"
