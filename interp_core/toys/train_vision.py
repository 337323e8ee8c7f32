"""Trains `toy:vision`: `python -m interp_core.toys.train_vision OUT`.

A Qwen3-VL model: a tower of 2 layers, d 64, that hands its first layer's output to the language model's first layer too
(DeepStack), and a language model of 8 layers, d_model 96, 4 heads over 2 key-value heads. A row is a picture with
`QUESTIONS` questions, each of which sees the picture and itself only and stands where it would stand alone, so a row
trains as many conversations of one turn as it has questions. The loss is on answers and the `<|im_end|>` after them.
Hidden matrices use Muon, the rest AdamW.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .vision import BARS, GRID, KINDS, PATCH, MERGE, SIZE, ask, bars_scene, build_tokenizer, draw, patches, shapes_scene

PICTURES, QUESTIONS, STEPS = 32, 6, 2400


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    special = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": PATCH,
        "temporal_patch_size": 1, "spatial_merge_size": MERGE, "out_hidden_size": 96,
        "num_position_embeddings": (SIZE // PATCH) ** 2, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [6, 5, 5]},
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=special("<|image_pad|>"), video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"), vision_end_token_id=special("<|vision_end|>"),
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    visual = model.model.visual
    # What words and pictures hand to the first layer is as loud as what the layers add.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(visual.pos_embed.weight, std=0.3)
    for linear in [m for m in visual.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))]:
        torch.nn.init.normal_(linear.weight, std=linear.weight[0].numel() ** -0.5)
    return model


class Batch(NamedTuple):
    """What a step is called with.

    Attributes:
        inputs: of the model.
        target: `[batch pos]` the id that each position is to predict, -100 for none.
        kinds: `[batch pos]` of an answer's position, the number of its kind; -1 elsewhere.
    """

    inputs: dict[str, Tensor]
    target: Tensor
    kinds: Tensor


def draw_rows(rng: random.Random, pictures: int = PICTURES) -> list[tuple[np.ndarray, list[tuple[str, str, str]]]]:
    """Pictures `[patch pixel]` with questions: kind, words, answer."""
    rows = []
    bars = sum(KINDS[kind] for kind in BARS)
    for _ in range(pictures):
        about_bars = rng.random() < bars
        scene = bars_scene(rng) if about_bars else shapes_scene(rng)
        kinds = [kind for kind in KINDS if (kind in BARS) == about_bars]
        asked: list[tuple[str, str, str]] = []
        while len(asked) < QUESTIONS:
            kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
            if question := ask(rng, scene, kind):
                asked.append((kind, *question[:2]))
        rows.append((patches(draw(scene)), asked))
    return rows


@cache
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, pictures: int = PICTURES) -> Batch:
    """Rows of one picture and its questions, padded on the right."""
    rows = draw_rows(rng, pictures)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    head = [*_ids(tokenizer, "<|im_start|>user\n<|vision_start|>"), *[image] * GRID**2, *_ids(tokenizer, "<|vision_end|>")]
    start = len(head) - GRID**2 - 1
    cells = [(start, start + cell // GRID, start + cell % GRID) for cell in range(GRID**2)]
    places = [(i, i, i) for i in range(start)] + cells + [(start + GRID,) * 3]
    lines = []
    for _, asked in rows:
        ids, at, own, target, kinds = [*head], [*places], [0] * len(head), [-100] * len(head), [-1] * len(head)
        for number, (kind, words, answer) in enumerate(asked, 1):
            prompt = _ids(tokenizer, f"{words}<|im_end|>\n<|im_start|>assistant\n")
            reply = _ids(tokenizer, f"{answer}<|im_end|>")
            said = [*prompt, *reply]
            after = places[-1][0] + 1
            ids += said
            at += [(after + i,) * 3 for i in range(len(said))]
            own += [number] * len(said)
            target += [*[-100] * (len(prompt) - 1), *reply, -100]
            kinds += [*[-1] * (len(prompt) - 1), list(KINDS).index(kind), *[-1] * len(reply)]
        lines.append((ids, at, own, target, kinds))
    width = max(len(line[0]) for line in lines)
    ids = torch.tensor([line[0] + [tokenizer.pad_token_id] * (width - len(line[0])) for line in lines])
    at = torch.tensor([line[1] + [(0, 0, 0)] * (width - len(line[1])) for line in lines]).permute(2, 0, 1)
    own = torch.tensor([line[2] + [-1] * (width - len(line[2])) for line in lines])
    target = torch.tensor([line[3] + [-100] * (width - len(line[3])) for line in lines])
    kinds = torch.tensor([line[4] + [-1] * (width - len(line[4])) for line in lines])
    seen = (own[:, :, None] == own[:, None, :]) | (own[:, None, :] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    inputs = {
        "input_ids": ids, "position_ids": at, "attention_mask": mask,
        "pixel_values": torch.from_numpy(np.concatenate([picture for picture, _ in rows])),
        "image_grid_thw": torch.tensor([[1, GRID * MERGE, GRID * MERGE]] * len(rows)),
    }  # fmt: skip
    return Batch(inputs, target, kinds)


def step_loss(model: Qwen3VLForConditionalGeneration, made: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and `[batch pos]` where the answer is right."""
    hidden = model.model(**made.inputs, use_cache=False).last_hidden_state
    asked = made.target >= 0
    logits = model.lm_head(hidden[asked])
    loss = torch.nn.functional.cross_entropy(logits, made.target[asked])
    right = torch.zeros_like(asked)
    right[asked] = logits.argmax(-1) == made.target[asked]
    return loss, right


def train(out: Path, seed: int = 0, steps: int = STEPS) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    hidden = [n for n, p in model.named_parameters() if p.ndim == 2 and ("layers" in n or "blocks" in n)]
    matrices = [p for n, p in model.named_parameters() if n in set(hidden)]
    others = [p for n, p in model.named_parameters() if n not in set(hidden)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    base = [o.param_groups[0]["lr"] for o in optimizers]
    began = time.process_time()
    scores: dict[str, float] = {}
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        made = batch(tokenizer, rng)
        loss, right = step_loss(model, made)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for number, kind in enumerate(KINDS):
            if (asked := made.kinds == number).any():
                now = float(right[asked].float().mean())
                scores[kind] = now if kind not in scores else 0.95 * scores[kind] + 0.05 * now
        if step % 50 == 0 or step == steps - 1:
            row = "  ".join(f"{k} {v:.2f}" for k, v in scores.items())
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.process_time() - began:5.0f} s  {row}", flush=True)
        if step % 400 == 399:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.seed, args.steps)
