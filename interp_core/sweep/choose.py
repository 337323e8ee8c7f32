"""Which strategy a sweep takes: the cheapest that is exact on this model, which is tried before its first sweep.

    candidates, cheapest first      staircase ──▶ restart ──▶ full
    known without a trial           an engine that runs no rows, closed attention, chunks, …
    remembered                      session.strategy_checks: by strategy and kind of texts
    tried                           plain ── fails ──▶ with one relief ── fails ──▶ with the next ── fails ──▶ no

A relief is something that a sweep can do without (several texts in a pass, one row of inputs for all variants) where
that was what failed. Reliefs are handed to the trial, and stay with the model only if they helped.

The trial costs what a few layers cost on a few tokens. Of layers that are built alike the first and the last take part;
the others hand the stream through, and of the unembedding some rows are left. So shortened, the model is held against
itself: a strategy's numbers against those of plain forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches import one_row
from ..checks.selfcheck import WIDTH, check_tokens
from ..cost import TOGETHER
from ..engines.replace import replaced_forwards
from ..engines.tower import Tower
from ..errors import CapabilityError, InterpError, first_line
from ..identity import settings_of
from ..positions import VISION, PerRow, Rows
from ..progress import Progress
from ..readout import few_logits, is_plain
from ..score import Score
from ..session import Session
from ..sites import Edit, Site
from ..strategy_checks import Check, Relief, Trial
from ..text import Tokens
from ..vision.corner import corner, shorter
from .clean import CleanPass, clean_pass, runs_rows
from .place import Placer, why_apart
from .plan import WHOLE, Group
from .runner import Runner
from .store import opened

FAULTS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a model raises that is called in a way that it does not take."""
LOOKED_AT = 64
"""Rows of the unembedding that a trial looks at."""
RELIEFS = {
    "one text": (Relief.ROW_OF_INPUTS_FOR_EACH,), "texts": (Relief.APART, Relief.ROW_OF_INPUTS_FOR_EACH),
    "images": (), "with images": (Relief.PICTURED_APART,), "mixed": (Relief.PICTURED_APART,),
}  # fmt: skip
"""Of each kind of texts for which strategies are tried: what may help where they fail."""


def cheapest_strategy(
    session: Session, tokens: Tokens, strategy: str, tower: Tower | None = None
) -> tuple[str, str, Trial | None]:
    """The cheapest strategy that holds on this model, no dearer than the given one; why not a cheaper one; and what
    trying these took before the model's first sweep.

    Args:
        strategy: "auto", or the only one that will do.
        tower: the vision tower that the sweep will run.

    Raises:
        CapabilityError: it will not do here.
    """
    # where prefix or batched hold they are no cheaper than these; they are there to be asked for
    order = ("staircase", "restart", "full") if strategy == "auto" else (strategy,)
    checks: list[Check] = []
    for candidate in order:
        with session.turn:  # another thread does not take a strategy that is still being tried
            checks.append(Check("") if candidate == "full" else _checked(session, candidate, tokens, tower))
        if not checks[-1].problem:
            problems = dict.fromkeys(check.problem for check in checks if check.problem)
            return candidate, "; ".join(problems), _summed([trial for check in checks for trial in check.trials])
    raise CapabilityError(f"strategy {strategy!r} cannot be had here: {checks[0].problem}")


def _summed(trials: list[Trial]) -> Trial | None:
    calls, token_layers = sum(trial.calls for trial in trials), sum(trial.token_layers for trial in trials)
    return Trial(calls, token_layers, max(trial.layers for trial in trials)) if trials else None


def _checked(session: Session, strategy: str, tokens: Tokens, tower: Tower | None) -> Check:
    """What keeps a strategy from being exact on this model; what has to be tried is tried once and remembered."""
    if not runs_rows(session.engine):
        return Check(f"engine {session.engine.name!r} runs one variant after the other")
    if why := session.atlas.lacking.get("batch"):
        return Check(f"rows of a batch change each other's numbers ({why})")
    if len(session.atlas.layers("resid_pre")) < session.n_layers:
        why = session.atlas.lacking.get("resid_pre", "not in every layer")
        return Check(f"its blocks hand on no stream that has a site, so that no row can join it (resid_pre: {why})")
    if tokens.inputs and len(session.atlas.layers("deepstack")) >= session.n_layers:
        return Check(
            "DeepStack adds visual features after the last layer, behind which no pass of many rows can add them"
        )
    if tokens.inputs and not _whole(tokens):
        return Check("every text has hidden columns between its tokens, which only a pass over all of it has")
    reach = _reach(session, tokens) if strategy in ("staircase", "prefix") else Check("")
    if reach.problem:
        return reach
    remembered = session.strategy_checks
    kind = _kind(session, tokens, remembered.reliefs)
    check = remembered.strategies.get((strategy, kind))
    if check is None:
        check = remembered.strategies[strategy, kind] = _tried(session, strategy, kind, tokens, tower)
    return Check(check.problem, (*reach.trials, *check.trials))


