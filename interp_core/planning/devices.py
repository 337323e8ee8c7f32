"""What machines give: operations and bytes per second, by name, by your word, or by a pass on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import PlanError, nearest, wrong

if TYPE_CHECKING:
    from ..model import Model

DEVICES = {"A100": (312e12, 2.04e12, 80e9), "H100": (989e12, 3.35e12, 80e9), "H200": (989e12, 4.8e12, 141e9)}
"""Operations per second in bfloat16 without sparsity, bytes per second, bytes; data sheets of the SXM modules."""
UTILISATION = 0.4
"""Share of the peak that passes of a language model reach; published trainings lie between a third and a half."""
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Rate:
    """How fast a device is.

    Attributes:
        said: where the numbers come from.
        flops: operations per second that are reached.
        bandwidth: bytes per second (None: not looked at).
        memory: bytes (None: not said).
    """

    said: str
    flops: float
    bandwidth: float | None = None
    memory: float | None = None


def named_rate(name: str, utilisation: float = UTILISATION) -> Rate:
    """A device of the table.

    Raises:
        PlanError: no such device, or a share that is none.
    """
    if name.upper() not in DEVICES:
        raise PlanError(f"no device {name!r} is in the table. {nearest(name.upper(), DEVICES)} Or --flops-per-second")
    if not 0 < utilisation <= 1:
        raise PlanError(f"utilisation is {utilisation}: give a share of the peak, above 0 and 1 at most")
    flops, bandwidth, memory = DEVICES[name.upper()]
    return Rate(f"{name.upper()} at {utilisation:.0%} of its peak", flops * utilisation, bandwidth, memory)


def measured_rate(model: Model, flops: float, tokens: int, rounds: int = 3) -> Rate:
    """What passes of a model that is here reach, the best of some rounds.

    Args:
        flops: of such a pass.
        tokens: of the text that is run.
    """
    import torch

    size, seed = model.atlas.shape.n_ids, torch.Generator().manual_seed(0)
    ids = torch.randint(3, size, (1, tokens), generator=seed).to(model.device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first one also warms up
            began = time.perf_counter()
            model.hf(ids, use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    where = f"{model.source} on this machine ({model.device.type}), {tokens} tokens"
    return Rate(f"measured with {where}", flops / best)


def bytes_of(text: str, owner: str) -> float:
    """A number of bytes: `80GB`, `40 GiB`, or a plain number.

    Raises:
        PlanError: it is none.
    """
    word = text.strip().upper().replace(" ", "")
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if word.endswith(unit)), "")
    try:
        count = float(word.removesuffix(unit)) * UNITS.get(unit, 1.0)
    except ValueError:
        count = 0.0
    if not 0 < count < float("inf"):
        raise PlanError(wrong(owner, "a number of bytes, as 80GB or 40GiB", text))
    return count
