"""Compact exports of trace folders, for people who need neither model nor tokenizer.

    interp run export_traces --trace_dir exp/exp2/output/traces/exp/exp2/data/math.jsonl/qwen-8B/RUN \\
        --dataset_jsonl exp/exp2/data/math.jsonl --tokenizer_model Qwen/Qwen3-8B
    interp run export_traces --traces_root exp/exp2/output/traces --form proc_1          (every run below a folder)

A trace folder (`manifest.jsonl`, `ex_*.npz`; `interp_plugins.attribution.files.traces`) becomes one `.npz` per example
(`interp_plugins.attribution.files.exports`). Examples are found in the data set by the SHA-1 of prompt and target, and
their tokens are cut again with the run's tokenizer, as the run cut them; numbers of tokens must agree. Everything is
checked before anything is written. The settings are those of the published script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from interp_plugins.attribution.data.cache import example_tokens, json_rows
from interp_plugins.attribution.data.examples import example_of, sha1
from interp_plugins.attribution.files.exports import Form, export_bytes, export_of, is_cut, pieces
from interp_plugins.attribution.files.traces import MANIFEST, WITH_HOPS, Trace, read_manifest, read_traces

import interp_core as ic
from interp_core import open_tokenizer, runs

OUTPUT: Mapping[Form, Path] = {"proc": Path("exp/proc/output"), "proc_1": Path("exp/proc_1/output")}
"""Where exports go if nothing is said, each below what follows `traces/` in its folder's path."""


class ExportTracesConfig(ic.Config):
    """Which traces are exported, with whose tokens, and where to.

    Attributes:
        trace_dir: a run's trace folder, with its manifest.jsonl.
        dataset_jsonl: the cached data set of that run (default: what the folder's path names, where it is found).
        tokenizer_model: the run's tokenizer: toy:text, a folder, or a hub id (default: what the run's record says).
        out_dir: where exports go (default: OUT_ROOT/<what follows traces/ in the folder's path>).
        out_root: default exp/proc/output, for form proc_1 exp/proc_1/output.
        traces_root: in place of trace_dir, every trace folder below this one.
        form: proc, or proc_1: without tokens (and so without data set and tokenizer), with the lengths of the spans.
        profile: of the run, which says how it cut tokens (default: what its record says, else reference).
        limit: the first so many examples of each folder.
        overwrite: replace exports that another run, or a person, left there.
        allow_missing_ft_hops: write exports without `hop` where a trace of such a method has no `vh`.
    """

    trace_dir: Path | None = None
    dataset_jsonl: Path | None = None
    tokenizer_model: str | None = None
    out_dir: Path | None = None
    out_root: Path | None = None
    traces_root: Path | None = None
    form: Form = "proc"
    profile: Literal["reference", "sound"] | None = None
    limit: int | None = None
    overwrite: bool = False
    allow_missing_ft_hops: bool = False


def export_traces(config: ExportTracesConfig) -> Path:
    """Write exports; returns their folder.

    Raises:
        LoadError: no trace folder, damaged files, scores that are not finite, hops that are missing.
        TextError: examples that are not in the data set, twice in it, or have other tokens.
        PlanError: settings that contradict each other, files in the way.
    """
    folders = _folders(config.trace_dir, config.traces_root, config.out_dir)
    root = config.out_dir or config.out_root or OUTPUT[config.form]
    tokenizers: dict[str, Any] = {}
    files: dict[str, str | bytes] = {}
    for folder in folders:
        print(f"{folder}", flush=True)
        below = Path() if config.out_dir is not None else _suffix(folder)
        files |= {(below / name).as_posix(): content for name, content in _exports(folder, config, tokenizers).items()}
    settings = {
        "folders": [str(folder) for folder in folders], "form": config.form, "tokenizers": sorted(tokenizers),
        "limit": config.limit,
    }  # fmt: skip
    with runs.publish(root, settings, recipe="export_traces", overwrite=config.overwrite) as run:
        digests = {str(folder): runs.digest((folder / MANIFEST).read_text(encoding="utf-8")) for folder in folders}
        lines = run.put(files, stage="exports", inputs={"manifests": digests})
    print(f"{len(lines)} exports, {sum(line.endswith('same as before') for line in lines)} of them there before")
    return root if len(folders) > 1 or config.out_dir is not None else root / _suffix(folders[0])


def _exports(folder: Path, config: ExportTracesConfig, tokenizers: dict[str, Any]) -> dict[str, bytes]:
    """The exports of one trace folder by their file names; each tokenizer is opened once for all folders."""
    traces = list(read_traces(folder, config.limit))
    _demand_hops(folder, traces, config.form, config.allow_missing_ft_hops)
    tokens: Sequence[list[str] | None] = [None] * len(traces)
    if config.form == "proc":
        name, profile = _how(folder, config.tokenizer_model, config.profile)
        tokenizers[name] = tokenizers[name] if name in tokenizers else open_tokenizer(name)
        dataset = _dataset(folder, config.dataset_jsonl)
        tokens = list(_tokens(folder, traces, dataset, tokenizers[name], name, profile))
    exports: dict[str, bytes] = {}
    with ic.Progress("exports", len(traces)) as told:
        for trace, of_trace in zip(traces, tokens, strict=True):
            exports[trace.file] = export_bytes(export_of(trace, of_trace, form=config.form))
            told.add()
    _tell(traces, config.form)
    return exports


