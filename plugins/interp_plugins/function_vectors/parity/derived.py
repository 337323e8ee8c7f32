"""One folder's parts held against what they derive from, and against what the trials ask.

Two folders that agree may both be wrong, or hold nothing. So each is also held against itself:

    prompt_boundary    every trial; prompts are those of the maps, and of the fixed trials where their file is given;
                       a target is the first token of its answer
    slot_map           labels; maps of every trial, clean and corrupted; a label and a slot for every token
    mean_activations   a slot for every label; not zero throughout
    top_heads          effects of every trial, not zero throughout; heads that there are, as many as were asked for,
                       those of largest AIE; each AIE the mean of its effects
    fv_vector          not zero; of the length that the folder says; the sum of its layers' vectors, whose heads have
                       the means of the last slot
    injection_output   every trial; a difference is that of its log-probabilities; logits of every trial, whose
                       log-probabilities are those of the table

Everything is looked up in the files and worked out here anew; nothing is asked of the code that wrote them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.folders import Artefacts, Combination, Table
from ..files.golden import LOGITS
from ..prompts import Prompt
from .findings import Tolerances

MODES = ("clean", "corrupted")


class Problem(NamedTuple):
    """What is wrong in a folder.

    Attributes:
        part: of the folder, which says the file.
        key: what in it.
        why: in words.
    """

    part: str
    key: str
    why: str


@dataclass(frozen=True)
class Asked:
    """What the trials ask of a folder.

    Attributes:
        trials: how many there are.
        first: how many of them are looked at, row by row.
        combinations: kinds of prompts and layers that answers are compared of.
        kinds: kinds of prompts that are compared.
        token_class: class that heads were chosen by, unless the folder says another.
        prompts: of the fixed trials, by kind, where their file was given.
    """

    trials: int
    first: int
    combinations: frozenset[Combination]
    kinds: frozenset[str]
    token_class: int = -1
    prompts: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)


def problems(stage: str, folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    """What a folder's own parts say against each other, in one stage."""
    for name in EXTRA[stage]:
        extra = folder.parts.get(name)
        if extra is not None and extra.problem not in ("", "missing"):
            yield Problem(name, "(file)", extra.problem)
    for part, check in CHECKS[stage]:
        if value(folder, part) is None:
            continue
        try:
            yield from check(folder, demands)
        # files of anyone's making: what breaks a check is a finding about the file, never a stop
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            yield Problem(part, "(contents)", f"cannot be held against the other files: {error!r}")


def value(folder: Artefacts, name: str) -> Any:
    """A part that could be read; None if it could not, or is not there."""
    part = folder.parts.get(name)
    return None if part is None or part.problem else part.value


def all_heads(folder: Artefacts) -> Tensor | None:
    """Layers that have heads, by the means: those without are zero throughout. None if the means do not say."""
    mean = value(folder, "mean")
    return None if mean is None or mean.ndim != 4 else (mean != 0).flatten(1).any(1)


