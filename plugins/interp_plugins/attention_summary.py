"""Attention in numbers: how spread it is, how much goes to the first token and to sinks, and how far back it reaches.

    of a query i, over the keys j that it sees (padding is none):
    entropy     -Σ_j A[i, j] ln A[i, j] - o ln o            nats;  o = 1 - Σ_j A[i, j], what a learnt sink takes
    first       A[i, 0]
    sink        Σ over sinks k of A[i, k];   k is a sink of a head if A[i, k], in the mean of the queries after k, is at
                least `threshold`, and at least a quarter of the text comes after it
    off         o
    distance    Σ_j A[i, j] (i - j) / Σ_j A[i, j]           tokens

Each is the mean over queries, per head and prompt. Beside them stands what even attention gives, 1 / (i + 1) per key.

Source: Xiao et al. (2023), arXiv:2309.17453, and Gu et al. (2024), arXiv:2410.10781, for sinks and the threshold; Clark
et al. (2019), arXiv:1906.04341, for entropy and distance.
Shapes: A `[head query key]` of a layer and prompt; each number `[batch layer head]`.
Cost: one forward pass with attention in the open; a layer's patterns in memory at a time.
Must equal: the sums above, term by term (tests/test_attention_summary.py); a prompt in a padded batch what it is alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._columns import TITLE, legend
from ._pictures import of_rows
from ._places import PlacesConfig
from ._prompts import beside

MEASURES = ("entropy", "first", "sink", "off", "distance")
UNITS = {"entropy": "nats", "distance": "tokens"}
COLUMNS = {
    "entropy": "how spread a head's attention is, in nats: 0 if all goes to one token",
    "first": "share of attention on the first token",
    "sink": "share on the head's sinks: tokens that get much of it from all that follow",
    "off": "share that a learnt sink takes, which is no token",
    "distance": "how many tokens back attention reaches in the mean",
}
"""Measures in words; each is the mean over queries."""
NAMES = {
    "entropy": "Entropy of attention", "first": "Attention on the first token", "sink": "Attention on sinks",
    "off": "Attention on the learnt sink", "distance": "Mean distance of attention",
}  # fmt: skip


class SummaryConfig(PlacesConfig):
    """Settings of the summary.

    Attributes:
        at: the queries that count, as `Site.at` takes them (None: all).
        threshold: the mean attention from which on a token is a sink of a head.
        layers: which layers (None: all that have patterns).
    """

    threshold: float = Field(0.3, gt=0, le=1)
    layers: list[int] | None = None


@dataclass(frozen=True, eq=False)
class SummaryResult(ic.Result):
    """Attention of every head on every prompt.

    Attributes:
        entropy, first, sink, off, distance: see the module; NaN where a layer has fewer heads.
        even: of even attention, by measure.
        measures: names along `measure`.
        layers: numbers along `layer`.
        sinks: per prompt, position, token and number of heads of which it is a sink, the commonest first.
        place: of the queries.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(MEASURES, ("batch", "layer", "head")), "even": ("batch", "measure"),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {"sinks": "rows"}
    entropy: Float[Tensor, "batch layer head"]
    first: Float[Tensor, "batch layer head"]
    sink: Float[Tensor, "batch layer head"]
    off: Float[Tensor, "batch layer head"]
    distance: Float[Tensor, "batch layer head"]
    even: Float[Tensor, "batch measure"]
    measures: tuple[str, ...]
    layers: tuple[int, ...]
    sinks: tuple[tuple[tuple[int, str, int], ...], ...]
    place: str

    def mean(self, measure: str) -> Float[Tensor, "layer head"]:
        """Of one of `measures`, the mean over prompts."""
        numbers: Tensor = getattr(self, measure)
        return numbers.mean(0)

    def table(self) -> list[dict[str, Any]]:
        """One row per head, in the mean over prompts."""
        columns = {measure: self.mean(measure).tolist() for measure in self.measures}
        return [
            {"layer": layer, "head": head} | {measure: lines[i][head] for measure, lines in columns.items()}
            for i, layer in enumerate(self.layers)
            for head in range(self.entropy.shape[-1])
            if math.isfinite(columns["entropy"][i][head])
        ]

    @property
    def finding(self) -> str:
        """Where attention goes in the mean of all heads, and which head looks furthest back."""
        even = dict(zip(self.measures, self.even.mean(0).tolist(), strict=True))
        mean = {measure: float(self.mean(measure).nanmean()) for measure in self.measures}
        far = max(self.table(), key=lambda row: row["distance"])
        return (
            f"In the mean of {len(self.table())} heads{of_rows(self.entropy)}, {mean['first']:.0%} of attention goes "
            f"to the first token ({even['first']:.0%} if it were even), the entropy is {mean['entropy']:.2f} nats "
            f"({even['entropy']:.2f}) and the distance {mean['distance']:.1f} tokens ({even['distance']:.1f}); "
            f"furthest back looks head {far['head']} of layer {far['layer']}, {far['distance']:.1f} tokens."
        )

    def __str__(self) -> str:
        lines = [self.finding, f"  {'head':10}" + "".join(f"{measure:>10}" for measure in self.measures)]
        lines += [
            f"  {'z[{layer},{head}]'.format(**row):10}" + "".join(f"{row[measure]:10.3f}" for measure in self.measures)
            for row in self.table()
        ]
        return "\n".join([*lines, "", legend(COLUMNS, self.measures)])

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Prompts with the tokens that are sinks of most heads."""
        said = [
            "; ".join(
                f"{ic.report.place_words(ic.report.place_name(str(position), token))}: {heads} head{'s' * (heads != 1)}"
                for position, token, heads in row[:3]
            )
            for row in self.sinks
        ]
        return beside(super().prompt_rows() or [{}] * len(said), {"sinks": [text or "none" for text in said]})

    def details(self) -> dict[str, str]:
        """What even attention would give."""
        numbers = zip(self.measures, self.even.mean(0).tolist(), strict=True)
        lines = [f"{measure:10} {number:.3f}" for measure, number in numbers if measure not in ("sink", "off")]
        even = "\n".join([*lines, f"queries    {self.place}"])
        return {TITLE: legend(COLUMNS, self.measures), "Even attention": even}

    def charts(self) -> list[ic.report.Heatmap]:
        """A map of layers against heads for each measure; of the learnt sink only where there is one."""
        return [
            self._map(measure)
            for measure in self.measures
            if measure != "off" or float(self.off.nan_to_num().max()) > 1e-3
        ]

    def _map(self, measure: str) -> ic.report.Heatmap:
        numbers, unit = self.mean(measure).tolist(), UNITS.get(measure)
        return ic.report.Heatmap(
            numbers, [f"layer {layer}" for layer in self.layers], [f"head {i}" for i in range(len(numbers[0]))],
            texts=[[_said(number, unit is None) for number in line] for line in numbers],
            limits=(0.0, 1.0) if unit is None else None, percent=unit is None, colorbar=unit or "share of attention",
            title=f"{NAMES[measure]}{of_rows(self.entropy)}",
        )  # fmt: skip


def _said(number: float, share: bool) -> str | None:
    if not math.isfinite(number):
        return "–"
    return f"{number:.0%}" if share else f"{number:.1f}"


class AttentionSummary(ic.Method):
    """How spread each head's attention is, how much goes to the first token and to sinks, how far back it reaches."""

    name = "attention_summary"
    requires = frozenset({"pattern"})
    Config = SummaryConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: SummaryConfig) -> None:
        """The layers and the queries exist."""
        _sites(model, config)
        _queries(tokens, config)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: SummaryConfig) -> SummaryResult:
        """One pass, layer by layer."""
        sites, queries, real = _sites(model, config), _queries(tokens, config), tokens.columns(None)
        by_layer: dict[int, Tensor] = {}
        heads_of: list[Counter[int]] = [Counter() for _ in real]

        def each(layer: int, values: ic.LayerReadings) -> None:
            attention = values[S.pattern].detach().as_subclass(Tensor)
            rows = []
            for row, columns in enumerate(real):
                at = torch.tensor(columns, device=attention.device)
                own = attention[row][:, at][:, :, at]
                own = own.to(torch.promote_types(own.dtype, torch.float32))
                sinks = sinks_of(own, config.threshold)
                heads_of[row].update({k: int(n) for k, n in enumerate(sinks.sum(0).tolist()) if n})
                rows.append(measured(own[:, queries[row]], torch.tensor(queries[row], device=own.device), sinks).cpu())
            by_layer[layer] = torch.stack(rows, 1)

        model.run(tokens, read=sites, each=each, logits=False)
        layers = sorted(by_layer)
        widest = max(numbers.shape[-1] for numbers in by_layer.values())
        pad = torch.nn.functional.pad
        numbers = torch.stack(
            [pad(by_layer[layer], (0, widest - by_layer[layer].shape[-1]), value=math.nan) for layer in layers], 2
        )
        labels = tokens.labels
        return SummaryResult(
            **dict(zip(MEASURES, numbers.unbind(0), strict=True)), even=torch.stack([_even(at) for at in queries]),
            measures=MEASURES, layers=tuple(layers), place="all tokens" if config.at is None else f"at {config.at}",
            sinks=tuple(
                tuple((k, labels[row][k], heads) for k, heads in counted.most_common(10))
                for row, counted in enumerate(heads_of)
            ),
        )  # fmt: skip


