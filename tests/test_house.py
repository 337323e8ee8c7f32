"""What must stay true of the code itself: import arrows, public names, docstrings, sizes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rooms
from conftest import FAMILIES
from imports import arrows, circles, imports, modules, past_public_names
from sentences import branches_on_sentences

import interp_core as ic

ROOT = Path(__file__).parent.parent
PACKAGES = {"interp_core": ROOT / "interp_core", "interp_plugins": ROOT / "plugins", "interp_recipes": ROOT / "recipes"}
MODULES = modules({name: root if root.name == name else root / name for name, root in PACKAGES.items()})
OTHERS_SENTENCES = {
    "interp_core/loading.py",  # transformers and the hub raise OSError for a gated model as for a missing one
    "plugins/interp_plugins/attribution/files/arrays.py",  # numpy has one ValueError for pickles and for damage
}
"""Files that read another package's message, for want of anything else that tells its errors apart. May only shrink."""


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted(PACKAGES[package].rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def test_import_arrows() -> None:
    for path in sources("interp_core"):
        assert not any(name.startswith(("interp_plugins", "interp_recipes")) for name in imported(path)), path
    for path in sources("interp_plugins"):
        assert not any(name.startswith("interp_recipes") for name in imported(path)), path


def test_no_circles_of_imports() -> None:
    """Of all imports: at load, in functions, for types alone."""
    loops = circles(arrows(MODULES))
    assert not loops, f"modules import each other in a circle: {[sorted(loop) for loop in loops]}; let one import less"


def test_imports_run_down() -> None:
    """Every module is in a room, and imports from its own and from lower ones; the picture shows it."""
    homeless = sorted(module for module in MODULES if not rooms.room_of(module))
    assert not homeless, f"give these a room in tests/rooms.py: {homeless}"
    order, graph = list(rooms.ROOMS), rooms.between_rooms()
    up = [f"{room} -> {other}" for room in graph for other in graph[room] if order.index(other) > order.index(room)]
    assert not up, f"imports that run up: {up}"
    assert rooms.PICTURE.read_text() == rooms.svg(), "the picture is of another code: python tests/rooms.py"


def test_the_page_on_architecture_names_what_there_is() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    assert all(
        f"{name}/" in page for name in ("architectures", "engines", "sweep", "checks", "vision", "visual", "cli")
    )
    paths = re.findall(r"`((?:[\w]+/)*[\w]+(?:\.py|\.md|/))`", page)
    assert len(paths) > 20
    for path in paths:
        places = [ROOT / path, ROOT / "interp_core" / path, ROOT / "docs" / path]
        assert any(place.exists() for place in places), f"docs/architecture.md names {path}, which is not there"


def test_plugins_and_recipes_use_public_names_alone() -> None:
    """By imports (in every form) and by attributes; what they need is made public, documented and typed."""
    for module, path in MODULES.items():
        if not module.startswith("interp_core"):
            past = past_public_names(path.read_text(), module, path.stem == "__init__")
            assert not past, f"{path} reaches past the public names of interp_core (line, name): {sorted(past)}"


def test_fences_see_every_form() -> None:
    """Each of these reaches past the public names; the lines after do not."""
    reaching = """
import interp_core.run
import interp_core.run as t
from interp_core import trace
from interp_core.run import Run
from interp_core.score import _pick
from interp_core.sites import named as n, _index
import interp_core; interp_core.run
import interp_core as ic; ic.trace.Run
from interp_core import sites as S; S._split("")
model.atlas
self.model.engine.name
f()._rows
getattr(run, "_slots")
importlib.import_module("interp_core.run")
if TYPE_CHECKING: from interp_core.model import USES
def f(): from interp_core.text import Where"""
    lines = {line for line, _ in past_public_names(reaching)}
    assert lines == set(range(2, 2 + len(reaching.strip().splitlines())))
    public = """
import interp_core as ic, interp_core.sites, interp_core
from interp_core import Run, score
from interp_core.sites import z
from ._mine import _hidden
S = ic.sites; S.z[3].at(-1); ic.score.logprob(3); ic.__version__; interp_core.Run.logits
self.atlas, self._mine, pair._replace(a=1), x.__class__"""
    assert not past_public_names(public, "interp_plugins.some")
    loops = circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a", "f"}})
    assert loops == {frozenset("abc"), frozenset("de")}
    by_itself = {(name, alias) for _, name, alias in imports(ast.parse("from .. import b as c"), "p.q.r", False)}
    assert by_itself == {("p.b", "c")}


def test_nobody_decides_by_the_words_of_an_error() -> None:
    """A class of error, an enum or an attribute says what happened; its message may be reworded at any time."""
    reading = {}
    for path in sources(*PACKAGES):
        if lines := set(branches_on_sentences(path.read_text())):
            reading[str(path.relative_to(ROOT))] = sorted(lines)
    assert set(reading) == OTHERS_SENTENCES, f"decides by a sentence (file, lines), or is free of it now: {reading}"


def test_a_branch_on_a_sentence_is_seen_in_every_form() -> None:
    """The first six do, the others do not."""
    caught = """
try: f()
except InterpError as error: {}
def advice(problem: ValueError) -> str: return {}"""
    for branch in (
        "found = 'gated' in str(error)",
        "found = error.args[0] == 'x'",
        "found = str(error).lower().startswith('no ')",
        "why = str(error); found = why.startswith('refused')",
        "found = re.search('no', repr(error))",
        "found = 'no engine is called' in why",
    ):
        assert list(branches_on_sentences(caught.format(branch, 1))), branch
    assert list(branches_on_sentences(caught.format("pass", "1 if 'x' in str(problem) else 2")))
    for plain in ("why = str(error); ok = not why", "ok = name in registry", "found = 'no' in words", "g(str(error))"):
        assert not list(branches_on_sentences(caught.format(plain, 1))), plain


def test_heavy_packages_are_imported_only_where_they_are_used() -> None:
    heavy = {"transformer_lens", "nnsight", "datasets", "pandas", "wandb", "torchvision", "ray"}
    other_tools = {"pyvene", "interp_engine", "lxt", "flashtrace"}  # compared with in benchmarks/, which no wheel holds
    for path in sources(*PACKAGES):
        taken = {name.split(".")[0] for name in imported(path)}
        assert not taken & other_tools, path
        assert not taken & heavy or heavy & {path.stem, path.parent.name}, path


def test_light_modules_do_not_import_torch() -> None:
    for module in (
        "errors",
        "files",
        "runs",
        "sites",
        "positions",
        "plugins",
        "settings",
        "plugins.sandbox",
        "scaffold",
        "cli",
        "toys.text",
        "prompts",
        "report",
        "stats",
    ):
        code = f"import sys, interp_core.{module}; print('torch' in sys.modules)"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "False", module


def test_the_public_api_is_all() -> None:
    assert ic.__all__ == sorted(set(ic.__all__)) and set(dir(ic)) == {*ic.__all__, "__version__"}
    for name in ic.__all__:
        assert getattr(ic, name) is not None
    with pytest.raises(AttributeError, match="interp_core has no 'Modle'. Did you mean 'Model'"):
        _ = ic.Modle
    typed = (ROOT / "interp_core/__init__.py").read_text()
    for name in ic.__all__:
        assert f"import {name} as {name}" in typed, f"{name} is not visible to type checkers"


def test_every_public_name_is_documented() -> None:
    for name in ic.__all__:
        thing = getattr(ic, name)
        assert inspect.getdoc(thing), name
        if not inspect.isclass(thing):
            continue
        for attribute, _ in inspect.getmembers(thing, lambda x: inspect.isfunction(x) or isinstance(x, property)):
            owner = next(base for base in thing.__mro__ if attribute in vars(base))
            if not attribute.startswith("_") and owner.__module__.startswith("interp_core"):
                assert vars(owner)[attribute].__doc__, f"{name}.{attribute}"


def test_signatures_are_typed() -> None:
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.returns is not None, f"{path}:{node.lineno} {node.name}"


def test_files_and_functions_stay_small() -> None:
    for path in sources(*PACKAGES):
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} is too long: which idea would split it?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


