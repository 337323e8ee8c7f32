"""Generation with reads and edits at every step.

transformers' own `generate` runs with the plan's hooks installed, key-value cache on. What a position means at a
step: it counts the row's real tokens so far, and acts on those that this step computes. So `-1` and `"last"` act on
the newest token at every step, `5` once, `"prompt"` on the prompt only, `"generated"` on every token after it, and no
position on everything. Keys of attention sites reach back over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.atlas import Atlas
from .architectures.taps import KEYED
from .compiled import CompiledPlan, model_inputs
from .edits import TENSOR_OPS, Edit
from .engines.protocol import Passed, Slot
from .errors import CapabilityError, PlanError, ReadError
from .positions import LAST, Rows, Span, resolve
from .sites import Site
from .text import Tokens, token_text
from .trace import Reading, Receipt, Store, demand_effect, receipts

if TYPE_CHECKING:
    from .model import Input, Model

REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "prompt_lookup_num_tokens", "use_cache")


def generate(
    model: Model,
    x: Input,
    edits: Iterable[Edit] | Edit = (),
    read: Iterable[Site | str] | Site | str = (),
    *,
    max_new_tokens: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop_at_eos: bool = True,
    allow_noop: bool = False,
    **options: Any,
) -> Generation:
    """Generate text with edits and reads at every step.

    Args:
        x: as in `Model.run`; batches are padded on the left.
        edits, read: as in `Model.run`, see the module for positions.
        max_new_tokens: at most so many.
        do_sample: sample instead of taking the likeliest; then `temperature`, `top_p`, `top_k` (0: off) apply and
            `seed` makes it repeatable without touching the global generator.
        stop_at_eos: end a row at its end-of-sequence token.
        options: passed on to transformers' `generate`.

    Raises:
        PlanError: an edit whose value has positions that generation moves, or an option that changes the rows.
        TextError: prompt and new tokens do not fit the context.
        EffectError: an edit did nothing.
    """
    _check_options(options, max_new_tokens)
    tokens = model._fitting(model._input(x), max_new_tokens - 1)
    compiled = model.compile(read, edits)
    for edit in compiled.edits:
        _check_steady(edit, tokens.rows)
    sites = (*(edit.site for edit in compiled.edits), *(slot.site for slot in compiled.program.slots))
    for site in {site.name: site for site in reversed(sites)}.values():  # one of each name, plans may have thousands
        if why := model.can(site.name, "generate"):
            raise CapabilityError(f"{site} while generating: {why}")
    settings = _settings(model, do_sample, temperature, top_p, top_k, stop_at_eos)
    inputs = _inputs(tokens, compiled) | {"max_new_tokens": max_new_tokens} | settings | options
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), model.fresh(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        final = _grown(tokens.rows, max_new_tokens - 1)
        ids, passes = compiled.program.generate(inputs, tokens.rows, final, compiled.edits)
    made = Generation(compiled, tokens, ids.cpu(), passes, settings["eos_token_id"])
    if not allow_noop:
        demand_effect(compiled.edits, passes, lambda: made.receipts)
    return made


def _check_options(options: dict[str, Any], max_new_tokens: int) -> None:
    for name in REFUSED:
        if options.get(name) not in (None, 1, True):
            raise PlanError(f"generate({name}=…) changes the rows or steps that positions refer to; leave it out")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise PlanError(f"max_new_tokens is at least 1, not {max_new_tokens}")


def _inputs(tokens: Tokens, compiled: CompiledPlan) -> dict[str, Any]:
    """What transformers' `generate` is called with; it derives position ids from the mask by itself."""
    inputs = {k: value for k, value in model_inputs(compiled.model, tokens).items() if k != "position_ids"}
    inputs["attention_mask"] = tokens.mask.to(compiled.model.device, torch.long)
    if compiled.touches("logits"):
        inputs["logits_to_keep"] = 0  # it would compute the prompt's last ones only
    return inputs


def _settings(model: Model, sample: bool, temperature: float, top_p: float, top_k: int, stop: bool) -> dict[str, Any]:
    """Everything that decides the next token, said aloud, so that a model's own defaults do not."""
    defaults = model.hf.generation_config
    eos = defaults.eos_token_id
    if eos is None and model.tokenizer is not None:
        eos = model.tokenizer.eos_token_id
    listed = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    settings: dict[str, Any] = {"do_sample": sample, "pad_token_id": (listed or [0])[0]}
    settings["eos_token_id"] = listed if stop and listed else None
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings |= chosen if sample else dict.fromkeys(chosen)
    return settings | {"repetition_penalty": 1.0, "num_beams": 1}


def _grown(rows: Rows, more: int) -> Rows:
    """The rows as the last step will see them."""
    real = [[*row, *range(rows.width, rows.width + more)] for row in rows.real]
    return Rows(real, rows.names, rows.width + more, [len(row) for row in rows.real])


