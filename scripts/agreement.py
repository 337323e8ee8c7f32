"""Writes docs/agreement.md: python scripts/agreement.py [FAMILY …]

Every family on every engine, every site read and edited in every layer, in three dtypes, against hooks written by hand
(tests/reference.py). With families named, prints their rows and writes nothing.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

import interp_core as ic
from interp_core import testing
from interp_core.architectures.undescribed import UNDESCRIBED
from interp_core.files import write
from interp_core.sites import SITES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from mixtures import MIXTURES  # noqa: E402
from mixtures import by_hand as routed_by_hand  # noqa: E402
from parity import IDS, Battery, battery  # noqa: E402
from sweeping import against_full  # noqa: E402

ENGINES = ("torch", "nnsight", "transformer_lens")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ABSENT = ("has no vision tower", "has no DeepStack", "has no mixture-of-experts router")
"""What goes without saying: models without pictures or experts."""
HEAD = """# Agreement with hooks by hand

Written by `python scripts/agreement.py` ({versions}). Random-weight models of each family, 3 layers, d_model 64.

## Families × engines

A cell is the largest absolute difference to hooks written by hand for that family
([tests/reference.py](../tests/reference.py)), over all its sites and layers, of the values read and of the logits after
an edit, in float64 / float32 / bfloat16 (0: bit for bit), and how many of the family's sites the engine has. The tests
hold float64 to 1e-9 and float32 to 1e-5. What is missing is refused with its reason, [below](#what-is-refused-and-why).
"""
FOOT = """
In float64, differences above 1e-9 come from parts that compute in float32 whatever the model's dtype: attention of the
bridge's own (GPT-NeoX, Phi-3, GPT-OSS), GPT-J's rotary embedding, routers. In bfloat16 attention that is written out by
hand rounds in another order, and after an edit a router may send a token to other experts. `expert_out`,
`vision_embed` and `deepstack` are held against the model's own output instead
([tests/test_moe.py](../tests/test_moe.py), [tests/test_vision.py](../tests/test_vision.py)); gradients and generation
on every engine are in [tests/test_engines.py](../tests/test_engines.py), and `interp check MODEL` runs all four uses on
a model of yours.
"""


def main(*names: str) -> None:
    """Run the battery and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = names or testing.families()
    batteries = {}
    for family in families:
        batteries[family] = {engine: [battery(family, dtype, engine) for dtype in DTYPES] for engine in ENGINES}
        print(_row(family, batteries[family]), flush=True)
    if not names:
        write(ROOT / "docs/agreement.md", "\n".join(page(batteries)) + "\n")


def page(batteries: dict[str, dict[str, list[Battery]]]) -> list[str]:
    """Lines of the page."""
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p).split('+')[0]}"
        for p in ("torch", "transformers", "nnsight", "transformer-lens")
    )
    lines = [HEAD.format(versions=versions), *_header("family")]
    lines += [_row(family, cells) for family, cells in batteries.items()]
    lines += [FOOT, "## Site by site", ""]
    lines += ["The same by site: the worst of all families, and how many of them have it.", "", *_header("site")]
    for site in SITES:
        columns = [[[b.cells.get(site) for b in cells[e]] for cells in batteries.values()] for e in ENGINES]
        if any(None not in family for column in columns for family in column):
            lines.append(f"| `{site}` | " + " | ".join(_site(column) for column in columns) + " |")
    lines += ["", *routers(), "", *sweeps(list(batteries))]
    lines += ["", "## What is refused, and why", "", *_reasons(batteries), "## What a family lacks, and why", ""]
    for name in batteries:
        lacking: dict[str, list[str]] = {}
        for site, why in ic.load(testing.tiny(name)).atlas.lacking.items():
            if not any(word in why for word in ABSENT):
                lacking.setdefault(why, []).append(f"`{site}`")
        lines += [f"- **{name}** {', '.join(sites)}: {why}" for why, sites in lacking.items()]
    return lines


