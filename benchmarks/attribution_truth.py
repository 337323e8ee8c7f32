"""Do attribution methods find what an answer rests on? python benchmarks/attribution_truth.py toy [N]

    toy [N]          `toy:text`: a value behind 0, 1 and 2 aliases; gold are the value and the aliases
    steps [N]        the same, where the aliases stand in the target, as written reasoning
    real FILE …      SmolLM2-135M-Instruct on caches that the recipe `build_cache` made
    published FILE … the same caches in the profile `reference`, beside `flashtrace` and `lxt` where they are installed

Prompts are drawn once for all methods: as many chains as the toy was trained with, among them those where 10 % of the
prompt's tokens hold all gold tokens, and that the model answers right. Tables have means over prompts with 95 %
bootstrap intervals, of localisation and of faithfulness; "above chance" is paired: Recovery@10 % less what random
weights have on the same prompt on average. `--png FILE` draws Recovery@10 % with two hops, or of the last cache.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attribution import lxt_rules
from interp_plugins.attribution.data.cache import Example, Profile, example_tokens, load_examples
from interp_plugins.attribution.evaluation.areas import areas
from interp_plugins.attribution.evaluation.comparing import compare
from interp_plugins.attribution.evaluation.faithfulness import faithfulness
from interp_plugins.attribution.evaluation.perturbed import Perturbed
from interp_plugins.attribution.evaluation.recovery import chance, recovery, top_count
from torch import Tensor

import interp_core as ic
from interp_core.toys import text as toy

MOST_CHAINS = {0: 8, 1: 5, 2: 4}
"""By hops, as in the toy's training."""
METRICS = {
    "recovery": "Recovery@10 %", "above chance": "above chance", "rank_auc": "rank AUC", "mass": "mass on gold",
    "first": "on first token", "RISE": "RISE", "MAS": "MAS", "deletion AUC": "deletion AUC", "seconds": "s",
}  # fmt: skip
WITH_INTERVAL = ("recovery", "above chance", "deletion AUC")

Methods = Mapping[str, tuple[str, Mapping[str, Any]]]
FLOWS_AND_GRADIENTS: Methods = {
    "ifr span": ("ifr", {"variant": "span"}),
    "attnlrp": ("attnlrp", {}),
    "attnlrp, cp_lrp": ("attnlrp", {"rules": "cp_lrp"}),
    "attnlrp, pa_lrp": ("attnlrp", {"rules": "pa_lrp"}),
    "input_x_gradient": ("input_x_gradient", {}),
    "integrated_gradients": ("integrated_gradients", {}),
}
LEAVE_OUT = ("leave_out", {"target_scale": "logit"})
METHODS: Methods = {
    **FLOWS_AND_GRADIENTS,
    "attnlrp, against another value": ("attnlrp", {"against": "other"}),
    "ifr_routes": ("ifr_routes", {}),
    "attention_rollout": ("attention_rollout", {}),
    "leave_out": ("leave_out", {}),
    "leave_out, logit": LEAVE_OUT,
    "leave_out, logit, mask": ("leave_out", {"target_scale": "logit", "convention": "mask"}),
    "surrogate, words": ("surrogate", {"units": "word", "convention": "replace", "ablations": 128}),
    "random": ("random_attribution", {}),
    "ifr span, reference": ("ifr", {"variant": "span", "profile": "reference"}),
}


