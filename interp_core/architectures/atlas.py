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
from ..sites import SITES, Site, indices
from . import taps
from .components import ENDS, Components
from .family import Family, Heads, Place, split_heads
from .reach import Reach
from .taps import Lens, Tap
from .undescribed import UNDESCRIBED

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
        overwritten: the model writes into the tensor after it passed; reads keep a copy.
        wide: the family may compute it in float32 whatever the model's dtype.
    """

    __slots__ = (
        "layer", "module", "n_units", "name", "overwritten", "read", "sizes", "view", "visual", "why", "wide", "write",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        layer: int,
        read: Tap | None,
        write: Tap | None,
        sizes: Mapping[str, int],
        why: dict[str, str] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.name, self.layer, self.read, self.write, self.sizes = name, layer, read, write, sizes
        unit = SITES[name].unit
        self.n_units = None if unit is None else sizes[unit]
        self.why, self.module, self.view = why or {}, module, None if read is None else read.view
        self.visual, self.wide = SITES[name].visual, name.startswith("router")
        self.overwritten = False


class Atlas:
    """The sites of one model.

    Attributes:
        family: name of the family, `config.model_type`.
        shape: sizes of the model.
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
        self.family, self.shape, self.config = family, shape, config
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
            raise CapabilityError(f"{site}: {self.lacking[site.name]}")
        if not site.info.layered:
            return [self.entries[site.name, 0]]
        having = self.layers(site.name)
        if site.layers is None:
            return [self.entries[site.name, layer] for layer in having]
        counted = len(having) if site.info.visual else self.shape.n_layers  # what a vision tower hands over is apart
        asked = indices(site.layers, counted, "layer", site)
        if missing := [layer for layer in asked if (site.name, layer) not in self.entries]:
            shown = ", ".join(map(str, having))
            why = f" ({self.withdrawn[site.name, missing[0]]})" if (site.name, missing[0]) in self.withdrawn else ""
            raise SiteError(f"{site}: layer {missing[0]} has no {site.name}{why}; layers {shown} have")
        return [self.entries[site.name, layer] for layer in asked]

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
    atlas.components.add("unembed", None, model.get_output_embeddings())
    atlas.components.add("embed", None, model.get_input_embeddings())
    _explain(atlas, undescribed | builder.refused, builder.parallel)
    return atlas


