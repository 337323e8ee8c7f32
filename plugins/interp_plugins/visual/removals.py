"""Method `information_horizon`: visual tokens removed one by one and in subsets, from every layer on.

    one token      score with v removed from layer l on, for every v and l
    ranked         of the visual tokens the best-ranked share f is kept from layer l on, the others removed
    random         as many kept, drawn at random, `subsets` times
    ranking        "information": I_l(v) itself; "attention": mean over heads of what p0 pays to v in layer l

Removed: no other token, visual or text, sees it in layers ≥ l; the positions of the others stay.

Source: horizon.py. Shapes: information `[batch layer pos]`, NaN where no visual token is.
Cost: a sweep over layers · visual tokens, one over layers · fractions · (1 + subsets), and the first again for a blank.
Must equal: passes with masks by hand, 1e-5 in float32 (tests/test_visual_horizon.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import report, visual
from interp_core import sites as S

from .depth import Layers
from .horizon import SUBSETS, Claim, Horizon, claim, horizon, noise
from .sample import AnswerScores, Sample, demand_twin, per_row, rows_of, sample_of

Ranking = Literal["information", "attention"]


class HorizonConfig(ic.Config):
    """Settings of the information horizon.

    Attributes:
        keep: shares of visual tokens that subsets keep.
        subsets: random ones of each size, 5 or more.
        ranking: what ranked subsets go by; "information" looks at the answer, and is the best that a ranking can be.
        blank: the same text and answer with a blank image of the same size: tokens, or a list of one per row; gives ε.
        layers: from which on tokens are removed (None: all).
        answer: name of the span of the answer.
        seed: of the subsets.
        strategy: of the sweeps.
        progress: show from the beginning how much is done.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"blank"})
    keep: list[float] = [0.75, 0.5, 0.25]  # noqa: RUF012 (pydantic copies it)
    subsets: int = SUBSETS
    ranking: Ranking = "information"
    blank: Any = None
    layers: list[int] | None = None
    answer: str = "target"
    seed: int = 0
    strategy: str = "auto"
    progress: bool = False


@dataclass(frozen=True, eq=False)
class HorizonResult(ic.Result):
    """What is lost with single tokens, and with subsets.

    Attributes:
        information: I_l(v) in nats, NaN at tokens that are not visual.
        blank: the same of the blank images; None without them.
        ranked, random: scores with subsets kept.
        clean: scores with all tokens.
        layers, n_layers: decoder layers, and how many the model has.
        keep: shares kept.
        ranking: what ranked subsets went by.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "information": ("batch", "layer", "pos"), "blank": ("batch", "layer", "pos"),
        "ranked": ("batch", "layer", "fraction"), "random": ("batch", "layer", "fraction", "subset"),
        "clean": ("batch",),
    }  # fmt: skip
    information: Float[Tensor, "batch layer pos"]
    blank: Float[Tensor, "batch layer pos"] | None
    ranked: Float[Tensor, "batch layer fraction"]
    random: Float[Tensor, "batch layer fraction subset"]
    clean: Float[Tensor, " batch"]
    layers: tuple[int, ...]
    n_layers: int
    keep: tuple[float, ...]
    ranking: str

    @property
    def advantage(self) -> Float[Tensor, "batch layer fraction"]:
        """Ranked minus the mean of random subsets of the same size."""
        return self.ranked - self.random.mean(-1)

    def tokens(self, row: int) -> Float[np.ndarray, "layer visual"]:
        """I_l(v) of a row's visual tokens."""
        return _real(self.information[row])

    def horizon(self, images: Sequence[Any] | None = None, *, epsilon: float | None = None, **how: Any) -> Horizon:
        """Where information ends, by both criteria; see `horizon.horizon`.

        Args:
            epsilon: noise floor; None: of the blank images.
        """
        if epsilon is None:
            epsilon = noise([] if self.blank is None else [_real(row) for row in self.blank])
        rows = [self.tokens(row) for row in range(len(self.clean))]
        layers = Layers(self.layers, self.n_layers)
        return horizon(rows, self.advantage.numpy(), layers, self.keep, epsilon, images=images, **how)

    def claim(self, cliff: int, images: Sequence[Any] | None = None, **how: Any) -> Claim:
        """Whether a cliff may be claimed; see `horizon.claim`."""
        return claim(self.advantage.numpy(), Layers(self.layers, self.n_layers), cliff, images=images, **how)

    def table(self) -> list[dict[str, Any]]:
        """One row per layer: means over samples."""
        information = torch.stack([torch.from_numpy(self.tokens(row).mean(-1)) for row in range(len(self.clean))])
        gains = self.advantage.mean(0).tolist()
        return [
            {"layer": layer, "information": value}
            | {f"advantage_{share:g}": gain for share, gain in zip(self.keep, gains[i], strict=True)}
            for i, (layer, value) in enumerate(zip(self.layers, information.mean(0).tolist(), strict=True))
        ]

    def __str__(self) -> str:
        head = f"information of visual tokens of {len(self.clean)} samples; ranked by {self.ranking}"
        lines = [
            "  layer {:<3} ".format(row.pop("layer")) + "  ".join(f"{name} {value:+.4f}" for name, value in row.items())
            for row in self.table()
        ]
        return "\n".join([head, *lines])

    def html(self) -> str:
        """The table, and advantages by layer."""
        lines = [report.Line(f"keep {f:g}", self.advantage.mean(0)[:, i].numpy()) for i, f in enumerate(self.keep)]
        chart = report.Curves(
            lines, list(map(str, self.layers)), title="Ranked against random subsets", xlabel="decoder layer",
            ylabel="nats", caption="Mean log p with ranked minus with random visual tokens kept from the layer on.",
        )  # fmt: skip
        return chart.html() + report.table(self.table())