THROUGH: Methods = {
    "ifr span": ("ifr", {"variant": "span"}),
    **{
        f"ifr multi_hop, {hops} {'hop' if hops == 1 else 'hops'}, {at}": (
            "ifr", {"variant": "multi_hop", "n_hops": hops, "read_at": at}
        )
        for at in ("predictors", "tokens") for hops in (1, 2, 3)
    },
    "ifr multi_hop_both, hop0 sink, 2 hops, tokens": (
        "ifr", {"variant": "multi_hop_both", "hop0": "sink", "n_hops": 2, "read_at": "tokens"}
    ),
    "ifr multi_hop_split_hop, 2, tokens": ("ifr", {"variant": "multi_hop_split_hop", "n_hops": 2, "read_at": "tokens"}),
    "ft_attnlrp, 2 hops": ("attnlrp", {"variant": "multi_hop", "n_hops": 2}),
    "attnlrp": ("attnlrp", {}),
    "input_x_gradient": ("input_x_gradient", {}),
    "leave_out, logit": LEAVE_OUT,
    "random": ("random_attribution", {}),
    "ifr multi_hop, 2 hops, reference": ("ifr", {"variant": "multi_hop", "n_hops": 2, "profile": "reference"}),
}  # fmt: skip
"""Through written reasoning."""
REAL: Methods = {
    "ifr span": ("ifr", {"variant": "span"}),
    "ifr multi_hop, 1 hop, predictors": ("ifr", {"variant": "multi_hop", "read_at": "predictors"}),
    "ifr multi_hop, 1 hop, tokens": ("ifr", {"variant": "multi_hop", "read_at": "tokens"}),
    "ifr multi_hop_both, 1 hop": ("ifr", {"variant": "multi_hop_both"}),
    "ifr multi_hop_both, 1 hop, predictors": ("ifr", {"variant": "multi_hop_both", "read_at": "predictors"}),
    "attnlrp": ("attnlrp", {}),
    "attnlrp, cp_lrp": ("attnlrp", {"rules": "cp_lrp"}),
    "ft_attnlrp, 1 hop": ("attnlrp", {"variant": "multi_hop"}),
    "input_x_gradient": ("input_x_gradient", {}),
    "leave_out, sentences": ("leave_out", {"units": "sentence", "target_scale": "logit"}),
    "integrated_gradients, 8 steps": ("integrated_gradients", {"steps": 8, "batch_tokens": 512}),
    "surrogate, sentences": ("surrogate", {}),
    "random": ("random_attribution", {}),
    "ifr span, reference": ("ifr", {"variant": "span", "profile": "reference"}),
}
DEAR = ("leave_out, sentences", "integrated_gradients, 8 steps", "surrogate, sentences")
"""Of `REAL` what takes minutes per prompt."""
PUBLISHED = (
    ("ifr span", "ifr", {"variant": "span"}),
    ("ifr multi_hop_both", "ifr", {"variant": "multi_hop_both", "n_hops": 1}),
    ("attnlrp", "attnlrp", {}),
)


class Prompt(NamedTuple):
    """A prompt with its answer as target.

    Attributes:
        gold: the tokens that the answer rests on, as indices into the prompt's.
        other: the value of another chain.
    """

    tokens: ic.Tokens
    gold: tuple[int, ...]
    other: str = ""


def answered(model: ic.Model, tokens: ic.Tokens) -> bool:
    """Whether the model itself says the last token."""
    last = tokens.lengths[0] - 1
    return int(model.run(tokens, logits=[last - 1]).logits[0, 0].argmax()) == int(tokens.ids[0, last])


def needles(model: ic.Model, hops: int, count: int, seed: int = 0) -> list[Prompt]:
    """Questions about a value behind so many aliases."""
    rng, out = random.Random(seed), list[Prompt]()
    while len(out) < count:
        drawn = toy.needle_example(rng, rng.randint(2, MOST_CHAINS[hops]), hops)
        tokens = model.tokens(drawn.prompt, target=drawn.answer)
        size = tokens.lengths[0] - 1
        gold = tuple(tokens.find(chars).start for name, chars in drawn.evidence.items() if name != "query")
        if top_count(size, 0.1) >= len(gold) and answered(model, tokens):
            labels = tokens.labels[0][:size]
            others = [label for label in labels if label.strip().isdigit() and label != drawn.answer]
            out.append(Prompt(tokens, gold, others[0]))
    return out


def written(model: ic.Model, hops: int, count: int, chains: int = 5, seed: int = 0) -> list[Prompt]:
    """Values in the prompt, the aliases in the target: `VAR V3 84.` … and then `VAR V7 V3.` `? V7 84`.

    The aliases' statements are the span `thinking`, the value is the sink; gold is the value where it is stated.
    """
    rng, out = random.Random(seed), list[Prompt]()
    while len(out) < count:
        names, values = rng.sample(toy.NAMES, chains + hops), rng.sample(toy.NUMBERS, chains)
        chain = rng.randrange(chains)
        way = [names[chain], *names[chains:]]
        steps = "".join(f"VAR {name} {before}.\n" for before, name in pairwise(way))
        facts = "".join(f"VAR {name} {value}.\n" for name, value in zip(names, values, strict=False))
        tokens = model.tokens(facts, target=f"{steps}? {way[-1]} {values[chain]}")
        start, last = 4 * chains, tokens.lengths[0] - 1
        if answered(model, tokens):
            spans = {"thinking": ((ic.Span(start, start + 4 * hops),),), "sink": ((ic.Span(last, last + 1),),)}
            out.append(Prompt(replace(tokens, spans={**tokens.spans, **spans}), (4 * chain + 2,)))
    return out


def scored(model: ic.Model, prompt: Prompt, method: str, settings: Mapping[str, Any]) -> Any:
    """What a method says."""
    own = {key: prompt.other if value == "other" else value for key, value in settings.items()}
    return ic.method(method)(model, prompt.tokens, **own)


def found(result: Any, prompt: Prompt) -> float:
    """Recovery@10 %."""
    return float(recovery(_weights(result, prompt), prompt.gold).recovery[0])


def by_chance(prompt: Prompt) -> float:
    """Recovery@10 % of random weights, on average."""
    return chance(len(prompt.tokens.columns("prompt")[0]))


