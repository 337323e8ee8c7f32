"""Processors of vision-language models: built without torchvision, held against the model, and asked for pixels.

Some of transformers' processors (Qwen-VL, InternVL, LLaVA-OneVision, SmolVLM) demand a video processor, which exists
with torchvision only. Their image part does not use it, so here they are built without: the image processor of the
folder's `preprocessor_config.json` in its Pillow form, the tokenizer, and the processor's own settings. Nothing on this
way imports or installs torchvision, and videos are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import CapabilityError, LoadError, TextError, first_line
from ..inputs import PER_TOKEN
from .places import placeholder_ids

if TYPE_CHECKING:
    from PIL.Image import Image

STAND_INS = {"SmolVLMProcessor": "Idefics3Processor"}
"""Processors that do the same to images, for those that demand a package which only videos need (`num2words`)."""
COUNTS = {
    "internvl": "image_seq_length", "gemma3": "image_seq_length", "smolvlm": "image_seq_len",
    "idefics3": "image_seq_len", "llava_onevision": "num_image_tokens",
}  # fmt: skip
"""What a family's processor counts visual tokens by."""
MARK = "\ue0ff"
"""A private-use character that stands between images, to tell apart what the processor makes of each."""


def build(kind: type, image_processor: Any, tokenizer: Any, **settings: Any) -> Any:
    """A processor of a class of transformers, without its video part.

    Args:
        settings: of the processor itself, as in its `processor_config.json`.
    """
    without = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _unless_missing(kind)})
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    attributes = kind.get_attributes()  # type: ignore[attr-defined]
    return without(**{name: parts.get(name) for name in attributes}, **settings)


def _unless_missing(kind: type) -> Any:
    def check(self: Any, name: str, argument: Any) -> Any:
        proper = kind.check_argument_for_proper_class  # type: ignore[attr-defined]
        return None if argument is None and name == "video_processor" else proper(self, name, argument)

    return check


def open_processor(folder: str, config: Any, tokenizer: Any, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The processor that comes with a model, or None with the reason.

    Args:
        folder: a folder, or a hub id.
        config: of the model.
        options: what transformers is told of the files.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    try:
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", config=config, **options)
        settings, _ = transformers.ProcessorMixin.get_processor_dict(folder, **options)
        name = settings.get("processor_class") or getattr(images, "_processor_class", None)
        name = name or PROCESSOR_MAPPING_NAMES.get(config.model_type)
        kind = processor_class_from_name(STAND_INS.get(name, name)) if name else None
        if kind is None:
            return None, f"transformers has no processor {name or f'for {config.model_type!r}'}"
        # Files of settings hold more than their class takes.
        takes = kind.__init__.__code__.co_varnames[: kind.__init__.__code__.co_argcount]
        own = {key: value for key, value in settings.items() if key in takes and key not in kind.get_attributes()}
        processor = build(kind, images, tokenizer, **own)
    except Exception as error:  # the code of others, on files of others
        return None, f"its processor cannot be built: {first_line(error)}"
    why = "; ".join(differing(processor, config))
    return (None, f"its processor does not fit the model: {why}") if why else (processor, "")


def demand_fitting(processor: Any, config: Any) -> None:
    """Refuse the processor of another model; None, and those of models that see nothing, are let pass.

    Raises:
        LoadError: naming what differs.
    """
    if processor is None or not placeholder_ids(config):
        return
    if why := "; ".join(differing(processor, config)):
        raise LoadError(
            f"the processor ({type(processor).__name__}) does not belong to this {config.model_type}: {why}. Pass the "
            "processor that the model was trained with, or leave processor= out to have the folder's own"
        )


def differing(processor: Any, config: Any) -> Iterator[str]:
    """What a processor and a model do not agree on, in words."""
    wanted = [value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None))]
    known = {*(getattr(processor, "image_token_ids", None) or []), getattr(processor, "image_token_id", None)} - {None}
    if wanted and not known.intersection(wanted):
        token = getattr(processor, "image_token", None)
        shown = ", ".join(map(str, sorted(known))) or "none"
        yield f"its image token ({token!r}) has the id {shown}, the model's is {wanted[0]}"
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    if (getattr(images, "merge_size", None) is None) != (getattr(vision, "spatial_merge_size", None) is None):
        has, lacks = ("model", "it") if getattr(images, "merge_size", None) is None else ("processor", "the model")
        yield f"the {has} merges patches (merge_size), {lacks} does not"
    counts = COUNTS.get(config.model_type)
    if counts and getattr(processor, counts, None) is None:
        yield f"it has no {counts}, by which a {config.model_type} counts its visual tokens"
    for what, of, there, wants in (
        ("patch_size", (images, processor), "patch_size", _side(getattr(vision, "patch_size", None))),
        ("merge_size", (images,), "merge_size", getattr(vision, "spatial_merge_size", None)),
        ("temporal_patch_size", (images,), "temporal_patch_size", getattr(vision, "temporal_patch_size", None)),
        ("crop_size", (images,), "crop_size", _side(getattr(vision, "image_size", None))),
        ("tokens per tile", (processor,), "image_seq_length", _per_tile(config)),
        ("tokens per tile", (processor,), "image_seq_len", _per_tile(config)),
        ("tokens per tile", (processor,), "num_image_tokens", _per_tile(config)),
        ("vision_feature_select_strategy", (processor,), "vision_feature_select_strategy",
         getattr(config, "vision_feature_select_strategy", None)),
    ):  # fmt: skip
        present = next((_side(value) for item in of if (value := getattr(item, there, None)) is not None), None)
        if present is not None and wants is not None and present != wants:
            yield f"its {what} is {present}, the model's {wants}"


