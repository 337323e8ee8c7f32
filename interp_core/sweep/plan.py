"""What a sweep will do, as data: all that a runner needs beside the model, the tokens and the scores.

    SweepPlan
    ├── groups ── Group: texts that share a clean pass
    │             └── passes ── Pass: so many columns
    │                           └── steps ── Step: one variant on one text, a row of the pass
    ├── alone ─── Single: one variant on one text, a forward pass of its own
    └── scored, sites, … : what is scored of each text

A plan goes to another process with its tokens and scores (`SweepWork`), whose runner gets the same numbers from its own
model. `place.py` makes plans, `runner.py` carries them out.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import PlanError
from ..positions import VISION, Span
from ..score import Score
from ..session import Session
from ..sites import Edit, Site
from ..strategy_checks import Trial
from ..text import Tokens

WHOLE = ("restart", "batched")
"""Strategies that run all columns of a text, so that only equally long texts go together."""
STRATEGIES = ("auto", "staircase", "restart", "prefix", "batched", "full")


class Step(NamedTuple):
    """A variant on one text: its edits layer by layer with positions in this text, and where they begin."""

    number: int
    text: int
    edits: tuple[Edit, ...]
    layer: int
    start: int


class Single(NamedTuple):
    """A variant on one text that has a forward pass of its own: its edits with positions in this text."""

    number: int
    edits: tuple[Edit, ...]


class Pass(NamedTuple):
    """One pass over some variants, each on `columns` tokens from its first one on."""

    steps: tuple[Step, ...]
    columns: int


class Group(NamedTuple):
    """Texts of the batch that share a clean pass over `width` columns, and the passes over their variants."""

    texts: tuple[int, ...]
    width: int
    passes: list[Pass]


@dataclass
class SweepPlan:
    """How a sweep is carried out.

    Attributes:
        strategy: what was chosen.
        why: why nothing cheaper was.
        n_layers, lengths: of the model, and columns per row of the batch that are run.
        top: layers that a pass runs: all, unless an inner site is scored.
        scored: per row, columns whose logits are scored, or positions of the inner site.
        sites: per row, the inner site that is scored; None: logits are.
        groups: texts that go together, with their passes.
        alone: per row, variants that get a forward pass of their own.
        row_bytes: estimated memory of one variant in the widest pass.
        row_of_inputs_for_each: call the model with a row of inputs for each variant, also where one would do for all.
        leaves_last: no edit changes what the last layer makes of its attention.
        targets_only: of the logits only those of the scores' targets count.
        inside_tower: an edit lies inside of the vision tower, which then computes in every pass.
        model: what it is for, as `described` says it.
        trial: what trying the strategy on the model took before.
    """

    strategy: str
    why: str
    n_layers: int
    top: int
    lengths: list[int]
    n_variants: int
    scored: list[list[int]]
    sites: list[Site | None]
    groups: list[Group] = field(default_factory=list)
    alone: list[list[Single]] = field(default_factory=list)
    row_bytes: int = 0
    row_of_inputs_for_each: bool = False
    leaves_last: bool = False
    targets_only: bool = False
    inside_tower: bool = False
    model: str = ""
    trial: Trial | None = None

    @property
    def passes(self) -> list[Pass]:
        """All passes over variants."""
        return [sweep_pass for group in self.groups for sweep_pass in group.passes]

    @property
    def singles(self) -> list[list[int]]:
        """Per row, the variants that get a forward pass of their own."""
        return [[single.number for single in row] for row in self.alone]

    @property
    def token_layers(self) -> int:
        """Token-layers that will be executed."""
        clean = sum(len(group.texts) * group.width for group in self.groups)
        rows = ((step, sweep_pass.columns) for sweep_pass in self.passes for step in sweep_pass.steps)
        swept = sum((self.top - max(step.layer, 0)) * columns for step, columns in rows)
        full = sum(length * len(row) for length, row in zip(self.lengths, self.alone, strict=True))
        return swept + self.top * (clean + full)

    @property
    def naive(self) -> int:
        """Token-layers of one full forward pass per variant."""
        return self.n_variants * self.n_layers * sum(self.lengths)

    def explain(self) -> str:
        """Strategy, cost against one full forward pass per variant, memory, and why nothing cheaper."""
        rows = max((len(sweep_pass.steps) for sweep_pass in self.passes), default=0)
        fewer = f" ({self.naive / self.token_layers:.1f}× fewer)" if 0 < self.token_layers < self.naive else ""
        lines = [
            f"strategy     {self.strategy}",
            f"variants     {self.n_variants} on {len(self.lengths)} text(s) of {max(self.lengths)} tokens or less",
            f"passes       {len(self.groups)} clean, {len(self.passes)} with up to {rows} variants, "
            f"{sum(map(len, self.alone))} with one",
            f"token-layers {self.token_layers:,} against {self.naive:,} of one full forward pass per variant{fewer}",
            f"memory       about {rows * self.row_bytes / 2**20:,.1f} MiB for the widest pass",
        ]
        if self.trial is not None:
            lines.append(
                f"trial        {self.trial.token_layers:,} token-layers more, once per model: {self.trial.calls} calls "
                f"of {self.trial.layers} layers"
            )
        return "\n".join(lines + ([f"not cheaper: {self.why}"] if self.why else []))


class SweepWork(NamedTuple):
    """A plan with its tokens and scores: all that a runner in another process needs beside its own model.

    Edits' tensors go with it, and functions of `apply` and of scores by the names that they have in their modules.
    """

    tokens: Tokens
    plan: SweepPlan
    scores: tuple[Score, ...]

    def to_bytes(self) -> bytes:
        """It, pickled.

        Raises:
            PlanError: naming the first edit or score whose function has no name in a module (a lambda, say).
        """
        swept = [step.edits for sweep_pass in self.plan.passes for step in sweep_pass.steps]
        alone = [single.edits for row in self.plan.alone for single in row]
        edits = [edit for variant in (*swept, *alone) for edit in variant]
        applied = {id(edit.value): edit for edit in edits if edit.op == "apply"}
        for edit in applied.values():
            _demand_sendable(f"edit {edit}", edit.value)
        for score in self.scores:
            _demand_sendable(f"score {score.name}", score.fn)
        stream = io.BytesIO()
        _Packer(stream, pickle.HIGHEST_PROTOCOL).dump(tuple(self))
        return stream.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> SweepWork:
        """What `to_bytes` gave, in a process of one's own: unpickling runs what the bytes say."""
        return SweepWork(*pickle.loads(data))


class _Packer(pickle.Pickler):
    """Pickles of a tensor that is a part of another one its own numbers alone, not all that lie beside them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() < value.untyped_storage().nbytes() // value.element_size():
            return value.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _demand_sendable(owner: str, function: Any) -> None:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PlanError(
            f"{owner} cannot go to another process ({error}): give it a function that is defined in a module, at its "
            "top level"
        ) from error


def described(session: Session) -> str:
    """A model as a plan must know it: on one of other sizes its layers and columns would mean something else."""
    shape = session.atlas.shape
    sizes = f"{shape.n_layers} layers, d_model {shape.d_model}, {shape.d_vocab} tokens"
    return f"{session.atlas.family.name} of {sizes}, {str(session.dtype).removeprefix('torch.')}"


def named_edits(edits: Sequence[Edit]) -> str:
    """A variant, for messages."""
    return ", ".join(map(str, edits)) or "no edit"


def image_spans(tokens: Tokens, row: int) -> Sequence[Span]:
    """Where visual tokens lie in a row."""
    return tokens.spans[VISION][row] if tokens.inputs and VISION in tokens.spans else ()
