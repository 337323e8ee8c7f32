"""Vision towers by hand: module names written out family by family, and hooks on them. No atlas, no taps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pictures
import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
_QWEN = {
    "blocks": "model.visual.blocks", "attn": "attn", "qkv": "attn.qkv", "out": "attn.proj", "ln2": "norm2",
    "mlp": "mlp", "fc2": "mlp.linear_fc2", "merger": ("model.visual.merger", "in"), "patches": "model.visual.patch_embed",
}  # fmt: skip
_CLIP = {
    "blocks": "model.vision_tower.encoder.layers", "attn": "self_attn", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj", "ln2": "layer_norm2", "mlp": "mlp",
    "fc2": "mlp.fc2",
}  # fmt: skip
_AT = "attention."
LAYOUT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {**_QWEN, "fc2": "mlp.down_proj"},
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5_vision": _QWEN,
    "llava": _CLIP,
    "llava_onevision": {**_CLIP, "merger": ("model.multi_modal_projector", "in")},
    "gemma3_vision": {**_CLIP, "merger": ("model.vision_tower.post_layernorm", "out")},
    "smolvlm": {
        **_CLIP, "blocks": "model.vision_model.encoder.layers", "merger": ("model.vision_model.post_layernorm", "out"),
    },
    "internvl": {
        "blocks": "model.vision_tower.encoder.layer", "attn": "attention", "q": _AT + "q_proj", "k": _AT + "k_proj",
        "v": _AT + "v_proj", "out": _AT + "projection_layer", "ln2": "layernorm_after", "mlp": "mlp", "fc2": "mlp.fc2",
        "merger": ("model.vision_tower.layernorm", "out"),
    },
}  # fmt: skip
HEADS = 2


def count(family: str, image: Tensor) -> int:
    """Tokens that a picture has in the tower."""
    height, width = image.shape[1:]
    patches = (height // 4) * (width // 4)
    if family == "llava_onevision":
        return patches + 16
    return patches + {"llava": 1, "internvl": patches // 16}.get(family, 0)


class Tower:
    """The tower of a tiny model, with hooks by hand; its tensors as one row `[patch d]` of all images."""

    def __init__(self, family: str, hf: nn.Module) -> None:
        self.family, self.hf, self.layout = family, hf, LAYOUT[family]
        self.order: Tensor | None = None

    def learn_order(self, values: dict[str, Any]) -> None:
        """In which order patches pass, where windows change it: by the numbers of the patches themselves."""
        if self.family == "qwen2_5_vl":
            before = self.value("patches", 0, values)
            after = self.value("vision_resid_pre", 0, values)
            self.order = torch.cdist(before, after).argmin(1)
            assert (after[self.order] == before).all() and len(set(self.order.tolist())) == len(before)

    def rows(self, strung: Tensor, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Row by row, as `pixel_values` have the patches."""
        if self.order is not None:
            strung = strung[self.order]
        return list(strung.split([sum(count(self.family, image) for image in row) for row in rows]))

    def module(self, key: str, layer: int) -> nn.Module:
        path = f"{self.layout['blocks']}.{layer}" + (f".{self.layout[key]}" if key else "")
        return self.hf.get_submodule(path)

    def value(self, site: str, layer: int, values: dict[str, Any]) -> Tensor:
        """What passes at a site."""
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return x

        with self.hooked(site, layer, keep), torch.no_grad():
            self.hf(**values, use_cache=False)
        assert len(seen) == 1
        return seen[0]

    def logits(self, site: str, layer: int, values: dict[str, Any], change: Change) -> Tensor:
        """Logits with a change at a site."""
        extra = {}
        if self.family not in pictures.QWEN:
            extra["position_ids"] = (values["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self.hooked(site, layer, change):
            return self.hf(**values, **extra, use_cache=False).logits

    @contextmanager
    def hooked(self, site: str, layer: int, change: Change) -> Iterator[None]:
        name = site.removeprefix("vision_")
        scale = 1.0
        if self.family == "internvl" and name in ("attn_out", "mlp_out"):
            block = self.module("", layer)
            scale = (block.lambda_1 if name == "attn_out" else block.lambda_2).detach()  # type: ignore[assignment]
        places: dict[str, tuple[str, str]] = {
            "resid_pre": ("", "in"), "attn_in": ("attn", "in"), "z": ("out", "in"), "attn_out": ("attn", "out"),
            "resid_mid": ("ln2", "in"), "mlp_in": ("mlp", "in"), "mlp_act": ("fc2", "in"), "mlp_out": ("mlp", "out"),
            "resid_post": ("", "out"),
        }  # fmt: skip
        if name in ("q", "k", "v"):
            module, side = self.module("qkv" if "qkv" in self.layout else name, layer), "out"
        elif name == "pre_merger":
            path, side = self.layout["merger"]
            module = self.hf.get_submodule(path)
        elif name == "patches":
            module, side = self.hf.get_submodule(self.layout["patches"]), "out"
        else:
            key, side = places[name]
            module = self.module(key, layer)

        def strung(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            if name in ("q", "k", "v") and "qkv" in self.layout:
                parts = list(flat.chunk(3, -1))
                at = "qkv".index(name)
                parts[at] = change(parts[at].unflatten(-1, (HEADS, -1))).flatten(-2)
                return torch.cat(parts, -1).reshape(x.shape)
            if name in ("q", "k", "v", "z"):
                return change(flat.unflatten(-1, (HEADS, -1))).flatten(-2).reshape(x.shape)
            return (change(flat * scale) / scale).reshape(x.shape)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (strung(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": strung(kwargs["hidden_states"])}

        def after(_: nn.Module, _args: Any, output: Any) -> Any:
            return (strung(output[0]), *output[1:]) if isinstance(output, tuple) else strung(output)

        # before transformers' own hooks, which record what LLaVA's projector is handed
        handle = (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if side == "in"
            else module.register_forward_hook(after, prepend=True)
        )
        try:
            yield
        finally:
            handle.remove()
