"""Trace run folders: what an attribution gave for every example of a run, as the published evaluation keeps it.

    <output_root>/traces/<dataset>/<model>/<tag>/manifest.jsonl     one line per example, see `line_of`
                                                 ex_000000.npz      vectors, spans, scores of one example

Source: the `exp2` traces of FlashTrace (wbopan/flashtrace, commit 075e7e4, MIT). Files have closed intervals of the
generation's tokens; a `Trace` has half-open spans. Vectors are `[P + G]`: the P tokens of the user's prompt, then the G
of the generation, its end-of-sequence token included. What is written again from what was read is the same, byte for
byte (`arrays`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from interp_core import LoadError, PlanError, Span, errors, runs

from ..._json_files import json_rows
from ..data.examples import closed, sha1
from .arrays import Array, checked, demand_finite, npz_bytes, opened, read_npz

MANIFEST = "manifest.jsonl"
FORMS = ("seq", "row", "rec")
"""Vectors of one attribution: of the row-normalised matrix, of the rows that are explained, by recursion."""
NEEDED = {"example_idx": int, "attr_func": str, "file": str, "prompt_sha1": str}
"""What every line of a manifest says."""
TAKES = {int: "a whole number", str: "a text"}
SPANS = ("indices_to_explain_gen", "sink_span_gen", "thinking_span_gen")
INDICES = ("user_prompt_indices", "keep_prompt_token_indices", "gold_prompt_token_indices")
SECONDS = ("time_attr_s", "time_faith_s", "time_recovery_s")
WITH_HOPS = ("ifr_multi_hop_stop_words", "ifr_multi_hop_both", "ifr_multi_hop_split_hop", "ifr_in_all_gen")
"""Methods whose exports hold vectors of single hops."""
HOP_COUNTED = ("ifr_multi_hop", *WITH_HOPS, "ft_attnlrp", "attnlrp_aggregated_multi_hop")
"""Methods whose tag names the number of hops."""
LRP = ("attnlrp", "ft_attnlrp", "attnlrp_aggregated_multi_hop")
KNOWN = (
    *(f"v_{form}_{part}" for part in ("all", "prompt") for form in FORMS), "prompt_len", "gen_len", *SPANS, *INDICES,
    "faithfulness_scores", "recovery_scores", *SECONDS, "vh", "attnlrp_neg_handling", "attnlrp_norm_mode",
    "attnlrp_ratio_enabled",
)  # fmt: skip
"""Members of an example's file, in their order."""


def run_tag(
    attr_func: str,
    modes: Sequence[str],
    count: int,
    n_hops: int = 1,
    neg_handling: str = "drop",
    norm_mode: str = "norm",
) -> str:
    """The name of a run's folder: method, its settings where it has them, modes and number of examples."""
    parts = [attr_func]
    if attr_func in HOP_COUNTED:
        parts.append(f"n{n_hops}")
    if attr_func in LRP:
        parts += [f"neg{neg_handling}", f"norm{norm_mode}"]
    return "_".join([*parts, *(["m" + "+".join(modes)] if modes else []), f"{count}ex"])


@dataclass(frozen=True, eq=False)
class Trace:
    """One example of a trace folder.

    Attributes:
        index: number of the example in its run.
        attr_func: method, by the name of the published evaluation.
        prompt_sha1, target_sha1: of the example's texts, by which it is found again.
        vectors: "seq", "row" and "rec", float32 `[P + G]` each, not negative.
        prompt_len: P, tokens of the user's prompt.
        explained, sink, thinking: in tokens of the generation, half-open; None where the example has none.
        indices: members of `INDICES`: positions of the user's tokens in the formatted prompt; prompt tokens that are
            kept (no stop words); prompt tokens of the needles.
        faithfulness: float64 `[form 3]`: RISE, MAS, RISE+AP.
        recovery: float64 `[form]`, Recovery@10 %.
        skipped: why there is no recovery.
        seconds: members of `SECONDS`.
        hops: float32 `[hop P + G]`, unmasked.
        lrp: `attnlrp_neg_handling`, `attnlrp_norm_mode`, `attnlrp_ratio_enabled` of traces with hops.
        line: its line of the manifest, if it was read.
    """

    index: int
    attr_func: str
    prompt_sha1: str
    target_sha1: str | None
    vectors: Mapping[str, Array]
    prompt_len: int
    explained: Span | None = None
    sink: Span | None = None
    thinking: Span | None = None
    indices: Mapping[str, Array] = field(default_factory=dict)
    faithfulness: Array | None = None
    recovery: Array | None = None
    skipped: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    hops: Array | None = None
    lrp: tuple[str, str, int] | None = None
    line: Mapping[str, Any] | None = None

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"ex_{self.index:06d}.npz" if self.line is None else str(self.line["file"])

    @property
    def length(self) -> int:
        """P + G."""
        return len(self.vectors["row"])

    @property
    def gen_len(self) -> int:
        """G, tokens of the generation, its end-of-sequence token included."""
        return self.length - self.prompt_len


