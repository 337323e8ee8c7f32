"""What attribution costs, beside a plain pass and the published packages: python benchmarks/attribution.py PART [N …]

    span     span and multi-hop IFR: one hop, three hops
    all      all positions: exact, and with a tolerance
    lrp      AttnLRP of a span, and a row per token of the target
    length   one hop, all positions and AttnLRP per token, at every length

8 layers, d_model 512 (`--width`), 8 heads of which 2 have keys and values, random weights, float32 (`--dtype`), one
thread; half of the tokens are the prompt, half the target, whose last 16 are explained. Calls take turns in one
process, and the shortest of all rounds counts, in CPU seconds (on a CUDA device by the clock); the unit is one plain
sdpa pass over the same tokens that keeps the last logits. `--memory` adds the most bytes that tensors took at a time.
`length` draws seconds and bytes against the number of tokens (`--png FILE`), beside the published seconds where their
file is given (`--published efficiency.json` of FlashTrace's repository: 8B on six GPUs, against generated tokens).
`flashtrace` and `lxt` are measured where they are installed (`pip install flashtrace lxt`; they are no dependency):
flashtrace needs eager attention, so it has a second model with the same weights. Where a CUDA device is at hand:
`--device cuda --dtype bfloat16 --width 2048 5000`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from turns import shortest

import interp_core as ic
from interp_core.bench.allocations import peak_bytes
from interp_core.testing import tiny
from interp_core.toys import text as toy

SINK = 16
Calls = dict[str, Callable[[], object]]


class Setting:
    """A model, a second one with eager attention and the same weights, and a text of so many tokens."""

    def __init__(self, n_tokens: int, *, width: int = 512, device: str = "cpu", dtype: str = "float32") -> None:
        self.size = {
            "num_hidden_layers": 8, "hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": width // 8, "intermediate_size": 3 * width, "vocab_size": 1500, "attention_bias": False,
            "max_position_embeddings": 2 * n_tokens + 16,
        }  # fmt: skip
        self.place = {"device": device, "dtype": getattr(torch, dtype)}
        tokenizer = toy.build_tokenizer()
        self.hf = tiny("llama", **self.size).to(**self.place)
        self.model = ic.load(self.hf, tokenizer=tokenizer)
        words = [f" {word}" for word in toy.words()]
        chosen = [words[i * 7 % len(words)] for i in range(n_tokens - 1)]
        half = n_tokens // 2
        self.prompt, self.target = "".join(chosen[:half]), "".join(chosen[half:])
        texts = [tokenizer(text)["input_ids"] for text in (self.prompt, self.target)]
        ids = torch.tensor([[*texts[0], *texts[1], tokenizer.eos_token_id]])
        n = ids.shape[1]
        if n != n_tokens:
            raise SystemExit(f"the text has {n} tokens, not {n_tokens}")
        spans = {
            "prompt": ((ic.Span(0, half),),), "target": ((ic.Span(half, n),),),
            "sink": ((ic.Span(n - 1 - SINK, n - 1),),), "thinking": ((ic.Span(half, n - 1 - SINK),),),
        }  # fmt: skip
        self.tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool), spans=spans)
        gen = n - half
        self.sink, self.thinking = (gen - 1 - SINK, gen - 2), (0, gen - 2 - SINK)

    @cached_property
    def eager(self) -> Any:
        """The same model for those who need attention maps."""
        return tiny("llama", attn_implementation="eager", **self.size).to(**self.place)

    def plain(self) -> object:
        """One pass without anything."""
        with torch.no_grad():
            return self.hf(input_ids=self.tokens.ids.to(self.hf.device), use_cache=False, logits_to_keep=1)

    def ours(self, name: str, **settings: Any) -> Callable[[], object]:
        """A call of one of our methods."""
        return lambda: ic.method(name)(self.model, self.tokens, **settings)

    def flashtrace(self, kind: str, call: str, *, sink_chunk_tokens: int = 32, **settings: Any) -> Calls:
        """A call of theirs; none where the package is missing."""
        if importlib.util.find_spec("flashtrace") is None:
            return {}
        module = importlib.import_module("flashtrace.improved" if kind.endswith("Both") else "flashtrace.attribution")
        options = {} if "LRP" in kind else {"sink_chunk_tokens": sink_chunk_tokens}
        engine = getattr(module, kind)(self.eager, self.model.tokenizer, **options)
        return {f"flashtrace {call}": lambda: getattr(engine, call)(self.prompt, target=self.target, **settings)}


def span(at: Setting) -> Calls:
    """Span and multi-hop IFR."""
    both = {"sink_span": at.sink, "thinking_span": at.thinking}
    calls = {"span": at.ours("ifr", variant="span")}
    for variant in ("multi_hop", "multi_hop_both"):
        for hops in (1, 3):
            calls[f"{variant}, {hops} hops"] = at.ours("ifr", variant=variant, n_hops=hops)
    calls |= at.flashtrace("LLMIFRAttribution", "calculate_ifr_span", span=at.sink)
    for hops in (1, 3):
        theirs = at.flashtrace("LLMIFRAttributionBoth", "calculate_ifr_multi_hop_both", n_hops=hops, **both)
        calls |= {f"{name}, {hops} hops": call for name, call in theirs.items()}
    return calls


def every(at: Setting) -> Calls:
    """All positions."""
    calls = {"all_positions": at.ours("ifr", variant="all_positions")}
    for tolerance in (5e-4, 5e-3):
        calls[f"all_positions, {tolerance:g}"] = at.ours("ifr", variant="all_positions", tolerance=tolerance)
    theirs = at.flashtrace("LLMIFRAttribution", "calculate_ifr_for_all_positions", sink_chunk_tokens=1)
    return calls | theirs


def lrp(at: Setting) -> Calls:
    """AttnLRP of a span, and per token."""

    def gradient() -> object:
        embed = at.hf.get_input_embeddings()(at.tokens.ids.to(at.hf.device)).detach().requires_grad_()
        logits = at.hf(inputs_embeds=embed, use_cache=False, logits_to_keep=SINK + 2).logits
        return torch.autograd.grad(logits[0, :SINK, 0].sum(), embed)

    calls = {
        "plain forward and backward": gradient,
        "attnlrp span": at.ours("attnlrp", variant="hop0"),
        "attnlrp per token": at.ours("attnlrp", variant="per_token"),
    }
    if importlib.util.find_spec("lxt") is not None:
        calls["lxt span"] = lambda: _lxt(at, gradient)
    return calls


def _lxt(at: Setting, gradient: Callable[[], object]) -> object:
    with lxt_rules():
        return gradient()


@contextmanager
def lxt_rules() -> Iterator[None]:
    """LXT's patches of Llama's classes, undone at the end (LXT itself cannot). Its modules for models that this
    transformers, or this machine without torchvision, does not have are left out."""
    for name, patched in (("bert", "modeling_bert"), ("vit_torch", "vision_transformer")):
        module = types.ModuleType(f"lxt.efficient.models.{name}")
        module.__dict__.update({"attnLRP": {}, "cp_LRP": {}, patched: types.ModuleType(patched)})
        sys.modules.setdefault(module.__name__, module)
    from lxt.efficient import monkey_patch
    from transformers.models.llama import modeling_llama

    class Interface(dict[str, Any]):
        """What LXT puts in the place of transformers' attention functions, asked as transformers 5 asks them."""

        def get_interface(self, name: str, default: Any) -> Any:
            return self.get(name, default)

    owners = [modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm, torch.nn.Dropout, modeling_llama]
    before = [dict(vars(owner)) for owner in owners]
    try:
        monkey_patch(modeling_llama, verbose=False)
        modeling_llama.ALL_ATTENTION_FUNCTIONS = Interface(modeling_llama.ALL_ATTENTION_FUNCTIONS)
        yield
    finally:
        for owner, names in zip(owners, before, strict=True):
            for name in set(vars(owner)) - set(names):
                delattr(owner, name)
            for name, value in names.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)


