"""Function vectors: what heads carry of a task that is shown in context, as one vector that can be added elsewhere.

    mean[l, a, s] = 1/N Σ_n avg_{t in slot s} z_n[l, t, a]                             clean prompts
    IE[n, l, a]   = p(y | corrupted n, z[l, last, a] := mean[l, a, last]) - p(y | corrupted n)
    v             = Σ_{(l, a) of largest mean IE} out-projection_l(mean[l, a, last])

Source: Todd et al. (2024), "Function Vectors in Large Language Models", arXiv:2310.15213.

tasks, template, prompts, trials   task files, prompts with a slot for every token, trials
means, effects, vectors            mean activations, indirect effects and heads, vectors and their algebra
inject, evaluate, metrics          into forward passes, likelihoods and generation; ranks and string metrics
vocab, induction, studies          decoding, attention of heads, templates and number of heads
related                            what several tasks share: heads, differences of vectors, similarities
method, page, report               all of it as the method `function_vectors`; pictures, and the page of the recipe
files                              file formats: fixed trials, extraction and answers, what is published
parity, relation                   the parity suite; runs of tables of relations
"""

from __future__ import annotations

from .effects import (
    CLASSES,
    Effects,
    Head,
    average,
    gap,
    indirect_effect,
    indirect_effects,
    ranking,
    top_heads,
    universal,
)
from .evaluate import Evaluation, baseline, evaluate, filter_set, generated, questions
from .files.trials import Trial, Trials
from .inject import by_layer, continued, head_injection, injection, scored
from .means import mean_head_activations, mean_layer_activations
from .method import FunctionVectors, FunctionVectorsConfig, FunctionVectorsResult
from .prompts import Prompt, Slots, build, dummy
from .tasks import Pair, Task, load_task
from .template import Template
from .trials import fixed_trials, legacy_trials, relation_trials
from .vectors import FunctionVector, function_vector, head_space, mean_vector, similarity
from .vocab import decoded, reconstructed, words

__all__ = [
    "CLASSES",
    "Effects",
    "Evaluation",
    "FunctionVector",
    "FunctionVectors",
    "FunctionVectorsConfig",
    "FunctionVectorsResult",
    "Head",
    "Pair",
    "Prompt",
    "Slots",
    "Task",
    "Template",
    "Trial",
    "Trials",
    "average",
    "baseline",
    "build",
    "by_layer",
    "continued",
    "decoded",
    "dummy",
    "evaluate",
    "filter_set",
    "fixed_trials",
    "function_vector",
    "gap",
    "generated",
    "head_injection",
    "head_space",
    "indirect_effect",
    "indirect_effects",
    "injection",
    "legacy_trials",
    "load_task",
    "mean_head_activations",
    "mean_layer_activations",
    "mean_vector",
    "questions",
    "ranking",
    "reconstructed",
    "relation_trials",
    "scored",
    "similarity",
    "top_heads",
    "universal",
    "words",
]
