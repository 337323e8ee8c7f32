"""For tests, ours and those of plugin authors: small models of real families, and the conformance kit.

    testing.check_method(MyMethod, ic.load(testing.tiny("gemma2"))).raise_if_failed()

The models are made from config: no download, no training, the same weights for the same seed. `real_model()` finds the
one that is not, if it was fetched.
"""

from ..real import real_model
from .kit import Report, Row, check_method, check_plugin
from .models import families, mixtures, tiny
from .processors import pictures, processor
from .routed import VOCAB
from .visual import VISUAL

__all__ = [
    "VISUAL", "VOCAB", "Report", "Row", "check_method", "check_plugin", "families", "mixtures", "pictures", "processor",
    "real_model", "tiny",
]  # fmt: skip
