"""Stages of the recipe `visual_phase1`: what each runs, keeps, and hands on.

sanity      every sample through `ic.visual_check`; a check that fails ends the run
causal      pilots → τ, further samples → curves → cliff_boundary, with the hash of the records
truncation  answers with the image gone from layers of a grid on; the boundary is run if the grid lacks it
geometry    of visual and text rows; the ratio of effective ranks at a boundary that comes from other samples
checkpoint  gates and verdict, from records alone
overlay     which visual tokens one sample's answer needs
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from interp_plugins.attribution.over_image import places_of
from interp_plugins.geometry.result import GeometryResult
from interp_plugins.visual import gates
from interp_plugins.visual.gates import Gate, Judgement
from interp_plugins.visual.records import Records
from interp_plugins.visual.truncation import answered

import interp_core as ic
from interp_core import runs

from ..visual_data import Asking, Row, each, note_bad, stacked
from .findings import Causal, Geometry, Truncation
from .gates import gate_rows
from .horizon import Removals
from .plan import Plan
from .samples import REENCODED, Sample, Samples

ATTRIBUTION = "ifr"
NO_DEPENDENCE = "not run: no visual dependence measurable"


# Sanity


def sanity(run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking) -> dict[str, Any]:
    """The battery on every sample, with its table.

    Raises:
        CapabilityError: a check failed; nothing else is run.
    """

    def checked(sample: Sample) -> Row:
        pair = (sample.tokens(model, asking, mode) for mode in ("", "random"))
        battery = ic.visual_check(model, *pair, strict=False)
        place = str(ic.VisualCheck(battery.rows)).splitlines()[1]
        return {"place": place, "errors": battery.errors, "limits": battery.limits, "why": battery.why}

    def check() -> dict[str, Any]:
        worst: dict[str, float | None] = {}
        why: dict[str, str] = {}
        limits: dict[str, float] = {}
        rows = run.map("sanity", checked, data.every, by=lambda sample: sample.name, strict=True, file=False)
        for sample, row in zip(data.every, rows, strict=True):
            limits |= row["limits"]
            for name, error in row["errors"].items():
                before = worst.get(name)
                # `not <=`, so that an error that is not a number stands as the worst
                if name not in worst or (error is not None and (before is None or not error <= before)):
                    worst[name] = error
                    if name in row["why"]:
                        why[name] = f"{sample.name}: {row['why'][name].removeprefix('row 0: ')}"
        whole = ic.VisualCheck((), worst, limits, why)
        holds = {name: name not in whole.failed for name, error in worst.items() if error is not None}
        unreached = [name for name, error in worst.items() if error is None]
        head, *ends = str(whole).splitlines()
        places = [f"{number:3}{row['place'][3:]}" for number, row in enumerate(rows)]  # each is row 0 of its own table
        return {"ok": whole.ok, "checks": holds, "unreached": unreached, "errors": worst, "why": why,
                "table": [head, *places, *ends]}  # fmt: skip

    battery = run.stage("sanity.json", check, after=["samples.json"], shared=True)
    print(*battery["table"], sep="\n")
    if not battery["ok"]:
        failed = [name for name, holds in battery["checks"].items() if not holds]
        raise ic.CapabilityError(
            f"images do not do in this model what visual methods take for granted ({failed[0]}: "
            f"{battery['why'][failed[0]]}); the run stops here, {run.path / 'sanity.json'} has the table"
        )
    return dict(battery)


# Causal


def causal(run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking, plan: Plan) -> Causal:
    """Records of pilots, then of the further samples if the pilots show any dependence."""
    rows = _records(run, model, data.pilots, asking, plan, "pilots")
    cause = Causal.of_pilots(Records.of(rows[0]), plan, model.n_layers, rows[1])
    if not cause.stopped:
        more = _records(run, model, data.others, asking, plan, "samples")
        difficulty = {sample.name: sample.question.difficulty for sample in data.others}
        cause = cause.with_samples(Records.of([*rows[0], *more[0]]), plan, difficulty, [*rows[1], *more[1]])
    run.put({"causal/records.jsonl": cause.records.text()})
    elsewhere = plan.cliff_boundary is not None
    source = {"given": elsewhere, "record": _record_hash(plan.causal_record) if elsewhere else cause.records.hash}
    run.json("causal/causal.json", cause.row() | {"cliff_boundary": cause.cliff, "cliff_boundary_from": source})
    print(*cause.sentences(), sep="\n")
    return cause


def _record_hash(record: str | None) -> str | None:
    """The hash of a record that is named by its file, or itself."""
    if record is None or not Path(record).is_file():
        return record
    return hashlib.sha256(Path(record).read_bytes()).hexdigest()


def _records(
    run: runs.RunFolder, model: ic.Model, samples: Sequence[Sample], asking: Asking, plan: Plan, name: str
) -> tuple[list[Row], list[Row]]:
    """Records of samples, and of those that the model does not run why."""
    every = run.map(
        f"causal/rows_{name}.jsonl", lambda sample: _measured(model, sample, asking, plan), samples,
        by=lambda sample: sample.name, strict=asking.strict,
    )  # fmt: skip
    bad = [{"sample": row["sample"], "where": "causal", "reason": row["failed"]} for row in every if "failed" in row]
    return [row for row in every if "failed" not in row], bad


def _measured(model: ic.Model, sample: Sample, asking: Asking, plan: Plan) -> list[Row]:
    more: dict[str, Any] = {}
    names = list(plan.interventions)
    try:
        # the noise floor is of pilots alone: what the same image, written anew, does to the answer
        if sample.pilot and plan.null_image == "jpeg":
            names = list(dict.fromkeys((*names, "replace:swap")))
            more["swap"] = {REENCODED: sample.tokens(model, asking, REENCODED)}
        elif "replace:swap" in names:
            more["swap"] = {"image": sample.tokens(model, asking, "random")}
        result = ic.method("visual")(
            model, sample.tokens(model, asking), interventions=names, window=plan.window, seed=plan.seed,
            blind={mode: sample.tokens(model, asking, mode) for mode in plan.blind},
            layers=None if plan.layers is None else list(plan.layers), **more,
        )  # fmt: skip
        records = result.records([sample.name], [sample.image], groups=[sample.question.kind], pilots=[sample.pilot])
        if not all(np.isfinite(row["delta"]) for row in records.rows):
            raise ic.ReadError("its effects are not finite; another dtype may do")
    except ic.InterpError as error:
        # said, not listed: the row that is kept tells the next run, too
        note_bad([], sample.name, "causal", error, asking.strict)
        return [{"sample": sample.name, "failed": str(error)}]
    return [dict(row) for row in records.rows]


# Truncation


def truncation(
    run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking, plan: Plan, cause: Causal
) -> Truncation:
    """Answers of the further samples, with the image gone from each layer of the grid on, and with a random image."""
    header = cause.header()
    if cause.stopped:
        run.json("truncation/truncation.json", header | {"status": NO_DEPENDENCE})
        return Truncation(None, records=cause.records.hash)
    grid = plan.grid(model.n_layers, cause.cliff)
    samples = [sample for sample in data.others if sample.name in set(cause.samples)]
    gone = [*((layer, None) for layer in [*grid, None]), *plan.bands(model.n_layers)]
    every = run.map(
        "truncation/answers.jsonl",
        lambda cells: _answers(model, [sample for sample, _ in cells], asking, *cells[0][1]),
        [(sample, layers) for layers in gone for sample in samples],
        by=lambda cell: _cell(cell[0].name, *cell[1]), strict=asking.strict,
        batch=4 * asking.batch_size, alike=lambda cell: cell[1],  # a stopped run loses no more than a few batches
    )  # fmt: skip
    cut = Truncation.of(every, grid, samples, model.n_layers, plan, cause)
    run.json("truncation/truncation.json", header | cut.row())
    return cut


def _cell(sample: str, layer: int | None, stop: int | None = None) -> str:
    return f"{sample} @ {'random image' if layer is None else layer if stop is None else f'{layer} to {stop - 1}'}"


def _answers(
    model: ic.Model, samples: Sequence[Sample], asking: Asking, layer: int | None, stop: int | None = None
) -> list[Row]:
    """Answers without the image from a layer on, or before layer `stop` again with it; None: with the random image."""
    bad: list[Row] = []
    where = "answers with the random image" if layer is None else f"answers without the image from layer {layer} on"
    where = where if stop is None else f"answers without the image in layers {layer} to {stop - 1}"
    mode = "random" if layer is None else ""

    def work(part: Sequence[Sample]) -> list[str]:
        prompts = stacked([sample.tokens(model, asking, mode, answer=False) for sample in part])
        if layer is None:
            return list(model.generate(prompts, max_new_tokens=asking.max_new_tokens).texts)
        return answered(model, prompts, [layer], stop=stop, max_new_tokens=asking.max_new_tokens)[layer]

    texts = each(where, where, samples, lambda sample: sample.name, work, asking, bad)
    failed = {row["sample"]: row["reason"] for row in bad}
    rows = []
    for sample in samples:
        row: Row = {"cell": _cell(sample.name, layer, stop), "sample": sample.name, "layer": layer, "stop": stop}
        if sample.name in failed:
            rows.append(row | {"failed": failed[sample.name]})
            continue
        score = asking.scorer(texts[sample.name], sample.question.answers)
        rows.append(row | {"text": texts[sample.name], "score": score.value, "gold": score.gold,
                           "problem": score.problem})  # fmt: skip
    return rows


# Geometry


def geometry(
    run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking, plan: Plan, cause: Causal
) -> Geometry:
    """Geometry of the further samples' rows; the samples that the model does not run are left out."""
    header = cause.header()
    if cause.stopped:
        run.json("geometry/geometry.json", header | {"status": NO_DEPENDENCE})
        return Geometry(None)
    inputs = {"samples": list(cause.samples)}
    name = "geometry/result"
    if not run.kept(name, inputs=inputs):
        samples = [sample for sample in data.others if sample.name in set(cause.samples)]
        result, names, bad = _geometry(model, samples, asking, plan)
        files = {f"{name}/{file}": content for file, content in result.files().items()}
        noted = {"samples": names, "skipped": bad}
        run.put({**files, "geometry/samples.json": runs.json_text(noted)}, stage=name, inputs=inputs)
    noted = json.loads((run.path / "geometry/samples.json").read_text(encoding="utf-8"))
    shape = Geometry.of(GeometryResult.load(run.path / name), noted, cause, plan)
    run.json("geometry/geometry.json", header | shape.row())
    return shape


