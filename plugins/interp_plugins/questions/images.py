"""Images of questions: checked by their header when rows are read, decoded when pixels are asked for."""

from __future__ import annotations

import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import interp_core as ic


class RowError(ic.LoadError):
    """A row that cannot be used.

    Attributes:
        field: what of it is wrong.
        reason: in words that other rows may share.
    """

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{field}: {reason}{f' ({detail})' if detail else ''}")
        self.field, self.reason = field, reason


def opened(path: Path, *, decoded: bool = True) -> Any:
    """An image of a file.

    Args:
        decoded: with its pixels, in RGB; else the header alone is read, and the image is closed again.

    Raises:
        RowError: no such file, no image, one that breaks off, or one of more pixels than Pillow opens.
        CapabilityError: Pillow is not there.
    """
    image_module = pillow()
    if not path.is_file():
        raise RowError("image", "there is no such file", str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(path) as image:
                return image.convert("RGB") if decoded else image.size
    except (image_module.DecompressionBombWarning, image_module.DecompressionBombError) as error:
        raise RowError("image", "it has too many pixels", f"{path}: {error}") from error
    except image_module.UnidentifiedImageError as error:
        raise RowError("image", "it is no image that Pillow knows", str(path)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RowError("image", "it cannot be decoded", f"{path}: {error}") from error


def pillow() -> Any:
    """Pillow's module of images.

    Raises:
        CapabilityError: it is not there.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ic.CapabilityError("images need Pillow: pip install pillow") from error
    return Image


def placed(root: Path, name: Any) -> Path:
    """The file of an image by its name in a row, within a folder.

    Raises:
        RowError: no name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise RowError("image", "it has no image", ic.errors.wrong("image", "the name of a file", name))
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise RowError("image", "its name leads out of the folder of images", name)
    return root / parts
