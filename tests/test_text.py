"""Tokens, spans, targets and chat templates, on cut-down copies of real tokenizers (same ids for these texts)."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import DATA, tiny_model

import interp_core as ic
from interp_core.offsets import offsets_by_decoding
from interp_core.text import encode, encode_chat, from_inputs

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
        carried = kind == "phi3" and text.startswith("<s>")
        assert tokens.ids[0].tolist() == tokenizer(kind)(text, add_special_tokens=not carried)["input_ids"]
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
        offsets_by_decoding(tokenizer("gpt2"), tokenizer("gpt2")("Paris")["input_ids"], "Rome")


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [None, True, False])
def test_begin_of_sequence_is_never_doubled(kind: str, bos: bool | None) -> None:
    """A rendered template, passed on as a string, has its BOS already; what a text itself repeats stays."""
    for one in (tokenizer(kind), Slow(tokenizer(kind))):
        begin = one.bos_token or one.eos_token
        first = one.convert_tokens_to_ids(begin)
        if bos and one.bos_token_id is None:
            continue
        for text in (begin, f"{begin}Hello world", f"{begin}{begin}Hello world", f"Hello world{begin}", f"a{begin}b"):
            tokens = encode(one, text, bos=bos)
            own = one(text, add_special_tokens=False)["input_ids"]
            adds = own[0] != first and (bos or (bos is None and kind == "phi3"))
            assert tokens.ids[0].tolist() == [first] * bool(adds) + own, text
            assert len(tokens.offsets[0]) == len(tokens.labels[0]) == tokens.lengths[0]  # type: ignore[index]
    prompt, target = f"{begin}The Eiffel Tower is in", " Paris"
    joined = encode(tokenizer(kind), prompt, target)
    assert joined.ids[0].tolist() == tokenizer(kind)(prompt + target, add_special_tokens=False)["input_ids"]


@cache
def framing() -> Any:
    """A tokenizer that puts a token at both ends, as encoders' do, and one with a BOS of two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "the": 3, "cat": 4}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("the cat", [1, 3, 4, 2]),
        ("<s> the cat", [1, 3, 4, 2]),
        ("the cat </s>", [1, 3, 4, 2]),
        ("<s> the cat </s>", [1, 3, 4, 2]),
        ("<s> <s> the </s> </s>", [1, 1, 3, 2, 2]),
        ("the <s> cat", [1, 3, 1, 4, 2]),
        ("</s> the <s>", [1, 2, 3, 1, 2]),
        ("<s>", [1, 2]),
        ("</s>", [1, 2]),
        ("<s> </s>", [1, 2]),
    ],
)
def test_special_tokens_at_both_ends(text: str, ids: list[int]) -> None:
    for one in (framing(), Slow(framing())):
        for bos in (None, True):
            tokens = encode(one, text, bos=bos)
            assert tokens.ids[0].tolist() == ids and len(tokens.offsets[0]) == len(ids)  # type: ignore[index]


def test_rendered_chats_without_the_tokenizers_offsets() -> None:
    """Special tokens that a text has written out cover their characters."""
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "end"}]
    fast, slow = (encode_chat(one, messages) for one in (tokenizer("qwen2.5"), Slow(tokenizer("qwen2.5"))))
    assert slow.ids.tolist() == fast.ids.tolist() and slow.offsets == fast.offsets and slow.spans == fast.spans


def test_models_are_fed_one_begin_of_sequence() -> None:
    model = ic.load(ic.testing.tiny("llama"), tokenizer=framing())
    for text in ("<s> the cat </s>", "the cat"):
        assert model.run(text).tokens.ids.tolist() == [[1, 3, 4, 2]]
        assert model.generate(text, max_new_tokens=1).tokens.ids[0, :4].tolist() == [1, 3, 4, 2]
    assert model.tokens(["<s> the", "the cat"]).ids.tolist() == [[1, 1, 3, 2], [1, 3, 4, 2]]


MARKS = [
    "\u0301",
    "\u0302\u0301",
    "e\u0301",
    "n\u0303o e\u0302\u0301",
    " \u0301",
    "\u093f",
    "\u1112\u1161\u11ab",
    "a\u200d",
    "\ufeffa",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", MARKS)
def test_combining_marks_belong_to_tokens(kind: str, text: str) -> None:
    """Also where a tokenizer composes them with the letter before, and where nothing is before them."""
    for whole in (text, f"Hello {text} world", f"{text}{text}"):
        tokens = encode(tokenizer(kind), whole)
        assert tokens.ids[0].tolist() == tokenizer(kind)(whole)["input_ids"]
        spans = [tokens.find((i, i + 1)) for i, char in enumerate(whole) if not char.isspace()]
        assert all(len(span) for span in spans) and spans == sorted(spans)
        assert tokens.chars(spans[-1])[1] == len(whole)


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


# A tensor of one's own at positions


@pytest.mark.parametrize(
    "at", [-1, 0, "last", [0, -1], slice(1, 2), slice(-2, None), ic.Span(0, 2), ic.PerRow((1, 3, 0))]
)
def test_take_gives_what_a_run_would_give_there(padded: ic.Tokens, at: Any) -> None:
    """Of any dtype and number of axes; columns are where the values lie."""
    model, tokens = tiny_model("llama"), padded
    site = ic.sites.resid_post[1]
    run = model.run(tokens, read=[site, site.at(at)], logits=False)
    assert torch.equal(tokens.take(run[site], at), run[site.at(at)].plain)
    ids = tokens.take(tokens.ids, at)
    assert ids.flatten().tolist() == [int(tokens.ids[i, c]) for i, row in enumerate(tokens.columns(at)) for c in row]
    assert [label for row in tokens.labels_at(at) for label in row] == list(map(str, ids.flatten().tolist()))


def test_columns_of_positions_that_rows_have_differently_many_of(padded: ic.Tokens) -> None:
    tokens = padded
    assert tokens.columns(None) == [[2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [5, 6]]
    with pytest.raises(ic.PositionError, match=r": selects \[5, 7, 2\] positions of the rows; take them row by row"):
        tokens.take(tokens.ids, None)
    with pytest.raises(ic.PositionError, match="no position 3 in row 2: it has 2 tokens"):
        tokens.columns(3)
    for values in (torch.zeros(3, 6), torch.zeros(7), [[1]]):
        with pytest.raises(ic.PlanError, match=r"take takes a tensor \[3, 7, …\] of these tokens"):
            tokens.take(values, -1)  # type: ignore[arg-type]


def test_a_reading_gives_its_plain_tensor() -> None:
    reading = tiny_model("llama").run(torch.tensor([[5, 17, 33]]), read=ic.sites.embed)[ic.sites.embed]
    assert type(reading.plain) is torch.Tensor and reading.plain.data_ptr() == reading.data_ptr()
