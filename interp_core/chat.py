"""A conversation through a chat template, and where each message's own text stands in what the template made of it.

Nothing is searched for: a message may say `user`, and so does the template. Instead the conversation is rendered again
with marks, characters that occur nowhere in it, between those of the contents. Where the text without the marks is the
plain rendering, character by character, the marks stand where the template put that part of the content.

Two marks, around what a content has beside white space at its ends (which templates may trim), are enough for nearly
every message. Some templates look into a content (`'</think>' in content`) or keep only a part; there, marks between
all characters say what was kept: those that would change the rendering are found by halving, and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from .errors import TextError

Chars = tuple[int, int]
"""Half-open character range in a text."""
Cut = tuple[int, int, int]
"""A place between characters of a content: message, part, offset."""

MARKS = range(0xF0000, 0xFFFFE)
"""Private-use code points, which no text should have; those that one has are left out."""
TRIALS = 2000
"""Renderings with marks after which a message counts as one that cannot be located."""
NOT_OF_TEMPLATES = (
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
)  # fmt: skip
RESERVED = ("prompt", "target", "last", "all", "generated", "vision", "text", "question")
IMAGE_PLACE = {"type": "image"}
"""An image in a content, as templates see it: a place, without the image."""


def rendered(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, seen: bool = False, **template: Any
) -> tuple[str, list[tuple[Chars, ...]]]:
    """The text that a chat template makes of a conversation, and per message the half-open character ranges of its
    content: none for an empty one, several where the template keeps parts or shows it more than once.

    Args:
        seen: contents may have places of images, `{"type": "image"}`.

    Raises:
        TextError: no template, something that is no conversation, or a message whose text is not in the rendering.
    """
    if not getattr(tokenizer, "chat_template", None) and not template.get("chat_template"):
        raise TextError("this tokenizer has no chat template; pass plain text, or set tokenizer.chat_template")
    if wrong := [name for name in NOT_OF_TEMPLATES if name in template]:
        raise TextError(f"chat makes the tokens itself and takes options of the template only; leave out {wrong[0]}")
    template.setdefault("add_generation_prompt", not template.get("continue_final_message"))
    conversation = _conversation(messages, seen)

    def render(contents: Sequence[Mapping[str, Any]]) -> str:
        try:
            text: str = tokenizer.apply_chat_template(list(contents), tokenize=False, **template)
        except Exception as error:  # the template is code of others
            raise TextError(f"the chat template cannot render this conversation: {error}") from error
        return text

    if seen:
        return _located(render, conversation)
    if any(isinstance(message.get("content"), list) for message in conversation):
        try:
            return _located(render, conversation)
        except TextError:  # a template that knows no parts fails on them, drops them, or prints them as Python does
            joined = [
                {"content": "".join(_texts(m))} if isinstance(m.get("content"), list) else {} for m in conversation
            ]
            conversation = [message | whole for message, whole in zip(conversation, joined, strict=True)]
    return _located(render, conversation)


def _conversation(messages: Any, seen: bool) -> list[dict[str, Any]]:
    """Messages as dictionaries with `role`, and with a `content` that is a string or a list of parts, if any."""
    example = '[{"role": "user", "content": "Hello"}]'
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TextError(f"chat takes a list of messages, such as {example}, not {type(messages).__name__}")
    if not messages:
        raise TextError(f"the conversation is empty; give at least one message, such as {example}")
    for i, message in enumerate(messages):
        if isinstance(message, Sequence) and not isinstance(message, str):
            raise TextError("chat takes one conversation; make several one by one, and join them by ic.Tokens.stack")
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TextError(f"message {i} is {message!r:.60}; a message is like {example[1:-1]}")
        role, content = message["role"], message.get("content")
        if role in RESERVED or role.startswith("message_"):
            raise TextError(f"message {i} has the role {role!r}, which is the name of other tokens; rename it")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise TextError(f"the content of message {i} ({role}) is text or a list of parts, not {content!r:.60}")
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else part
            if seen and part == IMAGE_PLACE:
                continue
            if kind != "text" or not isinstance(part.get("text"), str):
                raise TextError(
                    f"message {i} ({role}) has a part that is no text ({kind!r:.60}); parts are {{'type': 'text', "
                    "'text': …}, and, for a vision-language model with its processor, {'type': 'image', 'image': …}"
                )
    return [_plain(message) for message in messages]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a dictionary; parts without any text are an empty text, which no template prints as a list."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    parts = [dict(part) for part in content]
    return dict(message) | {"content": parts if any(part.get("text", True) for part in parts) else ""}


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The parts of a content."""
    content = message.get("content")
    return [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]


def _with_texts(message: Mapping[str, Any], texts: Sequence[str]) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        pairs = zip(content, texts, strict=True)
        return {**message, "content": [{**part, "text": text} if "text" in part else part for part, text in pairs]}
    return message if content is None else {**message, "content": texts[0]}


