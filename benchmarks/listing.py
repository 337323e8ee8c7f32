"""How long it takes to list plugins: `python benchmarks/listing.py [distributions of 5 plugins each]`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

CODE = """
import time
start = time.perf_counter()
from interp_core.plugins import KINDS, registry
imported = time.perf_counter()
rows = [row for kind in KINDS for row in registry(kind)]
listed = time.perf_counter()
import sys
assert "torch" not in sys.modules
print(len(rows), 1e3 * (imported - start), 1e3 * (listed - imported))
"""
KINDS = ("methods", "recipes", "engines", "architectures", "launchers")


def install(folder: Path, name: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: interp-core>=0.1\n"
    )
    points = (f"[interp_core.{kind}]\n{name}_{kind} = {name}:X\n" for kind in KINDS)
    (info / "entry_points.txt").write_text("".join(points))


def main(distributions: int = 10, rounds: int = 9) -> None:
    with tempfile.TemporaryDirectory() as name:
        for i in range(distributions):
            install(Path(name), f"pack{i}")
        run = [sys.executable, "-c", CODE]
        lines = [
            subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONPATH": name}).stdout.split()
            for _ in range(rounds)
        ]
    imports, lists = (median(float(line[i]) for line in lines) for i in (1, 2))
    of_others = f"{lines[0][0]} plugins ({5 * distributions} of others)"
    print(f"{of_others}: listed in {lists:.1f} ms, after {imports:.1f} ms of import")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
