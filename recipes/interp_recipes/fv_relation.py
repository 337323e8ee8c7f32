"""Function vectors of the questions of a relation: for each its heads, its vector, and where that works best.

    interp run fv_relation --set relation_csv=relation.csv --model toy:text --out out/relation

The table has columns id, ex_A, ex_B. Per question: trials, mean activations on clean prompts, the effect of every head
on corrupted ones, the vector of the best heads, and what it does to prompts without demonstrations, layer by layer.
The same command goes on where a run was stopped. Files: `interp_plugins.function_vectors.relation.run` and `question`.
"""

from __future__ import annotations

from pathlib import Path

from interp_plugins.function_vectors.relation.run import run_relation
from interp_plugins.function_vectors.relation.settings import RelationSettings

import interp_core as ic
from interp_core import open_tokenizer


def fv_relation(config: RelationSettings) -> Path:
    """Run the questions of a relation, or go on with them; returns the page of the summary.

    Raises:
        LoadError, PlanError: a table, settings or folder that cannot be used; or no question could be run.
    """

    def load() -> ic.Model:
        return ic.load(config.model, dtype=config.dtype, device=config.device)

    return run_relation(config, open_tokenizer(config.model), load, print)
