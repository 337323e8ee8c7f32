"""Logit lens: what the model would say if it stopped after each layer.

    logits_l = readout(resid_l),  l = embedding, 0 … n_layers - 1        readout = unembed ∘ final norm, with its caps
    per layer and position: top-k tokens, and of a target token its log-probability and rank (0 is best)
    entropy_l = -Σ p_l log p_l          kl_l = KL(p_final ‖ p_l)         all in nats

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); with a translator per layer, the tuned lens of
Belrose et al. (2023), arXiv:2303.08112: `translator(layer, resid)` returns the residual stream as the final layer
would have it, and is not applied to the last layer.

Cost: 2 · (n_layers + 1) · pos · d_model · d_vocab multiply-adds after one forward pass that ends with the last block.
Only asked positions are read and unembedded, by tiles of the vocabulary (`tiles`).
Must equal: the last row is the model's own output (`kl` 0 there).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._pictures import which
from .._places import PlacesConfig
from .tiles import read_out


class LensConfig(PlacesConfig):
    """Settings of the logit lens.

    Attributes:
        at: positions to look at (None: all; rows must then be equally long).
        targets: whose log-probability and rank to follow: `"final"` the model's own prediction at each position,
            `"next"` the next token of the text, or token ids `[batch pos]`.
        top_k: how many tokens to keep per layer and position.
        translator: `(layer, resid [n d_model]) -> resid`; layer -1 is the embedding. Those of `transports` know their
            layers: rows that such a lens can never have (the embedding of a Jacobian lens) are left out.
        unfitted: what becomes of rows that a translator could have and has not: "refuse", "leave_out", or "plain" for
            a row without a translator.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"targets"})
    targets: Literal["final", "next"] | list[list[int]] = "final"
    top_k: int = 5
    translator: Callable[[int, Tensor], Tensor] | None = None
    unfitted: Literal["refuse", "leave_out", "plain"] = "refuse"

    def cost(self, work: ic.Work) -> ic.Cost:
        """A pass without logits, then every layer read out, and the last once more where it says the targets."""
        layers = len(rows_of(self, work.layers))
        said = not isinstance(self.targets, list)
        streams = layers * work.prompts * self.places(work)
        kept = ic.Cost(kept=streams * work.d_model * work.itemsize)
        return work.forward(read_out=0) + work.reading_out(streams + said * work.prompts * self.places(work)) + kept


