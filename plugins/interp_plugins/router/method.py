"""Method `router`: how a mixture of experts routes texts, by layer and expert.

    usage       U[l, e] of normalised weights, of counts, of probabilities              (usage.py)
    load        cv, max_vio, entropy, Gini, dead experts, load balancing loss           (load.py)
    tokens      router entropy H(p), N_eff = exp H, top-1 share, margin, z-loss; means over tokens (routed.py)
    together    pairs of experts within a layer, and from a layer to the next           (coactivation.py)

Each text is a sample: what is kept of it are sums over its tokens at the positions asked for, so that results of
batches are joined without loss, and intervals draw texts again.

Source: the modules named above say whose each number is.
Cost: one forward pass that ends with the last router, 5 % of it at most for the statistics (benchmarks/router.py);
memory layer · expert per text and layer · expert² in all, whatever the number of tokens.
Must equal: golden float64 numbers within 1e-6 (usage), exactly (counts, pairs); rows of every usage sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import stats

from .._columns import TITLE, legend
from .._places import PlacesConfig
from . import load, routed, usage
from .coactivation import Coactivation
from .points import Points, Shape, points_of, weights_digest
from .reading import SITES, Places, demand_reading, read_layers
from .routed import Routed
from .usage import Average, Statistic, layer_sums

PerToken = Literal["router_entropy", "n_eff", "top1_share", "margin", "z_loss"]
PER_TOKEN: tuple[PerToken, ...] = get_args(PerToken)
COLUMNS = {
    "cv": "coefficient of variation of the experts' shares of tokens: 0 if all get as many",
    "max_vio": "by how many even shares the busiest expert's share is above one: 0 if all get as many",
    "entropy": "entropy of the experts' shares over that of even ones: 1 if all get as many",
    "gini": "Gini coefficient of the experts' shares: 0 if all get as many",
    "dead": "experts that no token goes to",
    "aux_loss": "load balancing loss, of shares and mean probabilities: 1 if both are even",
    "router_entropy": "entropy of a token's probabilities over the experts, in nats",
    "n_eff": "over how many experts a token's probabilities spread: exp of their entropy",
    "top1_share": "share of the strongest expert in the weights of those that a token goes to",
    "margin": "smallest logit of the experts that a token goes to minus the largest of the others",
    "z_loss": "square of the log of the sum of exp(logits) of a token: large where logits are",
    "executed_sum": "sum of the weights that a token's experts count with; 1 where a model makes it so",
}
"""What the table says of a layer, in words; numbers of a token are means over tokens."""
SHOWN = 500
"""Resamples of the bands on a page."""


class RouterConfig(PlacesConfig):
    """Settings of the router statistics.

    Attributes:
        at: positions that count, as `Site.at` takes them; None: all real tokens; -1: the last one.
        pairs: count which experts are chosen together: layer · expert² numbers.
    """

    pairs: bool = True


@dataclass(frozen=True, eq=False)
class RouterResult(ic.Result):
    """Routing of texts. Sums are over a text's tokens at the positions asked for; dense layers have no row.

    Attributes:
        tokens: how many there are.
        count, weight, prob: tokens routed to each expert, and sums of normalised weights and of probabilities.
        executed: sum of the executed weights.
        router_entropy, n_eff, top1_share, margin, z_loss: means over the text's tokens (nats; margin in logits).
        together: tokens that go to both experts of a layer, over all texts; None if not asked for.
        steps: tokens that go to one expert and, in the next layer with experts, to the other.
        layers: decoder layers of the rows.
        model, n_layers, top_k: its name, all its decoder layers, experts per token.
        place: the positions.
        digest: of its weights; empty where they cannot be read.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokens": ("batch",),
        **dict.fromkeys(("count", "weight", "prob"), ("batch", "layer", "expert")),
        **dict.fromkeys(("executed", *PER_TOKEN), ("batch", "layer")),
        "together": ("layer", "expert", "expert"),
        "steps": ("step", "expert", "expert"),
    }
    JOINS: ClassVar[Mapping[str, str]] = {"together": "sum", "steps": "sum"}
    tokens: Int[Tensor, " batch"]
    count: Int[Tensor, "batch layer expert"]
    weight: Float[Tensor, "batch layer expert"]
    prob: Float[Tensor, "batch layer expert"]
    executed: Float[Tensor, "batch layer"]
    router_entropy: Float[Tensor, "batch layer"]
    n_eff: Float[Tensor, "batch layer"]
    top1_share: Float[Tensor, "batch layer"]
    margin: Float[Tensor, "batch layer"]
    z_loss: Float[Tensor, "batch layer"]
    together: Int[Tensor, "layer expert expert"] | None
    steps: Int[Tensor, "step expert expert"] | None
    layers: tuple[int, ...]
    model: str
    n_layers: int
    top_k: int
    place: str
    digest: str = ""

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.count.shape[2]

    @property
    def shape(self) -> Shape:
        """What points of this result depend on."""
        return Shape(self.model, self.n_layers, self.layers, self.n_experts, self.top_k, self.digest)

    def per_text(self, statistic: Statistic = "weight") -> Float[np.ndarray, "batch layer expert"]:
        """Each text's own usage.

        Raises:
            PlanError: no such statistic.
        """
        above, below = self._sums(statistic)
        return above / below

    def usage(self, statistic: Statistic = "weight", average: Average = "micro") -> Float[np.ndarray, "layer expert"]:
        """Usage over all tokens (micro), or the mean of the texts' own (macro).

        Raises:
            PlanError: no such statistic or average.
        """
        if average not in get_args(Average):
            raise ic.PlanError(f"no average {average!r}. {ic.errors.nearest(average, get_args(Average))}")
        # each text counts alike, however long; micro is by tokens
        if average == "macro":
            return self.per_text(statistic).mean(0)
        above, below = self._sums(statistic)
        return above.sum(0) / below.sum(0)

    def _sums(self, statistic: str) -> tuple[np.ndarray, np.ndarray]:
        """What a usage is the ratio of, text by text."""
        if statistic not in usage.STATISTICS:
            raise ic.PlanError(f"no usage {statistic!r}. {ic.errors.nearest(statistic, usage.STATISTICS)}")
        above = getattr(self, statistic).double().numpy()
        below = above.sum(-1, keepdims=True) if statistic == "count" else self.tokens.double().numpy()[:, None, None]
        return above, np.broadcast_to(below, (*above.shape[:2], 1))

    @cached_property
    def loads(self) -> dict[str, np.ndarray]:
        """Load statistics by name, each `[layer]`."""
        return load.load(self.count.sum(0).numpy(), self.usage("prob"))

    def mean(self, name: PerToken) -> Float[np.ndarray, " layer"]:
        """The mean over all tokens of a statistic of tokens."""
        return np.average(getattr(self, name).double().numpy(), axis=0, weights=self.tokens.numpy())

    def band(self, name: str, boot: stats.Bootstrap | None = None) -> stats.Band:
        """A curve over layers with its interval: a load statistic of all texts' counts, or the mean over texts of a
        statistic of tokens.

        Raises:
            PlanError: no such curve, or a single text.
        """
        boot = boot or stats.Bootstrap()
        if name in PER_TOKEN:
            return boot.band(getattr(self, name), axes=("layer",), name=name)
        if name not in self.loads:
            raise ic.PlanError(f"no curve {name!r}. {ic.errors.nearest(name, (*PER_TOKEN, *self.loads))}")

        # a load is a function of all counts together, no mean over texts: each resample is summed before it is measured
        def statistic(count: np.ndarray, prob: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            return load.load(count.sum(0), prob.sum(0) / tokens.sum())[name]

        return boot.band(self.count, self.prob, self.tokens, axes=("layer",), statistic=statistic, name=name)

    def usage_band(self, statistic: Statistic = "weight", boot: stats.Bootstrap | None = None) -> stats.Band:
        """Macro usage with its interval over texts."""
        axes = ("layer", "expert")
        return (boot or stats.Bootstrap()).band(self.per_text(statistic), axes=axes, name=f"usage_{statistic}")

    def difference(
        self, other: RouterResult, statistic: Statistic = "weight", boot: stats.Bootstrap | None = None
    ) -> stats.Band:
        """Macro usage of these texts minus that of others, with its paired interval: text i of both is a pair.

        Raises:
            PlanError: other layers or experts, or another number of texts.
        """
        mine, theirs = self.per_text(statistic), other.per_text(statistic)
        if mine.shape != theirs.shape or self.layers != other.layers:
            raise ic.PlanError(
                f"difference: {list(mine.shape)} texts, layers and experts against {list(theirs.shape)}; texts are "
                "paired, and of one model"
            )
        axes = ("layer", "expert")
        return (boot or stats.Bootstrap()).band(mine - theirs, axes=axes, name=f"difference of usage_{statistic}")

    def points(self, other: RouterResult | None = None, statistic: Statistic = "weight") -> Points:
        """Cells ranked by micro usage, or by the difference to another's, those above 0 alone."""
        mine = self.usage(statistic)
        if other is None:
            return points_of(mine, self.layers, statistic=f"usage_{statistic} {self.place}", shape=self.shape)
        if other.shape != self.shape:
            raise ic.PlanError(f"points: {self.shape} against {other.shape}; compare texts of one model")
        theirs = other.usage(statistic)
        return points_of(
            mine - theirs, self.layers, a=mine, b=theirs, statistic=f"usage_{statistic} {self.place} A-B",
            shape=self.shape, positive=True,
        )  # fmt: skip

    def table(self) -> list[dict[str, Any]]:
        """One row per layer."""
        curves = self.loads | {name: self.mean(name) for name in PER_TOKEN}
        curves["executed_sum"] = self.executed.double().sum(0).numpy() / float(self.tokens.sum())
        return [
            {"layer": layer} | {name: curve[row].item() for name, curve in curves.items()}
            for row, layer in enumerate(self.layers)
        ]

    def experts(self) -> list[dict[str, Any]]:
        """One row per layer and expert."""
        parts = {statistic: self.usage(statistic) for statistic in usage.STATISTICS}
        tokens = self.count.sum(0)
        return [
            {"layer": layer, "expert": expert, "tokens": int(tokens[row, expert])}
            | {name: float(value[row, expert]) for name, value in parts.items()}
            for row, layer in enumerate(self.layers)
            for expert in range(self.n_experts)
        ]

    def __str__(self) -> str:
        head = f"{self.model}: {int(self.tokens.sum()):,} tokens of {len(self.tokens)} texts at {self.place}, "
        lines = [f"{head}{self.top_k} of {self.n_experts} experts in {len(self.layers)} layers"]
        for row in self.table():
            lines.append(
                f"  layer {row['layer']:<3} cv {row['cv']:.2f}  entropy {row['entropy']:.3f}  dead {row['dead']:<3} "
                f"of a token: router_entropy {row['router_entropy']:.2f} nats, margin {row['margin']:.2f}"
            )
        return "\n".join([*lines, "", legend(COLUMNS, ("cv", "entropy", "dead", "router_entropy", "margin"))])

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(COLUMNS, self.table()[0])}

    def heatmap(self, statistic: Statistic = "weight") -> ic.report.Heatmap:
        """Usage by layer and expert; a cell tells its layer and expert when pointed at."""
        values, tokens = self.usage(statistic), self.count.sum(0)
        tips = [
            [
                f"layer {layer}, expert {expert}\n{values[row, expert]:.4f} of an even {1 / self.n_experts:.4f}\n"
                f"{int(tokens[row, expert]):,} tokens"
                for expert in range(self.n_experts)
            ]
            for row, layer in enumerate(self.layers)
        ]
        title, texts = f"Usage of experts ({statistic})", len(self.tokens)
        return ic.report.Heatmap(
            values, [f"layer {layer}" for layer in self.layers], list(map(str, range(self.n_experts))), tips=tips,
            limits=(0.0, float(values.max())), title=title, xlabel="expert", ylabel="", colorbar=statistic,
            caption=f"{title} at {self.place}: {int(self.tokens.sum()):,} tokens of {texts} text{'s' * (texts != 1)}.",
        )  # fmt: skip

    def curves(self, names: Iterable[str] = ("entropy", "gini")) -> ic.report.Curves:
        """Load over layers; with bands where there are several texts."""
        places = list(map(str, self.layers))
        boot = stats.Bootstrap(method="percentile", resamples=SHOWN)
        several = len(self.tokens) > 1
        lines = [
            ic.report.Line.of(name, self.band(name, boot)) if several else ic.report.Line(name, self.loads[name])
            for name in names
        ]
        note = f"95 % intervals over {len(self.tokens)} texts" if several else "a single text: no intervals"
        return ic.report.Curves(
            lines, places, title="Load by layer", xlabel="decoder layer", ylabel="entropy over ln E, Gini",
            caption=f"How evenly experts are used; {note}.",
        )  # fmt: skip

    def charts(self) -> list[ic.report.Chart]:
        """Usage by weight and by tokens, and load."""
        return [self.heatmap(), self.heatmap("count"), self.curves()]

    @property
    def heading(self) -> str:
        """What the page is about."""
        return "Routing of tokens to experts"

    @property
    def finding(self) -> str:
        """Where tokens are spread least evenly, and how many experts none goes to."""
        uneven = max(self.table(), key=lambda row: row["cv"])
        dead = int(sum(row["dead"] for row in self.table()))
        return (
            f"Tokens are spread least evenly over the experts of layer {uneven['layer']} (coefficient of variation "
            f"{uneven['cv']:.2f}); {dead} of {len(self.layers) * self.n_experts} experts get none."
        )


