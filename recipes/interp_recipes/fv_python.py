"""A recipe in another Python, as scripts ask for with `--python_bin`: same settings, other packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interp_core as ic


def ran_elsewhere(recipe: str, settings: Mapping[str, Any]) -> bool:
    """Run a recipe in the Python that its setting `python_bin` names, and wait for it; what it prints is shown. False,
    and nothing was run, if that is no other than this one.

    Raises:
        PlanError: there is no such program.
        InterpError: it failed.
    """
    named = settings["python_bin"]
    if named is None:
        return False
    program = shutil.which(str(named))
    if program is None:
        raise ic.PlanError(
            f"python_bin is {named}, which is no program; give the path of a Python that has interp-core"
        )
    python = Path(program).absolute()  # not resolved: environments link to one Python
    if python == Path(sys.executable).absolute():
        return False
    words = [str(python), "-c", "from interp_core.cli import main; main()", "run", recipe]
    for key, value in settings.items():
        if value is not None and key != "python_bin":
            words += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    sys.stdout.flush()
    code = subprocess.run(words, check=False).returncode
    if code:
        raise ic.InterpError(
            f"{recipe} ended with exit code {code} in {python}; its own message stands above. That Python needs "
            "interp-core with this recipe: leave python_bin out to run it in this one"
        )
    return True
