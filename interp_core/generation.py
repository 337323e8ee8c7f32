"""Generation with reads and edits at every step.

transformers' own `generate` runs with the plan's hooks installed, key-value cache on. What a position means at a
step: it counts the row's real tokens so far, and acts on those that this step computes. So `-1` and `"last"` act on
the newest token at every step, `5` once, `"prompt"` on the prompt only, `"generated"` on every token after it, and no
position on everything. Keys of attention sites reach back over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .architectures.atlas import CAUSAL, Atlas
from .architectures.hook_points import KEYED
from .architectures.parameters import is_special
from .batches import padded_on
from .checks.equations import distance
from .checks.selfcheck import check_tokens, limit
from .decoding import Ends, decoding
from .drawing import drawing
from .engines.protocol import PassRecord, Slot
from .errors import CapabilityError, PlanError, ReadError
from .foreign import GENERATION, Abroad, Answering
from .model_inputs import model_inputs
from .pass_views import GenerationView
from .positions import LAST, Rows, Span, resolve
from .readings import Reading, ReadStore
from .receipts import Receipt, demand_effect, demand_proof, receipts
from .run import CompiledPlan, forward
from .session import Input, Session
from .sites import TENSOR_OPS, Edit, Site
from .text import Tokens, token_text

FINE = ("", "")
"""What is wrong with steps of which nothing is."""


def generate(
    model: Session,
    x: Input,
    edits: Iterable[Edit] | Edit = (),
    read: Iterable[Site | str] | Site | str = (),
    *,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop_at_eos: bool = True,
    allow_noop: bool = False,
    **options: Any,
) -> Generation:
    """Generate text with edits and reads at every step.

    Args:
        x: as in `Model.run`; batches are padded on the left, those that come with padding elsewhere are moved there.
        edits, read: as in `Model.run`, see the module for positions.
        max_new_tokens: at most so many (default 32).
        do_sample: sample instead of taking the likeliest; then `temperature` (1.0), `top_p` (1.0), `top_k` (0: off)
            apply and `seed` makes it repeatable without touching the global generator.
        stop_at_eos: end a row at its end-of-sequence token.
        options: of transformers' `generate`, or a `generation_config` that holds them (what is said here goes before
            it). The model's own `generation_config` decides only which tokens end a text and fill it up.

    Raises:
        PlanError: an edit whose value has positions that generation moves, or an option that is refused or unknown.
        TextError: prompt and new tokens do not fit the context.
        CapabilityError: a model whose positions see later ones, or whose steps are wrong.
        EffectError: an edit did nothing.
    """
    if CAUSAL in (lacking := model.atlas.lacking):
        raise CapabilityError(
            f"generate: {lacking[CAUSAL]}. Run it on the text with its mask token, and read the logits there"
        )
    named = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_p": top_p}
    if model.atlas.shape.n_labelled:
        raise CapabilityError(
            f"the logits of this model are of {model.d_vocab} labels, not of tokens: it generates none"
        )
    prompt = model.input(x)
    how = decoding(model, prompt, options, named | {"top_k": top_k}, stop_at_eos)
    prompt = replace(prompt, inputs={**prompt.inputs, **how.inputs}) if how.inputs else prompt
    tokens, moved = padded_on(prompt, "left")
    rows = tokens.rows._replace(moved=moved)
    model.fit(tokens, how.new - 1)  # the last new token is chosen, and never run
    compiled = CompiledPlan(model, *model.program(read, edits))
    model.snapshot.demand_no_checkpoints()
    _check_plan(compiled, rows, tokens.padded)
    inputs = _inputs(tokens, compiled) | how.arguments
    with compiled.in_step("generate", tokens), model.turn, torch.no_grad(), model.fresh(), drawing(seed):
        final = _grown(rows, how.new - 1)
        ids, passes = compiled.program.generate(inputs, rows, final, compiled.edits, how.ends)
    generation = Generation(compiled, tokens, rows, ids.cpu(), passes, how.ends)
    demand_proof(compiled.edits, passes)
    if not allow_noop:
        demand_effect(compiled.edits, passes, lambda: generation.receipts)
    return generation


def _check_plan(compiled: CompiledPlan, rows: Rows, padded: bool) -> None:
    """Refuse edits and sites that cannot be carried out while generating, and padding that cannot."""
    inside = bool(compiled.edits or compiled.program.slots)
    if (inside or padded) and compiled.model.steps_wrong != FINE:
        _demand_steps(compiled.model, inside, padded)
    sites: dict[str, Site] = {}  # one of each name, plans may have thousands
    for edit in compiled.edits:
        _check_steady(edit, rows)
        if edit.site.name not in sites:
            sites[edit.site.name] = edit.site
    for slot in compiled.program.slots:
        if slot.site.name not in sites:
            sites[slot.site.name] = slot.site
    for site in sites.values():
        if why := compiled.model.can(site.name, "generate"):
            raise CapabilityError(f"{site} while generating: {why}")


def _inputs(tokens: Tokens, compiled: CompiledPlan) -> dict[str, Any]:
    """The model's inputs, for transformers' `generate`; it derives position ids from the mask by itself, counting from
    zero, which RoBERTa and its kin do not, and for models whose forward names them, which Whisper's does not."""
    model, placed = compiled.model, model_inputs(compiled.model, tokens)
    inputs = {name: value for name, value in placed.items() if name != "position_ids" or name in tokens.inputs}
    inputs["attention_mask"] = tokens.mask.to(model.device, torch.long)
    first, own = model.first_position, "position_ids" in inputs
    if not own and (first or (tokens.padded and not model.told_positions)) and model.takes("position_ids"):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first
    if compiled.touches("logits") and model.keeps_logits:
        inputs["logits_to_keep"] = 0  # it would compute the prompt's last ones only
    return inputs


