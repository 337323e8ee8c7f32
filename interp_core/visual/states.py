"""What the visual rows of the residual stream are replaced by: those of another run, or made of a run's own.

    blind, swap    X_l of the other run
    zeros          0
    own_mean       mean over the rows of X_l, per sample
    dataset_mean   mean over all rows of all samples' X_l
    noise          X_l + c σ_l ε,  ε ~ N(0, 1),  σ_l = std of all numbers of X_l but those of sink rows

`X_l [visual d_model]` are the visual rows of `resid_pre[l]` for l < L, of the input of the final norm for l = L. The
same is done to what DeepStack adds after block l, `D_l [visual d_model]`, so that a source says all that a policy may
need. A sink is a row whose norm is more than ten times the median norm of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import sites as S
from ..errors import CapabilityError, PlanError, ReadError, wrong
from ..positions import VISION, format_position, position
from ..run import Run

if TYPE_CHECKING:
    from ..positions import PositionLike
    from ..session import Session
    from ..sites import Site

Rows = tuple[Tensor, ...] | Tensor
"""Per row of the batch `[selected d_model]`; or one vector `[d_model]` for all."""
SINK = 10.0
"""Rows with more than so many times the median norm are sinks."""


@dataclass(frozen=True, eq=False)
class States:
    """Values of some positions of the residual stream, by layer.

    Attributes:
        streams: per layer l, the rows at `resid_pre[l]` (l = L: at the input of the final norm).
        additions: per layer l, the rows that DeepStack adds after block l.
        n_layers: L.
        at: which positions these are.
        of: what they are, for error messages.
    """

    streams: Mapping[int, Rows]
    additions: Mapping[int, Rows]
    n_layers: int
    at: PositionLike = VISION
    of: str = "the run"


def demand_images(model: Session) -> None:
    """Refuse models that take no images.

    Raises:
        CapabilityError: this is one.
    """
    if why := model.can("vision_embed", "read"):
        raise CapabilityError(f"no visual tokens: {why}")


def reads(model: Session, at: PositionLike = VISION) -> list[Site]:
    """What a run has to read so that `states` can be taken of it: `model.run(tokens, read=visual.reads(model))`.

    Args:
        at: positions whose rows are kept: "vision", "text", or any others.

    Raises:
        CapabilityError: a model without images.
    """
    demand_images(model)
    added = [S.deepstack] if position(at) == VISION and model.atlas.layers("deepstack") else []
    return [S.resid_pre.at(at), S.resid_post[-1].at(at), *added]


def states(run: Run, at: PositionLike = VISION) -> States:
    """The rows of the residual stream that a run has read, layer by layer.

    Raises:
        ReadError: no layer of it was read.
        PositionError: no such positions in the text of the run: one without images, say.
    """
    if not isinstance(run, Run):
        raise PlanError(wrong("states", "a run of the model", run))
    n_layers = run.model.n_layers
    streams = {i: rows_read(run, S.resid_pre[i].at(at)) for i in range(n_layers)}
    streams[n_layers] = rows_read(run, S.resid_post[n_layers - 1].at(at))
    added = run.model.atlas.layers("deepstack") if position(at) == VISION else []
    additions = {i: rows_read(run, S.deepstack[i]) for i in added}
    kept = {i: rows for i, rows in streams.items() if rows is not None}
    if not kept:
        raise ReadError(
            f"the run has not read the residual stream at {format_position(position(at))}; run with "
            "read=visual.reads(model)"
        )
    return States(kept, {i: rows for i, rows in additions.items() if rows is not None}, n_layers, at)


def rows_read(run: Run, site: Site) -> tuple[Tensor, ...] | None:
    """Per row of the batch, a site's values as plain tensors; None if the run has not read them."""
    try:
        return tuple(x.as_subclass(Tensor) for x in run.rows(site))
    except ReadError:
        return None


def of(source: Run | States, at: PositionLike = VISION) -> States:
    """A source as its states."""
    return source if isinstance(source, States) else states(source, at)