def made_trace(
    index: int,
    *,
    attr_func: str,
    prompt: str,
    target: str | None,
    vectors: Mapping[str, Any],
    prompt_len: int,
    explained: Span | None,
    sink: Span | None = None,
    thinking: Span | None = None,
    user_prompt_indices: Sequence[int] | None = None,
    keep_prompt_token_indices: Sequence[int] | None = None,
    gold_prompt_token_indices: Sequence[int] | None = None,
    faithfulness: Any = None,
    recovery: Any = None,
    recovery_skipped_reason: str | None = None,
    time_attr_s: float | None = None,
    time_faith_s: float | None = None,
    time_recovery_s: float | None = None,
    hops: Any = None,
    lrp: tuple[str, str, bool] | None = None,
) -> Trace:
    """A trace from arrays or tensors; what they are: `Trace`. Spans are in tokens of the generation.

    Args:
        lrp: of AttnLRP with hops: what becomes of negative scores, of the norm, and whether ratios are on.

    Raises:
        PlanError: vectors or hops of another length, that are not finite, or a span outside the generation.
    """
    values = {form: _array(vectors[form]) for form in FORMS}
    indices = zip(INDICES, (user_prompt_indices, keep_prompt_token_indices, gold_prompt_token_indices), strict=True)
    times = zip(SECONDS, (time_attr_s, time_faith_s, time_recovery_s), strict=True)
    ratio = None if lrp is None else (lrp[0], lrp[1], int(lrp[2]))
    trace = Trace(
        index, attr_func, sha1(prompt), None if target is None else sha1(target), values, prompt_len, explained, sink,
        thinking,
        {name: np.asarray(list(places), dtype=np.int64) for name, places in indices if places is not None},
        None if faithfulness is None else _array(faithfulness, np.float64),
        None if recovery is None else _array(recovery, np.float64),
        recovery_skipped_reason,
        {name: float(value) for name, value in times if value is not None},
        None if hops is None else _array(hops),
        # published files of methods with hops have these members, empty where the method is not AttnLRP
        ("", "", -1) if ratio is None and hops is not None else ratio,
    )  # fmt: skip
    _demand_fit(trace)
    return trace


def _array(values: Any, dtype: Any = np.float32) -> Array:
    values = values.detach().cpu().double().numpy() if hasattr(values, "detach") else values
    return np.ascontiguousarray(values, dtype=dtype)


def _demand_fit(trace: Trace) -> None:
    """Refuse a trace that nobody could read.

    Raises:
        PlanError: naming what does not fit.
    """
    length = trace.length
    where = f"example {trace.index}"
    try:
        for form in FORMS:
            checked(where, f"v_{form}_all", trace.vectors[form], "float32", (length,))
            demand_finite(where, f"v_{form}_all", trace.vectors[form])
        if trace.hops is not None:
            checked(where, "vh", trace.hops, "float32", (None, length))
            demand_finite(where, "vh", trace.hops)
        if trace.faithfulness is not None:
            checked(where, "faithfulness_scores", trace.faithfulness, "float64", (3, 3))
        if trace.recovery is not None:
            checked(where, "recovery_scores", trace.recovery, "float64", (3,))
    except LoadError as error:
        raise PlanError(str(error)) from error
    if not 0 < trace.prompt_len < length:
        raise PlanError(f"{where}: {trace.prompt_len} of {length} tokens are the prompt's; give one of both at least")
    for name, span in zip(SPANS, (trace.explained, trace.sink, trace.thinking), strict=True):
        if span is not None and not 0 <= span.start <= span.stop <= trace.gen_len:
            raise PlanError(f"{where}: {name} {span} lies outside the generation, which has {trace.gen_len} tokens")


# Writing


