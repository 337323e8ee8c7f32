"""Writes docs/compatibility.md: python scripts/compatibility.py

Every family, every site, read and edited in every layer, against hooks written by hand (tests/reference.py): the
largest absolute difference of the values read and of the logits after an edit.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

import interp_core as ic
from interp_core import testing
from interp_core.result import write
from interp_core.sites import SITES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
HEAD = """# Compatibility

Written by `python scripts/compatibility.py` ({versions}). Random-weight models of each family, 3 layers, d_model 64.

Each cell is the largest absolute difference to hooks written by hand for that family
([tests/reference.py](../tests/reference.py)), over all layers, of the value read and of the logits after an edit, for
float64 / float32 (0: bit for bit). The tests hold them to 1e-9 and 1e-5. `·` means that the family does not have the
site; the reason is what an error says, and is listed below the table.
"""


def main() -> None:
    """Run the battery and write the page."""
    from parity import battery

    torch.set_num_threads(1)
    names = testing.families()
    cells = {name: [battery(name, dtype) for dtype in (torch.float64, torch.float32)] for name in names}
    lacking = {name: ic.load(testing.tiny(name)).atlas.lacking for name in names}
    versions = ", ".join(f"{p} {importlib.metadata.version(p).split('+')[0]}" for p in ("torch", "transformers"))
    lines = [HEAD.format(versions=versions), "| site | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for site in SITES:
        row = []
        for name in names:
            found = [battery.get(site) for battery in cells[name]]
            row.append(
                "·"
                if found[0] is None or found[1] is None
                else " / ".join(f"{max(c):.0e}" if max(c) else "0" for c in found if c)
            )
        if any(cell != "·" for cell in row):
            lines.append(f"| `{site}` | " + " | ".join(row) + " |")
    lines += ["", "`expert_out` is held against the MoE block's own output instead (tests/test_moe.py).", ""]
    lines += ["## What a family lacks, and why", ""]
    for name in names:
        reasons: dict[str, list[str]] = {}
        for site, why in lacking[name].items():
            reasons.setdefault(why, []).append(f"`{site}`")
        lines += [f"- **{name}** {', '.join(sites)}: {why}" for why, sites in reasons.items()]
    write(ROOT / "docs/compatibility.md", "\n".join(lines) + "\n")
    worst = [max(max(cell) for battery in column for cell in battery.values()) for column in cells.values()]
    print(f"{len(names)} families, largest difference {max(worst):.1e} -> docs/compatibility.md")


if __name__ == "__main__":
    main()
