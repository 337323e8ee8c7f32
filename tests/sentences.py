"""Where code decides by the words of an error's message, read from its syntax."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

SEARCHES = {"startswith", "endswith", "find", "index", "count", "search", "match", "fullmatch"}


def branches_on_sentences(text: str) -> Iterator[int]:
    """Lines that compare or search what an error says, or look for a piece of English (two words) in any text.

    Errors are what handlers catch and arguments annotated as one; what they say is `str`, `repr` or `args` of them, and
    names that are assigned from these.
    """
    tree = ast.parse(text)
    errors = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation is not None]
    errors |= {node.arg for node in arguments if ast.unparse(node.annotation).endswith(("Error", "Exception"))}  # type: ignore[arg-type]
    name = "|".join(errors) or "(?!)"
    says = re.compile(rf"\b(?:str|repr)\((?:{name})\)|\b(?:{name})\.args\b")
    assigned = [
        node for node in ast.walk(tree) if isinstance(node, ast.Assign) and says.search(ast.unparse(node.value))
    ]
    messages = {ast.unparse(target) for node in assigned for target in node.targets}
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            if isinstance(node.ops[0], (ast.In, ast.NotIn)) and _is_english(node.left):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEARCHES:
            operands = [node.func.value, *node.args]
        written = [ast.unparse(operand) for operand in operands]
        if any(says.search(operand) or operand in messages for operand in written):
            yield node.lineno  # type: ignore[attr-defined]


def _is_english(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(re.fullmatch(r"[A-Za-z']+( [a-z']+)+", str(node.value)))
