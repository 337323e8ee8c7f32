"""What experts put out: contribution norms, REAP and frequency scores, and super experts.

    f_e(h)            output of expert e before the routing weight w_e; only tokens routed to e count
    frequency         N_e
    contribution      1/N_e Σ |w_e| ‖f_e‖          mean norm of what is added
    reap              1/N_e Σ w_e ‖f_e‖            S_j of REAP; never-routed experts score 0
    ean_sum, ean_mean Σ ‖f_e‖ and its mean         weighted_ean_sum = Σ w_e ‖f_e‖ = frequency · reap
    largest           max |f_e| over tokens and channels

    super expert      largest > P99.5 of all experts (linear interpolation), and > max / 10, in a layer below .75 L

`w` is the executed weight, which is REAP's g for families that softmax over all experts; where a family scales its
weights, every score of a model is scaled alike. "reference" takes ⌊max / 10⌋ as floor, as the published code does.

Source: REAP, Lasby et al. (2025), arXiv:2510.13999; super experts, Su et al. (2025), arXiv:2507.23279.
Cost: the experts once more for k · n token-slots, in pieces of `piece_bytes`; no `[n expert d_model]` tensor.
Must equal: S.expert_out over S.router_weights, expert by expert; two batches of unequal size = one batch.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import stats

from .points import Points, demand_routers
from .reading import Places

SUMS = ("frequency", "contribution", "weighted", "norm")
QUANTILE = 99.5
SHARE = 0.75


@dataclass(eq=False)
class ExpertOutputs:
    """Sums over tokens, by layer `[expert]`, gathered batch by batch.

    Attributes:
        sums: of each of frequency, contribution, weighted (w ‖f‖) and norm (‖f‖).
        largest: max |f|.
        n_layers: decoder layers of the model.
    """

    n_layers: int
    sums: dict[int, dict[str, Float[Tensor, " expert"]]] = field(default_factory=dict)
    largest: dict[int, Float[Tensor, " expert"]] = field(default_factory=dict)

    def add(self, layer: int, expert: Tensor, weight: Tensor, outputs: Tensor, n_experts: int) -> None:
        """Outputs `[slot d_model]` of experts `[slot]`, before their weights `[slot]`."""
        norm, weight = outputs.double().norm(dim=-1), weight.double()
        ones = torch.ones_like(norm)
        values = dict(zip(SUMS, (ones, weight.abs() * norm, weight * norm, norm), strict=True))
        kept = self.sums.setdefault(layer, {name: norm.new_zeros(n_experts) for name in SUMS})
        for name, value in values.items():
            kept[name].index_add_(0, expert, value)
        top = self.largest.setdefault(layer, norm.new_zeros(n_experts))
        top.scatter_reduce_(0, expert, outputs.abs().amax(-1).double(), "amax")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that have experts."""
        return tuple(sorted(self.sums))

    def score(self, name: str) -> Float[np.ndarray, "layer expert"]:
        """A score by its name, see the module.

        Raises:
            PlanError: no such score, or nothing was added.
        """
        known = ("frequency", "contribution", "reap", "ean_sum", "ean_mean", "weighted_ean_sum", "largest")
        if name not in known or not self.sums:
            raise ic.PlanError(f"no score {name!r} here. {ic.errors.nearest(name, known if self.sums else ())}")
        if name == "largest":
            return _stacked(self.largest[layer] for layer in self.layers)
        raw = {"ean_sum": "norm", "ean_mean": "norm", "weighted_ean_sum": "weighted", "reap": "weighted"}.get(
            name, name
        )
        value = _stacked(self.sums[layer][raw] for layer in self.layers)
        if name in ("contribution", "reap", "ean_mean"):
            # never-routed experts have sums of 0, and score 0
            value = value / np.maximum(_stacked(self.sums[layer]["frequency"] for layer in self.layers), 1)
        return value

    def agreement(self, first: str = "reap", second: str = "frequency") -> Float[np.ndarray, " layer"]:
        """Spearman's correlation of two scores over the experts of each layer; NaN where one of them is constant."""
        pairs = zip(self.score(first), self.score(second), strict=True)
        return np.array([stats.spearman(a, b) for a, b in pairs])


def _stacked(rows: Iterable[Tensor]) -> np.ndarray:
    return torch.stack([row.cpu() for row in rows]).numpy()


def outputs_of(
    model: ic.Model, batches: Iterable[ic.Tokens], at: Any = None, *, piece_bytes: int = 1 << 28
) -> ExpertOutputs:
    """Output norms of every expert, over the tokens routed to it.

    Args:
        model: with routers.
        batches: of tokens, also from a generator.
        at: positions that count; None: all real tokens.
        piece_bytes: of outputs that are held at a time.

    Raises:
        CapabilityError: a dense model, or a family whose experts are not called with hidden states, ids and weights.
        PositionError: a row without a token there.
    """
    layers = demand_routers("router outputs", model)
    _demand_apart(model, layers)
    outputs = ExpertOutputs(model.n_layers)
    sizes = {layer: model.sizes(S.router_logits[layer])["expert"] for layer in layers}
    for tokens in batches:
        counted = Places(tokens, at).mask(tokens)
        rules: dict[Any, Any] = {
            model.module("experts", layer): _rule(outputs, layer, sizes[layer], counted, piece_bytes)
            for layer in layers
        }
        with model.replacing(rules):
            model.run(tokens, read=S.resid_post[layers[-1]], logits=False)
    return outputs


