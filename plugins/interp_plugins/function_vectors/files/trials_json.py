"""The file of fixed trials.

    meta      dataset_json, seed, n_trials, n_shots, test_split, prefixes, separators, model_name_for_tokenizer,
              model_prepend_bos (the tokenizer adds a BOS), prepend_bos_token_used (its text stands in the prompts), and
              rng, whose random numbers they are
    splits    train_indices, valid_indices, test_indices: rows of the task, in split order
    trials    trial_id, demo_indices_in_train, query_index_in_valid, demos_clean, demos_corrupted, query,
              prompt_data_clean, prompt_data_corrupted, clean_prompt_str, corrupted_prompt_str, target_str, answer_ids,
              first_token_id, target_first_token_id

Examples carry their leading space. `prompt_data` is what the reference builds a prompt from: instructions, separators,
prefixes (with the text of a BOS), query_target, examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import interp_core as ic
from interp_core.errors import nearest

from ..tasks import Pair
from ..template import Boundary, Template, name_of

META: dict[str, type | tuple[type, ...]] = {
    "dataset_json": str, "seed": int, "n_trials": int, "n_shots": int, "test_split": float, "prefixes": dict,
    "separators": dict, "model_name_for_tokenizer": str, "model_prepend_bos": bool, "prepend_bos_token_used": bool,
}  # fmt: skip
SPLITS: dict[str, type] = dict.fromkeys(("train_indices", "valid_indices", "test_indices"), list)
TRIAL: dict[str, type] = {
    "trial_id": int, "demo_indices_in_train": list, "query_index_in_valid": int, "demos_clean": list,
    "demos_corrupted": list, "query": dict, "prompt_data_clean": dict, "prompt_data_corrupted": dict,
    "clean_prompt_str": str, "corrupted_prompt_str": str, "target_str": str, "answer_ids": list,
    "first_token_id": int, "target_first_token_id": int,
}  # fmt: skip
PROMPT_DATA = dict.fromkeys(("instructions", "separators", "prefixes", "query_target", "examples"), object)


def file_name(task: str, n_trials: int, n_shots: int, seed: int, model: str) -> str:
    """`fixed_trials_antonym_t10_s10_seed0_gpt2.json`."""
    return f"fixed_trials_{task}_t{n_trials}_s{n_shots}_seed{seed}_{short_name(model)}.json"


def short_name(model: str) -> str:
    """The last part of a model's name, as files are called: `meta-llama/Llama-3.1-8B` is `Llama-3.1-8B`."""
    return model.rstrip("/").split("/")[-1].replace(":", "-")


def read_json(path: str | Path) -> dict[str, Any]:
    """The file as data, its fields checked.

    Raises:
        LoadError: not there, no JSON, or a field that is missing or of the wrong kind; names trial and field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ic.LoadError(
            f"there is no file of fixed trials {path}; `interp run fv_fixed_trials` writes one"
        ) from error
    except ValueError as error:
        raise ic.LoadError(f"{path} is not JSON ({error}); copy the file again") from error
    _check(f"{path}", data, {"meta": dict, "splits": dict, "trials": list})
    _check(f"{path}, meta", data["meta"], META)
    _check(f"{path}, splits", data["splits"], SPLITS)
    for number, trial in enumerate(data["trials"]):
        where = f"{path}, trial {number}"
        _check(where, trial, TRIAL)
        for kind in ("clean", "corrupted"):
            _check(f"{where}, prompt_data_{kind}", trial[f"prompt_data_{kind}"], PROMPT_DATA)
            for place, pair in enumerate(trial[f"demos_{kind}"]):
                _check(f"{where}, demos_{kind}[{place}]", pair, {"input": str, "output": str})
            if len(trial[f"demos_{kind}"]) != data["meta"]["n_shots"]:
                shots = f"{len(trial[f'demos_{kind}'])} demonstrations, meta.n_shots is {data['meta']['n_shots']}"
                raise ic.LoadError(f"{where}: demos_{kind} has {shots}")
        _check(f"{where}, query", trial["query"], {"input": str, "output": str})
    if len(data["trials"]) != data["meta"]["n_trials"]:
        raise ic.LoadError(
            f"{path} holds {len(data['trials'])} trials, its meta.n_trials is {data['meta']['n_trials']}"
        )
    return data


def template_of(data: Mapping[str, Any], tokenizer: Any, boundary: Boundary = "strict") -> Template:
    """The template of a file.

    Raises:
        TextError: the file's BOS is not what this tokenizer does.
    """
    meta = data["meta"]
    added, text = meta["model_prepend_bos"], meta["prepend_bos_token_used"]
    if added and text:
        raise ic.TextError("meta: model_prepend_bos and prepend_bos_token_used are both true: a prompt has one BOS")
    template = Template(
        meta["prefixes"],
        meta["separators"],
        data["trials"][0]["prompt_data_clean"]["instructions"] if data["trials"] else "",
        all(word.startswith(" ") for trial in data["trials"] for pair in _pairs(trial) for word in pair.values()),
        added or text,
        boundary,
    )
    front = template.front(tokenizer)
    if (front.added, bool(front.text)) != (added, text):
        does = "adds a BOS" if front.added else f"adds none (its text {front.text!r} stands in the prompts)"
        raise ic.TextError(
            f"meta.model_prepend_bos is {added}, but {name_of(tokenizer)} {does}: the file was made for "
            f"{meta['model_name_for_tokenizer']}. Load that tokenizer, or make a file for this one"
        )
    return template


def spaced(template: Template, pair: Pair) -> dict[str, str]:
    """A pair as the file's examples have it."""
    return {"input": template.spaced(pair.input), "output": template.spaced(pair.output)}


def unspaced(template: Template, pair: Mapping[str, str]) -> Pair:
    """An example of the file as a pair."""
    skip = int(template.prepend_space)
    return Pair(pair["input"][skip:], pair["output"][skip:])


def _pairs(trial: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [trial["query"], *trial["demos_clean"], *trial["demos_corrupted"]]


def prompt_data(
    template: Template, front: str, demos: Sequence[Mapping[str, str]], query: Mapping[str, str]
) -> dict[str, Any]:
    """What the reference builds a prompt from."""
    return {
        "instructions": template.instructions,
        "separators": dict(template.separators),
        "prefixes": {**template.prefixes, "instructions": front + template.prefixes["instructions"]},
        "query_target": dict(query),
        "examples": [dict(pair) for pair in demos],
    }


def _check(where: str, item: Any, fields: Mapping[str, Any]) -> None:
    """Fields that must be there, and of which kind."""
    if not isinstance(item, dict):
        raise ic.LoadError(f"{where} is {type(item).__name__}, not an object with {', '.join(fields)}")
    for field, kind in fields.items():
        if field not in item:
            raise ic.LoadError(f"{where} has no field {field!r}. {nearest(field, item)}")
        if not isinstance(item[field], kind) or (kind is int and isinstance(item[field], bool)):
            raise ic.LoadError(f"{where}: field {field!r} is {item[field]!r:.60}, not {kind.__name__}")
