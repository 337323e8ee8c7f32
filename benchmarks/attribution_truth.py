"""Do attribution methods find what an answer rests on? python benchmarks/attribution_truth.py toy [N]

    toy [N]          `toy:text`: a value behind 0, 1 and 2 aliases; gold are the value and the aliases
    steps [N]        the same, where the aliases stand in the target, as written reasoning
    real FILE …      SmolLM2-135M-Instruct on caches that the recipe `build_cache` made

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
from interp_plugins.attribution.evaluation.areas import areas
from interp_plugins.attribution.evaluation.comparing import compare
from interp_plugins.attribution.evaluation.faithfulness import faithfulness
from interp_plugins.attribution.evaluation.perturbed import Perturbed
from interp_plugins.attribution.evaluation.recovery import recovery, top_count
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
        asked = rng.randrange(chains)
        way = [names[asked], *names[chains:]]
        steps = "".join(f"VAR {name} {before}.\n" for before, name in pairwise(way))
        facts = "".join(f"VAR {name} {value}.\n" for name, value in zip(names, values, strict=False))
        tokens = model.tokens(facts, target=f"{steps}? {way[-1]} {values[asked]}")
        start, last = 4 * chains, tokens.lengths[0] - 1
        if answered(model, tokens):
            spans = {"thinking": ((ic.Span(start, start + 4 * hops),),), "sink": ((ic.Span(last, last + 1),),)}
            out.append(Prompt(replace(tokens, spans={**tokens.spans, **spans}), (4 * asked + 2,)))
    return out


def scored(model: ic.Model, prompt: Prompt, method: str, settings: Mapping[str, Any]) -> ic.Result:
    """What a method says."""
    own = {key: prompt.other if value == "other" else value for key, value in settings.items()}
    return ic.method(method)(model, prompt.tokens, **own)


def found(result: Any, prompt: Prompt) -> float:
    """Recovery@10 %."""
    return float(recovery(_weights(result, prompt), prompt.gold).recovery[0])


def _weights(result: Any, prompt: Prompt) -> Tensor:
    """Scores of the prompt's tokens."""
    return result.scores[0, list(prompt.tokens.columns("prompt")[0])].double()


def rows_of(model: ic.Model, prompts: Sequence[Prompt], methods: Methods) -> list[dict[str, Any]]:
    """A row per prompt and method; negative weights count as none, as in published evaluations."""
    rows = list[dict[str, Any]]()
    for number, prompt in enumerate(prompts):
        weights, more = list[Tensor](), list[dict[str, Any]]()
        for method, settings in methods.values():
            began = time.perf_counter()
            result: Any = scored(model, prompt, method, settings)
            more.append({"seconds": time.perf_counter() - began, "first": float(result.first_share[0])})
            weights.append(_weights(result, prompt))
        signed, text = torch.stack(weights), Perturbed(model, prompt.tokens)
        positive, names = signed.clamp(min=0), tuple(methods)
        place = recovery(signed, prompt.gold, names=names)
        tables = place.table(), faithfulness(text, positive, names=names).table(), areas(text, positive).table()
        for name, own, *parts in zip(names, more, *tables, strict=True):
            row = {key: value for part in parts for key, value in part.items()}
            above = row["recovery"] - place.chance
            rows.append({"example": number, "method": name, "form": "", **row, **own, "above chance": above})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| method | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]
    cells = dict[str, list[str]]()
    for line in compare(rows, list(METRICS)):
        ends = f" ({line['low']:.2f} … {line['high']:.2f})" if line["metric"] in WITH_INTERVAL else ""
        cells.setdefault(line["method"], []).append(f"{line['mean']:.2f}{ends}")
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(numbers) + " |" for name, numbers in cells.items())])


def draw(rows: Sequence[Mapping[str, Any]], chance: float, title: str, path: Path) -> None:
    """Recovery@10 % of all methods."""
    series = dict[str, list[float]]()
    for row in rows:
        series.setdefault(row["method"], []).append(row["recovery"])
    intervals = {name: ic.stats.Bootstrap().mean(values) for name, values in series.items()}
    ic.report.Bars.of(intervals, base=chance, limits=(0, 1), title=title, xlabel="Recovery@10 %").png(path)


def on_toy(count: int, png: Path | None) -> None:
    """The tables of the toy."""
    model = ic.load("toy:text")
    for hops in MOST_CHAINS:
        prompts = needles(model, hops, count)
        rows = rows_of(model, prompts, METHODS)
        chance = sum(row["chance"] for row in rows) / len(rows)
        print(
            f"\n{hops} {'hop' if hops == 1 else 'hops'}: {count} prompts, chance {chance:.2f}\n\n{table(rows)}",
            flush=True,
        )
        if png and hops == max(MOST_CHAINS):
            draw(rows, chance, f"toy:text, {hops} hops, {count} prompts", png)


def main() -> None:
    """Print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["toy", "steps", "real"])
    parser.add_argument("what", nargs="*", help="number of prompts, or caches")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "toy":
        on_toy(int(options.what[0]) if options.what else 40, options.png)


if __name__ == "__main__":
    main()