def _demand_apart(model: ic.Model, layers: Iterable[int]) -> None:
    """Refuse experts whose outputs apart from their weights cannot be had.

    Raises:
        CapabilityError: experts that are unknown, or whose module is not handed ids and weights.
    """
    if why := model.can("expert_out", "read"):
        raise ic.CapabilityError(f"router outputs need the experts of {model.source}: {why}")
    for layer in layers:
        experts = model.module("experts", layer)
        takes = list(inspect.signature(experts.forward).parameters)
        if len(takes) != 3:
            raise ic.CapabilityError(
                f"router outputs: {type(experts).__name__} of {model.source} takes "
                f"{', '.join(takes)}, not hidden states, ids and weights: a weight scales what an expert reads, so "
                "that its output apart from the weight is not defined. Usage, load and routes are defined here too"
            )


def _rule(totals: ExpertOutputs, layer: int, n_experts: int, counted: Bool[Tensor, " token"], piece_bytes: int) -> Any:
    """What an experts' module does, and beside it the outputs of its experts without their weights."""

    def rule(module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if len(args) != 3 or kwargs or args[1].shape != args[2].shape or len(args[0]) != len(counted):
            raise ic.CapabilityError(
                f"router outputs: {type(module).__name__} is not called with hidden states, ids and weights, so that "
                "an expert's output apart from its weight is not defined"
            )
        hidden, ids, weights = args
        rows = counted.to(ids.device).nonzero()[:, 0]
        step = max(1, piece_bytes // (ids.shape[1] * hidden.shape[1] * hidden.element_size()))
        for part in rows.split(step):
            slots, expert = part.repeat_interleave(ids.shape[1]), ids[part].flatten()
            # the family's own experts once more, each token-slot as a token of one expert with weight 1: what comes out
            # is f_e
            single = torch.ones_like(weights[part].reshape(-1, 1))
            outputs = forward(hidden[slots], expert[:, None], single).detach()
            weight = weights[part].detach().flatten()
            _demand_sum(module, (outputs * weight[:, None]).view(len(part), -1, outputs.shape[1]).sum(1), out[part])
            totals.add(layer, expert, weight, outputs, n_experts)
        return out

    return rule


def _demand_sum(module: Any, total: Tensor, out: Tensor) -> None:
    """Refuse outputs that are not what the block adds.

    Raises:
        CapabilityError: their weighted sum is something else, beyond rounding.
    """
    error, size = (total - out).double().norm(), out.double().norm()
    # sums in another order differ by rounding; a rule that does something else is off by far more
    if float(error) > 256 * torch.finfo(out.dtype).eps * max(float(size), 1e-30):
        raise ic.CapabilityError(
            f"router outputs: the weighted outputs of {type(module).__name__} do not add up to what it returns "
            f"(off by {float(error / size):.2g} of it); this family is not known well enough"
        )


@dataclass(frozen=True)
class SuperExperts:
    """Experts whose outputs tower over all others.

    Attributes:
        cells: (layer, expert), the largest first.
        bound: what they are above.
        largest: of each of them.
        last_layer: layers from this one on were left out.
    """

    cells: tuple[tuple[int, int], ...]
    bound: float
    largest: tuple[float, ...]
    last_layer: int


def super_experts(
    largest: Any,
    layers: Iterable[int],
    n_layers: int,
    *,
    shared: Any = (),
    floor: Literal["exact", "reference"] = "exact",
) -> SuperExperts:
    """Find them.

    Args:
        largest: max |f| of each expert, `[layer expert]`.
        layers: decoder layers of the rows.
        n_layers: decoder layers of the model, dense ones too; those from round(.75 n_layers) on are left out.
        shared: the same of shared experts, `[row x]`, if known; they count in the percentile alone.
        floor: "exact" max / 10, or "reference" its whole part.

    Raises:
        PlanError: numbers that do not fit, or no layer that counts.
    """
    values, rows = np.asarray(largest, dtype=np.float64), list(layers)
    if values.ndim != 2 or len(values) != len(rows) or floor not in ("exact", "reference"):
        raise ic.PlanError(
            f"super_experts: numbers {list(values.shape)} of {len(rows)} layers, floor {floor!r}; floors are 'exact' "
            "and 'reference'"
        )
    last = round(SHARE * n_layers)
    kept = [row for row, layer in enumerate(rows) if layer < last]
    if not kept:
        raise ic.PlanError(f"super_experts: no layer below {last} of {n_layers} has experts; they are in {rows}")
    beside = [np.asarray(shared, dtype=np.float64)[kept].ravel()] if len(shared) else []
    pool = np.concatenate([values[kept].ravel(), *beside])
    tenth = pool.max() / 10
    bound = max(float(np.percentile(pool, QUANTILE)), math.floor(tenth) if floor == "reference" else float(tenth))
    cells = [
        (float(values[row, e]), rows[row], e) for row in kept for e in range(values.shape[1]) if values[row, e] > bound
    ]
    cells.sort(key=lambda cell: (-cell[0], cell[1:]))
    return SuperExperts(tuple(cell[1:] for cell in cells), bound, tuple(cell[0] for cell in cells), last)


def warn_super(points: Points | Mapping[int, Iterable[int]], supers: SuperExperts) -> tuple[tuple[int, int], ...]:
    """The super experts in a list of experts to mask; warns if there are any, since a mask of one destroys the model
    whatever else the list holds."""
    by_layer = points.experts() if isinstance(points, Points) else points
    hit = tuple(cell for cell in supers.cells if cell[1] in set(by_layer.get(cell[0], ())))
    if hit:
        named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in hit[:6])
        warnings.warn(
            f"the list holds {len(hit)} super expert(s): {named}; masking one alone may destroy the model, so that a "
            "curve shows them and not what the list is about. Leave them out, or show a curve without them beside it",
            stacklevel=2,
        )
    return hit
