"""Interventions on what the image puts into a model, layer by layer, as variants of a sweep.

    replace:blind     rows V of resid_pre[l] := those of a run with a blind image, and DeepStack's later additions
    replace:swap      the same of another sample's image
    replace:zero, mean, mean_dataset, noise    V := 0, its own mean, a data set's mean, x + k σ_l ε
    knockout[:Q[,K]]  queries Q do not see keys K in W(l) = l - ⌊k/2⌋ … l + ⌊k/2⌋; Q: text, question, last; K: vision
    truncation        no text token sees V from layer l on: V removed, positions of all others as they were
    band[:k]          the same in layers l … l + k - 1 alone (k: a quarter of all layers), cut off at L
    text:blind        dual channel: rows behind the image := those of the blind run, V left as it is

All but truncation are one-shot: what follows layer l is computed again. Every edit is one of `ic.visual`, at a layer's
input, behind any DeepStack addition. Replacing V by a blind run's rows, with additions following, is the blind run with
its text rows replaced by the clean run's: it is swept over the blind text, so that visual rows never run again.

Source: knockout windows of Zhang et al. (2025), arXiv:2411.18620 (window 9); the rest is ours.
Must equal: the same by hooks on the model (tests/test_visual_method.py), replace:blind at layer 0 the blind run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

import interp_core as ic
from interp_core import visual

from .sample import Sample

Deepstack = Literal["follow", "keep"]
REPLACED = ("blind", "swap", "zero", "mean", "mean_dataset", "noise")
QUERIES = ("text", "question", "last")
KEYS = ("vision", "question", "last")
BEHIND = "after_vision"
"""Text behind a row's first visual token."""


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
        kind: "replace", "knockout", "truncation", "band" or "text".
        what: of "replace": blind, zero, …; of "knockout": the queries; of "band": its layers.
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
        if name in ("truncation", "band", "text:blind", "text:swap") or (kind == "band" and rest.isdecimal()):
            return Intervention(name, kind, rest)
        known = [f"replace:{x}" for x in REPLACED] + [f"knockout:{x}" for x in QUERIES] + ["truncation", "band"]
        known += ["band:4", "text:blind"]
        raise ic.PlanError(f"no intervention is called {name!r}. {ic.errors.nearest(name, known)}")


class Clean(NamedTuple):
    """Rows of a run without edits, with what DeepStack adds: of the image, and of the text behind it."""

    image: visual.States
    text: visual.States


def read_clean(model: ic.Model, sample: Sample, tokens: ic.Tokens) -> tuple[Clean, Tensor]:
    """A run without edits, and its logits `[1 m d_vocab]` at the positions that predict the answer."""
    run = model.run(tokens, read=[*visual.reads(model), *visual.reads(model, BEHIND)], logits=sample.reads)
    return Clean(visual.states(run), visual.states(run, BEHIND)), run.logits.plain


def knockouts(model: ic.Model, sample: Sample, what: Intervention, layers: Sequence[int], width: int) -> list[Variant]:
    """Attention knockouts in a window around each layer, in a band from it on, or in all layers from it on.

    Raises:
        PlanError: no query sees such a key; no span "question" where it is asked for; a width without a middle.
    """
    if what.kind == "truncation":
        count = model.n_layers
        return [Variant(layer, count - layer, tuple(visual.truncated(model, layer))) for layer in layers]
    if what.kind == "band":
        ends = {i: min(i + band_width(model, what), model.n_layers) for i in layers}
        return [Variant(i, stop - i, tuple(visual.truncated(model, i, stop))) for i, stop in ends.items()]
    query, key = group(sample, what.what), group(sample, what.key)
    # queries before every key, and keys after every query, are hidden already: an edit there would change nothing,
    # which is an error
    query = [place for place in query if place >= min(key)]
    key = [place for place in key if place <= max(query, default=-1)]
    if not query or not key:
        raise ic.PlanError(f"{what.name}: no query sees such a key in this text")
    hit = {layer: visual.window(model, layer, width) for layer in layers}
    return [Variant(i, len(at), tuple(visual.blocked(model, at, query, key))) for i, at in hit.items()]


def band_width(model: ic.Model, what: Intervention) -> int:
    """Layers of a band: as said, or a quarter of the model's.

    Raises:
        PlanError: none, or more than the model has.
    """
    width = int(what.what) if what.what else -(-model.n_layers // 4)
    if not 1 <= width <= model.n_layers:
        raise ic.PlanError(f"{what.name}: a band of {width} layers; this model has {model.n_layers}, give 1 or more")
    return width


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


def replacements(source: visual.States, layers: Sequence[int], deepstack: Deepstack = "follow") -> list[Variant]:
    """Rows of each layer's input, from a source; DeepStack's additions at and after the layer follow or are kept."""
    return [Variant(layer, 1, tuple(visual.replaced(source, layer, deepstack))) for layer in layers]


def noisy(
    sample: Sample,
    clean: visual.States,
    layers: Sequence[int],
    deepstack: Deepstack,
    scale: float,
    seeds: Sequence[int],
) -> list[Variant]:
    """Rows with noise, layer by layer and draw by draw; the noise of a text depends on its tokens, seed and layer."""
    drawn = [replacements(visual.noise(clean, noise_seed(sample, seed), scale), layers, deepstack) for seed in seeds]
    return [draw[i] for i in range(len(layers)) for draw in drawn]


def noise_seed(sample: Sample, seed: int) -> int:
    """A seed of the sample's own."""
    # not the row's number: a sample has the same noise in any batch
    text = f"{sample.tokens.ids.tolist()} {seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
