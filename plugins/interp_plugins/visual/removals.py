"""Method `information_horizon`: visual tokens removed one by one and in subsets, from every layer on.

    one token      scores with v removed from layer l on, for every v and l
    ranked         of the visual tokens the best-ranked share f is kept from layer l on, the others removed
    random         as many kept, drawn at random, `subsets` times
    ranking        "information": I_l(v) itself; "attention": mean over heads of what p0 pays to v in layer l
    scores         mean: log p of the answer's tokens;  first: of its first alone;  right: whether every token of the
                   answer is the likeliest there, so that greedy generation would say this answer

Removed: no other token, visual or text, sees it in layers ≥ l; the positions of the others stay.

Source: horizon.py. Shapes: information `[batch layer pos]`, NaN where no visual token is.
Cost: a sweep over layers · visual tokens, one over layers · fractions · (1 + subsets), and the first again for a blank.
Must equal: passes with masks by hand, 1e-5 in float32 (tests/test_visual_horizon.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import report, visual
from interp_core import sites as S

from .._columns import TITLE, legend
from .depth import Layers
from .horizon import SUBSETS, Claim, Horizon, claim, horizon, noise
from .sample import AnswerScores, Sample, demand_twin, per_row, rows_of, sample_of

Ranking = Literal["information", "attention"]
MEASURED = ("mean", "first", "right")
"""What every run is read for."""


class HorizonConfig(ic.Config):
    """Settings of the information horizon.

    Attributes:
        keep: shares of visual tokens that subsets keep.
        subsets: random ones of each size, 5 or more.
        ranking: what ranked subsets go by; "information" looks at the answer, and is the best that a ranking can be.
        blank: the same text and answer with a blank image of the same size: tokens, or a list of one per row; gives ε.
        layers: from which on tokens are removed (None: all).
        tokens: of each text, so many tokens are removed one by one, spread over the image (None: all).
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
    tokens: int | None = None
    answer: str = "target"
    seed: int = 0
    strategy: str = "auto"
    progress: bool = False