def _geometry(
    model: ic.Model, samples: Sequence[Sample], asking: Asking, plan: Plan
) -> tuple[GeometryResult, list[str], list[Row]]:
    bad: list[Row] = []
    method = partial(ic.method("geometry"), model, seed=plan.seed)

    def measured(part: Sequence[Sample]) -> Any:
        prompts, others = (
            [sample.tokens(model, asking, mode, answer=False) for sample in part] for mode in ("", "random")
        )
        return method(
            stacked(prompts), against=others, clusters=[sample.image for sample in part], batch_size=asking.batch_size
        )

    try:
        return measured(samples), [sample.name for sample in samples], bad
    except ic.InterpError:
        # the method takes all samples at once, so that one that fails is found by running each alone
        good = []
        for sample in samples:
            try:
                measured([sample])
                good.append(sample)
            except ic.InterpError as error:
                note_bad(bad, sample.name, "geometry", error, asking.strict)
        if not good:
            raise
        return measured(good), [sample.name for sample in good], bad


# Checkpoint


def checkpoint(
    run: runs.RunFolder, checks: Mapping[str, Any], cause: Causal, cut: Truncation, shape: Geometry, gone: Removals,
    plan: Plan,
) -> Judgement:  # fmt: skip
    """Gates and verdict."""
    g0 = gates.sanity_gate(checks["checks"], runs.digest(checks)[:16])
    every: list[Gate] = [g0, *gate_rows(cause, cut, shape, gone, plan)]
    judged = gates.judge(every, plan.thresholds)
    run.json("checkpoint_eval/checkpoint_eval.json", judged.row() | cause.header())
    lines = ["| gate | status | number | interval | demanded | records | |", "|---|---|---|---|---|---|---|"]
    for gate in judged.gates:
        interval = "" if gate.low is None else f"{gate.low:.4g} to {gate.high:.4g}"
        number = "" if gate.number is None else f"{gate.number:.4g}"
        lines.append(
            f"| {gate.name} | {gate.status} | {number} | {interval} | {gate.threshold} | {gate.records} | {gate.why} |"
        )
    lines += ["", f"Verdict: **{judged.verdict}** (exit code {judged.exit_code}, thresholds {judged.thresholds})", ""]
    run.put({"checkpoint_eval/checkpoint_eval.md": "\n".join(lines)})
    print(judged)
    return judged