def _tried(session: Session, strategy: str, kind: str, tokens: Tokens, tower: Tower | None) -> Check:
    """Try a strategy as it is, and where it fails with one relief after the other. One that helps stays with the model:
    what it does without was what is wrong, for its other strategies too."""
    reliefs = session.strategy_checks.reliefs
    check = _trial(session, strategy, tokens, reliefs, tower)
    for relief in RELIEFS[kind]:
        if check.problem and relief not in reliefs:
            relieved = _trial(session, strategy, tokens, {**reliefs, relief: check.problem}, tower)
            if not relieved.problem:
                reliefs[relief] = check.problem
            check = Check(relieved.problem, check.trials + relieved.trials)
    return check


def _whole(tokens: Tokens) -> list[int]:
    """Rows without hidden columns between their tokens."""
    return [row for row in range(len(tokens)) if tokens.widths[row] == tokens.lengths[row]]


def _kind(session: Session, tokens: Tokens, reliefs: Mapping[Relief, str]) -> str:
    """What a trial has to hold for: `with images` or `mixed` (some rows have none) where such texts go together."""
    if not tokens.inputs:
        return "texts" if len(tokens.ids) > 1 else "one text"
    shortest = sorted(tokens.lengths[row] for row in _whole(tokens))[:2]
    together = VISION in tokens.spans and not why_apart(session, tokens, reliefs) and 2 * shortest[-1] <= TOGETHER
    if len(shortest) < 2 or not together:
        return "images"
    return "with images" if all(tokens.spans[VISION]) else "mixed"


def _reach(session: Session, tokens: Tokens) -> Check:
    """Whether keys of earlier positions can be had from a clean pass."""
    if ahead := session.atlas.lacking.get("causal"):
        return Check(ahead)
    length = max(tokens.lengths)
    scores = [session.atlas.entries.get(("scores", layer)) for layer in range(session.n_layers)]
    if closed := [i for i, entry in enumerate(scores) if not (entry and entry.write and entry.write.shares_keys)]:
        return Check(f"layer {closed[0]} has no attention that can take keys of earlier positions")
    reaches = session.atlas.reaches.values()
    chunk = min((reach.chunk for reach in reaches if reach.chunk), default=None)
    if chunk and length > chunk:
        return Check(f"attention in chunks of {chunk} does not reach back over the whole text")
    window = min((reach.window for reach in reaches if reach.window), default=None)
    if not window or length <= window:
        return Check("")
    if session.strategy_checks.window is None:
        session.strategy_checks.window = _told_window(session, window)
    return session.strategy_checks.window


def _told_window(session: Session, window: int) -> Check:
    """Keys of earlier positions are cut to a sliding window by what the layer tells its attention: does it tell? A text
    as short as a trial's would show no difference."""
    ids = check_tokens(session)[None]
    assert runs_rows(session.engine)
    rows = Rows([range(ids.shape[1])], {}, ids.shape[1])
    inputs = {"input_ids": ids.to(session.device), **session.without_cache}
    blocks = _blocks(session)
    layers = _representative(session, blocks, middle=True)
    with _shortened(session, blocks, layers) as counted:
        told = clean_pass(session.engine, session.atlas, inputs, rows, None, keep=True).windows
    trials = (Trial(len(counted), sum(counted), len(layers)),)
    for layer in layers:
        if told[layer] is None and session.atlas.reaches[layer].window:
            return Check(f"layer {layer} attends in a window of {window} and does not tell its attention so", trials)
    return Check("", trials)


def _trial(
    session: Session, strategy: str, tokens: Tokens, reliefs: Mapping[Relief, str], tower: Tower | None
) -> Check:
    """Hold a strategy against plain forward passes, on a model of few layers; on all where the others need them."""
    blocks = _blocks(session)
    few, every = _representative(session, blocks), tuple(range(len(blocks)))
    texts = _pictured(session, strategy, tokens, reliefs) if tokens.inputs else [tokens]
    trials: list[Trial] = []
    # a layer may need one that was left out (its keys, say): then all of them run
    for text, layers in dict.fromkeys([*((text, few) for text in texts), (texts[-1], every)]):
        with _shortened(session, blocks, layers) as counted:
            problem = _compare(session, strategy, text, layers, reliefs, tower)
        trials.append(Trial(len(counted), sum(counted), len(layers)))
        if problem is not None:
            return Check(problem, tuple(trials))
    return Check("a forward pass with an edit fails on this model", tuple(trials))


