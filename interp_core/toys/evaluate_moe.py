"""How the experts of `toy:moe` specialise: `python -m interp_core.toys.evaluate_moe [FOLDER]` prints its tables.

Per domain: its likelihood, how many experts it uses, and what masks do to it: of the tenth of all cells (layer, expert)
that the domain uses most beyond the others, and of as many cells per layer drawn at random. Documents are drawn with
seeds of their own, which training never uses.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import sites as S
from ..model import Model, load
from ..text import Tokens
from .domains import DOMAINS, document

Banned = Mapping[int, Sequence[int]]
"""Experts by layer."""


@dataclass(frozen=True)
class Documents:
    """Documents of one domain.

    Attributes:
        tokens: padded as the model takes them.
        answers: which tokens are answers `[batch pos]`.
    """

    tokens: Tokens
    answers: Tensor

    @staticmethod
    def of(model: Model, domain: str, count: int = 24) -> Documents:
        """Documents that training did not see."""
        rng = random.Random(f"evaluate {domain}")
        examples = [document(rng, domain) for _ in range(count)]
        tokens = model.tokens([example.text for example in examples])
        answers = torch.zeros_like(tokens.mask)
        assert tokens.offsets is not None
        for row, (example, offsets, real) in enumerate(zip(examples, tokens.offsets, tokens.rows.real, strict=True)):
            wanted = set(example.answers)
            answers[row, [real[i] for i, chars in enumerate(offsets) if tuple(chars) in wanted]] = True
        return Documents(tokens, answers)


def nll(model: Model, documents: Documents, banned: Banned | None = None) -> tuple[float, float]:
    """Mean negative log-likelihood in nats of all tokens but the first, and of answers, under a mask."""
    edits = [S.router_logits[layer].mask(list(experts)) for layer, experts in (banned or {}).items()]
    tokens, answers = documents.tokens, documents.answers
    logprobs = model.run(tokens, edits=edits, allow_noop=True).logits.plain[:, :-1].log_softmax(-1)
    surprise = -logprobs.gather(-1, tokens.ids[:, 1:, None])[..., 0]
    known = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    return float(surprise[known].mean()), float(surprise[answers[:, 1:]].mean())


def usage(model: Model, documents: Documents) -> Float[Tensor, "layer expert"]:
    """Mean executed weight of every expert over all tokens; rows sum to 1."""
    weights = model.run(documents.tokens, read=S.router_weights, logits=False)[S.router_weights].plain
    return weights[:, documents.tokens.mask].mean(1)


def entropy(used: Float[Tensor, "layer expert"]) -> Float[Tensor, " layer"]:
    """Entropy of usage per layer as a share of its largest, 0 (one expert) to 1 (all alike)."""
    return -(used * used.clamp_min(1e-12).log()).sum(-1) / math.log(used.shape[-1])


def specialists(every: Mapping[str, Tensor], domain: str, share: float = 0.1) -> dict[int, list[int]]:
    """The cells that a domain uses most beyond the mean of the others: that share of all cells, by layer."""
    others = torch.stack([used for name, used in every.items() if name != domain]).mean(0)
    beyond = every[domain] - others
    n_experts = beyond.shape[1]
    best = beyond.flatten().topk(round(share * beyond.numel())).indices.tolist()
    return {layer: sorted(i % n_experts for i in best if i // n_experts == layer) for layer in range(len(beyond))}


@dataclass(frozen=True)
class Effect:
    """What masks do to a domain, in nats per token; `answers` the same of answers alone.

    Attributes:
        banned: the domain's cells.
        clean: without a mask.
        masked: its cells masked.
        random: mean over random masks, as many cells in every layer.
        elsewhere: its cells masked, mean over the other domains of their change.
    """

    banned: Mapping[int, Sequence[int]]
    clean: tuple[float, float]
    masked: tuple[float, float]
    random: tuple[float, float]
    elsewhere: float

    def ratio(self, answers: bool = False) -> float:
        """How many times more the domain's own cells hurt than random ones."""
        i = int(answers)
        harm, chance = self.masked[i] - self.clean[i], self.random[i] - self.clean[i]
        return harm / chance if chance > 0 else math.inf


def effects(model: Model, every: Mapping[str, Documents], draws: int = 100) -> dict[str, Effect]:
    """The effect of masks in each domain."""
    used = {name: usage(model, documents) for name, documents in every.items()}
    clean = {name: nll(model, documents) for name, documents in every.items()}
    n_experts = next(iter(used.values())).shape[1]
    by_domain = {}
    for name, documents in every.items():
        banned = specialists(used, name)
        rng = random.Random(f"masks {name}")
        drawn = [
            nll(model, documents, {layer: rng.sample(range(n_experts), len(e)) for layer, e in banned.items() if e})
            for _ in range(draws)
        ]
        own = {layer: experts for layer, experts in banned.items() if experts}
        other = [nll(model, docs, own)[0] - clean[where][0] for where, docs in every.items() if where != name]
        mean = (sum(a for a, _ in drawn) / draws, sum(b for _, b in drawn) / draws)
        by_domain[name] = Effect(own, clean[name], nll(model, documents, own), mean, sum(other) / len(other))
    return by_domain


def tables(model: Model) -> str:
    """Specialisation and effects as Markdown."""
    every = {name: Documents.of(model, name) for name in DOMAINS}
    used = {name: usage(model, documents) for name, documents in every.items()}
    layers = range(model.n_layers)
    head = "".join(f" layer {layer}: experts (share) | entropy |" for layer in layers)
    lines = [f"| domain |{head}", "|---|" + "---|---|" * model.n_layers]
    for name, shares in used.items():
        cells = ""
        for layer in layers:
            top = shares[layer].topk(3)
            said = ", ".join(f"{e} ({s:.2f})" for s, e in zip(*map(Tensor.tolist, top), strict=True) if s >= 0.05)
            cells += f" {said} | {entropy(shares)[layer]:.2f} |"
        lines.append(f"| {name} |{cells}")
    lines.append(f"| all |{''.join(f' | {h:.2f} |' for h in entropy(torch.stack(list(used.values())).mean(0)))}")
    lines += ["", "| domain | cells | NLL | its cells masked | random cells | ratio | ratio, answers | other domains |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, effect in effects(model, every).items():
        numbers: list[Any] = [effect.clean[0], effect.masked[0], effect.random[0]]
        shown = " | ".join(f"{value:.3f}" for value in numbers)
        cells = "+".join(str(len(effect.banned.get(layer, ()))) for layer in layers)
        ratios = f"{effect.ratio():.1f} | {effect.ratio(answers=True):.1f}"
        lines.append(f"| {name} | {cells} | {shown} | {ratios} | {effect.elsewhere:+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(tables(load(sys.argv[1] if len(sys.argv) > 1 else "toy:moe")))
