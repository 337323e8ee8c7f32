"""The family of `model.py`: its blocks keep the output projection of the MLP under a name that nobody could guess."""

from interp_core.architectures.family import Family

FAMILY = Family("hello", paths={"blocks.mlp.out": "squeeze"})
