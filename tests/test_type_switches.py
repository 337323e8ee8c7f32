"""Other models of a type: what its config switches (biases, norms, factors, shared keys, blocks side by side) is turned, as
much of it at once as transformers builds, and every site is as true as by default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from matrix import row
from parity import IDS

from interp_core import testing
from interp_core.compatibility import matrix, sites_of
from interp_core.testing.types import types

SAMPLE = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "granitemoehybrid", "opt", "qwen2_moe", "stablelm")
MODELS = [name for name in types() if matrix()["types"][name]["torch"]["word"] in ("verified", "partial")]
NO_KIND = re.compile(
    "use_cache|output_|return_dict|is_decoder|is_encoder_decoder|add_cross_attention|tie_encoder|gradient|.*dropout|"
    ".*kernel|.*_init|add_pooling|.*fp32|.*float32|.*fused|summary_|mask_|chunk_size_feed_forward|scale_parametrization"
)
"""Words that say how a model is run, trained or built, not what it computes."""
FACTOR = re.compile(r".*(scale|scaling|multipl|factor)")
NUMBERS = {"num_key_value_heads": 1, "floor_scale": 4, "log_scaling_n_floor": 4}
"""Heads that share one key, and attention that is tempered from the fifth token on."""

LEFT = {
    "axk2": "attention_bias",  # of so small a model: an edit of v changes nothing, as the indexer shows that key to nobody
    "dbrx": "num_key_value_heads",  # which is in its config's config
    "doge": "is_moe",
    "gemma4": "enable_moe_block",
    "jetmoe": "num_key_value_heads",  # which its number of heads follows from
}
"""Switches that are left as they are: they make another type of it, or nothing that would be checked."""
LOST = {
    "falcon": "rot_q rot_k",  # positions are a bias: nothing rotates
    "opt": "final_norm",  # as in OPT-350m
    "stablelm": "resid_mid",  # blocks are parallel
    "roformer": "v",  # rotated before it is mixed
    "zamba2": "q k v",  # adapters add to them
}
"""Sites that a switch takes away."""


def switches(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What another model of the type may have otherwise."""
    for word, now in config.items():
        if NO_KIND.match(word):
            continue
        if isinstance(now, bool):
            yield word, not now
        elif isinstance(now, float) and now == 1.0 and FACTOR.match(word):
            yield word, 0.6
        elif isinstance(now, list) and now and all(isinstance(x, float) and x == 1.0 for x in now):
            yield word, [0.6 + 0.3 * i for i in range(len(now))]
        elif now is not None and word in NUMBERS:
            yield word, NUMBERS[word]


def turned(model_type: str) -> dict[str, Any]:
    """As many switches at once as a model can be built with."""
    settings: dict[str, Any] = {}
    for word, value in switches(testing.tiny(model_type).config.to_dict()):
        if word in LEFT.get(model_type, "").split():
            continue
        try:
            built = testing.tiny(model_type, **settings, **{word: value})
            built(input_ids=IDS)
        except Exception:  # whatever the library says: its models do not have all that their configs can say
            continue
        settings[word] = value
    return settings


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in MODELS]
)
def test_other_models_of_a_type_are_served_as_truly(model_type: str) -> None:
    known = matrix()["types"][model_type]["torch"]
    settings = turned(model_type)
    if not settings:
        return
    cell = row(model_type, "torch", **settings)
    assert not {"false", "unheld"} & cell.keys() and cell["word"] != "refused", (settings, cell)
    lost = set(sites_of(known)) - set(sites_of(cell)) - set(LOST.get(model_type, "").split())
    assert not lost, (settings, cell)
