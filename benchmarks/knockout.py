"""Knockouts at one query, side by side with a plain pass: python benchmarks/knockout.py [tokens] [rounds] [family ...]

One layer of three (d_model 256, 8 heads) hides ten keys from the last query. Both calls keep the last logits only, take
turns, and the shortest of all rounds counts, in processor time of one thread; a knockout at all later queries stands
beside it.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import torch
from turns import shortest

import interp_core as ic
from interp_core import sites as S

FAMILIES = ("llama", "mistral", "gpt2", "gptj", "gpt_neo", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe", "llama4")
LLAMA_LIKE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8},
    "gpt_neo": {"hidden_size": 256, "num_heads": 8},
    "gpt2": {"n_embd": 256, "n_head": 8},
    "gptj": {"n_embd": 256, "n_head": 8, "rotary_dim": 16},
}


def main(tokens: str = "2048", rounds: str = "5", *families: str) -> None:
    """Print a row per family."""
    n = int(tokens)
    print(f"| family ({n} tokens) | attention | plain, ms | one query | all later queries |")
    print("|---|---|---|---|---|")
    for family in families or FAMILIES:
        longest = "n_positions" if family in ("gpt2", "gptj") else "max_position_embeddings"
        model = ic.load(ic.testing.tiny(family, **{longest: n}, **SHAPES.get(family, LLAMA_LIKE)))
        ids = torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(0))
        layer = model.atlas.layers("pattern")[-1]
        keys = list(range(n - 12, n - 2))
        last = S.pattern[layer].knockout(query=-1, key=keys)
        later = S.pattern[layer].knockout(query=slice(n // 4, None), key=slice(2, 12))

        def run(*edits: ic.Edit, model: ic.Model = model, ids: torch.Tensor = ids) -> Any:
            return model.run(ids, edits=edits, logits=-1, allow_noop=True)

        calls = run, partial(run, last), partial(run, later)
        shortest(1, *calls)  # warm
        plain, few, many = (seconds * 1e3 for seconds in shortest(int(rounds), *calls, clock=time.process_time))
        kernel = model.hf.config._attn_implementation
        print(
            f"| {family} | {kernel} | {plain:.0f} | {few:.0f} ({few / plain:.2f}×) | {many:.0f} ({many / plain:.2f}×) |"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
