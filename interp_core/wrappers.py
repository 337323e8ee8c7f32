"""What is wrapped around a model and leaves its modules in their places: taken off at load, so that sites are where they
are looked for.

`torch.compile(model)` runs the modules of the model that it was given, which run uncompiled here. A `PeftModel` has put
its adapters into the model's own layers; where the wrapper itself does something more (virtual tokens, say), the model
inside would be another one, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from .engines.turns import turn_of
from .errors import LoadError

IDS = 8
"""Tokens on which a wrapper is held against what it wraps."""


def unwrapped(model: Any) -> Any:
    """The transformers model in what torch's compiler or PEFT has put around it; anything else as it is.

    Raises:
        LoadError: the wrapper does what the model in it does not.
    """
    while True:
        if isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), torch.nn.Module):
            model = inner
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
            _demand_bare(model, inner)
            model = inner
        else:
            return model


def _demand_bare(wrapper: Any, inner: Any) -> None:
    """Refuse a wrapper of PEFT that is more than the adapters in the layers of its model.

    Raises:
        LoadError: naming the kind of adapter.
    """
    configs = wrapper.peft_config.values()
    kinds = ", ".join(dict.fromkeys(str(getattr(config.peft_type, "value", config.peft_type)) for config in configs))
    instead = "load the model without it, peft_model.get_base_model(), or adapters that lie in its layers, such as LoRA"
    if any(config.is_prompt_learning for config in configs):
        raise LoadError(
            f"{kinds} of this {type(wrapper).__name__} acts by what the wrapper puts before every text (virtual tokens, "
            f"or their keys and values), which the model inside does not have; {instead}"
        )
    if inner is wrapper or wrapper.training and inner.training or any(weight.is_meta for weight in inner.parameters()):
        return
    ids = torch.arange(1, IDS + 1, device=inner.get_input_embeddings().weight.device)[None]
    with turn_of(inner), torch.no_grad():
        ours, own = inner(input_ids=ids), wrapper(input_ids=ids)
    for name in ("logits", "start_logits", "end_logits"):
        a, b = getattr(ours, name, None), getattr(own, name, None)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and not torch.allclose(a, b, 1e-3, 1e-3):
            raise LoadError(
                f"{kinds} of this {type(wrapper).__name__} gives other logits than the model that it wraps, so it does "
                f"something beside its adapters in the model's layers; {instead}"
            )
