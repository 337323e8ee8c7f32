"""Batteries: what holds of a model on every engine, site by site (`interp check`), and what of its images."""
