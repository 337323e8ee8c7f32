"""Images: processors without torchvision, pictures, blind images, and what each visual token stands for.

from interp_core import vision

blind = vision.blind_images(pictures, "random", processor=model.processor)
model.tokens(question, answer, images=blind.images[0])
"""

from .blind import MODES, BlindImages, blind_images, derangement, mean_colour
from .pictures import LARGEST, SMALLEST, PictureError, demand_picture, open_picture
from .places import VisualToken, placeholder_ids
from .processors import build, grid_of

__all__ = [
    "LARGEST", "MODES", "SMALLEST", "BlindImages", "PictureError", "VisualToken", "blind_images", "build",
    "demand_picture", "derangement", "grid_of", "mean_colour", "open_picture", "placeholder_ids",
]  # fmt: skip
