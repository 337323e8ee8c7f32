"""Edits: a site, an operation and a value, as data; and what each operation does to a tensor.

The vocabulary is small and closed, so that every engine, also a remote one, can carry it out:
`set add scale zero project apply`, `knockout` for attention patterns, and for routers `mask` and `force` (of logits)
and `boost` (of executed weights), in several modes each.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import PlanError
from .sites import Site

MASKS = {"replace": "mask", "keep": "mask_keep", "drop": "mask_drop"}
FORCES = {"own_weight": "force", "steermoe": "force_steermoe"}
BOOSTS = ("boost", "boost_renormalised")
ROUTING = (*MASKS.values(), *FORCES.values(), *BOOSTS)
"""Edits of what a router selects, of whole tokens; what they do is in `architectures/rerouting.py`."""
OPS = ("set", "add", "scale", "zero", "project", "apply", "knockout", *ROUTING)
TENSOR_OPS = ("set", "add", "project")
_ONLY = {
    "knockout": "pattern",
    **dict.fromkeys((*MASKS.values(), *FORCES.values()), "router_logits"),
    **dict.fromkeys(BOOSTS, "router_weights"),
}


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to a site. Made by the methods of `Site`.

    Attributes:
        site: what is changed.
        op: one of `OPS`.
        value: a tensor (`set`, `add`, `project`), a number (`scale`), expert indices (`mask…`, `force…`), these and a
            factor (`boost…`), a function (`apply`), or None.

    Raises:
        PlanError: an operation that the site does not take, or a value of the wrong kind.
    """

    site: Site
    op: str
    value: Any = None

    def __post_init__(self) -> None:
        op, value = self.op, self.value
        if op not in OPS:
            raise PlanError(f"no edit is called {op!r}; there are {', '.join(OPS)}")
        if op in _ONLY and self.site.name != _ONLY[op]:
            raise PlanError(f"{op} is for {_ONLY[op]}, not for {self.site.name}")
        if op in TENSOR_OPS and not isinstance(value, Tensor):
            raise PlanError(f"{self.site}: {op} takes a torch tensor, not {type(value).__name__}")
        if op == "scale" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise PlanError(f"{self.site}: scale takes a number, not {type(value).__name__}")
        if op in ROUTING:
            self._check_routing()
        if op == "apply" and not callable(value):
            raise PlanError(f"{self.site}: apply takes a function of a tensor, not {type(value).__name__}")
        if op == "project" and not 1 <= value.ndim <= 2:
            raise PlanError(f"{self.site}: project takes [d] or [k d] directions, not {list(value.shape)}")
        if op == "project" and not bool((value.detach().norm(dim=-1) > 0).all()):
            raise PlanError(f"{self.site}: project got a direction of length zero")
        if op == "knockout" and self.site.key is None and self.site.pos is None:
            raise PlanError(f"{self.site}: knockout of every key leaves nothing to attend to; give query= and key=")

    def _check_routing(self) -> None:
        op, value = self.op, self.value
        if op in BOOSTS:
            if not (isinstance(value, tuple) and len(value) == 2 and _is_finite(value[1])):
                raise PlanError(f"{self.site}: boost takes experts and a finite factor, not {value!r:.60}")
            value = value[0]
        if not (isinstance(value, tuple) and value and all(type(item) is int for item in value)):
            raise PlanError(f"{self.site}: {op} takes the numbers of experts, not {value!r:.60}")
        if self.site.units is not None:
            raise PlanError(f"{self.site}: {op} is about whole tokens; leave the expert out of the site, {op}(experts)")

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that an edit of what a router selects names."""
        found: tuple[int, ...] = self.value[0] if self.op in BOOSTS else self.value if self.op in ROUTING else ()
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.site, self.op, digest(self.value) if isinstance(self.value, Tensor) else self.value

    def __str__(self) -> str:
        value = self.value
        if isinstance(value, Tensor):
            shown = f" {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        elif self.op in ROUTING:
            shown = " experts=" + ",".join(map(str, self.experts)) + (f" × {value[1]:g}" if self.op in BOOSTS else "")
        elif self.op == "apply":
            shown = f" {getattr(value, '__qualname__', repr(value))}"
        else:
            shown = "" if value is None else f" {value:g}"
        return f"{self.site} {self.op}{shown}"

    __repr__ = __str__


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and content."""
    data = tensor.detach().cpu().contiguous().reshape(-1)
    made = hashlib.sha256(f"{data.dtype}{list(tensor.shape)}".encode())
    made.update(data.view(torch.uint8).numpy().data)
    return made.hexdigest()


def carry_out(edit: Edit, x: Tensor, value: Any) -> Tensor:
    """What an edit makes of the tensor it selects; `value` is its value as `prepared` gives it."""
    op = edit.op
    if op == "set":
        return value.expand_as(x)
    if op == "add":
        return x + value
    if op == "scale":
        return x * value
    if op == "zero":
        return torch.zeros_like(x)
    if op == "project":
        return x - (x @ value.mT) @ value
    if op == "knockout":
        return torch.full_like(x, torch.finfo(x.dtype).min)
    new = edit.value(x.clone())  # a function that works in place does what its result says, and no more
    if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
        found = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise PlanError(f"{edit}: the function returned {found} for {x.dtype} {list(x.shape)}")
    return new


def prepared(edit: Edit, x: Tensor) -> Any:
    """An edit's value as `carry_out` takes it for `x`: on its device, in its dtype (routers may compute in another than
    the model's), directions made orthonormal."""
    if not isinstance(edit.value, Tensor):
        return edit.value
    if edit.op != "project":
        return edit.value.to(x.device, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.qr(torch.atleast_2d(edit.value).to(x.device, wide).mT).Q.mT.to(x.dtype)
