"""Where each site lies in a model: module paths, by the family's words, to hook points.

    model ── Stack (blocks of the language model, or of its vision tower) ── Block ── locators ── Entry in the atlas

A locator is a function of a block that adds one group of sites to the atlas. To give a model another site, write its
line in `interp_core/sites.py` and a locator here; for a site of one family, `sites.define` in the family's file and the
locator in its `Family.sites`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, LoadError, first_line
from ..sites import SITES, VISION_
from . import hook_points
from .atlas import ROUTED, Atlas, Entry, Shape
from .components import ENDS, Components
from .conventions import discover
from .family import Family, Heads, Place, View, clipped, split_heads
from .hook_points import HookPoint, Layout, Side
from .misplaced import demand_blocks, demand_paths
from .mixers import gate, mixer_ends, mixer_of
from .parameters import LENT, declared, device_of, is_plain, layer_config, matrix, tokens_of, widths
from .reach import Reach
from .shards import share_out
from .towers import last_used
from .undescribed import explain, refusals, router_reason
from .unfit import decoder_alone, demand_fit, demand_own_blocks


@cache
def known_paths() -> dict[str, dict[str, str]]:
    """Module paths by Hugging Face class name, from TransformerLens' adapters."""
    return json.loads(Path(__file__).with_name("paths.json").read_text())


def build(model: Any, family: Family | None) -> Atlas:
    """The atlas of a Hugging Face model.

    Raises:
        LoadError: no transformer blocks in it, or it is one that cannot be served.
        PluginError: a path of the family's file leads nowhere in it.
    """
    demand_fit(model, family)
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    known = known_paths().get(type(model).__name__)
    shown = known or discover(modules, model.get_input_embeddings(), described=family is not None)
    own = family.paths if family else {}
    if own.get("blocks") in modules and own["blocks"] != shown.get("blocks"):  # what shows is of other blocks
        shown = {key: path for key, path in shown.items() if not key.startswith("blocks")}
    paths = {**shown, **own}
    if family and config is model.config:
        demand_blocks(family, modules)
    if paths.get("blocks") not in modules:  # a language model inside another, where its own file has it elsewhere
        paths |= {key: path for key, path in shown.items() if not key.startswith("blocks.")}
    if paths.get("blocks") not in modules:
        if family:
            demand_blocks(family, modules)
        raise LoadError(
            f"{type(model).__name__} shows no list of transformer blocks with attention, which sites are of. "
            "For another layout write a family file, see docs/families.md."
        )
    demand_own_blocks(type(model).__name__, modules[paths["blocks"]])
    unnamed = family is None
    undescribed = {} if family and family.router else router_reason(model, modules)
    family = family or Family(str(model.config.model_type))
    blocks = modules[paths["blocks"]]
    shape = Shape(
        n_layers=len(list(blocks.children())),
        d_model=config.hidden_size,
        d_vocab=tokens_of(model.get_output_embeddings(), config),
        n_ctx=getattr(config, "max_position_embeddings", None),
        n_labelled=len(model.get_input_embeddings().weight) if LENT in vars(model) else 0,
    )
    atlas = Atlas(family, shape, model.config)
    if known is None and unnamed:
        atlas.notes.append(
            f"nobody has described the family {family.name!r}: its sites are found by the usual names of modules"
        )
    if shape.n_labelled:
        atlas.notes.append(f"its logits are of {shape.d_vocab} labels, at every position; see docs/wrapped.md")
    stack = Stack(atlas, modules, paths, config)
    stack.embedding = next((path for path, module in modules.items() if module is model.get_input_embeddings()), "")
    stack.locate()
    atlas.notes += decoder_alone(blocks, config)
    ends(stack)
    tower = _tower(atlas, modules)
    # Behind `ends`: of a component the first module counts, and paths go before what transformers says.
    atlas.components.add("unembed", None, model.get_output_embeddings())
    atlas.components.add("embed", None, model.get_input_embeddings())
    explain(atlas, undescribed | stack.refused | tower, stack.parallel)
    if atlas.reaches and not any(reach.causal for reach in atlas.reaches.values()):
        atlas.note_reach(ahead=not getattr(config, "is_decoder", False))
    share_out(atlas, model)
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
    stack = Stack(atlas, modules, {**family.paths, "blocks": blocks[0]}, config, family)
    atlas.tower = len(list(modules[blocks[0]].children()))
    stack.locate()
    if place := stack.places.get("pre_merger"):
        stack.view("pre_merger", 0, stack.point(place.module, place.side), stack.d_model)
    last = last_used(atlas.config, atlas.tower)
    unread = f"this {atlas.family.name} takes what it sees from layer {last} of its tower: later ones change nothing"
    for (name, layer), entry in atlas.entries.items():
        if SITES[name].tower and SITES[name].layered and layer > last:
            entry.write, entry.why = None, {"write": unread, "grad": unread}
    return {VISION_ + name: why for name, why in stack.refused.items()}


