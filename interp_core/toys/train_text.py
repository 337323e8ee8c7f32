"""Trains `toy:text`: `python -m interp_core.toys.train_text OUT`.

A Qwen3 model, 6 layers, d_model 128, 4 heads over 2 key-value heads. The tasks come in stages, each harder than the
one before, and a stage ends when its tasks are learnt: retrieval in the mix before induction exists only adds a loss
floor. Hidden matrices use Muon, the rest AdamW. Every token is predicted, answers with 20 times the weight of others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..model import load
from .evaluate import table
from .text import END, NUMBERS, Example, build_tokenizer, induction_example, needle_example, relation_example, words
from .training import Optimizers, command_line, language_model

WINDOW, BATCH = 72, 48
OTHER_WEIGHT = 0.05
Make = Callable[[random.Random], Example]


def _induction(pool: tuple[str, ...]) -> Make:
    return lambda rng: induction_example(rng, rng.randint(3, 24), 64, pool)


def _needle(hops: int) -> Make:
    def make(rng: random.Random) -> Example:
        chains = rng.randint(2, {0: 8, 1: 5, 2: 4}[hops])
        room = (WINDOW - 2 - 4 * chains * (hops + 1)) // 4
        return needle_example(rng, chains, hops, min(room, chains * (hops + 1)))

    return make


def _relation(rng: random.Random) -> Example:
    return relation_example(rng, shots=10)


STAGES: list[dict[str, tuple[float, Make]]] = [
    {"induction": (1.0, _induction(NUMBERS))},
    {"induction": (0.3, _induction(NUMBERS)), "hop0": (0.3, _needle(0)), "relation": (0.4, _relation)},
    {
        "induction": (0.15, _induction((*NUMBERS, *words()))),
        "hop0": (0.1, _needle(0)),
        "hop1": (0.4, _needle(1)),
        "relation": (0.35, _relation),
    },
    {
        "induction": (0.15, _induction((*NUMBERS, *words()))),
        "hop0": (0.1, _needle(0)),
        "hop1": (0.15, _needle(1)),
        "hop2": (0.35, _needle(2)),
        "relation": (0.25, _relation),
    },
]
PASS = {"induction": 0.97, "hop0": 0.98, "hop1": 0.98, "hop2": 0.98, "relation": 0.97}


def batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[batch pos]` (padded right), an end after each text, and which of them are answers."""
    ids, _, answers = marked(tokenizer, [Example(e.text + END, e.answers) for e in examples])
    return ids, answers


def marked(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask `[batch pos]` (padded right), and which tokens are answers."""
    encoded = tokenizer([e.text for e in examples], return_offsets_mapping=True, padding=True, return_tensors="pt")
    answers = torch.zeros_like(encoded.input_ids, dtype=torch.bool)
    for row, (example, offsets) in enumerate(zip(examples, encoded.offset_mapping.tolist(), strict=True)):
        wanted = set(example.answers)
        answers[row, [i for i, o in enumerate(offsets) if tuple(o) in wanted]] = True
    return encoded.input_ids, encoded.attention_mask, answers


def step_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    target, is_answer = ids[:, 1:], answers[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    weight = torch.where(is_answer, 1.0, OTHER_WEIGHT)
    end = target == model.config.eos_token_id  # padding is the same id: the first is the text's end, the rest is none
    weight = torch.where(end & (end.cumsum(-1) > 1), 0.0, weight)
    hits = (logits.argmax(-1) == target) & is_answer
    return (nll * weight).sum() / weight.sum(), hits


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "head_dim": 32}
    model = Qwen3ForCausalLM(Qwen3Config(**language_model(tokenizer), **sizes))
    # Embeddings as loud as what the first layers add: induction appears after 200 steps instead of 700.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def train(out: Path, seed: int = 0, cooldown: int = 600, limit: int = 6000, device: str = "cpu") -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build(tokenizer).to(device)
    optimizers = Optimizers(model, lambda name, p: p.ndim == 2 and "layers" in name)
    stage, decay_from, began = 0, None, time.process_time()
    scores: dict[str, float] = {}
    for step in range(limit):
        tasks = STAGES[stage]
        kinds = rng.choices(list(tasks), [share for share, _ in tasks.values()], k=BATCH)
        ids, answers = batch(tokenizer, [tasks[kind][1](rng) for kind in kinds])
        left = 1.0 if decay_from is None else 1 - (step - decay_from) / cooldown
        loss, hits = step_loss(model, ids.to(device), answers.to(device))
        optimizers.step(loss, left * min(1.0, (step + 1) / 50))
        for kind in tasks:
            rows = torch.tensor([k == kind for k in kinds])
            shown = answers[rows].sum()
            if shown:
                now = float(hits.cpu()[rows].sum() / shown)
                scores[kind] = now if kind not in scores else 0.95 * scores[kind] + 0.05 * now
        if step % 50 == 0:
            row = "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
            print(
                f"step {step:5d}  stage {stage}  loss {loss.item():.3f}  {time.process_time() - began:5.0f} s  {row}",
                flush=True,
            )
        if decay_from is None:
            learnt = all(scores.get(kind, 0) > (PASS[kind] if kind != "relation" else 0.92) for kind in tasks)
            if learnt and stage + 1 < len(STAGES):
                stage += 1
            elif learnt or step + cooldown >= limit:
                decay_from = step
        elif step + 1 - decay_from >= cooldown:
            break
    model = model.cpu().eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(table(load(str(out)), 500))


if __name__ == "__main__":
    command_line(__doc__, train, "limit")
