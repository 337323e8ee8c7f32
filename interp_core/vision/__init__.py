"""Images: where visual tokens are and what they stand for, processors without torchvision, and pictures."""

from .pictures import LARGEST, SMALLEST, open_picture
from .places import VisualToken, placeholder_ids
from .processors import build

__all__ = ["LARGEST", "SMALLEST", "VisualToken", "build", "open_picture", "placeholder_ids"]
