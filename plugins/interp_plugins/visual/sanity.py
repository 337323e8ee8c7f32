"""The sanity battery: what must hold on every sample before a number about images is believed.

    tokens       V lies in the text, all its ids are placeholders, as many as the images' grids say, in as many runs
    projector    the rows V of resid_pre[0] are what the projector hands over                           exactly
    other image  with another image of the same grid resid_pre[0] changes on V alone                    exactly
    identity     V replaced by its own rows, at every layer, changes nothing
    blind        V replaced at layer 0 by a blind run's rows, DeepStack following, is the blind run
    knockout     text kept from V, position by position, in all layers is truncation from layer 0
    last layer   V replaced at the input of the final norm changes nothing where the answer is read
    repeated     two runs without edits are equal to the bit                                            exactly
    plain pass   log p of the answer is that of the model's own forward pass

"Changes nothing" is the largest difference of log p over the answer's tokens, at most `TOLERANCE` for the dtype.

Source: specification of this project. Cost: six runs and a sweep over layers per sample.
Must equal: all of it, on every family (tests/test_visual_sanity.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import score as scores
from interp_core import sites as S
from interp_core import visual

from .sample import Sample, demand_twin

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Nats, by the model's dtype; in a float64 model norms and rotary angles may still be float32."""
EXACT = ("tokens", "projector", "other image", "repeated")


class Range(NamedTuple):
    """Where a sample's visual tokens are.

    Attributes:
        sample: its name.
        tokens: of the whole text.
        visual: how many visual ones.
        runs: pieces of text that they form, as (start, stop).
        grid: rows and columns of each image's first tile.
        first, last: pixel boxes of the first and the last visual token.
    """

    sample: str
    tokens: int
    visual: int
    runs: tuple[tuple[int, int], ...]
    grid: tuple[tuple[int, int], ...]
    first: tuple[float, ...] | None
    last: tuple[float, ...] | None


@dataclass(frozen=True)
class Sanity:
    """What the battery says.

    Attributes:
        ranges: of every sample.
        worst: per check, the largest difference over samples, and the sample that has it.
        tolerance: of the checks that are not exact.
    """

    ranges: tuple[Range, ...]
    worst: Mapping[str, tuple[float, str]]
    tolerance: float

    @property
    def checks(self) -> dict[str, bool]:
        """Whether each check holds."""
        return {name: value <= self._limit(name) for name, (value, _) in self.worst.items()}

    def _limit(self, name: str) -> float:
        return 0.0 if name in EXACT else self.tolerance

    def demand(self) -> None:
        """Refuse to go on where a check does not hold.

        Raises:
            EffectError: naming the checks, and the worst sample of each.
        """
        failed = [
            f"{name}: {self.worst[name][0]:.3g} in sample {self.worst[name][1]}, {self._limit(name):g} allowed"
            for name, holds in self.checks.items() if not holds
        ]  # fmt: skip
        if failed:
            raise ic.EffectError(f"images and text do not go together as they should: {'; '.join(failed)}")

    def row(self) -> dict[str, Any]:
        """As JSON."""
        worst = {
            name: {"worst": value, "sample": sample, "limit": self._limit(name), "holds": self.checks[name]}
            for name, (value, sample) in self.worst.items()
        }
        return {"checks": worst, "visual_range": [one._asdict() for one in self.ranges]}

    def __str__(self) -> str:
        lines = [
            f"{one.sample:<20} {one.tokens:>5} tokens, {one.visual:>4} visual in "
            f"{', '.join(f'{a}:{b}' for a, b in one.runs)}; grid {', '.join(f'{r}×{c}' for r, c in one.grid)}; boxes "
            f"{_box(one.first)} … {_box(one.last)}"
            for one in self.ranges
        ]
        checks = [
            f"{'ok' if holds else 'FAIL':<5} {name} ({self.worst[name][0]:.2g})" for name, holds in self.checks.items()
        ]
        return "\n".join([*lines, *checks])


def _box(box: Sequence[float] | None) -> str:
    return "no pixels" if box is None else f"({', '.join(f'{edge:g}' for edge in box)})"


def battery(model: ic.Model, samples: Iterable[tuple[str, Sample, ic.Tokens]]) -> Sanity:
    """All checks on all samples.

    Args:
        samples: name, sample, and the same text with another image of the same grid.

    Raises:
        PlanError: no samples, or another text.
        TextError: visual tokens that do not fit the images.
    """
    ranges: list[Range] = []
    worst: dict[str, tuple[float, str]] = {}
    for name, sample, other in samples:
        demand_twin(sample, other, f"the other image of {name}")
        ranges.append(_range(model, name, sample))
        for check, value in _checked(model, sample, other).items():
            if check not in worst or not value <= worst[check][0]:
                worst[check] = value, name
    if not ranges:
        raise ic.PlanError("the sanity battery needs a sample at least")
    return Sanity(tuple(ranges), worst, TOLERANCE.get(model.dtype, 2e-2))


