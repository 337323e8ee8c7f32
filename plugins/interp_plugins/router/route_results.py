"""The result of `route_utility`: regret, how often others are better, and how well the router ranks, by layer.

    gain      d(A) = u(A) - u(native), 0 where |d| is within rounding
    regret    mean over tokens of max(0, max d over alternatives); `regret_random` over random sets; `excess` = the one
              minus the other
    better    mean share of alternatives with d > 0; `better_random` of random sets
    spearman  mean over tokens of the rank correlation of Σ log p_router with u; tokens whose routes are all worth the
              same have none, nor those with fewer than three

Rounding of a token is four times what the native set, forced, differs from the run as it is, 8 ε max(1, |u|) at least.

Source: route_utility.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import stats

from .._columns import TITLE, legend

Group = Literal["all", "fragile", "sure"]
GROUPS: tuple[Group, ...] = get_args(Group)
QUARTILE = 0.25
COLUMNS = {
    "group": "all tokens; the quarter whose next token the model finds least likely (fragile); the others (sure)",
    "regret": "nats by which the best other route beats the model's own, 0 where none does",
    "regret_random": "the same of as many sets of experts drawn at random",
    "excess": "regret minus regret_random",
    "better": "share of other routes that beat the model's own",
    "better_random": "the same of sets drawn at random",
    "spearman": "rank correlation of the router's scores of routes with what they are worth",
}
"""What the table says, in words; all but the group are means over tokens."""
SHOWN = 500
"""Resamples of the bands on a page."""


@dataclass(frozen=True, eq=False)
class RouteUtilityResult(ic.Result):
    """Utilities of routes. Not a number where a token was not asked for, or has fewer routes.

    Attributes:
        native: log-probability of the next token, in nats.
        rounding: largest difference that forcing the native set makes.
        utility: that of each route, the native one first.
        scores: Σ log p of the router over a route's experts.
        random: log-probability under random sets, as many as the token has alternatives there.
        experts: of each route; zeros where `utility` is not a number.
        token_layers: what it cost, trials of the sweep's strategy aside.
        naive: what one forward pass per route would have cost.
        token_labels, target_labels: the tokens that are routed otherwise, and those that follow, per text.
        layers: decoder layers of the axis `layer`.
        model, n_layers, n_experts, top_k, dtype: of the model.
        routes, alternatives, weights, temperature, seed: the settings.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "native": ("batch", "pos"),
        "rounding": ("batch", "pos"),
        "utility": ("batch", "pos", "layer", "route"),
        "scores": ("batch", "pos", "layer", "route"),
        "random": ("batch", "pos", "layer", "draw"),
        "experts": ("batch", "pos", "layer", "route", "slot"),
        "token_layers": (),
        "naive": (),
    }
    JOINS: ClassVar[Mapping[str, str]] = {
        "token_layers": "sum", "naive": "sum", "token_labels": "rows", "target_labels": "rows"
    }  # fmt: skip
    native: Float[Tensor, "batch pos"]
    rounding: Float[Tensor, "batch pos"]
    utility: Float[Tensor, "batch pos layer route"]
    scores: Float[Tensor, "batch pos layer route"]
    random: Float[Tensor, "batch pos layer draw"]
    experts: Int[Tensor, "batch pos layer route slot"]
    token_layers: Int[Tensor, ""]
    naive: Int[Tensor, ""]
    token_labels: tuple[tuple[str, ...], ...]
    target_labels: tuple[tuple[str, ...], ...]
    layers: tuple[int, ...]
    model: str
    n_layers: int
    n_experts: int
    top_k: int
    routes: str
    alternatives: int
    weights: str
    temperature: float
    seed: int
    dtype: str

    @cached_property
    def _asked(self) -> Bool[Tensor, "batch pos"]:
        return ~self.native.isnan()

    @cached_property
    def texts(self) -> Int[np.ndarray, " token"]:
        """The text of each token, in the order of texts and then positions: that of all arrays `[token …]`."""
        return self._asked.nonzero()[:, 0].numpy()

    @cached_property
    def tolerance(self) -> Float[Tensor, " token"]:
        """Differences of log-probability up to which two routes are worth the same."""
        eps = max(torch.finfo(getattr(torch, self.dtype)).eps, torch.finfo(torch.float64).eps)
        native = self.native[self._asked]
        return torch.maximum(4 * self.rounding[self._asked], 8 * eps * native.abs().clamp(min=1))

    def _gains(self, values: Tensor) -> Float[Tensor, "token layer route"]:
        """What routes are worth above the native one; NaN where there is none."""
        gain = values[self._asked] - self.native[self._asked][:, None, None]
        return torch.where(gain.abs() <= self.tolerance[:, None, None], 0.0, gain)

    @cached_property
    def per_token(self) -> dict[str, Float[np.ndarray, "token layer"]]:
        """Regret, better and spearman of every token and layer, and the random sets'; NaN where there is no number."""
        columns: dict[str, np.ndarray] = {}
        for name, gains in (("", self._gains(self.utility[..., 1:])), ("_random", self._gains(self.random))):
            columns[f"regret{name}"] = gains.nan_to_num(0.0).clamp(min=0).amax(-1).numpy()
            columns[f"better{name}"] = ((gains > 0).sum(-1).double() / (~gains.isnan()).sum(-1)).numpy()
        columns["excess"] = columns["regret"] - columns["regret_random"]
        columns["spearman"] = self._ranked()
        return columns

    def _ranked(self) -> Float[np.ndarray, "token layer"]:
        utility, scores = self.utility[self._asked].numpy(), self.scores[self._asked].numpy()
        correlations = np.full(utility.shape[:2], np.nan)
        for token, layer in np.ndindex(*correlations.shape):
            there = ~np.isnan(utility[token, layer])
            worth = utility[token, layer, there]
            # two routes are always ranked one way or the other, and routes within rounding of each other are not ranked
            if there.sum() >= 3 and np.ptp(worth) > float(self.tolerance[token]):
                correlations[token, layer] = stats.spearman(scores[token, layer, there], worth)
        return correlations

    def group(self, name: Group) -> Bool[np.ndarray, " token"]:
        """All tokens, the fragile quarter (of all that this result has), or the others.

        Raises:
            PlanError: no such group.
        """
        if name not in GROUPS:
            raise ic.PlanError(f"no group {name!r}. {ic.errors.nearest(name, GROUPS)}")
        native = self.native[self._asked].numpy()
        fragile: np.ndarray = native <= np.quantile(native, QUARTILE)
        return {"all": np.ones_like(fragile), "fragile": fragile, "sure": ~fragile}[name]

    def values(self, name: str, group: Group = "all") -> Float[np.ndarray, "token layer"]:
        """A number of every token of a group and every layer.

        Raises:
            PlanError: no such number or group.
        """
        if name not in self.per_token:
            raise ic.PlanError(f"no {name!r} of routes. {ic.errors.nearest(name, self.per_token)}")
        return self.per_token[name][self.group(group)]

    def mean(self, name: str, group: Group = "all") -> Float[np.ndarray, " layer"]:
        """Its mean over the tokens that have it, by layer; NaN where none has.

        Raises:
            PlanError: no such number or group.
        """
        values = self.values(name, group)
        there = ~np.isnan(values)
        total = np.where(there, values, 0).sum(0)
        return np.where(there.any(0), total / np.maximum(there.sum(0), 1), np.nan)

    def band(self, name: str, group: Group = "all", boot: stats.Bootstrap | None = None) -> stats.Band:
        """The mean of a number by layer with its interval: texts are drawn again with all their tokens; of a single
        text its tokens, as if they were independent. Tokens that lack it in some layer are left out.

        Raises:
            PlanError: no such number or group; fewer than two texts or tokens that have it.
        """
        values, texts = self.values(name, group), self.texts[self.group(group)]
        whole = ~np.isnan(values).any(1)
        clusters = texts[whole] if len(set(texts[whole])) > 1 else None
        drawn = replace(boot or stats.Bootstrap(), clusters=clusters, strata=None)
        return drawn.band(values[whole], axes=("layer",), name=name)

    def table(self) -> list[dict[str, Any]]:
        """One row per layer and group."""
        return [
            {"layer": layer, "group": group, "tokens": int(self.group(group).sum())}
            | {name: float(self.mean(name, group)[row]) for name in self.per_token}
            for row, layer in enumerate(self.layers)
            for group in GROUPS
            if self.group(group).any()
        ]

    def tokens(self) -> list[dict[str, Any]]:
        """One row per token and layer, with its best route."""
        tokens = [label for labels in self.token_labels for label in labels]
        targets = [label for labels in self.target_labels for label in labels]
        native, fragile = self.native[self._asked], self.group("fragile")
        utility, experts = self.utility[self._asked], self.experts[self._asked]
        best = utility.nan_to_num(-torch.inf).argmax(-1)
        return [
            {
                "text": int(self.texts[i]), "token": token, "target": target, "layer": layer,
                "logprob": float(native[i]), "fragile": bool(fragile[i]),
                "routes": int((~utility[i, row].isnan()).sum()), "native": experts[i, row, 0].tolist(),
                "best": experts[i, row, best[i, row]].tolist(),
            }
            | {name: float(value[i, row]) for name, value in self.per_token.items()}
            for i, (token, target) in enumerate(zip(tokens, targets, strict=True))
            for row, layer in enumerate(self.layers)
        ]  # fmt: skip

    def __str__(self) -> str:
        n = int(self._asked.sum())
        lines = [
            f"{self.model}: {n:,} tokens of {len(self.native)} texts, {self.alternatives} routes or fewer by "
            f"{self.routes}, weights {self.weights}",
            f"  {int(self.token_layers):,} token-layers; one forward pass per route would take {int(self.naive):,}",
        ]
        for row in self.table():
            lines.append(
                f"  layer {row['layer']:<3} {row['group']:<8} regret {row['regret']:.3f} (random sets "
                f"{row['regret_random']:.3f})  better {row['better']:.2f}  spearman {row['spearman']:+.2f}"
            )
        return "\n".join([*lines, "", legend(COLUMNS, ("group", "regret", "better", "spearman"))])

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(COLUMNS, self.table()[0])}

    def curves(self) -> ic.report.Curves:
        """Regret by layer beside that of random sets; with bands where they can be had."""
        boot = stats.Bootstrap(method="percentile", resamples=SHOWN)
        lines = []
        for group in ("all", "fragile"):
            for name, label in (("regret", "routes"), ("regret_random", "random sets")):
                enough = self.group(group).sum() > 1
                lines.append(
                    ic.report.Line.of(f"{label}, {group}", self.band(name, group, boot))
                    if enough
                    else ic.report.Line(f"{label}, {group}", self.mean(name, group))
                )
        several = "texts" if len(set(self.texts)) > 1 else "tokens of one text"
        return ic.report.Curves(
            lines, list(map(str, self.layers)), title="Regret of the native route", xlabel="decoder layer",
            ylabel="regret (nats)",
            caption=f"Best of {self.alternatives} routes ({self.routes}, weights {self.weights}) minus native, "
            f"and the same maximum over as many random sets; 95 % intervals over {several}.",
        )  # fmt: skip

    def charts(self) -> list[ic.report.Curves]:
        """Regret by layer."""
        return [self.curves()]

    @property
    def finding(self) -> str:
        """Where another route would have been worth most, beside sets drawn at random."""
        row = max((row for row in self.table() if row["group"] == "all"), key=lambda row: row["regret"])
        return (
            f"The native route loses most to the best of {self.alternatives} others in layer {row['layer']}: "
            f"{row['regret']:.3f} nats per token, against {row['regret_random']:.3f} to the best random sets."
        )