def _real(values: Float[Tensor, "layer pos"]) -> Float[np.ndarray, "layer visual"]:
    """Columns of visual tokens alone."""
    return values[:, ~values.isnan().all(0)].double().numpy()


def removed(model: ic.Model, tokens: ic.Tokens, gone: Sequence[int], layer: int) -> list[ic.Edit]:
    """Visual tokens hidden from all others, from a layer on."""
    return visual.removed(model, tokens, [sorted(gone)], range(layer, model.n_layers))


class InformationHorizon(ic.Method):
    """How much each visual token still matters from each layer on, and whether choosing tokens well still helps."""

    name = "information_horizon"
    requires = frozenset({"pattern"})
    Config = HorizonConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: HorizonConfig) -> None:
        """Images, answers and subsets, before anything runs."""
        if config.subsets < SUBSETS:
            raise ic.PlanError(f"{self.name}: subsets={config.subsets}; random needs {SUBSETS} subsets or more")
        if not config.keep or not all(0 < share < 1 for share in config.keep):
            raise ic.PlanError(
                f"{self.name}: keep={config.keep}; shares lie between 0 and 1, and there is one at least"
            )
        if not any(tokens.spans.get("vision", ())):
            raise ic.PlanError(f"{self.name}: no row has visual tokens; give texts with images")
        model.layers(S.pattern if config.layers is None else S.pattern[config.layers])

    def run(self, model: ic.Model, tokens: ic.Tokens, config: HorizonConfig) -> HorizonResult:
        """Row by row."""
        samples = [sample_of(row, config.answer, row=i) for i, row in enumerate(rows_of(tokens))]
        blanks = per_row(config.blank, len(tokens), "blank")
        for sample, blank in zip(samples, blanks, strict=True):
            if blank is not None:
                demand_twin(sample, blank, "the blank image")
        found = []
        with ic.Progress(self.name, len(samples), shown=config.progress) as progress:
            for sample, blank in zip(samples, blanks, strict=True):
                found.append(_Removing(model, sample, config).run(blank))
                progress.add()
        width, columns = tokens.ids.shape[1], [tokens.rows.real[row] for row in range(len(tokens))]
        places = [[real[v] for v in one.visual] for real, one in zip(columns, samples, strict=True)]
        information, blank_information = (
            None if any(one[key] is None for one in found) else torch.stack(
                [_laid_out(one[key], place, width) for one, place in zip(found, places, strict=True)]
            )
            for key in ("information", "blank")
        )  # fmt: skip
        assert information is not None
        return HorizonResult(
            information, blank_information, torch.stack([one["ranked"] for one in found]),
            torch.stack([one["random"] for one in found]), torch.stack([one["clean"] for one in found]),
            _layers(model, config), model.n_layers, tuple(config.keep), config.ranking,
        )  # fmt: skip


