"""Which strategy a sweep takes: the cheapest that is exact on this model, which is tried before its first sweep.

The trial costs what a few layers cost on a few tokens. Of layers that are built alike the first and the last take part;
the others hand the stream through, and of the unembedding some rows are left. So shortened, the model is held against
itself: a strategy's numbers against those of plain forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches import one_row
from ..checks.selfcheck import WIDTH, check_tokens
from ..engines.replace import replaced_forwards
from ..engines.torch import TorchEngine
from ..engines.tower import Tower
from ..errors import CapabilityError, InterpError
from ..identity import settings_of
from ..positions import VISION, PerRow, Rows
from ..progress import Progress
from ..readout import is_plain
from ..score import Score
from ..session import Session
from ..sites import Edit, Site
from ..strategy_checks import Trial
from ..text import Tokens
from ..vision.corner import corner, shorter
from .clean import CleanPass, clean_pass
from .plan import APART, EACH, PICTURED, TOGETHER, WHOLE, Group, apart
from .runner import Runner
from .store import opened

FAULTS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a model raises that is called in a way that it does not take."""
WINDOW = "sliding windows"
"""Under this a model remembers whether its layers tell their attention of them."""
SEEN = 64
"""Rows of the unembedding that a trial looks at."""


RELIEFS = {"one text": (EACH,), "texts": (APART, EACH), "images": (), "with images": (PICTURED,), "mixed": (PICTURED,)}
"""Of each kind of input for which strategies are tried: what may help where they fail."""


def cheapest_strategy(
    model: Session, tokens: Tokens, asked: str, tower: Tower | None = None
) -> tuple[str, str, Trial | None]:
    """The cheapest strategy that holds on this model, no dearer than asked for; why not a cheaper one; and what trying
    these took before the model's first sweep.

    Args:
        tower: the vision tower that the sweep will run.
    """
    order = ("staircase", "restart", "full") if asked == "auto" else (asked,)
    found: list[str] = []
    trials: list[Trial] = []
    for strategy in order:
        with model.turn:  # another thread does not take a strategy that is still being tried
            problem = "" if strategy == "full" else _problem(model, strategy, tokens, trials, tower)
        if not problem:
            return strategy, "; ".join(dict.fromkeys(found)), _summed(trials)
        found.append(problem)
    raise CapabilityError(f"strategy {asked!r} cannot be had here: {found[0]}")


def _summed(trials: list[Trial]) -> Trial | None:
    calls, token_layers = sum(one.calls for one in trials), sum(one.token_layers for one in trials)
    return Trial(calls, token_layers, max(one.layers for one in trials)) if trials else None


def _problem(model: Session, strategy: str, tokens: Tokens, trials: list[Trial], tower: Tower | None) -> str:
    """What keeps a strategy from being exact on this model, tried once and remembered."""
    if type(model.engine) is not TorchEngine:
        return f"engine {model.engine.name!r} runs one variant after the other"
    if tokens.inputs and len(model.atlas.layers("deepstack")) >= model.n_layers:
        return "DeepStack adds visual features after the last layer, behind which no pass of many rows can add them"
    if tokens.inputs and not _whole(tokens):
        return "every text has hidden columns between its tokens, which only a pass over all of it has"
    if strategy in ("staircase", "prefix") and (problem := _unreached(model, tokens, trials)):
        return problem
    kind = _kind(model, tokens)
    tried, key = model.tried, f"{strategy}, {kind}"
    if key not in tried:
        own = model.trials[key] = []
        tried[key] = ""  # so that the trial's own sweeps go ahead
        tried[key] = _trial(model, strategy, tokens, own, tower)
        for relief in RELIEFS[kind]:
            if tried[key] and relief not in tried:
                tried[relief], tried[key] = tried[key], ""
                tried[key] = _trial(model, strategy, tokens, own, tower)
                if tried[key]:
                    del tried[relief]  # that was not it
    trials += model.trials.get(key, [])
    return tried[key]


