"""Golden outputs of the published function-vector code: prompts, tensors and tables per family."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from conftest import DATA
from interp_plugins.function_vectors.prompts import Prompt
from interp_plugins.function_vectors.rows import tokens
from interp_plugins.function_vectors.tasks import Task, load_task
from interp_plugins.function_vectors.vectors import FunctionVector
from safetensors.torch import load_file
from tolerances import possible_ranks, rounding
from torch import Tensor

import interp_core as ic

FAMILIES = ("tiny-llama3-8b", "tiny-llama2-7b", "gpt2-xl", "tiny-pythia")
FOLDER = DATA / "fv"


@cache
def model(family: str) -> ic.Model:
    return ic.load(str(FOLDER / family / "model"))


@cache
def tensors(family: str) -> dict[str, Tensor]:
    """What `golden.safetensors` and the `.pt` files hold."""
    found = load_file(FOLDER / family / "golden.safetensors")
    for name, file in (
        ("mean", "antonym_mean_head_activations_FIXED"), ("ie", "antonym_indirect_effect"),
        ("ie_classes", "antonym_indirect_effect_all_classes"), ("fv", "src_fv"),
    ):  # fmt: skip
        found[name] = torch.load(FOLDER / family / f"{file}.pt", weights_only=True)
    return found


@cache
def table(family: str, name: str) -> Any:
    """A JSON file."""
    path = FOLDER / family / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    with gzip.open(f"{path}.gz", "rt") as file:
        return json.load(file)


@cache
def prompts(family: str, mode: str) -> tuple[Prompt, ...]:
    """The ten fixed trials' prompts, `clean` or `corrupted`, as the reference tokenised and labelled them."""
    trials = table(family, "fixed_trials_antonym_t10_s10_seed0")["trials"]
    found = []
    for row in table(family, "slot_maps"):
        if row["mode"] == mode:
            trial = trials[row["trial_id"]]
            slots = tuple(row["idx_map_updated"][str(i)] for i in range(len(row["input_ids"])))
            ids, answer = tuple(row["input_ids"]), tuple(trial["answer_ids"])
            found.append(Prompt(row["prompt"], ids, tuple(row["labels"]), slots, trial["target_str"], answer))
    return tuple(found)


@cache
def legacy(family: str, what: str) -> tuple[Prompt, ...]:
    """Prompts that the reference drew by itself for its `mean` and `ie`; without slots."""
    texts = table(family, "legacy_stream")[f"{what}_prompts"]
    return tuple(Prompt(t, tuple(model(family).tokenizer(t).input_ids), (), (), "", ()) for t in texts)


@cache
def same_arithmetic(family: str) -> bool:
    """Whether a plain forward pass of transformers gives the golden logits to the bit: the processor's kernels sum in
    the order of those that made them."""
    ids = torch.tensor([prompts(family, "corrupted")[0].ids])
    with torch.no_grad():
        logits = model(family).hf(ids).logits[0, -1]
    return torch.equal(logits, tensors(family)["inject_corrupted_clean_logits"][0])


@cache
def task() -> Task:
    return load_task("antonym", folder=FOLDER / "tasks")


def vector(family: str) -> FunctionVector:
    """The published function vector."""
    return FunctionVector(tensors(family)["fv"][0], task="antonym", model=family)


def same_ranks(found: Tensor, wanted: Any, model: ic.Model, prompts: Sequence[Prompt], edits: Any = ()) -> None:
    """Ranks `[prompt]` of the answers are the published ones, or both lie within rounding of a tie."""
    wanted = torch.as_tensor(wanted)
    for i in (found != wanted).nonzero()[:, 0].tolist():
        logits = model.run(tokens([prompts[i]]), edits=edits, logits=-1).logits[0].as_subclass(Tensor)
        slack = rounding(model) * float(logits.abs().max())
        low, high = possible_ranks(logits, torch.tensor(prompts[i].target_ids[0]), slack)
        assert low <= found[i] <= high and low <= wanted[i] <= high, (i, found[i], wanted[i], low, high)


def same_order(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Rows `[layer, head, effect]` stand in the published order, but for effects as close as published ones are held."""
    effects = {tuple(row[:2]): row[2] for row in wanted}
    assert sorted(effects) == sorted(tuple(row[:2]) for row in found)
    limit = 1e-8 + 1e-4 * max(map(abs, effects.values()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert abs(effects[tuple(ours[:2])] - theirs[2]) <= limit, (ours, theirs)
