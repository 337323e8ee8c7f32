"""Where results go: tried before a model is loaded, and what the system says of it in one sentence."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from ..errors import InterpError, PlanError

ADVICE = {
    errno.ENOSPC: "make room, or give another --out",
    errno.EDQUOT: "make room, or give another --out",
    errno.EROFS: "give an --out that can be written",
    errno.EACCES: "give an --out that can be written",
    errno.EPERM: "give an --out that can be written",
}
DRAFT = 1 << 16
"""Bytes that are written and deleted again, to see whether there is room at all."""


def demand_writable(path: Path | None, *, file: bool = False) -> None:
    """Refuse a place that cannot be written, before anything is worked out.

    Args:
        file: it is to be a file, not a folder.

    Raises:
        PlanError: saying why not.
    """
    if path is None:
        return
    if file and path.is_dir():
        raise PlanError(f"--out {path} is a folder; give a file")
    folder = path.parent if file else path
    near = next(place for place in (folder, *folder.parents, Path.cwd()) if place.exists())
    if not near.is_dir():
        raise PlanError(f"--out {path}: {near} is a file; give {'another' if file else 'a folder'}")
    try:
        with tempfile.TemporaryFile(dir=near) as draft:
            draft.write(bytes(DRAFT))
    except OSError as error:
        bare = OSError(error.errno, error.strerror)  # without the draft's name
        raise PlanError(f"--out {path}: nothing can be written in {near.absolute()}: {sentence(bare)}") from error


def sentence(error: Exception) -> str:
    """An error in one line: ours as it is, the system's with what to do."""
    if isinstance(error, InterpError) or not isinstance(error, OSError) or not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    advice = ADVICE.get(error.errno or 0, "")
    return f"{where}{error.strerror.lower()}{advice and '; ' + advice}"
