"""Where the messages of a conversation are in what chat templates make of them."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
from conftest import DATA
from templates import KINDS, PARTS, Messages

import interp_core as ic
from interp_core.chat import rendered
from interp_core.text import encode_chat

SHORT = ["a", "e", "|", "user", "end", "system", "You are", "assistant", "\n", "<", "role"]


@cache
def tokenizer(kind: str, template: str | None = None) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(DATA / "tokenizers" / kind))
    if template is not None:
        loaded.chat_template = template
    return loaded


def templated(kind: str) -> Any:
    return tokenizer("phi3", KINDS[kind].template)


def expected(kind: str, messages: Messages) -> tuple[str, list[tuple[tuple[int, int], ...]]]:
    """The text of the pieces, and per message where its content is, without white space at its ends."""
    text, ranges = "", [()] * len(messages)
    for piece, message in KINDS[kind].pieces(messages):
        inner = piece.strip() if message is not None and messages[message]["content"].strip() else piece
        start = len(text) + piece.find(inner)
        if message is not None and piece:
            ranges[message] = (*ranges[message], (start, start + len(inner)))
        text += piece
    return text, ranges


def conversations(kind: str, count: int) -> list[list[dict[str, str]]]:
    """Conversations of substrings of the template and of its own rendering: what a search would stumble over."""
    draw = random.Random(f"chat {kind}")
    roles = KINDS[kind].roles
    sample = "".join(piece for piece, _ in KINDS[kind].pieces([{"role": r, "content": "The sea."} for r in roles]))
    source = sample + KINDS[kind].template

    def content(role: str) -> str:
        start, length = draw.randrange(len(source)), draw.choice([1, 1, 2, 3, 5, 8, 13, 21])
        text = draw.choice([draw.choice(SHORT), source[start : start + length], source[start : start + length] * 2])
        text = draw.choice(["", "", "", " ", "\n\n", "\u0301"]) + text + draw.choice(["", "", "", " ", "\n"])
        if kind == "thinking" and role == "assistant" and draw.random() < 0.4:
            text = f"<think>\n{text}\n</think>\n\n{draw.choice(['so', text])} it is{draw.choice(['', ', as far as anyone knows'])}"
        return f"<tool>{text}</tool>" if kind == "looking" and draw.random() < 0.3 else text

    return [[{"role": role, "content": content(role)} for role in roles] for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_the_renderings_own(kind: str) -> None:
    """The law: the text is the template's, character by character, and every message lies where the template put it."""
    for messages in conversations(kind, 60):
        before = copy.deepcopy(messages)
        text, ranges = rendered(templated(kind), messages)
        want, places = expected(kind, messages)
        assert text == want == templated(kind).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for i, message in enumerate(messages):
            shown = tuple(text[a:b] for a, b in ranges[i]), tuple(text[a:b] for a, b in places[i])
            assert ranges[i] == places[i], (messages, message, shown)
        assert messages == before


@pytest.mark.parametrize("kind", ["phi3", "qwen2.5"])
@pytest.mark.parametrize("content", [*SHORT[:8], "Alibaba Cloud", "<|im_start|>user", " the <|end|>"])
def test_spans_are_the_tokens_of_the_messages(kind: str, content: str) -> None:
    """On real templates and tokenizers: a message's span is the tokens that share a character with it, no others."""
    turns = [("user", "Name a colour."), ("assistant", "Blue"), ("user", content)]
    messages = [{"role": role, "content": text} for role, text in turns]
    tokens = encode_chat(tokenizer(kind), messages)
    text = tokens.texts[0]  # type: ignore[index]
    opening = {"phi3": "<|end|>\n<|user|>\n", "qwen2.5": "<|im_end|>\n<|im_start|>user\n"}[kind]
    start = text.rindex(opening + content) + len(opening) + len(content) - len(content.lstrip())
    assert tokens.spans["message_2"] == ((tokens.find((start, start + len(content.strip()))),),)
    assert tokens.spans["user"][0] == (tokens.spans["message_0"][0][0], tokens.spans["message_2"][0][0])
    assert tokens.ids[0].tolist() == tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["phi3", "qwen2.5"])
def test_begun_answers(kind: str) -> None:
    hello, begun = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The sea "}
    tokens = encode_chat(tokenizer(kind), [hello, begun], continue_final_message=True)
    assert tokens.texts[0].endswith("assistant|>\nThe sea " if kind == "phi3" else "assistant\nThe sea ")  # type: ignore[index]
    assert tokens.texts[0][slice(*tokens.chars(tokens.spans["message_1"][0][0]))].strip() == "The sea"  # type: ignore[index]
    begun["content"] = "The sea"
    more = encode_chat(tokenizer(kind), [hello, begun], target=" is", continue_final_message=True)
    assert more.texts[0].endswith("The sea is") and more.spans["target"][0][0].stop == more.lengths[0]  # type: ignore[index]
    with pytest.raises(ic.TextError, match="continue_final_message and add_generation_prompt are not compatible"):
        encode_chat(tokenizer(kind), [hello, begun], continue_final_message=True, add_generation_prompt=True)
    closed = encode_chat(tokenizer("qwen2.5"), [hello], add_generation_prompt=False)
    assert closed.texts[0].endswith("Hello<|im_end|>\n")  # type: ignore[index]


