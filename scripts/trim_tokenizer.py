"""Cuts a BPE tokenizer down to what some texts need: python scripts/trim_tokenizer.py SOURCE TARGET TEXTS.json

Kept are the merges that the texts use and their tokens, with their own ids, so that these texts are split exactly as
by the whole tokenizer, in a thousandth of its size. Tests use such copies of real tokenizers.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer


def used(words: list[str], ranks: dict[tuple[str, str], int], vocab: dict[str, int]) -> set[tuple[str, str]]:
    """Merges that BPE carries out on these words."""
    merges = set()
    for word in words:
        pieces = list(word)
        while True:
            pairs = [(ranks[pair], pair) for pair in pairwise(pieces) if pair in ranks]
            if not pairs:
                break
            pair = min(pairs)[1]
            merges.add(pair)
            merged, i = [], 0
            while i < len(pieces):
                if tuple(pieces[i : i + 2]) == pair:
                    merged.append("".join(pair))
                    i += 2
                else:
                    merged.append(pieces[i])
                    i += 1
            pieces = merged
    return merges


def trim(source: Path, target: Path, texts: list[str]) -> None:
    """Write the small copy, and check it."""
    whole = Tokenizer.from_file(str(source / "tokenizer.json"))
    data = json.loads((source / "tokenizer.json").read_text())
    model = data["model"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    special = {token["content"] for token in data["added_tokens"]}
    words = []
    cut = re.compile("|".join(map(re.escape, special)))
    for plain in (part for text in texts for part in cut.split(text)):
        normal = whole.normalizer.normalize_str(plain) if whole.normalizer else plain
        pieces = whole.pre_tokenizer.pre_tokenize_str(normal) if whole.pre_tokenizer else [(normal, None)]
        words += [piece for piece, _ in pieces]
    kept = used(words, {pair: rank for rank, pair in enumerate(merges)}, model["vocab"])
    tokens = {piece for pair in kept for piece in (*pair, "".join(pair))} | special
    tokens |= {token for token in model["vocab"] if len(token) == 1 and ord(token) < 0x180}
    tokens |= {token for token in model["vocab"] if token.startswith("<0x")} | {char for word in words for char in word}
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token in tokens}
    model["vocab"] |= {token["content"]: token["id"] for token in data["added_tokens"]}  # or their ids would move
    model["merges"] = [list(pair) for pair in merges if pair in kept]
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja", "LICENCE_NOTE.txt"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    small = Tokenizer.from_file(str(target / "tokenizer.json"))
    for text in texts:
        assert small.encode(text).ids == whole.encode(text).ids, text


if __name__ == "__main__":
    trim(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
