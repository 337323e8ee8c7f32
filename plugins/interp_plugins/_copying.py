"""Copying scores: whether a head's output says the tokens that it read, by weights alone.

    M = W_E W_V W_O W_U  [d_vocab d_vocab]      score = Σ Re λ / Σ |λ| over its eigenvalues λ
    those that are not 0 are the eigenvalues of W_O (W_U W_E) W_V  [d_head d_head]

Folded, the gains of the head's norm count into W_V, those of a post-norm into W_O and of the final norm into W_U, and
what LayerNorm takes out of its input is taken out. A query head reads the values of its key-value head.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
Must equal: the eigenvalues of M itself (tests/test_head_detectors.py).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._frozen import POST_NORMS, frozen

Embeddings = Literal["token", "effective"]
TOKENS = 4096
"""Tokens of the vocabulary that are multiplied at a time."""


def copying_scores(
    model: ic.Model, layers: list[int], folded: bool, embeddings: Embeddings
) -> tuple[Float[Tensor, "layer head"], dict[int, str]]:
    """Scores of all heads of some layers (NaN where there is none), and by layer why not."""
    norms = _Norms(model, layers, folded)
    why: dict[int, str] = {}
    rows: list[Tensor] = []
    grams: dict[bool, Tensor] = {}
    with ic.Progress("copying scores", len(layers)) as progress:
        for layer in layers:
            heads = model.sizes(S.pattern[layer])["head"]
            try:
                effective = embeddings == "effective" and layer > 0
                if effective not in grams:
                    grams[effective] = _gram(model, norms, effective)
                rows.append(_of_layer(model, norms, layer, grams[effective]))
            except (ic.CapabilityError, ic.SiteError) as error:
                why[layer] = str(error)
                rows.append(torch.full((heads,), math.nan))
            progress.add()
    widest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, widest - len(row)), value=math.nan) for row in rows]), why


class _Norms:
    """What norms do to weights beside them: gains, and whether they take the mean out. All of them 1 unless folded."""

    def __init__(self, model: ic.Model, layers: list[int], folded: bool) -> None:
        self.model, self.folded = model, folded
        self._ones = torch.ones(model.d_model, dtype=torch.float64)
        if not folded:
            return
        # what norms make of a few tokens tells which kind they are
        ids = (torch.arange(8) + model.d_vocab // 2)[None] % model.d_vocab
        text = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        last = S.resid_post[model.n_layers - 1], S.final_norm
        pairs = [(S.resid_pre[layer], S.attn_in[layer]) for layer in layers if layer in model.layers(S.attn_in)]
        run = model.run(text, read=[site for pair in [*pairs, last] for site in pair], logits=False)
        self._seen = {
            after: (run[before].plain[0].detach().cpu().double(), run[after].plain[0].detach().cpu().double())
            for before, after in [*pairs, last]
        }

    def into(self, site: S.Site) -> tuple[Tensor, bool]:
        """Gains of the norm that makes `attn_in[l]` or `final_norm` of the stream `[d_model]`, and whether it takes the
        mean out.

        Raises:
            CapabilityError: it is no such norm.
        """
        if not self.folded:
            return self._ones, False
        if site not in self._seen:
            raise ic.CapabilityError(f"{site}: {self.model.can(site.name, 'read')}")
        x, y = self._seen[site]
        if torch.equal(x, y):  # families that norm what attention gives, and not what it reads
            return self._ones, False
        norm = frozen(self.model, site, x, y)
        return norm.gain, norm.centred

    def added(self, layer: int) -> Tensor:
        """Gains of the norm behind attention; 1 where there is none."""
        if not self.folded or POST_NORMS["attn_out"] not in self.model.components(layer):
            return self._ones
        return self.model.weights(S.attn_out[layer]).cpu().double()


def _of_layer(model: ic.Model, norms: _Norms, layer: int, gram: Float[Tensor, "d_model d_model"]) -> Tensor:
    """Scores of one layer's heads, of W_U W_E as it is there."""
    gain, centred = norms.into(S.attn_in[layer])
    values = model.weights(S.v[layer]).to(gram) * gain.to(gram)[:, None]
    values = values - values.mean(1, keepdim=True) if centred else values
    out = model.weights(S.z[layer]).to(gram) * norms.added(layer).to(gram)
    small = torch.stack([of_head @ gram @ values[head * len(values) // len(out)] for head, of_head in enumerate(out)])
    eigenvalues = torch.linalg.eigvals(small.cpu().double())
    return (eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)).float()


@torch.no_grad()
def _gram(model: ic.Model, norms: _Norms, effective: bool) -> Float[Tensor, "d_model d_model"]:
    """W_U W_E, some tokens after others, the final norm's gains in W_U.

    Raises:
        CapabilityError: no such matrices.
    """
    unembed, embed = model.weights(S.logits), model.weights(S.embed)
    gain, centred = norms.into(S.final_norm)
    kind = torch.promote_types(embed.dtype, torch.float32)
    gram = torch.zeros(model.d_model, model.d_model, dtype=kind, device=unembed.device)
    for ids in torch.arange(min(len(embed), unembed.shape[1])).split(TOKENS):
        tokens = _effective(model, embed, ids) if effective else embed[ids.to(embed.device)]
        gram += unembed[:, ids.to(unembed.device)].to(kind) @ tokens.to(gram)
    gram = gram * gain.to(gram)[:, None]
    return gram - gram.mean(0) if centred else gram


def _effective(model: ic.Model, embed: Tensor, ids: Tensor) -> Float[Tensor, "token d_model"]:
    """Token embeddings with what the first MLP adds to them, attention (or what mixes tokens there) left out."""
    edits = [S.resid_pre[0].set(embed[ids.to(embed.device)][:, None]), S.mixer_out[0].zero()]
    run = model.run(ids[:, None], read=S.resid_post[0], edits=edits, logits=False, allow_noop=True)
    return run[S.resid_post[0]].plain[:, 0].detach()