@dataclass(frozen=True, eq=False)
class HorizonResult(ic.Result):
    """What is lost with single tokens, and with subsets.

    Attributes:
        lost: by score, what removing one token takes; NaN at tokens that are not visual, or were not removed.
        lost_blank: the same of the blank images; None without them.
        kept: by score, what is left with subsets kept: the ranked one, then the random ones.
        whole: by score, with all tokens.
        layers, n_layers: decoder layers, and how many the model has.
        keep: shares kept.
        ranking: what ranked subsets went by.
        scores: names along the axis; what has no axis of scores (`information`, `ranked`, …) is of the first.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lost": ("batch", "score", "layer", "pos"), "lost_blank": ("batch", "score", "layer", "pos"),
        "kept": ("batch", "score", "layer", "fraction", "subset"), "whole": ("batch", "score"),
    }  # fmt: skip
    lost: Float[Tensor, "batch score layer pos"]
    lost_blank: Float[Tensor, "batch score layer pos"] | None
    kept: Float[Tensor, "batch score layer fraction subset"]
    whole: Float[Tensor, "batch score"]
    layers: tuple[int, ...]
    n_layers: int
    keep: tuple[float, ...]
    ranking: str
    scores: tuple[str, ...] = MEASURED

    def of(self, score: str) -> HorizonResult:
        """The same of one score alone.

        Raises:
            PlanError: no such score.
        """
        if score not in self.scores:
            raise ic.PlanError(f"no score {score!r}. {ic.errors.nearest(score, self.scores)}")
        at = [self.scores.index(score)]
        blank = None if self.lost_blank is None else self.lost_blank[:, at]
        return replace(
            self, lost=self.lost[:, at], lost_blank=blank, kept=self.kept[:, at], whole=self.whole[:, at],
            scores=(score,),
        )  # fmt: skip

    @property
    def information(self) -> Float[Tensor, "batch layer pos"]:
        """I_l(v) in nats, NaN at tokens that are not visual."""
        return self.lost[:, 0]

    @property
    def blank(self) -> Float[Tensor, "batch layer pos"] | None:
        """The same of the blank images; None without them."""
        return None if self.lost_blank is None else self.lost_blank[:, 0]

    @property
    def ranked(self) -> Float[Tensor, "batch layer fraction"]:
        """Scores with the best-ranked tokens kept."""
        return self.kept[:, 0, ..., 0]

    @property
    def random(self) -> Float[Tensor, "batch layer fraction subset"]:
        """Scores with random ones kept."""
        return self.kept[:, 0, ..., 1:]

    @property
    def clean(self) -> Float[Tensor, " batch"]:
        """Scores with all tokens."""
        return self.whole[:, 0]

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
        return "\n".join([head, *lines, "", legend(self._columns, self.table()[0])])

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(self._columns, self.table()[0])}

    @property
    def _columns(self) -> dict[str, str]:
        """The columns of the table in words."""
        kept = {f"advantage_{share:g}": share for share in self.keep}
        return {"information": "nats that the answer loses without one visual token from the layer on, in the mean"} | {
            name: f"nats by which the best-ranked {share:.0%} of the tokens, kept alone, beat as many random ones"
            for name, share in kept.items()
        }

    def charts(self) -> list[report.Curves]:
        """Advantages by layer."""
        lines = [report.Line(f"keep {f:g}", self.advantage.mean(0)[:, i].numpy()) for i, f in enumerate(self.keep)]
        chart = report.Curves(
            lines, list(map(str, self.layers)), title="Ranked against random subsets", xlabel="decoder layer",
            ylabel="nats", caption="Mean log p with ranked minus with random visual tokens kept from the layer on.",
        )  # fmt: skip
        return [chart]

    @property
    def finding(self) -> str:
        """Where a visual token matters most, and what choosing well is worth there."""
        row = max(self.table(), key=lambda row: row["information"])
        gain = row[f"advantage_{self.keep[0]:g}"]
        return (
            f"A visual token is worth most from layer {row['layer']} on: {row['information']:.4f} nats in the mean; "
            f"keeping the best {self.keep[0]:.0%} instead of random ones gains {gain:.3f} nats there."
        )


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
        if config.tokens is not None and (config.tokens < 1 or config.ranking == "information"):
            raise ic.PlanError(
                f"{self.name}: tokens={config.tokens} with ranking={config.ranking!r}; give one at least, and a "
                "ranking that does not need them all: ranking='attention'"
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
        parts = []
        with ic.Progress(self.name, len(samples), shown=config.progress) as progress:
            for sample, blank in zip(samples, blanks, strict=True):
                parts.append(_Removing(model, sample, config).run(blank))
                progress.add()
        width, columns = tokens.ids.shape[1], [tokens.rows.real[row] for row in range(len(tokens))]
        places = [[real[v] for v in part["looked"]] for real, part in zip(columns, parts, strict=True)]
        information, blank_information = (
            None if any(part[key] is None for part in parts) else torch.stack(
                [_laid_out(part[key], place, width) for part, place in zip(parts, places, strict=True)]
            )
            for key in ("information", "blank")
        )  # fmt: skip
        assert information is not None
        return HorizonResult(
            information, blank_information, torch.stack([part["kept"] for part in parts]),
            torch.stack([part["clean"] for part in parts]), _layers(model, config), model.n_layers, tuple(config.keep),
            config.ranking,
        )  # fmt: skip


def _layers(model: ic.Model, config: HorizonConfig) -> tuple[int, ...]:
    return tuple(sorted(set(model.layers(S.pattern if config.layers is None else S.pattern[config.layers]))))


def _laid_out(
    values: Float[Tensor, "score layer visual"], places: Sequence[int], width: int
) -> Float[Tensor, "score layer pos"]:
    out = torch.full((*values.shape[:2], width), float("nan"), dtype=torch.float64)
    out[..., list(places)] = values
    return out


class _Removing:
    """One sample's sweeps."""

    def __init__(self, model: ic.Model, sample: Sample, config: HorizonConfig) -> None:
        self.model, self.sample, self.config = model, sample, config
        self.layers = _layers(model, config)

    def run(self, blank: ic.Tokens | None) -> dict[str, Any]:
        looked = self._looked_at()
        information, clean = self._single(self.sample.tokens, looked)
        kept = self._subsets(self._ranks(information[0]))
        other = None if blank is None else self._single(blank, looked)[0]
        return {"looked": looked, "information": information, "blank": other, "kept": kept, "clean": clean}

    def _looked_at(self) -> list[int]:
        """Visual tokens that are removed one by one: evenly over the image where not all are."""
        places, count = list(self.sample.visual), self.config.tokens
        if count is None or count >= len(places):
            return places
        # a ranking that covers the image evenly with any number of first ones
        ranks = visual.ranked(self.model, self.sample.tokens, "uniform")[0]
        return [places[i] for i in sorted(ranks.argsort(descending=True, stable=True)[:count].tolist())]

    def _single(
        self, tokens: ic.Tokens, looked: Sequence[int]
    ) -> tuple[Float[Tensor, "score layer visual"], Float[Tensor, " score"]]:
        edits = [removed(self.model, tokens, [v], layer) for layer in self.layers for v in looked]
        values, clean = self._scored(tokens, edits)
        return clean[:, None, None] - values.reshape(len(MEASURED), len(self.layers), -1), clean

    def _ranks(self, information: Float[Tensor, "layer visual"]) -> Float[Tensor, "layer visual"]:
        """What ranked subsets go by."""
        if self.config.ranking == "information":
            return information
        query, visual = self.sample.answer[0] - 1, list(self.sample.visual)
        sites = [S.pattern[layer].at(query=query, key=visual) for layer in self.layers]
        run = self.model.run(self.sample.tokens, read=sites, logits=False)
        return torch.stack([run[site].plain[0].double().mean(0).cpu() for site in sites])

    def _subsets(self, ranks: Float[Tensor, "layer visual"]) -> Float[Tensor, "score layer fraction subset"]:
        """Scores with the ranked subset kept, then with random ones."""
        config, visual = self.config, np.array(self.sample.visual)
        edits = []
        for i, layer in enumerate(self.layers):
            order = np.argsort(-ranks[i].numpy(), kind="stable")
            for share in config.keep:
                # one at least is kept and one removed; half up, since round() goes to the even number
                kept = max(1, min(len(visual) - 1, math.floor(share * len(visual) + 0.5)))
                # no layer in the seed: the same subsets at every layer, so that layers are compared on them
                draws = [np.random.default_rng([config.seed, draw, kept]) for draw in range(config.subsets)]
                orders = [order, *(draw.permutation(len(visual)) for draw in draws)]
                gone = [sorted(visual[ranking[kept:]].tolist()) for ranking in orders]
                edits += [removed(self.model, self.sample.tokens, columns, layer) for columns in gone]
        values, _ = self._scored(self.sample.tokens, edits)
        return values.reshape(len(MEASURED), len(self.layers), len(config.keep), 1 + config.subsets)

    def _scored(
        self, tokens: ic.Tokens, edits: Sequence[list[ic.Edit]]
    ) -> tuple[Float[Tensor, "score variant"], Float[Tensor, " score"]]:
        wanted = {score.name: score for score in AnswerScores(self.sample).listed()}
        sweeps = self.model.sweep(tokens, edits, [wanted[name] for name in MEASURED], strategy=self.config.strategy)
        by = {sweep.score: sweep for sweep in sweeps}
        values = torch.stack([by[name].values[:, 0].double().cpu() for name in MEASURED])
        return values, torch.stack([by[name].clean[0].double().cpu() for name in MEASURED])
