"""Whether images do in a model what methods on visual tokens take for granted, held on the very texts that they use.

V are a row's visual positions, L the number of layers, p0 the last position of the prompt. In this order:

    places      V is there, holds image tokens only, and as many as the grids of the row's images say
    features    what enters the first layer on V is what the vision tower gives (0)
    elsewhere   with other images of the same grid, `resid_pre[0]` changes on V, and nowhere else (0)
    identity    V's own rows put into `resid_pre[l]`, for the first, the middle and the last l, change nothing (0)
    blind       the other images' rows put into `resid_pre[0]`, DeepStack following, give the run with these images
    removal     knocking out V as keys of text in all layers gives the run in which nothing may attend to V at all
    end         the other images' rows put into `resid_post[L-1]` change nothing at p0
    repeat      a second run gives the same bits (0)
    score       the target's log-probability by `ic.score.nll` is that of a plain forward pass of transformers

The references take other ways than what they check: `features` calls the model's own `get_image_features`; `removal`
masks columns of the attention mask and hands the model the positions that it used before; `score` hooks nothing.
Numbers are largest differences over the largest value, and where no (0) stands, within the tolerance of the coarsest
dtype that values pass through (`interp_core.batteries.sites`). Cost: about twelve forward passes per row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import score
from .. import sites as S
from ..errors import CapabilityError, InterpError, TextError, wrong
from ..model_inputs import model_inputs
from ..text import Tokens
from ..vision.places import VisualToken, placeholder_ids, visual_grid, with_visual_names
from ..visual.replacing import replaced
from .sites import TOLERANCE, coarsest

if TYPE_CHECKING:
    from ..model import Model

EXACT = ("places", "features", "elsewhere", "identity", "repeat")


@dataclass(frozen=True)
class VisualRow:
    """Where one row's visual tokens are.

    Attributes:
        length: real tokens.
        runs: spans of visual tokens, start and stop.
        grids: rows and columns of each tile, image by image.
        tokens: number of visual tokens.
        first: the first visual token that stands for pixels, and for which; None where the family's grids are not
            known.
        last: the last one that does.
    """

    length: int
    runs: tuple[tuple[int, int], ...]
    grids: tuple[str, ...]
    tokens: int
    first: VisualToken | None
    last: VisualToken | None


@dataclass(frozen=True)
class VisualCheck:
    """What `visual_check` found; prints as a table.

    Attributes:
        rows: where visual tokens are, row by row.
        errors: per check, the largest relative difference over the rows; None where it could not be reached.
        limits: per check, what is allowed.
        why: per check that failed or could not be reached, the reason.
    """

    rows: tuple[VisualRow, ...]
    errors: Mapping[str, float | None] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, error in self.errors.items() if error is not None and not error <= self.limits[name]]

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return not self.failed

    def raise_if_failed(self) -> None:
        """Refuse to go on.

        Raises:
            CapabilityError: a check failed; the message names the first, and holds the table.
        """
        if self.failed:
            name = self.failed[0]
            raise CapabilityError(
                f"images do not do in this model what visual methods take for granted ({name}: {self.why[name]}); "
                f"numbers of such methods would not be the model's.\n{self}"
            )

    def __str__(self) -> str:
        lines = [f"{'row':>3} {'T':>5} {'tokens':>6}  {'runs':24} {'grid':16} pixels of first and last"]
        for number, row in enumerate(self.rows):
            runs = " ".join(f"[{start},{stop})" for start, stop in row.runs)
            boxes = " … ".join(_box(token) for token in (row.first, row.last) if token is not None)
            lines.append(
                f"{number:3} {row.length:5} {row.tokens:6}  {runs:24} {' '.join(row.grids):16} {boxes}".rstrip()
            )
        for name, error in self.errors.items():
            mark = "-" if error is None else "FAIL" if name in self.failed else "ok"
            shown = "" if error is None else f"{error:.1e}"
            lines.append(f"{mark:4} {name:10} {shown:8} {self.why.get(name, '')}".rstrip())
        return "\n".join(lines)


def visual_check(model: Model, tokens: Tokens, other: Tokens, *, strict: bool = True) -> VisualCheck:
    """Hold a model's images against what visual methods take for granted; see the module for the checks.

    Args:
        tokens: of texts with images, from `model.tokens` or `model.chat`; with targets, the score is checked too.
        other: the same texts with other images of the same grids, such as blind ones.
        strict: raise where a check fails.

    Raises:
        TextError: no images, or `other` is no such text.
        CapabilityError: with `strict`, a check failed.
    """
    for what, value in (("tokens", tokens), ("other", other)):
        if not isinstance(value, Tokens):
            raise TextError(wrong(f"visual_check({what}=…)", "Tokens of texts with images", value))
    if not torch.equal(tokens.ids, other.ids) or not torch.equal(tokens.mask, other.mask):
        raise TextError(
            "the other images make another text: their grids differ. Give images as large as those they stand in for "
            "(ic.vision.blind_images), with the same texts"
        )
    rows = [_Row(model, with_image, blind) for with_image, blind in zip(tokens, other, strict=True)]
    limit = TOLERANCE.get(coarsest(model), 2e-5)
    errors: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for name in CHECKS:
        for number, row in enumerate(rows):
            error, reason = _measured(name, row)
            worst = errors.get(name)
            # The first row always counts, so that a check that no row reaches stands in the table with its reason;
            # `not <=`, since a NaN is worse than any number.
            if number == 0 or (error is not None and (worst is None or not error <= worst)):
                errors[name] = error
                if reason or (error is not None and not error <= _limit(name, limit)):
                    why[name] = f"row {number}: {reason or f'differs by {error:.1e}'}"
    check = VisualCheck(tuple(row.where for row in rows), errors, {name: _limit(name, limit) for name in CHECKS}, why)
    if strict:
        check.raise_if_failed()
    return check


def _limit(name: str, tolerance: float) -> float:
    return 0.0 if name in EXACT else tolerance


def _measured(name: str, row: _Row) -> tuple[float | None, str]:
    """The difference of one check in one row, with a reason where there is one."""
    try:
        return CHECKS[name](row), ""
    except _Unreached as reason:
        return None, str(reason)
    except InterpError as error:
        return float("inf"), str(error)


class _Unreached(Exception):
    """A check that does not apply."""


class _Row:
    """One row with its images, and with the other ones."""

    def __init__(self, model: Model, tokens: Tokens, other: Tokens) -> None:
        self.model = model
        self.tokens, self.other = (with_visual_names(x, model.hf.config, model.atlas.family) for x in (tokens, other))
        if not self.tokens.spans.get("vision", ((),))[0]:
            raise TextError("a row has no visual tokens; give texts with images")
        self.visual = [i for span in self.tokens.spans["vision"][0] for i in span]
        self.deep = [S.deepstack[layer] for layer in model.layers(S.deepstack)] if "deepstack" in model.sites else []
        self.layers = model.n_layers
        read = [*(S.resid_pre[layer] for layer in self.probed), S.resid_post[self.layers - 1], *self.deep]
        self.run, self.blind = (model.run(x, read=read) for x in (self.tokens, self.other))
        self.where = _where(model, self.tokens, self.visual)

    @property
    def probed(self) -> list[int]:
        """The first, the middle and the last layer."""
        return sorted({0, self.layers // 2, self.layers - 1})

    def logits(self, run: Any) -> Tensor:
        """Logits `[pos d_vocab]` of a run."""
        out: Tensor = run.logits.plain[0]
        return out


def _where(model: Model, tokens: Tokens, visual: list[int]) -> VisualRow:
    runs = tuple((span.start, span.stop) for span in tokens.spans["vision"][0])
    try:
        cells = visual_grid(tokens, model.hf.config, model.atlas.family)[0]
    except CapabilityError:
        cells = []
    tiles: dict[tuple[int, int], tuple[int, int]] = {}
    for cell in cells:
        if cell.col is not None:
            down, across = tiles.get((cell.image, cell.tile), (0, 0))
            tiles[cell.image, cell.tile] = max(down, cell.row + 1), max(across, cell.col + 1)
    grids = tuple(f"{down}x{across}" for down, across in tiles.values())
    shown = [cell for cell in cells if cell.box is not None]
    first, last = (shown[0], shown[-1]) if shown else (None, None)
    return VisualRow(tokens.lengths[0], runs, grids, len(visual), first, last)


def _box(token: VisualToken) -> str:
    return "none" if token.box is None else f"({', '.join(f'{edge:g}' for edge in token.box)})"


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; infinite where one is no number."""
    a, b = a.as_subclass(Tensor).double(), b.as_subclass(Tensor).double()
    far = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
    # `max` over layers would drop a NaN, `max(0.0, nan)` being 0; infinity stays.
    return far if far == far else float("inf")


