"""For tests, ours and those of plugin authors: small models of real families, and the conformance kit.

    testing.check_method(MyMethod, ic.load(testing.tiny("gemma2"))).raise_if_failed()

The models are made from config: no download, no training, the same weights for the same seed. `real_model()` finds the
one that is not, if it was fetched.
"""

from ..real import real_model
from .engines import check_engine
from .families import check_family
from .kit import check_method, check_plugin
from .launchers import check_launcher
from .models import families, mixtures, tiny
from .processors import pictures, processor
from .recipes import check_recipe
from .report import Report, Row
from .routed import VOCAB
from .visual import VISUAL

__all__ = [
    "VISUAL", "VOCAB", "Report", "Row", "check_engine", "check_family", "check_launcher", "check_method",
    "check_plugin", "check_recipe", "families", "mixtures", "pictures", "processor", "real_model", "tiny",
]  # fmt: skip