GRAMMAR = ("found", "one", "made", "given", "asked", "result", "value", "item")
"""Names that say a word's role in the sentence and not what the thing is."""


def test_no_two_scripts_have_one_name() -> None:
    """`benchmarks/gpu.py` takes hand-written hooks from the tests: of two modules of one name it would get the other."""
    names = Counter(path.name for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).glob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_local_names_say_the_content() -> None:
    """There were 2,569 uses of the first five before they got names of their own; the last three may not replace them."""
    uses = Counter(
        name
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if (name := getattr(node, "id", getattr(node, "arg", None))) in GRAMMAR
    )
    assert sum(uses[name] for name in GRAMMAR[:5]) <= 50, f"say what it is instead: {uses}"
    assert 0 < sum(uses[name] for name in GRAMMAR[5:]) <= 1919, f"say what it is instead: {uses}"


def test_every_skip_says_why() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        for found in re.finditer(r"mark\.(skip|skipif|xfail)\(([^)]*)", path.read_text()):
            assert "reason=" in found.group(2), f"{path}: {found.group()}"


def test_no_path_of_anyones_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip(reason="not a git checkout: the list of files comes from git")
    pattern = re.compile(r"(?<![\w.])/(root|home/\w+|work)/")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".yml"} and path.is_file():
            assert not pattern.search(path.read_text()), name


