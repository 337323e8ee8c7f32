"""The sizes of a model layer by layer, by its config alone: it is built on the meta device, where nothing is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import atlas_of
from ..architectures.atlas import Atlas
from ..cost import Work
from ..errors import LoadError, PlanError, first_line, nearest
from ..loading import open_config
from .processes import NOT_COUNTED, Shares

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Layer:
    """What a block is made of, in the letters of the page on planning.

    Attributes:
        matrices: numbers in its matrices, without experts (W).
        expert_matrices: numbers in those of all experts (X).
        experts, top_k: how many there are (E), and how many a token takes (k).
        heads, kv_heads: query heads (H; 0: no attention pattern) and key-value heads (G).
        d_key, d_value: widths of a head's keys and values (a, b).
        window: how many tokens a query sees; None: all.
        neurons: of the MLP, or of shared experts (f).
        gated: the MLP has a gate.
        norms: of the stream; two, or four with those after attention and MLP.
        head_norms: queries and keys are normed.
        held: numbers of all its parameters and buffers.
    """

    matrices: int
    expert_matrices: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    d_key: int
    d_value: int
    window: int | None
    neurons: int
    gated: bool
    norms: int
    head_norms: bool
    held: int

    @property
    def expert_neurons(self) -> int:
        """Neurons of an expert times the width of the stream, all three matrices of it: `3 g d`."""
        return self.expert_matrices // self.experts if self.experts else 0


@dataclass(frozen=True)
class Outline:
    """A model by its sizes.

    Attributes:
        source, family: names.
        layers: blocks in order.
        d_model, d_vocab, n_ctx: of the stream, the vocabulary, and the longest text (None: it does not say).
        dtype: of weights and activations.
        held: numbers of all parameters and buffers, tied ones once.
        first, last: of these, what stands before the blocks (embeddings), and behind them.
        unembedding: numbers in the matrix that gives logits.
        capped: logits are capped.
        capped_scores: attention's are.
        plain_gelu: the MLP's activation is made of plain operations.
        wide_norms: norms are made of operations in float32, whatever the dtype.
        wide_softmax: so is the softmax of `eager` attention.
        eager: attention keeps its patterns (`eager`), where "sdpa" does not.
        notes: what is not counted.
        tp: how many processes share it, each on a device of its own.
        part: of these, what the fullest has; None where it is one.
    """

    source: str
    family: str
    layers: tuple[Layer, ...]
    d_model: int
    d_vocab: int
    n_ctx: int | None
    dtype: str
    held: int
    first: int
    last: int
    unembedding: int
    capped: bool
    capped_scores: bool
    plain_gelu: bool
    wide_norms: bool
    wide_softmax: bool
    eager: bool
    notes: tuple[str, ...] = ()
    tp: int = 1
    part: Outline | None = None
    _kinds: dict[tuple[int, int], Mapping[Layer, int]] = field(default_factory=dict, repr=False, compare=False)

    def kinds(self, start: int, stop: int) -> Mapping[Layer, int]:
        """Layers of a stretch, alike ones together, with their number: most models have one kind, or two."""
        if (start, stop) not in self._kinds:
            self._kinds[start, stop] = Counter(self.layers[start:stop])
        return self._kinds[start, stop]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return _dtype(self.dtype).itemsize

    def work(self, prompts: int, tokens: int, **more: int) -> Work:
        """Prompts for this model.

        Raises:
            PlanError: numbers out of range.
        """
        by_layer: dict[str, Any] = {
            name: tuple(getattr(layer, name) for layer in self.layers)
            for name in ("heads", "kv_heads", "experts", "d_key", "d_value")
        }
        sizes = {"d_model": self.d_model, "d_vocab": self.d_vocab, "itemsize": self.itemsize}
        return Work(prompts, tokens, **by_layer | sizes | more)


def outline_of(source: Any, *, dtype: str | None = None, attention: str | None = None, tp: int = 1) -> Outline:
    """The sizes of a model.

    Args:
        source: a `config.json`, a folder with one, a hub id (its config in the cache will do), a toy, or a Hugging Face
            model.
        dtype: of weights and activations (None: what the config says, else float32).
        attention: "sdpa" or "eager" (None: what transformers takes for this family).
        tp: processes that share the model, as `ic.load(…, tp_plan="auto")` does in each of them.

    Raises:
        LoadError: no config, or none that transformers knows; a dtype or an attention that there is not.
        PlanError: a model that so many processes cannot share.
    """
    if tp < 1:
        raise PlanError(f"tp is {tp}: give 1 at least")
    if isinstance(source, nn.Module):
        return _outline(source, str(getattr(source.config, "name_or_path", "") or type(source).__name__), tp)
    config = open_config(source)
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or "float32"
    kind = dtype or str(stored).removeprefix("torch.")
    options: dict[str, Any] = {"dtype": _dtype(kind)}
    if attention is not None:
        if attention not in ("sdpa", "eager"):
            raise LoadError(f"a plan knows no attention {attention!r}. {nearest(attention, ('sdpa', 'eager'))}")
        options["attn_implementation"] = attention
    return _outline(_weightless(config, str(source), options), str(source), tp)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise LoadError(f"a plan knows no dtype {name!r}. {nearest(name, DTYPES)}")
    kind: torch.dtype = getattr(torch, name)
    return kind


def _weightless(config: Any, source: str, options: dict[str, Any]) -> Any:
    """The model on the meta device."""
    import transformers

    auto = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    try:
        with torch.device("meta"):
            return getattr(transformers, auto).from_config(config, **options)
    except Exception as error:  # the code of others, on settings of others
        raise LoadError(
            f"{source}: transformers {transformers.__version__} makes no language model of this config "
            f"({first_line(error)}); give the config of a causal language model"
        ) from error


def _outline(model: Any, source: str, tp: int) -> Outline:
    atlas, config = atlas_of(model), model.config.get_text_config()
    blocks = [atlas.module("block", layer) for layer in range(atlas.shape.n_layers)]
    layers = tuple(_layer(atlas, config, layer, block) for layer, block in enumerate(blocks))
    total = _numbers(model)
    head = model.get_output_embeddings()
    own_head = head is not None and head.weight is not model.get_input_embeddings().weight
    last = _numbers(head) if own_head else 0
    notes = []
    if mixing := sum(not layer.heads for layer in layers):
        notes.append(f"of {mixing} layers without patterns the projections alone are counted")
    if atlas.tower:
        notes.append("the vision tower's weights are counted, its passes are not")
    parts = str(model)
    wide_norms = not isinstance(atlas.module("ln1", 0), nn.LayerNorm) if "ln1" in atlas.components.names(0) else True
    whole = Outline(
        Path(source).name if source.endswith(".json") else source, atlas.family.name, layers, atlas.shape.d_model,
        atlas.shape.d_vocab, atlas.shape.n_ctx, str(model.dtype).removeprefix("torch."), total,
        total - last - sum(layer.held for layer in layers), last, atlas.shape.d_model * atlas.shape.d_vocab,
        bool(getattr(config, "final_logit_softcapping", None)), bool(getattr(config, "attn_logit_softcapping", None)),
        "NewGELU" in parts, wide_norms, atlas.family.name != "gpt2", config._attn_implementation == "eager",
        tuple(notes),
    )  # fmt: skip
    if tp == 1:
        return whole
    return replace(whole, tp=tp, part=_part(whole, model, atlas, tp), notes=(*notes, NOT_COUNTED), _kinds={})


def _part(whole: Outline, model: Any, atlas: Atlas, tp: int) -> Outline:
    """What the fullest of so many processes has."""
    shares, layers = Shares(model, tp, whole.source), []
    for number, layer in enumerate(whole.layers):
        block, there = atlas.module("block", number), atlas.components.names(number)
        attention, experts = (
            list(atlas.module(name, number).parameters()) if name in there else [] for name in ("attn", "experts")
        )
        apart = {id(weight) for weight in (*attention, *experts)}
        mlp = [weight for weight in block.parameters() if id(weight) not in apart]
        where = f"of layer {number} of {whole.source}"
        layers.append(
            replace(
                layer, held=shares.held(block), neurons=shares.divided(layer.neurons, mlp),
                heads=shares.divided(layer.heads, attention, f"heads {where}"),
                kv_heads=shares.divided(layer.kv_heads, attention, f"key-value heads {where}"),
                expert_matrices=shares.of(weight for weight in experts if weight.ndim > 1),
            )
        )  # fmt: skip
    total, last = shares.held(model), shares.held(model.get_output_embeddings()) if whole.last else 0
    first = total - last - sum(layer.held for layer in layers)
    return replace(whole, layers=tuple(layers), held=total, first=first, last=last, _kinds={})


def _layer(atlas: Atlas, config: Any, layer: int, block: nn.Module) -> Layer:
    there = set(atlas.components.names(layer))
    experts = list(atlas.module("experts", layer).parameters()) if "experts" in there else []
    apart = {id(weight) for weight in experts}
    matrices = _matrices(block, apart)
    count = atlas.entries["router_logits", layer].sizes["expert"] if ("router_logits", layer) in atlas.entries else 0
    attention = _matrices(atlas.module("attn", layer), apart) if "attn" in there else 0
    router = _matrices(atlas.module("router", layer), apart) if "router" in there else 0
    act = atlas.entries.get(("mlp_act", layer))
    sizes = {name: dict(entry.sizes) for name in ("q", "v", "z") if (entry := atlas.entries.get((name, layer)))}
    neurons = (matrices - attention - router) // (3 * atlas.shape.d_model)
    gated = True
    if act is not None and not count:
        gated = "mlp.gate" in there or neurons >= act.sizes["d_mlp"]
        neurons = act.sizes["d_mlp"]
    heads = sizes.get("z", {}).get("head", 0)
    width = sizes.get("z", {}).get("d_head", 0)
    key, value = sizes.get("q", {}), sizes.get("v", {})
    return Layer(
        matrices, sum(weight.numel() for weight in experts if weight.ndim > 1), count,
        int(getattr(config, "num_experts_per_tok", 0) or getattr(config, "top_k_experts", 0) or 0) if count else 0,
        heads, value.get("head", heads), key.get("d_head", width), value.get("d_head", width),
        atlas.reaches[layer].window if layer in atlas.reaches else None, neurons, gated,
        len(there & {"ln1", "ln1_post", "ln2", "ln2_post"}), "attn.q_norm" in there, _numbers(block),
    )  # fmt: skip


def _matrices(module: nn.Module, apart: set[int]) -> int:
    """Numbers in what tokens are multiplied by: no embeddings, no convolutions, none of `apart`."""
    looked_up = {
        id(weight)
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.Conv1d))
        for weight in part.parameters()
    }
    weights = [weight for weight in module.parameters() if weight.ndim > 1 and id(weight) not in apart | looked_up]
    return sum(weight.numel() for weight in weights)


def _numbers(module: nn.Module) -> int:
    """Numbers of all parameters and buffers, shared ones once."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
