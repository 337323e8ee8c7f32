"""Classes of images and text with an image in the text: what passes in every block, and edits at visual positions, are
those of hooks by hand.

Pixels are packed by hand, as each class takes them; `pictures` does so for the families that are described.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from type_layouts import LAYOUT
from visual_layouts import named

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.testing.types import types, visual

IMAGE = 90
GRID = {"image_grid_thw": [[1, 4, 4]]}
WIDE = {"image_sizes": [[16, 32]]}
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16]]}


class Case(NamedTuple):
    """How many visual tokens an image is, the shape of its pixels, what goes along with them, and settings."""

    n: int
    shape: tuple[int, ...]
    beside: dict[str, Any] = {}
    config: dict[str, Any] = {}


CASES = {
    "Cosmos3Edge": Case(4, (16, 48), GRID),
    "Gemma3": Case(4, (1, 3, 16, 16)),
    "Granite4Vision": Case(14, (1, 3, 3, 16, 16), WIDE, TILES),
    "HunYuanVL": Case(8, (16, 48), GRID),
    "Idefics3": Case(4, (1, 1, 3, 16, 16)),
    "InternVL": Case(4, (1, 3, 16, 16), {}, {"image_seq_length": 4}),
    "Janus": Case(16, (1, 3, 16, 16)),
    "Llava": Case(16, (1, 3, 16, 16)),
    "LlavaNext": Case(52, (1, 3, 3, 16, 16), WIDE, TILES),
    "LlavaOnevision": Case(52, (1, 3, 3, 16, 16), WIDE, TILES),
    "Mistral3": Case(4, (1, 3, 16, 16), {"image_sizes": [[16, 16]]}),
    "PaliGemma": Case(16, (1, 3, 16, 16)),
    "Qwen2VL": Case(4, (16, 96), GRID),
    "Qwen2_5_VL": Case(4, (16, 96), GRID, {"vision_config": {"window_size": 16}}),
    "Qwen3VL": Case(4, (16, 96), GRID),
    "SmolVLM": Case(4, (1, 1, 3, 16, 16)),
    "Step3p7": Case(1, (1, 3, 16, 16)),
}
"""The most used of the hub, and five that are new."""
FAST = ("Mistral3", "PaliGemma", "Qwen2VL")
CLASSES = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CASES if named(name) in visual()
]
"""Of those, what the installed transformers has."""


def inputs(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A text around an image of random pixels."""
    case = CASES[name]
    ids = torch.tensor([[5, 17, 92, *[IMAGE] * case.n, 93, 33, 8]])
    pixels = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    beside = {key: torch.tensor(value) for key, value in case.beside.items()}
    if case.beside is GRID:
        beside["mm_token_type_ids"] = (ids == IMAGE).int()
    if name in ("Gemma3", "PaliGemma"):  # PaliGemma: 0 is the prefix, which sees itself whole
        beside["token_type_ids"] = (ids == IMAGE).int() if name == "Gemma3" else torch.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **beside}


@pytest.mark.parametrize("name", CLASSES)
def test_blocks_with_an_image_are_read_and_edited_as_by_hand(name: str) -> None:
    hf = testing.tiny(named(name), dtype=torch.float64, **CASES[name].config)
    model, values = ic.load(hf), inputs(name)
    blocks = hf.get_submodule(LAYOUT[named(name)]["blocks"])
    visual = (values["input_ids"][0] == IMAGE).nonzero()[:, 0]
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _m, _a, out: seen.__setitem__(layer, out[0] if isinstance(out, tuple) else out)

    def add(_m: Any, _a: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[:, visual] += noise
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def by_hand(hooks: list[Any], seed: int = 0) -> Tensor:
        try:
            with torch.no_grad():
                return hf(**inputs(name, seed), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()

    plain = by_hand([block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)])
    run = model.run(values, read=S.resid_post)
    assert torch.equal(run.logits, plain)
    for layer in range(len(blocks)):
        assert torch.equal(run[S.resid_post[layer]], seen[layer])
    assert not torch.allclose(by_hand([], seed=1)[:, -1], plain[:, -1], atol=1e-3)  # pixels are looked at
    for layer in (0, 1):
        edited = model.run(values, edits=S.resid_post[layer].at("vision").add(noise))
        assert edited.receipts[0].positions == (tuple(visual.tolist()),)
        assert torch.allclose(edited.logits, by_hand([blocks[layer].register_forward_hook(add)]), atol=1e-10)
        assert not torch.allclose(edited.logits[:, -1], plain[:, -1], atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ("MiniCPMV4_6", "MiniCPMV4_7") if named(name) in visual()])
def test_linear_attention_in_a_class_that_nobody_has_described(name: str) -> None:
    model = ic.load(testing.tiny(named(name)))
    assert model.atlas.layers("attn_out") == model.atlas.layers("mixer_out") == [0, 1, 2]
    assert model.atlas.layers("mixer_gate") == [0, 1] and model.atlas.layers("z") == [2]


REFUSED = {
    "BlipForConditionalGeneration": "can be loaded alone, model.text_decoder, which is a BlipTextLMHeadModel",
    "IdeficsForVisionText2Text": "it cannot run a text without an image",
    "Kosmos2ForConditionalGeneration": "it cannot run a text without an image",
    "Llama4ForConditionalGeneration": "load that alone, as Llama4ForCausalLM",
    "NemotronH_Omni_Reasoning_V3": "can be loaded alone, model.language_model, which is a NemotronHForCausalLM",
    "gemma4_assistant": "it drafts tokens for another model",
}


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")  # as Llama 4's tower is built
@pytest.mark.parametrize("name", [name for name in REFUSED if name in (*types(), *visual())])
def test_what_cannot_be_served_is_refused_in_a_sentence(name: str) -> None:
    hf = testing.tiny(name)
    try:
        runs = hf(input_ids=torch.tensor([[5, 17, 33]])) is not None
    except (AttributeError, TypeError, ValueError):
        runs = False
    if name == "Llama4ForConditionalGeneration" and runs:
        pytest.skip("this version of transformers can run it")
    assert "can be loaded alone" in REFUSED[name] or not runs
    with pytest.raises(ic.LoadError, match=REFUSED[name]):
        ic.load(hf)
