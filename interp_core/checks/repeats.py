"""Blocks and modules that run several times in a pass, for layers that share their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..architectures.atlas import Atlas, Entry
from ..errors import CapabilityError
from ..run import Run
from ..session import Session
from ..sites import SITES
from .equations import Finding, Law


@contextmanager
def turns(model: Session) -> Iterator[dict[int, int]]:
    """How often the model's own blocks run in a pass, by layer, of the passes that follow."""
    counted, components, often = Counter[int](), model.atlas.components, dict[int, int]()
    modules = {-1: model.hf} | {layer: components.get("block", layer) for layer in components.layers("block")}
    handles = [m.register_forward_pre_hook(lambda _m, _a, i=i: counted.update([i])) for i, m in modules.items()]
    try:
        yield often
    finally:
        for handle in handles:
            handle.remove()
    passes = max(counted.pop(-1, 1), 1)
    often.update({layer: n // passes for layer, n in counted.items()})


def run_again(atlas: Atlas, often: Mapping[int, int]) -> Iterator[Finding]:
    """Blocks that run several times in a pass, for layers that share them, are nothing that sites by layer are of.

    Raises:
        CapabilityError: all blocks are such.
    """
    again = tuple(sorted(layer for layer, times in often.items() if times > 1))
    if not again:
        return
    if len(again) == atlas.shape.n_layers:
        raise CapabilityError(
            f"this {atlas.family.name} runs the same block {max(often.values())} times in a pass, for layers that "
            "share their weights: a site would mean all of them at once. Nothing can be read or edited by layer; load "
            "a model whose layers have weights of their own"
        )
    detail = f"{often[again[0]]} times, as its block runs again: a site would mean all of them at once"
    for name in SITES:
        if SITES[name].layered and not SITES[name].tower and set(atlas.layers(name)) & set(again):
            yield Finding(name, "passes once", False, detail, Law.VALUE, layers=again)


def passing_once(entries: list[Entry], edited: Run, shared: set[str]) -> Iterator[Finding]:
    """Modules that run several times in a pass, for layers that share them: a read shows one of them, an edit is made
    in all.

    Args:
        shared: see `shared_modules`.
    """
    for entry, receipt in zip(entries, edited.receipts, strict=True):
        if receipt.fired < 2:
            continue
        often = f"{receipt.fired} times"
        # what is read is the last pass, which the equations of sites without layers are about
        law = Law.VALUE if SITES[entry.name].layered else Law.EDIT
        alone = (entry.layer,) if entry.write is not None and entry.write.module in shared else ()
        yield Finding(entry.name, "passes once", False, f"{often}, since others share its module", law, layers=alone)


def shared_modules(model: Session) -> set[str]:
    """Paths of modules that hang in several places."""
    places = dict[int, list[str]]()
    for path, module in model.hf.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return {path for paths in places.values() if len(paths) > 1 for path in paths}
