"""RISE and MAS beside a plain loop: python benchmarks/attribution_evaluation.py [rounds] [tokens ...]

A Llama of 8 layers, d_model 512 and 32,000 tokens, random weights; half of the text prompt, half target. The three
vectors of a method that explains a span by one (seq, row, rec: one ordering), and three of different orderings. The
plain loop does what published evaluations do: for every vector 21 whole passes, all logits, log-softmax of all of them.
Both take turns; CPU seconds, the least of all rounds; curves are held against each other. Last column: the share of
positions that a key/value cache of what stands before the first deleted token would save.
"""

from __future__ import annotations

import sys
import time

import torch
from interp_plugins.attribution.evaluation.faithfulness import Faithfulness, faithfulness
from interp_plugins.attribution.evaluation.perturbed import Perturbed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import shortest

import interp_core as ic

VOCABULARY = 32_000


def main(rounds: str = "1", *tokens: str) -> None:
    """Print a row per length and kind of vectors."""
    print("| tokens | vectors | plain loop, CPU s | ours, CPU s | ratio | passes | a pass, CPU s | in passes | cache |")
    print("|---|---|---|---|---|---|---|---|---|")
    for n in tokens or ("256", "512"):
        for line in rise_mas(int(n), int(rounds)):
            print(line, flush=True)


def rise_mas(n: int, rounds: int = 2) -> list[str]:
    """A row for vectors of one ordering and one for vectors of three."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=2,
    )  # fmt: skip
    model = ic.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(3, VOCABULARY, (1, n))
    half = n // 2
    spans = {"prompt": ((ic.Span(4, half - 4),),), "target": ((ic.Span(half, n),),)}
    tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), spans=spans)
    ordering, three = torch.rand(half - 8), torch.rand(3, half - 8)
    lines = []
    for what, weights in (
        ("one ordering", torch.stack([ordering, 2 * ordering, ordering**2])),
        ("three orderings", three),
    ):
        results: dict[str, Faithfulness | Tensor] = {}

        def ours(weights: Tensor = weights, results: dict[str, Faithfulness | Tensor] = results) -> None:
            results["ours"] = faithfulness(Perturbed(model, tokens), weights)

        steps = faithfulness(Perturbed(model, tokens), weights).steps

        def loop(steps: Tensor = steps, results: dict[str, Faithfulness | Tensor] = results) -> None:
            results["loop"] = torch.stack([plain_curve(model, ids, 4, half, vector) for vector in steps])

        one_pass, seconds, plain = shortest(rounds, lambda: model.run(tokens), ours, loop, clock=time.process_time)
        curves, wanted = results["ours"], results["loop"]
        assert isinstance(curves, Faithfulness) and isinstance(wanted, Tensor)
        torch.testing.assert_close(curves.curve, wanted, atol=1e-2, rtol=1e-5)
        lines.append(
            f"| {n} | {what} | {plain:.2f} | {seconds:.2f} | {plain / seconds:.1f} | "
            f"{curves.passes} of {curves.asked} | {one_pass:.3f} | {seconds / one_pass:.1f} | "
            f"{cached(steps, 4, n):.1%} |"
        )
    return lines


def plain_curve(model: ic.Model, ids: Tensor, start: int, target: int, steps: Tensor) -> Tensor:
    """The curve of one vector by whole passes."""
    changed, curve = ids.clone(), []
    for step in range(-1, int(steps.max()) + 1):
        changed[0, start : start + len(steps)][steps == step] = 2
        with torch.no_grad():
            every = model.hf(input_ids=changed, use_cache=False).logits.float().log_softmax(-1)
        curve.append(every[0, target - 1 : -1].gather(-1, ids[0, target:, None]).sum())
    return torch.stack(curve).double()


def cached(steps: Tensor, start: int, n: int) -> float:
    """Mean share of the positions that stand before the first deleted one."""
    place = torch.arange(len(steps[0]))
    first = [start + int(place[row <= step].min()) for row in steps for step in range(int(steps.max()) + 1)]
    return sum(first) / len(first) / n


if __name__ == "__main__":
    main(*sys.argv[1:])
