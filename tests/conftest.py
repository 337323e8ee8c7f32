"""Shared fixtures: real small models, loaded once per session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread, also for the processes that tests start: two threads on two busy cores are slower.
os.environ["OMP_NUM_THREADS"] = os.environ.get("INTERP_TEST_THREADS", "1")

from collections.abc import Container, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import interp_core as ic
from interp_core import real, testing

DATA = Path(__file__).parent / "data"
FAMILIES = testing.families()
FEW = {
    "gpt2": "fused q, k and v; LayerNorm; learnt positions; float64 throughout",
    "llama": "separate projections with biases, grouped queries, rotary positions, RMSNorm in float32",
    "gemma2": "caps, norms after attention and MLP, every second layer a sliding window",
    "gptj": "parallel block, rotary positions in pairs, scores in float32",
    "deepseek_v3": "latent attention (keys wider than values), router by groups with a correction bias, shared expert",
    "gpt_oss": "sinks, router that takes the best and then the softmax",
    "qwen3_5": "linear attention in a layer, gated attention in the others",
    "qwen3_vl": "pictures, DeepStack, positions in three dimensions",
}
"""Families that stand for the kinds which differ most, and the kind: where a test costs seconds per family."""
SAMPLED: dict[str, str] = FEW | {
    "gpt_neox": "parallel block, fused head by head, rotary positions in a part of a head",
    "gpt_neo": "attention of its own, unscaled, local windows",
    "opt": "MLP without a module of its own",
    "qwen3": "norms of queries and keys",
    "olmo2": "norms after attention and MLP only",
    "qwen3_moe": "router by softmax, dense layers between",
    "granitemoe": "multipliers of the stream, the scores and the logits; experts in one module",
    "llama4": "attention in chunks, layers without rotary positions, weights on the experts' inputs",
    "qwen3_next": "linear attention, gate, and shared expert together",
    "llava": "pictures in a plain language model",
    "gemma3_vision": "pictures that attend both ways, windows",
}
"""Families that stand for every kind, and the kind they stand for; the others repeat one of these."""
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the real model run only where they are asked for: the others are to stay fast, and to need no model.
    A test's name holds no address, which would be another one in every process that tests are divided among."""
    named_by_place = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not named_by_place, named_by_place
    if "real" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="on the real model: `make real` gets it, `pytest -m real` runs this")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


def sampled(families: Iterable[str] = FAMILIES, fast: Container[str] = SAMPLED) -> list[Any]:
    """Parameters: all families, those that only repeat a kind among the slow tests."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in families]


@cache
def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **config: Any
) -> ic.Model:
    """A tiny model of a family, shared by all tests of a session: tests leave it as they found it."""
    try:
        hf = testing.tiny(family, dtype=dtype, **config)
    except ic.LoadError as error:  # the declared range of transformers begins before some families
        if f"transformers {transformers.__version__} has no" not in str(error):
            raise
        pytest.skip(str(error))
    if attention is not None:
        hf.set_attn_implementation(attention)
    return ic.load(hf)


def nth(model: ic.Model, name: str, n: int) -> int:
    """The n-th layer that has a site (the last, if there are fewer)."""
    layers = model.atlas.layers(name)
    return layers[min(n, len(layers) - 1)]


@cache
def toy_model() -> ic.Model:
    return ic.load("toy:text")


@cache
def the_real_model() -> ic.Model:
    """Loaded once; the test is skipped if it is not there."""
    try:
        testing.real_model()
    except ic.LoadError as error:
        pytest.skip(reason=str(error))
    return ic.load(real.NAME)


@pytest.fixture
def toy() -> ic.Model:
    return toy_model()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of seven ordinary ids, no padding."""
    return torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


@pytest.fixture
def padded() -> ic.Tokens:
    """Three rows of five, seven and two tokens, padded on the left."""
    rows = [[5, 17, 33, 8, 61], [9, 54, 12, 70, 3, 28, 45], [7, 30]]
    return ic.Tokens.stack([ic.Tokens(torch.tensor([r]), torch.ones(1, len(r), dtype=torch.bool)) for r in rows])


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Qwen3-VL and its processor's files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vl"
    processor = ic.testing.processor("qwen3_vl")
    for part in (ic.testing.tiny("qwen3_vl"), processor.image_processor, processor.tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rough_figures() -> Iterator[None]:
    """PNGs of few pixels whose parts are not moved to fit, for runs that write dozens: that takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp_core.report.png.DPI", 30)
        patch.setattr("interp_core.report.png.LAYOUT", None)
        yield


@pytest.fixture
def of_others() -> Iterator[Any]:
    """Registers families for the length of a test."""
    registry = ic.registry("architectures")
    rows, hidden = list(registry.rows), [row.hidden for row in registry.rows]
    yield lambda family: registry.register(family.name, family)
    registry.rows = rows
    for row, was in zip(rows, hidden, strict=True):
        row.hidden = was
