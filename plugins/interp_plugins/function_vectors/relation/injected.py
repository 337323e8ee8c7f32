"""The vector of a question, and what it does: files of heads and vectors, of every layer, and of all layers.

top_heads.json          the heads of largest effect
fv_global_resid.pt      their vector in the residual stream, which is what is added
fv_by_layer.pt          per layer their means side by side, before the output projection: cannot be added
step6/layer_<l>/        prompts without demonstrations, as they are and with the vector after layer l
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import interp_core as ic
from interp_core import runs

from ..effects import Head
from ..files.answers import Measured, measured
from ..files.common import by_layer
from ..files.trials_json import short_name
from ..inject import injection
from ..vectors import FunctionVector, function_vector
from .draws import Work
from .settings import RelationSettings
from .tables import Means, Row, aie_rows, csv_table, eval_rows, eval_summary, read_json

SUMMARY = "step6/step6_all_layers_summary.json"
META = "fv_global_resid_meta.json"
TOKEN_RULE = "the last token of the prompt"


def make_vector(
    model: ic.Model, work: Work, mean: Means, rows: Sequence[Row], settings: RelationSettings, part: runs.Part
) -> FunctionVector:
    """Average effects, the heads of largest, and their vector."""
    key, last = settings.score_key, mean[:, :, -1]
    norms = {(layer, head): float(last[layer, head].norm()) for layer, head in model.heads}
    table = aie_rows(rows, norms, key)
    best = table[: settings.top_k]
    gap = best[-1][key] - table[len(best)][key] if len(table) > len(best) else None
    kept = ("layer", "head", "mean_delta_logprob", "mean_delta_p", "n_trials")
    listed = [{name: row[name] for name in kept} | {"score_key": key, "rank_score": row[key]} for row in best]
    vector = function_vector(
        model, mean, [Head(row["layer"], row["head"], row[key]) for row in best], task=work.question.q_id
    )
    meta = {"k": settings.top_k, "model": settings.model, "model_spec": _kind(model), "score_key": key}
    files: dict[str, str | bytes] = {
        "aie_scores.csv": csv_table(table),
        "top_heads.json": runs.json_text({"meta": meta | {"gap_k_to_k1": gap}, "heads": listed}),
    }
    part.put(files | _vector_files(model, work, mean, vector, settings, listed), stage="vector")
    return vector


def _vector_files(
    model: ic.Model, work: Work, mean: Means, vector: FunctionVector, settings: RelationSettings, heads: list[Row]
) -> dict[str, str | bytes]:
    """The vector in the residual stream, and its parts by layer, before the projection and after it."""
    chosen = [Head(*head) for head in vector.heads]
    parts = by_layer(model, mean, chosen, alpha=settings.alpha, model_spec=_kind(model))
    sizes = {key: parts[key] for key in ("n_heads", "head_dim", "resid_dim")}
    meta = {
        "spec_name": _kind(model), "model": settings.model, "q_id": work.question.q_id, "space": "resid",
        "shape": [len(vector.vector)], "norm": vector.norm, "bias": "per_head", "heads": heads,
        "token_position_rule": TOKEN_RULE,
    }  # fmt: skip
    return {
        "fv_by_layer.pt": ic.runs.pt_bytes(parts),
        "fv_global_resid.pt": ic.runs.pt_bytes({"fv_global_resid": vector.vector, **sizes}),
        META: runs.json_text(meta),
    }


def _kind(model: ic.Model) -> str:
    return str(model.hf.config.model_type)


def evaluate_layers(
    model: ic.Model,
    work: Work,
    vector: FunctionVector,
    settings: RelationSettings,
    layers: Sequence[int],
    part: runs.Part,
) -> None:
    """The prompts without demonstrations, as they are and with the vector at every layer that is not on file."""
    todo = [layer for layer in layers if not part.kept(f"step6/layer_{layer}", after=["trials", "vector"])]
    if not todo:
        return
    different = list(dict.fromkeys(work.asked))
    edits = [injection(model, vector, layer, strength=settings.alpha) for layer in todo]
    measures = measured(model, different, edits)
    # queries repeat over trials: each is swept once, and its numbers put back where it was asked
    place = torch.tensor([different.index(prompt) for prompt in work.asked])
    measures = Measured(*(values[..., place] for values in measures))
    fv_meta = read_json(work.folder / META)
    for number, layer in enumerate(todo):
        rows = eval_rows(work.question.q_id, model.tokenizer, work.asked, measures, number)
        files = {
            f"step6/layer_{layer}/{name}": content for name, content in _layer(work, settings, layer, rows, fv_meta)
        }
        part.put(files, stage=f"step6/layer_{layer}", after=["trials", "vector"])


def _layer(
    work: Work, settings: RelationSettings, layer: int, rows: list[Row], fv_meta: Row
) -> Iterator[tuple[str, str]]:
    """The files of one layer."""
    q_id, summary = work.question.q_id, eval_summary(rows)
    fv = {key: fv_meta[key] for key in ("shape", "norm")}
    config = {
        "model": settings.model, "edit_layer": layer, "fv_source": "fv_global_resid", "seed": settings.seed,
        "n_eval": len(rows), "alpha": settings.alpha, "dtype": settings.dtype, "score_key": settings.score_key,
    }  # fmt: skip
    meta = config | {
        "injection_point": f"resid_post[{layer}], {TOKEN_RULE}", "slot": "query_predictive",
        "slot_index_rule": TOKEN_RULE, "token_rule": "the first token of the answer after the prompt",
        "fv_type": "question", "eval_scope": "question", "eval_qids": [q_id], "heads": fv_meta["heads"], "fv": fv,
        "config": config, "fv_meta": fv_meta,
    }  # fmt: skip
    results = {
        "config": config, "fv": fv, "summary": summary, "per_qid": {q_id: summary},
        "matrix": {"__global__": {q_id: summary[settings.score_key]}}, "metadata": meta, "results": rows,
    }  # fmt: skip
    name = short_name(settings.model)
    yield f"step6_results_{runs.safe_name(name)}_layer{layer}_n{len(rows)}.json", runs.json_text(results)
    yield "eval_trials.jsonl", runs.json_lines(rows)
    yield "eval_meta.json", runs.json_text(meta)
    yield "eval_summary.json", runs.json_text(summary)


def summarise(work: Work, settings: RelationSettings, layers: Sequence[int], part: runs.Part) -> Row:
    """All layers side by side; the best is that of the highest score, the lowest of several."""
    done = list(layers)
    per = {layer: read_json(work.folder / f"step6/layer_{layer}/eval_summary.json") for layer in done}
    best = max(done, key=lambda layer: (per[layer][settings.score_key], -layer), default=None)
    overview: Row = {
        "q_id": work.question.q_id, "score_key": settings.score_key, "expected_layers": list(layers),
        "completed_layers": done, "missing_layers": [], "best_layer": best,
        "best_score": None if best is None else per[best][settings.score_key],
        "per_layer": {str(layer): summary for layer, summary in per.items()},
    }  # fmt: skip
    part.put({SUMMARY: runs.json_text(overview)})
    return overview
