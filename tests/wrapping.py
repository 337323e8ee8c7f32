"""Sites of a wrapped model against hooks that are written by hand on its own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layouts import LAYOUT
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])
FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")


@contextmanager
def hooked(root: nn.Module, places: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """What passes at `path:in` or `path:out`, by site."""
    kept: dict[str, Tensor] = {}
    handles = []
    for site, place in places.items():
        path, side = place.split(":")
        module = root.get_submodule(path)
        if side == "in":
            handle = module.register_forward_pre_hook(lambda _m, args, site=site: kept.update({site: args[0].clone()}))
        else:
            handle = module.register_forward_hook(
                lambda _m, _a, out, site=site: kept.update({site: (out[0] if isinstance(out, tuple) else out).clone()})
            )
        handles.append(handle)
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def places(family: str, layer: int, prefix: str = "") -> dict[str, str]:
    """Where a layer's sites are in a family."""
    names = LAYOUT.get(family, LAYOUT["llama"])
    block = f"{prefix}{names['blocks']}.{layer}"
    out = {f"resid_pre[{layer}]": f"{block}:in", f"resid_post[{layer}]": f"{block}:out"}
    ends = {"attn_out": "out", "mlp_out": "out", "q": "out", "k": "out", "v": "out", "o": "in", "down": "in"}
    called = {"o": "z", "down": "mlp_act"}
    for part, side in ends.items():
        if part in names and not (part == "down" and "router" in names):
            out[f"{called.get(part, part)}[{layer}]"] = f"{block}.{names[part]}:{side}"
    return out | {"embed": f"{prefix}{names['embed']}:out", "final_norm": f"{prefix}{names['norm']}:out"}


def output_projection(root: Any, family: str, layer: int, prefix: str = "") -> Any:
    names = LAYOUT.get(family, LAYOUT["llama"])
    return root.get_submodule(f"{prefix}{names['blocks']}.{layer}.{names['o']}")


def hold(model: ic.Model, root: Any, family: str, prefix: str = "", rounding: float = 1e-5) -> None:
    """Every site against hooks by hand, and heads against the projection that adds them up."""
    where = {**places(family, 0, prefix), **places(family, 1, prefix)}
    with hooked(root, where) as kept, torch.no_grad():
        logits = root(input_ids=IDS).logits
    heads = [] if model.can(S.head_out, "read") else [S.head_out[1], S.attn_out[1], S.z[1]]
    run = model.run(IDS, read=[*where, *heads])
    torch.testing.assert_close(run.logits.plain, logits, atol=rounding, rtol=rounding)
    for site, by_hand in kept.items():
        torch.testing.assert_close(run[site].plain.reshape(by_hand.shape), by_hand, atol=rounding, rtol=rounding)
    if heads:
        whole = run[S.attn_out[1]].plain
        size = {"atol": 3 * rounding * float(whole.abs().max()), "rtol": 0}
        torch.testing.assert_close(run[S.head_out[1]].plain.sum(2) + model.bias(S.z[1]), whole, **size)
        weighed = torch.einsum("bphd,hde->bphe", run[S.z[1]].plain, model.weights(S.z[1]))
        torch.testing.assert_close(run[S.head_out[1]].plain, weighed, **size)
        some = model.run(IDS, read=S.head_out[1, [2, 0]])[S.head_out[1, [2, 0]]].plain
        torch.testing.assert_close(some, run[S.head_out[1]].plain[:, :, [2, 0]], **size)
