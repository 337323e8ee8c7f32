"""Copies of a model for engines that change the modules which they run."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..architectures.parameters import is_placed, is_shared
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


def with_same_weights(model: Any) -> Any:
    """A copy of a model that shares every parameter and buffer with it, for tools that change the modules.

    Raises:
        CapabilityError: its modules cannot be copied.
    """
    demand_copyable(model)
    # What `deepcopy` finds in its memo it takes for copied already.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
