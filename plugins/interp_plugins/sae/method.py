"""Sparse autoencoders: which features are active at each token, how much they leave unexplained, and edits by feature.

    u = x - b_dec, or x where the configuration has apply_b_dec_to_input = false        p = u W_enc + b_enc
    standard   f = max(p, 0)
    jumprelu   f = max(p, 0) where p > threshold, else 0
    topk       f = max(p, 0) of the k largest p, else 0
    gated      f = max(u W_enc exp(r_mag) + b_mag, 0) where u W_enc + b_gate > 0, else 0
    x̂ = f W_dec + b_dec

    L0 = number of f > 0        error = |x - x̂|²        spread = |x - mean of x over the text's tokens|²
    unexplained = Σ error / Σ spread                       0: all is explained; 1: as bad as the mean
    recovered = (zero - reconstruction) / (zero - clean)   of the mean loss of the next token, in nats

Shapes: x `[batch pos d_in]`, f `[batch pos d_sae]`, W_enc `[d_in d_sae]`, W_dec `[d_sae d_in]`. Heads of `z` lie behind
each other. Where the model was loaded with `center_writing_weights`, x is the stream minus its mean over d_model, which
is put back afterwards (LayerNorm takes it out of every reader).

Source: Bricken et al. (2023), "Towards Monosemanticity"; Rajamanoharan et al. (2024), arXiv:2404.16014 (gated) and
arXiv:2407.14435 (jumprelu); Gao et al. (2024), arXiv:2406.04093 (topk). Files are those of SAELens, versions 3 to 6.
Cost: a forward pass that ends at the site, and 4 · tokens · d_in · d_sae operations; some tokens' features in memory
at a time. `loss=True` takes three whole passes more.
Must equal: the formulas in float64 (tests/test_sae.py); the features of each token add up to its reconstruction, and
a feature scaled by 0 takes its direction times its activation out of the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

import interp_core as ic

from .._pictures import which
from .._places import PlacesConfig
from .autoencoder import SAE
from .files import load_sae

SHOWN = 16
"""Features of a chart."""
RUNS = ("clean", "reconstruction", "zero")


class SAEConfig(PlacesConfig):
    """Settings of sparse autoencoders.

    Attributes:
        sae: a folder as SAELens saves it, or an `SAE`.
        at: positions to look at, and to replace for the loss (None: all; rows must then be equally long).
        top_k: how many features to keep per position.
        loss: work out the loss of the next token with the reconstruction in the place of the site, too.
    """

    sae: Any = None
    top_k: int = Field(10, ge=1)
    loss: bool = False


@dataclass(frozen=True, eq=False)
class SAEResult(ic.Result):
    """Features of a text.

    Attributes:
        features: the most active ones, by number; -1 where fewer are active.
        activations: of these.
        l0: how many are active.
        error, spread: squared distance of the site from its reconstruction, and from its mean over the text's tokens.
        losses: of the next token, mean over the text in nats, by `RUNS`; None if not asked for.
        tokens: text of the positions, per row.
        site: what was read.
        d_sae: how many features there are.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "features": ("batch", "pos", "k"), "activations": ("batch", "pos", "k"), "l0": ("batch", "pos"),
        "error": ("batch", "pos"), "spread": ("batch", "pos"), "losses": ("batch", "run"),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {"tokens": "rows"}
    features: Int[Tensor, "batch pos k"]
    activations: Float[Tensor, "batch pos k"]
    l0: Int[Tensor, "batch pos"]
    error: Float[Tensor, "batch pos"]
    spread: Float[Tensor, "batch pos"]
    losses: Float[Tensor, "batch run"] | None
    tokens: tuple[tuple[str, ...], ...]
    site: str
    d_sae: int

    @property
    def unexplained(self) -> Float[Tensor, "batch pos"]:
        """Share of the variance that the reconstruction leaves, at each position; not a number where a text is one
        token."""
        return self.error / self.spread

    @property
    def recovered(self) -> Float[Tensor, " batch"] | None:
        """Share of the loss without the site that its reconstruction wins back; None if not asked for."""
        if self.losses is None:
            return None
        clean, reconstruction, zero = self.losses.unbind(1)
        return (zero - reconstruction) / (zero - clean)

    def top(self, row: int, count: int = SHOWN) -> list[int]:
        """The features of a row with the largest activations, the largest first."""
        largest: dict[int, float] = {}
        for feature, active in zip(
            *(x[row].flatten().tolist() for x in (self.features, self.activations)), strict=True
        ):
            if feature >= 0:
                largest[feature] = max(active, largest.get(feature, 0.0))
        return sorted(largest, key=lambda feature: -largest[feature])[:count]

    def table(self) -> list[dict[str, Any]]:
        """One row per prompt, position and active feature that is kept."""
        return [
            {
                "row": b, "pos": p, "token": self.tokens[b][p], "feature": int(self.features[b, p, i]),
                "activation": float(self.activations[b, p, i]), "l0": int(self.l0[b, p]),
                "unexplained": float(self.unexplained[b, p]),
            }
            for b, p, i in (self.features >= 0).nonzero().tolist()
        ]  # fmt: skip

    @property
    def finding(self) -> str:
        """How many features are active, what they leave, and the most active one."""
        share = float((self.error.sum() / self.spread.sum()).nan_to_num())
        words = (
            f"Of {self.d_sae} features {float(self.l0.double().mean()):.3g} are active at a token of {self.site} in "
            f"the mean, and leave {share:.0%} of the variance unexplained"
        )
        if self.recovered is not None:
            words += f"; their reconstruction recovers {float(self.recovered.mean()):.0%} of the loss"
        if not bool((self.features >= 0).any()):
            return f"{words}."
        row, pos, _ = torch.unravel_index(self.activations.argmax(), self.activations.shape)
        strongest, active = int(self.features[row, pos, 0]), float(self.activations[row, pos, 0])
        return f"{words}. The most active is feature {strongest}, {active:.3g} at {self.tokens[row][pos]!r}."

    def __str__(self) -> str:
        lines = [self.finding]
        for row, tokens in enumerate(self.tokens):
            lines += [f"prompt {row}:"] if len(self.tokens) > 1 else []
            for pos, token in enumerate(tokens):
                active = zip(self.features[row, pos].tolist(), self.activations[row, pos].tolist(), strict=True)
                named = [f"{number} ({activation:.3g})" for number, activation in active if number >= 0]
                lines.append(
                    f"{ic.report.short(ic.report.visible(token)):>14}  {int(self.l0[row, pos]):>5}  "
                    + ", ".join(named[:5])
                )
        return "\n".join(lines)

    def charts(self) -> list[ic.report.Heatmap]:
        """One grid per prompt: the most active features along the text."""
        return [self._grid(row) for row in range(len(self.tokens))]

    def _grid(self, row: int) -> ic.report.Heatmap:
        numbers = self.top(row)
        grid = [
            torch.where(self.features[row] == number, self.activations[row], 0).sum(-1).tolist() for number in numbers
        ]
        return ic.report.Heatmap(
            grid or [[0.0] * len(self.tokens[row])], [f"feature {number}" for number in numbers] or ["none is active"],
            self.tokens[row], title=f"Features of {self.site}{which(row, len(self.tokens))}", xlabel="token",
            colorbar="activation",
            caption=f"The {len(numbers)} features with the largest activations{which(row, len(self.tokens))}; white "
            "where a feature is not among those kept of a token.",
        )  # fmt: skip


