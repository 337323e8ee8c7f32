"""A folder of artefacts that a run goes on with: every file is written whole, and kept only for the same settings."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from interp_plugins.function_vectors.artefacts import pt

import interp_core as ic
from interp_core.result import write

ARGS = "fv_eval_args.txt"
OLD = "model_fingerprint"
"""What older versions noted of a model."""
T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """Artefacts and the settings that they were made with.

    Attributes:
        path: the folder.
        args: settings, as `fv_eval_args.txt` has them.
        stages: files that a later run may keep, as patterns.
    """

    path: Path
    args: Mapping[str, Any]
    stages: Sequence[str]

    def check(self) -> None:
        """Whether this folder may be written to; changes nothing.

        Raises:
            PlanError: artefacts that this recipe did not make, or whose settings do not tell all that they depend on.
        """
        there, before = self._there(), self._before()
        if there and before is not None and OLD in before:
            raise ic.PlanError(
                f"{self.path} holds {there[0]} of an older version, which noted the first numbers of weights alone, so "
                "it is not known whether this model made it; give another out, or move it away"
            )
        if there and before is None:
            raise ic.PlanError(
                f"{self.path} holds {there[0]} but no readable {ARGS}, so it is not known what made it; give another "
                "out, or move it away"
            )

    def open(self) -> None:
        """Go on with what is there, or say what is replaced and why, and take it away."""
        before, there = self._before(), self._there()
        if before != self.args:
            if before is not None and there:
                keys = [key for key in {**before, **self.args} if before.get(key) != self.args.get(key)]
                why = ", ".join(f"{key} was {before.get(key)!r}, is {self.args.get(key)!r}" for key in keys)
                print(f"{self.path}: replaces {', '.join(there)} ({why})")
            for name in there:
                (self.path / name).unlink()
        self.write(ARGS, json.dumps(self.args, indent=2, ensure_ascii=False))

    def stage(self, name: str, read: Callable[[Path], T], make: Callable[[], T], data: Callable[[T], str | bytes]) -> T:
        """A stage's value: read from its file if that is there and whole, else made and written."""
        path = self.path / name
        if path.is_file():
            try:
                found = read(path)
                print(f"  kept {name}")
                return found
            except (ic.LoadError, ValueError) as error:
                print(f"  {name} is made again: {error}")
        value = make()
        self.write(name, data(value))
        print(f"  made {name}", flush=True)
        return value

    def tensor(self, name: str, read: Callable[[Path], torch.Tensor], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A stage that is one tensor in a `.pt` file."""
        return self.stage(name, read, make, pt)

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """A stage that is JSON; what is returned is as it is read back."""

        def read(path: Path) -> Any:
            return json.loads(path.read_text(encoding="utf-8"))

        return self.stage(name, read, lambda: json.loads(json.dumps(make())), lambda x: json.dumps(x, indent=2))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows as CSV; columns are the keys of the first."""
        text = io.StringIO()
        made = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        made.writeheader()
        made.writerows(rows)
        self.write(name, text.getvalue())

    def picture(self, name: str, draw: Callable[[Path], Any]) -> None:
        """A picture, drawn elsewhere and put here whole."""
        with TemporaryDirectory() as drawn:
            draw(Path(drawn) / name)
            self.write(name, (Path(drawn) / name).read_bytes())

    def write(self, name: str, data: str | bytes) -> None:
        """A file, whole or not at all."""
        write(self.path / name, data)

    def _there(self) -> list[str]:
        return [path.name for stage in self.stages for path in sorted(self.path.glob(stage)) if path.is_file()]

    def _before(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / ARGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
