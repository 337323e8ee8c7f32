"""Trains `toy:vision`: `python -m interp_core.toys.train_vision OUT`.

A Qwen3-VL model: a tower of 2 layers, d 64, that hands its first layer's output to the language model's first layer too
(DeepStack), and a language model of 8 layers, d_model 96, 4 heads over 2 key-value heads. A row is a picture with
`QUESTIONS` questions, each of which sees the picture and itself only and stands where it would stand alone, so a row
trains as many conversations of one turn as it has questions. The loss is on answers and the `<|im_end|>` after them.
Hidden matrices use Muon, the rest AdamW.
"""

from __future__ import annotations

import random
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..model import load
from .evaluate_vision import tables
from .training import Optimizers, command_line
from .vision import (
    BARS,
    CELL,
    GRID,
    KINDS,
    MERGE,
    PATCH,
    SIZE,
    ask,
    bars_scene,
    build_tokenizer,
    draw,
    patches,
    shapes_scene,
)

PICTURES, QUESTIONS = 24, 6
MOST = (1, 2, 5)
"""How many objects there are at most, stage by stage."""
GATES = (("exist", "color", "shape"), ("exist", "color", "shape"), tuple(kind for kind in KINDS if kind != "where"))
PASS = 0.85
"""What the kinds of a stage's gate have to reach in training before it ends; after the last one comes the cool-down."""


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
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    visual = model.model.visual
    # What words and pictures hand to the first layer is as loud as what the layers add.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(visual.pos_embed.weight, std=0.3)
    for linear in [m for m in visual.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))]:
        torch.nn.init.normal_(linear.weight, std=linear.weight[0].numel() ** -0.5)
    return model


Pixels = np.ndarray[Any, np.dtype[np.float32]]


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


class Line(NamedTuple):
    """A picture and its questions, token by token.

    Attributes:
        ids: tokens.
        places: time, row and column of each, as M-RoPE counts them.
        parts: 0 for the picture and what stands before it, then the number of the question.
        target: the id to predict, -100 for none.
        kinds: where an answer is predicted the number of its kind, -1 elsewhere.
    """

    ids: list[int]
    places: list[tuple[int, int, int]]
    parts: list[int]
    target: list[int]
    kinds: list[int]


PADDING = Line([0], [(0, 0, 0)], [-1], [-100], [-1])