def measured(calls: Calls, at: Setting, rounds: int, *, memory: bool) -> list[tuple[str, float, float]]:
    """Print a row per call, in plain passes; gives names, seconds and MiB (0 where they were not asked for)."""
    every = {"plain pass": at.plain, **calls}
    cuda = at.hf.device.type == "cuda"
    waited = [partial(_waited, call) for call in every.values()] if cuda else list(every.values())
    seconds = shortest(rounds, *waited, clock=time.perf_counter if cuda else time.process_time)
    print(f"| {at.tokens.ids.shape[1]} tokens | s | of a plain pass |" + (" MiB above the model |" if memory else ""))
    print("|---|---|---|" + ("---|" if memory else ""))
    rows = []
    for (name, call), took in zip(every.items(), seconds, strict=True):
        size = peak_bytes(call) / 2**20 if memory else 0.0
        more = f" {size:.0f} |" if memory else ""
        print(f"| {name} | {took:.3f} | {took / seconds[0]:.2f} |{more}", flush=True)
        rows.append((name, took, size))
    return rows


def _waited(call: Callable[[], object]) -> None:
    """A call until the CUDA device has done all of it."""
    call()
    torch.cuda.synchronize()


def draw(rows: dict[str, dict[int, tuple[float, float]]], published: str | None, path: str) -> None:
    """Seconds and MiB against the number of tokens, all axes logarithmic; ours solid, theirs dashed."""
    import matplotlib.pyplot as plt

    panels = ["seconds, here", "MiB above the model, here"] + ["published seconds: 8B, six GPUs"] * bool(published)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained")
    for name, points in rows.items():
        style = "--" if name.startswith(("flashtrace", "lxt")) else "-"
        for axis, number in zip(axes, (0, 1), strict=False):
            axis.loglog(list(points), [p[number] for p in points.values()], style, marker="o", ms=3, label=name)
    if published:
        curves = json.loads(Path(published).read_text())
        for name in ("FlashTrace", "IFR", "AttnLRP"):
            axes[-1].loglog(
                curves["lengths"], curves["series"]["time_generation_seconds"][name], "--o", ms=3, label=name
            )
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("generated tokens" if "published" in title else "tokens")
        if "published" not in title:
            known = sorted({n for points in rows.values() for n in points})
            axis.set_xticks(known, [f"{n:,}" for n in known])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=80)


