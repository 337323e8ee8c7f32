"""What is done with a question, stage by stage; each goes on from the files that an earlier run has left.

    mean activations  stepD_mean_acts/qid_<Q>_clean_mean.pt       heads on the clean prompts, per slot
    effects           cie_scores.csv, trial_metrics.jsonl         z of one head on a corrupted prompt set to its mean
    vector            aie_scores.csv, top_heads.json, fv_*.pt     the heads of largest mean effect, summed
    injection         step6/layer_<l>/                            the vector added on prompts without demonstrations
    summary           step6/step6_all_layers_summary.json         the best layer

Effects are written trial by trial, evaluations layer by layer, everything whole or not at all. The evaluations of all
layers come from one sweep, so that a stopped one starts again; it is short, since its prompts are.

Source: Todd et al. (2024), arXiv:2310.15213, one relation's question at a time.
Cost, for T-token prompts, t-token queries, L layers and H heads: trials × (3·L·T + H·L(L + 1)/2) + prompts × (L·t +
L(L + 1)/2) token-layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import interp_core as ic
from interp_core.result import write

from ..artefacts import lines, pt, text
from ..effects import Head
from ..files import read_means
from ..inject import head_injection
from ..means import mean_head_activations
from .draws import Work
from .injected import SUMMARY, evaluate_layers, make_vector, missing_layers, summarise
from .measures import MEASURES, as_they_are, measured
from .settings import RelationSettings
from .status import Status, holds_numbers
from .tables import Means, Row, cie_rows, csv_table, read_cie, read_json, read_lines


def is_complete(folder: Path, layers: Sequence[int]) -> bool:
    """Whether every file of a question is there."""
    names = (
        "sampled_trials.json", "sampled_trials_zeroshot.json", _means_file(folder), "cie_scores.csv",
        "trial_metrics.jsonl", "aie_scores.csv", "top_heads.json", "fv_global_resid.pt", "fv_global_resid_meta.json",
        "fv_by_layer.pt", SUMMARY,
    )  # fmt: skip
    return all((folder / name).is_file() for name in names) and not missing_layers(folder, layers)


def _means_file(folder: Path) -> str:
    return f"stepD_mean_acts/qid_{folder.name}_clean_mean.pt"


def run_question(model: ic.Model, work: Work, settings: RelationSettings, layers: Sequence[int], at: Status) -> Row:
    """All stages; returns the summary of layers.

    Raises:
        InterpError: from the stage that `at` then names.
    """
    at.stage = "trials"
    for draft in work.folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        draft.unlink()
    write_trials(work)
    at.stage = "mean activations"
    mean = mean_activations(model, work)
    at.stage = "effects"
    rows = effects(model, work, mean)
    at.stage = "vector"
    vector = make_vector(model, work, mean, rows, settings)
    at.stage = "injection"
    evaluate_layers(model, work, vector, settings, layers)
    at.stage = "summary"
    return summarise(work, settings, layers)


def write_trials(work: Work) -> None:
    """The two files of trials. If numbers are there, these must be the trials that they came from.

    Raises:
        LoadError: they are others.
    """
    bound = holds_numbers(work.folder)
    for name, data in (("sampled_trials.json", work.sampled), ("sampled_trials_zeroshot.json", work.zeroshot)):
        path = work.folder / name
        if bound and path.is_file() and read_json(path)["trials"] != data["trials"]:
            raise ic.LoadError(f"{path} holds other trials than these pairs and settings give; delete {work.folder}")
        write(path, text(data))


def mean_activations(model: ic.Model, work: Work) -> Means:
    """Means over the clean prompts, from the file if there is one."""
    path = work.folder / _means_file(work.folder)
    if path.is_file():
        return read_means(path, model)
    mean = mean_head_activations(model, [trial.clean for trial in work.trials])
    write(path, pt(mean))
    return mean


def effects(model: ic.Model, work: Work, mean: Means) -> list[Row]:
    """Effects of every head in every trial; trials that are on file are not run again."""
    scores, metrics = work.folder / "cie_scores.csv", work.folder / "trial_metrics.jsonl"
    found, said = read_cie(scores), read_lines(metrics)
    done = len({row["trial_idx"] for row in found})
    if len(found) != done * len(model.heads) or len(said) < done:
        raise ic.LoadError(f"{scores} does not hold {len(model.heads)} heads of every trial; delete it and {metrics}")
    table, told = csv_table(found), lines(said[:done])
    q_id, slot = work.question.q_id, work.trials[0].clean.slots[-1]
    edits = head_injection(mean, [Head(*place, 0.0) for place in model.heads], model, slot=slot)
    for trial in work.trials[done:]:
        patched = measured(model, [trial.corrupted], edits)
        target = trial.clean.target_ids[0]
        rows = cie_rows(q_id, trial.number, target, model.heads, patched)
        line: Row = {
            "q_id": q_id, "trial_idx": trial.number, "query_source_index": work.sources[trial.query_index],
            "target_str": trial.clean.target, "target_id": target,
            "target_token": model.tokenizer.convert_ids_to_tokens(target),
        }  # fmt: skip
        clean, top = as_they_are(model, [trial.clean])
        for kind, numbers, first in (("clean", clean, top), ("corrupted", patched.clean, patched.clean_top)):
            line |= {f"{measure}_{kind}": float(x) for measure, x in zip(MEASURES, numbers[:, 0], strict=True)}
            line |= {f"pred_id_{kind}": int(first[0]), f"accuracy_{kind}": float(int(first[0]) == target)}
        found += rows
        table += csv_table(rows, header=not table)
        told += lines([line])
        write(metrics, told)
        write(scores, table)
    return found