def _weights(result: Any, prompt: Prompt) -> Tensor:
    """Scores of the prompt's tokens."""
    return result.scores[0, list(prompt.tokens.columns("prompt")[0])].double()


def rows_of(
    model: ic.Model, prompts: Sequence[Prompt], methods: Methods, *, steps: int = 20, with_areas: bool = True
) -> list[dict[str, Any]]:
    """A row per prompt and method; negative weights count as none, as in published evaluations.

    Args:
        steps: of deletion curves; 0: none.
        with_areas: also the areas that keep the curve's sign, which take as many passes again.
    """
    rows = list[dict[str, Any]]()
    for number, prompt in enumerate(prompts):
        weights, more = list[Tensor](), list[dict[str, Any]]()
        for method, settings in methods.values():
            began = time.perf_counter()
            result = scored(model, prompt, method, settings)
            more.append({"seconds": time.perf_counter() - began, "first": float(result.first_share[0])})
            weights.append(_weights(result, prompt))
        signed, text = torch.stack(weights), Perturbed(model, prompt.tokens)
        positive, names = signed.clamp(min=0), tuple(methods)
        place = recovery(signed, prompt.gold, names=names)
        tables = [place.table()]
        tables += [faithfulness(text, positive, names=names, steps=steps).table()] if steps else []
        tables += [areas(text, positive).table()] if with_areas else []
        for name, own, *parts in zip(names, more, *tables, strict=True):
            row = {key: value for part in parts for key, value in part.items()}
            above = row["recovery"] - place.chance
            rows.append({"example": number, "method": name, "form": "", **row, **own, "above chance": above})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    shown = [metric for metric in METRICS if metric in rows[0]]
    lines = ["| method | " + " | ".join(METRICS[m] for m in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    cells = dict[str, list[str]]()
    for line in compare(rows, shown):
        ends = f" ({line['low']:.2f} … {line['high']:.2f})" if line["metric"] in WITH_INTERVAL else ""
        cells.setdefault(line["method"], []).append(f"{line['mean']:.2f}{ends}")
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(numbers) + " |" for name, numbers in cells.items())])


def draw(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], title: str, path: Path) -> None:
    """Recovery@10 % of methods, without further variants of the same."""
    level = sum(map(by_chance, prompts)) / len(prompts)
    series = dict[str, list[float]]()
    for row in rows:
        if not row["method"].endswith(("another value", "mask", "words")):
            series.setdefault(row["method"], []).append(row["recovery"])
    intervals = {name: ic.stats.Bootstrap().mean(values) for name, values in series.items()}
    ic.report.Bars.of(intervals, base=level, limits=(0, 1), title=title, xlabel="Recovery@10 %").png(path)


def on_toy(count: int, png: Path | None) -> None:
    """The tables of the toy."""
    model = ic.load("toy:text")
    for hops in MOST_CHAINS:
        prompts = needles(model, hops, count)
        rows = rows_of(model, prompts, METHODS)
        title = _titled(f"{hops} {'hop' if hops == 1 else 'hops'}", prompts)
        print(f"\n{title}\n\n{table(rows)}", flush=True)
        if png and hops == max(MOST_CHAINS):
            draw(rows, prompts, f"toy:text, {title}", png)


def on_steps(count: int) -> None:
    """The tables of written reasoning."""
    model = ic.load("toy:text")
    for steps in (1, 2):
        prompts = written(model, steps, count)
        print(f"\n{_titled(f'{steps} written', prompts)}\n\n{table(rows_of(model, prompts, THROUGH))}", flush=True)


def on_real(name: str, examples: Sequence[Example], steps: int, labels: Sequence[str]) -> None:
    """The table of one cache.

    Args:
        steps: of deletion curves; 0: none, and none of `DEAR` unless it is named.
        labels: of methods; none: all.
    """
    model = ic.load("smollm2")
    prompts = [cached(model, example, "sound") for example in examples]
    labels = labels or [label for label in REAL if steps or label not in DEAR]
    methods = {label: REAL[label] for label in labels}
    rows = rows_of(model, prompts, methods, steps=steps, with_areas=False)
    print(f"\n{_titled(name, prompts)}\n\n{table(rows)}", flush=True)


def cached(model: ic.Model, example: Example, profile: Profile) -> Prompt:
    """An example of a cache."""
    tokens = example_tokens(model, example, profile, eos=True)
    places = {position: place for place, position in enumerate(tokens.columns("prompt")[0])}
    return Prompt(tokens, tuple(places[p] for span in tokens.spans["gold"][0] for p in span))


