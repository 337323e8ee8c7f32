"""`engines/README.md` names every file that leaves something behind: on modules, in other libraries, for the process."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ENGINES = Path(__file__).parent.parent / "interp_core" / "engines"
HOOKS = {"register_forward_hook", "register_forward_pre_hook", "_forward_hooks", "_forward_pre_hooks"}
CACHES = {"cache", "lru_cache"}
KEEPERS = {"dict", "list", "set", "Lock", "RLock", "WeakKeyDictionary", "WeakValueDictionary"}


def named(node: ast.AST) -> str:
    """The last name of a call's function, of an attribute or of a name."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def patches(node: ast.AST) -> bool:
    """Whether a statement or call changes what is not its own: a `__dict__`, a module's hooks, a class, a registry."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            owner = target.value if isinstance(target, (ast.Attribute, ast.Subscript)) else None
            of_class = isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id[0].isupper()
            if of_class or (owner is not None and named(owner) == "__dict__"):
                return True
    if isinstance(node, ast.Call):
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        writes = owner is not None and named(owner) == "__dict__" and named(node) in {"pop", "setdefault", "update"}
        return writes or named(node) in {"register", "filterwarnings", "setattr", "move_to_end"}
    return isinstance(node, ast.Attribute) and node.attr in HOOKS


def keeps(node: ast.AST) -> bool:
    """Whether a statement of a module, or a function, keeps something for the process."""
    if isinstance(node, ast.FunctionDef):
        return bool(CACHES & {named(decorator) for decorator in node.decorator_list})
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    empty = (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)
    return empty or (isinstance(value, ast.Call) and named(value) in KEEPERS)


def leaves_state(source: str) -> list[str]:
    """The code that leaves something behind when it has run."""
    tree = ast.parse(source)
    everywhere = [node for node in ast.walk(tree) if patches(node)]
    return [ast.unparse(node) for node in (*everywhere, *filter(keeps, tree.body))]


@pytest.mark.parametrize(
    "line",
    [
        'module.__dict__["forward"] = f',
        'module.__dict__.pop("forward")',
        'mask.__dict__.setdefault("known", {})',
        "handle = block.register_forward_hook(f)",
        "table = module._forward_hooks",
        "BackwardTracer.parse = parse",
        'setattr(module, "x", 1)',
        "AttentionInterface.register(NAME, f)",
        "KNOWN: dict[str, int] = {}",
        "LOCK = threading.Lock()",
        "@lru_cache\ndef f(): ...",
    ],
)
def test_each_way_of_leaving_something_is_seen(line: str) -> None:
    assert leaves_state(line)


@pytest.mark.parametrize(
    "line", ["def f(self): self.x = {}", 'v = module.__dict__.get("forward")', "NAMES = {1: 2}", "x.y.z = 3"]
)
def test_what_an_object_keeps_for_itself_is_not(line: str) -> None:
    assert not leaves_state(line)


def test_the_readme_names_every_file_that_leaves_something() -> None:
    readme = (ENGINES / "README.md").read_text()
    files = {str(path.relative_to(ENGINES)): path.read_text() for path in ENGINES.rglob("*.py")}
    leaving = {name: leaves_state(text) for name, text in files.items()}
    always = {"attention.py", "torch.py", "replace.py", "turns.py", "nnsight/base.py"}
    assert always <= {n for n in leaving if leaving[n]}
    missing = {name: left for name, left in leaving.items() if left and f"`{name}`" not in readme}
    assert not missing, f"engines/README.md does not say what these leave behind {missing}"


def test_files_of_the_readme_are_there() -> None:
    readme, root = (ENGINES / "README.md").read_text(), ENGINES.parent.parent
    paths = re.findall(r"`([\w/]+\.py)`", readme)
    assert paths and not [path for path in paths if not ((ENGINES / path).exists() or (root / path).exists())]
