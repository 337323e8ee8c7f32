"""One example through one method: vectors, RISE and MAS on the target, Recovery@10 % of the needles.

    matrix [target, prompt + target]   rows of the method; where it has none, its one vector for what is explained
    seq, row, rec                      see `forms`
    faithfulness, recovery             of the prompt's part of each, see `faithfulness` and `recovery`

In the profile `sound` all methods are scored on the same tokens, all of the prompt, and equal weights are taken in the
order of the text; in `reference`, methods that leave stop words out are scored without them, on an easier set than the
others, and equal weights are taken as torch's sort leaves them.

Source: FlashTrace at 075e7e4, `exp2`. Cost: the method, and 1 + 20 forward passes per ordering.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic

from ..data.examples import Example
from ..data.tokens import example_tokens
from ..files.traces import HOP_COUNTED, LRP, Trace, made_trace
from ..layout import is_stop
from ..method import AttributionResult
from ..named import named
from .comparing import example_rows
from .faithfulness import Faithfulness, faithfulness
from .forms import Forms, forms
from .perturbed import Perturbed
from .recovery import Recovery, recovery

FAITHFULNESS, RECOVERY = "faithfulness_gen", "recovery_ruler"
MODES = (FAITHFULNESS, RECOVERY)
WITHOUT_STOPS = ("ifr_multi_hop_stop_words", "ifr_multi_hop_both")
"""Methods that the reference scores on the prompt's tokens without stop words."""


@dataclass(frozen=True)
class Options:
    """How examples are evaluated, by the names of the published command.

    Attributes:
        modes: of `MODES`.
        profile: "sound" or "reference".
        n_hops, chunk_tokens, sink_chunk_tokens: of IFR.
        attnlrp_neg_handling, attnlrp_norm_mode: of AttnLRP.
        tie_orders: how many random orders among equal weights to score beside the declared one.
    """

    modes: tuple[str, ...] = (FAITHFULNESS,)
    profile: Literal["sound", "reference"] = "sound"
    n_hops: int = 3
    chunk_tokens: int = 128
    sink_chunk_tokens: int = 32
    attnlrp_neg_handling: str = "drop"
    attnlrp_norm_mode: str = "norm"
    tie_orders: int = 0

    def settings(self, attr_func: str) -> tuple[str, dict[str, Any]]:
        """The method of a published name, and its settings.

        Raises:
            PlanError: no method is called so.
        """
        method, fixed = named(attr_func)
        known = ic.method(method).Config.model_fields
        wanted: dict[str, Any] = {"profile": self.profile}
        if method == "ifr":
            wanted |= {"chunk_tokens": self.chunk_tokens, "sink_chunk_tokens": self.sink_chunk_tokens}
        if attr_func in HOP_COUNTED or "multi_hop" in str(fixed.get("variant")):
            wanted["n_hops"] = self.n_hops
        if attr_func in LRP:
            wanted |= {"neg_handling": self.attnlrp_neg_handling, "norm_mode": self.attnlrp_norm_mode}
        return method, {**{name: value for name, value in wanted.items() if name in known}, **fixed}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What came of one example.

    Attributes:
        trace: as trace folders keep it.
        rows: its numbers, a row per form (seq, row, rec).
    """

    trace: Trace
    rows: list[dict[str, Any]]


def evaluate(model: ic.Model, example: Example, index: int, attr_func: str, options: Options) -> Evaluated:
    """Attribute one example and score what came out.

    Raises:
        TextError, PlanError, CapabilityError: an example that does not fit the model, before the method runs.
    """
    tokens = example_tokens(model, example, options.profile, eos=True)
    if "explained" not in tokens.spans or "target" not in tokens.spans:
        raise ic.TextError(f"{example.where}: it has no indices_to_explain; build the cache with spans (build_cache)")
    method, settings = options.settings(attr_func)
    start = time.perf_counter()
    result = ic.method(method)(model, tokens, **settings)
    took = time.perf_counter() - start
    prompt, target = tokens.columns("prompt")[0], tokens.columns("target")[0]
    explained = _within(tokens, "explained", target[0])
    assert explained is not None
    three = forms(matrix_of(result, prompt, target, explained), explained)
    kept = [i for i, p in enumerate(prompt) if not is_stop(tokens.labels[0][p])]
    gold = _indices(tokens, "gold", prompt)
    only = kept if options.profile == "reference" and attr_func in WITHOUT_STOPS else None
    faith, faith_s = _faithfulness(model, tokens, three, only, options)
    hops = result.hops is not None and attr_func in HOP_COUNTED
    recovered, recovery_s = _recovery(three, gold, only, options)
    trace = made_trace(
        index, attr_func=attr_func, prompt=example.prompt, target=example.target,
        vectors={name: getattr(three, name) for name in Forms.NAMES}, prompt_len=len(prompt), explained=explained,
        sink=_within(tokens, "sink", target[0]), thinking=_within(tokens, "thinking", target[0]),
        user_prompt_indices=prompt, keep_prompt_token_indices=kept if attr_func in WITHOUT_STOPS else None,
        gold_prompt_token_indices=gold,
        faithfulness=None if faith is None else faith.scores,
        recovery=None if recovered is None or recovered.skipped else recovered.recovery,
        recovery_skipped_reason=None if recovered is None else recovered.skipped or None,
        time_attr_s=took, time_faith_s=faith_s, time_recovery_s=recovery_s,
        hops=result.hops[0][:, [*prompt, *target]] if hops else None,
        lrp=_lrp(attr_func, options),
    )  # fmt: skip
    return Evaluated(trace, _rows(trace, result, faith, recovered))


def matrix_of(
    result: AttributionResult, prompt: Sequence[int], target: Sequence[int], explained: ic.Span
) -> Float[Tensor, "target pos"]:
    """Rows of the target's tokens over prompt and target; of a method without rows its vector for what is explained."""
    columns = torch.tensor([*prompt, *target])
    if result.rows is not None:
        return result.rows[0][target[0] : target[-1] + 1][:, columns]
    matrix = result.scores.new_full((len(target), len(columns)), torch.nan)
    matrix[explained.start : explained.stop] = result.scores[0][columns]
    return matrix


