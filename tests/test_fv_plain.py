"""Side a of the parity suite: the same bits as the package's own functions, from code that shares nothing with them; so
a fault in one of these is found in its stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from interp_plugins.function_vectors.effects import average, indirect_effects, ranking, top_heads
from interp_plugins.function_vectors.files import answers, checks, extraction
from interp_plugins.function_vectors.files.plain import plain_effects, plain_logits, plain_means, plain_vector
from interp_plugins.function_vectors.inject import injection
from interp_plugins.function_vectors.means import mean_head_activations
from interp_plugins.function_vectors.prompts import Prompt
from interp_plugins.function_vectors.rows import tokens
from interp_plugins.function_vectors.vectors import function_vector
from interp_recipes.fv_golden import GoldenConfig, fv_golden
from interp_recipes.fv_parity import ParityConfig, fv_parity
from test_fv_parity import report, some
from torch import Tensor

import interp_core as ic

MEASURES = ("probability", "logprob")
LAST = "query_predictive_token"


def made(lengths: list[int]) -> Prompt:
    """A prompt with words of so many tokens, one slot each."""
    ids = tuple(range(5, 5 + sum(lengths)))
    slots = tuple(slot for slot, length in enumerate(lengths) for _ in range(length))
    return Prompt("", ids, ("demonstration_1_token",) * (len(ids) - 1) + (LAST,), slots, " x", (1,))


def equal_to_the_bit(model: ic.Model, clean: list[Prompt], corrupted: list[Prompt], classes: bool = False) -> None:
    mean = plain_means(model, clean)
    assert torch.equal(mean, mean_head_activations(model, clean, batch=1))
    found = plain_effects(model, corrupted, mean, classes=classes)
    wanted = indirect_effects(model, corrupted, mean, MEASURES, by="replay", classes=classes)
    for measure in MEASURES:
        assert torch.equal(found[measure].nan_to_num(7.0), wanted[measure].effects.nan_to_num(7.0))
        assert found[measure].dtype == wanted[measure].effects.dtype
    heads = top_heads(average(found["logprob"]), 3)
    vector = function_vector(model, mean, heads)
    assert torch.equal(plain_vector(model, mean, heads), vector.vector)
    layer = model.n_layers - 1
    for edits, added in (((), None), ((injection(model, vector, layer),), vector.vector)):
        logits = torch.cat(
            [model.run(tokens([prompt]), edits=edits).logits.as_subclass(Tensor) for prompt in corrupted]
        )
        assert torch.equal(plain_logits(model, corrupted, added, layer), logits[:, -1].float())


SAMPLED = ("gpt2", "llama", "gemma2", "qwen3_next", "gpt_oss")
"""Conv1D with bias, grouped queries, post-norms, layers without heads, sinks."""


CASES = [(name, torch.float32) for name in FAMILIES] + [(name, torch.bfloat16) for name in FAMILIES]
FAST = [(name, torch.float32) for name in SAMPLED] + [("llama", torch.bfloat16)]


@pytest.mark.parametrize(
    ("family", "dtype"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_the_same_bits_as_replay(family: str, dtype: torch.dtype) -> None:
    """Means, effects, vector, logits: on every family, also in half precision, with words of several tokens."""
    prompts = [made([1, 2, 1]), made([1, 1, 2])]
    equal_to_the_bit(tiny_model(family, dtype), prompts, prompts, classes=family == "llama")


def hooks(model: ic.Model) -> list[int]:
    """Every hook on a module of the model."""
    modules = model.hf.modules()
    return [id(hook) for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


def test_no_hook_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error in the middle of a pass."""
    model, prompts = tiny_model("llama"), [made([1, 1, 2])]
    before = hooks(model)  # transformers leaves its own once it was asked for hidden states
    monkeypatch.setattr(model.hf.lm_head, "forward", lambda _: 1 / 0)
    for call in (lambda: plain_means(model, prompts), lambda: plain_logits(model, prompts, torch.zeros(64), 0)):
        with pytest.raises(ZeroDivisionError):
            call()
    assert hooks(model) == before


