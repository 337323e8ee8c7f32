"""What the scripts that train toys have in common: sizes, optimizers, and the command line."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


def language_model(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the configs of toys that read text alone have in common."""
    return {
        "vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02,
        "max_position_embeddings": 256, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


class Optimizers:
    """Muon for hidden matrices, AdamW for the rest, with one factor on both learning rates."""

    def __init__(self, model: nn.Module, is_hidden: Callable[[str, Tensor], bool]) -> None:
        named = list(model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        hidden = [parameter for name, parameter in named if is_hidden(name, parameter)]
        rest = [parameter for name, parameter in named if not is_hidden(name, parameter)]
        muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0)
        adam = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.full_rates: list[tuple[torch.optim.Optimizer, float]] = [(muon, 0.02), (adam, 3e-3)]

    def step(self, loss: Tensor, factor: float) -> None:
        """Go down the gradient of a loss, of length 1 at most, with learning rates times a factor."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in self.full_rates:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def command_line(doc: str | None, train: Callable[..., None], most: str) -> None:
    """Call a training function with a folder, `--seed`, and its argument that says how many steps it takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("out", type=Path)
    for name in ("seed", most):
        parser.add_argument(f"--{name}", type=int, default=inspect.signature(train).parameters[name].default)
    torch.set_num_threads(1)
    train(**vars(parser.parse_args()))
