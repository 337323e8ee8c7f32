"""DeepSeek-V4: the first layers send each token id to experts of its own, by a table ("hash routers"); the others choose
by scores with a correction bias. Several residual streams pass between blocks, so most sites of the stream do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family
from .routing import Router
from .scored import BIAS, Scored, own_score


class HashedRouter(Router):
    """A router of logits, or of token ids."""

    def absent(self, module: Any) -> Mapping[str, str]:
        """See `Router.absent`."""
        if not hasattr(module, "tid2eid"):
            return {}
        return dict.fromkeys(
            ("router_logits", "router_probs"), "a hash router: token ids choose the experts, logits only weigh them"
        )


FAMILY = Family(
    "deepseek_v4",
    router=HashedRouter("mlp.gate", "mlp.experts", Scored(own_score, BIAS, eps=1e-20, scale="routed_scaling_factor")),
)
