"""Trains `toy:moe`: `python -m interp_core.toys.train_moe OUT`.

A Qwen3-MoE model, 3 layers, d_model 96, 4 heads over 2 key-value heads, 16 experts of width 48, 2 per token. Documents
of all domains come in equal shares. Attention is small, so that what a domain knows has to lie in experts. Two losses
shape the routing, layer by layer:

    balance   E Σ_e f_e p_e over the batch: experts are used alike, all domains together
    focus     max(0, H(mean routing of a document) - ln 3): a document uses few experts, about three

Nothing is told which expert a domain should have, nor which domain a document is of. Hidden matrices use Muon, the rest
AdamW. Every token is predicted, answers with 20 times the weight of others.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ..model import load
from .domains import DOMAINS, build_tokenizer, document
from .evaluate_moe import tables
from .text import Example
from .train_text import OTHER_WEIGHT, marked
from .training import Optimizers, command_line, language_model

BATCH, STEPS = 24, 550
BALANCE, FOCUS, EXPERTS_OF_A_DOCUMENT = 0.03, 0.02, 3


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    sizes = {
        "hidden_size": 96, "intermediate_size": 48, "moe_intermediate_size": 48, "num_experts": 16,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "num_hidden_layers": 3, "head_dim": 24,
    }  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**language_model(tokenizer), **sizes))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


class Routers:
    """What the routers returned in the last pass, for the losses that shape them."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.returned: list[Any] = []
        self.hooks = [
            layer.mlp.gate.register_forward_hook(lambda _m, _a, output: self.returned.append(output))
            for layer in model.model.layers
        ]

    def losses(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Balance and focus, summed over layers; `mask` `[batch pos]` tells padding apart."""
        balance = focus = torch.zeros((), device=mask.device)
        real, lengths = mask.flatten().bool(), mask.sum(1, keepdim=True)
        for logits, _, chosen in self.returned:
            probs = logits.float().softmax(-1)
            n_experts = probs.shape[-1]
            share = torch.nn.functional.one_hot(chosen[real], n_experts).float().mean((0, 1))
            # Switch Transformer's auxiliary loss (Fedus et al., 2022, eq. 4): 1 where experts are used alike.
            balance = balance + n_experts * (share * probs[real].mean(0)).sum()
            # exp of an entropy counts the experts that a document uses; under three it is left alone.
            used = (probs.view(*mask.shape, n_experts) * mask[..., None]).sum(1) / lengths
            entropy = -(used * used.clamp_min(1e-9).log()).sum(-1)
            focus = focus + (entropy - math.log(EXPERTS_OF_A_DOCUMENT)).clamp_min(0).mean()
        self.returned.clear()
        return balance, focus

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def draw(rng: random.Random) -> list[Example]:
    """A batch of documents, every domain's share the same."""
    return [document(rng, DOMAINS[i % len(DOMAINS)]) for i in range(BATCH)]


def step_loss(
    model: Qwen3MoeForCausalLM, routers: Routers, ids: Tensor, mask: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and the negative log-likelihood `[batch pos]` of every token but the first."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    target = ids[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    weight = torch.where(answers[:, 1:], 1.0, OTHER_WEIGHT) * mask[:, 1:]
    balance, focus = routers.losses(mask)
    return (nll * weight).sum() / weight.sum() + BALANCE * balance + FOCUS * focus, nll.detach()


def train(out: Path, seed: int = 0, steps: int = STEPS) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    routers = Routers(model)
    # Experts' weights are stacked `[expert out in]`; torch's Muon takes matrices alone.
    optimizers = Optimizers(model, lambda name, p: "self_attn" in name and p.ndim == 2)
    began = time.process_time()
    for step in range(steps):
        ids, mask, answers = marked(tokenizer, draw(rng))
        loss, nll = step_loss(model, routers, ids, mask, answers)
        optimizers.step(loss, min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps)))
        if step % 50 == 0 or step == steps - 1:
            shown = {
                domain: nll[i :: len(DOMAINS)][answers[i :: len(DOMAINS), 1:]].mean().item()
                for i, domain in enumerate(DOMAINS)
            }
            row = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.process_time() - began:5.0f} s  {row}", flush=True)
    routers.remove()
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(tables(load(str(out))))


if __name__ == "__main__":
    command_line(__doc__, train, "steps")
