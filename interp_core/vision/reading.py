"""Texts with images as tokens: every image in its place, its visual tokens named, its pixels beside them.

The text is put together first (each placeholder becomes what the processor makes of its image) and then read like any
text, so that special tokens, targets and the boundary between prompt and target mean what they mean there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..architectures.family import Family
from ..chat import Chars, rendered
from ..errors import CapabilityError, TextError, wrong
from ..inputs import PER_TOKEN
from ..positions import Span
from ..text import Tokens, encode_row, with_messages, with_targets
from .pictures import TAKES, open_pictures
from .places import placeholder_ids, with_visual_names
from .processors import around, expansions, literals, placeholder

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEYS = ("image", "path", "url")


@dataclass(frozen=True)
class Reader:
    """What texts with images are read with.

    Attributes:
        processor: of the model's family.
        tokenizer: the model's.
        config: the model's.
        family: the model's.
    """

    processor: Any
    tokenizer: Any
    config: Any
    family: Family

    def texts(
        self, texts: str | Sequence[str], target: str | Sequence[str] | None, images: Any, bos: bool | None,
        boundary: str,
    ) -> Tokens:  # fmt: skip
        """See `Model.tokens`."""
        pairs = with_targets(texts, target)
        per_row = [images] if isinstance(texts, str) else _per_row(images, len(pairs))
        tokens = []
        for number, ((text, goal), pictures) in enumerate(zip(pairs, per_row, strict=True)):
            opened = open_pictures(pictures, f"row {number}: ")
            tokens.append(self._row(text, goal, opened, bos, boundary, number))
        return Tokens.stack(tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], target: str | None, template: dict[str, Any]) -> Tokens:
        """See `Model.chat`."""
        known = literals(self.processor)
        conversation, pictures = _without_pictures(messages, known)
        opened = open_pictures(pictures)
        # The processor's has places for images; the tokenizer may have one for text alone.
        own = getattr(self.processor, "chat_template", None)
        own = own.get("default") if isinstance(own, Mapping) else own
        if own and not template.get("chat_template"):
            template["chat_template"] = own
        text, places = rendered(self.tokenizer, conversation, seen=True, **template)
        token = placeholder(self.processor)
        if (shown := text.count(token)) != len(opened):
            raise TextError(
                f"the chat template shows {shown} places for {len(opened)} images ({token!r}); pass the template of "
                "this family (chat_template=…)"
            )
        tokens, moved = self._read(text, target, opened, False, "strict", 0)
        ranges = [[tuple(map(moved, chars)) for chars in place] for place in places]
        tokens = with_messages(tokens, conversation, ranges)
        said = [chars for message, place in zip(conversation, ranges, strict=True) if message["role"] == "user"
                for chars in place]  # fmt: skip
        return self._asked(tokens, said)

    def _row(
        self, text: str, target: str | None, pictures: list[Image], bos: bool | None, boundary: str, row: int
    ) -> Tokens:
        token = placeholder(self.processor)
        shown = text.count(token)
        if pictures and not shown:
            text, shown = around(self.processor, self.config) * len(pictures) + text, len(pictures)
        if shown != len(pictures):
            raise TextError(
                f"row {row}: the text has {shown} places for images ({token!r}), and {len(pictures)} images are given; "
                "give one per place, or a text without places, which puts them first"
            )
        if other := next((name for name in literals(self.processor) if name != token and name in text), None):
            raise TextError(
                f"row {row}: the text has {other!r}, which would be read as a visual token; {token!r} stands for an "
                "image (videos are not supported)"
            )
        if any(other in (target or "") for other in literals(self.processor)):
            raise TextError(f"row {row}: the target {target!r:.60} names an image; images belong to the prompt")
        tokens, moved = self._read(text, target, pictures, bos, boundary, row)
        start = moved(text.rfind(token) + len(token)) if pictures else 0
        return self._asked(tokens, [(start, moved(len(text)))])

    def _read(
        self, text: str, target: str | None, pictures: list[Image], bos: bool | None, boundary: str, row: int
    ) -> tuple[Tokens, Any]:
        """Tokens of a text with a place for each picture, and where its characters are in what became of it."""
        if not pictures:
            return encode_row(self.tokenizer, text, target, bos, boundary, row), lambda char: char
        parts, inputs = expansions(self.processor, pictures, f"row {row}: ")
        token = placeholder(self.processor)
        between = text.split(token)
        whole = "".join(piece for pair in zip(between, [*parts, ""], strict=True) for piece in pair)
        ends = list(accumulate(len(piece) + len(token) for piece in between))[:-1]
        grown = [0, *accumulate(len(part) - len(token) for part in parts)]

        def moved(char: int) -> int:
            return char + grown[sum(end <= char for end in ends)]

        tokens = encode_row(self.tokenizer, whole, target, bos, boundary, row)
        visual = torch.isin(tokens.ids, torch.tensor(sorted(placeholder_ids(self.config)))).long()
        needed = dict.fromkeys((name for name in self.family.needs if name in PER_TOKEN), visual)
        tokens = replace(tokens, inputs={**needed, **inputs})
        return with_visual_names(tokens, self.config, self.family), moved

    def _asked(self, tokens: Tokens, said: Iterable[Chars]) -> Tokens:
        """The tokens with the span `question`: what the user's text says after the last image, or at all."""
        last = max((span.stop for span in tokens.spans.get("vision", ((),))[0]), default=0)
        special = set(self.tokenizer.all_special_ids) | placeholder_ids(self.config)
        ids, questions = tokens.ids[0].tolist(), list[Span]()
        for start, stop in said:
            span = tokens._covering(start, stop, 0) if start < stop else None
            places = [i for i in span or () if i >= last]
            while places and ids[places[0]] in special:
                places.pop(0)
            while places and ids[places[-1]] in special:
                places.pop()
            questions += [Span(places[0], places[-1] + 1)] if places else []
        return replace(tokens, spans={**tokens.spans, "question": (tuple(questions),)})


