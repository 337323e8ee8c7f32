"""Phi-3: fused query-key-value projection in blocks."""

from .family import Family, fused_blocks

FAMILY = Family("phi3", fused=fused_blocks)
