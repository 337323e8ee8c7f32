"""GLM-4-MoE: sigmoid scores, chosen with a correction bias and by groups; the first layers are dense."""

from .family import Family
from .routing import Router
from .scored import SIGMOID_IN_GROUPS

FAMILY = Family("glm4_moe", router=Router("mlp.gate", "mlp.experts", SIGMOID_IN_GROUPS))
