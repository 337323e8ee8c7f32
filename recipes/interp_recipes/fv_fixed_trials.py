"""Fixed trials of function vectors: drawn once, written to a file, checked.

    interp run fv_fixed_trials --set dataset_json=antonym.json --set model_name_for_tokenizer=gpt2 --set out_path=out/
    interp run fv_fixed_trials --set out_path=out/fixed_trials_antonym_t10_s10_seed0_gpt2.json      (checks only)

Each trial has a clean prompt, and one whose answers are permuted; `numpy.random.default_rng(seed)` draws them. Checks
are prompt parity, slot parity and verify (see `interp_plugins.function_vectors.checks`), over all trials, clean and
corrupted; a mismatch ends the recipe with an error. Needs a tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_plugins.function_vectors.checks import Check, prompt_parity, slot_parity, verify_answers
from interp_plugins.function_vectors.tasks import load_task
from interp_plugins.function_vectors.template import Template
from interp_plugins.function_vectors.trials import fixed_trials
from interp_plugins.function_vectors.trials_file import file_name, read_json

import interp_core as ic
from interp_core.loading import open_tokenizer


def fv_fixed_trials(
    dataset_json: Path | None = None,
    out_path: Path = Path("out/fixed_trials"),
    n_trials: int = 10,
    n_shots: int = 10,
    seed: int = 0,
    test_split: float = 0.3,
    prefixes: dict[str, str] | None = None,
    separators: dict[str, str] | None = None,
    model_name_for_tokenizer: str | None = None,
    model_prepend_bos: bool | None = None,
    prepend_bos_token_used: bool | None = None,
    verify: bool = True,
    verify_n: int = 3,
) -> Path:
    """Write fixed trials and check them; returns the file's path.

    Args:
        dataset_json: task file; without one, the file `out_path` is only checked.
        out_path: file to write or check, or a folder for `fixed_trials_<task>_t<N>_s<S>_seed<K>_<model>.json`.
        n_trials, n_shots: trials, and demonstrations in each.
        seed: of the split and of the draws.
        test_split: share of rows that are not for training.
        prefixes, separators: of the template; default Q: / A:, a line break and an empty line.
        model_name_for_tokenizer: toy:text, a folder, or a hub id; a file that is only checked names its own.
        model_prepend_bos: the tokenizer adds a BOS (default: asked of the tokenizer).
        prepend_bos_token_used: the text of a BOS stands in the prompts (default: where the tokenizer adds none).
        verify: also compare the answers' first tokens.
        verify_n: trials to print.

    Raises:
        TextError: a mismatch, or prompts that cannot be built.
    """
    path = out_path
    if dataset_json is not None:
        name = model_name_for_tokenizer or "toy:text"
        tokenizer = open_tokenizer(name)
        template = _template(tokenizer, prefixes, separators, model_prepend_bos, prepend_bos_token_used)
        task = load_task(dataset_json, seed=seed, test_split=test_split)
        trials = fixed_trials(task, tokenizer, template=template, n_trials=n_trials, n_shots=n_shots, seed=seed)
        if path.suffix != ".json":
            path /= file_name(task.name, n_trials, n_shots, seed, name)
        replace(trials, meta={**trials.meta, "model_name_for_tokenizer": name}).save(path)
        print(f"{task}\n{path}")
    data = read_json(path)
    tokenizer = open_tokenizer(model_name_for_tokenizer or data["meta"]["model_name_for_tokenizer"])
    checks = [prompt_parity(data, tokenizer), slot_parity(data, tokenizer)]
    if verify:
        _show(data, tokenizer, verify_n)
        checks.append(verify_answers(data, tokenizer))
    _judge(path, checks)
    return path


def _template(
    tokenizer: Any,
    prefixes: Mapping[str, str] | None,
    separators: Mapping[str, str] | None,
    model_prepend_bos: bool | None,
    prepend_bos_token_used: bool | None,
) -> Template:
    """The template, with the BOS that the two settings ask for."""
    template = Template.filled(prefixes, separators)
    added = template.front(tokenizer).added
    if model_prepend_bos and not added:
        raise ic.TextError("model_prepend_bos is true, but this tokenizer adds no BOS; leave the setting out")
    if prepend_bos_token_used and added:
        raise ic.TextError("prepend_bos_token_used is true, but this tokenizer adds a BOS itself: a prompt has one")
    off = model_prepend_bos is False if added else prepend_bos_token_used is False
    return replace(template, bos=False if off else prepend_bos_token_used or None)


def _show(data: Mapping[str, Any], tokenizer: Any, n: int) -> None:
    """The first trials, as they are read."""
    special = data["meta"]["model_prepend_bos"]
    for trial in data["trials"][: max(0, n)]:
        print(f"trial {trial['trial_id']}")
        for kind in ("clean", "corrupted"):
            text = trial[f"{kind}_prompt_str"]
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            print(f"  {kind:9} {len(ids)} tokens  {text[:60]!r} … {text[-40:]!r}  last ids {ids[-5:]}")
        first = tokenizer.convert_ids_to_tokens(trial["first_token_id"])
        print(f"  target    {trial['target_str']!r}  first_token_id {trial['first_token_id']} ({first!r})")


def _judge(path: Path, checks: list[Check]) -> None:
    """Print what was checked; an error if anything does not agree."""
    for check in checks:
        print(check)
    wrong = [line for check in checks for line in check.mismatches]
    if wrong:
        shown = "\n  ".join(wrong[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ic.TextError(
            f"{path} does not hold the trials that this tokenizer and its own pairs give ({len(wrong)} mismatches):\n"
            f"  {shown}{more}\nMake it again from its task file (dataset_json), or load the tokenizer it names"
        )
