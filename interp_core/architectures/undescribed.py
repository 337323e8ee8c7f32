"""Why routers of families that nobody has described have no sites, by model type, so that none is silently without."""

from __future__ import annotations

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
