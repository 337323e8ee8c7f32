"""Cached examples of one tokenizer made those of another: their spans are moved by the target's characters.

    interp run remap_spans --in_jsonl niah_mq_q2.jsonl math.jsonl --out_dir mapped --old_tokenizer_model qwen3-8b \
        --new_tokenizer_model llama-3.1-8b-instruct

Every file is written to `out_dir` under its own name, whole, once all of them are mapped; the run's record stands
beside the folder, in `{out_dir}.runs`. Standard output is JSON: a line per file, then all of it. Examples that cannot
be moved are left out, counted there by reason, and named on standard error. See docs/attribution_caches.md.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp_plugins.attribution.data.cache import json_rows
from interp_plugins.attribution.data.span_moves import REASONS, moved

import interp_core as ic
from interp_core import runs

from .configs import words


class RemapSpansConfig(ic.Config):
    """Which cached examples are made those of which tokenizer.

    Attributes:
        in_jsonl: files of cached examples (several, also joined by commas).
        out_dir: where they go, under the same names.
        old_tokenizer_model: whose tokens the spans count: a folder, a hub id, or toy:text.
        new_tokenizer_model: whose tokens they are to count.
        allow_fallback_answer: where a span cannot be moved, look for the answer that metadata has.
        strict: an example that cannot be moved is an error, and nothing is written.
        overwrite: replace files that another run or a person left there.
    """

    in_jsonl: list[str]
    out_dir: Path
    old_tokenizer_model: str
    new_tokenizer_model: str
    allow_fallback_answer: bool = False
    strict: bool = False
    overwrite: bool = False

    def paths(self) -> list[Path]:
        """The files.

        Raises:
            PlanError: none, or two of one name.
        """
        paths = [Path(name) for name in words(self.in_jsonl)]
        if not paths:
            raise ic.PlanError("in_jsonl names no file; give at least one file of cached examples")
        names = [path.name for path in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ic.PlanError(
                f"two files are called {twice}, and both would be written to {self.out_dir / twice}; map them apart"
            )
        return paths


def remap_spans(config: RemapSpansConfig) -> None:
    """Move the spans of cached examples to another tokenizer.

    Raises:
        LoadError: a file or tokenizer that cannot be read.
        PlanError: two files of one name, or one that is there already.
        TextError: with `strict`, an example that cannot be moved.
    """
    paths = config.paths()
    tokenizers = config.model_dump(include={"old_tokenizer_model", "new_tokenizer_model"})
    settings = {
        "in_jsonl": [str(path) for path in paths], **tokenizers, "allow_fallback_answer": config.allow_fallback_answer,
    }  # fmt: skip
    with runs.publish(
        config.out_dir, settings, recipe="remap_spans", overwrite=config.overwrite, say=lambda line: None
    ) as record:
        record.claim([path.name for path in paths], stage="remapped")
        old, new = map(ic.open_tokenizer, tokenizers.values())
        files, reports = {}, []
        with ic.Progress("rows") as told:
            for path in paths:
                rows, report = _mapped(path, old, new, config, told)
                files[path.name] = runs.json_lines(rows)
                reports.append({"in_jsonl": str(path), "out_jsonl": str(config.out_dir / path.name), **report})
        record.put(files, stage="remapped")
    for report in reports:
        print(json.dumps(report, ensure_ascii=False))
    print(json.dumps({**tokenizers, "datasets": reports}, ensure_ascii=False, indent=2))


def _mapped(
    path: Path, old: Any, new: Any, config: RemapSpansConfig, told: ic.Progress
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """The rows of a file that could be moved, and counts of all."""
    rows: list[Mapping[str, Any]] = []
    errors: Counter[str] = Counter()
    total = 0
    for number, row in json_rows(path):
        total += 1
        told.add()
        remapped, reason = moved(row, old, new, allow_fallback_answer=config.allow_fallback_answer)
        if remapped is not None:
            rows.append(remapped)
            continue
        spans = ", ".join(f"{name} {row.get(name)}" for name in ("indices_to_explain", "sink_span"))
        told_of = f"{path}, line {number}: {reason}: {REASONS[reason]} ({spans})"
        if config.strict:
            hint = "" if config.allow_fallback_answer else "; --allow_fallback_answer looks for the answer in metadata"
            raise ic.TextError(f"{told_of}. Leave --strict out to drop it{hint}")
        print(f"dropped {told_of}", file=sys.stderr)
        errors[reason] += 1
    return rows, {"total": total, "mapped_ok": len(rows), "dropped": total - len(rows), "errors": errors}
