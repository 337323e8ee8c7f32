"""Files that are whole or not there, of the same bytes for the same content; and drafts that dead processes left."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import LoadError, first_line, wrong

STALE_SECONDS = 24 * 3600
"""Age after which a draft of another machine, whose processes cannot be asked, counts as left behind."""
_FOLDERS = re.compile(
    r"(?:(?<=^)|(?<=[\s,;=:'\"(\[]))(?:~|\.\.|[A-Za-z]:)?[/\\](?![/\\])(?:[^/\\\s,;'\"()]+[/\\])+(?=[^/\\\s,;'\"()])"
)
"""Folders of paths that are absolute, or lead out of the working folder, up to the last part."""
_DRAFT = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-\d+\.tmp")


def write(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all, also when the process is killed or the power fails."""
    draft = _drafted(path, data)
    try:
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def create(path: Path, data: str | bytes, *, lasting: bool = True) -> bool:
    """Write a file whole if there is none; of several processes that try, one does. Whether it was this one.

    Args:
        lasting: it is to be there after a loss of power.
    """
    draft = _drafted(path, data, lasting)
    try:
        os.link(draft, path)  # unlike a rename, fails where there is a file
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without links: two processes at the same instant are not told apart
            return False
        os.replace(draft, path)
        return True
    finally:
        draft.unlink(missing_ok=True)


def split_lines(text: str) -> list[str]:
    """Lines of a file of JSON lines. They end at "\\n" alone: JSON holds U+2028 and others as they are, at which
    `str.splitlines` would break a line as well."""
    return text.removesuffix("\n").split("\n") if text else []


def sha256(data: str | bytes) -> str:
    """Digest of what a file will hold."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def safetensors_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file; the same tensors and metadata give the same bytes.

    The library keeps metadata in a hash map and writes it in an order that changes from call to call: it is put in the
    order of its names here.
    """
    from safetensors.torch import save

    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    data = save(copies, dict(metadata or {}))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that numbers begin at a multiple of eight bytes, as the format asks for
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def pt_bytes(value: Any) -> bytes:
    """A `.pt` file that `torch.load(…, weights_only=True)` reads."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_pt(path: str | Path, what: str, *, mmap: bool = False) -> Any:
    """What a `.pt` file of plain values holds.

    Args:
        what: should be in it, for messages.
        mmap: tensors stay in the file until they are used.

    Raises:
        LoadError: no such file, or one that cannot be read without running what is in it.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise LoadError(f"there is no file {path}, which should hold {what}") from None
    except Exception as error:  # whatever pickle and zip raise
        raise LoadError(f"{path} cannot be read as {what} (with weights_only=True): {first_line(error)}") from error


def file_sha256(path: Path) -> str | None:
    """Digest of what a file holds; None where there is no file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def host() -> str:
    """Eight digits that stand for this machine."""
    return sha256(socket.gethostname())[:8]


def is_running(machine: str, pid: int) -> bool:
    """Whether a process of a machine may still run; for another machine nobody can tell, so it may."""
    if machine != host() or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sweep_drafts(folder: Path, deep: bool = True) -> list[Path]:
    """Delete the drafts that dead processes left in a folder, and in those within it if `deep`."""
    swept = []
    for path in folder.rglob(".*.tmp") if deep else folder.glob(".*.tmp"):
        named = _DRAFT.fullmatch(path.name)
        try:
            if named and (
                not is_running(named[1], int(named[2])) or time.time() - path.stat().st_mtime > STALE_SECONDS
            ):
                path.unlink()
                swept.append(path)
        except FileNotFoundError:  # its process has just renamed it
            pass
    return swept


def _drafted(path: Path, data: str | bytes, lasting: bool = True) -> Path:
    """A file beside another, with what that is to hold; safe on the disk, if it is to last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name[:120]}.{host()}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def without_folder(name: str) -> str:
    """A name as others may read it: of an absolute path, or one that leads out of the working folder, its last part."""
    leads_away = Path(name).is_absolute() or name.startswith(("~", "..")) or str(Path.home()) in name
    return Path(name).name if leads_away else name


def without_folders(text: str) -> str:
    """A text as others may read it: of absolute paths in it, the last part alone."""
    return _FOLDERS.sub("", text)


def folder_of(what: str, folder: Any) -> Path:
    """A folder as a path.

    Raises:
        LoadError: something that names none.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise LoadError(wrong(what, "a folder", folder))
    return Path(folder)
