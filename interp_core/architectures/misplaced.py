"""Paths of a family file that lead nowhere in a model, told by name before anything runs.

Without this a misspelt path would leave its site out in silence, as if the family had none. Layers differ, so a path in
a block must be in one block at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from ..errors import PluginError, nearest
from .family import Family, Place, llama_like

CONVENTIONS = llama_like("")
"""What many family files say of modules that only some of their models have: no slip where there are none."""


def demand_blocks(family: Family, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a family file that puts the list of blocks where the model has no module.

    Raises:
        PluginError: it does.
    """
    if (path := family.paths.get("blocks")) is not None and path not in modules:
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        raise PluginError(_message(family.name, "blocks", path, lists))


def demand_paths(
    name: str,
    family: Family,
    paths: Mapping[str, str],
    places: Mapping[str, Place],
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, Mapping[str, str]],
) -> None:
    """Hold the other paths of a family file against a model's blocks.

    Args:
        name: of the family.
        family: its file, or what that says of the vision tower.
        paths, places: what came of the file's, over TransformerLens' paths and for the model's config.
        parts: the path of each block, and those of its components.

    Raises:
        PluginError: one of them leads nowhere.
    """
    for what, path, beside in _missing(family, paths, places, modules, parts):
        meant = {module.removeprefix(base): None for base in beside for module in modules if module.startswith(base)}
        raise PluginError(_message(name, what, path, [*meant]))


def _message(family: str, what: str, path: str, modules: Sequence[str]) -> str:
    return (
        f"the family file of {family!r} says that {what} is at {path!r}, where this model has no module. "
        f"{nearest(path, modules)}"
    )


def _missing(
    family: Family,
    paths: Mapping[str, str],
    places: Mapping[str, Place],
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[str, str, list[str]]]:
    """What leads nowhere: what is there by the file, the path, and what the names of modules beside it begin with."""
    inside = [f"{block}." for block in parts]

    def in_a_block(path: str) -> bool:
        return any(base + path in modules for base in inside)

    for key, path in family.paths.items():
        if key.startswith("blocks."):
            optional = path.endswith("|") or CONVENTIONS.get(key) == path
            if not optional and not any(key.removeprefix("blocks.") in held for held in parts.values()):
                parent = key.rpartition(".")[0]  # of `blocks.attn.q` the module of `blocks.attn`
                within = f"{paths[parent]}." if parent != "blocks" and parent in paths else ""
                yield key, path, [base + within for base in inside]
        elif key != "parallel" and paths[key] == path and not any(p in modules for p in path.split("|")):
            yield key, path, [""]
    for name, place in places.items():
        if name == "pre_merger":  # behind the blocks
            if place.module not in modules:
                yield name, place.module, [""]
        elif not in_a_block(place.module):
            yield name, place.module, inside
    if family.router is not None:
        named = {"the router": family.router.module, "what it chooses from": family.router.experts}
        absent = {what: path for what, path in named.items() if not in_a_block(path)}
        # A model of dense layers alone has neither, and no experts under any name.
        if len(absent) == 1 or any(name.endswith("experts") for name in modules if name.startswith(tuple(inside))):
            yield from ((what, path, inside) for what, path in absent.items())
