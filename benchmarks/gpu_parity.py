"""How exact interp_core is on a device, family by family; a part of `benchmarks/gpu.py`.

Two limits are used. `by hand`: the same operations on the same device,
`interp_core.batteries.sites.TOLERANCE` of the largest
value. `rounding`: the same number by other shapes or on another device, `GROWTH` roundings of float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core.batteries.sites import TOLERANCE
from interp_core.sites import SITES, Site

GROWTH = 256
"""Roundings between two ways to one number, relative to the largest value: sums in another order differ by about the
square root of their terms, operations that lie one behind the other add up by theirs, attention and gates sharpen."""
LIMIT = GROWTH * torch.finfo(torch.float32).eps
SAME = ("embed", "resid_pre", "resid_post", "q", "v", "z", "attn_out", "mlp_out", "final_norm", "logits")
"""Sites at which hooks by hand carry out the very operations of the model, whatever its attention is."""
IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])


def first_line(error: BaseException) -> str:
    """An error's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def plain(x: Any) -> Tensor:
    """As float64 on the CPU; scores that a mask hides at the least float32 value."""
    return x.detach().as_subclass(Tensor).cpu().double().clamp(min=torch.finfo(torch.bfloat16).min / 2)


def apart(found: Any, wanted: Any) -> float:
    """Largest difference over the largest value (at least one), hidden scores left out; inf where one is no number."""
    a, b = plain(found), plain(wanted)
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    seen = b.abs() < 1e30
    return float((a - b)[seen].abs().max() / b[seen].abs().max().clamp(min=1)) if bool(seen.any()) else 0.0


def parity(bench: Any) -> None:
    """Every tiny family: reads and edits against hooks by hand on the device, and against float64 on the CPU."""
    for done, family in enumerate(bench.families):
        if bench.late:
            return bench.over(f"after {done} of {len(bench.families)} families")
        cells, holds, count = on_device(bench, family)
        far, numbers = against_float64(bench, family)
        cells.append(f"float64 on the CPU {far:.0e} (limit {LIMIT:.0e})")
        bench.hold(f"{family}: {', '.join(cells)}", holds and far <= LIMIT, count + numbers)


def on_device(bench: Any, family: str) -> tuple[list[str], bool, int]:
    """What is said of each dtype and attention, whether all of it holds, and how many values were compared."""
    cells: list[str] = []
    holds, count = True, 0
    for dtype, attention in itertools.product((torch.float32, torch.bfloat16), ("eager", "sdpa", "flash_attention_2")):
        if attention.startswith("flash") and (dtype == torch.float32 or not flash(bench)):
            continue
        label = f"{str(dtype)[6:]} {attention}"
        try:
            worst, sites = by_hand(bench, family, dtype, attention)
        except Exception as error:  # one way that fails leaves the others
            holds = False
            cells.append(f"{label} {type(error).__name__}: {first_line(error)}")
            continue
        if worst is None:
            cells.append(f"{label} cannot be had")
            continue
        holds, count = holds and worst <= TOLERANCE[dtype], count + sites
        cells.append(f"{label} {worst:.0e} at {sites}")
    return cells, holds, count


def flash(bench: Any) -> bool:
    """Whether flash attention can be had."""
    return bench.cuda and bool(transformers.utils.is_flash_attn_2_available())


def by_hand(bench: Any, family: str, dtype: torch.dtype, attention: str) -> tuple[float | None, int]:
    """Largest relative difference of reads and edits to hooks by hand, and how many sites were compared in their first
    and last layer; None if the model has no such attention. A run without edits must be the model's, to the bit if it
    repeats itself."""
    from reference import Reference  # imports models that other parts do without

    hf, inputs = ic.testing.tiny(family, dtype=dtype).to(bench.device), {"input_ids": IDS.to(bench.device)}
    try:
        hf.set_attn_implementation(attention)
        with torch.no_grad():
            wanted, again = (hf(**inputs, use_cache=False).logits for _ in range(2))
    except (ValueError, ImportError, RuntimeError):  # the model itself has no such attention, or not for its shapes
        return None, 0
    model, reference = ic.load(hf), Reference(family, hf)
    got = model.run(IDS).logits.as_subclass(Tensor)
    repeats = torch.equal(wanted, again)  # kernels that add atomically do not
    worst, count = float("inf") if repeats and not torch.equal(got, wanted) else apart(got, wanted), 1
    everything = dtype == torch.float32 and attention == "eager"
    exact = SAME if reference.scale == 1 else [name for name in SAME if not name.endswith("_out")]
    for name in reference.sites():
        if (everything or (name in exact and not opens(model, name))) and not model.can(name, "read"):
            layers = reference.layers(name)
            for layer in sorted({layers[0], layers[-1]}):
                worst, count = max(worst, cell(model, reference, name, layer, inputs)), count + 1
    return worst, count


