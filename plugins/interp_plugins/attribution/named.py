"""Methods by the names that published experiments give them.

Source: FlashTrace (Pan et al. 2026), arXiv:2602.01914, whose commands use these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import interp_core as ic

from .method import Attribution

NAMES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ifr_span": ("ifr", {"variant": "span"}),
    "ifr_all_positions": ("ifr", {"variant": "all_positions"}),
    "ifr_all_positions_output_only": ("ifr", {"variant": "all_positions_output_only"}),
    "ifr_multi_hop": ("ifr", {"variant": "multi_hop"}),
    "ifr_multi_hop_stop_words": ("ifr", {"variant": "multi_hop_stop_words"}),
    "ifr_multi_hop_both": ("ifr", {"variant": "multi_hop_both"}),
    "ifr_multi_hop_split_hop": ("ifr", {"variant": "multi_hop_split_hop"}),
    "ifr_in_all_gen": ("ifr", {"variant": "in_all_gen"}),
    "attnlrp": ("attnlrp", {"variant": "hop0"}),
    "attnlrp_per_token": ("attnlrp", {"variant": "per_token"}),
    "ft_attnlrp": ("attnlrp", {"variant": "multi_hop"}),
    "attnlrp_aggregated_multi_hop": ("attnlrp", {"variant": "multi_hop"}),
    "input_x_gradient": ("input_x_gradient", {}),
    "IG": ("integrated_gradients", {}),
    "attention": ("attention_rollout", {}),
    "random": ("random_attribution", {}),
    "leave_out": ("leave_out", {}),
    "surrogate": ("surrogate", {}),
}
"""Name, and the method with its settings."""


def named(name: str) -> tuple[str, Mapping[str, Any]]:
    """The method of a name, and its settings; the name of any other attribution method is itself.

    Raises:
        PlanError: no method is called so.
    """
    if name in NAMES:
        return NAMES[name]
    methods = sorted({method for method, _ in NAMES.values()} | {"ifr_routes"})
    try:
        method = ic.method(name)
    except ic.PluginError as error:
        raise ic.PlanError(
            f"no attribution method is called {name!r}. {ic.errors.nearest(name, [*NAMES, *methods])}"
        ) from error
    if not isinstance(method, Attribution):
        raise ic.PlanError(f"{name} is no attribution method. {ic.errors.nearest(name, [*NAMES, *methods])}")
    return name, {}