class Router(ic.Method):
    """How often, with what weight and how surely tokens go to each expert of each layer."""

    name = "router"
    requires = frozenset(site.name for site in SITES)
    Config = RouterConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: RouterConfig) -> None:
        """The model has routers, and every prompt tokens at the positions."""
        demand_reading(self.name, model)
        Places(tokens, config.at)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: RouterConfig) -> RouterResult:
        """One pass, summed layer by layer."""
        sums: dict[int, dict[str, Tensor]] = {}
        pairs = Coactivation() if config.pairs else None

        def consume(layer: int, part: Routed, places: Places) -> None:
            sums[layer] = _of_layer(part, places)
            if pairs is not None:
                pairs.add_layer(layer, part)

        read_layers(model, tokens, consume, config.at)
        layers = sorted(sums)
        fields = {name: torch.stack([sums[layer][name] for layer in layers], 1) for name in sums[layers[0]]}
        return RouterResult(
            # sums are float64 on the way, and whole numbers again here
            tokens=fields.pop("tokens")[:, 0].round().long(), count=fields.pop("count").round().int(), **fields,
            together=None if pairs is None else pairs.counts,
            steps=None if pairs is None or len(layers) < 2 else pairs.steps,
            layers=tuple(layers), model=Path(model.source).name, n_layers=model.n_layers,
            top_k=model.sizes(S.router_indices)["k"], place=_place(config.at),
            digest=_digest(model),
        )  # fmt: skip


def _of_layer(part: Routed, places: Places) -> dict[str, Tensor]:
    """Sums and means over each row's tokens, by field."""
    rows = places.rows.to(part.chosen.device)
    fields = layer_sums(part, places.rows, places.n_rows).tensors
    h = routed.entropy(part)
    values = torch.stack([h, h.exp(), routed.top1_share(part).double(), routed.margin(part), routed.z_loss(part)], 1)
    sums = values.new_zeros(places.n_rows, values.shape[1]).index_add_(0, rows, values)
    means = (sums.cpu() / fields["tokens"][:, None]).float()
    kept = {name: value.cpu() if name in ("tokens", "count") else value.float().cpu() for name, value in fields.items()}
    return kept | {name: means[:, i] for i, name in enumerate(PER_TOKEN)}


def _digest(model: ic.Model) -> str:
    try:
        return weights_digest(model)
    except ic.CapabilityError:  # weights that lie elsewhere: points are then known by the model's name and shape alone
        return ""


def _place(at: Any) -> str:
    return "all positions" if at is None else f"positions {at}" if not isinstance(at, str) else at
