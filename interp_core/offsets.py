"""Which characters of its text each token covers."""

from __future__ import annotations

import unicodedata
from typing import Any

from .chat import Chars
from .errors import TextError


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