def zeros(source: Run | States) -> States:
    """Zero in the place of every row."""
    return _mapped(source, lambda rows, _: tuple(map(torch.zeros_like, rows)), "zeros")


def own_mean(source: Run | States) -> States:
    """In the place of every row, the mean of the sample's own."""
    return _mapped(source, lambda rows, _: tuple(x.mean(0).expand_as(x) for x in rows), "the own mean")


def noise(source: Run | States, seed: int | Iterable[int], scale: float = 1.0) -> States:
    """Every row with Gaussian noise of `scale` times the standard deviation of the sample's rows, sinks left out of it.

    Args:
        seed: of the sample, or one per row of the batch: with the layer it fixes the noise, so that a row gets the same
            alone and in a batch. Draw several times, and average.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale >= 0:
        raise PlanError(wrong("scale=", "a factor of the standard deviation, from 0 on", scale))
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not all(isinstance(number, int) for number in seeds) or not seeds:
        raise PlanError(wrong("seed=", "an integer, or one for each row", seed))

    def noised(rows: tuple[Tensor, ...], key: str) -> tuple[Tensor, ...]:
        each = seeds * len(rows) if isinstance(seed, int) else seeds
        if len(each) != len(rows):
            raise PlanError(f"{len(each)} seeds for {len(rows)} rows; give one seed, or one for each row")
        return tuple(
            x + scale * _deviation(x) * _normal(x, row_seed, key) for x, row_seed in zip(rows, each, strict=True)
        )

    return _mapped(source, noised, "noise")


def _deviation(x: Float[Tensor, "selected d_model"]) -> Tensor:
    norms = x.norm(dim=-1)
    return x[norms <= SINK * norms.median()].std(correction=0) if len(x) else x.new_zeros(())


def _normal(x: Tensor, seed: int, key: str) -> Tensor:
    # 56 bits, since seeds are numbers of 64. Drawn in float64 on the CPU: the same in every dtype, on every device.
    number = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
    sample = torch.randn(x.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return sample.to(x.device, x.dtype)


def dataset_mean(sources: Iterable[Run | States]) -> States:
    """One vector per layer: the mean over all rows of all samples. Held are the sums alone, so samples may come from a
    generator.

    Raises:
        PlanError: no samples, or none with rows.
    """
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[tuple[str, int], int] = {}
    last: States | None = None
    for source in sources:
        last = of(source)
        for kind, layers in (("streams", last.streams), ("additions", last.additions)):
            for layer, rows in layers.items():
                for x in _listed(rows, last.of):
                    total = x.double().sum(0)
                    sums[kind, layer] = sums[kind, layer] + total if (kind, layer) in sums else total
                    counts[kind, layer] = counts.get((kind, layer), 0) + len(x)
    if last is None or not any(counts.values()):
        raise PlanError("dataset_mean: there are no rows to average; give runs with images")
    dtype = next(_listed(rows, last.of)[0].dtype for rows in last.streams.values())
    means = {key: (total / counts[key]).to(dtype) for key, total in sums.items() if counts[key]}
    parts = [{i: x for (name, i), x in means.items() if name == part} for part in ("streams", "additions")]
    return States(parts[0], parts[1], last.n_layers, last.at, "the dataset mean")


def _mapped(source: Run | States, change: Callable[[tuple[Tensor, ...], str], tuple[Tensor, ...]], name: str) -> States:
    known = of(source)
    parts: list[dict[int, Any]] = [
        {i: change(_listed(rows, known.of), f"{kind} {i}") for i, rows in layers.items()}
        for kind, layers in (("stream", known.streams), ("addition", known.additions))
    ]
    return replace(known, streams=parts[0], additions=parts[1], of=name)


def _listed(rows: Rows, name: str) -> tuple[Tensor, ...]:
    if isinstance(rows, Tensor):
        raise PlanError(f"{name} is one vector for all rows; give a run, or the states of one")
    return rows
