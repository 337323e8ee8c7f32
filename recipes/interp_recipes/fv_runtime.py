"""A function vector for use: means, heads and vector of fixed trials, and an evaluation of it.

    interp run fv_runtime --fixed_trials_path out/fixed_trials_antonym_t10_s10_seed0_gpt2.json --model_name gpt2

Vectors are kept by the space that they live in: `fv_global_resid.pt` and `resid_by_layer` can be added to the residual
stream, `fv_by_layer` lies before the output projections and cannot. Effects are measured in probability and
log-probability; `score_key` says by which of them heads are ranked. The files are listed in
`interp_plugins.function_vectors.files.runtime`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from interp_plugins.function_vectors.files.answers import Answers, answers
from interp_plugins.function_vectors.files.extraction import By, Extraction, extract
from interp_plugins.function_vectors.files.fixed_run import edit_layer_of, put_in
from interp_plugins.function_vectors.files.runtime import KEYS, runtime_files

from .fv_configs import ExtractionConfig


class RuntimeConfig(ExtractionConfig):
    """How the vector is worked out and tried.

    Attributes:
        by: sweep, or replay (one full forward pass per trial, layer and head).
        score_key: what heads are ranked by.
        alpha: factor of the vector.
    """

    by: By = "sweep"
    score_key: Literal["mean_delta_p", "mean_delta_logprob"] = "mean_delta_p"
    alpha: float = 1.0


def fv_runtime(config: RuntimeConfig) -> Path:
    """Write the runtime files; returns their folder.

    Raises:
        TextError: fixed trials of another tokenizer or model.
        PlanError: settings that do not fit the file or the model.
    """
    run = config.read()
    model = config.load(config.model_name)
    layer, folder = edit_layer_of(model, config.edit_layer), run.folder(config.save_path_root)
    names = ["mean_activations.pt", "top_heads.json", "eval_meta.json"]
    with config.published("fv_runtime", model, run, names) as record:
        extraction = extract(
            model, run, by=config.by, n_top_heads=config.n_top_heads, measure=KEYS[config.score_key], record=record
        )
        answered = answers(
            model, run, extraction.vector, layer, kind=config.prompt_kind, by=config.by, alpha=config.alpha
        )
        print(model, *_told(extraction, answered), sep="\n")
        print(*put_in(record, folder, runtime_files(model, run, extraction, answered)), sep="\n")
    return folder


def _told(extraction: Extraction, answered: Answers) -> list[str]:
    """What came out, in words."""
    base, steered, vector = answered.base, answered.steered, extraction.vector
    moved = float((steered.logprob - base.logprob).mean())
    return [
        f"function vector of norm {vector.norm:.4g}: {', '.join(f'z[{a},{h}]' for a, h, _ in extraction.heads)}",
        f"{len(base.rank)} {answered.kind} prompts: {int((base.rank == 0).sum())} answered, "
        f"{int((steered.rank == 0).sum())} with the vector after layer {answered.layer}; log-probability {moved:+.3f}",
    ]
