"""Compressed numpy files (`.npz`) as trace folders and exports have them: read without pickle, written byte for byte.

A file is what `numpy.savez_compressed` makes of its members in their order: a zip archive with one `.npy` per member,
deflate at zlib's default level, every date 1980-01-01. So the same members give the same bytes as long as zlib
compresses alike (builds of zlib-ng do not; the members' own bytes are the same everywhere).
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp_core import LoadError, Span

Array = np.ndarray[Any, Any]


def npz_bytes(members: Mapping[str, Array]) -> bytes:
    """The file that holds these arrays, in their order."""
    buffer, named = io.BytesIO(), dict[str, Any](members)
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of a file, in their order.

    Raises:
        LoadError: no such file, one that is damaged, or one that holds pickled objects.
    """
    try:
        with path.open("rb") as file:  # numpy would leave the file of a damaged archive open
            if not zipfile.is_zipfile(file):
                raise LoadError(f"{path} is no .npz file (an archive of arrays by name), or is cut off")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise LoadError(f"there is no file {path}") from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = "it holds pickled objects, which are never loaded" if "pickle" in str(error).lower() else str(error)
        raise LoadError(f"{path} cannot be read as an .npz file: {why}") from error


def checked(path: Path | str, name: str, array: Array, dtype: str, shape: tuple[int | None, ...]) -> Array:
    """The array, if it is of this dtype ("U" is text of any width) and shape (None: any size).

    Raises:
        LoadError: it is not, with both.
    """
    kind = array.dtype.kind == "U" if dtype == "U" else array.dtype == np.dtype(dtype)
    fits = len(array.shape) == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
    if not kind or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise LoadError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}, not {'text' if dtype == 'U' else dtype} [{wanted}]"
        )
    return array


def demand_finite(path: Path | str, name: str, array: Array) -> None:
    """Refuse scores that are not numbers.

    Raises:
        LoadError: some are not, naming the first.
    """
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        place = ", ".join(map(str, wrong[0].tolist()))
        raise LoadError(
            f"{path}: {len(wrong)} of {array.size} scores of {name} are not finite numbers, the first at [{place}] "
            f"({array[tuple(wrong[0])]}); run the attribution again in float32 or bfloat16 (float16 overflows)"
        )


def closed(span: Span | None) -> Array:
    """A span as files have it: first and last token; -1, -1 for none."""
    return np.asarray((-1, -1) if span is None else (span.start, span.stop - 1), dtype=np.int64)


def opened(pair: Array) -> Span | None:
    """The span of a file's first and last token; None for -1, -1."""
    start, last = (int(end) for end in pair)
    return None if (start, last) == (-1, -1) else Span(start, last + 1)
