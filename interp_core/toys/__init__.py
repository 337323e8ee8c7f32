"""Tiny trained models that ship with the package, their tasks, and the scripts that train them."""

from . import domains, text, vision

__all__ = ["domains", "text", "vision"]
