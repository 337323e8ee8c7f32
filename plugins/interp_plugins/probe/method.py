"""Method `probe`: states of prompts at named positions and in several image modes, and what can be decoded of them.

    read      resid_pre[0] … resid_pre[L-1], resid_post[L-1], or another site, layer by layer or head by head
              (sites.py), at each position (places.py), in `original` and blind modes
    decode    ridge, logistic, means, lda or mlp on repeated, stratified folds of whole groups    (folds.py, study.py)
    beside    shuffled labels, control task, the question's words, blind images                   (nulls.py, compare.py)
    capacity  selectivity of probes that see some principal directions only                       (capacity.py)

States are kept per prompt, so that batches (`batch_size=`, `out=`) join without loss; probes are fitted when they are
first asked for, on all prompts together.

Source: the modules named above say whose each number is; docs/methods/probe.md has formulas and rules.
Cost: one forward pass per mode; memory prompts · modes · positions · (layers + 1) · d in float32.
Must equal: `decode` on states read by `model.run` or `model.collect` at the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._prompts import prompts_of
from .compare import ORIGINAL
from .places import Pooling, columns_of, default_places, pooled
from .result import OF_PROMPTS, Labels, ProbeResult
from .sites import By, probed
from .study import Decoder

BLIND = ("blind_black", "blind_mean", "blind_random")
TOKEN = "token"


class ProbeConfig(ic.Config):
    """Settings of the probes.

    Attributes:
        labels: what is to be decoded, one per prompt, of the original image in all modes; None: read states alone.
        groups: what prompts share (an image), one per prompt; never on both sides of a fold.
        questions: the prompts' texts without the image, one per prompt, for the probe of words and control tasks.
        types: of the questions, one per prompt, for control tasks; "token": the token that is read, the word type of
            Hewitt and Liang; None: the questions themselves.
        blind_black, blind_mean, blind_random: the same prompts with another image, one per prompt.
        donors: the group whose image each prompt was shown in `blind_random`.
        site: in text form, any along batch and pos: "mlp_out", "z", "z[3,2]", "mlp_act[4]"; None: the stream.
        by: of a site with heads or experts, each of these by itself ("unit"), or all of a layer together ("layer").
        positions: names of places; None: the three of a text with images, `answer_token` of another.
        pooling: of a place of several tokens: mean, max, or the one in the middle.
        allow_leaky: also read `answer_label`, and prompts that hold their answer; results are marked.
        decoder: ridge, logistic, means, lda or mlp.
        shuffles: shuffled labelings of each mode.
        n_folds, repeats: of the folds.
        cliff_boundary: the first layer after the cliff, for means over layers; found on other samples.
        seed: of folds, shuffles and control tasks.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset({*OF_PROMPTS, *BLIND})
    labels: Any = None
    groups: Any = None
    questions: Any = None
    types: Any = None
    blind_black: Any = None
    blind_mean: Any = None
    blind_random: Any = None
    donors: Any = None
    site: str | None = None
    by: By = "layer"
    positions: tuple[str, ...] | None = None
    pooling: Pooling = "mean"
    allow_leaky: bool = False
    decoder: Decoder = "ridge"
    shuffles: int = Field(100, ge=0)
    n_folds: int = Field(5, ge=2)
    repeats: int = Field(5, ge=1)
    cliff_boundary: int | None = Field(None, ge=0)
    seed: int = Field(0, ge=0)


