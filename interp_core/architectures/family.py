"""What a model family file says: only what module paths do not.

Module paths come from TransformerLens' adapters (`paths.json`). A family file adds how a fused projection splits,
where a router sits and how it selects, which blocks are parallel, and what the family cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .grids import Grid
from .routing import Router

View = Callable[[Tensor], Tensor]
"""A strided view of a module's tensor in the axes of a site: writing to the view writes to the tensor."""

Join = Callable[[nn.Module, str, Tensor, Tensor], Tensor]
"""How a block goes on, of the block, the site of the stream that follows (`resid_mid` or `resid_post`), the stream
before it, and what is added."""


class Arrangement(NamedTuple):
    """What becomes of the features of a projection before its heads are a view of them, as another order: the way
    there, and back."""

    into: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def clipped(config: Any, arranged: Arrangement | None) -> Arrangement | None:
    """What attention makes of a projection's features before they are heads: it may clip them (`clip_qkv` of DBRX, MPT
    and OLMo)."""
    clip = getattr(getattr(config, "attn_config", config), "clip_qkv", None)
    if not clip:
        return arranged
    into, back = arranged or (lambda x: x, torch.clone)  # OLMo clips in place
    return Arrangement(lambda x: into(x).clamp(-clip, clip), back)


@dataclass(frozen=True)
class Heads:
    """Head counts of one attention layer; `d_key` is the width of queries and keys where it is not that of values."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_key: int = 0


Fused = Callable[[Heads, str], View]
"""How a fused query-key-value projection splits: heads and one of "q", "k", "v" to a view `[batch pos head d_head]`."""


def split_heads(n_heads: int, d_head: int) -> View:
    """`[batch pos (head d_head)]` as `[batch pos head d_head]`."""
    return lambda x: x.view(x.shape[0], x.shape[1], n_heads, d_head)


def fused_blocks(heads: Heads, part: str) -> View:
    """All queries, then all keys, then all values (GPT-2, Phi-3)."""
    q, kv = heads.n_heads * heads.d_head, heads.n_kv_heads * heads.d_head
    start = {"q": 0, "k": q, "v": q + kv}[part]
    n = heads.n_heads if part == "q" else heads.n_kv_heads
    split = split_heads(n, heads.d_head)
    return lambda x: split(x[..., start : start + n * heads.d_head])


def fused_per_head(heads: Heads, part: str) -> View:
    """Query, key and value of each head side by side (GPT-NeoX)."""
    d = heads.d_head
    start = {"q": 0, "k": d, "v": 2 * d}[part]
    split = split_heads(heads.n_heads, 3 * d)
    return lambda x: split(x)[..., start : start + d]


def fused_per_head_or_shared(heads: Heads, part: str) -> View:
    """Query, key and value of each head side by side, or all queries, then the keys and values that they share (Falcon,
    GPT-BigCode)."""
    return (fused_per_head if heads.n_heads == heads.n_kv_heads else fused_blocks)(heads, part)


def first_half(heads: Heads, part: str) -> View:
    """The first half of what belongs to each head (Qwen3-Next: query, then gate)."""
    split = split_heads(heads.n_heads if part == "q" else heads.n_kv_heads, 2 * heads.d_head)
    return lambda x: split(x)[..., : heads.d_head]


def llama_like(model: str) -> dict[str, str]:
    """Module paths of blocks with Llama's names, for classes that TransformerLens has no adapter for."""
    attention = {f"blocks.attn.{part}": f"{part}_proj" for part in "qkvo"}
    norms = {"blocks.ln1": "input_layernorm", "blocks.ln2": "post_attention_layernorm"}
    ends = {"blocks": f"{model}.layers", "embed": f"{model}.embed_tokens", "ln_final": f"{model}.norm"}
    return {
        **ends,
        **norms,
        **attention,
        "blocks.attn": "self_attn",
        "blocks.mlp": "mlp",
        "blocks.mlp.in": "up_proj",
        "blocks.mlp.gate": "gate_proj",
        "blocks.mlp.out": "down_proj",
    }


@dataclass(frozen=True)
class Place:
    """One side of a module in the block, for sites that lie elsewhere than usual.

    Attributes:
        module: its path in the block.
        side: `in` or `out`.
        flat: batch and pos pass there flattened.
    """

    module: str
    side: Literal["in", "out"]
    flat: bool = False