class Stack:
    """A model's blocks, or those of its vision tower, and what their family says of them.

    Args:
        tower: of a vision tower's blocks, what the atlas must know of them.

    Attributes:
        text: whether they are the language model's.
        prefix: begins the names of their sites.
        refused: sites that the family cannot give, with the reason.
        places: where the family has sites that lie elsewhere than usual.
        embedding: path of the token embedding.
    """

    def __init__(
        self, atlas: Atlas, modules: Mapping[str, nn.Module], paths: Mapping[str, str], config: Any,
        tower: Family | None = None,
    ) -> None:  # fmt: skip
        self.atlas, self.modules, self.paths, self.config = atlas, modules, paths, config
        self.text, self.components = tower is None, atlas.components if tower is None else Components("", 0)
        self.prefix, self.layout = ("" if self.text else VISION_), (None if self.text else Layout(images=True))
        family = self.family = tower or atlas.family
        self.embedding = ""
        self.parallel = (
            family.parallel(config)
            if family.parallel
            else getattr(config, "use_parallel_residual", "parallel" in paths)
        )
        self.places = family.places(config) if callable(family.places) else family.places
        self.d_model = {"d_model": atlas.shape.d_model}
        self.refused = refusals(family, config if self.text else atlas.config)
        if not self.text:
            projection = self.components_of(f"{paths['blocks']}.0")["attn.o"]
            self.d_model = {"d_model": widths(modules[projection])[1]}

    def locate(self) -> None:
        """Find every site of every block."""
        layers = range(len(list(self.modules[self.paths["blocks"]].children())))
        blocks = [Block(self, layer) for layer in layers]
        parts = {block.path: block.parts for block in blocks}
        demand_paths(self.atlas.family.name, self.family, self.paths, self.places, self.modules, parts)
        for block in blocks:
            self.components.add("block", block.layer, block.module)
            self.components.add_block(block.layer, block.parts, self.modules)
            for locate in (*LOCATORS, *self.family.sites):
                locate(block)

    def components_of(self, block: str) -> dict[str, str]:
        """Module paths of the components that a block has."""
        parts, varied = {}, self.family.varied
        for key, names in {**self.paths, **(varied(self.modules[block]) if varied else {})}.items():
            if key.startswith("blocks."):
                paths = (self._inside(block, key, name) for name in names.split("|"))
                if path := next((path for path in paths if path in self.modules), None):
                    parts[key.removeprefix("blocks.")] = path
        if mixer := mixer_of(block, parts, self.modules):
            parts["mixer"] = mixer
        return parts

    def _inside(self, block: str, key: str, name: str) -> str:
        """The path of a component in a block: those of attention and MLP (`blocks.attn.q`) lie inside their module."""
        outer = key.split(".")[:-1]
        parent = self.paths.get(".".join(outer)) if len(outer) > 1 else None
        return f"{block}.{parent}.{name}" if parent else f"{block}.{name}"

    def point(self, module: str, side: Side, *, flat: bool = False, view: View | None = None) -> HookPoint:
        """A hook point at a module, as tensors pass there."""
        return HookPoint(module, side, view=view, layout=Layout(flat=True) if flat else self.layout)

    def view(self, name: str, layer: int, point: HookPoint, sizes: Mapping[str, int]) -> None:
        """Add a site that is a view of what passes at a point, where the model has that module."""
        if point.module in self.modules:
            why = {"grad": "it is computed of what several modules give"} if point.get else None
            self.add(Entry(self.prefix + name, layer, point, point, sizes, why, self.modules[point.module]))

    def add(self, entry: Entry) -> None:
        """Add a site, unless the family refuses it."""
        if entry.name.removeprefix(self.prefix) not in self.refused:
            self.atlas.entries[entry.name, entry.layer] = entry


