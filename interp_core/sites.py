"""What can be named inside a model: sites, and the edits that one can make at them.

A `Site` is plain data: a name, layers, units (heads, experts, neurons) and positions. Nothing here touches a model.

    from interp_core import sites as S

    S.resid_post                 every layer
    S.resid_post[2]              one layer; negative counts from the end; slices and lists select several
    S.z[3, 5]                    head 5 of layer 3
    S.z[3, 5].at(-1)             at the last real token of every row
    S.pattern[8:16].at(query="text", key="vision")

    S.z[3, 5].at(-1).zero()      an `Edit`

Axes of a value are those of the table below; an integer for a layer, unit or position drops its axis, as in numpy.
Names follow TransformerLens. Those of a vision tower are the same with `vision_` before them: `S.vision_z[3, 5]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import PlanError, SiteError, nearest, wrong
from .positions import Position, PositionLike, Slice, format_position, parse_position, position

if TYPE_CHECKING:
    from torch import Tensor

    from .edits import Edit

__all__ = [
    "SITES", "Site", "SiteInfo", "attn_in", "attn_out", "deepstack", "embed", "expert_out", "final_norm", "head_out",
    "indices", "k", "logits", "mlp_act", "mlp_in", "mlp_out", "named", "pattern", "q", "resid_mid", "resid_post",
    "resid_pre", "rot_k", "rot_q", "router_indices", "router_logits", "router_probs", "router_weights", "scores",
    "shared_expert_gate", "v", "vision_attn_in", "vision_attn_out", "vision_embed", "vision_head_out", "vision_k",
    "vision_mlp_act", "vision_mlp_in", "vision_mlp_out", "vision_pre_merger", "vision_q", "vision_resid_mid",
    "vision_resid_post", "vision_resid_pre", "vision_v", "vision_z", "z",
]  # fmt: skip

Index = int | Slice | tuple[int, ...] | None
"""Normal form of a layer or unit selection; None selects all."""


@dataclass(frozen=True)
class SiteInfo:
    """What a site name means.

    Attributes:
        axes: names of the axes of its value, all layers' alike.
        unit: the axis that a second index selects (`head`, `expert`, `d_mlp`), if any.
        layered: whether the site exists once per layer.
        doc: one line for tables.
    """

    axes: tuple[str, ...]
    doc: str
    unit: str | None = None
    layered: bool = True

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
_VISUAL = ("batch", "visual", "d_model")
_PATCHES = ("batch", "patch", "d_model")

VISION_ = "vision_"
"""Begins the name of a tower's site, before the name of the same thing in the language model."""


def _of_tower(info: SiteInfo) -> SiteInfo:
    axes = tuple("patch" if axis == "pos" else axis for axis in info.axes)
    return replace(info, axes=axes, doc=f"vision tower: {info.doc}")