def _places(row: _Row) -> float:
    ids, config = row.tokens.ids[0], row.model.hf.config
    held = {ids[i].item() for i in row.visual}
    if not held <= placeholder_ids(config):
        raise TextError(f"visual positions hold the ids {sorted(held)}")
    elsewhere = [i for i in range(len(ids)) if ids[i].item() in placeholder_ids(config) and i not in row.visual]
    if elsewhere:
        raise TextError(f"image tokens at {elsewhere} are not among the visual positions")
    if row.where.first is None:
        raise _Unreached("it is not known how this family lays visual tokens over an image")
    return 0.0


def _features(row: _Row) -> float:
    inner = getattr(row.model.hf, "model", row.model.hf)
    call = getattr(inner, "get_image_features", None)
    if call is None:
        raise _Unreached(f"{type(inner).__name__} has no get_image_features")
    placed = model_inputs(row.model, row.tokens)
    takes = inspect.signature(call).parameters
    with row.model.turn, torch.no_grad(), row.model.fresh():
        out = call(
            **{name: placed[name] for name in row.tokens.inputs if name in takes}, return_dict=True
        ).pooler_output
    parts = list(out) if isinstance(out, (list, tuple)) else [out]
    features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    seen = row.run[S.resid_pre[0]].plain[0, row.visual]
    if features.shape != seen.shape:
        raise TextError(f"the tower gives {list(features.shape)}, the text has {list(seen.shape)}")
    return _distance(seen, features)


