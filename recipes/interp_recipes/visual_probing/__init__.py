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
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from interp_plugins.probe.places import LEAKY, Pooling
from interp_plugins.probe.study import Decoder
from interp_plugins.questions import Questions

import interp_core as ic
from interp_core import runs

from .. import visual_data
from ..visual_data import Asking, Dataset, Row
from .findings import Behaviour, Cliff, Findings, Position
from .probes import Grouping, Probing, probed
from .report import files_of, write_all
from .samples import (
    BLOCK,
    MODES,
    AskingProbes,
    Shown,
    answer_rows,
    block_bytes,
    label_of,
    read_block,
    read_note,
    shown,
)

POSITIONS = ("text_instruction_token", "visual_token", "answer_token")
YES_NO = ("yes", "no")
PROFILES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"max_samples": 18, "repeats": 1, "shuffles": 100},
    "full": {"max_samples": 400, "repeats": 5, "shuffles": 100},
}
"""What is not set by its flag."""
DRAWN = 8
"""The toy's questions that are drawn for one that is asked: it has eight kinds."""


def visual_probing(
    model: str = visual_data.TOY, profile: Literal["smoke", "full"] = "full", out: Path | None = None,
    dataset: Dataset | None = None, data_path: Path | None = None, images: Path | None = None, split: str | None = None,
    kinds: list[str] | None = None, classes: list[str] | None = None, max_samples: int | None = None,
    positions: list[str] | None = None, cliff_boundary: int | None = None, causal_record: str | None = None,
    decoder: Decoder = "ridge", pooling: Pooling = "mean", group_by: Grouping = "image", shuffles: int | None = None,
    n_folds: int = 5, repeats: int | None = None, scorer: str | None = None, prompt: str | None = None,
    max_new_tokens: int = 16, max_model_len: int | None = None, batch_size: int = 8, tp_size: int = 1,
    device: str | None = None, dtype: str | None = None, seed: int = 0, strict: bool = False,
) -> Path:  # fmt: skip
    """Probe a model's states with the image and without, and let it answer; returns the page.

    Args:
        model: toy:vision, a folder, or a hub id of a vision-language model.
        profile: smoke (18 samples, all files, verdicts inconclusive) or full (400 samples, 5 x 5 folds).
        out: folder of the run; the same command goes on there.
        dataset: chartqa, docvqa, vqav2, pope, plain, or toy (drawn).
        data_path, images: its file or folder, and the folder of its images where that is another.
        split: of chartqa.
        kinds: only questions of these kinds.
        classes: the answers that are labels; questions with others are not asked (None: yes and no).
        max_samples: questions, drawn by `seed`, each kind in its share.
        positions: of probes, by the names above, or any span.
        cliff_boundary: the first layer after the cliff, over which means are taken (None: over all layers).
        causal_record: of the causal study that found it: its file (causal.json), or its hash.
        decoder, pooling: ridge, logistic, means, lda, mlp; of the visual tokens: mean, max, midpoint.
        group_by: image, or image_and_question where labels go with the questions' words.
        shuffles, n_folds, repeats: of the probes; fewer than 100 shuffled labelings are inconclusive.
        scorer: of answers (None: that of the data set).
        prompt: words of the question with {question} in them (None: those of the data set).
        max_new_tokens, max_model_len: of an answer; samples that are longer with it are left out.
        batch_size: samples that run together; changes no number beyond rounding.
        tp_size, device, dtype: CUDA devices that the layers are laid over, or where and as what the model is loaded.
        seed: of the selection, donors, folds and shuffles.
        strict: the first sample that cannot be used ends the run; else it is listed and left out.

    Raises:
        PlanError, LoadError: settings or files that cannot be used, before the model is loaded where they tell.
        CapabilityError: a model that reads no images.
    """
    which = visual_data.dataset_of(dataset, data_path, model)
    given = {"max_samples": max_samples, "repeats": repeats, "shuffles": shuffles}
    sizes = {**PROFILES[profile], **{name: value for name, value in given.items() if value is not None}}
    labels, words = tuple(classes or YES_NO), visual_data.PROMPTS[which] if prompt is None else prompt
    asking = AskingProbes(
        words, max_model_len, max_new_tokens, batch_size, visual_data.scorer_of(which, scorer), strict,
        tuple(positions or POSITIONS), pooling,
    )  # fmt: skip
    probing = Probing(decoder, sizes["shuffles"], n_folds, sizes["repeats"], group_by, seed)
    _check(asking, probing, labels, sizes["max_samples"], cliff_boundary, causal_record)
    record = _causal(cliff_boundary, causal_record)
    selected = _selected(which, data_path, images, split, kinds, labels, sizes["max_samples"], seed)
    loaded = visual_data.visual_model(model, device=device, dtype=dtype, tp_size=tp_size)
    cliff = _cliff(loaded, cliff_boundary, *record)
    settings = _settings(which, selected[0], labels, asking, probing, cliff)
    with runs.open(out, settings, recipe="visual_probing", model=loaded, dataset=which, free=("batch_size",)) as run:
        run.claim(files_of(asking.positions))  # before any work
        return _run(run, loaded, labels, asking, probing, cliff, *selected)


