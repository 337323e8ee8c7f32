"""GPT-OSS: each head's softmax has a learnt sink, so a pattern's rows sum to less than one; top-k of the router's
logits (with a bias), then softmax over these.
"""

from .family import Family
from .routing import Router, TopKOfLogits

FAMILY = Family("gpt_oss", router=Router("mlp.router", "mlp.experts", TopKOfLogits()))
