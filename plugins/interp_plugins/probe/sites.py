"""What a probe reads: the residual stream, or any site along batch and pos, layer by layer or unit by unit.

    the stream   resid_pre[0] … resid_pre[L-1], resid_post[L-1]
    a site       its layers; by="unit" every head (or expert) of them by itself

Source: this package.
"""

from __future__ import annotations

from typing import Literal

import interp_core as ic
from interp_core import sites as S

By = Literal["layer", "unit"]


def probed(model: ic.Model, site: str | None, by: By) -> tuple[S.Site, ...]:
    """Sites in one layer each, in the order of the layers.

    Raises:
        SiteError: there is no such site or layer.
        CapabilityError: the model lacks it.
        PlanError: it has positions of its own, other axes, or widths that differ.
    """
    if site is None:
        return (
            *(S.resid_pre[layer] for layer in model.layers(S.resid_pre)),
            S.resid_post[model.layers(S.resid_post)[-1]],
        )
    asked_for = S.Site.parse(site)
    if asked_for.pos is not None or asked_for.key is not None:
        raise ic.PlanError(f"probe: site={site!r} has a position; positions=(…) say where to read")
    if asked_for.info.axes[:2] != ("batch", "pos") or not asked_for.info.layered:
        raise ic.PlanError(
            f"probe: {asked_for.name} is [{' '.join(asked_for.info.axes)}]; take a site of layers [batch pos …]: "
            "resid_mid, attn_out, mlp_out, z, mlp_act and the like"
        )
    if why := model.can(asked_for.name, "read"):
        raise ic.CapabilityError(f"probe: {why}")
    whole, unit = S.named(asked_for.name), asked_for.info.unit
    if by == "unit" and unit is None:
        raise ic.PlanError(f"probe: by='unit' of {asked_for.name}, which has no heads or experts; leave by= out")
    sites: list[S.Site] = []
    for layer in model.layers(asked_for):
        if by == "unit" and unit is not None:
            count = model.sizes(whole[layer])[unit]
            sites += [whole[layer, i] for i in S.indices(asked_for.units, count, unit, site)]
        else:
            sites.append(whole[layer] if asked_for.units is None else whole[layer, asked_for.units])
    widths = {tuple(model.sizes(S.named(one_layer.name)[one_layer.layers]).values()) for one_layer in sites}
    if len(widths) > 1:
        raise ic.PlanError(
            f"probe: {site} differs in width between layers; give layers that are alike: '{asked_for.name}[0]'"
        )
    return tuple(sites)