def opens(model: ic.Model, name: str) -> bool:
    """Whether a site lies inside attention (`v` of multi-head latent attention), where ours stands in for a kernel."""
    entries = [model.atlas.entries[name, layer] for layer in model.atlas.layers(name)]
    return any(entry.read is not None and entry.read.side == "attention" for entry in entries)


def cell(model: ic.Model, reference: Any, name: str, layer: int, inputs: dict[str, Tensor]) -> float:
    """One site in one layer, read and (where it can be) edited."""
    site = Site(name, layer if SITES[name].layered else None)
    wanted = reference.value(name, layer, inputs)
    worst = apart(model.run(IDS, read=site)[site], wanted)
    if model.can(name, "write"):
        return worst
    if name == "router_weights":
        edit, change = site.at(-2).scale(0.5), lambda x: changed(x, (slice(None), -2), lambda part: part * 0.5)
    else:
        inside = "query" in SITES[name].axes
        noise = torch.linspace(-1, 1, wanted.shape[1 if inside else -1]).to(wanted)
        edit = site.at(query=-1, key=-2).add(noise) if inside else site.at(-2).add(noise)
        index = (slice(None), slice(None), -1, -2) if inside else (slice(None), -2)
        change = lambda x: changed(x, index, lambda part: part + noise)  # noqa: E731
    return max(worst, apart(model.run(IDS, edits=edit).logits, reference.logits(name, layer, inputs, change)))


def changed(x: Tensor, index: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy with one part changed."""
    x = x.clone()
    x[index] = change(x[index])
    return x


def against_float64(bench: Any, family: str) -> tuple[float, int]:
    """The device in float32 against the CPU in float64: the stream, and logits after an edit in the first layer."""
    found = []
    for device, dtype in ((bench.device, torch.float32), (torch.device("cpu"), torch.float64)):
        model = ic.load(ic.testing.tiny(family, dtype=dtype).to(device))
        vector = torch.linspace(-1, 1, model.atlas.shape.d_model, dtype=dtype)
        run = model.run(IDS, read=S.resid_post, edits=S.resid_post[0].at(-2).add(vector))
        found.append([run[S.resid_post], run.logits])
    return max(apart(a, b) for a, b in zip(*found, strict=True)), len(found[0])


def knockout(bench: Any) -> None:
    """A knockout at the last query of a long text against a plain pass and against all of the attention opened."""
    model, n_tokens = bench.large, 48 if bench.small else 4096
    ids, keys = bench.ids(n_tokens).to(bench.device), slice(-20, -10)
    few = S.pattern[1].knockout(query=-1, key=keys)
    most = S.pattern[1].knockout(query=slice(n_tokens // 4, None), key=slice(2, 12))

    def run(*edits: ic.Edit) -> ic.Run:
        return model.run(ids, edits=edits, logits=-1, allow_noop=True)

    found, whole = run(few), run(few, S.pattern[1].at(query=slice(1, None)).scale(1.0))
    off = apart(found.logits, whole.logits)
    bench.hold(f"logits differ by {off:.0e} from attention opened whole", off <= TOLERANCE[model.dtype])
    shown = []
    for what, edits in (("plain", ()), ("one query", (few,)), ("most queries", (most,))):
        run(*edits)
        taken = min(bench.milliseconds(lambda: run(*edits)) for _ in range(3))  # noqa: B023
        peak = f", {bench.peak(lambda: run(*edits))[0] / 2**20:,.0f} MiB" if bench.cuda else ""  # noqa: B023
        shown.append(f"{what} {taken:.1f} ms{peak}")
    bench.say(f"{model!r}, {n_tokens} tokens: {'; '.join(shown)}")