def _faithfulness(
    model: ic.Model, tokens: ic.Tokens, three: Forms, only: Sequence[int] | None, options: Options
) -> tuple[Faithfulness | None, float | None]:
    if FAITHFULNESS not in options.modes:
        return None, None
    start = time.perf_counter()
    weights = three.prompt_weights
    order = _torch_order(weights, only) if options.profile == "reference" else None
    scored = faithfulness(
        Perturbed(model, tokens), weights, names=Forms.NAMES, kept=only, order=order, tie_orders=options.tie_orders
    )
    return scored, time.perf_counter() - start


def _torch_order(weights: Tensor, only: Sequence[int] | None) -> Tensor:
    """The order that the reference deletes in: torch's, which among equal weights is any."""
    places = torch.arange(weights.shape[1]) if only is None else torch.tensor(only)
    return places[torch.argsort(weights[:, places].float(), dim=-1, descending=True)]


def _recovery(
    three: Forms, gold: Sequence[int], only: Sequence[int] | None, options: Options
) -> tuple[Recovery | None, float | None]:
    if RECOVERY not in options.modes:
        return None, None
    start = time.perf_counter()
    return recovery(three.prompt_weights, gold, kept=only, names=Forms.NAMES), time.perf_counter() - start


def _lrp(attr_func: str, options: Options) -> tuple[str, str, bool] | None:
    """What the trace of an AttnLRP with hops says of itself."""
    if attr_func not in LRP or attr_func == "attnlrp":
        return None
    return options.attnlrp_neg_handling, options.attnlrp_norm_mode, True


def _within(tokens: ic.Tokens, name: str, start: int) -> ic.Span | None:
    """A span counted within the target."""
    spans = tokens.spans.get(name, ((),))[0]
    return ic.Span(spans[0].start - start, spans[0].stop - start) if spans else None


def _indices(tokens: ic.Tokens, name: str, prompt: Sequence[int]) -> list[int]:
    """A span's tokens as indices into the prompt."""
    places = {position: i for i, position in enumerate(prompt)}
    return [places[p] for span in tokens.spans.get(name, ((),))[0] for p in span if p in places]


def _rows(
    trace: Trace, result: AttributionResult, faith: Faithfulness | None, recovered: Recovery | None
) -> list[dict[str, Any]]:
    """The numbers of an example as plain data, a row per form; None where there is no number."""
    more = {
        "prompt_len": trace.prompt_len, "gen_len": trace.gen_len, "seconds": trace.seconds["time_attr_s"],
        "first_share": float(result.first_share[0]), "sink_share": float(result.sink_share[0]),
        "skipped": "" if recovered is None else recovered.skipped,
    }  # fmt: skip
    tables = [[{"vector": name} for name in Forms.NAMES]]
    tables += [part.table() for part in (faith, recovered) if part is not None]
    rows = example_rows(trace.index, trace.attr_func, *tables, more=more)
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]