def sinks_of(attention: Float[Tensor, "head query key"], threshold: float) -> Float[Tensor, "head key"]:
    """Which tokens are sinks of which heads, as 1 and 0; all queries of a text, padding left out."""
    n = attention.shape[-1]
    later = torch.arange(n - 1, -1, -1, device=attention.device)
    mean = attention.tril(-1).sum(-2) / later.clamp(min=1)
    return ((mean >= threshold) & (later >= max(1, n / 4))).to(attention)


def measured(
    attention: Float[Tensor, "head query key"], queries: Tensor, sinks: Float[Tensor, "head key"]
) -> Float[Tensor, "measure head"]:
    """The measures of the heads of a layer on one text, mean over queries.

    Args:
        attention: of some queries, keys without padding.
        queries: which tokens they are `[query]`.
        sinks: see `sinks_of`.
    """
    total = attention.sum(-1)
    off = (1 - total).clamp(min=0)
    off = off.where(off > 1e-5, 0)  # rows that add up to one but for rounding have no learnt sink
    entropy = -torch.xlogy(attention, attention).sum(-1) - torch.xlogy(off, off)
    away = queries[:, None] - torch.arange(attention.shape[-1], device=attention.device)
    distance = (attention * away).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    on_sinks = (attention * sinks[:, None]).sum(-1)
    return torch.stack([entropy, attention[..., 0], on_sinks, off, distance]).mean(-1)


def _even(queries: list[int]) -> Float[Tensor, " measure"]:
    """The same of even attention."""
    seen = torch.tensor(queries) + 1.0
    return torch.stack([seen.log(), 1 / seen, torch.zeros_like(seen), torch.zeros_like(seen), (seen - 1) / 2]).mean(-1)


def _sites(model: ic.Model, config: SummaryConfig) -> list[S.Site]:
    """The patterns that are read.

    Raises:
        SiteError: a layer that there is not, or without patterns.
    """
    layers = model.layers(S.pattern if config.layers is None else S.pattern[config.layers])
    return [S.pattern[layer] for layer in layers]


def _queries(tokens: ic.Tokens, config: SummaryConfig) -> list[list[int]]:
    """The queries that count, row by row, among the row's real tokens.

    Raises:
        PositionError: a text does not have them.
    """
    rows = []
    for row, (columns, real) in enumerate(zip(tokens.columns(config.at), tokens.columns(None), strict=True)):
        place = {column: i for i, column in enumerate(real)}
        rows.append([place[column] for column in columns if column in place])
        if not rows[-1]:
            raise ic.PositionError(f"attention_summary: at={config.at} selects no token of prompt {row}")
    return rows