def _elsewhere(row: _Row) -> float:
    with_image, blind = (run[S.resid_pre[0]].plain[0] for run in (row.run, row.blind))
    text = [i for i in range(len(with_image)) if i not in set(row.visual)]
    # Otherwise `blind` and `end` would hold of any model: they put rows in that are there already.
    if torch.equal(with_image[row.visual], blind[row.visual]):
        raise TextError("the other images are the same to the model; give images that differ")
    return _distance(with_image[text], blind[text]) if text else 0.0


def _identity(row: _Row) -> float:
    worst = 0.0
    for layer in row.probed:
        again = row.model.run(row.tokens, edits=replaced(row.run, layer, "keep"), allow_noop=True)
        worst = max(worst, _distance(row.logits(again), row.logits(row.run)))
    return worst


def _blind(row: _Row) -> float:
    patched = row.model.run(row.tokens, edits=replaced(row.blind, 0))
    return _distance(row.logits(patched), row.logits(row.blind))


def _removal(row: _Row) -> float:
    layers = row.model.layers(S.pattern) if "pattern" in row.model.sites else []
    # One layer without a knockout (linear attention, say) lets V through, and the two passes differ by right.
    if len(layers) < row.layers:
        missing = row.model.can("pattern", "write") or "other layers mix positions in other ways"
        raise _Unreached(f"attention can be knocked out in {len(layers)} of {row.layers} layers ({missing})")
    edit = S.pattern.knockout(query="text", key="vision")
    knocked = row.logits(row.model.run(row.tokens, edits=edit, allow_noop=True))
    text = [i for i in range(len(knocked)) if i not in set(row.visual)]
    return _distance(knocked[text], _without_columns(row)[text])


def _without_columns(row: _Row) -> Tensor:
    """Logits of transformers' own pass in which no token may attend to V, at the positions that tokens had with it."""
    model = row.model
    block = model.module("block", 0)
    path = next(name for name, module in model.hf.named_modules() if module is block)
    text_model = model.hf.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    positions: list[Any] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs.get("position_ids"))

    # transformers counts positions from the attention mask, and M-RoPE from the images too: without V's columns every
    # later token would move. So one pass with the whole mask tells the positions, which the second is handed.
    placed = {name: value for name, value in model_inputs(model, row.tokens).items() if name != "attention_mask"}
    mask = row.tokens.mask.clone()
    mask[:, row.visual] = False
    with model.turn, torch.no_grad(), model.fresh():
        handle = text_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            model.hf(**placed, attention_mask=row.tokens.mask.long().to(model.device), use_cache=False)
        finally:
            handle.remove()
        count = torch.arange(mask.shape[1], device=model.device)[None]
        places = count if not positions or positions[0] is None else positions[0]
        placed |= {"position_ids": places, "attention_mask": mask.long().to(model.device)}
        out: Tensor = model.hf(**placed, use_cache=False).logits[0]
    return out


def _end(row: _Row) -> float:
    # Behind the last block nothing moves between positions any more: what is put in on V cannot reach p0.
    patched = row.model.run(row.tokens, edits=replaced(row.blind, row.layers))
    at = row.tokens.spans["prompt"][0][0].stop - 1 if "prompt" in row.tokens.spans else row.tokens.lengths[0] - 1
    return _distance(row.logits(patched)[at], row.logits(row.run)[at])


def _repeat(row: _Row) -> float:
    again = row.model.run(row.tokens)
    return 0.0 if torch.equal(row.logits(again), row.logits(row.run)) else float("inf")


def _score(row: _Row) -> float:
    if "target" not in row.tokens.spans:
        raise _Unreached("the text has no target")
    scored = score.nll(row.tokens)(row.run).double()
    placed = model_inputs(row.model, row.tokens)
    with row.model.turn, torch.no_grad(), row.model.fresh():
        logits = row.model.hf(**placed, use_cache=False).logits[0].double()
    plain = logits.log_softmax(-1)
    target = row.tokens.spans["target"][0][0]
    ids = row.tokens.ids[0, list(target)].to(plain.device)
    # The token at i is predicted by the logits at i - 1.
    wanted = -plain[[i - 1 for i in target], ids].sum(-1, keepdim=True)
    # A probability near 1 has a log near 0, but is rounded as the logits are that it comes from.
    scale = logits[[i - 1 for i in target]].abs().max().clamp(min=1e-12)
    far = float((scored.as_subclass(Tensor) - wanted).abs().max() / torch.maximum(scale, wanted.abs().max()))
    return far if far == far else float("inf")


CHECKS: Mapping[str, Callable[[_Row], float]] = {
    "places": _places, "features": _features, "elsewhere": _elsewhere, "identity": _identity, "blind": _blind,
    "removal": _removal, "end": _end, "repeat": _repeat, "score": _score,
}  # fmt: skip
"""By name, in order."""
