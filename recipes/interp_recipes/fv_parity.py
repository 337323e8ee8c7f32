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

from functools import partial
from pathlib import Path

from interp_plugins.function_vectors.files.fixed_run import edit_layer_of, put_in
from interp_plugins.function_vectors.files.trials_json import read_json
from interp_plugins.function_vectors.parity.findings import Mode
from interp_plugins.function_vectors.parity.reports import REPORT, Suite
from interp_plugins.function_vectors.parity.suite import Sides

import interp_core as ic
from interp_core import open_tokenizer

from .fv_configs import TrialsConfig


class ParityConfig(TrialsConfig):
    """What is compared, and how.

    Attributes:
        fixed_trials_path: file of fixed trials; needed for sides that are worked out, and checked where it is given.
        model_name: toy:text, a folder, or a hub id (default: the file's).
        a, b: folders of artefacts; one that is not given is worked out, beside the reports.
        compare: fast (numbers within tolerances) or replay (equal to the bit).
        stages: only these, separated by commas; then nothing is written.
        token_class_idx: class of tokens that heads are chosen by.
        edit_layer: where the vector is added (default: a third of the way up; of two folders all that both have).
        max_trials: compare the rows of the first trials only.
        save_path_root: reports go to <root>/<dataset_name>/ and <root>/<dataset_name>/<fixed_trials_id>/, the run's
            record beside them, to <root>.runs/.
    """

    fixed_trials_path: Path | None = None
    model_name: str | None = None
    a: Path | None = None
    b: Path | None = None
    compare: Mode = "fast"
    stages: str = ""
    token_class_idx: int = -1
    max_trials: int | None = None

    def check(self) -> None:
        """Raise a PlanError for settings that compare nothing."""
        if self.max_trials is not None and self.max_trials < 1:
            raise ic.PlanError(
                f"max_trials is {self.max_trials}: give at least 1, or leave it out to compare all trials"
            )
        if self.fixed_trials_path is None and (self.a is None or self.b is None):
            raise ic.PlanError("fv_parity takes two folders, a and b; or fixed_trials_path, to work them out")


def fv_parity(config: ParityConfig) -> Path:
    """Compare and report; returns the folder of the reports.

    Raises:
        InterpError: FAIL; names the first divergence and a command that shows it again.
    """
    config.check()
    names = {name: getattr(config, name) for name in ("dataset_name", "fixed_trials_id", "model_name")}
    sides = Sides(config.a, config.b, config.compare, config.save_path_root, names)
    if config.fixed_trials_path is not None:
        data = read_json(config.fixed_trials_path)
        tokenizer = open_tokenizer(config.model_name or data["meta"]["model_name_for_tokenizer"])
        sides.check(config.fixed_trials_path, data, tokenizer, config.fixed_trials_model, config.seed)
    model, layer = None, config.edit_layer
    if sides.run is not None and (config.a is None or config.b is None):
        model = config.load(sides.run.model_name)
        layer = edit_layer_of(model, layer)
    of = None if layer is None else (config.prompt_kind, layer)
    compared = partial(sides.suite, config.stages, of, config.max_trials, config.token_class_idx)
    if model is None and config.stages:
        return report(compared(), None)
    with config.published("fv_parity", model, sides.run, [REPORT]) as record:
        if model is not None:
            assert layer is not None
            heads = config.n_top_heads, config.token_class_idx
            print(*sides.work_out(model, *heads, layer, config.prompt_kind, record), sep="\n")
        return report(compared(), None if config.stages else record)


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
