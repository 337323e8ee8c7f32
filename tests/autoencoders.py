"""Sparse autoencoders with random weights, as SAELens saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

OWN = {
    "standard": ["b_enc"],
    "topk": ["b_enc"],
    "jumprelu": ["b_enc", "threshold"],
    "gated": ["b_gate", "b_mag", "r_mag"],
}


def folder(
    path: Path,
    kind: str = "standard",
    hook: str = "blocks.2.hook_resid_pre",
    d_in: int = 128,
    d_sae: int = 48,
    **cfg: Any,
) -> Path:
    """A random autoencoder as SAELens saves it, version 5; a setting of None is left out."""
    g = torch.Generator().manual_seed(d_in)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[0] ** 0.5

    weights = {"W_enc": random(d_in, d_sae), "W_dec": random(d_sae, d_in), "b_dec": random(d_in)}
    weights |= {name: random(d_sae).abs() if name == "threshold" else random(d_sae) for name in OWN[kind]}
    settings = {
        "architecture": kind, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "model_name": "toy", "hook_name": hook,
        "hook_layer": 2, "hook_head_index": None, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "normalize_activations": "none",
        "activation_fn_kwargs": {"k": 7} if kind == "topk" else {},
    } | cfg  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({name: held for name, held in settings.items() if held is not None}))
    return path
