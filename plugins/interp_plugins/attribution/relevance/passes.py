"""Relevance of tokens and of inner sites: one forward pass under rules, and a backward pass per question.

    R(token)  = Σ_d e · ∂y/∂e                       e: what enters the first block (`embed`; with images the fused
                                                    embeddings), y: a weighted sum of chosen logits
    R(site)   = Σ value · ∂y/∂value                 over the feature axes (d_model, d_head, d_mlp)
    R(visual) = Σ_d e · ∂y/∂e + Σ_layers Σ_d f · ∂y/∂f      f: DeepStack features, inputs of their own
    R(pos)    = Σ_layers Σ_d t · ∂y/∂t              t: tables of positions, where the rules take them as inputs

The gradient follows the rules. y is linear in its weights, so any number of questions share the forward pass, and the
relevance of a span is the sum of its tokens' relevances.

Source: Achtibat et al. (2024), arXiv:2402.05602; DeepStack inputs as in Pan et al. (2026), arXiv:2602.01914; positions
Bakish et al. (2025), arXiv:2506.02138.

Cost: a span is one forward and one backward pass. `relevance_rows` is one backward pass per target token over the
tokens before it, and a forward pass per √(2T) of them; the last layer's MLP runs on the predicting positions alone.
Must equal: input × gradient without rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S

from .rules import Rules


class AtSites(dict[S.Site, Tensor]):
    """Relevance by site, one layer each; `[S.z]`, without a layer, is that of all its layers, `[layer …]`."""

    def __missing__(self, site: S.Site) -> Tensor:
        layers = [value for known_site, value in self.items() if known_site.name == site.name]
        if site != S.Site(site.name) or not layers:
            known = ", ".join(map(str, self)) or "none"
            raise ic.SiteError(f"no relevance of {site} was asked for; there is that of: {known}. Name it in sites=")
        return torch.stack(layers)


class Relevances(NamedTuple):
    """The relevance of everything for one weighted sum of logits.

    Attributes:
        tokens: per token of the row; DeepStack's part of a visual token is in it.
        objective: the sum of logits itself.
        relevance: of the sites that were asked for, summed over their feature axes, without the batch's axis:
            `run.relevance[S.z[3]]`, or of all layers `run.relevance[S.z]`.
        deepstack: DeepStack's part by itself.
        positions: of tables of positions: signed, and layer by layer without sign, per token; not in `tokens`.
    """

    tokens: Float[Tensor, " pos"]
    objective: float
    relevance: AtSites
    deepstack: Float[Tensor, " pos"] | None = None
    positions: Float[Tensor, "two pos"] | None = None


class Explained:
    """One forward pass of one row under rules, which keeps its graph for any number of questions.

    Attributes:
        logits: at the positions asked for `[asked d_vocab]`.

    Args:
        tokens: one row without padding.
        at: positions whose logits can be asked about, ascending.
        sites: inner sites, whole; without a layer, all of them.
        alone: nothing but the logits is needed of the last layer, so its MLP runs at these positions alone.
    """

    def __init__(
        self, model: ic.Model, tokens: ic.Tokens, chosen: Rules, at: Sequence[int], sites: Sequence[S.Site] = (),
        *, alone: bool = False,
    ) -> None:  # fmt: skip
        self._tokens, self._entry = tokens, S.resid_pre[0] if tokens.inputs else S.embed
        deep = [S.deepstack[layer] for layer in model.layers(S.deepstack)] if tokens.inputs else []
        self._inner = [inner for site in sites for inner in _single(model, site)]
        self._sites = [self._entry, *deep, *self._inner]
        # zeros that are added at a site have its gradient, and leave the value itself in the graph of those before it
        self._zeros = [_zero(model, tokens, site) for site in self._sites]
        edits = [site.add(zero) for site, zero in zip(self._sites, self._zeros, strict=True)]
        # rules hold in the forward pass alone: what they pass back is decided there, and the backward passes come later
        with chosen.on(model) as places, _narrowed(model, tokens, at if alone and not sites else None):
            run = model.run(tokens, read=self._sites, edits=edits, logits=list(at), allow_noop=True)
        self._places = places
        self._values = [run[site].plain.detach() for site in self._sites]
        self.logits = run.logits.plain[0]

    def chosen(self, ids: Sequence[int] | None = None, against: int | None = None) -> Float[Tensor, " asked"]:
        """A logit per position asked for.

        Args:
            ids: of the tokens (None: each position's largest).
            against: id of a token whose logit is taken away.
        """
        largest = self.logits.argmax(-1) if ids is None else torch.tensor(list(ids), device=self.logits.device)
        logits = self.logits.gather(-1, largest[:, None])[:, 0]
        return logits if against is None else logits - self.logits[:, against]

    def relevance(
        self, logits: Float[Tensor, " asked"], weights: Tensor | None = None, last: bool = False
    ) -> Relevances:
        """One backward pass from a weighted sum of what `chosen` gave (default: from the plain sum).

        Args:
            last: let go of the graph.
        """
        weights = torch.ones_like(logits) if weights is None else weights.to(logits)
        tables = [table for layer in self._places.tables.values() for table in layer]
        grads = torch.autograd.grad(
            logits, [*self._zeros, *tables], weights, retain_graph=not last, allow_unused=True, materialize_grads=True
        )
        grads, of_tables = grads[: len(self._zeros)], grads[len(self._zeros) :]
        parts = [_summed(value, grad, site) for value, grad, site in zip(self._values, grads, self._sites, strict=True)]
        first = len(parts) - len(self._inner)
        of_tokens, deep = parts[0], None
        if first > 1:
            deep = torch.zeros_like(of_tokens)
            deep[torch.tensor(self._tokens.columns("vision")[0])] = torch.stack(parts[1:first]).sum(0)
            of_tokens = of_tokens + deep
        positions = _positions(tables, of_tables, len(of_tokens))
        inner = AtSites(zip(self._inner, parts[first:], strict=True))
        return Relevances(of_tokens, float((logits.detach() * weights).sum()), inner, deep, positions)


def relevance(
    model: ic.Model,
    tokens: ic.Tokens,
    chosen: Rules,
    at: Sequence[int],
    ids: Sequence[int] | None = None,
    *,
    weights: Tensor | None = None,
    against: int | None = None,
    sites: Sequence[S.Site] = (),
) -> Relevances:
    """Relevance for a weighted sum of logits: one forward pass and one backward pass.

    Args:
        tokens: one row without padding.
        chosen: the rules.
        at: positions whose logits are summed.
        ids: the token that is meant at each (None: each position's largest logit).
        weights: per position (default: 1).
        against: id of a token whose logit is taken away at each position.
        sites: inner sites whose relevance is wanted, whole.

    Raises:
        CapabilityError: the rules do not reach what the model computes, or a site cannot be changed here.
    """
    explained = Explained(model, tokens, chosen, at, sites, alone=True)
    return explained.relevance(explained.chosen(ids, against), weights, last=True)


def relevance_rows(
    model: ic.Model,
    tokens: ic.Tokens,
    chosen: Rules,
    at: Sequence[int],
    ids: Sequence[int] | None = None,
    *,
    against: int | None = None,
) -> Float[Tensor, "asked pos"]:
    """Relevance for the logit at each of ascending positions, zero behind it; arguments as `relevance`.

    A position owes nothing to later ones, so positions go together in groups of neighbours, and each group's passes
    end with its last. (With images whole rows run.)
    """
    length, rows = tokens.ids.shape[1], []
    step = len(at) if tokens.inputs else group_size(length)
    with ic.Progress("rows", len(at)) as progress:
        for start in range(0, len(at), step):
            group = list(at[start : start + step])
            part = tokens if tokens.inputs else _head(tokens, group[-1] + 1)
            explained = Explained(model, part, chosen, group, alone=True)
            logits = explained.chosen(None if ids is None else ids[start : start + step], against)
            for i, seed in enumerate(torch.eye(len(group), device=logits.device)):
                row = explained.relevance(logits, seed, last=i == len(group) - 1).tokens
                rows.append(torch.cat([row, row.new_zeros(length - len(row))]))
                progress.add()
    return torch.stack(rows)


def group_size(length: int) -> int:
    """How many neighbours go together. A group's rows all run to its end: many groups repeat forward passes, few carry
    backward passes too far; √(2T) is where the two cost the same."""
    return max(1, round(math.sqrt(2 * length)))


def _head(tokens: ic.Tokens, length: int) -> ic.Tokens:
    return ic.Tokens(tokens.ids[:, :length], tokens.mask[:, :length])


def _single(model: ic.Model, site: S.Site) -> list[S.Site]:
    """A site's layers, one by one.

    Raises:
        PlanError: a part of a site.
        CapabilityError: its value cannot be an input of a backward pass.
    """
    if site != site.whole:
        raise ic.PlanError(f"relevance of {site}: give whole sites, as {site.whole}")
    if why := model.can(site.name, "write"):
        raise ic.CapabilityError(f"relevance of {site}: {why}")
    return [S.named(site.name)[layer] for layer in model.layers(site)] if site.info.layered else [site]


def _zero(model: ic.Model, tokens: ic.Tokens, site: S.Site) -> Tensor:
    """What is added at a site, to differentiate by."""
    sizes = {"batch": 1, **dict.fromkeys(("pos", "query", "key"), tokens.ids.shape[1]), **model.sizes(site)}
    if site.info.visual:
        sizes["visual"] = len(tokens.columns("vision")[0])
        sizes["patch"] = sum(map(len, tokens.patches[0])) if tokens.patches else 0
    shape = [sizes[axis] for axis in site.info.axes]
    return torch.zeros(shape, dtype=model.dtype, device=model.device, requires_grad=True)


def _summed(value: Tensor, grad: Tensor, site: S.Site) -> Tensor:
    """Value times gradient over the feature axes, of the one row."""
    wide = torch.promote_types(value.dtype, torch.float32)
    product = value.to(wide) * grad.to(value.device, wide)
    axes = [i for i, axis in enumerate(site.info.axes) if axis.startswith("d_")]
    return (product.sum(axes) if axes else product)[0]


def _positions(tables: Sequence[Tensor], grads: Sequence[Tensor], length: int) -> Tensor | None:
    """Relevance of tables of positions, with its sign and each table's without."""
    if not tables:
        return None
    each = torch.stack([
        (table.detach() * grad).double().sum(-1).reshape(-1, length).sum(0)
        for table, grad in zip(tables, grads, strict=True)
    ])  # fmt: skip
    return torch.stack([each.sum(0), each.abs().sum(0)])


@contextmanager
def _narrowed(model: ic.Model, tokens: ic.Tokens, at: Sequence[int] | None) -> Iterator[None]:
    """For a while, the last layer's MLP runs at these positions alone; others get zeros, which nobody reads."""
    last, width = model.n_layers - 1, tokens.ids.shape[1]
    if at is None or tokens.inputs or "mlp" not in model.components(last):
        yield
        return
    kept = torch.tensor(list(at), device=model.device)

    def rule(module: nn.Module, forward: Any, x: Tensor, *args: Any, **named: Any) -> Any:
        if x.ndim != 3 or x.shape[1] != width:
            return forward(x, *args, **named)
        beside = [arg[:, kept] if isinstance(arg, Tensor) and arg.shape[:-1] == x.shape[:-1] else arg for arg in args]
        part = forward(x[:, kept], *beside, **named)  # BLOOM and MPT hand the stream over, too
        # a mixture that also returns its router's logits: these are of all positions
        if not isinstance(part, Tensor):
            return forward(x, *args, **named)
        return x.new_zeros(*x.shape[:-1], part.shape[-1]).index_copy(1, kept, part)

    with model.replacing({model.module("mlp", last): rule}):
        yield
