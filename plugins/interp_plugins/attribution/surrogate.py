"""Ablation surrogate: a sparse linear model of what the answer's probability is when random sources are taken away.

    mask i      each source kept with probability `keep`, drawn by numpy's RandomState(i + seed)
    y_i       = log p - log(1 - p),  p = p(answer | the prompt with the sources of mask i)
    y        ≈  b + sum over sources s of w_s mask_s                 by the lasso (`lasso`)
    score(j)  = w of j's source / number of its tokens

With `against`, y is the difference of the two logits. 1 - p is worked out as -expm1(log p), and log p is at most
-1e-12, so that a certain answer gives 27.6, not infinity.

Sources are sentences, words or spans of the user's prompt (`units`). A prompt of one sentence, or of so few that a mask
leaves none of them and nothing else to predict from, is taken apart into words instead, and the note `sources` says so.
Sources are taken away by their characters, with the white space before them, unless another convention is asked for
(`ablation`). Where two sources say the same, both get weight, while leaving out either costs nothing.

    LDS        Spearman's correlation of b + w · mask and y, on `held_out` fresh masks with the seeds that follow
    drop(k)    log p(answer | prompt) - log p(answer | prompt without the k best sources), for k of `top_k`

Source: Cohen-Wang et al. (2024), arXiv:2409.00729 (ContextCite); LDS: Park et al. (2023), arXiv:2303.14186.
Cost: a forward pass per mask over what is left of the prompt and the answer; with conventions "mask" and "replace" what
their sweep says.
Must equal: the lasso's optimality conditions on the values of one forward pass per mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp_core as ic

from .ablations.ablation import Ablation, Convention
from .ablations.judge import Judge
from .ablations.lasso import Fit, drawn, lasso
from .ablations.units import Kind, Unit, units_of
from .layout import Layout
from .leave_out import AblationConfig, AblationMethod, described, listed, spread
from .method import Attributed

CERTAIN = -1e-12
"""The largest log-probability that is taken as it is."""


class SurrogateConfig(AblationConfig):
    """Settings of the ablation surrogate.

    Attributes:
        units: the sources.
        convention: how they are taken away.
        ablations: random masks that the fit is made from.
        keep: probability that a mask keeps a source.
        seed: of the first mask.
        alpha: weight of the lasso's penalty, per token of the answer.
        held_out: fresh masks on which the fit is tested.
        top_k: numbers of best sources that are taken away together, to see what the answer loses.
    """

    units: Kind = "sentence"
    convention: Convention = "delete_text"
    ablations: int = 64
    keep: float = 0.5
    seed: int = 0
    alpha: float = 0.01
    held_out: int = 0
    top_k: list[int] | None = None


class Surrogate(AblationMethod):
    """Weights of a sparse linear model of the answer's probability under random ablations.

    `price` leaves out what `top_k` costs, since its sources are not known before the fit.
    """

    name = "surrogate"
    requires = frozenset({"causal", "embed", "resid_post"})
    Config = SurrogateConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> None:
        """Masks, and numbers that make sense of them."""
        if config.ablations < 2 or config.held_out == 1 or config.held_out < 0:
            raise ic.PlanError(
                f"{self.name}: ablations={config.ablations}, held_out={config.held_out}; a fit takes two masks at "
                "least, a test none or two"
            )
        if not 0 < config.keep < 1 or not config.alpha >= 0 or any(k < 1 for k in config.top_k or ()):
            raise ic.PlanError(
                f"{self.name}: keep={config.keep}, alpha={config.alpha}, top_k={config.top_k}; take a probability "
                "between 0 and 1, a penalty of at least 0, and numbers of sources from 1"
            )
        super().check(model, tokens, config)

    def removals(self, units: Sequence[Unit], config: Any) -> list[list[int]]:
        """What the masks leave out: those of the fit, then those of the test."""
        return [np.flatnonzero(~mask).tolist() for mask in self.masks(units, config)]

    def ablation(self, model: ic.Model, layout: Layout, config: Any) -> Ablation:
        """The variants of one row: by words, where sentences cannot be sources."""
        kind, _ = self.sources(model, layout, config)
        return self.by_units(model, layout, config, kind)

    def sources(self, model: ic.Model, layout: Layout, config: Any) -> tuple[Kind, str]:
        """What kind of source a row is taken apart into, and why it is not the one that was asked for."""
        if config.units == "sentence":
            few = len(units_of(self.name, model, layout, "sentence", (), config.within)) < 2
            if few:
                return "word", "the prompt is one sentence"
            try:
                self.by_units(model, layout, config, "sentence")
            except ic.PositionError:
                return "word", "a mask leaves none of the few sentences"
        return config.units, ""

    def masks(self, units: Sequence[Unit], config: Any) -> np.ndarray:
        """All masks `[mask source]`."""
        # the test's masks come last: another number of them leaves the fit as it is
        return drawn(config.ablations + config.held_out, len(units), config.keep, config.seed)

    def attribute(self, model: ic.Model, layout: Layout, config: SurrogateConfig) -> Attributed:
        """Ablations of one row, the fit, and its tests."""
        work, judge = self.ablation(model, layout, config), self.judge(model, layout, config)
        price, (kind, why) = work.price(judge), self.sources(model, layout, config)
        clean, values = work.run(judge)
        y = values.double() if judge.against is not None else logit_scaled(values)
        masks = self.masks(work.units, config)
        fit = lasso(masks[: config.ablations], y[: config.ablations].numpy(), config.alpha, len(judge.ids))
        weights = torch.from_numpy(fit.weights)
        notes = {
            **described(work, judge, price), **self._tests(model, layout, config, work, judge, fit, clean),
            "target_scale": "difference of logits" if judge.against is not None else "log p - log(1 - p)",
            "sampler": f"numpy RandomState(i + {config.seed}), each source kept with probability {config.keep}",
            "sources": f"{kind}s" + (f", not sentences: {why}" if why else ""),
            "ablations": config.ablations, "alpha": config.alpha, "intercept": fit.intercept, "kkt": fit.kkt,
            "units": listed(work.units, weights, "weight"),
        }  # fmt: skip
        if config.held_out:
            predicted, measured = fit.predicted(masks[config.ablations :]), y[config.ablations :].numpy()
            notes["lds"] = ic.stats.spearman(predicted.tolist(), measured.tolist())
        return Attributed(spread(layout, work.units, weights), notes=notes)

    def _tests(
        self, model: ic.Model, layout: Layout, config: SurrogateConfig, work: Ablation, judge: Judge, fit: Fit,
        clean: Tensor,
    ) -> dict[str, Any]:  # fmt: skip
        """What the answer loses without the best sources."""
        if not config.top_k:
            return {}
        # signed: sources that speak against the answer are not among its best, however large
        best = np.argsort(-fit.weights, kind="stable").tolist()
        again = Ablation(
            self.name, model, layout, work.units, [best[:k] for k in config.top_k], config.convention,
            config.replacement, config.batch_tokens,
        )  # fmt: skip
        _, values = again.run(judge)
        return {"drop": {str(k): float(clean - value) for k, value in zip(config.top_k, values, strict=True)}}


def logit_scaled(log_probability: Tensor) -> Tensor:
    """log p - log(1 - p), in float64."""
    log_p = log_probability.double().clamp(max=CERTAIN)
    # expm1 has digits of 1 - p where p is nearly 1
    return log_p - torch.log(-torch.expm1(log_p))
