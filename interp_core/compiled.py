"""A plan checked against a model, and what the model is called with."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.atlas import Atlas, Shape
from .architectures.taps import KEYED
from .edits import TENSOR_OPS, Edit
from .engines.protocol import HandOver, Passed, Program
from .errors import CapabilityError, PlanError, TextError, wrong
from .plan import Plan
from .positions import PositionLike, Rows
from .readings import LayerReadings, demand_proof
from .regions import Bound, Region
from .sites import Site
from .text import CACHE, Tokens, from_inputs
from .trace import Run
from .vision.places import with_visual_names

if TYPE_CHECKING:
    from .model import Input, Model

PADDED = (
    "the ids begin or end with the model's padding id and come without an attention_mask, so padding counts as text: "
    "pass {'input_ids': ids, 'attention_mask': mask} (all ones, if it is text)"
)
NOTHING = nullcontext()
Each = Callable[[int, LayerReadings], object]
"""What is called with a layer and what was read of it, as soon as that has passed."""


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
        each: Each | None = None,
        attention: bool = False,
        allow_noop: bool = False,
    ) -> Run:
        """One forward pass; arguments as in `Model.run`."""
        model, edits = self.model, self.edits
        if torch.is_inference_mode_enabled():
            return self._outside_inference(x, grad, logits, each, attention, allow_noop)
        tokens = x if isinstance(x, Tokens) else model._input(x)
        stop = logits is False
        if grad is not True and grad is not False and not callable(grad):
            raise PlanError(wrong("grad=", "True, False or a function of the logits", grad))
        if logits is None:
            raise PlanError(wrong("logits=", "True, False or positions", logits))
        graph = grad is not False or any([e.op in TENSOR_OPS and e.value.requires_grad for e in edits])  # noqa: C419 (faster)
        with model.turn:
            program, keep = self.ready(), None
            if stop:
                self._check_stop(bool(grad))
            if graph:
                self._check_grad(grad)
            inputs = {**model_inputs(model, tokens, cache=True), "use_cache": False}
            if CACHE in inputs:
                self._check_cached()
                inputs[cache_name(model.hf)] = _own(inputs.pop(CACHE))  # the pass adds to it
            if not isinstance(logits, bool):
                keep = self._keep(logits, tokens.rows, inputs)
            apart = model.snapshot.weights_apart() if graph else NOTHING
            handing = None if each is None else self._handing(each, tokens.rows, graph)
            more = self._attending(each) if attention else {}
            with torch.set_grad_enabled(graph), model.fresh(), apart:
                passed = program.forward(inputs, tokens.rows, edits, keep_graph=graph, stop=stop, each=handing, **more)
            run = Run(self, tokens, passed)
        if not stop:
            run.set_logits(passed.output.logits, logits, keep)
        passed.output = None
        if callable(grad):
            with torch.enable_grad():
                run.differentiate(grad)
        if passed.routed:
            demand_proof(edits, (passed,))
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

    def _check_cached(self) -> None:
        """Refuse sites whose keys reach back into a cache that was handed in: positions count this run's tokens."""
        entries = [slot.entry for slot in self.program.slots]
        entries += [entry for edit in self.edits for entry in self.model.atlas.select(edit.site)]
        for entry in entries:
            if any(tap and tap.side == "attention" and tap.part in (*KEYED, "scores", "pattern")
                   for tap in (entry.read, entry.write)):  # fmt: skip
                raise CapabilityError(f"{entry.name} has keys of the {CACHE} handed in; run the whole text without it")

    def _handing(self, each: Each, rows: Rows, graph: bool) -> HandOver:
        """What hands the readings of a layer over.

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

        def handing(layer: int, numbers: list[int], passed: Passed) -> None:
            values = [passed.values[number] for number in numbers]
            kept = [slots[number] for number in numbers]
            each(layer, LayerReadings(kept, atlas, rows, layer, values, passed.attention.get(layer)))

        return handing

    def _attending(self, each: Each | None) -> dict[str, bool]:
        """What a program is told that is to keep attention for `each`.

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


def tokens_of(model: Model, x: Input) -> Tokens:
    """What a user gave a model, as tokens.

    Raises:
        TextError: something else, or what does not fit the model.
    """
    if isinstance(x, Tensor):
        x = {"input_ids": x if x.ndim == 2 else x[None]}
    if isinstance(x, Mapping):
        tokens = model._fitting(from_inputs(x, model.tokenizer))
        if "attention_mask" not in x and not model._warned and looks_padded(model.hf.config, tokens.ids):
            model._warned = True
            warnings.warn(PADDED, stacklevel=5)
        return with_visual_names(tokens, model.hf.config, model.atlas.family)
    if isinstance(x, str) or (isinstance(x, Sequence) and not isinstance(x, (bytes, Tokens))):
        return model.tokens(x)
    raise TextError(wrong("a model", "text, texts, Tokens, a tokenizer's output or ids", x))


