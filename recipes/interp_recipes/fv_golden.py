"""Golden artefacts of fixed trials, as the published code would leave them, and a dump to compare others with.

    interp run fv_golden --fixed_trials_path out/fixed_trials_antonym_t10_s10_seed0_gpt2.json --model_name gpt2

Means of heads on the clean prompts, indirect effects on the corrupted ones, the heads of largest effect, the function
vector, and what each trial answers without it and with it. `replay` keeps the order of operations of the published
code, by hooks written by hand (`interp_plugins.function_vectors.files.plain`) that share nothing with what
`fv_runtime` uses; `sweep` gives the same numbers but for rounding, sooner. Files:
`interp_plugins.function_vectors.files.golden`.
"""

from __future__ import annotations

from pathlib import Path

from interp_plugins.function_vectors.files.answers import answers
from interp_plugins.function_vectors.files.extraction import By, Extraction, extract
from interp_plugins.function_vectors.files.fixed_run import PromptKind, edit_layer_of, fixed_run, published, put_in
from interp_plugins.function_vectors.files.golden import DUMP, HEADS, VECTOR, source_files

import interp_core as ic
from interp_core import open_tokenizer

from .fv_python import ran_elsewhere


def fv_golden(
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
    by: By = "replay",
    last_token_only: bool = True,
    n_top_heads: int = 10,
    token_class_idx: int = -1,
    edit_layer: int | None = None,
    prompt_kind: PromptKind = "corrupted",
    save_path_root: Path = Path("results"),
    overwrite: bool = False,
    python_bin: Path | None = None,
) -> Path:
    """Write the artefacts; returns their folder.

    Args:
        fixed_trials_path: file of fixed trials, made with this model's tokenizer.
        model_name: toy:text, a folder, or a hub id.
        dataset_name, seed, n_shots, n_trials: what the file must have (default: whatever it has).
        fixed_trials_id, fixed_trials_model: name of the folder (default: the file's name); of the model, in the file.
        device, dtype, attn_implementation: of the model (default: as stored; CUDA if there is one).
        by: replay (one full forward pass per trial, layer and head) or sweep.
        last_token_only: effects of the last token (rank 3), or of all ten token classes (rank 4).
        n_top_heads, token_class_idx: heads of the vector; the class they are chosen by, other than -1 of all classes.
        edit_layer, prompt_kind: where the vector is added (default: a third of the way up), and to which prompts.
        save_path_root: files go to <root>/<dataset_name>/<fixed_trials_id>/, the run's record to <root>.runs/.
        overwrite: replace files of other runs.
        python_bin: another Python, to work them out there (default: this one); the dump names its versions.

    Raises:
        TextError, PlanError: fixed trials of another tokenizer or model, settings that do not fit, files in the way.
    """
    settings = {**locals()}
    run = fixed_run(
        fixed_trials_path, open_tokenizer(model_name), model_name=model_name, dataset_name=dataset_name,
        fixed_trials_id=fixed_trials_id, fixed_trials_model=fixed_trials_model, seed=seed, n_shots=n_shots,
        n_trials=n_trials,
    )  # fmt: skip
    folder = run.folder(save_path_root)
    if ran_elsewhere("fv_golden", settings):
        return folder
    model = ic.load(model_name, device=device, dtype=dtype, attn_implementation=attn_implementation)
    layer = edit_layer_of(model, edit_layer)
    with published(save_path_root, "fv_golden", settings, model, run, [DUMP, HEADS, VECTOR], overwrite) as record:
        made = extract(
            model, run, by=by, by_hand=by == "replay", n_top_heads=n_top_heads, token_class_idx=token_class_idx,
            last_token_only=last_token_only, progress=True,
        )  # fmt: skip
        answered = answers(model, run, made.vector, layer, kind=prompt_kind, by=by, by_hand=by == "replay")
        _tell(model, made)
        print(*put_in(record, folder, source_files(model, run, made, answered)), sep="\n")
    return folder


def _tell(model: ic.Model, made: Extraction) -> None:
    """Print what came out."""
    heads, effects = ", ".join(f"L{a}H{b}" for a, b, _ in made.heads), made.effects[made.measure]
    print(f"{model}\nmeans {[*made.mean.shape]}, effects {[*effects.shape]}, gap after the last head {made.gap:.3g}")
    print(f"function vector of norm {made.vector.norm:.4g}: {heads}")
