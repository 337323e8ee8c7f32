"""The ids of a text, and which characters of it each token covers."""

from __future__ import annotations

import unicodedata
from typing import Any

from .chat import Chars
from .errors import TextError


def ids_with_offsets(tokenizer: Any, text: str, bos: bool | None) -> tuple[list[int], list[Chars]]:
    """Ids of one text and the characters of each.

    Args:
        bos: see `text.encode`.

    Raises:
        TextError: a text without tokens, a BOS where there is none, or a tokenizer that does not decode to its text.
    """
    if bos and tokenizer.bos_token_id is None:
        raise TextError("a BOS was asked for, but the tokenizer has none; leave bos out or set tokenizer.bos_token")
    special, fast = bos is not False, getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, add_special_tokens=special, **({"return_offsets_mapping": True} if fast else {}))
    ids = list(encoded["input_ids"])
    if not ids:
        raise TextError(f"the text {text!r:.60} has no tokens")
    kept = _not_doubled(tokenizer, text, ids) if special else slice(None)
    ids = ids[kept]
    if fast:
        offsets = with_composed(text, [(int(a), int(b)) for a, b in encoded["offset_mapping"]][kept])
    else:
        offsets = offsets_by_decoding(tokenizer, ids, text)
    if bos and ids[0] != tokenizer.bos_token_id:
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    return ids, offsets


def _not_doubled(tokenizer: Any, text: str, ids: list[int]) -> slice:
    """Which tokens to keep so that special ones that the text has written out (a chat template rendered by hand) are
    not put around it a second time."""
    specials = set(tokenizer.all_special_ids)
    if not specials.intersection(ids[1:3] + ids[-3:-1]):  # beside those at the ends; spares a second tokenizing
        return slice(None)
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in reversed(range(len(ids) - len(bare) + 1)):
        before, after = ids[:start], ids[start + len(bare) :]
        if ids[start : start + len(bare)] != bare:
            continue
        doubled = bool(before) and bare[: len(before)] == before, bool(after) and bare[-len(after) :] == after
        if any(doubled):
            return slice(len(before) if doubled[0] else 0, len(ids) - (len(after) if doubled[1] else 0))
    return slice(None)


def with_composed(text: str, offsets: list[Chars]) -> list[Chars]:
    """Offsets in which characters that the tokenizer composed with the one before (a letter and its accent become one)
    belong to that one's tokens."""
    if unicodedata.is_normalized("NFC", text):
        return offsets
    covered = {i for a, b in offsets for i in range(a, b)}

    def composes(start: int, end: int) -> bool:
        """Whether the character at `end` adds none to those before it."""
        without, whole = (unicodedata.normalize("NFC", text[start:stop]) for stop in (end, end + 1))
        return len(whole) <= len(without)

    longer: list[Chars] = []
    for start, end in offsets:
        while start < end < len(text) and end not in covered and composes(start, end):
            end += 1
        longer.append((start, end))
    return longer


def offsets_by_decoding(tokenizer: Any, ids: list[int], text: str) -> list[Chars]:
    """Offsets for tokenizers that give none: how far each decoded prefix reaches into the text.

    Special tokens cover what the text has written out for them, or nothing; decoding starts anew after those.
    """
    specials = set(tokenizer.all_special_ids)
    offsets: list[Chars] = []
    kept: list[int] = []
    before, start, skipped = 0, 0, False  # SentencePiece drops white space at the start
    for token in ids:
        if token in specials:
            begin, written = before + len(text[before:]) - len(text[before:].lstrip()), tokenizer.decode([token])
            if text.startswith(written, begin):
                before, kept, skipped = begin + len(written), [], False
                start = before
            offsets.append((min(begin, before), before))
            continue
        kept.append(token)
        whole = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        decoded = whole.rstrip("\ufffd")  # the bytes of a character that is not complete yet
        if not skipped and decoded:
            place = text.find(decoded, start)
            skipped, start = True, place if place >= 0 and not text[start:place].strip() else start
        after = start + len(decoded)
        if text[start:after] != decoded:
            raise TextError(f"this tokenizer gives no offsets and does not decode to its text ({decoded[-20:]!r})")
        after = max(after, before)  # a run of bytes may fall back to its start until it is complete
        offsets.append((before, min(after + (decoded != whole), len(text))))
        before = after
    return offsets