def _prompts(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    table: Table = value(folder, "trials")
    kinds = Counter(row.of[0] for row in table.rows.values() if row.of and row.trial < demands.first)
    for kind in sorted(demands.kinds):
        if kinds[kind] != demands.first:
            yield Problem("trials", "n_trials", f"{kinds[kind]} {kind} trials, there are {demands.first}")
    numbered = value(folder, "maps") is not None and not [*_maps_of_trials(folder, demands)]
    maps = _by_place(value(folder, "maps")) if numbered else {}  # a missing one would move those behind it
    for row in table.rows.values():
        if row.of is None or row.of[0] not in demands.kinds or row.trial >= demands.first:
            continue
        fields, at = row.fields, (row.trial, row.of[0])
        if at in maps and fields["prompt"] != maps[at]["prompt"]:
            yield Problem("trials", f"{row.key}: prompt", "is not that of the maps")
        if "answer_ids" in fields and fields["target_id"] != fields["answer_ids"][0]:
            yield Problem("trials", f"{row.key}: target_id", f"is no start of answer_ids {fields['answer_ids']}")
        if row.of[0] in demands.prompts:
            wanted = demands.prompts[row.of[0]][row.trial]
            for name, right in (("prompt", wanted.text), ("target_id", wanted.target_ids[0])):
                if fields[name] != right:
                    yield Problem(
                        "trials", f"{row.key}: {name}", f"is {fields[name]!r}, the fixed trials have {right!r}"
                    )


def _maps_of_trials(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    counts = Counter(mode for (trial, mode) in _by_place(value(folder, "maps")) if trial < demands.first)
    for mode in MODES:
        if counts[mode] != demands.first:
            yield Problem(
                "maps", "n_trials", f"maps of {counts[mode]} {mode} prompts, there are {demands.first} trials"
            )


def _ids(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    if lacking := [*_maps_of_trials(folder, demands)]:
        yield from lacking
        return
    for (trial, mode), fields in _by_place(value(folder, "maps")).items():
        if trial < demands.first and mode in demands.prompts:
            wanted = demands.prompts[mode][trial]
            if (fields["prompt"], tuple(fields["input_ids"])) != (wanted.text, wanted.ids):
                yield Problem("maps", f"trial {trial}, {mode}: input_ids", "are not those of the fixed trials")


def _labels(folder: Artefacts, _: Asked) -> Iterator[Problem]:
    if not value(folder, "labels"):
        yield Problem("labels", "labels", "there are none")


def _slots(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    yield from _maps_of_trials(folder, demands)
    labels = value(folder, "labels")
    for (trial, mode), fields in _by_place(value(folder, "maps")).items():
        if trial >= demands.first:
            continue
        where, slots, n = f"trial {trial}, {mode}", fields["idx_map_updated"], len(fields["input_ids"])
        if len(fields["labels"]) != n:
            yield Problem("maps", f"{where}: labels", f"{len(fields['labels'])} labels of {n} tokens")
        if set(slots) != {str(token) for token in range(n)}:
            yield Problem("maps", f"{where}: idx_map_updated", f"does not have a slot for each of {n} tokens")
        if not fields["idx_map"].items() <= slots.items():
            yield Problem("maps", f"{where}: idx_map", "has slots that idx_map_updated has not")
        if labels and {*slots.values()} != {*range(len(labels))}:
            yield Problem(
                "maps", f"{where}: idx_map_updated", f"does not run through the {len(labels)} slots of labels"
            )
        if mode in demands.prompts:
            wanted = demands.prompts[mode][trial]
            if (tuple(fields["labels"]), tuple(slots.values())) != (wanted.labels, wanted.slots):
                yield Problem("maps", f"{where}: labels", "labels or slots are not those of the fixed trials")


def _mean(folder: Artefacts, _: Asked) -> Iterator[Problem]:
    mean, labels = value(folder, "mean"), value(folder, "labels")
    if labels and mean.ndim == 4 and mean.shape[2] != len(labels):
        yield Problem("mean", "mean shape", f"has {mean.shape[2]} slots, there are {len(labels)} labels")
    if mean.numel() and not mean.any():
        yield Problem("mean", "mean", "is zero throughout")


def _effects(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    effects, mean = value(folder, "effects"), value(folder, "mean")
    if len(effects) != demands.trials:
        yield Problem("effects", "effects shape", f"effects of {len(effects)} trials, there are {demands.trials}")
    if mean is not None and mean.ndim == 4 and effects.shape[1:3] != mean.shape[:2]:
        yield Problem("effects", "effects shape", f"{list(effects.shape)}, the means are {list(mean.shape)}")
    if effects.numel() and not effects.nan_to_num().any():
        yield Problem("effects", "effects", "are zero throughout: they determine no heads")


def _heads(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    """The list of heads against the effects."""
    heads, effects, said = value(folder, "heads"), value(folder, "effects"), value(folder, "said") or {}
    names = [(layer, head) for layer, head, _ in heads]
    if not heads:
        yield Problem("heads", "heads", "there are none")
    if said.get("n_top_heads") not in (None, len(heads)):
        yield Problem("heads", "heads", f"{len(heads)} heads, the file says {said['n_top_heads']}")
    if effects is None or not heads:
        return
    kept = effects.double() if effects.ndim == 3 else effects[..., _class(folder, demands)].double()
    aie, n = kept.mean(0), len(kept)
    # the file's mean was summed in float32, in an order that is not known: n terms, each off by half an eps
    rounding = 2 * n * torch.finfo(torch.float32).eps * float(kept.nan_to_num().abs().max())
    real = {(int(layer), int(head)): float(aie[layer, head]) for layer, head in (~aie.isnan()).nonzero()}
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        yield Problem("heads", f"heads z[{twice[0][0]},{twice[0][1]}]", "is there twice")
    if unknown := [name for name in names if name not in real]:
        yield Problem("heads", f"heads z[{unknown[0][0]},{unknown[0][1]}]", "has no effects")
        return
    # scores of the published list are rounded to so many places: half of the last one, and a little
    coarse = rounding + (0.6 * 10.0 ** -said["places"] if said.get("places") else 0.0)
    stated = [(f"heads[{place}]", *head, coarse) for place, head in enumerate(heads)]
    stated += [("aie_sorted_full", *head, rounding) for head in said.get("aie") or []]
    for key, layer, head, score, near in stated:
        apart = abs(score - real.get((layer, head), math.nan))
        if not apart <= near:
            right = real.get((layer, head))
            yield Problem("heads", f"{key} z[{layer},{head}] AIE", f"is {score}, the mean of its effects is {right}")
    left = max((score for name, score in real.items() if name not in names), default=-math.inf)
    falling = [*(real[name] for name in names), left]
    for place, (higher, lower) in enumerate(pairwise(falling)):
        if lower > higher + rounding:
            after = "of a head that is left out" if place + 1 == len(names) else f"of heads[{place + 1}]"
            yield Problem("heads", f"heads[{place}]", f"has an AIE of {higher:.6g}, below the {lower:.6g} {after}")


def _vector(folder: Artefacts, _: Asked) -> Iterator[Problem]:
    vector, norm, heads = (value(folder, name) for name in ("vector", "norm", "heads"))
    if not bool(vector.isfinite().all()) or not vector.numel():
        return  # the comparison says so
    length = float(vector.double().norm())
    if not length:
        yield Problem("vector", "fv", "is zero throughout")
    if norm is not None and not abs(length - norm) <= 1e-5 * length:
        yield Problem("vector", "fv", f"has length {length:.8g}, the folder says {norm:.8g}")
    if (layers := value(folder, "by_layer")) is None:
        return
    parts = [part.double() for part in layers["resid_by_layer"].values()]
    # the writer sums head by head, this layer by layer: as many roundings more as there are layers
    near = 8 * len(parts) * torch.finfo(torch.float32).eps * sum(float(part.abs().max()) for part in parts)
    if not parts or not float((sum(parts) - vector.double()).abs().max()) <= near:
        yield Problem("vector", "fv", "is not the sum of resid_by_layer")
    mean = value(folder, "mean")
    if mean is None or not heads:
        return
    own = torch.zeros_like(mean[:, :, -1])
    for layer, head, _score in heads:
        own[layer, head] = mean[layer, head, -1]
    wanted = {layer: own[layer].flatten() for layer, _head, _score in heads}
    if wanted.keys() != layers["fv_by_layer"].keys():
        yield Problem("by_layer", "fv_by_layer", f"has layers {sorted(layers['fv_by_layer'])}, heads {sorted(wanted)}")
        return
    for layer, right in wanted.items():
        if not torch.equal(layers["fv_by_layer"][layer].to(right), right):
            yield Problem("by_layer", f"fv_by_layer[{layer}]", "is not the means of its heads at the last slot")


def _answers(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    table: Table = value(folder, "answers")
    counts = Counter(row.of for row in table.rows.values() if row.of and row.trial < demands.first)
    for of in sorted(demands.combinations):
        if counts[of] != demands.first:
            yield Problem("answers", "n_trials", f"{counts[of]} answers {_of(of)}, there are {demands.first} trials")
    for row in table.rows.values():
        if row.of not in demands.combinations or row.trial >= demands.first:
            continue
        base, steered, moved = (row.fields[f"{name}_logprob"] for name in ("base", "with", "delta"))
        if isinstance(moved, float) and not abs(steered - base - moved) <= 2 * Tolerances().logit:
            yield Problem("answers", f"{row.key}: delta_logprob", f"is {moved}, the difference is {steered - base}")


def _logits(folder: Artefacts, demands: Asked) -> Iterator[Problem]:
    """Logits against the rows that they belong to; the published file holds those of the first trials."""
    logits, answers = value(folder, "logits"), value(folder, "answers")
    whole = folder.parts["logits"].file.name == LOGITS
    for of in sorted(demands.combinations):
        if of not in logits:
            has = ", ".join(_of(other) for other in sorted(logits)) or "of nothing"
            yield Problem("logits", f"logits {of}", f"there are none {_of(of)}; it has those {has}")
            continue
        base, steered = logits[of]
        if base.shape != steered.shape or base.ndim != 2 or not base.numel():
            yield Problem("logits", f"logits {of} shape", f"{list(base.shape)} and {list(steered.shape)} [trial vocab]")
        elif len(base) != demands.trials and (whole or len(base) > demands.trials):
            yield Problem("logits", f"logits {of}", f"of {len(base)} trials, there are {demands.trials}")
        for row in answers.rows.values() if answers else ():
            if row.of == of and row.trial < min(demands.first, len(base), len(steered)):
                for name, x in (("base", base[row.trial]), ("with", steered[row.trial])):
                    key, stated = f"{row.key}: {name} logits", row.fields[f"{name}_logprob"]
                    right = float(torch.log_softmax(x.double(), -1)[row.fields["target_id"]])
                    if isinstance(stated, float) and not abs(stated - right) <= _near(folder, x):
                        yield Problem("logits", key, f"give the target {right:.7g}, the table says {stated:.7g}")


def _near(folder: Artefacts, logits: Tensor) -> float:
    """How far a log-probability may lie from that of the logits, which may come from another batch: the tolerance of
    logits, or the rounding of a model in half precision."""
    dtype = getattr(torch, str(folder.settings.get("profile", {}).get("dtype", "float32")))
    return max(Tolerances().logit, 16 * torch.finfo(dtype).eps * float(logits.abs().max()))


def _by_place(table: Table | None) -> dict[tuple[int, str], Mapping[str, Any]]:
    """Maps by place of the trial, and mode."""
    return {} if table is None else {(row.trial, row.fields["mode"]): row.fields for row in table.rows.values()}


def _class(folder: Artefacts, demands: Asked) -> int:
    return int(folder.settings.get("token_class_idx", demands.token_class))


def _of(of: Combination) -> str:
    return f"of {of[0]} prompts at layer {of[1]}"


Check = Callable[[Artefacts, Asked], Iterator[Problem]]
CHECKS: Mapping[str, Sequence[tuple[str, Check]]] = {
    "prompt_boundary": (("trials", _prompts), ("maps", _ids)),
    "slot_map": (("labels", _labels), ("maps", _slots)),
    "mean_activations": (("mean", _mean),),
    "top_heads": (("effects", _effects), ("heads", _heads)),
    "fv_vector": (("vector", _vector),),
    "injection_output": (("answers", _answers), ("logits", _logits)),
}
"""Checks of every stage, each with the part that it is of."""
EXTRA: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(CHECKS, ()), "top_heads": ("said",), "fv_vector": ("norm", "by_layer"),
}  # fmt: skip
"""Parts that a folder need not have, by the stage that looks at them."""
