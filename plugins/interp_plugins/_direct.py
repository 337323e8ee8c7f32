"""The direct runs of path patching: what each receiver would be if only the sender were different.

    z of every head, mlp_out of every MLP := base run's;  the sender's := source run's;  receivers are read

With attention frozen, a position's stream depends on nothing but the same position, so a run takes the positions of the
senders alone, all senders as rows of one batch. The stream that enters the first block is the base run's too: position
embeddings need not fit.

Source: Wang et al. (2022), arXiv:2211.00593, appendix B.
Cost: per sender one run of its positions, up to the layer of the last receiver; many senders go in one.
Must equal: a pass per sender with hooks by hand (tests/test_path_patching.py), however senders are chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._contrast import Contrast
from ._frozen import mixed
from ._maps import single_place

SENDERS = ("embed", "z", "attn_out", "mixer_out", "mlp_out")
RECEIVERS = ("mixer_in", "attn_in", "q", "k", "v", "mlp_in", "resid_pre", "resid_post", "logits")
CHUNK_BYTES = 1 << 28
"""Of what direct runs keep at a time."""


class End(NamedTuple):
    """One sender or receiver: its name, and the sites that act together, each in one layer with at most one unit."""

    name: str
    sites: tuple[S.Site, ...]


def listed(model: ic.Model, what: str, names: Any, allowed: tuple[str, ...]) -> list[End]:
    """Senders or receivers from their text forms.

    Raises:
        SiteError, CapabilityError: there is no such site here.
        PlanError: one that cannot be this end of a path.
    """
    ends: list[End] = []
    for entry in names if isinstance(names, list) else [names]:
        if isinstance(entry, list):
            parts = [end for name in entry for end in _single(model, what, name, allowed)]
            ends.append(End("+".join(end.name for end in parts), tuple(site for end in parts for site in end.sites)))
        else:
            ends += _single(model, what, entry, allowed)
    if not all(end.sites for end in ends) or not ends:
        raise ic.PlanError(f"path_patching: {what} names nothing; there are {', '.join(allowed)}")
    return ends


def _single(model: ic.Model, what: str, name: Any, allowed: tuple[str, ...]) -> Iterator[End]:
    """The ends that a site names, one per layer and unit."""
    site = name if isinstance(name, S.Site) else S.Site.parse(str(name))
    if site.name not in allowed or site.pos is not None or site.key is not None:
        why = "positions are given by at=" if site.name in allowed else f"{what} are {', '.join(allowed)}"
        raise ic.PlanError(f"path_patching: {site} as one of the {what}: {why}")
    if site.name in ("embed", "logits"):
        yield End(site.name, (S.resid_pre[0] if site.name == "embed" else S.resid_post[model.n_layers - 1],))
        return
    if why := model.can(site.name, "read"):
        raise ic.CapabilityError(f"{site}: {why}")
    for layer in model.layers(site):
        if site.info.unit is None:
            whole = S.named(site.name)[layer]
            mixes = site.name in ("attn_out", "mixer_out")
            heads = [S.z[at] for at in model.heads if at[0] == layer] if mixes else []
            yield End(str(whole), tuple(heads) or (mixed(model, layer) if mixes else whole,))
            continue
        for unit in S.indices(
            site.units, model.sizes(S.named(site.name)[layer])[site.info.unit], site.info.unit, str(site)
        ):
            unit_site = S.named(site.name)[layer, unit]
            yield End(str(unit_site), (unit_site,))


def reaches(sender: End, receiver: End) -> bool:
    """Whether some receiver of a group lies above some sender of the other."""
    return min(map(_order, sender.sites)) < max(map(_order, receiver.sites))


def _order(site: S.Site) -> tuple[int, int]:
    """When a forward pass meets a site."""
    assert isinstance(site.layers, int)
    return site.layers, list(S.SITES).index(site.name)


class DirectPlan:
    """What direct runs need of the two runs.

    Attributes:
        reads: receivers, whole.
        frozen: set in every row of a direct run.
        mlps: those below the last receiver.
        top: the last receiver's place in a forward pass.
        here, there: what is read in the base and in the source run.
    """

    def __init__(self, model: ic.Model, senders: list[End], receivers: list[End], at: Any, through_mlps: bool) -> None:
        self.model, self.senders, self.at, self.single = model, senders, at, single_place(at)
        self.reads = list(dict.fromkeys(site.whole for end in receivers for site in end.sites))
        self.top = max(map(_order, self.reads))
        heads = model.layers(S.z)
        beside = [i for i in heads if i in model.layers(S.mixer_out) and i not in model.layers(S.attn_out)]
        if beside:
            raise ic.CapabilityError(
                f"path_patching holds every head at its base value, and in layer {beside[0]} of {model.source} heads "
                f"are not all that mixes tokens: {model.can('attn_out', 'read')}"
            )
        frozen = [S.z[i] for i in heads] + [mixed(model, i) for i in model.layers(S.mixer_out) if i not in heads]
        self.mlps = self._below([S.mlp_out[i] for i in model.layers(S.mlp_out)])
        self.frozen = self._below([S.resid_pre[0], *frozen]) + ([] if through_mlps else self.mlps)
        sending = {site.whole for end in senders for site in end.sites}
        sites = [*self.frozen, *(site for site in self.mlps if site in sending and site not in self.frozen)]
        grouped = [site.whole for end in receivers if len(end.sites) > 1 for site in end.sites]
        self.here = [site.at(at) for site in dict.fromkeys([*sites, *grouped])]
        self.there = [site.at(at) for site in sites if site in sending]

    def _below(self, sites: list[S.Site]) -> list[S.Site]:
        """Sites that a run which ends at the last receiver meets."""
        return [site for site in sites if _order(site) <= self.top]


class DirectRuns:
    """Direct runs: rows are senders, columns the senders' positions, everything but the direct path as in the base run.

    The first row of each example sends nothing: what a receiver gets is the difference to it, so that rounding cancels.
    It is added to the base run; of a group, whose lower receivers change what the upper ones are, the sum is set.
    """

    def __init__(self, plan: DirectPlan, pair: Contrast) -> None:
        self.plan, self.pair, self.model = plan, pair, plan.model
        self.base = self._values(pair.base, plan.here)
        zeros = {site.whole: torch.zeros_like(self.base[site.whole]) for site in plan.there}
        self.source = zeros if pair.source is None else self._values(pair.source, plan.there)
        self.ids = self._columns(pair.base.tokens)
        self.token_layers = 0

    def _values(self, run: ic.Run, sites: list[S.Site]) -> dict[S.Site, Float[Tensor, "batch pos *rest"]]:
        """Values at the senders' positions, by whole site."""
        values = {site.whole: run[site].plain for site in sites}
        return {site: value.unsqueeze(1) if self.plan.single else value for site, value in values.items()}

    def _columns(self, tokens: ic.Tokens) -> Tensor:
        """Token ids at the senders' positions `[batch pos]`."""
        columns = torch.tensor(tokens.columns(self.plan.at))
        return tokens.ids.gather(1, columns.to(tokens.ids.device))

    def chunks(self, senders: list[int]) -> Iterator[list[int]]:
        """Senders that go together in memory."""
        largest = max(value.numel() * value.element_size() for value in self.base.values())
        most = max(1, CHUNK_BYTES // (largest * (2 * len(self.plan.reads) + len(self.source) + 16)))
        for start in range(0, len(senders), most):
            yield senders[start : start + most]

    def received(self, chunk: list[int]) -> Callable[[int, End], list[ic.Edit]]:
        """The run of some senders. What it gives takes a sender's number and a receiver, and makes the edits of the
        base run by which the receiver is what it is in the direct run."""
        rows, batch = len(chunk) + 1, len(self.ids)
        self.token_layers += rows * self.ids.numel() * (self.plan.top[0] + 1)
        edits = [site.set(self._sent(site, chunk)) for site in self.plan.frozen]
        edits += [edit for site in self.plan.mlps if site not in self.plan.frozen for edit in self._mlp(site, chunk)]
        ids = self.ids.repeat(rows, 1)
        text = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        run = self.model.run(text, read=self.plan.reads, edits=edits, logits=False, allow_noop=True)
        seen = {site: run[site].plain.unflatten(0, (rows, batch)) for site in self.plan.reads}

        def change(sender: int, site: S.Site, whole: bool) -> ic.Edit:
            unit = (slice(None), slice(None), site.units) if isinstance(site.units, int) else ()
            part = seen[site.whole][1 + chunk.index(sender)][unit] - seen[site.whole][0][unit]
            part = part + self.base[site.whole][unit] if whole else part
            where, part = site.at(self.plan.at), part[:, 0] if self.plan.single else part
            return where.set(part) if whole else where.add(part)

        return lambda sender, end: [change(sender, site, len(end.sites) > 1) for site in end.sites]

    def _sent(self, site: S.Site, chunk: list[int]) -> Float[Tensor, "row pos *rest"]:
        """What a frozen site is in every row: its base value, but for the senders' own."""
        value = self.base[site].expand(len(chunk) + 1, *self.base[site].shape)
        own = [
            (row, part) for row, s in enumerate(chunk, 1) for part in self.plan.senders[s].sites if part.whole == site
        ]
        if own:
            value = value.clone()
        for row, part in own:
            at = (row, ..., part.units, slice(None)) if isinstance(part.units, int) else (row,)
            value[at] = self.source[site][at[1:]] if isinstance(part.units, int) else self.source[site]
        return value.flatten(0, 1)

    def _mlp(self, site: S.Site, chunk: list[int]) -> Iterator[ic.Edit]:
        """An MLP that sends while the others compute: set in its own rows alone."""
        batch, width = self.ids.shape
        rows = [row for row, s in enumerate(chunk, 1) if site in self.plan.senders[s].sites]
        if rows:
            everywhere = tuple(range(width))
            where = [everywhere if row // batch in rows else () for row in range((len(chunk) + 1) * batch)]
            value = self.source[site].expand(len(rows), *self.source[site].shape)
            yield site.at(ic.PerRow(tuple(where))).set(value.flatten(0, 2))
