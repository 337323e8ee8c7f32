"""`benchmarks/gpu.py` on a CPU, in small: every part reports and compares, with the few packages that it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = ("sweeps", "synchronisations", "memory", "streams", "environment")
LONG = ("parity", "overhead", "knockout", "compiled", "generation")
NEED_A_DEVICE = ("synchronisations", "memory")
BARE = """
import importlib.abc, importlib.metadata, runpy, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nnsight", "transformer_lens", "httpx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
installed = importlib.metadata.distributions
importlib.metadata.distributions = lambda **kw: (d for d in installed(**kw) if d.name not in ("interp-core", "interp_core"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where this package is not installed, nor are the libraries of its other engines."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", BARE, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=env, check=False)


def reported(parts: tuple[str, ...], out: Path) -> None:
    """Run parts and hold what the page says against what they must have done."""
    done = run("--device", "cpu", "--small", "--out", str(out), *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    page = out.read_text()
    counts = {part: (int(n), int(bad)) for part, n, bad in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", page, re.M)}
    assert tuple(counts) == parts
    assert all(failed == 0 for _, failed in counts.values())
    assert {part for part, (compared, _) in counts.items() if not compared} == {*parts} & {*NEED_A_DEVICE}
    sections = dict(zip(parts, page.split("\n## ")[1:], strict=True))
    assert all(section.startswith(part) and "- " in section for part, section in sections.items())
    for part in {*parts} & {*NEED_A_DEVICE}:
        assert "no device" in sections[part]
    assert f"{sum(n for n, _ in counts.values())} comparisons in {len(parts)} parts, 0 failed" in done.stdout


def test_parts_report_and_compare_without_a_device(tmp_path: Path) -> None:
    reported(SHORT, tmp_path / "gpu.md")


@pytest.mark.slow
def test_long_parts_report_and_compare(tmp_path: Path) -> None:
    reported(LONG, tmp_path / "gpu.md")


def test_a_part_that_fails_is_counted_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    def breaks(bench: gpu.Bench) -> None:
        bench.hold("first", True)
        raise RuntimeError("broken")

    def endless(bench: gpu.Bench) -> None:
        while True:
            pass

    def holds(bench: gpu.Bench) -> None:
        bench.hold("second", True, 25)

    monkeypatch.setattr(gpu, "PARTS", {"breaks": (breaks, 1.0), "endless": (endless, 0.001), "holds": (holds, 1.0)})
    bench = gpu.Bench("cpu", small=True)
    for name in gpu.PARTS:
        gpu.run_part(bench, name, minutes=1.0)
    assert bench.compared == {"breaks": 1, "endless": 0, "holds": 25}
    assert bench.failed == {"breaks": 1, "endless": 1, "holds": 0}
    assert any("cut off" in text for part, text in bench.lines if part == "endless")
