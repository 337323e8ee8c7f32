"""Raises on import."""

raise RuntimeError("no luck")
