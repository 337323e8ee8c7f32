"""The parity suite: two folders of artefacts compared stage by stage, down to the first number that differs.

    interp run fv_parity --fixed_trials_path T.json --model_name M          both sides worked out here
    interp run fv_parity --fixed_trials_path T.json --model_name M --a DIR  one of them read
    interp run fv_parity --a DIR --b DIR                                    both read; no model needed

Side a is worked out by replay, in the order of operations of the published code, by hooks written by hand; side b by
this package's functions, by sweep, or by replay too with `--compare replay`, where numbers must then be equal to the
bit. What is compared, within which tolerances, and what counts as failure:
`interp_plugins.function_vectors.parity.stages`. Reports: `interp_plugins.function_vectors.parity.reports`. FAIL is an
error, so that the command exits with 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from interp_plugins.function_vectors.files.fixed_run import PromptKind, edit_layer_of, published, put_in
from interp_plugins.function_vectors.files.trials_json import read_json
from interp_plugins.function_vectors.parity.findings import Mode
from interp_plugins.function_vectors.parity.reports import REPORT, Suite
from interp_plugins.function_vectors.parity.suite import Sides

import interp_core as ic
from interp_core import open_tokenizer


def fv_parity(
    fixed_trials_path: Path | None = None,
    model_name: str | None = None,
    a: Path | None = None,
    b: Path | None = None,
    compare: Mode = "fast",
    stages: str = "",
    dataset_name: str | None = None,
    fixed_trials_id: str | None = None,
    fixed_trials_model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    seed: int | None = None,
    n_top_heads: int = 10,
    token_class_idx: int = -1,
    edit_layer: int | None = None,
    prompt_kind: PromptKind = "corrupted",
    max_trials: int | None = None,
    save_path_root: Path = Path("results_fv"),
    overwrite: bool = False,
) -> Path:
    """Compare and report; returns the folder of the reports.

    Args:
        fixed_trials_path: file of fixed trials; needed for sides that are worked out, and checked where it is given.
        model_name: toy:text, a folder, or a hub id (default: the file's).
        a, b: folders of artefacts; one that is not given is worked out, beside the reports.
        compare: fast (numbers within tolerances) or replay (equal to the bit).
        stages: only these, separated by commas; then nothing is written.
        dataset_name, seed: what the file must have (default: whatever it has).
        fixed_trials_id: name of the reports' folder (default: the file's name).
        fixed_trials_model: what the file calls this model, if that is not the end of model_name.
        device, dtype, attn_implementation: of the model (default: as stored; CUDA if there is one).
        n_top_heads, token_class_idx: heads of the vector, and the class of tokens that they are chosen by.
        edit_layer: where the vector is added (default: a third of the way up; of two folders all that both have).
        prompt_kind: which prompts are answered: corrupted, clean or zeroshot.
        max_trials: compare the rows of the first trials only.
        save_path_root: reports go to <root>/<dataset_name>/ and <root>/<dataset_name>/<fixed_trials_id>/, the run's
            record beside them, to <root>.runs/.
        overwrite: files of other runs may be replaced.

    Raises:
        InterpError: FAIL; names the first divergence and a command that shows it again.
    """
    settings = {**locals()}
    _check(max_trials)
    names = {"dataset_name": dataset_name, "fixed_trials_id": fixed_trials_id, "model_name": model_name}
    sides = Sides(a, b, compare, save_path_root, names)
    if fixed_trials_path is not None:
        data = read_json(fixed_trials_path)
        tokenizer = open_tokenizer(model_name or data["meta"]["model_name_for_tokenizer"])
        sides.check(fixed_trials_path, data, tokenizer, fixed_trials_model, seed)
    elif a is None or b is None:
        raise ic.PlanError("fv_parity takes two folders, a and b; or fixed_trials_path, to work them out")
    return _compared(sides, settings)


def _compared(sides: Sides, asked: Mapping[str, Any]) -> Path:
    """Work out what is not given, and report; `asked` are the settings of the recipe."""
    model, stages, layer, kind = None, asked["stages"], asked["edit_layer"], asked["prompt_kind"]
    if sides.run is not None and (asked["a"] is None or asked["b"] is None):
        options = {key: asked[key] for key in ("device", "dtype", "attn_implementation")}
        model = ic.load(sides.run.model_name, **options)
        layer = edit_layer_of(model, layer)
    of = None if layer is None else (kind, layer)
    compared = partial(sides.suite, stages, of, asked["max_trials"], asked["token_class_idx"])
    if model is None and stages:
        return report(compared(), None)
    root, overwrite = asked["save_path_root"], asked["overwrite"]
    with published(root, "fv_parity", asked, model, sides.run, [REPORT], overwrite) as record:
        if model is not None:
            heads, put = (asked["n_top_heads"], asked["token_class_idx"]), partial(put_in, record)
            print(*sides.work_out(model, *heads, layer, kind, put), sep="\n")
        return report(compared(), None if stages else record)


def _check(max_trials: int | None) -> None:
    if max_trials is not None and max_trials < 1:
        raise ic.PlanError(f"max_trials is {max_trials}: give at least 1, or leave it out to compare all trials")


def report(suite: Suite, record: ic.runs.RunFolder | None) -> Path:
    """Print the suite, write it if there is a place for it, and fail if it does."""
    print(f"{suite.dataset_name}, {suite.fixed_trials_id}: {suite.status}", *suite.lines(), sep="\n")
    if record is not None:
        own, task = suite.files()
        print(*put_in(record, suite.folder, own), *put_in(record, suite.folder.parent, task), sep="\n")
    if suite.status != "PASS":
        first = suite.first
        what = f"{first}\n  again: {suite.reproduction(first)}" if first else "not everything was compared"
        raise ic.InterpError(f"parity of {suite.dataset_name}, {suite.fixed_trials_id}: FAIL\n  {what}")
    return suite.folder