class _Builder:
    """Fills an atlas from module paths."""

    def __init__(self, atlas: Atlas, modules: Mapping[str, nn.Module], paths: Mapping[str, str], config: Any) -> None:
        self.atlas, self.modules, self.paths, self.config = atlas, modules, paths, config
        family = self.family = atlas.family
        self.parallel = family.parallel(config) if family.parallel else "parallel" in paths
        self.places = family.places(config) if callable(family.places) else family.places
        self.d_model = {"d_model": atlas.shape.d_model}
        self.refused = refusals(family, config)

    def ends(self) -> None:
        for name, component in (("embed", "embed"), ("final_norm", "ln_final")):
            if (path := self.paths.get(component)) in self.modules:
                self._view(name, 0, Tap(str(path), "out"), self.d_model)
        for component in ENDS:
            if (path := self.paths.get(component)) in self.modules:
                self.atlas.components.add(component, None, self.modules[str(path)])
        self._vision()
        tap = taps.logits()
        why = {"grad": "the score is a function of the logits already; differentiate it by hand"}
        self._add(Entry("logits", 0, tap, tap, {"d_vocab": self.atlas.shape.d_vocab}, why))

    def _vision(self) -> None:
        """What a vision tower hands over: it arrives as arguments of the language model."""
        vision = getattr(self.atlas.config, "vision_config", None)
        language = self.paths["blocks"].rpartition(".")[0]
        arguments = inspect.signature(self.modules[language].forward).parameters
        if vision is None or taps.EMBEDDINGS not in arguments:
            return
        self._view("vision_embed", 0, Tap(language, "in", taps.EMBEDDINGS), self.d_model)
        if taps.DEEPSTACK in arguments:
            for layer in range(len(vision.deepstack_visual_indexes)):
                tap = taps.deepstack(language, layer)
                why = {"grad": "it is computed beside the forward pass"}
                self._add(Entry("deepstack", layer, tap, tap, self.d_model, why))

    def block(self, layer: int) -> None:
        block = f"{self.paths['blocks']}.{layer}"
        found = self._components(block)
        self.atlas.components.add("block", layer, self.modules[block])
        self.atlas.components.add_block(layer, found, self.modules)
        self._view("resid_pre", layer, Tap(block, "in"), self.d_model)
        self._view("resid_post", layer, Tap(block, "out"), self.d_model)
        if attn := found.get("attn", found.get("linear_attn")):
            attn_out = self._added("attn_out", block, found.get("ln1_post", attn))
            place = self.places.get("attn_in")
            self._view("attn_in", layer, _placed(block, place) if place else Tap(attn, "in"), self.d_model)
            self._view("attn_out", layer, attn_out, self.d_model)
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

    def _added(self, name: str, block: str, module: str, *, flat: bool = False) -> Tap:
        """What is added to the stream: what a module gives, times the block's factor."""
        if place := self.places.get(name):
            module, flat = f"{block}.{place.module}", place.flat
        factors = self.family.added(self.modules[block]) if self.family.added else {}
        lens = Lens(flat, float(factors.get(name, 1.0)))
        return Tap(module, "out", lens=None if lens == Lens() else lens)

    def _between(self, layer: int, block: str, attn_out: Tap, found: Mapping[str, str]) -> None:
        """The stream between attention and MLP. What a module gives is the stream itself; what a module reads is
        a use of it beside others, so there changes go in by `attn_out`."""
        place, module = self.places.get("resid_mid"), found.get("ln2", found.get("mlp"))
        if place is None and (module is None or "mlp" not in found):
            return
        tap = _placed(block, place) if place else Tap(str(module), "in")
        if tap.side == "out":
            self._view("resid_mid", layer, tap, self.d_model)
            return
        why = {"grad": "the stream also goes on past the module where it is read"} if tap.lens else None
        join = partial(self.family.join, self.modules[block], "resid_mid") if self.family.join else None
        write = taps.resid_mid(Tap(block, "in"), attn_out, join)
        self._add(Entry("resid_mid", layer, tap, write, self.d_model, why))

    def _mlp(self, layer: int, block: str, found: Mapping[str, str]) -> None:
        where: dict[str, Tap] = {}
        mlp = found.get("mlp")
        if mlp:
            where["mlp_in"] = Tap(mlp, "in")
        if mlp or "mlp_out" in self.places:
            router = self.family.router
            flat = router is not None and router.flat and f"{block}.{router.module}" in self.modules
            where["mlp_out"] = self._added("mlp_out", block, found.get("ln2_post", str(mlp)), flat=flat)
        if out := found.get("mlp.out") or found.get("mlp.dense_out"):
            where["mlp_act"] = Tap(out, "in")
        for name in ("mlp_in", "mlp_act"):
            if name in self.places:
                where[name] = _placed(block, self.places[name])
        for name, tap in where.items():
            sizes = {"d_mlp": taps.in_features(self.modules[tap.module])} if name == "mlp_act" else self.d_model
            self._view(name, layer, tap, sizes)

    def _heads(self, layer: int, attn: str, found: Mapping[str, str]) -> None:
        module, family = self.modules[attn], self.family
        heads = self._head_counts(module, found)
        if heads is None:
            return
        q, k = ({"head": n, "d_head": heads.d_key or heads.d_head} for n in (heads.n_heads, heads.n_kv_heads))
        v, z = ({"head": n, "d_head": heads.d_head} for n in (heads.n_kv_heads, heads.n_heads))
        for part, sizes in (("q", q), ("k", k), ("v", v)):
            if part in family.inside:
                self._view(part, layer, Tap(attn, "attention", part, view=taps.transposed), sizes)
            elif path := found.get(f"attn.{part}"):
                split = family.views.get(part)
                view = split(heads, part) if split else split_heads(sizes["head"], sizes["d_head"])
                self._view(part, layer, Tap(path, "out", view=view), sizes)
            elif family.fused and (path := found.get("attn.qkv")):
                self._view(part, layer, Tap(path, "out", view=family.fused(heads, part)), sizes)
        if out := found.get("attn.o"):
            self._view("z", layer, Tap(out, "in", view=split_heads(heads.n_heads, heads.d_head)), z)
            tap = taps.head_out(Tap(out, "in"), Tap(out, "out"), self.modules[out], heads.n_heads, heads.d_head)
            sizes = {"head": heads.n_heads, **self.d_model}
            self._add(Entry("head_out", layer, tap, tap, sizes, {"grad": "it is computed beside the forward pass"}))
        matrix = {"head": heads.n_heads}
        self.atlas.reaches[layer] = Reach.of(module, self.config, layer, images=self.family.whole_images)
        if uses_interface(module):
            for name, sizes in (("rot_q", q), ("rot_k", k)):
                self._view(name, layer, Tap(attn, "attention", name, view=taps.transposed), sizes)
            for name in ("scores", "pattern"):
                self._view(name, layer, Tap(attn, "attention", name), matrix)
        elif family.pattern:
            block = f"{self.paths['blocks']}.{layer}"
            self._view("pattern", layer, Tap(f"{block}.{family.pattern}", "out"), matrix)

    def _head_counts(self, module: nn.Module, found: Mapping[str, str]) -> Heads | None:
        """Head counts of a layer, from the config and, where it has them, the layer's own weights."""
        n_heads = getattr(self.config, "num_attention_heads", None)
        if n_heads is None or "attn.o" not in found:
            return None
        d_head = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        width = taps.in_features(self.modules[found["attn.o"]])
        d_head = int(d_head or width // n_heads)
        n_heads = width // d_head
        n_kv = n_heads
        if k := found.get("attn.k"):
            n_kv = taps.out_features(self.modules[k]) // d_head
        elif qkv := found.get("attn.qkv"):
            n_kv = (taps.out_features(self.modules[qkv]) // d_head - n_heads) // 2
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
            ("router_logits", taps.router_logits(gate, router, n, k)),
            ("router_weights", taps.router_weights(gate, router, n, k)),
        ):
            self._add(Entry(name, layer, tap, tap, {"expert": n}, dict(beside)))
        only_read = {"write": "it is only read; edit router_logits or router_weights", **beside}
        self._add(Entry("router_probs", layer, taps.router_probs(gate, router), None, {"expert": n}, dict(only_read)))
        self._add(Entry("router_indices", layer, taps.router_indices(gate, router, k), None, {"k": k}, dict(only_read)))
        if router.shared_gate and (path := f"{block}.{router.shared_gate}") in self.modules:
            why = {"write": "it is only read", **beside}
            self._add(Entry("shared_expert_gate", layer, taps.shared_expert_gate(path), None, {"gate": 1}, why))
        tap = taps.expert_out(experts, router, n)
        self._add(Entry("expert_out", layer, tap, tap, {"expert": n, **self.d_model}, beside))
        for name, reason in router.absent(self.modules[gate]).items():
            if self.atlas.entries.pop((name, layer), None):
                self.atlas.withdrawn[name, layer] = reason

    def _view(self, name: str, layer: int, tap: Tap, sizes: Mapping[str, int]) -> None:
        if tap.module in self.modules:
            self._add(Entry(name, layer, tap, tap, sizes, module=self.modules[tap.module]))

    def _add(self, entry: Entry) -> None:
        if entry.name not in self.refused:
            self.atlas.entries[entry.name, entry.layer] = entry


def _placed(block: str, place: Place) -> Tap:
    return Tap(f"{block}.{place.module}", place.side, lens=Lens(flat=True) if place.flat else None)


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


def discover(modules: Mapping[str, nn.Module], embedding: nn.Module | None = None) -> dict[str, str]:
    """Module paths of an unknown family, by the names of its modules: the longest list of blocks with attention, of
    those beside the token embedding if there are such (a vision tower has blocks too)."""
    lists = [(path, m) for path, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    home = next((path.rpartition(".")[0] for path, m in modules.items() if m is embedding), "")
    hints = {
        "blocks.attn": ("self_attn", "attention", "self_attention", "attn"),
        "blocks.mlp": ("mlp", "feed_forward", "ffn"),
    }
    for path, blocks in sorted(lists, key=lambda item: (item[0].rpartition(".")[0] != home, -len(item[1]))):
        children = dict(blocks[0].named_children())
        found = {key: next((n for n in names if n in children), None) for key, names in hints.items()}
        if found["blocks.attn"] is None:
            continue
        out = {key: name for key, name in found.items() if name}
        return {"blocks": path, **out, **_discover_ends(modules, path)}
    return {}


def _discover_ends(modules: Mapping[str, nn.Module], blocks: str) -> dict[str, str]:
    parent = blocks.rpartition(".")[0]
    out: dict[str, str] = {}
    for path, module in modules.items():
        outer, _, name = path.rpartition(".")
        if outer == parent and isinstance(module, nn.Embedding) and "pos" not in name:
            out.setdefault("embed", path)
        if (outer == parent and "norm" in name.lower()) or (name == "ln_f" and outer == parent):
            out["ln_final"] = path
    return out
