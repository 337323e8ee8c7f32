"""Sweeps against loops, side by side in one process: python benchmarks/sweep.py [heads|many|positions] [threads]
and python benchmarks/sweep.py cold [heads|many|sixteen|fv|knockout] [threads]

heads:     every head at the last position, 12 layers × 12 heads, d_model 768, 96 tokens (144 variants).
many:      the same for 32 layers × 32 heads, d_model 256 (1,024 variants); loops are timed on a part and scaled up.
positions: the residual stream at every layer and position, 12 × 96 (1,152 variants); loops as for `many`.

sixteen:   every head of 16 layers × 16 heads, d_model 1,024, 128 tokens (256 variants).
fv:        every head of 8 layers × 16 heads, d_model 1,024, 122 tokens (128 variants), as for function vectors.
knockout:  ten keys hidden from the last query, layer by layer, in the model of `heads` (12 variants).

cold:      the first sweep of a process, with the trial of strategies, and a later one, each against the loop; in five
           processes one after the other, of which the median counts.

The sweep and the loop with hooks by hand take turns, three times for `heads` and nine for `many`; medians count.

The floor is the time that the executed token-layers' multiply-adds take as one matrix product at the rate measured
beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S

SIZES = {
    "heads": (12, 12, 768, 64, 2048, 96), "positions": (12, 12, 768, 64, 2048, 96),
    "knockout": (12, 12, 768, 64, 2048, 96), "many": (32, 32, 256, 8, 688, 96),
    "sixteen": (16, 16, 1024, 64, 2736, 128), "fv": (8, 16, 1024, 64, 2736, 122),
}  # fmt: skip
"""Layers, heads, d_model, d_head, d_mlp and tokens."""
ROUNDS = {"heads": 3, "many": 9, "positions": 1}
HIDDEN = slice(20, 30)
TARGET, OTHER = 5, 9


def main(name: str = "heads", threads: str = "2") -> None:
    """Print the table of one sweep."""
    torch.set_num_threads(int(threads))
    _, heads, d_model, d_head, d_mlp, _ = SIZES[name]
    model, ids, mean, stream, variants = study(name)
    judged = score.logit_diff(TARGET, OTHER)
    model.sweep(ids, variants[:2], judged)  # tries the strategy on the model
    turns, study_of = [], (name, model, ids, mean, stream, variants)
    for _ in range(ROUNDS[name]):
        seconds, swept = timed(lambda: model.sweep(ids, variants, judged))
        others = loops(*study_of)
        turns.append((seconds, next(others)))
    ours = statistics.median(seconds for seconds, _ in turns)
    by_hand = statistics.median(first[1] for _, first in turns)
    first, *rest = turns[-1][1]
    print(swept.plan.explain(), "\n")
    rate = matmul_rate(4 * ids.numel(), d_model, d_mlp)
    floor = swept.plan.token_layers * (4 * d_model * heads * d_head + 3 * d_model * d_mlp) * 2 / rate
    rows = [("interp_core sweep", ours, len(variants))]
    for tool, seconds, values, chosen in [(first, by_hand, *rest[1:]), *others]:
        wanted = swept.values[chosen, 0]
        assert torch.allclose(values, wanted, atol=1e-3, rtol=1e-4), (tool, (values - wanted).abs().max())
        rows.append((tool, seconds * len(variants) / len(chosen), len(chosen)))
    print(f"| {name}, {len(variants)} variants | s | ratio | timed |")
    print("|---|---|---|---|")
    for tool, seconds, count in rows:
        print(f"| {tool} | {seconds:.2f} | {seconds / ours:.1f} | {count} |")
    print(f"\nfloor {floor:.2f} s at {rate / 1e9:.0f} GFLOP/s: {floor / ours:.0%} of it reached, {threads} threads")


def cold(name: str = "heads", threads: str = "2") -> None:
    """Print the ratios of first and later sweeps, each process fresh."""
    rows = []
    for _ in range(5):
        run = [sys.executable, __file__, "once", name, threads]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as installed
        done = subprocess.run(run, check=True, capture_output=True, text=True, env=env)
        rows.append([float(x) for x in done.stdout.split()])
    first, later, loop = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"| {name} | s | ratio |\n|---|---|---|\n| first sweep of a process | {first:.3f} | {loop / first:.1f} |")
    print(
        f"| later sweeps | {later:.3f} | {loop / later:.1f} |\n\ncold at {later / first:.2f} of warm, {threads} threads"
    )


def once(name: str, threads: str) -> None:
    """Seconds of the first sweep, of a later one, and of one full forward pass per variant."""
    torch.set_num_threads(int(threads))
    model, ids, mean, stream, variants = study(name)
    with torch.no_grad():
        model.hf(ids, use_cache=False)  # what the machine does at its first products is nobody's
    judged = score.logit_diff(TARGET, OTHER)
    first, _ = timed(lambda: model.sweep(ids, variants, judged))
    later = statistics.median(timed(lambda: model.sweep(ids, variants, judged))[0] for _ in range(3))
    _, seconds, values, chosen = next(loops(name, model, ids, mean, stream, variants))
    wanted = model.sweep(ids, variants, judged).values[chosen, 0]
    assert torch.allclose(values, wanted, atol=1e-3, rtol=1e-4), (values - wanted).abs().max()
    print(first, later, seconds * len(variants) / len(chosen))


def study(name: str) -> tuple[ic.Model, Tensor, Tensor, Tensor, list[ic.Edit]]:
    """The model of a size, a text, values for heads and for the stream, and the variants."""
    layers, heads, d_model, d_head, d_mlp, tokens = SIZES[name]
    hf = ic.testing.tiny(
        "llama", num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=d_model,
        head_dim=d_head, intermediate_size=d_mlp, attention_bias=False, vocab_size=32000,
    )  # fmt: skip
    model = ic.load(hf)
    ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))
    mean = torch.randn(layers, heads, d_head, generator=torch.Generator().manual_seed(1))
    stream = torch.randn(layers, tokens, d_model, generator=torch.Generator().manual_seed(2))
    if name == "positions":
        variants = [S.resid_pre[at].at(pos).set(stream[at, pos]) for at in range(layers) for pos in range(tokens)]
    elif name == "knockout":
        variants = [S.pattern[at].knockout(query=-1, key=HIDDEN) for at in range(layers)]
    else:
        variants = [S.z[at, head].at(-1).set(mean[at, head]) for at, head in model.heads]
    return model, ids, mean, stream, variants


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def matmul_rate(rows: int, d_model: int, d_mlp: int) -> float:
    """Floating-point operations per second of a product as the model has them, the best of some."""
    a, b = torch.randn(rows, d_model), torch.randn(d_model, d_mlp)
    best = min(timed(lambda: [a @ b for _ in range(20)])[0] for _ in range(5))
    return 20 * 2 * a.numel() * d_mlp / best


def difference(hf: Any, ids: Tensor, module: Any, hook: Any, *, with_kwargs: bool = False) -> Tensor:
    """The score `[row]` of one forward pass with an input hook."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    try:
        with torch.no_grad():
            logits = hf(ids, use_cache=False, logits_to_keep=1).logits
    finally:
        handle.remove()
    return (logits[:, -1, TARGET] - logits[:, -1, OTHER]).float()


