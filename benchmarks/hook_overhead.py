"""Hook overhead, side by side in one process: python benchmarks/hook_overhead.py [narrow|gpt2|tiny] [rounds]

narrow: 12 layers, d_model 96, 12 heads, 8 tokens, where Python costs more than arithmetic.
gpt2:   the sizes of GPT-2 (124M, random weights), 64 tokens.
toy:    the toy model that ships with the package, 32 tokens.
"""

from __future__ import annotations

import sys

import torch

import interp_core as ic
from interp_core.bench import benchmark

CONFIGS = {
    "narrow": (
        {
            "num_hidden_layers": 12, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12,
            "head_dim": 8, "intermediate_size": 256, "attention_bias": False,
        },
        8, "llama",
    ),
    "gpt2": ({"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}, 64, "gpt2"),
}  # fmt: skip


def main(name: str = "narrow", rounds: str = "40") -> None:
    """Print the table of one configuration."""
    torch.set_num_threads(1)
    tokenizer = ic.load("toy:text").tokenizer
    if name == "toy":
        model, n_tokens = ic.load("toy:text"), 32
    else:
        config, n_tokens, family = CONFIGS[name]
        config = {"vocab_size": len(tokenizer), **config}
        model = ic.load(ic.testing.tiny(family, **config), tokenizer=tokenizer)
    print(benchmark(model, rounds=int(rounds), n_tokens=n_tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
