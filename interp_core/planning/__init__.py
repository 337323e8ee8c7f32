"""What runs cost on machines that are not here: sizes by config alone, operations, memory, devices, time.

`outline` builds a model without weights, `formulas` has what its layers cost, `devices` what machines give, `plan` puts
them together. The page on planning has the formulas; `interp plan` is the command.
"""

from .devices import Rate, named_rate
from .outline import Outline, outline_of
from .plan import RunPlan, plan

__all__ = ["Outline", "Rate", "RunPlan", "named_rate", "outline_of", "plan"]
