"""Method `visual`: how much of an answer is lost when what the image puts into a layer is replaced, hidden or removed.

    Δ(l)   mean log p of the teacher-forced answer, clean minus intervened at layer l (nats; > 0: the image was used)
    rows   one per sample, intervention, mode and layer (records.py), from which curves (curves.py), τ (threshold.py)
           and gates (gates.py) are worked out without the model

The answer stands in the text and is read at the positions that predict it. Each row is a sample of its own: its visual
positions are those of its image.

Source: interventions.py, sample.py; docs/methods/visual.md.
Cost: one clean run, one per blind image, one sweep per curve.
Must equal: one forward pass with hooks per layer (tests/test_visual_method.py); layer 0 of replace:blind the blind run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import interp_core as ic
from interp_core import report
from interp_core import score as scores
from interp_core import sites as S

from .._columns import TITLE, legend
from .interventions import Deepstack, Intervention
from .measure import Measured, Measuring, Plan, demand
from .records import BLIND, Records
from .sample import modes_of, per_row, rows_of, sample_of

COLUMNS = {
    "curve": "what is done to visual tokens from the layer on, or around it",
    "delta": "nats per token of the answer that it loses by that, in the mean",
    "right": "share of prompts whose answer the model still says",
}
"""What the table says, in words."""
FIELDS = ("mean", "first", "p", "kl", "right", "token", "foil")


class VisualConfig(ic.Config):
    """Settings of causal curves.

    Attributes:
        interventions: "replace:blind", "replace:swap", "replace:zero", "replace:mean", "replace:mean_dataset",
            "replace:noise", "knockout:text" (or question, last; ",question" names other keys than the image),
            "truncation", "band" (or "band:4", in so many layers from l on), "text:blind".
        blind: the same text and answer with a blind image: tokens, a list of one item per row, or by mode
            {"random": tokens, "black": tokens}; measured also as a run of its own.
        swap: another sample's image, in the same way.
        reference: what replace:mean_dataset puts in, `ic.visual.dataset_mean(runs)`.
        deepstack: DeepStack additions at and after the layer follow a replacement, or are kept.
        layers: of the curves (None: all).
        window: layers that a knockout hits together, odd.
        noise: in standard deviations of the visual rows.
        draws, seed: of noise.
        answer: name of the span of the answer.
        foil: a wrong first token, to compare logits with: an id or a word, or one per row.
        strategy: of the sweeps.
        progress: show from the beginning how much is done.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"blind", "swap", "foil"})
    interventions: list[str] = ["replace:blind"]  # noqa: RUF012 (pydantic copies it)
    blind: Any = None
    swap: Any = None
    reference: Any = None
    deepstack: Deepstack = "follow"
    layers: list[int] | None = None
    window: int = 1
    noise: float = 1.0
    draws: int = 5
    seed: int = 0
    answer: str = "target"
    foil: int | str | list[int] | list[str] | None = None
    strategy: str = "auto"
    progress: bool = False


