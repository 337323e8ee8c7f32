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
from interp_plugins.function_vectors.files.fixed_run import edit_layer_of, put_in
from interp_plugins.function_vectors.files.golden import DUMP, HEADS, VECTOR, source_files

import interp_core as ic

from .fv_configs import ExtractionConfig
from .fv_python import ran_elsewhere


class GoldenConfig(ExtractionConfig):
    """How the artefacts are worked out.

    Attributes:
        by: replay (one full forward pass per trial, layer and head) or sweep.
        last_token_only: effects of the last token (rank 3), or of all ten token classes (rank 4).
        token_class_idx: the class that heads are chosen by, other than -1 of all classes.
        python_bin: another Python, to work them out there (default: this one); the dump names its versions.
    """

    by: By = "replay"
    last_token_only: bool = True
    token_class_idx: int = -1
    save_path_root: Path = Path("results")
    python_bin: Path | None = None


def fv_golden(config: GoldenConfig) -> Path:
    """Write the artefacts; returns their folder.

    Raises:
        TextError, PlanError: fixed trials of another tokenizer or model, settings that do not fit, files in the way.
    """
    run, by_hand = config.read(), config.by == "replay"
    folder = run.folder(config.save_path_root)
    if ran_elsewhere("fv_golden", config.model_dump()):
        return folder
    model = config.load(config.model_name)
    layer = edit_layer_of(model, config.edit_layer)
    with config.published("fv_golden", model, run, [DUMP, HEADS, VECTOR]) as record:
        extraction = extract(
            model, run, by=config.by, by_hand=by_hand, n_top_heads=config.n_top_heads,
            token_class_idx=config.token_class_idx, last_token_only=config.last_token_only, record=record,
        )  # fmt: skip
        answered = answers(
            model, run, extraction.vector, layer, kind=config.prompt_kind, by=config.by, by_hand=by_hand
        )  # fmt: skip
        _tell(model, extraction)
        print(*put_in(record, folder, source_files(model, run, extraction, answered)), sep="\n")
    return folder


def _tell(model: ic.Model, extraction: Extraction) -> None:
    """Print what came out."""
    heads = ", ".join(f"z[{layer},{head}]" for layer, head, _ in extraction.heads)
    mean, effects = extraction.mean, extraction.effects[extraction.measure]
    print(f"{model}\nmeans {[*mean.shape]}, effects {[*effects.shape]}, gap after the last head {extraction.gap:.3g}")
    print(f"function vector of norm {extraction.vector.norm:.4g}: {heads}")