def _pictured(session: Session, strategy: str, tokens: Tokens, reliefs: Mapping[Relief, str]) -> list[Tokens]:
    """Texts with images to try a strategy on, small ones first: one, or where such texts go together two, of unequal
    length unless the strategy runs whole texts, and beside them a text without an image where there are such."""
    kind, config, family = _kind(session, tokens, reliefs), session.hf.config, session.atlas.family
    whole = _whole(tokens)
    pictured = [row for row in whole if VISION in tokens.spans and tokens.spans[VISION][row]] or whole
    rows = [one_row(tokens, row) for row in sorted(pictured, key=tokens.lengths.__getitem__)[:2]]
    batches = []
    for texts in ([corner(row, config, family) for row in rows], rows):
        first = texts[0]
        if kind == "images":
            batches.append(first)
            continue
        n = first.ids.shape[1]
        plain = check_tokens(session).repeat(n // WIDTH + 1)[None, :n]
        more = [Tokens(plain, torch.ones_like(plain, dtype=torch.bool))] if kind == "mixed" else []
        second = first if strategy in WHOLE else shorter(texts[-1], config, family)
        batches.append(Tokens.stack([first, second, *more]))
    return batches


class _Variant(NamedTuple):
    """A vector is added at a layer, in each text at its position from the end."""

    layer: int
    places: tuple[int, ...]

    def vector(self, session: Session) -> Tensor:
        return torch.linspace(-1, 1, session.atlas.shape.d_model, dtype=session.dtype, device=session.device)

    def edit(self, session: Session) -> Edit:
        return Site("resid_pre", self.layer).at(PerRow(self.places)).add(self.vector(session))


def _compare(
    session: Session,
    strategy: str,
    tokens: Tokens,
    layers: tuple[int, ...],
    reliefs: Mapping[Relief, str],
    tower: Tower | None,
) -> str | None:
    """What is wrong with a strategy; None if plain forward passes cannot be had to compare it with.

    For a sweep over several texts, variants of two texts of unequal length (equal for strategies that run whole texts)
    go through a pass together, and some of the first text through one of their own. With images each text's plain
    passes are its own, without padding.
    """
    start_layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    if tokens.inputs:
        texts, variants = tokens, _beside_an_image(tokens, start_layers)
    else:
        ids, mask = check_tokens(session)[None], torch.ones(1, WIDTH, dtype=torch.bool)
        variants = [_Variant(layer, (-3,)) for layer in start_layers]
        if len(tokens.ids) > 1:
            ids, mask = torch.cat([ids, ids.flip(1)]), mask.repeat(2, 1)
            mask[1, WIDTH - (strategy not in WHOLE) :] = False
            variants = [_Variant(layer, (-3, -3)) for layer in start_layers]
            variants += [_Variant(layer, (-1, -3)) for layer in (start_layers[0], start_layers[-1])]
        texts = Tokens(ids, mask)
    edits, scores = [(variant.edit(session),) for variant in variants], (Score("trial", _weighed),)
    plain: dict[int, Tensor] = {}
    try:
        with opened(None, session, texts, edits, scores) as store, Progress("trial") as told:
            plan = Placer(session, texts, edits, scores, None, one_group=True).plan(strategy, "", reliefs)
            rehearsal = _Rehearsal(session, texts, plan, scores, store, tower)
            rehearsal.variants, rehearsal.plain = variants, plain
            rehearsal.run(told)
    except (*FAULTS, InterpError) as error:
        if len(plain) < len(texts):
            return None
        return f"it fails on this model ({type(error).__name__}: {first_line(error)})"
    wanted = torch.stack([plain[text] for text in range(len(texts))], -1)
    differ = float((store.values[..., 0] - wanted.to(store.values)).abs().max() / wanted.abs().max())
    # far above rounding, far below a wrong position or key; models in float64 have modules that compute in float32
    limit = {torch.float64: 1e-6, torch.float32: 1e-4}.get(session.dtype, 5e-2)
    return "" if differ <= limit else f"its numbers differ from full forward passes by {differ:.0e} on this model"


def _beside_an_image(texts: Tokens, start_layers: list[int]) -> list[_Variant]:
    """Variants at each text's first token after the images (the last one, if nothing follows), and at their first."""
    after, first = [], []
    for row, length in enumerate(texts.lengths):
        spans = texts.spans[VISION][row] if VISION in texts.spans else ()
        after.append(min(max((span.stop for span in spans), default=length), length - 1) - length)
        first.append(min((span.start for span in spans), default=0) - length)
    return [
        _Variant(layer, tuple(places))
        for layer, places in ((start_layers[0], after), (start_layers[-1], after), (start_layers[0], first))
    ]


def _weighed(logits: Tensor) -> Tensor:
    """A number that every logit changes."""
    return logits @ torch.linspace(-1, 1, logits.shape[-1]).to(logits)


class _Rehearsal(Runner):
    """A sweep whose variants also run in full: in rows of their own beside the texts of the clean pass, where hooks by
    hand edit them, so that comparing costs no further call; or, of images, in forward passes of their own.

    Attributes:
        plain: per text, scores `[variant]` of those.
    """

    variants: list[_Variant]
    plain: dict[int, Tensor]

    def _clean(self, group: Group) -> CleanPass:
        if self.tokens.inputs:
            for text in group.texts:
                edits = [Site("resid_pre", variant.layer).at(variant.places[text]) for variant in self.variants]
                vectors = [variant.vector(self.session) for variant in self.variants]
                logits = [
                    self._alone(text, (site.add(vector),))[0][0] for site, vector in zip(edits, vectors, strict=True)
                ]
                self.plain[text] = torch.stack([_weighed(row) for row in logits]).cpu()
            return super()._clean(group)
        edited = [(text, variant) for text in group.texts for variant in self.variants]
        blocks, handles = _blocks(self.session), []
        for row, (text, variant) in enumerate(edited, len(group.texts)):
            column = self.tokens.lengths[text] + variant.places[text]
            hook = _adding(variant.vector(self.session), row, column)
            handles.append(blocks[variant.layer].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            clean = super()._clean(group._replace(texts=(*group.texts, *(text for text, _ in edited))))
        finally:
            for handle in handles:
                handle.remove()
        scores = _weighed(clean.value[len(group.texts) :, 0]).view(len(group.texts), -1)
        self.plain.update(zip(group.texts, scores.cpu(), strict=True))
        return clean


def _adding(vector: Tensor, row: int, column: int) -> Callable[..., Any]:
    """A hook that adds to the stream of a row at a column."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[row, column] += vector
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


def _blocks(session: Session) -> list[nn.Module]:
    assert runs_rows(session.engine)
    entries = [session.atlas.entries["resid_pre", layer] for layer in range(session.n_layers)]
    return [session.engine.modules[entry.read.module] for entry in entries if entry.read is not None]


def _representative(session: Session, blocks: list[nn.Module], *, middle: bool = False) -> tuple[int, ...]:
    """The first and the last layer, and of each kind of layer its first and last (and the one in the middle)."""
    kinds: dict[Any, list[int]] = {}
    types = getattr(session.hf.config.get_text_config(), "layer_types", None) or [""] * len(blocks)
    for layer, block in enumerate(blocks):
        kinds.setdefault((str(types[layer : layer + 1]), settings_of(block)), []).append(layer)
    chosen = {0, len(blocks) - 1} | {at for layers in kinds.values() for at in (layers[0], layers[-1])}
    return tuple(sorted(chosen | ({layers[len(layers) // 2] for layers in kinds.values()} if middle else set())))


@contextmanager
def _shortened(session: Session, blocks: list[nn.Module], layers: tuple[int, ...]) -> Iterator[list[int]]:
    """For a while, only these layers compute and the model has few logits; gives the tokens of each call of a layer."""
    counted: list[int] = []
    last: list[Any] = [None]

    def note(_: nn.Module, __: Any, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        counted.append(stream.shape[:-1].numel())
        last[0] = None if isinstance(output, Tensor) else output[1:]

    # blocks of a model return alike: what one returned beside the stream stands for what one that is left out would
    def through(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if last[0] is None else (hidden_states, *last[0])

    forwards: dict[nn.Module, Callable[..., Any]] = {
        block: through for layer, block in enumerate(blocks) if layer not in layers
    }
    head = session.hf.get_output_embeddings()
    if is_plain(head):
        forwards[head] = few_logits(head, slice(LOOKED_AT))
    handles = [blocks[layer].register_forward_hook(note) for layer in layers]
    try:
        with replaced_forwards(forwards):
            yield counted
    finally:
        for handle in handles:
            handle.remove()
