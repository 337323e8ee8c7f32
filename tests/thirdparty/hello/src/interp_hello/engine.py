"""An engine that counts the plans that it compiles."""

from __future__ import annotations

from interp_core.architectures.atlas import Atlas
from interp_core.engines.torch import TorchEngine, TorchProgram
from interp_core.plan import Plan


class Counting(TorchEngine):
    """The default engine, with a counter."""

    name = "counting"
    plans = 0

    def compile(self, plan: Plan, atlas: Atlas) -> TorchProgram:
        """Count, then compile."""
        self.plans += 1
        return super().compile(plan, atlas)
