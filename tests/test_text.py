"""Tokens, spans, targets and chat templates, on cut-down copies of real tokenizers (same ids for these texts)."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import DATA

import interp_core as ic
from interp_core.text import _offsets_by_decoding, encode, encode_chat, from_inputs

KINDS = ["gpt2", "qwen2.5", "phi3"]
TEXTS: list[str] = json.loads((DATA / "texts.json").read_text())
PLAIN = [text for text in TEXTS if "<|" not in text and "<s>" not in text]


@cache
def tokenizer(kind: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(DATA / "tokenizers" / kind))


class Slow:
    """A tokenizer without offsets, as SentencePiece's own are."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self.inner(text, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_tokenizers_and_offsets_cover_the_text(kind: str) -> None:
    for text in TEXTS:
        tokens = encode(tokenizer(kind), text)
        assert tokens.ids[0].tolist() == tokenizer(kind)(text)["input_ids"]
        assert tokens.offsets is not None
        covered = {i for a, b in tokens.offsets[0] for i in range(a, b)}
        assert {i for i, char in enumerate(text) if not char.isspace()} <= covered
        assert len(tokens.labels[0]) == tokens.lengths[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_substring_is_found(kind: str) -> None:
    text = "naïve café — “quotes”… 😀👍🏽 日本語 テスト"
    tokens = encode(tokenizer(kind), text)
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            if not text[start:stop].strip():
                continue
            span = tokens.find((start, stop))
            a, b = tokens.chars(span)
            assert a <= start and b >= stop
            narrower = [s for s in (ic.Span(span.start + 1, span.stop), ic.Span(span.start, span.stop - 1)) if len(s)]
            for inner in narrower:  # no token too many
                covered = [c for c in tokens.offsets[0][inner.start : inner.stop] if c[0] < c[1]]  # type: ignore[index]
                touching = {i for x, y in covered for i in range(x, y)}
                assert set(range(start, stop)) - touching or _shared(tokens, span)


def _shared(tokens: ic.Tokens, span: ic.Span) -> bool:
    """Whether neighbouring tokens in the span share a character."""
    offsets = tokens.offsets[0][span.start : span.stop]  # type: ignore[index]
    return any(a[1] > b[0] or a == b for a, b in pairwise(offsets))


def test_neighbouring_tokens_may_share_a_character() -> None:
    tokens = encode(tokenizer("gpt2"), "naïve café — “quotes”… 😀👍🏽 日本語 テスト")
    span = tokens.find("😀")
    assert len(span) > 1
    assert len({tokens.offsets[0][i] for i in span}) < len(span) or _shared(tokens, span)  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_without_the_tokenizers_help(kind: str) -> None:
    for text in PLAIN:
        fast = encode(tokenizer(kind), text)
        slow = encode(Slow(tokenizer(kind)), text)
        assert torch.equal(fast.ids, slow.ids)
        for i, (a, b) in enumerate(slow.offsets[0]):  # type: ignore[index]
            c, d = fast.offsets[0][i]  # type: ignore[index]
            assert a <= d and c <= b, (text, i)
        if word := re.search(r"\S+", text):
            assert set(fast.find(word.span())) & set(slow.find(word.span()))
    with pytest.raises(ic.TextError, match="does not decode to its text"):
        _offsets_by_decoding(tokenizer("gpt2"), tokenizer("gpt2")("Paris")["input_ids"], "Rome")


@pytest.mark.parametrize("kind", KINDS)
def test_targets_continue_their_prompts(kind: str) -> None:
    for prompt, target in (("The Eiffel Tower is in", " Paris"), ("Q: big\nA: small\n\nQ: hot\nA:", " cold")):
        tokens = encode(tokenizer(kind), prompt, target)
        names = tokens.rows.names
        whole = [*names["prompt"][0], *names["target"][0]]
        assert whole == list(range(tokens.lengths[0]))
        alone = tokenizer(kind)(prompt)["input_ids"]
        assert tokens.ids[0, : len(alone)].tolist() == alone and names["target"][0][0] == len(alone)
        assert tokens.chars(ic.Span(names["target"][0][0], whole[-1] + 1))[1] == len(prompt + target)


def test_boundaries_inside_a_token_are_refused() -> None:
    for kind in ("gpt2", "qwen2.5"):
        with pytest.raises(ic.TextError, match="Move spaces from the prompt's end to the target's start"):
            encode(tokenizer(kind), "The Eiffel Tower is in ", "Paris")
        with pytest.raises(ic.TextError, match="the tokens of the prompt change"):
            encode(tokenizer(kind), "The Eiffel Tower is in", "side")
        joined = encode(tokenizer(kind), "The Eiffel Tower is in", "side", boundary="concat")
        apart = [tokenizer(kind)(part)["input_ids"] for part in ("The Eiffel Tower is in", "side")]
        assert joined.ids[0].tolist() == apart[0] + apart[1]
        assert joined.texts == ("The Eiffel Tower is inside",)
        assert joined.chars(joined.find("side")) == (22, 26)


def test_several_texts_and_targets() -> None:
    tokens = encode(tokenizer("gpt2"), ["The Eiffel Tower is in", "Hello world"], [" Paris", " Rome"])
    assert len(tokens) == 2 and tokens.padded
    assert tokens.mask[0].all() and not tokens.mask[1, 0]
    assert tokens.rows.names["target"][1][0] == tokens.lengths[1] - 1
    assert tokens.row(1).ids[0].tolist() == tokens.ids[1][tokens.mask[1]].tolist()
    assert torch.equal(tokens.row(-1).ids, tokens.row(1).ids)
    again = ic.Tokens.stack(list(tokens))
    assert torch.equal(again.mask, tokens.mask) and again.spans.keys() == tokens.spans.keys()


def test_named_spans() -> None:
    tokens = encode(tokenizer("gpt2"), ["The Eiffel Tower is in", "Hello world"])
    named = tokens.name(first=re.compile(r"\w+"), thing=["Eiffel Tower", "world"])
    assert named.rows.names["first"] == [[0], [0]]
    assert [tokens.texts[0][slice(*tokens.chars(named.spans["thing"][0][0]))]] == [" Eiffel Tower"]  # type: ignore[index]
    both = encode(tokenizer("gpt2"), "The quick brown fox jumps over the lazy dog. The dog sleeps.")
    assert both.find("dog", nth=0) < both.find("dog", nth=1) == both.find("dog", nth=-1)
    assert both.find(re.compile("l.zy")) == both.find("lazy")
    assert both.find(ic.Span(2, 4)) == ic.Span(2, 4)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("cat", "'cat' occurs not at all in row 0"),
        ("Towr", r"occurs not at all .* Did you mean 'Tower'"),
        (re.compile("z+"), "'z.*' occurs not at all"),
        ((0, 99), "characters 0:99 lie outside row 0, whose text has 22"),
        ((5, 5), "lie outside row 0"),
        (ic.Span(3, 30), "lies outside row 0"),
    ],
)
def test_spans_outside_the_text(what: Any, says: str) -> None:
    tokens = encode(tokenizer("gpt2"), "The Eiffel Tower is in")
    with pytest.raises(ic.PositionError, match=says):
        tokens.find(what)


