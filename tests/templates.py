"""Chat templates of the kinds that models come with, each beside what it does in plain Python, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from json import dumps
from typing import Any, NamedTuple

Messages = Sequence[dict[str, Any]]
Piece = tuple[str, int | None]
"""Text, and the message whose content it is."""


class Kind(NamedTuple):
    """A template, what it does, and the roles that it takes, in turn."""

    template: str
    pieces: Callable[[Messages], Iterator[Piece]]
    roles: tuple[str, ...] = ("system", "user", "assistant", "user")


def headed(messages: Messages) -> Iterator[Piece]:
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", None
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", None
        yield message["content"], i
        yield "<|im_end|>\n", None
    yield "<|im_start|>assistant\n", None


HEADED = Kind(
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful "
    "assistant.<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    headed,
    ("user", "assistant", "user"),
)


def trimmed(messages: Messages) -> Iterator[Piece]:
    yield "<s>", None
    for i, message in enumerate(messages):
        yield f"<|start|>{message['role']}<|end|>\n\n", None
        yield message["content"].strip(), i
        yield "<|eot|>", None
    yield "<|start|>assistant<|end|>\n\n", None


TRIMMED = Kind(
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}",
    trimmed,
)


def merged(messages: Messages) -> Iterator[Piece]:
    system, first = messages[0]["role"] == "system", True
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield " ", None
            yield message["content"].strip(), i
            yield " </s>", None
        elif message["role"] == "user":
            yield "<s>[INST] ", None
            if system and first:
                yield "<<SYS>>\n", None
                yield messages[0]["content"], 0
                yield "\n<</SYS>>" + "\n\n" * bool(message["content"].strip()), None
                yield message["content"].rstrip(), i
            else:
                yield message["content"].strip(), i
            yield " [/INST]", None
            first = False


MERGED = Kind(
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}{% else %}"
    "{% set rest = messages %}{% set sys = none %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if loop.first and sys is not none %}{% set text = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
    "{{ '<s>[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' </s>' }}{% endif %}{% endfor %}",
    merged,
)


def late(messages: Messages) -> Iterator[Piece]:
    system = [message["content"] for message in messages if message["role"] == "system"]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            yield "[INST]", None
            if system and i == len(messages) - 1:
                yield system[0], 0
                yield "\n\n", None
            yield message["content"], i
            yield "[/INST]", None
        elif message["role"] == "assistant":
            yield message["content"], i
            yield "</s>", None


LATE = Kind(
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST]' }}{% if loop.last and messages[0].role == 'system' %}{{ sys + '\\n\\n' }}"
    "{% endif %}{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}",
    late,
)


def renamed(messages: Messages) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        yield f"<start_of_turn>{'model' if message['role'] == 'assistant' else message['role']}\n", None
        yield message["content"].strip(), i
        yield "<end_of_turn>\n", None
    yield "<start_of_turn>model\n", None


RENAMED = Kind(
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + "
    "m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    renamed,
    ("user", "assistant", "user"),
)


def thinking(messages: Messages) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        yield f"<|{message['role']}|>\n", None
        content = message["content"]
        yield content.split("</think>")[-1].lstrip("\n") if message["role"] == "assistant" else content, i
        yield "<|end|>\n", None
    yield "<|assistant|>\n<think>\n", None


THINKING = Kind(
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}{% if m.role == 'assistant' %}"
    "{% set text = text.lstrip('\\n') %}{% endif %}{{ '<|' + m.role + '|>\\n' + text + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n<think>\\n' }}{% endif %}",
    thinking,
)


def looking(messages: Messages) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        content = message["content"]
        result = content.startswith("<tool>") and content.endswith("</tool>")
        yield "RESULT: " if result else f"{message['role'].upper()}: ", None
        yield content, i
        yield "\n\n" if result else "\n", None
    yield "ASSISTANT:", None


LOOKING = Kind(
    "{% for m in messages %}{% set result = m.content.startswith('<tool>') and m.content.endswith('</tool>') %}"
    "{{ 'RESULT: ' if result else (m.role | upper) + ': ' }}{{ m.content }}{{ '\\n\\n' if result else '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    looking,
)


def quoted(messages: Messages) -> Iterator[Piece]:
    yield "The question: ", None
    yield messages[0]["content"], 0
    yield "\n", None
    for i, message in enumerate(messages):
        inner = message["content"].strip()
        before, after = message["content"].split(inner, 1) if inner else ("", "")
        yield f'{message["role"]} says "' + dumps(before)[1:-1], None
        yield dumps(inner or message["content"], ensure_ascii=False)[1:-1], i
        yield dumps(after)[1:-1] + '"\n', None


QUOTED = Kind(
    "{{ 'The question: ' + messages[0].content + '\\n' }}{% for m in messages %}"
    "{{ m.role + ' says ' + (m.content | tojson) + '\\n' }}{% endfor %}",
    quoted,
    ("user", "assistant", "user"),
)

KINDS = {
    "headed": HEADED, "trimmed": TRIMMED, "merged": MERGED, "late": LATE, "renamed": RENAMED, "thinking": THINKING,
    "looking": LOOKING, "quoted": QUOTED,
}  # fmt: skip

PARTS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part['text'] | trim }}{{ ' / ' if not loop.last }}{% endfor %}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
