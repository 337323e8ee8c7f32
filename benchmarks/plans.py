"""How well plans foretell what runs take: python benchmarks/plans.py  (SmolLM2 too, if `make real` has fetched it)

Operations are counted by torch (`FlopCounterMode`) with kernels whose products it counts, bytes are those of all
tensors that operations make (`interp_core.bench.allocations`); weights are left out. Numbers are planned over measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import interp_core as ic
from interp_core import real, testing
from interp_core import sites as S
from interp_core.bench.allocations import peak_bytes
from interp_core.planning import outline_of
from interp_core.planning.formulas import activations, cache, flops

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "vocab_size": 400,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_head": 8, "n_positions": 256, "vocab_size": 400},
    "llama": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | {"num_experts": 8, "moe_intermediate_size": 192},
    "gemma2": SIZES,
}
ROWS, LENGTH, NEW = 2, 96, 12


def texts(rows: int, length: int, d_vocab: int) -> ic.Tokens:
    ids = torch.randint(5, d_vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


class _NoModules:
    """In place of torch's tracker of modules, which cannot follow `torch.autograd.grad`: everything is one module's."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of products of matrices, as torch counts them."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        run()
    return counter.get_total_flops()


class Measured:
    """A model's passes as it runs them, and as they are planned."""

    def __init__(self, model: ic.Model) -> None:
        self.model, self.outline = model, outline_of(model.hf)
        self.tokens = texts(ROWS, LENGTH, model.d_vocab)
        work = self.outline.work(ROWS, LENGTH, batch=ROWS, new_tokens=NEW)
        read = {"read": [S.embed], "grad": torch.sum, "logits": [-1]}
        self.passes: dict[str, tuple[ic.Cost, Callable[[], object]]] = {
            "forward": (work.forward(read_out=LENGTH), lambda: model.run(self.tokens)),
            "backward": (work.forward(backward=1), lambda: model.run(self.tokens, **read)),
            "generation": (
                work.generate(),
                lambda: model.generate(self.tokens, max_new_tokens=NEW, min_new_tokens=NEW),
            ),
        }

    def bytes_of(self, cost: ic.Cost) -> int:
        generated = len(cost.passes) > 1
        return max(activations(self.outline, p) + generated * cache(self.outline, p) for p in cost.passes)

    def memory(self) -> dict[str, float]:
        """Planned over measured bytes of tensors, weights left out."""
        return {name: self.bytes_of(cost) / peak_bytes(run) for name, (cost, run) in self.passes.items()}

    def operations(self) -> dict[str, float]:
        """Planned over counted operations."""
        planned = {name: sum(flops(self.outline, p).total for p in c.passes) for name, (c, _) in self.passes.items()}
        return {name: planned[name] / operations(run) for name, (_, run) in self.passes.items()}


ATTRIBUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "IFR, a span": ("ifr", {"variant": "span"}), "IFR, rows": ("ifr", {"variant": "all_positions"}),
    "IFR, two hops": ("ifr", {"n_hops": 2}), "AttnLRP": ("attnlrp", {}),
    "AttnLRP, rows": ("attnlrp", {"variant": "per_token"}), "gradient": ("input_x_gradient", {}),
}  # fmt: skip


def attributed(model: ic.Model, name: str, length: int, target: int) -> tuple[int, int, int]:
    """Operations of an attribution of one text: planned of its passes, planned beside them, and counted."""
    method, settings = ATTRIBUTIONS[name]
    ready, outline = ic.method(method), outline_of(model.hf)
    tokens = texts(1, length, min(900, model.d_vocab))
    tokens = tokens.name(prompt=ic.Span(0, length - target), target=ic.Span(length - target, length))
    cost = ready.configured(settings).cost(outline.work(1, length, target=target))
    ready(model, tokens, **settings)  # what is done once per model is done here
    counted = operations(lambda: ready(model, tokens, **settings))
    return sum(flops(outline, each).total for each in cost.passes), cost.beside, counted


def models() -> Iterator[tuple[str, Any]]:
    """Tiny models of each family, and the real one where it is."""
    for family, settings in FAMILIES.items():
        yield family, testing.tiny(family, **settings)
    if real.place().is_dir():
        yield real.NAME, ic.load(real.NAME).hf


def one_by_one(hf: Any, name: str) -> dict[str, float]:
    """Operations with experts that run one by one, whose products torch counts."""
    if "moe" not in name:
        return Measured(ic.load(hf)).operations()
    hf.set_experts_implementation("eager")
    try:
        return Measured(ic.load(hf)).operations()
    finally:
        hf.set_experts_implementation("grouped_mm")


def main() -> None:
    print("| model | attention | operations: forward, backward, generation | bytes: forward, backward, generation |")
    print("|---|---|---|---|")
    for name, hf in models():
        for attention in ("eager",) if name == "gemma2" else ("sdpa", "eager"):
            hf.set_attn_implementation(attention)
            counted = "(products that torch does not count)"
            if attention == "eager":
                counted = ", ".join(f"{ratio:.3f}" for ratio in one_by_one(hf, name).values())
            held = ", ".join(f"{ratio:.2f}" for ratio in Measured(ic.load(hf)).memory().values())
            print(f"| {name} | {attention} | {counted} | {held} |")
    print("\n| planned over counted | passes alone | with what is beside them |\n|---|---|---|")
    for source in ("toy:text", *([real.NAME] if real.place().is_dir() else [])):
        model = ic.load(source)
        model.hf.set_attn_implementation("eager")
        model = ic.load(model.hf, tokenizer=model.tokenizer)
        for length, target in ((20, 5), (200, 20)):
            for name in ATTRIBUTIONS if len(model.layers(S.z)) < 10 else list(ATTRIBUTIONS)[:3]:
                passes, beside, counted = attributed(model, name, length, target)
                row = f"{source}, {length} tokens: {name}"
                print(f"| {row} | {passes / counted:.2f} | {(passes + beside) / counted:.2f} |")


if __name__ == "__main__":
    main()