def test_begin_of_sequence() -> None:
    phi = tokenizer("phi3")
    assert encode(phi, "Hello world").ids[0, 0] == phi.bos_token_id
    assert encode(phi, "Hello world", bos=False).ids[0, 0] != phi.bos_token_id
    gpt = encode(tokenizer("gpt2"), "Hello world", bos=True)
    assert gpt.ids[0, 0] == tokenizer("gpt2").bos_token_id and gpt.offsets[0][0] == (0, 0)  # type: ignore[index]
    assert gpt.labels[0][0] == "<|endoftext|>"
    assert gpt.find("Hello") == ic.Span(1, 2)
    with pytest.raises(ic.PositionError, match="special tokens only"):
        gpt.chars(ic.Span(0, 1))
    with pytest.raises(ic.TextError, match="the tokenizer has none"):
        encode(tokenizer("qwen2.5"), "Hello world", bos=True)


@pytest.mark.parametrize("kind", ["qwen2.5", "phi3"])
def test_chat(kind: str) -> None:
    messages = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    tokens = encode_chat(tokenizer(kind), messages)
    text = tokenizer(kind).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokens.texts == (text,)
    assert tokens.ids[0].tolist() == tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    for i, message in enumerate(messages):
        a, b = tokens.chars(tokens.spans[f"message_{i}"][0][0])
        assert message["content"] in text[a:b] and len(text[a:b].strip()) <= len(message["content"]) + 1
    assert len(tokens.spans["user"][0]) == 2 and len(tokens.spans["assistant"][0]) == 1
    answer = encode_chat(tokenizer(kind), messages, target="Paris")
    assert answer.texts[0].endswith("Paris") and "target" in answer.spans  # type: ignore[index]


def test_chat_refusals() -> None:
    with pytest.raises(ic.TextError, match="no chat template"):
        encode_chat(tokenizer("gpt2"), [{"role": "user", "content": "Hello world"}])
    with pytest.raises(ic.TextError, match=r"message 0 \(user\) is empty"):
        encode_chat(tokenizer("qwen2.5"), [{"role": "user", "content": ""}])


def test_empty_and_misfitting_text(toy: ic.Model) -> None:
    for text in ("", [], ["Q:", ""]):
        with pytest.raises(ic.TextError, match="empty|no text given"):
            toy.run(text)
    with pytest.raises(ic.TextError, match="the target is empty"):
        toy.tokens("Q:", target="")
    with pytest.raises(ic.TextError, match="2 targets for 1 texts"):
        toy.tokens(["Q:"], target=["a", "b"])
    with pytest.raises(ic.TextError, match="the text is empty"):
        toy.run(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ic.TextError, match="300 tokens do not fit the model's context of 256"):
        toy.run(" 84" * 300)
    with pytest.raises(ic.TextError, match="token id 1469 does not exist: the model has 1469"):
        toy.run(torch.tensor([[1, 1469]]))
    with pytest.raises(ic.TextError, match="token id 1469 does not exist"):
        toy.run(ic.Tokens(torch.tensor([[1469]]), torch.ones(1, 1, dtype=torch.bool)))
    with pytest.raises(ic.TextError, match="token ids are integers"):
        toy.run(torch.zeros(1, 3))
    with pytest.raises(ic.TextError, match="lack input_ids; they have 'pixel_values'"):
        toy.run({"pixel_values": torch.zeros(1)})
    with pytest.raises(ic.TextError, match="'strict' or 'concat'"):
        toy.tokens("Q:", target=" big", boundary="loose")


def test_models_without_tokenizer_take_ids() -> None:
    model = ic.load(ic.testing.tiny("llama"))
    with pytest.raises(ic.TextError, match="loaded without a tokenizer"):
        model.run("Hello")
    assert model.run(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)
    tokens = from_inputs({"input_ids": [[1, 2, 3]]})
    assert tokens.labels == (("1", "2", "3"),)
    with pytest.raises(ic.TextError, match="carry no text or offsets"):
        tokens.find("a")


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(ic.TextError, match="the tokenizer has 1469 tokens, the model 96: they do not belong together"):
        ic.load(ic.testing.tiny("llama"), tokenizer=ic.load("toy:text").tokenizer)
