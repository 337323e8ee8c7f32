"""Everything on a CUDA device, in at most 8 minutes: python benchmarks/gpu.py [--out FILE]

It needs torch, transformers, safetensors, einops, jaxtyping and pydantic beside this package, which may lie uninstalled
in a clone. Without a device: `--device cpu --small`, which takes seconds and shows that the script works.

Each part has its share of the time. One that fails prints its error, and the next goes on; one whose time is over says
how far it came. The last line counts what was compared and what failed; the exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import copy
import gc
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

from gpu_parity import IDS, LIMIT, apart, changed, first_line, knockout, parity, plain  # noqa: E402

import interp_core as ic  # noqa: E402
from interp_core import sites as S  # noqa: E402
from interp_core.batteries.sites import TOLERANCE  # noqa: E402
from interp_core.bench.tools import Bare, ByHand, Ours  # noqa: E402

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
LAYERS, VOCAB = 32, 32000
NO_DEVICE = "no device"
SYNCS = {"plain": 2, "resid": 2, "z": 2, "ablate": 3, "patch": 3}
"""Synchronisations of a run that are needed: ids and mask go to the device, a receipt's norm comes back."""


class Overtime(BaseException):
    """A part's time is over."""


class Bench:
    """What the parts share: the device, sizes, and what was found.

    Attributes:
        lines: what was printed, as (part, text).
        short: parts that did not come to their end.
        compared, failed: how many comparisons were made, and how many did not hold.
    """

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small
        self.cuda, self.part, self.until = self.device.type == "cuda", "", 0.0
        self.lines: list[tuple[str, str]] = []
        self.short: list[str] = []
        self.compared: dict[str, int] = {}
        self.failed: dict[str, int] = {}
        self.families = ["gpt2", "qwen3_moe"] if small else ic.testing.families()

    def say(self, text: str) -> None:
        """A line of the part that runs."""
        self.lines.append((self.part, text))
        print(f"  {text}", flush=True)

    def hold(self, what: str, holds: bool, count: int = 1) -> None:
        """So many comparisons were made, and hold or do not."""
        self.compared[self.part] += count
        self.failed[self.part] += not holds
        self.say(f"{'ok  ' if holds else 'FAIL'} {what}")

    def over(self, text: str) -> None:
        """The part's time is over: say how far it came."""
        self.say(f"time is over {text}")
        self.short.append(self.part)

    @property
    def late(self) -> bool:
        """Whether nothing more should be begun in this part."""
        return time.monotonic() > self.until

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, the device's work included, and its result."""
        self.sync()
        start = time.perf_counter()
        result = function()
        self.sync()
        return time.perf_counter() - start, result

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Time between two events around a call; of the clock where there is no device."""
        if not self.cuda:
            return self.timed(call)[0] * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def peak(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """Bytes at the peak of a call over what was there before, and its result."""
        self.sync()
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        self.sync()
        return torch.cuda.max_memory_allocated(self.device) - before, result

    def free(self) -> int:
        """Bytes that are free on the device (on a CPU: as if 1 GiB were)."""
        gc.collect()
        if not self.cuda:
            return 2**30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def llama(self, n_layers: int, dtype: torch.dtype) -> Any:
        """A model of random weights, made on the device."""
        shape, vocab = (SMALL, 96) if self.small else (SHAPE, VOCAB)
        shape = {**shape, "vocab_size": vocab, "max_position_embeddings": 8192}
        config = transformers.LlamaConfig(num_hidden_layers=n_layers, eos_token_id=2, **shape)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def large(self) -> ic.Model:
        """The model at 7B's shapes in bfloat16, with as many layers as fit a third of the memory."""
        per_layer = 2 * (4 * SHAPE["hidden_size"] ** 2 + 3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"])
        layers = 3 if self.small else max(2, min(LAYERS, self.free() // 3 // per_layer))
        return ic.load(self.llama(layers, torch.bfloat16))

    def ids(self, n_tokens: int, rows: int = 1) -> Tensor:
        """A text of random tokens, on the CPU."""
        size = 96 if self.small else VOCAB
        return torch.randint(3, size, (rows, n_tokens), generator=torch.Generator().manual_seed(1))


# Sweeps


def heads(model: ic.Model) -> list[ic.Edit]:
    """Every head silenced at the last token."""
    return [S.z[layer, head].at(-1).zero() for layer, head in model.heads]


def sweeps(bench: Bench) -> None:
    """Sweeps equal one full pass per variant; and how much faster they are at 7B's shapes."""
    rough = bench.llama(3 if bench.small else 4, torch.bfloat16)
    fine = ic.load(copy.deepcopy(rough).float())
    model, ids, judged = ic.load(rough), bench.ids(12 if bench.small else 96, 2), ic.score.logit_diff(5, 9)
    stream = torch.randn(model.atlas.shape.d_model, generator=torch.Generator().manual_seed(2))
    places = [(layer, pos) for layer in range(model.n_layers) for pos in (0, 3, -2)]

    def variants(of: ic.Model) -> list[ic.Edit]:
        return [*heads(of), *(S.resid_pre[layer].at(pos).set(stream.to(of.dtype)) for layer, pos in places)]

    truth = fine.sweep(ids, variants(fine), judged, strategy="full").values
    for strategy in ("staircase", "restart", "prefix", "batched"):
        off = apart(fine.sweep(ids, variants(fine), judged, strategy=strategy).values, truth)
        bench.hold(f"float32 {strategy} against full: {off:.1e} (limit {LIMIT:.0e})", off <= LIMIT, truth.numel())
    full, swept = (model.sweep(ids, variants(model), judged, strategy=kind) for kind in ("full", "auto"))
    errors = [float((plain(study.values) - plain(truth)).pow(2).mean().sqrt()) for study in (full, swept)]
    what = f"bfloat16 {swept.plan.strategy}: off float32 by {errors[1]:.1e} (rms), full passes by {errors[0]:.1e}"
    bench.hold(f"{what} (limit twice that)", errors[1] <= 2 * errors[0], truth.numel())
    del rough, fine, model
    for n_tokens in (16,) if bench.small else (128, 512):
        if bench.late:
            return bench.over(f"before {n_tokens} tokens")
        ratio(bench, n_tokens)


def ratio(bench: Bench, n_tokens: int) -> None:
    """A sweep over all heads of the large model against a loop with hooks by hand, which a part is timed on."""
    model, ids, judged = bench.large, bench.ids(n_tokens), ic.score.logit_diff(5, 9)
    variants = heads(model)
    cold, swept = bench.timed(lambda: model.sweep(ids, variants, judged))
    warm = statistics.median(bench.timed(lambda: model.sweep(ids, variants, judged))[0] for _ in range(2))
    chosen = list(range(0, len(variants), max(1, len(variants) // 16)))
    loop_by_hand(model, ids, chosen[:1])
    seconds, values = bench.timed(lambda: loop_by_hand(model, ids, chosen))
    full = model.sweep(ids, [variants[i] for i in chosen], judged, strategy="full").values[:, 0]
    off = apart(values, full)
    bench.hold(f"loop by hand against full passes: {off:.1e}", off <= TOLERANCE[torch.bfloat16], len(chosen))
    noise = apart(swept.values[chosen, 0], full)
    bench.say(f"the sweep against full passes in bfloat16: {noise:.1e} (rounding; held above in float32)")
    loop, memory = seconds / len(chosen) * len(variants), swept.plan.explain().splitlines()
    bench.say(
        f"{model!r}, {n_tokens} tokens, {len(variants)} heads: loop {loop:.2f} s, first sweep {cold:.2f} s "
        f"({loop / cold:.1f}×), later {warm:.2f} s ({loop / warm:.1f}×)"
    )
    bench.say("; ".join(" ".join(line.split()) for line in memory))


def loop_by_hand(model: ic.Model, ids: Tensor, numbers: list[int]) -> Tensor:
    """One full pass per variant, with a hook that silences the head."""
    hf, differences = model.hf, []
    n_heads, width, on_device = hf.config.num_attention_heads, hf.config.head_dim, ids.to(model.device)
    for number in numbers:
        layer, head = divmod(number, n_heads)

        def hook(_: nn.Module, args: tuple[Tensor, ...], head: int = head) -> tuple[Tensor, ...]:
            return (changed(args[0], (slice(None), -1, slice(head * width, (head + 1) * width)), torch.zeros_like),)

        handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = hf(on_device, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        handle.remove()
        differences.append(logits[5] - logits[9])
    return torch.stack(differences)


# Overhead


def overhead(bench: Bench) -> None:
    """Reads and edits against a plain pass and hooks by hand, by CUDA events, of a small and the large model."""
    small = ic.load(ic.testing.tiny("llama").to(bench.device))
    for name, model, n_tokens in (("tiny", small, 8), ("large", bench.large, 16 if bench.small else 512)):
        ids = bench.ids(n_tokens).clamp(max=95).to(bench.device)
        tools = {"bare": Bare(model, ids), "by hand": ByHand(model, ids), "ours": Ours(model, ids)}
        bench.say(f"{name}: {model!r}, {n_tokens} tokens; ms, bare pass | by hand | interp_core (to by hand)")
        for operation in ("plain", "resid", "z", "ablate", "patch", "generate"):
            if bench.late:
                return bench.over(f"before {name} {operation}")
            compare(bench, operation, tools)


def compare(bench: Bench, operation: str, tools: dict[str, Any]) -> None:
    """One operation of each tool in turn: the same result, and the medians of their times."""
    base = "generate" if operation == "generate" else "plain"
    calls = {name: getattr(tool, base if name == "bare" else operation, None) for name, tool in tools.items()}
    calls = {name: call for name, call in calls.items() if call is not None}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        results = {name: call() for name, call in calls.items()}  # and warm
        for _ in range(2 if bench.small or operation == "generate" else 20):
            for name, call in calls.items():
                times[name].append(bench.milliseconds(call))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    other = "by hand" if "by hand" in results else "bare"
    logits = [(x[0] if isinstance(x, tuple) else x) for x in (results["ours"], results[other])]
    new = min(x.shape[1] for x in logits)  # ours are the new tokens alone
    off = apart(*(x[:, -new:] for x in logits))
    shown = " | ".join(f"{medians[name]:.3f}" if name in medians else "-" for name in tools)
    what = f"{operation}: {shown} ({medians['ours'] / medians[other]:.3f}), differ by {off:.0e}"
    bench.hold(what, off <= TOLERANCE[tools["ours"].model.dtype])


def synchronisations(bench: Bench) -> None:
    """How often a run waits for the device, beyond what a plain pass or a hook by hand does."""
    if not bench.cuda:
        return bench.say(NO_DEVICE)
    model = ic.load(ic.testing.tiny("llama").to(bench.device))
    ids = IDS[:1].to(bench.device)
    hand, ours, bare = ByHand(model, ids), Ours(model, ids), Bare(model, ids)
    for operation, needed in SYNCS.items():
        by_hand = waits(getattr(bare if operation == "plain" else hand, operation))
        where = waits(getattr(ours, operation))
        what = f"{operation}: {len(where)}, by hand {len(by_hand)}; {needed} more may be needed"
        bench.hold(f"{what} ({', '.join(sorted(set(where))) or 'none'})", len(where) <= len(by_hand) + needed)


def waits(call: Callable[[], Any]) -> list[str]:
    """Where a call waits for the device, as file:line, after two that are not counted."""
    with torch.no_grad():
        call(), call()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]


def memory(bench: Bench) -> None:
    """Peak memory of sweeps against what their plan says, and of reads against what they hold."""
    if not bench.cuda:
        return bench.say(NO_DEVICE)
    model, ids, judged = bench.large, bench.ids(512), ic.score.logit_diff(5, 9)
    variants, config = heads(model), model.hf.config
    model.sweep(ids, variants[:2], judged)
    kept = 512 * model.n_layers * 2 * (config.hidden_size + 2 * config.num_key_value_heads * config.head_dim)
    for budget in (2**29, 2**31, None):
        peak, swept = bench.peak(lambda: model.sweep(ids, variants, judged, memory_budget=budget))  # noqa: B023
        rows = max(len(batch.steps) for batch in swept.plan.passes)
        promise = rows * swept.plan.row_bytes + kept
        sizes = f"peak {peak / 2**20:,.0f} MiB, promised {promise / 2**20:,.0f} MiB, {kept / 2**20:,.0f} of it shared"
        bench.hold(f"sweep with memory_budget={budget}: {rows} rows, {sizes}", peak <= promise)
    bare, _ = bench.peak(lambda: model.run(ids, logits=-1))
    peak, run = bench.peak(lambda: model.run(ids, read=S.resid_post, logits=-1))
    held = sum(run[S.resid_post[layer]].nbytes for layer in range(model.n_layers))
    sizes = f"{(peak - bare) / 2**20:,.0f} MiB over a plain pass, what is read takes {held / 2**20:,.0f} MiB"
    bench.hold(f"stream of every layer read: {sizes}", peak - bare <= 1.05 * held)


# Streams, compiled layers, generation


def streams(bench: Bench) -> None:
    """Runs on a stream beside the usual one, and of threads with a stream each, equal those on the usual one."""
    model = ic.load(ic.testing.tiny("qwen3").to(bench.device))
    edits = [S.z[1, 2].at(-1).zero(), S.resid_post[0].at(-2).scale(2.0)]

    def run() -> list[Tensor]:
        edited = model.run(IDS, read=S.resid_post, edits=edits)
        return [edited.logits.as_subclass(Tensor), edited[S.resid_post].as_subclass(Tensor)]

    def aside() -> list[Tensor]:
        stream = torch.cuda.Stream(bench.device) if bench.cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(bench.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            values = [x.cpu() for x in run()]
        return values

    wanted = [x.cpu() for x in run()]
    off = max(map(apart, aside(), wanted))
    what = "a stream of its own" if bench.cuda else f"the usual stream ({NO_DEVICE})"
    bench.hold(f"one run on {what}: {off:.0e}", off <= LIMIT)
    threaded: list[list[Tensor]] = []
    threads = [threading.Thread(target=lambda: threaded.extend(aside() for _ in range(8))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    off = max((apart(a, b) for values in threaded for a, b in zip(values, wanted, strict=True)), default=float("inf"))
    bench.hold(f"{len(threaded)} runs of 3 threads: {off:.0e}", off <= LIMIT and len(threaded) == 24, len(threaded))


def compiled(bench: Bench) -> None:
    """Modules compiled in place run as written for the length of a run; one in a module's place is refused."""
    ways: dict[str, Callable[[Any], Any]] = {
        "torch.compile(model)": torch.compile,
        "torch.compile(layer)": lambda hf: hf.model.layers.__setitem__(1, torch.compile(hf.model.layers[1])),
        "model.compile()": lambda hf: hf.compile(),
        "layer.compile()": lambda hf: hf.model.layers[1].compile(),
        "forward = torch.compile(forward)": lambda hf: setattr(hf, "forward", torch.compile(hf.forward)),
    }
    ids = torch.arange(3, 11, device=bench.device)[None]
    wanted = ic.load(ic.testing.tiny("llama").to(bench.device)).run(ids, read=S.mlp_act[1])[S.mlp_act[1]].plain
    for way, make in ways.items():
        hf = ic.testing.tiny("llama").to(bench.device)
        module = make(hf)
        try:
            model = ic.load(module if isinstance(module, nn.Module) else hf)
        except ic.LoadError as error:
            bench.hold(f"{way} is refused: {first_line(error)}", "_orig_mod" in str(error))
        else:
            seen = model.run(ids, read=S.mlp_act[1])[S.mlp_act[1]].plain
            bench.hold(f"{way} runs as written", torch.equal(seen, wanted))


def generation(bench: Bench) -> None:
    """Greedy tokens with an edit at every step equal those of the CPU in float32; where they part, logits are tied."""
    new = 8 if bench.small else 16
    for done, family in enumerate(bench.families):
        if bench.late:
            return bench.over(f"after {done} of {len(bench.families)} families")
        generated, models = [], []
        for device in (bench.device, torch.device("cpu")):
            model = ic.load(ic.testing.tiny(family).to(device))
            edit = S.resid_post[0].add(torch.linspace(-1, 1, model.atlas.shape.d_model))
            generated.append(model.generate(IDS, edits=edit, max_new_tokens=new, stop_at_eos=False).ids)
            models.append((model, edit))
        same, slack = agreeing(*generated, *models[1])
        bench.hold(f"{family}: {same} of {2 * new} tokens, tie within {slack:.0e}", same > 0 and slack <= LIMIT, same)


def agreeing(on_device: Tensor, wanted: Tensor, model: ic.Model, edit: ic.Edit) -> tuple[int, float]:
    """How many new tokens are the same until rows part, and how far the logits lie apart where they do."""
    same, slack = 0, 0.0
    for row, (row_ids, other) in enumerate(zip(on_device, wanted, strict=True)):
        differ = (row_ids != other).nonzero()
        step = int(differ[0]) if len(differ) else len(other)
        same += step
        if len(differ):
            text = torch.cat([IDS[row], other[:step]])
            logits = plain(model.run(text[None], edits=edit).logits[0, -1])
            slack = max(slack, float((logits[row_ids[step]] - logits[other[step]]).abs() / logits.abs().max()))
    return same, slack


# The whole


def environment(bench: Bench) -> None:
    """What this ran on."""
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else f"{NO_DEVICE}, CPU"
    bench.say(f"card {name}, {bench.free() / 2**30:.0f} GiB free")
    bench.say(f"torch {torch.__version__} (CUDA {torch.version.cuda}), transformers {transformers.__version__}")
    bench.say(f"Python {sys.version.split()[0]}")
    heavy = [name for name in ("nnsight", "transformer_lens", "pandas", "datasets") if name in sys.modules]
    bench.hold(f"nothing more was imported{': ' + ', '.join(heavy) if heavy else ''}", not heavy)


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "parity": (parity, 0.33), "sweeps": (sweeps, 0.2), "overhead": (overhead, 0.11), "knockout": (knockout, 0.04),
    "synchronisations": (synchronisations, 0.03), "memory": (memory, 0.08), "streams": (streams, 0.03),
    "compiled": (compiled, 0.03), "generation": (generation, 0.12), "environment": (environment, 0.03),
}  # fmt: skip
"""Functions and their shares of the time; the environment comes last, when all that could be imported was."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Overtime` in here after so many seconds."""

    def over(*_: Any) -> None:
        raise Overtime(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(bench: Bench, name: str, minutes: float) -> None:
    """One part; an error is printed and counted."""
    part, share = PARTS[name]
    bench.part, bench.compared[name], bench.failed[name] = name, 0, 0
    bench.until = time.monotonic() + 0.8 * share * minutes * 60
    print(f"\n{name}: {(part.__doc__ or '').strip()}", flush=True)
    start = time.monotonic()
    try:
        with limited(share * minutes * 60):
            part(bench)
    except (Exception, Overtime) as error:
        bench.failed[name] += 1
        bench.say(f"FAIL {type(error).__name__}: {first_line(error)}")
        traceback.print_exc()
    counts = f"{bench.compared[name]} compared, {bench.failed[name]} failed"
    print(f"  {counts}, {time.monotonic() - start:.0f} s", flush=True)


def page(bench: Bench) -> str:
    """What was found, as Markdown."""
    lines = ["# On a CUDA device", "", "| part | compared | failed |", "|---|---|---|"]
    lines += [f"| {name} | {bench.compared[name]} | {bench.failed[name]} |" for name in bench.compared]
    for name in bench.compared:
        lines += ["", f"## {name}", "", *(f"- {text}" for part, text in bench.lines if part == name)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few families")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all parts together")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all by default")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu --small")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # on by default, and convolutions would be held against float64
    transformers.logging.set_verbosity_error()
    bench = Bench(options.device, options.small)
    for name in options.parts or PARTS:
        run_part(bench, name, options.minutes)
    compared, failed = sum(bench.compared.values()), sum(bench.failed.values())
    if options.out:
        options.out.write_text(page(bench), encoding="utf-8")
    short = f"; short of time: {', '.join(bench.short)}" if bench.short else ""
    print(f"\n{compared} comparisons in {len(bench.compared)} parts, {failed} failed{short}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