def _layers(model: ic.Model, config: HorizonConfig) -> tuple[int, ...]:
    return tuple(sorted(set(model.layers(S.pattern if config.layers is None else S.pattern[config.layers]))))


def _laid_out(values: Float[Tensor, "layer visual"], places: Sequence[int], width: int) -> Float[Tensor, "layer pos"]:
    out = torch.full((len(values), width), float("nan"), dtype=torch.float64)
    out[:, list(places)] = values
    return out


class _Removing:
    """One sample's sweeps."""

    def __init__(self, model: ic.Model, sample: Sample, config: HorizonConfig) -> None:
        self.model, self.sample, self.config = model, sample, config
        self.layers = _layers(model, config)

    def run(self, blank: ic.Tokens | None) -> dict[str, Any]:
        information, clean = self._single(self.sample.tokens)
        ranked, random = self._subsets(self._ranks(information))
        other = None if blank is None else self._single(blank)[0]
        return {"information": information, "blank": other, "ranked": ranked, "random": random, "clean": clean}

    def _single(self, tokens: ic.Tokens) -> tuple[Float[Tensor, "layer visual"], Float[Tensor, ""]]:
        edits = [removed(self.model, tokens, [v], layer) for layer in self.layers for v in self.sample.visual]
        values, clean = self._scored(tokens, edits)
        return clean - values.reshape(len(self.layers), -1), clean

    def _ranks(self, information: Float[Tensor, "layer visual"]) -> Float[Tensor, "layer visual"]:
        """What ranked subsets go by."""
        if self.config.ranking == "information":
            return information
        query, visual = self.sample.answer[0] - 1, list(self.sample.visual)
        sites = [S.pattern[layer].at(query=query, key=visual) for layer in self.layers]
        run = self.model.run(self.sample.tokens, read=sites, logits=False)
        return torch.stack([run[site].plain[0].double().mean(0).cpu() for site in sites])

    def _subsets(self, ranks: Float[Tensor, "layer visual"]) -> tuple[Tensor, Tensor]:
        """Scores `[layer fraction]` of ranked subsets and `[layer fraction subset]` of random ones."""
        config, visual = self.config, np.array(self.sample.visual)
        edits = []
        for i, layer in enumerate(self.layers):
            order = np.argsort(-ranks[i].numpy(), kind="stable")
            for share in config.keep:
                kept = max(1, min(len(visual) - 1, math.floor(share * len(visual) + 0.5)))
                draws = [np.random.default_rng([config.seed, draw, kept]) for draw in range(config.subsets)]
                orders = [order, *(draw.permutation(len(visual)) for draw in draws)]
                gone = [sorted(visual[one[kept:]].tolist()) for one in orders]
                edits += [removed(self.model, self.sample.tokens, one, layer) for one in gone]
        values, _ = self._scored(self.sample.tokens, edits)
        table = values.reshape(len(self.layers), len(config.keep), 1 + config.subsets)
        return table[..., 0], table[..., 1:]

    def _scored(self, tokens: ic.Tokens, edits: Sequence[list[ic.Edit]]) -> tuple[Tensor, Tensor]:
        found = self.model.sweep(tokens, edits, AnswerScores(self.sample).listed()[:1], strategy=self.config.strategy)[
            0
        ]
        return found.values[:, 0].double(), found.clean[0].double()
