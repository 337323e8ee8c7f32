"""Path patching: through which paths the difference between two prompts goes, sender by sender, receiver by receiver.

    direct run      base text; every head's output (z) and every MLP's at its value in the base run, the sender's at its
                    value in the source run; so the stream that enters layer l is  base_l + Σ over senders below l of Δ,
                    Δ = what the sender adds to the stream in the source run - what it adds in the base run
                    (through_mlps: MLPs compute from the changed stream instead)
    received(r)     what the receiver r is in the direct run: q, k or v of a head, attn_in, mlp_in, the final stream
    effect(s → r)   (score(base with r := received(r)) - score(base)) / (score(source) - score(base))

In the last run everything above r follows. A receiver below the sender has effect 0; what reaches "logits" is the
direct effect. Senders or receivers of a group act together.

Source: Wang et al. (2022), arXiv:2211.00593, with through_mlps=True; Goldowsky-Dill et al. (2023), arXiv:2304.05969.

Shapes: z `[batch pos head d_head]`, Δ `[batch pos d_model]`, received `[batch pos d_head]` or `[batch pos d_model]`.
Cost: with attention frozen nothing moves between positions, so the direct runs take only the sender's positions p, as a
short text of their own: senders × p × layers token-layers; then a sweep, (layers from r on) × (tokens from p on) for
each pair with a path. By hand it is two full forward passes per pair.
Must equal: two full forward passes per pair, with hooks (the tests, 1e-10 in float64).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._contrast import ContrastConfig, Contrasted, contrast
from ._direct import RECEIVERS, SENDERS, DirectPlan, DirectRuns, listed, reaches
from ._maps import place_name, swept
from ._pictures import Picture, Pictured, effect_words, of_rows


class PathConfig(ContrastConfig):
    """Settings of path patching.

    Attributes:
        senders: sites in text form: "z" (every head), "z[2,3]", "mlp_out", "attn_out[1]", "embed"; or a list of such,
            each item a sender of its own, a list within the list a group that sends together.
        receivers: the same of "q", "k", "v" (of key-value heads), "attn_in", "mlp_in", "resid_pre", "resid_post",
            "logits".
        at: positions of the sender, as `Site.at` takes them, all together.
        through_mlps: MLPs on the way compute from the changed stream; else they are frozen like attention.
        direction: "noising" puts corrupted values into the clean run, "denoising" clean ones into the corrupted run.
    """

    senders: Any = "z"
    receivers: Any = "logits"
    at: Any = "all"
    through_mlps: bool = False
    direction: Literal["denoising", "noising"] = "noising"


@dataclass(frozen=True, eq=False)
class PathResult(Pictured, Contrasted):
    """Effects of paths.

    Attributes:
        effect: of each path, in `unit`s.
        base: scores of the run that is changed.
        senders, receivers: names along the axes.
        place: positions of the senders.
        through_mlps, kind, score, unit: what was done, and what effects are counted in.
        explain: how it was carried out.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "effect": ("batch", "sender", "receiver"), "base": ("batch",), **Contrasted.AXES,
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {"explain": "first", "place": "first", **Contrasted.JOINS}
    effect: Float[Tensor, "batch sender receiver"]
    base: Float[Tensor, " batch"]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    place: str
    through_mlps: bool
    kind: str
    score: str
    unit: str
    explain: str

    @property
    def mean(self) -> Float[Tensor, "sender receiver"]:
        """Effects averaged over batch rows."""
        return self.effect.mean(0)

    @property
    def title(self) -> str:
        """What the effects are of."""
        ends = [names[0] if len(names) == 1 else f"{len(names)} {what}" for names, what in self._ends()]
        mlps = ", through MLPs" if self.through_mlps else ""
        return f"{self.kind} of paths {ends[0]} → {ends[1]} at {ic.report.place_words(self.place)}{mlps}"

    def _ends(self) -> list[tuple[tuple[str, ...], str]]:
        return [(self.senders, "senders"), (self.receivers, "receivers")]

    def table(self) -> list[dict[str, Any]]:
        """One row per path, averaged over batch rows."""
        lines = zip(self.senders, self.mean.tolist(), strict=True)
        return [
            {"sender": sender, "receiver": receiver, "effect": value}
            for sender, line in lines
            for receiver, value in zip(self.receivers, line, strict=True)
        ]

    def __str__(self) -> str:
        best = sorted(self.table(), key=lambda row: -abs(row["effect"]))[:10]
        lines = [f"  {row['effect']:+8.3f}  {row['sender']} → {row['receiver']}" for row in best]
        return "\n".join([f"{self.title} ({self.unit}); {self.score} {self.base.mean():.3f} without", *lines])

    def pictures(self) -> list[Picture]:
        """Senders against receivers; of one sender or one receiver, layers against the heads of the other end."""
        for (names, _), value in zip(self._ends(), (self.mean[:, 0], self.mean[0]), strict=True):
            if self.mean.numel() == len(names) > 1 and (by_layer := _by_layer(names, value.tolist())):
                return [Picture(self.title, *by_layer)]
        return [Picture(self.title, self.mean.tolist(), list(self.senders), list(self.receivers))]

    @property
    def finding(self) -> str:
        """The path with the largest effect."""
        best = max(self.table(), key=lambda row: abs(row["effect"]))
        said = effect_words(best["effect"], self.unit, self.kind, self.score, float(self.base.mean()))
        return f"The largest effect: the path from {best['sender']} to {best['receiver']} {said}{of_rows(self.base)}."


