"""JetMoE: top-k of the logits, then softmax over these; the router's module gives the slots sorted by expert.

Attention is a mixture too: a router of its own, which has no site, sends each token to experts that project queries
and what heads give; so a token's heads are those of its slots, and head 3 of one token is another expert's than that of
the next. Both projections see rows sorted by expert. No single module runs an expert, so `expert_out` does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family
from .hook_points import Call, HookPoint, transposed
from .reach import Reach
from .routing import Router, TopKOfLogits, dense


class SortedRouter(Router):
    """The module returns `(slots in the order of their experts, their tokens, weights, slots per expert, logits)`; slot
    i is the (i mod k)-th of token i div k."""

    def logits(self, output: Any) -> Tensor:
        """See `Router.logits`."""
        logits: Tensor = output[4]
        return logits

    def weights(self, output: Any, n_experts: int) -> Tensor:
        """See `Router.weights`."""
        return dense(*self.slots(output, len(output[0]) // len(output[4])), n_experts)

    def chosen(self, output: Any, k: int) -> Tensor:
        """See `Router.chosen`."""
        slots, _, _, sizes, _ = output
        experts = torch.arange(len(sizes), device=slots.device)
        experts = experts.repeat_interleave(torch.tensor(sizes, device=slots.device))
        return torch.empty_like(experts).scatter(0, slots, experts).view(-1, k)

    def slots(self, output: Any, k: int) -> tuple[Tensor, Tensor]:
        """See `Router.slots`."""
        weights = torch.empty_like(output[2]).scatter(0, output[0], output[2])
        return weights.view(-1, k), self.chosen(output, k)

    def returned(self, output: Any, logits: Tensor, weights: Tensor, chosen: Tensor) -> Any:
        """See `Router.returned`."""
        experts, slots = chosen.flatten().sort(stable=True)
        sizes = torch.bincount(experts, minlength=logits.shape[-1]).tolist()
        sorted_weights = weights.to(output[2].dtype).flatten()[slots]
        return slots, slots.div(chosen.shape[-1], rounding_mode="trunc"), sorted_weights, sizes, logits

    def reweighted(self, output: Any, weights: Tensor) -> Any:
        """See `Router.reweighted`."""
        as_others_give_it = (output[4], *self.slots(output, len(output[0]) // len(weights)))
        return self.returned(output, *super().reweighted(as_others_give_it, weights))


def by_token(n_heads: int, d_head: int, experts: str, module: str, side: Any) -> HookPoint:
    """Rows of slots, sorted by expert, as heads of tokens."""

    def get(call: Call, _units: tuple[int, ...] | None) -> Tensor:
        rows = torch.zeros_like(call.first).index_copy(0, call.needs[0], call.first)
        return rows.view(*call.shape, n_heads, d_head)

    def put(call: Call, _old: Tensor, new: Tensor) -> None:
        call.first = new.reshape(call.first.shape)[call.needs[0]]

    needs = (HookPoint(f"{experts}.router", "out"),)
    return HookPoint(f"{experts}.{module}", side, get=get, put=put, needs=needs)


def heads_of_slots(block: Any) -> None:
    """Heads of a mixture of attention; a key-value head serves one head of each slot."""
    attention, path, stack = block.module.self_attention, f"{block.path}.self_attention", block.stack
    counts = {"head": attention.num_heads, "d_head": attention.head_dim}
    stack.atlas.reaches[block.layer] = Reach.of(attention, block.config, block.layer, images=False)
    for name, module, side in (("q", "input_linear", "out"), ("z", "output_linear", "in")):
        point = by_token(counts["head"], counts["d_head"], f"{path}.experts", module, side)
        block.add(name, point, point, counts, {"grad": "it is put together of rows sorted by expert"})
    for name in ("v", "rot_q", "rot_k"):
        block.view(name, HookPoint(path, "attention", name, view=transposed), counts)
    for name in ("scores", "pattern"):
        block.view(name, HookPoint(path, "attention", name), {"head": counts["head"]})


FAMILY = Family(
    "jetmoe",
    sites=(heads_of_slots,),
    router=SortedRouter("mlp.router", "mlp.output_linear", TopKOfLogits()),
    refuse={
        "expert_out": "JetMoE runs its experts on rows sorted by expert; no module gives one expert's output",
        "head_out": "JetMoE projects a token's heads by the experts that the token chose, and weighs what they give: "
        "there is no one output projection",
        "k": "a key-value head of JetMoE serves a head of each slot, by turns and not group by group; rot_k has the "
        "keys of every head",
    },
)
