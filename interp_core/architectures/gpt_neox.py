"""GPT-NeoX (Pythia): query, key and value of a head lie side by side; blocks are parallel unless the config says no.

GPT-NeoX-Japanese and Persimmon (Fuyu's language model) have that projection in blocks that are not parallel.
"""

from .family import Family, fused_per_head

FAMILY = Family("gpt_neox", fused=fused_per_head, parallel=lambda config: bool(config.use_parallel_residual))
JAPANESE = Family("gpt_neox_japanese", fused=fused_per_head)
PERSIMMON = Family("persimmon", fused=fused_per_head)
FUYU = Family("fuyu", fused=fused_per_head)
