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
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import SIDES
from interp_plugins.pairs.routing import joined, pair_sums, routed_targets
from interp_plugins.router.points import Shape
from torch import Tensor

import interp_core as ic
from interp_core import runs

from .config import MoeExpertsConfig
from .findings import Findings
from .report import FILES, PAGE, SUMMARY, write

BLOCK = 8
"""Samples whose sums are kept together: what a stopped run does again at most."""
SAMPLES = "tables/expert_core_samples"


def moe_experts(config: MoeExpertsConfig) -> Path:
    """Compare how two contexts route the tokens that they share; returns the page's path.

    Raises:
        CapabilityError: a dense model, before it runs.
        LoadError: pairs that cannot be read, naming sample and field.
        PlanError: settings out of range, files of another run.
    """
    config.check()
    pairs, unreadable = config.read(config.data_path)
    model = config.load()
    shape = Shape.of(model)
    config.check(shape)
    about: dict[str, Any] = {"recipe": "moe_experts", "model": model, "dataset": config.data_path.stem}
    with config.open(config.identity, pairs, **about) as run:
        run.claim(FILES, stage=SUMMARY)  # what another run wrote is found before any work
        run.claim([PAGE])
        stages, sums, names, failed = _sums(run, model, pairs, config)
        if not names:
            raise ic.PlanError(
                f"{config.data_path}: the model runs none of the samples; the first: {failed[0]['reason']}"
            )
        layouts = sorted({pair.layout for pair in pairs})
        dropped = [
            *_dropped(unreadable),
            *({"sample": p.name, "targets": count, "reason": why} for p in pairs for why, count in p.dropped.items()),
            *_dropped(failed),
        ]
        findings = Findings(config, shape, names, sums, dropped, layouts, str(config.data_path))
        return write(run, model, findings, stages)


def _dropped(samples: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Whole samples, as rows of the table that also has targets of samples."""
    return [{"sample": row["sample"], "targets": "", "reason": row["reason"]} for row in samples]


def _sums(
    run: runs.RunFolder, model: ic.Model, pairs: Sequence[Pair], config: MoeExpertsConfig
) -> tuple[list[str], dict[str, Tensor], list[str], list[dict[str, str]]]:
    """Stages and sums of all samples, block by block; their names; and those that the model does not run."""
    stages, parts, names, failed = [], [], [], []
    blocks = [pairs[start : start + BLOCK] for start in range(0, len(pairs), BLOCK)]
    for number, block in enumerate(blocks):
        file, make = f"{SAMPLES}/{number:04d}.safetensors", partial(_block, model, block, config)
        block_sums, about = run.stage(file, make, read=_read, data=_data)
        stages.append(file)
        parts += [block_sums] if about["samples"] else []
        names += about["samples"]
        failed += about["dropped"]
    return stages, (joined(parts) if parts else {}), names, failed


Block = tuple[dict[str, Tensor], dict[str, Any]]
"""Sums of some samples; their names, and what was left out."""


def _block(model: ic.Model, pairs: Sequence[Pair], config: MoeExpertsConfig) -> Block:
    parts, names = [], []
    dropped: list[dict[str, str]] = []
    with ic.Progress(f"samples {pairs[0].name} to {pairs[-1].name}", len(pairs)) as told:
        for pair in pairs:
            side = ""
            try:
                routed = []
                for side in SIDES:
                    routed.append(routed_targets(model, pair, side, config.top_k))
            except (ic.TextError, ic.CapabilityError) as error:
                why = f"sample {pair.name!r}, {side}: {error}"
                config.leave_out(dropped, pair.name, type(error)(why))
            else:
                parts.append(pair_sums(*routed))
                names.append(pair.name)
            told.add()
    # a file of no tensors cannot be written, so that a block of which nothing runs has an empty one
    return (joined(parts) if parts else {"none": torch.zeros(0)}), {"samples": names, "dropped": dropped}


def _data(block: Block) -> bytes:
    return runs.safetensors_bytes(block[0], {name: json.dumps(value) for name, value in block[1].items()})


def _read(path: Path) -> Block:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        noted: Mapping[str, str] = file.metadata()
    return tensors, {name: json.loads(value) for name, value in noted.items()}
