"""A model class of one's own: Llama with another MLP."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class HelloConfig(LlamaConfig):
    """Its `model_type` finds the family."""

    model_type = "hello"


class HelloMLP(LlamaMLP):
    """The same numbers, another module name."""

    def __init__(self, config: HelloConfig) -> None:
        super().__init__(config)
        self.squeeze = self.down_proj
        del self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Gated, then squeezed."""
        return self.squeeze(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HelloForCausalLM(LlamaForCausalLM):
    """Random weights."""

    config_class = HelloConfig

    def __init__(self, config: HelloConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = HelloMLP(config)


def make() -> HelloForCausalLM:
    """Two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return HelloForCausalLM(HelloConfig(vocab_size=64, **sizes)).eval()
