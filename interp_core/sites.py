"""What can be named inside a model: sites, and the edits that one can make at them.

A `Site` is plain data: a name, layers, units (heads, experts, neurons) and positions. Nothing here touches a model.

    from interp_core import sites as S

    S.resid_post                 every layer
    S.resid_post[2]              one layer; negative counts from the end; slices and lists select several
    S.z[3, 5]                    head 5 of layer 3
    S.z[3, 5].at(-1)             at the last real token of every row
    S.pattern[8:16].at(query="text", key="vision")
    S.z[3, 5].at(-1).zero()      an `Edit`

Where they lie:

    resid_pre ──┬──────────────────────────── + ── resid_mid ──┬───────────────────────────── + ── resid_post
                └─ mixer_in ─ … ─ mixer_out ──┘                └─ mlp_in ─ mlp_act ─ mlp_out ─┘

    mixers      mixer_in is attn_in, mixer_out is attn_out where the mixer is attention, with a softmax or linear
    attention   q ─ rot_q ─┬─ scores ─ pattern ─┬─ z ─ head_out     which adds up to attn_out
                k ─ rot_k ─┘               v ───┘
    mixture     mlp_in ─ router_logits ─ router_indices, router_weights ─ expert_out     which adds up to mlp_out
    ends        embed before the first block; final_norm and logits after the last one

Axes of a value are those of the table below; an integer for a layer, unit or position drops its axis, as in numpy.
Names follow TransformerLens. Those of a vision tower are the same with `vision_` before them: `S.vision_z[3, 5]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .errors import PlanError, SiteError, nearest, no_function_of, wrong
from .foreign import SITE, Abroad, Answering, UnknownSiteError, no_site, ours
from .indexing import Index, as_index, parsed_index, shown_index, split_at_commas
from .indexing import indices as indices
from .positions import Position, PositionLike, Slice, format_position, parse_position, position
from .tensors import digest, is_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SiteInfo:
    """What a site name means.

    Attributes:
        axes: names of the axes of its value, all layers' alike.
        unit: the axis that a second index selects (`head`, `expert`, `d_mlp`), if any.
        layered: whether the site exists once per layer.
        doc: one line for tables.
        order: sorts sites as a forward pass meets them in a layer.
    """

    axes: tuple[str, ...]
    doc: str
    unit: str | None = None
    layered: bool = True
    order: float = field(default=0.0, compare=False)

    @property
    def positions(self) -> tuple[str, ...]:
        """The axes that `.at()` selects on."""
        return tuple(axis for axis in self.axes if axis in ("pos", "query", "key", "patch"))

    @property
    def visual(self) -> bool:
        """Whether it exists with images only: its positions are visual tokens, all of them, or the tower's patches."""
        return "visual" in self.axes or self.tower

    @property
    def tower(self) -> bool:
        """Whether it lies in the vision tower: its positions are patches, and its layers the tower's."""
        return "patch" in self.axes


_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_ATTENTION = ("batch", "head", "query", "key")
_EXPERTS = ("batch", "pos", "expert")
_CHOSEN = ("batch", "pos", "k")
_VISUAL = ("batch", "visual", "d_model")
_PATCHES = ("batch", "patch", "d_model")
_PATCH_HEADS = ("batch", "patch", "head", "d_head")
_PATCH_ACTS = ("batch", "patch", "d_mlp")
_PATCH_OUTS = ("batch", "patch", "head", "d_model")

VISION_ = "vision_"
"""Begins the name of a tower's site, before the name of the same thing in the language model."""

SITES: dict[str, SiteInfo] = {}
"""All site names in the order in which a forward pass meets them."""

MASKS = {"replace": "mask", "keep": "mask_keep", "drop": "mask_drop"}
FORCES = {"own_weight": "force", "steermoe": "force_steermoe"}
BOOSTS = ("boost", "boost_renormalised")
ROUTING = (*MASKS.values(), *FORCES.values(), *BOOSTS)
"""Edits of what a router selects, of whole tokens; what they do is in `architectures/rerouting.py`."""
OPS = ("set", "add", "scale", "zero", "project", "apply", "knockout", *ROUTING)
TENSOR_OPS = ("set", "add", "project")
_ONLY = {
    "knockout": "pattern",
    **dict.fromkeys((*MASKS.values(), *FORCES.values()), "router_logits"),
    **dict.fromkeys(BOOSTS, "router_weights"),
}


