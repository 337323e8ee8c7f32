"""Steered generation, side by side in one process: python benchmarks/generation.py [rounds] [new tokens ...]

A vector is added to the stream at the newest token of every step (4 layers, d_model 96). Per new token: transformers'
own generate, the same with a hook by hand, and interp_core (the shortest of all rounds), and the Python calls added.
What a step adds must not grow with the text.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from turns import shortest

import interp_core as ic
from interp_core import sites as S
from interp_core.bench import count_calls

CONFIG = {"num_hidden_layers": 4, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
PROMPT, LAYER, LENGTHS, CALLS = 8, 1, (32, 64, 256, 1024, 4096), 256


def main(rounds: str = "3", *lengths: str) -> None:
    """Print one row per number of new tokens."""
    torch.set_num_threads(1)
    wanted = [int(n) for n in lengths] or LENGTHS
    hf = ic.testing.tiny("llama", **CONFIG, max_position_embeddings=PROMPT + max(wanted))
    hf.generation_config.eos_token_id = None
    model, ids, vector = ic.load(hf), torch.randint(3, 90, (1, PROMPT)), torch.full((CONFIG["hidden_size"],), 0.1)
    edit = S.resid_post[LAYER].at(-1).add(vector)

    def plain(new: int) -> Any:
        return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

    def by_hand(new: int) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, -1] += vector
            return output

        handle = hf.model.layers[LAYER].register_forward_hook(hook)
        try:
            return plain(new)
        finally:
            handle.remove()

    def ours(new: int) -> Any:
        return model.generate(ids, edit, max_new_tokens=new, stop_at_eos=False)

    ways = (plain, by_hand, ours)
    print("| new tokens | plain, µs a token | by hand | interp_core | calls added by hand | by interp_core |")
    print("|---|---|---|---|---|---|")
    for new in wanted:
        calls = [partial(way, new) for way in ways]
        base, hand, own = (s / new * 1e6 for s in shortest(int(rounds) * max(1, 512 // new), *calls))
        added = ["", ""]
        if new <= CALLS:
            counted = [count_calls(call) for call in calls]
            added = [f"{n - counted[0]:,}" for n in counted[1:]]
        shown = f"{hand:.0f} ({hand / base:.3f}×) | {own:.0f} ({own / base:.3f}×)"
        print(f"| {new} | {base:.0f} | {shown} | {added[0]} | {added[1]} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
