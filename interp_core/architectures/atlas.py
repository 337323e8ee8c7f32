"""The atlas: which sites a given model has, with what shapes, and the taps that reach them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CapabilityError, LoadError, SiteError, nearest
from ..indexing import indices
from ..sites import SITES, VISION_, Site
from . import hook_points
from .components import ENDS, Components
from .family import Family, Heads, Place, View, split_heads
from .hook_points import HookPoint, Layout, Side
from .reach import Reach
from .towers import last_used
from .undescribed import UNDESCRIBED, discover

ROUTED = ("router_logits", "router_probs", "router_weights", "router_indices", "shared_expert_gate", "expert_out")
"""Sites that only mixtures of experts have."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in TransformerLens' words."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int | None


class Entry:
    """One site in one layer (layer 0 for sites without layers).

    Attributes:
        read, write: taps, None where `why` says why not.
        sizes: sizes of the feature axes by name (`head`, `d_head`, `d_model`, …).
        n_units: how many heads, experts or neurons there are.
        why: reasons by what is missing (`read`, `write`, `grad`).
        module: the module whose input or output it is, where it is one.
        view: how the site's value lies in what that module gives or takes (None: as it is).
        visual: its positions are the visual tokens.
        tower: it lies in the vision tower.
        overwritten: the model writes into the tensor after it passed; reads keep a copy.
        wide: the family may compute it in float32 whatever the model's dtype.
    """

    __slots__ = (
        "layer", "module", "n_units", "name", "overwritten", "read", "sizes", "tower", "view",
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
        self.visual, self.tower, self.wide = info.visual, info.tower, name.startswith("router")
        self.overwritten = False


class Atlas:
    """The sites of one model.

    Attributes:
        family: name of the family, `config.model_type`.
        shape: sizes of the model.
        tower: number of layers of its vision tower.
        config: the model's whole config.
        components: modules by TransformerLens' names of components.
        reaches: per layer with heads, how far its queries look.
        entries: `(name, layer)` to entry, for everything that exists in this model.
        lacking: site names that the whole model lacks, with the reason; also `readout`, `left padding` and `right
            padding`, where the model cannot have those.
        withdrawn: `(name, layer)` of what was taken out later, with the reason.
        notes: what a user should know of this model.
    """

    def __init__(self, family: Family, shape: Shape, config: Any) -> None:
        self.family, self.shape, self.config, self.tower = family, shape, config, 0
        self.entries: dict[tuple[str, int], Entry] = {}
        self.components = Components(family.name, shape.n_layers)
        self.reaches: dict[int, Reach] = {}
        self.lacking: dict[str, str] = {}
        self.withdrawn: dict[tuple[str, int], str] = {}
        self.notes: list[str] = []

    def layers(self, name: str) -> list[int]:
        """Layers that have the site."""
        return [layer for site, layer in self.entries if site == name]

    def module(self, component: str, layer: int | None = None) -> nn.Module:
        """The module of a component; see `Structure.module`."""
        return self.components.get(component, layer)

    def select(self, site: Site) -> list[Entry]:
        """The entries that a site names.

        Raises:
            SiteError: a layer that does not exist, or that lacks the site.
            CapabilityError: the family lacks the site.
        """
        if (one := self.entries.get((site.name, site.layers))) is not None:  # type: ignore[arg-type]
            return [one]
        if site.name in self.lacking:
            raise CapabilityError(f"{site}: {self.lacking[site.name]}{self._beside(site.name)}")
        if not site.info.layered:
            return [self.entries[site.name, 0]]
        having = self.layers(site.name)
        if site.layers is None:
            return [self.entries[site.name, layer] for layer in having]
        counted = len(having) if site.info.visual else self.shape.n_layers  # what a vision tower hands over is apart
        counted = self.tower if site.info.tower else counted
        asked = indices(site.layers, counted, "layer", site)
        if missing := [layer for layer in asked if (site.name, layer) not in self.entries]:
            shown = ", ".join(map(str, having))
            why = f" ({self.withdrawn[site.name, missing[0]]})" if (site.name, missing[0]) in self.withdrawn else ""
            raise SiteError(f"{site}: layer {missing[0]} has no {site.name}{why}; layers {shown} have")
        return [self.entries[site.name, layer] for layer in asked]

    def _beside(self, name: str) -> str:
        """The site of the language model that is what a vision tower's would be."""
        same = name.removeprefix(VISION_)
        return f"; {same} is its language model's" if same != name and self.layers(same) else ""

    def drop(self, name: str, why: str, layers: Sequence[int] = ()) -> None:
        """Take a site out of the atlas, in some layers or all (())."""
        for layer in self.layers(name):
            if not layers or layer in layers:
                del self.entries[name, layer]
                self.withdrawn[name, layer] = why
        if not self.layers(name):
            self.lacking[name] = why


@cache
def known_paths() -> dict[str, dict[str, str]]:
    """Module paths by Hugging Face class name, from TransformerLens' adapters."""
    return json.loads(Path(__file__).with_name("paths.json").read_text())


def build(model: Any, family: Family | None) -> Atlas:
    """The atlas of a Hugging Face model.

    Raises:
        LoadError: no transformer blocks in it.
    """
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    known = known_paths().get(type(model).__name__)
    shown = known or discover(modules, model.get_input_embeddings())
    paths = {**shown, **(family.paths if family else {})}
    if paths.get("blocks") not in modules:  # a language model inside another, where its own file has it elsewhere
        paths |= {key: path for key, path in shown.items() if not key.startswith("blocks.")}
    if paths.get("blocks") not in modules:
        raise LoadError(
            f"{type(model).__name__} shows no list of transformer blocks; interp_core works on decoder-only "
            "transformers. For another layout write a family file, see docs/families.md."
        )
    unnamed = family is None
    undescribed = {} if family and family.router else router_reason(model, modules)
    family = family or Family(str(model.config.model_type))
    blocks = modules[paths["blocks"]]
    shape = Shape(
        n_layers=len(list(blocks.children())),
        d_model=config.hidden_size,
        d_vocab=model.get_output_embeddings().weight.shape[0],
        n_ctx=getattr(config, "max_position_embeddings", None),
    )
    atlas = Atlas(family, shape, model.config)
    if known is None and unnamed:
        atlas.notes.append(
            f"the family {family.name!r} is unknown: sites found by module names, those of heads only where these show"
        )
    builder = _Builder(atlas, modules, paths, config)
    if known is None and unnamed:
        builder.refused["resid_mid"] = "module names do not show where the stream passes between attention and MLP"
    for layer in range(shape.n_layers):
        builder.block(layer)
    builder.ends()
    tower = _tower(atlas, modules)
    atlas.components.add("unembed", None, model.get_output_embeddings())
    atlas.components.add("embed", None, model.get_input_embeddings())
    _explain(atlas, undescribed | builder.refused | tower, builder.parallel)
    return atlas


def _tower(atlas: Atlas, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Fill in the sites of a vision tower, which is a stack of blocks as the language model is one.

    Returns:
        Reasons why sites are lacking.
    """
    family, config = atlas.family.tower, getattr(atlas.config, "vision_config", None)
    names = [name for name, info in SITES.items() if info.tower]
    if config is None:
        return dict.fromkeys(names, f"this {atlas.family.name} has no vision tower")
    blocks = [] if family is None else [p for p in family.paths["blocks"].split("|") if p in modules]
    if family is None or not blocks:
        why = f"no family file describes the vision tower of this {atlas.family.name}, see docs/families.md"
        return dict.fromkeys(names, why)
    builder = _Builder(atlas, modules, {**family.paths, "blocks": blocks[0]}, config, family)
    atlas.tower = len(list(modules[blocks[0]].children()))
    for layer in range(atlas.tower):
        builder.block(layer)
    if place := builder.places.get("pre_merger"):
        builder.view("pre_merger", 0, builder.tap(place.module, place.side), builder.d_model)
    last = last_used(atlas.config, atlas.tower)
    unread = f"this {atlas.family.name} takes what it sees from layer {last} of its tower: later ones change nothing"
    for (name, layer), entry in atlas.entries.items():
        if SITES[name].tower and SITES[name].layered and layer > last:
            entry.write, entry.why = None, {"write": unread, "grad": unread}
    return {VISION_ + name: why for name, why in builder.refused.items()}


class _Builder:
    """Fills an atlas from module paths.

    Args:
        tower: of a vision tower's blocks, what the atlas must know of them.
    """

    def __init__(
        self, atlas: Atlas, modules: Mapping[str, nn.Module], paths: Mapping[str, str], config: Any,
        tower: Family | None = None,
    ) -> None:  # fmt: skip
        self.atlas, self.modules, self.paths, self.config = atlas, modules, paths, config
        self.text, self.components = tower is None, atlas.components if tower is None else Components("", 0)
        self.prefix, self.layout = ("" if self.text else VISION_), (None if self.text else Layout(images=True))
        family = self.family = tower or atlas.family
        self.parallel = family.parallel(config) if family.parallel else "parallel" in paths
        self.places = family.places(config) if callable(family.places) else family.places
        self.d_model = {"d_model": atlas.shape.d_model}
        self.refused = refusals(family, config if self.text else atlas.config)
        if not self.text:
            out = self._components(f"{paths['blocks']}.0")["attn.o"]
            self.d_model = {"d_model": hook_points.out_features(modules[out])}

    def tap(self, module: str, side: Side, *, flat: bool = False, view: View | None = None) -> HookPoint:
        """A tap at a module, as tensors pass there."""
        return HookPoint(module, side, view=view, layout=Layout(flat=True) if flat else self.layout)

    def placed(self, block: str, place: Place) -> HookPoint:
        """A tap at a place in a block."""
        return self.tap(f"{block}.{place.module}", place.side, flat=place.flat)

    def ends(self) -> None:
        for name, component in (("embed", "embed"), ("final_norm", "ln_final")):
            if (path := self.paths.get(component)) in self.modules:
                self.view(name, 0, HookPoint(str(path), "out"), self.d_model)
        for component in ENDS:
            if (path := self.paths.get(component)) in self.modules:
                self.atlas.components.add(component, None, self.modules[str(path)])
        self._vision()
        tap = hook_points.logits()
        why = {"grad": "the score is a function of the logits already; differentiate it by hand"}
        self._add(Entry("logits", 0, tap, tap, {"d_vocab": self.atlas.shape.d_vocab}, why))

    def _vision(self) -> None:
        """What a vision tower hands over: it arrives as arguments of the language model."""
        vision = getattr(self.atlas.config, "vision_config", None)
        language = self.paths["blocks"].rpartition(".")[0]
        arguments = inspect.signature(self.modules[language].forward).parameters
        if vision is None or hook_points.EMBEDDINGS not in arguments:
            return
        self.view("vision_embed", 0, HookPoint(language, "in", hook_points.EMBEDDINGS), self.d_model)
        if hook_points.DEEPSTACK in arguments:
            for layer in range(len(vision.deepstack_visual_indexes)):
                tap = hook_points.deepstack(language, layer)
                why = {"grad": "it is computed beside the forward pass"}
                self._add(Entry("deepstack", layer, tap, tap, self.d_model, why))

    def block(self, layer: int) -> None:
        block = f"{self.paths['blocks']}.{layer}"
        found = self._components(block)
        self.components.add("block", layer, self.modules[block])
        self.components.add_block(layer, found, self.modules)
        self.view("resid_pre", layer, self.tap(block, "in"), self.d_model)
        self.view("resid_post", layer, self.tap(block, "out"), self.d_model)
        if attn := found.get("attn", found.get("linear_attn")):
            attn_out = self._added("attn_out", block, found.get("ln1_post", attn))
            place = self.places.get("attn_in")
            self.view("attn_in", layer, self.placed(block, place) if place else self.tap(attn, "in"), self.d_model)
            self.view("attn_out", layer, attn_out, self.d_model)
            if not self.parallel:
                self._between(layer, block, attn_out, found)
        if attn := found.get("attn"):
            self._heads(layer, attn, found)
        self._mlp(layer, block, found)
        self._router(layer, block)

    def _components(self, block: str) -> dict[str, str]:
        """Module paths of the components that this block has."""
        found, own = {}, self.family.varied
        for key, names in {**self.paths, **(own(self.modules[block]) if own else {})}.items():
            if key.startswith("blocks."):
                paths = (self._inside(block, key, name) for name in names.split("|"))
                if path := next((path for path in paths if path in self.modules), None):
                    found[key.removeprefix("blocks.")] = path
        return found

    def _inside(self, block: str, key: str, name: str) -> str:
        parts = key.split(".")
        if len(parts) > 2:
            parent = self.paths.get(".".join(parts[:-1]))
            return f"{block}.{parent}.{name}" if parent else f"{block}.{name}"
        return f"{block}.{name}"

    def _added(self, name: str, block: str, module: str, *, flat: bool = False) -> HookPoint:
        """What is added to the stream: what a module gives, times the block's factor."""
        if place := self.places.get(name):
            module, flat = f"{block}.{place.module}", place.flat
        factors = self.family.added(self.modules[block]) if self.family.added else {}
        layout = Layout(flat, factors.get(name, 1.0), images=not self.text)
        return HookPoint(module, "out", layout=layout if layout.flat or layout.scaled or layout.images else None)

    def _between(self, layer: int, block: str, attn_out: HookPoint, found: Mapping[str, str]) -> None:
        """The stream between attention and MLP. What a module gives is the stream itself; what a module reads is
        a use of it beside others, so there changes go in by `attn_out`."""
        place, module = self.places.get("resid_mid"), found.get("ln2", found.get("mlp"))
        if place is None and (module is None or "mlp" not in found):
            return
        tap = self.placed(block, place) if place else self.tap(str(module), "in")
        if tap.side == "out":
            self.view("resid_mid", layer, tap, self.d_model)
            return
        why = {"grad": "the stream also goes on past the module where it is read"} if tap.layout else None
        join = partial(self.family.join, self.modules[block], "resid_mid") if self.family.join else None
        write = hook_points.resid_mid(self.tap(block, "in"), attn_out, join)
        self._add(Entry(f"{self.prefix}resid_mid", layer, tap, write, self.d_model, why))

    def _mlp(self, layer: int, block: str, found: Mapping[str, str]) -> None:
        where: dict[str, HookPoint] = {}
        mlp = found.get("mlp")
        if mlp:
            where["mlp_in"] = self.tap(mlp, "in")
        if mlp or "mlp_out" in self.places:
            router = self.family.router
            flat = router is not None and router.flat and f"{block}.{router.module}" in self.modules
            where["mlp_out"] = self._added("mlp_out", block, found.get("ln2_post", str(mlp)), flat=flat)
        if out := found.get("mlp.out") or found.get("mlp.dense_out"):
            where["mlp_act"] = self.tap(out, "in")
        for name in ("mlp_in", "mlp_act"):
            if name in self.places:
                where[name] = self.placed(block, self.places[name])
        for name, tap in where.items():
            sizes = {"d_mlp": hook_points.in_features(self.modules[tap.module])} if name == "mlp_act" else self.d_model
            self.view(name, layer, tap, sizes)

    def _heads(self, layer: int, attn: str, found: Mapping[str, str]) -> None:
        module, family = self.modules[attn], self.family
        heads = self._head_counts(module, found)
        if heads is None:
            return
        q, k = ({"head": n, "d_head": heads.d_key or heads.d_head} for n in (heads.n_heads, heads.n_kv_heads))
        v, z = ({"head": n, "d_head": heads.d_head} for n in (heads.n_kv_heads, heads.n_heads))
        for part, sizes in (("q", q), ("k", k), ("v", v)):
            if part in family.inside:
                self.view(part, layer, HookPoint(attn, "attention", part, view=hook_points.transposed), sizes)
            elif path := found.get(f"attn.{part}"):
                split = family.views.get(part)
                view = split(heads, part) if split else split_heads(sizes["head"], sizes["d_head"])
                self.view(part, layer, self.tap(path, "out", view=view), sizes)
            elif family.fused and (path := found.get("attn.qkv")):
                self.view(part, layer, self.tap(path, "out", view=family.fused(heads, part)), sizes)
        if out := found.get("attn.o"):
            self.view("z", layer, self.tap(out, "in", view=split_heads(heads.n_heads, heads.d_head)), z)
            ends = self.tap(out, "in"), self.tap(out, "out")
            tap = hook_points.head_out(*ends, self.modules[out], heads.n_heads, heads.d_head)
            sizes = {"head": heads.n_heads, **self.d_model}
            why = {"grad": "it is computed beside the forward pass"}
            self._add(Entry(f"{self.prefix}head_out", layer, tap, tap, sizes, why))
        if not self.text:
            return
        matrix = {"head": heads.n_heads}
        self.atlas.reaches[layer] = Reach.of(module, self.config, layer, images=self.family.whole_images)
        if uses_interface(module):
            for name, sizes in (("rot_q", q), ("rot_k", k)):
                self.view(name, layer, HookPoint(attn, "attention", name, view=hook_points.transposed), sizes)
            for name in ("scores", "pattern"):
                self.view(name, layer, HookPoint(attn, "attention", name), matrix)
        elif family.pattern:
            block = f"{self.paths['blocks']}.{layer}"
            self.view("pattern", layer, HookPoint(f"{block}.{family.pattern}", "out"), matrix)

    def _head_counts(self, module: nn.Module, found: Mapping[str, str]) -> Heads | None:
        """Head counts of a layer, from the config and, where it has them, the layer's own weights."""
        n_heads = getattr(self.config, "num_attention_heads", None) or getattr(self.config, "num_heads", None)
        if n_heads is None or "attn.o" not in found:
            return None
        d_head = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        width = hook_points.in_features(self.modules[found["attn.o"]])
        d_head = int(d_head or width // n_heads)
        n_heads = width // d_head
        n_kv = n_heads
        if k := found.get("attn.k"):
            n_kv = hook_points.out_features(self.modules[k]) // d_head
        elif qkv := found.get("attn.qkv"):
            n_kv = (hook_points.out_features(self.modules[qkv]) // d_head - n_heads) // 2
        heads = Heads(n_heads, n_kv, d_head)
        return self.family.heads(module, heads) if self.family.heads else heads

    def _router(self, layer: int, block: str) -> None:
        router = self.family.router
        if router is None or f"{block}.{router.module}" not in self.modules:
            return
        gate, experts = f"{block}.{router.module}", f"{block}.{router.experts}"
        self.atlas.components.add_router(layer, self.modules[gate], self.modules[experts])
        n, k = router.sizes(self.modules[gate])
        beside = {"grad": "it is computed beside the forward pass"}
        for name, tap in (
            ("router_logits", hook_points.router_logits(gate, router, n, k)),
            ("router_weights", hook_points.router_weights(gate, router, n, k)),
        ):
            self._add(Entry(name, layer, tap, tap, {"expert": n}, dict(beside)))
        only_read = {"write": "it is only read; edit router_logits or router_weights", **beside}
        self._add(
            Entry("router_probs", layer, hook_points.router_probs(gate, router), None, {"expert": n}, dict(only_read))
        )
        self._add(
            Entry("router_indices", layer, hook_points.router_indices(gate, router, k), None, {"k": k}, dict(only_read))
        )
        if router.shared_gate and (path := f"{block}.{router.shared_gate}") in self.modules:
            why = {"write": "it is only read", **beside}
            self._add(Entry("shared_expert_gate", layer, hook_points.shared_expert_gate(path), None, {"gate": 1}, why))
        tap = hook_points.expert_out(experts, router, n)
        self._add(Entry("expert_out", layer, tap, tap, {"expert": n, **self.d_model}, beside))
        for name, reason in router.absent(self.modules[gate]).items():
            if self.atlas.entries.pop((name, layer), None):
                self.atlas.withdrawn[name, layer] = reason

    def view(self, name: str, layer: int, tap: HookPoint, sizes: Mapping[str, int]) -> None:
        """Add a site that is a view of what passes."""
        if tap.module in self.modules:
            self._add(Entry(self.prefix + name, layer, tap, tap, sizes, module=self.modules[tap.module]))

    def _add(self, entry: Entry) -> None:
        if entry.name.removeprefix(self.prefix) not in self.refused:
            self.atlas.entries[entry.name, entry.layer] = entry


def refusals(family: Family, config: Any) -> dict[str, str]:
    """Sites that the family cannot give, with the reason."""
    return {**family.refuse, **(family.refuse_if(config) if family.refuse_if else {})}


def router_reason(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a model that sends tokens to experts has no router sites, where no family file describes its router."""
    kinds = (str(model.config.model_type), str(model.config.get_text_config().model_type).removesuffix("_text"))
    why = next((UNDESCRIBED[kind] for kind in kinds if kind in UNDESCRIBED), "")
    if not why and (path := next((path for path in modules if path.endswith(".experts")), "")):
        why = f"no family file says how it selects experts ({path}); write one with a router, see docs/families.md"
    return dict.fromkeys(ROUTED, why) if why else {}


def _explain(atlas: Atlas, refused: Mapping[str, str], parallel: bool) -> None:
    """Say why each site that is not there is not there."""
    present = {name for name, _ in atlas.entries}
    family = atlas.family
    for name in SITES:
        if name in present:
            continue
        if reason := {**family.unseen, **refused}.get(name):
            why = reason
        elif name == "resid_mid" and parallel:
            why = f"{family.name} blocks are parallel: attention and MLP read the same residual stream"
        elif name in ROUTED and not (name == "shared_expert_gate" and "router_logits" in present):
            why = f"{family.name} has no mixture-of-experts router that the atlas knows"
        elif name == "shared_expert_gate":
            why = f"this {family.name} has no gate on a shared expert"
        elif SITES[name].visual:
            why = f"this {family.name} has no {'vision tower' if name == 'vision_embed' else 'DeepStack'}"
        elif name == "mlp_act" and "expert_out" in present:
            why = f"every MLP of this {family.name} is a mixture of experts; see expert_out"
        else:
            near = nearest(name, present)
            why = f"the atlas does not know where {family.name} keeps {name}. {near}"
        atlas.lacking[name] = why
    if "final_norm" not in present:
        atlas.lacking["readout"] = f"this {family.name} has no final norm that the atlas knows"


def uses_interface(attention: nn.Module) -> bool:
    """Whether an attention module goes through transformers' attention interface."""
    code = inspect.unwrap(type(attention).forward).__code__
    return "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(attention, "config")