def _located(
    render: Callable[[Sequence[Mapping[str, Any]]], str], conversation: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[Chars, ...]]]:
    marked = _Marked(render, conversation)
    texts = {(i, j): text for i, message in enumerate(conversation) for j, text in enumerate(_texts(message)) if text}
    known = marked.survey([(*at, offset) for at, text in texts.items() for offset in _edges(text)])
    shown: list[list[Chars]] = [[] for _ in conversation]
    for at, text in texts.items():
        ranges = None
        for offsets in ([], [len(text) // 2], range(len(text) + 1)):
            known |= marked.survey([(*at, offset) for offset in offsets]) if offsets else {}
            places = {cut[2]: place for cut, place in known.items() if cut[:2] == at}
            ranges = _ranges(text, places, marked.plain, parts=len(offsets) > 1)
            if ranges is not None:
                break
        if ranges is None and (not text.strip() or (any(places.values()) and marked.same_without(at))):
            continue  # white space, or thoughts, that the template leaves out: a turn with nothing in it
        if ranges is None:
            role = conversation[at[0]]["role"]
            raise TextError(
                f"the chat template does not show message {at[0]} ({role}, {text.strip()!r:.40}), or changes it so "
                "that it cannot be located. Leave the message out, or write it as the template expects."
            )
        shown[at[0]] += [chars for chars in ranges if chars[0] < chars[1]]
    return marked.plain, [tuple(sorted(set(ranges))) for ranges in shown]


def _edges(text: str) -> Chars:
    """Where a text begins and ends without white space around it; its own ends if it is white space only."""
    inner = text.strip()
    start = text.find(inner) if inner else 0
    return start, start + len(inner or text)


class _Marked:
    """Renderings of a conversation with marks in its contents."""

    def __init__(self, render: Callable[[Sequence[Mapping[str, Any]]], str], conversation: Sequence[Any]) -> None:
        self.plain = render(conversation)
        self._render, self._conversation, self._trials = render, conversation, 0
        self._used = set(self.plain).union(*chain.from_iterable(map(_texts, conversation)))

    def at(self, cuts: Sequence[Cut]) -> dict[Cut, list[int]] | None:
        """Where cuts come out in the plain rendering; None if marks there change the rest of it."""
        self._trials += 1
        marks = dict(zip(cuts, (chr(code) for code in MARKS if chr(code) not in self._used), strict=False))
        if len(marks) < len(cuts):
            return None
        by_part: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for (i, j, offset), mark in sorted(marks.items()):
            by_part.setdefault((i, j), []).append((offset, mark))
        try:
            text = self._render([_with_marks(message, i, by_part) for i, message in enumerate(self._conversation)])
        except TextError:  # the template refuses what it does not know
            return None
        cut_of = {mark: cut for cut, mark in marks.items()}
        places: dict[Cut, list[int]] = {cut: [] for cut in cuts}
        kept: list[str] = []
        for char in text:
            if char in cut_of:
                places[cut_of[char]].append(len(kept))
            else:
                kept.append(char)
        return places if "".join(kept) == self.plain else None

    def same_without(self, at: tuple[int, int]) -> bool:
        """Whether the rendering is that of the same conversation with an empty text there."""
        i, j = at
        texts = _texts(self._conversation[i])
        texts[j] = ""
        emptied = [_with_texts(m, texts) if n == i else m for n, m in enumerate(self._conversation)]
        try:
            return self._render(emptied) == self.plain
        except TextError:
            return False

    def survey(self, cuts: Sequence[Cut]) -> dict[Cut, list[int]]:
        """As `at`, without the cuts at which a mark changes the rest."""
        places = self.at(cuts)
        if places is not None or len(cuts) == 1 or self._trials > TRIALS:
            return places or {}
        half = len(cuts) // 2
        return self.survey(cuts[:half]) | self.survey(cuts[half:])


def _with_marks(
    message: Mapping[str, Any], i: int, marks: Mapping[tuple[int, int], Sequence[tuple[int, str]]]
) -> Mapping[str, Any]:
    texts = []
    for j, text in enumerate(_texts(message)):
        here = marks.get((i, j), ())
        pieces = [text[a:b] for a, b in pairwise([0, *(offset for offset, _ in here), len(text)])]
        texts.append(pieces[0] + "".join(mark + piece for (_, mark), piece in zip(here, pieces[1:], strict=True)))
    return _with_texts(message, texts)


def _ranges(text: str, places: Mapping[int, Sequence[int]], plain: str, parts: bool) -> list[Chars] | None:
    """The ranges of the rendering that show a content, from where offsets in it came out; None if they do not say.

    Args:
        parts: take what was kept, where not all of it was; asks for all offsets.
    """
    shown = {offset: at for offset, at in places.items() if at}
    copies = {len(at) for at in shown.values()}
    if len(copies) != 1:  # nowhere, or some parts more often than others
        return None
    ranges: list[Chars] = []
    for copy in range(copies.pop()):
        points = [(offset, at[copy]) for offset, at in sorted(shown.items())]
        if any(a[1] > b[1] for a, b in pairwise(points)) or (ranges and points[0][1] < ranges[-1][1]):
            return None
        ranges += _whole(text, points, plain) or (_kept(text, points, plain) if parts else [])
    return ranges or None


def _whole(text: str, points: Sequence[Chars], plain: str) -> list[Chars]:
    """The whole content, if both its ends are known, or if it stands unchanged around a place that is."""
    start, stop = _edges(text)
    known = dict(points)
    if start in known and stop in known:
        return [(known[start], known[stop])]
    offset, at = points[0]
    begin = at - (offset - start)
    whole = text.strip() and begin >= 0 and plain.startswith(text[start:stop], begin)
    return [(begin, begin + stop - start)] if whole else []


def _kept(text: str, points: Sequence[Chars], plain: str) -> list[Chars]:
    """The runs of characters that the template kept as they are, without white space at their ends."""
    runs: list[Chars] = []
    for (offset, at), (next_offset, next_at) in pairwise(points):
        if at < next_at and plain[at:next_at] == text[offset:next_offset]:
            begin = runs.pop()[0] if runs and runs[-1][1] == at else at
            runs.append((begin, next_at))
    return [(begin + start, begin + stop) for begin, end in runs for start, stop in [_edges(plain[begin:end])]]
