"""Routing that other programs recorded: `routed_experts` arrays of vLLM and SGLang.

Both return, per completion, whole numbers `[tokens, layers, k]`: ids of the executed experts, without weights. vLLM
gives an array, SGLang base64 of little-endian int32. Layers that have no router stand there as zeros, and are skipped
by name. Of ids alone counts, sets and co-activation can be made; weights and probabilities cannot.

Source: the documentation of both; this package read it in 2026.
Must equal: the same statistics of `S.router_indices` read from the model.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

import interp_core as ic

from .points import Shape
from .routed import Routed


def decoded(text: str | bytes, n_layers: int, top_k: int) -> Int[np.ndarray, "token layer k"]:
    """SGLang's base64 as an array.

    Args:
        text: what the server returned.
        n_layers: layers that it records (all decoder layers).
        top_k: experts per token.

    Raises:
        LoadError: no base64, or numbers that do not fill whole tokens.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ic.LoadError(f"routed_experts is no base64: {error}") from error
    size = 4 * n_layers * top_k
    if not raw or len(raw) % size:
        raise ic.LoadError(
            f"routed_experts has {len(raw)} bytes, not whole tokens of {n_layers} layers × {top_k} int32 ({size} bytes)"
        )
    return np.frombuffer(raw, dtype="<i4").reshape(-1, n_layers, top_k)


def routed_experts(array: Any, shape: Shape) -> dict[int, Routed]:
    """Recorded ids as routing by decoder layer.

    Args:
        array: whole numbers `[tokens, layers, k]`; its layers are all decoder layers, or those with routers alone.
        shape: of the model, which says which layers have routers: `Shape.of(model)`, or written by hand.

    Raises:
        LoadError: another shape or kind of numbers; an id that is no expert's; a token that has an expert twice (zeros
            where a server did not record it); a dense layer that is not zero.
    """
    ids = np.asarray(array)
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ic.LoadError(
            f"routed_experts is an array of whole numbers [tokens, layers, k], not {ids.dtype} {ids.shape}"
        )
    layers = _layers(ids, shape)
    if ids.shape[2] != shape.top_k:
        raise ic.LoadError(f"routed_experts has {ids.shape[2]} experts per token, {shape.model} takes {shape.top_k}")
    dense = [layer for row, layer in enumerate(layers) if layer not in shape.moe_layers and ids[:, row].any()]
    if dense:
        raise ic.LoadError(f"routed_experts names experts in layer {dense[0]}, where {shape.model} has none")
    routed = ((layer, ids[:, row]) for row, layer in enumerate(layers) if layer in shape.moe_layers)
    return {layer: _layer(of_layer, layer, shape) for layer, of_layer in routed}


def _layers(ids: np.ndarray, shape: Shape) -> Sequence[int]:
    """Decoder layers of the array's second axis."""
    if ids.shape[1] == shape.n_layers:
        return range(shape.n_layers)
    if ids.shape[1] == len(shape.moe_layers):
        return shape.moe_layers
    raise ic.LoadError(
        f"routed_experts has {ids.shape[1]} layers; {shape.model} has {shape.n_layers}, of which "
        f"{len(shape.moe_layers)} have routers"
    )


def _layer(ids: np.ndarray, layer: int, shape: Shape) -> Routed:
    outside = (ids < 0) | (ids >= shape.n_experts)
    if outside.any():
        token = int(np.argwhere(outside)[0][0])
        raise ic.LoadError(
            f"routed_experts: token {token} in layer {layer} went to {ids[token].tolist()}; {shape.model} has "
            f"{shape.n_experts} experts"
        )
    ordered = np.sort(ids, -1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if twice.any():
        token = int(np.argwhere(twice)[0][0])
        zeros = int((~ids[twice].any(-1)).sum())
        raise ic.LoadError(
            f"routed_experts: token {token} in layer {layer} has an expert twice: {ids[token].tolist()} "
            f"({int(twice.sum())} such tokens, {zeros} of them zeros); leave out tokens that the server did not "
            "record, such as those of a cached prefix"
        )
    return Routed.of_ids(torch.from_numpy(ids.astype(np.int64)), shape.n_experts)