def test_contents_in_parts() -> None:
    """A template that knows parts gets them; for others, which print or refuse them, they are one text."""
    parts = [{"type": "text", "text": " one "}, {"type": "text", "text": ""}, {"type": "text", "text": "text "}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": []}]
    text, places = rendered(tokenizer("phi3", PARTS), messages)
    assert text == "user: one /  / text\nuser: \n"
    assert [text[a:b] for a, b in places[0]] == ["one", "text"] and places[1] == ()
    for template in (
        "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}",
        "{% for m in messages %}{{ '<' }}{{ m.content }}{{ '>' }}{% endfor %}",
        "{% for m in messages %}{{ '<' }}{% if m.content is string %}{{ m.content }}{% endif %}{{ '>' }}{% endfor %}",
    ):
        text, places = rendered(tokenizer("phi3", template), messages)
        assert text == "< one text ><>" and [text[a:b] for a, b in places[0]] == ["one text"]
    with pytest.raises(ic.TextError, match=r"message 0 \(user\) has a part that is no text \('image'\).* processor"):
        rendered(tokenizer("phi3"), [{"role": "user", "content": [{"type": "image"}]}])


def test_empty_messages_have_no_span(toy: ic.Model) -> None:
    for content in ("", None, " \n"):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hello"}]
        tokens = encode_chat(
            templated("trimmed"), [{k: v for k, v in m.items() if v is not None} for m in messages[1:]]
        )
        assert set(tokens.spans) == {"message_0", "user"}
        if content is not None:
            tokens = encode_chat(templated("trimmed"), messages)
            assert set(tokens.spans) == {"message_1", "user"} and "<|start|>system<|end|>\n\n<|eot|>" in tokens.texts[0]  # type: ignore[index]
    messages = [{"role": "user", "content": ""}, {"role": "user", "content": "big"}]
    tokens = toy.chat(messages, chat_template=KINDS["looking"].template)
    with pytest.raises(ic.PositionError, match="no positions called 'message_0'"):
        toy.run(tokens, read=ic.sites.resid_post[1].at("message_0"))


def test_turns_of_thoughts_only_are_empty() -> None:
    turns = ["Hello", "<think>\nhm\n</think>\n\n", "And?"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    text, places = rendered(templated("thinking"), messages)
    assert "hm" not in text and [len(ranges) for ranges in places] == [1, 0, 1]


def test_marks_that_a_text_holds_are_not_taken() -> None:
    content = "\U000f0000a\U000f0001"
    text, places = rendered(templated("headed"), [{"role": "user", "content": content}])
    assert [text[a:b] for a, b in places[0]] == [content]


HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ("Hello", {}, "chat takes a list of messages, such as .* not str"),
        (None, {}, "chat takes a list of messages, .* not NoneType"),
        ([], {}, "the conversation is empty"),
        ([[HELLO], [HELLO]], {}, r"one conversation; make several one by one, .*Tokens\.stack"),
        (["Hello"], {}, "message 0 is 'Hello'; a message is like"),
        ([{"content": "Hello"}], {}, "message 0 is .* a message is like"),
        ([{"role": "user", "content": 3}], {}, r"the content of message 0 \(user\) is text or a list of parts, not 3"),
        ([{"role": "target", "content": "a"}], {}, "the role 'target', which is the name of other tokens"),
        ([HELLO], {"tokenize": True}, "options of the template only; leave out tokenize"),
        ([HELLO], {"tools": 3}, "the chat template cannot render this conversation: 'int' object is not iterable"),
        ([{"role": "system", "content": "Be kind"}, HELLO], {}, r"does not show message 0 \(system, 'Be kind'\)"),
        ([HELLO], {"chat_template": "{% if messages[0].content == 'Hello' %}Hello{% endif %}"}, "does not show mess"),
        ([HELLO], {"chat_template": "{{ messages[0].content | length }}"}, "does not show message 0"),
        ([HELLO], {"chat_template": "{{ messages[0].content | reverse }}"}, "does not show message 0"),
        ([HELLO], {"chat_template": "{{ raise_exception('no Hello') }}"}, "cannot render this conversation: no Hello"),
        ([HELLO], {"chat_template": "{{ messages[0].content"}, "cannot render this conversation"),
    ],
)
def test_what_cannot_be_located_is_refused(messages: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ic.TextError, match=says):
        encode_chat(tokenizer("phi3"), messages, **options)


def test_no_template() -> None:
    with pytest.raises(ic.TextError, match="no chat template"):
        encode_chat(tokenizer("gpt2"), [HELLO])
    tokens = encode_chat(tokenizer("gpt2"), [HELLO], chat_template=KINDS["looking"].template)
    assert tokens.texts == ("USER: Hello\nASSISTANT:",)