def _demand_steps(model: Session, inside: bool, padded: bool) -> None:
    """Refuse models whose steps behind the prompt are not those of a pass over the whole text. It is tried once, on a
    few tokens, before the first generation with edits, reads or padding. Without these what transformers gives stands.

    Raises:
        CapabilityError: a step gives other logits, of any row or of padded ones, or computes the whole text again.
    """
    if model.steps_wrong is None:
        model.steps_wrong = FINE  # while it is tried
        model.steps_wrong = _try_steps(model)
    of_any, of_padded = model.steps_wrong
    name = model.atlas.family.name
    if of_any and inside:
        raise CapabilityError(
            f"generate: this {name} {of_any}: run() the text, and again with every token that it chooses"
        )
    if padded and of_padded:
        raise CapabilityError(
            f"generate: a row of this {name} that is padded {of_padded}: generate row by row (for row in tokens)"
        )


def _try_steps(model: Session) -> tuple[str, str]:
    """What is wrong with the first step behind a prompt, of a row that fills the batch and of one that is padded."""
    ids, logits = check_tokens(model), Site("logits")
    left, mask = ids[None], torch.ones(1, len(ids), dtype=torch.bool)
    if not model.atlas.lacking.get("left padding"):
        left, mask = torch.stack([ids, torch.cat([ids[:1].expand(2), ids[:-2]])]), mask.repeat(2, 1)
        mask[1, :2] = False
    made = generate(model, Tokens(left, mask), (), logits, max_new_tokens=2, stop_at_eos=False)
    step = made.steps[1][logits].plain
    if step.shape[1] > 1:
        return "keeps nothing from step to step, so that each computes the whole text again without the edit", ""
    whole = Tokens(torch.cat([left, made.ids[:, :1]], 1), torch.cat([mask, mask[:, -1:]], 1))
    wanted = forward(model, whole, logits=-1).logits.plain
    most = 0.5 if any(map(is_special, model.hf.modules())) else limit(model)
    off = [distance(one, other) for one, other in zip(step[:, -1], wanted, strict=True)]
    why = "gets other logits from what transformers hands on from step to step than in one pass (off by {:.1e})"
    wrong = [why.format(far) if far > most else "" for far in off]  # where weights are NaN, nothing can be said
    return wrong[0], wrong[-1]


def _grown(rows: Rows, more: int) -> Rows:
    """The rows as the last step will see them."""
    real = [[*row, *range(rows.width, rows.width + more)] for row in rows.real]
    return rows._replace(real=real, width=rows.width + more, prompt=[len(row) for row in rows.real])


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


