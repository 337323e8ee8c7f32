"""Rules in the place of a model's modules, attention and operations: see `Model.replacing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from .architectures.components import OF_BLOCKS
from .architectures.hook_points import Sharded
from .architectures.shards import on_all_heads, sees_part
from .engines.attention import demand_open
from .engines.replace import FUNCTIONS, Operations, Rule, activations, replaced_attention, replaced_forwards
from .engines.torch import TorchEngine
from .errors import CapabilityError, PlanError, nearest, wrong

if TYPE_CHECKING:
    from .structure import Structure

MARK = "interp_replaced"
"""Stands in the model while rules hold."""


@contextmanager
def replacing(
    model: Structure,
    modules: Mapping[nn.Module | type[nn.Module] | str, Rule],
    attention: Rule | None,
    operations: Mapping[str, Rule],
) -> Iterator[None]:
    """See `Model.replacing`."""
    chosen = _chosen(model, modules, attention, operations)
    with model.turn, ExitStack() as stack:
        assert isinstance(model.engine, TorchEngine)
        model.turn.demand_idle(model.engine.modules)
        layers = {} if attention is None else _attention_modules(model)
        by_operation = Operations(operations)
        forwards: dict[nn.Module, Callable[..., Any]] = {
            module: by_operation.applied(rule, module, by_operation.model_code(module.forward))
            for module, rule in chosen.items()
        }
        if "activation" in operations:
            rule = operations["activation"]
            whole = [module for module in activations(model.hf) if module not in chosen]
            forwards |= {module: by_operation.applied(rule, module.forward) for module in whole}
        if operations:
            forwards[model.hf] = by_operation.around(forwards.get(model.hf, model.hf.forward))
        if MARK not in model.hf.__dict__:  # of blocks inside each other the outermost takes it out again
            model.hf.__dict__[MARK] = True
            stack.callback(model.hf.__dict__.pop, MARK)
        stack.enter_context(replaced_forwards(forwards))
        if attention is not None:
            rules = {module: on_all_heads(attention, heads) for module, heads in layers.items()}
            stack.enter_context(replaced_attention(rules, by_operation))
        yield


def demand_own(model: Structure, what: str) -> None:
    """Refuse what relies on the model being itself.

    Raises:
        PlanError: rules stand in the place of some of it.
    """
    if MARK in model.hf.__dict__:
        raise PlanError(f"{what} inside model.replacing(...) would mix the model's own numbers with those of the rules")


def _chosen(model: Structure, modules: Any, attention: Any, operations: Any) -> dict[nn.Module, Rule]:
    """The rule of each module, if all arguments are of their kinds.

    Raises:
        PlanError: naming the first that is not.
        CapabilityError: an engine that runs a copy of the model.
    """
    if type(model.engine) is not TorchEngine:
        raise CapabilityError(
            f"engine {model.engine.name!r} runs its own copy of the modules; replace them on model.on('torch')"
        )
    for name, rules in (("modules", modules), ("operations=", operations)):
        if not isinstance(rules, Mapping):
            raise PlanError(wrong(name, "a dictionary with a function for each", rules))
    for rule in (*modules.values(), *operations.values(), *([] if attention is None else [attention])):
        if not callable(rule):
            raise PlanError(wrong("a rule", "a function", rule))
    for name in operations:
        if name not in FUNCTIONS:
            raise PlanError(f"no operation {name!r}. {nearest(str(name), FUNCTIONS)}")
    if not (modules or operations or attention):
        raise PlanError("nothing is replaced: give modules, attention= or operations=")
    chosen: dict[nn.Module, Rule] = {}
    parts: dict[nn.Module, None] = dict.fromkeys(model.hf.modules())
    for key, rule in modules.items():
        if isinstance(key, type):
            matching: list[nn.Module] = [module for module in parts if type(module) is key]
        elif isinstance(key, nn.Module):
            matching = [key] if key in parts else []
        elif isinstance(key, str):
            layers: list[int | None] = [*model.atlas.components.layers(key)]
            matching = [model.module(key, layer) for layer in layers or [0 if key in OF_BLOCKS else None]]
        else:
            takes = "a module of the model, a class of them, or a component as ln1"
            raise PlanError(wrong("what is replaced", takes, key))
        if not matching:
            name = key.__name__ if isinstance(key, type) else type(key).__name__
            kinds = sorted({type(module).__name__ for module in parts})
            raise PlanError(f"this model has no such module: {name}. {nearest(name, kinds)}")
        for module in matching:
            if sees_part(model.atlas, model.hf, module):
                raise CapabilityError(
                    f"{type(module).__name__} of {key!r} works on a part of its tensor in each process, under tp_plan; "
                    "put the rule on the attention or MLP that it is in, or load without tp_plan"
                )
            chosen[module] = rule
    return chosen


def _attention_modules(model: Structure) -> dict[nn.Module, list[Sharded | None]]:
    """The attention module of every layer that attends, and how heads of its queries, keys and values are shared out.

    Raises:
        CapabilityError: a layer whose attention function cannot be replaced.
        PlanError: attention is replaced already.
    """
    assert isinstance(model.engine, TorchEngine)
    entries, modules = model.atlas.entries, dict[nn.Module, list[Sharded | None]]()
    for layer in range(model.n_layers):
        scores, pattern = entries.get(("scores", layer)), entries.get(("pattern", layer))
        if scores is None or scores.read is None or scores.read.side != "attention":
            if pattern is not None and pattern.read is not None:
                raise CapabilityError(
                    f"attention=: layer {layer} of this {model.atlas.family.name} computes attention by itself, so its "
                    "function cannot be replaced; replace the module, or its operations"
                )
            continue
        parts = [entries.get((name, layer)) for name in ("scores", "rot_k")]
        layouts = [part.read.layout if part is not None and part.read is not None else None for part in parts]
        modules[model.engine.modules[scores.read.module]] = [
            None if layout is None else layout.shards for layout in layouts
        ]
    for module in modules:
        if "interp_rule" in module.__dict__:
            raise PlanError("attention is replaced already, by a rule around this one; leave one of them out")
        demand_open(module, "attention= needs")
    if not modules:
        raise CapabilityError(f"attention=: no layer of this {model.atlas.family.name} attends")
    return modules
