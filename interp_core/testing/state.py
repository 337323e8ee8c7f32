"""What a method must leave as it found it: a model's hooks, weights, modes and config, and the random state."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..tensors import digest

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
GLOBAL = {
    "torch": ("torch's global generator", "torch.Generator().manual_seed(seed)"),
    "cuda": ("torch's global generator of a CUDA device", 'torch.Generator("cuda").manual_seed(seed)'),
    "numpy": ("numpy's global generator", "numpy.random.default_rng(seed)"),
    "random": ("Python's global generator", "random.Random(seed)"),
}
"""Generators that everybody draws from, and what to draw from instead."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A model and the process around it, at one moment; each part maps what it is about to what was found."""

    hooks: Facts
    weights: Facts
    modes: Facts
    config: Facts
    random: Facts

    @staticmethod
    def of(model: Any) -> State:
        """The state of a Hugging Face model; reads every weight."""
        return State(_hooks(model), _weights(model), _modes(model), _config(model), _random())

    def changes(self, part: str, later: State) -> str:
        """How one part differs later; empty if it does not."""
        before, after = getattr(self, part), getattr(later, part)
        names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if not names:
            return ""
        tell = {"weights": _changed_weight, "random": _drawn}.get(part, _changed)
        shown = [tell(name, before.get(name, "nothing"), after.get(name, "nothing")) for name in names[:3]]
        return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _changed(name: str, before: Any, after: Any) -> str:
    return f"{name} was {before!s:.60}, is {after!s:.60}"


def _changed_weight(name: str, before: Any, after: Any) -> str:
    if "nothing" in (before, after):
        return f"{name} was {'added' if before == 'nothing' else 'taken away'}"
    return f"{name} has other values" if before[1] != after[1] else f"{name} was replaced by another tensor like it"


def _drawn(name: str, before: Any, after: Any) -> str:
    kind = name.partition(":")[0]
    return f"it draws from {GLOBAL[kind][0]}, or seeds it; use a generator of your own: {GLOBAL[kind][1]}"


def _hooks(model: Any) -> Facts:
    facts: Facts = {}
    for path, module in model.named_modules():
        place = path or type(model).__name__
        for kind in HOOKS:
            if hooks := getattr(module, kind, None):
                facts[f"{place}.{kind}"] = [getattr(h, "__qualname__", repr(h)) for h in hooks.values()]
        if "forward" in vars(module):  # put over the class's own
            facts[f"{place}.forward"] = vars(module)["forward"]
        facts[f"{place} (class)"] = type(module).__qualname__
        facts |= _code(type(module))
    for name, weight in model.named_parameters():
        if weight._backward_hooks:
            facts[f"{name}._backward_hooks"] = list(weight._backward_hooks)
    for kind in EVERYWHERE:
        if hooks := getattr(torch_module, kind):
            facts[f"torch.{kind}"] = [getattr(h, "__qualname__", repr(h)) for h in hooks.values()]
    return facts


def _code(kind: type) -> Facts:
    """What a class of modules computes with: its `forward`, and the functions of the Python module that it is written
    in, where published methods put their own."""
    facts: Facts = {f"{kind.__qualname__}.forward": kind.forward, f"{kind.__qualname__}.__call__": kind.__call__}  # type: ignore[attr-defined]
    if kind.__module__.startswith("torch."):
        return facts
    functions = vars(sys.modules.get(kind.__module__, object)).items()
    return facts | {f"{kind.__module__}.{name}": value for name, value in functions if inspect.isfunction(value)}


def _weights(model: Any) -> Facts:
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # An offloaded weight is another empty tensor after each call of its module.
    return {name: (0 if value.is_meta else id(value), _digest(value)) for name, value in values.items()}


def _digest(value: Tensor) -> str:
    value = value.to_local() if hasattr(value, "to_local") else value
    return "meta" if value.is_meta else digest(value)


def _modes(model: Any) -> Facts:
    facts: Facts = {
        f"{path or type(model).__name__}.training": module.training for path, module in model.named_modules()
    }
    for name, weight in model.named_parameters():
        facts[f"{name}.requires_grad"] = weight.requires_grad
        facts[f"{name}.grad"] = "none" if weight.grad is None else _digest(weight.grad)
    facts["torch.is_grad_enabled()"] = torch.is_grad_enabled()
    facts["torch.is_inference_mode_enabled()"] = torch.is_inference_mode_enabled()
    facts["torch.get_default_dtype()"] = torch.get_default_dtype()
    facts["torch.are_deterministic_algorithms_enabled()"] = torch.are_deterministic_algorithms_enabled()
    return facts


def _config(model: Any) -> Facts:
    facts: Facts = {}
    for name in ("config", "generation_config"):
        if (config := getattr(model, name, None)) is not None:
            plain = json.loads(json.dumps(config.to_dict(), default=str))
            facts |= {f"{name}.{key}": value for key, value in plain.items()}
    for path, module in model.named_modules():
        inner = getattr(module, "config", None)
        if inner is not None and hasattr(inner, "_attn_implementation"):
            facts[f"{path or 'model'} attention"] = inner._attn_implementation
    return facts


def _random() -> Facts:
    _, keys, place, *_ = np.random.get_state(legacy=True)
    facts: Facts = {
        "torch": _digest(torch.get_rng_state()),
        "numpy": (hashlib.sha256(np.asarray(keys).tobytes()).hexdigest(), place),
        "random": hash(random.getstate()),
    }
    if torch.cuda.is_available():
        facts |= {f"cuda:{i}": _digest(state) for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return facts
