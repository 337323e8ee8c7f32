"""Which of several texts has the longest residual stream."""

from __future__ import annotations

import interp_core as ic


def longest(text: list[str], model: str = "toy:text", power: int = 1) -> str:
    """The text whose last token ends with the longest residual stream.

    Args:
        text: to choose from.
        model: what `ic.load` takes.
        power: of the norm.
    """
    norms = ic.method("resid_norm")(ic.load(model), text, power=power).norm
    return f"longest: {text[int(norms[-1, :, -1].argmax())]}"