class Step(ReadStore):
    """One forward pass of a generation; indexed by sites. The first one covers the prompt."""

    _what = "step"

    def __init__(self, slots: Sequence[Slot], atlas: Atlas, rows: Rows, record: PassRecord, columns: int) -> None:
        super().__init__(slots, atlas, rows)
        self._passed, self._columns = record, columns

    def _value(self, slot: int) -> Tensor | None:
        value = self._passed.values[slot]
        if value is None or self._slots[slot].site.key is not None or "key" not in self._slots[slot].site.info.axes:
            return value
        return value[..., : self._columns]  # a static cache has places for keys that are not there yet


class Generation(GenerationView, Answering):
    """What `generate` gives back.

    Attributes:
        ids: new tokens `[batch new]`; after a row's end they only fill it up.
        texts: their text per row, up to the end-of-sequence token.
        tokens: prompt and new tokens up to each row's end (the token that ends it included), padded on the left, and
            on the right where a row has ended; with the spans `prompt` and `generated`.
        ended: per row, whether it came to an end of its own (the others stopped at `max_new_tokens` or `max_time`).
    """

    _abroad = Abroad("a Generation", GENERATION)

    def __init__(
        self, compiled: CompiledPlan, prompt: Tokens, rows: Rows, ids: Tensor, passes: list[PassRecord], ends: Ends
    ) -> None:
        self._compiled, self._rows, self.model = compiled, rows, compiled.model
        self.ids = ids[:, prompt.ids.shape[1] :]
        self._passes = passes[: self.ids.shape[1]]  # some devices make one pass more before they see the end
        lengths = ends.lengths(self.ids.shape[1])
        self._lengths, self.ended = lengths, ends.now()
        tokenizer = compiled.model.tokenizer
        kept = [[*row[: n - 1], *(i for i in row[n - 1 : n] if i not in ends.eos)]
                for row, n in zip(self.ids.tolist(), lengths, strict=True)]  # fmt: skip
        self.texts = [tokenizer.decode(row, skip_special_tokens=True) for row in kept] if tokenizer else []
        self.tokens = _joined(prompt, ids, lengths, tokenizer)

    @cached_property
    def receipts(self) -> list[Receipt]:
        """One per edit, over all steps."""
        return receipts(self._compiled.edits, self._passes, self._rows)

    @cached_property
    def steps(self) -> list[Step]:
        """One `Step` per forward pass: the prompt's, then one per token."""
        slots, atlas, width = self._compiled.program.slots, self._compiled.model.atlas, self._rows.width
        steps = [Step(slots, atlas, self._rows, self._passes[0], width)]
        for i, record in enumerate(self._passes[1:], 1):  # positions within a step: the one new token, if there is one
            newest = Rows([[0] if i < length else [] for length in self._lengths], {}, 1, growing=True)
            steps.append(Step(slots, atlas, newest, record, width + i))
        return steps

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
        point = self._compiled.model.atlas.select(site)[0].read
        if point is not None and point.part in KEYED:  # a step's keys reach back to the start
            parts = [part[..., -(part.shape[-3] if i == 0 else 1) :, :, :] for i, part in enumerate(parts)]
        axis = 2 if layered else 1
        full = torch.cat(parts, axis)
        rows = Rows([row[:-1] for row in self.tokens.rows.real], {}, full.shape[axis])
        return Reading.of(full, site, rows)


def _joined(prompt: Tokens, ids: Tensor, lengths: list[int], tokenizer: Any) -> Tokens:
    width = prompt.ids.shape[1]
    mask = torch.cat([prompt.mask, torch.arange(ids.shape[1] - width) < torch.tensor(lengths)[:, None]], 1)
    spans = dict(prompt.spans)
    spans["prompt"] = tuple((Span(0, length),) for length in prompt.lengths)
    spans["generated"] = tuple((Span(n, n + more),) for n, more in zip(prompt.lengths, lengths, strict=True))
    new_ids = [row[width : width + n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    words = [[token_text(tokenizer, i) if tokenizer else str(i) for i in row] for row in new_ids]
    labels = [(*old, *fresh) for old, fresh in zip(prompt.labels, words, strict=True)]
    return Tokens(ids, mask, spans=spans, labels=tuple(labels))
