"""Places every variant of a sweep on every text: where it begins, what goes together in a pass, what that costs.

    column   0 1 2 3 4 5 6 7            A variant that edits layer l at column c differs from the clean pass only
    layer 2  · · · · · ▒ ▒ ▒            above and to the right (▒): in (n - c) × (L - l) token-layers. That is its
    layer 1  · · · · · ▒ ▒ ▒            step; (l, c) is where it begins. Columns behind all that is edited or
    layer 0  · · · · · · · ·            scored are not run at all, so n may be less than the text.
                       c

Steps of equally many columns go into a pass; texts of about one length share the clean pass. What cannot be a row among
others (what the vision tower hands over, sites behind the last layer, rows with holes) gets a forward pass of its own.

Positions are resolved against the batch with its padding, and counted in the row from here on: a plan knows no padding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from ..architectures.atlas import Entry
from ..architectures.hook_points import HookPoint
from ..architectures.parameters import sizes_of
from ..cost import TOGETHER
from ..engines.program import forward_order
from ..engines.tower import Tower
from ..errors import CapabilityError, PlanError
from ..inputs import undivided
from ..positions import ALL, Position, is_single, resolve
from ..score import Score, SiteScore
from ..session import Session
from ..sites import TENSOR_OPS, Edit, Site
from ..strategy_checks import Relief
from ..text import Tokens
from .plan import WHOLE, Group, Pass, Single, Step, SweepPlan, described, image_spans, named_edits
from .store import SweepStore

FILLED = 1.125
"""Columns that texts of a clean pass may have, filled up to one length, for each of their tokens."""
SHORT = 16
"""Columns of a text with images for each one before them at which these are run too: over a few earlier keys, attention
in two parts costs more than they do in the model's own kernel."""


def why_apart(session: Session, tokens: Tokens, reliefs: Mapping[Relief, str]) -> str:
    """Why texts of a batch go one by one; empty if they can go together."""
    if len(tokens) < 2:
        return ""
    if not tokens.inputs:
        return reliefs.get(Relief.APART, "")
    if whole := undivided(tokens):
        return f"{', '.join(whole)} cannot be split into rows"
    lacking = session.atlas.lacking.get("right padding", "")
    return reliefs.get(Relief.PICTURED_APART, "") or (lacking and f"padding changes this model's numbers ({lacking})")