def _by_layer(names: Sequence[str], values: Sequence[float]) -> tuple[list[list[float]], list[str], list[str]] | None:
    """Values of single sites as a matrix of layers and units; None where there are groups."""
    if any("+" in name for name in names):
        return None
    sites = [S.Site.parse(name) for name in names]
    layers = sorted({site.layers for site in sites if isinstance(site.layers, int)})
    if len(layers) < 2:
        return None
    cells = {
        (site.layers, site.name if site.units is None else f"{site.name} {site.units}"): value
        for site, value in zip(sites, values, strict=True)
    }
    columns = list(dict.fromkeys(column for _, column in cells))
    matrix = [[cells.get((layer, column), float("nan")) for column in columns] for layer in layers]
    return matrix, [f"layer {layer}" for layer in layers], columns


class PathPatching(ic.Method):
    """How much of the difference between two prompts goes from one part of a model to another by the direct path."""

    name = "path_patching"
    Config = PathConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: PathConfig) -> PathResult:
        """Direct runs of all senders, then a sweep over the pairs that have a path."""
        senders = listed(model, "senders", config.senders, SENDERS)
        receivers = listed(model, "receivers", config.receivers, RECEIVERS)
        if tokens.inputs:
            raise ic.PlanError("path_patching runs positions by themselves, and takes text without images")
        place = place_name(self.name, tokens, config.at)
        plan = DirectPlan(model, senders, receivers, config.at, config.through_mlps)
        pair = contrast(self.name, model, tokens, config, plan.here, plan.there)
        runs = DirectRuns(plan, pair)
        effect = torch.zeros(len(senders), len(receivers), len(tokens), dtype=pair.low.dtype)
        pairs = [
            (s, r) for s in range(len(senders)) for r in range(len(receivers)) if reaches(senders[s], receivers[r])
        ]
        layers = 0
        for chunk in runs.chunks(sorted({s for s, _ in pairs})):
            # only pairs of this chunk: direct runs of all senders would not fit beside the sweep
            changes = runs.received(chunk)
            chosen = [(s, r) for s, r in pairs if s in chunk]
            variants = [changes(s, receivers[r]) for s, r in chosen]
            sweep = swept(model, pair.base.tokens, variants, pair.judged, config)
            effect[[s for s, _ in chosen], [r for _, r in chosen]] = sweep.effects.to(effect)
            layers += sweep.plan.token_layers
        explain = _explained(runs, len(pairs), len(senders) * len(receivers), layers)
        return PathResult(
            effect=pair.share(effect).movedim(-1, 0).contiguous(), place=place, explain=explain,
            senders=tuple(end.name for end in senders), receivers=tuple(end.name for end in receivers),
            through_mlps=config.through_mlps, **pair.named(),
        )  # fmt: skip


def _explained(runs: DirectRuns, pairs: int, paths: int, layers: int) -> str:
    total, naive = runs.token_layers + layers, 2 * paths * runs.model.n_layers * sum(runs.pair.base.tokens.lengths)
    fewer = f" ({naive / total:.1f}× fewer)" if 0 < total < naive else ""
    return (
        f"paths        {paths:,}, of which {pairs:,} have a receiver above the sender\n"
        f"direct runs  {runs.token_layers:,} token-layers at {runs.ids.shape[1]} position(s)\n"
        f"sweep        {layers:,} token-layers\n"
        f"together     {total:,} against {naive:,} of two full forward passes per path{fewer}"
    )