@cache
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opening(tokenizer: PreTrainedTokenizerFast) -> Line:
    """What stands before a question: the user's turn with the picture."""
    before, after = _ids(tokenizer, "<|im_start|>user\n<|vision_start|>"), _ids(tokenizer, "<|vision_end|>")
    ids = [*before, *_ids(tokenizer, "<|image_pad|>") * GRID**2, *after]
    start = len(before)
    places = [(i, i, i) for i in range(start)]
    places += [(start, start + cell // GRID, start + cell % GRID) for cell in range(GRID**2)]
    places += [(start + GRID,) * 3]  # M-RoPE: a picture takes as many positions as its longer edge
    return Line(ids, places, [0] * len(ids), [-100] * len(ids), [-1] * len(ids))


def add(line: Line, tokenizer: PreTrainedTokenizerFast, words: str, answer: str, kind: str, number: int) -> None:
    """A question and its answer, placed as if it were the only one."""
    prompt = _ids(tokenizer, f"{words}<|im_end|>\n<|im_start|>assistant\n")
    reply = _ids(tokenizer, f"{answer}<|im_end|>")
    first = line.places[line.parts.count(0) - 1][0] + 1  # after the picture, whatever questions stand between
    length = len(prompt) + len(reply)
    line.ids.extend([*prompt, *reply])
    line.places.extend((first + i,) * 3 for i in range(length))
    line.parts.extend([number] * length)
    line.target.extend([*[-100] * (len(prompt) - 1), *reply, -100])
    line.kinds.extend([*[-1] * (len(prompt) - 1), list(KINDS).index(kind), *[-1] * len(reply)])


def draw_line(rng: random.Random, tokenizer: PreTrainedTokenizerFast, most: int) -> tuple[Line, Pixels]:
    """A picture with questions that fit it, and its `pixel_values`."""
    about_bars = rng.random() < sum(KINDS[kind] for kind in BARS)
    scene = bars_scene(rng) if about_bars else shapes_scene(rng, min(2, most), most)
    kinds = [kind for kind in KINDS if (kind in BARS) == about_bars]
    line, number = opening(tokenizer), 0
    while number < QUESTIONS:
        kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        if question := ask(rng, scene, kind):
            number += 1
            add(line, tokenizer, question[0], question[1], kind, number)
    return line, patches(draw(scene))


def batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, most: int = MOST[-1], pictures: int = PICTURES
) -> Batch:
    """Rows of one picture and its questions, padded on the right. Questions do not see each other."""
    rows = [draw_line(rng, tokenizer, most) for _ in range(pictures)]
    width = max(len(line.ids) for line, _ in rows)
    missing = [width - len(line.ids) for line, _ in rows]
    ids, places, parts, target, kinds = (
        torch.tensor([[*line[i], *PADDING[i] * n] for (line, _), n in zip(rows, missing, strict=True)])
        for i in range(len(PADDING))
    )
    # Each part sees itself and part 0, the picture, up to where it is.
    seen = (parts[:, :, None] == parts[:, None]) | (parts[:, None] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    inputs: dict[str, Tensor] = {
        "input_ids": ids,
        "position_ids": places.permute(2, 0, 1),
        "attention_mask": mask,
        "pixel_values": torch.from_numpy(np.concatenate([pixels for _, pixels in rows])),
        "image_grid_thw": torch.tensor([[1, GRID * MERGE, GRID * MERGE]] * pictures),
    }
    return Batch(inputs, target, kinds)


def step_loss(model: Qwen3VLForConditionalGeneration, examples: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and `[batch pos]` where the answer is right."""
    hidden = model.model(**examples.inputs, use_cache=False).last_hidden_state
    answered = examples.target >= 0
    logits = model.lm_head(hidden[answered])
    loss = torch.nn.functional.cross_entropy(logits, examples.target[answered])
    right = torch.zeros_like(answered)
    right[answered] = logits.argmax(-1) == examples.target[answered]
    return loss, right


def train(out: Path, seed: int = 0, cooldown: int = 400, limit: int = 2500) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build(tokenizer)
    inside = ("layers", "blocks", "merger")
    optimizers = Optimizers(model, lambda name, p: p.ndim == 2 and any(part in name for part in inside))
    stage, decay_from, began = 0, None, time.process_time()
    scores = dict.fromkeys(KINDS, 0.0)
    for step in range(limit):
        left = 1.0 if decay_from is None else 1 - (step - decay_from) / cooldown
        examples = batch(tokenizer, rng, MOST[stage])
        loss, right = step_loss(model, examples)
        optimizers.step(loss, left * min(1.0, (step + 1) / 50))
        for number, kind in enumerate(KINDS):
            if (of_kind := examples.kinds == number).any():
                scores[kind] += 0.05 * (float(right[of_kind].float().mean()) - scores[kind])
        if step % 50 == 0:
            row = "  ".join(f"{k} {v:.2f}" for k, v in scores.items())
            print(
                f"step {step:5d}  stage {stage}  loss {loss.item():.3f}  {time.process_time() - began:5.0f} s  {row}",
                flush=True,
            )
        if decay_from is None:
            learnt = min(scores[kind] for kind in GATES[stage]) > PASS
            if learnt and stage + 1 < len(MOST):
                stage += 1
                # Pictures are harder now: what was reached on easy ones says nothing.
                scores = dict.fromkeys(KINDS, 0.0)
            elif learnt or step + cooldown >= limit:
                decay_from = step
        elif step + 1 - decay_from >= cooldown:
            break
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=1, merge_size=MERGE, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": CELL**2, "longest_edge": 16 * SIZE**2},
    ).save_pretrained(out)  # fmt: skip
    print(tables(load(str(out))))


if __name__ == "__main__":
    command_line(__doc__, train, "limit")