class Placer:
    """Makes the plan of a sweep.

    Args:
        budget: bytes that one pass may take; None: half of what is free.
        one_group: texts with images that can go together do, however unequal their lengths.
    """

    def __init__(
        self,
        session: Session,
        tokens: Tokens,
        variants: Sequence[tuple[Edit, ...]],
        scores: Sequence[Score],
        budget: int | None,
        *,
        one_group: bool = False,
    ) -> None:
        self.session, self.tokens, self.variants, self.scores = session, tokens, variants, scores
        self.one_group = one_group
        self.score = score = scores[0]
        for other in scores[1:]:
            if (type(other), other.at, other.of) != (type(score), score.at, score.of):
                raise PlanError(f"scores {score.name} and {other.name} read different places; sweep once for each")
        self.budget = budget if budget is not None else _free(session) // 2
        self._resolved: dict[tuple[Position, bool], list[list[int]]] = {}
        self._ahead = "causal" in session.atlas.lacking  # positions see later ones, so that an edit acts on all
        self.stacked = len(session.atlas.layers("deepstack"))
        self.top, self.ceiling = session.n_layers, (session.n_layers, math.inf)
        if isinstance(score, SiteScore):
            self._inner(score.of)
        self.scored = self._local(score.selects)
        for row, places in enumerate(self.scored):
            if len(places) != 1 and type(score) is Score:
                raise PlanError(
                    f"score {score.name} reads {len(places)} positions of row {row}; it takes one, or several with "
                    "span=True"
                )
        self.widths = [self._width(row) for row in range(len(tokens))]

    def _inner(self, site: Site) -> None:
        """Hold an inner site that is scored against the model: one layer, readable; and where passes end."""
        entries = self.session.atlas.select(site)
        if site.info.visual:
            raise PlanError(
                f"score {self.score.name} reads {site}; a sweep scores sites of the language model's layers"
            )
        if len(entries) != 1 or not site.info.layered:
            raise PlanError(f"score {self.score.name} reads {site}; it takes a site of one layer, as {site.name}[0]")
        (entry,) = entries
        if why := self.session.can(site.name, "read"):
            raise CapabilityError(f"score {self.score.name} reads {site}: {why}")
        self.top = entry.layer + (site.name != "resid_pre")
        self.ceiling = forward_order(entry, self.session.n_layers)

    def _width(self, row: int) -> int:
        """Columns of a row that are run: what lies behind every edit and everything scored is not."""
        of = self.score.of
        if (of is not None and "key" in of.info.axes) or self._ahead:
            return self.tokens.lengths[row]
        seen = max((run.stop for run in image_spans(self.tokens, row)), default=0)  # a token may see its whole image
        return max(*self.scored[row], self._last(row), seen - 1) + 1

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

    def plan(
        self, strategy: str, why: str, reliefs: Mapping[Relief, str], store: SweepStore | None = None
    ) -> SweepPlan:
        """The passes of a strategy.

        Args:
            why: why it is no cheaper one.
            reliefs: what this model goes without, and why.
            store: what is done already, and is left out.
        """
        shape = len(self.variants), len(self.tokens)
        done = torch.zeros(shape, dtype=torch.bool) if store is None else store.done
        clean_done = torch.zeros(shape[1], dtype=torch.bool) if store is None else store.clean_done
        apart = why_apart(self.session, self.tokens, reliefs)
        why = "; ".join(filter(None, (why, f"texts go one by one: {apart}" if apart else "")))
        of, edited = self.score.of, {edit.site.name for edits in self.variants for edit in edits}
        plan = SweepPlan(
            strategy, why, self.session.n_layers, self.top, self.widths, len(self.variants), self.scored,
            [None if of is None else self._in_row(of, row) for row in range(len(self.tokens))],
            row_of_inputs_for_each=Relief.ROW_OF_INPUTS_FOR_EACH in reliefs,
            leaves_last=bool(self.tokens.inputs) and self._leaves_last(),
            targets_only=all(score.targets_only for score in self.scores) and "logits" not in edited,
            inside_tower=self._inside_tower(),
            model=described(self.session),
        )  # fmt: skip
        by_text: list[list[Step]] = []
        # holes in a row are columns of their own, which only a pass over all of it has
        gaps = [width > length for width, length in zip(self.tokens.widths, self.tokens.lengths, strict=True)]
        for row in range(len(self.tokens)):
            by_text.append([])
            plan.alone.append([])
            for number, edits in enumerate(self.variants):
                if not done[number, row]:
                    step = None if strategy == "full" or gaps[row] else self._step(number, edits, row, strategy)
                    if step is None:
                        plan.alone[-1].append(Single(number, self._single(number, row)))
                    else:
                        by_text[-1].append(step)
        # a text whose variants have passes of their own, or are done, is a group for its score without edits
        rest = [row for row, steps in enumerate(by_text) if not steps and (plan.alone[row] or not clean_done[row])]
        groups = self._groups(strategy, by_text, plan.singles, bool(apart)) + [(row,) for row in rest]
        for texts in sorted(groups, key=min):
            width = max(self._columns[text] for text in texts)
            passes = self._passes([step for text in texts for step in by_text[text]], width, plan)
            plan.groups.append(Group(texts, width, list(passes)))
        return plan

    @property
    def _columns(self) -> list[int]:
        """Columns of each row that a clean pass has: images come with their whole text."""
        return self.tokens.lengths if self.tokens.inputs else self.widths

    def _groups(
        self, strategy: str, by_text: list[list[Step]], singles: list[list[int]], apart: bool
    ) -> list[tuple[int, ...]]:
        """Texts that go together: as many as fill a pass well, of about one length, because shorter ones are filled up.
        Alone are those of which an inner site is scored, and those with images that have forward passes of their own,
        for which their images are computed anyway."""
        swept = [row for row, steps in enumerate(by_text) if steps]
        alone = apart or self.score.of is not None
        if self.one_group and self.tokens.inputs and not apart:
            return [tuple(swept)] if swept else []
        most = min(TOGETHER, self.budget // 4 // self._clean_bytes)  # most of the memory is for rows
        # rows of whole texts have all columns of their text; and where the longest text sets the angle of all
        # positions, a shorter one beside it would get others than alone
        exact = strategy in WHOLE or _rescaled(self.session)
        groups, closed = list[list[int]](), True
        for row in sorted(swept, key=lambda row: self._columns[row]):  # the next one is the longest of its group
            joined = [] if closed else [*groups[-1], row]
            width, used = self._columns[row], sum(self._columns[text] for text in joined)
            closed = alone or bool(self.tokens.inputs and singles[row])
            if not joined or closed or width * len(joined) > min(most, used if exact else used * FILLED):
                groups.append([row])
            else:
                groups[-1] = joined
        return [tuple(sorted(texts)) for texts in groups]

    def _edited(self) -> list[HookPoint]:
        """Where values of the sites that are edited pass."""
        sites = {edit.site.name for edits in self.variants for edit in edits}
        entries = [
            self.session.atlas.entries[name, layer] for name in sites for layer in self.session.atlas.layers(name)
        ]
        return [entry.write for entry in entries if entry.write is not None]

    def _inside_attention(self) -> bool:
        return any(point.inside for point in self._edited())

    def _leaves_last(self) -> bool:
        """Whether no edit changes what the last layer makes of its attention."""
        inner = {"resid_pre", "scores", "pattern"}
        edited = [edit.site for edits in self.variants for edit in edits if edit.site.name not in inner]
        last = self.session.n_layers - 1
        return all(entry.layer < last for site in dict.fromkeys(edited) for entry in self.session.atlas.select(site))

    def _inside_tower(self) -> bool:
        """Whether an edit changes what the vision tower computes."""
        if not self.tokens.inputs:
            return False
        modules, tower = dict(self.session.hf.named_modules()), Tower(self.session.hf).module
        inner = set() if tower is None else set(tower.modules())
        return any(modules.get(point.module) in inner for point in self._edited())

    def _step(self, number: int, edits: Sequence[Edit], row: int, strategy: str) -> Step | None:
        """A variant on one row; None if it needs a pass of its own."""
        layer, start = self.session.n_layers - 1, self.widths[row]
        leaving, others = list[Edit](), list[Edit]()
        for edit in edits:
            for entry in self.session.atlas.select(edit.site):
                self._check_below(edit, entry)
                placed = self._placed(edit, entry, row)
                if placed is None:
                    return None
                # what leaves a block is changed before what enters the next, of which it is the same tensor
                (leaving if edit.site.name == "resid_post" else others).append(placed[0])
                layer, start = min(layer, placed[1]), min(start, placed[2])
        scored = max(self.scored[row])
        if not leaving and not others:
            return None
        if self._ahead:
            start = 0
        if start > scored:
            raise PlanError(
                f"{named_edits(edits)} acts from position {start} on, the score {self.score.name} reads position "
                f"{scored}: nothing can change"
            )
        if strategy in ("batched", "prefix"):  # all layers, but those that begin before the first block stay so
            layer = min(layer, 0)
        start = 0 if strategy in WHOLE else min(start, *self.scored[row])
        if layer < 0 and not self.session.told_positions:
            start = 0  # what embeds columns without being told which they are, embeds all of them
        if "token_type_ids" in self.tokens.inputs:  # an image sees itself both ways
            start = next((run.start for run in image_spans(self.tokens, row) if run.start <= start < run.stop), start)
        if self.tokens.inputs and start * SHORT <= self.widths[row] - start:
            start = 0
        return Step(number, row, (*leaving, *others), layer, start)

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
        if forward_order(entry, self.session.n_layers) > self.ceiling:
            raise PlanError(
                f"{edit} lies above {self.score.of}, which score {self.score.name} reads: it can change nothing; leave "
                "it out, or score a site above it"
            )

    def _valued(self, edit: Edit, site: Site, row: int, width: int | None = None) -> Edit:
        """The edit at its place in one row, with this row's part of its value; of the row's first `width` tokens."""
        laid_out = edit.op in TENSOR_OPS and edit.op != "project"  # directions are the same everywhere
        return Edit(site, edit.op, self._part(edit.value, edit.site, row, width) if laid_out else edit.value)

    def _part(self, value: Tensor, site: Site, row: int, width: int | None) -> Tensor:
        """A row's part of a value, which is laid over the padded batch, or strings together what each row selects where
        rows select different numbers of positions."""
        info, columns = site.info, self.tokens.ids.shape[1]
        if info.visual and not info.tower:
            tokens = [[sum(map(len, image_spans(self.tokens, i)))] for i in range(len(self.tokens))]
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
            group.sort(key=lambda step: step.layer)  # rows join in this order
            for i in range(0, len(group), most):
                yield Pass(tuple(group[i : i + most]), columns)

    @property
    def _clean_bytes(self) -> int:
        """What a clean pass leaves of one token: streams, keys and values of all layers."""
        shape, config = self.session.atlas.shape, self.session.hf.config.get_text_config()
        heads = max(sizes_of(config, "num_attention_heads"), default=1)
        width = max(sizes_of(config, "head_dim"), default=shape.d_model // heads)
        kept = 2 * max(sizes_of(config, "num_key_value_heads"), default=heads) * width
        return self.session.n_layers * (shape.d_model + kept) * torch.empty((), dtype=self.session.dtype).element_size()

    def _row_bytes(self, width: int, columns: int) -> int:
        """What one row takes at most at a time: streams and MLP of its columns, attention over the text, its logits."""
        shape, config = self.session.atlas.shape, self.session.hf.config.get_text_config()
        d_mlp = max(sizes_of(config, "intermediate_size"), default=4 * shape.d_model)
        heads = max(sizes_of(config, "num_attention_heads"), default=1)
        # an upper bound: so many tensors of the stream, of the MLP and of attention never live at a time in a block; a
        # test holds it against the bytes that are allocated
        numbers = columns * (12 * shape.d_model + 3 * d_mlp + 3 * heads * width)
        if not all(score.targets_only for score in self.scores) and self.score.of is None:
            numbers += 3 * shape.d_vocab
        return int(numbers * max(4, torch.empty((), dtype=self.session.dtype).element_size()))

    def _single(self, number: int, row: int) -> tuple[Edit, ...]:
        """A variant's edits on one row, for a forward pass of its own."""
        if len(self.tokens) == 1 and not self.tokens.padded:
            return self.variants[number]
        has_images = bool(image_spans(self.tokens, row))
        edits = [edit for edit in self.variants[number] if has_images or not edit.site.info.visual]
        sites = [(edit, self._in_row(edit.site, row)) for edit in edits]
        return tuple(self._valued(edit, site, row) for edit, site in sites if () not in (site.pos, site.key))

    def _in_row(self, site: Site, row: int) -> Site:
        """A site with its positions counted in one row."""
        return _at(replace(site, pos=None, key=None), self._places(site, row))


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
    pos, key = (tuple(columns) if isinstance(columns := places.get(axis), list) else columns for axis in ("pos", "key"))
    return Site(site.name, site.layers, site.units, pos, key)


def _rescaled(session: Session) -> bool:
    """Whether positions are turned by an angle that depends on the longest text of the batch."""
    config = session.hf.config.get_text_config()
    return any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope"))


def _free(session: Session) -> int:
    """Bytes of memory that are free; where processes share a model, for the one that has least: all plan alike."""
    device, processes = session.device, session.atlas.processes
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if processes is None:
        return free
    least = torch.tensor(free, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=processes)
    return int(least)
