"""Artefacts of the published code: means, effects and vectors in `.pt` files, read without running what is in them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from ..effects import CLASSES
from ..means import head_shape
from ..vectors import FunctionVector


def read_tensor(path: str | Path) -> Tensor:
    """The tensor that a `.pt` file holds, float32 or as stored if wider.

    Raises:
        LoadError: no such file, one that needs code to be read, or no tensor in it.
    """
    tensor = ic.runs.read_pt(path, "a tensor")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ic.LoadError(f"{path} holds {kind}, not a tensor of numbers")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_means(path: str | Path, model: ic.Model) -> Float[Tensor, "layer head slot d_head"]:
    """Mean head activations.

    Raises:
        LoadError: not readable, or of another model.
    """
    means = read_tensor(path)
    heads, d_head = head_shape(model)
    if means.ndim != 4 or (means.shape[0], means.shape[1], means.shape[3]) != (model.n_layers, heads, d_head):
        raise ic.LoadError(
            f"{path} holds {list(means.shape)}; means of this model are [layer {model.n_layers}, head {heads}, slot, "
            f"d_head {d_head}]"
        )
    return means


def read_effects(path: str | Path, model: ic.Model) -> Float[Tensor, "trial layer head *token_class"]:
    """Indirect effects, of the last token or of all classes. The published code drops axes of size one: they come back.

    Raises:
        LoadError: not readable, or of another model.
    """
    effects = read_tensor(path)
    wanted = model.n_layers, head_shape(model)[0], *((len(CLASSES),) if effects.ndim == 4 else ())
    trials, rest = divmod(effects.numel(), math.prod(wanted))
    if rest or tuple(effects.squeeze().shape) != tuple(size for size in (trials, *wanted) if size != 1):
        raise ic.LoadError(
            f"{path} holds {list(effects.shape)}; effects of this model are [trial, layer {wanted[0]}, head "
            f"{wanted[1]}] or [trial, layer, head, token class {len(CLASSES)}]"
        )
    return effects.reshape(trials, *wanted)


def read_vector(path: str | Path, model: ic.Model, *, task: str = "") -> FunctionVector:
    """A function vector `(1, d_model)` or `(d_model,)`.

    Raises:
        LoadError: not readable, or of another width.
    """
    vector = read_tensor(path)
    if vector.numel() != model.d_model:
        raise ic.LoadError(f"{path} holds {list(vector.shape)}, the residual stream has {model.d_model}")
    return FunctionVector(vector.flatten().float(), "resid", task or Path(path).stem, model.source)
