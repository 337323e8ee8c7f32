"""Operations and bytes of passes, by the formulas of the page on planning; its letters stand in the comments."""

from __future__ import annotations

from typing import NamedTuple

from ..cost import Passes
from .outline import Layer, Outline


class Flops(NamedTuple):
    """Operations of passes."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both."""
        return self.forward + self.backward


def flops(outline: Outline, passes: Passes) -> Flops:
    """Operations of passes, forward and backward."""
    tokens = passes.rows * passes.columns
    linear = attending = 0
    for layer, count in outline.kinds(passes.start, passes.stop).items():
        active = layer.matrices + layer.top_k * layer.expert_matrices // max(layer.experts, 1)
        linear += count * 2 * tokens * active
        # 2 H (a + b) for every query and key
        attending += count * passes.rows * 2 * layer.heads * (layer.d_key + layer.d_value) * _pairs(layer, passes)
    logits = 2 * outline.unembedding * passes.read_out
    return Flops(linear + attending + logits, passes.backward * (linear + 2 * attending + logits))


def _pairs(layer: Layer, passes: Passes) -> int:
    """Queries times the keys that they meet, of a row."""
    if not passes.generated:
        return passes.columns * (passes.past + passes.columns)
    keys = range(passes.past + 1, passes.past + passes.columns + 1)
    return sum(min(count, layer.window or count) for count in keys)


def cache(outline: Outline, passes: Passes) -> int:
    """Bytes of keys and values of the widest call, after its last token; of passes of a sweep those that are kept."""
    rows, length = passes.rows_at_once, passes.past + passes.columns
    numbers = sum(
        count * rows * layer.kv_heads * (layer.d_key + layer.d_value) * min(length, layer.window or length)
        for layer, count in outline.kinds(passes.start, passes.stop).items()
    )
    return numbers * outline.itemsize


def weights_read(outline: Outline, passes: Passes) -> int:
    """Bytes of the weights that calls go through; of experts those that some token takes."""
    tokens = passes.rows_at_once * (1 if passes.generated else passes.columns)
    numbers = 0
    for layer, count in outline.kinds(passes.start, passes.stop).items():
        taken = min(1.0, tokens * layer.top_k / layer.experts) if layer.experts else 0.0
        numbers += count * (layer.held - layer.expert_matrices + int(taken * layer.expert_matrices))
    numbers += outline.unembedding if passes.read_out else 0
    return passes.calls * numbers * outline.itemsize


def activations(outline: Outline, passes: Passes) -> int:
    """Bytes of the widest moment of a call, without weights, caches and what is kept."""
    rows = passes.rows_at_once
    columns = 1 if passes.generated else passes.columns
    keys = passes.past + passes.columns
    n, logits = rows * columns, _at_once(passes) * outline.d_vocab
    layers = outline.kinds(passes.start, passes.stop)
    if not layers or not n:
        return 0
    kept = outline.d_model * n
    if not passes.backward:
        moments = [_widest(outline, layer, rows, columns, keys) for layer in layers]
        return int(max([*moments, kept + logits * (1 + outline.capped)])) * outline.itemsize
    saved = kept + sum(count * _saved(outline, layer, rows, columns, keys) for layer, count in layers.items())
    last = max(3 * layer.neurons * n + 3 * layer.top_k * _neurons(outline, layer) * n for layer in layers)
    top = logits * (4 if outline.capped else 1)
    return int(max(saved + logits * outline.capped * 2 + last, saved + top + logits)) * outline.itemsize


def _at_once(passes: Passes) -> int:
    """Positions whose logits are there together."""
    return min(passes.at_once, passes.read_out) if passes.at_once else passes.read_out


def _neurons(outline: Outline, layer: Layer) -> int:
    """Neurons of an expert (g)."""
    return layer.expert_neurons // (3 * outline.d_model)


def _widest(outline: Outline, layer: Layer, rows: int, columns: int, keys: int) -> float:
    """Numbers at the widest moment of a block without gradients."""
    n, d, pattern = rows * columns, outline.d_model, rows * layer.heads * columns * keys * outline.eager
    repeated = 2 * layer.heads * layer.d_key * rows * keys * outline.eager
    mask = rows * columns * keys * outline.eager
    qkv = 3 * layer.heads * layer.d_key + 2 * layer.kv_heads * (layer.d_key + layer.d_value)
    attention = (3 * d + qkv) * n + 2 * pattern + repeated + mask
    mlp = 4 * d * n + pattern + mask + _inner(outline, layer) * layer.neurons * n
    routed = 4 * d * n + pattern + mask + layer.top_k * (4 * _neurons(outline, layer) + d) * n
    return max(attention, mlp, routed if layer.experts else 0)


def _inner(outline: Outline, layer: Layer) -> int:
    """How many tensors as wide as the MLP are there together."""
    return 3 if layer.gated else 4 if outline.plain_gelu else 2


def _saved(outline: Outline, layer: Layer, rows: int, columns: int, keys: int) -> float:
    """Numbers that a block keeps for its backward pass."""
    n, d = rows * columns, outline.d_model
    attention = (2 * layer.heads * layer.d_key + layer.kv_heads * (layer.d_key + layer.d_value)) * n
    if outline.eager:
        attention += (1 + outline.capped_scores) * rows * layer.heads * columns * keys
        attention += 2 * layer.heads * layer.d_key * rows * keys
    mlp = (3 if layer.gated else 4 if outline.plain_gelu else 1) * layer.neurons
    routed = layer.top_k * (3 * _neurons(outline, layer) + d) if layer.experts else 0
    return 2 * d * n + attention + (mlp + routed) * n
