"""Transports: what turns a layer's stream into the one that the last layer would have, before it is read out.

`jacobian` is the Jacobian lens, `fitting` fits it, `lens_files` reads and writes its files in all their forms,
`steering` changes a run along its directions; `tuned` is the tuned lens.
"""

from .fitting import fit_jacobian
from .jacobian import JacobianLens
from .lens_files import load_jacobian, save_jacobian
from .steering import ablation, direction, steering, swap
from .tuned import TunedLens, fit_tuned, load_tuned, save_tuned

__all__ = [
    "JacobianLens", "TunedLens", "ablation", "direction", "fit_jacobian", "fit_tuned", "load_jacobian", "load_tuned",
    "save_jacobian", "save_tuned", "steering", "swap",
]  # fmt: skip
