"""Attention that models compute by themselves, opened: python benchmarks/own_attention.py [tokens] [rounds] [family …]

Three layers (d_model 256, 8 heads). A plain pass, one that reads the patterns of all layers, one that hides ten keys
from the last query in one layer, and transformers' own way to give patterns (`output_attentions`, with eager attention)
take turns; the shortest of all rounds counts, in processor time of one thread.
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

FAMILIES = ("falcon", "gpt_neo", "bloom", "mpt", "xglm", "llama")
SHAPES: dict[str, dict[str, Any]] = {
    "falcon": {"hidden_size": 256, "num_attention_heads": 8},
    "gpt_neo": {"hidden_size": 256, "num_heads": 8},
    "bloom": {"hidden_size": 256, "n_head": 8},
    "mpt": {"d_model": 256, "n_heads": 8},
    "xglm": {"d_model": 256, "attention_heads": 8, "ffn_dim": 1024},
    "llama": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8},
}
LONGEST = {"mpt": "max_seq_len"}


def main(tokens: str = "512", rounds: str = "7", *families: str) -> None:
    """Print a row per family."""
    n = int(tokens)
    print(f"| family ({n} tokens) | attention | plain, ms | patterns | knockout | patterns by transformers |")
    print("|---|---|---|---|---|---|")
    for family in families or FAMILIES:
        longest = {LONGEST.get(family, "max_position_embeddings"): n}
        hf = ic.testing.tiny(family, **longest, **SHAPES[family])
        model = ic.load(hf)
        ids = torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(0))
        hide = S.pattern[1].knockout(query=-1, key=list(range(n - 12, n - 2)))
        eager = ic.testing.tiny(family, **longest, **SHAPES[family])
        eager.set_attn_implementation("eager")

        calls = [
            partial(model.run, ids),
            partial(model.run, ids, read=S.pattern),
            partial(model.run, ids, edits=hide),
            partial(_by_transformers, eager, ids),
        ]
        shortest(1, *calls)  # warm
        plain, *others = (seconds * 1e3 for seconds in shortest(int(rounds), *calls, clock=time.process_time))
        shown = [f"{each:.0f} ({each / plain:.2f}×)" for each in others]
        shown[-1] = shown[-1] if _by_transformers(eager, ids)[0] is not None else "gives none"
        print(f"| {family} | {hf.config._attn_implementation} | {plain:.0f} | {' | '.join(shown)} |", flush=True)


def _by_transformers(hf: Any, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return hf(input_ids=ids, use_cache=False, output_attentions=True).attentions


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
