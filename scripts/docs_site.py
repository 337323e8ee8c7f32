"""Builds the docs site: python scripts/docs_site.py [OUT]  (`make docs`; needs the extra `docs`, and no network)

The pages of the repository stay as they are. What Sphinx reads is put together in OUT/source: the README as the first
page, the pages of docs/ by section, the executed notebooks as pages, and a page for each public name, whose text is its
docstring. Warnings are errors, and every link of the built pages is followed as far as it stays among them.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import interp_core as ic

ROOT = Path(__file__).parent.parent
SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": (
        "tutorial", "notebooks/patching", "notebooks/steering", "notebooks/method", "gallery",
        "from_transformer_lens", "from_nnsight", "from_pyvene", "toys", "real_model",
    ),
    "Guide": (
        "sites", "runs", "text", "prompts", "many_texts", "sweeps", "engines", "images", "visual_edits", "statistics",
        "planning", "reports", "run_folders", "cluster", "plugins", "families", "wrapped", "errors",
    ),
    "Methods": (
        "methods/direct_logit_attribution", "methods/head_detectors", "methods/attention_summary",
        "methods/steering_vectors", "methods/sae", "methods/logit_lens", "methods/lens_transports",
        "methods/activation_patching", "methods/attribution_patching", "methods/path_patching", "methods/ablations",
        "attribution", "methods/ifr", "methods/ifr_routes", "methods/attnlrp", "methods/attribution_alternatives",
        "methods/function_vectors", "methods/function_vectors_relation", "methods/router", "methods/visual",
        "methods/visual_map", "methods/localisation", "methods/geometry", "methods/probe",
    ),
    "Studies": (
        "attribution_evaluation", "attribution_caches", "attribution_traces", "attribution_truth", "moe_pairs",
        "moe_experts", "moe_mask_sweep", "function_vectors_parity", "visual_phase1", "visual_probing",
        "visual_questions", "visual_answers",
    ),
    "Project": ("architecture", "compatibility", "agreement", "overhead", "gpu", "../CONTRIBUTING", "../CHANGELOG"),
}  # fmt: skip
"""The pages of docs/ in the order in which the site has them."""
FILES = ("benchmarks", "interp_core", "plugins", "recipes", "scripts", "tests")
"""Folders with what pages link to beside other pages."""


def pages() -> set[str]:
    """What there is to be put into a section, as `SECTIONS` names it."""
    docs = ROOT / "docs"
    found = [path.relative_to(docs).with_suffix("") for kind in ("md", "ipynb") for path in docs.rglob(f"*.{kind}")]
    return {path.as_posix() for path in found} | {"../CONTRIBUTING", "../CHANGELOG"}


def assemble(source: Path) -> None:
    """Put together what Sphinx reads."""
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("*.py", "site"))
    for name in FILES:
        (source / name).symlink_to(ROOT / name)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "README.md", source / "index.md")
    for path in (source / "docs/notebooks").glob("*.ipynb"):
        path.with_suffix(".md").write_text(notebook(json.loads(path.read_text(encoding="utf-8")), path.name))
    for page in [*source.glob("*.md"), *source.glob("docs/**/*.md")]:
        page.write_text(as_on_the_site(page), encoding="utf-8")
    sections = [*(name.lower() for name in SECTIONS), "api/index"]
    with (source / "index.md").open("a", encoding="utf-8") as first:
        first.write(contents(sections, hidden=True))
    for name, members in SECTIONS.items():
        paths = [Path("docs", member).as_posix().replace("docs/../", "") for member in members]
        (source / f"{name.lower()}.md").write_text(f"# {name}\n{contents(paths)}", encoding="utf-8")
    reference(source / "api")


def contents(paths: list[str], hidden: bool = False) -> str:
    """A list of pages, or none that is seen, for the bar at the side alone."""
    options = ":hidden:\n" if hidden else ":maxdepth: 1\n"
    return "\n```{toctree}\n" + options + "\n" + "\n".join(paths) + "\n```\n"


def as_on_the_site(page: Path) -> str:
    """A page with its links as the site needs them: to notebooks, which are pages there; to pages of results, which are
    opened; to files, which are downloads; and none to folders."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, _, place = target.partition("#")
        if re.match(r"\w+:", target) or not path:
            return match[0]
        if path.endswith(".ipynb"):
            return f"[{words}]({path.removesuffix('ipynb')}md)"
        if re.search(r"gallery/\w+\.html$", path):
            return f'<a href="{path}">{words}</a>'
        if path.endswith("../README.md"):
            return f"[{words}]({path.removesuffix('README.md')}index.md{'#' * bool(place)}{place})"
        if (page.parent / path).is_dir():
            return words
        outside = any(part in FILES for part in Path(path).parts)
        return f"[{words}](path:{path})" if outside else match[0]

    return re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)", link, page.read_text(encoding="utf-8"))