def length(at: Setting) -> Calls:
    """What the published curves show, as far as it takes less than minutes."""
    n = at.tokens.ids.shape[1]
    calls = {"one hop": at.ours("ifr", variant="multi_hop_both", n_hops=1)}
    calls["all positions"] = at.ours("ifr", variant="all_positions")
    both = {"sink_span": at.sink, "thinking_span": at.thinking, "n_hops": 1}
    theirs = at.flashtrace("LLMIFRAttributionBoth", "calculate_ifr_multi_hop_both", **both)
    calls |= dict(zip(["flashtrace one hop"], theirs.values(), strict=False))
    if n <= 256:
        calls["AttnLRP per token"] = at.ours("attnlrp", variant="per_token")
    if n <= 512:
        theirs = at.flashtrace("LLMIFRAttribution", "calculate_ifr_for_all_positions", sink_chunk_tokens=1)
        calls |= dict(zip(["flashtrace all positions"], theirs.values(), strict=False))
    return calls


PARTS: dict[str, Callable[[Setting], Calls]] = {"span": span, "all": every, "lrp": lrp, "length": length}


def main() -> None:
    """Measure one part at the lengths asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS])
    parser.add_argument("tokens", nargs="*", type=int, default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also the most bytes that tensors took at a time")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--png", help="also draw seconds and bytes against tokens")
    parser.add_argument("--published", help="file of published curves to draw beside them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn: dict[str, dict[int, tuple[float, float]]] = {}
    for n in options.tokens:
        at = Setting(n, width=options.width, device=options.device, dtype=options.dtype)
        rows = measured(PARTS[options.part](at), at, options.rounds, memory=options.memory or bool(options.png))
        for name, seconds, size in rows:
            drawn.setdefault(name, {})[n] = seconds, size
        print()
    if options.png:
        draw(drawn, options.published, options.png)


if __name__ == "__main__":
    main()
