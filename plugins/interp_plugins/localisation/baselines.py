"""Maps that know nothing of the model: noise, and a blob in the centre. A method is worth what it has above them.

    random   uniform in 0 … 1, 32 × 32, seeded by the first eight bytes of SHA-256 of "SAMPLE:random"
    centre   exp(-(x² + y²) / 2σ²), σ = 0.35, x and y in 32 steps from -1 to 1

The centre is required beside any insertion curve: in published tables it beats gradients and flows there.

Source: FlashTrace's multimodal evaluation (arXiv:2602.01914).
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Float

SIDE = 32
DEVIATION = 0.35


def random_map(sample: str, method: str = "random", side: int = SIDE) -> Float[np.ndarray, "row col"]:
    """Noise, the same for the same sample.

    Args:
        sample: its name.
        method: for other noise of the same sample.
        side: rows and columns.
    """
    seed = int.from_bytes(hashlib.sha256(f"{sample}:{method}".encode()).digest()[:8], "big")
    return np.random.default_rng(seed).random((side, side), dtype=np.float32).astype(np.float64)


def centre_map(side: int = SIDE, deviation: float = DEVIATION) -> Float[np.ndarray, "row col"]:
    """A Gaussian blob in the middle of the image."""
    steps = (2 * np.arange(side) - (side - 1)) / max(side - 1, 1)  # as exact on one side as on the other
    return np.asarray(np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * deviation**2)))