class Block:
    """One block, for functions that find sites in it.

    Attributes:
        stack: the blocks that it is one of.
        path, module: of the block.
        config: of its layer, where layers differ.
        parts: module paths of its components by TransformerLens' names (`attn`, `attn.q`, `mlp.out`, …).
    """

    def __init__(self, stack: Stack, layer: int) -> None:
        self.stack, self.layer, self.path = stack, layer, f"{stack.paths['blocks']}.{layer}"
        self.module, self.parts, self.d_model = stack.modules[self.path], stack.components_of(self.path), stack.d_model
        self.config = layer_config(stack.config, layer)

    def point(self, path: str, side: Side, *, flat: bool = False, view: View | None = None) -> HookPoint:
        """A hook point at a module of the block, by its path in the block."""
        return self.stack.point(f"{self.path}.{path}", side, flat=flat, view=view)

    def placed(self, name: str, usual: HookPoint) -> HookPoint:
        """Where the family has a site, if it says so, else where it usually lies."""
        place = self.stack.places.get(name)
        return self.at(place) if place else usual

    def at(self, place: Place) -> HookPoint:
        """A hook point at a place of the family's."""
        return self.point(place.module, place.side, flat=place.flat)

    def view(self, name: str, point: HookPoint, sizes: Mapping[str, int]) -> None:
        """Add a site that is a view of what passes at a point. `sizes` are those of its feature axes."""
        self.stack.view(name, self.layer, point, sizes)

    def add(
        self, name: str, read: HookPoint, write: HookPoint | None, sizes: Mapping[str, int], why: dict[str, str]
    ) -> None:
        """Add a site that is read and written at different points, or has reasons why it lacks something."""
        self.stack.add(Entry(self.stack.prefix + name, self.layer, read, write, sizes, why))

    def addition(self, name: str, module: str, *, flat: bool = False) -> HookPoint:
        """What is added to the stream: what a module gives, times the block's factor, with its bias."""
        family = self.stack.family
        if place := self.stack.places.get(name):
            module, flat = f"{self.path}.{place.module}", place.flat
        factors = family.added(self.module) if family.added else {}
        biases = family.biases(self.module) if family.biases else {}
        layout = Layout(flat, factors.get(name, 1.0), biases.get(name, 0.0), images=not self.stack.text)
        return HookPoint(module, "out", layout=layout if layout.flat or layout.scaled or layout.images else None)

    def whole(self, name: str, part: HookPoint) -> HookPoint:
        """What is added together with what a module beside gives, if there is one."""
        beside = f"{self.path}.{self.stack.family.beside.get(name, '')}"
        if beside not in self.stack.modules or beside == part.module:
            return part
        return hook_points.both(self.stack.point(self.path, "in"), self.addition("beside", beside), part)


# One function per group of sites. A family's own (`Family.sites`) are called after these, in the same way.


