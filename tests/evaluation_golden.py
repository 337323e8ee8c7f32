"""What the published code gave for the examples that evaluations are tested on."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from conftest import DATA
from torch import Tensor

HERE = DATA / "attribution" / "evaluation"
EXAMPLES = [*(f"llama/ex{k}" for k in range(5)), *(f"qwen3/ex{k}" for k in range(3))]


@cache
def golden(name: str) -> dict[str, Any]:
    with np.load(HERE / name) as file:
        return {key: file[key] if file[key].dtype.kind == "U" else torch.from_numpy(file[key]) for key in file.files}


def example(name: str) -> dict[str, Any]:
    numbers = golden("faithfulness.npz")
    return {key.removeprefix(f"{name}/"): value for key, value in numbers.items() if key.startswith(f"{name}/")}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