class SparseAutoencoders(ic.Method):
    """Which features of a sparse autoencoder are active at each token, and what they leave unexplained."""

    name = "sae"
    Config = SAEConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: SAEConfig) -> None:
        """The autoencoder fits the model, and prompts have the same positions."""
        if isinstance(config.sae, (str, Path)):
            load_sae(config.sae, shapes_alone=True).check(model)
        elif isinstance(config.sae, SAE):
            config.sae.check(model)
        else:
            raise ic.PlanError(
                ic.errors.wrong(f"{self.name}: sae=", "a folder as SAELens saves it, or an SAE", config.sae)
            )
        if config.at is None and tokens.padded:
            raise ic.PlanError(f"{self.name}: rows have {tokens.lengths} tokens; choose positions that all have: at=-1")
        if config.loss and min(tokens.lengths) < 2:
            raise ic.PlanError(f"{self.name}: loss= is of the next token, and a prompt has one token alone")

    def run(self, model: ic.Model, tokens: ic.Tokens, config: SAEConfig) -> SAEResult:
        """Read the site, encode it; for the loss, run again with the reconstruction and with zeros."""
        return _looked(model, tokens, config, _given(config))

    def run_batches(
        self, model: ic.Model, batches: Iterable[tuple[ic.Tokens, Any]], config: SAEConfig
    ) -> Iterator[SAEResult]:
        """Weights are read once."""
        sae = _given(config)
        return (_looked(model, tokens, part, sae) for tokens, part in batches)


