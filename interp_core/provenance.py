"""Where a result comes from: what made it, of which model and prompts, with which settings, when, and by which command.

Plain data, so that it is saved with the result and printed on its page. Nothing in it tells where files lie on the
user's machine: of paths there is the last part alone.
"""

from __future__ import annotations

import inspect
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .batches import numbering
from .columns import shortened
from .files import without_folder, without_folders
from .identity import NoIdentityError, identity, weights
from .runs.identity import digest, plain_fields
from .runs.session import now, packages

if TYPE_CHECKING:
    from .settings import Config
    from .structure import Structure
    from .text import Tokens

PROMPTS, LETTERS = 20, 600
"""How many prompts are kept as text, and how many letters of each; of all of them there is a digest."""
WEIGHTS = 1 << 30
"""Bytes of weights up to which a model without a revision gets a fingerprint, once (a second); `out=` takes any."""


_DIGEST = re.compile("[0-9a-f]{32,}")
_WITHIN: ContextVar[bool] = ContextVar("within", default=False)
"""Whether a result is being made that has its record already."""


@contextmanager
def within() -> Iterator[None]:
    """For a while, results are parts of one that has its record: they get none, since a fingerprint reads all weights,
    and a method may sweep hundreds of times."""
    token = _WITHIN.set(True)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def provenance(
    name: str, what: str, model: Structure, tokens: Tokens, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The record of a result; None of one that is made `within` another.

    Args:
        name: of the method, or of what else made it.
        what: what it asks, in a sentence.
        settings: as plain data.
    """
    return None if _WITHIN.get() else _record(name, what, _model(model), settings, _prompts(tokens))


def run_provenance(
    run: Mapping[str, Any], what: str, model: Structure | None, bound: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The record of a run, whose page says itself what its samples are; settings without folders.

    Args:
        run: what makes it this run, see `RunFolder.identity`.
        model: None where it was not loaded, since all was done before.
        bound: the model as the run has noted it; None where no model has made anything.
    """
    told = None if model is None else _model(model)
    if bound is not None:
        parts = bound["parts"]
        kept = {"class": parts["model"], "source": without_folder(bound["source"]), "layers": None, "revision": None}
        told = told or kept | {key: parts[key] for key in ("dtype", "device", "attention", "engine")}
        # read for the run already, whatever its size
        told["fingerprint"] = None if told["revision"] else parts["weights"][:16]
    return _record(run["recipe"], what, told, _shared(run["settings"]), None)


def _record(
    name: str, what: str, model: Mapping[str, Any] | None, settings: Mapping[str, Any], prompts: Any
) -> dict[str, Any]:
    return {
        "name": name, "what": what, "model": model, "settings": dict(settings), "prompts": prompts,
        "versions": versions(), "command": command(), "date": now(),
    }  # fmt: skip


def _shared(setting: Any) -> Any:
    """Plain data as others may read it: of paths the last part alone, of digests the beginning."""
    if isinstance(setting, Mapping):
        return {_shared(key): _shared(held) for key, held in setting.items()}
    if isinstance(setting, list):
        return [_shared(held) for held in setting]
    if not isinstance(setting, str):
        return setting
    return setting[:16] if _DIGEST.fullmatch(setting) else without_folders(setting)


def _folded(row: Sequence[str]) -> Iterator[str]:
    """A row's tokens; of one like `<|image_pad|>` that stands hundreds of times, how often."""
    for token, run in groupby(row):
        count = len(list(run))
        special = count > 1 and token.startswith("<") and token.endswith(">")
        yield f"{token}×{count} " if special else token * count


def versions() -> dict[str, str]:
    """Python, and the packages that numbers depend on."""
    return {"python": platform.python_version()} | packages()


def command() -> str:
    """How this process was started, without folders; "" in a notebook or an interactive session."""
    if not sys.argv or not sys.argv[0] or "ipykernel" in sys.argv[0] or hasattr(sys, "ps1"):
        return ""
    parts = (word.rpartition("=") if word.startswith("-") else ("", "", word) for word in sys.argv)
    words = [flag + equals + without_folder(path) for flag, equals, path in parts]
    return " ".join(word if word and not set(word) & set(" \n\t'\"") else repr(word) for word in words)


def sentence(kind: type) -> str:
    """The first sentence of a class's docstring, which says what it is for."""
    text = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return text.partition("; see the module")[0].rstrip(".") + "." if text else ""


def plain_settings(config: Config) -> dict[str, Any]:
    """Settings as JSON holds them; what is for Python alone (a tensor, a function) by its type."""
    return plain_fields(config, lambda name, setting: type(setting).__name__)


def shared_settings(config: Config) -> dict[str, Any]:
    """Settings as others may read them: without folders."""
    return {
        key: without_folder(held) if isinstance(getattr(config, key), PurePath) else held
        for key, held in plain_settings(config).items()
    }


def _model(model: Structure) -> dict[str, Any]:
    """A model by its source, and by its revision on the hub or the fingerprint of its weights."""
    config = model.hf.config
    revision = getattr(config, "_commit_hash", None)
    return {
        "source": without_folder(model.source), "class": type(model.hf).__name__, "layers": model.n_layers,
        "revision": revision, "fingerprint": None if revision else _fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "attention": str(getattr(config, "_attn_implementation", "")), "engine": model.engine_name,
    }  # fmt: skip


def _fingerprint(model: Structure) -> str | None:
    """Digest of the weights; None of those that are too many to read for this, or that are not in memory."""
    if sum(parameter.nbytes for parameter in model.hf.parameters()) > WEIGHTS:
        return None
    try:
        return weights(model.hf)[:16]
    except NoIdentityError:
        return None


def _prompts(tokens: Tokens) -> dict[str, Any]:
    """How many prompts, a digest of all, and the first ones as text."""
    rows: Sequence[Sequence[str]] = tokens.labels[:PROMPTS]
    try:
        told = identity(numbering(tokens))[:16]
    except NoIdentityError:
        told = digest(tokens.ids.tolist())[:16]
    texts = ["".join(_folded(row)) for row in rows]
    return {
        "count": len(tokens), "digest": told, "lengths": [min(tokens.lengths), max(tokens.lengths)],
        "texts": [shortened(text, LETTERS) for text in texts],
    }  # fmt: skip
