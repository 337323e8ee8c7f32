"""What is wrapped around a model and leaves its modules in their places: taken off at load, so that sites are where
they are looked for.

`torch.compile(model)` runs the modules of the model that it was given, which run uncompiled here. A `PeftModel` has put
its adapters into the model's own layers; where the wrapper itself does something more (virtual tokens, say), the model
inside would be another one, and is refused.

A classifier or reward model is a language model's stack with another head. It is run as the causal model of its family
that has this head for its unembedding: its logits are those of labels, at every position what the head makes of the
stream there. A sequence classifier picks those of the last token, so that each position is the verdict on the text up
to there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .architectures.parameters import LENT
from .architectures.unfit import demand_one_text, with_head
from .engines.turns import turn_of
from .errors import LoadError, first_line
from .snapshot import bare_config, demand_steady, take_again

IDS = 8
"""Tokens on which a wrapper is held against what it wraps."""
HEADS = ("score", "classifier", "qa_outputs")
"""How transformers calls the heads of classifiers and of what answers questions."""


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
            f"{kinds} of this {type(wrapper).__name__} acts by what the wrapper puts before every text (virtual "
            f"tokens, or their keys and values), which the model inside does not have; {instead}"
        )
    if inner is wrapper or any(weight.is_meta for weight in inner.parameters()):
        return
    for path, module in inner.named_modules():
        demand_steady(path, module)
    try:
        with turn_of(inner), torch.no_grad():
            ours, own = (_logits(which, _ids(inner)) for which in (inner, wrapper))
    except Exception as error:  # the code of others: a wrapper may need more than a text
        raise LoadError(f"{kinds} of this {type(wrapper).__name__} cannot run a text: {first_line(error)}") from error
    if ours is not None and own is not None and not torch.allclose(ours, own, 1e-3, 1e-3):
        raise LoadError(
            f"{kinds} of this {type(wrapper).__name__} gives other logits than the model that it wraps, so it does "
            f"something beside its adapters in the model's layers; {instead}"
        )


def with_its_head(model: Any) -> Any:
    """A classifier as the causal model of its family whose unembedding is its head, of the same modules; a model that
    has an unembedding as it is.

    Raises:
        LoadError: it has no head, or one that makes its logits of something else than the stream of each position.
    """
    if model.get_output_embeddings() is not None:
        return model
    demand_one_text(model)
    kind, causal = type(model).__name__, _causal(type(model.config))
    called = next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)), "")
    if not called or causal is None:
        raise LoadError(f"{kind} has no output embeddings; {_head_inside(model) or with_head(model.config)}")
    with torch.device("meta"):
        shell = causal(bare_config(model.config))
    heads = [name for name, part in shell.named_children() if part is shell.get_output_embeddings()]
    lent = {causal.base_model_prefix: model.base_model_prefix, **dict.fromkeys(heads, called)}
    vars(shell)[LENT] = model, lent
    take_again(shell)
    shell.training = model.training
    lent_weights = {id(weight) for weight in model.parameters()}
    own = [name for name, weight in shell.named_parameters() if id(weight) not in lent_weights]
    if heads and all(weight.is_meta for weight in model.parameters()):  # nothing to compare
        return shell
    if heads and not own:
        try:
            with turn_of(model), torch.no_grad():
                ours, theirs = (_logits(which, _ids(model)) for which in (shell, model))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            ours = theirs = None
        if ours is not None and theirs is not None:
            ours = ours if theirs.ndim == ours.ndim else ours[:, -1]
            if ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-3, 1e-3):
                return shell
    if not heads or own:
        where = "in a module or behind layers of its own"
        why = f"cannot take the place of {causal.__name__}'s unembedding, which lies {where}"
    else:
        why = (
            "does not make its logits of the stream after the final norm, position by position (it pools, or has "
            "layers of its own)"
        )
    raise LoadError(
        f"the head of {kind} {why}, so there is no site logits; pass the model with its language modelling head, such "
        f"as {causal.__name__}"
    )


def _head_inside(model: Any) -> str:
    """What a message says where a part of a model, such as its language model, is one with a head; "" if none is."""
    for name, part in model.named_children():
        if hasattr(part, "get_output_embeddings") and part.get_output_embeddings() is not None:
            return f"the part that has them can be loaded alone, model.{name}, which is a {type(part).__name__}"
    return ""


def _causal(config: type) -> Any:
    """The causal language model of transformers for a kind of config, or None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)


def _ids(model: Any) -> Tensor:
    """A few tokens `[1 pos]` that are no padding."""
    table = model.get_input_embeddings().weight
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [i % len(table) for i in range(1, IDS + 1) if i % len(table) != pad]
    return torch.tensor([ids], device=table.device)


def _logits(model: Any, ids: Tensor) -> Tensor | None:
    """What a model's head makes of a text; of a question's answer the two kinds side by side."""
    output = model(input_ids=ids)
    if (logits := getattr(output, "logits", None)) is not None:
        return logits
    ends = [getattr(output, f"{end}_logits", None) for end in ("start", "end")]
    return None if any(end is None for end in ends) else torch.stack(ends, -1)  # type: ignore[arg-type]
