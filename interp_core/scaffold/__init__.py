"""A package to start from: a plugin of one kind that works, with its entry point and its test.

Its texts are files beside this one, `shared/` and one folder per kind.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from .._version import __version__
from ..errors import PluginError, nearest
from ..plugins import registry

Commands = tuple[tuple[str, str], ...]
"""What to type, and what that does."""
INSTALL: Commands = (("pip install -e '.[test]'", ""),)
TEST: Commands = (("pytest", "the same, and what is particular"),)


@dataclass(frozen=True)
class Kind:
    """What a package of one kind of plugin has beside what all have.

    Attributes:
        group: of its entry point.
        attribute: what the entry point leads to, in its module.
        check: what `interp plugins check` does with it, in a few words.
        commands: what to do with it then.
        files: further texts, and where they go.
    """

    group: str
    attribute: str
    check: str
    commands: Commands
    files: dict[str, str] = field(default_factory=dict)


_RUN: Commands = (("interp run $name --text 'Q: big' --out out/$name", "numbers and a page"),)
KINDS = {
    "method": Kind("methods", "$cls", "the conformance kit", _RUN),
    "recipe": Kind(
        "recipes", "$name", "runs it twice on the toy",
        (("interp run $name --help", "its settings"), ("interp run $name --out out/$name", "")),
    ),
    "family": Kind(
        "architectures", "FAMILY", "every site, on a small model", (), {"model.py": "src/{name}/model.py"}
    ),
    "engine": Kind(
        "engines", "$cls", "every site, against engine torch",
        (("interp check toy:text --engine $name", "the same on another model"),),
    ),
    "launcher": Kind(
        "launchers", "$cls", "a few small jobs",
        (("interp run logit_lens --text 'Q: big' --launcher $name", "a job of its own"),),
    ),
}  # fmt: skip
FILES = {
    "shared/pyproject.toml": "pyproject.toml",
    "shared/README.md": "README.md",
    "shared/py.typed": "src/{name}/py.typed",
    "shared/gitignore": ".gitignore",
    "package.py": "src/{name}/__init__.py",
    "test.py": "tests/test_{name}.py",
}


def write_package(name: str, folder: Path | None = None, kind: str = "method", *, minimal: bool = False) -> Path:
    """Write a package.

    Args:
        name: of the plugin and of its module.
        folder: where; by default a new folder of that name here.
        kind: of plugin, one of `KINDS`.
        minimal: the smallest method that is right.

    Raises:
        PluginError: a name that is no Python name or taken, no template for the kind, or a folder with something in it.
    """
    if kind not in KINDS:
        raise PluginError(f"there is no template for a {kind!r}. {nearest(kind, KINDS)}")
    if minimal and kind != "method":
        raise PluginError(f"the template for {_a(kind)} is the smallest already: leave --minimal out")
    _check_name(name, kind)
    out = Path(name) if folder is None else folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PluginError(f"{out} is there already and not empty: nothing was written; give another folder with --out")
    templates = "minimal" if minimal else kind
    values = _values(name, kind)
    values["usage"] = _text(f"{templates}/usage.py", values)
    texts = {
        target.format(name=name): _text(file if "/" in file else f"{templates}/{file}", values)
        for file, target in {**FILES, **KINDS[kind].files}.items()
    }
    for target, text in texts.items():
        path = out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return out


def next_steps(name: str, folder: Path, kind: str) -> str:
    """What to type when a package has been written."""
    rest = [Template(command).substitute(name=name) for command, _ in KINDS[kind].commands]
    return "\n".join(f"  {line}" for line in (f"pip install -e {folder}", f"interp plugins check {name}", *rest))


def _values(name: str, kind: str) -> dict[str, str]:
    """What the texts say of this plugin."""
    words, spec = name.split("_"), KINDS[kind]
    names = {"name": name, "cls": "".join(word.capitalize() for word in words)}
    commands = (*INSTALL, (f"interp plugins check {name}", spec.check), *TEST, *spec.commands)
    return names | {
        "kind": _a(kind),
        "group": spec.group,
        "attribute": Template(spec.attribute).substitute(names),
        "commands": _aligned([(Template(command).substitute(names), comment) for command, comment in commands]),
        "dist": name.replace("_", "-").strip("-"),
        "title": " ".join(words).strip().capitalize(),
        "version": __version__,
    }


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "engine" else f"a {kind}"


def _aligned(commands: Sequence[tuple[str, str]]) -> str:
    """Commands with what they do behind them, in a column."""
    width = max(len(command) for command, comment in commands if comment)
    return "\n".join(f"{command:{width}}  # {comment}" if comment else command for command, comment in commands)


def _text(file: str, values: dict[str, str]) -> str:
    """A text of the package, with its names put in."""
    return Template(resources.files(__name__).joinpath(f"{file}.txt").read_text(encoding="utf-8")).substitute(values)


def _check_name(name: str, kind: str) -> None:
    plain, plugins = re.sub(r"\W+", "_", name.strip()).strip("_").lower(), registry(KINDS[kind].group)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        hint = f" Try {plain!r}." if plain.isidentifier() and not keyword.iskeyword(plain) else ""
        raise PluginError(
            f"{name!r} cannot be the name of {_a(kind)} and its module: small letters, digits and _.{hint}"
        )
    if name in plugins:
        dist = plugins.find(name).dist
        raise PluginError(f"{dist} has {_a(kind)} {name!r} already; two of one name shadow each other. Take another")
    if importlib.util.find_spec(name) is not None:
        raise PluginError(f"there is a module {name!r} here already, which the package would hide. Take another name")