def test_every_error_is_in_the_tree_and_in_the_docs() -> None:
    from interp_core import errors

    kinds = [v for v in vars(errors).values() if inspect.isclass(v) and v.__module__ == errors.__name__]
    assert all(issubclass(kind, ic.InterpError) for kind in kinds)
    drawn = errors.__doc__ or ""
    page = (ROOT / "docs/errors.md").read_text()
    for kind in kinds:
        assert kind.__name__ in drawn and kind.__name__ in page and kind.__name__ in ic.__all__


def test_paths_are_those_of_the_installed_transformer_lens() -> None:
    """The atlas' module paths come from TransformerLens' adapters: the file is what the script writes."""
    script = ROOT / "scripts/atlas_paths.py"
    out = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_nothing_is_installed_behind_the_users_back() -> None:
    """TransformerLens would run `pip install torchvision` for some models: no file reaches that path."""
    for path in sources(*PACKAGES):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"boot_transformers", "_ensure_torchvision"}, path
        # plugins are looked at, recipes run where a Python is named, git is asked for the commit,
        # programs that a model wrote are scored, Slurm is asked for its jobs
        of_their_own = {"fv_python.py", "session.py", "sandbox.py", "slurm.py"}
        alone = {"pip"} if path.name in of_their_own else {"subprocess", "pip"}
        assert not alone & {name.split(".")[0] for name in imported(path)}, path


def test_every_site_is_documented() -> None:
    from interp_core.sites import SITES

    page = (ROOT / "docs/sites.md").read_text()
    for name, info in SITES.items():
        assert f"| `{name}` | {' '.join(info.axes)} | {info.doc} |" in page


def test_every_module_says_what_it_is() -> None:
    for path in sources(*PACKAGES):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_versions_agree() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ic.__version__
    assert f"## {ic.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
        if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["docs"],
    ]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()  # type: ignore[union-attr]
        assert name in pins or name == "interp-core", f"{name} is not in constraints.txt"
    assert importlib.metadata.version("torch").split("+")[0] == "2.13.0"


def test_the_lock_pins_what_every_extra_needs_and_refuses_to_lose_one() -> None:
    lock = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/lock")))
    needs = {
        "root": ["Torch>=2", 'sphinx[x]; extra == "docs"', 'pyvene; extra == "bench"', "pip"],
        "torch": ['colorama; sys_platform == "nowhere"'], "sphinx": ["roman_numerals", 'y; extra == "x"'],
        "roman-numerals": [], "y": [], "pip": [],
    }  # fmt: skip

    def find(name: str) -> Any:
        if name not in needs:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(metadata={"Name": name}, version="1.2+cpu", requires=needs[name])

    assert list(lock.pins("root", find)) == ["roman-numerals", "root", "sphinx", "torch", "y"]
    assert lock.text(lock.pins("root", find)).splitlines()[1] == "roman-numerals==1.2"
    del needs["roman-numerals"]
    with pytest.raises(SystemExit, match=r"not installed: roman-numerals\. Nothing is written: first .*docs"):
        lock.pins("root", find)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*lock.EXTRAS, "bench"} == set(project["optional-dependencies"])


def test_types_are_checked_with_what_dev_installs() -> None:
    """The type checker says the same with and without the other extras: what they install is named as skipped."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in ("test", "dev", "plot", "images") for one in extras[name])]
    there = {re.split(r"[\s<>=\[]", one)[0].lower() for one in wanted}
    skipped = {name.removesuffix(".*") for one in settings["tool"]["mypy"]["overrides"] for name in one["module"]}
    packages = importlib.metadata.packages_distributions()
    of_transformers = {"httpx", "huggingface_hub"}
    known = {*sys.stdlib_module_names, *skipped, *PACKAGES, *of_transformers}
    taken = {name.split(".")[0] for path in sources(*PACKAGES) for name in imported(path)}
    assert "gguf" in taken
    lost = {name for name in taken - known if not there & {one.lower() for one in packages.get(name, ())}}
    assert not lost, f"no extra that mypy is run with installs {sorted(lost)}; name them in its overrides"


def test_types_and_shapes_hold_at_run_time() -> None:
    """A part of the suite again, with every signature and shape annotation checked on every call."""
    hook = "--jaxtyping-packages=interp_core,interp_plugins,beartype.beartype"
    files = ["tests/test_logit_lens.py", "tests/test_moe.py", "tests/test_gradients.py"]
    kept = ("gpt2", "deepseek_v3", "qwen3_next", "qwen3_vl", "qwen3_moe")
    others = [family for family in FAMILIES if not any(family in one for one in kept)]
    some = f"not ({' or '.join(others)})"
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", some, hook, *files]
    out = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stdout[-3000:]
