"""Function vectors of the questions of a relation: for each its heads, its vector, and where that works best.

    interp run fv_relation --set relation_csv=relation.csv --model toy:text --out out/relation

The table has columns id, ex_A, ex_B. Per question: trials, mean activations on clean prompts, the effect of every head
on corrupted ones, the vector of the best heads, and what it does to prompts without demonstrations, layer by layer.
The same command goes on where a run was stopped. Files: `interp_plugins.function_vectors.relation.run` and `question`.
"""

from __future__ import annotations

from pathlib import Path

from interp_plugins.function_vectors.relation.run import run_relation
from interp_plugins.function_vectors.relation.settings import BadRows, OnError, RelationSettings, ScoreKey

import interp_core as ic
from interp_core import open_tokenizer


def fv_relation(
    relation_csv: Path,
    model: str = "toy:text",
    out: Path | None = None,
    q_ids: str | list[str] | None = None,
    max_questions: int | None = None,
    n_trials: int = 25,
    n_demos: int = 9,
    top_k: int = 20,
    score_key: ScoreKey = "mean_delta_p",
    alpha: float = 1.0,
    layers: list[int] | None = None,
    held_out: int = 0,
    seed: int = 0,
    prefixes: dict[str, str] | None = None,
    separators: dict[str, str] | None = None,
    prepend_bos_token_used: bool = False,
    q_column: str | None = None,
    a_column: str | None = None,
    b_column: str | None = None,
    numbers: bool = False,
    bad_rows: BadRows = "fail",
    dtype: str | None = None,
    device: str | None = None,
    dry_run: bool = False,
    on_error: OnError = "continue",
) -> Path:
    """Run the questions of a relation, or go on with them; returns the page of the summary.

    Args:
        relation_csv: table with a pair per row: columns id (or q), ex_A, ex_B, however written.
        model: toy:text, a folder, or a hub id.
        out: folder of the run (None: results/{model}/{table}/{timestamp}-fv_relation-{hash}).
        q_ids: which questions (default: all).
        max_questions: at most so many of them.
        n_trials, n_demos: trials per question, and demonstrations in each.
        top_k: heads that make the vector.
        score_key: what ranks heads, and then layers.
        alpha: factor of the vector where it is added.
        layers: where to add it (default: after every layer).
        held_out: pairs per question that no trial shows, to try the vector on (default: the trials' queries).
        seed: of the draws, the same for every question.
        prefixes, separators: of the template; default Q: / A:, a line break and an empty line.
        prepend_bos_token_used: the text of a BOS stands in the prompts of a tokenizer that adds none.
        q_column, a_column, b_column: columns of the table (default: found by name).
        numbers: cells may be numbers.
        bad_rows: a question with bad rows fails, or they are left out.
        dtype, device: of the model.
        dry_run: read, draw and write the trials; load no model.
        on_error: a question that fails is noted and the others go on, or the run stops.

    Raises:
        LoadError, PlanError: a table, settings or folder that cannot be used; or no question could be run.
    """
    given = dict(locals())
    settings = RelationSettings(**given)
    return run_relation(
        settings, open_tokenizer(model), lambda: ic.load(model, dtype=dtype, device=device), lambda line: print(line)
    )
