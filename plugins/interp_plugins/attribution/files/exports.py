"""Compact exports of traces: one small `.npz` per example, for people who need neither model nor tokenizer.

    attr   float32 [L]      one number per token of input, reasoning and answer: the row vector of the trace
    hop    float32 [H L]    vectors of single hops, where the method has them
    tok    text [L]         the tokens; form "proc" alone
    span_in, span_cot, span_out    int64 [2], first and last token; -1, -1 where there is none
    length int64 [3]        tokens of the three spans; form "proc_1" alone
    rise, mas, recovery     float64, of the row vector; NaN where they were not worked out

L is P + G - 1: the template's tokens are not in a trace, and the last token, the end of sequence, is left out here.
Source: `exp/proc` and `exp/proc_1` of FlashTrace (wbopan/flashtrace, commit 075e7e4, MIT). What is written again from
what was read is the same file byte for byte (`arrays`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from interp_core import LoadError, Span, TextError

from .arrays import Array, checked, closed, demand_finite, npz_bytes, opened, read_npz
from .traces import WITH_HOPS, Trace

Form = Literal["proc", "proc_1"]
"""With tokens, and hops of the methods made of them; or without tokens, with lengths and all hops that there are."""
SPANS = ("span_in", "span_cot", "span_out")
SCORES = ("rise", "mas", "recovery")
KEYS: Mapping[Form, tuple[str, ...]] = {
    "proc": ("attr", "tok", *SPANS, *SCORES),
    "proc_1": ("attr", *SPANS, "length", *SCORES),
}
"""Members in their order; `hop` comes last, where it is."""


@dataclass(frozen=True, eq=False)
class Export:
    """One export; spans are half-open in the L tokens.

    Attributes:
        attr: float32 `[L]`.
        hop: float32 `[hop L]`, or None.
        tok: the L tokens; None in form "proc_1".
        span_in, span_cot, span_out: input, reasoning, answer; None where there is none.
        rise, mas, recovery: NaN where they were not worked out.
    """

    attr: Array
    hop: Array | None
    tok: tuple[str, ...] | None
    span_in: Span | None
    span_cot: Span | None
    span_out: Span | None
    rise: float = math.nan
    mas: float = math.nan
    recovery: float = math.nan

    @property
    def form(self) -> Form:
        """Which form it has."""
        return "proc_1" if self.tok is None else "proc"


def export_of(trace: Trace, tok: Sequence[str] | None, *, form: Form = "proc") -> Export:
    """What of a trace is exported.

    Args:
        tok: the L tokens (`pieces`), for form "proc".

    Raises:
        LoadError: the trace has no span for the answer.
    """
    sink = trace.explained if trace.sink is None else trace.sink
    if sink is None:
        raise LoadError(
            f"{trace.file} has neither sink_span_gen nor indices_to_explain_gen: it is not known which tokens are the "
            "answer; run the evaluation again on a data set with spans"
        )
    thinking = Span(0, max(0, sink.start)) if trace.thinking is None else trace.thinking
    length = trace.length - 1
    hops = trace.hops if form == "proc_1" or trace.attr_func in WITH_HOPS else None
    faith, recovery = trace.faithfulness, trace.recovery
    return Export(
        trace.vectors["row"][:length],
        None if hops is None else np.ascontiguousarray(hops[:, :length]),
        tuple(tok) if tok is not None and form == "proc" else None,
        Span(0, trace.prompt_len),
        _placed(thinking, trace.prompt_len, length),
        _placed(sink, trace.prompt_len, length),
        math.nan if faith is None else float(faith[1, 0]),
        math.nan if faith is None else float(faith[1, 1]),
        math.nan if recovery is None else float(recovery[1]),
    )


def _placed(span: Span, start: int, length: int) -> Span | None:
    """A span of the generation among all tokens, without what lies outside; None if nothing is left."""
    first, stop = max(start, start + span.start), min(length, start + span.stop)
    return Span(first, stop) if first < stop else None


def is_cut(trace: Trace) -> bool:
    """Whether a span of the trace reaches past its last token that is exported, and is cut in the export."""
    spans = (trace.explained if trace.sink is None else trace.sink, trace.thinking)
    return any(span is not None and (span.start < 0 < span.stop or span.stop > trace.gen_len - 1) for span in spans)


def members_of(export: Export) -> dict[str, Array]:
    """The arrays of an export's file, in their order.

    Raises:
        TextError: a token that numpy's text cannot hold.
    """
    spans = dict(zip(SPANS, (export.span_in, export.span_cot, export.span_out), strict=True))
    values: dict[str, Any] = {"attr": export.attr} | {name: closed(span) for name, span in spans.items()}
    values |= {name: np.asarray(getattr(export, name), dtype=np.float64) for name in SCORES}
    values["length"] = np.asarray([len(span or ()) for span in spans.values()], dtype=np.int64)
    if export.tok is not None:
        values["tok"] = np.asarray(export.tok, dtype=np.str_)
        place = next((i for i, text in enumerate(export.tok) if text.endswith("\0")), None)
        if place is not None:
            raise TextError(
                f"token {place} ends in a NUL character ({export.tok[place]!r}), which numpy's text leaves out; export "
                "form proc_1, which has no tokens"
            )
    out: dict[str, Array] = {name: values[name] for name in KEYS[export.form]}
    return out if export.hop is None else out | {"hop": export.hop}


def export_bytes(export: Export) -> bytes:
    """The file."""
    return npz_bytes(members_of(export))


def read_export(path: str | Path) -> Export:
    """An export, of either form.

    Raises:
        LoadError: no such file, a damaged one, other members than these, arrays that do not fit each other, scores that
            are not finite, or spans outside the text or out of order.
    """
    path = Path(path)
    members = read_npz(path)
    form: Form = "proc" if "tok" in members else "proc_1"
    names = [name for name in members if name != "hop"]
    if sorted(names) != sorted(KEYS[form]):
        raise LoadError(
            f"{path} is no export: it has {', '.join(members)}, an export {', '.join(KEYS[form])} (and hop)"
        )
    attr = checked(path, "attr", members["attr"], "float32", (None,))
    demand_finite(path, "attr", attr)
    hop = members.get("hop")
    if hop is not None:
        demand_finite(path, "hop", checked(path, "hop", hop, "float32", (None, len(attr))))
    tok = None if form == "proc_1" else checked(path, "tok", members["tok"], "U", (len(attr),)).tolist()
    spans = [opened(checked(path, name, members[name], "int64", (2,))) for name in SPANS]
    _demand_order(path, spans, len(attr))
    if form == "proc_1":
        said = checked(path, "length", members["length"], "int64", (3,)).tolist()
        if said != (lengths := [len(span or ()) for span in spans]):
            raise LoadError(f"{path}: length is {said}, the spans have {lengths} tokens; the file is damaged")
    rise, mas, recovery = (float(checked(path, name, members[name], "float64", ())) for name in SCORES)
    return Export(
        attr, hop, None if tok is None else tuple(tok), spans[0], spans[1], spans[2], rise=rise, mas=mas,
        recovery=recovery,
    )  # fmt: skip


def _demand_order(path: Path, spans: Sequence[Span | None], length: int) -> None:
    """Refuse spans that lie outside the text, or an input that is not its beginning."""
    for name, span in zip(SPANS, spans, strict=True):
        if span is not None and not 0 <= span.start < span.stop <= length:
            raise LoadError(
                f"{path}: {name} is {span.start} to {span.stop - 1} (both within), the text has tokens 0 to "
                f"{length - 1}"
            )
    head = spans[0]
    later = [span for span in spans[1:] if span is not None]
    if head is None or head.start != 0 or any(span.start < head.stop for span in later):
        raise LoadError(f"{path}: the input is {head}; it begins the text, and reasoning and answer follow it")


def pieces(tokenizer: Any, prompt: str, target: str) -> tuple[list[str], list[str]]:
    """The tokens of an example as the published evaluation cuts them: the prompt after a space, and the generation with
    its end-of-sequence token, encoded, decoded and encoded again.

    Raises:
        TextError: a tokenizer without offsets or without an end-of-sequence token.
    """
    if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token is None:
        lacks = "no end-of-sequence token" if tokenizer.eos_token is None else "no offsets (it is a slow one)"
        raise TextError(f"this tokenizer has {lacks}, which the tokens of a trace are cut by; give the run's tokenizer")
    ids = tokenizer(target + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _cut(tokenizer, f" {prompt}"), _cut(tokenizer, written)


def _cut(tokenizer: Any, text: str) -> list[str]:
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return [text[start:stop] for start, stop in offsets]
