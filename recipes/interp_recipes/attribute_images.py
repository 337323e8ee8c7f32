"""Prompts with images for `interp attribute`: text and pictures through the processor of a vision-language model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import interp_core as ic


def opened(paths: Sequence[Path]) -> list[Any]:
    """The images of files.

    Raises:
        LoadError: a file that is not there, or no image.
    """
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        if not path.is_file():
            raise ic.LoadError(f"there is no image {path}")
        try:
            images.append(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ic.LoadError(f"{path} is no image that can be read: {error}") from error
    return images


def processor_of(model: str) -> Any:
    """The processor of a model's folder or hub id.

    Raises:
        LoadError: it has none that takes images.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ic.LoadError(f"{model} has no processor for --image: {str(error).splitlines()[0]}") from error
    if not hasattr(processor, "image_processor"):
        raise ic.LoadError(f"{model} takes no images; leave --image out, or give a vision-language model")
    return processor


def tokens_of(model: ic.Model, prompt: str, images: Sequence[Any], target: str | None, chat: bool) -> ic.Tokens:
    """Tokens of images and a text, with the target as the span of that name; labels stand for the text.

    Without a chat template the images stand before the text, one to a line, where the prompt does not place them. A
    text without images is the tokenizer's work alone.

    Raises:
        TextError: no chat template, other numbers of images and places, or a target that changes the prompt's tokens.
    """
    if not images:
        return model.chat([{"role": "user", "content": prompt}], target) if chat else model.tokens(prompt, target)
    processor = model.processor
    text = _templated(processor, prompt, len(images)) if chat else _placed(processor, prompt, len(images))
    values = _processed(processor, text + (target or ""), images)
    tokens = model.tokens(values)
    if target is not None:
        before = _processed(processor, text, images)["input_ids"][0].tolist()
        start, stop = len(before), tokens.lengths[0]
        if start >= stop or values["input_ids"][0, :start].tolist() != before:
            raise ic.TextError(
                f"the prompt's tokens are others when {target!r:.40} follows them; begin the target with a space, or "
                "on a line of its own"
            )
        tokens = tokens.name(target=ic.Span(start, stop))
    return searchable(tokens)


def shown(tokens: ic.Tokens, images: Sequence[Any]) -> Sequence[Any]:
    """The pictures as the model saw them, resized and cut, where the processor gives it one per image; else the files',
    which it has then resized alone."""
    seen = tokens.inputs.get("pixel_values")
    return list(seen) if seen is not None and seen.ndim == 4 and len(seen) == len(images) else images


def searchable(tokens: ic.Tokens) -> ic.Tokens:
    """Tokens whose text is that of their labels, so that parts of a target can be found in it."""
    labels = tokens.labels[0]
    ends = [0, *itertools.accumulate(map(len, labels))]
    return replace(tokens, texts=("".join(labels),), offsets=(tuple(itertools.pairwise(ends)),))


def _templated(processor: Any, prompt: str, count: int) -> str:
    """A message of images and text in the processor's chat template."""
    if not processor.chat_template:
        raise ic.TextError("the processor has no chat template; leave --chat out")
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": prompt}]
    message = {"role": "user", "content": content}
    return str(processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def _placed(processor: Any, prompt: str, count: int) -> str:
    """A prompt with a place for each image."""
    place = getattr(processor, "image_token", None)
    if not isinstance(place, str):
        raise ic.TextError(
            f"{type(processor).__name__} names no token for images; put the prompt in its --chat template"
        )
    there = prompt.count(place)
    if there not in (0, count):
        raise ic.TextError(f"the prompt has {there} places {place!r} for {count} images; give one per image, or none")
    return prompt if there else "".join(f"{place}\n" for _ in range(count)) + prompt


def _processed(processor: Any, text: str, images: Sequence[Any]) -> Any:
    """What the processor makes of them; a template that begins with the token of beginnings gets no second one."""
    first = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if first and text.startswith(first) else {}
    return processor(text=[text], images=list(images), return_tensors="pt", **special)
