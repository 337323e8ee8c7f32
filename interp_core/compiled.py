"""A plan checked against a model, and what the model is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edits import TENSOR_OPS, Edit
from .engines.protocol import Program
from .errors import CapabilityError, PlanError, wrong
from .plan import Plan
from .positions import PositionLike, Rows
from .regions import Bound, Region
from .sites import Site
from .text import Tokens
from .trace import Run

if TYPE_CHECKING:
    from .model import Input, Model


class CompiledPlan:
    """A plan checked against a model. `run` it on as many inputs as you like."""

    __slots__ = ("_reads", "edits", "model", "program")

    def __init__(self, model: Model, program: Program, reads: tuple[Any, ...], edits: tuple[Edit, ...]) -> None:
        self.model, self.program, self._reads, self.edits = model, program, reads, edits

    @property
    def plan(self) -> Plan:
        """The plan."""
        return Plan.of(self._reads, self.edits)

    def touches(self, name: str) -> bool:
        """Whether it reads or edits sites of that name."""
        read = any(slot.entry.name == name for slot in self.program.slots)
        return read or any(edit.site.name == name for edit in self.edits)

    def run(
        self,
        x: Input,
        *,
        grad: Callable[[Tensor], Tensor] | bool = False,
        logits: bool | PositionLike = True,
        allow_noop: bool = False,
    ) -> Run:
        """One forward pass; arguments as in `Model.run`."""
        model, program = self.model, self.program
        tokens = x if isinstance(x, Tokens) else model._input(x)
        edits, keep, stop = self.edits, None, logits is False
        if grad is not True and grad is not False and not callable(grad):
            raise PlanError(wrong("grad=", "True, False or a function of the logits", grad))
        if logits is None:
            raise PlanError(wrong("logits=", "True, False or positions", logits))
        if stop:
            self._check_stop(bool(grad))
        graph = grad is not False or any([e.op in TENSOR_OPS and e.value.requires_grad for e in edits])  # noqa: C419 (faster)
        if graph:
            self._check_grad(bool(grad))
        inputs = {**model_inputs(model, tokens), "use_cache": False}
        if not isinstance(logits, bool):
            keep = self._keep(logits, tokens.rows, inputs)
        with torch.set_grad_enabled(graph), model.fresh():
            passed = program.forward(inputs, tokens.rows, edits, keep_graph=graph, stop=stop)
        run = Run(self, tokens, passed)
        if not stop:
            run.set_logits(passed.output.logits, logits, keep)
        passed.output = None
        if callable(grad):
            with torch.enable_grad():
                run.differentiate(grad)
        if not allow_noop and edits:
            run.demand_effect()
        return run

    def _keep(self, asked: PositionLike, rows: Rows, inputs: dict[str, Any]) -> Bound:
        """Which logits to keep; where the model can, it computes no others."""
        region = Region(Site("logits").at(asked), None)
        assert region.pos is not None
        columns = region.columns(rows, region.pos)
        if self.model.keeps_logits and not self.touches("logits"):
            kept = sorted({column for row in columns for column in row})
            columns = [[kept.index(column) for column in row] for row in columns]
            tail = kept == list(range(rows.width - len(kept), rows.width))
            inputs["logits_to_keep"] = len(kept) if tail else torch.tensor(kept, device=self.model.device)
        return Bound(region, rows, columns, None, None)

    def _check_stop(self, grad: bool) -> None:
        if not self._reads:
            raise PlanError("logits=False without reads asks for nothing")
        if grad:
            raise PlanError("grad needs the logits; leave logits=False out")
        self.program.check_reach(self.edits)

    def _check_grad(self, asked: bool) -> None:
        for slot in self.program.slots:
            if asked and (why := slot.entry.why.get("grad")):
                raise CapabilityError(f"{slot.site} has no gradient: {why}")


def model_inputs(model: Model, tokens: Tokens) -> dict[str, Any]:
    """What the Hugging Face model is called with, made and checked once per tokens, kind of model and device. Masks and
    positions only where there is padding: without, the model's own defaults are the same and cheaper.

    Raises:
        TextError: tokens that do not fit the model.
    """
    device = model.device
    key = (model.atlas.shape, device)
    if key in tokens.placed:
        return tokens.placed[key]
    model._fitting(tokens)
    inputs: dict[str, Any] = {"input_ids": tokens.ids.to(device)}
    if tokens.padded or tokens.inputs:
        inputs["attention_mask"] = tokens.mask.to(device, torch.long)
    if tokens.padded and not any(name.endswith("_grid_thw") for name in tokens.inputs):  # those models count by grids
        inputs["position_ids"] = (tokens.mask.long().cumsum(-1) - 1).clamp(min=0).to(device)
    for name, value in tokens.inputs.items():
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    tokens.placed[key] = inputs
    return inputs
