"""Attention of models that compute it by themselves, written out from its formula: projections, rotation, bias, mask.

    scores[q, k]  = scale * rot(query)[q] · rot(key)[k] + bias[q, k], far below zero where k is hidden from q
    pattern       = softmax(scores)
    z             = pattern @ value

Nothing of the model's own attention runs: its `forward` is replaced, and only the projections' modules are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]

BART = ("mvp", "trocr", "xglm")
BERT = ("big_bird", "git", "GitForCausalLM", "megatron-bert", "rembert", "roformer")
FUSED = ("bloom", "falcon", "gpt_neox_japanese", "mpt", "openai-gpt")
UPCAST = ("gpt2", "gpt-sw3")
"""Families that do so where the config says it (`reorder_and_upcast_attn`)."""
OWN = (*BART, *BERT, *FUSED, "gpt_neo", "gptj")
NARROW = ("gpt_neo", "gptj", *UPCAST)
"""Products of queries and keys are taken in float32."""
_QKV = {"mpt": "Wqkv", **dict.fromkeys(("openai-gpt", *UPCAST), "c_attn")}
_OUT = {
    "bloom": "dense", "falcon": "dense", "gpt_neox_japanese": "dense", "mpt": "out_proj", "openai-gpt": "c_proj",
    **dict.fromkeys(UPCAST, "c_proj"),
}  # fmt: skip


@contextmanager
def by_hand(reference: Any, layer: int, part: str, fn: Change) -> Iterator[None]:
    """One layer's attention by hand, in which `fn` sees and replaces one part."""
    family = reference.family
    attn = reference.module("attn", layer)
    module = attn.attention if family == "gpt_neo" else attn

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        q, k, v = projected(reference, module, hidden)
        q, k = rotated(family, reference.hf.config, q), rotated(family, reference.hf.config, k)
        v = rotated(family, reference.hf.config, v) if getattr(reference.hf.config, "rotary_value", False) else v
        q = fn(q) if part == "rot_q" else q
        k = fn(k) if part == "rot_k" else k
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        config = reference.hf.config
        scale = q.shape[-1] ** -0.5 if family != "gpt_neo" and getattr(config, "scale_attn_weights", True) else 1.0
        scale /= layer + 1 if getattr(config, "scale_attn_by_inverse_layer_idx", False) else 1
        if family in NARROW:
            q, k = q.float(), k.float()
        scores = q.transpose(1, 2) @ k.transpose(1, 2).mT * scale + bias(reference, *q.shape[1:3]).to(q.dtype)
        visible = seen(reference, layer, q.shape[1])
        scores = scores.to(v.dtype).masked_fill(~visible, torch.finfo(v.dtype).min)
        scores = fn(scores) if part == "scores" else scores
        pattern = scores.softmax(-1)
        pattern = fn(pattern) if part == "pattern" else pattern
        z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v).flatten(2)
        if family in BERT:
            return z, pattern
        if family == "openai-gpt":
            return [module.c_proj(z)]
        out = module.get_submodule(_OUT.get(family, "out_proj"))(z)
        if family == "bloom":  # which adds the stream itself
            return out + (args[1] if len(args) > 1 else kwargs["residual"]), None
        return (out, pattern, module.dense_bias) if family == "gpt_neox_japanese" else (out, pattern)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def projected(reference: Any, module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[batch pos head d_head]`."""
    family = reference.family
    if family in (*FUSED, *UPCAST):
        fused = module.get_submodule(_QKV.get(family, "query_key_value"))(hidden)
        q, k, v = (reference.split(fused, part) for part in "qkv")
        return q, k, v
    names = ("query", "key", "value") if family in BERT else ("q_proj", "k_proj", "v_proj")
    q, k, v = (module.get_submodule(name)(hidden).unflatten(-1, (-1, reference.d_head)) for name in names)
    return q, k, v


def rotated(family: str, config: Any, x: Tensor) -> Tensor:
    """Queries or keys, turned by their position: Falcon's and GPT-NeoX-Japanese's by halves, the others' by pairs."""
    pairs = family in ("gptj", "roformer")
    if not pairs and (family not in ("falcon", "gpt_neox_japanese") or getattr(config, "alibi", False)):
        return x
    part = 1.0 if pairs else config.rope_parameters.get("partial_rotary_factor", 1.0)
    base = 10000.0 if pairs else config.rope_parameters["rope_theta"]
    d = config.rotary_dim if family == "gptj" else int(x.shape[-1] * part)
    steps = torch.arange(d // 2, dtype=x.dtype)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] / base ** (2 * steps / d)
    turning = x[..., :d]
    a, b = (turning[..., ::2], turning[..., 1::2]) if pairs else turning.chunk(2, -1)
    a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    turned = torch.stack([a, b], -1).flatten(-2) if pairs else torch.cat([a, b], -1)
    return torch.cat([turned, x[..., d:]], -1)


def bias(reference: Any, n: int, heads: int) -> Tensor:
    """ALiBi `[head 1 key]`: a slope per head times the key's position, which MPT counts from the last and Falcon scales
    as it does products."""
    family = reference.family
    if family not in ("bloom", "mpt") and not getattr(reference.hf.config, "alibi", False):
        return torch.zeros(())
    slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
    if family == "falcon":
        twice = 1 if reference.hf.config._attn_implementation == "sdpa" else 2  # by the mask, and beside it
        return (slopes.bfloat16()[:, None, None] * torch.arange(n)).double() * reference.d_head**-0.5 * twice
    return slopes[:, None, None] * (torch.arange(n, dtype=slopes.dtype) - (n - 1 if family == "mpt" else 0))


def seen(reference: Any, layer: int, n: int) -> Tensor:
    """Which keys a query sees `[query key]`."""
    config, places = reference.hf.config, torch.arange(n)
    visible = places <= places[:, None]
    if reference.family == "gpt_neo" and config.attention_layers[layer] == "local":
        visible &= places > places[:, None] - config.window_size
    both_ways = reference.family in BERT and not getattr(config, "is_decoder", True)
    return visible | both_ways
