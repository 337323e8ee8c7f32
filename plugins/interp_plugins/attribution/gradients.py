"""Attribution by gradients with respect to the token embeddings: input × gradient, and integrated gradients.

    input × gradient       score(j) = <x_j, dF/dx_j>
    integrated gradients   score(j) = <x_j - x'_j, sum over k of w_k dF/dx_j at x' + a_k (x - x')>

x are the embeddings of the row, x' those of a baseline, F the answer's logits or log-probabilities. Nodes a_k and
weights w_k are those of a quadrature rule on [0, 1]. Visual tokens count by what the vision tower hands over for them,
features that are added after later layers (DeepStack) included.

profile="reference" of integrated gradients does as the published experiments: log-probabilities, every token at eos in
the baseline, and a trapezoid rule whose n weights are 1/n (the ends half of it), so that they add up to 1 - 1/n: with
20 steps .95 of the integral.

Source: Shrikumar et al. (2016), arXiv:1605.01713; Sundararajan et al. (2017), arXiv:1703.01365; the reference is
FlashTrace (Pan et al. 2026), arXiv:2602.01914.
Cost: one forward and one backward pass; integrated gradients steps × (forward + backward), many steps in a pass, and
two forwards. `per_token` adds a forward, and a backward per token of the target, to each.
Must equal: a small step of an embedding, scaled up; the scores of integrated gradients add up to F(x) - F(x') as steps
grow, and equal captum's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .ablations.judge import Judge, StandIn, TargetScale, embedded, judge_of, stand_in, wide
from .layout import Layout
from .method import Attributed, Attribution, AttributionConfig, stream_site

Rule = Literal["gauss_legendre", "trapezoid", "left", "right", "middle"]
Baseline = Literal["zeros"] | StandIn


LEGENDRE = 1000
"""Steps that the Gauss-Legendre rule takes at most."""


class GradientConfig(AttributionConfig):
    """Settings of input × gradient.

    Attributes:
        target_scale: gradients of the answer's logits, or of its log-probabilities.
        per_token: also a row per token of the target.
    """

    target_scale: TargetScale = "logit"
    per_token: bool = False

    @property
    def by_token(self) -> bool:
        """Whether tokens of the target get rows of their own, which differ."""
        return self.per_token

    def cost(self, work: ic.Work) -> ic.Cost:
        """A pass of each text by itself with a backward pass; for rows another, with one per token of the target."""
        answer = work.forward(read_out=self.explained(work), backward=1, batch=1)
        if not (self.by_token and work.target):
            return answer
        return answer + work.forward(read_out=work.target, backward=work.target, batch=1)


class IntegratedConfig(GradientConfig):
    """Settings of integrated gradients.

    Attributes:
        baseline: from where the line to the embeddings begins: the embedding of "eos", "pad" or a token id at every
            token, or "zeros".
        over: what moves along the line: "all" tokens, or the "prompt" alone.
        steps: points on the line.
        rule: how the integral is worked out: by Gauss and Legendre, the trapezoid rule, or a Riemann sum at the left,
            right or middle of each step.
        batch_tokens: tokens that go together in a pass, at most.
    """

    baseline: Baseline = "eos"
    over: Literal["all", "prompt"] = "all"
    steps: int = 20
    rule: Rule = "gauss_legendre"
    batch_tokens: int = 4096

    @property
    def by_token(self) -> bool:
        """Whether tokens of the target get rows of their own, which differ."""
        return self.per_token or self.profile == "reference"

    def cost(self, work: ic.Work) -> ic.Cost:
        """Both ends of the line, and its steps with a backward pass each; for rows as many again, with one per step and
        token of the target."""
        read_out = self.explained(work)
        together = max(1, min(self.batch_tokens // work.tokens, self.steps))
        ends = work.forward(read_out=read_out, batch=1) + work.forward(read_out=read_out, batch=1)
        steps = work.prompts * self.steps
        cost = ends + work.forward(steps, read_out=read_out, backward=1, batch=together)
        if self.by_token and work.target:
            cost += work.forward(steps, read_out=work.target, backward=work.target, batch=together)
        return cost


class Gradients(Attribution):
    """What both share: the answer's judges, a number per token, checks."""

    additive = False

    def check(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> None:
        """Embeddings have gradients here."""
        super().check(model, tokens, config)
        if why := model.can("embed", "grad"):
            raise ic.CapabilityError(f"{self.name} needs gradients of the token embeddings: {why}")


class InputXGradient(Gradients):
    """Each token's embedding times the gradient of the answer's logits with respect to it, summed."""

    name = "input_x_gradient"
    requires = frozenset({"causal", "embed", "resid_post"})
    Config = GradientConfig

    def attribute(self, model: ic.Model, layout: Layout, config: GradientConfig) -> Attributed:
        """One forward and one backward pass; for rows another forward, and a backward per token of the target."""
        middle, later = stream_site(model), _added_later(model, layout.tokens)
        visual = [p for span in layout.tokens.spans.get("vision", ((),))[0] for p in span]
        sites = [S.embed, *([S.vision_embed] if visual else []), *(S.resid_pre[layer + 1] for layer in later)]
        judges: list[Judge] = []

        def goal(logits: Tensor) -> Tensor:
            judges[:] = [judge_of(layout, logits.detach(), config.target_scale)]
            return judges[0].rows(logits).sum()

        run = model.run(layout.tokens, read=[*sites, middle], grad=goal, logits=list(layout.predictors))
        values = [run[site].plain for site in sites]
        features = [*values[1 : 1 + bool(visual)], *later.values()]

        def scored(grads: Sequence[Tensor]) -> Float[Tensor, " pos"]:
            scores = (wide(values[0]) * grads[0]).sum(-1)[0]
            for feature, grad in zip(features, grads[1:], strict=True):
                own = grad.flatten(0, -2) if grad.shape == feature.shape else grad[0, visual]
                scores[visual] += (wide(feature.flatten(0, -2)) * own).sum(-1)
            return scores

        scores = scored([run.grad[site].plain for site in sites])
        rows = None
        if config.per_token and len(layout.target):
            # gradients at the sites of the same pass: a zero added there has the site's gradient
            zeros = [torch.zeros_like(value, requires_grad=True) for value in values]
            added = [site.add(zero) for site, zero in zip(sites, zeros, strict=True)]
            by_token = []
            with ic.Progress("rows", len(layout.target)) as progress:
                for grads in _of_each_token(model, layout, judges[0], layout.tokens, added, zeros):
                    by_token.append(scored(grads))
                    progress.add()
            rows = torch.stack(by_token)
        stream = run[middle].plain[0].float().norm(dim=-1)
        notes = {"explains": judges[0].name, "answer": list(judges[0].ids), "input": "token embeddings"}
        return Attributed(scores, rows, stream=stream, notes=notes)


class IntegratedGradients(Gradients):
    """Gradients along the line from a baseline to the row's embeddings, times the way."""

    name = "integrated_gradients"
    requires = frozenset({"causal", "embed", "resid_post"})
    Config = IntegratedConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> None:
        """Steps, a baseline that the model has, text alone."""
        super().check(model, tokens, config)
        if config.steps < 1 or (config.steps < 2 and "trapezoid" in (config.rule, _rule(config))):
            raise ic.PlanError(f"{self.name}: steps={config.steps}; take one at least, two for the trapezoid rule")
        if config.steps > LEGENDRE and _rule(config) == "gauss_legendre":
            raise ic.PlanError(
                f"{self.name}: steps={config.steps}; nodes of gauss_legendre are eigenvalues of a matrix of steps by "
                f"steps, and more than {LEGENDRE} bring nothing; take fewer, or rule='middle'"
            )
        if config.batch_tokens < 1:
            raise ic.PlanError(f"{self.name}: batch_tokens={config.batch_tokens}; take one at least")
        if tokens.inputs:
            raise ic.CapabilityError(
                f"{self.name} moves token embeddings, and these tokens come with {', '.join(tokens.inputs)}; use "
                "input_x_gradient or leave_out"
            )
        kind = _baseline(config)
        if kind != "zeros":
            stand_in(self.name, model, kind)

    def attribute(self, model: ic.Model, layout: Layout, config: IntegratedConfig) -> Attributed:
        """Steps of the line, many in a pass."""
        reference = config.profile == "reference"
        per_token = config.by_token and len(layout.target) > 0
        middle = stream_site(model)
        clean = model.run(layout.tokens, read=[S.embed, middle], logits=list(layout.predictors))
        scale: TargetScale = "logprob" if reference else config.target_scale
        judge = judge_of(layout, clean.logits.plain, scale)
        x = clean[S.embed].plain[0]
        start = self._start(model, layout, config, x)
        nodes, weights = quadrature(_rule(config), config.steps, short=reference)
        total = _integral(model, layout, judge, (start, x), (nodes, weights), per_token, config.batch_tokens)
        scores = ((wide(x) - wide(start)) * total).sum(-1)
        ends = [float(judge.rows(logits)) for logits in (clean.logits.plain, _at(model, layout, start))]
        notes = {
            "explains": judge.name, "answer": list(judge.ids), "baseline": _baseline(config), "over": config.over,
            "rule": _rule(config) + (" with weights 1/n" if reference else ""), "steps": config.steps,
            "difference": ends[0] - ends[1], "residue": ends[0] - ends[1] - float(scores[0].double().sum()),
        }  # fmt: skip
        stream = clean[middle].plain[0].float().norm(dim=-1)
        return Attributed(scores[0], scores[1:] if per_token else None, stream=stream, notes=notes)

    def _start(
        self, model: ic.Model, layout: Layout, config: IntegratedConfig, x: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "pos d_model"]:
        """Where the line begins."""
        kind = _baseline(config)
        start = torch.zeros_like(x)
        if kind != "zeros":
            start = embedded(model, stand_in(self.name, model, kind)).expand_as(x)
        if config.over == "prompt":
            moving = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
            moving[list(layout.prompt)] = True
            start = torch.where(moving, start, x)
        return start


def quadrature(rule: Rule, steps: int, *, short: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a rule on [0, 1].

    Args:
        short: the trapezoid rule as published code has it, with weights of 1/steps for steps points.
    """
    n = steps
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return (nodes + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(n, 1 / n if short else 1 / (n - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, n), weights
    first = {"left": 0.0, "middle": 0.5, "right": 1.0}[rule]
    return (np.arange(n) + first) / n, np.full(n, 1 / n)


def _integral(
    model: ic.Model, layout: Layout, judge: Judge, ends: tuple[Tensor, Tensor], points: tuple[np.ndarray, np.ndarray],
    per_token: bool, batch_tokens: int,
) -> Float[Tensor, "goal pos d_model"]:  # fmt: skip
    """Weighted sum of gradients along the line, of the answer and then of each token of the target."""
    start, x = ends
    count = max(1, batch_tokens // layout.length)
    total = torch.zeros(1 + per_token * len(layout.target), *x.shape, device=x.device, dtype=wide(x).dtype)
    with ic.Progress("gradients", len(total) * len(points[0])) as progress:
        for at in range(0, len(points[0]), count):
            nodes, weights = (torch.as_tensor(p[at : at + count], device=x.device, dtype=x.dtype) for p in points)
            line = torch.lerp(start[None], x[None], nodes[:, None, None]).requires_grad_()
            tokens, edit = _repeated(layout, len(line)), S.embed.set(line)
            run = model.run(tokens, edits=edit, logits=list(judge.positions), allow_noop=True)
            grads = iter([torch.autograd.grad(judge.rows(run.logits.plain).sum(), line)])
            if per_token:
                grads = itertools.chain(grads, _of_each_token(model, layout, judge, tokens, [edit], [line]))
            for goal, (grad,) in zip(total, grads, strict=True):
                goal += torch.einsum("r,rpd->pd", wide(weights), wide(grad))
                progress.add(len(line))
    return total


def _of_each_token(
    model: ic.Model, layout: Layout, judge: Judge, tokens: ic.Tokens, edits: list[ic.Edit], values: list[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Gradients with respect to the values of edits, of each token of the target: one forward, a backward for each."""
    places = [p - 1 for p in layout.target]
    ids = tuple(layout.tokens.ids[0, layout.target.start : layout.target.stop].tolist())
    logits = model.run(tokens, edits=edits, logits=places, allow_noop=True).logits.plain
    goals = Judge(tuple(places), ids, judge.scale, judge.against).each(logits).sum(0)
    for n, goal in enumerate(goals):
        yield torch.autograd.grad(goal, values, retain_graph=n + 1 < len(goals))


def _repeated(layout: Layout, count: int) -> ic.Tokens:
    """A row so many times."""
    ids = layout.tokens.ids.expand(count, -1)
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _at(model: ic.Model, layout: Layout, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "1 predictor d_vocab"]:
    """Logits at other embeddings."""
    run = model.run(_repeated(layout, 1), edits=S.embed.set(x), logits=list(layout.predictors), allow_noop=True)
    return run.logits.plain


def _added_later(model: ic.Model, tokens: ic.Tokens) -> dict[int, Tensor]:
    """Visual features that are added after some layers, `[batch visual d_model]` by layer."""
    layers = model.layers(S.deepstack) if any(tokens.spans.get("vision", ((),))[0]) else []
    if not layers:
        return {}
    run = model.run(tokens, read=[S.deepstack[layer] for layer in layers], logits=False)
    return {layer: run[S.deepstack[layer]].plain for layer in layers}


def _rule(config: IntegratedConfig) -> Rule:
    return "trapezoid" if config.profile == "reference" else config.rule


def _baseline(config: IntegratedConfig) -> Baseline:
    return "eos" if config.profile == "reference" else config.baseline
