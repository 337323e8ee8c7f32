"""Which experts two contexts use for the same tokens: usage, differences, divergence, and points for masks.

    interp run moe_experts --model_path M --data_path pair_tokens.json --out_dir O --device cpu --top_k 8
        --threshold_percentile 99 --threshold_min 0.005

writes, as the published analysis does, into the folder O:

    figures/expert_core/expert_usage_{all,last}_{agentic,assisted,diff,diff_thresholded}.png
    figures/expert_core/routing_{tv,jaccard,intersection}_curve.png
    tables/expert_core_layer_metrics.csv, expert_core_matrices.npz, expert_core_summary.json
    tables/last_token_{agentic_minus_assisted,assisted_minus_agentic,agentic}_points.json
    tables/expert_core_top_experts.csv      ours: the largest differences with their intervals
    tables/expert_core_dropped.csv          ours: samples and targets that were left out, and why
    tables/expert_core_samples/*.safetensors    ours: each sample's own sums, by which a stopped run goes on
    expert_core_report.html                 ours: all of it as a page

The run's record lies beside the folder (O.runs), so that `moe_nll` may write into the same; without O the run has
a folder of its own. Layers are decoder layers. Numbers, and where they differ from the published code:
docs/moe_experts.md.

Source: Geuan666/XAI4Agent (2026), `analyze_expert_core.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interp_plugins.pairs import Pair, read_pairs
from interp_plugins.pairs.pair import SIDES, Layout
from interp_plugins.pairs.routing import joined, pair_sums, routed_targets
from interp_plugins.router.points import Shape
from torch import Tensor

import interp_core as ic
from interp_core import runs

from .moe_experts_findings import Findings, Settings
from .moe_experts_report import FILES, PAGE, write

BLOCK = 8
"""Samples whose sums are kept together: what a stopped run does again at most."""
SAMPLES = "tables/expert_core_samples"


def moe_experts(
    model_path: str,
    data_path: Path,
    out_dir: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    top_k: int | None = None,
    threshold_percentile: float = 99.0,
    threshold_min: float = 0.005,
    max_samples: int | None = None,
    layout: Layout | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Compare how two contexts route the tokens that they share; returns the page's path.

    Args:
        model_path: a mixture of experts: toy:moe, a folder, or a hub id; needs no tokenizer.
        data_path: pairs, as docs/moe_pairs.md has them.
        out_dir: folder of the results (None: results/{model}/{dataset}/{timestamp}-moe_experts-{hash}).
        device: cpu, cuda, cuda:1 (None: the first CUDA device, if any).
        dtype: of the weights (None: as stored).
        top_k: experts per token (None: the model's own number). With another number than the model's, sets are the
            largest so many of the router's probabilities, a statistic that the model does not execute.
        threshold_percentile, threshold_min: cells of a difference map stand out from this percentile of all cells on,
            and from this size on.
        max_samples: the first so many samples of the file.
        layout: packed or padded, of the assisted context (None: as the file has it).
        strict: the first sample that cannot be used ends the run; without it, it is left out and listed.
        overwrite: replace files in `out_dir` that another run wrote.

    Raises:
        CapabilityError: a dense model, before it runs.
        LoadError: pairs that cannot be read, naming sample and field.
        PlanError: settings out of range, files of another run.
    """
    settings = Settings(top_k, threshold_percentile, threshold_min, max_samples, layout)
    settings.check()
    pairs, dropped = _usable(data_path, settings, strict)
    model = ic.load(model_path, device=device, dtype=dtype)
    shape = Shape.of(model)
    settings.check(shape)
    with _opened(out_dir, settings, model, pairs, Path(data_path).stem, overwrite) as run:
        run.claim(FILES, stage=PAGE)  # what another run wrote is found before any work
        stages, sums, names, failed = _sums(run, model, pairs, settings, strict)
        if not names:
            raise ic.PlanError(f"{data_path}: the model runs none of the samples; the first: {failed[0]['reason']}")
        layouts = sorted({pair.layout for pair in pairs})
        findings = Findings(settings, shape, names, sums, [*dropped, *failed], layouts, str(data_path))
        return write(run, model, findings, stages)


