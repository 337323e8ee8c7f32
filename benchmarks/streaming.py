"""Streaming reads, side by side with holding them: python benchmarks/streaming.py [tokens] [rounds]

12 layers, 12 heads, d_model 768. `each` lets a layer's values go when its function returns. Calls keep the last logits
only and take turns, and the shortest of all rounds counts; bytes are the most that tensors took at a time, above a
plain pass.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from turns import shortest

import interp_core as ic
from interp_core import sites as S
from interp_core.bench.allocations import peak_bytes

WAYS: dict[str, dict[str, Any]] = {
    "plain pass": {},
    "rot_q, rot_k, v held": {"read": [S.rot_q, S.rot_k, S.v]},
    "pattern, v held": {"read": [S.pattern, S.v]},
    "pattern, v, each layer": {"read": [S.pattern, S.v], "each": lambda layer, values: None},
    "streams held": {"read": [S.resid_pre, S.attn_out, S.mlp_out]},
    "streams, each layer": {"read": [S.resid_pre, S.attn_out, S.mlp_out], "each": lambda layer, values: None},
}


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
    seconds, most = shortest(int(rounds), *calls), [peak_bytes(call) for call in calls]
    print(f"| {n} tokens | ms | of a plain pass | MiB above it |\n|---|---|---|---|")
    for name, time, size in zip(WAYS, seconds, most, strict=True):
        print(f"| {name} | {time * 1e3:.0f} | {time / seconds[0]:.2f} | {(size - most[0]) / 2**20:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