def _range(model: ic.Model, name: str, sample: Sample) -> Range:
    tokens = sample.tokens
    grid = model.visual_grid(tokens)[0]
    runs = tuple((span.start, span.stop) for span in tokens.spans["vision"][0])
    shapes = []
    for image in sorted({token.image for token in grid}):
        own = [token for token in grid if (token.image, token.tile) == (image, 0)]
        columns = [token.col for token in own if token.col is not None]
        shapes.append((max(token.row for token in own) + 1, max(columns) + 1))
    return Range(name, tokens.lengths[0], len(sample.visual), runs, tuple(shapes), grid[0].box, grid[-1].box)


def _checked(model: ic.Model, sample: Sample, other: ic.Tokens) -> dict[str, float]:
    """How far each check is from holding."""
    tokens, n = sample.tokens, model.n_layers
    reads = [*visual.reads(model), S.vision_embed, S.resid_pre[0]]
    clean = model.run(tokens, read=reads, logits=sample.reads)
    again = model.run(tokens, logits=sample.reads)
    blind = model.run(other, read=reads, logits=sample.reads)
    wanted, blinded = _answer(clean, sample), _answer(blind, sample)
    first = clean[S.resid_pre[0]].plain[0]
    text = torch.ones(len(first), dtype=torch.bool)
    text[list(sample.visual)] = False
    moved = (first - blind[S.resid_pre[0]].plain[0]).abs()
    own = visual.states(clean)
    each = scores.nll(tokens, _name_of(tokens, sample))
    identity = model.sweep(tokens, [visual.replaced(own, layer) for layer in range(n)], each)

    def edited(edits: Sequence[ic.Edit]) -> Tensor:
        return _answer(model.run(tokens, edits=edits, logits=sample.reads, allow_noop=True), sample)

    explicit = visual.blocked(model, range(n), list(sample.after), list(sample.visual))
    return {
        "tokens": float(_misplaced(model, sample)),
        "projector": _apart(clean.rows(S.vision_embed)[0], first[list(sample.visual)]),
        "other image": float(moved[text].max()) + float(not bool(moved[~text].any())),
        "identity": float(identity.effects.abs().max()) / len(sample.ids),
        "blind": _apart(edited(visual.replaced(blind, 0)), blinded),
        "knockout": _apart(edited(explicit), edited(visual.truncated(model, 0))),
        "last layer": _apart(edited(visual.replaced(visual.zeros(own), n)), wanted),
        "repeated": _apart(again.logits.plain, clean.logits.plain),
        "plain pass": _apart(_plain(model, sample), wanted),
    }


def _misplaced(model: ic.Model, sample: Sample) -> int:
    """Visual positions that are no placeholder or too many or too few for the grids, and runs too many or too few."""
    tokens, config = sample.tokens, model.hf.config
    names = ("image_token_id", "image_token_index")
    known = {getattr(config, name, None) for name in names}
    real = tokens.rows.real[0]
    odd = sum(int(tokens.ids[0, real[place]]) not in known for place in sample.visual)
    grid = model.visual_grid(tokens)[0]
    runs = sum(len(spans[0]) for name, spans in tokens.spans.items() if name.startswith("image_"))
    return odd + abs(len(grid) - len(sample.visual)) + abs(runs - len(tokens.spans["vision"][0]))


def _name_of(tokens: ic.Tokens, sample: Sample) -> str:
    """The name of the answer's span."""
    return next(name for name, rows in tokens.rows.names.items() if tuple(rows[0]) == sample.answer)


def _answer(run: ic.Run, sample: Sample) -> Float[Tensor, " m"]:
    return _logp(run.logits.plain[0], sample)


def _logp(logits: Float[Tensor, "m d_vocab"], sample: Sample) -> Float[Tensor, " m"]:
    values = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return values.gather(-1, sample.ids.to(values.device)[:, None])[:, 0].cpu()


def _plain(model: ic.Model, sample: Sample) -> Float[Tensor, " m"]:
    """By the model's own forward pass, without anything of this package."""
    tokens, device = sample.tokens, model.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tokens.inputs.items()}
    with torch.no_grad():
        logits = model.hf(
            input_ids=tokens.ids.to(device), attention_mask=tokens.mask.long().to(device), use_cache=False, **inputs
        ).logits
    return _logp(logits[0, sample.reads], sample)


def _apart(first: Tensor, second: Tensor) -> float:
    """The largest difference; infinite where shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    return float((first.as_subclass(Tensor) - second.to(first.device)).abs().max())