@dataclass(frozen=True)
class Family:
    """What the atlas must know of a family beyond module paths.

    Attributes:
        name: for tables and messages.
        paths: canonical component to module path, over TransformerLens' table (`blocks.mlp.out`, …). Alternatives are
            joined by `|`; the first that a block has is taken. What no block of a model has is refused at load, unless
            it ends with `|`: not all models of the family have it.
        varied: paths that not all blocks share, given the block ("" for none).
        fused: how `blocks.attn.qkv` splits.
        arranged: another order of that projection's features, given the heads, where no view of it has them as heads;
            then `fused` splits what is in that order. None for models that need none.
        views: how the projections of single parts (`q`, `k`, `v`) split, where they hold more than that part.
        heads: head counts of a layer, given its attention module and the counts by its weights.
        inside: of `q`, `k`, `v` those that are read inside attention, for families where no module gives them.
        beside: by `attn_out` or `mlp_out`, a module in the block that is called before attention or MLP, on the same
            input; what both give is added.
        places: `attn_in`, `attn_out` (also of mixers that are no attention), `mixer_in`, `resid_mid` and sites of the
            MLP that lie elsewhere than at `blocks.attn`, before `blocks.ln2` and at `blocks.mlp`; or a function of the
            config that gives them.
        added: factors by which the block multiplies what mixer and MLP give before it adds them to the stream, by site
            (`attn_out`, `mlp_out`, and `beside` for a module beside these), given the block.
        biases: what the block adds to these products, by site, given the block.
        join: how the block goes on from the stream and what is added to it, where that is not their sum.
        mixed: what attention makes of pattern and values (`z`), given its module and both, where that is more than
            their product.
        calls: how often a layer calls attention, with the same queries and keys, for parts of the values.
        summed: where the stream passes with the MLP's part added, in blocks that go on to change it.
        parallel: whether attention and MLP read the same residual, given the config; None: as transformers' word for
            that says, `use_parallel_residual`, or as the norms that a block has let it be seen.
        router: where blocks have one.
        refuse: sites that the family cannot give, with the reason.
        refuse_if: sites that models with some configs cannot give, with the reason, given the config.
        grid: which pixels each visual token stands for.
        pixels: what the first axis of `pixel_values` counts.
        tower: what is odd about the blocks of the vision tower, as a family of its own. Its `places` may have
            `pre_merger`.
        needs: inputs without which transformers takes images for text, silently.
        whole_images: visual tokens of an image see its later ones too.
        bare: the unembedding reads the stream as the last block leaves it (that has normed it): there is no final norm;
            or a function of the config that says so.
        unfit: why a model of the family cannot be taken as it is, given the config; "" if it can.
        sites: functions that find sites of the family's own in a block (`sites.define` names them; see `locate.Block`).
        carried: paths of attributes in which a forward pass of the family leaves something for the next one (Qwen-VL's
            `model.rope_deltas`). Runs are to depend on their input alone, so each starts with these at None and puts
            back what it has found.
    """

    name: str
    paths: Mapping[str, str] = field(default_factory=dict)
    varied: Callable[[Any], Mapping[str, str]] | None = None
    fused: Fused | None = None
    arranged: Callable[[Heads], Arrangement | None] | None = None
    views: Mapping[str, Fused] = field(default_factory=dict)
    heads: Callable[[Any, Heads], Heads] | None = None
    inside: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Place] | Callable[[Any], Mapping[str, Place]] = field(default_factory=dict)
    added: Callable[[Any], Mapping[str, float | Tensor]] | None = None
    biases: Callable[[Any], Mapping[str, Tensor]] | None = None
    join: Join | None = None
    summed: Place | None = None
    mixed: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    calls: int = 1
    parallel: Callable[[Any], bool] | None = None
    router: Router | None = None
    refuse: Mapping[str, str] = field(default_factory=dict)
    refuse_if: Callable[[Any], Mapping[str, str]] | None = None
    grid: Grid | None = None
    pixels: Literal["", "image", "tile", "patch", "row"] = ""
    tower: Family | None = None
    needs: tuple[str, ...] = ()
    whole_images: bool = False
    bare: bool | Callable[[Any], bool] = False
    unfit: Callable[[Any], str] | None = None
    sites: tuple[Callable[[Any], None], ...] = ()
    carried: tuple[str, ...] = ()


def fault(name: str, value: Any) -> str:
    """What is wrong with an imported value as the file of a family."""
    return "" if isinstance(value, Family) else f"is a {type(value).__name__}, not a Family"
