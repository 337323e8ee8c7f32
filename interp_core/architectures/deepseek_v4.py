"""DeepSeek-V4: the first layers send each token id to experts of its own, by a table ("hash routers"); the others
choose by scores with a correction bias.

Several residual streams pass between blocks, so most sites of the stream do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .family import Family
from .routing import Router
from .scored import BIAS, Beside, Scored, own_score


def _hashed(module: Any) -> bool:
    return hasattr(module, "tid2eid")


class ScoredOrById(Scored):
    """Chosen by scores, or by token ids; weighed by scores."""

    def scores(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.scores`."""
        return Scored(self.score).scores(router, logits) if _hashed(router) else super().scores(router, logits)

    def choose(self, router: Any, logits: Tensor) -> Tensor:
        """See `Selection.choose`."""
        if not _hashed(router):
            return super().choose(router, logits)
        by_id: Tensor = router.tid2eid[router.token_ids.reshape(-1)].long()
        return by_id


class HashedRouter(Router):
    """A router of logits, or of token ids, which the block hands it."""

    def absent(self, module: Any) -> Mapping[str, str]:
        """See `Router.absent`."""
        why = "a hash router: token ids choose the experts, logits only weigh them"
        return dict.fromkeys(("router_logits", "router_probs"), why) if _hashed(module) else {}

    def rule(self, module: Any, args: tuple[Any, ...]) -> Any:
        """See `Router.rule`."""
        return Beside(module, token_ids=args[1]) if _hashed(module) else module


FAMILY = Family(
    "deepseek_v4",
    router=HashedRouter(
        "mlp.gate", "mlp.experts", ScoredOrById(own_score, BIAS, eps=1e-20, scale="routed_scaling_factor")
    ),
)
