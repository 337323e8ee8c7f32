"""Whether a model is still what it was when it was opened.

Sites, hook points and compiled plans are worked out once. What can change under them is looked at before every run, in
loops over attributes that cost no Python call: whether the modules that the run touches hang where they hung and none
was compiled in place since, whether dtype, device and config (with it the attention implementation) are as they were,
and whether anything that is random while training is in training mode. A model that changed is opened anew, as `load`
would. Values of weights need no look: nothing is worked out from them; nor do adapters that are switched, except on an
engine's copy, which has switches of its own.

An engine's copy of the model shares its weights and nothing else, so there every module and weight is held against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .architectures.parameters import CAPS, LENT
from .errors import CapabilityError, LoadError

Place = tuple[Mapping[str, Any], str, Any]
"""Where something hangs: a module's table of what it holds, the name there, and what it was."""
SWITCH = "_active_adapter"
"""An attribute of layers with adapters (PEFT): which of them act."""
_SWITCHES = (SWITCH, "_disable_adapters", "merged_adapters", "scaling")
"""Attributes of layers with adapters that say what acts, and how much."""
_DRAWS = ("drop", "jitter")
"""What attributes of modules are called that say how much of what passes is random while training."""


class Snapshot:
    """What a model was like.

    Args:
        model: the user's model.
        run: the model that the engine runs: the same, or a copy.

    Attributes:
        modules: where every module of the user's model hangs.
    """

    __slots__ = (
        "_compiled", "_configs", "_copied", "_draws", "_root", "_switches", "_table", "_weight", "_weights", "modules",
    )  # fmt: skip

    def __init__(self, model: Any, run: Any) -> None:
        self._root = run
        self.modules = tuple(_held(model, "_modules"))
        held = (*self.modules, *_held(model, "_parameters"), *_lasting(model))
        self._weights = tuple((table, name) for table, name, _ in _held(run, "_parameters"))
        self._copied = (*_lent(model), *(() if run is model else held))
        # A copy has switches of adapters of its own; on the model's own modules they act at once.
        self._switches = (
            [] if run is model else [(own, _switched(own)) for own in map(vars, model.modules()) if SWITCH in own]
        )
        self._compiled = {id(module) for module in model.modules() if module._compiled_call_impl is not None}
        # What can draw is few of the modules, and which they are is settled; whether they train is looked at each time.
        self._draws = tuple(item for item in model.named_modules() if _may_draw(item[1]))
        # One level deep, for the price of a look at every run: what is written into a nested setting goes unnoticed.
        owner, _ = vars(model).get(LENT, (model, {}))
        configs = (model.config, model.config.get_text_config(), owner.config)
        self._configs = [(kept, dict(kept)) for kept in map(vars, configs)]
        embedding = model.get_input_embeddings()
        # One weight stands for all: `model.to` moves and casts them together.
        self._table = next(module._parameters for module in embedding.modules() if "weight" in module._parameters)
        weight = self._table["weight"]
        assert weight is not None
        self._weight: tuple[Any, Any, Any] = weight.dtype, weight.device, weight.shape

    def stale(self, places: Iterable[Place] = ()) -> bool:
        """Whether the model is another one by now, as far as these places matter.

        Raises:
            CapabilityError: it is in training mode, where runs differ.
        """
        for path, module in self._draws:
            if module.training:
                demand_steady(path, module)
        weight, (dtype, device, shape) = self._table["weight"], self._weight
        if weight.dtype is not dtype or weight.device != device or weight.shape != shape:
            return True
        for now, then in self._configs:  # loops, not any(): a generator would cost a Python call a place
            if now != then:
                return True
        if self._root._compiled_call_impl is not None and id(self._root) not in self._compiled:
            return True
        for own, switched in self._switches:
            if _switched(own) != switched:
                return True
        try:
            for table, name, held in places:
                if table[name] is not held:
                    return True
                if held._compiled_call_impl is not None and id(held) not in self._compiled:
                    return True
            for table, name, held in self._copied:
                if table[name] is not held:
                    return True
        except KeyError:  # it hangs nowhere any more
            return True
        return False

    def forget(self) -> None:
        """Count as stale from now on."""
        self._weight = None, None, None

    def demand_no_checkpoints(self) -> None:
        """Refuse activation checkpoints: a layer would run again in the backward pass, and without a cache.

        Raises:
            CapabilityError: naming the first module that has them.
        """
        for _, name, module in self.modules:
            if module.training and vars(module).get("gradient_checkpointing"):
                raise CapabilityError(
                    f"{name} ({type(module).__name__}) is in training mode with activation checkpoints, so that the "
                    "backward pass would run it again without this plan; call model.hf.eval() for the run"
                )

    @contextmanager
    def weights_apart(self) -> Iterator[None]:
        """A while in which what is computed is not differentiated by weights.

        Raises:
            CapabilityError: weights that autograd does not take.
        """
        self.demand_no_checkpoints()
        if self._table["weight"].is_inference():
            raise CapabilityError(
                "the weights were made under torch.inference_mode(), so nothing behind them has gradients; load the "
                "model outside of it"
            )
        # Else autograd would keep, for every linear map, the input that its weight's gradient needs.
        # By where they hang: an offloaded one is another tensor after every call of its module.
        trained = [place for place in self._weights if _parameter(*place).requires_grad]
        try:
            for place in trained:
                _parameter(*place).requires_grad = False
            yield
        finally:
            for place in trained:
                _parameter(*place).requires_grad = True


