"""What all attribution methods share: what they can be set to, the rows that they are given, and what they return.

    score(token) = how much a token of the row counts for what is explained

A method explains a part of a target (`sink`) or, without one, the next token. It gives a number per token of the row;
some also a row per token of the target, and vectors of hops. Beside them stand the shares of mass on the first token
and on attention sinks, where much of any model's attention goes without meaning:

    share(S) = sum over tokens in S of |score| / sum over all tokens of |score|

An attention sink is a token whose residual stream, halfway up, is more than eight times as long as the row's median:
the massive activations that go with attention sinks.

Source: Sun et al. (2024), arXiv:2402.17762, for massive activations; this package for the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._pictures import which
from .gate import demand_additive
from .layout import Layout, Part, layout_of, with_target
from .over_image import Place, grid_map, overlays, places_of
from .page import layers_of, strip_of, strip_page, top_tokens

HEADINGS = {
    "ifr": "Information flow", "ifr_routes": "Routes of information flow", "attnlrp": "AttnLRP",
    "input_x_gradient": "Input × gradient",
}  # fmt: skip
"""Titles of pages."""
MASSIVE = 8.0
"""How many times as long as the row's median the stream of an attention sink is."""


class AttributionConfig(ic.Config):
    """What every attribution method can be set to.

    Attributes:
        target: what follows the prompt and is explained, or one per prompt (None: the span `target` of the tokens, or
            the next token).
        sink: the part of the target that is explained: text of it, or tokens of it as a half-open range; or one per
            prompt, as a list (None: the span `sink`, or the whole target).
        thinking: the part of the target that is reasoning, in the same way (None: the span `thinking`, or the sink).
        against: a token, by id or as a word, whose logit is taken away from the answer's; or one per prompt.
        profile: "sound", or "reference" to do as the published code does where that differs.
        leave_out: "first" gives the first token no score, "sinks" attention sinks either.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({"sink", "thinking", "against"})
    target: str | list[str] | None = None
    sink: Part | list[Part] | None = None
    thinking: Part | list[Part] | None = None
    against: int | str | list[int] | list[str] | None = None
    profile: Literal["sound", "reference"] = "sound"
    leave_out: Literal["nothing", "first", "sinks"] = "nothing"


class Attributed(NamedTuple):
    """What a method gives for one row, at the row's own positions.

    Attributes:
        scores: a number per token.
        rows: a row per token of the target; not a number where it was not asked for.
        hops: a vector per hop, before anything is left out of it.
        mass: what each hop passes on, in parts of what the first was given.
        stream: lengths of the residual stream halfway up, if the method's own pass has them (see `stream_site`).
        notes: plain values for the record.
    """

    scores: Float[Tensor, " pos"]
    rows: Float[Tensor, "target pos"] | None = None
    hops: Float[Tensor, "hop pos"] | None = None
    mass: Float[Tensor, " hop"] | None = None
    stream: Float[Tensor, " pos"] | None = None
    notes: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False)
class AttributionResult(ic.Result):
    """Scores of tokens; not a number at padding.

    Attributes:
        scores: a number per token.
        rows: what each token of the target (query) owes to each token (key); not a number for other queries.
        hops: a vector per hop.
        mass: what each hop passes on.
        first_share: share of mass on the first token.
        sink_share: share of mass on attention sinks.
        sinks: which tokens are attention sinks.
        method: that gave them, with its settings.
        labels: tokens of each row, as text.
        spans: where prompt, target, sink and thinking stand, as half-open ranges of the row's tokens.
        notes: what else the method says, per row.
        visual: where visual tokens lie in their images, per row; see `over_image`.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scores": ("batch", "pos"), "rows": ("batch", "query", "key"), "hops": ("batch", "hop", "pos"),
        "mass": ("batch", "hop"), "first_share": ("batch",), "sink_share": ("batch",), "sinks": ("batch", "pos"),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = {"labels": "rows", "spans": "rows", "notes": "rows", "visual": "rows"}
    scores: Float[Tensor, "batch pos"]
    rows: Float[Tensor, "batch query key"] | None
    hops: Float[Tensor, "batch hop pos"] | None
    mass: Float[Tensor, "batch hop"] | None
    first_share: Float[Tensor, " batch"]
    sink_share: Float[Tensor, " batch"]
    sinks: Tensor
    method: str
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[dict[str, list[list[int]]], ...]
    notes: tuple[dict[str, Any], ...]
    visual: tuple[tuple[Place, ...], ...]

    def __str__(self) -> str:
        lines = []
        for row, labels in enumerate(self.labels):
            first, sinks = float(self.first_share[row]), float(self.sink_share[row])
            lines.append(f"{self.method}, row {row}: {len(labels)} tokens")
            lines += [
                f"  {ic.report.visible(x['token']):16} {x['score']: .4g}  at position {x['pos']}" for x in self.top(row)
            ]
            lines.append(f"  of the mass, {first:.1%} lie on the first token, {sinks:.1%} on attention sinks")
        return "\n".join(lines)

    @property
    def heading(self) -> str:
        """What the method is called in the field, where its name is short for that."""
        return HEADINGS.get((self.provenance or {}).get("name", ""), super().heading)

    @property
    def finding(self) -> str:
        """The token that counts most in the first row."""
        best = self.top(0, 1)
        if not best:
            return ""
        of = f" of prompt 0 (of {len(self.labels)})" if len(self.labels) > 1 else ""
        spot = str(best[0]["pos"]), best[0]["token"]
        verb = "owes most to" if best[0]["score"] >= 0 else "is held back most by"
        return f"The answer {verb} the token at {ic.report.place_words(ic.report.place_name(*spot))}{of}."

    def top(self, row: int = 0, k: int = 10) -> list[dict[str, Any]]:
        """The tokens that count most, those of the target left out; with their shares of the mass of all tokens."""
        labels, layers, shown = self._drawn(row)
        return top_tokens(labels, next(iter(layers.values())), shown["spans"], k=k, stop=shown["stop"])

    def table(self) -> list[dict[str, Any]]:
        """The ten tokens that count most in each row."""
        return [{"row": row, **line} for row in range(len(self.labels)) for line in self.top(row)]

    def html(self) -> str:
        """Each row's text, coloured by scores and by the vectors of hops, with the tokens that count most; then its
        images, if it has some, as colours alone (`over_images` lays them over the pictures)."""
        pieces = []
        for row in range(len(self.labels)):
            labels, layers, shown = self._drawn(row)
            pieces.append(strip_page(labels, layers, title=self.method, **shown))
            pieces += [overlay.html() for overlay in self.over_images(row=row).values()]
        return "".join(pieces)

    def over_images(self, pictures: Sequence[Any] | None = None, row: int = 0) -> dict[str, ic.report.Overlay]:
        """A row's scores over its images, by name: charts with `html()` and `png(path)`.

        Args:
            pictures: one per image: of PIL, or numbers `[height width 3]` or `[3 height width]`; of an image that was
                cut into tiles, a list of them. Without, colours alone.

        Raises:
            PlanError: another number of pictures, or some where there are no images.
        """
        places = self.visual[row]
        if not places and not pictures:
            return {}
        _, layers, _ = self._drawn(row)
        return overlays(layers, places, pictures, title=self.method)

    def map(self, row: int = 0, image: int = 0, tile: int = 0) -> Float[Tensor, "row col"]:
        """A row's scores of the visual tokens of an image, or of a tile of it: what `localisation` takes.

        Raises:
            PositionError: no such image or tile.
        """
        return grid_map(self._own(self.scores[row], row), self.visual[row], image, tile)

    def charts(self) -> Sequence[ic.report.Chart]:
        """Each row's tokens, the layers below each other."""
        drawn = [self._drawn(row) for row in range(len(self.labels))]
        return [
            strip_of(labels, layers, shown["spans"], title=f"{self.method}{which(row, len(drawn))}")
            for row, (labels, layers, shown) in enumerate(drawn)
        ]

    def _drawn(self, row: int) -> tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]:
        """A row's tokens, its numbers by name, and where prompt, reasoning and sink stand and the target begins."""
        places = {name: self.spans[row].get(name, []) for name in ("prompt", "thinking", "sink")}
        if places["thinking"] == places["sink"]:
            places["thinking"] = []
        spans = {name: (ranges[0][0], ranges[0][1]) for name, ranges in places.items() if len(ranges) == 1}
        hops = None if self.hops is None else self._own(self.hops[row], row).tolist()
        layers = layers_of(
            self._own(self.scores[row], row).tolist(), hops, None if self.mass is None else self.mass[row].tolist()
        )
        stop = next((start for start, _ in self.spans[row].get("target", ())), len(self.labels[row]))
        return self.labels[row], layers, {"spans": spans, "stop": stop}

    def _own(self, values: Tensor, row: int) -> Tensor:
        """Of values along the columns of the batch those of a row's own tokens."""
        return values[..., torch.tensor(self.columns(row))]

    def columns(self, row: int) -> list[int]:
        """The columns of a row's tokens."""
        real = torch.nonzero(self.real[row]).flatten().tolist()
        return list(real)

    @property
    def real(self) -> Tensor:
        """Which columns are tokens, not padding `[batch pos]`."""
        return ~self.scores.isnan()


