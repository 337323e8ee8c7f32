"""Head detectors: which heads look at the previous token, at duplicates, and at what came after them; which ones copy.

    previous    P[i, i-1] = 1
    duplicate   P[i, j] = 1 where token j = token i, j < i
    induction   P[i, j+1] = 1 where token j = token i, j < i        (duplicate, one column to the right)

    stripe    mean over queries i that have a place in P of Σ_j A[i, j] P[i, j]       1: a perfect head
    mul       Σ A ⊙ P / Σ A            abs    1 - mean |A - P| · T                    TransformerLens' head_detector
    copying   Σ Re λ / Σ |λ| over the eigenvalues of W_E W_V W_O W_U                  in [-1, 1], by weights alone

Attention A `[head query key]` is that of random tokens, all different, twice in a row (there a stripe is A[i, i-1],
A[i, i-n] and A[i, i-(n-1)]), and that of the prompts. Places that a layer's attention cannot see (a window) do not
count, and where it sees none the score is not a number.

Source: Olsson et al., "In-context Learning and Induction Heads" (2022); Elhage et al. (2021) for copying;
TransformerLens' `head_detector` for mul and abs.
Cost: a forward pass of sequences × 2 · length tokens and one of the prompts, attention in the open, a layer's
patterns in memory at a time. Copying: 2 · d_vocab · d_model² multiply-adds once, then per head a matrix [d_head
d_head].
Must equal: patterns of `model.run(…, read=S.pattern)` multiplied by hand; eigenvalues of the whole matrix [d_vocab
d_vocab].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from ._copying import Embeddings, copying_scores
from ._pictures import of_rows

KINDS = ("previous", "duplicate", "induction")
WORDS = {
    "previous": "How far each head attends to the token before",
    "duplicate": "How far each head attends to earlier places of the same token",
    "induction": "How far each head attends to what followed the same token before",
    "copying": "How far each head writes the token that it reads, by its weights",
}
"""What a map of scores shows, as a title."""
CHUNK_BYTES = 1 << 28
"""Of patterns that random sequences take at a time."""
Scoring = Literal["stripe", "mul", "abs"]


class DetectorConfig(ic.Config):
    """Settings of the head detectors.

    Attributes:
        score: "stripe", the mean attention at the places looked for; "mul" or "abs" as TransformerLens counts.
        sequences: random sequences (0: prompts alone).
        length: different tokens of each, which come twice.
        bos: begin random sequences with the tokenizer's BOS (None: if the tokenizer puts it by itself).
        seed: of the draw.
        exclude_bos: leave attention on the first token out ("mul", "abs").
        exclude_current: leave attention of a token on itself out ("mul", "abs").
        copying: work out copying scores, too.
        folded: count gains of norms into the weights of copying scores, and means that LayerNorm takes out.
        embeddings: what copying starts from: "token" embeddings, or "effective" ones, with what the first MLP adds to
            them (for layers above the first).
    """

    score: Scoring = "stripe"
    sequences: int = Field(50, ge=0)
    length: int = Field(50, ge=2)
    bos: bool | None = None
    seed: int = Field(0, ge=0)
    exclude_bos: bool = False
    exclude_current: bool = False
    copying: bool = True
    folded: bool = True
    embeddings: Embeddings = "token"


@dataclass(frozen=True, eq=False)
class DetectorResult(ic.Result):
    """Scores of heads.

    Attributes:
        random: on random repeated tokens, mean over sequences; None without such.
        prompts: on each prompt (NaN: it has no such place, or the layer does not see it).
        copying: by weights; None if not asked for. NaN: `unmeasured` says why.
        chance, prompt_chance: scores of a head that attends to all it can see alike.
        kinds: names along `kind`.
        layers: numbers along `layer`: those whose attention has patterns.
        score: how it was counted.
        tokens: of a random sequence.
        unmeasured: by kind and layer, why there is no score.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "random": ("kind", "layer", "head"), "prompts": ("batch", "kind", "layer", "head"),
        "copying": ("layer", "head"), "chance": ("kind",), "prompt_chance": ("batch", "kind"),
    }  # fmt: skip
    JOINS: ClassVar[Mapping[str, str]] = dict.fromkeys(("random", "copying", "chance"), "same")
    random: Float[Tensor, "kind layer head"] | None
    prompts: Float[Tensor, "batch kind layer head"]
    copying: Float[Tensor, "layer head"] | None
    chance: Float[Tensor, " kind"] | None
    prompt_chance: Float[Tensor, "batch kind"]
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    score: str
    tokens: int
    unmeasured: dict[str, str]

    @property
    def on_prompts(self) -> Float[Tensor, "kind layer head"]:
        """Mean over the prompts that have the places."""
        return self.prompts.nanmean(0)

    @property
    def _even(self) -> dict[str, float]:
        """By kind, the score of even attention: on random tokens, or else on the prompts."""
        numbers = self.prompt_chance.nanmean(0) if self.chance is None else self.chance
        return dict(zip(self.kinds, numbers.tolist(), strict=True))

    def _columns(self) -> dict[str, Tensor]:
        """Scores by what they are of, each `[layer head]`."""
        columns = {}
        for i, kind in enumerate(self.kinds):
            if self.random is not None:
                columns[kind] = self.random[i]
            columns[f"{kind}, prompts"] = self.on_prompts[i]
        return columns if self.copying is None else columns | {"copying": self.copying}

    def table(self) -> list[dict[str, Any]]:
        """One row per head."""
        columns = {name: scores.tolist() for name, scores in self._columns().items()}
        rows = []
        for i, layer in enumerate(self.layers):
            for head in range(self.prompts.shape[-1]):
                scores = {name: lines[i][head] for name, lines in columns.items()}
                if any(map(math.isfinite, scores.values())):
                    rows.append({"layer": layer, "head": head} | scores)
        return rows

    @property
    def finding(self) -> str:
        """The head with the highest score of each kind."""
        said = []
        for name, scores in self._columns().items():
            if (self.random is not None and name.endswith("prompts")) or not bool(scores.isfinite().any()):
                continue
            best = int(scores.nan_to_num(-math.inf).argmax())
            layer, head = divmod(best, scores.shape[1])
            kind = name.removesuffix(", prompts")
            even = f" (even attention {self._even[kind]:.2f})" if kind in self._even else ""
            said.append(f"{kind}: z[{self.layers[layer]},{head}], {scores[layer, head]:.2f}{even}")
        where = f"on {self.tokens} random tokens" if self.random is not None else f"on prompts{of_rows(self.prompts)}"
        return f"Heads with the highest scores {where}: {'; '.join(said)}." if said else ""

    def __str__(self) -> str:
        lines = [self.finding]
        for name, scores in self._columns().items():
            flat = scores.flatten().nan_to_num(-math.inf)
            best = flat.topk(min(5, int(flat.isfinite().sum()))).indices.tolist()
            heads = [f"z[{self.layers[i // scores.shape[1]]},{i % scores.shape[1]}] {flat[i]:.3f}" for i in best]
            lines.append(f"  {name:22} {'  '.join(heads)}")
        return "\n".join(lines)

    def details(self) -> dict[str, str]:
        """What chance is, and what could not be measured."""
        chance = ", ".join(f"{kind} {number:.3f}" for kind, number in self._even.items())
        lines = [f"{what}: {why}" for what, why in self.unmeasured.items()]
        return {"Scores of even attention": chance} | ({"Not measured": "\n".join(lines)} if lines else {})

    def charts(self) -> list[ic.report.Heatmap]:
        """A map of layers against heads for each kind: on random tokens, or else on the prompts, and of copying."""
        charts = []
        where = "on random tokens" if self.random is not None else f"on the prompts{of_rows(self.prompts)}"
        counted = "" if self.score == "stripe" else f" (score {self.score!r})"
        for name, scores in self._columns().items():
            if (self.random is not None and name.endswith("prompts")) or not bool(scores.isfinite().any()):
                continue
            copying = name == "copying"
            limits = (-1.0, 1.0) if copying else (0.0, 1.0) if self.score != "abs" else None
            title = f"{WORDS[name.removesuffix(', prompts')]}{'' if copying else f', {where}{counted}'}"
            charts.append(
                ic.report.Heatmap(
                    scores.tolist(), [f"layer {layer}" for layer in self.layers],
                    [f"head {head}" for head in range(scores.shape[1])], texts=ic.report.cell_texts(scores.tolist()),
                    diverging=copying, limits=limits, title=title, colorbar=f"{name.removesuffix(', prompts')} score",
                )
            )  # fmt: skip
        return charts


