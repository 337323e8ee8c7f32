"""Settings of the recipe `visual_phase1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from interp_plugins.visual.gates import GATES, Thresholds
from interp_plugins.visual.horizon import SUBSETS

import interp_core as ic

from ..visual_data import VisualConfig, demand_at_least
from .plan import Plan
from .samples import Mode

PROFILES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"pilots": 8, "samples": 10, "horizon_samples": 10, "resamples": 500},
    "full": {"pilots": 20, "samples": 100, "horizon_samples": 40, "resamples": 2000},
}
"""What is not set by its flag."""
INTERVENTIONS = ("replace:blind", "knockout:text", "truncation", "band", "text:blind")
KEEP = (0.75, 0.5, 0.25)
"""Shares of visual tokens that subsets keep."""


class VisualPhase1Config(VisualConfig):
    """What is taken away from a model's images, from which layers, and what the gates demand of the effects.

    Attributes:
        profile: smoke (8 pilots, 10 further samples: gates that need more are inconclusive) or full (20 and 100).
        cliff_boundary: a cliff known from another study (None: the one that this study finds).
        pilots: samples that set the threshold τ and nothing else (None: the profile's number).
        samples: further ones, of which all curves are (None: the profile's number).
        interventions: of the method `visual`; replace:blind is always among them, and the cliff is its.
        blind: images that stand in (None: random; black and mean are the others); the cliff is of the first.
        null_image: what leaves what the image shows, for the noise floor: jpeg, or none (a floor of 0).
        layers: of the causal curves (None: all).
        window: how many layers a knockout hits together.
        tau: the threshold of an effect, in nats.
        adaptive_tau: take tau_ratio of the peak of the pilots' mean effect instead, not below the noise floor.
        tau_ratio: the share of the peak that adaptive_tau takes.
        truncation_layers: from which the image is taken away for answers (None: 13 at most; the boundary is added).
        horizon_samples: how many further samples lose visual tokens one by one and in subsets (0: none, and no gate
            G7; None: the profile's number).
        horizon_tokens: how many tokens of each, spread over the image (0: all).
        keep_fractions: shares of the visual tokens that subsets keep (None: 0.75, 0.5, 0.25).
        random_subsets: random subsets against each ranked one.
        gate_images: how many images a gate needs; with fewer it is inconclusive. Like all thresholds of gates it is
            written down with a hash before anything runs.
        share_at_start: of the gates: the share of the effect that is there at layer 0.
        cliff_width: of the gates: how wide the window of the cliff may be, as a share of the layers.
        drop_easy: of the gates: by how much easy answers may drop behind the cliff,
        drop_hard: of the gates: by how much hard answers must drop there.
        resamples: bootstrap samples of the intervals (None: the profile's number).
    """

    pilots: int | None = None
    samples: int | None = None
    interventions: list[str] | None = None
    blind: list[Mode] | None = None
    null_image: Literal["jpeg", "none"] = "jpeg"
    layers: list[int] | None = None
    window: int = 1
    tau: float = 0.01
    adaptive_tau: bool = False
    tau_ratio: float = 0.1
    truncation_layers: list[int] | None = None
    horizon_samples: int | None = None
    horizon_tokens: int | None = 16
    keep_fractions: list[float] | None = None
    random_subsets: int = 5
    gate_images: int = 30
    share_at_start: float = 0.9
    cliff_width: float = 1 / 6
    drop_easy: float = 0.01
    drop_hard: float = 0.05
    resamples: int | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """How many of each."""
        return self.sizes(PROFILES)

    def cost(self, work: ic.Work) -> ic.Cost:
        """All that it may run, as if images mattered and a cliff were found; see `cost`."""
        from .cost import phase_cost

        numbers = self.numbers
        return phase_cost(work, self.plan(), self.asking(), numbers["pilots"], numbers["samples"])

    def plan(self) -> Plan:
        """What is measured.

        Raises:
            PlanError: settings out of range, before anything is loaded.
        """
        numbers = self.numbers
        demand_at_least(
            pilots=(numbers["pilots"], 8 if self.adaptive_tau else 2), samples=(numbers["samples"], 4),
            resamples=(numbers["resamples"], 100), gate_images=(self.gate_images, 1),
            horizon_samples=(numbers["horizon_samples"], 0), horizon_tokens=(self.horizon_tokens or 1, 1),
            random_subsets=(self.random_subsets, SUBSETS),
        )  # fmt: skip
        if not (self.tau > 0 and 0 < self.tau_ratio <= 1):
            raise ic.PlanError(f"tau {self.tau:g}, tau_ratio {self.tau_ratio:g}: they are above 0, and in (0, 1]")
        keep, blind = tuple(self.keep_fractions or KEEP), tuple(self.blind or ("random",))
        if not all(0 < share < 1 for share in keep):
            raise ic.PlanError(f"keep_fractions {', '.join(map(str, keep))}: each lies between 0 and 1")
        if len(set(blind)) < len(blind):
            raise ic.PlanError(f"blind: {', '.join(blind)}; give each once")
        # G6 is of probes, which this study has none of; G7 of samples whose visual tokens are removed
        gates = [gate for gate in GATES if gate != "G6" and (gate != "G7" or numbers["horizon_samples"])]
        thresholds = Thresholds.of({
            "images": self.gate_images, "share_at_start": self.share_at_start, "width": self.cliff_width,
            "drop_easy": self.drop_easy, "drop_hard": self.drop_hard, "gates": tuple(gates),
        })  # fmt: skip
        return Plan(
            interventions=tuple(dict.fromkeys(("replace:blind", *(self.interventions or INTERVENTIONS)))),
            blind=blind, null_image=self.null_image, layers=_tuple(self.layers), window=self.window, tau=self.tau,
            adaptive_tau=self.adaptive_tau, tau_ratio=self.tau_ratio, cliff_boundary=self.cliff_boundary,
            causal_record=self.causal_record, truncation_layers=_tuple(self.truncation_layers),
            horizon_samples=numbers["horizon_samples"], horizon_tokens=self.horizon_tokens or None,
            keep_fractions=keep, random_subsets=self.random_subsets, resamples=numbers["resamples"], seed=self.seed,
            thresholds=thresholds,
        )  # fmt: skip


def _tuple(layers: list[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(layers)