def stream_site(model: ic.Model) -> S.Site:
    """Where the stream's length tells attention sinks."""
    return S.resid_post[(model.n_layers - 1) // 2]


class Attribution(ic.Method):
    """Base of attribution methods: a subclass writes `attribute` for one row.

    Attributes:
        additive: the method stands on the equation of `gate`.
        contrastive: it can explain one token against another.
    """

    Config: ClassVar[type[ic.Config]] = AttributionConfig
    additive: ClassVar[bool] = True
    contrastive: ClassVar[bool] = True

    def attribute(self, model: ic.Model, layout: Layout, config: Any) -> Attributed:
        """Scores of one row."""
        raise NotImplementedError

    def __call__(
        self, model: ic.Model, x: Any, *, target: str | Sequence[str] | None = None, **settings: Any
    ) -> AttributionResult:
        """Explain what follows prompts; as any method, and:

        Args:
            target: what follows the prompt, or one per prompt; the tokens of both are what the result is about.

        Raises:
            TextError: the prompt's tokens are others when the target follows.
        """
        if target is not None:
            x = with_target(model, x, target) if isinstance(x, ic.Tokens) else model.tokens(x, target)
        return super().__call__(model, x, **settings)

    def check(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> None:
        """Every row has what is to be explained, and the model's contributions add up."""
        if config.against is not None and not self.contrastive:
            raise ic.PlanError(
                f"{self.name} explains states, not logits: against= is for methods by gradient or ablation"
            )
        layouts = self.layouts(model, tokens, config)
        if self.additive:
            demand_additive(self.name, model, layouts[0].tokens)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> AttributionResult:
        """Row by row: rows do not see each other."""
        layouts, per_row = self.layouts(model, tokens, config), []
        with ic.Progress(f"{self.name}, prompts", len(layouts)) as progress:
            for layout in layouts:
                attributed = self.attribute(model, layout, config)
                if not bool(attributed.scores.isfinite().all()):
                    raise ic.ReadError(f"{self.name} gave scores that are no numbers; see dtype {model.dtype}")
                per_row.append(attributed)
                progress.add()
        return self._result(model, tokens, layouts, per_row, config)

    def layouts(self, model: ic.Model, tokens: ic.Tokens, config: Any) -> list[Layout]:
        """Where prompt, target and its parts stand, per row.

        Raises:
            PositionError, PlanError: a row that has not what is asked for.
        """
        rows = _rows(tokens)
        parts = {name: getattr(config, name) for name in ("sink", "thinking", "against")}
        return [
            layout_of(model, row, **{name: _of_row(name, part, number, len(rows)) for name, part in parts.items()})
            for number, row in enumerate(rows)
        ]

    def _result(
        self, model: ic.Model, tokens: ic.Tokens, layouts: Sequence[Layout], per_row: Sequence[Attributed], config: Any
    ) -> AttributionResult:
        width = tokens.ids.shape[1]
        places = [torch.tensor(columns) for columns in tokens.columns(None)]
        sinks = [attention_sinks(model, layout, each.stream) for layout, each in zip(layouts, per_row, strict=True)]
        shares = [mass_shares(each.scores, where) for each, where in zip(per_row, sinks, strict=True)]
        kept = [_without(each, where, config.leave_out) for each, where in zip(per_row, sinks, strict=True)]
        known = type(config).model_fields
        settings = {n: v for n, v in config.model_dump().items() if n == "variant" or v != known[n].default}
        shown = ", ".join(f"{name}={value!r:.40}" for name, value in settings.items() if name not in config.PER_PROMPT)

        def laid(values: Sequence[Tensor | None]) -> Tensor | None:
            if values[0] is None:
                return None
            rows = zip(values, places, strict=True)
            return torch.stack([_spread(value, place, width) for value, place in rows if value is not None])

        squares = [_square(each.rows, layout) for each, layout in zip(kept, layouts, strict=True)]
        rows = None if squares[0] is None else torch.stack([
            _spread(_spread(square, place, width).mT, place, width).mT
            for square, place in zip(squares, places, strict=True) if square is not None
        ])  # fmt: skip
        scores, marks = laid([each.scores for each in kept]), torch.zeros(len(tokens), width, dtype=torch.bool)
        assert scores is not None
        for row, (place, where) in enumerate(zip(places, sinks, strict=True)):
            marks[row, place] = where
        masses = [each.mass for each in kept if each.mass is not None]
        return AttributionResult(
            scores=scores, rows=rows, hops=laid([each.hops for each in kept]),
            mass=torch.stack(masses).cpu() if masses else None,
            first_share=torch.stack([first for first, _ in shares]),
            sink_share=torch.stack([sink for _, sink in shares]),
            sinks=marks, method=f"{self.name}({shown})", labels=tokens.labels,
            spans=tuple(layout.spans() for layout in layouts), notes=tuple(dict(each.notes) for each in kept),
            visual=places_of(model, tokens),
        )  # fmt: skip


def attention_sinks(model: ic.Model, layout: Layout, stream: Tensor | None = None) -> Tensor:
    """Which tokens of a row are attention sinks `[pos]`.

    Args:
        stream: lengths of the stream at `stream_site`; read by a pass of its own where they are not at hand.
    """
    if stream is None:
        site = stream_site(model)
        stream = model.run(layout.tokens, read=site, logits=False)[site][0].float().norm(dim=-1)
    return (stream > MASSIVE * stream.median()).cpu()


def mass_shares(scores: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of mass on the first token and on attention sinks; 0 of nothing."""
    size = scores.detach().abs().double().cpu()
    # scores that are all 0 have no shares: 0 of nothing, rather than NaN
    total = size.sum().clamp_min(1e-300)
    return size[0] / total, size[sinks].sum() / total


def _without(attributed: Attributed, sinks: Tensor, left_out: str) -> Attributed:
    """Scores on this machine, in float32 at least, without what is to be left out."""
    gone = sinks.clone() if left_out == "sinks" else torch.zeros_like(sinks)
    gone[0] |= left_out != "nothing"

    def kept(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values = values.detach().cpu()
        # sums over long texts are made of these: half precision ends here, and what came in float64 stays
        return (values if values.dtype == torch.float64 else values.float()).masked_fill(gone, 0.0)

    scores = kept(attributed.scores)
    assert scores is not None
    return attributed._replace(scores=scores, rows=kept(attributed.rows), hops=kept(attributed.hops))


def _square(rows: Tensor | None, layout: Layout) -> Tensor | None:
    """Rows of the target's tokens among those of all tokens `[query key]`."""
    if rows is None:
        return None
    square = rows.new_full((layout.length, rows.shape[1]), float("nan"))
    square[layout.target.start : layout.target.stop] = rows
    return square


def _spread(values: Tensor, place: Tensor, width: int) -> Tensor:
    """A row's values at its columns in the batch; not a number at padding."""
    if len(place) == width:
        return values
    return values.new_full((*values.shape[:-1], width), float("nan")).index_copy_(-1, place, values)


def _rows(tokens: ic.Tokens) -> list[ic.Tokens]:
    """Each row alone; with images there is one."""
    if not tokens.inputs:
        return list(tokens)
    if len(tokens) > 1:
        raise ic.PlanError(f"rows with {', '.join(tokens.inputs)} cannot be taken apart; give one at a time")
    return [tokens]


def _of_row(name: str, value: Any, number: int, count: int) -> Any:
    """A setting of one row: an item of a list, or the same for all."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise ic.PlanError(f"{name}= has {len(value)} items for {count} prompts; give one, or one per prompt")
    return value[number]
