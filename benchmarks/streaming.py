"""Streaming reads, side by side with holding them: python benchmarks/streaming.py [tokens] [rounds]

12 layers, 12 heads, d_model 768. `each` lets a layer's values go when its function returns. Calls keep the last logits
only and take turns, and the shortest of all rounds counts; bytes are the most that tensors took at a time, above a
plain pass.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from turns import shortest

import interp_core as ic
from interp_core import sites as S

WAYS: dict[str, dict[str, Any]] = {
    "plain pass": {},
    "rot_q, rot_k, v held": {"read": [S.rot_q, S.rot_k, S.v]},
    "pattern, v held": {"read": [S.pattern, S.v]},
    "pattern, v, each layer": {"read": [S.pattern, S.v], "each": lambda layer, values: None},
    "streams held": {"read": [S.resid_pre, S.attn_out, S.mlp_out]},
    "streams, each layer": {"read": [S.resid_pre, S.attn_out, S.mlp_out], "each": lambda layer, values: None},
}


class Bytes(TorchDispatchMode):
    """The most that tensors made meanwhile took at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, partial(self.note, new=False), (args, kwargs))
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, partial(self.note, new=True), out)
        return out

    def note(self, tensor: Tensor, new: bool) -> None:
        """A storage that is met for the first time, in what was given or in what was made."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            size = storage.nbytes() if new else 0
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage._cdata, size)

    def gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def main(tokens: str = "1024", rounds: str = "5") -> None:
    """Print a row per way of reading."""
    n = int(tokens)
    model = ic.load(
        ic.testing.tiny(
            "llama", num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, hidden_size=768,
            head_dim=64, intermediate_size=2048, max_position_embeddings=n,
        )
    )  # fmt: skip
    ids = torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(0))
    calls = [partial(model.run, ids, logits=-1, **way) for way in WAYS.values()]
    seconds, most = shortest(int(rounds), *calls), []
    for call in calls:
        with Bytes() as counted:
            call()
        most.append(counted.most)
    print(f"| {n} tokens | ms | of a plain pass | MiB above it |\n|---|---|---|---|")
    for name, time, size in zip(WAYS, seconds, most, strict=True):
        print(f"| {name} | {time * 1e3:.0f} | {time / seconds[0]:.2f} | {(size - most[0]) / 2**20:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