def demand_plain(model: nn.Module) -> None:
    """Refuse models that something is wrapped around (`wrapped.py` takes off what it knows), or inside which nothing
    can be seen: their sites would be half there.

    Raises:
        LoadError: naming the module, and what to load instead.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = next(((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
        if inner is not None:
            raise LoadError(
                f"{type(model).__name__} wraps a {type(inner[1]).__name__}, whose sites would not be where they are "
                f"looked for; load the model inside, model.{inner[0]} (without what the wrapper itself does)"
            )
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        packed = isinstance(weight, torch.Tensor) and not weight.is_floating_point() and not weight.is_complex()
        if packed and type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
            raise LoadError(
                f"{name} ({type(module).__name__}) is quantised, and has no forward of its own that would know of it: "
                "its weights are not there as numbers. Load the model without quantisation, as in dtype=torch.bfloat16."
            )
        if hasattr(module, "_orig_mod"):
            raise LoadError(
                f"{name} is a compiled module ({type(module).__name__}), which stands where the module was that it was "
                f"made of; load the model with that one, {name}._orig_mod, in its place, or compile it in place "
                "(module.compile()), which runs undo for as long as they take"
            )
    try:
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # a class that does not say where it is
        embedding = None
    if embedding is not None and not isinstance(embedding, nn.ModuleList):
        weight = getattr(embedding, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise LoadError(
                f"the token embedding ({type(embedding).__name__}) shows no weight of numbers (quantised, or inside "
                "a module around it), which is not supported: dtype and device of a model are those of its embedding. "
                "Quantise or wrap the other layers alone."
            )


def demand_usable(model: Any, *, weightless: bool = False) -> None:
    """Refuse a model that cannot be run, or whose runs mean nothing.

    Args:
        weightless: it needs no weights here.

    Raises:
        CapabilityError: with the reason.
        LoadError: it is wrapped, or quantised in a way that is not known.
    """
    demand_plain(model)
    for path, module in model.named_modules():
        demand_steady(path, module)
    if not weightless:
        _demand_weights(model)
    if getattr(model.config, "return_dict", True) is False:
        raise CapabilityError("model.hf.config.return_dict is False, so its outputs have no names; set it to True")


def demand_steady(path: str, module: nn.Module) -> None:
    """Refuse a module that does something else at every run, because it is in training mode.

    Raises:
        CapabilityError: naming it.
    """
    if module.training and (what := _drawing(module)):
        raise CapabilityError(
            f"the model is in training mode, where {what} of {path or 'the model'} ({type(module).__name__}) makes "
            "runs differ; call model.hf.eval(), and model.hf.train() after the run"
        )


def _demand_weights(model: nn.Module) -> None:
    """Refuse weights that hold no numbers, and that nobody loads when they are needed.

    Raises:
        CapabilityError: naming the first of them.
    """
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta and not hasattr(module, "_hf_hook"):
                raise CapabilityError(
                    f"{path}.{name} is on the meta device, which holds no numbers; load the weights, or move the model "
                    "with model.hf.to_empty(device=…) and load_state_dict"
                )


def _parameter(table: Mapping[str, Any], name: str) -> torch.Tensor:
    return table[name]


def _held(model: nn.Module, kind: str) -> Iterator[Place]:
    for module in model.modules():
        table = module.__dict__[kind]
        yield from ((table, name, held) for name, held in table.items() if held is not None)


def _lasting(model: nn.Module) -> Iterator[Place]:
    """Buffers that are saved with the model; others, such as tables of rotary angles, models make anew."""
    for module in model.modules():
        table, passing = module._buffers, module._non_persistent_buffers_set
        yield from ((table, name, held) for name, held in table.items() if held is not None and name not in passing)


def _lent(model: Any) -> Iterator[Place]:
    """Where modules hang that a model runs and another one owns."""
    owner, names = vars(model).get(LENT, (None, {}))
    yield from ((owner._modules, name, owner._modules[name]) for name in names.values())


def take_again(model: Any) -> None:
    """Let a model run what its owner has by now in the places of the modules that it runs."""
    owner, names = vars(model).get(LENT, (None, {}))
    for own, name in names.items():
        setattr(model, own, getattr(owner, name))
    if owner is not None:
        model.config = bare_config(owner.config)


def bare_config(config: Any) -> Any:
    """The config of a classifier without what its family does to the logits of tokens: no scale, no cap. Where there is
    none, the config itself."""
    settings = vars(config)
    scaled = {name: 1.0 for name in ("logit_scale", "logits_scaling") if settings.get(name) not in (None, 1)}
    changed = scaled | {name: None for name in CAPS if settings.get(name) is not None}
    if settings.get("dim_model_base"):  # MiniCPM's scale is of the stream's width to this one
        changed["dim_model_base"] = config.hidden_size
    if not changed:
        return config
    bare = copy(config)
    vars(bare).update(changed)
    return bare


def _switched(own: Mapping[str, Any]) -> list[Any]:
    """How the adapters of a layer are switched, of its attributes."""
    return [copy(own.get(name)) for name in _SWITCHES]


def _may_draw(module: nn.Module) -> bool:
    """Whether it might do something random while training, with what it is set to now or later."""
    return isinstance(module, _DropoutNd) or any(_named(name) for name in vars(module))


def _named(attribute: str) -> bool:
    return any(kind in attribute for kind in _DRAWS)


def _drawing(module: nn.Module) -> str:
    """What makes a module in training mode random; empty if nothing does."""
    if isinstance(module, _DropoutNd):
        return f"p={module.p:g}" if module.p else ""
    for name, value in vars(module).items():
        if _named(name) and isinstance(value, (bool, int, float)) and value:
            return f"{name}={value}"
    return ""


@contextmanager
def forgotten(root: nn.Module, carried: Sequence[str]) -> Iterator[None]:
    """Forget, for a while, what passes have left in attributes of modules; their paths are `carried`."""
    saved = []
    for path in carried:
        owner, _, name = path.rpartition(".")
        module = root.get_submodule(owner)
        if hasattr(module, name):
            saved.append((module, name, getattr(module, name)))
            setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