def _settings(
    dataset: str, questions: Questions, classes: Sequence[str], asking: AskingProbes, probing: Probing, cliff: Cliff
) -> dict[str, object]:
    """What the numbers depend on, beside the model."""
    return {
        "dataset": dataset, "questions": visual_data.digest_of(questions), "n_questions": len(questions),
        "classes": list(classes), **{k: v for k, v in vars(asking).items() if k != "strict"},
        "scorer": str(asking.scorer), **vars(probing), "cliff_boundary": cliff.boundary, "causal_record": cliff.hash,
    }  # fmt: skip


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
    made = run.stage(
        "samples.json", lambda: shown(model, list(questions), classes, asking, skipped, probing.seed).record()
    )
    data = Shown.of(made, by_name)
    files, left_out = _states(run, model, data, asking)
    answers, failed = _answers(run, model, data, asking)
    bad = {row["sample"] for row in (*left_out, *failed)}
    kept = [number for number, sample in enumerate(data.samples) if sample.name not in bad]
    if not kept:
        first = (*left_out, *failed)[0]
        raise ic.PlanError(f"the model runs none of the {len(data.samples)} samples; the first: {first['reason']}")
    found = []
    for place in asking.positions:
        comparison, why, constant = probed(run, data, kept, place, files, probing)
        found.append(Position(place, comparison, why, cliff, constant))
    samples = [data.samples[number] for number in kept]
    findings = Findings(
        found, _behaviour(answers, data, kept, asking), cliff, [sample.label for sample in samples],
        [*data.skipped, *left_out, *failed], unused,
        sum(sample.label == data.samples[sample.donor].label for sample in samples),
        sum(sample.name in data.resized for sample in samples), data.colour,
    )  # fmt: skip
    return write_all(run, model, findings)


def _states(
    run: runs.RunFolder, model: ic.Model, data: Shown, asking: AskingProbes
) -> tuple[dict[str, list[str]], list[Row]]:
    """The files of states of each mode, block by block; and the samples that the model does not run."""
    files: dict[str, list[str]] = {}
    bad: list[Row] = []
    everyone = range(len(data.samples))
    for mode in MODES:
        for start in range(0, len(everyone), BLOCK):
            name = f"states/{mode}/{start // BLOCK:04d}.safetensors"
            make = partial(read_block, model, data, mode, everyone[start : start + BLOCK], asking)
            bad += run.stage(name, make, after=["samples.json"], read=read_note, data=block_bytes)[1]["skipped"]
            files.setdefault(mode, []).append(name)
    return files, bad


def _answers(
    run: runs.RunFolder, model: ic.Model, data: Shown, asking: AskingProbes
) -> tuple[dict[str, dict[str, Row]], list[Row]]:
    """The model's answers in each mode by sample; and the samples for which it has none."""
    answers: dict[str, dict[str, Row]] = {}
    bad: list[Row] = []
    for mode in MODES:
        with run.rows(f"answers/{mode}.jsonl", key="sample") as rows:
            todo = [number for number, sample in enumerate(data.samples) if sample.name not in rows]
            for start in range(0, len(todo), BLOCK):
                for row in answer_rows(model, data, mode, todo[start : start + BLOCK], asking):
                    rows.add(row)
            answers[mode] = {row["sample"]: row for row in rows}
        bad += [{"sample": row["sample"], "where": f"{mode}, answering", "reason": row["failed"]}
                for row in answers[mode].values() if row["failed"]]  # fmt: skip
    return answers, bad


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


