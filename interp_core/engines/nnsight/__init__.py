"""Engine `nnsight`: the same plan through nnsight's envoys.

nnsight runs intervention code in a greenlet that waits for one value after the other, in the order in which the model
computes them. A plan has no such order, so the engine learns the model's: one forward pass per kind of input (text,
images) notes when each module begins and ends. The code is one loop over the plan's hooks in that order.

The user's own model is left alone: nnsight changes the `forward` of every module of what it wraps, which is a copy here
that shares the weights. `model.engine.nnsight` is nnsight's object, for traces written by hand.

What is inside attention crosses no module boundary, and so no envoy; the attention hook opens it up as for `torch`.
"""

from __future__ import annotations

from ...architectures.atlas import Atlas
from ...plan import Plan
from ..program import HookProgram
from . import remote
from .base import TracedEngine
from .local import NNsightProgram


class NNsightEngine(TracedEngine):
    """Plans through nnsight."""

    program = NNsightProgram

    def adapt(self, atlas: Atlas) -> None:
        """See `Engine.adapt`."""
        if self.remote:
            remote.adapt(atlas)

    def compile(self, plan: Plan, atlas: Atlas) -> HookProgram:
        """See `Engine.compile`."""
        return remote.RemoteProgram(self, plan, atlas) if self.remote else NNsightProgram(self, plan, atlas)
