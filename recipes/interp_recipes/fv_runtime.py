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
from interp_plugins.function_vectors.files.fixed_run import PromptKind, edit_layer_of, fixed_run, published, put_in
from interp_plugins.function_vectors.files.runtime import KEYS, runtime_files

import interp_core as ic
from interp_core import open_tokenizer


def fv_runtime(
    fixed_trials_path: Path,
    model_name: str = "toy:text",
    dataset_name: str | None = None,
    fixed_trials_id: str | None = None,
    fixed_trials_model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    seed: int | None = None,
    n_shots: int | None = None,
    n_trials: int | None = None,
    by: By = "sweep",
    score_key: Literal["mean_delta_p", "mean_delta_logprob"] = "mean_delta_p",
    n_top_heads: int = 10,
    edit_layer: int | None = None,
    alpha: float = 1.0,
    prompt_kind: PromptKind = "corrupted",
    save_path_root: Path = Path("results_fv"),
    overwrite: bool = False,
) -> Path:
    """Write the runtime files; returns their folder.

    Args:
        fixed_trials_path: file of fixed trials, made with this model's tokenizer.
        model_name: toy:text, a folder, or a hub id.
        dataset_name, seed, n_shots, n_trials: what the file must have (default: whatever it has).
        fixed_trials_id: name of the folder (default: the file's name).
        fixed_trials_model: what the file calls this model, if that is not the end of model_name.
        device, dtype, attn_implementation: of the model (default: as stored; CUDA if there is one).
        by: sweep, or replay (one full forward pass per trial, layer and head).
        score_key: what heads are ranked by.
        n_top_heads: heads of the vector.
        edit_layer: where the vector is added (default: a third of the way up).
        alpha: factor of the vector.
        prompt_kind: which prompts are answered: corrupted, clean or zeroshot.
        save_path_root: files go to <root>/<dataset_name>/<fixed_trials_id>/, the run's record to <root>.runs/.
        overwrite: files of other runs may be replaced.

    Raises:
        TextError: fixed trials of another tokenizer or model.
        PlanError: settings that do not fit the file or the model.
    """
    settings = {**locals()}
    run = fixed_run(
        fixed_trials_path, open_tokenizer(model_name), model_name=model_name, dataset_name=dataset_name,
        fixed_trials_id=fixed_trials_id, fixed_trials_model=fixed_trials_model, seed=seed, n_shots=n_shots,
        n_trials=n_trials,
    )  # fmt: skip
    model = ic.load(model_name, device=device, dtype=dtype, attn_implementation=attn_implementation)
    layer, folder = edit_layer_of(model, edit_layer), run.folder(save_path_root)
    names = ["mean_activations.pt", "top_heads.json", "eval_meta.json"]
    with published(save_path_root, "fv_runtime", settings, model, run, names, overwrite) as record:
        made = extract(model, run, by=by, n_top_heads=n_top_heads, measure=KEYS[score_key], progress=True)
        answered = answers(model, run, made.vector, layer, kind=prompt_kind, by=by, alpha=alpha)
        print(model, *_told(made, answered, prompt_kind, layer), sep="\n")
        print(*put_in(record, folder, runtime_files(model, run, made, answered)), sep="\n")
    return folder


def _told(made: Extraction, answered: Answers, kind: PromptKind, layer: int) -> list[str]:
    """What came out, in words."""
    moved = float((answered.steered.logprob - answered.base.logprob).mean())
    return [
        f"function vector of norm {made.vector.norm:.4g}: {', '.join(f'L{a}H{h}' for a, h, _ in made.heads)}",
        f"{len(answered.base.rank)} {kind} prompts: {int((answered.base.rank == 0).sum())} answered, "
        f"{int((answered.steered.rank == 0).sum())} with the vector after layer {layer}; log-probability {moved:+.3f}",
    ]
