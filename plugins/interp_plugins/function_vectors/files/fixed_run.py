"""Runs over fixed trials: what they are made on, and how their files are written.

A run is named by its task and its file of fixed trials; its files go to `<root>/<dataset_name>/<fixed_trials_id>/`,
each whole or not at all. What was there before is named. The same run writes the same bytes.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import interp_core as ic
from interp_core import runs

from ..prompts import Prompt, build
from ..template import name_of
from .trials import Trials
from .trials_json import short_name

PromptKind = Literal["corrupted", "clean", "zeroshot"]
"""Which prompts are answered: those with permuted answers, those without, or the query alone."""
Files = Mapping[str, str | bytes]
"""Contents by file name."""


@dataclass(frozen=True)
class FixedRun:
    """Fixed trials, read and checked against a tokenizer.

    Attributes:
        path: their file.
        trials: the trials.
        dataset_name: the task.
        fixed_trials_id: the file's name without its ending.
        model_name: as it was asked for.
    """

    path: Path
    trials: Trials
    dataset_name: str
    fixed_trials_id: str
    model_name: str

    @property
    def clean(self) -> list[Prompt]:
        """Clean prompts."""
        return [trial.clean for trial in self.trials]

    @property
    def corrupted(self) -> list[Prompt]:
        """Prompts with permuted answers."""
        return [trial.corrupted for trial in self.trials]

    def prompts(self, kind: PromptKind, tokenizer: Any) -> list[Prompt]:
        """Prompts of a kind; zero-shot ones are built here."""
        if kind != "zeroshot":
            return self.clean if kind == "clean" else self.corrupted
        assert self.trials.slots is not None
        template = self.trials.slots.template
        return [
            build(tokenizer, template, [], t.query, None, where=f"trial {t.number}, zero-shot") for t in self.trials
        ]

    def folder(self, root: Path) -> Path:
        """Where the run's files go."""
        return root / self.dataset_name / self.fixed_trials_id

    def meta(self) -> dict[str, Any]:
        """What every file says of its run."""
        meta = self.trials.meta
        return {
            "dataset_name": self.dataset_name, "fixed_trials_id": self.fixed_trials_id, "model_name": self.model_name,
            "seed": meta["seed"], "n_trials": len(self.trials), "n_shots": meta["n_shots"],
        }  # fmt: skip


def fixed_run(
    path: str | Path,
    tokenizer: Any,
    *,
    model_name: str,
    dataset_name: str | None = None,
    fixed_trials_id: str | None = None,
    fixed_trials_model: str | None = None,
    **expected: int | None,
) -> FixedRun:
    """Read fixed trials for a model that is yet to be loaded.

    Args:
        model_name: the model to run.
        dataset_name: of the task (None: as the file says).
        fixed_trials_id: name of the run's folder (None: the file's name).
        fixed_trials_model: what the file calls this model, if that is not the end of `model_name`.
        expected: `seed`, `n_trials`, `n_shots` that the file must have; None asks for nothing.

    Raises:
        LoadError: no such file, or fields that are missing.
        TextError: a file of another tokenizer or model, or trials with the same number.
        PlanError: not what was expected, or names that are no file names.
    """
    trials = Trials.load(path, tokenizer)
    meta = trials.meta
    theirs, ours = meta["model_name_for_tokenizer"], fixed_trials_model or model_name
    if short_name(theirs) != short_name(ours):
        raise ic.TextError(
            f"{path}: meta.model_name_for_tokenizer is {theirs}, the model is {ours}: make a file for this one with "
            f"`interp run fv_fixed_trials`; if both are the same model, pass fixed_trials_model={theirs}"
        )
    task = Path(meta["dataset_json"]).stem
    for name, wanted, on_file in [
        ("dataset_name", dataset_name, task),
        *((name, value, meta[name]) for name, value in expected.items()),
    ]:
        if wanted is not None and wanted != on_file:
            raise ic.PlanError(
                f"{name} is {wanted!r}, the fixed trials of {path} have {on_file!r}; give their file, or {on_file!r}"
            )
    numbers = Counter(trial.number for trial in trials)
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise ic.TextError(f"{path}: {numbers[twice[0]]} trials have trial_id {twice[0]}; number them apart")
    names = (
        folder_name("dataset_name", dataset_name or task),
        folder_name("fixed_trials_id", fixed_trials_id or Path(path).stem),
    )
    return FixedRun(Path(path), trials, *names, model_name)


def folder_name(setting: str, name: str) -> str:
    """A name that may become a folder's.

    Raises:
        PlanError: one that may not.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ic.PlanError(f"{setting} is {name!r}, which is no name of a folder: use letters, digits, '_', '-', '.'")
    return name


def edit_layer_of(model: ic.Model, edit_layer: int | None) -> int:
    """The layer to inject at: the one asked for, or a third of the way up, as the reference does on GPT-J (9 of 28).

    Raises:
        PlanError: a layer that there is not.
    """
    layer = model.n_layers // 3 if edit_layer is None else edit_layer
    if not 0 <= layer < model.n_layers:
        raise ic.PlanError(f"edit_layer is {layer}, this model has layers 0 to {model.n_layers - 1}")
    return layer


def profile(model: ic.Model) -> dict[str, Any]:
    """What numbers may depend on besides model and trials."""
    config = model.hf.config
    quantized = getattr(config, "quantization_config", None)
    packages = ("torch", "transformers", "tokenizers", "interp-core")
    return {
        "model": model.source,
        "architecture": type(model.hf).__name__,
        "tokenizer": name_of(model.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "quantization": str(getattr(quantized, "quant_method", quantized)) if quantized is not None else None,
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "engine": model.engine_name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSON list with a row per line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def published(
    root: Path,
    recipe: str,
    settings: Mapping[str, Any],
    model: ic.Model | None,
    run: FixedRun | None,
    names: Sequence[str],
    overwrite: bool,
) -> runs.RunFolder:
    """A recipe's run in a published tree, `<root>/<dataset_name>/<fixed_trials_id>/`.

    Args:
        settings: of the recipe.
        names: files of that folder, which are looked for before the model runs.

    Raises:
        PlanError: one of them is another run's.
    """
    # where files go and which Python makes them changes no number: another run may differ in these
    free = {"save_path_root", "overwrite", "python_bin"}
    kept = {key: value for key, value in settings.items() if key not in free}
    dataset = run.dataset_name if run is not None else ""
    record = runs.publish(root, kept, recipe=recipe, model=model, dataset=dataset, overwrite=overwrite)
    if run is not None:
        place = run.folder(root).relative_to(root).as_posix()
        record.claim([f"{place}/{name}" for name in names], stage=place)
    return record


def put_in(record: runs.RunFolder, folder: Path, files: Files) -> list[str]:
    """Write the files of a folder below a tree's root; says what became of each, as `put`."""
    place = folder.relative_to(record.path).as_posix()
    return record.put({f"{place}/{name}": content for name, content in files.items()}, stage=place)


def put(folder: Path, files: Files) -> list[str]:
    """Write files, each whole or not at all; what became of each: written, replaced, or the same as before."""
    said = []
    for name, content in files.items():
        path, data = folder / name, content.encode() if isinstance(content, str) else content
        there = path.exists()
        same = there and path.read_bytes() == data
        if not same:
            runs.write(path, data)
        said.append(f"{path}  {'same as before' if same else 'replaced' if there else 'written'}")
    return said