def members_of(trace: Trace) -> dict[str, Array]:
    """The arrays of a trace's file, in their order."""
    out: dict[str, Array] = {f"v_{form}_all": trace.vectors[form] for form in FORMS}
    out |= {f"v_{form}_prompt": trace.vectors[form][: trace.prompt_len] for form in FORMS}
    out["prompt_len"] = np.asarray(trace.prompt_len, dtype=np.int64)
    out["gen_len"] = np.asarray(trace.gen_len, dtype=np.int64)
    for name, span in zip(SPANS, (trace.explained, trace.sink, trace.thinking), strict=True):
        # the explained span is in every file, empty where there is none; the other two are left out
        if span is not None or name == SPANS[0]:
            out[name] = np.asarray(closed(span) or (), dtype=np.int64)
    out |= {name: trace.indices[name] for name in INDICES if name in trace.indices}
    if trace.faithfulness is not None:
        out["faithfulness_scores"] = trace.faithfulness
    if trace.recovery is not None:
        out["recovery_scores"] = trace.recovery
    out |= {name: np.asarray(trace.seconds[name], dtype=np.float64) for name in SECONDS if name in trace.seconds}
    if trace.hops is not None:
        out["vh"] = trace.hops
    if trace.lrp is not None:
        out |= {name: np.asarray(text, dtype="<U16") for name, text in zip(KNOWN[-3:-1], trace.lrp[:2], strict=True)}
        out["attnlrp_ratio_enabled"] = np.asarray(trace.lrp[2], dtype=np.int64)
    return out


def line_of(trace: Trace) -> dict[str, Any]:
    """A trace's line of the manifest: the one that was read, or what its arrays say."""
    if trace.line is not None:
        return dict(trace.line)
    spans = dict(zip(SPANS, (closed(trace.explained) or [], closed(trace.sink), closed(trace.thinking)), strict=True))
    faith = None if trace.faithfulness is None else trace.faithfulness.tolist()
    out: dict[str, Any] = {
        "example_idx": trace.index, "attr_func": trace.attr_func, "file": trace.file,
        "prompt_sha1": trace.prompt_sha1, "target_sha1": trace.target_sha1, "prompt_len": trace.prompt_len,
        "gen_len": trace.gen_len, **spans, "faithfulness_scores": faith,
        "recovery_scores": None if trace.recovery is None else trace.recovery.tolist(),
        "recovery_skipped_reason": trace.skipped, **{name: trace.seconds.get(name) for name in SECONDS},
        "input_len": trace.prompt_len,
        "output_len": len(trace.sink) if trace.sink else None,
        "cot_len": len(trace.thinking) if trace.thinking else None,
    }  # fmt: skip
    for i, form in enumerate(FORMS):
        out |= {f"rise_{form}": faith and faith[i][0], f"mas_{form}": faith and faith[i][1]}
    if trace.hops is not None:
        out |= {"n_hops_plus_one": trace.hops.shape[0], "total_len": trace.hops.shape[1]}
        out |= dict(zip(KNOWN[-3:], trace.lrp or ("", "", -1), strict=True))
    return out


def trace_files(traces: Iterable[Trace]) -> dict[str, str | bytes]:
    """The files of a trace folder by name, for `run.put`: one per example, and the manifest last."""
    lines, files = [], dict[str, str | bytes]()
    for trace in traces:
        files[trace.file] = npz_bytes(members_of(trace))
        lines.append(line_of(trace))
    return files | {MANIFEST: runs.json_lines(lines)}


def write_trace(folder: str | Path, index: int, **given: Any) -> Trace:
    """Write one example into a trace folder: its file, then its line of the manifest, each whole. An example that is
    there is replaced.

    Args:
        folder: `…/traces/<dataset>/<model>/<tag>`; made if it is not there.
        given: as `made_trace`.

    Raises:
        PlanError: as `made_trace`.
    """
    trace, path = made_trace(index, **given), Path(folder)
    lines = {line["file"]: line for line in read_manifest(path)} if (path / MANIFEST).exists() else {}
    runs.write(path / trace.file, npz_bytes(members_of(trace)))
    lines[trace.file] = line_of(trace)
    runs.write(path / MANIFEST, runs.json_lines(lines[name] for name in sorted(lines)))
    return trace


# Reading