def beside_published(name: str, examples: Sequence[Example]) -> None:
    """Ours and the published packages' numbers on the same tokens: largest difference, in parts of the largest number,
    Recovery@10 % and seconds."""
    model, rows = ic.load("smollm2"), list[dict[str, Any]]()
    theirs = Theirs(model)
    for number, example in enumerate(examples):
        prompt = cached(model, example, "reference")
        for label, method, settings in PUBLISHED:
            began = time.perf_counter()
            result: Any = ic.method(method)(model, prompt.tokens, profile="reference", **settings)
            between = time.perf_counter()
            vector = theirs.vector(label, example, prompt.tokens)
            seconds = between - began, time.perf_counter() - between
            size = len(prompt.tokens.columns("prompt")[0])
            ours, other = _weights(result, prompt), vector[:size].double()
            recovered = recovery(torch.stack([ours, other]), prompt.gold).recovery.tolist()
            apart = float((ours - other).abs().max() / other.abs().max())
            cells = [apart, *recovered, *seconds]
            names = ("difference", "ours", "published", "s", "published s")
            rows.append({"example": number, "method": label, "form": "", **dict(zip(names, cells, strict=True))})
    print(f"\n{name}, profile reference: {len(examples)} prompts\n")
    print("| method | largest difference | Recovery@10 % | published | s | published |\n|---|---|---|---|---|---|")
    for label, _, _ in PUBLISHED:
        own = [row for row in rows if row["method"] == label]
        mean = {key: sum(row[key] for row in own) / len(own) for key in names}
        worst = max(row["difference"] for row in own)
        numbers = f"{mean['ours']:.2f} | {mean['published']:.2f} | {mean['s']:.1f} | {mean['published s']:.1f}"
        print(f"| {label} | {worst:.0e} | {numbers} |", flush=True)


class Theirs:
    """The published packages on the same weights; flashtrace needs eager attention."""

    def __init__(self, model: ic.Model) -> None:
        from transformers import AutoModelForCausalLM

        self.model = model
        path = ic.testing.real_model()
        self.eager: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)

    def vector(self, label: str, example: Example, tokens: ic.Tokens) -> Tensor:
        """What the package says of prompt and target."""
        if label == "attnlrp":
            return self._lxt(tokens)
        import flashtrace.attribution
        import flashtrace.improved

        assert example.sink_span and example.thinking_span
        sink, thinking = ((span.start, span.stop - 1) for span in (example.sink_span, example.thinking_span))
        text: Any = {"prompt": example.prompt, "target": example.target}
        settings: Any = {"model": self.eager, "tokenizer": self.model.tokenizer, "use_chat_template": True}
        if label == "ifr span":
            result = flashtrace.attribution.LLMIFRAttribution(**settings).calculate_ifr_span(**text, span=sink)
        else:
            engine = flashtrace.improved.LLMIFRAttributionBoth(**settings)
            result = engine.calculate_ifr_multi_hop_both(**text, sink_span=sink, thinking_span=thinking, n_hops=1)
        row: Tensor = result.attribution_matrix[sink[0]]
        return row

    def _lxt(self, tokens: ic.Tokens) -> Tensor:
        """Input × gradient under LXT's rules."""
        embed = self.model.hf.get_input_embeddings()(tokens.ids).detach().requires_grad_()
        sink = tokens.spans["sink"][0][0]
        own = torch.arange(sink.start, sink.stop)
        with lxt_rules():
            logits = self.model.hf(inputs_embeds=embed, use_cache=False).logits[0, own - 1, tokens.ids[0, own]]
            (grad,) = torch.autograd.grad(logits.sum(), embed)
        return (embed * grad).sum(-1)[0, list(tokens.columns("prompt")[0])].detach()


def _titled(name: str, prompts: Sequence[Prompt]) -> str:
    sizes = [len(prompt.tokens.columns("prompt")[0]) for prompt in prompts]
    level = sum(map(by_chance, prompts)) / len(prompts)
    return f"{name}: {len(prompts)} prompts of {min(sizes)} to {max(sizes)} tokens, chance {level:.2f}"


def main() -> None:
    """Print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["toy", "steps", "real", "published"])
    parser.add_argument("what", nargs="*", help="number of prompts, or caches")
    parser.add_argument("--most", type=int, help="examples of each cache, at most")
    parser.add_argument("--steps", type=int, default=20, help="of the real model's deletion curves; 0: no deletions")
    parser.add_argument("--methods", nargs="+", choices=list(REAL), default=[], help="of the real model's tables")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "toy":
        on_toy(int(options.what[0]) if options.what else 40, options.png)
    elif options.part == "steps":
        on_steps(int(options.what[0]) if options.what else 40)
    else:
        for path in map(Path, options.what):
            examples = load_examples(path, options.most)
            if options.part == "real":
                on_real(path.stem, examples, options.steps, options.methods)
            else:
                beside_published(path.stem, examples)


if __name__ == "__main__":
    main()
