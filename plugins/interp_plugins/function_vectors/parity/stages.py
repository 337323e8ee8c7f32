"""Parity of two folders of artefacts, stage by stage in a fixed order, down to the first number that differs.

    prompt_boundary    prompts, their ids, where the answer begins, its tokens
    slot_map           labels of the slots; labels, idx_map, idx_avg and slot of every token
    mean_activations   the tensor
    top_heads          effects, heads in order, their AIE, and its gap at the end of the list
    fv_vector          the tensor
    injection_output   log-probabilities, ranks and likeliest tokens without and with the vector, and logits

*replay* demands equality to the bit. *fast* demands it of everything discrete, and of numbers agreement within
`Tolerances`. If the AIE of the last head lies no further above the next one's than effects may differ, such a
comparison does not determine the heads: that fails too. So does a part that both folders lack, but for logits, which
are compared where both have them. All trials are compared.

That two folders agree is not enough: each is held against what its parts derive from (`derived`), and every stage
fails that has compared fewer values, or more, than the trials ask for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..effects import average, gap, ranking
from ..files.folders import Artefacts, Combination, Row, Table
from ..prompts import Prompt
from .derived import Asked, all_heads, problems, value
from .findings import STAGES, Mode, Pair, Stage, Tolerances

EXACT = ("target_id", "base_rank", "with_rank", "base_pred_id", "with_pred_id")
"""Columns of answers that must be the same."""
LOGPROBS = ("base_logprob", "with_logprob", "delta_logprob")
"""Columns that answers must have."""
MAPPED = ("labels", "idx_map", "idx_avg", "idx_map_updated")
"""What a map says of a prompt's tokens."""
Key = TypeVar("Key")
SETTINGS = (
    "dataset_name", "fixed_trials_id", "model_name", "seed", "n_trials", "n_shots", "by", "n_top_heads",
    "token_class_idx", "edit_layer", "prompt_kind", "alpha",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Two folders, and how to compare them.

    Attributes:
        a, b: the folders.
        mode: "replay" or "fast".
        of: kind of prompts and layer of injection that both must have; None: all that both have.
        max_trials: look at rows of the first trials only.
        token_class_idx: class by which heads were chosen, where effects have all.
        tolerances: None: the mode's.
        prompts: of the fixed trials, by kind, where their file is given: what both folders must have.
    """

    a: Artefacts
    b: Artefacts
    mode: Mode = "fast"
    of: Combination | None = None
    max_trials: int | None = None
    token_class_idx: int = -1
    tolerances: Tolerances | None = None
    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)

    @property
    def within(self) -> Tolerances:
        """The tolerances."""
        return self.tolerances or Tolerances.of(self.mode)

    def stages(self, names: Iterable[str] = STAGES) -> list[Stage]:
        """These stages, compared in order."""
        stages = []
        for name in names:
            began, stage = time.perf_counter(), Stage(name)
            getattr(self, f"_{name}")(stage)
            # before the count: a folder that contradicts itself is named as such, not as too few values
            self._derived(stage)
            stage.counted(stage.files[0], 0 if stage.findings else self._count(name, stage))
            stage.seconds = time.perf_counter() - began
            stages.append(stage)
        return stages

    def settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings, and what numbers depend on besides, in which the folders say that they differ."""
        sides = self.a.settings, self.b.settings
        if not all(sides):
            return {}
        flat = [{**{key: side.get(key) for key in SETTINGS}, **side.get("profile", {})} for side in sides]
        return {key: (flat[0].get(key), flat[1].get(key)) for key in flat[0] if flat[0].get(key) != flat[1].get(key)}

    @cached_property
    def trials(self) -> int:
        """How many trials there are: in their file, else as the folders say, else as many as any part has."""
        if self.prompts:
            return max(len(prompts) for prompts in self.prompts.values())
        said = [side.settings.get("n_trials") for side in (self.a, self.b)]
        if numbers := [number for number in said if isinstance(number, int)]:
            return max(numbers)
        counts = [0]
        for side in (self.a, self.b):
            tables = [table for name in ("trials", "maps", "answers") if (table := value(side, name)) is not None]
            counts += [row.trial + 1 for table in tables for row in table.rows.values()]
            counts += [len(effects) for effects in [value(side, "effects")] if effects is not None and effects.ndim]
        return max(counts)

    @cached_property
    def asked(self) -> Asked:
        """What the trials ask of either folder."""
        first = self.trials if self.max_trials is None else min(self.trials, max(0, self.max_trials))
        combinations, kinds = self._in_both("answers", lambda of: of), self._in_both("trials", lambda of: of[0])
        return Asked(self.trials, first, combinations, kinds, self.token_class_idx, self.prompts)

    def _in_both(self, part: str, key: Callable[[Combination], Key]) -> frozenset[Key]:
        """What the rows of a part that are compared are of: what was asked for, or what both folders have."""
        tables = [value(side, part) for side in (self.a, self.b)]
        held = [{key(row.of) for row in table.rows.values() if row.of} for table in tables if table is not None]
        shared = held[0] & held[1] if len(held) == 2 else set()
        return frozenset(shared if self.of is None else {key(self.of)} & shared)

    def _derived(self, stage: Stage) -> None:
        """What either folder's own parts say against each other."""
        for side, folder in enumerate((self.a, self.b)):
            for part, key, why in problems(stage.name, folder, self.asked):
                files = [each.parts.get(part, folder.parts[part]).file for each in (self.a, self.b)]
                stage.find((files[0], files[1]), key, side=side, why=why)

    def _count(self, name: str, stage: Stage) -> int:
        """How many values a stage compares that has found nothing: as many as the trials ask for."""
        n, side = self.asked.first, self.a
        if name == "prompt_boundary":
            return n * len(self.asked.kinds) * len(stage.notes["fields"]) + 2 * n * len(("prompt", "input_ids"))
        if name == "slot_map":
            return 1 + 2 * n * len(MAPPED)
        if name == "injection_output":
            exact = len(LOGPROBS) + len(stage.notes["columns"])
            return n * len(self.asked.combinations) * exact + 2 * stage.notes.get("trials with logits", 0)
        shapes = {part: value(side, part) for part in ("mean", "effects", "vector", "heads", "labels")}
        if name == "mean_activations":
            layers, heads, slots, width = shapes["mean"].shape
            return int(layers * heads * (len(shapes["labels"]) if shapes["labels"] else slots) * width)
        if name == "fv_vector":
            return int(shapes["vector"].numel())
        per_trial = math.prod(stage.notes["shape"][1:])
        return self.trials * per_trial + 1 + len(shapes["heads"])

    def _prompt_boundary(self, stage: Stage) -> None:
        stage.notes["fields"] = []
        for files, a, b in self._both(stage, "trials"):
            kinds = [{row.of[0] for row in table.rows.values() if row.of} for table in (a, b)]
            if not self.asked.kinds:
                stage.find(files, "prompt_kind", *(sorted(kind) for kind in kinds))
                continue
            tables = [
                Table({k: r for k, r in t.rows.items() if r.of and r.of[0] in self.asked.kinds}, t.problems)
                for t in (a, b)
            ]
            stage.notes["fields"] = [*{"prompt": None, "target_id": None, **_shared(*tables)}]
            self._tables(stage, files, tables[0], tables[1], stage.notes["fields"])
        for files, a, b in self._both(stage, "maps"):
            self._tables(stage, files, a, b, ("prompt", "input_ids"))

    def _slot_map(self, stage: Stage) -> None:
        for files, a, b in self._both(stage, "labels"):
            stage.thing(files, "labels", a, b)
        for files, a, b in self._both(stage, "maps"):
            self._tables(stage, files, a, b, MAPPED)

    def _mean_activations(self, stage: Stage) -> None:
        for files, a, b in self._both(stage, "mean"):
            stage.tensors(files, "mean", ("layer", "head", "slot", "d_head"), a, b, self.within.mean)
            stage.notes |= {"shape": list(a.shape), "tolerance": self.within.mean}

    def _top_heads(self, stage: Stage) -> None:
        tolerance, aies = 0.0, None
        for files, a, b in self._both(stage, "effects"):
            if a.ndim != b.ndim:  # all classes against the last token
                a, b = (x[..., self.token_class_idx] if x.ndim == 4 else x for x in (a, b))
            tolerance = self.within.effect + self.within.effect_share * _largest(a)
            axes = ("trial", "layer", "head", "token_class")[: 4 if a.ndim == 4 else 3]
            if stage.tensors(files, "effects", axes, a, b, tolerance, gaps=self._headless(a)):
                aies = [average(x, self.token_class_idx) for x in (a, b)]
            stage.notes |= {"shape": list(a.shape), "tolerance": tolerance}
        for files, a, b in self._both(stage, "heads"):
            stage.thing(files, "heads", *([head[:2] for head in side] for side in (a, b)))
            for place, (x, y) in enumerate(zip(a, b, strict=False)):
                if x[:2] == y[:2]:
                    stage.number(files, f"heads[{place}] z[{x[0]},{x[1]}] AIE", x[2], y[2], tolerance)
            if aies is not None and a:
                self._gap(stage, files, aies, len(a), tolerance)

    def _headless(self, effects: Tensor) -> Tensor | None:
        """Where effects are of layers without heads, as the means of both folders say."""
        sides = [all_heads(side) for side in (self.a, self.b)]
        if any(side is None or effects.ndim < 3 or len(side) != effects.shape[1] for side in sides):
            return None
        headless = ~torch.stack([side for side in sides if side is not None]).any(0)
        return headless.view(1, -1, *[1] * (effects.ndim - 2)).expand_as(effects)

    def _gap(self, stage: Stage, files: Pair, aies: list[Tensor], k: int, tolerance: float) -> None:
        """Whether the list of heads ends where their AIE falls by more than effects may differ."""
        count = min(len(ranking(aie)) for aie in aies)
        gaps = {n: min(gap(aie, n) for aie in aies) for n in range(1, count + 1)}
        stage.notes |= {"n_top_heads": k, "gap_at_k": [gap(aie, k) for aie in aies] if k <= count else None}
        if tolerance == 0.0 or k >= count or gaps[k] > tolerance:
            return
        # the nearest number of heads at which the list does end clearly, for the advice
        clear = sorted((n for n in gaps if gaps[n] > tolerance), key=lambda n: (abs(n - k), n))
        stage.find(
            files, f"gap at k={k}", *stage.notes["gap_at_k"],
            why=f"the AIE of head {k} lies {gaps[k]:.3g} above that of head {k + 1}, where effects may differ by "
            f"{tolerance:.3g}: this comparison does not determine the heads. Compare by replay, or take "
            f"n_top_heads={clear[0]}",
        )  # fmt: skip

    def _fv_vector(self, stage: Stage) -> None:
        for files, a, b in self._both(stage, "vector"):
            norms = [float(x.double().norm()) for x in (a, b)]
            tolerance = self.within.vector * (norms[0] if math.isfinite(norms[0]) else 0.0)
            stage.tensors(files, "fv", ("d_model",), a, b, tolerance)
            stage.notes |= {"norm_a": norms[0], "norm_b": norms[1], "tolerance": tolerance}

    def _injection_output(self, stage: Stage) -> None:
        logits = self._logits(stage)
        for files, a, b in self._both(stage, "answers"):
            if not self.asked.combinations:
                held = [sorted({row.of for row in table.rows.values() if row.of}) for table in (a, b)]
                self._other(stage, files, held)
                continue
            tables = [
                Table({k: r for k, r in t.rows.items() if r.of in self.asked.combinations}, t.problems) for t in (a, b)
            ]
            stage.notes["columns"] = [name for name in EXACT if name in {"target_id": None, **_shared(*tables)}]
            for x, y in self._rows(stage, files, *tables):
                stage.rows.append(self._answer(stage, files, x, y, logits))
            with_logits = [row for row in stage.rows if row["clean_logits_max_abs_diff"] is not None]
            stage.notes |= {"tolerance": self.within.logit, "checked_trials": len(stage.rows)}
            stage.notes |= {"trials with logits": len(with_logits)}
            stage.notes |= {"prompt_kind, edit_layer": [list(of) for of in sorted(self.asked.combinations)]}

    def _other(self, stage: Stage, files: Pair, held: list[list[Combination]]) -> None:
        """The folders hold answers of other prompts or layers than asked for, or than each other."""
        for place, key in enumerate(("prompt_kind", "edit_layer")):
            sides = [sorted({of[place] for of in side}) for side in held]
            wanted = [self.of[place]] if self.of else sides[0]
            if not {*wanted} & {*sides[0]} & {*sides[1]}:
                side = int({*wanted} <= {*sides[0]})
                demanded = f"; asked for: {self.of[place]!r}" if self.of else ""
                stage.find(files, key, *sides, side=side, why=f"a has {sides[0]}, b has {sides[1]}{demanded}")

    def _answer(
        self, stage: Stage, files: Pair, x: Row, y: Row, logits: dict[Combination, tuple[Pair, Tensor]]
    ) -> dict[str, Any]:
        """One trial: its findings, and its row of the table."""
        tolerance, before = self.within.logit, len(stage.findings)
        for name in stage.notes["columns"]:
            self._field(stage, files, x, y, name)
        row: dict[str, Any] = {"trial_idx": x.trial, "target_id": x.fields.get("target_id")}
        equal: dict[str, bool] = {}
        for name, key in (("clean", "base_logprob"), ("with", "with_logprob"), ("delta", "delta_logprob")):
            a, b = (side.fields.get(key) for side in (x, y))
            row |= {f"{name}_src_logprob": a, f"{name}_fv_logprob": b}
            equal[f"{name}_equal"] = False
            if isinstance(a, float) and isinstance(b, float):
                # a difference has the error of both its sides
                allowed = 2 * tolerance if name == "delta" else tolerance
                equal[f"{name}_equal"] = stage.number(files, f"{x.key}: {key}", a, b, allowed)
            else:
                stage.find(files, f"{x.key}: {key}", a, b, side=int(isinstance(a, float)), why="no number")
        row |= equal
        assert x.of is not None
        where, apart = logits.get(x.of, (files, torch.zeros(0)))
        for place, name in enumerate(("clean", "with")):
            logits_apart = float(apart[x.trial, place]) if x.trial < len(apart) else None
            row[f"{name}_logits_max_abs_diff"] = logits_apart
            if logits_apart is not None:
                stage.number(where, f"{x.key}: {name} logits", logits_apart, 0.0, tolerance)
        row["trial_match"] = len(stage.findings) == before
        return {**row, "prompt_kind": x.of[0], "edit_layer": x.of[1]}

    def _logits(self, stage: Stage) -> dict[Combination, tuple[Pair, Tensor]]:
        """Largest difference of logits, without and with the vector `[trial 2]`, where both have them."""
        pair = self.a.parts["logits"], self.b.parts["logits"]
        if lacking := [str(part.file) for part in pair if part.problem == "missing"]:
            stage.notes["logits"] = f"not compared: no {' and no '.join(lacking)}"
            return {}
        apart_by_combination: dict[Combination, tuple[Pair, Tensor]] = {}
        for files, a, b in self._both(stage, "logits"):
            for of in sorted(self.asked.combinations & {*a} & {*b}):
                if a[of][0].shape[1:] != b[of][0].shape[1:]:
                    stage.find(files, f"logits {of} shape", *(list(side[of][0].shape) for side in (a, b)))
                    continue
                n = min(len(x) for side in (a, b) for x in side[of])
                apart = [(x[:n].double() - y[:n].double()).abs().amax(-1) for x, y in zip(a[of], b[of], strict=True)]
                apart_by_combination[of] = files, torch.stack(apart, -1)
        return apart_by_combination

    def _both(self, stage: Stage, name: str) -> Iterator[tuple[Pair, Any, Any]]:
        """A part of both folders; nothing, and findings, if one cannot be read."""
        pair = self.a.parts[name], self.b.parts[name]
        files = pair[0].file, pair[1].file
        stage.files.append(files)
        for side, part in enumerate(pair):
            if part.problem:
                stage.find(files, "(file)", side=side, why=part.problem)
        if not any(part.problem for part in pair):
            yield files, pair[0].value, pair[1].value

    def _rows(self, stage: Stage, files: Pair, a: Table, b: Table) -> Iterator[tuple[Row, Row]]:
        """Rows that both tables have; findings for those that one lacks, and for repeated ones."""
        for side, table in enumerate((a, b)):
            for key, why in table.problems:
                stage.find(files, key, side=side, why=why)
        for key in dict.fromkeys([*a.rows, *b.rows]):
            rows = [table.rows.get(key) for table in (a, b)]
            if self.max_trials is not None and any(row is not None and row.trial >= self.max_trials for row in rows):
                continue
            x, y = rows
            if x is None or y is None:
                stage.find(files, key, side=int(y is None), why=f"missing in {'b' if y is None else 'a'}")
            else:
                yield x, y

    def _tables(self, stage: Stage, files: Pair, a: Table, b: Table, names: Iterable[str]) -> None:
        """These fields, row by row."""
        for x, y in self._rows(stage, files, a, b):
            for name in names:
                self._field(stage, files, x, y, name)

    def _field(self, stage: Stage, files: Pair, x: Row, y: Row, name: str) -> None:
        """A field of two rows, which both must have."""
        lacking = [side for side, row in enumerate((x, y)) if name not in row.fields]
        if lacking:
            stage.find(files, f"{x.key}: {name}", side=lacking[0], why="no such field in this row")
        else:
            stage.thing(files, f"{x.key}: {name}", x.fields[name], y.fields[name])


def _shared(a: Table, b: Table) -> dict[str, None]:
    """Names of the fields that both tables have."""
    known = [dict.fromkeys(name for row in table.rows.values() for name in row.fields) for table in (a, b)]
    return {name: None for name in known[0] if name in known[1]}


def _largest(x: Tensor) -> float:
    """The largest of the numbers, without sign."""
    return float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
