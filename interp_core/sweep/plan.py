"""What a sweep will do: where each variant begins, which go together in a pass, and what that costs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..architectures.atlas import Entry
from ..architectures.hook_points import HookPoint
from ..engines.program import forward_order
from ..engines.tower import Tower
from ..errors import CapabilityError, PlanError
from ..inputs import undivided
from ..positions import ALL, VISION, Position, Slice, Span, is_single, resolve
from ..score import Score
from ..session import Session
from ..sites import TENSOR_OPS, Edit, Site
from ..strategy_checks import Trial
from ..text import Tokens

WHOLE = ("restart", "batched")
"""Strategies that run all columns of a text, so that only equally long texts go together."""
TOGETHER = 512
"""Tokens of the texts that share a clean pass, at most: a matrix product of so many rows runs at the machine's rate."""
FILLED = 1.125
"""Columns that they may have, filled up to one length, for each of their tokens."""
SHORT = 16
"""Columns of a text with images for each one before them at which these are run too: over a few earlier keys, attention
in two parts costs more than they do in the model's own kernel."""
APART = "several texts in one pass"
PICTURED = "several texts with images in one pass"
EACH = "one row of inputs for all variants"
"""Under these a model remembers that they were tried and do not hold, and why: texts then go alone, and a model that
shapes its output like its input is called with a row for each variant."""
STRATEGIES = ("auto", "staircase", "restart", "prefix", "batched", "full")


class Step(NamedTuple):
    """A variant on one text: its edits layer by layer with positions in this text, and where they begin."""

    number: int
    text: int
    edits: tuple[Edit, ...]
    layer: int
    start: int


class Pass(NamedTuple):
    """One pass over some variants, each on `columns` tokens from its first one on."""

    steps: tuple[Step, ...]
    columns: int


class Group(NamedTuple):
    """Texts of the batch that share a clean pass over `width` columns, and the passes over their variants."""

    texts: tuple[int, ...]
    width: int
    passes: list[Pass]


@dataclass
class SweepPlan:
    """How a sweep is carried out.

    Attributes:
        strategy: what was chosen.
        why: why nothing cheaper was.
        n_layers, lengths: of the model, and tokens per row of the batch.
        top: layers that a pass runs: all, unless an inner site is scored.
        groups: texts that go together, with their passes.
        singles: per row, variants that get a forward pass of their own.
        row_bytes: estimated memory of one variant in the widest pass.
        trial: what trying the strategy on the model took before.
    """

    strategy: str
    why: str
    n_layers: int
    top: int
    lengths: list[int]
    n_variants: int
    groups: list[Group] = field(default_factory=list)
    singles: list[list[int]] = field(default_factory=list)
    row_bytes: int = 0
    trial: Trial | None = None

    @property
    def passes(self) -> list[Pass]:
        """All passes over variants."""
        return [one for group in self.groups for one in group.passes]

    @property
    def token_layers(self) -> int:
        """Token-layers that will be executed."""
        steps = sum((self.top - max(step.layer, 0)) * one.columns for one in self.passes for step in one.steps)
        alone = sum(length * len(singles) for length, singles in zip(self.lengths, self.singles, strict=True))
        return steps + self.top * (alone + sum(len(group.texts) * group.width for group in self.groups))

    @property
    def naive(self) -> int:
        """Token-layers of one full forward pass per variant."""
        return self.n_variants * self.n_layers * sum(self.lengths)

    def explain(self) -> str:
        """Strategy, cost against one full forward pass per variant, memory, and why nothing cheaper."""
        rows = max((len(one.steps) for one in self.passes), default=0)
        lines = [
            f"strategy     {self.strategy}",
            f"variants     {self.n_variants} on {len(self.lengths)} text(s) of {max(self.lengths)} tokens or less",
            f"passes       {len(self.groups)} clean, {len(self.passes)} with up to {rows} variants, "
            f"{sum(map(len, self.singles))} with one",
            f"token-layers {self.token_layers:,} against {self.naive:,} of one full forward pass per variant "
            f"({self.naive / self.token_layers:.1f}× fewer)",
            f"memory       about {rows * self.row_bytes / 2**20:,.1f} MiB for the widest pass",
        ]
        if self.trial is not None:
            lines.append(
                f"trial        {self.trial.token_layers:,} token-layers more, once per model: {self.trial.calls} calls "
                f"of {self.trial.layers} layers"
            )
        return "\n".join(lines + ([f"not cheaper: {self.why}"] if self.why else []))


