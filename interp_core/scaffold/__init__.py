"""A package to start from: a method that works, with its entry point and its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from .._version import __version__
from ..errors import PluginError, nearest
from ..plugins import registry

KINDS = ("method",)
FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "package.py": "src/{name}/__init__.py",
    "py.typed": "src/{name}/py.typed",
    "test.py": "tests/test_{name}.py",
    "gitignore": ".gitignore",
}


def write_package(name: str, folder: Path | None = None, kind: str = "method") -> Path:
    """Write a package.

    Args:
        name: of the method and of its module.
        folder: where; by default a new folder of that name here.

    Raises:
        PluginError: a name that is no Python name or taken, no template for the kind, or a folder with something in it.
    """
    if kind not in KINDS:
        raise PluginError(
            f"there is no template for a {kind!r}. {nearest(kind, KINDS)} docs/plugins.md shows the others"
        )
    _check_name(name)
    out = Path(name) if folder is None else folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PluginError(f"{out} is there already and not empty: nothing was written; give another folder with --out")
    words = name.split("_")
    values = {
        "name": name,
        "dist": name.replace("_", "-").strip("-"),
        "cls": "".join(word.capitalize() for word in words),
        "title": " ".join(words).strip().capitalize(),
        "version": __version__,
    }
    texts = {
        target.format(name=name): Template(
            (resources.files(__name__) / kind / f"{file}.txt").read_text(encoding="utf-8")
        ).substitute(values)
        for file, target in FILES.items()
    }
    for target, text in texts.items():
        path = out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return out


def _check_name(name: str) -> None:
    plain = re.sub(r"\W+", "_", name.strip()).strip("_").lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        hint = f" Try {plain!r}." if plain.isidentifier() and not keyword.iskeyword(plain) else ""
        raise PluginError(f"{name!r} cannot be the name of a method and its module: small letters, digits and _.{hint}")
    if name in registry("methods"):
        dist = registry("methods").find(name).dist
        raise PluginError(f"{dist} has a method {name!r} already; two of one name shadow each other. Take another")
    if importlib.util.find_spec(name) is not None:
        raise PluginError(f"there is a module {name!r} here already, which the package would hide. Take another name")