@dataclass(frozen=True, slots=True)
class Site(Answering):
    """A named tensor inside a model, or a part of it. Build it from the names of this module.

    Attributes:
        name: a key of `SITES`.
        layers: selected layers, None for all.
        units: selected heads, experts or neurons, None for all.
        pos: selected positions (`query` positions for attention sites), None for all.
        key: selected key positions, attention sites only.
    """

    name: str
    layers: Index = None
    units: Index = None
    pos: Position | None = None
    key: Position | None = None
    _abroad = Abroad("a Site", SITE)

    def __getitem__(self, index: Any) -> Site:
        """Select layers and units: `[layer]` or `[layer, unit]`; sites without layers take `[unit]`.

        Raises:
            SiteError: more indices than the site has, or one that is not an integer, slice or list of integers.
        """
        info = self.info
        items = index if isinstance(index, tuple) else (index,)
        fields = [name for name, has in (("layers", info.layered), ("units", info.unit is not None)) if has]
        if self.layers is not None or self.units is not None:
            raise SiteError(f"{self} is already selected; write both indices at once: {self.name}[layer, unit]")
        if len(items) > len(fields):
            takes = ", ".join(field[:-1] for field in fields) or "no index"
            raise SiteError(f"{self.name}[{shown_index(index)}] has {len(items)} indices, {self.name} takes {takes}")
        chosen: dict[str, Any] = {f: as_index(item, self.name) for f, item in zip(fields, items, strict=False)}
        return replace(self, **chosen)

    def at(self, pos: PositionLike = None, *, query: PositionLike = None, key: PositionLike = None) -> Site:
        """Select positions: integers (negative from the last real token), slices, `Span`s, lists, lists per row,
        a boolean mask `[batch pos]`, or names that the batch knows (`"last"`, `"prompt"`, `"vision"`, own spans).

        Attention sites take `query=` and `key=`; `.at(x)` is `query=x`.

        Raises:
            SiteError: key positions for a site without a key axis.
            PositionError: not a position.
        """
        axes = self.info.positions
        if not axes:
            raise SiteError(f"{self.name} has no positions to select")
        if key is not None and "key" not in axes:
            raise SiteError(f"{self.name} has no key axis; only scores and pattern take key=")
        chosen = pos if query is None else query
        return replace(
            self, pos=self.pos if chosen is None else position(chosen), key=self.key if key is None else position(key)
        )

    @property
    def info(self) -> SiteInfo:
        """Axes, unit axis and description of this site's name."""
        return SITES[self.name]

    @property
    def whole(self) -> Site:
        """This site in its layers, with all units and positions."""
        return Site(self.name, self.layers)

    def set(self, value: Tensor) -> Edit:
        """Replace the value. `value` has the axes of the selection, or a suffix of them (`[d_model]` for all rows)."""
        return self._edit("set", value)

    def add(self, value: Tensor) -> Edit:
        """Add `value`: the axes of the selection, or a suffix of them."""
        return self._edit("add", value)

    def scale(self, factor: float) -> Edit:
        """Multiply by a number."""
        return self._edit("scale", factor)

    def zero(self) -> Edit:
        """Set to zero."""
        return self._edit("zero", None)

    def project(self, directions: Tensor) -> Edit:
        """Remove the component in the span of `directions` (`[d]` or `[k d]`; need not be orthonormal)."""
        return self._edit("project", directions)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Edit:
        """Replace the value x by `fn(x)`, of the same shape and dtype. Local engines only."""
        return self._edit("apply", fn)

    def knockout(self, query: PositionLike = None, key: PositionLike = None) -> Edit:
        """`pattern` only: forbid these queries to attend to these keys, before the softmax, so that the rest of the
        row takes over the probability."""
        return self.at(query=query, key=key)._edit("knockout", None)

    def mask(self, experts: int | Sequence[int], mode: str = "replace") -> Edit:
        """`router_logits` only: ban experts, so that they are not executed at all at the selected positions.

        Args:
            mode: "replace": out of the choice, before groups and top-k, so that others take their slots. "keep": the
                set stays as chosen, without the banned ones, and the others' weights are rescaled to the old sum.
                "drop": the same without rescaling. In these two modes a token whose whole set is banned keeps it, and
                the receipt counts it.

        Raises:
            PlanError: no such mode.
        """
        return self._edit(_mode("mask", MASKS, mode), _experts(experts, "mask"))

    def force(self, experts: int | Sequence[int], mode: str = "own_weight") -> Edit:
        """`router_logits` only: have experts executed at every selected position; the weakest of the chosen give way.
        Forces act after all other edits of the same logits.

        Args:
            mode: "own_weight": the new set is weighed by the family's rule on the router's own logits. "steermoe": the
                logits of forced experts become the highest one + 0.01, from which the family selects and weighs.

        Raises:
            PlanError: no such mode.
        """
        return self._edit(_mode("force", FORCES, mode), _experts(experts, "force"))

    def boost(self, experts: int | Sequence[int], factor: float, renormalise: bool = False) -> Edit:
        """`router_weights` only: multiply the executed weights of experts, where they are chosen. An expert that is
        chosen nowhere is an EffectError.

        Args:
            renormalise: rescale a token's weights to the sum that they had.
        """
        return self._edit("boost_renormalised" if renormalise else "boost", (_experts(experts, "boost"), factor))

    def _edit(self, op: str, value: Any) -> Edit:
        return Edit(self, op, value)

    def __str__(self) -> str:
        index = [part for part in (self.layers, self.units) if part is not None]
        if self.layers is None and self.units is not None and self.info.layered:
            index = [Slice(), self.units]
        text = f"{self.name}[{','.join(shown_index(part) for part in index)}]" if index else self.name
        if self.pos is not None and self.key is None:
            return f"{text}@{format_position(self.pos)}"
        if self.key is not None:
            query = "" if self.pos is None else f"query={format_position(self.pos)};"
            return f"{text}@{query}key={format_position(self.key)}"
        return text

    __repr__ = __str__

    @staticmethod
    def parse(text: str) -> Site:
        """The site that `str(site)` shows: `resid_post[3]@-1`, `z[3,5]@target`, `pattern[8:16]@query=text;key=vision`.

        Raises:
            SiteError: not in this form, or an unknown name.
        """
        if not isinstance(text, str):
            raise SiteError(wrong("a site", "the text of one, like 'resid_post[3]@-1'", text))
        body, _, positions = text.strip().partition("@")
        name, bracket, rest = body.partition("[")
        site = named(name.strip())
        if bracket:
            if not rest.endswith("]"):
                raise SiteError(f"{text!r} lacks a closing bracket; write {name}[layer] or {name}[layer,unit]")
            site = site[tuple(parsed_index(part, text) for part in split_at_commas(rest[:-1]))]
        if not positions:
            return site
        if "key=" not in positions:
            return site.at(parse_position(positions))
        parts = dict(part.partition("=")[::2] for part in positions.split(";"))
        if unknown := set(parts) - {"query", "key"}:
            raise SiteError(f"{text!r} has positions of {sorted(unknown)[0]!r}; write {name}[layer]@query=…;key=…")
        return site.at(**{axis: parse_position(chosen) for axis, chosen in parts.items()})


