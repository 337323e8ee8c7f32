"""Families that nobody has described: module paths by the names of modules, and why routers have no sites, by model
type, so that none is silently without."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_SEQ2SEQ = "is an encoder-decoder with a capacity per expert: which tokens an expert drops depends on the others"
_JOINT = (
    "the weights of routed experts are normalised along with those of shared ones, by logits that the router's module "
    "does not give"
)
_OWN = "text and images have routers and experts of their own in one block; a site by layer would be one of them"
_NOT_HELD = "nobody has held its routers against selection by hand yet; a family file with a router can be added"

UNDESCRIBED: dict[str, str] = {
    "axk2": "experts of a group that is left out count zero in the choice, so they may be chosen all the same",
    "dbrx": "the router's module gives logits only, and the block selects by a method: nothing shows what is executed",
    "diffusion_gemma": "it denoises blocks of text and is no causal language model",
    "doge": "its experts are rows of two tables, found by product keys; there is no router of single experts",
    "ernie4_5_vl_moe": _OWN,
    "inkling": _JOINT,
    "inkling_mm_model": _JOINT,
    "nllb-moe": f"it {_SEQ2SEQ}",
    "qwen3_omni_moe": "it is several models; load its thinker, Qwen3OmniMoeThinkerForConditionalGeneration",
    "switch_transformers": f"it {_SEQ2SEQ}",
    "zaya": "a router reads the hidden states of the router before it, and may send a token past all experts",
} | dict.fromkeys(
    (
        "beam", "deepseek_ocr2", "dots3_note", "glm5_next", "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop",
        "minimax_m3_vl", "mistral_large4", "muse_spark", "qwen4_exp", "step3p7", "unlimited_ocr",
    ),
    _NOT_HELD,
)  # fmt: skip


def discover(modules: Mapping[str, nn.Module], embedding: nn.Module | None = None) -> dict[str, str]:
    """Module paths of an unknown family, by the names of its modules: the longest list of blocks with attention, of
    those beside the token embedding if there are such (a vision tower has blocks too)."""
    lists = [(path, m) for path, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    home = next((path.rpartition(".")[0] for path, m in modules.items() if m is embedding), "")
    hints = {
        "blocks.attn": ("self_attn", "attention", "self_attention", "attn"),
        "blocks.mlp": ("mlp", "feed_forward", "ffn"),
    }
    for path, blocks in sorted(lists, key=lambda item: (item[0].rpartition(".")[0] != home, -len(item[1]))):
        children = dict(blocks[0].named_children())
        parts = {key: next((n for n in names if n in children), None) for key, names in hints.items()}
        if parts["blocks.attn"] is None:
            continue
        of_blocks = {key: name for key, name in parts.items() if name}
        return {"blocks": path, **of_blocks, **_discover_ends(modules, path)}
    return {}


def _discover_ends(modules: Mapping[str, nn.Module], blocks: str) -> dict[str, str]:
    parent = blocks.rpartition(".")[0]
    ends: dict[str, str] = {}
    for path, module in modules.items():
        outer, _, name = path.rpartition(".")
        if outer == parent and isinstance(module, nn.Embedding) and "pos" not in name:
            ends.setdefault("embed", path)
        if (outer == parent and "norm" in name.lower()) or (name == "ln_f" and outer == parent):
            ends["ln_final"] = path
    return ends
