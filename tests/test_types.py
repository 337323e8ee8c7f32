"""Every causal model type of transformers: it is built, it opens or is refused by name, and what it serves is true.

The fast suite has a fixed sample; `slow` has all of them. Hooks written by hand are `reference.py`'s.
"""

from __future__ import annotations

import pytest
import torch
from parity import IDS, cell
from reference import Reference
from type_layouts import LAYOUT

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.sites import Site
from interp_core.testing.types import types

SAMPLE = (
    "afmoe", "apertus", "axk2", "bitnet", "cohere", "codegen", "deepseek_v32", "falcon", "gemma4_unified_text", "glm4",
    "gpt_bigcode", "gpt_neox_japanese", "helium", "hyperclovax", "laguna", "mimo_v2_flash", "minicpm3", "mllama",
    "modernbert-decoder", "nanochat", "persimmon", "phi4_multimodal", "starcoder2", "vaultgemma", "youtu",
)  # fmt: skip
SPARSE = ("deepseek_v32", "glm_moe_dsa")
"""Types whose attention sees the keys that an indexer chooses."""


def sampled(all_of_them: list[str]) -> list[object]:
    """The sample, and beside it the others as slow tests."""
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in all_of_them]


@pytest.mark.parametrize("model_type", sampled([name for name in types() if name in LAYOUT]))
def test_what_is_served_equals_hooks_written_by_hand(model_type: str) -> None:
    hf = testing.tiny(model_type, dtype=torch.float64)
    hf.set_attn_implementation("eager")
    model, reference = ic.load(hf), Reference(model_type, hf)
    held = [site for site in reference.sites() if not model.can(site, "read")]
    assert {"resid_pre", "resid_post", "attn_in", "mlp_in", "z", "logits"} <= set(held)
    for site in held:
        off = cell(model, reference, site, edit=not model.can(site, "write"))
        assert max(off) < 1e-5, (site, off)  # families that compute attention in float32 round there


@pytest.mark.parametrize("model_type", SPARSE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_open_attention_sees_the_keys_that_the_indexer_chose(model_type: str, attention: str) -> None:
    hf = testing.tiny(model_type)
    hf.set_attn_implementation(attention)
    model = ic.load(hf)
    plain = model.run(IDS).logits
    run = model.run(IDS, read=S.pattern, edits=S.z.scale(1.0), allow_noop=True)
    assert torch.allclose(run.logits, plain, atol=1e-4)
    chosen = hf.config.index_topk
    assert IDS.shape[1] > chosen
    assert (run[Site("pattern")] > 0).sum(-1).max() == chosen
