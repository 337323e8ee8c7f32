"""Run folders: one for every recipe and sweep, which a killed run goes on from and no other run can enter.

    with runs.open(out, settings, recipe="heads", model=model) as run:
        mean = run.stage("mean.safetensors", lambda: {"mean": means(model)})
        with run.rows("effects.jsonl", key="head") as rows:
            for head in heads:
                if head not in rows:
                    rows.add({"head": head, "effect": effect(model, mean, head)})
        run.table("effects.csv", list(rows))

A folder of other settings or of another model is refused, with what differs. What every file is, and what a kill leaves
at any point: docs/run_folders.md. Nothing here imports torch before a model or a tensor comes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, wrong
from ..files import is_running, pt_bytes, read_pt, safetensors_bytes, split_lines, write
from .folder import DONE, MANIFEST, RECORD, Part, RunFolder, identity_of, manifest, parts
from .identity import digest, model_record, safe_name, slug
from .rows import Rows
from .session import PASSED, sessions
from .stages import Files, csv_text, json_lines, json_text
from .status import RunStatus, TableStatus, status

if TYPE_CHECKING:
    from ..structure import Structure

__all__ = [
    "Files", "Part", "Rows", "RunFolder", "RunStatus", "TableStatus", "csv_text", "digest", "discard", "json_lines",
    "json_text", "manifest", "model_record", "open", "parts", "pt_bytes", "publish", "read_pt", "safe_name",
    "safetensors_bytes", "split_lines", "status", "write",
]  # fmt: skip

RESULTS = Path("results")
"""Where runs go that are given no folder."""


def open(
    folder: str | Path | None,
    settings: Mapping[str, Any] | Any,
    *,
    recipe: str,
    model: Structure | Mapping[str, Any] | None = None,
    dataset: str = "",
    free: Iterable[str] = (),
    say: Callable[[str], None] = print,
    kind: str = "run",
) -> RunFolder:
    """The folder of a run, to go on with or to begin; nothing is written before its `with` block.

    Args:
        folder: where (None: `results/{model}/{dataset}/{timestamp}-{recipe}-{hash}`; one of the same recipe, settings
            and model there that was killed or stopped is gone on with).
        settings: as resolved: a `Config`, or names and plain values.
        recipe: whose run it is.
        model: whose numbers it holds; `run.bind(model)` where it is loaded later.
        dataset: what it is about, for the manifest and the default folder.
        free: settings that may differ the next time.
        say: gets a line about every stage that is kept or made.
        kind: what messages call it.

    Raises:
        PlanError: the folder holds a run of another recipe, of other settings or of another model.
        CapabilityError: a model whose fingerprint cannot be told.
    """
    identity = identity_of(recipe, settings, model, dataset, free, PASSED.get())
    path = _default(identity, say) if folder is None else _path(folder)
    return RunFolder(path, path, identity, say=say, kind=kind)


def publish(
    tree: str | Path,
    settings: Mapping[str, Any] | Any,
    *,
    recipe: str,
    model: Structure | Mapping[str, Any] | None = None,
    dataset: str = "",
    free: Iterable[str] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> RunFolder:
    """A run that writes into a tree which other runs write into too; its record stands beside the tree, in
    `{tree}.runs/{recipe}-{hash}`. The same settings and model are the same run, which goes on.

    Args:
        tree: the folder; what is in it is left alone.
        overwrite: files that this run did not write may be replaced; without it they are an error.
        settings, recipe, model, dataset, free, say: as `open`.

    Raises:
        CapabilityError: a model whose fingerprint cannot be told.
    """
    identity = identity_of(recipe, settings, model, dataset, free, PASSED.get())
    path = _path(tree)
    home = path.parent / f"{path.name or 'tree'}.runs" / f"{slug(recipe)}-{identity['hash']}"
    return RunFolder(path, home, identity, shared=True, overwrite=overwrite, say=say)


def discard(folder: str | Path) -> None:
    """Delete what a run has made in a folder, and its record; other files stay. A folder without a run is left alone.

    Raises:
        PlanError: a process is at work there.
        LoadError: its record is damaged.
    """
    home = _path(folder)
    if _at_work(home):
        raise PlanError(f"a process is at work on the run in {home}; stop it, or give another folder")
    record = home / RECORD
    notes = [RunFolder.read(path) for kind in ("stages", "drafts") for path in (record / kind).rglob("*.json")]
    for note in notes:
        for name in note["files"] if note else ():
            path = home / note["folder"] / name  # type: ignore[index]
            if path.resolve().is_relative_to(home.resolve()):
                path.unlink(missing_ok=True)
    if record.is_dir():
        shutil.rmtree(record)
        for name in (MANIFEST, DONE):
            (home / name).unlink(missing_ok=True)


def _path(folder: Any) -> Path:
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise PlanError(wrong("the folder of a run", "a path", folder))
    for part in (Path(folder), *Path(folder).parents):
        if part.exists() and not part.is_dir():
            below = "" if part == Path(folder) else f", and {folder} would lie below it"
            raise PlanError(f"{part} is a file{below}; give a folder for the run")
    return Path(folder)


def _default(identity: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """Where a run goes that is given no folder: that of the same run if it was left unfinished, else a new one."""
    settings = identity["settings"]
    source = identity["model"]["source"] if identity["model"] else str(settings.get("model", "no-model"))
    place = RESULTS / slug(Path(source).name) / slug(identity["dataset"])
    ending = f"{slug(identity['recipe'])}-{identity['hash']}"
    for path in sorted(place.glob(f"*-{ending}"), reverse=True):
        if not (path / "DONE").is_file() and not _at_work(path):
            say(f"goes on with {path}")
            return path
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    names = (f"{stamp}{more}-{ending}" for more in ("", *(f".{number}" for number in range(2, 10_000))))
    return next(place / name for name in names if not (place / name).exists())  # one may be of this very second


def _at_work(home: Path) -> bool:
    """Whether a process may be at work on a run."""
    listed = sessions(home / "record" / "sessions")
    return any(session["state"] == "running" and is_running(session["host"], session["pid"]) for session in listed)
