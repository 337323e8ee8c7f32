"""A plan as lines."""

from __future__ import annotations

from .plan import MOST, RunPlan


def page(told: RunPlan) -> str:
    """A plan in at most 25 lines."""
    outline, work, cost, taken = told.outline, told.work, told.cost, told.memory
    held = scaled(outline.held).replace("G", "B")
    attention = "eager" if outline.eager else "sdpa"
    together = f", {work.batch:,} together" if work.prompts > 1 else ""
    target = f", {work.target:,} of them the target" if work.target else ""
    says = "" if told.declared else f"{told.name} does not say what it runs: priced as one forward pass per prompt"
    beside = f", {scaled(cost.beside)}FLOP beside them" if cost.beside else ""
    n_layers = len(outline.layers)
    shared = f", shared by {outline.tp} processes" if outline.tp > 1 else ""
    rows = [
        ("run", f"{told.name} on {outline.source}"),
        ("model", f"{outline.family}, {n_layers} layers, {held} parameters, {outline.dtype}, {attention}{shared}"),
        ("prompts", f"{work.prompts:,} of {work.tokens:,} tokens{target}{together}"),
        ("", says),
        ("token-layers", f"{cost.forward:,} forward, {cost.backward:,} backward, in {cost.calls:,} calls"),
        ("logits", f"{cost.read_out:,} positions; {cost.generated:,} generated tokens"),
        ("operations", f"{scaled(told.forward)}FLOP forward, {scaled(told.backward)}FLOP backward{beside}"),
        ("bytes read", f"{size(told.weights_read)} of weights, {size(told.cache_read)} of keys and values"),
        ("bytes kept", f"{size(cost.kept)} of activations and results"),
        ("a device", f"{size(taken.total)}: weights {size(taken.weights)}, widest moment {size(taken.activations)}, "
                     f"keys and values {size(taken.cache)}, kept {size(taken.kept)}"),
        *_devices(told),
        ("shards", f"{told.shards:,} proposed"),
        *_time(told),
        *(("assumes", sentence) for sentence in cost.assumes),
        *(("not counted", note) for note in outline.notes),
    ]  # fmt: skip
    return "\n".join(f"{name:13} {text}" for name, text in rows if text)


def _devices(told: RunPlan) -> list[tuple[str, str]]:
    if told.gpu_memory is None:
        return [("devices", f"{told.gpus}; give --gpu-memory or --device to learn what fits")]
    each = f"of {size(told.gpu_memory)}"
    if not told.fits:
        if told.outline.tp > 1:
            return [("devices", f"DOES NOT FIT on {told.per_copy} {each} each; a larger --tp, or a smaller --batch")]
        more = f"; {told.needed} of them would do" if told.needed else "; no number of them would do: a smaller --batch"
        return [("devices", f"DOES NOT FIT on {told.gpus} {each}{more}")]
    limit = told.outline.n_ctx
    longest = told.longest_context
    most = " (all that the model takes)" if longest == limit else ""
    alike = f"{told.work.batch:,} together" if told.work.batch > 1 else "one at a time"
    return [
        ("devices", f"{told.per_copy} {each} for a copy of the model; {told.copies} at a time on {told.gpus}"),
        (
            "largest batch",
            "any: prompts run one by one"
            if told.largest_batch == MOST
            else f"{told.largest_batch:,} prompts of {told.work.tokens:,} tokens",
        ),
        ("longest text", f"{longest:,} tokens, {alike}{most}"),
    ]


def _time(told: RunPlan) -> list[tuple[str, str]]:
    if told.seconds is None or told.rate is None:
        return [("time", "give --device, --flops-per-second or --measured MODEL")]
    reading = f", {scaled(told.rate.bandwidth)}B/s" if told.rate.bandwidth else ""
    return [("time", f"{span(told.seconds)} ({told.rate.said}: {scaled(told.rate.flops)}FLOP/s{reading})")]


def scaled(count: float) -> str:
    """A number with its prefix: `30.5 B` of parameters reads `30.5 G` of operations."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}"
    return f"{count:.3g} "


def size(count: float) -> str:
    """Bytes with their prefix."""
    return f"{scaled(count)}B"


def span(seconds: float) -> str:
    """A time in the unit that fits it."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} seconds"