def routers() -> list[str]:
    """How far executed weights are from selection by hand in the families that are described for their routers."""
    lines = ["## Further families with experts", ""]
    lines += ["Their routers are held against selection written by hand ([tests/mixtures.py](../tests/mixtures.py),"]
    lines += [
        "[tests/test_moe_families.py](../tests/test_moe_families.py)): executed weights with and without bans, what"
    ]
    lines += [
        "the experts' module is called with, sums of experts, edits and their proofs. The other sites have passed the"
    ]
    lines += ["self-check only. The largest difference of executed weights to those by hand, over all layers:", ""]
    lines += ["| family | float64 | float32 | bfloat16 | taken out by the self-check |", "|---|---|---|---|---|"]
    for family, mixture in MIXTURES.items():
        cells, model = [], None
        for dtype in DTYPES:
            try:
                model = ic.load(testing.tiny(family, dtype=dtype))
            except ic.CapabilityError:  # transformers keeps parts of it in float32
                cells.append("–")
                continue
            logits, weights = (ic.sites.named(name) for name in ("router_logits", "router_weights"))
            run = model.run(IDS, read=[site[layer] for site in (logits, weights) for layer in mixture.layers])
            apart = [
                run[weights[i]].plain.double() - routed_by_hand(family, model.hf, i, run[logits[i]].plain, IDS)
                for i in mixture.layers
            ]
            cells.append(f"{max(float(x.abs().max()) for x in apart):.0e}")
        assert model is not None
        gone = dict.fromkeys(name for (name, _), why in model.atlas.withdrawn.items() if "self-check" in why)
        shown = ", ".join(f"`{name}`" for name in gone)
        lines.append(f"| {family} | " + " | ".join(cells) + f" | {shown or '–'} |")
    lines += ["", "Families of transformers whose routers have no sites:", ""]
    reasons: dict[str, list[str]] = {}
    for family, why in UNDESCRIBED.items():
        reasons.setdefault(why, []).append(family)
    return [*lines, *(f"- **{', '.join(names)}**: {why}" for why, names in reasons.items())]


def sweeps(families: list[str]) -> list[str]:
    """How far sweeps are from one full forward pass per variant."""
    lines = [
        "## Sweeps",
        "",
        "What `model.sweep` takes by itself on engine `torch` ([strategies](sweeps.md)), and the largest",
    ]
    lines += ["difference of its scores to one full forward pass per variant, over the largest score.", ""]
    lines += ["| family | strategy | float64 | float32 | why nothing cheaper |", "|---|---|---|---|---|"]
    for family in families:
        rows = [against_full(family, dtype) for dtype in DTYPES[:2]]
        errors = " | ".join(_worst([row.error]) for row in rows)
        lines.append(f"| {family} | {rows[0].strategy} | {errors} | {rows[0].why} |")
    return lines


def _header(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(f"`{engine}`" for engine in ENGINES) + " |", "|---|---|---|---|"]


def _worst(cells: Iterable[float]) -> str:
    worst = max(cells, default=0.0)
    return f"{worst:.0e}" if worst else "0"


def _row(family: str, engines: dict[str, list[Battery]]) -> str:
    shown = []
    for batteries in engines.values():
        n = len(batteries[0].cells)
        of = n + sum(" edits" not in site for site in batteries[0].refused)
        numbers = " / ".join(_worst(max(cell) for cell in b.cells.values()) for b in batteries)
        shown.append(f"{numbers}, {n} of {of}" if n else "none")
    return f"| {family} | " + " | ".join(shown) + " |"


def _site(column: list[list[tuple[float, float] | None]]) -> str:
    having = [cells for cells in column if None not in cells]
    numbers = " / ".join(_worst(max(cells[i]) for cells in having) for i in range(len(DTYPES)))  # type: ignore[arg-type]
    return f"{numbers}, {len(having)}" if having else "·"


def _reasons(batteries: dict[str, dict[str, list[Battery]]]) -> list[str]:
    lines = []
    for engine in ENGINES:
        reasons: dict[str, dict[str, list[str]]] = {}
        for family, cells in batteries.items():
            for site, why in cells[engine][0].refused.items():
                reasons.setdefault(why.removeprefix(f"{site}: "), {}).setdefault(family, []).append(site)
        lines += [f"**{engine}**" + (":" if reasons else ": nothing."), ""]
        for why, families in reasons.items():
            who = "; ".join(f"{family} ({', '.join(sites)})" for family, sites in families.items())
            lines.append(f"- {why} — {who}")
    return [*lines, ""]


if __name__ == "__main__":
    main(*sys.argv[1:])