SITES: dict[str, SiteInfo] = {
    "embed": SiteInfo(_RESID, "output of the token embedding", layered=False),
    "vision_embed": SiteInfo(_VISUAL, "what the vision tower hands to the language model", layered=False),
    "deepstack": SiteInfo(_VISUAL, "visual features that are added after the block (DeepStack)"),
    "resid_pre": SiteInfo(_RESID, "residual stream that enters the block"),
    "attn_in": SiteInfo(_RESID, "what the attention reads, after its norm"),
    "q": SiteInfo(_HEADS, "queries, before query-key norm and rotary embedding", "head"),
    "k": SiteInfo(_HEADS, "keys (key-value heads), before query-key norm and rotary embedding", "head"),
    "v": SiteInfo(_HEADS, "values (key-value heads)", "head"),
    "rot_q": SiteInfo(_HEADS, "queries as they meet the keys, after norm and rotary embedding", "head"),
    "rot_k": SiteInfo(_HEADS, "keys (key-value heads) as they meet the queries", "head"),
    "scores": SiteInfo(_ATTENTION, "attention scores, scaled, capped and masked, before softmax", "head"),
    "pattern": SiteInfo(_ATTENTION, "attention probabilities", "head"),
    "z": SiteInfo(_HEADS, "input of the output projection, per query head", "head"),
    "head_out": SiteInfo(("batch", "pos", "head", "d_model"), "z times the head's slice of W_O", "head"),
    "attn_out": SiteInfo(_RESID, "what attention adds to the residual stream"),
    "resid_mid": SiteInfo(_RESID, "residual stream between attention and MLP"),
    "mlp_in": SiteInfo(_RESID, "what the MLP reads, after its norm"),
    "mlp_act": SiteInfo(("batch", "pos", "d_mlp"), "input of the MLP's output projection", "d_mlp"),
    "router_logits": SiteInfo(_EXPERTS, "router logits; an edit re-routes", "expert"),
    "router_probs": SiteInfo(_EXPERTS, "the router's scores as probabilities; read only", "expert"),
    "router_weights": SiteInfo(_EXPERTS, "executed expert weights, zero where not chosen", "expert"),
    "router_indices": SiteInfo(("batch", "pos", "k"), "executed experts, as the router orders them; read only"),
    "shared_expert_gate": SiteInfo(("batch", "pos", "gate"), "factor on the shared expert's output; read only"),
    "expert_out": SiteInfo(("batch", "pos", "expert", "d_model"), "weighted output of an expert", "expert"),
    "mlp_out": SiteInfo(_RESID, "what the MLP adds to the residual stream"),
    "resid_post": SiteInfo(_RESID, "residual stream that leaves the block"),
    "final_norm": SiteInfo(_RESID, "output of the final norm", layered=False),
    "logits": SiteInfo(("batch", "pos", "d_vocab"), "logits of the next token", layered=False),
}
_TOWER = "resid_pre attn_in q k v z head_out attn_out resid_mid mlp_in mlp_act mlp_out resid_post"
SITES = {
    "embed": SITES["embed"],
    **{f"{VISION_}{name}": _of_tower(SITES[name]) for name in _TOWER.split()},
    "vision_pre_merger": SiteInfo(
        _PATCHES, "vision tower: patches as the merger or projector reads them", layered=False
    ),
    **SITES,
}
"""All site names in the order in which a forward pass meets them."""


@dataclass(frozen=True, slots=True)
class Site:
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
            raise SiteError(f"{self.name}[{_show(index)}] has {len(items)} indices, {self.name} takes {takes}")
        chosen: dict[str, Any] = {f: _index(item, self.name) for f, item in zip(fields, items, strict=False)}
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
            self,
            pos=self.pos if chosen is None else position(chosen),
            key=self.key if key is None else position(key),
        )

    @property
    def info(self) -> SiteInfo:
        """Axes, unit axis and description of this site's name."""
        return SITES[self.name]

    @property
    def whole(self) -> Site:
        """The same site and layers, all units and positions."""
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
        from .edits import MASKS

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
        from .edits import FORCES

        return self._edit(_mode("force", FORCES, mode), _experts(experts, "force"))

    def boost(self, experts: int | Sequence[int], factor: float, renormalise: bool = False) -> Edit:
        """`router_weights` only: multiply the executed weights of experts, where they are chosen. An expert that is
        chosen nowhere is an EffectError.

        Args:
            renormalise: rescale a token's weights to the sum that they had.
        """
        return self._edit("boost_renormalised" if renormalise else "boost", (_experts(experts, "boost"), factor))

    def _edit(self, op: str, value: Any) -> Edit:
        from .edits import Edit

        return Edit(self, op, value)

    def __str__(self) -> str:
        index = [part for part in (self.layers, self.units) if part is not None]
        if self.layers is None and self.units is not None and self.info.layered:
            index = [Slice(), self.units]
        text = f"{self.name}[{','.join(_show(part) for part in index)}]" if index else self.name
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
        body, _, place = text.strip().partition("@")
        name, bracket, rest = body.partition("[")
        site = named(name.strip())
        if bracket:
            if not rest.endswith("]"):
                raise SiteError(f"{text!r} lacks a closing bracket; write {name}[layer] or {name}[layer,unit]")
            site = site[tuple(_parse_index(part, text) for part in _split(rest[:-1]))]
        if not place:
            return site
        if "key=" not in place:
            return site.at(parse_position(place))
        parts = dict(part.partition("=")[::2] for part in place.split(";"))
        if unknown := set(parts) - {"query", "key"}:
            raise SiteError(f"{text!r} has positions of {sorted(unknown)[0]!r}; write {name}[layer]@query=…;key=…")
        return site.at(**{axis: parse_position(where) for axis, where in parts.items()})


def named(name: str) -> Site:
    """The site of that name, everywhere.

    Raises:
        SiteError: unknown name.
    """
    if not isinstance(name, str) or name not in SITES:
        raise SiteError(f"no site is called {name!r}. {nearest(name, SITES)}")
    return Site(name)


