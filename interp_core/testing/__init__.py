"""For tests, ours and those of plugin authors: small random-weight models of real families.

    model = ic.load(testing.tiny("gemma2"))

The models are made from config: no download, no training, the same weights for the same seed.
"""

from .models import VOCAB, families, tiny

__all__ = ["VOCAB", "families", "tiny"]
