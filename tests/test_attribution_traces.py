"""Trace folders and exports: files of others are read, held against what they say, and written again byte for byte."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from interp_plugins.attribution.files import exports, traces
from interp_recipes.attribution_eval import AttributionEvalConfig, attribution_eval
from interp_recipes.export_traces import ExportTracesConfig, export_traces

import interp_core as ic

HERE = DATA / "attribution"
GOLDEN, PUBLISHED = HERE / "traces/golden", HERE / "traces/published"
FOLDERS = sorted(path.parent for path in (HERE / "traces").rglob("manifest.jsonl"))
EXPORTS = sorted((HERE / "exports").rglob("*.npz"))
RULER = GOLDEN / "tiny_gen_ruler/tiny-llama"
BOTH = GOLDEN / "tiny_gen/tiny-llama/ifr_multi_hop_both_n1_mfaithfulness_gen_2ex"
LLAMA = HERE / "models/llama"
ONE = "ifr_multi_hop_both_n1_mfaithfulness_gen+recovery_ruler_1ex"


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def compresses_alike(data: bytes) -> bool:
    """Whether this machine's zlib makes of a file's first member what the file has (zlib-ng does not)."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.infolist()[0]
        content = archive.read(first)
    name, extra = struct.unpack("<HH", data[first.header_offset + 26 : first.header_offset + 30])
    start = first.header_offset + 30 + name + extra
    deflate = zlib.compressobj(-1, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush() == data[start : start + first.compress_size]


def same_file(made: bytes, kept: bytes) -> None:
    """The same bytes, compressed where zlib compresses alike, and within either way."""
    assert list(members(made)) == list(members(kept)) and members(made) == members(kept)
    assert made == kept or not compresses_alike(kept)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_traces_are_written_again_as_they_are(folder: Path) -> None:
    for name, content in traces.trace_files(traces.read_traces(folder)).items():
        kept = (folder / name).read_bytes()
        if isinstance(content, str):
            assert content.encode() == kept
        else:
            same_file(content, kept)


def test_a_line_of_the_manifest_is_what_its_arrays_say() -> None:
    """Every key of the published evaluation, in its order, to the bit."""
    count = 0
    for folder in FOLDERS:
        if folder.is_relative_to(GOLDEN):
            for trace in traces.read_traces(folder):
                made = traces.line_of(replace(trace, line=None))
                assert made == trace.line and list(made) == list(trace.line)
                count += 1
    assert count == 12


def test_names_of_runs() -> None:
    for folder in (path for path in FOLDERS if path.is_relative_to(GOLDEN)):
        line = traces.read_manifest(folder)[0]
        modes = folder.name.rpartition("_m")[2].rpartition("_")[0].split("+")
        assert traces.run_tag(line["attr_func"], modes, len(traces.read_manifest(folder)), 1) == folder.name


def plain(trace: traces.Trace, row: dict[str, Any]) -> dict[str, Any]:
    """A trace as the arguments that `write_trace` takes."""
    return {
        "attr_func": trace.attr_func, "prompt": row["prompt"], "target": row["target"], "vectors": trace.vectors,
        "prompt_len": trace.prompt_len, "explained": trace.explained, "sink": trace.sink, "thinking": trace.thinking,
        **{name: values.tolist() for name, values in trace.indices.items()}, "faithfulness": trace.faithfulness,
        "recovery": trace.recovery, **trace.seconds, "hops": trace.hops,
        "lrp": trace.lrp if trace.lrp and trace.lrp[0] else None,
    }  # fmt: skip


@pytest.mark.parametrize("folder", [BOTH, *sorted(RULER.iterdir())], ids=lambda path: path.name)
def test_write_trace_makes_the_same_folder(folder: Path, tmp_path: Path) -> None:
    """From plain arguments; in any order, and a second time."""
    rows = [json.loads(line) for line in (HERE / f"traces/{folder.parent.parent.name}.jsonl").read_text().splitlines()]
    kept = list(traces.read_traces(folder))
    for trace in [*reversed(kept), kept[0]]:
        traces.write_trace(tmp_path, trace.index, **plain(trace, rows[trace.index]))
    assert (tmp_path / "manifest.jsonl").read_bytes() == (folder / "manifest.jsonl").read_bytes()
    for trace in kept:
        same_file((tmp_path / trace.file).read_bytes(), (folder / trace.file).read_bytes())


def test_a_trace_that_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    trace = next(traces.read_traces(BOTH))
    row = {"prompt": "p", "target": "t"}
    short = dict(trace.vectors) | {"rec": trace.vectors["rec"][:-1]}
    for change, says in (
        ({"vectors": short}, r"example 0: v_rec_all is float32 \[136\], not float32 \[137\]"),
        ({"vectors": {form: np.full(137, np.nan) for form in traces.FORMS}}, "137 of 137 scores of v_seq_all are not"),
        ({"hops": np.full((2, 137), np.inf)}, r"274 of 274 scores of vh are not finite numbers, the first at \[0, 0\]"),
        ({"sink": ic.Span(24, 34)}, "sink_span_gen Span.* lies outside the generation, which has 33 tokens"),
        ({"prompt_len": 137}, "137 of 137 tokens are the prompt's"),
        ({"faithfulness": [0.1, 0.2]}, r"faithfulness_scores is float64 \[2\], not float64 \[3, 3\]"),
    ):
        with pytest.raises(ic.PlanError, match=says):
            traces.write_trace(tmp_path, 0, **plain(trace, row) | change)
    assert not list(tmp_path.iterdir())


def test_the_published_recovery_comes_out_again() -> None:
    """Needle tokens among the top tenth of the prompt, by a stable sort: about half of the weights are ties at zero."""
    (folder,) = [path for path in FOLDERS if path.is_relative_to(PUBLISHED)]
    (trace,) = traces.read_traces(folder)
    gold = trace.indices["gold_prompt_token_indices"]
    for form, stored in zip(traces.FORMS, trace.recovery, strict=True):
        weights = trace.vectors[form][: trace.prompt_len]
        best = np.argsort(-weights, kind="stable")[: math.ceil(0.1 * trace.prompt_len)]
        assert len(np.intersect1d(best, gold)) / len(gold) == stored == trace.line["recovery_scores"][0]
        assert 0.4 < (weights == 0).mean() < 0.6


# Exports


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_exports_are_written_again_as_they_are(path: Path) -> None:
    export = exports.read_export(path)
    same_file(exports.export_bytes(export), path.read_bytes())
    assert export.form == ("proc_1" if "proc_1" in path.parts else "proc")


def test_the_published_export() -> None:
    export = exports.read_export(HERE / "exports/published/ex_000000.npz")
    assert (export.attr.shape, export.hop.shape) == ((304,), (2, 304)) and len(export.tok) == 304
    assert export.span_in == ic.Span(0, 108) and export.span_cot == ic.Span(108, 285)
    assert export.span_out == ic.Span(285, 304) and math.isnan(export.recovery) and export.rise == 0.32917558886509635
    assert "".join(export.tok).startswith(" ")


def test_the_recipe_makes_the_same_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published scripts did, at their places, in both forms."""
    tree = tmp_path / "exp/exp2/output/traces"
    shutil.copytree(GOLDEN, tree)
    monkeypatch.chdir(tmp_path)
    given = {"dataset_jsonl": HERE / "traces/tiny_gen_ruler.jsonl", "tokenizer_model": str(LLAMA)}
    export_traces(ExportTracesConfig(traces_root=tree / "tiny_gen_ruler", **given))
    one = Path("exp/proc/output/tiny_gen_ruler/tiny-llama") / ONE
    assert (
        export_traces(ExportTracesConfig(trace_dir=tree / "tiny_gen_ruler/tiny-llama" / ONE, **given)) == one
    )  # the same content is no clash
    assert export_traces(ExportTracesConfig(traces_root=tree, form="proc_1")) == Path("exp/proc_1/output")
    count = 0
    for form in ("proc", "proc_1"):
        for path in (HERE / f"exports/{form}").rglob("*.npz"):
            made = tmp_path / f"exp/{form}/output/tiny_gen_ruler" / path.relative_to(HERE / f"exports/{form}")
            same_file(made.read_bytes(), path.read_bytes())
            count += 1
    assert count == 20 and len(list(tmp_path.glob("exp/proc/output/**/*.npz"))) == 10


def test_a_second_run_replaces_its_own_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"dataset_jsonl": HERE / "traces/tiny_gen.jsonl", "tokenizer_model": str(LLAMA), "out_dir": tmp_path / "o"}
    assert export_traces(ExportTracesConfig(trace_dir=BOTH, limit=1, **given)) == tmp_path / "o"
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["ex_000000.npz"]
    export_traces(ExportTracesConfig(trace_dir=BOTH, **given))
    assert "2 exports, 1 of them there before" in capsys.readouterr().out
    export_traces(ExportTracesConfig(trace_dir=BOTH, **given))
    assert "2 exports, 2 of them there before" in capsys.readouterr().out
    (tmp_path / "o/ex_000001.npz").write_bytes(b"a person's")
    before = (tmp_path / "o/ex_000000.npz").read_bytes()
    with pytest.raises(
        ic.PlanError, match="is there, written by export_traces-.*form was 'proc', is 'proc_1'.*--overwrite"
    ):
        export_traces(ExportTracesConfig(trace_dir=BOTH, form="proc_1", **given))
    assert (tmp_path / "o/ex_000000.npz").read_bytes() == before
    export_traces(ExportTracesConfig(trace_dir=BOTH, form="proc_1", overwrite=True, **given))
    assert exports.read_export(tmp_path / "o/ex_000001.npz").form == "proc_1"


def test_data_set_and_tokenizer_are_inferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the path below `traces/` (a data set given as a path is nested folders), and from the run's record."""
    name = "exp/exp2/data/tiny_gen.jsonl"
    folder = tmp_path / "exp/exp2/output/traces" / name / "tiny-llama" / BOTH.name
    shutil.copytree(BOTH, folder)
    with pytest.raises(ic.LoadError, match="data set of .* is not given, and its path does not lead to one"):
        export_traces(
            ExportTracesConfig(trace_dir=folder, dataset_jsonl=None, tokenizer_model=str(LLAMA), out_dir=tmp_path / "o")
        )
    (tmp_path / "exp/exp2/data").mkdir()
    shutil.copy(HERE / "traces/tiny_gen.jsonl", tmp_path / name)
    with pytest.raises(
        ic.LoadError, match="tokenizer model of .* is not given, and no record of its run says it; give --tok"
    ):
        export_traces(ExportTracesConfig(trace_dir=folder, out_dir=tmp_path / "o"))
    export_traces(
        ExportTracesConfig(trace_dir=folder, dataset_jsonl=None, tokenizer_model=str(LLAMA), out_dir=tmp_path / "o")
    )
    assert f"data set: {tmp_path / name}" in capsys.readouterr().out and len(list((tmp_path / "o").iterdir())) == 2


@pytest.mark.parametrize("profile", ["sound", "reference"])
def test_our_own_runs_are_exported(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the folder is given: the rest is in the run's record."""
    monkeypatch.chdir(tmp_path)
    shots = "Q: big\nA: small\n\nQ: hot\nA:"
    row = {"prompt": shots, "target": " cold\n\n", "indices_to_explain": [0, 0], "sink_span": [0, 0]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy.jsonl").write_text(json.dumps(row) + "\n")
    model = ic.load("toy:text", check=False)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    given: dict[str, Any] = {"data_root": tmp_path / "data", "output_root": tmp_path / "output", "num_examples": 1}
    given |= {"model_path": str(tmp_path / "model"), "profile": profile, "save_hop_traces": True, "n_hops": 1}
    attribution_eval(AttributionEvalConfig(datasets="toy", attr_funcs="ifr_multi_hop_both", **given))
    (folder,) = (path.parent for path in (tmp_path / "output").rglob("manifest.jsonl"))
    out = export_traces(ExportTracesConfig(trace_dir=folder))
    assert out == Path("exp/proc/output/toy") / folder.parent.name / folder.name
    (trace,), export = traces.read_traces(folder), exports.read_export(out / "ex_000000.npz")
    assert "".join(export.tok) == (" " if profile == "reference" else "") + shots + " cold\n\n"
    assert export.tok[export.span_out.start] == " cold" and export.hop.shape == (2, trace.length - 1)
    assert np.array_equal(export.attr, trace.vectors["row"][:-1]) and export.rise == trace.faithfulness[1, 0]


def test_an_example_that_is_not_in_the_data_set_is_named(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (HERE / "traces/tiny_gen.jsonl").read_text().splitlines()]
    data = tmp_path / "data.jsonl"
    for changed, says in (
        ([rows[0]], r"1 of 2 examples .* the first is example 1 \(ex_000001.npz, .* its prompt is not there either"),
        ([rows[0], rows[1] | {"target": " x"}], "its prompt is in line 2, with another target"),
        ([rows[0], rows[1], rows[0]], "lines 1 and 3 have the same prompt and target"),
        ([{**row, "target": None} for row in rows], "none of 2 lines has a target"),
        ([rows[0], {"text": "x"}], "line 2, is no example: it has no prompt, but text"),
    ):
        data.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises((ic.TextError, ic.LoadError), match=says):
            export_traces(
                ExportTracesConfig(
                    trace_dir=BOTH, dataset_jsonl=data, tokenizer_model=str(LLAMA), out_dir=tmp_path / "o"
                )
            )
    assert not (tmp_path / "o").exists()


def test_another_tokenizer_is_told_by_both_lengths(tmp_path: Path) -> None:
    says = r"Prompt token length mismatch: ex_000000.npz has 104 tokens, toy:text gives \d+ \(example 0, line 1 of "
    with pytest.raises(ic.TextError, match=says):
        export_traces(
            ExportTracesConfig(
                trace_dir=BOTH,
                dataset_jsonl=HERE / "traces/tiny_gen.jsonl",
                tokenizer_model="toy:text",
                out_dir=tmp_path / "o",
            )
        )


def test_missing_hops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The traces of a method of hops without `vh`: refused, or exported without on demand."""
    folder = tmp_path / "t"
    kept = [replace(trace, hops=None, lrp=None) for trace in traces.read_traces(BOTH)]
    folder.mkdir()
    for name, content in traces.trace_files(kept).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    files = {"dataset_jsonl": HERE / "traces/tiny_gen.jsonl", "tokenizer_model": str(LLAMA), "out_dir": tmp_path / "o"}
    with pytest.raises(
        ic.LoadError, match=r"2 of 2 traces have no 'vh', the first ex_000000.npz.*allow_missing_ft_hops"
    ):
        export_traces(ExportTracesConfig(trace_dir=folder, **files))
    export_traces(ExportTracesConfig(trace_dir=folder, **files, allow_missing_ft_hops=True))
    assert exports.read_export(tmp_path / "o/ex_000000.npz").hop is None
    assert "2 of 2 traces of ifr_multi_hop_both have no 'vh'" in capsys.readouterr().out


def damaged(folder: Path, name: str, **changes: Any) -> None:
    """A trace's file with other members (None: without)."""
    with np.load(folder / name) as archive:
        arrays = dict(archive) | changes
    np.savez_compressed(folder / name, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"v_row_all": np.full(97, np.nan, "f4")}, r"97 of 97 scores of v_row_all are not finite numbers, .*\[0\] \(nan"),
        ({"vh": np.full((2, 97), np.nan, "f4")}, "194 of 194 scores of vh are not finite"),
        ({"vh": np.zeros((2, 96), "f4")}, r"vh is float32 \[2, 96\], not float32 \[any, 97\]"),
        ({"v_row_all": np.zeros(97)}, r"v_row_all is float64 \[97\], not float32"),
        ({"v_row_all": None}, "lacks v_row_all, which every trace has"),
        ({"v_seq_all": None}, "lacks v_seq_all, which every trace has"),
        ({"v_rec_prompt": np.zeros(64, "f4")}, "v_rec_prompt is not the beginning of v_rec_all"),
        ({"gen_len": np.int64(34)}, "gen_len is 34, manifest.jsonl says 33"),
        ({"extra": np.zeros(2)}, "holds 'extra', which traces do not have"),
        ({"sink_span_gen": np.array([1, 2, 3])}, r"sink_span_gen is int64 \[3\]"),
        ({"time_attr_s": np.array("soon")}, r"time_attr_s is <U4 \[\], not float64 \[\]"),
        ({"time_attr_s": np.zeros(0)}, r"time_attr_s is float64 \[0\], not float64 \[\]"),
        ({"attnlrp_ratio_enabled": np.array(np.nan)}, r"attnlrp_ratio_enabled is float64 \[\], not int64"),
        ({"attnlrp_norm_mode": np.zeros(0, "U4")}, r"attnlrp_norm_mode is <U4 \[0\]"),
        ({"vh": np.array([{}], dtype=object)}, "it holds pickled objects, which are never loaded"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_damaged_traces(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """The second of two examples: nothing is written of the first either."""
    folder = tmp_path / "t"
    shutil.copytree(BOTH, folder)
    damaged(folder, "ex_000001.npz", **changes)
    with pytest.raises(ic.LoadError, match=says):
        export_traces(
            ExportTracesConfig(
                trace_dir=folder,
                dataset_jsonl=HERE / "traces/tiny_gen.jsonl",
                tokenizer_model=str(LLAMA),
                out_dir=tmp_path / "o",
            )
        )
    assert not (tmp_path / "o").exists()


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(BOTH, folder)
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    for text, says in (
        ("", "is empty; give the folder of a run that wrote traces"),
        (lines[0] + lines[1][:40], "line 2, is no JSON"),
        (lines[0] + "{}\n", "line 2, lacks example_idx, attr_func, file, prompt_sha1"),
        (lines[0] * 2, "names ex_000000.npz twice"),
        (lines[0].replace("ex_000000.npz", "../ex_000000.npz"), "'../ex_000000.npz' is no name of a file beside it"),
        (lines[0].replace('"ex_000000.npz"', "7"), "7 is no name of a file beside it"),
        (
            lines[0].replace('"example_idx": 0', '"example_idx": "one"'),
            "example_idx takes a whole number, not str 'one'",
        ),
        (lines[0].replace('"attr_func": "', '"attr_func": ["a"], "b": "'), "attr_func takes a text, not list"),
        (lines[0].replace('"target_sha1": "', '"target_sha1": ["a"], "b": "'), "target_sha1 takes a text, not list"),
    ):
        (folder / "manifest.jsonl").write_text(text)
        with pytest.raises(ic.LoadError, match=says):
            list(traces.read_traces(folder))
    (folder / "manifest.jsonl").write_text("".join(lines))
    whole = (BOTH / "ex_000001.npz").read_bytes()
    flipped = whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]
    for content, says in (
        (b"", "is no .npz file"),
        (whole[:-300], "is cut off"),
        (flipped, "cannot be read as an .npz"),
    ):
        (folder / "ex_000001.npz").write_bytes(content)
        with pytest.raises(ic.LoadError, match=says):
            list(traces.read_traces(folder))
    (folder / "ex_000001.npz").unlink()
    with pytest.raises(ic.LoadError, match="there is no file"):
        list(traces.read_traces(folder))
    (folder / "ex_000001.npz").mkdir()
    with pytest.raises(ic.LoadError, match="ex_000001.npz cannot be read"):
        list(traces.read_traces(folder))
    (folder / "ex_000001.npz").rmdir()
    (folder / "ex_000001.npz").write_bytes(whole)
    for given, says in (
        ({}, "give --trace_dir"),
        ({"trace_dir": folder, "traces_root": folder}, "one of both"),
        ({"trace_dir": tmp_path}, "is no trace folder: there is no manifest.jsonl"),
        ({"traces_root": LLAMA}, "there is no manifest.jsonl below"),
        ({"traces_root": GOLDEN, "out_dir": tmp_path}, "give --out_root"),
        ({"trace_dir": folder, "limit": 0}, "limit is 0: give at least 1"),
        (
            {"trace_dir": folder, "tokenizer_model": str(LLAMA), "dataset_jsonl": tmp_path / "no"},
            "there is no file .*no;",
        ),
    ):
        with pytest.raises((ic.LoadError, ic.PlanError), match=says):
            export_traces(ExportTracesConfig(**given))


def test_damaged_exports(tmp_path: Path) -> None:
    whole = {form: next(iter((HERE / f"exports/{form}").rglob(f"{ONE}/*.npz"))).read_bytes() for form in exports.KEYS}
    pair = np.array([0, 200])
    for form, changes, says in (
        ("proc", {"hop": np.zeros((2, 135), "f4")}, r"hop is float32 \[2, 135\]"),
        ("proc", {"attr": np.full(136, np.inf, "f4")}, "136 of 136 scores of attr are not finite"),
        ("proc", {"rise": None}, "is no export: it has"),
        ("proc", {"more": pair}, "is no export: it has"),
        ("proc", {"span_out": pair}, r"span_out is 0 to 200 \(both within\), the text has tokens 0 to 135"),
        ("proc", {"span_cot": np.array([5, 9])}, "it begins the text"),
        ("proc", {"tok": np.zeros(136)}, "tok is float64"),
        ("proc_1", {"length": np.array([104, 24, 9])}, r"length is \[104, 24, 9\], the spans have \[104, 24, 8\]"),
    ):
        path = tmp_path / "ex.npz"
        path.write_bytes(whole[form])
        damaged(tmp_path, "ex.npz", **changes)
        with pytest.raises(ic.LoadError, match=says):
            exports.read_export(path)


def test_spans_of_exports(tmp_path: Path) -> None:
    """No reasoning is -1, -1 in the file; what reaches past the text is cut, and said."""
    trace = replace(next(traces.read_traces(BOTH)), thinking=None, sink=ic.Span(0, 40))
    export = exports.export_of(trace, None, form="proc_1")
    assert export.span_cot is None and export.span_out == ic.Span(104, 136) and exports.is_cut(trace)
    (tmp_path / "x.npz").write_bytes(exports.export_bytes(export))
    with np.load(tmp_path / "x.npz") as file:
        assert file["span_cot"].tolist() == [-1, -1] and file["length"].tolist() == [104, 0, 32]
    assert exports.read_export(tmp_path / "x.npz").span_cot is None
    assert exports.export_of(replace(trace, sink=ic.Span(8, 9)), None).span_cot == ic.Span(104, 112)
    with pytest.raises(ic.LoadError, match="neither sink_span_gen nor indices_to_explain_gen"):
        exports.export_of(replace(trace, sink=None, explained=None), None)
    with pytest.raises(ic.TextError, match="token 0 ends in a NUL character"):
        exports.export_bytes(exports.export_of(trace, ["\0", *["a"] * 135]))
