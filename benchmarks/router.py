"""What router statistics add to a forward pass, and what they keep.

    python benchmarks/router.py                   usage of two views, on a Qwen3-MoE of random weights
    python benchmarks/router.py --pairs           with pairs of experts (the method's default)

Time: the pass as it is, with statistics, and as it is again, in turns, in CPU time of a process of one thread on one
core (wall time on a GPU; threads that wait for each other would count as work). A turn's figure is the pass with
statistics by the mean of the two around it, so that other work on the machine slows both alike; printed are the median
and the quartiles of turns, and beside them those of the second plain pass by the first, which is what the clock itself
is good for. On a busy machine that is little, so the share of CPU time inside hooks, by the profiler of Python, stands
below: all that statistics do happens there.
Memory: bytes of everything that usage keeps, and the most bytes of tensors at a time, counted at every operation, of
the same batches 20,000 and 200,000 tokens long.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from interp_plugins.router.coactivation import Coactivation
from interp_plugins.router.reading import read_layers, usage_of
from interp_plugins.router.usage import Usage

import interp_core as ic
from interp_core import sites as S
from interp_core.bench.allocations import peak_bytes


def model_of(device: str, d_model: int, n_layers: int, n_experts: int, top_k: int) -> ic.Model:
    """A Qwen3-MoE of random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=8, num_key_value_heads=2,
        head_dim=d_model // 8, num_experts=n_experts, num_experts_per_tok=top_k, moe_intermediate_size=d_model * 3 // 8,
        norm_topk_prob=True, max_position_embeddings=4096,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return ic.load(Qwen3MoeForCausalLM(config).to(device, dtype).eval(), check=False)


def batches(n_tokens: int, rows: int, width: int) -> Iterator[ic.Tokens]:
    """Texts of random tokens."""
    random = torch.Generator().manual_seed(0)
    for _ in range(n_tokens // (rows * width)):
        ids = torch.randint(3, 1000, (rows, width), generator=random)
        yield ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def timed(device: str, run: Callable[[], object]) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"d_model": 512, "layers": 6, "experts": 64, "top_k": 8, "width": 512, "rows": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(device, options.d_model, options.layers, options.experts, options.top_k)
    (tokens,) = batches(options.rows * options.width, options.rows, options.width)
    last = S.router_logits[options.layers - 1]  # both passes end with the last router

    def plain() -> Any:
        return model.run(tokens, read=last, logits=False)

    def statistical() -> None:
        usage, pairs = Usage(), Coactivation()

        def consume(layer: int, routed: Any, places: Any) -> None:
            usage.add_layer(layer, routed, places.rows, places.n_rows)
            if options.pairs:
                pairs.add_layer(layer, routed)

        read_layers(model, tokens, consume)

    if device == "cpu":
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    plain(), statistical()
    turns = [[timed(device, run) for run in (plain, statistical, plain)] for _ in range(options.repeats)]
    print(f"{device}, one thread, {options.rows} x {options.width} tokens, {vars(options)}")
    print(f"  plain        {1000 * statistics.median(before for before, _, _ in turns):8.1f} ms")
    for name, ratios in {
        "statistics": [2 * observed / (before + after) for before, observed, after in turns],
        "plain again": [after / before for before, _, after in turns],
    }.items():
        low, median, high = (100 * (q - 1) for q in statistics.quantiles(ratios, n=4))
        print(f"  {name:12} {median:+8.1f} % ({low:+.1f} to {high:+.1f}; {options.repeats} turns)")
    if device == "cpu":
        print(f"  in hooks     {100 * in_hooks(statistical, options.repeats):+8.1f} %")
    if not options.no_memory:
        memory()


def in_hooks(run: Callable[[], object], repeats: int) -> float:
    """The share of a run's CPU time that is spent in hooks."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(lambda: [run() for _ in range(repeats)])
    spent = {where: total for where, (_, _, _, total, _) in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    hooks = [total for (path, _, name), total in spent.items() if name == "hook" and path.endswith("ports.py")]
    assert hooks, "no hook was called"
    return sum(hooks) / max(spent.values())


def memory() -> None:
    """Of a small model, so that 200,000 tokens are done in a minute; what is kept does not depend on its width."""
    model = model_of("cpu", 64, 4, 32, 4)
    for n_tokens in (20_000, 200_000):
        kept: dict[str, Usage] = {}
        most = peak_bytes(lambda n=n_tokens, kept=kept: kept.update(usage_of(model, batches(n, 4, 250))))  # type: ignore[misc]
        bytes_kept = sum(usage.nbytes() for usage in kept.values())
        print(f"  {kept['all'].tokens:8,} tokens: {bytes_kept:,} bytes kept, {most:,} bytes of tensors at most")


if __name__ == "__main__":
    main()
