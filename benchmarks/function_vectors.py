"""Function vectors against the published algorithm: python benchmarks/function_vectors.py [trials] [threads]

8 layers × 16 heads (8 for keys and values), d_model 512, vocabulary 8,192, Llama architecture with random weights;
prompts of 122 tokens with 10 shots in 87 slots, float32. The other side is the published algorithm written down
plainly: hooks on the output projections, one full forward pass per prompt for means, one per layer and head for
indirect effects, two per layer for injection. Both run in one process and take turns, so that what else the machine
does meets both; times are of the processor (of the wall in brackets), by the median call.

The whole recipe is 10 prompts for means, 10 for effects, the vector of 10 heads, and that vector after every layer on
10 prompts without shots and 10 ten-shot ones; each side goes on with what it made. The published side has two
passes per prompt and layer there; its effects are computed for two heads per layer and trial, and their time is scaled
to all heads, so the ten heads are those of this side's effects.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from interp_plugins.function_vectors import (
    FunctionVector,
    Head,
    Prompt,
    average,
    by_layer,
    function_vector,
    indirect_effect,
    mean_head_activations,
    top_heads,
)
from torch import Tensor

import interp_core as ic

LAYERS, HEADS, D_MODEL, VOCAB, TOKENS, SHOTS = 8, 16, 512, 8192, 122, 10
D_HEAD = D_MODEL // HEADS


def prompt(rng: random.Random) -> Prompt:
    """Random tokens in the roles of ten questions and answers; words are as long as it takes to make 122 tokens."""
    roles = ["bos_token"]
    for shot in range(1, SHOTS + 1):
        roles += ["structural_token"] * 2 + [f"demonstration_{shot}_token", "separator_token", "structural_token"]
        roles += ["predictive_token", f"demonstration_{shot}_label_token", "end_of_example_token"]
    roles += ["query_structural_token"] * 2 + ["query_demonstration_token", "query_separator_token"]
    roles += ["query_structural_token", "query_predictive_token"]
    words = [slot for slot, role in enumerate(roles) if "demonstration" in role]
    longer = rng.choices(words, k=TOKENS - len(roles))
    slots = sorted([*range(len(roles)), *longer])
    ids = tuple(rng.randrange(3, VOCAB) for _ in slots)
    return Prompt("", ids, tuple(roles[slot] for slot in slots), tuple(slots), "", (rng.randrange(3, VOCAB),))


def zero_shot(prompt: Prompt) -> Prompt:
    """A prompt without its demonstrations: the BOS and the query."""
    kept = [at for at, role in enumerate(prompt.labels) if role == "bos_token" or role.startswith("query")]
    labels, ids = (tuple(row[at] for at in kept) for row in (prompt.labels, prompt.ids))
    return Prompt("", ids, labels, tuple(range(len(kept))), "", prompt.target_ids)


class Published:
    """The published algorithm, plainly."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.projections = [layer.self_attn.o_proj for layer in hf.model.layers]

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> Tensor:
        return self.hf(torch.tensor([prompt.ids])).logits[0, -1]

    def inputs(self, prompt: Prompt) -> list[Tensor]:
        """What the output projections get."""
        kept: list[Tensor] = []
        hooks = [p.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for p in self.projections]
        self.logits(prompt)
        for hook in hooks:
            hook.remove()
        return kept

    def means(self, prompts: list[Prompt]) -> Tensor:
        n_slots = prompts[0].slots[-1] + 1
        store = torch.zeros(len(prompts), LAYERS, HEADS, n_slots, D_HEAD)
        for number, prompt in enumerate(prompts):
            z = torch.vstack([x.view(1, TOKENS, HEADS, D_HEAD) for x in self.inputs(prompt)]).permute(0, 2, 1, 3)
            for slot in range(n_slots):
                places = [at for at, label in enumerate(prompt.slots) if label == slot]
                store[number, :, :, slot] = z[:, :, places[0] : places[-1] + 1].mean(2)
        return store.mean(0)

    def effect(self, prompt: Prompt, mean: Tensor, layer: int, head: int) -> float:
        """The probability of the answer with one head's mean in place; the caller takes off the clean one."""
        projection, part = self.projections[layer], slice(head * D_HEAD, (head + 1) * D_HEAD)

        def patch(module: Any, args: Any, _: Any) -> Tensor:
            x = args[0].clone()
            x[:, -1, part] = mean[layer, head, -1]
            return x @ module.weight.T

        hook = projection.register_forward_hook(patch)
        logits = self.logits(prompt)
        hook.remove()
        return float(torch.softmax(logits, -1)[prompt.target_ids[0]])

    @torch.no_grad()
    def vector(self, mean: Tensor, heads: Sequence[Head]) -> Tensor:
        total = torch.zeros(D_MODEL)
        for layer, head, _ in heads:
            x = torch.zeros(D_MODEL)
            x[head * D_HEAD : (head + 1) * D_HEAD] = mean[layer, head, -1]
            total += self.projections[layer](x)
        return total

    def injected(self, prompt: Prompt, vector: Tensor, layer: int) -> tuple[float, float]:
        """Log-probability of the answer without the vector, and with it after a layer."""

        def add(_m: Any, _a: Any, out: Any) -> Any:
            stream = out if isinstance(out, Tensor) else out[0]
            stream[:, -1] += vector
            return out

        clean = torch.log_softmax(self.logits(prompt), -1)
        hook = self.hf.model.layers[layer].register_forward_hook(add)
        steered = torch.log_softmax(self.logits(prompt), -1)
        hook.remove()
        return float(clean[prompt.target_ids[0]]), float(steered[prompt.target_ids[0]])


