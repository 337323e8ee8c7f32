"""What hooks cost: the same reads and edits by interp_core, by hand, and by tools that are handed in, in one process.

Times are process CPU time, interleaved in random order, each after an untimed call of the same, medians over rounds.
Python calls are counted by cProfile: they do not depend on the machine or on what else it does. Memory is what the
result holds.
"""

from __future__ import annotations

import cProfile
import gc
import importlib
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PlanError, first_line
from ..methods import method
from ..plugins import registry
from ..progress import Progress, stopping
from .tools import TOOLS, Tool, ready

if TYPE_CHECKING:
    from ..model import Model

OPERATIONS = {
    "plain": "forward pass without hooks",
    "resid": "read the residual stream of every layer",
    "z": "read all heads' z",
    "pattern": "read all attention patterns",
    "ablate": "zero one head",
    "patch": "replace one position of the stream",
    "cache": "read everything the tool calls a cache",
    "generate": "32 tokens, a vector added at every step",
}


@dataclass(frozen=True)
class Row:
    """One tool at one operation.

    Attributes:
        seconds: median CPU time.
        ratio: to the plain forward pass (for `generate`, to the plain model's own generation).
        calls: Python calls added to it.
        held: bytes that the result keeps alive.
        noise: how far the times lie apart; see `_noise`.
    """

    operation: str
    tool: str
    seconds: float
    ratio: float
    calls: int
    held: int
    noise: float = 0.0


NOISY = 0.1
"""Half the distance between the quartiles of a bare pass's times, over their median, from which a table says so."""


def benchmark(model: Model, *, rounds: int = 20, n_tokens: int = 32, **options: Any) -> str:
    """The table of `measure`, which says what `options` there are, as Markdown."""
    rows, failed = measure(model, rounds=rounds, n_tokens=n_tokens, **options)
    head = f"{model!r}, {n_tokens} tokens, {torch.get_num_threads()} threads, medians of {rounds} rounds of CPU time"
    lines = [head, "", "| operation | tool | ms | ratio to plain | added µs | Python calls added | held MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    plain = {row.operation: row.seconds / row.ratio for row in rows}
    for row in rows:
        added = (row.seconds - plain[row.operation]) * 1e6
        lines.append(
            f"| {OPERATIONS.get(row.operation, row.operation)} | {row.tool} | {row.seconds * 1e3:.2f} "
            f"| {row.ratio:.3f} | {added:+.0f} | {row.calls:+d} | {row.held / 2**20:.2f} |"
        )
    if (noise := max((row.noise for row in rows if row.tool == "bare"), default=0.0)) > NOISY:
        lines += [
            "",
            f"This machine was busy: the bare pass itself varied by ±{noise:.0%} from round to round, so that smaller "
            "differences say nothing. Run it again when the machine is idle, or with more --rounds.",
        ]
    lines += [""] + [f"{tool} cannot {OPERATIONS.get(operation, operation)}: {why}" for operation, tool, why in failed]
    return "\n".join(lines).rstrip()


def measure(
    model: Model,
    *,
    rounds: int = 20,
    n_tokens: int = 32,
    extra: Sequence[str] = (),
    operations: Sequence[str] = tuple(OPERATIONS),
    only: Sequence[str] | None = None,
    tools: Mapping[str, Callable[[Model, Tensor], Tool]] = TOOLS,
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """Time every operation of every tool; also returns what a tool could not do, `(operation, tool, error)`.

    Args:
        extra: `module:function` of your own, which takes the model and token ids and returns the function to be
            timed; or the name of an installed method.
        only: names of the tools to take (default: all).
        tools: what makes each tool ready for a model and token ids (default: the model as it is, hooks by hand and
            interp_core; `benchmarks/peers.py` of the repository has other packages' too).

    Raises:
        PlanError: an operation, tool or function that does not exist.
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise PlanError(f"no operation {unknown.pop()!r}; there are {', '.join(OPERATIONS)}")
    size = model.atlas.shape.n_ids
    ids = torch.randint(3, size, (1, n_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for operation in operations:
        for name, tool in ready(tools, model, ids, only).items():
            if function := getattr(tool, operation, None):
                runs[operation, name] = function
    for path in extra:
        runs[path, path.rpartition(":")[2]] = _function(path)(model, ids)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order = random.Random(0)
    progress = Progress("rounds", rounds)
    with stopping(lambda: f"{progress.count} of {rounds} rounds were timed"), torch.no_grad(), progress:
        calls, held, failed = _first(runs)
        for _ in range(rounds):
            gc.collect()  # between rounds, so that it falls on nobody
            keys = list(runs)
            order.shuffle(keys)
            for key in keys:
                runs[key]()  # so that the caches are warm with its own work, not with the last tool's
                times[key].append(_seconds(runs[key], model.device))
            progress.add()
    return _rows(runs, times, calls, held), failed


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """CPU time of one call, the device's work included."""
    began = time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - began


def _first(
    runs: dict[tuple[str, str], Callable[[], Any]],
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int], list[tuple[str, str, str]]]:
    """Warm-up: calls and held bytes of each, and those that fail, which are taken out of `runs`."""
    calls, held, failed = {}, {}, []
    for key, run in list(runs.items()):
        try:
            calls[key], held[key] = count_calls(run), _held(run())
        except Exception as error:  # another tool's failure is a line in the table
            if key[1] == "interp_core":
                raise
            del runs[key]
            failed.append((*key, f"{type(error).__name__}: {first_line(error)[:120]}"))
    return calls, held, failed


def _rows(
    runs: dict[tuple[str, str], Any],
    times: dict[tuple[str, str], list[float]],
    calls: dict[tuple[str, str], int],
    held: dict[tuple[str, str], int],
) -> list[Row]:
    """Medians; what each operation is compared to is the bare model's own way of doing without hooks."""
    rows = []
    for key in runs:
        base = ("generate", "bare") if key[0] == "generate" else ("plain", "bare")
        seconds = statistics.median(times[key])
        ratio = seconds / statistics.median(times[base]) if base in times else 1.0
        rows.append(Row(*key, seconds, ratio, calls[key] - calls.get(base, 0), held[key], _noise(times[key])))
    return rows


def _noise(seconds: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median; 0 of fewer than four."""
    if len(seconds) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2 / middle


def count_calls(run: Callable[[], Any]) -> int:
    """Python function calls of one call, counted after two warm-up calls."""
    run()
    run()
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


def _held(result: Any) -> int:
    """Bytes of all tensors in a result, each storage once."""
    seen: dict[int, int] = {}
    todo = [result]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
    return sum(seen.values())


def _function(path: str) -> Callable[..., Callable[[], Any]]:
    module, _, name = path.partition(":")
    if path in registry("methods"):
        return lambda model, ids: partial(method(path), model, ids.cpu())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"--extra {path}: {error}; give module:function, importable from here, or a method") from error