class Probe(ic.Method):
    """What can be decoded from states at each layer, with images and without, beside what chance gives."""

    name = "probe"
    requires = frozenset({"resid_pre", "resid_post"})
    Config = ProbeConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> None:
        """Labels are there for all prompts, and every prompt of every mode has the positions."""
        for name in OF_PROMPTS:
            values = getattr(config, name)
            if values == TOKEN and name == "types":
                continue
            if values is not None and (isinstance(values, str) or len(values) != len(tokens)):
                raise ic.PlanError(
                    f"probe: {name} has {len(values)} items for {len(tokens)} prompts; give one per prompt"
                )
        if config.donors is not None and (config.groups is None or config.blind_random is None):
            raise ic.PlanError("probe: donors name the groups whose images blind_random shows; give both")
        sites = probed(model, config.site, config.by)
        if config.cliff_boundary is not None and config.cliff_boundary >= len(sites):
            raise ic.PlanError(f"probe: cliff_boundary {config.cliff_boundary} of {len(sites) - 1} layers")
        places = config.positions or default_places(tokens)
        if len(set(places)) < len(places) or not places:
            raise ic.PlanError(f"probe: positions {places}; give some, each once")
        if config.types == TOKEN and len(places) > 1:
            raise ic.PlanError(f"probe: types={TOKEN!r} are the tokens at one position; there are {', '.join(places)}")
        modes = _modes(model, tokens, config)
        for mode, rows in modes.items():
            for each in rows:
                for place in places:
                    columns_of(each, place, allow_leaky=config.allow_leaky)
            if mode != ORIGINAL:
                # places are by name in every mode; the same length is what a blind image of the same grid has
                alone = [length for each in rows for length in each.lengths]
                if alone != tokens.lengths:
                    number = next(
                        i for i, pair in enumerate(zip(alone, tokens.lengths, strict=True)) if len({*pair}) > 1
                    )
                    raise ic.PlanError(
                        f"probe: prompt {number} has {tokens.lengths[number]} tokens, {alone[number]} in {mode}; give "
                        "a blind image of the same size, and the same text"
                    )

    def run(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> ProbeResult:
        """One pass per mode."""
        places = config.positions or default_places(tokens)
        modes = _modes(model, tokens, config)
        sites = probed(model, config.site, config.by)
        how = places, config.pooling, config.allow_leaky, sites
        states = torch.stack(
            [torch.cat([read_states(model, each, *how) for each in rows]) for rows in modes.values()], 1
        )
        own = {name: _plain(getattr(config, name), len(tokens)) for name in OF_PROMPTS if name != "types"}
        words = config.types == TOKEN
        own["types"] = _plain(_tokens_at(tokens, places[0], config.allow_leaky) if words else config.types, len(tokens))
        return ProbeResult(
            states, tuple(modes), places, **own,
            decoder=config.decoder, shuffles=config.shuffles, n_folds=config.n_folds, repeats=config.repeats,
            cliff=config.cliff_boundary or 0, seed=config.seed, leaky="target" in tokens.spans,
            sites=() if config.site is None else tuple(map(str, sites)),
        )  # fmt: skip


def read_states(
    model: ic.Model,
    tokens: ic.Tokens,
    places: tuple[str, ...],
    pooling: Pooling = "mean",
    allow_leaky: bool = False,
    sites: Sequence[S.Site] | None = None,
) -> Float[Tensor, "batch position layer d_model"]:
    """States of a batch at places, float32: `resid_pre` of every layer and `resid_post` of the last, or others of
    `probed`, in which heads and experts of a layer lie behind each other.

    Raises:
        PlanError, PositionError: as `columns_of`, before anything runs.
    """
    columns = [columns_of(tokens, place, allow_leaky=allow_leaky) for place in places]
    chosen = list(probed(model, None, "layer") if sites is None else sites)
    kept: dict[S.Site, Tensor] = {}

    def each(layer: int, values: ic.LayerReadings) -> None:
        for site in chosen:
            if site.layers == layer:
                states = values[site].as_subclass(Tensor).detach().flatten(2)
                kept[site] = torch.stack([pooled(states, rows, pooling) for rows in columns], 1).cpu()

    model.run(tokens, read=chosen, each=each, logits=False)
    return torch.stack([kept[site] for site in chosen], 2)


def _tokens_at(tokens: ic.Tokens, place: str, allow_leaky: bool) -> tuple[str, ...]:
    """The token at a place of each prompt; of several, all of them."""
    rows = zip(tokens.labels, tokens.columns(None), columns_of(tokens, place, allow_leaky=allow_leaky), strict=True)
    return tuple("".join(labels[real.index(column)] for column in chosen) for labels, real, chosen in rows)


def states_of(activations: ic.Activations, at: Any = -1) -> Float[Tensor, "sample layer d_model"]:
    """States of texts that `model.collect` wrote with `read=S.resid_pre` (or with `.at(at)`), at one position of each.

    Raises:
        ReadError: it was not read there.
    """
    return torch.stack([activations[S.resid_pre.at(at), text].float() for text in range(len(activations))])


def _modes(model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> dict[str, list[ic.Tokens]]:
    """Batches of each mode; blind prompts run one by one, as they have their own images."""
    modes = {ORIGINAL: [tokens]}
    for mode in BLIND:
        if (value := getattr(config, mode)) is not None:
            modes[mode] = prompts_of(f"probe: {mode}", model, value, len(tokens))
    return modes


def _plain(values: Any, count: int) -> Labels:
    """A setting of the prompts as JSON has it; None for each where it was not given."""
    values = (None,) * count if values is None else values
    return tuple(value.item() if hasattr(value, "item") else value for value in values)
