"""GPT-NeoX (Pythia): query, key and value of a head lie side by side; blocks are parallel unless the config says no."""

from .family import Family, fused_per_head

FAMILY = Family("gpt_neox", fused=fused_per_head, parallel=lambda config: bool(config.use_parallel_residual))