@dataclass(frozen=True, eq=False)
class VisualResult(ic.Result):
    """Scores of every sample without and with every intervention.

    Attributes:
        mean, first, p, kl, right, token, foil: of the intervened runs: mean log p of the answer, log p and p of its
            first token, KL at p0 from the clean run, whether the greedy answer is right, the token that it begins with,
            logit of the first token minus the foil's (NaN without one).
        clean: the same of the clean run, in the order of `scores`.
        blind: the same of the runs with blind images.
        m: tokens of the answer.
        curves, modes: names along the axes.
        interventions: of each curve.
        layers, n_layers: decoder layers of the curves, and of the model.
        hit: layers that each curve really changes at each layer.
        scores: names along the axis.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(FIELDS, ("batch", "curve", "layer")), "clean": ("batch", "score"),
        "blind": ("batch", "mode", "score"), "m": ("batch",),
    }  # fmt: skip
    mean: Float[Tensor, "batch curve layer"]
    first: Float[Tensor, "batch curve layer"]
    p: Float[Tensor, "batch curve layer"]
    kl: Float[Tensor, "batch curve layer"]
    right: Float[Tensor, "batch curve layer"]
    token: Float[Tensor, "batch curve layer"]
    foil: Float[Tensor, "batch curve layer"]
    clean: Float[Tensor, "batch score"]
    blind: Float[Tensor, "batch mode score"]
    m: Int[Tensor, " batch"]
    curves: tuple[str, ...]
    interventions: tuple[str, ...]
    modes: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    hit: tuple[tuple[int, ...], ...]
    scores: tuple[str, ...] = FIELDS

    @property
    def delta(self) -> Float[Tensor, "batch curve layer"]:
        """Δ in nats, of the mean log p."""
        return self.clean[:, FIELDS.index("mean"), None, None] - self.mean

    @property
    def delta_blind(self) -> Float[Tensor, "batch mode"]:
        """Δ of replacing the whole image."""
        place = FIELDS.index("mean")
        return self.clean[:, place, None] - self.blind[:, :, place]

    def records(
        self,
        samples: Sequence[str] | None = None,
        images: Sequence[str] | None = None,
        *,
        groups: Sequence[str] | None = None,
        pilots: Sequence[bool] | None = None,
    ) -> Records:
        """One row per sample, intervention, mode and layer.

        Args:
            samples, images: names (None: row numbers; each sample its own image).
            groups: kinds of question, as drawn in strata.
            pilots: which samples are pilots (None: none).
        """
        count = len(self.m)
        names = list(map(str, range(count))) if samples is None else list(samples)
        who = zip(
            names, names if images is None else images, [""] * count if groups is None else groups,
            [False] * count if pilots is None else pilots, strict=True,
        )  # fmt: skip
        return Records.of(row for i, described in enumerate(who) for row in self._rows(i, *described))

    def _rows(self, i: int, sample: str, image: str, group: str, pilot: bool) -> list[dict[str, Any]]:
        head = {"sample": sample, "image": image, "group": group, "pilot": bool(pilot), "n_layers": self.n_layers}
        clean, m = dict(zip(FIELDS, self.clean[i].tolist(), strict=True)), int(self.m[i])
        rows = []
        for number, mode in enumerate(self.modes):
            place = {"intervention": BLIND, "mode": mode, "layer": None, "hit": self.n_layers}
            rows.append(head | place | _row(clean, dict(zip(FIELDS, self.blind[i, number].tolist(), strict=True)), m))
        for number, (curve, name) in enumerate(zip(self.curves, self.interventions, strict=True)):
            values = {field: getattr(self, field)[i, number].tolist() for field in FIELDS}
            for at, layer in enumerate(self.layers):
                place = {"intervention": name, "mode": curve[len(name) :].strip(), "layer": layer}
                here = {field: column[at] for field, column in values.items()}
                rows.append(head | place | {"hit": self.hit[number][at]} | _row(clean, here, m))
        return rows

    def table(self) -> list[dict[str, Any]]:
        """One row per curve and layer: means over samples."""
        mean, right = self.delta.mean(0), self.right.mean(0)
        return [
            {"curve": curve, "layer": layer, "delta": float(mean[i, j]), "right": float(right[i, j])}
            for i, curve in enumerate(self.curves)
            for j, layer in enumerate(self.layers)
        ]

    def __str__(self) -> str:
        lines = [f"effects in nats of {len(self.m)} samples, layers {', '.join(map(str, self.layers))}"]
        for mode, value in zip(self.modes, self.delta_blind.mean(0).tolist(), strict=True):
            lines.append(f"  {'blind ' + mode:<28} {value:+.3f}")
        for curve, values in zip(self.curves, self.delta.mean(0).tolist(), strict=True):
            lines.append(f"  {curve:<28} " + " ".join(f"{value:+.3f}" for value in values))
        return "\n".join(lines)

    def details(self) -> dict[str, str]:
        """The columns of the table in words."""
        return {TITLE: legend(COLUMNS, COLUMNS)}

    def chart(self) -> report.Curves:
        """Mean effect by layer; bands are those of `curves.curve` of the records."""
        means = self.delta.mean(0).double().numpy()
        lines = [report.Line(curve, np.asarray(means[i])) for i, curve in enumerate(self.curves)]
        return report.Curves(
            lines, list(map(str, self.layers)), title="Effect on the answer", xlabel="decoder layer", ylabel="nats",
            caption=f"Mean loss of the answer's log-probability over {len(self.m)} sample{'s' * (len(self.m) != 1)}.",
        )  # fmt: skip

    def charts(self) -> list[report.Curves]:
        """The curves."""
        return [self.chart()]

    @property
    def heading(self) -> str:
        """What the page is about."""
        return "Loss without visual tokens"

    @property
    def finding(self) -> str:
        """What costs the answer most."""
        blind = dict(
            zip((f"a blind image ({mode})" for mode in self.modes), self.delta_blind.mean(0).tolist(), strict=True)
        )
        shown = {f"{row['curve']} at layer {row['layer']}": row["delta"] for row in self.table()} or blind
        name = max(shown, key=lambda key: shown[key])
        worst = f"{name} takes {shown[name]:.2f} nats of the answer's log-probability"
        beside = "; ".join(f"{mode} takes {loss:.2f}" for mode, loss in blind.items())
        return f"{worst}{'; ' + beside if beside and shown is not blind else ''}."


def _row(clean: Mapping[str, float], here: Mapping[str, float], m: int) -> dict[str, Any]:
    """The numbers of a record."""
    delta = clean["mean"] - here["mean"]
    # NaN where there is no foil; JSON has none, so that records say null
    foil = clean["foil"] - here["foil"]
    return {
        "delta": delta, "delta_sum": delta * m, "delta_first": clean["first"] - here["first"],
        "delta_foil": None if foil != foil else foil, "mean": here["mean"], "first": here["first"], "kl": here["kl"],
        "p": here["p"], "clean_p": clean["p"], "right": here["right"], "clean_right": clean["right"],
        "token": int(here["token"]), "clean_token": int(clean["token"]), "m": m,
    }  # fmt: skip


class Visual(ic.Method):
    """What a model loses, layer by layer, when visual tokens are replaced, hidden or removed."""

    name = "visual"
    requires = frozenset({"resid_pre"})
    Config = VisualConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: VisualConfig) -> None:
        """Images, answers, other images and interventions, all before anything runs."""
        plan = self._plan(model, config)
        names = tokens.rows.names
        for row in range(len(tokens)):
            if not names.get("vision", [[]] * len(tokens))[row]:
                raise ic.PlanError(f"visual: row {row} has no visual tokens; give texts with images")
        if config.answer not in names:
            raise ic.PlanError(f"visual: no span {config.answer!r}. {ic.errors.nearest(config.answer, names)}")
        blind = [modes_of(item, "blind") for item in per_row(config.blind, len(tokens), "blind")]
        swap = [modes_of(item, "swap") for item in per_row(config.swap, len(tokens), "swap")]
        for what, rows in (("blind", blind), ("swap", swap)):
            # curves are named by mode, and a batch has one list of curves
            if len({tuple(row) for row in rows}) > 1:
                raise ic.PlanError(f"visual: rows have other modes of {what}: {[list(row) for row in rows]:.80}")
        demand(model, plan, bool(blind[0]), bool(swap[0]))

    def run(self, model: ic.Model, tokens: ic.Tokens, config: VisualConfig) -> VisualResult:
        """Row by row."""
        plan, count = self._plan(model, config), len(tokens)
        blind, swap = per_row(config.blind, count, "blind"), per_row(config.swap, count, "swap")
        foils = None if config.foil is None else scores.token_ids(model, config.foil, count, "visual", "foil")
        samples = [
            sample_of(row, config.answer, None if foils is None else int(foils[i]), i)
            for i, row in enumerate(rows_of(tokens))
        ]
        work = [
            Measuring(model, sample, plan, modes_of(b, "blind"), modes_of(s, "swap"))
            for sample, b, s in zip(samples, blind, swap, strict=True)
        ]
        measured = []
        with ic.Progress("visual", count, shown=config.progress) as progress:
            for measuring in work:
                measured.append(measuring.run())
                progress.add()
        return _result(plan, measured, [len(sample.ids) for sample in samples])

    def _plan(self, model: ic.Model, config: VisualConfig) -> Plan:
        layers = model.layers(S.resid_pre if config.layers is None else S.resid_pre[config.layers])
        if not config.interventions or len(set(config.interventions)) < len(config.interventions):
            raise ic.PlanError(f"visual: interventions={config.interventions}; name one or more, each once")
        if config.draws < 1:
            raise ic.PlanError(f"visual: draws={config.draws}; noise needs one at least, five or more to average")
        return Plan(
            tuple(map(Intervention.parse, config.interventions)), tuple(sorted(set(layers))), model.n_layers,
            config.window, config.deepstack, config.reference, config.noise, config.draws, config.seed, config.strategy,
        )  # fmt: skip


def _result(plan: Plan, measured: Sequence[Measured], m: Sequence[int]) -> VisualResult:
    names = tuple(measured[0].curves)
    absent = torch.full((len(plan.layers),), torch.nan)  # the foil, where there is none

    def stacked(field: str) -> Tensor:
        rows = [torch.stack([sample.curves[name].get(field, absent).double() for name in names]) for sample in measured]
        return torch.stack(rows)

    modes = tuple(measured[0].blind)
    blind = [[[sample.blind[mode].get(name, torch.nan) for name in FIELDS] for mode in modes] for sample in measured]
    clean = [[sample.clean.get(name, torch.nan) for name in FIELDS] for sample in measured]
    # with the space, or "band" would be taken for the beginning of "band:4"
    kinds = [next(what.name for what in plan.interventions if f"{name} ".startswith(f"{what.name} ")) for name in names]
    return VisualResult(
        mean=stacked("mean"), first=stacked("first"), p=stacked("p"), kl=stacked("kl"), right=stacked("right"),
        token=stacked("token"), foil=stacked("foil"), clean=torch.tensor(clean, dtype=torch.float64),
        blind=torch.tensor(blind, dtype=torch.float64).reshape(len(measured), len(modes), len(FIELDS)),
        m=torch.tensor(list(m)), curves=names, interventions=tuple(kinds), modes=modes, layers=plan.layers,
        n_layers=plan.n_layers, hit=tuple(measured[0].hit[name] for name in names),
    )  # fmt: skip