@dataclass(frozen=True, eq=False)  # equality is below: `==` of two tensors is a tensor
class Edit:
    """One change to a site. Made by the methods of `Site`.

    Attributes:
        site: what is changed.
        op: one of `OPS`.
        value: a tensor (`set`, `add`, `project`), a number (`scale`), expert indices (`mask…`, `force…`), these and a
            factor (`boost…`), a function (`apply`), or None.

    Raises:
        PlanError: an operation that the site does not take, or a value of the wrong kind.
    """

    site: Site
    op: str
    value: Any = None

    def __post_init__(self) -> None:
        op, value = self.op, self.value
        if op not in OPS:
            raise PlanError(f"no edit is called {op!r}; there are {', '.join(OPS)}")
        if op in _ONLY and self.site.name != _ONLY[op]:
            raise PlanError(f"{op} is for {_ONLY[op]}, not for {self.site.name}")
        if op in TENSOR_OPS and not is_tensor(value):
            kind = type(value).__name__
            raise PlanError(f"{self.site}: {op} takes a torch tensor, not {kind}; write torch.as_tensor(…) around it")
        if op == "scale" and not _is_finite(value):
            raise PlanError(f"{self.site}: {wrong('scale', 'a finite number', value)}")
        if op in ROUTING:
            self._check_routing()
        if op == "apply" and (fault := no_function_of("x", value)):
            raise PlanError(f"{self.site}: apply takes a function of the value x that returns the new one, {fault}")
        if op == "project" and not 1 <= value.ndim <= 2:
            raise PlanError(f"{self.site}: project takes [d] or [k d] directions, not {list(value.shape)}")
        if op == "project" and not bool((value.detach().norm(dim=-1) > 0).all()):
            raise PlanError(f"{self.site}: project got a direction of length zero")
        if op == "knockout" and self.site.key is None and self.site.pos is None:
            raise PlanError(f"{self.site}: knockout of every key leaves nothing to attend to; give query= and key=")

    def _check_routing(self) -> None:
        op, value = self.op, self.value
        if op in BOOSTS:
            if not (isinstance(value, tuple) and len(value) == 2 and _is_finite(value[1])):
                raise PlanError(f"{self.site}: boost takes experts and a finite factor, not {value!r:.60}")
            value = value[0]
        if not (isinstance(value, tuple) and value and all(type(item) is int for item in value)):
            raise PlanError(f"{self.site}: {op} takes the numbers of experts, not {value!r:.60}")
        if self.site.units is not None:
            raise PlanError(f"{self.site}: {op} is about whole tokens; leave the expert out of the site, {op}(experts)")

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that an edit of what a router selects names."""
        numbers: tuple[int, ...] = self.value[0] if self.op in BOOSTS else self.value if self.op in ROUTING else ()
        return numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.site, self.op, digest(self.value) if is_tensor(self.value) else self.value

    def __str__(self) -> str:
        value = self.value
        if is_tensor(value):
            shown = f" {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        elif self.op in ROUTING:
            shown = " experts=" + ",".join(map(str, self.experts)) + (f" × {value[1]:g}" if self.op in BOOSTS else "")
        elif self.op == "apply":
            shown = f" {getattr(value, '__qualname__', repr(value))}"
        else:
            shown = "" if value is None else f" {value:g}"
        return f"{self.site} {self.op}{shown}"

    __repr__ = __str__


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def define(
    name: str, axes: tuple[str, ...], doc: str, unit: str | None = None, *, layered: bool = True, after: str = ""
) -> Site:
    """A new name for a site, of every model; which families have it, and where, `Family.sites` says.

    Args:
        axes, doc, unit, layered: see `SiteInfo`.
        after: the site that a forward pass meets before it ("": it meets this one last).

    Raises:
        SiteError: the name is taken by a site of other axes, or is no name; `after` is no site.
    """
    info = SiteInfo(tuple(axes), doc, unit, layered)
    if not (isinstance(name, str) and name.isidentifier()):
        raise SiteError(f"{name!r} cannot name a site: write letters, digits and _, as in 'kv_latent'")
    if SITES.get(name, info) != info:
        raise SiteError(f"a site is called {name!r} already: {' '.join(SITES[name].axes)}, {SITES[name].doc}")
    if unit is not None and unit not in axes:
        raise SiteError(f"{name}: its unit {unit!r} is none of its axes {' '.join(axes)}")
    if after:
        number = named(after).info.order
        later = [other.order for other in SITES.values() if other.order > number]
        info = replace(info, order=(number + min(later, default=number + 2)) / 2)  # between the two: others keep theirs
    else:
        info = replace(info, order=float(len(SITES)))
    SITES.setdefault(name, info)
    if after:
        # In place: other modules have this very dictionary.
        ordered = sorted(SITES.items(), key=lambda item: item[1].order)
        SITES.clear()
        SITES.update(ordered)
    return Site(name)


def named(name: str) -> Site:
    """The site of that name, everywhere.

    Raises:
        SiteError: unknown name.
    """
    if not isinstance(name, str) or name not in SITES:
        raise SiteError(no_site(name, SITES))
    return Site(name)


def from_hook(name: str) -> Site:
    """The site that another library calls so: TransformerLens' "blocks.6.hook_resid_pre" is `resid_pre[6]`.

    Raises:
        SiteError: none is called so.
    """
    return Site.parse(ours(str(name), SITES).removeprefix("S.") or named(name).name)


def _experts(experts: Any, what: str) -> Any:
    index = as_index(experts, what)
    return (index,) if isinstance(index, int) else index


def _mode(what: str, modes: Mapping[str, str], mode: Any) -> str:
    if not isinstance(mode, str) or mode not in modes:
        raise PlanError(f"{what}: no mode is called {mode!r}. {nearest(mode, modes)}")
    return modes[mode]


# A forward pass meets them in this order: programs end at the last one read, sweeps begin at the first one edited.
embed = define("embed", _RESID, "output of the token embedding", layered=False)
vision_resid_pre = define("vision_resid_pre", _PATCHES, "vision tower: residual stream that enters the block")
vision_attn_in = define("vision_attn_in", _PATCHES, "vision tower: what the attention reads, after its norm")
vision_q = define("vision_q", _PATCH_HEADS, "vision tower: queries, before query-key norm and rotary embedding", "head")
vision_k = define("vision_k", _PATCH_HEADS, "vision tower: keys, before query-key norm and rotary embedding", "head")
vision_v = define("vision_v", _PATCH_HEADS, "vision tower: values (key-value heads)", "head")
vision_z = define("vision_z", _PATCH_HEADS, "vision tower: input of the output projection, per query head", "head")
vision_head_out = define("vision_head_out", _PATCH_OUTS, "vision tower: z times the head's slice of W_O", "head")
vision_attn_out = define("vision_attn_out", _PATCHES, "vision tower: what attention adds to the residual stream")
vision_resid_mid = define("vision_resid_mid", _PATCHES, "vision tower: residual stream between attention and MLP")
vision_mlp_in = define("vision_mlp_in", _PATCHES, "vision tower: what the MLP reads, after its norm")
vision_mlp_act = define("vision_mlp_act", _PATCH_ACTS, "vision tower: input of the MLP's output projection", "d_mlp")
vision_mlp_out = define("vision_mlp_out", _PATCHES, "vision tower: what the MLP adds to the residual stream")
vision_resid_post = define("vision_resid_post", _PATCHES, "vision tower: residual stream that leaves the block")
vision_pre_merger = define(
    "vision_pre_merger", _PATCHES, "vision tower: patches as the merger or projector reads them", layered=False
)
vision_embed = define("vision_embed", _VISUAL, "what the vision tower hands to the language model", layered=False)
deepstack = define("deepstack", _VISUAL, "visual features that are added after the block (DeepStack)")
resid_pre = define("resid_pre", _RESID, "residual stream that enters the block")
mixer_in = define("mixer_in", _RESID, "what the block's token mixer reads, after its norm")
attn_in = define("attn_in", _RESID, "what the attention reads, after its norm")
q = define("q", _HEADS, "queries, before query-key norm and rotary embedding", "head")
k = define("k", _HEADS, "keys (key-value heads), before query-key norm and rotary embedding", "head")
v = define("v", _HEADS, "values (key-value heads)", "head")
rot_q = define("rot_q", _HEADS, "queries as they meet the keys, after norm and rotary embedding", "head")
rot_k = define("rot_k", _HEADS, "keys (key-value heads) as they meet the queries", "head")
scores = define("scores", _ATTENTION, "attention scores, scaled, capped and masked, before softmax", "head")
pattern = define("pattern", _ATTENTION, "attention probabilities", "head")
z = define("z", _HEADS, "input of the output projection, per query head", "head")
head_out = define("head_out", ("batch", "pos", "head", "d_model"), "z times the head's slice of W_O", "head")
attn_out = define("attn_out", _RESID, "what attention adds to the residual stream")
mixer_gate = define("mixer_gate", ("batch", "pos", "d_mixer"), "gate on what the mixer gives, before its activation")
ssm_state = define("ssm_state", ("batch", "pos", "d_state"), "recurrent state after each position; read only")
mixer_out = define("mixer_out", _RESID, "what the token mixer adds to the residual stream")
resid_mid = define("resid_mid", _RESID, "residual stream between token mixer and MLP")
mlp_in = define("mlp_in", _RESID, "what the MLP reads, after its norm")
mlp_act = define("mlp_act", ("batch", "pos", "d_mlp"), "input of the MLP's output projection", "d_mlp")
router_logits = define("router_logits", _EXPERTS, "router logits; an edit re-routes", "expert")
router_probs = define("router_probs", _EXPERTS, "the router's scores as probabilities; read only", "expert")
router_weights = define("router_weights", _EXPERTS, "executed expert weights, zero where not chosen", "expert")
router_indices = define("router_indices", _CHOSEN, "executed experts, as the router orders them; read only")
shared_expert_gate = define(
    "shared_expert_gate", ("batch", "pos", "gate"), "factor on the shared expert's output; read only"
)
expert_out = define("expert_out", ("batch", "pos", "expert", "d_model"), "weighted output of an expert", "expert")
mlp_out = define("mlp_out", _RESID, "what the MLP adds to the residual stream")
resid_post = define("resid_post", _RESID, "residual stream that leaves the block")
final_norm = define("final_norm", _RESID, "output of the final norm", layered=False)
logits = define("logits", ("batch", "pos", "d_vocab"), "logits of the next token", layered=False)

__all__ = sorted(["SITES", "Site", "SiteInfo", "define", "from_hook", "indices", "named", *SITES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Site:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in SITES:  # a family's own
        return Site(name)
    raise UnknownSiteError(no_site(name, SITES))


def __dir__() -> list[str]:
    return sorted({*__all__, *SITES})
