"""Pairs: files in every form and layout, what is refused, and pairs built of texts with real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from interp_plugins.pairs import Pair, build_pair, build_pairs, read_pairs, write_pairs
from interp_plugins.pairs.files import FIRST, MASKED
from interp_plugins.pairs.pair import SIDES, Layout
from interp_plugins.pairs.problems import contexts_of, read_rows
from interp_recipes import build_pairs as recipe
from moe_golden import DATA, model, pairs

import interp_core as ic

LAYOUTS: tuple[Layout, Layout] = ("packed", "padded")
TOKENIZERS = ("gpt2", "phi3", "qwen2.5")


@cache
def tokenizer(name: str) -> Any:
    return ic.open_tokenizer(Path(__file__).parent / "data" / "tokenizers" / name)


def seed_row(**changes: Any) -> dict[str, Any]:
    """A sample in the published form: the assisted context in the columns of the agentic one."""
    return {
        "agentic_ids": [1, 20, 21, 22, 23, 24, 25],
        "assisted_aligned_ids": [1, 40, 0, 0, 23, 24, 25],
        "assisted_aligned_attention_mask": [1, 1, 0, 0, 1, 1, 1],
        "canonical_non_ws_positions": [4, 5, 6],
        "segment_positions": {"code": [4, 7]}, "aligned_ok": True,
    } | changes  # fmt: skip


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "pair_tokens.json"
    path.write_text(json.dumps(data))
    return path


def same(a: Pair, b: Pair) -> bool:
    tensors = all(
        torch.equal(getattr(a.tokens(side), name), getattr(b.tokens(side), name))
        for side in SIDES for name in ("ids", "mask")
    )  # fmt: skip
    fields = ("name", "agentic_positions", "assisted_positions", "dropped", "more", "layout")
    return tensors and all(getattr(a, name) == getattr(b, name) for name in fields)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_golden_pairs_in_both_layouts(layout: Layout, tmp_path: Path) -> None:
    found = read_pairs(DATA / "pairs.json", layout=layout)
    assert [len(pair) for pair in found] == [14, 19, 9, 24 if layout == "packed" else 22, 1, 12]
    assert [dict(pair.dropped) for pair in found if pair.dropped] == ([] if layout == "packed" else [{MASKED: 2}])
    for pair, row in zip(found, pairs(), strict=True):
        columns = pair.assisted.columns(list(pair.assisted_positions))[0]
        assert pair.agentic.ids[0].tolist() == row["a_ids"] and pair.layout == layout
        if layout == "packed":
            assert pair.assisted.ids[0].tolist() == row["b_ids"] and columns == row["canonical_nonws_b"]
        else:
            assert pair.assisted.ids[0].tolist() == row["b_padded_ids"]
            assert columns == [p for p in row["canonical_nonws_a"] if row["b_padded_mask"][p]]
        assert torch.equal(pair.target_ids("agentic"), pair.target_ids("assisted"))
        assert pair.more["code_len"] == row["code_len"]
    again = read_pairs(write_pairs(tmp_path / "again.json", found), layout=layout)
    assert all(same(a, b) for a, b in zip(found, again, strict=True)) and len(again) == 6
    if layout == "packed":  # the other layout stays in the file
        assert [len(pair) for pair in read_pairs(tmp_path / "again.json", layout="padded")] == [14, 19, 9, 22, 1, 12]


def test_padded_contexts_run_as_transformers_runs_them() -> None:
    """A mask with holes, and no positions: every token at its column."""
    compared = 0
    for pair in read_pairs(DATA / "pairs.json", layout="padded"):
        tokens = pair.assisted
        with torch.no_grad():
            reference = model().hf(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits
            ours, packed = model().run(tokens).logits.plain, model().run(pair.packed().assisted).logits.plain
        torch.testing.assert_close(ours[tokens.mask], reference[tokens.mask], rtol=0, atol=1e-5)
        at = list(pair.assisted_positions)
        assert not torch.allclose(packed[0, at], ours[0, tokens.columns(at)[0]], atol=1e-2)
        compared += 1
    assert compared == 6


def test_published_files_with_their_synonyms(tmp_path: Path) -> None:
    row = seed_row(canonical_non_ws_tokens=[23, 24, 25])
    renamed = {
        "agentic_input_ids": row["agentic_ids"], "assisted_ids": row["assisted_aligned_ids"],
        "assisted_aligned_attention_mask": row["assisted_aligned_attention_mask"],
        "canonical_nonws_positions": row["canonical_non_ws_positions"], "segment_positions": row["segment_positions"],
        "aligned_ok": True,
    }  # fmt: skip
    path = written(tmp_path, {"humaneval_0": row, "humaneval_1": renamed})
    first, second = read_pairs(path)
    assert first.layout == "padded" and first.agentic_positions == (4, 5, 6) and first.assisted_positions == (2, 3, 4)
    assert first.more == {"segment_positions": {"code": [4, 7]}, "aligned_ok": True}
    second = Pair(**{**vars(second), "name": first.name})
    assert same(first, second)
    rewritten = json.loads(write_pairs(tmp_path / "again.json", [first]).read_text())
    assert rewritten == {"humaneval_0": row}
    packed = read_pairs(path, layout="packed", max_samples=1)
    assert len(packed) == 1 and packed[0].assisted.ids.tolist() == [[1, 40, 23, 24, 25]]
    assert packed[0].assisted_positions == (2, 3, 4) and not packed[0].assisted.inputs


def test_targets_that_cannot_be_are_counted(tmp_path: Path) -> None:
    row = seed_row(
        canonical_non_ws_positions=[0, 3, 4], assisted_aligned_attention_mask=[1, 1, 0, 0, 1, 1, 1],
        assisted_aligned_ids=[1, 40, 0, 22, 23, 24, 25],
    )  # fmt: skip
    (pair,) = read_pairs(written(tmp_path, {"x": row}))
    assert pair.agentic_positions == (4,) and pair.dropped == {FIRST: 1, MASKED: 1}
    (again,) = read_pairs(write_pairs(tmp_path / "again.json", [pair]))
    assert again.dropped == pair.dropped
    late = seed_row(assisted_aligned_attention_mask=[0, 0, 0, 0, 1, 1, 1])  # nothing is before the first
    (pair,) = read_pairs(written(tmp_path, {"x": late}))
    assert pair.agentic_positions == (5, 6) and pair.assisted_positions == (1, 2) and pair.dropped == {FIRST: 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"agentic_ids": None}, "'x' has no agentic_ids"),
        ({"agentic_ids": []}, "'x': agentic_ids is empty"),
        ({"agentic_ids": "1 2"}, "'x': agentic_ids takes a list of token ids"),
        ({"agentic_ids": [1, 20, 21, 22, 23, 24.0, 25]}, "'x': agentic_ids takes a list of token ids"),
        ({"assisted_aligned_ids": None}, "'x' has no assisted_aligned_ids"),
        ({"assisted_aligned_ids": [1, 40, 0, 0, 23, 99, 25]}, "'x': 1 of 3 targets have other ids .* position 5"),
        ({"assisted_aligned_attention_mask": [1, 1]}, "assisted_aligned_attention_mask takes 7 ones and zeros"),
        ({"assisted_aligned_attention_mask": [0] * 7}, "assisted_aligned_attention_mask takes 7 ones"),
        ({"canonical_non_ws_positions": None}, "'x' has no canonical_non_ws_positions"),
        ({"canonical_non_ws_positions": []}, "'x': canonical_non_ws_positions has no target;"),
        ({"canonical_non_ws_positions": [2, 3]}, r"no target left \(2 masked out of a context\)"),
        ({"canonical_non_ws_positions": [4, 7]}, r"has 7, the context has 7 tokens \(0 to 6\)"),
        ({"canonical_non_ws_positions": [-1]}, "canonical_non_ws_positions takes a list of positions"),
        ({"canonical_non_ws_positions": [4, 4]}, "canonical_non_ws_positions does not increase"),
        ({"canonical_non_ws_tokens": [23, 24, 26]}, r"canonical_non_ws_tokens are not .* number 2 is \[26\]"),
        ({"assisted_ids": [1, 23], "assisted_canonical_non_ws_positions": [1]}, "3 targets, .* 1; a target has"),
        ({"dropped_targets": 3}, "dropped_targets takes counts by reason"),
    ],
)
def test_samples_that_cannot_be_used_are_named_with_their_field(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {"x": seed_row(**change), "y": seed_row()})
    with pytest.raises(ic.LoadError, match=says):
        read_pairs(path)
    told: list[str] = []
    assert [pair.name for pair in read_pairs(path, bad=lambda name, _: told.append(name))] == ["y"] and told == ["x"]


@pytest.mark.parametrize(
    ("data", "says"), [([], "holds no sample"), (3, "holds int"), ({"x": 3}, "'x': it takes an object with fields")]
)
def test_files_of_another_form_are_refused(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match=says):
        read_pairs(written(tmp_path, data))


def test_what_is_asked_of_files_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ic.LoadError, match="cannot be read"):
        read_pairs(tmp_path / "none.json")
    path = written(tmp_path, [{"task_id": "a", **seed_row()}, seed_row()])
    assert [pair.name for pair in read_pairs(path)] == ["a", "sample_1"]
    with pytest.raises(ic.PlanError, match="no layout 'pack'. Did you mean 'packed'"):
        read_pairs(path, layout="pack")  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match="max_samples is 0"):
        read_pairs(path, max_samples=0)
    with pytest.raises(ic.PlanError, match="'a' is the name of several pairs"):
        write_pairs(path, [read_pairs(path)[0]] * 2)
    only = seed_row(
        assisted_aligned_ids=None, assisted_ids=[1, 23, 24, 25], assisted_canonical_non_ws_positions=[1, 2, 3]
    )
    assert read_pairs(written(tmp_path, {"x": only}))[0].layout == "packed"
    with pytest.raises(ic.LoadError, match="has no assisted_aligned_ids, so that there is no padded layout"):
        read_pairs(written(tmp_path, {"x": only}), layout="padded")


# Building


@pytest.mark.parametrize("name", TOKENIZERS)
def test_targets_are_the_same_text_in_both_contexts(name: str) -> None:
    """Each covers the same letters of the target; with the dropped ones, every token that touches it is counted."""
    form = "plain" if name == "gpt2" else "chat"
    rows = [contexts_of(row, form) for row in read_rows(DATA / "problems.jsonl")]
    made = list(build_pairs(tokenizer(name), rows))
    assert [pair.name for pair in made] == ["HumanEval/23", "HumanEval/45", "HumanEval/53"]
    for pair, row in zip(made, rows, strict=True):
        starts, cells = [], []
        for side in SIDES:
            tokens = pair.tokens(side)
            assert tokens.texts and tokens.offsets
            start = tokens.texts[0].rfind(row["target"])
            starts.append(start)
            cells.append([tuple(c - start for c in tokens.offsets[0][p]) for p in pair.positions(side)])
        assert cells[0] == cells[1] and torch.equal(pair.target_ids("agentic"), pair.target_ids("assisted"))
        assert all(0 <= a < b <= len(row["target"]) and row["target"][a:b].strip() for a, b in cells[0])
        offsets, stop = pair.agentic.offsets, starts[0] + len(row["target"])
        assert offsets is not None
        touching = [1 for a, b in offsets[0] if a < b and a < stop and starts[0] < b]
        assert len(pair) + sum(pair.dropped.values()) == len(touching) > 20
        assert len(pair.agentic.labels[0]) > len(pair.assisted.labels[0]) and pair.dropped["blank"] > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_are_cut_otherwise_are_left_out_with_the_reason(name: str) -> None:
    """A letter before the target joins its first word in one context; bytes of a letter are targets one by one."""
    target = "retail x = 'naïve 🦜'\ny = 1"
    pair = build_pair(tokenizer(name), "x", f"Write: {target}", f"Then xxx{target}.", target)
    assert torch.equal(pair.target_ids("agentic"), pair.target_ids("assisted"))
    assert sum(pair.dropped.values()) >= 1 and set(pair.dropped) <= {
        "across an end of the target text", "cut into other tokens in the assisted context", "blank",
        "another id in the assisted context",
    }  # fmt: skip
    assert pair.agentic.texts and pair.agentic.offsets
    covered = {pair.agentic.texts[0][slice(*pair.agentic.offsets[0][p])] for p in pair.agentic_positions}
    assert any("🦜" in text for text in covered)


def test_the_last_occurrence_counts() -> None:
    pair = build_pair(tokenizer("gpt2"), "x", "a = 1\na = 1\n", "so a = 1\n", "a = 1")
    assert pair.agentic.labels_at(list(pair.agentic_positions))[0] == ("=", "1")
    assert pair.agentic_positions[0] > 4 and pair.more == {"target": "a = 1"}
    with pytest.raises(ic.TextError, match="no token of the target is the same in both contexts"):
        build_pair(tokenizer("gpt2"), "x", "1", "so 1\n", "1")  # the first token of one context


def bad_rows() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"name": "x", "agentic": "a b", "assisted": "a b"}, "'x' has no target"),
        ({"name": "x", "agentic": "a b", "assisted": "a c", "target": "a b"}, "does not stand in assisted"),
        ({"name": "x", "agentic": "a b", "assisted": "a b", "target": " "}, "target takes a text that is not blank"),
        ({"name": "x", "agentic": [{"role": "user"}], "assisted": "a", "target": "a"}, "'x', agentic: .*chat template"),
    ]


@pytest.mark.parametrize(("row", "says"), bad_rows())
def test_rows_of_which_no_pair_can_be_made_are_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ic.TextError, match=says):
        list(build_pairs(tokenizer("gpt2"), [row]))
    told: list[str] = []
    keep: Callable[[str, ic.InterpError], None] = lambda name, _: told.append(name)  # noqa: E731
    good = {"agentic": "so a b", "assisted": "see: a b", "target": " b"}
    assert [pair.name for pair in build_pairs(tokenizer("gpt2"), [row, good], keep)] == ["sample_1"] and told == ["x"]


def test_the_recipe_builds_pairs_of_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "problems.jsonl"
    source.write_text((DATA / "problems.jsonl").read_text() + '{"task_id": "broken", "prompt": "def f():"}\n')
    path = recipe.build_pairs(
        recipe.BuildPairsConfig(
            source=source, tokenizer=str(Path(__file__).parent / "data/tokenizers/qwen2.5"), out=tmp_path / "out"
        )
    )
    found = read_pairs(path)
    assert [pair.name for pair in found] == ["HumanEval/23", "HumanEval/45", "HumanEval/53"]
    counts = json.loads((tmp_path / "out/counts.json").read_text())
    assert counts["targets"] == sum(map(len, found)) and counts["rows"] == 4 and counts["pairs"] == 3
    listed = (tmp_path / "out/dropped.csv").read_text()
    assert "broken" in listed and "has no canonical_solution" in listed and "blank" in listed
    assert "3 pairs of 4 rows" in capsys.readouterr().out
    with pytest.raises(ic.TextError, match="has no canonical_solution"):
        recipe.build_pairs(
            recipe.BuildPairsConfig(
                source=source,
                tokenizer=str(Path(__file__).parent / "data/tokenizers/qwen2.5"),
                out=tmp_path / "s",
                strict=True,
            )
        )
