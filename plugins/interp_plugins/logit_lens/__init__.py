"""Logit lens: what the model would say after each layer, and how well it predicts a text there.

`method` is the method (a grid of layers and positions), `aligned` scores given targets layer by layer, `tiles` reads
out without logits as wide as the vocabulary, `states` keeps streams in files, `origin_states` reads those of others.
"""

from .method import LensConfig, LogitLens, LogitLensResult

__all__ = ["LensConfig", "LogitLens", "LogitLensResult"]
