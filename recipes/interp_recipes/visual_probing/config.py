"""Settings of the recipe `visual_probing`."""

from __future__ import annotations

from collections.abc import Mapping

from interp_plugins.probe.places import LEAKY, Pooling
from interp_plugins.probe.study import Decoder

import interp_core as ic

from ..visual_data import VisualConfig, demand_at_least
from .probes import Grouping, Probing
from .samples import AskingProbes

POSITIONS = ("text_instruction_token", "visual_token", "answer_token")
YES_NO = ("yes", "no")
PROFILES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"max_samples": 18, "repeats": 1, "shuffles": 100},
    "full": {"max_samples": 400, "repeats": 5, "shuffles": 100},
}
"""What is not set by its flag."""


class VisualProbingConfig(VisualConfig):
    """What is decoded, from which states, and how.

    Attributes:
        profile: smoke (18 samples, all files, verdicts inconclusive) or full (400 samples, 5 x 5 folds).
        cliff_boundary: the first layer after the cliff, over which means are taken (None: over all layers).
        classes: the answers that are labels; questions with others are not asked (None: yes and no).
        max_samples: questions, drawn by `seed`, each kind in its share (None: the profile's number).
        positions: of probes: text_instruction_token, visual_token, answer_token (None: these), or any span.
        decoder: ridge, logistic, means, lda, mlp.
        pooling: of the visual tokens: mean, max, midpoint.
        group_by: image, or image_and_question where labels go with the questions' words.
        shuffles: labelings of the null; fewer than 100 are inconclusive (None: the profile's number).
        n_folds: parts of the samples, each of which is left out of training once.
        repeats: how often these parts are drawn anew (None: the profile's number).
    """

    classes: list[str] | None = None
    max_samples: int | None = None
    positions: list[str] | None = None
    decoder: Decoder = "ridge"
    pooling: Pooling = "mean"
    group_by: Grouping = "image"
    shuffles: int | None = None
    n_folds: int = 5
    repeats: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes.

        Raises:
            PlanError: fewer than two, or one twice.
        """
        labels = tuple(self.classes or YES_NO)
        if len(set(labels)) < len(labels) or len(labels) < 2:
            raise ic.PlanError(f"classes: {', '.join(labels)}; two different answers at least are to be told apart")
        return labels

    @property
    def count(self) -> int:
        """How many questions are asked."""
        return self.sizes(PROFILES)["max_samples"]

    def asking(self) -> AskingProbes:
        """How questions are put, and where states are read.

        Raises:
            PlanError: as of `VisualConfig`; a position twice, or the label's own.
        """
        positions = tuple(self.positions or POSITIONS)
        if len(set(positions)) < len(positions):
            raise ic.PlanError(f"positions: {', '.join(positions)}; give each once")
        if LEAKY in positions:
            raise ic.PlanError(
                f"{LEAKY} is the label itself and decodes at 1.0 everywhere; take answer_token, which predicts it"
            )
        return AskingProbes(**vars(super().asking()), positions=positions, pooling=self.pooling)

    def probing(self) -> Probing:
        """Settings of the probes.

        Raises:
            PlanError: out of range.
        """
        sizes = self.sizes(PROFILES)
        demand_at_least(
            max_samples=(sizes["max_samples"], 2), n_folds=(self.n_folds, 2), repeats=(sizes["repeats"], 1),
            shuffles=(sizes["shuffles"], 0), cliff_boundary=(self.cliff_boundary or 0, 0),
        )  # fmt: skip
        return Probing(self.decoder, sizes["shuffles"], self.n_folds, sizes["repeats"], self.group_by, self.seed)
