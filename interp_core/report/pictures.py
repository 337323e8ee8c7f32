"""Pictures as red, green and blue, and as text that a page can hold. No image library is needed."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

from ..errors import PlanError, wrong


def pixels_of(picture: Any) -> np.ndarray:
    """A picture as bytes `[height width 3]`.

    Args:
        picture: an image of PIL; an array or a tensor `[height width]`, `[height width 3]` (or 4) or, as processors
            give them, `[3 height width]`. Whole numbers are 0 to 255; others are 0 to 1 where they lie there, else
            stretched to it.

    Raises:
        PlanError: something else, or numbers that are none.
    """
    if hasattr(picture, "detach"):
        picture = picture.detach().float().cpu().numpy() if picture.is_floating_point() else picture.cpu().numpy()
    elif hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size or array.dtype.kind not in "fiub":
        raise PlanError(wrong("Overlay", "a picture [height width 3] or [3 height width]", picture))
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise PlanError("Overlay: the picture has values that are no numbers")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            array = (array - low) / max(high - low, 1e-12)
        array = np.rint(array * 255)
    elif array.dtype.kind == "b":
        array = array * 255
    return np.ascontiguousarray(np.broadcast_to(array[:, :, :3].clip(0, 255), (*array.shape[:2], 3)).astype(np.uint8))


def data_uri(pixels: np.ndarray) -> str:
    """A picture `[height width 3]` as a PNG in an address of its own."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()