def _folders(trace_dir: Path | None, traces_root: Path | None, out_dir: Path | None) -> list[Path]:
    """The trace folders that are asked for.

    Raises:
        PlanError, LoadError: none, or two answers.
    """
    if (trace_dir is None) == (traces_root is None):
        raise ic.PlanError(
            "give --trace_dir (one run's trace folder) or --traces_root (all below a folder): one of both"
        )
    if trace_dir is not None:
        read_manifest(trace_dir, 1)
        return [trace_dir]
    assert traces_root is not None
    if out_dir is not None:
        raise ic.PlanError("--out_dir is one run's folder; with --traces_root give --out_root")
    folders = sorted(path.parent for path in traces_root.rglob(MANIFEST))
    if not folders:
        raise ic.LoadError(f"there is no {MANIFEST} below {traces_root}; give the folder `traces` of an evaluation")
    return folders


def _suffix(folder: Path) -> Path:
    """What follows `traces/` in a folder's path: data set, model and run; its own name where there is no `traces`."""
    parts = folder.absolute().parts
    places = [i + 1 for i, part in enumerate(parts) if part == "traces" and i + 1 < len(parts)]
    # the last `traces` behind which data set, model and run still fit: a folder above, or a model, may be called so too
    whole = [i for i in places if len(parts) - i >= 3]
    start = whole[-1] if whole else next(iter(places), len(parts) - 1)
    return Path(*parts[start:])


def _output_root(folder: Path) -> Path:
    """The evaluation's output folder, which holds `traces`."""
    return folder.absolute().parents[len(_suffix(folder).parts)]


def _demand_hops(folder: Path, traces: Sequence[Trace], form: Form, allowed: bool) -> None:
    """Refuse traces without the vectors that exports of their method hold.

    Raises:
        LoadError: naming the first.
    """
    lacking = [trace for trace in traces if trace.hops is None and trace.attr_func in WITH_HOPS]
    if form == "proc_1" or not lacking:
        return
    if not allowed:
        raise ic.LoadError(
            f"{folder}: {lacking[0].attr_func} has per-hop vectors, but {len(lacking)} of {len(traces)} traces have no "
            f"'vh', the first {lacking[0].file}; run the evaluation again with --save_hop_traces, or give "
            "--allow_missing_ft_hops to export without `hop`"
        )
    print(f"  {len(lacking)} of {len(traces)} traces of {lacking[0].attr_func} have no 'vh': exported without `hop`")


def _tell(traces: Sequence[Trace], form: Form) -> None:
    """Say what an export has differently from its trace."""
    if cut := [trace for trace in traces if is_cut(trace)]:
        print(f"  {len(cut)} of {len(traces)} have a span past the last token before the end of sequence: it is cut")
    print(f"  {len(traces)} examples, {form}")


# Data set and tokenizer


def _records_of(folder: Path) -> list[Mapping[str, Any]]:
    """Records of our evaluations that wrote traces of this data set and model into the folder's tree."""
    tree, suffix = _output_root(folder), _suffix(folder)
    place = suffix.parent.as_posix()
    records = [runs.manifest(path.parent) for path in sorted(tree.parent.glob(f"{tree.name}.runs/*/manifest.json"))]
    return [
        record
        for record in records
        if record["recipe"] == "attribution_eval"
        and place in {f"{name.strip('/')}/{record['settings']['label']}" for name in record["settings"]["datasets"]}
    ]


def _how(folder: Path, tokenizer_model: str | None, profile: str | None) -> tuple[str, str]:
    """The tokenizer of a run and its profile."""
    records = _records_of(folder)
    sources = [record["model"]["source"] for record in records if record["model"]]
    profiles = [record["settings"]["options"]["profile"] for record in records]
    return (
        _said(folder, "tokenizer model", sources, tokenizer_model, None),
        _said(folder, "profile", profiles, profile, "reference"),
    )


def _said(folder: Path, what: str, values: Sequence[str], wanted: str | None, fallback: str | None) -> str:
    """What was asked for, or else the one thing that the records of a folder say.

    Raises:
        LoadError: they say nothing, or several things, and there is nothing to fall back on.
    """
    if wanted is not None:
        return wanted
    names = sorted({*values})
    if len(names) != 1 and (names or fallback is None):
        known = f"its records name {' and '.join(names)}" if names else "no record of its run says it"
        raise ic.LoadError(f"the {what} of {folder} is not given, and {known}; give --{what.replace(' ', '_')}")
    if names:
        print(f"  {what}: {names[0]}")
    return names[0] if names else str(fallback)


