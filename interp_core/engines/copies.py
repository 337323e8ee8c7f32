"""Copies of a model for engines that change the modules which they run."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..architectures.parameters import COMPILED, is_placed, is_shared
from ..errors import CapabilityError


def demand_copyable(model: nn.Module) -> None:
    """Refuse modules whose copies would still be about the former ones.

    Raises:
        CapabilityError: saying so.
    """
    if any(is_shared(module) or is_placed(module) for module in model.modules()):
        raise CapabilityError(
            "this engine runs a copy of the modules, and those of a model with device_map or tp_plan, which know where "
            "their weights are, cannot be copied; load it with engine='torch'"
        )
    compiled = [path for path, module in model.named_modules() if hasattr(vars(module).get("forward"), COMPILED)]
    if compiled:
        raise CapabilityError(
            f"this engine runs a copy of the modules, and the forward of {compiled[0] or 'the model'} is a compiled "
            "function of the original; load it with engine='torch', or compile by module.compile()"
        )


def with_same_weights(model: Any) -> Any:
    """A copy of a model that shares every parameter and buffer with it, for tools that change the modules.

    Raises:
        CapabilityError: its modules cannot be copied.
    """
    demand_copyable(model)
    # What `deepcopy` finds in its memo it takes for copied already.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