def stream(block: Block) -> None:
    """`resid_pre`, `resid_post`: what the block gets and gives."""
    block.view("resid_pre", block.stack.point(block.path, "in"), block.d_model)
    block.view("resid_post", block.stack.point(block.path, "out"), block.d_model)


def mlp(block: Block) -> None:
    """`mlp_in`, `mlp_act`, `mlp_out`."""
    parts, stack = block.parts, block.stack
    points: dict[str, HookPoint] = {}
    if module := parts.get("mlp"):
        points["mlp_in"] = stack.point(module, "in")
    if module or "mlp_out" in stack.places:
        router = stack.family.router
        flat = router is not None and router.flat and f"{block.path}.{router.module}" in stack.modules
        points["mlp_out"] = block.whole(
            "mlp_out", block.addition("mlp_out", parts.get("ln2_post", str(module)), flat=flat)
        )
    if projection := parts.get("mlp.out") or parts.get("mlp.dense_out"):
        points["mlp_act"] = stack.point(projection, "in")
    for name in ("mlp_in", "mlp_act"):
        if place := stack.places.get(name):
            points[name] = block.at(place)
    for name, point in points.items():
        said = getattr(block.config, "intermediate_size", 0)
        width = declared(stack.modules[point.module], 0, said) if name == "mlp_act" else 0
        block.view(name, point, {"d_mlp": width} if width else block.d_model)


def heads(block: Block) -> None:
    """`q`, `k`, `v`, `z`, `head_out`, and what is inside attention: `rot_q`, `rot_k`, `scores`, `pattern`."""
    attn = block.parts.get("attn")
    if attn is None:
        return
    module = block.stack.modules[attn]
    if block.stack.text:
        within = block.stack.modules[hook_points.attending(attn, module) or attn]
        block.stack.atlas.looks_back &= bool(getattr(within, "is_causal", False))
    counts = head_counts(block, module)
    if counts is None:
        return
    q, k = ({"head": n, "d_head": counts.d_key or counts.d_head} for n in (counts.n_heads, counts.n_kv_heads))
    v = {"head": counts.n_kv_heads, "d_head": counts.d_head}
    _projections(block, attn, counts, {"q": q, "k": k, "v": v})
    if projection := block.parts.get("attn.o"):
        _mixed(block, projection, counts)
    if block.stack.text:  # a tower's attention is called per image or window, so it has no pattern of a whole pass
        _inside_attention(block, attn, {"rot_q": q, "rot_k": k}, counts.n_heads)


def _projections(block: Block, attn: str, counts: Heads, sizes: Mapping[str, Mapping[str, int]]) -> None:
    family, stack = block.stack.family, block.stack
    for part, of_part in sizes.items():
        if part in family.inside:
            block.view(part, HookPoint(attn, "attention", part, view=hook_points.transposed), of_part)
            continue
        if path := block.parts.get(f"attn.{part}"):
            split, ordered = family.views.get(part), None
            view = split(counts, part) if split else split_heads(of_part["head"], of_part["d_head"])
        elif family.fused and (path := block.parts.get("attn.qkv")):
            view, ordered = family.fused(counts, part), family.arranged(counts) if family.arranged else None
        else:
            continue
        point = stack.point(path, "out", view=view)
        normed = f"attn.{part}_norm" in block.parts  # and what the norm gives is clipped
        if arranged := ordered if normed else clipped(block.config, ordered):
            point = replace(point, layout=replace(point.layout or Layout(), arranged=arranged))
        block.view(part, point, of_part)
        if ordered and (entry := stack.atlas.entries.get((stack.prefix + part, block.layer))):
            entry.view = partial(_arranged_view, ordered.into, view)


def _arranged_view(into: View, view: View, x: Tensor) -> Tensor:
    """The site's axes, of what its module gives as it gives it."""
    return view(into(x))


