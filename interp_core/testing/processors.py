"""Processors for the tiny vision-language models, made in memory: real text and real pictures, without
files or torchvision.

The tokenizer knows single words (`WORDS`), whatever their case, and digits; words that it does not know are `[unk]`.
Processors give every picture 16 x 16 pixels a tile, so that it has 4 visual tokens (LLaVA and LLaVA-OneVision: 16) or a
few times that.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, nearest
from ..vision.pictures import pillow
from ..vision.processors import STAND_INS, build
from .visual import IMAGE, VISUAL

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS = """
    a an and answer are assistant bar black blue bottom brown circle color colour cross dark gray green how in is it
    left light many mean most no not object of on one orange pink purple question red right ring shape square system
    tall taller than the there top triangle two user value what which white yellow yes , . : ? ! - = 0 1 2 3 4 5 6 7 8 9
""".split()  # noqa: SIM905 (read by people)
VIDEO, START, END = IMAGE + 1, IMAGE + 2, IMAGE + 3
COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (230, 200, 30),
    "purple": (148, 103, 189), "orange": (255, 127, 14),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle", "cross")
_QWEN = {
    "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END,
}  # fmt: skip
_TILES = {f"<row_{row}_col_{col}>": 79 + 2 * row + col for row in (1, 2) for col in (1, 2)}
_SPECIAL: Mapping[str, Mapping[str, int]] = {
    "llava": {"<image>": IMAGE},
    "llava_onevision": {"<image>": IMAGE, "<video>": VIDEO},
    "internvl": {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END},
    "gemma3_vision": {"<image_soft_token>": IMAGE, "<start_of_image>": START, "<end_of_image>": END},
    "smolvlm": {
        "<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": END, "<end_of_utterance>": 94, **_TILES
    },
}  # fmt: skip
_NAMED = {
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3_vision": {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"
    },
}  # fmt: skip
_PLACE = {
    "internvl": "<IMG_CONTEXT>", "gemma3_vision": "<start_of_image>", "llava": "<image>", "llava_onevision": "<image>",
    "smolvlm": "<image>",
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SQUARE = {"height": 16, "width": 16}


def processor(family: str) -> Any:
    """A processor for `tiny(family)`, with its tokenizer and a chat template of a few lines.

    Raises:
        LoadError: no such vision-language family here.
        CapabilityError: Pillow is not installed.
    """
    import transformers

    if family not in VISUAL:
        raise LoadError(f"no processor for {family!r}. {nearest(family, VISUAL)}")
    pillow()
    name, images, settings, own = _PARTS.get(family, _QWEN_PARTS)
    image_processor = getattr(transformers, images)(**settings)
    name = STAND_INS.get(name, name)
    built = build(getattr(transformers, name), image_processor, _tokenizer(family), **own)
    place = _PLACE.get(family, "<|vision_start|><|image_pad|><|vision_end|>")
    built.chat_template = built.tokenizer.chat_template = TEMPLATE.replace("PLACE", place)
    return built


_QWEN_PARTS: tuple[str, str, dict[str, Any], dict[str, Any]] = (
    "Qwen3VLProcessor", "Qwen2VLImageProcessorPil",
    {
        "patch_size": 4, "merge_size": 2, "temporal_patch_size": 1,
        "size": {"shortest_edge": 64, "longest_edge": 32 * 32},
    },
    {},
)  # fmt: skip
_PARTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", *_QWEN_PARTS[1:]),
    "llava": (
        "LlavaProcessor", "CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": _SQUARE},
        {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    ),
    "llava_onevision": (
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessorPil",
        {"size": _SQUARE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "internvl": (
        "InternVLProcessor", "GotOcr2ImageProcessorPil",
        {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 2}, {"image_seq_length": 4},
    ),
    "gemma3_vision": ("Gemma3Processor", "Gemma3ImageProcessorPil", {"size": _SQUARE}, {"image_seq_length": 4}),
    "smolvlm": (
        "SmolVLMProcessor", "SmolVLMImageProcessorPil",
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}, {"image_seq_len": 4},
    ),
}  # fmt: skip


def _tokenizer(family: str) -> Any:
    """Single words and digits, in the ids below the special ones of the family."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    basic = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "[unk]": 3, "<|im_start|>": 80, "<|im_end|>": 81}
    special = {**basic, **_SPECIAL.get(family, _QWEN)}
    words = {word: 4 + number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d|[^A-Za-z\d]"), "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="[unk]",
        extra_special_tokens=_NAMED.get(family, {}),
    )  # fmt: skip
    further = [name for name in special if name not in ("<pad>", "<bos>", "<eos>", "[unk]")]
    fast.add_special_tokens({"additional_special_tokens": further})
    return fast


def pictures(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[Image]:
    """Drawn pictures, each of one coloured shape on a light ground; the same for the same seed.

    Args:
        size: width and height in pixels.
    """
    from PIL import Image, ImageDraw

    pick = random.Random(seed)
    images = []
    for _ in range(count):
        image = Image.new("RGB", size, (240, 240, 235))
        draw_shape(ImageDraw.Draw(image), size, pick.choice(SHAPES), COLOURS[pick.choice(sorted(COLOURS))], pick)
        images.append(image)
    return images


def draw_shape(pen: Any, size: tuple[int, int], shape: str, colour: tuple[int, int, int], pick: random.Random) -> None:
    """One shape, half as large as the picture, somewhere in it."""
    side = max(min(size) // 2, 2)
    left, top = (pick.randrange(max(edge - side, 1)) for edge in size)
    right, bottom = left + side, top + side
    if shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    else:
        width = max(side // 4, 1)
        pen.line((left, top, right, bottom), fill=colour, width=width)
        pen.line((left, bottom, right, top), fill=colour, width=width)
