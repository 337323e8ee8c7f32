"""What a model answers, site by site and method by method, to hold a model that is placed elsewhere against it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import interp_core as ic
from interp_core import score
from interp_core import sites as S
from interp_core.plugins import registry
from interp_core.sites import SITES, Site
from interp_core.testing.case import MethodCase
from interp_core.testing.kit import _singles

IDS = torch.tensor([[5, 9, 22, 7, 11, 30], [8, 3, 3, 41, 6, 2]])
Answers = dict[str, "torch.Tensor | str"]
"""By question: what came, or the kind of refusal."""


def sites(model: ic.Model, few: bool = False) -> Answers:
    """Every site of every layer (of the last one that has it, if few): read, edited whole and in one unit,
    differentiated; and its weights."""
    out: Answers = {}
    for name in sorted({name for name, _ in model.atlas.entries}):
        for layer in model.atlas.layers(name)[-1 if few else 0 :]:
            site = Site(name, layer if SITES[name].layered else None)
            _ask(out, f"read {site}", lambda site=site: model.run(IDS, read=site)[site])
            factor = -1.0 if name == "router_logits" else 1.5  # another set of experts
            at = [site] if SITES[name].unit is None else [site, Site(name, layer, 1)]
            for part in at:
                edit = part.at(query=-1) if "query" in SITES[name].axes else part.at(-1)
                change = edit.scale(factor)
                _ask(out, f"edit {part}", lambda change=change: model.run(IDS, edits=change, allow_noop=True).logits)
            _ask(out, f"grad {site}", lambda site=site: _gradient(model, site))
            _ask(out, f"weights {site}", lambda site=site: model.weights(site))
            _ask(out, f"bias {site}", lambda site=site: model.bias(site))
    return out


def _gradient(model: ic.Model, site: Site) -> torch.Tensor:
    return model.run(IDS, read=site, grad=lambda logits: logits.logsumexp(-1).sum()).grad[site]


def verbs(model: ic.Model, few: bool = False) -> Answers:
    """Sweeps by every strategy, knockouts, generation, and reading out."""
    out: Answers = {}
    heads = [S.z[1, head].zero() for head in range(model.n_heads)]
    hidden = [S.pattern[1, head].knockout(query=-1, key=1) for head in range(model.n_heads)]
    variants = [*heads, *hidden, *(S.attn_out[layer].zero() for layer in range(model.n_layers))]
    for strategy in ("full", "auto") if few else ("full", "batched", "auto"):
        _ask(
            out, f"sweep {strategy}",
            lambda way=strategy: model.sweep(IDS, variants, score.logit_diff(3, 9), strategy=way).values,
        )  # fmt: skip
    stream = torch.ones(2, model.d_model)
    _ask(out, "readout", lambda: model.readout(stream))
    _ask(out, "unembed", lambda: model.unembed(stream, torch.tensor([1, 3])))
    _ask(out, "tiles", lambda: torch.cat(list(model.unembed_tiles(stream, 10)), -1))
    _ask(out, "project", lambda: model.project(model.run(IDS, read=S.z[1])[S.z[1]], 1))
    _ask(out, "generate", lambda: model.generate(IDS, max_new_tokens=3, edits=S.z[1].scale(1.3)).tokens.ids)
    return out


def methods(model: ic.Model, names: Iterable[str] = ()) -> Answers:
    """What registered methods give with their own settings, tensor by tensor (all methods, if none are named)."""
    out: Answers = {}
    for name in names or registry("methods").names():
        case = MethodCase(registry("methods").get(name), model, {}, _singles(model, ()), 10.0)
        try:
            result = case.run(case.whole)
        except ic.InterpError as refusal:
            out[name] = type(refusal).__name__
            continue
        for field in result.AXES:
            if (values := getattr(result, field)) is not None:
                out[f"{name} {field}"] = values.detach().double()
    return out


def _ask(out: Answers, question: str, answer: Callable[[], Any]) -> None:
    try:
        out[question] = answer().as_subclass(torch.Tensor).detach().double()
    except ic.InterpError as refusal:
        out[question] = type(refusal).__name__


def differing(ours: Answers, theirs: Answers, limit: float) -> dict[str, Any]:
    """Questions that are answered otherwise: by how much of the largest number, or with what."""
    out: dict[str, Any] = dict.fromkeys(ours.keys() ^ theirs.keys(), "only one answers")
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if isinstance(a, str) or isinstance(b, str):
            if a is not b and a != b:
                out[name] = (a, b)
            continue
        x, y = (torch.nan_to_num(z, nan=-7e5, posinf=7e5, neginf=-7e5) for z in (a, b))
        far = float((x - y).abs().max()) / max(1.0, float(x.abs().max())) if x.shape == y.shape and x.numel() else 0.0
        if x.shape != y.shape or far > limit:
            out[name] = far if x.shape == y.shape else (x.shape, y.shape)
    return out


# Two processes, which fork from this one, so that torch is imported already.

Task = Callable[[Path, int], Any]


def in_two(task: Task, folder: Path) -> list[Any]:
    """What a task returns in each of two processes that share a model out; a failure is raised here, with its trace."""
    children = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            _child(task, folder, rank)
        children.append(pid)
    until = time.monotonic() + 300
    for pid in children:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until or list(folder.glob("failed-*")):  # the other would wait for it
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                break
            time.sleep(0.02)
    failed = [file.read_text() for file in sorted(folder.glob("failed-*"))]
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in (0, 1)]


def _child(task: Task, folder: Path, rank: int) -> None:
    from torch import distributed

    try:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
        torch.save(task(folder, rank), folder / f"result-{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(0)
