"""Parameters of modules as numbers, wherever they are kept: the one place through which weights are read.

A model that is larger than its device has parts elsewhere. What accelerate has offloaded (`device_map`) is on the meta
device between calls of its module, and comes from the map that its hook loads it from; what transformers has shared out
between processes (tensor parallelism) is a DTensor, and is gathered, which all of them have to do together.
"""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CapabilityError

SHARING = ("transformers.distributed.", "transformers.integrations.")
"""Where transformers' code is that shares a module's work out between processes."""


def parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter or buffer of a module, or of one in it (`"inner.weight"`), whole and where that module computes.

    Raises:
        CapabilityError: it is on the meta device, and nothing brings it.
    """
    path, _, name = name.rpartition(".")
    module = attrgetter(path)(module) if path else module
    held = getattr(module, name)
    assert isinstance(held, Tensor)
    if held.is_meta:
        kept = _kept(module)
        if kept is None:
            raise CapabilityError(
                f"the {name} of {type(module).__name__} is on the meta device, which holds no numbers, and nothing "
                "brings it: load the model with its weights"
            )
        return kept[name].to(device_of(module), held.dtype)
    gather = getattr(held, "full_tensor", None)  # a DTensor, of which this process has a part
    return held if gather is None else gather()


def bias_of(module: nn.Module) -> Tensor | None:
    """A module's bias as `parameter` gives it, None if it has none."""
    return None if getattr(module, "bias", None) is None else parameter(module, "bias")


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these modules that has parameters computes: where they are, or will be when it is called."""
    for part in (part for module in modules for part in module.modules()):
        for held in (*part._parameters.values(), *part._buffers.values()):
            if held is not None:
                return _execution_device(part) if held.is_meta else held.device
    return torch.device("cpu")


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a module computes what its class says, with nobody's function in the place of its forward: that of
    accelerate brings its weights, that of transformers' tensor parallelism shares its work out, and both then call it.
    """
    forward = vars(module).get("forward")
    while forward is not None:
        if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
            forward = vars(module).get("_old_forward")
        elif is_shared(module) and getattr(forward, "__name__", "") in ("tp_forward", "ep_forward"):
            forward = _free(forward).get("original_forward")
        else:
            return getattr(forward, "__func__", None) is type(module).forward
    return True


class Sharing(NamedTuple):
    """How transformers shares a module's work out: the style, which says how tensors come and go, and the processes."""

    style: Any
    mesh: Any


def sharing(module: nn.Module) -> Sharing | None:
    """How a module's work is shared out, None if it is not, or in a way that is not known here."""
    free = _free(vars(module)["forward"]) if is_shared(module) else {}
    mesh = free.get("mesh", free.get("ep_mesh"))
    return Sharing(free["self"], mesh) if "self" in free and mesh is not None else None


def _free(function: Any) -> dict[str, Any]:
    """What a function has of the one that made it, by name."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def is_shared(module: nn.Module) -> bool:
    """Whether transformers has put a function in the place of a module's forward that shares its work out."""
    forward = vars(module).get("forward")
    return str(getattr(forward, "__module__", "")).startswith(SHARING)


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has given a module its place, and brings what it needs there."""
    return "_hf_hook" in vars(module)


def _hook(module: nn.Module) -> Any:
    """Accelerate's hook of a module that moves its weights, or None."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])  # several in a row are one
    return next((one for one in hooks if getattr(one, "execution_device", None) is not None), None)


def _kept(module: nn.Module) -> Any:
    """What accelerate loads a module's weights from, by name; None if it does not."""
    return getattr(_hook(module), "weights_map", None)


def _execution_device(module: nn.Module) -> torch.device:
    place = getattr(_hook(module), "execution_device", "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
