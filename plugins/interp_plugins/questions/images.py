"""Images of questions: checked by their header when rows are read, decoded when pixels are asked for."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import interp_core as ic
from interp_core import vision


class RowError(ic.LoadError):
    """A row that cannot be used.

    Attributes:
        field: what of it is wrong.
        reason: in words that other rows may share.
    """

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{field}: {reason}{f' ({detail})' if detail else ''}")
        self.field, self.reason = field, reason


def opened(image: Any) -> Any:
    """An image of a question, decoded, in RGB.

    Raises:
        RowError: no such file, no image, one that breaks off, one that is too small or too large.
        CapabilityError: Pillow is not there.
    """
    try:
        return vision.open_picture(image, "image")
    except vision.PictureError as error:
        raise RowError("image", error.reason, str(error)) from error


def demand_image(path: Path) -> None:
    """Refuse what is no image by its file's header.

    Raises:
        RowError, CapabilityError: as `opened`.
    """
    try:
        vision.demand_picture(path, "image")
    except vision.PictureError as error:
        raise RowError("image", error.reason, str(error)) from error


def placed(root: Path, name: Any) -> Path:
    """The file of an image by its name in a row, within a folder.

    Raises:
        RowError: no name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise RowError("image", "it has no image", ic.errors.wrong("image", "the name of a file", name))
    parts = PurePosixPath(name.replace("\\", "/"))
    # the colon is of a drive (C:/a.png), which is no absolute path to anyone but Windows
    if parts.is_absolute() or ".." in parts.parts or ":" in str(parts).partition("/")[0]:
        raise RowError("image", "its name leads out of the folder of images", name)
    return root / parts
