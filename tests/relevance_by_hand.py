"""Relevance by hand: the plain model runs, and rules are hung on the nodes of its autograd graph.

Nothing here replaces anything in the forward pass, and nothing comes from `interp_plugins.attribution.relevance.rules`: what a node
is is told by its name, where it stands by when it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layouts import DENSE, LAYOUT, LINEAR
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2CLS

EPSILON = 1e-10
COMPOSED = tuple({kind for kind in ACT2CLS.values() if isinstance(kind, type)})
Ranges = dict[str, list[tuple[int, int]]]


def relevance(hf: Any, family: str, ids: Tensor, at: int, token: int, rule: str, router: str) -> Tensor:
    """Relevance of each token for one logit, by rule set `attnlrp`, `cp_lrp` or `gradient` `[pos]`."""
    for weight in hf.parameters():
        weight.requires_grad_(False)
    leaf: list[Tensor] = []

    def embedded(_module: Any, _args: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    handle = hf.get_input_embeddings().register_forward_hook(embedded)
    try:
        with marked(hf, family, router if rule != "gradient" else "plain", rule) as ranges:
            logit = hf(input_ids=ids, use_cache=False).logits[0, at, token]
    finally:
        handle.remove()
    if rule != "gradient":
        Hung(rule, router, ranges).on(logit.grad_fn)
    (grad,) = torch.autograd.grad(logit, leaf[0])
    return (leaf[0].detach() * grad).sum(-1)[0]


def nodes(root: Any) -> Iterator[Any]:
    """All nodes of a graph."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]


def now() -> int:
    """Number of the next node."""
    return int((torch.zeros(1, requires_grad=True) * 1).grad_fn._sequence_nr())  # type: ignore[union-attr]


@contextmanager
def marked(hf: Any, family: str, router: str, rule: str) -> Iterator[Ranges]:
    """While the model runs, note which nodes are made where; composed activations become one factor of their input."""
    ranges: Ranges = {"mixture": [], "experts": [], "plain": [], "cut": []}
    layout, modules, handles = LAYOUT[family], dict(hf.named_modules()), []

    def timed(module: Any, kind: str) -> None:
        starts: list[int] = []
        handles.append(module.register_forward_pre_hook(lambda *_: starts.append(now())))
        handles.append(module.register_forward_hook(lambda *_: ranges[kind].append((starts.pop(), now()))))

    def constant(_module: Any, _args: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if part.requires_grad:
                number = part.grad_fn._sequence_nr()
                ranges["cut"].append((number, number + 1))

    def factor(module: Any, args: Any, output: Tensor) -> Tensor:
        x = args[0].detach()
        slope = output.detach() / (x + EPSILON * torch.ones_like(x).copysign(x))
        return args[0] * slope + (output.detach() - x * slope)

    for layer in range(hf.config.get_text_config().num_hidden_layers):
        block = f"{layout['blocks']}.{layer}"
        if layer in LINEAR.get(family, ()):
            timed(modules[f"{block}.linear_attn"], "plain")
        if "router" in layout and layer not in DENSE[family]:
            timed(modules[f"{block}.{layout['mlp']}"], "mixture")
            timed(modules[f"{block}.{layout['experts']}"], "experts")
            timed(modules[f"{block}.{layout['router']}"], "plain")
            if router == "frozen":
                handles.append(modules[f"{block}.{layout['router']}"].register_forward_hook(constant))
    if rule != "gradient":
        composed = [m for m in hf.modules() if isinstance(m, COMPOSED) and "NewGELU" in type(m).__name__]
        handles += [module.register_forward_hook(factor) for module in composed]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


class Hung:
    """Rules on the nodes of a graph."""

    def __init__(self, rule: str, router: str, ranges: Ranges) -> None:
        self.rule, self.router, self.ranges = rule, router, ranges
        self.known: dict[Any, bool] = {}

    def inside(self, node: Any, kind: str) -> bool:
        return any(start <= node._sequence_nr() < stop for start, stop in self.ranges[kind])

    def routing(self, node: Any) -> bool:
        return self.inside(node, "mixture") and not self.inside(node, "experts")

    def cut(self, node: Any) -> bool:
        """Whether what a node computed counts as a constant."""
        kind, routing = type(node).__name__.removesuffix("Backward0"), self.routing(node)
        if self.inside(node, "cut"):
            return True
        if self.inside(node, "plain"):
            return False
        softmax = self.rule == "cp_lrp" or (routing and self.router == "frozen")
        gate = not (routing and self.router == "halved")
        return kind == "Rsqrt" or (kind == "Softmax" and softmax) or (kind in ("Sigmoid", "Softplus") and gate)

    def moves(self, node: Any) -> bool:
        """Whether any gradient gets through a node."""
        if node is None:
            return False
        if node not in self.known:
            parents = [parent for parent, _ in node.next_functions]
            self.known[node] = not self.cut(node) and (not parents or any(map(self.moves, parents)))
        return self.known[node]

    def on(self, root: Any) -> None:
        for node in reversed(list(nodes(root))):
            self.moves(node)
        for node in nodes(root):
            self.hang(node)

    def hang(self, node: Any) -> None:
        """Hang its rule on a node."""
        if self.cut(node):
            self.shared(node, [0.0] * len(node.next_functions))
            return
        if self.inside(node, "plain"):
            return
        kind, parents = type(node).__name__.removesuffix("Backward0"), [parent for parent, _ in node.next_functions]
        if kind in ("Mul", "Bmm") and sum(map(self.moves, parents)) == 2:
            active = [type(parent).__name__ in ("SiluBackward0", "GeluBackward0") for parent in parents]
            if self.rule == "cp_lrp" and any(active):
                self.shared(node, [0.0 if on else 1.0 for on in active])
            else:
                self.shared(node, [0.5, 0.5])
        elif kind in SLOPES:
            slope = SLOPES[kind](node)
            node.register_hook(lambda _inputs, outputs: (outputs[0] * slope,))
        elif kind == "NativeLayerNorm":
            scale, weight = node._saved_result2, node._saved_weight

            def centred(_inputs: Any, outputs: Any) -> Any:
                grad = outputs[0] * weight * scale
                return (grad - grad.mean(-1, keepdim=True), None, None)

            node.register_hook(centred)

    def shared(self, node: Any, shares: list[float]) -> None:
        node.register_hook(
            lambda inputs, _: tuple(None if x is None else x * s for x, s in zip(inputs, shares, strict=True))
        )


def _slope(x: Tensor, y: Tensor) -> Tensor:
    return y / (x + EPSILON * torch.ones_like(x).copysign(x))


SLOPES: dict[str, Callable[[Any], Tensor]] = {
    "Silu": lambda node: _slope(node._saved_self, F.silu(node._saved_self)),
    "Gelu": lambda node: _slope(node._saved_self, F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "Tanh": lambda node: _slope(torch.atanh(node._saved_result), node._saved_result),
}
