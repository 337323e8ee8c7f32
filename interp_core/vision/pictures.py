"""Pictures as a processor takes them: opened from a file or an array, as RGB, of a size that a processor can work with.

Limits: at least `SMALLEST` pixels a side (below that transformers cannot tell rows from colour channels, and guesses),
at most `LARGEST` pixels in all (Pillow's own limit against decompression bombs).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import CapabilityError, TextError, wrong

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST = 4
LARGEST = 89_478_485
GONE, UNREADABLE = "there is no such file", "it is no picture that can be read"
SMALL, LARGE = "it is too small", "it has too many pixels"
TAKES = "a PIL image, the path of a file, or an array of uint8 [height width 3]"


class PictureError(TextError):
    """A picture that cannot be used.

    Attributes:
        reason: in words that other pictures may share: `GONE`, `UNREADABLE`, `SMALL` or `LARGE`.
    """

    def __init__(self, message: str, reason: str = UNREADABLE) -> None:
        super().__init__(message)
        self.reason = reason


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        CapabilityError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CapabilityError(
            "pictures need Pillow, which is not installed: pip install 'interp-core[images]'"
        ) from error
    return Image


def open_picture(picture: Any, what: str = "image 0") -> Image:
    """A picture as a PIL image in RGB, turned as its EXIF data says.

    Args:
        picture: a PIL image, the path of a file, or an array of uint8 `[height width 3]` or `[height width]`.
        what: how messages call it.

    Raises:
        TextError: something else (`PictureError`: a picture that is gone, damaged, too small or too large).
        CapabilityError: Pillow is not installed.
    """
    kind = pillow()
    if isinstance(picture, kind.Image):
        image = picture
    elif isinstance(picture, (str, PathLike)):
        image = _from_file(kind, str(picture), what)
    elif isinstance(picture, (np.ndarray, Tensor)):
        image = _from_array(kind, np.asarray(picture), what)
    else:
        raise TextError(wrong(what, TAKES, picture))
    _demand_size(image, what)
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"{what} cannot be read ({error}): it is cut short or damaged; copy it again") from error


def demand_picture(path: str | PathLike[str], what: str = "image 0") -> None:
    """Refuse what is no picture by its file's header; whether it breaks off later, only `open_picture` tells.

    Raises:
        TextError, CapabilityError: as `open_picture`.
    """
    _from_file(pillow(), str(path), what, decoded=False)


def open_pictures(pictures: Any, what: str = "") -> list[Image]:
    """Several pictures, or a single one as a list of one.

    Raises:
        TextError, CapabilityError: as `open_picture`.
    """
    listed = list(pictures) if isinstance(pictures, Sequence) and not isinstance(pictures, (str, bytes)) else [pictures]
    return [open_picture(picture, f"{what}image {number}") for number, picture in enumerate(listed)]


def _from_file(kind: Any, path: str, what: str, *, decoded: bool = True) -> Image | None:
    from PIL import ImageOps

    if "://" in path:
        raise TextError(f"{what} is a web address ({path:.60}), and nothing is downloaded: save it, and pass its path")
    if not Path(path).is_file():
        raise PictureError(f"{what}: there is no file {path}", GONE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kind.DecompressionBombWarning)  # of those, and larger ones, we say more below
        try:
            with kind.open(path) as image:
                _demand_size(image, f"{what} ({path})")
                if not decoded:
                    return None
                image.load()
                turned: Image = ImageOps.exif_transpose(image)
                return turned
        except kind.DecompressionBombError as error:
            raise PictureError(_too_large(f"{what} ({path})", str(error)), LARGE) from error
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, TextError):
                raise
            raise PictureError(
                f"{what}: {path} is no picture that can be read ({error}); it is another file, or damaged"
            ) from error


def _from_array(kind: Any, array: np.ndarray, what: str) -> Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise TextError(
            f"{what} takes an array of uint8 [height width 3] or [height width], not {array.dtype} "
            f"{list(array.shape)}; convert values to 0 … 255, and put the colours last"
        )
    if 0 in array.shape:
        raise TextError(f"{what} has no pixels: {list(array.shape)}")
    image: Image = kind.fromarray(array)
    return image


def _demand_size(image: Image, what: str) -> None:
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise PictureError(
            f"{what} is {width} x {height} pixels; at least {SMALLEST} a side are needed: below that transformers "
            "cannot tell rows from colours. Enlarge it.",
            SMALL,
        )
    if width * height > LARGEST:
        raise PictureError(_too_large(what, f"{width} x {height} pixels"), LARGE)


def _too_large(what: str, size: str) -> str:
    return f"{what} has more than {LARGEST} pixels ({size}); make it smaller before it is passed (image.thumbnail(…))"
