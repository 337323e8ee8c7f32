"""Settings of a run over a relation, and what of them may change when it goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import interp_core as ic

from ..template import Template
from .source import Question

ScoreKey = Literal["mean_delta_p", "mean_delta_logit", "mean_delta_logprob"]
BadRows = Literal["fail", "drop"]
OnError = Literal["continue", "stop"]
FREE = frozenset(
    {
        "relation_csv", "q_column", "a_column", "b_column", "out", "q_ids", "max_questions", "dry_run", "on_error",
        "device",
    }
)  # fmt: skip
"""Settings that another call on the same folder may have differently; what the table holds is told by its digest."""


class RelationSettings(ic.Config):
    """Settings of a run over a relation.

    Attributes:
        relation_csv: the table of pairs; see `source`.
        model: toy:text, a folder, or a hub id.
        out: folder of the run (None: results/{model}/{table}/{timestamp}-fv_relation-{hash}).
        q_ids: which questions (None: all).
        max_questions: at most so many of them.
        n_trials: trials per question.
        n_demos: demonstrations in each.
        top_k: heads that make the vector.
        score_key: what ranks heads, and then layers.
        alpha: factor of the vector where it is added.
        layers: where to add it (None: after every layer).
        held_out: pairs per question that no trial shows; the vector is then tried on them instead of on the trials'
            queries.
        seed: of the draws, the same for every question.
        prefixes, separators: of the template (None: Q: / A:, a line break and an empty line).
        prepend_bos_token_used: the text of a BOS stands in the prompts of a tokenizer that adds none.
        q_column, a_column, b_column: columns of the table (None: found by name).
        numbers: cells may be numbers.
        bad_rows: a question with bad rows fails, or they are left out.
        dtype, device: of the model.
        dry_run: read, draw and write the trials; load no model.
        on_error: a question that fails is noted and the others go on, or the run stops.
    """

    relation_csv: Path
    model: str = "toy:text"
    out: Path | None = None
    q_ids: str | list[str] | None = None
    max_questions: int | None = None
    n_trials: int = 25
    n_demos: int = 9
    top_k: int = 20
    score_key: ScoreKey = "mean_delta_p"
    alpha: float = 1.0
    layers: list[int] | None = None
    held_out: int = 0
    seed: int = 0
    prefixes: dict[str, str] | None = None
    separators: dict[str, str] | None = None
    prepend_bos_token_used: bool = False
    q_column: str | None = None
    a_column: str | None = None
    b_column: str | None = None
    numbers: bool = False
    bad_rows: BadRows = "fail"
    dtype: str | None = None
    device: str | None = None
    dry_run: bool = False
    on_error: OnError = "continue"

    @property
    def chosen(self) -> list[str] | None:
        """The questions that are asked for."""
        return [self.q_ids] if isinstance(self.q_ids, str) else self.q_ids

    def check(self) -> None:
        """Raise a PlanError for a number that means nothing."""
        least = {"n_trials": 1, "n_demos": 1, "top_k": 1, "held_out": 0, "max_questions": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ic.PlanError(f"{name} is {value}; it is {low} or more")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ic.PlanError(f"alpha is {self.alpha}, a vector times that does nothing; give another factor")
        if self.layers is not None and (not self.layers or len({*self.layers}) < len(self.layers)):
            raise ic.PlanError(f"layers are {self.layers}; give each once, or leave the setting out for all")

    def check_model(self, model: ic.Model) -> list[int]:
        """The layers to add the vector at.

        Raises:
            PlanError: more heads or other layers than the model has.
        """
        if self.top_k > len(model.heads):
            raise ic.PlanError(f"top_k is {self.top_k}, {self.model} has {len(model.heads)} heads; ask for fewer")
        for layer in self.layers or ():
            if not 0 <= layer < model.n_layers:
                raise ic.PlanError(f"layers has {layer}, {self.model} has layers 0 to {model.n_layers - 1}")
        return list(range(model.n_layers)) if self.layers is None else sorted(self.layers)

    def template(self, tokenizer: Any) -> Template:
        """The template, with the BOS that the tokenizer adds, or the text of one if that is asked for."""
        template = Template.filled(self.prefixes, self.separators)
        if self.prepend_bos_token_used or template.front(tokenizer).added:
            return template
        return Template(template.prefixes, template.separators, bos=False)

    def config(self, question: Question) -> dict[str, Any]:
        """What a question's numbers depend on, as `qid_status.json` keeps it."""
        kept = {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE}
        return kept | {"pairs_sha256": question.digest}