def _whole(tokens: Tokens) -> list[int]:
    """Rows without hidden columns between their tokens."""
    return [row for row in range(len(tokens)) if tokens.widths[row] == tokens.lengths[row]]


def _kind(model: Session, tokens: Tokens) -> str:
    """What a trial has to hold for: `with images` or `mixed` (some rows have none) where such texts go together."""
    if not tokens.inputs:
        return "texts" if len(tokens.ids) > 1 else "one text"
    shortest = sorted(tokens.lengths[row] for row in _whole(tokens))[:2]
    together = VISION in tokens.spans and not apart(model, tokens) and 2 * shortest[-1] <= TOGETHER
    if len(shortest) < 2 or not together:
        return "images"
    return "with images" if all(tokens.spans[VISION]) else "mixed"


def _unreached(model: Session, tokens: Tokens, trials: list[Trial]) -> str:
    """Why keys of earlier positions cannot be had from a clean pass; empty if they can."""
    config, length = model.hf.config.get_text_config(), max(tokens.lengths)
    closed = [layer for layer in range(model.n_layers) if ("scores", layer) not in model.atlas.entries]
    if closed or any(model.atlas.entries["scores", i].write is None for i in range(model.n_layers)):
        return f"layer {closed[0] if closed else 0} has no attention that can take keys of earlier positions"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and length > chunk:
        return f"attention in chunks of {chunk} does not reach back over the whole text"
    window = getattr(config, "sliding_window", None)
    if not window or length <= window or not getattr(config, "use_sliding_window", True):
        return ""
    if WINDOW not in model.tried:
        own = model.trials[WINDOW] = []
        model.tried[WINDOW] = _silent_window(model, window, own)
    trials += model.trials.get(WINDOW, [])
    return model.tried[WINDOW]


def _silent_window(model: Session, window: int, trials: list[Trial]) -> str:
    """Keys of earlier positions are cut to a sliding window by what the layer tells its attention: does it tell?"""
    kinds, ids = getattr(model.hf.config.get_text_config(), "layer_types", None), check_tokens(model)[None]
    assert isinstance(model.engine, TorchEngine)
    rows = Rows([range(ids.shape[1])], {}, ids.shape[1])
    inputs = {"input_ids": ids.to(model.device), "use_cache": False}
    blocks = _blocks(model)
    layers = _representative(model, blocks, middle=True)
    with _shortened(model, blocks, layers) as counted:
        told = clean_pass(model.engine, model.atlas, inputs, rows, None, keep=True).windows
    trials.append(Trial(len(counted), sum(counted), len(layers)))
    for layer in layers:
        if told[layer] is None and (kinds is None or kinds[layer] == "sliding_attention"):
            return f"layer {layer} attends in a window of {window} and does not tell its attention so"
    return ""


def _trial(model: Session, strategy: str, tokens: Tokens, trials: list[Trial], tower: Tower | None) -> str:
    """Hold a strategy against plain forward passes, on a model of few layers; on all where the others need them."""
    blocks = _blocks(model)
    few, every = _representative(model, blocks), tuple(range(len(blocks)))
    texts = _pictured(model, strategy, tokens) if tokens.inputs else [tokens]
    for text, layers in dict.fromkeys([*((text, few) for text in texts), (texts[-1], every)]):
        with _shortened(model, blocks, layers) as counted:
            problem = _compare(model, strategy, text, layers, tower)
        calls, token_layers = len(counted), sum(counted)
        trials.append(Trial(calls, token_layers, len(layers)))
        if problem is not None:
            return problem
    return "a forward pass with an edit fails on this model"


