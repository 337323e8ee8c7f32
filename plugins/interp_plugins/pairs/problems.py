"""Two contexts around the solution of a programming problem: an agent's transcript, and a plain answer.

    {"task_id": "HumanEval/0", "prompt": "def …", "canonical_solution": "    return …", "entry_point": …, "test": …}

Both end with the same fenced code, signature and solution, which is the target. In the agentic context it comes after
two turns of work, the assistant's tests and what they printed; in the assisted one it is the answer to the question.
The turns are written by rule and nothing is executed: they are contexts to compare routing in, no record of an agent.

Source: the form of the problems is HumanEval's (Chen et al. 2021, arXiv:2107.03374).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import interp_core as ic
from interp_core import runs

Form = Literal["chat", "plain"]
NEEDS = ("prompt", "canonical_solution")
NAMES = ("task_id", "name", "id")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .json or .jsonl file, also a gzipped one.

    Raises:
        LoadError: it cannot be read, or holds something else than objects.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        lines = ".jsonl" in path.suffixes
        rows = [json.loads(x) for x in runs.split_lines(content) if x.strip()] if lines else json.loads(content)
    except (OSError, EOFError, ValueError) as error:
        raise ic.LoadError(f"{path} cannot be read ({error}); give a .json or .jsonl file, gzipped or not") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ic.LoadError(f"{path} holds no rows; give one object per problem, or a list of them")
    return rows


def contexts_of(row: Mapping[str, Any], form: Form = "chat") -> dict[str, Any]:
    """Name, both contexts and target of a row: of a problem, or as they stand where the row has them already.

    Raises:
        TextError: a row that is neither, naming the field.
    """
    name = next((str(row[key]) for key in NAMES if key in row), "a problem")
    if "target" in row and "agentic" in row:
        return {**row, "name": name}
    if missing := [key for key in NEEDS if not isinstance(row.get(key), str)]:
        raise ic.TextError(
            f"sample {name!r} has no {missing[0]}: a problem has prompt and canonical_solution, a pair agentic, "
            f"assisted and target; it has {', '.join(map(str, row))}"
        )
    code = (row["prompt"] + row["canonical_solution"]).strip("\n")
    written = {"agentic": _agentic(row, code), "assisted": _assisted(row, code)}
    shown = written if form == "chat" else {side: plain(messages) for side, messages in written.items()}
    return {"name": name, **shown, "target": code}


Message = dict[str, str]


def _agentic(row: Mapping[str, Any], code: str) -> list[Message]:
    function = str(row.get("entry_point", "the function"))
    test = str(row.get("test", "")).strip("\n") or f"assert callable({function})"
    return [
        _said("user", f"Solve this problem with your tools, then answer.\n\n{_fenced(row['prompt'])}"),
        _said("assistant", f"I write the tests to a file and run them before I write {function}.\n\n{_fenced(test)}"),
        _said("user", f"Tool output:\nNameError: name '{function}' is not defined\n1 failed"),
        _said("assistant", f"The tests fail as they should. This is the solution:\n\n{_fenced(code)}"),
    ]


def _assisted(row: Mapping[str, Any], code: str) -> list[Message]:
    return [_said("user", f"Complete this function.\n\n{_fenced(row['prompt'])}"), _said("assistant", _fenced(code))]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _fenced(code: str) -> str:
    return "```python\n" + code.strip("\n") + "\n```"


def plain(messages: list[Message]) -> str:
    """A transcript as text, for tokenizers without a chat template."""
    return "\n\n".join(f"{message['role'].capitalize()}:\n{message['content']}" for message in messages)
