"""Tiny trained models that ship with the package, their tasks, and the scripts that train them."""

from . import text

__all__ = ["text"]
