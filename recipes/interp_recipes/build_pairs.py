"""Aligned pairs for `moe_experts` and `moe_nll`, of programming problems or of transcripts of your own.

    interp run build_pairs --source HumanEval.jsonl.gz --tokenizer qwen3-coder --out data/pairs
    interp run build_pairs --source transcripts.jsonl --tokenizer qwen3-coder --out data/pairs

A problem has prompt and canonical_solution (HumanEval's form), and both contexts are written around it; a row of your
own has name, agentic, assisted (texts, or lists of messages) and target, the text that stands in both. `<out>/` gets
`pair_tokens.json`, `dropped.csv` (samples and targets that were left out, and why) and `counts.json`. No model is run.
See docs/moe_pairs.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_plugins.pairs import Pair
from interp_plugins.pairs.building import build_pairs as built
from interp_plugins.pairs.files import pairs_text
from interp_plugins.pairs.problems import Form, contexts_of, read_rows

import interp_core as ic
from interp_core import runs

FILE = "pair_tokens.json"


class BuildPairsConfig(ic.Config):
    """Of which rows pairs are made, and for which tokenizer.

    Attributes:
        source: a .json or .jsonl file of problems or transcripts, gzipped or not.
        tokenizer: of the model that the pairs are for: a folder, a hub id, toy:text.
        out: folder of the run (default: one below results/).
        max_samples: the first so many rows.
        form: chat or plain, how problems are written (None: chat where the tokenizer has a template).
        strict: the first row of which no pair can be made ends the run; without it, it is left out and listed.
    """

    source: Path
    tokenizer: str
    out: Path | None = None
    max_samples: int | None = None
    form: Form | None = None
    strict: bool = False


def build_pairs(config: BuildPairsConfig) -> Path:
    """Build aligned pairs; returns the file.

    Raises:
        LoadError: a source or tokenizer that cannot be read.
        PlanError: settings out of range, or a folder of another run.
        TextError: no pair could be made.
    """
    source, strict = config.source, config.strict
    if config.max_samples is not None and config.max_samples < 1:
        raise ic.PlanError(f"max_samples is {config.max_samples}: give at least 1, or leave it out for all")
    rows, opened = read_rows(source)[: config.max_samples], ic.open_tokenizer(config.tokenizer)
    form = config.form or ("chat" if getattr(opened, "chat_template", None) else "plain")
    dropped: list[dict[str, Any]] = []

    def bad(name: str, error: ic.InterpError) -> None:
        print(f"  left out {name}: {error}")
        dropped.append({"sample": name, "targets": "", "reason": str(error)})

    def contexts() -> Iterator[Mapping[str, Any]]:
        for row in rows:
            try:
                yield contexts_of(row, form)
            except ic.TextError as error:
                if strict:
                    raise
                bad(str(row.get("task_id", "a row")), error)

    vocabulary = runs.digest([sorted(opened.get_vocab().items()), str(getattr(opened, "chat_template", ""))])
    settings = {"rows": runs.digest(rows), "tokenizer": vocabulary, "form": form}
    with runs.open(config.out, settings, recipe="build_pairs", dataset=source.name.split(".")[0]) as run:
        pairs = list(built(opened, contexts(), None if strict else bad))
        if not pairs:
            raise ic.TextError(f"{source}: no pair could be made; the first: {dropped[0]['reason']}")
        return _written(run, pairs, dropped, len(rows))


def _written(run: runs.RunFolder, pairs: Sequence[Pair], dropped: list[dict[str, Any]], rows: int) -> Path:
    """The pairs, what was left out, and counts."""
    reasons: Counter[str] = Counter()
    for pair in pairs:
        reasons.update(pair.dropped)
        dropped += [{"sample": pair.name, "targets": n, "reason": why} for why, n in pair.dropped.items()]
    targets = sum(map(len, pairs))
    run.put({FILE: pairs_text(pairs)})
    run.table("dropped.csv", dropped, ["sample", "targets", "reason"])
    run.json("counts.json", {"rows": rows, "pairs": len(pairs), "targets": targets, "dropped_targets": dict(reasons)})
    left = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    print(f"{len(pairs)} pairs of {rows} rows, {targets:,} targets" + (f"; left out: {left}" if left else ""))
    return run.path / FILE
