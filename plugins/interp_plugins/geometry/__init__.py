"""Geometry of states: how many directions rows use, how alike they point, how alike two sets of the same rows are.

Pure functions on rows `[n d]` in float64; the method `geometry` reads them from a model, layer by layer.

Source: docs/methods/geometry.md has formulas, conventions and what each number must equal.
"""
