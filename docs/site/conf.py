"""Settings of Sphinx for the docs site, whose sources `scripts/site.py` puts together."""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from typing import Any

import interp_core as ic

project = "interp_core"
version = release = ic.__version__
root_doc = "index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
# what pages link to beside other pages: it becomes a download
exclude_patterns = ["benchmarks", "interp_core", "plugins", "recipes", "scripts", "tests", "docs/site", "docs/gallery"]

myst_heading_anchors = 6
myst_links_external_new_tab = False

suppress_warnings = ["ref.python"]  # `Rows` of `ic.visual` is a type of its own beside two classes of that name
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "inherited-members": True, "no-value": True, "show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar, napoleon_attr_annotations = True, False  # types stand in the signature
default_role = "literal"  # docstrings write code in single backticks
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = f"interp_core {release}"
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "use_edit_page_button": False,
}
html_static_path, html_css_files = ["static"], ["site.css"]
html_show_sourcelink = False
html_copy_source = False


MARKS = re.compile(r"\||\*(?! )|(?<=\S)\*")
"""Characters that would mean emphasis or a substitution; a `*` between blanks is an item of a list."""
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")


def plain(_app: Any, what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are nearly Markdown: what is indented after an empty line is a block of code, and outside of backticks
    `*` and `|` are characters. What stands before a colon in a property's first line is no type of it."""
    if what in ("property", "attribute", "data") and lines:
        lines[:1] = re.split(r"(?<=:) ", lines[0])
    kept: list[str] = []
    block, section = False, False
    for number, text in enumerate(lines):
        line = f"    {text}" if text.startswith("|") else text  # a table stays as it is written
        indented = line.startswith("    ")
        if line.strip() and not indented:
            block, section = False, line.rstrip(":") in SECTIONS
        elif indented and not block and not section and (not number or not lines[number - 1].strip()):
            block = True
            kept += ["::", ""]
        pieces = re.split(r"(`[^`]*`)", line)
        escaped = "".join(f"``{p[1:-1].strip()}``" if p.startswith("`") else MARKS.sub(r"\\\g<0>", p) for p in pieces)
        kept.append(line if block else escaped)
    lines[:] = kept


def of_others(_app: Any, what: str, _name: str, thing: Any, _skip: bool, _options: Any) -> bool | None:
    """Members that are left out: what PyTorch and pydantic give their subclasses, and classes that stand in another as
    an attribute, which have pages of their own."""
    if inspect.isclass(thing):
        return True if what == "class" and "." not in thing.__qualname__ else None
    home = getattr(getattr(thing, "fget", getattr(thing, "func", thing)), "__module__", None) or ""
    foreign = inspect.isroutine(thing) or inspect.isdatadescriptor(thing) or isinstance(thing, cached_property)
    return True if foreign and not home.startswith("interp_core") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", of_others)
