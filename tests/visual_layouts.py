"""Where hand-written hooks find the language model in classes of images and text: the type whose layout it has (see
`type_layouts`), and its path.

Nothing comes from the atlas or a config. A class that is not here has sites that no hand-written hook holds.
"""

from __future__ import annotations

from collections.abc import Mapping

_CLASSES: dict[str, str] = {
    "apertus": "Apertus1p5",
    "aria_text": "Aria",
    "cohere2": "AyaVision Cohere2Vision CohereCompass",
    "deepseek_v3": "Kimi_K25",
    "dots1": "DeepseekOcr2 Ernie4_5_VLMoe Glm4vMoe Step3p7 UnlimitedOcr",
    "dots3_note_text": "Dots3Note",
    "exaone4": "Exaone4_5_",
    "fuyu": "Fuyu",
    "gemma3": "Gemma3 MuseGlimmer",
    "gemma4_text": "Gemma4 Gemma4Unified",
    "git": "Git",
    "glm4": "Glm46V Glm4v GlmOcr",
    "glm4_moe_lite": "Mistral4",
    "glm5_next_text": "Glm5Next",
    "granite": "Granite4Vision GraniteDocling",
    "hyperclovax": "HyperCLOVAXVisionV2",
    "inkling2_loop_text": "Inkling2Loop",
    "inkling2_text": "Inkling2",
    "hy_v4": "HYV4VL",
    "kosmos_2_5": "Kosmos2_5",
    "muse_spark": "MuseSpark",
    "nanochat": "Cosmos3Edge",
    "lfm2": "Lfm2Vl",
    "lfm3": "Lfm3Vl",
    "llama": "Chameleon Cosmos3Omni DeepseekVL DeepseekVLHybrid Emu3 Evolla GotOcr2 HunYuanVL Idefics2 Idefics3 InternVL "
    "Janus LightOnOcr Llava LlavaNext LlavaNextVideo LlavaOnevision Mistral3 Mllama Molmo2 Ovis2 PaddleOCRVL PaliGemma "
    "QianfanOCR Qwen2VL Qwen2_5OmniThinker Qwen2_5_VL Qwen3VL SmolVLM VideoLlama3 VideoLlava VipLlava",
    "mellum": "Qwen3OmniMoeThinker Qwen3VLMoe",
    "minimax_m3_vl_text": "MiniMaxM3Sparse",
    "mistral_large4": "MistralLarge4",
    "qwen3_5_moe_text": "Qwen3_5Moe",
    "qwen4_exp": "Qwen4Exp",
    "qwen3_5_text": "MiniCPMOcr MiniCPMV4_6 MiniCPMV4_7 Qwen3_5",
}
"""By type, the classes around a language model with its blocks, without the ending of their names."""
_ENDINGS = {"Git": "ForCausalLM", "Evolla": "ForProteinText2Text", "Fuyu": "ForCausalLM", "Mistral4": "ForCausalLM"}
_PATHS = {
    "Git": "git", "Kosmos2_5": "text_model",
    **dict.fromkeys(("Chameleon", "Evolla", "Fuyu", "Mistral4"), "model"),
    **dict.fromkeys(("Emu3", "GraniteDocling", "Idefics2", "Idefics3", "SmolVLM"), "model.text_model"),
}  # fmt: skip


def named(name: str) -> str:
    """The class's whole name."""
    return name + _ENDINGS.get(name, "ForConditionalGeneration")


AROUND: dict[str, tuple[str, str]] = {
    named(name): (kind, _PATHS.get(name, "model.language_model"))
    for kind, names in _CLASSES.items()
    for name in names.split()
}
"""By class, the type whose layout its language model has, and where that is."""


def around(layouts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Layouts of the classes, from those of types: `model.norm` of a type is `norm` of the language model here."""
    inside = {}
    for name, (kind, path) in AROUND.items():
        ends = {key: f"{path}.{layouts[kind][key].partition('.')[2]}" for key in ("embed", "blocks", "norm")}
        inside[name] = {**layouts[kind], **ends}
    return inside