# Settings


def _check(
    asking: AskingProbes, probing: Probing, classes: Sequence[str], count: int, cliff: int | None, record: str | None
) -> None:
    """Raises:
    PlanError: settings out of range, before anything is loaded.
    """
    visual_data.check_prompt(asking.prompt)
    if len(set(classes)) < len(classes) or len(classes) < 2:
        raise ic.PlanError(f"classes: {', '.join(classes)}; two different answers at least are to be told apart")
    if len(set(asking.positions)) < len(asking.positions):
        raise ic.PlanError(f"positions: {', '.join(asking.positions)}; give each once")
    if LEAKY in asking.positions:
        raise ic.PlanError(
            f"{LEAKY} is the label itself and decodes at 1.0 everywhere; take answer_token, which predicts it"
        )
    least = {
        "max_samples": (count, 2), "n_folds": (probing.n_folds, 2), "repeats": (probing.repeats, 1),
        "shuffles": (probing.shuffles, 0), "max_new_tokens": (asking.max_new_tokens, 1),
        "batch_size": (asking.batch_size, 1), "cliff_boundary": (cliff or 0, 0),
    }  # fmt: skip
    for name, (value, low) in least.items():
        if value < low:
            raise ic.PlanError(f"{name} is {value}: give at least {low}")
    if record is not None and cliff is None:
        raise ic.PlanError("--causal_record says where a cliff was found; give the layer too: --cliff_boundary")


def _causal(cliff: int | None, record: str | None) -> tuple[str, str]:
    """The causal record, and its hash (of a file, its sha256); empty where none is named.

    Raises:
        PlanError: neither a file nor a hash, or a file that found another cliff.
    """
    if record is None:
        return "", ""
    path = Path(record)
    if not path.is_file():
        if 16 <= len(record) <= 64 and set(record.lower()) <= set("0123456789abcdef"):
            return "", record.lower()
        raise ic.PlanError(f"--causal_record {record}: no such file, and no hash of a record")
    content = path.read_bytes()
    try:
        there = json.loads(content)
    except ValueError:
        there = None
    said = there.get("cliff_boundary") if isinstance(there, dict) else None
    if isinstance(said, int) and said != cliff:
        raise ic.PlanError(f"--cliff_boundary is {cliff}, {path} found {said}; give that, or another record")
    return str(path), hashlib.sha256(content).hexdigest()


def _selected(
    dataset: Dataset, data_path: Path | None, images: Path | None, split: str | None, kinds: Sequence[str] | None,
    classes: Sequence[str], count: int, seed: int,
) -> tuple[Questions, dict[str, int], list[Row]]:  # fmt: skip
    """The questions that are asked; how many are not, by why; and rows that cannot be used.

    Raises:
        LoadError: fewer than two questions have one of the answers.
    """
    drawn = DRAWN * count if kinds is None else 2 * count
    every = visual_data.questions_of(
        dataset, data_path, images, count=drawn, seed=seed, kinds=kinds, split=split
    )  # fmt: skip
    fitting = every.where(lambda question: label_of(question, classes) is not None)
    if len(fitting) < 2:
        raise ic.LoadError(
            f"{len(fitting) or 'none'} of {len(every)} questions of {every.source} is answered by "
            f"{' or '.join(classes)}, and it takes two; give --classes, the answers that are labels"
        )
    chosen = fitting.select(min(count, len(fitting)), seed=seed).checked()
    skipped = [{"sample": row.where, "where": row.field, "reason": row.detail} for row in chosen.skipped]
    unused = {f"they are not answered by {' or '.join(classes)}": len(every) - len(fitting),
              "max_samples were drawn": max(len(fitting) - count, 0)}  # fmt: skip
    if dataset == "toy":
        unused = {}  # as many can be drawn as one likes
    return chosen, {why: number for why, number in unused.items() if number}, skipped
