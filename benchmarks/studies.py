"""Patching studies, side by side with loops by hand: python benchmarks/studies.py ranking | time [threads]

ranking: how attribution patching ranks patches against the exact sweep, on the toy: 16 pairs of prompts, antonyms
         against French translations of the same words; mean over the pairs of Pearson and Spearman correlation over all
         patches, and of the share of the 10 strongest that both name.
time:    Llama architecture, 12 layers × 12 heads, d_model 768, random weights, 96 tokens, float32: each study against
         full forward passes with hooks written by hand (timed on a part and scaled up; the numbers are compared).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import interp_core as ic

LAYERS, HEADS, D_MODEL, D_HEAD, D_MLP, TOKENS = 12, 12, 768, 64, 2048, 96
TARGET, OTHER, TIMED, DRAWS = 5, 9, 8, 8


def main(what: str = "ranking", threads: str = "2") -> None:
    """Print a table."""
    torch.set_num_threads(int(threads))
    ranking() if what == "ranking" else times(int(threads))


def pairs(n: int = 16) -> tuple[list[str], list[str]]:
    """Prompts of the toy that differ in their relation only."""
    from interp_core.toys.text import relation_example, relations

    tables, pick = relations(), random.Random(0)
    words = [word for word in tables["antonym"] if tables["antonym"][word] != tables["french"][word]]
    seeds = {word: pick.randrange(1 << 30) for word in pick.sample(words, n)}
    clean, french = (
        [relation_example(random.Random(s), relation, 3, word).prompt for word, s in seeds.items()]
        for relation in ("antonym", "french")
    )
    return clean, french


def ranking() -> None:
    """Every way of attribution patching on heads, streams and MLPs."""
    model, (clean, french) = ic.load("toy:text"), pairs()
    lengths = model.tokens(clean).lengths
    keep = [i for i, n in enumerate(lengths) if n == max(set(lengths), key=lengths.count)]
    clean, french = [clean[i] for i in keep], [french[i] for i in keep]
    print(
        f"| {len(keep)} pairs of prompts | patches | | Pearson | Spearman | 10 strongest |\n|---|---|---|---|---|---|"
    )
    for site, at in (("z", -1), ("z", "each"), ("resid_pre", "each"), ("mlp_out", "each")):
        for steps, along in ((0, "inputs"), (8, "inputs"), (8, "activations")):
            patching = ic.method("attribution_patching")(
                model, clean, corrupted=french, site=site, at=at, steps=steps, along=along, compare=True
            )
            numbers = [patching.pearson, patching.spearman, patching.overlap]
            shown = " | ".join(f"{float(x.mean()):.2f}" for x in numbers)
            how = f"{steps} steps along the {along}" if steps else "gradient"
            print(f"| `{site}`, at={at!r} | {patching.effect[0].numel()} | {how} | {shown} |")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def times(threads: int) -> None:
    """Every study against its loop."""
    hf = ic.testing.tiny(
        "llama", num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=D_MODEL,
        head_dim=D_HEAD, intermediate_size=D_MLP, attention_bias=False, vocab_size=32000,
    )  # fmt: skip
    model, pick = ic.load(hf), torch.Generator().manual_seed(0)
    clean, other = (_tokens(torch.randint(3, 32000, (1, TOKENS), generator=pick)) for _ in range(2))
    reference = _tokens(torch.randint(3, 32000, (DRAWS, TOKENS), generator=pick))
    hand = ByHand(hf, clean.ids, other.ids)
    fixed = {"corrupted": other, "answer": TARGET, "other": OTHER, "direction": "noising"}
    queries = f"q[{LAYERS - 1}]"
    studies: list[tuple[str, str, dict[str, Any], Callable[[int, int, int], Tensor]]] = [
        ("every head at the last position", "activation_patching", fixed, lambda at, head, _: hand.patched(at, head)),
        ("the same by 8 resampled prompts", "ablations", {
            "kind": "resample", "reference": reference, "score": "logit_diff", "answer": TARGET, "other": OTHER,
        }, lambda at, head, _: hand.resampled(at, head, reference.ids)),
        ("paths from every head to the logits", "path_patching", fixed | {"at": -1},
         lambda at, head, _: hand.path(at, head, None)),
        ("paths from every head to the queries of the last layer", "path_patching",
         fixed | {"at": -1, "receivers": queries}, lambda at, head, end: hand.path(at, head, end)),
    ]  # fmt: skip
    ic.method("activation_patching")(model, clean, layers=[0])  # tries the sweep on the model
    print(f"| {threads} threads | variants | s | by hand, s | ratio |\n|---|---|---|---|---|")
    for title, name, settings, alone in studies:
        ours, study = timed(lambda name=name, settings=settings: ic.method(name)(model, clean, **settings))
        effect, base = study.effect[0], study.base[0]
        scale = study.source[0] - base if "corrupted" in settings else 1.0
        count = effect.numel() * (DRAWS if name == "ablations" else 1)
        chosen = [divmod(n, HEADS) for n in range(0, (LAYERS - 1) * HEADS, (LAYERS - 1) * HEADS // TIMED)]
        seconds = 0.0
        for at, head in chosen:
            end = (at + head) % HEADS if queries in settings.values() else 0
            seconds_each, value = timed(lambda at=at, head=head, end=end, alone=alone: alone(at, head, end))
            mine = effect[at * HEADS + head, end] if name == "path_patching" else effect[at, head, 0]
            wanted, seconds = (value - base) / scale, seconds + seconds_each
            assert torch.allclose(mine, wanted, atol=2e-5 * float(1 + 1 / abs(scale))), (title, mine, wanted)
        per = seconds / len(chosen) / (DRAWS if name == "ablations" else 1)
        print(f"| {title} | {count:,} | {ours:.2f} | {per * count:.1f} | {per * count / ours:.0f} |")
    for title, settings in (("every head", {}), ("every stream", {"site": "resid_pre"})):
        ours, study = timed(
            lambda settings=settings: ic.method("attribution_patching")(model, clean, at="each", **fixed, **settings)
        )
        seconds_each = timed(lambda: hand.run([]))[0]
        count = study.effect.numel()
        print(
            f"| {title} at every position, by gradient | {count:,} | {ours:.2f} | {seconds_each * count:.0f} "
            f"| {seconds_each * count / ours:,.0f} |"
        )


def _tokens(ids: Tensor) -> ic.Tokens:
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


class ByHand:
    """Full forward passes with PyTorch hooks."""

    def __init__(self, hf: Any, base: Tensor, source: Tensor) -> None:
        self.hf, self.base, self.layers = hf, base, hf.model.layers
        self.values = [self._kept(ids) for ids in (base, source)]

    def _kept(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        z: list[Tensor] = []
        mlp: list[Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: z.append(args[0])) for layer in self.layers
        ]
        hooks += [layer.mlp.register_forward_hook(lambda _, args, out: mlp.append(out)) for layer in self.layers]
        with torch.no_grad():
            self.hf(ids, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        return z, mlp

    def run(self, hooks: list[Callable[[], Any]]) -> Tensor:
        """The score of the base run with hooks."""
        with ExitStack() as stack, torch.no_grad():
            for register in hooks:
                handle = register()
                stack.callback(handle.remove)
            logits = self.hf(self.base, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits[TARGET] - logits[OTHER]

    def z(self, at: int, head: int, value: Tensor, rest: Tensor | None = None) -> Callable[[], Any]:
        """A hook that sets a head at the last position."""

        def hook(_: Any, args: Any) -> Any:
            x = (args[0] if rest is None else rest).clone()
            x[:, -1, head * D_HEAD : (head + 1) * D_HEAD] = value[:, -1, head * D_HEAD : (head + 1) * D_HEAD]
            return (x, *args[1:])

        return lambda: self.layers[at].self_attn.o_proj.register_forward_pre_hook(hook)

    def patched(self, at: int, head: int) -> Tensor:
        return self.run([self.z(at, head, self.values[1][0][at])])

    def resampled(self, at: int, head: int, reference: Tensor) -> Tensor:
        if not hasattr(self, "reference"):
            self.reference = [self._kept(row[None])[0] for row in reference]
        return torch.stack([self.run([self.z(at, head, z[at])]) for z in self.reference]).mean()

    def path(self, at: int, head: int, end: int | None) -> Tensor:
        """Two passes: everything frozen but the sender, then the receiver changed alone."""
        (z, mlp), (sent, _) = self.values
        hooks = [self.z(i, head, sent[i] if i == at else z[i], z[i]) for i in range(LAYERS)]
        hooks += [
            lambda i=i: self.layers[i].mlp.register_forward_hook(lambda _, args, out: mlp[i]) for i in range(LAYERS)
        ]
        if end is None:
            return self.run(hooks)
        part, held, last = slice(end * D_HEAD, (end + 1) * D_HEAD), [], self.layers[-1].self_attn.q_proj
        self.run([*hooks, lambda: last.register_forward_hook(lambda _, args, out: held.append(out))])

        def received(_: Any, args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[..., part] = held[0][..., part]
            return new

        return self.run([lambda: last.register_forward_hook(received)])


if __name__ == "__main__":
    main(*sys.argv[1:])
