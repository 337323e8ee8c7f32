"""Files of Jacobian lenses: published ones in all their forms, told apart by their keys, and our own.

    J, n_prompts, source_layers, d_model [, metadata]        the published form; matrices in half precision
    J, source_layers, d_model, provenance                    what vllm-lens writes
    jacobian_sum, n_done, next_idx, source_layers            a fit that was stopped: sums, divided by n_done here

Row i of a matrix is a coordinate of the output. Files are read with `weights_only`. Two kinds with the same or like
keys are refused by name: a lens of attention heads (a matrix for the last layer too) and an estimate from random
projections.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import interp_core as ic

from .jacobian import JacobianLens

PROJECTED = {"n_proj", "model_id", "n_layers"}
"""Keys of estimates from random projections."""


def load_jacobian(path: str | Path, model: ic.Model | None = None, *, n_prompts: int | None = None) -> JacobianLens:
    """A Jacobian lens from a file.

    Args:
        model: that it has to fit.
        n_prompts: that it should be of, by its own description (`config.yaml` beside published files): fewer are a fit
            that was not finished, which is warned of.

    Raises:
        LoadError: no file, or not of this kind, naming what it holds.
        PlanError: it does not fit the model.
    """
    data = ic.runs.read_pt(path, "a Jacobian lens")
    if not isinstance(data, Mapping):
        raise ic.LoadError(f"{path} holds {type(data).__name__}, a Jacobian lens is a mapping")
    lens = _of(data, Path(path))
    if n_prompts is not None and lens.n_prompts != n_prompts:
        warnings.warn(
            f"{path} is a lens of {lens.n_prompts} prompts, it should be of {n_prompts}: a fit that was not finished",
            stacklevel=2,
        )
    return lens if model is None else lens.check(model)


def save_jacobian(lens: JacobianLens, path: str | Path) -> Path:
    """Write a lens in the published form, in half precision; metadata beside it.

    Raises:
        PlanError: an entry is too large for half precision.
    """
    matrices = {layer: matrix.half().cpu() for layer, matrix in lens.matrices.items()}
    for layer, matrix in matrices.items():
        if not bool(matrix.isfinite().all()):
            raise ic.PlanError(f"layer {layer} of the Jacobian lens has entries that half precision cannot hold")
    data = {
        "J": matrices, "n_prompts": lens.n_prompts, "source_layers": list(lens.layers), "d_model": lens.d_model,
        "metadata": dict(lens.metadata),
    }  # fmt: skip
    ic.runs.write(Path(path), ic.runs.pt_bytes(data))
    return Path(path)


def _of(data: Mapping[Any, Any], path: Path) -> JacobianLens:
    keys = set(data)
    if "jacobian_sum" in keys:
        if not data.get("n_done"):
            raise ic.LoadError(f"{path} is a fit that was stopped before its first prompt was done")
        n = int(data["n_done"])
        matrices = {layer: matrix / n for layer, matrix in _matrices(data["jacobian_sum"], path).items()}
        return JacobianLens(matrices, n, {"checkpoint": True})
    # estimates have a J, too, of which single entries mean nothing
    if "J" not in keys or PROJECTED & keys:
        kind = "an estimate from random projections" if PROJECTED & keys else "no Jacobian lens"
        raise ic.LoadError(
            f"{path} is {kind}: it holds {', '.join(sorted(map(str, keys)))}; a lens holds J, n_prompts, source_layers "
            "and d_model, and a fit that was stopped jacobian_sum, n_done and source_layers"
        )
    matrices = _matrices(data["J"], path)
    if "source_layers" in keys and sorted(data["source_layers"]) != sorted(matrices):
        raise ic.LoadError(f"{path} says layers {sorted(data['source_layers'])} and holds {sorted(matrices)}")
    width = int(data.get("d_model", len(next(iter(matrices.values())))))
    for layer, matrix in matrices.items():
        if matrix.shape != (width, width):
            raise ic.LoadError(
                f"{path}: the matrix of layer {layer} is {list(matrix.shape)}, width {width} has [{width}, {width}]"
                " (a lens of attention heads has one column per head and coordinate)"
            )
    metadata = dict(data.get("metadata") or data.get("provenance") or {})
    return JacobianLens(matrices, int(data.get("n_prompts", metadata.get("n_prompts", 0))), metadata)


def _matrices(stored: Any, path: Path) -> dict[int, Tensor]:
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ic.LoadError(f"{path} holds no matrices by layer")
    return {int(layer): matrix.float() for layer, matrix in sorted(stored.items(), key=lambda item: int(item[0]))}
