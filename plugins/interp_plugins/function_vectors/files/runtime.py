"""The runtime files of fixed trials: means, heads, vectors and an evaluation, for those who use the vector.

mean_activations.pt, mean_activations_meta.json   means by slot, and which slot is which
indirect_effect.pt, slot_maps.json                as among the golden files
top_heads.json                                    the heads, with effects in probability and log-probability
fv_by_layer.pt          fv_by_layer: head_space, per layer the means of its chosen heads side by side, before the
                        output projection, where they cannot be added to the residual stream; resid_by_layer: what
                        the layer's heads add to it, whose sum over layers is the function vector
fv_global_resid.pt, fv_global_resid_meta.json     the function vector, in the residual stream
step6_results_<model>_layer<L>_n<N>.json          one evaluation: settings, summary, rows
eval_summary.json, eval_trials.jsonl, eval_meta.json
injection_logits.safetensors                      last-token logits
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import runs

from ..means import head_shape
from .answers import Answers
from .common import by_layer, target_fields
from .extraction import Extraction, Measure
from .fixed_run import Files, FixedRun, profile
from .golden import LOGITS, MAPS, logits_file, settings_of, slot_maps
from .trials_json import short_name

KEYS: dict[str, Measure] = {"mean_delta_p": "probability", "mean_delta_logprob": "logprob"}
"""What heads can be ranked by: names of the files, and of the measure."""
TOKEN_RULE = "first token of the answer: ids(prompt + answer) without the first len(ids(prompt))"
SLOT_RULE = "last slot, query_predictive_token: the last token of the prompt"


def runtime_files(model: ic.Model, run: FixedRun, extraction: Extraction, answered: Answers) -> Files:
    """The files, by name."""
    rows = _rows(model, run, answered)
    summary = _summary(rows)
    meta = _eval_meta(model, run, extraction, answered)
    vector = extraction.vector.vector
    heads, d_head = head_shape(model)
    step6 = f"step6_results_{_plain(short_name(run.model_name))}_layer{answered.layer}_n{len(rows)}.json"
    return {
        "mean_activations.pt": ic.runs.pt_bytes(extraction.mean),
        "mean_activations_meta.json": runs.json_text(_mean_meta(model, run)),
        "indirect_effect.pt": ic.runs.pt_bytes(extraction.effects[extraction.measure]),
        MAPS: slot_maps(run, model),
        "top_heads.json": runs.json_text(_top_heads(run, extraction)),
        "fv_by_layer.pt": ic.runs.pt_bytes(
            by_layer(
                model, extraction.mean, extraction.heads, alpha=answered.alpha, model_spec=short_name(run.model_name)
            )
        ),
        "fv_global_resid.pt": ic.runs.pt_bytes(
            {"fv_global_resid": vector, "resid_dim": len(vector), "head_dim": d_head, "n_heads": heads}
        ),
        "fv_global_resid_meta.json": runs.json_text(_vector_meta(run, extraction)),
        LOGITS: logits_file(answered),
        step6: runs.json_text(_step6(meta, summary, rows)),
        "eval_summary.json": runs.json_text(summary),
        "eval_trials.jsonl": runs.json_lines(rows),
        "eval_meta.json": runs.json_text(meta),
    }


def _score_key(extraction: Extraction) -> str:
    return next(key for key, measure in KEYS.items() if measure == extraction.measure)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name)


def _mean_meta(model: ic.Model, run: FixedRun) -> dict[str, Any]:
    slots = run.trials.slots
    assert slots is not None
    heads, d_head = head_shape(model)
    places: dict[str, list[int]] = {}
    for slot, label in enumerate(slots.labels):
        places.setdefault(label, []).append(slot)
    return {
        "n_mean_trials": len(run.trials),
        "n_icl_examples": run.trials.meta["n_shots"],
        "seed": run.trials.meta["seed"],
        "layers": model.layers("z"),
        "n_layers": model.n_layers,
        "n_heads": heads,
        "head_dim": d_head,
        "resid_dim": model.d_model,
        "dummy_labels": slots.json()["labels"],
        "slot_index_map": places,
        "slot_query_pred": len(slots) - 1,
    }


def _top_heads(run: FixedRun, extraction: Extraction) -> dict[str, Any]:
    p, logprob = extraction.aie("probability"), extraction.aie("logprob")
    score_key = _score_key(extraction)
    return {
        "meta": {
            **run.meta(), "k": len(extraction.heads), "model": run.model_name, "model_spec": short_name(run.model_name),
            "score_key": score_key, "token_class_idx": extraction.token_class, "by": extraction.by,
            "gap_k_to_k1": extraction.known_gap,
            "ties": "score descending, layer ascending, head ascending",
        },
        "heads": [
            {
                "layer": layer, "head": head, "score_key": score_key, "rank_score": score,
                "mean_delta_logprob": float(logprob[layer, head]),
                "mean_delta_p": float(p[layer, head]), "n_trials": len(run.trials),
            }
            for layer, head, score in extraction.heads
        ],
    }  # fmt: skip


def _vector_meta(run: FixedRun, extraction: Extraction) -> dict[str, Any]:
    return {
        **run.meta(),
        "spec_name": short_name(run.model_name),
        "model": run.model_name,
        "space": "resid",
        "shape": [len(extraction.vector.vector)],
        "norm": extraction.vector.norm,
        "heads": [list(head) for head in extraction.heads],
        "bias": "per_head",
        "token_position_rule": SLOT_RULE,
    }


def _rows(model: ic.Model, run: FixedRun, answered: Answers) -> list[dict[str, Any]]:
    rows = []
    for place, (trial, prompt) in enumerate(zip(run.trials, answered.prompts, strict=True)):
        row: dict[str, Any] = {}
        for side, judged in (("base", answered.base), ("with", answered.steered)):
            row |= {
                f"pred_id_{side}": int(judged.pred_id[place]),
                f"accuracy_{side}": float(judged.rank[place] == 0),
                f"rank_{side}": int(judged.rank[place]),
                f"logit_{side}": float(judged.logit[place]),
                f"logprob_{side}": float(judged.logprob[place]),
                f"p_{side}": float(judged.p[place]),
            }
        row["delta_acc"] = row["accuracy_with"] - row["accuracy_base"]
        row |= {f"delta_{key}": row[f"{key}_with"] - row[f"{key}_base"] for key in ("logit", "logprob", "p")}
        about = {
            "idx": place, "trial_id": trial.number, "trial_idx": place, "q_id": run.dataset_name,
            "prompt_kind": answered.kind, "edit_layer": answered.layer, "prompt": prompt.text,
            "n_tokens": len(prompt.ids), "answer": prompt.target, "answer_ids": list(prompt.target_ids),
        }  # fmt: skip
        rows.append({**about, **target_fields(prompt, model.word(prompt.target_ids[0])), **row})
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    summary: dict[str, Any] = {"n": len(rows)}
    for side in ("base", "with"):
        summary[f"acc_{side}"] = float(column(f"accuracy_{side}").mean())
    summary["delta_acc"] = summary["acc_with"] - summary["acc_base"]
    for key in ("logit", "logprob", "p"):
        for side in ("base", "with"):
            summary[f"mean_{key}_{side}"] = float(column(f"{key}_{side}").mean())
        delta = column(f"delta_{key}")
        summary |= {f"mean_delta_{key}": float(delta.mean()), f"std_delta_{key}": float(delta.std(correction=0))}
    return summary


def _eval_meta(model: ic.Model, run: FixedRun, extraction: Extraction, answered: Answers) -> dict[str, Any]:
    vector = _vector_meta(run, extraction)
    score_key = _score_key(extraction)
    return {
        **run.meta(),
        "model": run.model_name,
        "edit_layer": answered.layer,
        "prompt_kind": answered.kind,
        "injection_point": f"resid_post[{answered.layer}], last token of the prompt",
        "slot_rule": SLOT_RULE,
        "token_rule": TOKEN_RULE,
        "score_key": score_key,
        "heads": vector["heads"],
        "n_eval": len(answered.prompts),
        "alpha": answered.alpha,
        "fv_source": "fv_global_resid.pt",
        "fv_type": "resid",
        "eval_scope": f"{answered.kind} prompts of the fixed trials",
        "eval_qids": [run.dataset_name],
        "config": {**settings_of(extraction, answered), "fixed_trials_path": str(run.path), "score_key": score_key},
        "fv": {"shape": vector["shape"], "norm": vector["norm"]},
        "fv_meta": vector,
        "profile": profile(model),
    }


def _step6(meta: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = [(row["accuracy_base"] == 1.0, row["accuracy_with"] == 1.0) for row in rows]
    names = {(False, False): "neither", (False, True): "gained", (True, False): "lost", (True, True): "both"}
    return {
        "config": meta["config"],
        "fv": meta["fv"],
        "summary": summary,
        "per_qid": dict.fromkeys(meta["eval_qids"], summary),
        "matrix": {name: right.count(pair) for pair, name in names.items()},
        "metadata": {key: meta[key] for key in ("model", "edit_layer", "injection_point", "token_rule", "profile")},
        "results": rows,
    }
