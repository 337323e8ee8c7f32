"""What two folders of artefacts differ in: findings, gathered stage by stage, and how far numbers may lie apart."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import interp_core as ic
from interp_core.errors import nearest

Mode = Literal["replay", "fast"]
Pair = tuple[Path, Path]
"""The file of the first folder, and that of the second."""
STAGES = {
    "prompt_boundary": "Prompt/token boundary",
    "slot_map": "Slot map",
    "mean_activations": "Mean activations",
    "top_heads": "Top heads",
    "fv_vector": "FV vector",
    "injection_output": "Injection outputs",
}
"""Stages in order, with their titles."""


@dataclass(frozen=True)
class Tolerances:
    """How far numbers may lie apart.

    Attributes:
        mean: of mean activations.
        effect, effect_share: of effects and AIE: the first plus so much of the largest effect.
        vector: of the numbers of the function vector, times its length.
        logit: of logits and log-probabilities; the difference of two log-probabilities has twice this.
    """

    mean: float = 1e-5
    effect: float = 1e-8
    effect_share: float = 1e-4
    vector: float = 1e-6
    logit: float = 5e-5

    @staticmethod
    def of(mode: Mode) -> Tolerances:
        """Those of a mode; replay has none."""
        return Tolerances() if mode == "fast" else Tolerances(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Finding:
    """Something that does not agree.

    Attributes:
        stage: where.
        files: those compared.
        side: which of them is at fault: 0 or 1 (the second, where nobody can tell).
        key: what in it.
        a, b: what they hold.
        difference: of two numbers.
        count: how many values it stands for; the key is that of the largest difference.
        why: what is wrong, where values alone do not say it.
    """

    stage: str
    files: Pair
    side: int
    key: str
    a: Any = None
    b: Any = None
    difference: float | None = None
    count: int = 1
    why: str = ""

    @property
    def file(self) -> Path:
        """The file at fault."""
        return self.files[self.side]

    def __str__(self) -> str:
        difference = self.why or f"a has {_short(self.a)}, b has {_short(self.b)}"
        apart = "" if self.difference is None or self.why else f", {self.difference:.3g} apart"
        more = "" if self.count == 1 else f"; and {self.count - 1} more"
        return f"{self.stage} / {self.file} / {self.key}: {difference}{apart}{more}"

    def json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {
            "stage": self.stage, "file": str(self.file), "key": self.key, "file_a": str(self.files[0]),
            "file_b": str(self.files[1]), "a": plain(self.a), "b": plain(self.b), "abs_diff": plain(self.difference),
            "count": self.count, "why": self.why,
        }  # fmt: skip


@dataclass
class Stage:
    """One stage of a comparison, filled as it goes.

    Attributes:
        name: of `STAGES`.
        files: those compared.
        findings: what does not agree.
        compared: how many values were looked at.
        asked: how many the trials ask for.
        max_abs_diff: largest difference between two numbers.
        notes: what else there is to know.
        rows: of the injection, one per trial.
        seconds: time that it took.
        skipped: why it was not done.
    """

    name: str
    files: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    compared: int = 0
    asked: int = 0
    max_abs_diff: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""

    @property
    def mismatch_count(self) -> int:
        """How many values do not agree."""
        return sum(finding.count for finding in self.findings)

    @property
    def status(self) -> str:
        """PASS; FAIL if something does not agree, which `counted` also finds of too few comparisons; or SKIPPED."""
        return "SKIPPED" if self.skipped else "PASS" if self.compared and not self.findings else "FAIL"

    def counted(self, files: Pair, expected: int) -> None:
        """Hold the number of comparisons against what the trials ask for; a stage that has a finding may stop short."""
        self.asked += expected
        if not self.findings and (self.compared != self.asked or not self.asked):
            why = f"{self.compared:,} values were compared, the trials ask for {self.asked:,}"
            self.find(files, "(count)", self.compared, self.asked, why=why)

    def find(self, files: Pair, key: str, a: Any = None, b: Any = None, *, side: int = 1, **more: Any) -> None:
        """Add a finding."""
        self.findings.append(Finding(self.name, files, side, key, a, b, **more))

    def number(self, files: Pair, key: str, a: float, b: float, tolerance: float) -> bool:
        """Whether two numbers agree; what is no number agrees with nothing."""
        self.compared += 1
        apart = abs(a - b)
        if math.isfinite(apart):
            self.max_abs_diff = max(self.max_abs_diff, apart)
        good = apart <= tolerance
        if not good:
            self.find(files, key, a, b, difference=apart)
        return good

    def thing(self, files: Pair, key: str, a: Any, b: Any) -> bool:
        """Whether two things are the same; of lists and mappings the first difference is named."""
        self.compared += 1
        if a == b:
            return True
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            at = next(k for k in {**a, **b} if k not in a or k not in b or a[k] != b[k])
            self.find(files, f"{key}[{at}]", a.get(at), b.get(at))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            place = next(i for i in range(len(a)) if a[i] != b[i])
            self.find(files, f"{key}[{place}]", a[place], b[place])
        elif isinstance(a, list) and isinstance(b, list):
            self.find(files, key, a, b, why=f"a has {len(a)}, b has {len(b)}")
        else:
            self.find(files, key, a, b)
        return False

    def tensors(
        self, files: Pair, name: str, axes: Sequence[str], a: Tensor, b: Tensor, tolerance: float,
        *, gaps: Tensor | None = None,
    ) -> bool:  # fmt: skip
        """Whether two tensors agree; what is no number agrees with nothing.

        Args:
            name: of the tensor, and of its axes, for the key.
            gaps: entries that must not be a number in either, of the same shape (None: all must be numbers).
        """
        self.compared += a.numel()
        if a.shape != b.shape or a.ndim != len(axes) or not a.numel():
            named = " ".join(axes)
            self.find(files, f"{name} shape", list(a.shape), list(b.shape), why=f"a is {list(a.shape)}, b is "
                      f"{list(b.shape)} [{named}]")  # fmt: skip
            return False
        a, b = a.double(), b.double()
        apart = (a - b).abs()
        good = (apart <= tolerance) & a.isfinite() & b.isfinite()
        if gaps is not None:
            good = torch.where(gaps, a.isnan() & b.isnan(), good)
        self.max_abs_diff = max(
            self.max_abs_diff, float(apart[apart.isfinite()].max()) if apart.isfinite().any() else 0.0
        )
        if bool(good.all()):
            return True
        worst = apart.nan_to_num(math.inf, math.inf).masked_fill(good, -1.0)
        at = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, at, strict=True))
        self.find(
            files, f"{name}[{place}]", float(a[at]), float(b[at]), difference=float(apart[at]), count=int((~good).sum())
        )  # fmt: skip
        return False


def plain(value: Any) -> Any:
    """A value as strict JSON has it: numbers that are none as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def chosen(names: str | Collection[str]) -> tuple[str, ...]:
    """Stages by name, separated by commas, in their order; all if none is named.

    Raises:
        PlanError: a stage that there is not.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in STAGES:
            raise ic.PlanError(f"there is no stage {name!r}. {nearest(name, STAGES)}")
    return tuple(name for name in STAGES if name in (wanted or STAGES))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:70]} … {text[-40:]}"
