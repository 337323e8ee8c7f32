"""Tuned lens: an affine translator per layer.

    h' = h + h Wᵀ + b,   logits = readout(h')            translator i acts on resid_pre[i], i = 0 on the embedding

The output of the last block has none. All zeros are the plain logit lens. In terms of block outputs (as rows of the
lens are numbered here) translator i belongs to layer i - 1.

Two fits, both deterministic: "kl" minimises KL(final ‖ layer) on the texts' positions, as published, with Adam in fixed
steps from zero; "regression" is the least-squares map to the last block's output, with a ridge, in closed form.

Source: Belrose et al. (2023), arXiv:2303.08112; the regression is that of Din et al. (2023), arXiv:2303.09435.
Cost: reading out one product [d_model d_model] per row. "regression": one forward pass per text, and a linear system
per layer. "kl": steps · rows · d_vocab · d_model multiply-adds, three times, per layer.
Must equal: h + h Wᵀ + b; with zeros the logit lens, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

CONFIG, PARAMS = "config.json", "params.pt"
KIND = "linear_tuned_lens"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators by layer. Called with a layer (-1: the embedding) and rows of its stream it translates them.

    Attributes:
        weight, bias: per layer, -1 to n_layers - 2.
        metadata: as the file's config has it.
    """

    weight: Mapping[int, Float[Tensor, "d_model d_model"]]
    bias: Mapping[int, Float[Tensor, " d_model"]]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    FIRST = -1
    """The first layer that a lens of this kind can have: the embedding."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that it has a translator for."""
        return tuple(sorted(self.weight))

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return len(next(iter(self.bias.values())))

    def __call__(self, layer: int, resid: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Rows of a layer's stream as the last block would give them.

        Raises:
            PlanError: the layer has no translator.
        """
        if layer not in self.weight:
            raise ic.PlanError(f"the tuned lens has no translator for layer {layer}; it has {list(self.layers)}")
        weight, bias = self.weight[layer].to(resid.device), self.bias[layer].to(resid.device)
        wide = resid.to(weight.dtype)
        return (wide + wide @ weight.mT + bias).to(resid.dtype)

    def check(self, model: ic.Model) -> TunedLens:
        """The lens itself, if it fits a model; warns if it was made for another unembedding.

        Raises:
            PlanError: another width, or other layers than the model has.
        """
        if self.d_model != model.d_model:
            raise ic.PlanError(f"the tuned lens is of width {self.d_model}, the model's stream of {model.d_model}")
        wanted = tuple(range(-1, model.n_layers - 1))
        if self.layers != wanted:
            raise ic.PlanError(
                f"the tuned lens has {len(self.layers)} translators, a model of {model.n_layers} layers {len(wanted)}"
            )
        expected = self.metadata.get("unembed_hash")
        if expected and expected != unembed_hash(model):
            warnings.warn(
                "the tuned lens was made for another unembedding than this model's (unembed_hash differs): a "
                "fine-tuned or another model; its rows may say little",
                stacklevel=2,
            )
        return self


def unembed_hash(model: ic.Model) -> str:
    """What tells an unembedding from another in published files: a hash of its printed corners, one digit each."""
    matrix = model.weights(S.logits).mT.float().cpu().numpy()
    return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


# Files


def load_tuned(folder: str | Path, model: ic.Model | None = None) -> TunedLens:
    """A tuned lens from its folder (`config.json`, `params.pt`).

    Args:
        model: that it has to fit.

    Raises:
        LoadError: a file is missing or of another kind, naming what it holds.
        PlanError: it does not fit the model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ic.LoadError(f"no tuned lens at {folder}: {CONFIG} is not there") from None
    except (ValueError, OSError) as error:
        raise ic.LoadError(f"{folder} cannot be read as a tuned lens: {str(error).splitlines()[0]}") from error
    state = ic.runs.read_pt(folder / PARAMS, "a tuned lens")
    if not isinstance(config, dict) or config.get("lens_type", KIND) != KIND:
        raise ic.LoadError(f"{folder / CONFIG} is of no {KIND}")
    weight, bias = _translators(state, folder / PARAMS)
    said = config.get("d_model", len(bias[-1])), config.get("num_hidden_layers", len(weight))
    if said != (len(bias[-1]), len(weight)):
        raise ic.LoadError(
            f"{folder} says width {said[0]} and {said[1]} layers, its parameters have {len(bias[-1])} and {len(weight)}"
        )
    lens = TunedLens(weight, bias, config)
    return lens if model is None else lens.check(model)


def _translators(state: Any, path: Path) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ic.LoadError(f"{path} holds no translators")
    weight: dict[int, Tensor] = {}
    bias: dict[int, Tensor] = {}
    for name, value in state.items():
        number, _, kind = str(name).partition(".")
        if not number.isdigit() or kind not in ("weight", "bias"):
            raise ic.LoadError(f"{path} holds {name!r}; translators are '0.weight', '0.bias', '1.weight' and so on")
        (weight if kind == "weight" else bias)[int(number) - 1] = value.float()
    if sorted(weight) != list(range(-1, len(weight) - 1)):
        raise ic.LoadError(f"{path} holds translators {sorted(i + 1 for i in weight)}; they have to go from 0 on")
    for layer, matrix in weight.items():
        bias.setdefault(layer, torch.zeros(len(matrix)))  # lenses without biases exist
        if matrix.shape != (len(bias[layer]), len(bias[layer])):
            raise ic.LoadError(f"{path}: translator {layer + 1} is {list(matrix.shape)}, its bias {len(bias[layer])}")
    return dict(sorted(weight.items())), dict(sorted(bias.items()))


def save_tuned(lens: TunedLens, folder: str | Path) -> Path:
    """Write a tuned lens in the published form."""
    folder = Path(folder)
    state = {f"{layer + 1}.weight": lens.weight[layer].cpu() for layer in lens.layers}
    state |= {f"{layer + 1}.bias": lens.bias[layer].cpu() for layer in lens.layers}
    config = {
        **lens.metadata, "d_model": lens.d_model, "num_hidden_layers": len(lens.layers), "bias": True,
        "lens_type": KIND,
    }  # fmt: skip
    ic.runs.write(folder / PARAMS, ic.runs.pt_bytes(state))
    ic.runs.write(folder / CONFIG, ic.runs.json_text(config))
    return folder


# Fitting


def fit_tuned(
    model: ic.Model,
    texts: Sequence[Any],
    *,
    objective: Literal["kl", "regression"] = "kl",
    steps: int = 250,
    rows: int = 256,
    rate: float = 1e-3,
    ridge: float = 1e-3,
    skip_first: int = 1,
    progress: bool = False,
) -> TunedLens:
    """Fit translators on all positions of some texts but the first `skip_first`.

    Args:
        objective: "kl", as published, or "regression"; see the module.
        steps, rows, rate: of "kl": steps, positions per step (taken round and round, in order), Adam's rate, which
            falls to zero in a line.
        ridge: of "regression", in units of the mean square of a coordinate.
        progress: say how far it is on standard error.

    Raises:
        PlanError: no positions.
    """
    if objective not in ("kl", "regression"):
        raise ic.PlanError(f"no objective {objective!r}. {ic.errors.nearest(objective, ['kl', 'regression'])}")
    layers = list(range(-1, model.n_layers - 1))
    streams = _streams(model, texts, skip_first, progress)
    weight, bias = {}, {}
    with ic.Progress("tuned lens, layers", len(layers), shown=progress) as shown:
        for i, layer in enumerate(layers):
            if objective == "regression":
                weight[layer], bias[layer] = _regression(streams[i], streams[-1], ridge)
            else:
                weight[layer], bias[layer] = _descent(model, streams[i], streams[-1], steps, rows, rate)
            shown.add()
    # as published files have it, by which `check` knows a lens of another unembedding
    metadata = {
        "base_model_name_or_path": ic.runs.model_record(model)["source"], "unembed_hash": unembed_hash(model),
        "objective": objective, "texts": len(texts), "positions": len(streams[-1]),
        **({"ridge": ridge} if objective == "regression" else {"steps": steps, "rows": rows, "rate": rate}),
    }  # fmt: skip
    return TunedLens(weight, bias, metadata)


def _streams(model: ic.Model, texts: Sequence[Any], skip_first: int, progress: bool) -> list[Tensor]:
    """Rows `[n d_model]` of the embedding and of every block's output."""
    sites = [S.resid_pre[0], *(S.resid_post[layer] for layer in range(model.n_layers))]
    parts: list[list[Tensor]] = [[] for _ in sites]
    with ic.Progress("tuned lens, texts", len(texts), shown=progress) as shown:
        for text in texts:
            run = model.run(text, read=sites, logits=False)
            for part, site in zip(parts, sites, strict=True):
                part.append(run[site].plain[:, skip_first:].flatten(0, 1).float())
            shown.add()
    streams = [torch.cat(part) if part else torch.zeros(0, model.d_model) for part in parts]
    if not len(streams[0]):
        raise ic.PlanError(f"a tuned lens needs positions to fit on; {len(texts)} texts have none after {skip_first}")
    return streams


def _regression(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The affine map from x to y - x of least squares, in float64."""
    x, y = x.double(), y.double()
    mean_x, change = x.mean(0), y - x
    mean_y = change.mean(0)
    centred = x - mean_x
    gram = centred.mT @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.mT @ (change - mean_y)).mT
    return weight.float(), (mean_y - weight @ mean_x).float()


def _descent(model: ic.Model, x: Tensor, y: Tensor, steps: int, rows: int, rate: float) -> tuple[Tensor, Tensor]:
    """Translator of least KL(final ‖ translated)."""
    weight = torch.zeros(x.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(x.shape[1], requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=rate)
    at = torch.arange(steps * rows).view(steps, rows) % len(x)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = x[at[step]]
        with torch.no_grad():
            wanted = torch.log_softmax(model.readout(y[at[step]].to(model.dtype)).float(), -1)
        with torch.enable_grad():
            logprob = torch.log_softmax(model.readout((batch + batch @ weight.mT + bias).to(model.dtype)).float(), -1)
            loss = torch.nn.functional.kl_div(logprob, wanted, log_target=True, reduction="batchmean")
            adam.zero_grad()
            loss.backward()
        adam.step()
    return weight.detach(), bias.detach()