def _pictured(model: Session, strategy: str, tokens: Tokens) -> list[Tokens]:
    """Texts with images to try a strategy on, small ones first: one, or where such texts go together two, of unequal
    length unless the strategy runs whole texts, and beside them a text without an image where there are such."""
    kind, whole = _kind(model, tokens), strategy in WHOLE
    fit = _whole(tokens)
    seen = [row for row in fit if VISION in tokens.spans and tokens.spans[VISION][row]] or fit
    rows = [one_row(tokens, row) for row in sorted(seen, key=tokens.lengths.__getitem__)[:2]]
    out = []
    for texts in ([corner(row, model.hf.config, model.atlas.family) for row in rows], rows):
        first = texts[0]
        if kind == "images":
            out.append(first)
            continue
        n = first.ids.shape[1]
        plain = check_tokens(model).repeat(n // WIDTH + 1)[None, :n]
        more = [Tokens(plain, torch.ones_like(plain, dtype=torch.bool))] if kind == "mixed" else []
        out.append(
            Tokens.stack([first, first if whole else shorter(texts[-1], model.hf.config, model.atlas.family), *more])
        )
    return out


class _Variant(NamedTuple):
    """A vector is added at a layer, in each text at its position from the end."""

    layer: int
    places: tuple[int, ...]

    def vector(self, model: Session) -> Tensor:
        return torch.linspace(-1, 1, model.atlas.shape.d_model, dtype=model.dtype, device=model.device)

    def edit(self, model: Session) -> Edit:
        return Site("resid_pre", self.layer).at(PerRow(self.places)).add(self.vector(model))


def _compare(model: Session, strategy: str, tokens: Tokens, layers: tuple[int, ...], tower: Tower | None) -> str | None:
    """What is wrong with a strategy; None if plain forward passes cannot be had to compare it with.

    For a sweep over several texts, variants of two texts of unequal length (equal for strategies that run whole texts)
    go through a pass together, and some of the first text through one of their own. With images each text's plain
    passes are its own, without padding.
    """
    start_layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    if tokens.inputs:
        texts, variants = tokens, _beside_an_image(tokens, start_layers)
    else:
        ids, mask = check_tokens(model)[None], torch.ones(1, WIDTH, dtype=torch.bool)
        variants = [_Variant(at, (-3,)) for at in start_layers]
        if len(tokens.ids) > 1:
            ids, mask = torch.cat([ids, ids.flip(1)]), mask.repeat(2, 1)
            mask[1, WIDTH - (strategy not in WHOLE) :] = False
            variants = [_Variant(at, (-3, -3)) for at in start_layers]
            variants += [_Variant(at, (-1, -3)) for at in (start_layers[0], start_layers[-1])]
        texts = Tokens(ids, mask)
    rehearsal = _Rehearsal(model, texts, variants)
    rehearsal.tower = tower
    try:
        with opened(None, model, texts, rehearsal.variants, rehearsal.scores) as store, Progress("trial") as told:
            rehearsal.run(rehearsal.plan(strategy, "", store.done), store, told)
    except (*FAULTS, InterpError) as error:
        if len(rehearsal.wanted) < len(texts):
            return None
        return f"it fails on this model ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    wanted = torch.stack([rehearsal.wanted[text] for text in range(len(texts))], -1)
    differ = float((store.values[..., 0] - wanted.to(store.values)).abs().max() / wanted.abs().max())
    limit = {torch.float64: 1e-6, torch.float32: 1e-4}.get(model.dtype, 5e-2)  # some modules compute in float32 always
    return "" if differ <= limit else f"its numbers differ from full forward passes by {differ:.0e} on this model"


def _beside_an_image(texts: Tokens, start_layers: list[int]) -> list[_Variant]:
    """Variants at each text's first token after the images (the last one, if nothing follows), and at their first."""
    after, first = [], []
    for row, length in enumerate(texts.lengths):
        runs = texts.spans[VISION][row] if VISION in texts.spans else ()
        after.append(min(max((run.stop for run in runs), default=length), length - 1) - length)
        first.append(min((run.start for run in runs), default=0) - length)
    return [
        _Variant(at, tuple(places))
        for at, places in ((start_layers[0], after), (start_layers[-1], after), (start_layers[0], first))
    ]


def _judged(logits: Tensor) -> Tensor:
    return logits @ torch.linspace(-1, 1, logits.shape[-1]).to(logits)


class _Rehearsal(Runner):
    """A sweep that also runs its variants in full: in rows of their own beside the texts of a clean pass, where hooks
    by hand edit them, or, of images, in forward passes of their own.

    Attributes:
        wanted: per text, scores `[variant]` of those.
    """

    def __init__(self, model: Session, texts: Tokens, given: list[_Variant]) -> None:
        super().__init__(model, texts, tuple((one.edit(model),) for one in given), (Score("trial", _judged),), None)
        self.given = given
        self.wanted: dict[int, Tensor] = {}

    def _groups(self, strategy: str, swept: list[int], singles: list[list[int]]) -> list[tuple[int, ...]]:
        if self.tokens.inputs and not self.apart:
            return [tuple(swept)]
        return super()._groups(strategy, swept, singles)

    def _clean(self, group: Group) -> CleanPass:
        if self.tokens.inputs:
            numbers = range(len(self.given))
            for text in group.texts:
                alone = [
                    self._alone(one_row(self.tokens, text), text, self.single(number, text))[0][0] for number in numbers
                ]
                self.wanted[text] = torch.stack([_judged(logits) for logits in alone]).cpu()
            return super()._clean(group)
        edited = [(text, one) for text in group.texts for one in self.given]
        blocks, handles = _blocks(self.model), []
        for row, (text, one) in enumerate(edited, len(group.texts)):
            hook = _adding(one.vector(self.model), row, self.tokens.lengths[text] + one.places[text])
            handles.append(blocks[one.layer].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            clean = super()._clean(group._replace(texts=(*group.texts, *(text for text, _ in edited))))
        finally:
            for handle in handles:
                handle.remove()
        scores = _judged(clean.value[len(group.texts) :, 0]).view(len(group.texts), -1)
        self.wanted.update(zip(group.texts, scores.cpu(), strict=True))
        return clean


def _adding(vector: Tensor, row: int, column: int) -> Callable[..., Any]:
    """A hook that adds to the stream of a row at a column."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[row, column] += vector
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


def _blocks(model: Session) -> list[nn.Module]:
    assert isinstance(model.engine, TorchEngine)
    entries = [model.atlas.entries["resid_pre", layer] for layer in range(model.n_layers)]
    return [model.engine.modules[entry.read.module] for entry in entries if entry.read is not None]


def _representative(model: Session, blocks: list[nn.Module], *, middle: bool = False) -> tuple[int, ...]:
    """The first and the last layer, and of each kind of layer its first and last (and the one in the middle)."""
    kinds: dict[Any, list[int]] = {}
    types = getattr(model.hf.config.get_text_config(), "layer_types", None) or [""] * len(blocks)
    for layer, block in enumerate(blocks):
        kinds.setdefault((str(types[layer : layer + 1]), settings_of(block)), []).append(layer)
    chosen = {0, len(blocks) - 1} | {at for layers in kinds.values() for at in (layers[0], layers[-1])}
    return tuple(sorted(chosen | ({layers[len(layers) // 2] for layers in kinds.values()} if middle else set())))


@contextmanager
def _shortened(model: Session, blocks: list[nn.Module], layers: tuple[int, ...]) -> Iterator[list[int]]:
    """For a while, only these layers compute and the model has few logits; gives the tokens of each call of a layer."""
    counted: list[int] = []
    last: list[Any] = [None]

    def note(_: nn.Module, __: Any, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        counted.append(stream.shape[:-1].numel())
        last[0] = None if isinstance(output, Tensor) else output[1:]

    def through(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if last[0] is None else (hidden_states, *last[0])

    forwards: dict[nn.Module, Callable[..., Any]] = {
        block: through for layer, block in enumerate(blocks) if layer not in layers
    }
    head = model.hf.get_output_embeddings()
    if is_plain(head):
        weight, bias = head.weight[:SEEN].detach(), None if head.bias is None else head.bias[:SEEN].detach()
        forwards[head] = lambda x: nn.functional.linear(x, weight, bias)
    handles = [blocks[layer].register_forward_hook(note) for layer in layers]
    try:
        with replaced_forwards(forwards):
            yield counted
    finally:
        for handle in handles:
            handle.remove()
