"""Qwen3-MoE, and families with the same router: softmax over all experts, then top-k, renormalised if the config says
so; some layers may be dense. Qwen2-MoE and OLMoE differ in what lies beside the routed experts only.
"""

from .family import Family
from .routing import Router
from .scored import TOP_K_OF_SOFTMAX

ROUTER = Router("mlp.gate", "mlp.experts", TOP_K_OF_SOFTMAX, shared_gate="mlp.shared_expert_gate")
FAMILY = Family("qwen3_moe", router=ROUTER)
QWEN2_MOE = Family("qwen2_moe", router=ROUTER)
OLMOE = Family("olmoe", router=ROUTER)
MIXTRAL = Family("mixtral", router=ROUTER)
