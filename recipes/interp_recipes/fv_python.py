"""A recipe in another Python, as scripts ask for with `--python_bin`: same settings, other packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interp_core as ic


def another(python_bin: Path | None) -> Path | None:
    """The interpreter that was asked for; None if that is the one that runs.

    Raises:
        PlanError: there is no such program.
    """
    if python_bin is None:
        return None
    found = shutil.which(str(python_bin))
    if found is None:
        raise ic.PlanError(
            f"python_bin is {python_bin}, which is no program; give the path of a Python that has interp-core"
        )
    path = Path(found).absolute()  # not resolved: environments link to one Python
    return None if path == Path(sys.executable).absolute() else path


def run_in(python: Path, recipe: str, settings: Mapping[str, Any]) -> None:
    """Run a recipe there and wait for it; what it prints is printed.

    Raises:
        InterpError: it failed.
    """
    words = [str(python), "-c", "from interp_core.cli import main; main()", "run", recipe]
    for key, value in settings.items():
        if value is not None:
            words += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    sys.stdout.flush()
    code = subprocess.run(words, check=False).returncode
    if code:
        raise ic.InterpError(
            f"{recipe} ended with exit code {code} in {python}; its own message stands above. That Python needs "
            "interp-core with this recipe: leave python_bin out to run it in this one"
        )
