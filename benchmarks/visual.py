"""Layer curves of a vision-language model, beside a plain forward pass per layer: python benchmarks/visual.py [rounds]

Qwen3-VL architecture with random weights: 24 layers, d_model 256, three DeepStack additions, 4 text tokens, 256 visual
ones, 14 text tokens; float32, one thread, all in one process, CPU time. The naive way calls the whole model once per
layer with hooks by hand, and computes the last logits alone. `cold` is a model's first sweep, with its trial; `warm` is
the shortest of some. The last column is the largest difference between scores (a logit) of both ways.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from turns import shortest

import interp_core as ic
from interp_core import score
from interp_core import sites as S

LAYERS, D_MODEL, BEFORE, AFTER, GRID = 24, 256, 4, 14, 16
IMAGE, START, ANSWER = 90, 92, 7
VISION = slice(BEFORE, BEFORE + GRID * GRID)
LATER = slice(VISION.stop, VISION.stop + AFTER)


def model() -> Any:
    """The model, in transformers."""
    import transformers

    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "patch_size": 4,
        "temporal_patch_size": 1, "spatial_merge_size": 2, "out_hidden_size": D_MODEL, "num_position_embeddings": 1024,
        "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    text = {
        "hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "intermediate_size": 3 * D_MODEL, "vocab_size": 1024,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": 93}
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def inputs(seed: int) -> dict[str, Tensor]:
    """A text around an image of random pixels."""
    words = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (1, LATER.stop), generator=words)
    ids[:, VISION], ids[:, BEFORE - 1] = IMAGE, START
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(4 * GRID * GRID, 48, generator=torch.Generator().manual_seed(seed)),
        "image_grid_thw": torch.tensor([[1, 2 * GRID, 2 * GRID]]),
    }  # fmt: skip


class Naive:
    """One forward pass per layer, with hooks by hand.

    Attributes:
        streams: of the blind run, what enters each layer at the visual tokens.
        features: of the blind run, what DeepStack adds.
    """

    def __init__(self, hf: Any) -> None:
        self.hf, self.language = hf, hf.model.language_model
        self.streams: list[Tensor] = []
        self.features: list[Tensor] = []
        hidden = torch.zeros(1, 1, LATER.stop, LATER.stop)
        hidden[..., LATER, VISION] = torch.finfo(torch.float32).min
        causal = torch.full((LATER.stop, LATER.stop), torch.finfo(torch.float32).min).triu(1)
        self.mask = torch.minimum(hidden, causal)

    def curve(self, kind: str) -> Tensor:
        """The answer's logit for each layer."""
        if kind == "blind":
            self._look(inputs(1))
        out = []
        for layer in range(LAYERS):
            with torch.no_grad(), self._hooked(kind, layer):
                out.append(self.hf(**inputs(0), use_cache=False, logits_to_keep=1).logits[0, -1, ANSWER])
        return torch.stack(out)

    def _look(self, values: dict[str, Tensor]) -> None:
        self.streams = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: self.streams.append(args[0][:, VISION]))
            for block in self.language.layers
        ]

        def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            self.features = kwargs["deepstack_visual_embeds"]

        handles.append(self.language.register_forward_pre_hook(note, with_kwargs=True))
        with torch.no_grad():
            self.hf(**values, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()

    @contextmanager
    def _hooked(self, kind: str, layer: int) -> Iterator[None]:
        blocks = self.language.layers
        masked = blocks[layer:] if kind == "truncation" else blocks[layer : layer + 1]
        if kind in ("knockout", "truncation"):
            handles = [b.self_attn.register_forward_pre_hook(self._masking, with_kwargs=True) for b in masked]
        else:
            handles = [blocks[layer].register_forward_pre_hook(self._replacing(kind, layer))]
        if kind == "blind":
            handles.append(self.language.register_forward_pre_hook(self._following(layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _masking(self, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": self.mask}

    def _replacing(self, kind: str, layer: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> Any:
            x = args[0].clone()
            if kind == "noise":
                x[:, VISION] += noise(layer)
            else:
                x[:, VISION] = self.streams[layer] if kind == "blind" else 0
            return (x, *args[1:])

        return hook

    def _following(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            known = kwargs["deepstack_visual_embeds"]
            return args, {**kwargs, "deepstack_visual_embeds": [*known[:layer], *self.features[layer:]]}

        return hook


def noise(layer: int) -> Tensor:
    """What a noise curve adds."""
    return torch.randn(GRID * GRID, D_MODEL, generator=torch.Generator().manual_seed(layer))


class Ours:
    """The same curves by `model.sweep`."""

    def __init__(self, hf: Any) -> None:
        self.model = ic.load(hf)

    def curve(self, kind: str) -> Tensor:
        """The answer's logit for each layer."""
        later, layers, judged = slice(LATER.start, None), range(LAYERS), score.logit(ANSWER)
        if kind == "blind":  # rows after the image, of the run that sees it, put into the one that does not
            run = self.model.run(inputs(0), read=S.resid_pre.at(later), logits=False)
            edits = [S.resid_pre[at].at(later).set(run[S.resid_pre[at].at(later)]) for at in layers]
            return self.model.sweep(inputs(1), edits, judged).values[:, 0]
        makes: dict[str, Callable[[int], ic.Edit]] = {
            "knockout": lambda at: S.pattern[at].knockout(query=later, key="vision"),
            "truncation": lambda at: S.pattern[at:].knockout(query=later, key="vision"),
            "zero": lambda at: S.resid_pre[at].at("vision").zero(),
            "noise": lambda at: S.resid_pre[at].at("vision").add(noise(at)),
        }
        return self.model.sweep(inputs(0), [makes[kind](at) for at in layers], judged).values[:, 0]


def main(rounds: str = "3", *kinds: str) -> None:
    """Print a row per curve."""
    torch.set_num_threads(1)
    hf = model()
    naive = Naive(hf)
    print("| curve of 24 layers | naive, s | cold, s | warm, s | ratio cold | ratio warm | largest difference |")
    print("|---|---|---|---|---|---|---|")
    naive.curve("zero")
    for kind in kinds or ("knockout", "truncation", "blind", "zero", "noise"):
        mine, plainly = partial(Ours(hf).curve, kind), partial(naive.curve, kind)
        start = time.process_time()
        mine()
        first = time.process_time() - start
        plain, warm = shortest(int(rounds), plainly, mine, clock=time.process_time)
        off = float((mine() - plainly()).abs().max())
        ratios = f"{plain / first:.1f} | {plain / warm:.1f}"
        print(f"| {kind} | {plain:.2f} | {first:.2f} | {warm:.2f} | {ratios} | {off:.1e} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
