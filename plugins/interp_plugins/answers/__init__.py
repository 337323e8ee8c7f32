"""Answers: what a model's text says, and what that is worth beside the gold answers.

    scoring      `scorer(name, **options)(prediction, golds)` gives a `Score`; `.all(…)` gives `Scores` with counts
    extraction   the answer within a text: thinking blocks, "Final answer:", boxes, first line
    chartqa      relaxed accuracy, official and lenient          numerals   numbers with units, signs and percents
    docvqa       ANLS                                            vqav2      accuracy over ten people's answers
    pope         accuracy, precision, recall, F1, yes-rate       words      yes/no, choice, counts, colours, contains

    from interp_plugins.answers import scorer

    relaxed = scorer("chartqa", convention="lenient")
    relaxed("<think>…</think>Final answer: 12 percent", "0.12").value        # 1.0
    scores = relaxed.all(predictions, golds)
    scores.mean, scores.unparsable, scores.interval(images=images), scores.by(kinds)

Everything is a pure function of texts. A text with no answer in it scores 0 and is counted apart.
"""

from __future__ import annotations

from .extraction import Extraction, extract
from .scoring import Score, Scorer, Scores
from .table import SCORERS, scorer

__all__ = ["SCORERS", "Extraction", "Score", "Scorer", "Scores", "extract", "scorer"]
