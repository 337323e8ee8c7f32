"""The gate before attribution: what a model adds to its residual stream must add up.

    resid_pre[l] + mixer_out[l] + mlp_out[l] = resid_post[l]

Everything here stands on it: a method that shares out what mixers and MLPs add would share out something else.
(`mixer_out` is `attn_out`, or what else mixes tokens in that layer.)

Cost: once per model, a pass over the first few tokens of the text. Must equal: the model's own stream, to rounding.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

import interp_core as ic
from interp_core import sites as S

TOKENS = 16
"""How many tokens of a text are looked at: an equation that fails does so at each."""
RESIDUE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""How much may be left over, in parts of the stream's norm: a few roundings of its terms."""

_PASSED: WeakKeyDictionary[ic.Model, tuple[object, ...]] = WeakKeyDictionary()
"""Models that have passed, each with its self-check and what was laid over its modules then: one that has changed is
looked at anew."""


def demand_additive(owner: str, model: ic.Model, tokens: ic.Tokens) -> None:
    """Refuse a model whose contributions do not add up.

    Args:
        tokens: one row; with further inputs (images) all of it is looked at.

    Raises:
        CapabilityError: naming the site that is missing, or the layer and what is left over.
    """
    parts = [name for name in ("mixer_out", "mlp_out") if model.layers(name)]
    for name in ("resid_pre", "resid_post", *(("mixer_out", "mlp_out") if not parts else ())):
        if not model.layers(name):
            raise ic.CapabilityError(f"{owner} shares out what is added to the stream: {model.can(name, 'read')}")
    # looked at once per model, until it is checked anew or a module's forward or hooks are others
    now = (id(model.check), *_changes(model))
    if model.check is not None and _PASSED.get(model) == now:
        return
    # a few tokens tell; a row with images cannot be cut
    few = tokens if tokens.inputs else ic.Tokens(tokens.ids[:, :TOKENS], tokens.mask[:, :TOKENS])
    limit = RESIDUE.get(model.dtype, 1e-4)
    reads = [site for site in (S.resid_pre, S.mixer_out, S.mlp_out, S.resid_post) if model.layers(site)]

    def look(layer: int, values: ic.LayerReadings) -> None:
        terms = [site for site in (S.mixer_out, S.mlp_out) if layer in model.layers(site)]
        before, after = values[S.resid_pre].double(), values[S.resid_post].double()
        added = sum(values[site].double() for site in terms)
        residue = float(((before + added - after).norm(dim=-1) / after.norm(dim=-1).clamp_min(1e-30)).max())
        if not residue <= limit:
            sums = " + ".join(["resid_pre", *(site.name for site in terms)])
            why = "".join(f"; {_lacking(model, name, layer)}" for name in parts if layer not in model.layers(name))
            raise ic.CapabilityError(
                f"{owner} shares out what is added to the stream, and in layer {layer} of {model.source} it does not "
                f"add up: {sums} is off resid_post by {residue:.1e} of its norm (at most {limit:.0e} in "
                f"{str(model.dtype).removeprefix('torch.')}){why}; see `interp sites` for what this model has"
            )

    model.run(few, read=reads, logits=False, each=look)
    _PASSED[model] = now


def _changes(model: ic.Model) -> list[object]:
    """What was laid over single modules: other forwards, and hooks."""
    over = ((m.__dict__.get("forward"), m._forward_hooks, m._forward_pre_hooks) for m in model.hf.modules())
    return [(place, f, *h.values(), *p.values()) for place, (f, h, p) in enumerate(over) if f or h or p]


def _lacking(model: ic.Model, name: str, layer: int) -> str:
    """Why a layer does not have a site that others have, as the self-check says."""
    try:
        model.sizes(getattr(S, name)[layer])
    except ic.SiteError as error:
        return str(error)
    return ""
