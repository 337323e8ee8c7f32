"""Settings that the recipes on fixed trials have alike, stated once: each recipe's own config inherits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from interp_plugins.function_vectors.files.fixed_run import FixedRun, PromptKind, fixed_run, published

import interp_core as ic
from interp_core import open_tokenizer

from .configs import DeviceConfig


class TemplateConfig(ic.Config):
    """The template of prompts.

    Attributes:
        prefixes, separators: of the template; default Q: / A:, a line break and an empty line.
    """

    prefixes: dict[str, str] | None = None
    separators: dict[str, str] | None = None


class TrialsConfig(DeviceConfig):
    """A run over a file of fixed trials, published as `<save_path_root>/<dataset_name>/<fixed_trials_id>/`.

    Attributes:
        dataset_name, seed: what the file must have (default: whatever it has).
        fixed_trials_id: name of the folder (default: the file's name).
        fixed_trials_model: what the file calls this model, if that is not the end of model_name.
        attn_implementation: of the model (default: as stored).
        n_top_heads: heads of the vector.
        edit_layer: where the vector is added (default: a third of the way up).
        prompt_kind: which prompts are answered: corrupted, clean or zeroshot.
        save_path_root: files go to <root>/<dataset_name>/<fixed_trials_id>/, the run's record to <root>.runs/.
        overwrite: files of other runs may be replaced.
    """

    dataset_name: str | None = None
    fixed_trials_id: str | None = None
    fixed_trials_model: str | None = None
    attn_implementation: str | None = None
    seed: int | None = None
    n_top_heads: int = 10
    edit_layer: int | None = None
    prompt_kind: PromptKind = "corrupted"
    save_path_root: Path = Path("results_fv")
    overwrite: bool = False

    def load(self, model_name: str) -> ic.Model:
        """The model, where and as these settings say."""
        return ic.load(
            model_name, device=self.device, dtype=self.dtype, attn_implementation=self.attn_implementation
        )  # fmt: skip

    def published(
        self, recipe: str, model: ic.Model | None, run: FixedRun | None, names: Sequence[str]
    ) -> ic.runs.RunFolder:
        """The recipe's run in the tree; `names` are looked for before the model runs."""
        return published(self.save_path_root, recipe, self.model_dump(), model, run, names, self.overwrite)


class ExtractionConfig(TrialsConfig):
    """A function vector that is worked out of fixed trials.

    Attributes:
        fixed_trials_path: file of fixed trials, made with this model's tokenizer.
        model_name: toy:text, a folder, or a hub id.
        n_shots, n_trials: what the file must have (default: whatever it has).
    """

    fixed_trials_path: Path
    model_name: str = "toy:text"
    n_shots: int | None = None
    n_trials: int | None = None

    def read(self) -> FixedRun:
        """The trials, checked against the model's tokenizer."""
        names = ("model_name", "dataset_name", "fixed_trials_id", "fixed_trials_model", "seed", "n_shots", "n_trials")
        expected = {name: getattr(self, name) for name in names}
        return fixed_run(self.fixed_trials_path, open_tokenizer(self.model_name), **expected)
