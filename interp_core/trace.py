"""`Run`: what one forward pass of a plan gave."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engines.layers import LET_GO
from .engines.protocol import Passed
from .errors import ReadError
from .plan import Plan
from .positions import PositionLike
from .readings import ForwardPass, Gradients, Receipt, demand_effect, receipts
from .regions import Bound
from .sites import Site
from .text import Tokens

if TYPE_CHECKING:
    from .compiled import CompiledPlan
    from .model import Model


class Run(ForwardPass):
    """One forward pass: read values by site, logits, receipts, gradients.

    Attributes:
        tokens: the input.
        model: what ran.
        grad: gradients by site, for runs with `grad=`.
    """

    def __init__(self, compiled: CompiledPlan, tokens: Tokens, passed: Passed) -> None:
        self._slots, self._atlas, self._rows = compiled.program.slots, compiled.model.atlas, tokens.rows
        self._compiled, self.tokens, self._passed = compiled, tokens, passed
        self.model: Model = compiled.model

    def _value(self, slot: int) -> Tensor:
        value = self._passed.values[slot]
        if value is LET_GO:
            raise ReadError(f"{self._slots[slot].site} was handed to each= as it passed, and let go")
        return value  # type: ignore[return-value]

    @property
    def plan(self) -> Plan:
        """What was read and edited."""
        return self._compiled.plan

    def save(self, folder: str | Path) -> Path:
        """Write all of it into a folder, as `run.json` and `run.safetensors`: what was read, gradients, logits, tokens,
        plan and receipts. `ic.open_run(folder)` gives them back, without the model.

        Raises:
            PlanError: an edit that is a function, or an input of the text that no file can hold.
        """
        from .saved import save_run

        return save_run(self, self.plan, self.receipts, self.model, folder)

    def to_cache(self, model: Any = None) -> Any:
        """A TransformerLens `ActivationCache` of the whole sites that were read, under TransformerLens' names.

        Its analysis tools (`accumulated_resid`, `decompose_resid`, `logit_attrs`, `stack_head_results`, …) need weights
        and so a bridge: runs on engine `transformer_lens` bring theirs.

        Args:
            model: a `TransformerBridge` of the same model, for runs on another engine.

        Raises:
            ReadError: nothing that was read has a name there.
        """
        from .engines.transformer_lens import cache_of

        return cache_of(self, model)

    @cached_property
    def receipts(self) -> list[Receipt]:
        """One per edit."""
        return receipts(self._compiled.edits, (self._passed,), self._rows)

    def demand_effect(self) -> None:
        """Refuse edits that did nothing.

        Raises:
            EffectError: naming the first of them.
        """
        demand_effect(self._compiled.edits, (self._passed,), lambda: self.receipts)

    def set_logits(self, logits: Tensor, asked: bool | PositionLike, bound: Bound | None) -> None:
        """Keep the logits that were asked for."""
        self._logits = logits if bound is None else bound.take(logits)
        self._logits_site = Site("logits") if isinstance(asked, bool) else Site("logits").at(asked)

    def differentiate(self, score: Callable[[Tensor], Tensor]) -> None:
        """Fill `grad` with the gradients of `score(logits)` and let go of the graph."""
        assert self._logits is not None
        scalar = score(self._logits)
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            shape = list(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise ReadError(f"grad= takes a function of the logits that returns one number, it returned {shape}")
        bases = [base for base in self._passed.bases if base is not None]
        tensors, bounds = [tensor for tensor, _ in bases], [bound for _, bound in bases]
        if scalar.requires_grad:
            grads = torch.autograd.grad(scalar.sum(), tensors, allow_unused=True, materialize_grads=True)
        else:  # edits have cut it off from everything read
            grads = tuple(map(torch.zeros_like, tensors))
        self._grad = Gradients(self, list(grads), bounds)
        self._passed.bases = []
        self._passed.values = [None if value is None else value.detach() for value in self._passed.values]
        self._logits = self._logits.detach()