def _index(item: Any, name: str) -> Index:
    if item.__class__ is int:  # nearly all
        return item
    if hasattr(item, "tolist"):
        item = item.tolist()
    if _is_integer(item):
        return int(item)
    if isinstance(item, slice):
        whole = item == slice(None)
        return None if whole else Slice(item.start, item.stop, item.step)
    if isinstance(item, Slice) or item is None:
        return item
    if isinstance(item, Sequence) and not isinstance(item, str):
        if not item:
            raise SiteError(f"{name}[[]]: an empty list selects nothing")
        if all(map(_is_integer, item)):
            return tuple(int(i) for i in item)
    raise SiteError(f"{name}[{item!r:.60}]: a layer or unit is an integer, slice or list of integers")


def _experts(experts: Any, what: str) -> Any:
    index = _index(experts, what)
    return (index,) if isinstance(index, int) else index


def _mode(what: str, modes: Mapping[str, str], mode: Any) -> str:
    if not isinstance(mode, str) or mode not in modes:
        raise PlanError(f"{what}: no mode is called {mode!r}. {nearest(mode, modes)}")
    return modes[mode]


def _is_integer(item: Any) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool)


def indices(index: Index, size: int, what: str, where: object) -> range | tuple[int, ...]:
    """The numbers that an index selects out of `size`, negative ones counted from the end.

    Raises:
        SiteError: out of range; `what` names the axis (`layer`, `head`), `where` what was asked.
    """
    if index is None:
        return range(size)
    if isinstance(index, Slice):
        found = range(size)[index.slice]
        if not found:
            raise SiteError(f"{where} selects no {what}: there are {size}, 0 to {size - 1}")
        return found
    asked = (index,) if isinstance(index, int) else index
    for i in asked:
        if not -size <= i < size:
            raise SiteError(f"{where}: no {what} {i}, there are {size}, 0 to {size - 1}")
    return tuple(i % size for i in asked)


def _show(index: Any) -> str:
    if isinstance(index, slice):
        index = Slice(index.start, index.stop, index.step)
    if isinstance(index, tuple):
        return "[" + ",".join(map(str, index)) + "]"
    return str(index)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _parse_index(text: str, whole: str) -> Any:
    text = text.strip()
    try:
        if text.startswith("["):
            return [int(part) for part in text.strip("[]").split(",")]
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return int(text)
    except ValueError:
        raise SiteError(f"{whole!r}: {text!r} is not an integer, a slice like 2:5 or a list like [1,4]") from None


embed = Site("embed")
vision_resid_pre = Site("vision_resid_pre")
vision_attn_in = Site("vision_attn_in")
vision_q = Site("vision_q")
vision_k = Site("vision_k")
vision_v = Site("vision_v")
vision_z = Site("vision_z")
vision_head_out = Site("vision_head_out")
vision_attn_out = Site("vision_attn_out")
vision_resid_mid = Site("vision_resid_mid")
vision_mlp_in = Site("vision_mlp_in")
vision_mlp_act = Site("vision_mlp_act")
vision_mlp_out = Site("vision_mlp_out")
vision_resid_post = Site("vision_resid_post")
vision_pre_merger = Site("vision_pre_merger")
vision_embed = Site("vision_embed")
deepstack = Site("deepstack")
resid_pre = Site("resid_pre")
attn_in = Site("attn_in")
q = Site("q")
k = Site("k")
v = Site("v")
rot_q = Site("rot_q")
rot_k = Site("rot_k")
scores = Site("scores")
pattern = Site("pattern")
z = Site("z")
head_out = Site("head_out")
attn_out = Site("attn_out")
resid_mid = Site("resid_mid")
mlp_in = Site("mlp_in")
mlp_act = Site("mlp_act")
router_logits = Site("router_logits")
router_probs = Site("router_probs")
router_weights = Site("router_weights")
router_indices = Site("router_indices")
shared_expert_gate = Site("shared_expert_gate")
expert_out = Site("expert_out")
mlp_out = Site("mlp_out")
resid_post = Site("resid_post")
final_norm = Site("final_norm")
logits = Site("logits")


def __getattr__(name: str) -> NoReturn:
    if name.startswith("_"):
        raise AttributeError(name)
    raise _UnknownSiteAttribute(f"no site is called {name!r}. {nearest(name, SITES)}")


class _UnknownSiteAttribute(SiteError, AttributeError):
    """`S.reisd_post`: both a SiteError and what `hasattr` expects."""
