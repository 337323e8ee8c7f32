"""VQAv2's contractions: what is written without its apostrophe, and with it. 120 forms.

The table is rebuilt from what it says: contractions whose one apostrophe is left out; those of two or three, of which
each form lacks one; and what is odd in the published table (one reversed, two that map to themselves, four with a
capital I, which words in lower case never meet).
"""

from __future__ import annotations

_ONE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't "
    "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's "
    "they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_SEVERAL = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've 'ow's'at y'all'd've"
)
_ODD = {
    "somebody'd": "somebodyd", "let's": "let's", "she's": "she's", "Im": "I'm", "Ive": "I've", "Id've": "I'd've",
    "I'dve": "I'd've",
}  # fmt: skip


def _lacking_one(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {form: word for word in f"{_ONE} {_SEVERAL}".split() for form in _lacking_one(word)} | _ODD
"""Contraction by the form in which it is written."""
