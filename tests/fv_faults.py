"""Faults for folders of the parity suite: what is spoilt in which file, and where it must be found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A change to a JSON file, or to a file of JSON lines."""

    def spoil(folder: Path) -> None:
        path = folder / name
        rows = path.suffix == ".jsonl"
        data = [json.loads(x) for x in path.read_text().splitlines()] if rows else json.loads(path.read_text())
        change(data)
        path.write_text("".join(json.dumps(row) + "\n" for row in data) if rows else json.dumps(data))

    return spoil


def tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A change to a `.pt` file."""

    def spoil(folder: Path) -> None:
        data = torch.load(folder / name, weights_only=True)
        torch.save(change(data), folder / name)

    return spoil


def at(value: Any, *keys: Any, to: Any) -> None:
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to(value[keys[-1]]) if callable(to) else to


def put(place: tuple[int, ...], value: float, add: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x[place] = x[place] + value if add else value
        return x

    return change


def swap(rows: list[Any], i: int, j: int) -> None:
    rows[i], rows[j] = rows[j], rows[i]


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def garbage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:60])


def shifted(row: dict[str, Any]) -> None:
    """One token's slot off by one."""
    row["idx_map"]["9"] += 1


def scaled(vectors: dict[str, Any]) -> dict[str, Any]:
    return vectors | {"fv_global_resid": vectors["fv_global_resid"] * 1.001}