def hidden(hf: Any, ids: Tensor, layer: int) -> Tensor:
    """Keys hidden from the last query in one layer, by a mask."""
    seen = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen[..., -1, HIDDEN] = False

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": seen}

    return difference(hf, ids, hf.model.layers[layer].self_attn, hook, with_kwargs=True)


def loops(name: str, model: ic.Model, ids: Tensor, mean: Tensor, stream: Tensor, variants: list[ic.Edit]) -> Any:
    """What others do, each with its values of the variants that it was timed on."""
    hf, layers = model.hf, model.n_layers
    heads = mean.shape[1]
    tokens, few = ids.shape[1], name in ("heads", "knockout")
    chosen = list(range(len(variants))) if few else list(range(0, len(variants), len(variants) // 16))

    def place(number: int) -> tuple[Any, Any]:
        """Module and input hook of one variant, or of a batch of them."""
        if name == "positions":
            at, pos = divmod(number, tokens)
            return hf.model.layers[at], (pos, slice(None), stream[at, pos])
        at, head = divmod(number, heads)
        d = mean.shape[-1]
        return hf.model.layers[at].self_attn.o_proj, (-1, slice(head * d, (head + 1) * d), mean[at, head])

    def hooked(numbers: list[int]) -> Tensor:
        module, _ = place(numbers[0])
        edits = [place(number)[1] for number in numbers]

        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            for row, (pos, part, value) in enumerate(edits):
                x[row, pos, part] = value
            return (x, *args[1:])

        return difference(hf, ids.expand(len(numbers), -1), module, hook)

    run_alone = (lambda layer: hidden(hf, ids, layer)) if name == "knockout" else (lambda number: hooked([number]))
    seconds, values = timed(lambda: torch.cat([run_alone(number) for number in chosen]))
    yield "one full forward per variant, hooks by hand", seconds, values, chosen
    per = heads if name != "positions" else tokens
    size = min(per, 32)
    cells = [range(at * per, (at + 1) * per) for at in range(layers)]
    groups = [list(cell[i : i + size]) for cell in cells for i in range(0, per, size)]
    groups = groups if name == "heads" else groups[:: max(1, len(groups) // 3)]
    seconds, values = timed(lambda: torch.cat([hooked(group) for group in groups]))
    yield "batched by layer, hooks by hand", seconds, values, [number for group in groups for number in group]
    some = chosen[:: max(1, len(chosen) // 24)]
    if name != "positions":
        yield ("nnsight, one trace per variant", *timed(lambda: traced(model, ids, mean, some)), some)
        bridge = "TransformerLens bridge, run_with_hooks per variant"
        yield (bridge, *timed(lambda: bridged(model, ids, mean, some)), some)


def traced(model: ic.Model, ids: Tensor, mean: Tensor, numbers: list[int]) -> Tensor:
    """nnsight's own loop."""
    nnsight = model.on("nnsight").engine.nnsight  # type: ignore[attr-defined]
    d, differences = mean.shape[-1], []
    for number in numbers:
        at, head = divmod(number, mean.shape[1])
        with torch.no_grad(), nnsight.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            projection = nnsight.model.layers[at].self_attn.o_proj
            z = projection.input.clone()
            z[:, -1, head * d : (head + 1) * d] = mean[at, head]
            projection.input = z
            logits = nnsight.output.logits.save()
        differences.append(logits[0, -1, TARGET] - logits[0, -1, OTHER])
    return torch.stack(differences)


def bridged(model: ic.Model, ids: Tensor, mean: Tensor, numbers: list[int]) -> Tensor:
    """TransformerLens' own loop."""
    bridge = model.on("transformer_lens").engine.bridge  # type: ignore[attr-defined]
    differences = []
    for number in numbers:
        at, head = divmod(number, mean.shape[1])

        def patch(z: Tensor, hook: Any, at: int = at, head: int = head) -> Tensor:
            split = z.view(*z.shape[:2], mean.shape[1], -1).clone()
            split[:, -1, head] = mean[at, head]
            return split.view(z.shape)

        with torch.no_grad():
            logits = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{at}.attn.hook_z", patch)])
        differences.append(logits[0, -1, TARGET] - logits[0, -1, OTHER])
    return torch.stack(differences)


if __name__ == "__main__":
    modes = {"cold": cold, "once": once}
    arguments = sys.argv[1:]
    modes[arguments[0]](*arguments[1:]) if arguments and arguments[0] in modes else main(*arguments)
