"""`interp run NAME --help`: what a method or a recipe does, and what can be set there.

The plugin is imported in this process, as for a run; what it imports itself (torch, as a rule) is the only cost.
`interp plugins show NAME` reads it in another process, under a time limit, and has the traceback of a broken one.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from typing import Any

from .. import settings
from ..columns import terminal_width, wrapped
from ..errors import PluginError
from ..plugins import Plugin
from . import flags
from .run import runnable


class NamedCommand(flags.SeveralCommand):
    """`interp run`, whose `--help` behind a name is about that method or recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--help` comes before settings are read: `demo --model --help` asks for help, not for a model."""
        if "--help" in args[1:] and not args[0].startswith("-"):
            kinds = [after for before, after in itertools.pairwise(args) if before == "--kind"]
            print(page(runnable(args[0], *kinds[:1])))
            ctx.exit()
        return super().parse_args(ctx, args)


class Shortcut(NamedCommand):
    """`interp NAME …`: what `interp run NAME …` is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With the name before them."""
        return super().parse_args(ctx, [str(self.name), *args])


def page(plugin: Plugin) -> str:
    """What a method or a recipe does, and its settings: name, type and default, then what they say of it.

    Raises:
        PluginError: one that cannot be used, and why, on one line.
    """
    try:
        value = plugin.load()
    except PluginError as error:
        why = plugin.error.strip().splitlines()[-1]
        more = f"`interp plugins show {plugin.name}` has all of it"
        raise PluginError(f"{plugin.label} is {plugin.state}: {why} ({more})") from error
    usage = f"interp run {plugin.name} --setting VALUE …"
    if plugin.kind == "methods":
        from ..methods import Batching

        usage += " --text TEXT --model MODEL --out FOLDER --overwrite"
        config = settings.joined(value.Config, Batching)
    else:
        config = settings.of_function(value)
    module = sys.modules.get(plugin.target.partition(":")[0])
    first_paragraphs = [(inspect.getdoc(source) or "").split("\n\n")[0] for source in (module, value)]
    listed = settings.page(config)
    also = "Several values stand one behind the other; --config FILE has settings by name. See also: interp run --help"
    said = (wrapped(text, terminal_width()) for text in (plugin.label, f"  {usage}", *first_paragraphs, listed, also))
    return "\n\n".join(text for text in said if text)