# Faults in the code


def swapped(x: Tensor, dim: int) -> Tensor:
    """The first two heads exchanged."""
    order = [1, 0, *range(2, x.shape[dim])]
    return x.index_select(dim, torch.tensor(order))


def mean_swapped(*args: Any, right: Any, **how: Any) -> Tensor:
    return swapped(right(*args, **how), 1)


def effects_swapped(*args: Any, right: Any, **how: Any) -> Any:
    return {key: one._replace(effects=one.effects.flip(2)) for key, one in right(*args, **how).items()}


def scaled(*args: Any, right: Any, **how: Any) -> Any:
    return 1.001 * right(*args, **how)


def a_layer_later(model: ic.Model, vector: Any, layer: int, *, right: Any, **how: Any) -> ic.Edit:
    edit: ic.Edit = right(model, vector, layer + 1, **how)
    return edit


def second_best(aie: Tensor, k: int, *, right: Any) -> Any:
    return ranking(aie)[1 : k + 1]


def off_by_one(*args: Any, right: Any, **how: Any) -> Prompt:
    prompt: Prompt = right(*args, **how)
    return replace(prompt, slots=tuple(slot + (at == 9) for at, slot in enumerate(prompt.slots)))


def next_id(*args: Any, right: Any, **how: Any) -> tuple[int, ...]:
    return tuple(token + 1 for token in right(*args, **how))


IN_CODE = {
    # what: (module, function, what it becomes, stage)
    "heads swapped in the means": (extraction, "mean_head_activations", mean_swapped, "mean_activations"),
    "heads of each layer turned round in the effects": (extraction, "indirect_effects", effects_swapped, "top_heads"),
    "the best head left out": (extraction, "top_heads", second_best, "top_heads"),
    "a vector scaled": (extraction, "function_vector", scaled, "fv_vector"),
    "an injection one layer later": (answers, "injection", a_layer_later, "injection_output"),
    "a slot off by one": (checks, "build", off_by_one, "slot_map"),
    "other targets": (checks, "target_ids", next_id, "prompt_boundary"),
}


@pytest.fixture(scope="module")
def one_trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of one trial, and its golden folder."""
    root = tmp_path_factory.mktemp("one")
    settings = some("tiny-llama2-7b", 1, root) | {"n_top_heads": 1, "edit_layer": 1}
    return {**settings, "golden": fv_golden(GoldenConfig(**settings, save_path_root=root))}


@pytest.mark.parametrize(
    ("fault", "given"),
    [*((fault, "trials alone") for fault in IN_CODE)]
    + [(fault, "a") for fault, (_, _, _, stage) in IN_CODE.items() if stage in ("mean_activations", "fv_vector")]
    + [
        ("an injection one layer later", "a"),
        ("heads of each layer turned round in the effects", "replay"),
        (None, "a"),
    ],
)
def test_faults_in_the_code(
    fault: str | None, given: str, one_trial: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in what side b is worked out by: the seed's own command finds each in its stage."""
    settings = {key: value for key, value in one_trial.items() if key != "golden"}
    settings |= {"a": one_trial["golden"]} if given == "a" else {}
    settings |= {"compare": "replay"} if given == "replay" else {}
    if fault is None:
        fv_parity(ParityConfig(**settings, save_path_root=tmp_path))
        return
    module, name, wrong, stage = IN_CODE[fault]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **how: wrong(*args, right=right, **how))
    with pytest.raises(ic.InterpError, match=f"FAIL\n  {stage} / "):
        fv_parity(ParityConfig(**settings, save_path_root=tmp_path))
    stages = {one["stage"]: one for one in report(tmp_path)["stages"]}
    assert stages[stage]["status"] == "FAIL" and stages[stage]["mismatch_count"] > 0
    before = [one["status"] for one in stages.values()]
    assert before[: [*stages].index(stage)] == ["PASS"] * [*stages].index(stage)
