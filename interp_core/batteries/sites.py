"""The whole battery on any model: every site, on every engine, in every use.

For each engine and site, in the first and last layer that has it:

    read        values against those of engine `torch`; on `torch` itself, the self-check's equations
    write       logits after an edit against those of engine `torch`; on `torch` itself, that the edit acts
    grad        d score / d site, against d score / d value of an edit that adds nothing there
    generate    values of the steps, made with the key/value cache, against one pass over the whole text

Numbers are largest differences over the largest value; a use that is refused shows its reason. Cost per engine and
site: about ten forward passes over six tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..checks.selfcheck import CHECKED_POSITIONS, check_edit, check_site, check_tokens
from ..columns import aligned, wrapped
from ..errors import CapabilityError, InterpError
from ..plugins import registry
from ..progress import Progress, stopping
from ..sites import SITES
from ..text import Tokens

if TYPE_CHECKING:
    from ..model import Model
    from ..sites import Edit

USES = ("read", "write", "grad", "generate")
NEW = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By dtype, relative to the largest value; the dtype is the coarsest that values pass through, see `coarsest`."""


@dataclass(frozen=True)
class Cell:
    """One use of one site on one engine.

    Attributes:
        error: largest relative difference, None where there is none to measure.
        status: whether it works, is refused before the run, or does something else.
        reason: why it does not work.
    """

    engine: str
    site: str
    use: str
    error: float | None
    status: Literal["ok", "refused", "failed"]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it works."""
        return self.status == "ok"

    @property
    def why(self) -> str:
        """What became of it, and the reason; empty where it works."""
        return "" if self.ok else f"{self.status}: {self.reason}"

    def __str__(self) -> str:
        return "no" if not self.ok else "ok" if not self.error else f"{self.error:.0e}"


@dataclass(frozen=True)
class Battery:
    """What `check_model` found."""

    cells: tuple[Cell, ...]

    @property
    def failed(self) -> list[Cell]:
        """Cells that neither work nor are refused."""
        return [cell for cell in self.cells if cell.status == "failed"]

    def text(self, width: int | None = None) -> str:
        """The table, and the reasons for what does not work, in lines of at most `width` letters."""
        table: dict[tuple[str, str], dict[str, Cell]] = {}
        for cell in self.cells:
            table.setdefault((cell.engine, cell.site), {})[cell.use] = cell
        rows: list[tuple[str, ...]] = [("engine", "site", *USES)]
        rows += [
            (engine, site, *(str(cells[use]) if use in cells else "" for use in USES))
            for (engine, site), cells in table.items()
        ]
        lines = aligned(rows)
        if width is not None and max(map(len, lines)) > width:  # engines as headings, not as a column
            lines = aligned([row[1:] for row in rows], width, keep=len(rows[0]))
            heads = [engine for engine, _ in table]
            for number in reversed([i for i, engine in enumerate(heads) if i == 0 or engine != heads[i - 1]]):
                lines.insert(number + 1, f"engine {heads[number]}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            if cell.why:
                reasons.setdefault((cell.engine, cell.why), []).append(f"{cell.site} {cell.use}")
        said = (f"{engine}: {', '.join(what)}: {why}" for (engine, why), what in reasons.items())
        return "\n".join([*lines, "", *(wrapped(line, width) for line in said)]).rstrip()

    def __str__(self) -> str:
        return self.text()


def check_model(model: Model, engines: Sequence[str] = ()) -> Battery:
    """Run the battery.

    Args:
        model: a model on engine `torch`.
        engines: which engines to hold against it (default: all that are installed, its own first).

    Raises:
        CapabilityError: no such engine.
    """
    cells: list[Cell] = []
    limit = TOLERANCE.get(coarsest(model), 2e-5)
    sites = [site for site in model.sites if not SITES[site].visual]  # these need images
    known = registry("engines")
    own = model.engine.name
    held = list(engines) or [own, *(name for name in known.names() if name != own)]

    def checked() -> str:
        bad = sum(cell.status == "failed" for cell in cells)
        uses = len(held) * len(sites) * len(USES)
        return f"{len(cells)} of {uses} uses of sites were checked, {bad or 'none'} of them failed"

    with stopping(checked), Progress("sites", len(held) * len(sites)) as progress:
        for name in held:
            try:
                other = model if name == own else model.on(name)
            except CapabilityError as error:
                if name not in known:
                    raise
                cells += [Cell(name, site, use, None, "refused", str(error)) for site in sites for use in USES]
                progress.add(len(sites))
                continue
            for site in sites:
                cells += [_cell(model, other, name, site, use, limit) for use in USES]
                progress.add()
    return Battery(tuple(cells))


class _Casts(TorchDispatchMode):
    """Notes the coarsest dtype that values are cast to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].is_floating_point() and out.is_floating_point()
        if cast and torch.finfo(out.dtype).eps > torch.finfo(self.coarsest).eps:
            self.coarsest = out.dtype
        return out