def _given(config: SAEConfig) -> SAE:
    return config.sae if isinstance(config.sae, SAE) else load_sae(config.sae)


@torch.no_grad()
def _looked(model: ic.Model, tokens: ic.Tokens, config: SAEConfig, sae: SAE) -> SAEResult:
    """The result of some prompts."""
    run = model.run(tokens, read=sae.site, logits=False)
    whole = sae.flat(run[sae.site].plain)
    sae = sae.to(whole)
    precise = sae.weights["b_dec"].dtype  # errors of a model in half precision are not rounded to it
    mask = tokens.mask.to(whole.device)[..., None]
    middle = (whole.double() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    x = (whole if config.at is None else sae.flat(run[sae.site].at(config.at))).to(precise)
    x = x[:, None] if x.ndim == 2 else x
    kept = min(config.top_k, sae.d_sae)
    parts = [_measured(sae, part, kept) for part in sae.chunks(x)]
    features, activations, l0, error = (
        torch.cat(column).unflatten(0, x.shape[:2]).cpu() for column in zip(*parts, strict=True)
    )
    return SAEResult(
        features=features, activations=activations, l0=l0, error=error,
        spread=(x - middle).pow(2).sum(-1).to(error).cpu(),
        losses=_losses(model, tokens, config.at, sae) if config.loss else None,
        tokens=tokens.labels_at(config.at), site=str(sae.site), d_sae=sae.d_sae,
    )  # fmt: skip


def _measured(sae: SAE, x: Float[Tensor, "n d_in"], kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some positions: the most active features, their activations, how many are active, and the squared error."""
    f = sae.encode(x)
    best = f.topk(kept, dim=-1)
    error = (x - sae.reconstruct(x, f)).pow(2).sum(-1)
    return torch.where(best.values > 0, best.indices, -1), best.values, (f > 0).sum(-1), error


def _losses(model: ic.Model, tokens: ic.Tokens, at: Any, sae: SAE) -> Float[Tensor, "batch run"]:
    """Mean loss of the next token: of the model, with the reconstruction, and with zeros."""
    edits: tuple[list[ic.Edit], ...] = ([], [sae.replace(at)], [sae.where(at).zero()])
    counted = (tokens.mask[:, 1:] & tokens.mask[:, :-1]).to(model.device)
    following = tokens.ids[:, 1:].to(model.device)
    losses = []
    for changes in edits:
        logits = model.run(tokens, edits=changes, allow_noop=True).logits.plain[:, :-1]
        logprob = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        each = -logprob.gather(-1, following.to(logprob.device)[..., None])[..., 0]
        losses.append((each * counted.to(each.device)).sum(1) / counted.sum(1).to(each))
    return torch.stack(losses, 1).cpu()
