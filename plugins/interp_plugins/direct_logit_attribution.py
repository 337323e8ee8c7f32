"""Direct logit attribution: which parts of a model write the answer's logit, beside a rival's, into the stream.

    y = r + Σ_l (a_l + m_l)            the stream before the final norm: embeddings, what mixers and MLPs add
    N(y) = γ ⊙ (y - mean y) / σ + β    LayerNorm; RMSNorm leaves the mean in; σ, that of y, is held
    u = W_U[:, answer] - W_U[:, rival]     g = (γ ⊙ u - mean(γ ⊙ u)) / σ, without the mean for RMSNorm
    part of c = c · g       of β: β · u       of the unembedding's bias: b_U[answer] - b_U[rival]
    head h of layer l = (z_h W_O[h]) · p      neuron n = act_n W_out[n] · p      p: g through a post-norm, held

All parts add up to the difference of the two logits, before a cap; the heads of a layer and their bias to a_l, the
neurons and theirs to m_l. Norms are the model's own: gains and bias as `model.weights` and `model.bias` give them, and
σ is what the norm's own output says that it was.

Source: nostalgebraist (2020) and Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); the frozen
scale is that of Wang et al. (2022), arXiv:2211.00593.
Shapes: parts `[batch part]`, heads `[batch layer head]`, neurons `[batch neuron_layer neuron]`.
Cost: one forward pass, read at one position; then layers · d_model² multiply-adds for the heads.
Must equal: the same sums by hand in float64 (tests/test_direct_logit_attribution.py); Σ parts = logit difference within
1e-4 · Σ |parts|, what the model's own rounding of the stream leaves (`rest`) told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import score as scores
from interp_core import sites as S

from ._frozen import Frozen, added, frozen
from ._maps import place_name, single_place
from ._pictures import Picture, drawn, of_rows
from ._prompts import beside

UNIT = "logits"
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call a cap on the logits."""
SHOWN = 40
"""Bars that a chart has at most; of more parts those that are largest."""


class DirectLogitConfig(ic.Config):
    """Settings of direct logit attribution.

    Attributes:
        answer: a token id or a word per prompt, or one for all (None: what the model says).
        rival: what the answer is compared with, in the same forms (None: what the model says next to it).
        at: the position whose next token it is; a single one, as `Site.at` takes it.
        heads: tell the heads of attention apart, too.
        neurons: layers whose neurons are told apart (None: of no layer).
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"answer", "rival"})
    answer: int | str | list[int] | list[str] | None = None
    rival: int | str | list[int] | list[str] | None = None
    at: Any = -1
    heads: bool = True
    neurons: int | list[int] | None = None


@dataclass(frozen=True, eq=False)
class DirectLogitResult(ic.Result):
    """Parts of a logit difference.

    Attributes:
        parts: of each component, of the final norm's bias and of the unembedding's, in logits.
        logit_diff: logit of the answer minus that of the rival, before a cap.
        after_cap: the same of the logits that the model gives, after its cap.
        rest: what the model's rounding of the stream leaves unexplained.
        heads: of each head (NaN: the layer has fewer, or `unexplained` says why not); None if not asked for.
        head_bias: of the output projection's bias (and a post-norm's), which is no head's.
        neurons, neuron_bias: the same of the neurons that were asked for; else None.
        answer, rival: token ids.
        names: of the parts.
        layers, neuron_layers: which layers heads and neurons are of.
        place: the position.
        capped: the model bends its logits after what is explained here.
        unexplained: by layer, why its heads cannot be told apart.
        vocab: text of the ids.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "parts": ("batch", "part"), "logit_diff": ("batch",), "after_cap": ("batch",), "rest": ("batch",),
        "heads": ("batch", "layer", "head"), "head_bias": ("batch", "layer"),
        "neurons": ("batch", "neuron_layer", "neuron"), "neuron_bias": ("batch", "neuron_layer"),
        "answer": ("batch",), "rival": ("batch",),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {"place": "first", "vocab": "union", "unexplained": "union"}
    parts: Float[Tensor, "batch part"]
    logit_diff: Float[Tensor, " batch"]
    after_cap: Float[Tensor, " batch"]
    rest: Float[Tensor, " batch"]
    heads: Float[Tensor, "batch layer head"] | None
    head_bias: Float[Tensor, "batch layer"] | None
    neurons: Float[Tensor, "batch neuron_layer neuron"] | None
    neuron_bias: Float[Tensor, "batch neuron_layer"] | None
    answer: Int[Tensor, " batch"]
    rival: Int[Tensor, " batch"]
    names: tuple[str, ...]
    layers: tuple[int, ...]
    neuron_layers: tuple[int, ...]
    place: str
    capped: bool
    unexplained: dict[str, str]
    vocab: dict[str, str]

    def table(self) -> list[dict[str, Any]]:
        """One row per component, head and neuron, in the mean over prompts; of a layer's neurons the 20 largest."""
        rows = self._rows(self.names, self.parts.mean(0), "component")
        if self.heads is not None:
            heads = self.heads.mean(0)
            for layer, line in zip(self.layers, heads, strict=True):
                rows += self._rows([f"z[{layer},{head}]" for head in range(len(line))], line, "head")
        if self.neurons is not None:
            for layer, line in zip(self.neuron_layers, self.neurons.mean(0), strict=True):
                top = line.abs().topk(min(20, len(line))).indices
                rows += self._rows([f"mlp_act[{layer},{n}]" for n in top.tolist()], line[top], "neuron")
        return rows

    def _rows(self, names: Sequence[str], numbers: Tensor, kind: str) -> list[dict[str, Any]]:
        return [
            {"part": name, "kind": kind, "logits": number}
            for name, number in zip(names, numbers.tolist(), strict=True)
            if math.isfinite(number)
        ]

    def _word(self, token: int) -> str:
        return repr(self.vocab.get(str(token), token))

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Prompts with the answer, its rival and by how much it leads."""
        columns = {
            "answer": [self._word(token) for token in self.answer.tolist()],
            "rival": [self._word(token) for token in self.rival.tolist()],
            "logit difference": [round(lead, 3) for lead in self.logit_diff.tolist()],
        }
        return beside(super().prompt_rows() or [{}] * len(self.answer), columns)

    def __str__(self) -> str:
        best = sorted(self.table(), key=lambda row: -abs(row["logits"]))[:10]
        return "\n".join([self.finding, *(f"  {row['logits']:+8.3f}  {row['part']}" for row in best)])

    @property
    def finding(self) -> str:
        """By how much the answer leads, and the component and head that do most for it or against it."""
        lead = float(self.logit_diff.mean())
        several = len(self.answer) > 1
        who = "the answers" if several else self._word(int(self.answer[0]))
        whom = "their rivals" if several else self._word(int(self.rival[0]))
        verbs = ("lead", "fall behind") if several else ("leads", "falls behind")
        said = f"{who[0].upper()}{who[1:]} {verbs[lead < 0]} {whom} by {abs(lead):.3g} logits{of_rows(self.answer)}"
        rows = self.table()
        for kind in ("component", "head"):
            of_kind = [row for row in rows if row["kind"] == kind]
            if of_kind:
                best = max(of_kind, key=lambda row: abs(row["logits"]))
                said += f"; of the {kind}s {best['part']} does most, with {best['logits']:+.3g}"
        return f"{said}."

    def details(self) -> dict[str, str]:
        """What lies between the parts and the model's logits."""
        total = float(self.parts.sum(1).mean())
        lines = [
            f"sum of parts        {total:+.4f}",
            f"rounding of stream  {float(self.rest.mean()):+.2g}",
            f"logit difference    {float(self.logit_diff.mean()):+.4f}{' before the cap' if self.capped else ''}",
        ]
        if self.capped:
            lines.append(f"as the model caps   {float(self.after_cap.mean()):+.4f}")
        lines += [f"heads of layer {layer}: {why}" for layer, why in self.unexplained.items()]
        return {"How it adds up": "\n".join(lines)}

    def charts(self) -> list[ic.report.Chart]:
        """Components as bars; heads as a map of layers against heads."""
        mean = self.parts.mean(0)
        kept = sorted(mean.abs().topk(min(SHOWN, len(mean))).indices.tolist())
        kept = [i for i in kept if bool(self.parts[:, i].any())]  # most models have no biases
        few = f", the {SHOWN} largest" if len(mean) > SHOWN else ""
        where = f"at {ic.report.place_words(self.place)}{of_rows(self.answer)}"
        charts: list[ic.report.Chart] = [
            ic.report.Bars(
                [ic.report.Bar(self.names[i], float(mean[i])) for i in kept], xlabel=UNIT,
                title=f"What each component adds to the logit difference, {where}{few}",
            )
        ]  # fmt: skip
        if self.heads is not None:
            rows, columns = ([f"{what} {i}" for i in numbers] for what, numbers in
                             (("layer", self.layers), ("head", range(self.heads.shape[-1]))))  # fmt: skip
            title = f"What each head adds to the logit difference, {where}"
            charts.append(drawn(Picture(title, self.heads.mean(0).tolist(), rows, columns), UNIT))
        return charts


