"""Pairs in files: `pair_tokens.json`, one object by the samples' names.

    {"humaneval_0": {"agentic_ids": […], "assisted_aligned_ids": […], "assisted_aligned_attention_mask": […],
                     "canonical_non_ws_positions": […], "canonical_non_ws_tokens": […], …}, …}

    agentic_ids                        also agentic_input_ids, agentic
    assisted_aligned_ids               also assisted_input_ids, assisted_ids, assisted: in the columns of the agentic
                                       context, columns between filled with padding (the padded layout)
    assisted_aligned_attention_mask    also assisted_attention_mask; none: all columns are real tokens
    canonical_non_ws_positions         also canonical_nonws_positions, canonical_nonws_a: columns of the agentic context
    canonical_non_ws_tokens            of these positions, as ids or text

    assisted_ids + assisted_canonical_non_ws_positions    also b_ids + canonical_nonws_b: an assisted context of its
                                                          own, with its own columns (the packed layout)

A file may also be {"pairs": [row, …]} or [row, …] with the name in "id", "name" or "task_id". What else a row has is
kept and written again. Every target that is left out is counted: at the first token, which nothing predicts; masked out
of a context. Source: the files of Geuan666/XAI4Agent.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core import errors, runs

from .._json_files import read_json
from .pair import Layout, Pair, tokens_of

AGENTIC = ("agentic_ids", "agentic_input_ids", "agentic", "a_ids")
AGENTIC_MASK = ("agentic_attention_mask",)
ALIGNED = ("assisted_aligned_ids", "b_padded_ids")
ASSISTED = ("assisted_ids", "assisted_input_ids", "assisted", "b_ids")
ALIGNED_MASK = ("assisted_aligned_attention_mask", "b_padded_mask", "assisted_attention_mask")
POSITIONS = ("canonical_non_ws_positions", "canonical_nonws_positions", "canonical_nonws_a")
OWN_POSITIONS = ("assisted_canonical_non_ws_positions", "assisted_canonical_nonws_positions", "canonical_nonws_b")
TOKENS = ("canonical_non_ws_tokens", "canonical_nonws_tokens")
DROPPED = "dropped_targets"
NAMES = ("id", "name", "task_id")
KNOWN = {
    *AGENTIC, *AGENTIC_MASK, *ALIGNED, *ASSISTED, *ALIGNED_MASK, *POSITIONS, *OWN_POSITIONS, *TOKENS, DROPPED,
}  # fmt: skip
FIRST, MASKED = "at the first token, which nothing predicts", "masked out of a context"
Bad = Callable[[str, ic.InterpError], None]
"""What gets the name and the error of a sample that cannot be used."""


def read_pairs(
    path: str | Path, *, layout: Layout | None = None, max_samples: int | None = None, bad: Bad | None = None
) -> list[Pair]:
    """The pairs of a file, in its order.

    Args:
        layout: "packed": the assisted context as a sequence of its own, or else its real tokens moved together;
            "padded": as it lies in the agentic context's columns. None: as the file has it, packed where it has both.
        max_samples: the first so many samples of the file.
        bad: called with name and error of every sample that cannot be used, which is left out; without it the first
            one is raised.

    Raises:
        LoadError: no such file, or of another form; a sample that cannot be used, naming it and the field.
        PlanError: a layout or a number that is none.
    """
    if layout not in (None, "packed", "padded"):
        raise ic.PlanError(f"there is no layout {layout!r}. {errors.nearest(layout, ('packed', 'padded'))}")
    if max_samples is not None and (isinstance(max_samples, bool) or max_samples < 1):
        raise ic.PlanError(f"max_samples is {max_samples}: give at least 1, or leave it out for all")
    pairs: list[Pair] = []
    for name, row in list(_rows(path))[:max_samples]:
        try:
            pairs.append(pair_of(name, row, layout))
        except ic.InterpError as error:
            told = ic.LoadError(f"{path}, {error}")
            if bad is None:
                raise told from error
            bad(name, told)
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> Path:
    """Write pairs as `pair_tokens.json`, whole or not at all; `read_pairs` gives the same.

    Raises:
        PlanError: two pairs of one name.
    """
    runs.write(Path(path), pairs_text(pairs))
    return Path(path)


def pairs_text(pairs: Iterable[Pair]) -> str:
    """The file of pairs: a line per sample.

    Raises:
        PlanError: two pairs of one name.
    """
    rows = [(pair.name, row_of(pair)) for pair in pairs]
    twice = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if twice:
        raise ic.PlanError(f"{twice[0]!r} is the name of several pairs; a file has each once")
    lines = [f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rows(path: str | Path) -> Iterable[tuple[str, Any]]:
    """Samples of a file by name.

    Raises:
        LoadError: it cannot be read, or is of another form.
    """
    takes = "a pair_tokens.json, an object of samples by name"
    data = read_json(path, takes)
    if isinstance(data, dict) and isinstance(data.get("pairs"), list):
        data = data["pairs"]
    if not isinstance(data, (dict, list)) or not data:
        raise ic.LoadError(f"{path} holds {'no sample' if data in ({}, []) else type(data).__name__}; give {takes}")
    if isinstance(data, dict):
        return data.items()
    names = [_named(row, number) for number, row in enumerate(data)]
    if len(set(names)) < len(names):
        raise ic.LoadError(f"{path} has two samples of the name {Counter(names).most_common(1)[0][0]!r}; give {takes}")
    return zip(names, data, strict=True)


def _named(row: Any, number: int) -> str:
    return next((str(row[key]) for key in NAMES if key in row), f"sample_{number}") if isinstance(row, dict) else ""


def pair_of(name: str, row: Any, layout: Layout | None = None) -> Pair:
    """The pair of one row of a file.

    Raises:
        LoadError, PlanError: a row of another form, or a pair that does not hold, naming sample and field.
    """
    if not isinstance(row, Mapping):
        raise ic.LoadError(f"sample {name!r}: {errors.wrong('it', 'an object with fields', row)}")
    fields = _Fields(name, row)
    agentic = fields.ids(AGENTIC)
    seen = fields.mask(AGENTIC_MASK, len(agentic))
    positions = fields.positions(POSITIONS, len(agentic))
    fields.check_tokens(positions, agentic)
    own = fields.first(OWN_POSITIONS) is not None and fields.first(ASSISTED) is not None
    if own and layout != "padded":
        assisted = fields.ids(ASSISTED)
        mask = [1] * len(assisted)
        theirs = fields.positions(OWN_POSITIONS, len(assisted))
        if len(theirs) != len(positions):
            raise ic.LoadError(
                f"sample {name!r}: {fields.called(POSITIONS)} has {len(positions)} targets, "
                f"{fields.called(OWN_POSITIONS)} {len(theirs)}; a target has a position in each context"
            )
    else:
        if layout == "padded" and own and fields.first(ALIGNED) is None:
            raise ic.LoadError(
                f"sample {name!r} has no assisted_aligned_ids, so that there is no padded layout; take layout packed"
            )
        assisted = fields.ids(ALIGNED if own else (*ALIGNED, *ASSISTED))
        mask, theirs = fields.mask(ALIGNED_MASK, len(assisted)), fields.positions(POSITIONS, len(assisted))
    more = fields.more() | (fields.aligned() if own and layout != "padded" else {})
    pair = _aligned(name, (agentic, seen, positions), (assisted, mask, theirs), fields, more)
    return pair.packed() if layout == "packed" else pair


Context = tuple[list[int], list[int], list[int]]
"""Ids, mask and target columns."""


def _aligned(name: str, agentic: Context, assisted: Context, fields: _Fields, more: Mapping[str, Any]) -> Pair:
    """The pair of two contexts, without the targets that cannot be."""
    dropped = Counter(fields.dropped())
    kept: list[tuple[int, int]] = []
    (_, seen, here), (_, mask, there) = agentic, assisted
    for a, b in zip(here, there, strict=True):
        if not seen[a] or not mask[b]:
            dropped[MASKED] += 1
        elif not sum(seen[:a]) or not sum(mask[:b]):
            dropped[FIRST] += 1
        else:
            kept.append((a, b))
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        left = f"no target left ({why})" if why else "no target"
        raise ic.LoadError(f"sample {name!r}: {fields.called(POSITIONS)} has {left}; a pair has one at least")
    return Pair(
        name, tokens_of(agentic[0], seen), tokens_of(assisted[0], mask), tuple(sum(seen[:a]) for a, _ in kept),
        tuple(sum(mask[:b]) for _, b in kept), dict(dropped), more,
    )  # fmt: skip


def row_of(pair: Pair) -> dict[str, Any]:
    """A pair as a row of a file has it."""
    here, there = (pair.tokens(side).columns(list(pair.positions(side)))[0] for side in ("agentic", "assisted"))
    row: dict[str, Any] = {"agentic_ids": pair.agentic.ids[0].tolist()}
    if pair.agentic.padded:
        row["agentic_attention_mask"] = pair.agentic.mask[0].long().tolist()
    if pair.layout == "padded" or here == there:
        row["assisted_aligned_ids"] = pair.assisted.ids[0].tolist()
        row["assisted_aligned_attention_mask"] = pair.assisted.mask[0].long().tolist()
    else:
        row |= {"assisted_ids": pair.assisted.ids[0].tolist(), "assisted_canonical_non_ws_positions": there}
    row |= {"canonical_non_ws_positions": here, "canonical_non_ws_tokens": pair.target_ids().tolist()}
    return row | ({DROPPED: dict(pair.dropped)} if pair.dropped else {}) | dict(pair.more)


class _Fields:
    """The fields of a sample, by any of their names."""

    def __init__(self, name: str, row: Mapping[str, Any]) -> None:
        self.name, self.row = name, row

    def first(self, names: Sequence[str]) -> Any:
        """The value of the first of the names that is there."""
        return next((self.row[key] for key in names if self.row.get(key) is not None), None)

    def called(self, names: Sequence[str]) -> str:
        """By which of the names the row has it."""
        return next((key for key in names if self.row.get(key) is not None), names[0])

    def _numbers(self, names: Sequence[str], what: str) -> list[int]:
        value = self.first(names)
        if value is None:
            hint = errors.nearest(names[0], self.row)
            raise ic.LoadError(f"sample {self.name!r} has no {names[0]} (also read: {', '.join(names[1:])}). {hint}")
        whole = isinstance(value, list) and all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
        )
        if not whole:
            told = errors.wrong(self.called(names), f"a list of {what}, whole numbers from 0 on", value)
            raise ic.LoadError(f"sample {self.name!r}: {told}")
        return list(value)

    def ids(self, names: Sequence[str]) -> list[int]:
        """Token ids."""
        ids = self._numbers(names, "token ids")
        if not ids:
            raise ic.LoadError(f"sample {self.name!r}: {self.called(names)} is empty; a context has tokens")
        return ids

    def mask(self, names: Sequence[str], length: int) -> list[int]:
        """An attention mask; ones where there is none."""
        if self.first(names) is None:
            return [1] * length
        value = self.first(names)
        mask = [int(i) for i in value] if isinstance(value, list) and all(i in (0, 1) for i in value) else []
        if len(mask) != length or not any(mask):
            told = errors.wrong(self.called(names), f"{length} ones and zeros, one per token, not all zero", value)
            raise ic.LoadError(f"sample {self.name!r}: {told}")
        return mask

    def positions(self, names: Sequence[str], length: int) -> list[int]:
        """Columns of targets in a context of so many."""
        positions, called = self._numbers(names, "positions"), self.called(names)
        if outside := [p for p in positions if p >= length]:
            raise ic.LoadError(
                f"sample {self.name!r}: {called} has {outside[0]}, the context has {length} tokens (0 to {length - 1})"
            )
        if any(a >= b for a, b in itertools.pairwise(positions)):
            raise ic.LoadError(f"sample {self.name!r}: {called} does not increase; give each target once, in order")
        return positions

    def check_tokens(self, positions: Sequence[int], ids: Sequence[int]) -> None:
        """Hold the ids that a row says its targets have against those that they have."""
        said = self.first(TOKENS)
        if not isinstance(said, list) or not said or not all(type(i) is int for i in said):
            return  # text is for readers
        there = [ids[p] for p in positions]
        if said != there:
            n = next(
                (n for n, (a, b) in enumerate(zip(said, there, strict=False)) if a != b), min(len(said), len(there))
            )
            raise ic.LoadError(
                f"sample {self.name!r}: {self.called(TOKENS)} are not the tokens at {self.called(POSITIONS)}: number "
                f"{n} is {said[n : n + 1]}, there is {there[n : n + 1]}"
            )

    def dropped(self) -> dict[str, int]:
        """What was left out when the file was made."""
        value = self.row.get(DROPPED) or {}
        if not isinstance(value, dict) or not all(type(count) is int for count in value.values()):
            raise ic.LoadError(f"sample {self.name!r}: {errors.wrong(DROPPED, 'counts by reason', value)}")
        return value

    def aligned(self) -> dict[str, Any]:
        """The padded layout, where the packed one was read."""
        fields = ((ALIGNED, self.first(ALIGNED)), (ALIGNED_MASK, self.first(ALIGNED_MASK)))
        return {names[0]: value for names, value in fields if value is not None}

    def more(self) -> dict[str, Any]:
        """Fields that are not read here."""
        return {key: value for key, value in self.row.items() if key not in KNOWN}
