"""What can be decoded of a yes/no answer with the image and without it, layer by layer, beside the model's own answers.

    interp run visual_probing --model toy:vision --profile smoke --out DIR
    interp run visual_probing --model PATH --dataset chartqa --data_path FOLDER --cliff_boundary 24 --causal_record FILE

writes into DIR (none: results/{model}/{dataset}/{timestamp}-visual_probing-{hash})

    visual_probing.html             the page: sentences, table, curves, answers, samples that were left out
    probing.json                    all of it as plain data
    tables/probing.csv              position by position: original, blind modes, delta, interval, p, nulls, verdict
    tables/curves.csv               position, mode, layer: accuracy and interval, nulls, control task, gain and band
    tables/behaviour.csv            mode by mode: score and interval, paired difference to the original
    tables/skipped.csv              questions that could not be used, and why
    figures/*.png                   curves and gains of each position, answers
    answers/*.jsonl                 what the model answered in each mode
    samples.json, states/, probes/  from which a stopped run goes on

Image modes: original, blind_black, blind_mean, blind_randomimage. Positions: text_instruction_token, visual_token,
answer_token (the token that predicts the answer). Rules, nulls and formulas: docs/visual_probing.md.

Source: ours; names of positions, modes and of the table are those of the GAP 2.0 studies. Their bootstrap over layers
and their answer position, which leaks the label, are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from interp_plugins.questions import Questions

import interp_core as ic
from interp_core import runs

from .. import visual_data
from ..visual_data import Asking, Row
from .config import VisualProbingConfig
from .findings import Behaviour, Cliff, Findings, Position
from .probes import Probing, probed, probes_file
from .report import files_of, write_all
from .samples import BLOCK, MODES, AskingProbes, Shown, answer_rows, block_bytes, label_of, read_block, read_note, shown

DRAWN = 8
"""The toy's questions that are drawn for one that is asked: it has eight kinds."""


def visual_probing(config: VisualProbingConfig) -> Path:
    """Probe a model's states with the image and without, and let it answer; returns the page.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
        CapabilityError: a model that reads no images.
    """
    dataset, labels, asking, probing = config.named_dataset(), config.labels, config.asking(), config.probing()
    record = _causal(config.cliff_boundary, config.causal_record)
    selected = _selected(config)
    model = config.load()
    cliff = _cliff(model, config.cliff_boundary, *record)
    settings = {
        "dataset": dataset, "questions": visual_data.digest_of(selected[0]), "n_questions": len(selected[0]),
        "classes": list(labels), **{k: v for k, v in vars(asking).items() if k != "strict"},
        "scorer": str(asking.scorer), **vars(probing), "cliff_boundary": cliff.boundary, "causal_record": cliff.hash,
    }  # fmt: skip
    free = ("batch_size",)
    with runs.open(config.out, settings, recipe="visual_probing", model=model, dataset=dataset, free=free) as run:
        run.claim(files_of(asking.positions))  # before any work
        return _run(run, model, labels, asking, probing, cliff, *selected)


def _cliff(model: ic.Model, boundary: int | None, record: str, digest: str) -> Cliff:
    """Raises:
    PlanError: a boundary that is no layer of the model.
    """
    if boundary is not None and boundary > model.n_layers:
        raise ic.PlanError(
            f"--cliff_boundary {boundary}: the model has layers 0 to {model.n_layers - 1}, and its output is "
            f"{model.n_layers}"
        )
    return Cliff(boundary, record, digest, model.n_layers + 1)


def _run(
    run: runs.RunFolder, model: ic.Model, classes: Sequence[str], asking: AskingProbes, probing: Probing, cliff: Cliff,
    questions: Questions, unused: Mapping[str, int], skipped: Sequence[Row],
) -> Path:  # fmt: skip
    """Samples, then states and answers of each mode, then probes, then what they say."""
    by_name = {question.name: question for question in questions}
    record = run.stage(
        "samples.json", lambda: shown(model, list(questions), classes, asking, skipped, probing.seed).record()
    )
    data = Shown.of(record, by_name)
    files, left_out = _states(run, model, data, asking)
    answers, failed = _answers(run, model, data, asking)
    bad = {row["sample"] for row in (*left_out, *failed)}
    kept = [number for number, sample in enumerate(data.samples) if sample.name not in bad]
    if not kept:
        first = (*left_out, *failed)[0]
        raise ic.PlanError(f"the model runs none of the {len(data.samples)} samples; the first: {first['reason']}")
    results = []
    fit = partial(probed, run, data, kept, files=files, probing=probing)
    _share(run, asking.positions, fit, [data.samples[number].name for number in kept])
    for place in asking.positions:
        comparison, why, constant = fit(place)
        results.append(Position(place, comparison, why, cliff, constant))
    samples = [data.samples[number] for number in kept]
    findings = Findings(
        results, _behaviour(answers, data, kept, asking), cliff, [sample.label for sample in samples],
        [*data.skipped, *left_out, *failed], unused,
        sum(sample.label == data.samples[sample.donor].label for sample in samples),
        sum(sample.name in data.resized for sample in samples), data.colour,
    )  # fmt: skip
    return write_all(run, model, findings)


