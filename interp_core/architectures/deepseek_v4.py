"""DeepSeek-V4: the first layers send each token id to experts of its own, by a table ("hash routers"); the others
choose by scores with a correction bias.

Several residual streams pass between blocks, so most sites of the stream do not exist. Attention has one key, which is
the value too, and some layers attend to compressed keys besides. The rotation of values is taken back from what they
are mixed to, before `z`; heads are projected in groups, and these together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import hook_points
from .family import Family, Heads
from .hook_points import HookPoint
from .routing import Router
from .scored import BIAS, Beside, Scored, own_score


def _hashed(module: Any) -> bool:
    return hasattr(module, "tid2eid")


class ScoredOrById(Scored):
    """Chosen by scores, or by token ids; weighed by scores."""

    def scores(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.scores`."""
        return Scored(self.score).scores(router, logits) if _hashed(router) else super().scores(router, logits)

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.choose`."""
        if not _hashed(router):
            return super().choose(router, logits)
        by_id: Tensor = router.tid2eid[router.token_ids.reshape(-1)].long()
        return by_id


class HashedRouter(Router):
    """A router of logits, or of token ids, which the block hands it."""

    def absent(self, module: Any) -> Mapping[str, str]:
        """See `Router.absent`."""
        why = "a hash router: token ids choose the experts, logits only weigh them"
        return dict.fromkeys(("router_logits", "router_probs"), why) if _hashed(module) else {}

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return Beside(module, token_ids=args[1]) if _hashed(module) else module


_COMPRESSED = (
    "this layer attends to compressed keys behind those of the text's tokens: there are more keys than positions"
)


def attention_heads(attention: Any, _heads: Heads) -> Heads:
    """Many queries and one key."""
    return Heads(attention.num_heads, 1, attention.head_dim)


def grouped_heads(block: Any) -> None:
    """`head_out`: what becomes of a head in its group's projection, and of that in the last one. Layers whose keys are
    compressed have no sites with a position per key."""
    attention, path = block.module.self_attn, f"{block.path}.self_attn"
    n, width = attention.num_heads, block.d_model["d_model"]

    def get(call: hook_points.Call, units: tuple[int, ...] | None) -> Tensor:
        z = call.needs[0].unflatten(2, (-1,)).flatten(2).unflatten(-1, (n, -1))
        first = attention.o_a_proj.weight.unflatten(0, (attention.o_a_proj.n_groups, -1))  # [group lora in]
        first = first.unflatten(-1, (-1, z.shape[-1]))  # [group lora head d_head]
        last = attention.o_b_proj.weight.unflatten(-1, first.shape[:2])  # [d_model group lora]
        matrices = torch.einsum("glhd,egl->ghde", first, last).flatten(0, 1)
        heads = list(range(n) if units is None else units)
        return torch.einsum("bphd,hde->bphe", z[..., heads, :], matrices[heads])

    def put(call: hook_points.Call, old: Tensor, new: Tensor) -> None:
        call.first = call.first + (new - old).sum(-2)

    needs = (HookPoint(f"{path}.o_a_proj", "in"),)
    point = HookPoint(f"{path}.o_b_proj", "out", get=get, put=put, partial=True, needs=needs)
    why = {"grad": "it is computed beside the forward pass"}
    block.add("head_out", point, point, {"head": n, "d_model": width}, why)
    atlas = block.stack.atlas
    atlas.withdrawn.pop(("head_out", block.layer), None)
    atlas.entries["z", block.layer].module = None  # no one module projects it
    for name in ("v", "rot_k", "scores", "pattern") if attention.compressor is not None else ():
        atlas.entries.pop((name, block.layer), None)
        atlas.withdrawn[name, block.layer] = _COMPRESSED


FAMILY = Family(
    "deepseek_v4",
    paths={"blocks.attn.q": "q_b_proj", "blocks.attn.k": "kv_proj", "blocks.attn.o": "o_a_proj"},
    heads=attention_heads,
    inside=("v",),
    sites=(grouped_heads,),
    router=HashedRouter(
        "mlp.gate", "mlp.experts", ScoredOrById(own_score, BIAS, eps=1e-20, scale="routed_scaling_factor")
    ),
)
