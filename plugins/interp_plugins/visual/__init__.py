"""How deep a vision-language model needs its image: causal curves, the layers at which they fall, gates, a verdict.

Source: docs/methods/visual.md has formulas, shapes, costs and what each number must equal.
"""
