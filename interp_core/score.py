"""Scores: what a run is judged by, one number per example.

A score is a function of the logits at one position, `[batch d_vocab]` to `[batch]`, with a name and the position it
reads (`-1` unless said otherwise); or of an inner site's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import CapabilityError, PlanError, nearest, wrong
from .positions import PerRow, Position, PositionLike, Slice, position
from .readings import ForwardPass
from .sites import Site
from .text import Tokens

__all__ = ["Score", "kl", "logit", "logit_diff", "logprob", "nll", "probability", "projection", "rank", "token_ids"]

Token = int | str
"""A token id, or the word that is one token, its leading space included."""
Target = Token | list[Token] | Tensor | tuple[Tensor, ...]
"""A token for all rows; tokens, one per row; ids `[batch]`; or the ids of each row's span."""


@dataclass(frozen=True, init=False)
class Score:
    """One number per example, of the logits at one position; `SpanScore` reads several, `SiteScore` an inner site.

    `Score(…, span=True)` and `Score(…, of=site)` make those.

    Attributes:
        name: for tables.
        fn: logits `[batch d_vocab]`, and one tensor `[batch]` per target, to values `[batch]`; row by row, so that a
            sweep can give it many variants of one example. A score goes to other processes if this is a function of a
            module, or an object of such a class.
        at: position whose logits it reads.
        targets: tokens; words become ids when the score meets a model.
        needs_clean: `fn` takes the logits of the run without edits too, after the targets; for sweeps only.
        targets_only: `fn` looks at the targets' logits only, so that a sweep computes no others; it is handed
            `[batch target]` then, and where the targets are in it.
        of: the site that it reads instead of logits; None.
    """

    span: ClassVar[bool] = False
    """Whether it reads several positions."""

    name: str
    fn: Callable[..., Float[Tensor, " batch"]]
    at: PositionLike
    targets: tuple[Target, ...]
    needs_clean: bool
    targets_only: bool
    of: Site | None

    def __new__(cls, *args: Any, span: bool = False, of: Site | None = None, **kwargs: Any) -> Score:
        """Of the class that these arguments ask for."""
        return object.__new__(cls if cls is not Score else SiteScore if of is not None else SpanScore if span else cls)

    def __init__(
        self, name: str, fn: Callable[..., Float[Tensor, " batch"]], at: PositionLike = -1,
        targets: tuple[Target, ...] = (), *, clean: bool = False, span: bool = False, narrow: bool = False,
        of: Site | None = None,
    ) -> None:  # fmt: skip
        # Past `__setattr__`, which a frozen class refuses.
        fields = {"name": name, "fn": fn, "at": at, "targets": targets, "of": of}
        vars(self).update(fields, needs_clean=clean, targets_only=narrow)
        if at is None and of is None:
            raise PlanError(wrong(f"score {name}: at=", "a position such as -1, or several with span=True", at))
        if not isinstance(name, str) or not callable(fn):
            raise PlanError(wrong("Score(name, fn)", "a name and a function of logits", (name, fn)))
        takes = "a token id, a word, a list of them (one per row) or a tensor of ids"
        for target in targets:
            if not _is_target(target):
                raise PlanError(wrong(f"score {name}", takes, target))

    def _with(self, **changes: Any) -> Score:
        """The same score with other targets or positions."""
        # Past `__init__`, whose arguments are called otherwise than the fields; what is changed was checked before.
        changed = object.__new__(type(self))
        vars(changed).update(vars(self), **changes)
        return changed

    @property
    def selects(self) -> Position:
        """The positions that it reads; of a site, those of its first axis of positions."""
        return Site("logits").at(self.at).pos or 0

    def seen(self, value: Tensor, count: int) -> Tensor:
        """What `fn` takes of what a pass gives: logits `[row scored d_vocab]`, of which `count` are of the text."""
        return value[:, 0]

    def on(self, model: Any, rows: int) -> Score:
        """The same score with the ids of its targets.

        Args:
            model: whose tokenizer says what words are.
            rows: how many examples there are.

        Raises:
            PlanError: another number of targets than rows, or a word of several tokens.
            CapabilityError: a likelihood of a text, of a model whose positions see later ones.
        """
        if self.fn is _nll and (why := model.atlas.lacking.get("causal")):
            raise CapabilityError(f"score {self.name}: {why}; score the logits at its mask token, logprob(word, at=…)")
        for target in self.targets:
            if _of_each(target) and len(target) < rows:
                self._counted("targets", target, rows)
        if not any(isinstance(target, (str, list)) for target in self.targets):
            return self
        owner = f"score {self.name}"
        ids: list[Target] = []
        for target in self.targets:
            if isinstance(target, str):
                ids.append(int(token_ids(model, target, 1, owner)))
            else:
                ids.append(token_ids(model, target, rows, owner) if isinstance(target, list) else target)
        return self._with(targets=tuple(ids))

    def of_rows(self, numbers: Sequence[int], count: int) -> Score:
        """The same score for some of so many examples.

        Raises:
            PlanError: it has targets or positions for another number of examples.
        """
        at = self.at if self.of is not None else position(self.at)
        if isinstance(at, PerRow):
            self._counted("positions", at.rows, count)
            at = PerRow(tuple(at.rows[number] for number in numbers))
        return self._with(targets=tuple(self._chosen(target, numbers, count) for target in self.targets), at=at)

    def _chosen(self, target: Target, numbers: Sequence[int], count: int) -> Target:
        """A target of some examples."""
        if isinstance(target, (int, str)):
            return target
        if isinstance(target, Tensor):
            if target.ndim:
                self._counted("targets", target, count)
            return target[list(numbers)] if target.ndim else target
        self._counted("targets", target, count)
        if isinstance(target, tuple):
            return tuple(target[number] for number in numbers)
        return [target[number] for number in numbers]

    def _counted(self, what: str, items: Sized, count: int) -> None:
        if len(items) != count:
            raise PlanError(f"score {self.name} has {what} of {len(items)} rows, there are {count}")

    def __call__(self, run: ForwardPass) -> Float[Tensor, " batch"]:
        """The score of a run that kept all logits, or those at this score's position, or the site that it reads.

        Raises:
            PlanError: no run, targets that do not fit it, or a run that kept other logits.
        """
        self._demand_run(run)
        if self.needs_clean:
            raise PlanError(f"score {self.name} compares with a clean run; use it in a sweep")
        logits = run.logits
        if (score := self.on(run.model, len(run.tokens))) is not self:
            return score(run)
        for target in self.targets:
            if _of_each(target):
                self._counted("targets", target, len(run.tokens))
        if any(isinstance(target, tuple) and len({len(ids) for ids in target}) > 1 for target in self.targets):
            raise PlanError(f"score {self.name}: the rows' spans differ in length; run them one by one, or sweep")
        self.fits(logits.shape[-1])
        if logits.site.pos is None:
            return self.rows(self._read(logits.at(self.at)))
        if logits.site != Site("logits").at(self.at):
            raise PlanError(f"score {self.name} reads logits at {self.at}, the run kept {logits.site}")
        return self.rows(self._read(logits))

    def _read(self, logits: Tensor) -> Tensor:
        """What `rows` takes of the logits at this score's positions."""
        read = logits.as_subclass(Tensor)
        if self.span or read.ndim == 2:
            return read
        if read.shape[1] != 1:
            raise PlanError(
                f"score {self.name} reads {read.shape[1]} positions; it takes one, or several with span=True"
            )
        return read[:, 0]

    def _demand_run(self, run: Any) -> None:
        if not isinstance(run, ForwardPass):
            of_logits = "; of logits [row d_vocab] it is score.rows(logits)" if isinstance(run, Tensor) else ""
            takes = "a run, as in score(model.run(text))"
            raise PlanError(wrong(f"score {self.name}", takes, run) + of_logits)

    def fits(self, d_vocab: int) -> None:
        """Refuse targets that the model does not have.

        Raises:
            PlanError: a token id that is not between 0 and d_vocab.
        """
        for target in self.targets:
            assert not isinstance(target, (str, list)), "on() comes first"
            for ids in target if isinstance(target, tuple) else (torch.as_tensor(target),):
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= d_vocab:
                    bad = low if low < 0 else high
                    raise PlanError(f"score {self.name}: no token id {bad}, there are {d_vocab}, 0 to {d_vocab - 1}")

    def words(self, model: Any) -> str:
        """The score in words, with the tokens that it is about as the model writes them: "the logit of ' John' minus
        that of ' Mary'"; of a function of your own its name with them."""
        said = [_one_word(model, target) for target in self.targets]
        if self.fn in _WORDS:
            return _WORDS[self.fn].format(*(word or other for word, other in zip(said, _EACH, strict=False)))
        return f"{self.name}({', '.join(said)})" if said and all(said) else self.name

    def ids(self, example: int) -> Tensor:
        """All target ids of an example, ascending."""
        targets = [target if isinstance(target, (int, str, list)) else _of(target, example) for target in self.targets]
        return torch.cat([torch.as_tensor(ids).flatten().cpu() for ids in targets]).unique()  # sorted, for `rows`

    def rows(
        self, logits: Tensor, example: int | None = None, clean: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Values `[row]` of logits `[row d_vocab]`: one row per example, or all rows of one example; of all tokens, or
        of those `kept`."""
        targets = []
        for target in self.targets:
            if isinstance(target, (str, list)):
                raise PlanError(f"score {self.name}: words and lists are given to a model first: score.on(model, rows)")
            ids = torch.stack(target) if isinstance(target, tuple) and example is None else target
            if example is not None and not isinstance(ids, int):
                ids = _of(ids, example)
            assert not isinstance(ids, tuple)
            ids = torch.as_tensor(ids, device=logits.device)
            ids = ids if kept is None else torch.searchsorted(kept.to(ids.device), ids)
            targets.append(ids.expand(logits.shape[:-1]))
        return self.fn(logits, *targets, *([] if clean is None else [clean]))


class SpanScore(Score):
    """A score of the logits at several positions: `fn` takes `[batch pos d_vocab]`, and ids `[batch pos]`."""

    span = True

    def seen(self, value: Tensor, count: int) -> Tensor:
        """Logits at this text's scored positions; rows of shorter texts are filled up."""
        return value[:, :count]


class SiteScore(Score):
    """A score of an inner site's value in one layer, at the site's own positions `of`: `fn` takes that value
    `[batch …]`, and a sweep ends its passes there."""

    of: Site

    @property
    def selects(self) -> Position:
        """The site's own positions."""
        return self.of.pos or Slice()

    def seen(self, value: Tensor, count: int) -> Tensor:
        """All of the value."""
        return value

    def __call__(self, run: ForwardPass) -> Float[Tensor, " batch"]:
        """The score of a run that read the site."""
        self._demand_run(run)
        return self.rows(run[self.of].as_subclass(Tensor))


def logprob(target: Target, at: PositionLike = -1) -> Score:
    """Log-probability of the target token, in nats: `logprob(" Paris")`, an id, or one per row."""
    return Score("logprob", _logprob, at, (target,))


def probability(target: Target, at: PositionLike = -1) -> Score:
    """Probability of the target token."""
    return Score("probability", _probability, at, (target,))


def logit(target: Target, at: PositionLike = -1) -> Score:
    """Logit of the target token."""
    return Score("logit", _pick, at, (target,), narrow=True)


def logit_diff(target: Target, other: Target, at: PositionLike = -1) -> Score:
    """Logit of the target token minus that of another."""
    return Score("logit_diff", _logit_diff, at, (target, other), narrow=True)


def rank(target: Target, at: PositionLike = -1) -> Score:
    """How many tokens have a larger logit than the target; 0 is best. Not differentiable."""
    return Score("rank", _rank, at, (target,))


def nll(tokens: Tokens, span: str = "target") -> Score:
    """Negative log-likelihood of a named span of the text given what precedes it, summed over its tokens, in nats.

    Raises:
        PlanError: no span of that name, an empty one, or one that begins with the text.
    """
    if not isinstance(tokens, Tokens):
        raise PlanError(wrong("score nll", "Tokens, as in nll(model.tokens(prompt, target=answer))", tokens))
    if span not in tokens.rows.names:
        raise PlanError(f"the text has no span {span!r}. {nearest(span, tokens.rows.names)}")
    places, ids = [], []
    for row, chosen in enumerate(tokens.rows.names[span]):
        if not chosen or chosen[0] == 0:
            raise PlanError(f"span {span!r} of row {row} is empty, or has nothing before it to be predicted from")
        real = tokens.rows.real[row]
        places.append([i - 1 for i in chosen])
        ids.append(tokens.ids[row, [real[i] for i in chosen]])
    return SpanScore("nll", _nll, places, (tuple(ids),))


def kl(at: PositionLike = -1) -> Score:
    """KL divergence of the next-token distribution from that of the run without edits, in nats: KL(clean ‖ edited)."""
    return Score("kl", _kl, at, clean=True)


def projection(site: Site, direction: Float[Tensor, " d"]) -> Score:
    """How far a site's value goes along a direction: value · direction, at the site's one position; a sweep ends its
    passes there.

    Args:
        site: in one layer, at one position: `S.resid_post[5].at(-1)`.

    Raises:
        PlanError: no site and a direction.
    """
    site = Site.parse(site) if isinstance(site, str) else site
    if not isinstance(site, Site):
        raise PlanError(wrong("projection", "a site like S.resid_post[5].at(-1), then a direction", site))
    if not isinstance(direction, Tensor) or direction.ndim != 1 or not direction.is_floating_point():
        raise PlanError(wrong(f"projection of {site}", "a direction, a tensor of numbers [d]", direction))
    return SiteScore(f"projection of {site}", partial(_along, direction), of=site)


def token_ids(model: Any, target: Any, rows: int, owner: str = "score", noun: str = "target") -> Tensor:
    """Ids of tokens `[batch]`.

    Args:
        target: an id or a word, for all rows, or a list or tensor with one per row.
        owner, noun: whose and what it is, for messages.

    Raises:
        PlanError: another number than rows, a word of several tokens, an id that does not exist, or something else.
    """
    if isinstance(target, Tensor):
        target = target.tolist()
    items = list(target) if isinstance(target, (list, tuple)) else [target] * rows
    if len(items) != rows:
        raise PlanError(f"{owner}: {len(items)} {noun}s for {rows} rows; give one per row, or one for all")
    size = model.atlas.shape.d_vocab if hasattr(model, "atlas") else None
    what = f"{owner}: the {noun}"
    ids = [_token_id(model, item, what) for item in items]
    for item in ids:
        if size is not None and not 0 <= item < size:
            raise PlanError(f"{what} {item} is no token id: the model has {size}, 0 to {size - 1}")
    return torch.tensor(ids)


def _token_id(model: Any, item: Any, what: str) -> int:
    if isinstance(item, str):
        if not hasattr(model, "tokens"):
            raise PlanError(f"{what} {item!r} is a word, and there is no model to say which token: give its id")
        ids = model.tokens(item, bos=False).ids[0].tolist()
        if len(ids) != 1:
            words = ", ".join(repr(model.word(token)) for token in ids)
            raise PlanError(f"{what} {item!r} is {len(ids)} tokens ({words}), a score reads one; give its first")
        return int(ids[0])
    if isinstance(item, bool) or not isinstance(item, int):
        raise PlanError(wrong(what, "token ids or words", item))
    return item


def _of_each(target: Target) -> TypeGuard[Tensor | tuple[Tensor, ...]]:
    """Whether it has ids for each row."""
    return isinstance(target, tuple) or (isinstance(target, Tensor) and target.ndim > 0)


def _is_target(target: Any) -> bool:
    whole = (torch.int32, torch.int64)
    if isinstance(target, Tensor):
        return target.dtype in whole and target.numel() > 0
    if isinstance(target, tuple):
        return bool(target) and all(isinstance(ids, Tensor) and _is_target(ids) for ids in target)
    if isinstance(target, list):
        return bool(target) and all(isinstance(item, (int, str)) and _is_target(item) for item in target)
    return bool(target) if isinstance(target, str) else isinstance(target, int) and not isinstance(target, bool)


def _of(target: Tensor | tuple[Tensor, ...], example: int) -> Tensor:
    """An example's part of a target."""
    return target[example] if isinstance(target, tuple) or target.ndim else target


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[..., None])[..., 0]