def _check_steady(edit: Edit, rows: Rows) -> None:
    """Refuse a value with an axis for rows or positions where steps would see only some of them."""
    site = edit.site
    if edit.op not in TENSOR_OPS or edit.op == "project" or site.info.visual:
        return
    features = len(site.info.axes) - 2 - isinstance(site.units, int)
    if edit.value.ndim <= features or site.pos in (-1, LAST):
        return
    if site.pos is None or resolve(site.pos, _grown(rows, 0)) != resolve(site.pos, _grown(rows, 1)):
        raise PlanError(
            f"{edit}: while generating, these positions move, so the value cannot have one entry per row or position. "
            "Use a value without these axes, or fixed positions such as 'prompt', a Span, or -1."
        )


class Step(Store):
    """One forward pass of a generation; indexed by sites. The first one covers the prompt."""

    _what = "step"

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, rows: Rows, passed: Passed) -> None:
        super().__init__(slots, atlas, rows)
        self._passed = passed

    def _value(self, slot: int) -> Tensor | None:
        return self._passed.values[slot]


class Generation:
    """What `generate` gives back.

    Attributes:
        ids: new tokens `[batch new]`.
        texts: their text per row, up to the end-of-sequence token.
        tokens: prompt and new tokens, with the spans `prompt` and `generated`.
    """

    def __init__(
        self, compiled: CompiledPlan, prompt: Tokens, ids: Tensor, passes: list[Passed], eos: list[int] | None
    ) -> None:
        self._compiled, self._passes, self._prompt = compiled, passes, prompt
        self.ids = ids[:, prompt.ids.shape[1] :]
        tokenizer = compiled.model.tokenizer
        kept = [row[: _end(row, eos)] for row in self.ids.tolist()]
        self.texts = [tokenizer.decode(row, skip_special_tokens=True) for row in kept] if tokenizer else []
        self.tokens = _joined(prompt, ids, tokenizer)

    @cached_property
    def receipts(self) -> list[Receipt]:
        """One per edit, over all steps."""
        return receipts(self._compiled.edits, self._passes, self._prompt.rows)

    @cached_property
    def steps(self) -> list[Step]:
        """One `Step` per forward pass: the prompt's, then one per token."""
        slots, atlas, prompt = self._compiled.program.slots, self._compiled.model.atlas, self._prompt
        one = Rows([[0]] * len(prompt), {}, 1)  # positions within a step: the prompt's, then the one new token
        return [Step(slots, atlas, one if i else prompt.rows, passed) for i, passed in enumerate(self._passes)]

    def __str__(self) -> str:
        return "\n".join(self.texts) if self.texts else str(self.ids.tolist())

    def __getitem__(self, site: Site | str) -> Reading:
        """A read over all steps, strung together along `pos`: prompt and new tokens but the last, which the model
        never saw. Only for reads of all positions.

        Raises:
            ReadError: not read, read at chosen positions, or an attention site, whose keys grow: use `steps`.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if "query" in site.info.axes:
            raise ReadError(f"{site}: its keys grow with every step; use generation.steps[i][site]")
        if site.pos is not None:
            raise ReadError(f"{site}: read the site without positions, or use generation.steps[i][site]")
        layered = site.info.layered and not isinstance(site.layers, int)
        parts = [step[site].as_subclass(Tensor) for step in self.steps]
        tap = self._compiled.model.atlas.select(site)[0].read
        if tap is not None and tap.part in KEYED:  # a step's keys reach back to the start
            parts = [part[..., -(part.shape[-3] if i == 0 else 1) :, :, :] for i, part in enumerate(parts)]
        axis = 2 if layered else 1
        full = torch.cat(parts, axis)
        rows = Rows([row[:-1] for row in self.tokens.rows.real], {}, full.shape[axis])
        return Reading.of(full, site, rows)


def _end(row: list[int], eos: list[int] | None) -> int:
    return next((i for i, token in enumerate(row) if token in (eos or ())), len(row))


def _joined(prompt: Tokens, ids: Tensor, tokenizer: Any) -> Tokens:
    new = ids.shape[1] - prompt.ids.shape[1]
    mask = torch.cat([prompt.mask, torch.ones(len(prompt), new, dtype=torch.bool)], 1)
    spans = dict(prompt.spans)
    spans["prompt"] = tuple((Span(0, length),) for length in prompt.lengths)
    spans["generated"] = tuple((Span(length, length + new),) for length in prompt.lengths)
    words = [[token_text(tokenizer, i) if tokenizer else str(i) for i in row[-new:]] for row in ids.tolist()]
    labels = [(*old, *fresh) for old, fresh in zip(prompt.labels, words, strict=True)]
    return Tokens(ids, mask, spans=spans, labels=tuple(labels))