def _states(
    run: runs.RunFolder, model: ic.Model, data: Shown, asking: AskingProbes
) -> tuple[dict[str, list[str]], list[Row]]:
    """The files of states of each mode, block by block; and the samples that the model does not run."""
    everyone = range(len(data.samples))
    blocks = {
        f"states/{mode}/{start // BLOCK:04d}.safetensors": (mode, everyone[start : start + BLOCK])
        for mode in MODES for start in range(0, len(everyone), BLOCK)
    }  # fmt: skip

    def block(name: str) -> Row:
        make = partial(read_block, model, data, *blocks[name], asking)
        return run.stage(name, make, after=["samples.json"], read=read_note, data=block_bytes)[1]

    rows = run.map(
        "states", block, blocks, by=lambda name: name, inputs={"samples": runs.digest(data.record())}, strict=True,
        beside=lambda name, rows: [name], file=False,
    )  # fmt: skip
    files = {mode: [name for name, (of, _) in blocks.items() if of == mode] for mode in MODES}
    return files, [skipped for row in rows for skipped in row["skipped"]]


def _share(run: runs.RunFolder, places: Sequence[str], fit: Callable[[str], Any], kept: Sequence[str]) -> None:
    """Have the processes at work on the run fit probes, each those of a position, whose file is then there."""

    def probe(place: str) -> Row:
        return {"files": [probes_file(place)] if fit(place)[0] is not None else []}

    run.map(
        "probes", probe, places, by=lambda place: place, inputs={"kept": list(kept)}, strict=True,
        beside=lambda place, rows: rows[0]["files"], file=False,
    )  # fmt: skip


def _answers(
    run: runs.RunFolder, model: ic.Model, data: Shown, asking: AskingProbes
) -> tuple[dict[str, dict[str, Row]], list[Row]]:
    """The model's answers in each mode by sample; and the samples for which it has none."""
    answers: dict[str, dict[str, Row]] = {}
    bad: list[Row] = []
    for mode in MODES:
        rows = _mode_answers(run, model, data, mode, asking)
        answers[mode] = {row["sample"]: row for row in rows}
        bad += [{"sample": row["sample"], "where": f"{mode}, answering", "reason": row["failed"]}
                for row in rows if row["failed"]]  # fmt: skip
    return answers, bad


def _mode_answers(run: runs.RunFolder, model: ic.Model, data: Shown, mode: str, asking: AskingProbes) -> list[Row]:
    return run.map(
        f"answers/{mode}.jsonl", lambda numbers: answer_rows(model, data, mode, numbers, asking),
        range(len(data.samples)), by=lambda number: data.samples[number].name, batch=BLOCK, strict=asking.strict,
    )  # fmt: skip


def _behaviour(answers: Mapping[str, Mapping[str, Row]], data: Shown, kept: Sequence[int], asking: Asking) -> Behaviour:
    names = [data.samples[number].name for number in kept]
    rows = {mode: [by_name[name] for name in names] for mode, by_name in answers.items()}
    return Behaviour(
        {mode: np.array([row["score"] for row in of]) for mode, of in rows.items()},
        {mode: sum(bool(row["problem"]) for row in of) for mode, of in rows.items()},
        {mode: sum(not row["ended"] for row in of) for mode, of in rows.items()},
        [data.samples[number].image for number in kept],
        str(asking.scorer),
    )


def _causal(cliff: int | None, record: str | None) -> tuple[str, str]:
    """The causal record, and its hash (of a file, its sha256); empty where none is named.

    Raises:
        PlanError: neither a file nor a hash, or a file that found another cliff.
    """
    if record is None:
        return "", ""
    path = Path(record)
    if not path.is_file():
        # a whole sha256, or its beginning, as reports print it
        if 16 <= len(record) <= 64 and set(record.lower()) <= set("0123456789abcdef"):
            return "", record.lower()
        raise ic.PlanError(f"--causal_record {record}: no such file, and no hash of a record")
    content = path.read_bytes()
    try:
        there = json.loads(content)
    except ValueError:
        there = None
    recorded = there.get("cliff_boundary") if isinstance(there, dict) else None
    if isinstance(recorded, int) and recorded != cliff:
        raise ic.PlanError(f"--cliff_boundary is {cliff}, {path} found {recorded}; give that, or another record")
    return str(path), hashlib.sha256(content).hexdigest()


def _selected(config: VisualProbingConfig) -> tuple[Questions, dict[str, int], list[Row]]:
    """The questions that are asked; how many are not, by why; and rows that cannot be used.

    Raises:
        LoadError: fewer than two questions have one of the answers.
    """
    count, answers = config.count, " or ".join(config.labels)
    every = config.questions(DRAWN * count if config.kinds is None else 2 * count)
    fitting = every.where(lambda question: label_of(question, config.labels) is not None)
    if len(fitting) < 2:
        raise ic.LoadError(
            f"{len(fitting) or 'none'} of {len(every)} questions of {every.source} is answered by {answers}, and it "
            "takes two; give --classes, the answers that are labels"
        )
    chosen = fitting.select(min(count, len(fitting)), seed=config.seed).checked()
    skipped = [{"sample": row.where, "where": row.field, "reason": row.detail} for row in chosen.skipped]
    unused = {f"they are not answered by {answers}": len(every) - len(fitting),
              "max_samples were drawn": max(len(fitting) - count, 0)}  # fmt: skip
    if config.named_dataset() == "toy":
        unused = {}  # as many can be drawn as one likes
    return chosen, {why: number for why, number in unused.items() if number}, skipped