class Clock:
    """Processor and wall time of what is done under a name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name: str, act: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = act()
        self.spent.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))
        return result

    def total(self, name: str, count: int = 1) -> tuple[float, float]:
        """Seconds for so many calls, by the median call."""
        cpu, wall = (statistics.median(column) for column in zip(*self.spent[name], strict=True))
        return cpu * count, wall * count


def whole(model: ic.Model, published: Published, clock: Clock, rng: random.Random) -> dict[str, float]:
    """Both sides of the whole recipe on the clock; how far apart their results are."""
    shown, corrupted, shuffled, others = ([prompt(rng) for _ in range(10)] for _ in range(4))
    questions = {"zero-shot": [zero_shot(trial) for trial in others], "shuffled": shuffled}

    def ours() -> tuple[Any, ...]:
        mean = mean_head_activations(model, shown)
        effects = indirect_effect(model, corrupted, mean)
        heads = top_heads(average(effects), 10)
        vector = function_vector(model, mean, heads)
        answers = {name: by_layer(model, some, vector, "logprob") for name, some in questions.items()}
        return mean, effects, heads, vector, answers

    apart = dict.fromkeys(("means", "effects", "vector", "log-probabilities"), 0.0)

    def compare(stage: str, a: Any, b: Any) -> None:
        apart[stage] = max(apart[stage], float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()))

    mean, effects, heads, vector, injected = clock("whole", ours)
    theirs = clock("whole means", lambda: published.means(shown))
    compare("means", mean, theirs)
    for number, trial in enumerate(corrupted):
        base = clock("whole clean", lambda a=trial: torch.softmax(published.logits(a), -1)[a.target_ids[0]])
        for layer, head in product(range(LAYERS), (number % HEADS, (number + HEADS // 2) % HEADS)):
            patched = clock("whole effects", lambda a=(trial, theirs, layer, head): published.effect(*a))
            compare("effects", effects[number, layer, head], patched - base)
    clock("whole", ours)
    published_vector = clock("whole vector", lambda: published.vector(theirs, heads))
    compare("vector", vector.vector / vector.norm, published_vector / vector.norm)
    for name, layer in product(questions, range(LAYERS)):
        for number, trial in enumerate(questions[name]):
            pair = clock(f"whole {name}", lambda a=(trial, published_vector, layer): published.injected(*a))
            compare("log-probabilities", (injected[name].clean[number], injected[name].values[layer, number]), pair)
    clock("whole", ours)
    calls = {"means": 1, "clean": 10, "effects": 10 * LAYERS * HEADS, "vector": 1}
    calls |= dict.fromkeys(questions, 10 * LAYERS)
    times = [clock.total(f"whole {name}", count) for name, count in calls.items()]
    clock.spent["whole, published"] = [(sum(cpu for cpu, _ in times), sum(wall for _, wall in times))]
    return {**apart, "largest effect": float(effects.abs().max())}


def main(trials: str = "3", threads: str = "1") -> None:
    torch.set_num_threads(int(threads))
    hf = ic.testing.tiny(
        "llama", num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
        hidden_size=D_MODEL, head_dim=D_HEAD, intermediate_size=1376, attention_bias=False, vocab_size=VOCAB,
    )  # fmt: skip
    model, published, clock, rng = ic.load(hf), Published(hf), Clock(), random.Random(0)
    prompts = [prompt(rng) for _ in range(10)]
    vector = FunctionVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)))
    mean_head_activations(model, prompts[:1], batch=1)
    by_layer(model, prompts[:1], vector, "logprob")  # tries the strategy on the model
    rows = []
    for _ in range(5):
        wanted = clock("means, published", lambda: published.means(prompts))
        single = clock("means one by one", lambda: mean_head_activations(model, prompts, batch=1))
        means = clock("means", lambda: mean_head_activations(model, prompts))
    rows.append(("mean activations, 10 prompts", "means", 1, float((means - wanted).abs().max())))
    rows.append(("the same, one per pass", "means one by one", 1, float((single - wanted).abs().max())))
    clock.spent["means one by one, published"] = clock.spent["means, published"]
    mean, some = means, prompts[: int(trials)]
    base = [float(torch.softmax(published.logits(trial), -1)[trial.target_ids[0]]) for trial in some]
    effects = torch.zeros(len(some), LAYERS, HEADS)
    for layer in range(LAYERS):
        here = clock("effects", lambda: indirect_effect(model, some, mean))
        for head, (number, trial) in product(range(HEADS), enumerate(some)):
            patched = clock("effects, published", lambda a=(trial, mean, layer, head): published.effect(*a))
            effects[number, layer, head] = patched - base[number]
    apart, largest = float((here - effects).abs().max()), float(effects.abs().max())
    rows.append((f"indirect effect, {trials} trials", "effects", len(some) * (LAYERS * HEADS + 1), apart))
    steered = torch.zeros(LAYERS, len(some))
    for _, layer in product(range(3), range(LAYERS)):
        here = clock("injection", lambda: by_layer(model, some, vector, "logprob")).values
        for number, trial in enumerate(some):
            pair = clock("injection, published", lambda a=(trial, vector.vector, layer): published.injected(*a))
            steered[layer, number] = pair[1]
    apart = float((here - steered).abs().max())
    rows.append((f"injection at all layers, {trials} prompts", "injection", len(some) * LAYERS, apart))
    parts = whole(model, published, clock, rng)
    most = parts.pop("largest effect")
    rows.append(("whole recipe", "whole", 1, parts["log-probabilities"]))
    print(f"{sum(p.numel() for p in hf.parameters()) / 1e6:.1f} M parameters, {threads} thread(s), {trials} trials\n")
    print("| stage | published, s | here, s | ratio | apart |\n|---|---|---|---|---|")
    for stage, name, count, apart in rows:
        theirs, ours = clock.total(f"{name}, published", count), clock.total(name)
        times = " | ".join(f"{cpu:.3f} ({wall:.3f})" for cpu, wall in (theirs, ours))
        print(f"| {stage} | {times} | {theirs[0] / ours[0]:.2f} ({theirs[1] / ours[1]:.2f}) | {apart:.1g} |")
    print(f"\nlargest effect {largest:.2g}; of the whole recipe {most:.2g}")
    print(f"whole recipe, apart: {', '.join(f'{stage} {far:.1g}' for stage, far in parts.items())}")
    print(f"its published effects: 2 heads of {HEADS} per layer and trial timed, scaled to all")


if __name__ == "__main__":
    main(*sys.argv[1:])
