"""What files import and reach for, read from their syntax: at load, inside functions and for types alone."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from types import ModuleType

import interp_core as ic

INTERNAL = {"atlas", "engine", "program", "renew", "reopen", "snapshot", "strategy_checks", "turn"}
"""Attributes of `Model` that are the engine's own."""
OF_OTHERS = {"_asdict", "_fields", "_make", "_replace", "_attn_implementation", "_forward_hooks", "_forward_pre_hooks"}
"""Underscored attributes of namedtuples, of transformers' configs and of torch's modules."""


def modules(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Every module of packages, and its file, by the folders that hold the packages' `__init__.py`."""
    out = {}
    for package, root in packages.items():
        for path in sorted(root.rglob("*.py")):
            if (path.parent / "__init__.py").exists():
                parts = path.relative_to(root).with_suffix("").parts
                out[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return out


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """Every import: its line, what it takes as an absolute dotted name, and what it is called there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or ""
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + is_package] if node.level else []
            for alias in node.names:
                name = ".".join([*above, *([node.module] if node.module else []), alias.name])
                yield node.lineno, name, alias.asname or alias.name


def arrows(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of the modules each imports. That a package's `__init__` runs before what is in it counts for nothing."""
    out: dict[str, set[str]] = {}
    for module, path in files.items():
        out[module] = set()
        for _, name, _ in imports(ast.parse(path.read_text()), module, path.stem == "__init__"):
            target = name if name in files else name.rpartition(".")[0]
            out[module] |= {target} & set(files) - {module}
    return out


def circles(arrows: Mapping[str, Set[str]]) -> set[frozenset[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    out: set[frozenset[str]] = set()

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in arrows[node]:
            if target not in order:
                visit(target)
            if target in stack:
                lowest[node] = min(lowest[node], lowest[target])
        if lowest[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            out.update([frozenset(component)] if len(component) > 1 else [])

    for node in arrows:
        if node not in order:
            visit(node)
    return out


def past_public_names(text: str, module: str = "", is_package: bool = False) -> set[tuple[int, str]]:
    """Where code reaches past interp_core's public names, by imports or by attributes: the line, and for what."""
    tree = ast.parse(text)
    out: set[tuple[int, str]] = set()
    called: dict[str, str] = {}
    for line, name, alias in imports(tree, module, is_package):
        if name.split(".")[0] == "interp_core":
            out |= {(line, hidden) for hidden in _hidden(name)}
            called[alias or "interp_core"] = name if alias else "interp_core"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, *rest = _dotted(node).split(".")
            if head in called:
                out |= {(node.lineno, hidden) for hidden in _hidden(".".join([called[head], *rest]))}
            elif _is_internal(node.attr) and [head, *rest] not in (["self", node.attr], ["cls", node.attr]):
                out.add((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith(("attr", "import_module")):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(name := argument.value, str):
                    hidden = _hidden(name) if name.startswith("interp_core.") else [f".{name}"] * _is_internal(name)
                    out |= {(node.lineno, one) for one in hidden}
    return out


def _is_internal(attribute: str) -> bool:
    underscored = attribute.startswith("_") and not attribute.startswith("__") and attribute not in OF_OTHERS
    return underscored or attribute in INTERNAL


def _hidden(name: str) -> list[str]:
    """The shortest beginning of a dotted name that is not public: not in the `__all__` of the public module above."""
    holder: object = ic
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 2):
        if not isinstance(holder, ModuleType):
            break
        if part not in getattr(holder, "__all__", ()) and not (part.startswith("__") and part.endswith("__")):
            return [".".join(parts[:i])]
        holder = inspect.getattr_static(holder, part, None) or getattr(holder, part)
    return []


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of the attribute of a name, `.c` of one of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
