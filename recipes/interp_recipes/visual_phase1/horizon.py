"""The information horizon in the recipe `visual_phase1`: single visual tokens, and subsets, taken away from a layer on.

answer         what the model itself says to the prompt, teacher-forced
single         log p of its first token;  generated: mean log p of all its tokens
information    what removing one visual token takes, beside the same in a black image of the same size
keep fractions the best-ranked share kept, beside random subsets of the same size
stays          whether greedy generation still says the same answer, which its tokens' probabilities tell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from interp_plugins.visual.depth import Layers
from interp_plugins.visual.horizon import Claim, Horizon, claim, horizon, noise

import interp_core as ic
from interp_core import report, runs, stats

from ..visual_data import Asking, Row, note_bad
from .findings import Causal, Truncation
from .plan import Plan
from .samples import BLANK, Sample, Samples

RANKING = "attention"
"""What p0 pays to a token at the layer itself: a ranking that does not know the answer."""
ANSWERS = {"single": "first", "generated": "mean"}
"""Scores of the method `information_horizon`, by what of the answer they are of."""


@dataclass(frozen=True, eq=False)
class Removals:
    """What the removals come to.

    Attributes:
        horizons, claims: by "single" and "generated"; empty where nothing was run.
        pooled: ranked minus random over all shares kept, by the same; `[layer]`.
        ranked, random: share of generated answers that stay, `[layer fraction]`.
        samples: whose answers these are.
        several: how many of these answers have more than one token.
        unlike: how many answers are not the greedy ones once they are written as text.
        why: why there are no numbers, or no claim.
        skipped: samples that the model did not run.
        records: hash of the rows.
    """

    horizons: Mapping[str, Horizon] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    pooled: Mapping[str, stats.Band] = field(default_factory=dict)
    ranked: stats.Band | None = None
    random: stats.Band | None = None
    samples: tuple[str, ...] = ()
    several: int = 0
    unlike: int = 0
    why: str = ""
    skipped: tuple[Row, ...] = ()
    records: str = ""

    @staticmethod
    def of(rows: Sequence[Row], layers: Layers, plan: Plan, cause: Causal) -> Removals:
        """From the rows of all layers."""
        bad = {row["sample"]: row for row in rows if "failed" in row}
        skipped = tuple({"sample": name, "where": "horizon", "reason": row["failed"]} for name, row in bad.items())
        kept = [row for row in rows if row["sample"] not in bad and row["layer"] in layers.numbers]
        cells = {(row["sample"], row["layer"]): row for row in kept}
        names = tuple(dict.fromkeys(row["sample"] for row in kept))
        images = [str(cells[name, layers.numbers[0]]["image"]) for name in names]
        records = runs.digest(sorted(runs.digest(dict(row)) for row in kept))[:16]
        if len(set(images)) < 2:
            why = f"{len(names)} samples were run, of fewer than two images"
            return Removals(why=why, skipped=skipped, records=records)

        def numbers(key: str, score: str, name: str) -> np.ndarray:
            return np.array([cells[name, layer][key][score] for layer in layers.numbers])

        tau = 0.0 if cause.threshold is None else cause.threshold.tau
        how: dict[str, Any] = {"images": images, "resamples": plan.resamples, "seed": plan.seed}
        boot = plan.boot(images)
        horizons, claims, pooled = {}, {}, {}
        for answer, score in ANSWERS.items():
            left = np.stack([numbers("kept", score, name) for name in names])
            gains = left[..., 0] - left[..., 1:].mean(-1)  # the first subset is the ranked one, the rest are random
            epsilon = noise([numbers("blank", score, name) for name in names])
            lost = [numbers("lost", score, name) for name in names]
            horizons[answer] = horizon(lost, gains, layers, plan.keep_fractions, epsilon, **how)
            pooled[answer] = boot.band(gains.mean(-1), axes=("layer",), name=f"ranked - random, {answer}")
            if cause.cliff is not None:
                claims[answer] = claim(gains, layers, cause.cliff, margin=tau, **how)
        stays = np.stack([numbers("kept", "right", name) for name in names])
        bands = [boot.band(part, axes=("layer", "fraction")) for part in (stays[..., 0], stays[..., 1:].mean(-1))]
        first = [cells[name, layers.numbers[0]] for name in names]
        several, unlike = sum(row["m"] > 1 for row in first), sum(not row["whole"]["right"] for row in first)
        why = "" if cause.cliff is not None else "there is no cliff inside the model"
        return Removals(horizons, claims, pooled, bands[0], bands[1], names, several, unlike, why, skipped, records)

    def information_row(self) -> Row:
        """As JSON, of single tokens."""
        return {
            "status": "run" if self.horizons else self.why, "records": self.records, "n": len(self.samples),
            "answers": {name: horizon.row() for name, horizon in self.horizons.items()},
            "of_several_tokens": self.several, "not_greedy_as_text": self.unlike, "skipped": list(self.skipped),
        }  # fmt: skip

    def keep_row(self) -> Row:
        """As JSON, of subsets."""
        base = {"status": "run" if self.horizons else self.why, "records": self.records, "ranking": RANKING}
        if self.ranked is None or self.random is None:
            return base
        generated = self.horizons["generated"]
        stays = [
            {"layer": layer, "keep": share, "ranked": float(self.ranked.value[i, j]),
             "random": float(self.random.value[i, j])}
            for i, layer in enumerate(generated.layers.numbers) for j, share in enumerate(generated.fractions)
        ]  # fmt: skip
        return base | {
            "n": len(self.samples), "claims": {name: claim.row() for name, claim in self.claims.items()},
            "answers_that_stay": stays,
            "advantage": {
                name: [{k: v for k, v in row.items() if k == "layer" or k.startswith("adv")} for row in each.table()]
                for name, each in self.horizons.items()
            },
        }  # fmt: skip

    def sentences(self) -> list[str]:
        """What came out."""
        if not self.horizons:
            return [f"There is no information horizon: {self.why}."] if self.why else []
        names = {"single": "Of the answer's first token", "generated": "Of whole generated answers"}
        said = [f"{names[name]}, {horizon}." for name, horizon in self.horizons.items()]
        if not self.several:
            said = [
                f"All answers are of one token, so that single and generated are one; {self.horizons['generated']}."
            ]
        if by_subsets := self.claims.get("generated"):
            said.append(f"By subsets of visual tokens, {by_subsets}.")
        if self.unlike:
            said.append(f"{self.unlike} answers, written as text and read again, are not quite what was generated.")
        return said

    def charts(self) -> dict[str, report.Chart]:
        """Information by layer, ranked against random, and answers that stay."""
        if self.ranked is None or self.random is None:
            return {}
        generated = self.horizons["generated"]
        shown = list(self.horizons) if self.several else ["generated"]  # of one token each, both curves are one
        called = {name: name if self.several else "answers of one token" for name in shown}
        places = list(map(str, generated.layers.numbers))
        n = f"n = {generated.mean.n} in {generated.mean.units} images."
        means = [report.Line.of(called[name], self.horizons[name].mean, self.horizons[name].epsilon) for name in shown]
        shares = [
            report.Line.of(f"keep {share:g}", [generated.advantage[i, j] for i in range(len(places))])
            for j, share in enumerate(generated.fractions)
        ]
        stays = [
            report.Line(f"{name}, keep {share:g}", band.value[:, j], None)
            for j, share in enumerate(generated.fractions)
            for name, band in (("ranked", self.ranked), ("random", self.random))
        ]
        return {
            "causal/information": report.Curves(
                means, places, title="Information of one visual token (dashed: noise floor)",
                xlabel="removed from layer", ylabel="nats", base="noise floor ε",
                caption=f"What removing one visual token takes from the answer, mean over tokens; {n}",
            ),
            "truncation/ranked_random": report.Curves(
                [report.Line.of(called[name], self.pooled[name]) for name in shown], places,
                title="Ranked minus random subsets, all shares", xlabel="others gone from layer", ylabel="nats",
                caption="log p with the best-ranked tokens kept, minus the mean of random subsets as large. A cliff is "
                f"claimed where this lies above 0 before it and not after; {n}",
            ),
            "truncation/keep_fractions": report.Curves(
                shares, places, title="Ranked minus random subsets, generated answers", xlabel="others gone from layer",
                ylabel="nats", caption=f"The same of generated answers, share by share; {n}",
            ),
            "truncation/answers_that_stay": report.Curves(
                stays, places, title="Generated answers that stay", xlabel="others gone from layer", percent=True,
                ylabel="share", caption=f"Greedy answers that stay what they are with a share of tokens kept; {n}",
            ),
        }  # fmt: skip


def removals(
    run: runs.RunFolder, model: ic.Model, data: Samples, asking: Asking, plan: Plan, cause: Causal, cut: Truncation
) -> Removals:
    """Removals of the first of the answered samples, layer by layer of the truncation grid."""
    header = cause.header()
    if cause.stopped or cut.drops is None or not plan.horizon_samples:
        why = "no samples were asked for (horizon_samples 0)" if not plan.horizon_samples else cause.stopped
        removed = Removals(why=why)
    else:
        samples = [sample for sample in data.others if sample.name in set(cut.samples)][: plan.horizon_samples]
        layers = [layer for layer in plan.grid(model.n_layers, cause.cliff) if layer < model.n_layers]
        every = run.map(
            "causal/horizon.jsonl",
            lambda sample: _removed(model, sample, cut.texts[sample.name], layers, asking, plan),
            samples, by=lambda sample: sample.name, strict=asking.strict,
        )  # fmt: skip
        removed = Removals.of(every, Layers(tuple(layers), model.n_layers), plan, cause)
    run.json("causal/horizon.json", header | removed.information_row())
    run.json("truncation/keep_fractions.json", header | removed.keep_row())
    print(*removed.sentences(), sep="\n")
    return removed


def _cell(sample: Sample, layer: int) -> str:
    return f"{sample.name} @ {layer}"


def _removed(
    model: ic.Model, sample: Sample, text: str, layers: Sequence[int], asking: Asking, plan: Plan
) -> list[Row]:
    """Rows of one sample, one per layer."""
    heads = [{"cell": _cell(sample, layer), "sample": sample.name, "image": sample.image, "layer": layer}
             for layer in layers]  # fmt: skip
    try:
        if not text.strip():
            raise ic.TextError("the model's own answer is empty; there is nothing whose probability could change")
        removal = ic.method("information_horizon")(
            model, sample.tokens(model, asking, answer=text), blank=sample.tokens(model, asking, BLANK, answer=text),
            keep=list(plan.keep_fractions), subsets=plan.random_subsets, ranking=RANKING, layers=list(layers),
            tokens=plan.horizon_tokens, seed=plan.seed,
        )  # fmt: skip
        if not all(part[~part.isnan()].isfinite().all() for part in (removal.lost, removal.kept)):
            raise ic.ReadError("its probabilities are not finite; another dtype may do")
    except ic.InterpError as error:
        note_bad([], sample.name, "horizon", error, asking.strict)
        return [head | {"failed": str(error)} for head in heads]
    assert removal.lost_blank is not None
    m = len(sample.tokens(model, asking, answer=text).rows.names["target"][0])
    looked = ~removal.lost[0, 0, 0].isnan()  # of `horizon_tokens` alone; the others were not removed
    rows = []
    for i, head in enumerate(heads):
        tables = {
            "lost": removal.lost[0, :, i, looked], "blank": removal.lost_blank[0, :, i, looked],
            "kept": removal.kept[0, :, i], "whole": removal.whole[0],
        }  # fmt: skip
        named = {key: dict(zip(removal.scores, table.tolist(), strict=True)) for key, table in tables.items()}
        rows.append(head | {"answer": text, "m": m, **named})
    return rows
