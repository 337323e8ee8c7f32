"""From the residual stream to logits, and from heads to the residual stream, the way the model itself does it.

    logits = cap(scale * unembed(final_norm(resid)))
    attention's output = z @ W_O + b_O

`cap` and `scale` are in the config of the families that have them (Gemma's `final_logit_softcapping`, Cohere's
`logit_scale`, Granite's `logits_scaling`). The self-check holds the result against the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .architectures.atlas import Atlas
from .architectures.hook_points import own_code
from .architectures.parameters import CAPS, bias_of, is_numbers, parameter, runs_own_forward
from .architectures.shards import called
from .errors import PlanError, wrong
from .sites import Site


def readout(model: Any, final_norm: nn.Module, resid: Tensor) -> Tensor:
    """Logits `[… d_vocab]` of a residual stream `[… d_model]`."""
    return unembed(model, final_norm(resid))


def unembed(model: Any, normed: Tensor, tokens: slice | Tensor | None = None) -> Tensor:
    """Logits `[… d_vocab]` of a normed residual stream `[… d_model]`, or `[… token]` of some tokens."""
    head = model.get_output_embeddings()
    if tokens is None:
        return finished(model, head(normed))
    if not is_plain(head) or _hooked(head):
        logits = unembed(model, normed.to(model.dtype))
        return logits[..., tokens if isinstance(tokens, slice) else tokens.to(logits.device)]
    return _of_rows(model, normed, parameter(head), bias_of(head), tokens)


def _of_rows(model: Any, normed: Tensor, weight: Tensor, bias: Tensor | None, tokens: slice | Tensor) -> Tensor:
    """Logits of some rows of the unembedding, in the dtype of the stream."""
    tokens = tokens if isinstance(tokens, slice) else tokens.to(weight.device)
    weight, normed = weight[tokens].to(normed.dtype), normed.to(weight.device)
    added = None if bias is None else bias[tokens].to(weight)
    return finished(model, nn.functional.linear(normed, weight, added))


def unembed_tiles(model: Any, normed: Tensor, width: int) -> Iterator[Tensor]:
    """Logits `[… width]`, so many tokens after so many; the last ones may be fewer. A head that is no plain matrix is
    asked once, for all."""
    head = model.get_output_embeddings()
    if not is_plain(head) or _hooked(head):
        yield from unembed(model, normed).split(width, -1)
        return
    weight, added = parameter(head), bias_of(head)
    for start in range(0, len(weight), width):
        yield _of_rows(model, normed, weight, added, slice(start, start + width))


def few_logits(head: nn.Linear, tokens: slice | Tensor) -> Callable[[Tensor], Tensor]:
    """A forward in the place of a plain head's own, for these tokens alone."""
    weight, added = parameter(head), bias_of(head)
    tokens = tokens if isinstance(tokens, slice) else tokens.to(weight.device)
    rows, of_rows = weight[tokens].detach(), None if added is None else added[tokens].detach()
    return lambda x: nn.functional.linear(x.to(rows.device), rows, of_rows)


def finished(model: Any, logits: Tensor) -> Tensor:
    """What the head gives, with the family's scales and cap."""
    if scale := _factor(model, "logit_scale"):
        logits = logits * scale
    if scaling := _factor(model, "logits_scaling"):
        logits = logits / scaling
    if cap := cap_of(model.config.get_text_config()):
        logits = torch.tanh(logits / cap) * cap
    return logits


def cap_of(config: Any) -> float | None:
    """What no logit is above, in families that bend them; by all names that configs have for it."""
    return next((cap for name in CAPS if (cap := getattr(config, name, None))), None)


def is_plain(head: Any) -> bool:
    """Whether a head's own forward is a product with its matrix and no more, so that some rows give some logits."""
    return type(head) is nn.Linear and runs_own_forward(head) and is_numbers(head.weight)


def _hooked(head: nn.Module) -> bool:
    """Whether others look at, or change, what the head takes or gives."""
    return bool(head._forward_hooks or head._forward_pre_hooks)


def scale_of(model: Any) -> float:
    """The factor between unembedding and logits, before a cap."""
    return float(_factor(model, "logit_scale") or 1) / float(_factor(model, "logits_scaling") or 1)


def _factor(model: Any, word: str) -> float | None:
    """What a config says of the logits, where the model's code knows the word (MPT's has one that it leaves be)."""
    said, kind = getattr(model.config.get_text_config(), word, None), cast(Any, type(model))
    return said if said is not None and _knows(kind, word) else None


@cache
def _knows(kind: type, word: str) -> bool:
    return any(word in (*code.co_names, *code.co_consts) for code in own_code(kind))


def project(atlas: Atlas, z: Tensor, layer: int, added: bool) -> Tensor:
    """What the attention of a layer gives `[… d_model]` for heads `[… head d_head]`; see `Model.project`."""
    heads, end = (atlas.select(Site(name, layer))[0] for name in ("z", "attn_out"))
    assert heads.module is not None and heads.read is not None and end.read is not None
    projected = called(heads.module, z.flatten(-2))
    if not added:
        return projected
    if not f"{heads.read.module}.".startswith(f"{end.read.module}."):  # neither attention nor its last projection
        assert end.module is not None
        projected = end.module(projected)
    layout = end.read.layout
    return projected if layout is None else projected * layout.factor + layout.bias


def demand_width(what: str, value: Any, *ends: int) -> None:
    """Refuse what is no tensor of numbers that ends in these sizes.

    Raises:
        PlanError: saying what it is.
    """
    wanted = f"a tensor of numbers [… {' '.join(map(str, ends))}]"
    if not isinstance(value, Tensor):
        raise PlanError(wrong(what, wanted, value))
    if tuple(value.shape[-len(ends) :]) != ends or not value.is_floating_point():
        raise PlanError(f"{what} takes {wanted}, not {value.dtype} {list(value.shape)}")


def demand_tokens(tokens: Any, d_vocab: int) -> None:
    """Refuse what names no tokens.

    Raises:
        PlanError: saying what it is, or the first id that there is not.
    """
    if tokens is None or isinstance(tokens, slice):
        return
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64):
        raise PlanError(wrong("unembed(tokens=…)", "a slice or a tensor of ids [token]", tokens))
    bad = tokens[(tokens < 0) | (tokens >= d_vocab)]
    if len(bad):
        raise PlanError(f"no token id {int(bad[0])}, there are {d_vocab}, 0 to {d_vocab - 1}")
