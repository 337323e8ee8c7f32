"""How well attribution patching fits the exact sweep, by the gradient and by each set of RelP's rules.

    python benchmarks/relp.py [FOLDER ...]      folders of Llama-like models with a tokenizer, such as stories260K

Pearson correlation over all patches of all pairs of prompts (layer × position, each a change of the logit difference,
not divided by the pair's), and, after the stroke, that of the maps averaged over the pairs. toy:text: antonyms against
French translations; tiny families: random weights, random tokens of which half are others in the corrupted prompt;
folders: stories about a girl or a boy, by the logits of " she" and " he".
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from studies import pairs

import interp_core as ic
from interp_core import testing

SITES = ("resid_pre", "attn_out", "mlp_out")
FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "qwen3_moe")
RULES: dict[str, Any] = {
    "gradient": {},
    "ln": {"rule": "relp", "relp_rules": ["ln"]},
    "ln+half (demo)": {"rule": "relp", "relp_rules": "published_demo"},
    "ln+identity": {"rule": "relp", "relp_rules": ["ln", "identity"]},
    "ln+identity+half (RelP)": {"rule": "relp", "relp_rules": "paper"},
    "RelP+ah": {"rule": "relp", "relp_rules": ["ln", "identity", "half", "ah"]},
}
GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam")
STORIES = (
    "Once upon a time, there was a {} named {}. One day,",
    "The {} was called {}. At the park,",
    "A {} called {} was very happy. Then",
    "In a big house lived a {} named {}. Every day,",
)


def main(*folders: str) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print("| model | pairs | patches | site | " + " | ".join(RULES) + " |\n|" + "---|" * (4 + len(RULES)))
    rows("toy:text", *toy())
    for family in FAMILIES:
        rows(family, *tiny(family))
    for folder in folders:
        rows(folder.rstrip("/").rpartition("/")[2], *stories(folder))


Texts = list[tuple[Any, Any, dict[str, Any]]]
"""Clean and corrupted prompts of one length, and the answers to them."""


def rows(name: str, model: ic.Model, texts: Texts) -> None:
    """A line per site: both correlations for each set of rules; of maps, where all prompts have one length."""
    for site in SITES:
        exact = [effects("activation_patching", model, *group, site) for group in texts]
        shown = []
        for settings in RULES.values():
            ours = [effects("attribution_patching", model, *group, site, settings) for group in texts]
            each = ic.stats.pearson(*(torch.cat([part.flatten() for part in side]) for side in (ours, exact)))
            maps = f" / {float(ic.stats.pearson(ours[0].mean(0).flatten(), exact[0].mean(0).flatten())):.3f}"
            shown.append(f"{float(each):.3f}{maps if len(texts) == 1 else ''}")
        pairs, patches = sum(len(part) for part in exact), sum(part.numel() for part in exact)
        print(f"| {name} | {pairs} | {patches:,} | `{site}` | " + " | ".join(shown) + " |", flush=True)


def effects(
    method: str, model: ic.Model, clean: Any, corrupted: Any, answers: dict[str, Any], site: str, more: Any = None
) -> torch.Tensor:
    """Changes of the logit difference `[pair layer head pos]`."""
    settings = {"site": site, "by": "layer", "at": "each", **answers, **(more or {})}
    patching = ic.method(method)(model, clean, corrupted=corrupted, **settings)
    return (patching.effect * (patching.source - patching.base)[:, None, None, None]).double()


def toy() -> tuple[ic.Model, Texts]:
    """Pairs of one length."""
    model, (clean, french) = ic.load("toy:text"), pairs()
    lengths = model.tokens(clean).lengths
    keep = [i for i, n in enumerate(lengths) if n == max(set(lengths), key=lengths.count)]
    return model, [([clean[i] for i in keep], [french[i] for i in keep], {})]


def tiny(family: str, n: int = 16, length: int = 12) -> tuple[ic.Model, Texts]:
    """Random tokens; every second one is another in the corrupted prompt."""
    model, pick = ic.load(testing.tiny(family)), torch.Generator().manual_seed(0)
    clean = torch.randint(3, 90, (n, length), generator=pick)
    other = torch.where(torch.arange(length) % 2 == 1, torch.randint(3, 90, (n, length), generator=pick), clean)
    mask = torch.ones_like(clean, dtype=torch.bool)
    return model, [(ic.Tokens(clean, mask), ic.Tokens(other, mask), {"answer": [3] * n, "other": [7] * n})]


def stories(folder: str) -> tuple[ic.Model, Texts]:
    """Each story with each girl's and boy's name, where both have as many tokens; by length."""
    model = ic.load(folder)
    texts = [(story.format("girl", a), story.format("boy", b)) for story in STORIES for a in GIRLS for b in BOYS]
    she, he = (int(model.tokens(f"a{word}").ids[0, -1]) for word in (" she", " he"))
    groups: dict[int, list[tuple[str, str]]] = {}
    for pair in texts:
        lengths = set(model.tokens(list(pair)).lengths)
        if len(lengths) == 1:
            groups.setdefault(lengths.pop(), []).append(pair)
    return model, [
        ([a for a, _ in group], [b for _, b in group], {"answer": [she] * len(group), "other": [he] * len(group)})
        for group in groups.values()
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
