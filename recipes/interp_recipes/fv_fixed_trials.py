"""Fixed trials of function vectors: drawn once, written to a file, checked.

    interp run fv_fixed_trials --set dataset_json=antonym.json --set model_name_for_tokenizer=gpt2 --set out_path=out/
    interp run fv_fixed_trials --fixed_trials_path out/fixed_trials_antonym_t10_s10_seed0_gpt2.json      (checks only)

Each trial has a clean prompt, and one whose answers are permuted; `numpy.random.default_rng(seed)` draws them. Checks
are prompt parity, slot parity and verify (`interp_plugins.function_vectors.files.checks`), over all trials, clean and
corrupted, if not told otherwise; a mismatch ends the recipe with an error. What was checked, and every mismatch, is
written to `<the file's name>_parity.log` beside it (`…_parity_corrupted.log`, `…_parity_first3.log` where only those
were checked). Needs a tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from interp_plugins.function_vectors.files.checks import KINDS, Check, prompt_parity, slot_parity, verify_answers
from interp_plugins.function_vectors.files.fixed_run import put
from interp_plugins.function_vectors.files.trials import trials_text
from interp_plugins.function_vectors.files.trials_json import file_name, read_json
from interp_plugins.function_vectors.tasks import load_task
from interp_plugins.function_vectors.template import Template, name_of
from interp_plugins.function_vectors.trials import fixed_trials

import interp_core as ic
from interp_core import open_tokenizer, runs

from .fv_configs import TemplateConfig

Mode = Literal["both", "clean", "corrupted"]
"""Which prompts are checked."""
OUT = Path("out/fixed_trials")


class FixedTrialsConfig(TemplateConfig):
    """Trials to draw, or a file to check.

    Attributes:
        dataset_json: task file; without one, the file `out_path` is only checked.
        out_path: file to write or check, or a folder for `fixed_trials_<task>_t<N>_s<S>_seed<K>_<model>.json`.
        n_trials, n_shots: trials, and demonstrations in each.
        seed: of the split and of the draws.
        test_split: share of rows that are not for training.
        model_name_for_tokenizer, tokenizer_name: toy:text, a folder, or a hub id (default: the file's own).
        model_prepend_bos: the tokenizer adds a BOS (default: asked of the tokenizer).
        prepend_bos_token_used: the text of a BOS stands in the prompts (default: where the tokenizer adds none).
        verify: also compare the answers' first tokens.
        verify_n: trials to print.
        fixed_trials_path: a file that is only checked, in place of `out_path`.
        mode, max_trials: check clean or corrupted prompts, or the first trials only.
        assert_zero: a mismatch is an error; if false, it is only printed and logged.
        log_path: where the log goes (default: beside the file).
        overwrite: replace a file that another run or a person left there.
    """

    dataset_json: Path | None = None
    out_path: Path = OUT
    n_trials: int = 10
    n_shots: int = 10
    seed: int = 0
    test_split: float = 0.3
    model_name_for_tokenizer: str | None = None
    model_prepend_bos: bool | None = None
    prepend_bos_token_used: bool | None = None
    verify: bool = True
    verify_n: int = 3
    fixed_trials_path: Path | None = None
    tokenizer_name: str | None = None
    mode: Mode = "both"
    max_trials: int | None = None
    assert_zero: bool = True
    log_path: Path | None = None
    overwrite: bool = False

    @property
    def path(self) -> Path:
        """The file that is asked for, or the folder for it."""
        return self.fixed_trials_path or self.out_path

    def check(self) -> str | None:
        """The tokenizer's name, where one is given.

        Raises:
            PlanError: settings that contradict each other.
        """
        names = {key: getattr(self, key) for key in ("model_name_for_tokenizer", "tokenizer_name")}
        named = {key: name for key, name in names.items() if name is not None}
        if len({*named.values()}) > 1:
            raise ic.PlanError(
                f"{' and '.join(f'{key}={name!r}' for key, name in named.items())} differ; give one of them"
            )
        if self.fixed_trials_path is not None and (self.dataset_json is not None or self.out_path != OUT):
            raise ic.PlanError(
                "fixed_trials_path names a file that is only checked: leave it out, or dataset_json, out_path"
            )
        if self.max_trials is not None and self.max_trials < 1:
            raise ic.PlanError(f"max_trials is {self.max_trials}: give at least 1, or leave it out to check all trials")
        return next(iter(named.values()), None)

    def template(self, tokenizer: Any) -> Template:
        """The template, with the BOS that the two settings ask for."""
        template = Template.filled(self.prefixes, self.separators)
        added = template.front(tokenizer).added
        if self.model_prepend_bos and not added:
            raise ic.TextError("model_prepend_bos is true, but this tokenizer adds no BOS; leave the setting out")
        if self.prepend_bos_token_used and added:
            raise ic.TextError("prepend_bos_token_used is true, but this tokenizer adds a BOS itself: a prompt has one")
        off = self.model_prepend_bos is False if added else self.prepend_bos_token_used is False
        return replace(template, bos=False if off else self.prepend_bos_token_used or None)


def fv_fixed_trials(config: FixedTrialsConfig) -> Path:
    """Write fixed trials and check them; returns the file's path.

    Raises:
        TextError: a mismatch, or prompts that cannot be built.
        PlanError: settings that contradict each other.
    """
    named, path = config.check(), config.path
    if config.dataset_json is not None:
        path = _drawn(config, config.dataset_json, named or "toy:text")
    data = read_json(path)
    tokenizer = open_tokenizer(named or data["meta"]["model_name_for_tokenizer"])
    log = config.log_path or path.with_name(_log_name(path, config.mode, config.max_trials, len(data["trials"])))
    some = {**data, "trials": data["trials"][: config.max_trials]}
    checks = _checked(path, some, tokenizer, config.mode, log, config.verify_n if config.verify else None)
    _judge(path, checks, config.assert_zero)
    return path


def _drawn(config: FixedTrialsConfig, dataset: Path, tokenizer_name: str) -> Path:
    """Draw trials and write their file, as a run of its own in the tree; returns its path."""
    tokenizer, task = open_tokenizer(tokenizer_name), load_task(dataset, seed=config.seed, test_split=config.test_split)
    sizes = {"n_trials": config.n_trials, "n_shots": config.n_shots, "seed": config.seed}
    trials = fixed_trials(task, tokenizer, template=config.template(tokenizer), **sizes)
    print(task)
    path = config.path
    if path.suffix != ".json":
        path /= file_name(task.name, **sizes, model=tokenizer_name)
    drawn = {"tokenizer": tokenizer_name, "file": path.name}
    with runs.publish(path.parent, drawn, recipe="fv_fixed_trials", overwrite=config.overwrite) as record:
        named = replace(trials, meta={**trials.meta, "model_name_for_tokenizer": tokenizer_name})
        print(*record.put({path.name: trials_text(named)}), sep="\n")
    return path


def _checked(
    path: Path, data: Mapping[str, Any], tokenizer: Any, mode: Mode, log: Path, verify_n: int | None
) -> list[Check]:
    """The checks of these trials, which are also logged; with the answers' if a number of trials is to be shown."""
    kinds = KINDS if mode == "both" else (mode,)
    checks = [prompt_parity(data, tokenizer, kinds), slot_parity(data, tokenizer, kinds)]
    if verify_n is not None:
        _show(data, tokenizer, verify_n)
        checks.append(verify_answers(data, tokenizer))
    try:
        print(*put(log.parent, {log.name: _log(path, tokenizer, kinds, checks)}), sep="\n")
    except OSError as error:
        raise ic.PlanError(f"the log {log} cannot be written ({error}); give another place: log_path=FILE") from error
    return checks


def _log_name(path: Path, mode: Mode, first: int | None, trials: int) -> str:
    """Another for checks of a part, which leave the log of the whole file alone."""
    part = ("" if mode == "both" else f"_{mode}") + ("" if first is None or first >= trials else f"_first{first}")
    return f"{path.stem}_parity{part}.log"


def _log(path: Path, tokenizer: Any, kinds: Sequence[str], checks: Sequence[Check]) -> str:
    """What was checked, with every mismatch; the same for the same file."""
    lines = [f"fixed trials: {path}", f"tokenizer: {name_of(tokenizer)}", f"prompts: {', '.join(kinds)}", ""]
    for check in checks:
        lines += [str(check), *(f"  {line}" for line in check.mismatches)]
    good = all(check.checked_trials and not check.mismatches for check in checks)
    return "\n".join([*lines, "", "PASS" if good else "FAIL"]) + "\n"


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


def _judge(path: Path, checks: list[Check], assert_zero: bool) -> None:
    """Print what was checked; an error, or a list, if anything does not agree."""
    for check in checks:
        print(check)
    wrong = [line for check in checks for line in check.mismatches]
    if empty := [check.name for check in checks if not check.checked_trials]:
        wrong.append(f"{', '.join(empty)}: there are no trials to check")
    if wrong and not assert_zero:
        print(*wrong, sep="\n")
    elif wrong:
        shown = "\n  ".join(wrong[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ic.TextError(
            f"{path} does not hold the trials that this tokenizer and its own pairs give ({len(wrong)} mismatches):\n"
            f"  {shown}{more}\nMake it again from its task file (dataset_json), or load the tokenizer it names"
        )
