"""What really runs: tokens of every block forward and backward, calls of the model, positions of its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import interp_core as ic


@dataclass
class Counted:
    """Token-layers forward and backward, calls of the first block, positions that went through the unembedding."""

    forward: int = 0
    backward: int = 0
    calls: int = 0
    logits: int = 0


def count(model: ic.Model, run: Callable[[], object]) -> Counted:
    """What a run takes, by hooks that know nothing of plans. It runs twice: what is done once per model has been done
    the second time, which counts."""
    counts = Counted()
    blocks = [model.module("block", layer) for layer in range(model.n_layers)]
    entered: dict[int, int] = {}

    def entering(block: Any, args: Any, kwargs: Any) -> None:
        counts.calls += block is blocks[0]
        if "forward" in vars(block):  # something stands in its place, and only hands the stream through
            return
        stream = args[0] if args else kwargs["hidden_states"]
        entered[id(block)] = stream.shape[:-1].numel()
        counts.forward += entered[id(block)]

    def leaving(block: Any, args: Any, output: Any) -> None:
        if "forward" in vars(block):
            return
        stream = output if isinstance(output, Tensor) else output[0]
        counts.forward += stream.shape[:-1].numel() - entered[id(block)]  # rows of a sweep join inside of a block
        if stream.requires_grad:
            stream.register_hook(back)

    def back(grad: Tensor) -> None:
        counts.backward += grad.shape[:-1].numel()

    def headed(head: Any, args: Any) -> None:
        counts.logits += args[0].shape[:-1].numel()

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    handles.append(model.hf.get_output_embeddings().register_forward_pre_hook(headed))
    try:
        run()
        counts.__init__()  # type: ignore[misc]
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts
