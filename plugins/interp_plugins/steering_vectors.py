"""Steering vectors: the direction in which pairs of prompts differ, layer by layer, to be added while generating.

    d_i = h(positive_i) - h(negative_i)      h: a layer's stream at one position `[d_model]`
    mean    v = mean of d                    raw length
    svd     v = u · r, u the first right singular vector of the d as they are                    (the default)
    pca     the same of d - mean d; where all pairs differ in one way, centring removes just that
            u is turned so that most d lie on its side, r = √mean (d · u)², so that 1 · v is about one pair's difference

Prompts that are questions, with `answers` that hold a letter, are contrastive activation addition (CAA): the two texts
are question + answer, h is taken at the letter (`at=-2`: "A" of "(A)"), and `kind="mean"` is its vector.

Controls of equal length: a random direction, one at right angles, and the same estimate from shuffled labels.

Source: Rimsky et al. (2023), arXiv:2312.06681 (CAA); Zou et al. (2023), arXiv:2310.01405, and Vogel's repeng for pca of
differences; Turner et al. (2023), arXiv:2308.10248.
Shapes: states `[batch side layer d_model]`, a vector `[d_model]`.
Cost: two forward passes, read at one position; a singular value decomposition `[batch d_model]` per layer, when it is
asked for.
Must equal: differences of `model.run(…)`; a direction planted in a model (tests/test_steering_vectors.py): where all
differences point the same way, svd gives it and pca does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._columns import TITLE, legend
from ._maps import place_name, single_place
from ._prompts import prompts_of

Kind = Literal["svd", "mean", "pca"]
Control = Literal["random", "orthogonal", "shuffled"]
STREAMS = ("resid_post", "resid_pre", "resid_mid", "attn_out", "mixer_out", "mlp_out")
SIDES = ("positive", "negative")
COLUMNS = {
    "length": "length of the mean difference of a pair",
    "median": "median length of a state, to compare with",
    "explained": "share of the squared differences along their first direction",
    "agree": "share of pairs whose difference lies on the side of the mean of the others",
    "cos(mean, svd)": "cosine of the mean difference and that first direction",
    "cos(svd, pca)": "cosine of that first direction and the first principal component",
}
"""What the table says of a layer, in words."""


class SteeringConfig(ic.Config):
    """Settings of steering vectors.

    Attributes:
        negative: the other prompt of each pair, or one for all.
        answers: instead, per prompt (a question) the answer that is wanted and the other one: `["(A)", "(B)"]`, put
            behind the question as they are.
        kind: how the direction comes out of the differences.
        site: "resid_post", "resid_pre", "resid_mid", "attn_out", "mixer_out" or "mlp_out".
        layers: which (None: all).
        at: the position, a single one (None: the last token, and with answers the last but one).
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"negative", "answers"})
    negative: Any = None
    answers: list[tuple[str, str]] | None = None
    kind: Kind = "svd"
    site: Literal["resid_post", "resid_pre", "resid_mid", "attn_out", "mixer_out", "mlp_out"] = "resid_post"
    layers: list[int] | None = None
    at: Any = None


@dataclass(frozen=True, eq=False)
class SteeringResult(ic.Result):
    """States of pairs, and the vectors that come out of them.

    Attributes:
        states: of each pair, positive and negative.
        layers: numbers along `layer`.
        site, kind, place: what was read, how vectors come out of it, and where.
        positive, negative: the texts.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"states": ("batch", "side", "layer", "d_model")}
    JOINS: ClassVar[Mapping[str, str]] = {"place": "first", "positive": "rows", "negative": "rows"}
    states: Float[Tensor, "batch side layer d_model"]
    layers: tuple[int, ...]
    site: str
    kind: Kind
    place: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def vector(self, layer: int, kind: Kind | None = None) -> Float[Tensor, " d_model"]:
        """The vector of a layer.

        Raises:
            PlanError: no such layer or kind, or pca of a single pair.
        """
        return direction(self._sides(layer), kind or self.kind)

    def control(self, layer: int, which: Control = "random", seed: int = 0) -> Float[Tensor, " d_model"]:
        """What a vector is to be compared with, as long as it: a random direction, a random one at right angles to it,
        or the same estimate with labels shuffled over all states.

        Raises:
            PlanError: no such layer or control.
        """
        sides, own = self._sides(layer), self.vector(layer)
        generator = torch.Generator().manual_seed(seed)
        if which == "shuffled":
            order = torch.randperm(2 * len(sides), generator=generator)
            other = direction(sides.flatten(0, 1)[order].unflatten(0, (len(sides), 2)), self.kind)
        elif which in ("random", "orthogonal"):
            other = torch.randn(len(own), generator=generator, dtype=own.dtype)
            if which == "orthogonal":
                other = other - own * (other @ own) / (own @ own)
        else:
            raise ic.PlanError(
                f"no control {which!r}. {ic.errors.nearest(which, ('random', 'orthogonal', 'shuffled'))}"
            )
        return other * (own.norm() / other.norm())

    def edits(
        self, layer: int | Sequence[int], multiplier: float = 1.0, at: Any = None, *, vector: Tensor | None = None
    ) -> list[ic.Edit]:
        """Edits that add the vector, for `model.run`, `model.generate` and `model.sweep`.

        Args:
            layer: one, or several, each with its own vector.
            multiplier: factor; negative ones steer the other way.
            at: where, as `Site.at` takes it; several in a tuple, as `after_end` gives them (None: everywhere).
            vector: another one instead (a control).

        Raises:
            PlanError: no such layer.
        """
        chosen = [layer] if isinstance(layer, int) else layer
        places = at if isinstance(at, tuple) else (at,)
        added = {number: self.vector(number) if vector is None else vector for number in chosen}
        sites = [(S.named(self.site)[number], add) for number, add in added.items()]
        return [
            (site if place is None else site.at(place)).add(multiplier * add) for site, add in sites for place in places
        ]

    def to_gguf(self, path: str | Path, hint: str = "") -> Path:
        """Write the vectors as a control vector of llama.cpp: `direction.{layer}`, float32, layers from 1 on, each of
        them added to what leaves its block.

        Args:
            hint: what llama.cpp calls the model's family (`controlvector.model_hint`).

        Raises:
            PlanError: another site than resid_post.
            CapabilityError: the package `gguf` is not installed.
        """
        if self.site != "resid_post":
            raise ic.PlanError(f"llama.cpp adds control vectors to resid_post; these are of {self.site}")
        try:
            from gguf import GGUFWriter
        except ImportError as error:
            raise ic.CapabilityError("control vectors are written by gguf: pip install gguf") from error
        out = Path(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(str(out), "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        kept = [layer for layer in self.layers if layer > 0]
        writer.add_uint32("controlvector.layer_count", len(kept))
        for layer in kept:
            writer.add_tensor(f"direction.{layer}", self.vector(layer).float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return out

    def _sides(self, layer: int) -> Float[Tensor, "batch side d_model"]:
        number = self.layers[layer] if -len(self.layers) <= layer < 0 else layer
        if number not in self.layers:
            has = ", ".join(map(str, self.layers))
            raise ic.PlanError(f"there is no steering vector of layer {layer}; there are those of {has}")
        return self.states[:, :, self.layers.index(number)]

    def table(self) -> list[dict[str, Any]]:
        """One row per layer: length of the mean difference, beside the median length of states; share of the squared
        differences along their first singular vector; share of pairs that lie on the side of the mean of all others;
        and cosines between the three kinds."""
        return list(self._table)

    @cached_property
    def _table(self) -> tuple[dict[str, Any], ...]:
        return tuple({"layer": layer} | described(self._sides(layer)) for layer in self.layers)

    @property
    def finding(self) -> str:
        """The layer whose differences have most in common."""
        if len(self.states) < 2:
            return "A single pair: its difference is the vector."
        best = max(self._table, key=lambda row: row["explained"])
        return (
            f"The {len(self.states)} pairs have most in common in layer {best['layer']}: their first direction holds "
            f"{best['explained']:.0%} of the squared differences, {best['agree']:.0%} of the pairs lie on the side of "
            f"the mean of the others, and that mean is {best['length'] / best['median']:.2g} times as long as a state."
        )

    def __str__(self) -> str:
        rows = [{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in self._table]
        heads = "".join(f"{name:>16}" for name in rows[0])
        lines = ["".join(f"{text:>16}" for text in row.values()) for row in rows]
        return "\n".join([self.finding, heads, *lines, "", legend(COLUMNS, rows[0])])

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(COLUMNS, self.table()[0])}

    def prompt_rows(self) -> list[dict[str, Any]]:
        """The pairs."""
        return [{"positive": a, "negative": b} for a, b in zip(self.positive, self.negative, strict=True)]

    def charts(self) -> list[ic.report.Curves]:
        """Layer by layer, how much pairs have in common."""
        names = {
            "explained": "first direction's share of squared differences",
            "agree": "pairs on the side of the mean of the others",
        }
        lines = [ic.report.Line(text, [row[name] for row in self._table]) for name, text in names.items()]
        return [
            ic.report.Curves(
                lines, [str(layer) for layer in self.layers], percent=True, limits=(0.0, 1.0),
                xlabel=f"{self.site} of layer", ylabel="share",
                title=f"What {len(self.states)} pairs have in common, at {ic.report.place_words(self.place)}",
            )
        ]  # fmt: skip


class SteeringVectors(ic.Method):
    """In which direction pairs of prompts differ at each layer: a vector that steers towards the first of each pair."""

    name = "steering_vectors"
    Config = SteeringConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: SteeringConfig) -> None:
        """There are pairs, and the letters of answers stand where they are read."""
        if why := model.can(config.site, "read"):
            raise ic.CapabilityError(f"{self.name}: {why}")
        model.layers(_site(config))
        at = _at(config)
        if not single_place(at):
            raise ic.PlanError(f"{self.name} reads one position; at={config.at!r} may select others")
        for side in _pairs(self.name, model, tokens, config):
            place_name(self.name, side, at)
        if config.answers is not None:
            _demand_letters(self.name, *_pairs(self.name, model, tokens, config), at)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: SteeringConfig) -> SteeringResult:
        """A pass for each side."""
        site, at = _site(config), _at(config)
        layers, sides = model.layers(site), _pairs(self.name, model, tokens, config)
        states = []
        for side in sides:
            run = model.run(side, read=[S.named(config.site)[layer].at(at) for layer in layers], logits=False)
            of_layers = [run[S.named(config.site)[layer].at(at)].plain.detach().cpu() for layer in layers]
            stacked = torch.stack(of_layers, 1)
            states.append(stacked.to(torch.promote_types(stacked.dtype, torch.float32)))
        return SteeringResult(
            states=torch.stack(states, 1), layers=tuple(layers), site=config.site, kind=config.kind,
            place=place_name(self.name, tokens, at) if config.answers is None else "the answers' letters",
            positive=_texts(sides[0]), negative=_texts(sides[1]),
        )  # fmt: skip


def direction(states: Float[Tensor, "batch side d_model"], kind: Kind) -> Float[Tensor, " d_model"]:
    """The vector of pairs of states.

    Raises:
        PlanError: no such kind, or pca of a single pair.
    """
    difference = (states[:, 0] - states[:, 1]).double()
    if kind == "mean":
        return difference.mean(0).to(states)
    if kind not in ("svd", "pca"):
        raise ic.PlanError(f"no kind of vector {kind!r}. {ic.errors.nearest(kind, ('svd', 'mean', 'pca'))}")
    if kind == "pca" and len(difference) < 2:
        raise ic.PlanError("pca takes the mean out, and of a single pair nothing is left; give more, or kind='mean'")
    centred = difference - difference.mean(0) if kind == "pca" else difference
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    along = difference @ first
    towards = along.sign().sum()
    first = -first if float(towards or along.sum()) < 0 else first
    return (first * along.pow(2).mean().sqrt()).to(states)


def described(states: Float[Tensor, "batch side d_model"]) -> dict[str, float]:
    """A layer's row of the table."""
    difference = (states[:, 0] - states[:, 1]).double()
    mean, count = difference.mean(0), len(difference)
    squares = torch.linalg.svdvals(difference).pow(2)
    others = difference.sum(0) - difference
    agree = float(((difference * others).sum(-1) > 0).double().mean()) if count > 1 else 1.0
    cosine = torch.nn.functional.cosine_similarity
    svd = direction(states, "svd").double()
    pca = direction(states, "pca").double() if count > 1 else svd
    return {
        "length": float(mean.norm()), "median": float(states.flatten(0, 1).norm(dim=-1).median()),
        "explained": float(squares[0] / squares.sum().clamp(min=1e-300)), "agree": agree,
        "cos(mean, svd)": float(cosine(mean, svd, 0)), "cos(svd, pca)": float(cosine(svd, pca, 0)),
    }  # fmt: skip


def after_end(tokens: ic.Tokens, end: str, *, with_end: bool = False) -> tuple[ic.Tokens, tuple[str, ...]]:
    """The tokens with a name for those after the last `end` of each row (where an instruction ends), and the places to
    steer at: these and all that is generated. A row without it is steered everywhere, as in CAA's code.

    Args:
        end: text that ends the instruction, such as "[/INST]".
        with_end: the last token of `end` counts, too.

    Raises:
        TextError: tokens without their text.
    """
    rows = []
    for row, length in enumerate(tokens.lengths):
        try:
            start = tokens.find(end, row, -1).stop - with_end
        except ic.PositionError:
            start = 0
        rows.append((ic.Span(start, length),) if start < length else ())
    if not any(rows):
        return tokens, ("generated",)
    return replace(tokens, spans={**tokens.spans, "after_end": tuple(rows)}), ("after_end", "generated")


def _site(config: SteeringConfig) -> S.Site:
    site = S.named(config.site)
    return site if config.layers is None else site[config.layers]


def _at(config: SteeringConfig) -> Any:
    return config.at if config.at is not None else -1 if config.answers is None else -2


def _texts(tokens: ic.Tokens) -> tuple[str, ...]:
    return tokens.texts or tuple(" ".join(labels) for labels in tokens.labels)


