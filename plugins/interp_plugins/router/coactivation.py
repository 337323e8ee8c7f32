"""Which experts are chosen together: within a layer, and from one layer to the next.

    N_ij            tokens whose S holds i and j; N_ii = N_i tokens whose S holds i
    given[i, j]     P(j | i) = N_ij / N_i                    over all pairs of a token's k experts
    lift[i, j]      N_ij N / (N_i N_j)                       1: as often together as independent experts would be
    reference       pairs of neighbours in the weight-sorted list alone, k - 1 instead of k (k - 1) / 2
    step[e, e']     P(e' at the next layer with experts | e at this one), over all k · k pairs; rows sum to k

Source: Muennighoff et al. (2024), OLMoE, arXiv:2409.02060, defines all pairs; its code counts neighbours.
Shapes: `[layer expert expert]`; steps `[layer - 1 expert expert]`, row i from the i-th layer to the one after it.
Cost: n · expert² multiply-adds per batch and layer; memory layer · expert², whatever the number of tokens.
Must equal: golden counts exactly; rows of `given` without the diagonal sum to k - 1, with neighbours to
2 (k - 1) / k on average over tokens' experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic

from .routed import Routed

EXACT = 1 << 24
"""Up to so many tokens a product of zeros and ones in float32 counts exactly."""


def together(first: Routed, second: Routed) -> Int[Tensor, "expert expert"]:
    """Tokens that go to expert i of the first and j of the second.

    Raises:
        PlanError: other tokens.
    """
    if len(first) != len(second):
        raise ic.PlanError(f"{len(first)} tokens are paired with {len(second)}; both layers need the same positions")
    total = torch.zeros(first.n_experts, second.n_experts, dtype=torch.long, device=first.chosen.device)
    for i in range(0, len(first), EXACT):
        a, b = first.chosen[i : i + EXACT].float(), second.chosen[i : i + EXACT].float()
        total += (a.T @ b).round().long()
    return total


def neighbours(routed: Routed) -> Int[Tensor, "expert expert"]:
    """Tokens in whose list, sorted by weight, i and j stand next to each other; the diagonal has N_i.

    Raises:
        ReadError: ids alone have no order.
    """
    weights = routed.need("weights").double().masked_fill(~routed.chosen, float("-inf"))
    k = int(routed.chosen.sum(-1).amax())
    order = weights.argsort(dim=-1, descending=True, stable=True)[:, :k]
    real = routed.chosen.gather(-1, order)
    total = torch.zeros(routed.n_experts, routed.n_experts, dtype=torch.long, device=order.device)
    for i in range(k - 1):
        rows = real[:, i + 1]
        pair = order[rows, i], order[rows, i + 1]
        total.index_put_(pair, torch.ones_like(pair[0]), accumulate=True)
    return total + total.T + torch.diag(routed.chosen.sum(0))


def given(counts: Tensor) -> Float[Tensor, "*layer expert expert"]:
    """P(j | i) of counts whose diagonal is N_i; NaN in the rows of experts that no token chose."""
    own = counts.diagonal(dim1=-2, dim2=-1).double()
    return counts.double() / own[..., None]


def lift(counts: Tensor, tokens: int) -> Float[Tensor, "*layer expert expert"]:
    """How much more often than independent experts; NaN where one of them was never chosen."""
    own = counts.diagonal(dim1=-2, dim2=-1).double()
    return counts.double() * tokens / (own[..., None] * own[..., None, :])


def conditional(step: Tensor, chosen: Tensor) -> Float[Tensor, "*layer expert expert"]:
    """P(e' at the next layer | e) of pair counts and the tokens `[layer expert]` that chose e."""
    return step.double() / chosen.double()[..., None]


class Coactivation:
    """Counts of pairs, gathered batch by batch; layers of a batch come in rising order.

    Args:
        reference: count neighbours in the weight-sorted list alone.
    """

    def __init__(self, *, reference: bool = False) -> None:
        self.reference = reference
        self.tokens = 0
        self._counts: dict[int, Tensor] = {}
        self._steps: dict[tuple[int, int], Tensor] = {}
        self._before: tuple[int, Routed] | None = None

    def add_layer(self, layer: int, routed: Routed) -> None:
        """Tokens of a batch in one layer.

        Raises:
            PlanError: the tokens are not those of the layer before.
            ReadError: `reference` of ids alone.
        """
        pairs = neighbours(routed) if self.reference else together(routed, routed)
        self._counts[layer] = self._counts[layer] + pairs if layer in self._counts else pairs
        # layers rise within a batch: one that does not begins the next batch, and has none before it
        if self._before is not None and self._before[0] < layer:
            key, step = (self._before[0], layer), together(self._before[1], routed)
            self._steps[key] = self._steps[key] + step if key in self._steps else step
        else:
            self.tokens += len(routed)
        # the sets alone, so that weights and logits of the layer can be let go
        self._before = layer, Routed(routed.chosen)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that have experts."""
        return tuple(sorted(self._counts))

    @property
    def counts(self) -> Int[Tensor, "layer expert expert"]:
        """N_ij by layer."""
        return torch.stack([self._counts[layer] for layer in self.layers]).cpu()

    @property
    def steps(self) -> Int[Tensor, "step expert expert"]:
        """Pairs over two layers that follow each other."""
        return torch.stack([self._steps[key] for key in sorted(self._steps)]).cpu()

    def nbytes(self) -> int:
        """Bytes of all counts."""
        return sum(x.numel() * x.element_size() for x in (*self._counts.values(), *self._steps.values()))
