"""Activation patching: which part of a model carries the difference between two prompts.

    denoising   effect(v) = (score(corrupted with v from clean) - score(corrupted)) / (score(clean) - score(corrupted))
    noising     effect(v) = (score(clean with v from corrupted) - score(clean)) / (score(corrupted) - score(clean))
    ablation    effect(v) = score(clean with v set to zero) - score(clean)              (without a corrupted prompt)

    gradient    effect(v) ≈ <v of the one run - v of the other, d score / d v>       attribution patching: all v at once

v runs over layers, heads and positions of a site; score is the logit of the clean answer minus that of the other (of an
ablation: the log-probability of the answer), at the last token. 1 is the whole difference, 0 none of it.

Source: Vig et al. (2020), arXiv:2004.12265; Meng et al. (2022), arXiv:2202.05262; denoising and noising as in
Heimersheim and Nanda (2024), arXiv:2404.15255; attribution patching: Nanda (2023); Syed et al. (2023),
arXiv:2310.10348.

Cost: that of the sweep, one clean pass and (layers from v on) × (tokens from v on) per v; of the gradient, two forward
passes and one backward. The gradient is a straight line through what is curved: rank with it, then look exactly. Must
equal: one full forward pass per v (the sweep's tests); patching everything at the first layer gives 1; the gradient is
the effect of a small step of the patch, scaled up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score
from interp_core import sites as S


class PatchingConfig(ic.Config):
    """Settings of activation patching.

    Attributes:
        corrupted: the other prompt, or one per row, with as many tokens; without one, what is chosen is set to zero.
        site: what is patched: "z" by heads, or "resid_pre", "attn_out", "mlp_out" and the like whole.
        layers: which layers (None: all that have the site).
        at: positions, one after the other: one, or a list; "all" takes each of them.
        by: "sweep" is exact, "gradient" estimates all effects in one backward pass.
        direction: "denoising" puts clean values into the corrupted run, "noising" corrupted ones into the clean run.
        answer, other: token ids per row (None: what the model says to the clean and to the corrupted prompt).
        strategy: of the sweep.
    """

    corrupted: Any = None
    site: str = "z"
    layers: list[int] | None = None
    at: int | list[int] | Literal["all"] = -1
    by: Literal["sweep", "gradient"] = "sweep"
    direction: Literal["denoising", "noising"] = "denoising"
    answer: list[int] | None = None
    other: list[int] | None = None
    strategy: str = "auto"


@dataclass(frozen=True, eq=False)
class PatchingResult(ic.Result):
    """Effects of patching.

    Attributes:
        effect: share of the difference (of an ablation: nats).
        base, source: scores of the run that is changed, and of the run that values come from (equal for an ablation).
        answer, other: token ids.
        site, direction: what was patched, how.
        layers, heads, places: names along the axes.
        explain: how the sweep was carried out.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "effect": ("batch", "layer", "head", "pos"), "base": ("batch",), "source": ("batch",),
        "answer": ("batch",), "other": ("batch",),
    }  # fmt: skip
    effect: Float[Tensor, "batch layer head pos"]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    answer: Tensor
    other: Tensor
    site: str
    direction: str
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    places: tuple[str, ...]
    explain: str

    @property
    def mean(self) -> Float[Tensor, "layer place"]:
        """Effects averaged over rows, layers against heads and positions."""
        return self.effect.mean(0).flatten(1)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `mean`."""
        heads = [f"head {head}" for head in self.heads] if len(self.heads) > 1 else [""]
        places = list(self.places) if len(self.places) > 1 else [""]
        return [f"{head} {place}".strip() or self.site for head in heads for place in places]

    def table(self) -> list[dict[str, Any]]:
        """One row per patch, averaged over rows."""
        mean = self.effect.mean(0)
        return [
            {"layer": layer, "head": head, "pos": place, "effect": float(mean[i, j, k])}
            for i, layer in enumerate(self.layers)
            for j, head in enumerate(self.heads)
            for k, place in enumerate(self.places)
        ]

    def __str__(self) -> str:
        best = sorted(self.table(), key=lambda row: -abs(row["effect"]))[:10]
        unit = "nats" if self.direction == "ablation" else "of the difference"
        lines = [f"{self.direction} of {self.site}: base {self.base.mean():.2f}, source {self.source.mean():.2f}"]
        return "\n".join(
            lines + [f"  layer {r['layer']} head {r['head']} at {r['pos']}: {r['effect']:+.2f} {unit}" for r in best]
        )

    def html(self) -> str:
        """The map, and how it was made."""
        from interp_core.report.html import escape, heatmap

        grid = heatmap(
            self.mean.tolist(), [f"layer {layer}" for layer in self.layers], self.columns, texts=self._texts(),
            diverging=True, caption=f"{self.direction} of {self.site}",
        )  # fmt: skip
        return f"{grid}<pre>{escape(self.explain)}</pre>"

    def png(self, path: str | Path) -> Path:
        """The map as a picture."""
        from interp_core.report.png import heatmap

        rows = [f"layer {layer}" for layer in self.layers]
        bar = "nats" if self.direction == "ablation" else "share of the difference"
        return heatmap(
            path, self.mean.tolist(), rows, self.columns, texts=self._texts(), diverging=True,
            title=f"{self.direction} of {self.site}", colorbar=bar,
        )  # fmt: skip

    def _texts(self) -> list[list[str]]:
        if self.direction == "ablation":
            return [[f"{value:+.1f}" for value in line] for line in self.mean.tolist()]
        return [[f"{round(100 * value) + 0}%" for value in line] for line in self.mean.tolist()]


class ActivationPatching(ic.Method):
    """See the module."""

    name = "activation_patching"
    Config = PatchingConfig

    def run(self, model: ic.Model, tokens: ic.Tokens, config: PatchingConfig) -> PatchingResult:
        """Sweep over the patches."""
        other = None if config.corrupted is None else self._corrupted(model, tokens, config)
        base, source = (tokens, other) if config.direction == "noising" or other is None else (other, tokens)
        layers, heads, places = self._grid(model, tokens, config)
        here = model.run(tokens, logits=-1)
        there = here if other is None else model.run(other, logits=-1)
        answers = [self._said(here, config.answer)]
        answers.append(answers[0] if other is None else self._said(there, config.other))
        judged = score.logprob(answers[0]) if other is None else score.logit_diff(*answers)
        if other is not None and bool((answers[0] == answers[1]).any()):
            row = int((answers[0] == answers[1]).nonzero()[0])
            raise ic.PlanError(
                f"activation_patching: row {row} has the answer {model.word(int(answers[0][row]))!r} for both prompts; "
                "give answer=[…] and other=[…], or prompts that differ"
            )
        grid = layers, heads, places
        clean, target = (judged(here if text is tokens else there).cpu() for text in (base, source))
        if config.by == "gradient":
            effects, explain = self._estimated(model, base, source, config.site, grid, judged), "one backward pass"
        else:
            variants = self._variants(model, source, config.site, *grid)
            found = model.sweep(base, variants, judged, strategy=config.strategy)
            effects, explain = found.effects.to(clean), found.plan.explain()
        effect = effects if source is None else effects / (target - clean)
        shape = (len(layers), len(heads), len(places), len(tokens))
        return PatchingResult(
            effect=effect.reshape(shape).permute(3, 0, 1, 2).contiguous(),
            base=clean, source=target, answer=answers[0], other=answers[1], site=config.site,
            direction="ablation" if other is None else config.direction, layers=tuple(map(str, layers)),
            heads=tuple("-" if head is None else str(head) for head in heads),
            places=tuple(_place_names(tokens, places)), explain=explain,
        )  # fmt: skip

    def _corrupted(self, model: ic.Model, tokens: ic.Tokens, config: PatchingConfig) -> ic.Tokens:
        other = config.corrupted if isinstance(config.corrupted, ic.Tokens) else model.tokens(config.corrupted)
        if other.lengths != tokens.lengths:
            raise ic.PlanError(
                f"activation_patching: the prompts have {tokens.lengths} tokens, the corrupted ones {other.lengths}; "
                "positions must mean the same in both"
            )
        return other

    def _grid(
        self, model: ic.Model, tokens: ic.Tokens, config: PatchingConfig
    ) -> tuple[list[int], list[int | None], list[int]]:
        """Layers, heads and positions that are patched."""
        site = S.named(config.site)
        if why := model.can(site.name, "write"):
            raise ic.CapabilityError(f"activation_patching of {site}: {why}")
        if site.info.positions != ("pos",):
            raise ic.PlanError(f"activation_patching takes sites along pos, {site} goes along {site.info.positions}")
        entries = model.atlas.select(site if config.layers is None else site[config.layers])
        heads: list[int | None] = [None] if site.info.unit is None else list(range(entries[0].n_units or 0))
        if config.at == "all" and len(set(tokens.lengths)) > 1:
            raise ic.PlanError(
                f"activation_patching: rows have {tokens.lengths} tokens; choose positions that all have: at=-1"
            )
        places = list(range(tokens.lengths[0])) if config.at == "all" else config.at
        return [entry.layer for entry in entries], heads, [places] if isinstance(places, int) else places

    def _said(self, run: ic.Run, given: list[int] | None) -> Tensor:
        if given is not None:
            if len(given) != len(run.tokens):
                raise ic.PlanError(
                    f"activation_patching: {len(given)} answers for {len(run.tokens)} rows; give one per row"
                )
            return torch.tensor(given)
        return run.logits.as_subclass(Tensor).argmax(-1).cpu()

    def _estimated(
        self, model: ic.Model, base: ic.Tokens, source: ic.Tokens | None, name: str, grid: Any, judged: score.Score
    ) -> Float[Tensor, "patch batch"]:
        """First-order effects of all patches."""
        layers, heads, places = grid
        site = S.named(name)
        if why := model.can(site.name, "grad"):
            raise ic.CapabilityError(f"activation_patching of {site} by gradient: {why}; use by='sweep'")
        reads = [site[layer].at(place) for layer in layers for place in places]
        here = model.run(base, read=reads, logits=-1, grad=lambda logits: judged.rows(logits).sum())
        there = None if source is None else model.run(source, read=reads, logits=False)
        found = []
        for layer in layers:
            parts = []
            for read in [site[layer].at(place) for place in places]:
                value = here[read].as_subclass(Tensor)
                wanted = torch.zeros_like(value) if there is None else there[read].as_subclass(Tensor)
                parts.append(((wanted - value) * here.grad[read].as_subclass(Tensor)).sum(-1))
            found.append(torch.stack(parts, -1).reshape(len(base), len(heads), len(places)))
        return torch.stack(found).permute(0, 2, 3, 1).flatten(0, 2).cpu()

    def _variants(
        self,
        model: ic.Model,
        source: ic.Tokens | None,
        name: str,
        layers: list[int],
        heads: list[int | None],
        places: list[int],
    ) -> list[ic.Edit]:
        """One edit per patch: the source run's value, or zero."""
        patches = [(layer, head, place) for layer in layers for head in heads for place in places]
        site = S.named(name)
        where = [(site[layer] if head is None else site[layer, head]).at(place) for layer, head, place in patches]
        if source is None:
            return [one.zero() for one in where]
        run = model.run(source, read=[site[layer].at(p) for layer in layers for p in places], logits=False)
        values = {(layer, p): run[site[layer].at(p)].as_subclass(Tensor) for layer in layers for p in places}
        return [
            one.set(values[layer, place] if head is None else values[layer, place][:, head].contiguous())
            for one, (layer, head, place) in zip(where, patches, strict=True)
        ]


def _place_names(tokens: ic.Tokens, places: list[int]) -> list[str]:
    """Position and token, where all rows have the same one; the position otherwise."""
    from interp_core.report.html import visible

    names = []
    for place in places:
        words = {visible(labels[place]) for labels in tokens.labels}
        names.append(f"{place} {words.pop()}" if len(words) == 1 else str(place))
    return names
