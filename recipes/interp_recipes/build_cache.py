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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from interp_plugins.attribution.data.building import REASONS, Form, build
from interp_plugins.attribution.data.cache import Example, Profile
from interp_plugins.attribution.data.sources import MADE, mapped, read_source

import interp_core as ic
from interp_core import errors, runs


def build_cache(
    source: str,
    model: str = "toy:text",
    out: Path | None = None,
    name: str | None = None,
    kind: str | None = None,
    targets: Literal["model", "source"] = "model",
    form: Form = "contains",
    instruction: str = "",
    num_examples: int | None = None,
    max_new_tokens: int = 128,
    keep_unfinished: bool = False,
    profile: Profile = "sound",
    batch_size: int = 8,
    count: int = 20,
    sentences: int = 40,
    hidden: int = 1,
    hops: int = 0,
    seed: int = 0,
) -> Path:
    """Build cached examples; returns the file.

    Args:
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
        count, seed: of what is made up.
        sentences, hidden: of needles: how much is noise, and how many numbers are in it.
        hops: aliases of toy_needles.

    Raises:
        LoadError: a source or model that cannot be read.
        PlanError: settings that contradict each other, or a folder of another run.
        TextError: nothing could be kept.
    """
    settings = {key: value for key, value in locals().items() if key not in ("out", "batch_size", "num_examples")}
    _demand_counts(count=count, batch_size=batch_size, max_new_tokens=max_new_tokens, num_examples=num_examples)
    cache = _cache(name or Path(source).stem)
    examples = _examples(
        source, kind, {"count": count, "sentences": sentences, "hidden": hidden, "hops": hops, "seed": seed}
    )
    digest = runs.digest([one.row() for one in examples])
    loaded = ic.load(model) if targets == "model" else None
    with runs.open(out, settings, recipe="build_cache", model=loaded, dataset=cache) as run:
        with run.rows("answers.jsonl", key="example", inputs={"source": digest}) as rows:
            todo = [i for i in range(len(examples)) if i not in rows]
            made = _rows(loaded or model, [examples[i] for i in todo], settings, batch_size)
            _answer(rows, zip(todo, made, strict=False), len(examples), num_examples)
            listed = sorted(rows, key=lambda row: int(row["example"]))
        return _written(run, cache, listed, num_examples)


def _demand_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ic.PlanError(f"{name} is {value}: give at least 1")


def _cache(name: str) -> str:
    """A cache's name, as long as its file takes no other's place."""
    if name == "answers" or Path(name).name != name:
        raise ic.PlanError(
            f"a cache cannot be called {name!r}: give --name, a plain one; answers.jsonl is the run's own"
        )
    return name


def _answer(rows: runs.Rows, made: Iterator[tuple[int, dict[str, Any]]], count: int, num_examples: int | None) -> None:
    """Add what becomes of the examples, until enough are kept."""
    kept = sum(row["row"] is not None for row in rows)
    with ic.Progress("examples answered", count) as told:
        told.add(len(rows))
        while num_examples is None or kept < num_examples:
            i, row = next(made, (None, {}))
            if i is None:
                return
            rows.add({"example": i, **row})
            kept += row["row"] is not None
            told.add()


def _examples(source: str, kind: str | None, made: dict[str, int]) -> list[Example]:
    """The source's examples."""
    if Path(source).suffix in (".json", ".jsonl") or Path(source).exists():
        return read_source(source, kind)
    if source not in MADE:
        raise ic.LoadError(
            f"there is no file {source}, and nothing made up of that name. {errors.nearest(source, MADE)}"
        )
    takes = {"needles": ("sentences", "hidden"), "toy_needles": ("hops",)}.get(source, ())
    return MADE[source](made["count"], seed=made["seed"], **{key: made[key] for key in takes})


def _rows(model: Any, examples: list[Example], settings: dict[str, Any], batch_size: int) -> Iterator[dict[str, Any]]:
    """What became of each example: the row of the cache or None, why, and what was written."""
    if settings["targets"] == "source":
        tokenizer = ic.open_tokenizer(model)
        for example in examples:
            found = mapped(example, tokenizer)
            reason = "" if found is not None else "no_span"
            yield {"row": found and found.row(), "reason": reason, "answer": example.target}
        return
    names = ("form", "instruction", "max_new_tokens", "keep_unfinished", "profile")
    for built in build(model, examples, **{name: settings[name] for name in names}, batch_size=batch_size):
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
    run.put({f"{name}.jsonl": runs.json_lines(kept)}, after=["answers.jsonl"])
    run.json("counts.json", {"examples": len(rows), "kept": len(kept), "dropped": dict(reasons)})
    if not kept:
        raise ic.TextError(
            f"none of {len(rows)} examples could be kept: {words}; {run.path / 'answers.jsonl'} has the answers"
        )
    print(f"kept {len(kept)} of {len(rows)}" + (f"; left out {words}" if words else ""))
    return run.path / f"{name}.jsonl"