@dataclass(frozen=True, eq=False)
class LogitLensResult(ic.Result):
    """What each layer would say. `layer` runs over the embedding and all blocks, the last is the model's output.

    Attributes:
        top_ids, top_logprob: likeliest tokens and their log-probabilities (nats).
        target_ids: the token followed at each position.
        target_logprob, target_rank: of that token, per layer.
        entropy, kl: of the layer's distribution, and from the final one to it (nats).
        layers: names of the rows.
        tokens: text of the positions, per batch row.
        top_tokens, target_tokens: text of the ids.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "top_ids": ("batch", "layer", "pos", "k"),
        "top_logprob": ("batch", "layer", "pos", "k"),
        "target_ids": ("batch", "pos"),
        "target_logprob": ("batch", "layer", "pos"),
        "target_rank": ("batch", "layer", "pos"),
        "entropy": ("batch", "layer", "pos"),
        "kl": ("batch", "layer", "pos"),
    }
    JOINS: ClassVar[Mapping[str, str]] = {"tokens": "rows", "vocab": "union"}
    top_ids: Int[Tensor, "batch layer pos k"]
    top_logprob: Float[Tensor, "batch layer pos k"]
    target_ids: Int[Tensor, "batch pos"]
    target_logprob: Float[Tensor, "batch layer pos"]
    target_rank: Int[Tensor, "batch layer pos"]
    entropy: Float[Tensor, "batch layer pos"]
    kl: Float[Tensor, "batch layer pos"]
    layers: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    vocab: dict[str, str]

    def word(self, token: int) -> str:
        """Text of a token id that occurs in this result."""
        return self.vocab[str(token)]

    def tops(self, row: int = 0) -> list[list[str]]:
        """The likeliest token per layer and position."""
        return [[self.word(i) for i in line] for line in self.top_ids[row, :, :, 0].tolist()]

    def table(self) -> list[dict[str, Any]]:
        """One row per batch row, layer and position."""
        return [
            {
                "row": b, "layer": self.layers[layer], "pos": p, "token": self.tokens[b][p],
                "top": self.word(int(self.top_ids[b, layer, p, 0])), "target": self.word(int(self.target_ids[b, p])),
                "logprob": float(self.target_logprob[b, layer, p]), "rank": int(self.target_rank[b, layer, p]),
                "entropy": float(self.entropy[b, layer, p]), "kl": float(self.kl[b, layer, p]),
            }
            for b, layer, p in torch.cartesian_prod(*map(torch.arange, self.entropy.shape)).tolist()
        ]  # fmt: skip

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)

    def text(self, width: int | None = None) -> str:
        """Per layer the likeliest token at every position; in lines of `width` letters, those that do not fit below."""
        lines = []
        for row, tokens in enumerate(self.tokens):
            columns = [["", *self.layers]]
            columns += [
                [ic.report.short(ic.report.visible(text)) for text in (token, *tops)]
                for token, *tops in zip(tokens, *self.tops(row), strict=True)
            ]
            padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
            blocks = [[padded[0]]]
            for column in padded[1:]:
                taken = sum(len(before[0]) + 2 for before in blocks[-1]) + len(column[0])
                if width is not None and taken > width and len(blocks[-1]) > 1:
                    blocks.append([padded[0]])
                blocks[-1].append(column)
            grids = ["\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]
            heading = f"prompt {row}:\n" if len(self.tokens) > 1 else ""
            lines += [heading + grids[0], *grids[1:]]
        return "\n\n".join(lines) if width is not None else "\n".join(lines)

    def _tips(self, row: int) -> list[list[str]]:
        tips = []
        for layer, name in enumerate(self.layers):
            line = []
            for p, token in enumerate(self.tokens[row]):
                tops = zip(self.top_ids[row, layer, p].tolist(), self.top_logprob[row, layer, p].tolist(), strict=True)
                head = f"layer {name}, after {ic.report.visible(token)}\n"
                body = "".join(
                    f"{ic.report.visible(self.word(i)):12} {torch.tensor(lp).exp():6.1%}\n" for i, lp in tops
                )
                target = ic.report.visible(self.word(int(self.target_ids[row, p])))
                rank = int(self.target_rank[row, layer, p])
                tail = f"{target}: rank {rank}, {self.target_logprob[row, layer, p]:.2f} nats\n"
                tail += f"entropy {self.entropy[row, layer, p]:.2f}, KL to final {self.kl[row, layer, p]:.2f}"
                line.append(head + body + tail)
            tips.append(line)
        return tips

    @property
    def finding(self) -> str:
        """From which layer on the target comes first, at the last position."""
        rank = self.target_rank[:, :, -1]
        since = [int((row != 0).nonzero().max()) + 1 if bool((row != 0).any()) else 0 for row in rank]
        firsts = [self.layers[layer] for layer in since if layer < len(self.layers)]
        if len(rank) == 1:
            word, place = repr(self.word(int(self.target_ids[0, -1]))), f"after {self.tokens[0][-1]!r}"
            if firsts:
                return f"{word} comes first from layer {firsts[0]} on, {place}."
            return f"{word} does not come first in the model's own output {place}: it has rank {int(rank[0, -1])}."
        layers = sorted(layer for layer in since if layer < len(self.layers))
        middle = f", from layer {self.layers[layers[len(layers) // 2]]} on in the median" if layers else ""
        return f"In {len(firsts)} of {len(rank)} prompts the target comes first at the last position{middle}."

    def _grid(self, row: int) -> ic.report.Heatmap:
        return ic.report.Heatmap(
            self.target_logprob[row].exp(), self.layers, self.tokens[row], texts=self.tops(row), tips=self._tips(row),
            limits=(0.0, 1.0), title=f"Logit lens{which(row, len(self.tokens))}", ylabel="after layer",
            xlabel="last token read", colorbar="probability of the target", percent=True,
            caption=f"What comes next{which(row, len(self.tokens))}: the likeliest next token after each layer, "
            "below the last one that was read; coloured by the probability of the target.",
        )  # fmt: skip

    def charts(self) -> list[ic.report.Heatmap]:
        """One grid per batch row: the likeliest token of each layer, coloured by the target's probability."""
        return [self._grid(row) for row in range(len(self.tokens))]