def _usable(data_path: Path, settings: Settings, strict: bool) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Pairs of the file; and the samples and targets that were left out.

    Raises:
        LoadError: none can be used, or one cannot and the run is strict.
    """
    dropped: list[dict[str, Any]] = []

    def bad(name: str, error: ic.InterpError) -> None:
        print(f"  left out {name}: {error}")
        dropped.append({"sample": name, "targets": "", "reason": str(error)})

    asked: dict[str, Any] = {"layout": settings.layout, "max_samples": settings.max_samples}
    pairs = read_pairs(data_path, **asked, bad=None if strict else bad)
    if not pairs:
        raise ic.LoadError(f"{data_path}: no sample can be used; the first: {dropped[0]['reason']}")
    targets = [(pair.name, count, why) for pair in pairs for why, count in pair.dropped.items()]
    return pairs, dropped + [{"sample": name, "targets": count, "reason": why} for name, count, why in targets]


def _opened(
    out_dir: Path | None, settings: Settings, model: ic.Model, pairs: Sequence[Pair], dataset: str, overwrite: bool
) -> runs.RunFolder:
    resolved = {**vars(settings), "pairs": runs.digest([pair.record() for pair in pairs])}
    if out_dir is None:
        return runs.open(None, resolved, recipe="moe_experts", model=model, dataset=dataset)
    return runs.publish(
        out_dir, resolved, recipe="moe_experts", model=model, dataset=dataset, overwrite=overwrite
    )  # fmt: skip


def _sums(
    run: runs.RunFolder, model: ic.Model, pairs: Sequence[Pair], settings: Settings, strict: bool
) -> tuple[list[str], dict[str, Tensor], list[str], list[dict[str, Any]]]:
    """Stages and sums of all samples, block by block; their names; and those that the model does not run."""
    stages, parts, names, failed = [], [], [], []
    blocks = [pairs[start : start + BLOCK] for start in range(0, len(pairs), BLOCK)]
    for number, block in enumerate(blocks):
        file, make = f"{SAMPLES}/{number:04d}.safetensors", partial(_block, model, block, settings, strict)
        made = run.stage(file, make, read=_read, data=_data)
        stages.append(file)
        parts += [made[0]] if made[1]["samples"] else []
        names += made[1]["samples"]
        failed += made[1]["dropped"]
    return stages, (joined(parts) if parts else {}), names, failed


Block = tuple[dict[str, Tensor], dict[str, Any]]
"""Sums of some samples; their names, and what was left out."""


def _block(model: ic.Model, pairs: Sequence[Pair], settings: Settings, strict: bool) -> Block:
    parts, names, dropped = [], [], []
    with ic.Progress(f"samples {pairs[0].name} to {pairs[-1].name}", len(pairs)) as told:
        for pair in pairs:
            doing = ""
            try:
                sides = []
                for doing in SIDES:
                    sides.append(routed_targets(model, pair, doing, settings.top_k))
            except (ic.TextError, ic.CapabilityError) as error:
                said = f"sample {pair.name!r}, {doing}: {error}"
                if strict:
                    raise type(error)(said) from error
                print(f"  left out {said}")
                dropped.append({"sample": pair.name, "targets": "", "reason": said})
            else:
                parts.append(pair_sums(*sides))
                names.append(pair.name)
            told.add()
    return (joined(parts) if parts else {"none": torch.zeros(0)}), {"samples": names, "dropped": dropped}


def _data(block: Block) -> bytes:
    return runs.safetensors_bytes(block[0], {name: json.dumps(value) for name, value in block[1].items()})


def _read(path: Path) -> Block:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        noted: Mapping[str, str] = file.metadata()
    return tensors, {name: json.loads(value) for name, value in noted.items()}