def reader_of(model: Any) -> Reader:
    """What reads texts with images for a model.

    Raises:
        CapabilityError: it sees nothing, or has no processor.
        TextError: it has no tokenizer.
    """
    config, source = model.hf.config, model.source
    if not placeholder_ids(config):
        raise CapabilityError(f"{source} ({model.atlas.family.name}) takes no images: it has no vision tower")
    if model.processor is None:
        why = model.no_processor or "it was loaded without one"
        raise CapabilityError(f"{source} has no processor for images ({why}): pass load(..., processor=…)")
    return Reader(model.processor, model._tokenizer(), config, model.atlas.family)


def demand_no_places(tokens: Tokens, model: Any) -> Tokens:
    """The tokens of a text without images.

    Raises:
        TextError: it names visual tokens all the same, or the place of an image (Gemma 3's is another token).
    """
    known = placeholder_ids(model.hf.config)
    if known and (token := getattr(model.processor, "image_token", None)):
        known = known | {model._tokenizer().convert_tokens_to_ids(token)}
    for row, (ids, mask) in enumerate(zip(tokens.ids, tokens.mask, strict=True)):
        if known and (placeholders := known.intersection(ids[mask].tolist())):
            at = next(i for i, token in enumerate(ids[mask].tolist()) if token in placeholders)
            raise TextError(
                f"row {row}: the text has a place for an image or video ({tokens.labels[row][at]!r}), and no images "
                "are given: pass images=[…], or take it out of the text"
            )
    return tokens


def has_pictures(messages: Any) -> bool:
    """Whether a conversation has parts that are images or videos."""
    listed = messages if isinstance(messages, Sequence) and not isinstance(messages, str) else []
    contents = [message.get("content") for message in listed if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "video") for part in parts)


def _per_row(images: Any, count: int) -> list[Any]:
    """Images of each of several rows."""
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise TextError(wrong("images=", "for several texts, a list with the images of each", images))
    if len(images) != count:
        raise TextError(
            f"images= has {len(images)} items for {count} texts; give a list of images per text ([] for none)"
        )
    return list(images)


def _without_pictures(messages: Sequence[Mapping[str, Any]], known: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """A conversation whose images are places only, and the images.

    Raises:
        TextError: a part without its image, a video, or a text that names an image.
    """
    conversation, pictures = [], list[Any]()
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
        kept = list[Any]()
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "video":
                raise TextError(f"message {number} has a video; videos are not supported: pass its frames as images")
            if kind == "image":
                pictures.append(_picture_of(part, number))
                kept.append({"type": "image"})
                continue
            said = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(said, str) and (named := next((token for token in known if token in said), None)):
                raise TextError(
                    f"message {number} has {named!r} in its text, which would be read as an image; give the image as a "
                    "part ({'type': 'image', 'image': …}), or take it out of the text"
                )
            kept.append(part)
        conversation.append({**message, "content": kept} if isinstance(content, (list, tuple)) else message)
    return conversation, pictures


def _picture_of(part: Mapping[str, Any], number: int) -> Any:
    named = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    if len(named) != 1:
        raise TextError(
            f"message {number} has an image part with {'no image' if not named else 'several images'}; write "
            f"{{'type': 'image', 'image': …}} with {TAKES}"
        )
    path = named[0]
    return path.removeprefix("file://") if isinstance(path, str) else path