class LogitLens(ic.Method):
    """Probability and rank of targets, and the likeliest tokens, after every layer; see the module."""

    name = "logit_lens"
    requires = frozenset({"resid_pre", "resid_post", "readout"})
    Config = LensConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: LensConfig) -> None:
        """Prompts have the same positions."""
        if config.at is None and tokens.padded:
            raise ic.PlanError(f"logit_lens: rows have {tokens.lengths} tokens; choose positions that all have: at=-1")
        check = getattr(config.translator, "check", None)
        if check is not None:
            check(model)
        rows_of(config, model.n_layers)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: LensConfig) -> LogitLensResult:
        """Read the residual stream once, unembed it layer by layer."""
        layers = rows_of(config, model.n_layers)
        sites = [(S.resid_pre[0] if layer < 0 else S.resid_post[layer]).at(config.at) for layer in layers]
        run = model.run(tokens, read=sites, logits=False)
        stream = [_with_pos(run[site]) for site in sites]
        batch, pos, _ = stream[0].shape
        rows = self._normed(model, layers, stream, config)
        targets = self._targets(model, rows, config, tokens, batch, pos)
        readout = read_out(model, rows, targets, top=min(config.top_k, model.d_vocab))
        parts = {
            "top_ids": readout.top, "top_logprob": readout.top_logprob, "target_logprob": readout.logprob,
            "target_rank": readout.rank, "entropy": readout.entropy, "kl": readout.kl,
        }  # fmt: skip
        shaped = {name: _by_row(value, batch) for name, value in parts.items() if value is not None}
        shaped["target_ids"] = targets.view(batch, pos)
        ids = torch.cat([shaped["top_ids"].flatten(), targets]).unique().tolist()
        return LogitLensResult(
            **shaped,
            layers=tuple("embed" if layer < 0 else str(layer) for layer in layers),
            tokens=tokens.labels_at(config.at),
            vocab={str(i): model.word(i) for i in ids},
        )

    @torch.no_grad()
    def _normed(
        self, model: ic.Model, layers: Sequence[int], stream: Sequence[Tensor], config: LensConfig
    ) -> Float[Tensor, "layer target d_model"]:
        """Each layer's stream, translated if it is to be, through the final norm."""
        rows, translator, norm = list[Tensor](), config.translator, model.module("ln_final")
        for layer, resid in zip(layers, stream, strict=True):
            resid = resid.flatten(0, 1).to(model.device)
            # the last block's output is what translators aim at: it has none
            plain = layer == layers[-1] or (config.unfitted == "plain" and not _has(translator, layer))
            rows.append(norm(resid if translator is None or plain else translator(layer, resid)))
        return torch.stack(rows)

    def _targets(
        self, model: ic.Model, rows: Tensor, config: LensConfig, tokens: ic.Tokens, batch: int, pos: int
    ) -> Int[Tensor, " target"]:
        """Token to follow at each position; where only the model can say, its likeliest."""
        ids = torch.full((batch * pos,), -1)
        if config.targets == "next":
            following = torch.roll(tokens.ids, -1, 1)
            following[~torch.roll(tokens.mask, -1, 1)] = -1  # padding on the right
            # the roll brings the first token round to the end
            following[:, -1] = -1
            ids = tokens.take(following, config.at).flatten()
        elif config.targets != "final":
            ids = torch.tensor(config.targets)
            if ids.shape != (batch, pos):
                raise ic.PlanError(f"logit_lens: targets are {list(ids.shape)}, the positions [{batch}, {pos}]")
            ids = ids.flatten()
        if bool((ids < 0).any()):
            top = read_out(model, rows[-1:], ids.clamp(min=0), spread=False, top=1).top
            assert top is not None
            ids = torch.where(ids < 0, top[0, :, 0], ids)
        return ids


def _has(translator: Any, layer: int) -> bool:
    """Whether a translator has a layer; one that does not say has them all."""
    return not hasattr(translator, "layers") or layer in translator.layers


def rows_of(config: LensConfig, n_layers: int) -> list[int]:
    """Layers that are read out, -1 for the embedding.

    Raises:
        PlanError: a translator lacks some that it could have.
    """
    last, translator = n_layers - 1, config.translator
    if config.unfitted == "plain":
        return list(range(-1, last + 1))
    layers = list(range(getattr(translator, "FIRST", -1), last))
    lacking = [layer for layer in layers if translator is not None and not _has(translator, layer)]
    if lacking and config.unfitted == "refuse":
        raise ic.PlanError(
            f"logit_lens: the lens has no matrix or translator for layer {', '.join(map(str, lacking))}; fit it for "
            'these, or say unfitted="leave_out" or unfitted="plain"'
        )
    return [*(layer for layer in layers if layer not in lacking), last]


def _by_row(value: Shaped[Tensor, "layer target *k"], batch: int) -> Shaped[Tensor, "batch layer pos *k"]:
    """The value of each batch row, in float32 as a result keeps it."""
    value = value.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()
    return value.float() if value.is_floating_point() else value


def _with_pos(value: Tensor) -> Tensor:
    """`[batch pos d]`, also where a single position dropped its axis."""
    return value[:, None] if value.ndim == 2 else value
