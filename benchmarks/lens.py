"""The lens by tiles beside its bare product, and others: python benchmarks/lens.py [rounds] [d_vocab] [d_model]

Processor time of one thread (the shortest of the rounds, all taking turns), a model of four small blocks and the
vocabulary of Qwen3. First 128 rows through the unembedding: the bare product, and all that the lens says of these rows.
Then the whole lens, forward pass included, on 32 targets of 128 tokens: ours; TransformerLens' lens at these positions;
transformers' hidden states through norm and head at all positions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from interp_plugins.logit_lens import aligned, tiles
from turns import shortest

import interp_core as ic

LAYERS, LENGTH, TARGETS = 4, 128, 32


def tiny(d_vocab: int, d_model: int, dtype: torch.dtype) -> ic.Model:
    """Four small blocks below a large head."""
    hf = ic.testing.tiny(
        "llama", vocab_size=d_vocab, hidden_size=d_model, num_hidden_layers=LAYERS, intermediate_size=256,
        max_position_embeddings=LENGTH, dtype=dtype,
    )  # fmt: skip
    return ic.load(hf, check=False)


@torch.no_grad()
def product(model: ic.Model, rows: int, rounds: int) -> None:
    """The lens on so many rows beside the bare product."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(LAYERS, rows // LAYERS, model.d_model, generator=generator)
    normed = model.module("ln_final")(stream.to(model.dtype))
    targets = torch.randint(0, model.d_vocab, (rows // LAYERS,), generator=generator)
    weight, flat = model.module("unembed").weight, normed.flatten(0, 1)
    width = tiles.tile_width(rows, flat.device)
    calls: dict[str, Callable[[], Any]] = {
        "bare product": lambda: torch.nn.functional.linear(flat, weight),
        f"bare product, tiles of {width:,}": lambda: [None for _ in model.unembed_tiles(flat, width)],
        "log_softmax of all logits": lambda: torch.log_softmax(torch.nn.functional.linear(flat, weight).float(), -1),
        "lens: NLL and rank": lambda: tiles.read_out(model, normed, targets, spread=False),
        "lens: NLL, rank, entropy, KL": lambda: tiles.read_out(model, normed, targets),
    }
    seconds = shortest(rounds, *calls.values(), clock=time.process_time)
    for name, each in zip(calls, seconds, strict=True):
        print(f"| {str(model.dtype).removeprefix('torch.')} | {name} | {each:.3f} | {each / seconds[0]:.2f} × |")


def whole(model: ic.Model, rounds: int) -> None:
    """The whole lens on needed positions, beside others."""
    from transformer_lens.tools.analysis import logit_lens

    generator = torch.Generator().manual_seed(1)
    tokens = ic.Tokens(ids := torch.randint(3, 90, (1, LENGTH), generator=generator), torch.ones_like(ids).bool())
    positions = list(range(LENGTH - TARGETS, LENGTH))
    before, targets = [p - 1 for p in positions], ids[:, positions]
    bridge = model.on("transformer_lens").engine.bridge

    @torch.no_grad()
    def plainly() -> torch.Tensor:
        out = model.hf(input_ids=ids, output_hidden_states=True, use_cache=False)
        norm, head = model.hf.model.norm, model.hf.lm_head
        states = [*map(norm, out.hidden_states[:-1]), out.hidden_states[-1]]
        logp = [torch.log_softmax(head(state)[0].float(), -1) for state in states]
        return torch.stack([each[before].gather(1, targets[0][:, None])[:, 0] for each in logp])

    def ours() -> torch.Tensor:
        return aligned.score(model, aligned.read_states(model, tokens, positions), spread=False).logprob

    def spread() -> torch.Tensor:
        return aligned.score(model, aligned.read_states(model, tokens, positions)).logprob

    def theirs() -> Any:
        return logit_lens(bridge, ids, positions=before, targets=targets, return_type="log_probs")

    difference = (ours() - plainly()).abs().max()
    calls = {
        "ours: NLL and rank": ours, "ours, with entropy and KL": spread, "TransformerLens, these positions": theirs,
        "hidden states, all positions": plainly,
    }  # fmt: skip
    seconds = shortest(rounds, *calls.values(), clock=time.process_time)
    for name, each in zip(calls, seconds, strict=True):
        print(f"| {str(model.dtype).removeprefix('torch.')} | {name} | {each:.3f} | {each / seconds[0]:.1f} × |")
    print(f"\nours and the plain one differ by {difference:.1e} nats at most\n")


def main(rounds: str = "5", d_vocab: str = "151936", d_model: str = "2048") -> None:
    """Print both tables in two dtypes."""
    torch.set_num_threads(1)
    models = [partial(tiny, int(d_vocab), int(d_model), dtype) for dtype in (torch.bfloat16, torch.float32)]
    print("| dtype | 128 rows | seconds | |\n|---|---|---|---|")
    for make in models:
        product(make(), 128, int(rounds))
    print(f"\n| dtype | lens of {TARGETS} targets, {LAYERS + 1} rows each | seconds | |\n|---|---|---|---|")
    for make in models:
        whole(make(), int(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
