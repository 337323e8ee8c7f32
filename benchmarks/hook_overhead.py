"""Hook overhead, side by side in one process: python benchmarks/hook_overhead.py [narrow|gpt2|toy|page] [rounds]

narrow: 12 layers, d_model 96, 12 heads, 8 tokens, where Python costs more than arithmetic.
gpt2:   the sizes of GPT-2 (124M, random weights), 64 tokens.
toy:    the toy model that ships with the package, 32 tokens.
page:   writes docs/overhead.md with the first two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peers import installed

import interp_core as ic
from interp_core.bench import benchmark
from interp_core.files import write

PAGE = """# What hooks cost

Written by `python benchmarks/hook_overhead.py page` with the extra `bench` installed. Every operation is done by every
tool in one process, in turn, on the same weights; each tool that changes the model has its own copy.

- `by hand` is what a careful person writes with PyTorch hooks (attention patterns: the family's eager attention).
- `Python calls added` is free of noise, and what the tests hold: ours stay under 1.5 × hand-written hooks.
- An edit by interp_core also measures how far it moved what it changed, for its receipt, and every run checks its
  input: that is the difference of some tens of µs to a bare hook in the rows of one edit.
- `read everything the tool calls a cache` differs by tool: ours is every site in every layer, scores, rotated queries
  and head outputs (heads × d_model) among them.

## Where Python costs more than arithmetic

{narrow}

## GPT-2's size

{gpt2}

Your own model: `interp bench MODEL`, with `--extra METHOD` or `--extra module:function` to add something of yours.
"""

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
    """Print the table of one configuration, or write the page."""
    torch.set_num_threads(1)
    if name == "page":
        text = PAGE.format(narrow=table("narrow", 100), gpt2=table("gpt2", 8))
        write(Path(__file__).parents[1] / "docs/overhead.md", text)
    else:
        print(table(name, int(rounds)))


def table(name: str, rounds: int) -> str:
    """The table of one configuration."""
    tokenizer = ic.load("toy:text").tokenizer
    if name == "toy":
        model, n_tokens = ic.load("toy:text"), 32
    else:
        config, n_tokens, family = CONFIGS[name]
        config = {"vocab_size": len(tokenizer), **config}
        model = ic.load(ic.testing.tiny(family, **config), tokenizer=tokenizer)
    return benchmark(model, rounds=rounds, n_tokens=n_tokens, tools=installed())


if __name__ == "__main__":
    main(*sys.argv[1:])