def _mixed(block: Block, projection: str, counts: Heads) -> None:
    """`z` and `head_out`, at the output projection."""
    stack = block.stack
    z = split_heads(counts.n_heads, counts.d_head)
    block.view("z", stack.point(projection, "in", view=z), {"head": counts.n_heads, "d_head": counts.d_head})
    ends = stack.point(projection, "in"), stack.point(projection, "out")
    module = stack.modules[projection]
    if why := _no_heads(module, stack.modules[""].dtype, counts.d_head):
        stack.atlas.withdrawn[f"{stack.prefix}head_out", block.layer] = why
        return
    point = hook_points.head_out(*ends, module, counts.n_heads, counts.d_head)
    sizes = {"head": counts.n_heads, **block.d_model}
    block.add("head_out", point, point, sizes, {"grad": "it is computed beside the forward pass"})


def _no_heads(projection: nn.Module, dtype: Any, d_head: int) -> str:
    """Why what an output projection makes of single heads cannot be told apart, by its first head; "" if it can."""
    place = device_of(projection)
    if is_plain(projection) or place.type == "meta":
        return ""
    try:
        matrix(projection, torch.zeros(0, dtype=dtype, device=place), torch.arange(d_head))
    except (CapabilityError, RuntimeError) as error:  # a library's own, of numbers that it cannot take
        return f"the weights of the output projection do not show: {first_line(error)}"
    return ""


def _inside_attention(block: Block, attn: str, rotated: Mapping[str, Mapping[str, int]], n_heads: int) -> None:
    stack = block.stack
    images, open_at = stack.family.whole_images, hook_points.attending(attn, stack.modules[attn])
    module = stack.modules[open_at or attn]
    stack.atlas.reaches[block.layer] = Reach.of(module, block.config, block.layer, images=images)
    side: Side = "attention" if open_at else "own"
    if not open_at and not (open_at := hook_points.computing(attn, stack.modules[attn])):
        return
    calls = stack.family.calls
    for name, sizes in rotated.items():
        block.view(name, HookPoint(open_at, side, name, view=hook_points.transposed, calls=calls), sizes)
    for name in ("scores", "pattern"):
        block.view(name, HookPoint(open_at, side, name, calls=calls), {"head": n_heads})