DUMP, EVAL, MAPS = "src_reference_dump.json", "eval_trials.jsonl", "slot_maps.json"
MEAN = "antonym_mean_head_activations_FIXED.pt"
FAULTS: dict[str, tuple[str, Callable[[Path], None], str, str, str]] = {
    # what: (side, how, stage, file, key)
    "prompt": ("b", edit(EVAL, lambda d: at(d, 1, "prompt", to=lambda x: x[:-2] + "B:")), "prompt_boundary", EVAL, "trial (1, 1), corrupted: prompt"),
    "prompt of the map": ("a", edit(MAPS, lambda d: at(d, 4, "prompt", to=lambda x: x + " ")), "prompt_boundary", MAPS, "trial 2, clean: prompt"),
    "id": ("b", edit(MAPS, lambda d: at(d, 5, "input_ids", 7, to=3)), "prompt_boundary", MAPS, "trial 2, corrupted: input_ids[7]"),
    "target": ("a", edit(DUMP, lambda d: at(d, "trials", 2, "target_id", to=17)), "prompt_boundary", EVAL, "trial (2, 2), corrupted: target_id"),
    "boundary": ("b", edit(EVAL, lambda d: at(d, 0, "answer", to=lambda x: x[1:])), "prompt_boundary", EVAL, "trial (0, 0), corrupted: boundary_answer"),
    "slot": ("b", edit(MAPS, lambda d: shifted(d[3])), "slot_map", MAPS, "trial 1, corrupted: idx_map[9]"),
    "all slots": ("a", edit(MAPS, lambda d: at(d, 0, "idx_map_updated", "3", to=lambda x: x + 1)), "slot_map", MAPS, "trial 0, clean: idx_map_updated[3]"),
    "label": ("b", edit(MAPS, lambda d: at(d, 0, "labels", 4, to="structural_token")), "slot_map", MAPS, "trial 0, clean: labels[4]"),
    "span": ("b", edit(MAPS, lambda d: d[1]["idx_avg"].update(query_demonstration_token=[9, 11])), "slot_map", MAPS, "trial 0, corrupted: idx_avg[query_demonstration_token]"),
    "dummy label": ("a", edit("antonym_dummy_labels.json", lambda d: at(d, "labels", 5, 1, to="bos_token")), "slot_map", "mean_activations_meta.json", "labels[5]"),
    "number of slots": ("b", edit("mean_activations_meta.json", lambda d: d["dummy_labels"].pop()), "slot_map", "mean_activations_meta.json", "labels"),
    "mean": ("b", tensor("mean_activations.pt", put((2, 1, 5, 3), 1e-3, add=True)), "mean_activations", "mean_activations.pt", "mean[layer 2, head 1, slot 5, d_head 3]"),
    "mean, not a number": ("a", tensor(MEAN, put((0, 3, 0, 1), torch.nan)), "mean_activations", "mean_activations.pt", "mean[layer 0, head 3, slot 0, d_head 1]"),
    "mean of other slots": ("a", tensor(MEAN, lambda x: x[:, :, 1:]), "mean_activations", "mean_activations.pt", "mean shape"),
    "effect": ("b", tensor("indirect_effect.pt", put((1, 3, 2), 1e-3, add=True)), "top_heads", "indirect_effect.pt", "effects[trial 1, layer 3, head 2]"),
    "effect, not a number": ("b", tensor("indirect_effect.pt", put((0, 2, 1), torch.nan)), "top_heads", "indirect_effect.pt", "effects[trial 0, layer 2, head 1]"),
    "a trial's effects": ("b", tensor("indirect_effect.pt", lambda x: x[:2]), "top_heads", "indirect_effect.pt", "effects shape"),
    "heads swapped": ("b", edit("top_heads.json", lambda d: swap(d["heads"], 1, 2)), "top_heads", "top_heads.json", "heads[1]"),
    "heads swapped in a": ("a", edit("top_heads_src.json", lambda d: swap(d["top_heads"], 0, 3)), "top_heads", "top_heads.json", "heads[0]"),
    "heads too few": ("b", edit("top_heads.json", lambda d: d["heads"].pop()), "top_heads", "top_heads.json", "heads"),
    "head score": ("b", edit("top_heads.json", lambda d: at(d, "heads", 2, "rank_score", to=lambda x: x + 1e-3)), "top_heads", "top_heads.json", "heads[2] z["),
    "vector scaled": ("b", tensor("fv_global_resid.pt", scaled), "fv_vector", "fv_global_resid.pt", "fv[d_model "),
    "vector without numbers": ("a", tensor("src_fv.pt", put((0, 17), torch.inf)), "fv_vector", "fv_global_resid.pt", "fv[d_model 17]"),
    "log-probability": ("b", edit(EVAL, lambda d: at(d, 1, "logprob_with", to=lambda x: x + 1e-3)), "injection_output", EVAL, "trial (1, 1), corrupted, layer 2: with_logprob"),
    "log-probability, not a number": ("a", edit(DUMP, lambda d: at(d, "trials", 0, "base_logprob", to=float("nan"))), "injection_output", EVAL, "trial (0, 0), corrupted, layer 2: base_logprob"),
    "log-probability, none": ("b", edit(EVAL, lambda d: at(d, 2, "logprob_base", to=None)), "injection_output", EVAL, "trial (2, 2), corrupted, layer 2: base_logprob"),
    "rank": ("b", edit(EVAL, lambda d: at(d, 2, "rank_with", to=lambda x: x + 1)), "injection_output", EVAL, "trial (2, 2), corrupted, layer 2: with_rank"),
    "likeliest token": ("b", edit(EVAL, lambda d: at(d, 0, "pred_id_base", to=5)), "injection_output", EVAL, "trial (0, 0), corrupted, layer 2: base_pred_id"),
    "edit layer": ("b", edit(EVAL, lambda d: [at(row, "edit_layer", to=3) for row in d]), "injection_output", EVAL, "edit_layer"),
    "trial missing": ("b", edit(EVAL, lambda d: d.pop(1)), "prompt_boundary", EVAL, "n_trials"),
    "trial missing in a": ("a", edit(DUMP, lambda d: d["trials"].pop(1)), "prompt_boundary", DUMP, "n_trials"),
    "trial twice": ("a", edit(DUMP, lambda d: d["trials"].append(d["trials"][0])), "prompt_boundary", DUMP, "trial (0, 0), corrupted"),
    "trial numbered wrongly": ("b", edit(EVAL, lambda d: at(d, 2, "trial_id", to=7)), "prompt_boundary", EVAL, "trial (2, 2), corrupted"),
    "map missing": ("b", edit(MAPS, lambda d: d.pop(2)), "prompt_boundary", MAPS, "trial 1, clean"),
    "no such field": ("a", edit(MAPS, lambda d: d[1].pop("idx_map")), "slot_map", MAPS, "trial 0, corrupted: idx_map"),
    "a field nowhere": ("b", edit("top_heads.json", lambda d: d["heads"][0].pop("rank_score")), "top_heads", "top_heads.json", "(file)"),
    "dump cut off": ("a", garbage(DUMP), "prompt_boundary", DUMP, "(file)"),
    "map cut off": ("b", garbage(MAPS), "prompt_boundary", MAPS, "(file)"),
    "means cut off": ("b", garbage("mean_activations.pt"), "mean_activations", "mean_activations.pt", "(file)"),
    "logits cut off": ("b", garbage("injection_logits.safetensors"), "injection_output", "injection_logits.safetensors", "(file)"),
    "list for a vector": ("b", tensor("fv_global_resid.pt", lambda d: [d["fv_global_resid"]]), "fv_vector", "fv_global_resid.pt", "(file)"),
} | {
    f"{side} without {name}": (side, delete(name), stage, name, "(file)")
    for side, name, stage in [
        ("a", DUMP, "prompt_boundary"), ("a", MAPS, "prompt_boundary"), ("a", "antonym_dummy_labels.json", "slot_map"),
        ("a", MEAN, "mean_activations"), ("a", "antonym_indirect_effect.pt", "top_heads"),
        ("a", "top_heads_src.json", "top_heads"), ("a", "src_fv.pt", "fv_vector"),
        ("b", EVAL, "prompt_boundary"), ("b", "mean_activations_meta.json", "slot_map"),
        ("b", "mean_activations.pt", "mean_activations"), ("b", "indirect_effect.pt", "top_heads"),
        ("b", "top_heads.json", "top_heads"), ("b", "fv_global_resid.pt", "fv_vector"),
    ]
}  # fmt: skip


