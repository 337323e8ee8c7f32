"""What is done with a question, stage by stage; each goes on from the files that an earlier run has left.

    mean activations  stepD_mean_acts/qid_<Q>_clean_mean.pt       heads on the clean prompts, per slot
    effects           cie_scores.csv, trial_metrics.jsonl         z of one head on a corrupted prompt set to its mean
    vector            aie_scores.csv, top_heads.json, fv_*.pt     the heads of largest mean effect, summed
    injection         step6/layer_<l>/                            the vector added on prompts without demonstrations
    summary           step6/step6_all_layers_summary.json         the best layer

Every stage is kept while its files are whole and of the same trials. Effects are noted trial by trial, evaluations
layer by layer. The evaluations of all layers come from one sweep, so that a stopped one starts again; it is short,
since its prompts are.

Source: Todd et al. (2024), arXiv:2310.15213, one relation's question at a time.
Cost, for T-token prompts, t-token queries, L layers and H heads: trials × (3·L·T + H·L(L + 1)/2) + prompts × (L·t +
L(L + 1)/2) token-layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import interp_core as ic
from interp_core import runs

from ..effects import Head
from ..files.answers import MEASURES, as_they_are, measured
from ..files.published import read_means
from ..files.trials import Trial
from ..inject import head_injection
from ..means import mean_head_activations
from .draws import Work
from .injected import evaluate_layers, make_vector, summarise
from .settings import RelationSettings
from .tables import Means, Row, cie_rows

STAGES = ("rows", "trials", "mean activations", "effects", "vector", "injection", "summary")
"""Where a question can fail."""
TRIALS, ZEROSHOT = "sampled_trials.json", "sampled_trials_zeroshot.json"


def run_question(
    model: ic.Model, work: Work, settings: RelationSettings, layers: Sequence[int], part: runs.Part
) -> Row:
    """All stages; returns the summary of layers.

    Raises:
        InterpError: from the stage that `part.doing` then names.
    """
    part.doing = "trials"
    write_trials(work, part)
    part.doing = "mean activations"
    mean = mean_activations(model, work, part)
    part.doing = "effects"
    rows = effects(model, work, mean, part)
    part.doing = "vector"
    vector = make_vector(model, work, mean, rows, settings, part)
    part.doing = "injection"
    evaluate_layers(model, work, vector, settings, layers, part)
    part.doing = "summary"
    return summarise(work, settings, layers, part)


def write_trials(work: Work, part: runs.Part, *, binds: bool = True) -> None:
    """The two files of trials."""
    part.put(
        {TRIALS: runs.json_text(work.sampled), ZEROSHOT: runs.json_text(work.zeroshot)}, stage="trials", binds=binds
    )


def mean_activations(model: ic.Model, work: Work, part: runs.Part) -> Means:
    """Means over the clean prompts, from the file if there is one."""
    return part.stage(
        f"stepD_mean_acts/qid_{work.folder.name}_clean_mean.pt",
        lambda: mean_head_activations(model, [trial.clean for trial in work.trials]),
        after=["trials"], read=lambda path: read_means(path, model), data=ic.runs.pt_bytes,
    )  # fmt: skip


def effects(model: ic.Model, work: Work, mean: Means, part: runs.Part) -> list[Row]:
    """Effects of every head in every trial; trials that are on record are not run again."""
    q_id, slot = work.question.q_id, work.trials[0].clean.slots[-1]
    edits = head_injection(mean, [Head(*place, 0.0) for place in model.heads], model, slot=slot)
    inputs = {"trials": runs.digest(work.sampled["trials"])}

    def trial_row(trial: Trial) -> Row:
        patched = measured(model, [trial.corrupted], edits)
        target = trial.clean.target_ids[0]
        line: Row = {
            "q_id": q_id, "trial_idx": trial.number, "query_source_index": work.sources[trial.query_index],
            "target_str": trial.clean.target, "target_id": target,
            "target_token": model.tokenizer.convert_ids_to_tokens(target),
        }  # fmt: skip
        clean, top = as_they_are(model, [trial.clean])
        for kind, numbers, first in (("clean", clean, top), ("corrupted", patched.clean, patched.clean_top)):
            line |= {f"{measure}_{kind}": float(x) for measure, x in zip(MEASURES, numbers[:, 0], strict=True)}
            line |= {f"pred_id_{kind}": int(first[0]), f"accuracy_{kind}": float(int(first[0]) == target)}
        return {"metrics": line, "scores": cie_rows(q_id, trial.number, target, model.heads, patched)}

    rows = part.map(
        "effects", trial_row, work.trials, by=lambda trial: trial.number, inputs=inputs, strict=True, file=False
    )  # fmt: skip
    scores = [score for row in rows for score in row["scores"]]
    for name, text in (
        ("trial_metrics.jsonl", runs.json_lines(row["metrics"] for row in rows)),
        ("cie_scores.csv", runs.csv_text(scores)),
    ):
        part.put({name: text}, stage=name, inputs=inputs)
    return scores


_FIXES: tuple[tuple[str | None, type[BaseException], str], ...] = (
    ("rows", ic.InterpError, "correct the table, or leave bad rows out (bad_rows=drop)"),
    ("trials", ic.InterpError, "give other prefixes and separators, or fewer demonstrations (n_demos)"),
    (None, torch.OutOfMemoryError, "load the model in a smaller dtype or on another device, or ask for fewer n_demos"),
    (None, ic.LoadError, "delete the file that the message names, and run again"),
    (None, ic.InterpError, "do what the message says, and run again"),
    (None, OSError, "see to space and rights of the run's folder, and run again"),
)


def fix(stage: str, error: Exception) -> str:
    """What to do about an error."""
    for where, kind, advice in _FIXES:
        if where in (None, stage) and isinstance(error, kind):
            return advice
    return "run this question alone with on_error=stop to see where it comes from, and report it"
