"""Models that cannot be served as they are, and what to load in their place: a sentence each, before anything runs."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from torch import nn

from ..errors import LoadError
from .family import Family

_NOT_THE_TEXTS = "so that positions inside it are not those of the text"
_CODEBOOKS = (
    "it reads and gives several codebooks at a time, with an embedding and a head for each: there is no text of one "
    "row of tokens, and no one unembedding"
)
_DRAFTS = (
    "it drafts tokens for another model, and reads that one's hidden states, keys and values (`inputs_embeds`, "
    "`shared_kv_states`): alone it cannot run a text"
)
_NEEDS_IMAGES = (
    "it cannot run a text without an image ({}), and what a model serves is verified on text alone when it is loaded"
)
UNFIT: dict[str, str] = {
    "blt": f"its largest stack of blocks runs on patches of several bytes each, {_NOT_THE_TEXTS}",
    "cpmant": f"it puts positions of its own in front of every text, {_NOT_THE_TEXTS}",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "idefics": _NEEDS_IMAGES.format("`pixel_values` are read in every pass, by cross-attention between its blocks"),
    "kosmos-2": _NEEDS_IMAGES.format("`pixel_values` are demanded in every pass"),
    "longformer": f"it fills every text up to a multiple of its attention window, {_NOT_THE_TEXTS}",
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody_decoder": _CODEBOOKS,
    "prophetnet": "beside the text's stream it runs one for each token that it predicts ahead, all in one tensor, "
    f"{_NOT_THE_TEXTS}",
    "reformer": "its blocks are reversible: two residual streams change places from block to block, and attention over "
    "hashed buckets has no pattern of queries and keys",
    "xlm": "it has no blocks: attention, MLPs and norms stand in lists of their own, and the stream between passes no "
    "module",
    "xlnet": "its stream lies as [pos batch d_model], with a second one beside it that predicts by permutations, "
    f"{_NOT_THE_TEXTS}",
}
"""What is odd about a model type, as the config of its class has it."""
CROSS = ("encoder_attn", "crossattention", "cross_attn")
"""How blocks of decoders call what reads an encoder."""


def demand_fit(model: Any, family: Family | None) -> None:
    """Refuse a model that cannot be served.

    Raises:
        LoadError: it cannot; the message says why, and what to load instead where there is something.
    """
    config, name = model.config, type(model).__name__
    demand_one_text(model)
    why = UNFIT.get(config.model_type) or (family.unfit(config) if family and family.unfit else "")
    if why:
        raise LoadError(f"{name} cannot be served: {why}")
    if isinstance(heads := model.get_output_embeddings(), nn.ModuleList):
        raise LoadError(f"{name} cannot be served: it has {len(heads)} heads, and no one unembedding")
    outputs = _outputs(model)
    if "logits" not in outputs and (several := [part for part in outputs if part.endswith("_logits")]):
        raise LoadError(f"{name} gives {' and '.join(several)}, and no logits by themselves; {with_head(config)}")


def _outputs(model: Any) -> list[str]:
    """What a model says that it gives; nothing where it does not say it."""
    kind = inspect.signature(type(model).forward).return_annotation
    return [part for output in (kind, *get_args(kind)) for part in getattr(output, "__dataclass_fields__", ())]


def demand_one_text(model: Any) -> None:
    """Refuse an encoder-decoder, whatever its head.

    Raises:
        LoadError: it is one.
    """
    if {"decoder_input_ids", "decoder_inputs_embeds"} & inspect.signature(type(model).forward).parameters.keys():
        raise LoadError(f"{type(model).__name__} {encoder_decoder(model.config)}")


def demand_own_blocks(name: str, blocks: nn.Module) -> None:
    """Refuse a list of blocks in which one stands several times.

    Raises:
        LoadError: naming its layers.
    """
    layers: dict[int, list[str]] = {}
    for layer, block in blocks._modules.items():
        layers.setdefault(id(block), []).append(layer)
    if same := next((places for places in layers.values() if len(places) > 1), None):
        raise LoadError(
            f"{name} cannot be served: layers {', '.join(same)} are one and the same block, so that a site would mean "
            "all of them at once; give each a copy of its own (copy.deepcopy)"
        )


def decoder_alone(blocks: nn.Module, config: Any) -> list[str]:
    """What a user should know of the decoder of an encoder-decoder; nothing of other models."""
    names = [name for block in blocks.children() for name, _ in block.named_children() if name in CROSS]
    if not names or not getattr(config, "is_decoder", False):
        return []
    return [
        f"no encoder runs in front of it: its cross-attention ({names[0]}) is left out, and its numbers are those "
        "of the decoder alone"
    ]


def encoder_decoder(config: Any) -> str:
    """What a message says of an encoder-decoder behind its name."""
    decoder = "" if config.model_type in UNFIT else class_for("CAUSAL_LM", config.model_type)
    instead = (
        f"its decoder alone can, as {decoder}: docs/families.md says how to make one of it"
        if decoder
        else "its decoder alone cannot either"
    )
    return (
        "is an encoder-decoder, which cannot be served: its logits are of a second text, which a run has no place for, "
        f"and are made of what its encoder gives, which has no sites; {instead}"
    )


def class_for(task: str, model_type: str) -> str:
    """The class that transformers has for a model type and a task (`CAUSAL_LM`, `MASKED_LM`,
    `SEQ_TO_SEQ_CAUSAL_LM`); "" if it has none."""
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    known = mapping.get(model_type, "")
    return known if isinstance(known, str) else known[0]


def with_head(config: Any) -> str:
    """What to load of a model type, for its head."""
    known = (class_for(task, config.model_type) for task in ("CAUSAL_LM", "MASKED_LM"))
    heads = " or ".join(dict.fromkeys(name for name in known if name))
    if not heads:
        return f"transformers has no class of {config.model_type!r} with a language modelling head that can be served"
    return f"pass the model with its language modelling head, {heads}"
