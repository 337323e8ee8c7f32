"""A plan checked against a model, and what the model is called with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edits import TENSOR_OPS, Edit
from .engines.protocol import Program
from .errors import CapabilityError, PlanError
from .plan import Plan
from .positions import PositionLike, Rows
from .regions import Bound, Region
from .sites import Site
from .text import Tokens
from .trace import Run

if TYPE_CHECKING:
    from .model import Input, Model


NOTHING = nullcontext()


class CompiledPlan:
    """A plan checked against a model. `run` it on as many inputs as you like."""

    __slots__ = ("_reads", "_snapshot", "edits", "model", "program")

    def __init__(self, model: Model, program: Program, reads: tuple[Any, ...], edits: tuple[Edit, ...]) -> None:
        self.model, self.program, self._reads, self.edits = model, program, reads, edits
        self._snapshot = model.snapshot

    @property
    def plan(self) -> Plan:
        """The plan."""
        return Plan.of(self._reads, self.edits)

    def ready(self) -> Program:
        """The program for the model as it is now, compiled again if it has changed; for whoever holds the turn.

        Raises:
            SiteError, PlanError, CapabilityError: the model as it is now cannot do it.
        """
        model = self.model
        if model.snapshot.stale(getattr(self.program, "places", ())):
            model.reopen()
        if self._snapshot is not model.snapshot:
            self.program, self._snapshot = model.compile(self._reads, self.edits).program, model.snapshot
        return self.program

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
        model, edits = self.model, self.edits
        if torch.is_inference_mode_enabled():
            return self._outside_inference(x, grad, logits, allow_noop)
        tokens = x if isinstance(x, Tokens) else model._input(x)
        stop = logits is False
        graph = grad is not False or any([e.op in TENSOR_OPS and e.value.requires_grad for e in edits])  # noqa: C419 (faster)
        with model.turn:
            program, keep = self.ready(), None
            if stop:
                self._check_stop(bool(grad))
            if graph:
                self._check_grad(grad)
            inputs = {**model_inputs(model, tokens), "use_cache": False}
            if not isinstance(logits, bool):
                keep = self._keep(logits, tokens.rows, inputs)
            apart = model.snapshot.weights_apart() if graph else NOTHING
            with torch.set_grad_enabled(graph), model.fresh(), apart:
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

    def _outside_inference(self, x: Input, grad: Any, logits: bool | PositionLike, allow_noop: bool) -> Run:
        """A run called under `torch.inference_mode()`: what is kept for later runs serves those with gradients too.

        Raises:
            PlanError: it asks for gradients.
        """
        wanted = next((f"{e}'s value" for e in self.edits if e.op in TENSOR_OPS and e.value.requires_grad), "")
        if grad is not False or wanted:
            raise PlanError(
                f"gradients are asked for ({wanted or 'grad='}) under torch.inference_mode(), where nothing has any; "
                "leave it for this run, or use torch.no_grad() instead, which such a run turns off for itself"
            )
        with torch.inference_mode(False):
            return self.run(x, logits=logits, allow_noop=allow_noop)

    def _check_grad(self, asked: Any) -> None:
        for slot in self.program.slots:
            if asked and (why := slot.entry.why.get("grad")):
                raise CapabilityError(f"{slot.site} has no gradient: {why}")
        if asked is True and not self.program.slots and not any(_may_need_grad(edit) for edit in self.edits):
            raise PlanError(
                "grad=True, but nothing in this plan has a gradient, since weights get none; read sites, or give an "
                "edit a value that requires grad"
            )


def _may_need_grad(edit: Edit) -> bool:
    return edit.op == "apply" or (edit.op in TENSOR_OPS and edit.value.requires_grad)


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
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_inference():  # autograd would not take it in a later run
            inputs[name] = value.clone()
    tokens.placed[key] = inputs
    return inputs
