"""Files of sparse autoencoders, as SAELens saves them: `cfg.json` and `sae_weights.safetensors` in a folder.

    version 3 to 5    architecture, d_in, d_sae, hook_name, apply_b_dec_to_input, normalize_activations, … side by side
    version 6         the settings of the model (hook_name, model_name, model_from_pretrained_kwargs) under `metadata`

A setting that changes what weights mean, and that is not known here, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._json_files import read_json
from .autoencoder import SAE

OWN = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Weights `[d_sae]` of each architecture, beside W_enc, W_dec and b_dec."""
WRITTEN = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mixer_out", "mlp_out")
"""Sites whose mean over d_model TransformerLens takes out where it centres the weights that write to the stream."""


def load_sae(folder: str | Path, *, scale: float | None = None, shapes_alone: bool = False) -> SAE:
    """The sparse autoencoder of a folder.

    Args:
        scale: what states were multiplied by in training, for `normalize_activations: expected_average_only_in`, whose
            factor the folder does not hold (√d_in / mean length of a state).
        shapes_alone: read no weights: to see whether it fits a model.

    Raises:
        LoadError: files that are missing or damaged, weights that are missing or of other shapes.
        CapabilityError: an architecture or a setting that is not known here, by its name.
        SiteError: a hook that is no site.
        PlanError: a scale for weights that have theirs.
    """
    path = Path(folder)
    cfg = read_json(path / "cfg.json", "a folder with cfg.json and sae_weights.safetensors, as SAELens saves it")
    if not isinstance(cfg, Mapping):
        raise ic.LoadError(f"{path / 'cfg.json'} holds a {type(cfg).__name__}; a configuration is a JSON object")
    # Up to version 5 all settings lie side by side; from 6 on those of the model are under `metadata`.
    cfg = {**(cfg.get("metadata") or {}), **cfg}
    architecture, k = _architecture(cfg, path)
    _refuse(cfg, path, scale)
    weights = _weights(path / "sae_weights.safetensors", shapes_alone)
    hook = cfg.get("hook_name") or cfg.get("hook_point")
    if not isinstance(hook, str):
        raise ic.LoadError(f"{path / 'cfg.json'} has no hook_name, which says what the autoencoder reads")
    site = S.from_hook(hook)
    if site.info.layered and not isinstance(site.layers, int):
        raise ic.LoadError(f"{path / 'cfg.json'}: hook_name {hook!r} names no layer; write blocks.6.{hook}")
    sae = SAE(
        site, architecture, weights, k, subtract=bool(cfg.get("apply_b_dec_to_input", True)),
        centred=_centred(cfg) and site.name in WRITTEN, source=f"{path.name} (of {cfg.get('model_name', 'a model')})",
    )  # fmt: skip
    _demand_shapes(sae, cfg, path)
    if scale is not None:
        scaled = {"W_enc": weights["W_enc"] * scale, **{name: weights[name] / scale for name in ("W_dec", "b_dec")}}
        sae = replace(sae, weights={**weights, **scaled})
    return sae


def _architecture(cfg: Mapping[str, Any], path: Path) -> tuple[str, int]:
    """Which architecture it is, and its k."""
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    architecture = cfg.get("architecture", "standard")
    # up to version 5 a topk autoencoder may be a standard one with another activation
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in OWN:
        raise ic.CapabilityError(
            f"{path.name}: no architecture {architecture!r} here. {ic.errors.nearest(architecture, OWN)}"
        )
    if activation not in ("relu", "topk"):
        raise ic.CapabilityError(
            f"{path.name}: no activation {activation!r} here. {ic.errors.nearest(activation, ('relu', 'topk'))}"
        )
    k = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k")) if architecture == "topk" else 0
    k = int(k) if isinstance(k, float) and k.is_integer() else k
    if isinstance(k, bool) or not isinstance(k, int) or (architecture == "topk" and k < 1):
        raise ic.LoadError(f"{path / 'cfg.json'}: topk needs k, how many features are active, not {k!r}")
    return architecture, k


def _refuse(cfg: Mapping[str, Any], path: Path, scale: float | None) -> None:
    """Settings that change what the weights mean, and that are not known here.

    Raises:
        CapabilityError: by their names.
    """
    for name in ("finetuning_scaling_factor", "rescale_acts_by_decoder_norm"):
        if cfg.get(name):
            raise ic.CapabilityError(
                f"{path.name} has {name}, which is not known here; save it with its factors folded in"
            )
    if cfg.get("hook_head_index") is not None:
        raise ic.CapabilityError(
            f"{path.name} is of head {cfg['hook_head_index']} alone (hook_head_index), of all heads they can be"
        )
    normalised = cfg.get("normalize_activations", "none")
    if normalised in (None, False, "none"):
        if scale is not None:
            raise ic.PlanError(f"{path.name} reads states as they are (normalize_activations: none); leave scale= out")
    elif normalised != "expected_average_only_in":
        raise ic.CapabilityError(
            f"{path.name} has normalize_activations {normalised!r}; known are 'none' and 'expected_average_only_in'"
        )
    elif scale is None:
        raise ic.CapabilityError(
            f"{path.name} has normalize_activations 'expected_average_only_in': it was trained on states times a "
            "factor that its folder does not hold; give load_sae(folder, scale=√d_in / their mean length in training)"
        )


def _centred(cfg: Mapping[str, Any]) -> bool:
    return bool((cfg.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))


def _weights(path: Path, shapes_alone: bool) -> dict[str, Tensor]:
    """Tensors of a file by name; empty ones of the same shapes, without reading it, where these are enough."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if shapes_alone:
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ic.LoadError(f"{path} cannot be read ({error}); SAELens writes it beside cfg.json") from error


def _demand_shapes(sae: SAE, cfg: Mapping[str, Any], path: Path) -> None:
    """All weights are there, as wide as the configuration says.

    Raises:
        LoadError: naming the first that is not.
    """
    d_in, d_sae = (cfg.get(name, 0) for name in ("d_in", "d_sae"))
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    shapes |= {name: [d_sae] for name in OWN[sae.architecture]}
    for name, shape in shapes.items():
        if name not in sae.weights:
            has = ", ".join(sorted(sae.weights))
            raise ic.LoadError(f"{path.name}: a {sae.architecture} autoencoder has {name}, and the file holds {has}")
        if list(sae.weights[name].shape) != shape:
            raise ic.LoadError(f"{path.name}: {name} is {list(sae.weights[name].shape)}, cfg.json says {shape}")
    if sae.k > d_sae:
        raise ic.LoadError(f"{path.name}: k is {sae.k}, and there are {d_sae} features")
