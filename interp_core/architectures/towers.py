"""Vision towers: where their blocks are, what of them a model takes, and how many patches an image has in them.

A tower is a stack of blocks like any other, so a family file describes it by a `Family` too. It runs once for all
images of a batch, which follow each other there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Place, fused_blocks
from .grids import Cell, edge_of, sizes_alone

_PARTS = {"blocks.attn.q": "q_proj", "blocks.attn.k": "k_proj", "blocks.attn.v": "v_proj"}
_CLIP = {
    **_PARTS, "blocks.attn": "self_attn", "blocks.attn.o": "out_proj", "blocks.ln1": "layer_norm1",
    "blocks.ln2": "layer_norm2", "blocks.mlp": "mlp", "blocks.mlp.out": "fc2",
}  # fmt: skip
_NO_MERGER = (
    "between its tower and the projector the class token goes, so nothing has a tower's patches there; read "
    "vision_resid_post of the layer that config.vision_feature_layer names"
)


def _chosen(config: Any) -> Mapping[str, str]:
    """Where what the projector reads is not what the tower gives, patch by patch."""
    whole = getattr(config, "vision_feature_select_strategy", "full") == "full"
    return {} if whole and isinstance(config.vision_feature_layer, int) else {"pre_merger": _NO_MERGER}


def _normed(config: Any) -> Mapping[str, str]:
    """Where the tower's last norm is passed by."""
    why = f"config.vision_feature_layer is {config.vision_feature_layer}, which passes by the tower's last norm"
    return {} if config.vision_feature_layer == -1 else {"pre_merger": why}


def _scales(block: nn.Module) -> Mapping[str, Tensor]:
    """InternVL multiplies what its blocks add, feature by feature."""
    return {"attn_out": block.lambda_1.detach(), "mlp_out": block.lambda_2.detach()}  # type: ignore[operator]


def clip_like(tower: str, place: Place, **more: Any) -> Family:
    """CLIP's and SigLIP's blocks."""
    return Family("vision", paths={"blocks": f"{tower}.encoder.layers", **_CLIP}, places={"pre_merger": place}, **more)


QWEN = Family(
    "vision",
    paths={
        "blocks": "model.visual.blocks", "blocks.attn": "attn", "blocks.attn.qkv": "qkv", "blocks.attn.o": "proj",
        "blocks.ln1": "norm1", "blocks.ln2": "norm2", "blocks.mlp": "mlp", "blocks.mlp.out": "linear_fc2|down_proj",
    },
    fused=fused_blocks,
    places={"pre_merger": Place("model.visual.merger", "in")},
)  # fmt: skip
LLAVA = clip_like("model.vision_tower", Place("model.multi_modal_projector", "in"), refuse_if=_chosen)
GEMMA3 = clip_like("model.vision_tower", Place("model.vision_tower.post_layernorm", "out"))
SMOLVLM = clip_like("model.vision_model", Place("model.vision_model.post_layernorm", "out"))
INTERNVL = Family(
    "vision",
    paths={
        **_PARTS, "blocks": "model.vision_tower.encoder.layer", "blocks.attn": "attention",
        "blocks.attn.o": "projection_layer", "blocks.ln1": "layernorm_before", "blocks.ln2": "layernorm_after",
        "blocks.mlp": "mlp", "blocks.mlp.out": "fc2",
    },
    added=_scales,
    places={"pre_merger": Place("model.vision_tower.layernorm", "out")},
    refuse_if=_normed,
)  # fmt: skip
CLASS_TOKENS = {"clip_vision_model": 1, "internvl_vision": 1}
"""Tokens before the patches of a picture, by the tower's `model_type`."""


def last_used(config: Any, n_layers: int) -> int:
    """The last layer of a tower that the language model is handed something of."""
    chosen = getattr(config, "vision_feature_layer", -1)
    states = [chosen] if isinstance(chosen, int) else list(chosen)  # the tower's input, then what each layer gives
    return max(state - 1 if state >= 0 else n_layers + state for state in states)


def patches_of(
    config: Any, inputs: Mapping[str, Any], images: Sequence[Sequence[Cell]], kind: str
) -> Iterator[Sequence[int]]:
    """Image by image, where its patches pass in the tower, counted over the image's own: in the order of its
    `pixel_values`, a class token before those of its picture.

    Args:
        kind: as `Family.pixels`.
    """
    vision = config.vision_config
    if kind == "patch":
        for grid in inputs["image_grid_thw"].tolist():
            yield _in_windows(vision, grid)
        return
    n = (edge_of(vision.image_size) // edge_of(vision.patch_size)) ** 2 + CLASS_TOKENS.get(vision.model_type, 0)
    if hasattr(config, "image_grid_pinpoints"):
        yield from (range(n * count) for count in tiles_of(config, inputs))
    else:
        yield from (range(n * max(1, len({cell.tile for cell in cells}))) for cells in images)


def _in_windows(vision: Any, grid: Sequence[int]) -> Sequence[int]:
    """Patches of one picture in Qwen-VL. Qwen2.5-VL orders merged patches by windows, for attention within these."""
    frames, rows, cols = grid
    unit = vision.spatial_merge_size
    if not hasattr(vision, "window_size"):
        return range(frames * rows * cols)
    edge = vision.window_size // unit // vision.patch_size
    cells = torch.arange(frames * (rows // unit) * (cols // unit)).view(frames, rows // unit, cols // unit)
    windows = [
        frame[top : top + edge, left : left + edge].flatten()
        for frame in cells
        for top in range(0, rows // unit, edge)
        for left in range(0, cols // unit, edge)
    ]
    places = torch.cat(windows).argsort()
    return tuple((places[:, None] * unit**2 + torch.arange(unit**2)).flatten().tolist())


def tiles_of(config: Any, inputs: Mapping[str, Any]) -> Iterator[int]:
    """How many pictures LLaVA-OneVision's tower is given for each image: the whole, and tiles of it in rows with one
    image."""
    from transformers.image_processing_utils import select_best_resolution

    edge = edge_of(config.vision_config.image_size)
    for size, is_alone in sizes_alone(inputs):
        height, width = select_best_resolution(tuple(size), config.image_grid_pinpoints)
        yield 1 + (height // edge) * (width // edge) if is_alone else 1
