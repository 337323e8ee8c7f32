"""What experts specialise in: domains of text, and tokens of the vocabulary.

    domain       N_{e,D} / N_D: tokens of D that go to e, over tokens of D           by chance k / E
    vocabulary   share(x, e) = N(x goes to e) / N(x) of a token id x that occurs often enough
                 by layer: mean over ids of max_e share; by expert: the ids with the largest share

An id is the token itself, the one that follows (the last position drops out), or the one that the model predicts. Rare
ids look specialised by chance, so the same numbers stand beside it with ids permuted over tokens.

Source: Muennighoff et al. (2024), OLMoE, arXiv:2409.02060; its code has k and the minimum count written into it.
Shapes: counts `[domain layer expert]`, `[id expert]`.
Cost: memory distinct ids · expert per layer, whatever the number of tokens.
Must equal: OLMoE's published counts give its own shares; top_k = all experts gives 1 everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp_core as ic

from .routed import Routed


def domain_shares(counts: Any, tokens: Any) -> Float[np.ndarray, "*domain layer expert"]:
    """N_{e,D} / N_D.

    Args:
        counts: tokens routed to each expert, `[… layer expert]`.
        tokens: tokens of each domain, `[…]`.

    Raises:
        PlanError: domains without tokens, or more selections of an expert than tokens.
    """
    n, below = np.asarray(counts, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if n.shape[:-2] != below.shape or not (below > 0).all():
        raise ic.PlanError(
            f"domain_shares: counts are {list(n.shape)}, tokens {list(below.shape)}; give one number of tokens, above "
            "0, per domain"
        )
    shares = n / below[..., None, None]
    if (shares > 1).any():
        raise ic.PlanError("domain_shares: an expert was chosen by more tokens than there are; were slots counted?")
    return shares


class Domains(NamedTuple):
    """Specialisation by domain, with what permuted texts give.

    Attributes:
        names: of the domains.
        share: N_{e,D} / N_D.
        spread: total variation of each domain's count shares to those of all texts, by layer.
        null: the same with labels permuted over texts, mean of the permutations.
        p: share of permutations with as large a spread (the permutation itself counted).
    """

    names: tuple[str, ...]
    share: Float[np.ndarray, "domain layer expert"]
    spread: Float[np.ndarray, "domain layer"]
    null: Float[np.ndarray, "domain layer"]
    p: Float[np.ndarray, "domain layer"]


def domains(counts: Any, tokens: Any, labels: Any, *, permutations: int = 200, seed: int = 0) -> Domains:
    """Specialisation of experts by domain, from each text's counts.

    Args:
        counts: tokens of each text that were routed to each expert, `[text layer expert]`.
        tokens: of each text.
        labels: its domain; permuted over texts, whose tokens are not independent.
        permutations: how many.
        seed: of the permutations.

    Raises:
        PlanError: fewer than two domains, or numbers that do not fit each other.
    """
    n, below = np.asarray(counts, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    names = tuple(dict.fromkeys(map(str, labels)))
    if n.ndim != 3 or not len(n) == len(below) == len(labels) or len(names) < 2:
        raise ic.PlanError(
            f"domains: {len(labels)} labels of {len(names)} domains, counts {list(n.shape)}, tokens of {len(below)} "
            "texts; give [text layer expert] with a label each, of two domains at least"
        )
    domain_of = np.array([names.index(str(label)) for label in labels])
    rng = np.random.default_rng(seed)
    real = _spread(n, domain_of, len(names))
    drawn = np.stack([_spread(n, rng.permutation(domain_of), len(names)) for _ in range(permutations)])
    share = domain_shares(_grouped(n, domain_of, len(names)), np.bincount(domain_of, below, len(names)))
    # 1e-12: a permutation that gives the labels back is as large, though its sums may round otherwise
    p = (1 + (drawn >= real - 1e-12).sum(0)) / (1 + permutations)
    return Domains(names, share, real, drawn.mean(0), p)


def _grouped(n: np.ndarray, domain_of: np.ndarray, size: int) -> np.ndarray:
    member = np.eye(size)[:, domain_of]
    return (member @ n.reshape(len(n), -1)).reshape(size, *n.shape[1:])


def _spread(n: np.ndarray, domain_of: np.ndarray, size: int) -> np.ndarray:
    grouped, total = _grouped(n, domain_of, size), n.sum(0)
    return np.abs(grouped / grouped.sum(-1, keepdims=True) - total / total.sum(-1, keepdims=True)).sum(-1) / 2


class Vocabulary:
    """Where each token id goes in one layer, gathered batch by batch.

    Args:
        n_experts: of the layer.
        seed: of the permuted ids.
    """

    def __init__(self, n_experts: int, *, seed: int = 0) -> None:
        self.ids = torch.zeros(0, dtype=torch.long)
        self.occurrences = torch.zeros(0, dtype=torch.long)
        self.counts = torch.zeros(0, n_experts, dtype=torch.int32)
        self.permuted = torch.zeros(0, n_experts, dtype=torch.int32)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, ids: Int[Tensor, " n"], routed: Routed) -> None:
        """Tokens of a batch; ids below 0 are left out. For the null, ids are permuted within the batch.

        Raises:
            PlanError: other numbers of ids and tokens, or of experts.
        """
        if len(ids) != len(routed) or routed.n_experts != self.counts.shape[1]:
            raise ic.PlanError(
                f"vocabulary: {len(ids)} ids for {len(routed)} tokens of {routed.n_experts} experts, "
                f"{self.counts.shape[1]} were announced"
            )
        keep = (ids >= 0).cpu()
        ids, chosen = ids.cpu()[keep].long(), routed.chosen.cpu()[keep]
        unknown = ids.unique()
        unknown = unknown[~torch.isin(unknown, self.ids)]
        if len(unknown):
            self._grow(unknown)
        place = torch.searchsorted(self.ids, ids)
        self.occurrences.index_add_(0, place, torch.ones_like(place))
        self.counts.index_add_(0, place, chosen.int())
        shuffled = place[torch.randperm(len(place), generator=self._random)]
        self.permuted.index_add_(0, shuffled, chosen.int())

    def _grow(self, unknown: Tensor) -> None:
        self.ids, order = torch.cat([self.ids, unknown]).sort()
        for name in ("occurrences", "counts", "permuted"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(len(unknown), *old.shape[1:])])[order])

    def shares(self, min_count: int = 10, *, permuted: bool = False) -> Float[np.ndarray, "id expert"]:
        """share(x, e) of ids that occur often enough, in the order of `frequent`."""
        often = self.frequent(min_count)
        counts = self.permuted if permuted else self.counts
        return (counts[often].double() / self.occurrences[often, None]).numpy()

    def frequent(self, min_count: int = 10) -> Bool[Tensor, " id"]:
        """Which ids occur often enough."""
        return self.occurrences >= min_count

    def specialisation(self, min_count: int = 10) -> dict[str, float]:
        """Mean over ids of the largest share of an expert, that of permuted ids, and how many ids there are.

        Raises:
            PlanError: no id occurs so often.
        """
        real, null = self.shares(min_count), self.shares(min_count, permuted=True)
        if not len(real):
            most = int(self.occurrences.max()) if len(self.ids) else 0
            raise ic.PlanError(
                f"no token id occurs {min_count} times (the commonest {most} times); give a lower min_count"
            )
        return {"share": float(real.max(1).mean()), "permuted": float(null.max(1).mean()), "ids": float(len(real))}

    def best(self, expert: int, n: int = 10, min_count: int = 10) -> list[tuple[int, float, int]]:
        """The ids that go to an expert most surely: id, share, occurrences; ties: the more frequent, then the lower."""
        often = self.frequent(min_count)
        share = self.shares(min_count)[:, expert].tolist()
        rows = zip(self.ids[often].tolist(), share, self.occurrences[often].tolist(), strict=True)
        return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))[:n]

    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(x.numel() * x.element_size() for x in (self.ids, self.occurrences, self.counts, self.permuted))