# Overlay


def overlay(run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking, cause: Causal) -> dict[str, Any]:
    """Maps of one sample: knockout by visual tokens, and an attribution where it works on the model."""
    name = cause.shown_sample([sample.name for sample in data.every])
    sample = next(sample for sample in data.every if sample.name == name)

    def make() -> dict[str, Any]:
        tokens = sample.tokens(model, asking)
        places = places_of(model, tokens)[0]
        length, values, notes = tokens.lengths[0], {}, []
        try:
            result = ic.method("visual_map")(model, tokens)
            values["visual_map"] = _on_places(result.loss[0].tolist(), tokens, length)
        except ic.InterpError as error:
            notes.append(f"visual_map: {error}")
        try:
            values[ATTRIBUTION] = ic.method(ATTRIBUTION)(model, tokens).scores[0].nan_to_num().tolist()
        except ic.InterpError as error:
            notes.append(f"{ATTRIBUTION}: {error}")
        return {"sample": name, "places": [list(place) for place in places], "values": values, "notes": notes}

    return dict(run.stage("overlay/overlay.json", make, inputs={"sample": name})) | {"picture": sample.picture,
                                                                                       "of": sample}  # fmt: skip


def _on_places(numbers: Sequence[float], tokens: ic.Tokens, length: int) -> list[float]:
    """Numbers of a row's visual tokens at their positions; 0 elsewhere."""
    out = [0.0] * length
    for place, value in zip(tokens.rows.names["vision"][0], numbers, strict=False):
        out[place] = 0.0 if value != value else float(value)
    return out
