"""Writes interp_core/architectures/paths.json: the module paths that TransformerLens' architecture adapters know.

The adapters say where each canonical component lives in a Hugging Face model. Reading them costs an import of
TransformerLens (seconds, and its dependencies), so it is done here once; a test holds the file against the installed
version. Run: python scripts/atlas_paths.py [--check]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

KEPT = {
    "embed", "embed_ln", "pos_embed", "rotary_emb", "blocks", "ln_final", "unembed", "vision_encoder",
    "vision_projector", "blocks.ln1", "blocks.ln1_post", "blocks.ln2", "blocks.ln2_post", "blocks.mlp",
    "blocks.mlp.in", "blocks.mlp.gate", "blocks.mlp.out", "blocks.mlp.dense_in", "blocks.mlp.dense_gate",
    "blocks.mlp.dense_out", "blocks.attn", "blocks.attn.q", "blocks.attn.k", "blocks.attn.v", "blocks.attn.qkv",
    "blocks.attn.o", "blocks.attn.q_norm", "blocks.attn.k_norm", "blocks.linear_attn",
}  # fmt: skip
OUT = Path(__file__).parent.parent / "interp_core" / "architectures" / "paths.json"


def _walk(components: dict[str, Any] | None, paths: dict[str, str], prefix: str = "") -> None:
    for key, component in (components or {}).items():
        if component.name and prefix + key in KEPT:
            paths[prefix + key] = component.name
        _walk(getattr(component, "submodules", None), paths, f"{prefix}{key}.")


def table() -> dict[str, dict[str, str]]:
    """Component paths per Hugging Face class name, for every adapter that describes transformer blocks."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    out: dict[str, dict[str, str]] = {}
    for name, adapter in SUPPORTED_ARCHITECTURES.items():
        config = TransformerBridgeConfig(
            d_model=64, d_head=16, n_layers=2, n_ctx=64, n_heads=4, d_vocab=100, d_mlp=128, act_fn="silu",
            architecture=name,
        )  # fmt: skip
        # Adapters of vision models only want torchvision for their processors, which are not made here.
        described = type(adapter.__name__, (adapter,), {"required_libraries": []})
        try:
            mapping = described(config).component_mapping
        except (ValueError, AttributeError, TypeError, ImportError):
            continue
        paths: dict[str, str] = {}
        _walk(mapping, paths)
        if "blocks" in paths and "blocks.attn" in paths:
            if "Parallel" in type(mapping["blocks"]).__name__:
                paths["parallel"] = "yes"
            out[name] = dict(sorted(paths.items()))
    return dict(sorted(out.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    paths = table()
    text = json.dumps(paths, indent=0, sort_keys=True) + "\n"
    if parser.parse_args().check:
        sys.exit(0 if text == OUT.read_text() else "paths.json differs from the installed TransformerLens")
    OUT.write_text(text)
    print(f"{len(paths)} architectures -> {OUT}")