class DirectLogitAttribution(ic.Method):
    """Which layers, heads and neurons write the answer's lead over its rival into the residual stream."""

    name = "direct_logit_attribution"
    requires = frozenset({"resid_pre", "resid_post", "mixer_out", "final_norm", "readout"})
    Config = DirectLogitConfig

    def conserved(
        self, model: ic.Model, tokens: ic.Tokens, split: DirectLogitResult
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Parts add up to the logit difference, heads and neurons to their layer. What speaks for the answer stands on
        one side and what speaks against it on the other, so that a small sum of large parts is held to their size."""
        laws = {"the parts add up to the logit difference": _sides(split.parts, split.logit_diff)}
        of = {name: split.parts[:, i] for i, name in enumerate(split.names)}
        if split.heads is not None and split.head_bias is not None:
            for i, layer in enumerate(split.layers):
                if str(layer) not in split.unexplained:
                    units = torch.cat([split.heads[:, i].nan_to_num(), split.head_bias[:, i, None]], 1)
                    law = f"the heads of layer {layer} add up to its attention"
                    laws[law] = _sides(units, of[f"attn_out[{layer}]"])
        if split.neurons is not None and split.neuron_bias is not None:
            for i, layer in enumerate(split.neuron_layers):
                units = torch.cat([split.neurons[:, i], split.neuron_bias[:, i, None]], 1)
                laws[f"the neurons of layer {layer} add up to its MLP"] = _sides(units, of[f"mlp_out[{layer}]"])
        return laws

    def check(self, model: ic.Model, tokens: ic.Tokens, config: DirectLogitConfig) -> None:
        """A single position, and neurons of layers that have them."""
        if not single_place(config.at):
            raise ic.PlanError(f"{self.name} explains the logits of one position; at={config.at!r} may select others")
        place_name(self.name, tokens, config.at)
        if config.neurons is not None and not _neuron_layers(model, config):
            why = model.can("mlp_act", "read") or "neurons=[] names no layer"
            raise ic.CapabilityError(f"{self.name}: no neurons to tell apart: {why}")
        for words, what in ((config.answer, "answer"), (config.rival, "rival")):
            if words is not None:
                scores.token_ids(model, words, len(tokens), self.name, what)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: DirectLogitConfig) -> DirectLogitResult:
        """One pass, and the products."""
        at, last = config.at, model.n_layers - 1
        parts_of = [site for layer in range(model.n_layers) for site in added(model, layer)]
        streams = [S.resid_pre[0], *parts_of, S.resid_post[last], S.final_norm]
        head_layers = model.layers(S.z) if config.heads else []
        neuron_layers = _neuron_layers(model, config)
        inner = [*(S.z[layer] for layer in head_layers), *(S.mlp_act[layer] for layer in neuron_layers)]
        run = model.run(tokens, read=[site.at(at) for site in [*streams, *inner]], logits=at)

        stream = {site: run[site.at(at)].plain.detach().cpu().double() for site in streams}
        logits = run.logits.plain.detach().cpu()
        answer, rival = _pair(self.name, model, config, logits, len(tokens))
        weight, bias = (model.weights(S.logits), model.bias(S.logits))
        u = (weight[:, answer.to(weight.device)] - weight[:, rival.to(weight.device)]).T.cpu().double()
        b = (bias[answer.to(bias.device)] - bias[rival.to(bias.device)]).cpu().double()

        y, normed = stream[S.resid_post[last]], stream[S.final_norm]
        norm = frozen(model, S.final_norm, y, normed)
        direction = norm.back(u)
        sites = [S.resid_pre[0], *parts_of]
        _demand_a_sum(model, y, [stream[site] for site in sites])
        terms = [(stream[site] * direction).sum(-1) for site in sites] + [u @ norm.bias, b]
        parts = torch.stack(terms, 1)
        lead = (normed * u).sum(-1) + b
        heads = _Inside(model, S.z, S.attn_out, head_layers, direction)
        heads.why |= {
            str(layer): f"another mixer stands beside attention there; see mixer_out[{layer}]"
            for layer in head_layers if S.mixer_out[layer] in parts_of
        }  # fmt: skip
        neurons = _Inside(model, S.mlp_act, S.mlp_out, neuron_layers, direction)
        for inside in (heads, neurons):
            for layer in inside.layers:
                inside.layer(layer, run[inside.site[layer].at(at)].plain.detach(), stream[inside.added[layer]])
        ids = [*answer.tolist(), *rival.tolist()]
        capped = logits.double().gather(1, torch.stack([answer, rival], 1))
        config_of, kind = model.hf.config.get_text_config(), torch.promote_types(model.dtype, torch.float32)
        return DirectLogitResult(
            parts=parts.to(kind), logit_diff=lead.to(kind), after_cap=(capped[:, 0] - capped[:, 1]).to(kind),
            rest=(lead - parts.sum(1)).to(kind), heads=heads.parts(), head_bias=heads.biases(),
            neurons=neurons.parts(), neuron_bias=neurons.biases(), answer=answer, rival=rival,
            names=("embed", *map(str, parts_of), "final norm's bias", "unembedding's bias"),
            layers=tuple(heads.layers), neuron_layers=tuple(neurons.layers),
            place=place_name(self.name, tokens, at),
            capped=any(getattr(config_of, name, None) for name in CAPS), unexplained=heads.why,
            vocab={str(i): model.word(i) for i in ids},
        )  # fmt: skip


def _sides(parts: Float[Tensor, "batch part"], total: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    """What speaks for the answer, and the total with what speaks against it."""
    return parts.clamp(min=0).sum(1), total - parts.clamp(max=0).sum(1)


class _Inside:
    """What the units of sites (heads, neurons) are of what their layer adds to the stream."""

    def __init__(
        self, model: ic.Model, site: S.Site, added: S.Site, layers: list[int], direction: Float[Tensor, "batch d_model"]
    ) -> None:
        self.model, self.site, self.added, self.direction = model, site, added, direction
        self.layers = [layer for layer in layers if layer in model.layers(added)]
        self.why: dict[str, str] = {}
        self._parts: list[Tensor] = []
        self._biases: list[Tensor] = []

    def layer(self, layer: int, units: Float[Tensor, "batch *unit d"], output: Float[Tensor, "batch d_model"]) -> None:
        """One layer's units, and what it added."""
        weight, bias = self.model.weights(self.site[layer]), self.model.bias(self.site[layer])
        kind = torch.promote_types(weight.dtype, torch.float32)
        units, weight = units.to(weight.device, kind), weight.to(kind)
        flat = weight.flatten(0, -2)
        before = (units.flatten(1) @ flat).cpu().double() + bias.cpu().double()
        try:
            norm = frozen(self.model, self.added[layer], before, output)
        except ic.CapabilityError as error:
            if self.site is not S.z:
                raise
            self.why[str(layer)] = str(error)
            norm = Frozen(output.new_full(output.shape[1:], math.nan), output.new_zeros(output.shape[1:]),
                          output.new_ones(len(output)), False)  # fmt: skip
        back = norm.back(self.direction)
        written = (back.to(weight.device, kind) @ flat.T).unflatten(1, weight.shape[:-1])
        parts = units * written
        self._parts.append((parts.sum(-1) if parts.ndim == 3 else parts).cpu())
        self._biases.append((back @ bias.cpu().double() + self.direction @ norm.bias).to(kind))

    def parts(self) -> Tensor | None:
        """`[batch layer unit]`, NaN where a layer has fewer; None of no layers."""
        if not self._parts:
            return None
        widest = max(part.shape[1] for part in self._parts)
        pad = torch.nn.functional.pad
        return torch.stack([pad(part, (0, widest - part.shape[1]), value=math.nan) for part in self._parts], 1)

    def biases(self) -> Tensor | None:
        """`[batch layer]`; None of no layers."""
        return torch.stack(self._biases, 1) if self._biases else None


def _neuron_layers(model: ic.Model, config: DirectLogitConfig) -> list[int]:
    """The layers whose neurons are asked for.

    Raises:
        SiteError: there is no such layer, or it has no neurons.
    """
    if config.neurons is None:
        return []
    chosen = [config.neurons] if isinstance(config.neurons, int) else config.neurons
    return model.layers(S.mlp_act[chosen])


def _pair(
    owner: str, model: ic.Model, config: DirectLogitConfig, logits: Float[Tensor, "batch d_vocab"], rows: int
) -> tuple[Tensor, Tensor]:
    """Answer and rival of each prompt; what is not given is what the model says, and says next to the other.

    Raises:
        PlanError: answer and rival are the same.
    """
    first, second = logits.topk(2, -1).indices.T
    ids = [
        None if words is None else scores.token_ids(model, words, rows, owner, what).cpu()
        for words, what in ((config.answer, "answer"), (config.rival, "rival"))
    ]
    answer = ids[0] if ids[0] is not None else first if ids[1] is None else first.where(first != ids[1], second)
    rival = ids[1] if ids[1] is not None else first.where(first != answer, second)
    if bool((answer == rival).any()):
        row = int((answer == rival).nonzero()[0])
        raise ic.PlanError(
            f"{owner}: answer and rival of prompt {row} are both {model.word(int(answer[row]))!r}: there is no "
            "difference to explain; give rival=[…], another token"
        )
    return answer, rival


def _demand_a_sum(model: ic.Model, y: Float[Tensor, "batch d_model"], parts: list[Tensor]) -> None:
    """Refuse streams that are no plain sum of what is added to them.

    Raises:
        CapabilityError: saying how far it is.
    """
    off = (y - sum(parts[1:], parts[0])).norm(dim=-1)
    size = sum((part.norm(dim=-1) for part in parts[1:]), parts[0].norm(dim=-1))
    slack = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    if bool((off > slack * size).any()):
        raise ic.CapabilityError(
            f"direct_logit_attribution: the last stream of {model.source} is not the sum of its embeddings and of what "
            f"attention and MLPs add (off by {float((off / size).max()):.1%}): it is normed or scaled on the way, or "
            "something else is added. docs/families.md says how; path_patching goes through the model itself"
        )
