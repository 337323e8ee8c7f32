"""What a model is made of: its sizes, the layers of its sites, its modules and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .architectures.atlas import Atlas, Entry
from .architectures.parameters import device_of
from .engines.protocol import Engine
from .engines.turns import Turn
from .errors import CapabilityError, PlanError, nearest, wrong
from .sites import Site
from .table import SiteTable

if TYPE_CHECKING:
    from .architectures.parameters import Weights

USES = ("read", "write", "grad", "generate", "rows")


class Structure:
    """The part of `Model` that answers questions and runs nothing, or a few tokens at most."""

    hf: Any
    tokenizer: Any
    source: str
    atlas: Atlas
    engine: Engine
    turn: Turn
    _embedding: Any

    def renew(self) -> bool:
        """See `Model.renew`."""
        raise NotImplementedError

    def sample(self, sites: Sequence[Site]) -> list[Tensor]:
        """See `Model.sample`."""
        raise NotImplementedError

    @property
    def sites(self) -> SiteTable:
        """Every site of this model with its axes; prints as a table."""
        return SiteTable(self.atlas)

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return self.atlas.shape.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.atlas.shape.d_model

    @property
    def d_vocab(self) -> int:
        """Number of tokens that the unembedding has, maybe more than the tokenizer's; of a classifier, labels."""
        return self.atlas.shape.d_vocab

    @property
    def n_heads(self) -> int:
        """Query heads of a layer.

        Raises:
            CapabilityError: the family's heads are not known, or layers differ: `sizes(S.z[layer])["head"]`.
        """
        return self.sizes(Site("z"))["head"]

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads of a layer; as `n_heads`."""
        return self.sizes(Site("v"))["head"]

    @property
    def d_head(self) -> int:
        """Width of a head's values, and of `z`; those of queries and keys may be wider (`sizes(S.q)`). As `n_heads`."""
        return self.sizes(Site("z"))["d_head"]

    @property
    def d_mlp(self) -> int:
        """Neurons of an MLP that is no mixture of experts; as `n_heads`."""
        return self.sizes(Site("mlp_act"))["d_mlp"]

    @cached_property
    def heads(self) -> list[tuple[int, int]]:
        """All `(layer, head)` with a `z` site."""
        return [
            (e.layer, h) for (name, _), e in self.atlas.entries.items() if name == "z" for h in range(e.n_units or 0)
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.hf.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight = self._embedding.weight  # looked at in every run, so without a walk where it is here
        return device_of(self._embedding) if weight.is_meta else weight.device

    @property
    def engine_name(self) -> str:
        """The engine that carries out plans, as it calls itself."""
        return self.engine.name

    def layers(self, site: Site | str) -> list[int]:
        """The layers that a site names and that have it; [] if the model lacks it (`can` says why).

        Raises:
            SiteError: no site is called so, or a layer was asked for that does not have it.
        """
        site = _site(site)
        if site.name in self.atlas.lacking:
            return []
        return [entry.layer for entry in self.atlas.select(site)]

    def sizes(self, site: Site | str) -> Mapping[str, int]:
        """Sizes of a site's feature axes by name, such as `{"head": 12, "d_head": 64}`.

        Raises:
            SiteError: there is no such site or layer.
            CapabilityError: the family lacks it, or the layers that it names differ.
        """
        site = _site(site)
        entries = self.atlas.select(site)
        for entry in entries:
            if entry.sizes != entries[0].sizes:
                first, other = (f"{dict(e.sizes)} in layer {e.layer}" for e in (entries[0], entry))
                raise CapabilityError(f"{site} differs between layers ({first}, {other}); ask for one layer")
        return dict(entries[0].sizes)

    def can(self, site: Site | str, use: str) -> str:
        """Why this model on this engine cannot do something with a site; empty if it can.

        Args:
            site: a site, of which its name counts.
            use: "read", "write", "grad", "generate" (reads and edits while generating) or "rows" (of `pattern`, made
                after the run from what `run(attention=True)` hands over).

        Raises:
            SiteError: no site is called so.
            PlanError: another use.
        """
        name = _site(site).name
        if use not in USES:
            raise PlanError(f"a site has no use {use!r}. {nearest(use, USES)}")
        if name in self.atlas.lacking:
            return self.atlas.lacking[name]
        # A use counts as refused if one layer refuses it: a plan over all layers would be.
        entries = [self.atlas.entries[name, layer] for layer in self.atlas.layers(name)]
        if use == "rows":
            return self._no_rows(entries)
        return next((entry.why[use] for entry in entries if use in entry.why), "")

    def _no_rows(self, entries: Sequence[Entry]) -> str:
        """Why rows of patterns cannot be made after a run."""
        if any(entry.name != "pattern" for entry in entries):
            return f"rows are made of patterns, not of {entries[0].name}"
        if not getattr(self.engine, "attends", False):
            return f"engine {self.engine.name} keeps nothing of which rows of patterns could be made"
        if refused := next((entry.why["rows"] for entry in entries if "rows" in entry.why), ""):
            return refused
        if any(entry.read is None or entry.read.side != "attention" for entry in entries):
            return f"attention of this {self.atlas.family.name} does not go through transformers' attention interface"
        return ""

    def components(self, layer: int | None = None) -> list[str]:
        """Names that `module` takes for a layer, or for what the model has once.

        Args:
            layer: negative counts from the end.
        """
        with self.turn:
            self.renew()
            return list(self.atlas.components.names(None if layer is None else layer % self.n_layers))

    def module(self, component: str, layer: int | None = None) -> nn.Module:
        """The module of `hf` that is a component, by TransformerLens' name of it, whatever the family calls it.

        Args:
            component: once per model `embed`, `embed_ln`, `pos_embed`, `rotary_emb`, `ln_final`, `unembed`,
                `vision_encoder`, `vision_projector`; per layer `block`, `ln1`, `attn`, `attn.q`, `attn.k`, `attn.v`,
                `attn.qkv`, `attn.q_norm`, `attn.k_norm`, `attn.o`, `linear_attn`, `mixer`, `ln1_post`, `ln2`, `mlp`,
                `mlp.in`, `mlp.gate`, `mlp.out`, `router`, `experts`, `ln2_post`.
            layer: for those of a layer; negative counts from the end.

        Raises:
            SiteError: no component is called so, or this layer does not have it (the message says which do).
            CapabilityError: the family has no module for it; the message lists what it has.
        """
        with self.turn:
            self.renew()  # a module that was exchanged since load is the model's, the atlas' own would be a ghost
            return self.atlas.module(component, layer)

    def weights(self, site: Site | str) -> Float[Tensor, "*axes"]:
        """The weights at a site, as TransformerLens lays them out, whatever the family's own layout (fused projections,
        Conv1D, grouped heads, quantized or adapted layers). Several layers are stacked along a first axis.

            q, k, v[l]         [head d_model d_head]     q[l] = attn_in[l] @ weights + bias; k and v have KV heads
            z[l]               [head d_head d_model]     head_out[l] = z[l] @ weights
            mlp_act[l]         [d_mlp d_model]           the MLP's output projection gives mlp_act[l] @ weights + bias
            embed              [d_vocab d_model]         embed = weights[ids]
            logits             [d_model d_vocab]         final_norm @ weights + bias, before a cap
            attn_in, mlp_in[l], final_norm   [d_model]   the norm that makes it, (x - mean) / deviation * weights + bias
                                                         with LayerNorm, x / root mean square * weights with RMSNorm
            attn_out, mlp_out[l]             [d_model]   the same of the norm of what is added, where there is one

        A head or neuron drops its axis: `weights(S.z[2, 3])` is `[d_head d_model]`. The tensor may share memory with
        the model: do not write into it.

        Raises:
            SiteError: a site without weights, or a layer or unit that there is not.
            CapabilityError: here they are no such matrix (queries out of a latent, say), or are not on this machine.
        """
        return self._weights(site).weight

    def bias(self, site: Site | str) -> Float[Tensor, "*axes"]:
        """The bias that belongs to `weights(site)`, zeros where there is none: `[head d_head]` of q, k and v,
        `[d_model]` of the output projections at `z` and `mlp_act` (it is no head's and no neuron's) and of norms,
        `[d_vocab]` of logits.

        Raises:
            SiteError, CapabilityError: as `weights`; or a head of `z`, a neuron, `embed`.
        """
        return self._weights(site, alone=True).bias

    def _weights(self, site: Site | str, alone: bool = False) -> Weights:
        from .weights import WeightReader

        with self.turn:
            self.renew()
            reader = WeightReader(self.atlas, self.hf, self.engine.model, self.hf.dtype, self.sample)
            return reader.read(_site(site), bias=alone)

    def readout(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits that the model would give for a residual stream: its own final norm, unembedding and caps.

        Raises:
            PlanError: not `[… d_model]`.
            CapabilityError: the self-check found that this does not reproduce the model's logits.
        """
        from .readout import readout

        with self._reading_out("readout", resid):
            return readout(self.hf, self.atlas.final_norm, resid)

    def unembed(
        self, normed: Float[Tensor, "... d_model"], tokens: slice | Tensor | None = None
    ) -> Float[Tensor, "... token"]:
        """The second half of `readout`: logits of a stream that has been through the final norm (`S.final_norm`).

        Args:
            tokens: of these alone, a slice or ids `[token]`, for the price of these and in the dtype of `normed`; a
                head that is no plain matrix (quantized, adapted, hooked) works out all.

        Raises:
            PlanError: not `[… d_model]`, or a token id that there is not.
            CapabilityError: as `readout`.
        """
        from .readout import demand_tokens, unembed

        with self._reading_out("unembed", normed):
            demand_tokens(tokens, self.atlas.shape.d_vocab)
            return unembed(self.hf, normed, tokens)

    def unembed_tiles(self, normed: Float[Tensor, "... d_model"], width: int) -> Iterator[Float[Tensor, "... token"]]:
        """All logits that `unembed` gives, `width` tokens at a time from the first on, so that no more are held at once
        (a head that is no plain matrix works out all).

        Raises:
            PlanError: not `[… d_model]`, or a width below 1.
            CapabilityError: as `readout`.
        """
        from .readout import unembed_tiles

        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise PlanError(wrong("unembed_tiles", "a number of tokens, 1 or more", width))
        with self._reading_out("unembed_tiles", normed):
            tiles = unembed_tiles(self.hf, normed, width)
        return self._in_turn(tiles)

    def _in_turn(self, tiles: Iterator[Tensor]) -> Iterator[Tensor]:
        """Each tile made with the turn, which is free while the caller looks at it: a sweep of another thread may have
        the unembedding compute less for the length of a pass."""
        while True:
            with self.turn:
                tile = next(tiles, None)
            if tile is None:
                return
            yield tile

    @contextmanager
    def _reading_out(self, what: str, stream: Tensor) -> Iterator[None]:
        """With the turn, once it is clear that a stream of this model can be read out."""
        from .readout import demand_width

        with self.turn:
            self.renew()
            if "readout" in self.atlas.lacking:
                raise CapabilityError(self.atlas.lacking["readout"])
            demand_width(what, stream, self.atlas.shape.d_model)
            yield


def _site(site: Site | str) -> Site:
    return site if isinstance(site, Site) else Site.parse(site)
