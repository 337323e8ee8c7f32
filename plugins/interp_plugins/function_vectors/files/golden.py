"""The golden files of fixed trials: the published code's artefacts, and a dump of them that can be compared.

<ds>_mean_head_activations_FIXED.pt   (layer, head, slot, d_head), clean prompts
<ds>_dummy_labels.json                labels of the slots
<ds>_indirect_effect.pt               (trial, layer, head), corrupted prompts, last token; or (…, 10 token classes)
src_fv.pt                             (1, d_model)
top_heads_src.json                    the heads with scores to four places; every head's AIE in order; gap at k
slot_maps.json                        per trial and mode: prompt, ids, tokens, labels, idx_map, idx_avg, all slots
injection_logits.safetensors          `clean` and `with` (trial, vocab) of the prompts that the dump's rows are of
src_reference_dump.json               settings, and a row per (trial_id, trial_idx): prompt, boundary, target,
                                      log-probabilities and ranks without the vector and with it
"""

from __future__ import annotations

import json
from typing import Any

import interp_core as ic
from interp_core import runs

from ..effects import ranking
from ..prompts import Prompt
from .answers import Answers
from .extraction import Extraction
from .fixed_run import Files, FixedRun, profile, table

DUMP = "src_reference_dump.json"
HEADS = "top_heads_src.json"
VECTOR = "src_fv.pt"
MAPS = "slot_maps.json"
LOGITS = "injection_logits.safetensors"


def source_files(model: ic.Model, run: FixedRun, extraction: Extraction, answered: Answers) -> Files:
    """The files, by name."""
    assert run.trials.slots is not None
    name = run.dataset_name
    return {
        f"{name}_mean_head_activations_FIXED.pt": ic.runs.pt_bytes(extraction.mean),
        f"{name}_dummy_labels.json": runs.json_text(run.trials.slots.json()),
        f"{name}_indirect_effect.pt": ic.runs.pt_bytes(extraction.effects[extraction.measure]),
        VECTOR: ic.runs.pt_bytes(extraction.vector.vector[None]),
        HEADS: runs.json_text(heads_table(extraction)),
        MAPS: slot_maps(run, model),
        LOGITS: logits_file(answered),
        DUMP: runs.json_text(_dump(model, run, extraction, answered)),
    }


def settings_of(extraction: Extraction, answered: Answers) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    return {
        "by": extraction.by, "n_top_heads": len(extraction.heads), "token_class_idx": extraction.token_class,
        "edit_layer": answered.layer, "prompt_kind": answered.kind, "alpha": answered.alpha,
    }  # fmt: skip


def heads_table(extraction: Extraction) -> dict[str, Any]:
    """The reference's `top_heads`, and what its rounded scores leave out."""
    return {
        "n_top_heads": len(extraction.heads),
        "top_heads": [[h.layer, h.head, round(h.score, 4)] for h in extraction.heads],
        "fv_norm": extraction.vector.norm,
        "aie_sorted_full": [list(head) for head in ranking(extraction.aie())],
        "gap_k_to_k1": extraction.known_gap,
    }


def slot_maps(run: FixedRun, model: ic.Model) -> str:
    """Tokens, labels and slots of every prompt."""
    return table(
        {
            "trial_id": trial.number,
            "mode": mode,
            "prompt": prompt.text,
            "input_ids": list(prompt.ids),
            "tokens": [model.word(token) for token in prompt.ids],
            "labels": list(prompt.labels),
            "idx_map": {str(token): slot for token, slot in prompt.idx_map.items()},
            "idx_avg": {label: list(span) for label, span in sorted(prompt.idx_avg.items())},
            "idx_map_updated": {str(token): slot for token, slot in enumerate(prompt.slots)},
        }
        for trial in run.trials
        for mode, prompt in (("clean", trial.clean), ("corrupted", trial.corrupted))
    )


def logits_file(answered: Answers) -> bytes:
    """Last-token logits without the vector and with it."""
    from safetensors.torch import save

    about = {"of": json.dumps([answered.kind, answered.layer])}  # one entry: their order is not kept
    return save({"clean": answered.base.logits.contiguous(), "with": answered.steered.logits.contiguous()}, about)


def _dump(model: ic.Model, run: FixedRun, extraction: Extraction, answered: Answers) -> dict[str, Any]:
    trials, slots, effects = run.trials, run.trials.slots, extraction.effects[extraction.measure]
    assert slots is not None
    return {
        "meta": {
            **run.meta(),
            **settings_of(extraction, answered),
            "fixed_trials_path": str(run.path),
            "rng": trials.meta.get("rng"),
            "boundary": slots.template.boundary,
            "prepend_bos_token_used": bool(slots.front.text),
            "profile": profile(model),
        },
        "mean_shape": list(extraction.mean.shape),
        "query_pred_slot": len(slots) - 1,
        "indirect_effect": {
            "shape": list(effects.shape),
            "max_abs": float(effects.nan_to_num().abs().max()),
            "top_heads": [list(head) for head in extraction.heads],
            "gap_k_to_k1": extraction.known_gap,
        },
        "fv": {"shape": [1, len(extraction.vector.vector)], "norm": extraction.vector.norm},
        "trials": [
            {"trial_id": trial.number, "trial_idx": place, **_boundary(model, prompt), **_row(answered, place)}
            for place, (trial, prompt) in enumerate(zip(trials, answered.prompts, strict=True))
        ],
    }


def _boundary(model: ic.Model, prompt: Prompt) -> dict[str, Any]:
    """Where the prompt ends and the answer begins."""
    return {
        "prompt": prompt.text,
        "n_tokens": len(prompt.ids),
        "boundary_prefix": prompt.text,
        "boundary_answer": prompt.target,
        "answer_ids": list(prompt.target_ids),
        "target_id": prompt.target_ids[0],
        "target_token": model.word(prompt.target_ids[0]),
    }


def _row(answered: Answers, place: int) -> dict[str, Any]:
    base, steered = answered.base, answered.steered
    return {
        "prompt_kind": answered.kind,
        "edit_layer": answered.layer,
        "base_logprob": float(base.logprob[place]),
        "with_logprob": float(steered.logprob[place]),
        "delta_logprob": float(steered.logprob[place]) - float(base.logprob[place]),
        "base_rank": int(base.rank[place]),
        "with_rank": int(steered.rank[place]),
        "base_pred_id": int(base.pred_id[place]),
        "with_pred_id": int(steered.pred_id[place]),
    }