# What the scores above compute: functions of this module, so that a score goes to other processes by their names.


def _logprob(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(torch.log_softmax(logits, -1), ids)


def _probability(logits: Tensor, ids: Tensor) -> Tensor:
    return _pick(torch.softmax(logits, -1), ids)


def _logit_diff(logits: Tensor, ids: Tensor, others: Tensor) -> Tensor:
    return _pick(logits, ids) - _pick(logits, others)


def _rank(logits: Tensor, ids: Tensor) -> Tensor:
    return (logits > _pick(logits, ids)[:, None]).sum(-1).float()


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    return -_pick(torch.log_softmax(logits, -1), ids).sum(-1)


def _kl(logits: Tensor, clean: Tensor) -> Tensor:
    wanted = torch.log_softmax(clean, -1)
    return (wanted.exp() * (wanted - torch.log_softmax(logits, -1))).sum(-1)


def _along(direction: Tensor, value: Tensor) -> Tensor:
    if value.shape[-1:] != direction.shape:
        raise PlanError(f"projection: the direction has {len(direction)} numbers, the site's value {list(value.shape)}")
    return value @ direction.to(value.device, value.dtype)


_WORDS: dict[Callable[..., Tensor], str] = {
    _logprob: "the log-probability of {}",
    _probability: "the probability of {}",
    _pick: "the logit of {}",
    _logit_diff: "the logit of {} minus that of {}",
    _rank: "the rank of {}",
    _nll: "the negative log-likelihood of the target",
    _kl: "the KL divergence from the run without edits",
}
"""Scores of this module in words; the tokens take the places of braces."""
_EACH = ("each prompt's target", "its rival")
"""Their words where prompts have others each."""


def _one_word(model: Any, target: Target) -> str:
    """The token of a target, quoted; "" of several."""
    if isinstance(target, tuple):
        return ""
    each = target.flatten().tolist() if isinstance(target, Tensor) else target if isinstance(target, list) else [target]
    words = {token if isinstance(token, str) else model.word(token) for token in each}
    return repr(words.pop()) if len(words) == 1 else ""


def __dir__() -> list[str]:
    return __all__
