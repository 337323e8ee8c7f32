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
    last = max(_going_back(outline, layer, rows, columns, keys) for layer in layers)
    top = logits * (4 if outline.capped else 1)
    return int(max(saved + logits * outline.capped * 2 + last, saved + top + logits)) * outline.itemsize


def _going_back(outline: Outline, layer: Layer, rows: int, columns: int, keys: int) -> int:
    """Numbers that a block's backward pass takes at its widest moment, beside what was kept."""
    n, pattern = rows * columns, rows * layer.heads * columns * keys * outline.eager
    mlp = 3 * layer.neurons * n + 3 * layer.top_k * _neurons(outline, layer) * n
    # when it comes to attention, what the MLP kept is gone, and of the softmax what went in
    attention = (
        int(min(_softmax(outline), 3) * pattern) + 4 * layer.heads * layer.d_key * n - _kept_by_mlp(outline, layer) * n
    )
    return max(mlp, attention)


def _kept_by_mlp(outline: Outline, layer: Layer) -> int:
    """Numbers of a token that an MLP, or a token's experts, keep for the backward pass."""
    mlp = (3 if layer.gated else 4 if outline.plain_gelu else 1) * layer.neurons
    routed = layer.top_k * (3 * _neurons(outline, layer) + outline.d_model) if layer.experts else 0
    return mlp + routed


def _softmax(outline: Outline) -> float:
    """Patterns that are there together while one is made: what goes in and what comes out, and where that is in float32
    the copy that is in it."""
    return 1 + 8 / outline.itemsize if outline.wide_softmax and outline.itemsize < 4 else 2


def _wide(outline: Outline) -> float:
    """A number in float32, in numbers of the model's dtype; no less than one."""
    return max(4 / outline.itemsize, 1)


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
    attention = (3 * d + qkv) * n + _softmax(outline) * pattern + repeated + mask
    mlp = 4 * d * n + pattern + mask + _inner(outline, layer) * layer.neurons * n
    routed = 4 * d * n + pattern + mask + layer.top_k * (4 * _neurons(outline, layer) + d) * n
    return max(attention, mlp, routed if layer.experts else 0)


def _inner(outline: Outline, layer: Layer) -> int:
    """How many tensors as wide as the MLP are there together."""
    return 3 if layer.gated else 4 if outline.plain_gelu else 2


def _saved(outline: Outline, layer: Layer, rows: int, columns: int, keys: int) -> float:
    """Numbers that a block keeps for its backward pass."""
    n, d = rows * columns, outline.d_model
    attention: float = (2 * layer.heads * layer.d_key + layer.kv_heads * (layer.d_key + layer.d_value)) * n
    stream = (_wide(outline) if outline.wide_norms else 1) * layer.norms * d * n
    if layer.head_norms:
        stream += _wide(outline) * (layer.heads + layer.kv_heads) * layer.d_key * n
    if outline.eager:
        made = 1 + (_wide(outline) if outline.wide_softmax and outline.itemsize < 4 else 0)
        attention += (made + outline.capped_scores) * rows * layer.heads * columns * keys
        attention += 2 * layer.heads * layer.d_key * rows * keys
    return stream + attention + _kept_by_mlp(outline, layer) * n
