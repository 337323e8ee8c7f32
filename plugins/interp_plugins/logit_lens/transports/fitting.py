"""Fitting a Jacobian lens: one forward pass and ⌈d_model / dim_batch⌉ backward passes per prompt.

A prompt runs `dim_batch` times side by side. Each backward pass begins with a 1 at a coordinate of its own per copy, at
all target positions together; what arrives at a layer's output, averaged over source positions, is a row of that
layer's matrix. Later targets than sources are all that count, which needs a model that never looks ahead: a first
backward pass from one position shows whether it does. Nothing is random.

A prompt's matrix X_n moves the mean by δ_n = mean over layers of ‖(X_n - J_{n-1}) / n‖ / ‖J_n‖; the published rule
stops once the mean of the last 10 is below 2e-3, after 100 prompts at least and 1,000 at most.

Source: Gurnee et al. (2026), as in `jacobian`; the rule "relp" is that of Jafari et al. (2025).
Cost: per prompt the passes above, with dim_batch copies of it in memory.
Must equal: the sum of autograd's Jacobians, whatever dim_batch is; a fit that was stopped, the one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ...attribution.relevance.rules import relp
from .jacobian import JacobianLens

STATE = "sums.safetensors"
RECIPE = "jacobian_lens"
COLUMNS = ("n_done", "prompt_idx", "seq_len", "n_valid_positions", "elapsed_s", "identity_distance", "mean_rel_change")
"""Of the table of convergence, as published files name them."""
SECONDS = 20.0
"""After so long what was summed up is written."""


@dataclass(frozen=True)
class JacobianFit:
    """How a lens is fitted.

    Attributes:
        dim_batch: coordinates per backward pass; it sets memory alone, never a number.
        max_seq_len: tokens of a prompt, at most.
        skip_first: positions at the beginning that are neither source nor target.
        target_layer: whose output is the target (negative counts from the end).
        rule: how the backward passes go: by the "gradient", or by "relp" (the R-lens: norms, patterns and gates are
            held).
        min_prompts, max_prompts: between which the fit may stop.
        tolerance, window: it stops when so many last changes have a mean below this (0: never).
        bos: a prompt begins with the tokenizer's token for it, also where the tokenizer adds none.
    """

    dim_batch: int = 8
    max_seq_len: int = 128
    skip_first: int = 16
    target_layer: int = -1
    rule: Literal["gradient", "relp"] = "gradient"
    min_prompts: int = 100
    max_prompts: int = 1000
    tolerance: float = 2e-3
    window: int = 10
    bos: bool = True


def fit_jacobian(
    model: ic.Model,
    texts: Sequence[str | Tensor | Sequence[int]],
    *,
    out: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> JacobianLens:
    """Fit a Jacobian lens on texts, in their order.

    Args:
        texts: texts, or ids of one. Those of `skip_first + 1` tokens or fewer have no valid position; they are skipped
            and do not count.
        out: a folder for the sums so far, from which a fit that was stopped goes on, and `convergence.csv`.
        progress: say how far it is on standard error.
        settings: fields of `JacobianFit`.

    Raises:
        PlanError: a setting that there is not; no text is long enough; the model looks ahead.
        CapabilityError: streams have no gradient on this engine.
    """
    fit = _settings(settings)
    target = range(model.n_layers)[fit.target_layer]
    if why := model.can("resid_post", "grad"):
        raise ic.CapabilityError(f"a Jacobian lens needs gradients of the stream: {why}")
    if target < 1:
        raise ic.PlanError(f"a Jacobian lens to the output of layer {target} has no layer before it")
    rows = [_ids(model, text, fit) for text in texts]
    numbered = [(i, ids) for i, ids in enumerate(rows) if len(ids) > fit.skip_first + 1][: fit.max_prompts]
    if not numbered:
        raise ic.PlanError(
            f"no text has more than {fit.skip_first + 1} tokens, of which the first {fit.skip_first} and the last are "
            f"left out (the longest of {len(rows)} has {max(map(len, rows), default=0)}); give longer texts"
        )
    sums = Sums(list(range(target)), model.d_model, torch.promote_types(model.dtype, torch.float32))
    if out is None:
        _fit(model, numbered, fit, target, sums, None, progress)
    else:
        recorded = {**vars(fit), "texts": ic.runs.digest([ids for _, ids in numbered])}
        # a fit may go on with more or fewer copies: no number depends on it
        del recorded["dim_batch"]
        with ic.runs.open(out, recorded, recipe=RECIPE, model=model, say=lambda line: None, kind="fit") as run:
            if run.kept(STATE):
                sums.restore(run.path / STATE)
            _fit(model, numbered, fit, target, sums, run, progress)
            run.table("convergence.csv", [dict(zip(COLUMNS, row, strict=True)) for row in sums.table])
    return sums.lens(_metadata(model, fit, target, sums))


def _settings(settings: Mapping[str, Any]) -> JacobianFit:
    unknown = set(settings) - set(JacobianFit.__dataclass_fields__)
    if unknown:
        name = min(unknown)
        raise ic.PlanError(
            f"a fit has no setting {name!r}. {ic.errors.nearest(name, list(JacobianFit.__dataclass_fields__))}"
        )
    fit = JacobianFit(**settings)
    for name, least in (("dim_batch", 1), ("max_seq_len", 2), ("skip_first", 0), ("max_prompts", 1), ("window", 1)):
        if getattr(fit, name) < least:
            raise ic.PlanError(f"{name} is {getattr(fit, name)}, it must be {least} at least")
    if fit.max_seq_len < fit.skip_first + 2:
        raise ic.PlanError(
            f"prompts of max_seq_len={fit.max_seq_len} have no position between the first {fit.skip_first} and the last"
        )
    return fit


def _ids(model: ic.Model, text: Any, fit: JacobianFit) -> list[int]:
    if isinstance(text, str):
        text = model.tokens(text)
    if isinstance(text, ic.Tokens):
        if len(text) != 1 or text.inputs:
            raise ic.PlanError("a Jacobian lens is fitted on texts, one by one, without images")
        ids, bare = text.ids[0, text.mask[0]].tolist(), True
    else:
        ids, bare = torch.as_tensor(text).flatten().tolist(), False
    # ids that are given are taken as they are
    first = getattr(model.tokenizer, "bos_token_id", None) if bare and fit.bos else None
    if first is not None and ids[:1] != [first]:
        ids = [first, *ids]
    return ids[: fit.max_seq_len]


def _metadata(model: ic.Model, fit: JacobianFit, target: int, sums: Sums) -> dict[str, Any]:
    import transformers

    record = ic.runs.model_record(model)
    return {
        **vars(fit), "target_layer": target, "model": record, "transformers": transformers.__version__,
        "interp_core": ic.__version__, "dtype": str(model.dtype).removeprefix("torch."), "n_prompts": sums.count,
        "seconds": round(sum(row[4] for row in sums.table), 1),
    }  # fmt: skip


@dataclass
class Sums:
    """Matrices summed up over prompts, every other prompt's by itself."""

    layers: list[int]
    d_model: int
    dtype: torch.dtype = torch.float32
    table: list[list[float]] = field(default_factory=list)
    halves: tuple[dict[int, Tensor], dict[int, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.halves = tuple(
            {layer: torch.zeros(self.d_model, self.d_model, dtype=self.dtype) for layer in self.layers}
            for _ in range(2)
        )  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """Prompts so far."""
        return len(self.table)

    def add(self, matrices: Mapping[int, Tensor], number: int, tokens: int, valid: int, seconds: float) -> None:
        """A prompt's matrices."""
        # by turns into two halves, whose distance tells how well the mean is known
        n, half = self.count + 1, self.halves[self.count % 2]
        changes, distances = [], []
        eye = torch.eye(self.d_model, dtype=self.dtype)
        for layer, matrix in matrices.items():
            before = self.halves[0][layer] + self.halves[1][layer]
            half[layer] += matrix
            mean = (before + matrix) / n
            old = before / max(n - 1, 1)
            changes.append(float(((matrix - old) / n).norm() / mean.norm()))
            distances.append(float((mean - eye).norm()) / math.sqrt(self.d_model))
        self.table.append([
            n, number, tokens, valid, seconds, sum(distances) / len(distances), sum(changes) / len(changes)
        ])  # fmt: skip

    def settled(self, fit: JacobianFit) -> bool:
        """Whether the published rule stops here."""
        last = [row[-1] for row in self.table[-fit.window :]]
        return self.count >= max(fit.min_prompts, fit.window) and sum(last) / len(last) < fit.tolerance

    def lens(self, metadata: Mapping[str, Any]) -> JacobianLens:
        """The mean."""
        n = self.count
        mean = {layer: (self.halves[0][layer] + self.halves[1][layer]) / n for layer in self.layers}
        a, b = (
            {layer: half[layer] / max((n + 1 - side) // 2, 1) for layer in self.layers}
            for side, half in enumerate(self.halves)
        )
        return JacobianLens(mean, n, metadata, (a, b))

    def file(self) -> bytes:
        """All of it as one file, so that sums and the table of what they are of cannot part."""
        tensors = {f"{side}.{layer}": matrix for side, half in enumerate(self.halves) for layer, matrix in half.items()}
        return ic.runs.safetensors_bytes({**tensors, "table": torch.tensor(self.table, dtype=torch.float64)})

    def restore(self, path: Path) -> None:
        """Go on from a file."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        self.table = tensors.pop("table").tolist()
        for name, tensor in tensors.items():
            side, layer = map(int, name.split("."))
            self.halves[side][layer] = tensor


def _fit(
    model: ic.Model,
    numbered: Sequence[tuple[int, list[int]]],
    fit: JacobianFit,
    target: int,
    sums: Sums,
    run: ic.runs.RunFolder | None,
    progress: bool,
) -> None:
    written = time.monotonic()
    try:
        with ic.Progress("Jacobian lens, prompts", len(numbered), shown=progress) as shown:
            shown.add(sums.count)
            for number, ids in numbered[sums.count :]:
                # also right after a restart, which may have stopped where the rule does
                if sums.count and sums.settled(fit):
                    break
                began = time.monotonic()
                matrices = prompt_jacobians(model, ids, fit, target, check=not sums.count)
                sums.add(matrices, number, len(ids), len(ids) - 1 - fit.skip_first, time.monotonic() - began)
                shown.add()
                if run is not None and time.monotonic() - written > SECONDS:
                    run.put({STATE: sums.file()})
                    written = time.monotonic()
    finally:
        if run is not None and sums.count:
            run.put({STATE: sums.file()})


@torch.enable_grad()  # whoever fits under no_grad means that nothing is to be trained
def prompt_jacobians(
    model: ic.Model, ids: Sequence[int], fit: JacobianFit, target: int, *, check: bool = True
) -> dict[int, Float[Tensor, "d_model d_model"]]:
    """The matrices of one prompt, per layer below `target`, in float32 (float64 of models in it).

    Args:
        check: make sure that no position looks ahead.

    Raises:
        PlanError: one does.
    """
    copies, d_model = min(fit.dim_batch, model.d_model), model.d_model
    rows = torch.tensor([list(ids)] * copies)
    tokens = ic.Tokens(rows, torch.ones_like(rows, dtype=torch.bool))
    valid = slice(fit.skip_first, len(ids) - 1)
    zeros = [
        torch.zeros(*rows.shape, d_model, dtype=model.dtype, device=model.device, requires_grad=True)
        for _ in range(target)
    ]
    edits = [S.resid_post[layer].add(zero) for layer, zero in enumerate(zeros)]
    rules = relp("paper").on(model) if fit.rule == "relp" else nullcontext()
    with rules:
        run = model.run(tokens, read=S.resid_post[target], edits=edits, logits=False, allow_noop=True)
    end = run[S.resid_post[target]].plain
    if check:
        _demand_causal(end, zeros, fit.skip_first)
    wide = torch.promote_types(model.dtype, torch.float32)
    matrices = [torch.empty(d_model, d_model, dtype=wide) for _ in zeros]
    for start in range(0, d_model, copies):
        count = min(copies, d_model - start)
        seed = torch.zeros_like(end)
        copy = torch.arange(count, device=end.device)
        seed[copy, valid, start + copy] = 1
        # copies do not see each other: each has its own coordinate's row in the same backward pass
        grads = torch.autograd.grad(end, zeros, seed, retain_graph=True)
        for matrix, grad in zip(matrices, grads, strict=True):
            matrix[start : start + count] = grad[:count, valid].to(wide).mean(1)
    return dict(enumerate(matrices))


def _demand_causal(end: Tensor, zeros: Sequence[Tensor], first: int) -> None:
    """A position's output owes nothing to later ones.

    Raises:
        PlanError: it does: sums over targets would count what is no consequence.
    """
    seed = torch.zeros_like(end)
    # an output at `first` that changes with a later input has looked ahead
    seed[:, first] = 1
    (grad,) = torch.autograd.grad(end, zeros[0], seed, retain_graph=True)
    if bool(grad[:, first + 1 :].any()):
        raise ic.PlanError(
            "a Jacobian lens sums over the targets that follow a source; in this model positions look ahead, so it has "
            "none. It is for causal models"
        )
