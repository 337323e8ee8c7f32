"""Interventions on what the image puts into a model, layer by layer, as variants of a sweep.

    replace:blind     rows V of resid_pre[l] := those of a run with a blind image; later DeepStack additions follow it
    replace:swap      the same of another sample's image
    replace:zero, mean, mean_dataset, noise    V := 0, its own mean, a given row, x + k σ_l ε (σ_l of V without sinks)
    knockout[:Q[,K]]  queries Q do not see keys K in W(l) = l - ⌊k/2⌋ … l + ⌊k/2⌋; Q: text, question, last; K: vision
    truncation        no text token sees V from layer l on: V removed, positions of all others as they were
    text:blind        dual channel: rows behind the image := those of the blind run, V left as it is

All are one-shot but truncation: what follows layer l is computed again. Every edit is at a layer's input, behind any
DeepStack addition. Replacing V by a blind run's rows, with additions following, is the blind run with its text rows
replaced by the clean run's: `replace:blind` is swept over the blind text, so that visual rows never run again.

Source: knockout windows of Zhang et al. (2025), arXiv:2411.18620 (window 9); the rest is ours.
Must equal: the same by hooks on the model (tests/test_visual_method.py), replace:blind at layer 0 the blind run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .sample import Sample

Deepstack = Literal["follow", "keep"]
REPLACED = ("blind", "swap", "zero", "mean", "mean_dataset", "noise")
QUERIES = ("text", "question", "last")
KEYS = ("vision", "question", "last")
SINK = 10.0
"""A visual row this many times as long as the median is a sink, and does not count for σ."""


class Variant(NamedTuple):
    """One change.

    Attributes:
        layer: that it is of.
        hit: how many layers it really touches.
        edits: of it.
    """

    layer: int
    hit: int
    edits: tuple[ic.Edit, ...]


@dataclass(frozen=True)
class Intervention:
    """What is asked for, parsed.

    Attributes:
        name: as given.
        kind: "replace", "knockout", "truncation" or "text".
        what: of "replace": blind, zero, …; of "knockout": the queries.
        key: of "knockout".
    """

    name: str
    kind: str
    what: str = ""
    key: str = "vision"

    @property
    def sources(self) -> str:
        """Which other images it needs: "blind", "swap" or none."""
        return self.what if self.kind in ("replace", "text") and self.what in ("blind", "swap") else ""

    @staticmethod
    def parse(name: str) -> Intervention:
        """From its name.

        Raises:
            PlanError: no such intervention.
        """
        kind, _, rest = name.partition(":")
        what, _, key = rest.partition(",")
        if kind == "replace" and rest in REPLACED:
            return Intervention(name, kind, rest)
        if kind == "knockout" and (what or "text") in QUERIES and (key or "vision") in KEYS:
            return Intervention(name, kind, what or "text", key or "vision")
        if name in ("truncation", "text:blind", "text:swap"):
            return Intervention(name, kind, rest)
        known = [f"replace:{x}" for x in REPLACED] + [f"knockout:{x}" for x in QUERIES] + ["truncation", "text:blind"]
        raise ic.PlanError(f"no intervention is called {name!r}. {ic.errors.nearest(name, known)}")


@dataclass(frozen=True, eq=False)
class Clean:
    """What interventions take from runs without edits.

    Attributes:
        visual, after: rows of resid_pre by layer, each `[position d_model]`.
        additions: DeepStack's, by the layer after which they are added, `[visual d_model]`.
    """

    visual: Mapping[int, Float[Tensor, "visual d_model"]]
    after: Mapping[int, Float[Tensor, "after d_model"]]
    additions: Mapping[int, Float[Tensor, "visual d_model"]]


def read_clean(model: ic.Model, sample: Sample, tokens: ic.Tokens, layers: Sequence[int]) -> tuple[Clean, Tensor]:
    """Rows of a run without edits, and its logits `[1 m d_vocab]` at the positions that predict the answer."""
    visual = {layer: S.resid_pre[layer].at(list(sample.visual)) for layer in layers}
    after = {layer: S.resid_pre[layer].at(list(sample.after)) for layer in layers}
    added = {layer: S.deepstack[layer] for layer in additions(model)}
    run = model.run(tokens, read=[*visual.values(), *after.values(), *added.values()], logits=sample.reads)
    rows = ({key: run[site].plain[0] for key, site in sites.items()} for sites in (visual, after, added))
    return Clean(*rows), run.logits.plain


def additions(model: ic.Model) -> list[int]:
    """Layers after which DeepStack adds visual features; none in most families."""
    return [] if model.can("deepstack", "read") else model.layers(S.deepstack)


def window(layer: int, width: int, n_layers: int) -> list[int]:
    """W(l), clipped to the layers that there are.

    Raises:
        PlanError: a width that has no middle.
    """
    if width < 1 or width % 2 == 0:
        raise ic.PlanError(f"visual: window={width}; it is an odd number of layers, so that it has a middle")
    return list(range(max(0, layer - width // 2), min(n_layers, layer + width // 2 + 1)))


def knockouts(sample: Sample, what: Intervention, layers: Sequence[int], width: int, n_layers: int) -> list[Variant]:
    """Attention knockouts in a window around each layer, or from each layer on.

    Raises:
        PlanError: no span "question" where it is asked for.
    """
    if what.kind == "truncation":
        query, key = list(sample.after), list(sample.visual)
        reached = {layer: list(range(layer, n_layers)) for layer in layers}
    else:
        query, key = group(sample, what.what), group(sample, what.key)
        query = [place for place in query if place >= min(key)]
        key = [place for place in key if place <= max(query, default=-1)]
        reached = {layer: window(layer, width, n_layers) for layer in layers}
    if not query or not key:
        raise ic.PlanError(f"{what.name}: no query sees such a key in this text")
    return [
        Variant(layer, len(hit), (S.pattern[hit].knockout(query=query, key=key),)) for layer, hit in reached.items()
    ]


def group(sample: Sample, name: str) -> list[int]:
    """Positions by the name of a group of tokens.

    Raises:
        PlanError: "question" of a text without a span of that name.
    """
    if name == "question":
        places = sample.tokens.rows.names.get("question", [[]])[0]
        if not places:
            raise ic.PlanError("knockout of the question needs the span 'question': tokens.name(question=…)")
        return list(places)
    known = {"vision": list(sample.visual), "text": list(sample.after), "last": sample.last}
    return known[name]


def replacements(
    what: str,
    sample: Sample,
    clean: Clean,
    layers: Sequence[int],
    *,
    deepstack: Deepstack = "follow",
    source: Clean | None = None,
    reference: Float[Tensor, "layer d_model"] | None = None,
    scale: float = 1.0,
    draws: int = 5,
    seed: int = 0,
) -> list[Variant]:
    """Edits of the visual rows of each layer's input, in the clean run; of noise `draws` for each layer.

    Args:
        what: one of `REPLACED`.
        deepstack: additions after layer l and later are treated alike, or left as they are. Noise leaves them.
        source: the run that rows come from ("blind", "swap").
        reference: rows of "mean_dataset".
        scale: k of noise.
    """

    def rows(x: Tensor, layer: int, draw: int) -> Tensor:
        if what in ("blind", "swap"):
            assert source is not None
            return source.visual[layer]
        if what == "noise":
            return noisy(x, scale, _seed(sample, seed, layer, draw))
        if what == "mean_dataset":
            assert reference is not None
            return reference[layer].to(x).expand_as(x).contiguous()
        return torch.zeros_like(x) if what == "zero" else x.mean(0).expand_as(x).contiguous()

    def added(layer: int) -> tuple[ic.Edit, ...]:
        if deepstack == "keep" or what in ("noise", "mean_dataset"):
            return ()
        given: Mapping[int, Tensor] = clean.additions if source is None else source.additions
        treat: Callable[[Tensor], Tensor] = {
            "zero": torch.zeros_like, "mean": lambda x: x.mean(0).expand_as(x).contiguous()
        }.get(what, lambda x: x)  # fmt: skip
        return tuple(S.deepstack[at].set(treat(x)[None]) for at, x in given.items() if at >= layer)

    where = list(sample.visual)
    return [
        Variant(
            layer, 1, (S.resid_pre[layer].at(where).set(rows(clean.visual[layer], layer, draw)[None]), *added(layer))
        )
        for layer in layers
        for draw in range(draws if what == "noise" else 1)
    ]


def text_rows(sample: Sample, source: Clean, layers: Sequence[int]) -> list[Variant]:
    """Rows behind the image of each layer's input, from another run."""
    where = list(sample.after)
    return [Variant(layer, 1, (S.resid_pre[layer].at(where).set(source.after[layer][None]),)) for layer in layers]


def noisy(rows: Float[Tensor, "visual d_model"], scale: float, seed: int) -> Float[Tensor, "visual d_model"]:
    """Rows with Gaussian noise of `scale` times the standard deviation over rows, sinks apart."""
    norms = rows.float().norm(dim=-1)
    kept = rows[norms <= SINK * norms.median()].float()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return rows + (scale * kept.std() * noise.to(rows.device)).to(rows.dtype)


def _seed(sample: Sample, seed: int, layer: int, draw: int) -> int:
    """The same for a text, layer and draw, whatever else is run."""
    text = f"{sample.tokens.ids.tolist()} {seed} {layer} {draw}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