def _dataset(folder: Path, dataset_jsonl: Path | None) -> Path:
    """The data set of a run.

    Raises:
        LoadError: it is not given and not found, naming where it was looked for.
    """
    if dataset_jsonl is not None:
        if not dataset_jsonl.is_file():
            raise ic.LoadError(f"there is no file {dataset_jsonl}; --dataset_jsonl is the cached data set of the run")
        return dataset_jsonl
    name = Path(*_suffix(folder).parts[:-2])
    looked: list[Path] = []
    if name.parts:
        around = [Path(), *folder.absolute().parents]
        looked = [parent / name for parent in around] if name.suffix == ".jsonl" else []
        passed = [record["passed"] or {} for record in _records_of(folder)]
        roots = [Path(words["data_root"]) for words in passed if "data_root" in words]
        data = [*roots, _output_root(folder).parent / "data", Path("exp/exp2/data")]
        looked += [root / f"{name}.jsonl" for root in data] + [parent / name for parent in around]
    for path in looked:
        if path.is_file():
            print(f"  data set: {path}")
            return path
    tried = f" (no {', '.join(str(path) for path in looked[:2])}, …)" if looked else ""
    raise ic.LoadError(
        f"the data set of {folder} is not given, and its path does not lead to one{tried}; give --dataset_jsonl, the "
        "cached JSONL that the run attributed"
    )


def _indexed(path: Path) -> dict[tuple[str, str], tuple[int, Mapping[str, Any]]]:
    """The rows of a data set, and their lines, by the SHA-1 of prompt and target.

    Raises:
        LoadError: a line that is no JSON object, or none with a target.
        TextError: the same prompt and target twice.
    """
    index: dict[tuple[str, str], tuple[int, Mapping[str, Any]]] = {}
    count = 0
    for number, row in json_rows(path):
        count += 1
        prompt, target = row.get("prompt"), row.get("target")
        if prompt is None:
            raise ic.LoadError(f"{path}, line {number}, is no example: it has no prompt, but {', '.join(row)}")
        if target is None:
            continue
        before, _ = index.setdefault((sha1(str(prompt)), sha1(str(target))), (number, row))
        if before != number:
            raise ic.TextError(
                f"{path}: lines {before} and {number} have the same prompt and target, so traces cannot be told "
                "apart by them; leave one out"
            )
    if not index:
        raise ic.LoadError(f"{path}: none of {count} lines has a target; give the cache with the targets of the run")
    return index


def _tokens(
    folder: Path, traces: Sequence[Trace], dataset: Path, tokenizer: Any, name: str, profile: str
) -> Iterator[list[str]]:
    """The tokens of each trace, without the end of sequence.

    Raises:
        TextError: an example that is not in the data set, or has another number of tokens.
    """
    index = _indexed(dataset)
    missing = [trace for trace in traces if (trace.prompt_sha1, trace.target_sha1) not in index]
    if missing:
        first = missing[0]
        near = next((place for (prompt, _), place in index.items() if prompt == first.prompt_sha1), None)
        why = f"its prompt is in line {near[0]}, with another target" if near else "its prompt is not there either"
        raise ic.TextError(
            f"Failed to match manifest sha1 to dataset_jsonl: {len(missing)} of {len(traces)} examples of {folder} are "
            f"not among the {len(index)} of {dataset}, the first is example {first.index} ({first.file}, prompt_sha1 "
            f"{first.prompt_sha1}, target_sha1 {first.target_sha1}; {why}); give the cached JSONL of that very run"
        )
    for trace in traces:
        line, row = index[trace.prompt_sha1, str(trace.target_sha1)]
        prompt, generation = _cut(tokenizer, row, f"{dataset}, line {line}", profile)
        for what, cut, kept in (("Prompt", prompt, trace.prompt_len), ("Generation", generation, trace.gen_len)):
            if len(cut) != kept:
                raise ic.TextError(
                    f"{what} token length mismatch: {trace.file} has {kept} tokens, {name} gives {len(cut)} (example "
                    f"{trace.index}, line {line} of {dataset}, profile {profile}); give --tokenizer_model of the run "
                    f"that wrote {folder}"
                )
        yield prompt + generation[:-1]


def _cut(tokenizer: Any, row: Mapping[str, Any], where: str, profile: str) -> tuple[list[str], list[str]]:
    """Tokens of prompt and generation as a run of that profile cut them."""
    if profile == "reference":
        return pieces(tokenizer, str(row["prompt"]), str(row["target"]))
    tokens = example_tokens(tokenizer, example_of(row, where), "sound", eos=True)
    prompt, generation = (list(tokens.labels_at(name)[0]) for name in ("prompt", "target"))
    return prompt, generation