def _pairs(owner: str, model: ic.Model, tokens: ic.Tokens, config: SteeringConfig) -> tuple[ic.Tokens, ic.Tokens]:
    """Both sides.

    Raises:
        PlanError: neither or both of negative and answers, or another number of them.
    """
    if (config.negative is None) == (config.answers is None):
        raise ic.PlanError(
            f"{owner} needs pairs: give negative=[…], a prompt for each, or answers=[(wanted, other), …]"
        )
    if config.answers is not None:
        if tokens.texts is None or tokens.inputs:
            raise ic.PlanError(
                f"{owner}: answers= are put behind the text of questions; give texts, or whole negative=[…]"
            )
        if len(config.answers) != len(tokens):
            raise ic.PlanError(f"{owner}: answers= has {len(config.answers)} pairs for {len(tokens)} questions")
        sides = zip(*config.answers, strict=True)
        positive, negative = (
            model.tokens([text + answer for text, answer in zip(tokens.texts, side, strict=True)]) for side in sides
        )
        return positive, negative
    single = isinstance(config.negative, str) or (isinstance(config.negative, ic.Tokens) and len(config.negative) == 1)
    others = [config.negative] * len(tokens) if single else config.negative
    return tokens, ic.Tokens.stack(prompts_of(f"{owner}: negative", model, others, len(tokens)))


def _demand_letters(owner: str, positive: ic.Tokens, negative: ic.Tokens, at: Any) -> None:
    """Refuse answers that do not differ where they are read.

    Raises:
        PlanError: saying which tokens stand there.
    """
    for row, ((a,), (b,)) in enumerate(zip(positive.labels_at(at), negative.labels_at(at), strict=True)):
        if a == b:
            ends = [" ".join(map(repr, side.labels[row][-4:])) for side in (positive, negative)]
            raise ic.PlanError(
                f"{owner}: at {at} both answers to question {row} have {a!r} (they end in {ends[0]} and {ends[1]}); "
                "give at=…, the position of the letter that differs"
            )