def head_counts(block: Block, module: nn.Module) -> Heads | None:
    """Head counts of a layer, from the config and, where it has them, the layer's own weights."""
    stack, parts = block.stack, block.parts
    config = block.config
    n_heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    if n_heads is None or "attn.o" not in parts:
        return None
    d_head = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    kv = getattr(config, "num_key_value_heads", None)
    kv, said = kv if isinstance(kv, int) else n_heads, d_head or block.d_model["d_model"] // n_heads
    width = declared(stack.modules[parts["attn.o"]], 0, n_heads * said)
    d_head = int(d_head or width // n_heads)
    n_heads = n_kv = width // d_head
    if k := parts.get("attn.k"):
        n_kv = declared(stack.modules[k], 1, kv * d_head) // d_head
    elif qkv := parts.get("attn.qkv"):
        n_kv = (declared(stack.modules[qkv], 1, (n_heads + 2 * kv) * d_head) // d_head - n_heads) // 2
    counts = Heads(n_heads, n_kv, d_head)
    return stack.family.heads(module, counts) if stack.family.heads else counts


def router(block: Block) -> None:
    """The sites of a mixture of experts."""
    stack, family_router = block.stack, block.stack.family.router
    if family_router is None or f"{block.path}.{family_router.module}" not in stack.modules:
        return
    selects, experts = f"{block.path}.{family_router.module}", f"{block.path}.{family_router.experts}"
    stack.atlas.components.add_router(block.layer, stack.modules[selects], stack.modules[experts])
    family_router = family_router.of(block.module)
    try:
        n, k = family_router.sizes(stack.modules[selects])
    except AttributeError:
        kind = type(stack.modules[selects]).__name__
        hidden = f"what is around the router ({kind}) does not show how it selects; take it off, or merge it"
        stack.atlas.withdrawn |= {(name, block.layer): hidden for name in ROUTED}
        return
    beside = {"grad": "it is computed beside the forward pass"}
    only_read = {"write": "it is only read; edit router_logits or router_weights", **beside}
    gates = {"write": "it is only read", **beside}
    at = hook_points.at_router(selects, experts, family_router)
    logits = hook_points.router_logits(at, family_router, n, k)
    weights = hook_points.router_weights(at, family_router, n, k)
    output = hook_points.expert_out(experts, family_router, n)
    block.add("router_logits", logits, logits, {"expert": n}, dict(beside))
    block.add("router_weights", weights, weights, {"expert": n}, dict(beside))
    block.add("router_probs", hook_points.router_probs(at, family_router), None, {"expert": n}, dict(only_read))
    block.add("router_indices", hook_points.router_indices(at, family_router, k), None, {"k": k}, dict(only_read))
    if family_router.shared_gate and (path := f"{block.path}.{family_router.shared_gate}") in stack.modules:
        block.add("shared_expert_gate", hook_points.shared_expert_gate(path), None, {"gate": 1}, gates)
    elif family_router.n_shared:
        n_shared = getattr(stack.modules[selects], family_router.n_shared)
        shared = hook_points.shared_weights(at, family_router)
        block.add("shared_expert_gate", shared, None, {"gate": n_shared}, gates)
    block.add("expert_out", output, output, {"expert": n, **block.d_model}, beside)
    for name, reason in family_router.absent(stack.modules[selects]).items():
        if stack.atlas.entries.pop((name, block.layer), None):
            stack.atlas.withdrawn[name, block.layer] = reason


LOCATORS = (stream, mixer_ends, heads, gate, mlp, router)


def ends(stack: Stack) -> None:
    """Sites and components that a model has once."""
    said, d_model = stack.paths.get("embed"), stack.atlas.shape.d_model
    embedding = said if said and said in stack.modules else stack.embedding
    if (width := getattr(stack.modules.get(embedding), "embedding_dim", d_model)) != d_model:
        narrow = f"token embeddings have {width} dimensions, and the stream, which is made of them, {d_model}"
        stack.refused.setdefault("embed", f"{narrow}; read resid_pre of layer 0")
    for name, module in (("embed", embedding), ("final_norm", stack.paths.get("ln_final", ""))):
        if module:
            stack.view(name, 0, HookPoint(module, "out"), stack.d_model)
    if stack.family.bare(stack.config) if callable(stack.family.bare) else stack.family.bare:
        stack.atlas.components.add("ln_final", None, nn.Identity())
    for component in ENDS:
        refused = component == "ln_final" and "final_norm" in stack.refused
        if (path := stack.paths.get(component)) in stack.modules and not refused:
            stack.atlas.components.add(component, None, stack.modules[str(path)])
    what_towers_hand_over(stack)
    point = hook_points.logits()
    why = {"grad": "the score is a function of the logits already; differentiate it by hand"}
    stack.add(Entry("logits", 0, point, point, {"d_vocab": stack.atlas.shape.d_vocab}, why))


def what_towers_hand_over(stack: Stack) -> None:
    """`vision_embed`, `deepstack`: what a vision tower gives arrives as arguments of the language model."""
    vision = getattr(stack.atlas.config, "vision_config", None)
    language = stack.paths["blocks"].rpartition(".")[0]
    arguments = inspect.signature(stack.modules[language].forward).parameters
    if vision is None or hook_points.EMBEDDINGS not in arguments:
        return
    stack.view("vision_embed", 0, HookPoint(language, "in", hook_points.EMBEDDINGS), stack.d_model)
    if hook_points.DEEPSTACK in arguments:
        for layer in range(len(vision.deepstack_visual_indexes)):
            point = hook_points.deepstack(language, layer)
            why = {"grad": "it is computed beside the forward pass"}
            stack.add(Entry("deepstack", layer, point, point, stack.d_model, why))
