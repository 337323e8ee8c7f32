"""How many heads a layer has, and how q, k and v lie in what its projections give, written out by hand for every family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from type_layouts import GATED_QUERIES, PER_HEAD, WIDE_QUERIES


class Projected:
    """The projections of a tiny model of one family.

    Attributes:
        layout: names of modules.
        shape: batch and pos of the input at hand.
    """

    hf: nn.Module
    family: str
    layout: dict[str, str]
    shape: tuple[int, int]

    def at(self, layer: int) -> None:
        """Count heads as the config does for a layer."""
        config = self.hf.config.get_text_config()
        if getattr(config, "per_layer_config", None):
            config = config.per_layer_config[layer]
        settings = config.to_dict()
        self.n_heads = getattr(config, "num_attention_heads", 1)  # Mamba has none
        named = {True: 1, False: self.n_heads, None: settings.get("num_key_value_heads")}
        self.n_kv = named[settings.get("multi_query")] or self.n_heads
        if settings.get("new_decoder_architecture"):
            self.n_kv = settings["num_kv_heads"]
        said = settings.get("v_head_dim") or settings.get("head_dim") or settings.get("attention_head_dim")
        self.d_head = said or config.hidden_size // self.n_heads
        self.side_by_side = self.family in PER_HEAD or settings.get("multi_query") is False
        self.d_key = settings["head_dim"] if self.family == "mimo_v2_flash" else self.d_head

    def split(self, x: Tensor, part: str) -> Tensor:
        """q, k or v `[batch pos head d_head]` out of what a projection returned."""
        b, s = self.shape
        config = self.hf.config
        if (clip := getattr(getattr(config, "attn_config", config), "clip_qkv", None)) and (
            self.family != "olmoe" or part == "v"  # which norms queries and keys before that
        ):
            x = x.clamp(-clip, clip)
        if self.family in WIDE_QUERIES and part == "v":  # per head a part of its key, and its value
            return x.reshape(b, s, self.n_heads, -1)[..., -self.d_head :]
        if self.family == "axk2":  # and its gate
            return x.reshape(b, s, self.n_heads, -1)[..., : -self.d_head]
        if self.family in WIDE_QUERIES:  # queries are wider than values
            return x.reshape(b, s, self.n_heads, -1)
        if self.family in GATED_QUERIES and part == "q":  # and its gate
            return x.reshape(b, s, self.n_heads, 2, self.d_head)[..., 0, :]
        if "qkv" not in self.layout:
            return x.reshape(b, s, -1, self.d_key)
        if self.family == "codegen":  # four parts, each with queries, values and keys
            return x.reshape(b, s, 4, 3, -1)[:, :, :, "qvk".index(part)].reshape(b, s, -1, self.d_head)
        index = "qkv".index(part)
        if self.family == "falcon":  # per key-value head its queries, its key and its value
            return (
                x.unflatten(-1, (self.n_kv, -1, self.d_head))
                .split([self.n_heads // self.n_kv, 1, 1], 3)[index]
                .flatten(2, 3)
            )
        if self.side_by_side:
            return x.reshape(b, s, self.n_heads, 3, self.d_head)[:, :, :, index]
        sizes = [self.n_heads * self.d_head, self.n_kv * self.d_head, self.n_kv * self.d_head]
        return x.split(sizes, -1)[index].reshape(b, s, -1, self.d_head)

    def joined(self, x: Tensor, part: str, new: Tensor) -> Tensor:
        """What the projection would have to return for q, k or v to be `new`."""
        b, s = self.shape
        if self.family in WIDE_QUERIES and part == "v":
            keys = x.reshape(b, s, self.n_heads, -1)[..., : -self.d_head]
            return torch.cat([keys, new], -1).reshape(x.shape)
        if self.family in GATED_QUERIES and part == "q":
            gate = x.reshape(b, s, self.n_heads, 2, self.d_head)[..., 1, :]
            return torch.stack([new, gate], 3).reshape(x.shape)
        if self.family == "axk2" and part == "q":
            gate = x.reshape(b, s, self.n_heads, -1)[..., -self.d_head :]
            return torch.cat([new, gate], -1).reshape(x.shape)
        if "qkv" not in self.layout:
            return new.reshape(x.shape)
        parts = {name: new if name == part else self.split(x, name) for name in "qkv"}
        if self.family == "codegen":
            return torch.stack([parts[name].reshape(b, s, 4, -1) for name in "qvk"], 3).reshape(x.shape)
        if self.family == "falcon":
            return torch.cat([parts[name].unflatten(2, (self.n_kv, -1)) for name in "qkv"], 3).reshape(x.shape)
        if self.side_by_side:
            return torch.stack([parts[name] for name in "qkv"], 3).reshape(x.shape)
        return torch.cat([parts[name].flatten(2) for name in "qkv"], -1)
