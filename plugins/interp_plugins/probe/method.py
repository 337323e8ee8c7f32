"""Method `probe`: states of prompts at named positions and in several image modes, and what can be decoded of them.

    read      resid_pre[0] … resid_pre[L-1], resid_post[L-1] at each position (places.py), in `original` and blind modes
    decode    ridge, logistic, means, lda or mlp on repeated, stratified folds of whole groups        (folds.py, study.py)
    beside    shuffled labels, control task, the question's words, blind images                       (nulls.py, compare.py)

States are kept per prompt, so that batches (`batch_size=`, `out=`) join without loss; probes are fitted when they are
first asked for, on all prompts together.

Source: the modules named above say whose each number is; docs/methods/probe.md has formulas and rules.
Cost: one forward pass per mode; memory prompts · modes · positions · (layers + 1) · d in float32.
Must equal: `decode` on states read by `model.run` or `model.collect` at the same positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

from .._prompts import prompts_of
from .compare import INTERPRETATION, ORIGINAL, Comparison, compare
from .places import LEAKY, Pooling, columns_of, default_places, pooled
from .study import Decoder

BLIND = ("blind_black", "blind_mean", "blind_random")
Labels = tuple[str | int | bool | None, ...]


class ProbeConfig(ic.Config):
    """Settings of the probes.

    Attributes:
        labels: what is to be decoded, one per prompt, of the original image in all modes; None: read states alone.
        groups: what prompts share (an image), one per prompt; never on both sides of a fold.
        questions: the prompts' texts without the image, one per prompt, for the probe of words and control tasks.
        types: of the questions, one per prompt, for control tasks; None: the questions themselves.
        blind_black, blind_mean, blind_random: the same prompts with another image, one per prompt.
        donors: the group whose image each prompt was shown in `blind_random`.
        positions: names of places; None: the three of a text with images, `answer_token` of another.
        pooling: of a place of several tokens: mean, max, or the one in the middle.
        allow_leaky: also read `answer_label`, and prompts that hold their answer; results are marked.
        decoder: ridge, logistic, means, lda or mlp.
        shuffles: shuffled labelings of each mode.
        n_folds, repeats: of the folds.
        cliff_boundary: the first layer after the cliff, for means over layers; found on other samples.
        seed: of folds, shuffles and control tasks.
    """

    PER_PROMPT: ClassVar[frozenset[str]] = frozenset(
        {"labels", "groups", "questions", "types", "donors", *BLIND}
    )  # fmt: skip
    labels: Any = None
    groups: Any = None
    questions: Any = None
    types: Any = None
    blind_black: Any = None
    blind_mean: Any = None
    blind_random: Any = None
    donors: Any = None
    positions: tuple[str, ...] | None = None
    pooling: Pooling = "mean"
    allow_leaky: bool = False
    decoder: Decoder = "ridge"
    shuffles: int = Field(100, ge=0)
    n_folds: int = Field(5, ge=2)
    repeats: int = Field(5, ge=1)
    cliff_boundary: int | None = Field(None, ge=0)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, eq=False)
class ProbeResult(ic.Result):
    """States of prompts, and what probes decode of them.

    Attributes:
        states: of every prompt, mode and position; layer l is `resid_pre[l]`, the last one `resid_post[L-1]`.
        modes, positions: names along the axes.
        labels, groups, questions, types, donors: of the prompts; None where not given.
        decoder, shuffles, n_folds, repeats, cliff, seed: settings of the probes.
        leaky: the prompts held their answers.
    """

    AXES: ClassVar[Mapping[str, tuple[str, ...]]] = {"states": ("batch", "mode", "position", "layer", "d_model")}
    JOINS: ClassVar[Mapping[str, str]] = dict.fromkeys(("labels", "groups", "questions", "types", "donors"), "rows")
    states: Float[Tensor, "batch mode position layer d_model"]
    modes: tuple[str, ...]
    positions: tuple[str, ...]
    labels: Labels
    groups: Labels
    questions: Labels
    types: Labels
    donors: Labels
    decoder: str
    shuffles: int
    n_folds: int
    repeats: int
    cliff: int
    seed: int
    leaky: bool = False

    def at(self, position: str) -> dict[str, Float[Tensor, "sample layer d_model"]]:
        """States of a position by mode.

        Raises:
            PlanError: no such position.
        """
        if position not in self.positions:
            raise ic.PlanError(f"no position {position!r} here. {ic.errors.nearest(position, self.positions)}")
        place = self.positions.index(position)
        return {mode: self.states[:, number, place] for number, mode in enumerate(self.modes)}

    def compare(self, position: str, labels: Any = None, **settings: Any) -> Comparison:
        """Fit the probes of a position.

        Args:
            position: its name.
            labels: others than those that the method was given.
            settings: of `compare.compare`, in place of the method's.

        Raises:
            PlanError: no labels, no such position, or too few samples for the folds.
        """
        labels = _given(self.labels) if labels is None else labels
        if labels is None:
            raise ic.PlanError("there are no labels: give labels=[…], one per prompt, to the method or to compare")
        if len(labels) != len(self.states):
            raise ic.PlanError(f"{len(labels)} labels for {len(self.states)} prompts; give one per prompt")
        groups, donors = _given(self.groups), _given(self.donors)
        how: dict[str, Any] = {
            "groups": groups, "donors": donors, "questions": _given(self.questions), "types": _given(self.types),
            "decoder": self.decoder, "shuffles": self.shuffles, "n_folds": self.n_folds, "repeats": self.repeats,
            "leaky": position == LEAKY, "seed": self.seed,
        }  # fmt: skip
        if donors is not None and groups is not None:
            of = dict(zip(groups, labels, strict=True))
            how["donor_labels"] = [of.get(donor) for donor in donors]
        return compare(self.at(position), labels, **{**how, **settings})

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Fitted probes of each position.

        Raises:
            PlanError: as `compare`.
        """
        return {position: self.compare(position) for position in self.positions}

    def table(self) -> list[dict[str, Any]]:
        """One row per position and mode: mean accuracy of the layers after the cliff; without labels, the states."""
        if _given(self.labels) is None or self.why:
            return super().table()
        return [
            {"position": position} | row | {"verdict": comparison.verdict(self.cliff)}
            for position, comparison in self.comparisons.items()
            for row in comparison.table(self.cliff)
        ]

    @cached_property
    def why(self) -> str:
        """Why no probe can be fitted; empty if one can."""
        if _given(self.labels) is None:
            return "there are no labels"
        try:
            _ = self.comparisons
        except ic.PlanError as error:
            return str(error)
        return ""

    def __str__(self) -> str:
        n, _, _, n_layers, d = self.states.shape
        head = f"{n} prompts, {n_layers} layers of {d}: {', '.join(self.modes)} at {', '.join(self.positions)}"
        if self.why:
            return f"{head}\n  no probes: {self.why}"
        return "\n".join([head, *(f"{position}: {comparison.text(self.cliff)}" for position, comparison in self.comparisons.items())])

    def html(self) -> str:
        """Accuracy over layers at each position, the table after the cliff, and what flags there are."""
        if self.why:
            return f"<p>{ic.report.escape(self.why)}</p>" + ic.report.table(super().table())
        parts = [comparison.curves(position).html() for position, comparison in self.comparisons.items()]
        flags = [f"{position}: {flag}" for position, c in self.comparisons.items() for flag in c.flags(self.cliff)]
        notes = "".join(f"<p>{ic.report.escape(note)}</p>" for note in [*flags, INTERPRETATION])
        return "".join(parts) + ic.report.table(self.table()) + notes