def coarsest(model: Model) -> torch.dtype:
    """The coarsest dtype that values pass through: norms, rotary angles and routers of many families compute in
    float32 whatever the model's dtype is, so two ways to one number in a float64 model are no closer than that."""
    with _Casts(model.dtype) as casts:
        model.run(_tokens(model))
    return casts.coarsest


def _cell(model: Model, other: Model, engine: str, name: str, use: str, limit: float) -> Cell:
    """One cell: the worst of the first and last layer."""
    if why := other.can(name, use):
        return Cell(engine, name, use, None, "refused", why)
    measure = {"read": _read, "write": _write, "grad": _gradient, "generate": _generation}[use]
    try:
        layers = model.atlas.layers(name)
        error = max(measure(model, other, name, layer) for layer in sorted({layers[0], layers[-1]}))
    except InterpError as problem:
        return Cell(engine, name, use, None, "failed", str(problem))
    if error <= limit:
        return Cell(engine, name, use, error, "ok")
    return Cell(engine, name, use, error, "failed", f"differs by {error:.1e}, more than {limit:g}")


def _tokens(model: Model) -> Tokens:
    ids = check_tokens(model)
    return Tokens(ids[None], torch.ones(1, len(ids), dtype=torch.bool))


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; hidden scores count as equal."""
    a, b = a.as_subclass(Tensor).double(), b.as_subclass(Tensor).double()
    seen = (a.abs() < 1e30) | (b.abs() < 1e30)
    if not seen.any():
        return 0.0
    return float((a - b)[seen].abs().max() / b[seen & (b.abs() < 1e30)].abs().max().clamp(min=1e-12))


def _read(model: Model, other: Model, name: str, layer: int) -> float:
    site = check_site(name, layer)
    if other is model:
        return 0.0  # the self-check has held its equations
    runs = [m.run(_tokens(model), read=site)[site] for m in (other, model)]
    return _distance(*runs)


def _probe(model: Model, name: str, layer: int) -> Edit:
    """The self-check's edit of that site, in one row."""
    edit = check_edit(model.atlas.entries[name, layer], 0, 1, model.run(_tokens(model), read=check_site(name, layer)))
    return check_site(name, layer).at(query=-1, key=-2).add(edit.value) if "query" in SITES[name].axes else edit


def _write(model: Model, other: Model, name: str, layer: int) -> float:
    edit, tokens = _probe(model, name, layer), _tokens(model)
    if other is model:
        return 0.0 if model.run(tokens, edits=edit).receipts[0].norm > 0 else float("inf")
    return _distance(*(m.run(tokens, edits=edit).logits for m in (other, model)))


def _gradient(model: Model, other: Model, name: str, layer: int) -> float:
    site, tokens, edit = check_site(name, layer), _tokens(model), _probe(model, name, layer)
    weights = torch.randn(model.atlas.shape.d_vocab, generator=torch.Generator().manual_seed(1))

    def score(logits: Tensor) -> Tensor:
        return (logits.as_subclass(Tensor)[:, -1] @ weights.to(logits)).sum()

    nothing = torch.zeros_like(edit.value).requires_grad_()
    score(other.run(tokens, edits=edit.site.add(nothing), allow_noop=True).logits).backward()
    assert nothing.grad is not None
    gradient = other.run(tokens, read=site, grad=score).grad[site].plain
    if "query" in site.info.axes:
        return _distance(gradient[0, :, -1, -2], nothing.grad)
    return _distance(gradient[0, list(CHECKED_POSITIONS)].flatten(0, -2).sum(0), nothing.grad)


def _generation(model: Model, other: Model, name: str, layer: int) -> float:
    site, tokens = check_site(name, layer), _tokens(model)
    generation = other.generate(tokens, read=site, max_new_tokens=NEW, stop_at_eos=False)
    whole = Tokens(generation.tokens.ids[:, :-1], torch.ones(1, generation.tokens.ids.shape[1] - 1, dtype=torch.bool))
    wanted = other.run(whole, read=site)[site].plain
    worst, n = 0.0, tokens.ids.shape[1]
    for number, step in enumerate(generation.steps[1:]):
        value, at = step[site].plain, n + number
        if "query" in site.info.axes:
            keys = value.shape[-1]
            part = wanted[:, :, at : at + 1, at + 1 - keys : at + 1]
        else:
            part = wanted[:, at : at + 1]
            value = value[:, -1:]
        worst = max(worst, _distance(value, part))
    return worst