def read_manifest(folder: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The lines of a trace folder's manifest.

    Args:
        limit: the first so many.

    Raises:
        LoadError: no manifest, an empty or damaged one, a line without a file, or two lines of one file.
        PlanError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PlanError(f"limit is {limit}: give at least 1, or leave it out for all examples")
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise LoadError(f"{folder} is no trace folder: there is no {MANIFEST} in it")
    lines: list[dict[str, Any]] = []
    for number, line in json_rows(path):
        if lacking := [name for name in NEEDED if line.get(name) in (None, "")]:
            raise LoadError(f"{path}, line {number}, lacks {', '.join(lacking)}")
        if not isinstance(line["file"], str) or Path(line["file"]).name != line["file"]:
            raise LoadError(f"{path}, line {number}: {line['file']!r} is no name of a file beside it")
        for name, kind in NEEDED.items():
            if not isinstance(line[name], kind) or isinstance(line[name], bool):
                raise LoadError(f"{path}, line {number}: {errors.wrong(name, TAKES[kind], line[name])}")
        if not isinstance(line.get("target_sha1"), (str, type(None))):
            raise LoadError(f"{path}, line {number}: {errors.wrong('target_sha1', TAKES[str], line['target_sha1'])}")
        lines.append(line)
    if not lines:
        raise LoadError(f"{path} is empty; give the folder of a run that wrote traces (--save_hop_traces)")
    names = [line["file"] for line in lines]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise LoadError(f"{path} names {double} twice; examples have files of their own")
    return lines[:limit]


def read_traces(folder: str | Path, limit: int | None = None) -> Iterator[Trace]:
    """The traces of a folder, one after the other.

    Raises:
        LoadError, PlanError: as `read_manifest` and `read_trace`.
    """
    return (read_trace(folder, line) for line in read_manifest(folder, limit))


def read_trace(folder: str | Path, line: Mapping[str, Any]) -> Trace:
    """The trace of a line of the manifest.

    Raises:
        LoadError: its file is missing, damaged, lacks a member or has one that is not known; arrays that do not fit
            each other or the manifest; scores that are not finite.
    """
    path = Path(folder) / str(line["file"])
    members = read_npz(path)
    if unknown := [name for name in members if name not in KNOWN]:
        raise LoadError(f"{path} holds {unknown[0]!r}, which traces do not have; they have {', '.join(KNOWN)}")
    if lacking := [name for name in ("v_row_all", "prompt_len", "gen_len", SPANS[0]) if name not in members]:
        raise LoadError(f"{path} lacks {', '.join(lacking)}, which every trace has")
    prompt_len, gen_len = (int(checked(path, n, members[n], "int64", ())) for n in ("prompt_len", "gen_len"))
    for name, size in (("prompt_len", prompt_len), ("gen_len", gen_len)):
        if line.get(name, size) != size:
            raise LoadError(f"{path}: {name} is {size}, {MANIFEST} says {line[name]}; files of two runs are mixed")
    length = prompt_len + gen_len
    explained, sink, thinking = (_span(path, members, name) for name in SPANS)
    hops = members.get("vh")
    if hops is not None:
        demand_finite(path, "vh", checked(path, "vh", hops, "float32", (None, length)))
    kinds = dict(zip(KNOWN[-3:], ("U", "U", "int64"), strict=True))
    lrp = [checked(path, name, members[name], kind, ()).item() for name, kind in kinds.items() if name in members]
    return Trace(
        index=line["example_idx"],
        attr_func=line["attr_func"],
        prompt_sha1=line["prompt_sha1"],
        target_sha1=line.get("target_sha1"),
        vectors={form: _vector(path, members, form, length, prompt_len) for form in FORMS},
        prompt_len=prompt_len,
        explained=explained,
        sink=sink,
        thinking=thinking,
        indices={n: checked(path, n, members[n], "int64", (None,)) for n in INDICES if n in members},
        faithfulness=_scores(path, members, "faithfulness_scores", (3, 3)),
        recovery=_scores(path, members, "recovery_scores", (3,)),
        skipped=line.get("recovery_skipped_reason"),
        seconds={name: float(checked(path, name, members[name], "float64", ())) for name in SECONDS if name in members},
        hops=hops,
        lrp=(str(lrp[0]), str(lrp[1]), int(lrp[2])) if len(lrp) == 3 else None,
        line=dict(line),
    )


def _scores(path: Path, members: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array | None:
    return checked(path, name, members[name], "float64", shape) if name in members else None


def _vector(path: Path, members: Mapping[str, Array], form: str, length: int, prompt_len: int) -> Array:
    """A vector of all tokens; its beginning is kept a second time, as that of the prompt."""
    whole, start = f"v_{form}_all", f"v_{form}_prompt"
    if whole not in members or start not in members:
        raise LoadError(f"{path} lacks {whole if whole not in members else start}, which every trace has")
    vector = checked(path, whole, members[whole], "float32", (length,))
    demand_finite(path, whole, vector)
    if not np.array_equal(vector[:prompt_len], checked(path, start, members[start], "float32", (prompt_len,))):
        raise LoadError(f"{path}: {start} is not the beginning of {whole}; the file is damaged")
    return vector


def _span(path: Path, members: Mapping[str, Array], name: str) -> Span | None:
    if name not in members or members[name].size == 0:
        return None
    pair = checked(path, name, members[name], "int64", (2,))
    return opened(pair) or Span(int(pair[0]), int(pair[1]) + 1)
