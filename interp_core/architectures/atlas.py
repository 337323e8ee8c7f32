"""The atlas: which sites a given model has, with what shapes, and the hook points that reach them.

It is data about one model: `locate.py` fills it, an engine fits it to itself (`Engine.adapt`), the self-check withdraws
what does not hold. A plan is compiled by it alone, so what it lacks is refused before a pass, with the reason that it
gives; `print(model.sites)` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import CapabilityError, SiteError
from ..indexing import indices
from ..sites import SITES, VISION_, Site
from .components import Components
from .family import Family
from .hook_points import HookPoint
from .reach import Reach

CAUSAL = "causal"
"""What is lacking, with the reason, where positions see later ones."""
ROUTED = ("router_logits", "router_probs", "router_weights", "router_indices", "shared_expert_gate", "expert_out")
"""Sites that only mixtures of experts have."""
OF_ATTENTION = ("attn_in", "attn_out", "q", "k", "v", "rot_q", "rot_k", "scores", "pattern", "z", "head_out")
"""Sites that only attention has."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in TransformerLens' words.

    Attributes:
        d_vocab: how many tokens it has logits of; of a classifier, how many labels.
        n_labelled: of a classifier, how many tokens it can be given; else 0, and they are `d_vocab`.
    """

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int | None
    n_labelled: int = 0

    @cached_property
    def n_ids(self) -> int:
        """How many tokens it can be given."""
        return self.n_labelled or self.d_vocab


class Entry:
    """One site in one layer (layer 0 for sites without layers).

    Attributes:
        read, write: hook points, None where `why` says why not.
        sizes: sizes of the feature axes by name (`head`, `d_head`, `d_model`, …).
        n_units: how many heads, experts or neurons there are.
        why: reasons by what is missing (`read`, `write`, `grad`).
        module: the module whose input or output it is, where it is one.
        view: how the site's value lies in what that module gives or takes (None: as it is).
        visual: its positions are the visual tokens.
        tower: it lies in the vision tower.
        overwritten: the model writes into the tensor after it passed; reads keep a copy.
        wide: the family may compute it in float32 whatever the model's dtype.
        order: when a forward pass meets it in its layer; that of its name but for families in which it differs.
    """

    __slots__ = (
        "layer", "module", "n_units", "name", "order", "overwritten", "read", "sizes", "tower", "view",
        "visual", "why", "wide", "write",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        layer: int,
        read: HookPoint | None,
        write: HookPoint | None,
        sizes: Mapping[str, int],
        why: dict[str, str] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.name, self.layer, self.read, self.write, self.sizes = name, layer, read, write, sizes
        unit = SITES[name].unit
        self.n_units = None if unit is None else sizes[unit]
        self.why, self.module, self.view = why or {}, module, None if read is None else read.view
        info = SITES[name]
        self.visual, self.tower = info.visual, info.tower
        self.wide = name.startswith("router") or (read is not None and read.side == "own")
        self.overwritten, self.order = False, info.order


class Atlas:
    """The sites of one model.

    Attributes:
        family: name of the family, `config.model_type`.
        shape: sizes of the model.
        tower: number of layers of its vision tower.
        config: the model's whole config.
        components: modules by TransformerLens' names of components.
        reaches: per layer with heads, how far its queries look.
        looks_back: every attention module says of itself that it looks back only.
        entries: `(name, layer)` to entry, for everything that exists in this model.
        lacking: site names that the whole model lacks, with the reason; also `readout`, `left padding` and `right
            padding`, where the model cannot have those.
        withdrawn: `(name, layer)` of what an engine or the self-check has taken out, with the reason.
        blind_behind: how many columns of padding behind a text make a query that sees nothing of it, where such a query
            is NaN.
        notes: what a user should know of this model.
        processes: the group of processes between which the model is shared out, if it is.
    """

    def __init__(self, family: Family, shape: Shape, config: Any) -> None:
        self.family, self.shape, self.config, self.tower = family, shape, config, 0
        self.entries: dict[tuple[str, int], Entry] = {}
        self.components = Components(family.name, shape.n_layers)
        self.reaches: dict[int, Reach] = {}
        self.looks_back = True
        self.blind_behind: int | None = None
        self.lacking: dict[str, str] = {}
        self.withdrawn: dict[tuple[str, int], str] = {}
        self.notes: list[str] = []
        self.processes: Any = None

    def layers(self, name: str) -> list[int]:
        """Layers that have the site."""
        return [layer for site, layer in self.entries if site == name]

    def module(self, component: str, layer: int | None = None) -> nn.Module:
        """The module of a component; see `Structure.module`."""
        return self.components.get(component, layer)

    @property
    def final_norm(self) -> nn.Module:
        """What the last stream passes before the unembedding, where there is a readout: nothing, if the last block has
        normed it."""
        entry = self.entries.get(("final_norm", 0))
        return nn.Identity() if entry is None or entry.module is None else entry.module

    def select(self, site: Site) -> list[Entry]:
        """The entries that a site names.

        Raises:
            SiteError: a layer that does not exist, or that lacks the site.
            CapabilityError: the family lacks the site.
        """
        # Nearly every site names one layer, and then its key is that of its entry.
        if (entry := self.entries.get((site.name, site.layers))) is not None:  # type: ignore[arg-type]
            return [entry]
        if site.name in self.lacking:
            raise CapabilityError(f"{site}: {self.lacking[site.name]}{self._beside(site.name)}")
        if not site.info.layered:
            return [self.entries[site.name, 0]]
        having = self.layers(site.name)
        if site.layers is None:
            return [self.entries[site.name, layer] for layer in having]
        counted = len(having) if site.info.visual else self.shape.n_layers  # what a vision tower hands over is apart
        counted = self.tower if site.info.tower else counted
        layers = indices(site.layers, counted, "layer", site)
        if missing := [layer for layer in layers if (site.name, layer) not in self.entries]:
            shown = ", ".join(map(str, having))
            why = f" ({self.withdrawn[site.name, missing[0]]})" if (site.name, missing[0]) in self.withdrawn else ""
            raise SiteError(f"{site}: layer {missing[0]} has no {site.name}{why}; layers {shown} have")
        return [self.entries[site.name, layer] for layer in layers]

    def _beside(self, name: str) -> str:
        """For a message about a vision tower's site that is not there: that the language model has such a site."""
        same = name.removeprefix(VISION_)
        return f"; {same} is its language model's" if same != name and self.layers(same) else ""

    def note_reach(self, *, ahead: bool) -> None:
        """Note whether positions see later ones, as in an encoder, or do not: attention modules do not always say."""
        self.lacking.pop(CAUSAL, None)
        if ahead:
            self.lacking[CAUSAL] = (
                f"positions of this {self.family.name} see later ones too, so its logits at a position are of the "
                "token there, not of the next one"
            )
        self.reaches = {layer: reach._replace(causal=not ahead) for layer, reach in self.reaches.items()}

    def drop(self, name: str, why: str, layers: Sequence[int] = ()) -> None:
        """Take a site out of the atlas, in some layers or all (())."""
        for layer in self.layers(name):
            if not layers or layer in layers:
                del self.entries[name, layer]
                self.withdrawn[name, layer] = why
        if not self.layers(name):
            self.lacking[name] = why