class HeadDetectors(ic.Method):
    """Which heads attend to the previous token, to duplicates and by induction, and which copy what they read."""

    name = "head_detectors"
    requires = frozenset({"pattern"})
    Config = DetectorConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: DetectorConfig) -> None:
        """There are enough tokens to draw from, and a BOS if it is asked for."""
        if config.sequences:
            random_repeats(model, config.length, 1, config.seed, config.bos)

    def run(self, model: ic.Model, tokens: ic.Tokens, config: DetectorConfig) -> DetectorResult:
        """All prompts as one batch."""
        return next(self.run_batches(model, [(tokens, config)], config))

    def run_batches(
        self, model: ic.Model, batches: Iterable[tuple[ic.Tokens, Any]], config: DetectorConfig
    ) -> Iterator[DetectorResult]:
        """Random sequences and weights once, then batch by batch the prompts."""
        layers = model.layers(S.pattern)
        random, chance, width, unmeasured = self._random(model, layers, config)
        copying = None
        if config.copying:
            copying, why = copying_scores(model, layers, config.folded, config.embeddings)
            unmeasured |= {f"copying, layer {layer}": reason for layer, reason in why.items()}
        for tokens, _ in batches:
            scores, even = scored(model, tokens, layers, config)
            yield DetectorResult(
                random=random, prompts=scores, copying=copying, chance=chance, prompt_chance=even, kinds=KINDS,
                layers=tuple(layers), score=config.score, tokens=width, unmeasured=unmeasured,
            )  # fmt: skip

    def _random(
        self, model: ic.Model, layers: list[int], config: DetectorConfig
    ) -> tuple[Tensor | None, Tensor | None, int, dict[str, str]]:
        """Mean scores on random sequences, those of even attention, how many tokens one has, and what has no score."""
        if not config.sequences:
            return None, None, 0, {}
        drawn = random_repeats(model, config.length, config.sequences, config.seed, config.bos)
        width = drawn.ids.shape[1]
        heads = max(model.sizes(S.pattern[layer])["head"] for layer in layers)
        most = max(1, CHUNK_BYTES // (4 * heads * width**2))
        parts = []
        with ic.Progress("random sequences", len(drawn)) as progress:
            for start in range(0, len(drawn), most):
                rows = [drawn.row(row) for row in range(start, min(start + most, len(drawn)))]
                parts.append(scored(model, ic.Tokens.stack(rows), layers, config))
                progress.add(len(rows))
        scores, chance = (torch.cat(both).mean(0) for both in zip(*parts, strict=True))
        unmeasured = {
            f"{kind}, layer {layer}": f"this layer's attention does not reach as far back as {config.length} tokens: a "
            "window or chunk hides the places"
            for i, kind in enumerate(KINDS)
            for k, layer in enumerate(layers)
            if bool(scores[i, k].isnan().all())
        }
        return scores, chance, width, unmeasured


def random_repeats(model: ic.Model, length: int, sequences: int, seed: int = 0, bos: bool | None = None) -> ic.Tokens:
    """Random tokens without special ones, all different in a row, each row twice in succession.

    Args:
        length: of what is repeated; a row has twice as many tokens, and a BOS.
        bos: as `DetectorConfig`.

    Raises:
        PlanError: fewer tokens than that, or no BOS.
    """
    tokenizer, size = model.tokenizer, model.d_vocab
    special: set[int] = set()
    first: list[int] = []
    if tokenizer is not None:
        size = min(size, len(tokenizer))
        special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        begin = int(model.tokens("a").ids[0, 0])
        if bos is None and begin in special:
            first = [begin]
    if bos:
        known = getattr(tokenizer, "bos_token_id", None)
        if known is None:
            raise ic.PlanError("head_detectors: bos=True, but this tokenizer has no BOS; leave bos= out")
        first = [known]
    pool = torch.tensor([i for i in range(size) if i not in special])
    if len(pool) < length:
        raise ic.PlanError(f"head_detectors: length={length} different tokens of {len(pool)}; take a smaller length")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(sequences):
        block = pool[torch.randperm(len(pool), generator=generator)[:length]]
        rows.append(torch.cat([torch.tensor(first, dtype=torch.long), block, block]))
    ids = torch.stack(rows)
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def scored(
    model: ic.Model, tokens: ic.Tokens, layers: list[int], config: DetectorConfig
) -> tuple[Float[Tensor, "batch kind layer head"], Float[Tensor, "batch kind"]]:
    """Scores of every row, kind, layer and head, and those of even attention; layer by layer."""
    columns = tokens.columns(None)
    places = [looked_for(tokens.ids[row, own].cpu()) for row, own in enumerate(columns)]
    how = config.score, config.exclude_bos, config.exclude_current
    by_layer: dict[int, Tensor] = {}

    def each(layer: int, values: ic.LayerReadings) -> None:
        attention = values[S.pattern].detach().as_subclass(Tensor)
        rows = []
        for row, own in enumerate(columns):
            at = torch.tensor(own, device=attention.device)
            rows.append(pattern_scores(attention[row][:, at][:, :, at].cpu(), places[row], *how))
        by_layer[layer] = torch.stack(rows)

    model.run(tokens, read=S.pattern, each=each, logits=False)
    widest = max(scores.shape[-1] for scores in by_layer.values())
    pad = torch.nn.functional.pad
    scores = [pad(by_layer[layer], (0, widest - by_layer[layer].shape[-1]), value=math.nan) for layer in layers]
    even = []
    for place in places:
        uniform = torch.ones(place.shape[1:]).tril()
        even.append(pattern_scores((uniform / uniform.sum(-1, keepdim=True))[None], place, *how)[:, 0])
    return torch.stack(scores, 2), torch.stack(even)


def looked_for(ids: Tensor) -> Bool[Tensor, "kind query key"]:
    """The places that each kind of head looks at, in a text of these tokens `[pos]`."""
    n = len(ids)
    previous = torch.ones(n, n, dtype=torch.bool).tril(-1).triu(-1)
    duplicate = (ids[:, None] == ids[None]).tril(-1)
    induction = torch.zeros_like(duplicate)
    induction[:, 1:] = duplicate[:, :-1]
    return torch.stack([previous, duplicate, induction])


def pattern_scores(
    attention: Float[Tensor, "head query key"],
    places: Bool[Tensor, "kind query key"],
    score: Scoring = "stripe",
    exclude_bos: bool = False,
    exclude_current: bool = False,
) -> Float[Tensor, "kind head"]:
    """Scores of the heads of a layer; NaN where the text has no such place, or the layer sees none of them.

    Args:
        attention: of one text, padding left out.
        places: see `looked_for`.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    # a place that no head of the layer gives anything is masked: softmax leaves exact zeros nowhere else
    seen = places & (attention > 0).any(0)
    queries = seen.any(-1)
    count = queries.sum(-1)[:, None].to(attention)
    if score == "stripe":
        hits = torch.einsum("hqk,nqk->nhq", attention, seen.to(attention))
        return (hits * queries[:, None]).sum(-1) / count  # 0 / 0 is the NaN of no place
    counted = torch.ones_like(attention[0])
    if exclude_bos:
        counted[:, 0] = 0
    if exclude_current:
        counted.fill_diagonal_(0)
    if score == "mul":
        attention = attention * counted
        scores = torch.einsum("hqk,nqk->nh", attention, places.to(attention)) / attention.sum((-2, -1))
    else:
        off = [((attention - place.to(attention)).abs() * counted).mean((-2, -1)) for place in places]
        scores = 1 - torch.stack(off) * attention.shape[-1]
    return scores.where(count > 0, math.nan)
