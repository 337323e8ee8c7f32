"""Families whose routers have no sites, and why: by model type, so that none is silently without."""

from __future__ import annotations

_SEQ2SEQ = "an encoder-decoder with a capacity per expert: which tokens an expert drops depends on the rest of the batch"

UNDESCRIBED: dict[str, str] = {
    "dbrx": "DBRX's router module gives logits only; the block selects inside a method, and what it selects passes no "
    "module boundary before the experts",
    "nllb-moe": f"NLLB-MoE is {_SEQ2SEQ}",
    "switch_transformers": f"Switch Transformers is {_SEQ2SEQ}",
}
