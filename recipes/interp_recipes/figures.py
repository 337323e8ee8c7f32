"""Charts as files of a run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from interp_core import report


def png_bytes(chart: report.Chart) -> bytes:
    """A chart's picture, for a run that puts several files at once; `RunFolder.figure` writes one."""
    with TemporaryDirectory() as folder:
        return chart.png(Path(folder) / "figure.png").read_bytes()