def both(spoil: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """The same fault in both folders, under names that both have."""
    return lambda a, b: (spoil(a), spoil(b))[0]


def alike(ours: Callable[[Path], None], theirs: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """The same fault in the files of either layout."""
    return lambda a, b: (ours(a), theirs(b))[0]


def tensors(source: str, runtime: str, change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
    """The same change to a tensor of both folders."""
    in_runtime = (
        (lambda d: d | {"fv_global_resid": change(d["fv_global_resid"][None])[0]}) if "fv" in runtime else change
    )
    return alike(tensor(source, change), tensor(runtime, in_runtime))


def lists(change: Callable[[list[Any]], None]) -> Callable[[Path, Path], None]:
    """The same change to both lists of heads."""
    return alike(
        edit("top_heads_src.json", lambda d: change(d["top_heads"])),
        edit("top_heads.json", lambda d: change(d["heads"])),
    )


def logits(change: Callable[[torch.Tensor], torch.Tensor], of: str | None = None) -> Callable[[Path], None]:
    """A change to the logits, and to what they say that they are of."""

    def spoil(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(folder / LOGITS, "pt") as file:
            kept, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        new = {key: change(x.clone()).contiguous() for key, x in kept.items()}
        save_file(new, folder / LOGITS, about if of is None else {"of": of})

    return spoil


def rows(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path, Path], None]:
    """The same change to the rows of trials."""
    return alike(edit(DUMP, lambda d: change(d["trials"])), edit(EVAL, change))


def least(folder: Path) -> None:
    """The last of the chosen heads exchanged for the one of smallest AIE, each with the score that it has."""
    path = folder / "top_heads_src.json"
    source = path.exists()
    effects = torch.load(
        folder / ("antonym_indirect_effect.pt" if source else "indirect_effect.pt"), weights_only=True
    ).mean(0)
    layer, head = divmod(int(effects.argmin()), effects.shape[1])
    score = float(effects.min())
    path = path if source else folder / "top_heads.json"
    data = json.loads(path.read_text())
    if source:
        data["top_heads"][-1] = [layer, head, round(score, 4)]
    else:
        data["heads"][-1] |= {"layer": layer, "head": head, "rank_score": score}
    path.write_text(json.dumps(data))


def emptied(x: torch.Tensor) -> torch.Tensor:
    return x[..., :0]


LOGITS, EFFECTS, VECTORS = "injection_logits.safetensors", "indirect_effect.pt", ("src_fv.pt", "fv_global_resid.pt")
EFFECTS_A, MEANS, HEADS = f"antonym_{EFFECTS}", (MEAN, "mean_activations.pt"), "top_heads_src.json"
HOLES: dict[str, tuple[Callable[[Path, Path], None], str, str, str]] = {
    # what is wrong in both folders alike, or in one where the other could not tell: (how, stage, file, key)
    "a head's effects, not numbers": (tensors(EFFECTS_A, EFFECTS, lambda x: at(x, (slice(None), 2, 4), to=torch.nan) or x), "top_heads", EFFECTS, "effects[trial 0, layer 2, head 4]"),
    "a head's effects in one trial, not numbers": (tensors(EFFECTS_A, EFFECTS, put((1, 0, 3), torch.nan)), "top_heads", EFFECTS, "effects[trial 1, layer 0, head 3]"),
    "a layer's effects, not numbers": (tensors(EFFECTS_A, EFFECTS, lambda x: at(x, (slice(None), 1), to=torch.nan) or x), "top_heads", EFFECTS, "effects[trial 0, layer 1, head 0]"),
    "effects of a trial missing": (tensors(EFFECTS_A, EFFECTS, lambda x: x[:-1]), "top_heads", EFFECTS_A, "effects shape"),
    "no effects": (tensors(EFFECTS_A, EFFECTS, emptied), "top_heads", EFFECTS, "effects shape"),
    "effects of rank 2": (tensors(EFFECTS_A, EFFECTS, lambda x: x[0]), "top_heads", EFFECTS, "effects shape"),
    "effects all zero": (tensors(EFFECTS_A, EFFECTS, torch.zeros_like), "top_heads", "top_heads.json", "gap at k"),
    "no maps": (both(edit("slot_maps.json", list.clear)), "prompt_boundary", "slot_maps.json", "n_trials"),
    "a trial without maps": (both(edit("slot_maps.json", lambda d: d.__delitem__(slice(2, 4)))), "prompt_boundary", "slot_maps.json", "n_trials"),
    "maps of clean prompts only": (both(edit("slot_maps.json", lambda d: d.__delitem__(slice(1, None, 2)))), "prompt_boundary", "slot_maps.json", "n_trials"),
    "other prompts than in the maps": (rows(lambda d: at(d, 1, "prompt", to=lambda x: x[1:])), "prompt_boundary", DUMP, "trial (1, 1), corrupted: prompt"),
    "target that no answer begins with": (rows(lambda d: at(d, 2, "target_id", to=3)), "prompt_boundary", DUMP, "trial (2, 2), corrupted: target_id"),
    "rows without prompts": (rows(lambda d: [row.pop("target_id") for row in d]), "prompt_boundary", DUMP, "trial (0, 0), corrupted: target_id"),
    "no rows": (rows(list.clear), "prompt_boundary", EVAL, "prompt_kind"),
    "no labels": (alike(edit("antonym_dummy_labels.json", lambda d: d["labels"].clear()), edit("mean_activations_meta.json", lambda d: d["dummy_labels"].clear())), "slot_map", "antonym_dummy_labels.json", "labels"),
    "a label too few": (alike(edit("antonym_dummy_labels.json", lambda d: d["labels"].pop()), edit("mean_activations_meta.json", lambda d: d["dummy_labels"].pop())), "slot_map", "slot_maps.json", "trial 0, clean: idx_map_updated"),
    "a token without slot": (both(edit("slot_maps.json", lambda d: d[0]["idx_map_updated"].pop("3"))), "slot_map", "slot_maps.json", "trial 0, clean: idx_map_updated"),
    "a slot off in one of two maps": (both(edit("slot_maps.json", lambda d: shifted(d[3]))), "slot_map", "slot_maps.json", "trial 1, corrupted: idx_map"),
    "maps without slots": (both(edit("slot_maps.json", lambda d: [row.pop("idx_map_updated") for row in d])), "slot_map", "slot_maps.json", "trial 0, clean: idx_map_updated"),
    "means all zero": (tensors(*MEANS, torch.zeros_like), "mean_activations", MEAN, "mean"),
    "no means": (tensors(*MEANS, emptied), "mean_activations", MEANS[1], "mean shape"),
    "means of fewer slots": (tensors(*MEANS, lambda x: x[:, :, 1:]), "mean_activations", MEAN, "mean shape"),
    "no heads": (lists(list.clear), "top_heads", HEADS, "heads"),
    "a head too few": (lists(list.pop), "top_heads", HEADS, "heads"),
    "a head twice": (lists(lambda d: d.__setitem__(3, d[0])), "top_heads", HEADS, "heads z["),
    "a head that is none": (alike(edit(HEADS, lambda d: at(d, "top_heads", 0, 0, to=99)), edit("top_heads.json", lambda d: at(d, "heads", 0, "layer", to=99))), "top_heads", "top_heads.json", "heads[0] z[99"),
    "heads in another order": (lists(lambda d: swap(d, 0, 3)), "top_heads", HEADS, "heads[0]"),
    "a head of smaller AIE": (both(least), "top_heads", HEADS, "heads[3]"),
    "an AIE that is not its effects'": (alike(edit(HEADS, lambda d: at(d, "aie_sorted_full", 1, 2, to=lambda x: x * 1.01)), edit("top_heads.json", lambda d: at(d, "heads", 1, "rank_score", to=lambda x: x * 1.01))), "top_heads", HEADS, "heads[1] z["),
    "an AIE that is none": (alike(edit(HEADS, lambda d: at(d, "aie_sorted_full", 1, 2, to=None)), edit("top_heads.json", lambda d: at(d, "heads", 1, "rank_score", to=None))), "top_heads", HEADS, "(file)"),
    "vector all zero": (tensors(*VECTORS, torch.zeros_like), "fv_vector", "src_fv.pt", "fv"),
    "vector scaled alike": (tensors(*VECTORS, lambda x: x * 1.001), "fv_vector", "src_fv.pt", "fv"),
    "vector turned round": (tensors(*VECTORS, lambda x: -x), "fv_vector", VECTORS[1], "fv"),
    "vector without numbers in both": (tensors(*VECTORS, put((0, 3), torch.nan)), "fv_vector", VECTORS[1], "fv[d_model 3]"),
    "no vector": (tensors(*VECTORS, emptied), "fv_vector", VECTORS[1], "fv shape"),
    "means of heads by layer": (lambda _, b: tensor("fv_by_layer.pt", lambda d: d | {"fv_by_layer": {k: x + 1 for k, x in d["fv_by_layer"].items()}})(b), "fv_vector", "fv_by_layer.pt", "fv_by_layer["),
    "vectors by layer cut off": (lambda _, b: garbage("fv_by_layer.pt")(b), "fv_vector", "fv_by_layer.pt", "(file)"),
    "logits of one trial": (lambda _, b: logits(lambda x: x[:1])(b), "injection_output", LOGITS, "logits ('corrupted', 2)"),
    "logits of one trial in both": (both(logits(lambda x: x[:1])), "injection_output", LOGITS, "logits ('corrupted', 2)"),
    "logits of none": (lambda _, b: logits(lambda x: x[:0])(b), "injection_output", LOGITS, "logits ('corrupted', 2)"),
    "logits of other prompts": (lambda _, b: logits(lambda x: x + 1, '["clean", 2]')(b), "injection_output", LOGITS, "logits ('corrupted', 2)"),
    "logits of another layer in both": (both(logits(lambda x: x, '["corrupted", 1]')), "injection_output", LOGITS, "logits ('corrupted', 2)"),
    "logits of other trials in both": (both(logits(lambda x: x.roll(1, 0))), "injection_output", LOGITS, "trial (0, 0), corrupted, layer 2: base logits"),
    "log-probabilities of other logits": (rows(lambda d: [at(row, key, to=lambda x: x - 1.0) for row in d for key in row if "logprob" in key and "delta" not in key]), "injection_output", LOGITS, "trial (0, 0), corrupted, layer 2: base logits"),
    "a difference of others": (rows(lambda d: at(d, 1, "delta_logprob", to=lambda x: x + 0.1)), "injection_output", DUMP, "trial (1, 1), corrupted, layer 2: delta_logprob"),
}  # fmt: skip