def named_edits(edits: Sequence[Edit]) -> str:
    """A variant, for messages."""
    return ", ".join(map(str, edits)) or "no edit"


def apart(model: Session, tokens: Tokens) -> str:
    """Why texts of a batch go one by one; empty if they can go together."""
    if len(tokens) < 2:
        return ""
    if not tokens.inputs:
        return model.tried.get(APART, "")
    if whole := undivided(tokens):
        return f"{', '.join(whole)} cannot be split into rows"
    lacking = model.atlas.lacking.get("right padding", "")
    return model.tried.get(PICTURED, "") or (lacking and f"padding changes this model's numbers ({lacking})")


class Planner:
    """What a sweep has to do: every variant placed on every row of the batch, and passes that carry many of them."""

    def __init__(
        self,
        model: Session,
        tokens: Tokens,
        variants: tuple[tuple[Edit, ...], ...],
        scores: tuple[Score, ...],
        budget: int | None,
    ) -> None:
        self.model, self.tokens, self.variants, self.scores = model, tokens, variants, scores
        self.score = score = scores[0]
        for other in scores[1:]:
            if (other.at, other.of, other.span) != (score.at, score.of, score.span):
                raise PlanError(f"scores {score.name} and {other.name} read different places; sweep once for each")
        self.budget = budget if budget is not None else _free(model.device) // 2
        self._resolved: dict[tuple[Position, bool], list[list[int]]] = {}
        self.stacked = len(model.atlas.layers("deepstack"))
        self.top, self.ceiling = model.n_layers, (model.n_layers, math.inf)
        if score.of is None:
            self.scored = self._local(Site("logits").at(score.at).pos or 0)
        else:
            self._inner(score.of)
            self.scored = self._local(score.of.pos or Slice())
        for row, places in enumerate(self.scored):
            if len(places) != 1 and not score.span and score.of is None:
                raise PlanError(f"score {score.name} reads {len(places)} positions of row {row}; it takes one")
        self.widths = [self._width(row) for row in range(len(tokens))]

    def _inner(self, site: Site) -> None:
        """Hold an inner site that is scored against the model: one layer, readable; and where passes end."""
        entries = self.model.atlas.select(site)
        if site.info.visual:
            raise PlanError(
                f"score {self.score.name} reads {site}; a sweep scores sites of the language model's layers"
            )
        if len(entries) != 1 or not site.info.layered:
            raise PlanError(f"score {self.score.name} reads {site}; it takes a site of one layer, as {site.name}[0]")
        (entry,) = entries
        if why := self.model.can(site.name, "read"):
            raise CapabilityError(f"score {self.score.name} reads {site}: {why}")
        self.top = entry.layer + (site.name != "resid_pre")
        self.ceiling = forward_order(entry, self.model.n_layers)

    def site(self, row: int) -> Site | None:
        """The inner site that is scored, with positions of one row."""
        of = self.score.of
        return None if of is None else _at(replace(of, pos=None, key=None), self._places(of, row))

    def _width(self, row: int) -> int:
        """Columns of a row that are run: what lies behind every edit and everything scored is not."""
        of = self.score.of
        if of is not None and "key" in of.info.axes:
            return self.tokens.lengths[row]
        seen = max((run.stop for run in self._images(row)), default=0)  # a token may see its whole image
        return max(*self.scored[row], self._last(row), seen - 1) + 1

    def _images(self, row: int) -> Sequence[Span]:
        """Where visual tokens lie in a row."""
        return self.tokens.spans[VISION][row] if self.tokens.inputs and VISION in self.tokens.spans else ()

    def _local(self, chosen: Position, tower: bool = False) -> list[list[int]]:
        """Per row, what a position selects, counted in the row; variants share positions, so each is resolved once.

        Args:
            tower: of a site in the vision tower, which counts patches.
        """
        key, rows = (chosen, tower), self.tokens.rows
        if tower:
            if rows.patches is None:
                return [[] for _ in rows.real]
            rows = rows.patches.rows
        if key not in self._resolved:
            for row, (real, columns) in enumerate(zip(rows.real, resolve(chosen, rows), strict=True)):
                if padding := sorted({*columns} - {*real}):
                    raise PlanError(
                        f"column {padding[0]} of row {row} is padding; a sweep edits and scores real tokens"
                    )
                self._resolved.setdefault(key, []).append([real.index(column) for column in columns])
        return self._resolved[key]

    def _places(self, site: Site, row: int) -> dict[str, int | list[int]]:
        """Positions that a site selects in a row: `pos`, and `key`."""
        places: dict[str, int | list[int]] = {}
        for axis, chosen in (("pos", site.pos), ("key", site.key)):
            if chosen is not None:
                local = self._local(chosen, site.info.tower)[row]
                places[axis] = local[0] if is_single(chosen) else local
        return places

    def _last(self, row: int) -> int:
        """The last position that any edit names."""
        sites = [edit.site for edits in self.variants for edit in edits if not edit.site.info.tower]
        places = [place for site in sites for place in self._places(site, row).values()]
        return max((max(p) if isinstance(p, list) and p else p if isinstance(p, int) else 0 for p in places), default=0)

    def plan(self, strategy: str, why: str, done: Tensor) -> SweepPlan:
        """The passes of a strategy, for what is not `done` `[variant batch]`."""
        why = "; ".join(filter(None, (why, f"texts go one by one: {self.apart}" if self.apart else "")))
        plan = SweepPlan(strategy, why, self.model.n_layers, self.top, self.widths, len(self.variants))
        steps: list[list[Step]] = []
        # holes in a row are columns of their own, which only a pass over all of it has
        gaps = [width > length for width, length in zip(self.tokens.widths, self.tokens.lengths, strict=True)]
        for row in range(len(self.tokens)):
            found: list[Step] = []
            singles: list[int] = []
            for number, edits in enumerate(self.variants):
                if not done[number, row]:
                    step = None if strategy == "full" or gaps[row] else self._step(number, edits, row, strategy)
                    singles.append(number) if step is None else found.append(step)
            plan.singles.append(singles)
            steps.append(found)
        for texts in self._groups(strategy, [row for row, found in enumerate(steps) if found], plan.singles):
            width = max(self._columns[text] for text in texts)
            passes = self._passes([step for text in texts for step in steps[text]], width, plan)
            plan.groups.append(Group(texts, width, list(passes)))
        return plan

    @property
    def _columns(self) -> list[int]:
        """Columns of each row that a clean pass has: images come with their whole text."""
        return self.tokens.lengths if self.tokens.inputs else self.widths

    def _groups(self, strategy: str, swept: list[int], singles: list[list[int]]) -> list[tuple[int, ...]]:
        """Texts that go together: as many as fill a pass well, of about one length, because shorter ones are filled up.
        Alone are those of which an inner site is scored, and those with images that have forward passes of their own,
        for which their images are computed anyway."""
        most = min(TOGETHER, self.budget // 4 // self._clean_bytes)
        exact = strategy in WHOLE or _rescaled(self.model)
        alone = bool(self.apart) or self.score.of is not None
        found, closed = list[list[int]](), True
        for row in sorted(swept, key=lambda row: self._columns[row]):
            own = [] if closed else [*found[-1], row]
            width, used = self._columns[row], sum(self._columns[one] for one in own)
            shut = alone or bool(self.tokens.inputs and singles[row])
            if not own or shut or width * len(own) > min(most, used if exact else used * FILLED):
                found.append([row])
            else:
                found[-1] = own
            closed = shut
        found += [[row] for row in range(len(self.tokens)) if row not in swept]
        return [tuple(sorted(group)) for group in sorted(found, key=min)]

    @cached_property
    def apart(self) -> str:
        """See `apart`."""
        return apart(self.model, self.tokens)

    def _edited(self) -> list[HookPoint]:
        """Where values of the sites that are edited pass."""
        sites = {edit.site.name for edits in self.variants for edit in edits}
        entries = [self.model.atlas.entries[name, layer] for name in sites for layer in self.model.atlas.layers(name)]
        return [entry.write for entry in entries if entry.write is not None]

    def _inside_attention(self) -> bool:
        return any(point.side == "attention" for point in self._edited())

    @cached_property
    def _leaves_last(self) -> bool:
        """Whether no edit changes what the last layer makes of its attention."""
        inner = {"resid_pre", "scores", "pattern"}
        edited = [edit.site for edits in self.variants for edit in edits if edit.site.name not in inner]
        last = self.model.n_layers - 1
        return all(entry.layer < last for site in dict.fromkeys(edited) for entry in self.model.atlas.select(site))

    def inside(self, tower: Tower | None) -> bool:
        """Whether an edit changes what a tower computes."""
        modules = dict(self.model.hf.named_modules())
        inner = () if tower is None or tower.module is None else set(tower.module.modules())
        return any(modules.get(point.module) in inner for point in self._edited())

    def _step(self, number: int, edits: Sequence[Edit], row: int, strategy: str) -> Step | None:
        """A variant on one row; None if it needs a pass of its own."""
        layer, start, leaving, own = self.model.n_layers - 1, self.widths[row], list[Edit](), list[Edit]()
        for edit in edits:
            for entry in self.model.atlas.select(edit.site):
                self._check_below(edit, entry)
                placed = self._placed(edit, entry, row)
                if placed is None:
                    return None
                (leaving if edit.site.name == "resid_post" else own).append(placed[0])  # before what enters the next
                layer, start = min(layer, placed[1]), min(start, placed[2])
        scored = max(self.scored[row])
        if not leaving and not own:
            return None
        if start > scored:
            raise PlanError(
                f"{named_edits(edits)} acts from position {start} on, the score {self.score.name} reads position "
                f"{scored}: nothing can change"
            )
        if strategy in ("batched", "prefix"):
            layer = min(layer, 0)
        start = 0 if strategy in WHOLE else min(start, *self.scored[row])
        if "token_type_ids" in self.tokens.inputs:  # an image sees itself both ways
            start = next((run.start for run in self._images(row) if run.start <= start < run.stop), start)
        if self.tokens.inputs and start * SHORT <= self.widths[row] - start:
            start = 0
        return Step(number, row, (*leaving, *own), layer, start)

    def _placed(self, edit: Edit, entry: Entry, row: int) -> tuple[Edit, int, int] | None:
        """An edit in one layer of one row, the layer and the column from which on it acts."""
        name, layer = entry.name, entry.layer
        if name == "embed" and not self.tokens.inputs:
            layer = -1
        elif not edit.site.info.layered or edit.site.info.visual:
            return None
        if name == "resid_post" and self.stacked <= layer < self.top - 1:
            name, layer = "resid_pre", layer + 1  # the same tensor, and the block below need not run
        places = self._places(edit.site, row)
        first = places.get("pos", 0)
        if [] in places.values():
            return None
        site = _at(Site(name, None if layer < 0 else layer, edit.site.units), places)
        return self._valued(edit, site, row, self.widths[row]), layer, min(first) if isinstance(first, list) else first

    def _check_below(self, edit: Edit, entry: Entry) -> None:
        """Refuse an edit that the scored site cannot see.

        Raises:
            PlanError: it acts above it.
        """
        if forward_order(entry, self.model.n_layers) > self.ceiling:
            raise PlanError(
                f"{edit} lies above {self.score.of}, which score {self.score.name} reads: it can change nothing; leave "
                "it out, or score a site above it"
            )

    def _valued(self, edit: Edit, site: Site, row: int, width: int | None = None) -> Edit:
        """The edit at its place in one row, with this row's part of its value; of the row's first `width` tokens."""
        given = edit.op in TENSOR_OPS and edit.op != "project"
        return Edit(site, edit.op, self._part(edit.value, edit.site, row, width) if given else edit.value)

    def _part(self, value: Tensor, site: Site, row: int, width: int | None) -> Tensor:
        """A row's part of a value, which is laid over the padded batch, or strings together what each row selects where
        rows select different numbers of positions."""
        info, columns = site.info, self.tokens.ids.shape[1]
        if info.visual and not info.tower:
            tokens = [[sum(map(len, self._images(i)))] for i in range(len(self.tokens))]
            if any(each != tokens[0] for each in tokens):
                return _stretch(value, tokens, row, [True], len(info.axes) - 2)
        chosen = dict(zip(info.positions, (site.pos or ALL if info.tower else site.pos, site.key), strict=False))
        places = {axis: self._local(at, info.tower) for axis, at in chosen.items() if at is not None}
        kept = [axis for axis, at in chosen.items() if at is None or not is_single(at)]
        units = [axis for axis in info.axes[1:] if axis not in chosen]
        units = units[isinstance(site.units, int) :] if info.unit in units else units
        axes = [axis for axis in info.axes[1:] if axis in (*units, *kept)]
        counts = [
            [len(places[axis][i]) if axis in places else columns for axis in chosen] for i in range(len(self.tokens))
        ]
        if any(each != counts[0] for each in counts):
            axes = [*kept, *units]  # as in `regions`, positions come first where they are strung together
            value = _stretch(value, counts, row, [axis in kept for axis in chosen], len(units))
        elif value.ndim > len(axes) and len(self.tokens) > 1:
            value = value[row : row + 1]
        real = torch.tensor(self.tokens.rows.real[row][:width], device=value.device)
        for end, axis in enumerate(reversed(axes), 1):
            laid = axis in kept and axis not in places and end <= value.ndim and value.shape[-end] == columns
            value = value.index_select(-end, real) if laid and len(real) < columns else value
        strung = axes != sorted(axes, key=info.axes.index) and value.ndim == len(axes)
        return value.movedim(-1, 0) if strung else value

    def _passes(self, steps: list[Step], width: int, plan: SweepPlan) -> Iterable[Pass]:
        """Passes over as many columns. Rows from before the first block on stay among themselves, and those of a text
        whose edits lie inside attention, where rows of several texts have different keys."""
        groups: dict[tuple[int, bool, int], list[Step]] = {}
        inside = self._inside_attention()
        for step in steps:
            key = self.widths[step.text] - step.start, step.layer < 0, -step.text if inside else 0
            groups.setdefault(key, []).append(step)
        for (columns, *_), group in sorted(groups.items(), reverse=True):
            cost = self._row_bytes(width, columns)
            plan.row_bytes = max(plan.row_bytes, cost)
            most = self.budget // cost
            if most < 1:
                raise PlanError(
                    f"one variant takes about {cost / 2**20:.1f} MiB, the memory budget is {self.budget / 2**20:.1f} "
                    "MiB; raise memory_budget, or shorten the text"
                )
            group.sort(key=lambda step: step.layer)
            for i in range(0, len(group), most):
                yield Pass(tuple(group[i : i + most]), columns)

    @property
    def _clean_bytes(self) -> int:
        """What a clean pass leaves of one token: streams, keys and values of all layers."""
        shape, config = self.model.atlas.shape, self.model.hf.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or shape.d_model // heads
        kept = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width
        return self.model.n_layers * (shape.d_model + kept) * torch.empty((), dtype=self.model.dtype).element_size()

    def _row_bytes(self, width: int, columns: int) -> int:
        """What one row takes at most at a time: streams and MLP of its columns, attention over the text, its logits."""
        shape, config = self.model.atlas.shape, self.model.hf.config.get_text_config()
        d_mlp = getattr(config, "intermediate_size", None) or 4 * shape.d_model
        heads = getattr(config, "num_attention_heads", 1)
        numbers = columns * (12 * shape.d_model + 3 * d_mlp + 3 * heads * width)
        if not all(score.narrow for score in self.scores) and self.score.of is None:
            numbers += 3 * shape.d_vocab
        return int(numbers * max(4, torch.empty((), dtype=self.model.dtype).element_size()))

    def single(self, number: int, row: int) -> list[Edit]:
        """A variant's edits on one row, for a forward pass of its own."""
        if len(self.tokens) == 1 and not self.tokens.padded:
            return list(self.variants[number])
        placed = [(edit, self._places(edit.site, row)) for edit in self.variants[number]]
        return [
            self._valued(edit, _at(replace(edit.site, pos=None, key=None), places), row)
            for edit, places in placed
            if [] not in places.values() and not (edit.site.info.visual and not self._images(row))  # of this row
        ]


def _stretch(value: Tensor, counts: list[list[int]], row: int, kept: list[bool], n_units: int) -> Tensor:
    """A row's stretch of a value whose first axis strings the rows together, with an axis for each position kept."""
    lengths = [*map(math.prod, counts)]
    if value.ndim != 1 + n_units or len(value) != sum(lengths):
        return value  # one that all positions share
    start = sum(lengths[:row])
    shape = [count for count, keep in zip(counts[row], kept, strict=True) if keep]
    return value[start : start + lengths[row]].reshape(*shape, *value.shape[1:])


def _at(site: Site, places: Mapping[str, int | list[int]]) -> Site:
    """A site without positions at the ones given."""
    pos, key = (tuple(found) if isinstance(found := places.get(axis), list) else found for axis in ("pos", "key"))
    return Site(site.name, site.layers, site.units, pos, key)


def _rescaled(model: Session) -> bool:
    """Whether positions are turned by an angle that depends on the longest text of the batch."""
    config = model.hf.config.get_text_config()
    return any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope"))


def _free(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
