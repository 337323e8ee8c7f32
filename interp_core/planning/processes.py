"""What one of several processes has of a model that they share: transformers' tensor parallelism, by the model's plan.

Projections of style `colwise` and `rowwise`, packed ones, embeddings and experts are divided; all else (norms, routers,
biases behind a `rowwise` projection, buffers) is whole in every process. Experts that are shared out one by one (expert
parallelism) take as many bytes as experts of which each process has some neurons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import PlanError

NOT_COUNTED = "what processes send each other, and what reads and edits of sites gather, is not in time and memory"


class Shares:
    """How many numbers of each parameter the first of `tp` processes has, which has most.

    Raises:
        PlanError: transformers has no plan for the model.
    """

    def __init__(self, model: Any, tp: int, source: str) -> None:
        plan = dict(getattr(model, "tp_plan", None) or {})
        if not plan:
            raise PlanError(
                f"transformers has no plan to share {source} ({type(model).__name__}) out between processes; leave "
                "--tp out, and its layers are laid over the devices"
            )
        self.tp = tp
        self._sizes = {id(weight): _size(name, weight, plan, tp) for name, weight in model.named_parameters()}

    def of(self, weights: Iterable[nn.Parameter]) -> int:
        """Numbers of parameters that it has."""
        return sum(self._sizes[id(weight)] for weight in weights)

    def held(self, module: nn.Module) -> int:
        """Numbers of a module that it has; buffers are whole."""
        return self.of(module.parameters()) + sum(buffer.numel() for buffer in module.buffers())

    def divided(self, count: int, weights: Iterable[nn.Parameter], what: str = "") -> int:
        """Its part of a count of heads or neurons, whose weights these are: all of it, where none of them is divided.

        Args:
            what: cannot be cut: whose part is a whole number.

        Raises:
            PlanError: it is not.
        """
        if all(self._sizes[id(weight)] == weight.numel() for weight in weights):
            return count
        if what and count % self.tp:
            raise PlanError(f"{self.tp} processes cannot share {count} {what}: give a --tp that divides them")
        return -(-count // self.tp)


def _size(name: str, weight: Tensor, plan: dict[str, str], tp: int) -> int:
    """Numbers of a parameter that the first process has."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    owner, _, own = generic.rpartition(".")
    style = plan.get(generic) or plan.get(owner) or ""
    if "colwise" in style:
        axis = -1 if style.startswith("embedding") or weight.ndim == 1 else -2
    elif "rowwise" in style and own != "bias":
        axis = 0 if style.startswith("embedding") else -1
    else:
        return weight.numel()
    return weight.numel() // weight.shape[axis] * -(-weight.shape[axis] // tp)
