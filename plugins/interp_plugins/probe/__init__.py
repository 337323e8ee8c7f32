"""Probes: what can be decoded from states, layer by layer, beside what chance, the text and a blind image give.

Pure functions on states `[sample layer d]`; the method `probe` reads states at positions from a model.

Source: docs/methods/probe.md has formulas, nulls, leakage rules and what each number must equal.
"""