class Probe(ic.Method):
    """What can be decoded from states at each layer, with images and without, beside what chance gives."""

    name = "probe"
    requires = frozenset({"resid_pre", "resid_post"})
    Config = ProbeConfig

    def check(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> None:
        """Labels are there for all prompts, and every prompt of every mode has the positions."""
        for name in ("labels", "groups", "questions", "types", "donors"):
            values = getattr(config, name)
            if values is not None and (isinstance(values, str) or len(values) != len(tokens)):
                raise ic.PlanError(
                    f"probe: {name} has {len(values)} items for {len(tokens)} prompts; give one per prompt"
                )
        if config.donors is not None and (config.groups is None or config.blind_random is None):
            raise ic.PlanError("probe: donors name the groups whose images blind_random shows; give both")
        if config.cliff_boundary is not None and config.cliff_boundary > model.n_layers:
            raise ic.PlanError(f"probe: cliff_boundary {config.cliff_boundary} of {model.n_layers} layers")
        places = config.positions or default_places(tokens)
        if len(set(places)) < len(places) or not places:
            raise ic.PlanError(f"probe: positions {places}; give some, each once")
        modes = _modes(model, tokens, config)
        for mode, rows in modes.items():
            for each in rows:
                for place in places:
                    columns_of(each, place, allow_leaky=config.allow_leaky)
            if mode != ORIGINAL:
                alone = [length for each in rows for length in each.lengths]
                if alone != tokens.lengths:
                    number = next(
                        i for i, pair in enumerate(zip(alone, tokens.lengths, strict=True)) if len({*pair}) > 1
                    )
                    raise ic.PlanError(
                        f"probe: prompt {number} has {tokens.lengths[number]} tokens, {alone[number]} in {mode}; give a "
                        "blind image of the same size, and the same text"
                    )

    def run(self, model: ic.Model, tokens: ic.Tokens, config: ProbeConfig) -> ProbeResult:
        """One pass per mode."""
        places = config.positions or default_places(tokens)
        modes = _modes(model, tokens, config)
        states = torch.stack([
            torch.cat([read_states(model, each, places, config.pooling, config.allow_leaky) for each in rows])
            for rows in modes.values()
        ], 1)  # fmt: skip
        none = (None,) * len(tokens)
        own = {name: tuple(value) if (value := getattr(config, name)) is not None else none
               for name in ("labels", "groups", "questions", "types", "donors")}  # fmt: skip
        return ProbeResult(
            states, tuple(modes), places, **{name: _plain(values) for name, values in own.items()},
            decoder=config.decoder, shuffles=config.shuffles, n_folds=config.n_folds, repeats=config.repeats,
            cliff=config.cliff_boundary or 0, seed=config.seed, leaky="target" in tokens.spans,
        )  # fmt: skip


def read_states(
    model: ic.Model, tokens: ic.Tokens, places: tuple[str, ...], pooling: Pooling = "mean", allow_leaky: bool = False
) -> Float[Tensor, "batch position layer d_model"]:
    """States of a batch at places, float32: `resid_pre` of every layer, and `resid_post` of the last.

    Raises:
        PlanError, PositionError: as `columns_of`, before anything runs.
    """
    columns = [columns_of(tokens, place, allow_leaky=allow_leaky) for place in places]
    kept: list[Tensor] = []

    def note(stream: Tensor) -> None:
        kept.append(torch.stack([pooled(stream.detach(), rows, pooling) for rows in columns], 1).cpu())

    last = S.resid_post[model.layers(S.resid_post)[-1]]

    def each(layer: int, values: ic.LayerReadings) -> None:
        note(values[S.resid_pre].as_subclass(Tensor))
        if layer == last.layers:
            note(values[last].as_subclass(Tensor))

    model.run(tokens, read=[S.resid_pre, last], each=each, logits=False)
    return torch.stack(kept, 2)


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


def _given(values: Labels) -> list[Any] | None:
    """Values of the prompts; None where none was given."""
    return None if all(value is None for value in values) else list(values)


def _plain(values: tuple[Any, ...]) -> Labels:
    """Labels as JSON has them."""
    return tuple(value.item() if hasattr(value, "item") else value for value in values)
