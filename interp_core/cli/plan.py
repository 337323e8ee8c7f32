"""`interp plan`: what a method or a recipe would cost, on devices that need not be here, by a model's config alone.

Settings are written as for `interp run`; those that are called like an option of this command are reached by `--set`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import settings
from ..columns import terminal_width, wrapped
from ..errors import PlanError
from ..plugins import Plugin
from . import flags
from .run import completed, runnable

if TYPE_CHECKING:
    from ..planning import Outline, Rate

PANEL_WORK, PANEL_MACHINE = "What runs", "Where"


def _where(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=PANEL_MACHINE)


Visual = Annotated[int, typer.Option(help="of these, tokens of an image, before the text", rich_help_panel=PANEL_WORK)]
Shared = Annotated[int, _where("processes that share a copy of the model, as ic.load(…, tp_plan='auto')")]
Rated = Annotated[float | None, _where("a rate of yours, as it is")]
Measured = Annotated[str | None, _where("a model that is here: the rate of its pass")]
Dtype = Annotated[str | None, _where("of weights and activations (its config's)")]
Attention = Annotated[str | None, _where("sdpa or eager (what transformers takes)")]


def plan(
    name: Annotated[
        str, typer.Argument(help="a method or a recipe, as `interp run` takes it", autocompletion=completed)
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="--SETTING VALUE", help="settings: `interp run NAME --help`")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="setting=value, as often as needed")] = None,
    model: Annotated[
        str, typer.Option(help="a config.json, a folder with one, a hub id, or a toy", rich_help_panel=PANEL_WORK)
    ] = "toy:text",
    prompts: Annotated[int, typer.Option(help="how many", rich_help_panel=PANEL_WORK)] = 1,
    tokens: Annotated[int, typer.Option(help="of a prompt, with its target", rich_help_panel=PANEL_WORK)] = 128,
    target: Annotated[
        int, typer.Option(help="of these, the last that are explained or scored", rich_help_panel=PANEL_WORK)
    ] = 0,
    visual: Visual = 0,
    new_tokens: Annotated[int, typer.Option(help="generated for each", rich_help_panel=PANEL_WORK)] = 0,
    batch: Annotated[int, typer.Option(help="prompts that run together", rich_help_panel=PANEL_WORK)] = 1,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file of settings; flags win over it")] = None,
    kind: Annotated[str | None, typer.Option(help="methods or recipes, where both have the name")] = None,
    gpus: Annotated[int, typer.Option(help="devices", rich_help_panel=PANEL_MACHINE)] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help="of each, as 80GB or 40GiB", rich_help_panel=PANEL_MACHINE)
    ] = None,
    tp: Shared = 1,
    device: Annotated[
        str | None, typer.Option(help="A100, H100 or H200: its rate, and its memory", rich_help_panel=PANEL_MACHINE)
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="share of its peak that is reached (.4)", rich_help_panel=PANEL_MACHINE)
    ] = None,
    flops_per_second: Rated = None,
    measured: Measured = None,
    dtype: Dtype = None,
    attention: Attention = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Price a run without running it: operations, bytes, memory, devices, time. The model may be a config alone."""
    plugin = runnable(name, kind)
    ready = _ready(plugin, list(words or []), assignments, model, config)
    from .. import planning
    from ..planning.devices import bytes_of
    from ..planning.page import page

    memory = None if gpu_memory is None else bytes_of(gpu_memory, "--gpu-memory")
    rate = _rate(device, utilisation, flops_per_second, measured, tokens)
    outline: Outline = planning.outline_of(model, dtype=dtype, attention=attention, tp=tp)
    batch = min(batch, max(prompts, 1))
    work = outline.work(prompts, tokens, target=target, visual=visual, new_tokens=new_tokens, batch=batch)
    memory = rate.memory if memory is None and rate is not None else memory
    told = planning.plan(plugin.name, outline, work, ready.cost, gpus=gpus, gpu_memory=memory, rate=rate)
    if as_json:
        print(json.dumps(told.to_dict(), indent=1))
    else:
        print(wrapped(page(told), terminal_width(), " " * 14))


def _ready(plugin: Plugin, words: list[str], assignments: list[str] | None, model: str, file: Path | None) -> Any:
    """The settings of what is planned, checked as a run checks them."""
    value = plugin.load()
    kind, owner = (value.Config, plugin.name) if plugin.kind == "methods" else (
        settings.of_function(value), f"recipe {plugin.name}"
    )  # fmt: skip
    held = {} if file is None else flags.read_file(file, owner, list(kind.model_fields))
    values = held | settings.read(owner, kind, flags.pairs(owner, kind, words, assignments))
    for key in ("model", "model_path"):
        if key in kind.model_fields:
            values.setdefault(key, model)
    return settings.configured(owner, kind, values)


def _rate(
    device: str | None, utilisation: float | None, flops_per_second: float | None, measured: str | None, tokens: int
) -> Rate | None:
    """How fast devices are, by the one of three ways that was taken."""
    ways = {"--device": device, "--flops-per-second": flops_per_second, "--measured": measured}
    taken = [way for way, said in ways.items() if said is not None]
    if len(taken) > 1:
        raise PlanError(f"{' and '.join(taken)} both say how fast a device is; leave one out")
    if utilisation is not None and device is None:
        raise PlanError("--utilisation is a share of a device's peak: it goes with --device")
    from ..planning import devices

    if measured is not None:
        return _measured(measured, tokens)
    if flops_per_second is not None:
        if not 0 < flops_per_second < float("inf"):
            raise PlanError(f"--flops-per-second is {flops_per_second}: give a finite number above 0, as 4e14")
        return devices.Rate("as given", flops_per_second)
    return (
        None
        if device is None
        else devices.named_rate(device, devices.UTILISATION if utilisation is None else utilisation)
    )


def _measured(source: str, tokens: int) -> Rate:
    """The rate of a pass of a model that is here, of as many tokens as it takes of those of the plan."""
    from ..model import load
    from ..planning import outline_of
    from ..planning.devices import measured_rate
    from ..planning.formulas import flops

    loaded = load(source)
    sizes = outline_of(loaded.hf)
    length = min(tokens, sizes.n_ctx or tokens)
    (passes,) = sizes.work(1, length).forward(read_out=length).passes
    return measured_rate(loaded, flops(sizes, passes).total, length)
