"""Pairs: two contexts that share a target text, aligned token by token.

    pair      what a pair is, and what must hold of it
    files     `pair_tokens.json`: read and written, with its synonyms, in both layouts
    building  pairs of texts and chat transcripts, aligned by characters
    problems  both contexts around the solution of a programming problem
    routing   how a model routes the targets of pairs

A statistic of a router is read at a target's position p, a likelihood at p - 1, where the model predicts it. "all" are
all targets of a sample, "last" is the last of them.
"""

from __future__ import annotations

from .building import build_pair, build_pairs
from .files import read_pairs, write_pairs
from .pair import Pair

__all__ = ["Pair", "build_pair", "build_pairs", "read_pairs", "write_pairs"]