def _side(value: Any) -> Any:
    """One number for a square, however it is written."""
    if isinstance(value, Mapping) or hasattr(value, "height"):
        sides = dict(value) if isinstance(value, Mapping) else vars(value)
        return sides.get("height") or sides.get("shortest_edge")
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _per_tile(config: Any) -> int | None:
    """How many visual tokens a square tile has, where the config says."""
    for name in ("image_seq_length", "mm_tokens_per_image"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    vision = getattr(config, "vision_config", None)
    size, patch = _side(getattr(vision, "image_size", None)), _side(getattr(vision, "patch_size", None))
    if config.model_type not in ("smolvlm", "idefics3", "llava_onevision") or not size or not patch:
        return None
    scale = getattr(config, "scale_factor", 1)
    return int((size // patch // scale) ** 2)


def placeholder(processor: Any) -> str:
    """What stands for one image in a text.

    Raises:
        CapabilityError: the processor does not say.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise CapabilityError(
            f"{type(processor).__name__} does not say what stands for an image in a text; call it yourself, and pass "
            "what it returns to model.tokens"
        )
    return token


def around(processor: Any, config: Any) -> str:
    """One image at the beginning of a text that has no place for it: the placeholder, between the tokens that Qwen-VL
    puts around images (other processors put theirs by themselves)."""
    ids = (getattr(config, name, None) for name in ("vision_start_token_id", "vision_end_token_id"))
    start, end = ("" if i is None else processor.tokenizer.convert_ids_to_tokens(i) or "" for i in ids)
    return f"{start}{placeholder(processor)}{end}"


def literals(processor: Any) -> list[str]:
    """Texts that a tokenizer would take for visual tokens."""
    tokenizer = processor.tokenizer
    names = ("image_token", "video_token", "context_image_token")
    said = [getattr(item, name, None) for item in (processor, tokenizer) for name in names]
    return list(dict.fromkeys(token for token in said if isinstance(token, str) and token))


class _Listener:
    """A tokenizer that notes the text that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.heard = tokenizer, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, **options: Any) -> Any:
        self.heard += [text] if isinstance(text, str) else text
        return self._tokenizer(text, **options)


def expansions(processor: Any, images: Sequence[Image], what: str) -> tuple[list[str], dict[str, Tensor]]:
    """What stands in a text for each image, and what the model is given of them, ids and masks aside.

    Raises:
        TextError: the processor does not take these images.
    """
    token = placeholder(processor)
    listener = _Listener(processor.tokenizer)
    listening = copy.copy(processor)
    listening.tokenizer = listener
    marked = MARK + MARK.join([token] * len(images)) + MARK
    try:
        out = listening(text=[marked], images=[list(images)], return_tensors="pt")
    except Exception as error:  # the code of others
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise TextError(
            f"{what}the processor ({type(processor).__name__}) does not take these images ({sizes} pixels): "
            f"{first_line(error)}"
        ) from error
    parts = listener.heard[-1].split(MARK)[1:-1] if listener.heard else []
    if len(parts) != len(images):
        raise CapabilityError(
            f"{type(processor).__name__} does not say what stands for each image; call it yourself, and pass what it "
            "returns to model.tokens"
        )
    aside = ("input_ids", "attention_mask", *PER_TOKEN)
    return parts, {name: value for name, value in out.items() if name not in aside}


def grid_of(processor: Any, image: Image) -> tuple[Any, ...]:
    """What an image's visual tokens are laid out by: two images of the same one can stand in for each other. Costs the
    processing of the image.

    Raises:
        TextError, CapabilityError: as `expansions`.
    """
    (part,), inputs = expansions(processor, [image], "")
    laid = [(name, value.tolist()) for name, value in inputs.items() if name in ("image_grid_thw", "image_sizes")]
    shapes = [(name, tuple(value.shape)) for name, value in inputs.items()]
    return (part, str(laid), *shapes)