def model_inputs(model: Model, tokens: Tokens, *, cache: bool = False) -> dict[str, Any]:
    """What the Hugging Face model is called with, made and checked once per tokens, kind of model and device. What the
    caller gave goes in as it is; masks and positions are added only where there is padding: without, the model's own
    defaults are the same and cheaper.

    Args:
        cache: a cache of earlier tokens is allowed for.

    Raises:
        TextError: tokens that do not fit the model.
        CapabilityError: padding on a side where it changes the numbers of this model.
        PlanError: a cache where there must be none.
    """
    if model.atlas.lacking and tokens.padded:
        _check_padding(model.atlas, tokens)
    device = model.device
    key = (model.atlas.shape, device)
    if CACHE in tokens.inputs and not cache:
        raise PlanError(f"{CACHE} is for run(), one pass that starts where the cache ends: pass the whole text instead")
    if key in tokens.placed:
        return tokens.placed[key]
    more = tokens.inputs[CACHE].get_seq_length() if cache and CACHE in tokens.inputs else 0
    model._fitting(tokens, more)
    given, width = tokens.inputs, tokens.ids.shape[1]
    seen = given.get("attention_mask", tokens.mask).to(device, torch.long)  # wider than the text where a cache is given
    padded = not bool(seen.all())
    inputs: dict[str, Any] = {"input_ids": tokens.ids.to(device)}
    if padded or (given and not {CACHE, "position_ids"} & set(given)):
        inputs["attention_mask"] = seen
    by_grids = any(name.endswith("_grid_thw") for name in given)
    if padded and not by_grids and _takes_positions(model):
        inputs["position_ids"] = (_from_first(seen) + first_position(model.hf))[:, -width:]
    for name, value in given.items():
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_inference():  # autograd would not take it in a later run
            inputs[name] = value.clone()
    tokens.placed[key] = inputs
    return inputs


def _from_first(seen: Tensor) -> Tensor:
    """Columns counted from each row's first real token to its last, as `forward` counts a row that begins in column 0:
    padding around a row takes no part, holes in it do."""
    columns = torch.arange(seen.shape[1], device=seen.device)
    first, last = seen.argmax(1, keepdim=True), seen.shape[1] - 1 - seen.flip(1).argmax(1, keepdim=True)
    return (columns - first).clamp(min=0).minimum(last - first)


def _check_padding(atlas: Atlas, tokens: Tokens) -> None:
    """Refuse rows whose padding would change their numbers, as the self-check found."""
    for side, column in (("left", 0), ("right", -1)):
        if (why := atlas.lacking.get(f"{side} padding")) and not tokens.mask[:, column].all():
            other = {"left": "right", "right": "left"}[side]
            free = f", or pad on the {other}" if f"{other} padding" not in atlas.lacking else ""
            raise CapabilityError(
                f"a row that is padded on the {side} gets other numbers in this {atlas.family.name} than alone "
                f"({why}): run rows one by one (for row in tokens){free}"
            )


def cache_name(hf: Any) -> str:
    """What a model calls the cache that it is handed; most have another word for it since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(hf).forward).parameters else CACHE


def _own(cache: Any) -> Any:
    """A copy of a cache, with its graph."""
    parts = (cache, *getattr(cache, "layers", ()))
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor.clone() for tensor in tensors})


def _takes_positions(model: Model) -> bool:
    takes = inspect.signature(type(model.hf).forward).parameters
    return "position_ids" in takes or any(item.kind is item.VAR_KEYWORD for item in takes.values())


def first_position(hf: Any) -> int:
    """The position that a model gives a text's first token: RoBERTa and its kin count from behind the padding id,
    others from where their table of positions begins, most from 0."""
    for path, module in hf.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    tables = (table for path, table in hf.named_buffers() if path.endswith("embeddings.position_ids"))
    return next((int(table.flatten()[0]) for table in tables), 0)


def demand_fit(shape: Shape, tokens: Tokens, more: int) -> Tokens:
    """The tokens, if they and so many new ones fit a model.

    Raises:
        TextError: too long, or an id that the model does not have.
    """
    longest = max(tokens.widths) + more
    if shape.n_ctx is not None and longest > shape.n_ctx:
        asked = f"{longest - more} tokens and {more} new ones" if more else f"{longest} tokens"
        raise TextError(f"{asked} do not fit the model's context of {shape.n_ctx}; shorten the text")
    top = int(tokens.ids.max())
    if top >= shape.d_vocab or int(tokens.ids.min()) < 0:
        raise TextError(f"token id {top} does not exist: the model has {shape.d_vocab} tokens")
    return tokens


def looks_padded(config: Any, ids: Tensor) -> bool:
    """Whether rows begin or end with the padding id, where that is not also one that text has."""
    config = config.get_text_config()
    pad, bos, eos = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    taken = pad in (bos, eos) or (isinstance(eos, list) and pad in eos)
    return pad is not None and not taken and bool((ids[:, [0, -1]] == pad).any())
