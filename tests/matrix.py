"""One row of the matrix of types and engines: what is served, what holds it, and what is missing for which reason."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from mixtures import MIXTURES, SHARING, mixture_of, shared_by_hand
from mixtures import by_hand as routed_by_hand
from parity import IDS, apart, cell
from reference import Reference
from torch import Tensor
from type_layouts import LAYOUT

import interp_core as ic
from interp_core import testing
from interp_core.compatibility import matrix
from interp_core.sites import SITES, Site

FAR = 1e-4
"""Types that compute attention, routers or logits in float32 round there, and edits carry it on; a fault is far more."""
ABSENT = (
    "has no vision tower", "has no DeepStack", "has no mixture-of-experts router", "has no gate on a shared expert",
    "is a mixture of experts; see expert_out", "blocks are parallel", "no rotary", "inside latent attention",
    "has a projection that gates", "keeps a state beside keys", "is softmax attention; what mixes", "inside its scan",
    "no final norm that is known", "the last block norms", "unembeds the stream", "lie between the last stream", "it has no MLP",
    "has both a mixer and an MLP", "nothing of it is added to the stream",
)  # fmt: skip
"""Reasons why a model does not have a site at all, as opposed to sites that cannot be reached."""
ROUTED = ("router_logits", "router_probs", "router_weights", "router_indices", "shared_expert_gate", "expert_out")


def row(model_type: str, engine: str, **config: Any) -> dict[str, Any]:
    """What one engine makes of a tiny model of a type, with settings of its config: `word` and `why`, the sites that
    are `held` by hooks written by hand (at most `off`), `unheld`, `false` (further off than rounding) and `missing` by reason. Errors that are not ours
    are raised: a load must not die of them."""
    try:
        hf = testing.tiny(model_type, dtype=torch.float64, **config)
    except ic.LoadError as error:
        return {"word": "not built", "why": said(error)}
    try:
        hf.set_attn_implementation("eager")
    except (ValueError, KeyError):  # attention of one kind alone
        pass
    try:
        model = ic.load(hf, engine=engine)
    except ic.InterpError as error:
        if "in torch.float64: " not in str(error):
            return {"word": "refused", "why": said(error), "class": type(hf).__name__}
        try:  # parts of it are float32 whatever the model's dtype
            model = ic.load(hf.float(), engine=engine)
        except ic.InterpError as again:
            return {"word": "refused", "why": said(again), "class": type(hf).__name__}
    held = dict(distances(model, model_type))
    served = [name for name, info in SITES.items() if not (info.visual or info.tower) and model.atlas.layers(name)]
    missing: dict[str, list[str]] = {}
    for name, why in model.atlas.lacking.items():
        of_text = name in SITES and not (SITES[name].visual or SITES[name].tower)
        if of_text and not any(word in why for word in ABSENT):
            missing.setdefault(why, []).append(name)
    partly: dict[tuple[str, str], list[int]] = {}
    for (name, layer), why in model.atlas.withdrawn.items():
        if name in served:
            partly.setdefault((name, why), []).append(layer)
    for (name, why), layers in partly.items():
        missing.setdefault(f"not in layers {layers}, {why}", []).append(name)
    for name in served:
        if "self-check" in (why := str(model.can(name, "write") or "")):
            missing.setdefault(f"not to be edited, {why}", []).append(name)
    unheld = [name for name in served if name not in held]
    false = [name for name, off in held.items() if off > FAR]
    cell = {
        "word": "partial" if unheld or missing or false else "verified",
        "class": type(hf).__name__,
        "held": " ".join(held),
        "off": float(f"{max(held.values(), default=0.0):.0e}"),
        "unheld": " ".join(unheld),
        "false": " ".join(false),
        "missing": {why: " ".join(names) for why, names in missing.items()},
    }
    return {key: part for key, part in cell.items() if part}


def said(error: Exception) -> str:
    """What an error says, in a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:240].rpartition(" ")[0] + " …"


def distances(model: ic.Model, model_type: str) -> Iterator[tuple[str, float]]:
    """How far reads and edits are from those of hooks written by hand, by site, where these are written."""
    reference = Reference(model_type, model.hf) if model_type in LAYOUT else None
    if reference is not None:
        for site in reference.sites():
            if model.can(site, "read"):
                continue
            try:
                yield site, max(cell(model, reference, site, edit=not model.can(site, "write")))
            except AttributeError:  # another transformers than the layouts are written for calls a module otherwise
                if version("transformers") == matrix()["versions"]["transformers"]:
                    raise
    name = mixture_of(model_type, model.atlas.family.name)
    if name and MIXTURES[name].blocks in dict(model.hf.named_modules()):
        yield from routed(model, f"{MIXTURES[name].blocks}.{{}}.{MIXTURES[name].experts}", name)
    elif reference is not None and "experts" in reference.layout:
        yield from routed(model, f"{reference.layout['blocks']}.{{}}.{reference.layout['experts']}", "")


def routed(model: ic.Model, experts: str, family: str) -> Iterator[tuple[str, float]]:
    """The same for routers: weights by hand from the logits (of a family in `mixtures`), probabilities that sum to one,
    experts that add up to what their module (a path with the layer left open) gives."""
    atlas = model.atlas
    names = [name for name in ROUTED if atlas.layers(name)]
    given: dict[int, Tensor] = {}
    handles = [
        model.hf.get_submodule(experts.format(layer)).register_forward_hook(
            lambda _m, _a, out, layer=layer: given.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
        for layer in atlas.layers("expert_out")
    ]
    gates = experts.rpartition(".")[0] + ".shared_expert_gate"
    gated: dict[int, Tensor] = {}
    handles += [
        model.hf.get_submodule(gates.format(layer)).register_forward_hook(
            lambda _m, _a, out, layer=layer: gated.__setitem__(layer, out.sigmoid())
        )
        for layer in atlas.layers("shared_expert_gate")
        if family not in SHARING
    ]
    try:
        with torch.no_grad():
            model.hf(input_ids=IDS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    run = model.run(IDS, read=[Site(name, layer) for name in names for layer in atlas.layers(name)])
    for name in names:
        off: list[float] = []
        for layer in atlas.layers(name):
            x = run[Site(name, layer)].plain.double()
            if name in ("router_logits", "router_weights") and family and layer in atlas.layers("router_logits"):
                logits = run[Site("router_logits", layer)].plain
                weights = run[Site("router_weights", layer)].plain.double()
                off.append(apart(weights - routed_by_hand(family, model.hf, layer, logits, IDS)))
            elif name == "router_probs":
                off.append(apart(x.sum(-1) - 1))
            elif name == "router_indices":
                weights = run[Site("router_weights", layer)].plain.double()
                off.append(apart(weights.scatter(-1, x.long(), 0.0)))
            elif name == "expert_out":
                total = given[layer].reshape(-1, *x.shape[:2], x.shape[-1]).sum(0)  # Llama 4 gives each expert's
                off.append(apart(x.sum(2) - total) / apart(total))
            elif name == "shared_expert_gate" and family in SHARING:
                logits, weights = (run[Site(f"router_{part}", layer)].plain for part in ("logits", "weights"))
                off.append(apart(x - shared_by_hand(family, model.hf, layer, logits, weights, IDS)))
            elif name == "shared_expert_gate":
                off.append(apart(x - gated[layer].view_as(x)))
        if off:  # what nothing was compared with is not held
            yield name, max(off)