def notebook(cells: dict[str, list[dict[str, object]]], name: str) -> str:
    """An executed notebook as a page: text, code, and what came out."""
    parts: list[str] = []
    for cell in cells["cells"]:
        text = "".join(cell["source"])  # type: ignore[arg-type]
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):  # type: ignore[attr-defined]
            data = output.get("data", {"text/plain": output.get("text")})
            shown = "".join(data.get("text/html") or data["text/plain"])
            kind = "{raw} html" if "text/html" in data else "text"
            parts.append(f"````{kind}\n{shown.rstrip()}\n````")
    return "\n\n".join([*parts, f"{{download}}`The notebook <{name}>`"]) + "\n"


def reference(folder: Path) -> None:
    """A page for each public name; those of a module that are public by themselves have theirs."""
    folder.mkdir()
    errors = [name for name in ic.__all__ if inspect.isclass(kind := getattr(ic, name)) and issubclass(kind, Exception)]
    groups: dict[str, list[str]] = {"Classes": [], "Functions": [], "Modules": []}
    for name in ic.__all__:
        thing = getattr(ic, name)
        kind = "Modules" if inspect.ismodule(thing) else "Classes" if inspect.isclass(thing) else "Functions"
        if name in errors:
            continue
        directive = {"Modules": "automodule", "Classes": "autoclass", "Functions": "autofunction"}[kind]
        parts = [f".{part}" for part in getattr(thing, "__all__", ()) if inspect.ismodule(getattr(thing, part))]
        apart = f"   :exclude-members: {', '.join(ic.__all__)}" if kind == "Modules" and name != "errors" else ""
        body = "\n".join(f".. {directive}:: interp_core.{name}{part}\n{apart}\n" for part in ["", *parts])
        (folder / f"{name}.md").write_text(f"# {name}\n\n```{{eval-rst}}\n{body}```\n", encoding="utf-8")
        first = (inspect.getdoc(thing) or "").split("\n\n")[0].split("\n")[0]
        groups[kind].append(f"| [`ic.{name}`]({name}.md) | {first.replace('|', chr(92) + '|')} |")
    text = "# API\n\nAll public names, as their docstrings say. Errors are on the page of [`ic.errors`](errors.md).\n"
    for kind, rows in groups.items():
        text += f"\n## {kind}\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows) + "\n"
    names = [name for name in ic.__all__ if name not in errors]
    (folder / "index.md").write_text(text + contents(names, hidden=True), encoding="utf-8")


class Links(HTMLParser):
    """Where a page links to, and which places on it can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places = {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, text in attrs:
            if key in ("href", "src") and text is not None:
                self.targets.append(text)
            elif key in ("id", "name") and text:
                self.places.add(text)


def broken(site: Path) -> Iterator[str]:
    """Links among the built pages that lead nowhere, and whatever is loaded from elsewhere."""
    built = [page for page in site.rglob("*.html") if "_static" not in page.parts]  # there are the theme's templates
    read = {page: Links(page) for page in built}
    for page, links in read.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            other = other / "index.html" if other.is_dir() else other
            if not other.exists():
                yield f"{page.relative_to(site)}: {target}"
            elif other in read and unquote(parts.fragment) not in read[other].places:
                yield f"{page.relative_to(site)}: {target} (no such place on that page)"


def main(out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    source, site = out.resolve() / "source", out.resolve() / "html"
    source.mkdir(parents=True)
    assemble(source)
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs/site")]
    if code := subprocess.run([*build, str(source), str(site)]).returncode:
        sys.exit(code)
    shutil.copytree(ROOT / "docs/gallery", site / "docs/gallery", dirs_exist_ok=True)
    if lost := sorted(set(broken(site))):
        sys.exit("links that lead nowhere:\n" + "\n".join(lost))
    print(f"{out}/html/index.html: {len(list(site.rglob('*.html')))} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out/docs"))
