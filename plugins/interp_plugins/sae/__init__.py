"""Sparse autoencoders: their files, their features, edits by feature, and the method `sae`."""

from .autoencoder import SAE as SAE
from .files import load_sae as load_sae
