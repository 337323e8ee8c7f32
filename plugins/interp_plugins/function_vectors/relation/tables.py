"""Tables of a question: effects per trial and head, their statistics per head, and the lines of an evaluation.

    delta    a measure with an edit minus the same measure without
    std      over trials, divided by their number (not one less), as the published runs have it

CSV files hold floats so that they are read back to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp_core import runs

from ..files.answers import MEASURES, Measured
from ..files.common import target_fields
from ..prompts import Prompt

Row = dict[str, Any]
Means = Float[Tensor, "layer head slot d_head"]


def compared(before: Sequence[float], after: Sequence[float], names: tuple[str, str]) -> Row:
    """Measures of two runs side by side: `p_base`, `p_patch`, `delta_p` and so on."""
    row: Row = {}
    for measure, old, new in zip(MEASURES, before, after, strict=True):
        row |= {f"{measure}_{names[0]}": old, f"{measure}_{names[1]}": new, f"delta_{measure}": new - old}
    return row


def cie_rows(q_id: str, trial: int, target: int, heads: Sequence[tuple[int, int]], measured: Measured) -> list[Row]:
    """Causal indirect effects of one trial, a row per head; `measured` is of that trial's prompt alone."""
    before, patched = measured.clean[:, 0].tolist(), measured.values[:, :, 0].T.tolist()
    return [
        {"q_id": q_id, "trial_idx": trial, "layer": layer, "head": head, "target_id": target}
        | compared(before, after, ("base", "patch"))
        for (layer, head), after in zip(heads, patched, strict=True)
    ]


def aie_rows(rows: Iterable[Mapping[str, Any]], norms: Mapping[tuple[int, int], float], score_key: str) -> list[Row]:
    """Statistics over trials, a row per head, the best first; ties go to the lower layer, then the lower head.

    Args:
        rows: of `cie_rows`, of all trials.
        norms: length of each head's mean activation at the last token.
        score_key: which column says what is best.
    """
    by_head: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_head.setdefault((row["layer"], row["head"]), []).append(row)
    statistics = []
    # statistics of plain floats, summed exactly (fmean): the CSV and a run that went on give the same bits
    for (layer, head), listed in by_head.items():
        head_row: Row = {"layer": layer, "head": head, "n_trials": len(listed)}
        for measure in MEASURES:
            head_row |= changes(measure, listed) | means(measure, listed, ("base", "patch"))
        head_row["any_nonzero"] = any(row[f"delta_{measure}"] != 0 for row in listed for measure in MEASURES)
        statistics.append(head_row | {"mean_act_norm": norms[layer, head]})
    return sorted(statistics, key=lambda row: (-row[score_key], row["layer"], row["head"]))


def changes(measure: str, rows: Sequence[Mapping[str, Any]]) -> Row:
    """Mean, standard deviation and mean size of a measure's change."""
    delta = [row[f"delta_{measure}"] for row in rows]
    return {
        f"mean_delta_{measure}": fmean(delta),
        f"std_delta_{measure}": pstdev(delta),
        f"mean_abs_delta_{measure}": fmean(map(abs, delta)),
    }


def means(measure: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Row:
    """Means of a measure under several names."""
    return {f"mean_{measure}_{name}": fmean(row[f"{measure}_{name}"] for row in rows) for name in names}


def eval_rows(q_id: str, tokenizer: Any, prompts: Sequence[Prompt], measured: Measured, variant: int) -> list[Row]:
    """What prompts measure without and with one of the edits, a row per prompt."""
    rows = []
    without, steered = measured.clean.T.tolist(), measured.values[:, variant].T.tolist()
    for number, prompt in enumerate(prompts):
        target, tops = prompt.target_ids[0], (int(measured.clean_top[number]), int(measured.top[variant, number]))
        hits = [float(top == target) for top in tops]
        row: Row = {
            "idx": number, "q_id": q_id, "prompt": prompt.text, "answer": prompt.target,
            **target_fields(prompt, tokenizer.convert_ids_to_tokens(target)), "pred_id_base": tops[0],
            "pred_id_with": tops[1], "accuracy_base": hits[0], "accuracy_with": hits[1],
            "delta_acc": hits[1] - hits[0],
        }  # fmt: skip
        rows.append(row | compared(without[number], steered[number], ("base", "with")))
    return rows


def eval_summary(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Means over the rows of an evaluation."""
    columns = {"acc_base": "accuracy_base", "acc_with": "accuracy_with", "delta_acc": "delta_acc"}
    out: Row = {"n_eval": len(rows)} | {key: fmean(row[name] for row in rows) for key, name in columns.items()}
    for measure in MEASURES:
        out |= means(measure, rows, ("base", "with")) | changes(measure, rows)
    return out


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV file with the columns of the first row; nothing of no rows."""
    return runs.csv_text(rows, list(rows[0])) if rows else ""


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
