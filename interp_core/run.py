"""Runs: a plan that is checked against a model, one forward pass of it, and what that gave.

    run(text, read=…, edits=…)
      → CompiledPlan      the program for these sites and operations, from the session's or compiled now
      → model_inputs      what the Hugging Face model is called with
      → Program.forward   one pass, by the engine; gives a PassRecord
      → Run               the record, read by site: values, logits, receipts; gradients where they were asked for

Everything that can be refused is refused before the pass. What only the pass can show is raised after it: an edit that
did nothing, a router that did not do as it was told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .architectures.hook_points import KEYED
from .architectures.together import together
from .engines.layers import LET_GO
from .engines.protocol import HandOver, PassRecord, Program
from .engines.selection import BoundSelection, Selection
from .errors import CapabilityError, PlanError, ReadError, wrong
from .model_inputs import cache_name, model_inputs
from .pass_views import PlanView
from .plan import Plan
from .positions import PositionLike, Rows
from .readings import ForwardPass, Gradients, LayerReadings
from .receipts import Receipt, demand_effect, demand_proof, receipts
from .score import Score
from .session import NOTHING, Input, Session
from .sites import TENSOR_OPS, Edit, Site
from .text import CACHE, Tokens

Each = Callable[[int, LayerReadings], object]
"""What is called with a layer and what was read of it, as soon as that has passed."""


class Run(ForwardPass):
    """One forward pass: read values by site, logits, receipts, gradients.

    Attributes:
        tokens: the input.
        model: what ran.
        grad: gradients by site, for runs with `grad=`.
    """

    def __init__(self, compiled: CompiledPlan, tokens: Tokens, record: PassRecord) -> None:
        self._slots, self._atlas, self._rows = compiled.program.slots, compiled.model.atlas, tokens.rows
        self._compiled, self.tokens, self._passed = compiled, tokens, record
        self.model: Session = compiled.model

    def _value(self, slot: int) -> Tensor:
        value = self._passed.values[slot]
        if value is LET_GO:
            raise ReadError(f"{self._slots[slot].site} was handed to each= as it passed, and let go")
        return value  # type: ignore[return-value]

    def __reduce__(self) -> NoReturn:
        raise PlanError("a run holds its model: keep it by run.save(folder), which ic.open_run(folder) gives back")

    @property
    def plan(self) -> Plan:
        """What was read and edited."""
        return self._compiled.plan

    def save(self, folder: str | Path) -> Path:
        """Write all of it into a folder, as `run.json` and `run.safetensors`: what was read, gradients, logits, tokens,
        plan and receipts. `ic.open_run(folder)` gives them back, without the model.

        Raises:
            PlanError: an edit that is a function, or an input of the text that no file can hold.
        """
        from .saved import save_run

        return save_run(self, self.plan, self.receipts, self.model, folder)

    def to_cache(self, model: Any = None) -> Any:
        """A TransformerLens `ActivationCache` of the whole sites that were read, under TransformerLens' names.

        Its analysis tools (`accumulated_resid`, `decompose_resid`, `logit_attrs`, `stack_head_results`, …) need weights
        and so a bridge: runs on engine `transformer_lens` bring theirs.

        Args:
            model: a `TransformerBridge` of the same model, for runs on another engine.

        Raises:
            ReadError: nothing that was read has a name there.
        """
        from .engines.transformer_lens import CACHE_NAMES, cache_of

        values = {
            (site.name, layer): self[Site(site.name, layer if site.info.layered else None)].plain
            for site in self
            if site.units is None and site.pos is None and site.name in CACHE_NAMES
            for layer in ((site.layers,) if isinstance(site.layers, int) else self._atlas.layers(site.name))
        }
        if not values:
            raise ReadError(
                f"no site of this run has a name in a cache (it holds {self.held()}); read whole sites, such as "
                "S.resid_post, S.z"
            )
        return cache_of(values, getattr(self.model.engine, "bridge", None) if model is None else model)

    @cached_property
    def receipts(self) -> list[Receipt]:
        """One per edit."""
        return receipts(self._compiled.edits, (self._passed,), self._rows)

    def demand_effect(self) -> None:
        """Refuse edits that did nothing.

        Raises:
            EffectError: naming the first of them.
        """
        demand_effect(self._compiled.edits, (self._passed,), lambda: self.receipts)

    def set_logits(self, logits: Tensor, at: bool | PositionLike, bound: BoundSelection | None) -> None:
        """Keep the logits at the positions that were asked for (True: all), which `bound` takes out of them."""
        self._logits = logits if bound is None else bound.take(logits)
        self._logits_site = Site("logits") if isinstance(at, bool) else Site("logits").at(at)

    def differentiate(self, score: Score | Callable[[Tensor], Tensor]) -> None:
        """Fill `grad` with the gradients of `score(logits)`, or of all rows' scores, and let go of the graph."""
        assert self._logits is not None
        scalar = score(self).sum() if isinstance(score, Score) else score(self._logits)
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            shape = list(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise ReadError(f"grad= takes a function of the logits that returns one number, it returned {shape}")
        bases = [base for base in self._passed.bases if base is not None]
        tensors, bounds = [tensor for tensor, _ in bases], [bound for _, bound in bases]
        if scalar.requires_grad:
            grads = torch.autograd.grad(scalar.sum(), tensors, allow_unused=True, materialize_grads=True)
        else:  # edits have cut it off from everything read
            grads = tuple(map(torch.zeros_like, tensors))
        self._grad = Gradients(self, list(grads), bounds)
        self._passed.bases = []
        self._passed.values = [None if value is None else value.detach() for value in self._passed.values]
        self._logits = self._logits.detach()


class CompiledPlan(PlanView):
    """A plan checked against a model. `run` it on as many inputs as you like."""

    __slots__ = ("_reads", "_snapshot", "_stepping", "edits", "model", "program")

    def __init__(self, model: Session, program: Program, reads: tuple[Any, ...], edits: tuple[Edit, ...]) -> None:
        self.model, self.program, self._reads, self.edits = model, program, reads, edits
        self._snapshot = model.snapshot
        self._stepping = False

    @property
    def plan(self) -> Plan:
        """What is read and edited, as a plan of its own that prints, compares and goes to JSON."""
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
            self.program, self._snapshot = model.program(self._reads, self.edits)[0], model.snapshot
        return self.program

    def touches(self, name: str) -> bool:
        """Whether it reads or edits sites of that name."""
        read = any(slot.entry.name == name for slot in self.program.slots)
        return read or any(edit.site.name == name for edit in self.edits)

    def in_step(self, verb: str, tokens: Tokens) -> AbstractContextManager[None]:
        """See `in_step` below, with what this plan reads and edits."""
        return in_step(self.model, verb, tokens, self._reads, self.edits)

    def _together(
        self, tokens: Tokens, grad: Any, logits: bool | PositionLike, each: Each | None, attention: bool,
        allow_noop: bool,
    ) -> Run:  # fmt: skip
        """A run that processes which share the model make together."""
        self._stepping = True
        try:
            with self.in_step("run", tokens):
                return self.run(tokens, grad=grad, logits=logits, each=each, attention=attention, allow_noop=allow_noop)
        finally:
            self._stepping = False

    def run(
        self,
        x: Input,
        *,
        grad: Score | Callable[[Tensor], Tensor] | bool = False,
        logits: bool | PositionLike = True,
        each: Each | None = None,
        attention: bool = False,
        allow_noop: bool = False,
    ) -> Run:
        """One forward pass; arguments as in `Model.run`."""
        if torch.is_inference_mode_enabled():
            return self._outside_inference(x, grad, logits, each, attention, allow_noop)
        model, edits = self.model, self.edits
        tokens = x if isinstance(x, Tokens) else model.input(x)
        if model.atlas.processes is not None and not self._stepping:
            return self._together(tokens, grad, logits, each, attention, allow_noop)
        stop = logits is False
        if grad is not True and grad is not False:  # so that a run without pays for no question
            if isinstance(grad, Score):
                grad = grad.on(model, len(tokens))
            elif not callable(grad):
                raise PlanError(wrong("grad=", "True, False, a score or a function of the logits", grad))
        if logits is None:
            raise PlanError(wrong("logits=", "True, False or positions", logits))
        graph = grad is not False or any([e.op in TENSOR_OPS and e.value.requires_grad for e in edits])  # noqa: C419 (faster)
        with model.turn:
            program, keep = self.ready(), None
            if stop:
                self._check_stop(bool(grad))
            if graph:
                self._check_grad(grad)
            inputs = {**model_inputs(model, tokens, cache=True), **model.without_cache}
            if CACHE in inputs:
                self._check_cached()
                inputs[cache_name(model.hf)] = _copied(inputs.pop(CACHE))  # the pass adds to it, the caller's stays
            if not isinstance(logits, bool):
                keep = self._keep(logits, tokens.rows, inputs)
            apart = model.snapshot.weights_apart() if graph else NOTHING
            handing = None if each is None else self._handing(each, tokens.rows, graph)
            more = self._attending(each) if attention else {}
            with torch.set_grad_enabled(graph), model.fresh(), apart:
                record = program.forward(inputs, tokens.rows, edits, keep_graph=graph, stop=stop, each=handing, **more)
            run = Run(self, tokens, record)
        if not stop:
            run.set_logits(record.output.logits, logits, keep)
        record.output = None  # the run has the logits that it was asked for; the others need not stay
        if callable(grad):
            with torch.enable_grad():
                run.differentiate(grad)
        if record.routed:
            demand_proof(edits, (record,))
        if not allow_noop and edits:
            run.demand_effect()
        return run

    def _keep(self, at: PositionLike, rows: Rows, inputs: dict[str, Any]) -> BoundSelection:
        """The index of the logits to keep, in what the model will give: where it can (`logits_to_keep`, added to
        `inputs`), it computes no others."""
        selection = Selection(Site("logits").at(at), None)
        assert selection.pos is not None
        columns = selection.columns(rows, selection.pos)
        if self.model.keeps_logits and not self.touches("logits"):
            kept = sorted({column for row in columns for column in row})
            columns = [[kept.index(column) for column in row] for row in columns]
            # Of a number the model takes a slice from the end, of indices it makes a copy.
            tail = kept == list(range(rows.width - len(kept), rows.width))
            inputs["logits_to_keep"] = len(kept) if tail else torch.tensor(kept, device=self.model.device)
        return BoundSelection(selection, rows, columns, None, None)

    def _check_stop(self, grad: bool) -> None:
        if not self._reads:
            raise PlanError("logits=False without reads asks for nothing")
        if grad:
            raise PlanError("grad needs the logits; leave logits=False out")
        self.program.check_reach(self.edits)

    def _check_cached(self) -> None:
        """Refuse sites whose keys reach back into a cache that was handed in: positions count this run's tokens."""
        entries = [slot.entry for slot in self.program.slots]
        entries += [entry for edit in self.edits for entry in self.model.atlas.select(edit.site)]
        for entry in entries:
            if any(point and point.inside and point.part in (*KEYED, "scores", "pattern")
                   for point in (entry.read, entry.write)):  # fmt: skip
                raise CapabilityError(f"{entry.name} has keys of the {CACHE} handed in; run the whole text without it")

    def _handing(self, each: Each, rows: Rows, graph: bool) -> HandOver:
        """A function that makes readings of what a program hands over of a layer, and calls `each` with them.

        Raises:
            PlanError: there is nothing to hand over, or a graph that would hold everything.
        """
        if not callable(each):
            raise PlanError(wrong("each=", "a function of a layer and its readings", each))
        slots, atlas = self.program.slots, self.model.atlas
        if not any(slot.site.info.layered for slot in slots):
            raise PlanError("each= is called with what is read of a layer, and nothing is: pass read=S.pattern, say")
        if graph:
            raise PlanError(
                "each= lets values go as the pass goes on, and gradients need them all: leave grad= (or values that "
                "require grad) out, or each="
            )

        def handing(layer: int, numbers: list[int], record: PassRecord) -> None:
            values = [record.values[number] for number in numbers]
            kept = [slots[number] for number in numbers]
            each(layer, LayerReadings(kept, atlas, rows, layer, values, record.attention.get(layer)))

        return handing

    def _attending(self, each: Each | None) -> dict[str, bool]:
        """The argument of `Program.forward` that has it keep attention for `each`; engines that cannot know none.

        Raises:
            PlanError: nobody is handed it, or edits change what it would be made of.
            CapabilityError: this model on this engine cannot.
        """
        if each is None:
            raise PlanError("attention=True hands each layer's attention over to each=, and there is none: pass each=")
        for edit in self.edits:
            if edit.site.name in ("scores", "pattern"):
                raise PlanError(f"{edit}: rows of attention=True are made of queries and keys, before such an edit")
        if why := self.model.can("pattern", "rows"):
            raise CapabilityError(f"attention=True: {why}; read S.pattern.at(query=…) instead")
        return {"attention": True}

    def _outside_inference(
        self, x: Input, grad: Any, logits: bool | PositionLike, each: Each | None, attention: bool,
        allow_noop: bool,
    ) -> Run:  # fmt: skip
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
            return self.run(x, logits=logits, each=each, attention=attention, allow_noop=allow_noop)

    def _check_grad(self, grad: Any) -> None:
        for slot in self.program.slots:
            if grad and (why := slot.entry.why.get("grad")):
                raise CapabilityError(f"{slot.site} has no gradient: {why}")
        self.model.demand_gradients()
        if callable(grad) and not self.program.slots:
            raise PlanError(
                "grad= gives gradients with respect to the sites that are read, and none is: pass read=S.resid_post, "
                "say; for tensors of your own pass grad=True, and call backward on a number made of run.logits"
            )
        if grad is True and not self.program.slots and not any(_may_need_grad(edit) for edit in self.edits):
            raise PlanError(
                "grad=True, but nothing in this plan has a gradient, since weights get none; read sites, or give an "
                "edit a value that requires grad"
            )


def _may_need_grad(edit: Edit) -> bool:
    return edit.op == "apply" or (edit.op in TENSOR_OPS and edit.value.requires_grad)


def _copied(cache: Any) -> Any:
    """A copy of a cache, with its graph."""
    # `deepcopy` refuses tensors that are not leaves of a graph; what is in its memo, it takes for copied.
    parts = (cache, *getattr(cache, "layers", ()))
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor.clone() for tensor in tensors})


def in_step(session: Session, verb: str, x: Input, *plan: Iterable[Any]) -> AbstractContextManager[None]:
    """A block that is carried out together by the processes which share a model, where they do (`tp_plan`).

    Args:
        plan: sites and edits that the verb was called with, in tuples or not.

    Raises:
        PlanError: other processes are asked for something else.
    """
    if session.atlas.processes is None:
        return NOTHING
    words = [f"`{verb}` on the ids {session.input(x).ids.tolist()}", *_words(plan)]
    return together(session.atlas.processes, words, session.device)


def _words(plan: Iterable[Any]) -> Iterator[str]:
    """Sites and edits, without the values that a process may have as its own."""
    for part in plan:
        if isinstance(part, Edit):
            yield f"{part.op} of {part.site}"
        elif isinstance(part, Site):
            yield str(part)
        else:
            yield from _words(part)


def forward(
    session: Session,
    x: Input,
    read: Iterable[Site | str] | Site | str = (),
    edits: Iterable[Edit] | Edit = (),
    **options: Any,
) -> Run:
    """One forward pass with reads and edits; arguments and errors are those of `Model.run`."""
    return CompiledPlan(session, *session.program(read, edits)).run(x, **options)
