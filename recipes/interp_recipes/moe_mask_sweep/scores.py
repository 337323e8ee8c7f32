"""What a masked model writes, judged: a scorer of the user's own, or tests of HumanEval-like problems.

The context up to its first target goes into `model.generate` under the mask; the scorer gets what comes out.

    --scorer module:function     a function of an `Answer`, which gives a number (1 for a pass)
    --scorer exact_match         1 where the answer begins with the targets' text
    --scorer code --problems F --execute_code
                                 1 where the problem's tests pass: this runs programs that the model wrote

Problems are JSON lines with task_id, prompt, test and entry_point, as HumanEval has them; a sample named `humaneval_3`
is the problem `HumanEval/3`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from interp_plugins.attribution.data.cache import json_rows
from interp_plugins.pairs import Pair
from interp_plugins.pairs.pair import Side

import interp_core as ic

from .sandbox import describe, run_program

FIELDS = ("task_id", "prompt", "test", "entry_point")


@dataclass(frozen=True)
class Answer:
    """What a masked model wrote.

    Attributes:
        sample: name of the pair.
        side: which of its contexts came before.
        text: what the model wrote.
        target: the text of the pair's targets.
        more: what else the pair's file says of the sample.
    """

    sample: str
    side: Side
    text: str
    target: str
    more: Mapping[str, Any]


Scorer = Callable[[Answer], float]


def exact_match(answer: Answer) -> float:
    """1 where the answer begins with the target, white space aside."""
    said, wanted = ("".join(text.split()) for text in (answer.text, answer.target))
    return float(said.startswith(wanted))


def scorer_of(
    name: str, problems: Path | None, execute: bool, seconds: float, megabytes: int, say: Callable[[str], None] = print
) -> Scorer:
    """The scorer of a name.

    Raises:
        PlanError: no such function; code without leave to run it, or without problems.
        LoadError: problems that cannot be read.
    """
    if name == "exact_match":
        return exact_match
    if name == "code":
        limits = describe(seconds, megabytes)
        if problems is None:
            raise ic.PlanError("--scorer code needs --problems: JSON lines with task_id, prompt, test and entry_point")
        if not execute:
            raise ic.PlanError(
                "--scorer code runs programs that the model writes, on this machine, and is off by default; "
                f"--execute_code lets it ({limits})"
            )
        say(f"runs code that the model writes: {limits}")
        return _tests(read_problems(problems), seconds, megabytes)
    module, sign, function = name.partition(":")
    if not sign:
        raise ic.PlanError(f"--scorer is 'exact_match', 'code' or module:function, not {name!r}")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ic.PlanError(f"--scorer {name}: {error}") from error
    if not callable(scorer):
        raise ic.PlanError(f"--scorer {name} is a {type(scorer).__name__}, not a function of an Answer")
    return cast(Scorer, scorer)


def read_problems(path: Path) -> dict[str, Mapping[str, str]]:
    """Problems by `problem_key` of their task_id.

    Raises:
        LoadError: no such file, or a line that is no problem.
    """
    problems: dict[str, Mapping[str, str]] = {}
    for number, row in json_rows(path):
        if missing := [field for field in FIELDS if field not in row]:
            raise ic.LoadError(f"{path}, line {number}: a problem has {', '.join(FIELDS)}; it lacks {missing[0]}")
        problems[problem_key(row["task_id"])] = {field: str(row[field]) for field in FIELDS}
    return problems


def problem_key(name: str) -> str:
    """`HumanEval/3` and `humaneval_3` are the same problem."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower())


def _tests(problems: Mapping[str, Mapping[str, str]], seconds: float, megabytes: int) -> Scorer:
    def scorer(answer: Answer) -> float:
        problem = problems.get(problem_key(answer.sample))
        if problem is None:
            raise ic.PlanError(f"sample {answer.sample!r} is none of the {len(problems)} problems; name it as task_id")
        code = answer.text.split("```")[0]
        whole = code if f"def {problem['entry_point']}" in code else problem["prompt"] + code
        program = f"{whole}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
        return float(run_program(program, seconds, megabytes).passed)

    return scorer


def answered(model: ic.Model, pair: Pair, side: Side, edits: Sequence[ic.Edit], max_new_tokens: int | None) -> Answer:
    """What the model writes after a context's part before its first target; greedy, under a mask of all positions.

    Args:
        max_new_tokens: at most so many (None: as many as from the first target to the last).
    """
    pair = pair.packed()
    targets, tokens = pair.positions(side), pair.tokens(side)
    ids = tokens.ids[0].tolist()
    count = max_new_tokens or targets[-1] - targets[0] + 1
    generation = model.generate(
        {"input_ids": tokens.ids[:, : targets[0]]}, edits=edits, max_new_tokens=count, allow_noop=True
    )  # fmt: skip
    assert model.tokenizer is not None
    wanted = model.tokenizer.decode(ids[targets[0] : targets[-1] + 1])
    return Answer(pair.name, side, generation.texts[0], wanted, pair.more)
