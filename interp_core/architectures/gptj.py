"""GPT-J, and CodeGen, whose one projection lies in four parts, each with queries, values and keys of a quarter of the
heads."""

from .family import Arrangement, Family, Heads, View, fused_blocks

FAMILY = Family("gptj", parallel=lambda config: True)
_PARTS = Arrangement(
    lambda x: x.unflatten(-1, (4, 3, -1)).transpose(-3, -2).flatten(-3),
    lambda x: x.unflatten(-1, (3, 4, -1)).transpose(-3, -2).flatten(-3),
)


def fused_parts(heads: Heads, part: str) -> View:
    """All queries, then all values, then all keys."""
    return fused_blocks(heads, {"q": "q", "v": "k", "k": "v"}[part])


CODEGEN = Family("codegen", parallel=lambda config: True, fused=fused_parts, arranged=lambda heads: _PARTS)
