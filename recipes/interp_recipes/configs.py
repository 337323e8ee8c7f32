"""Settings that several recipes have alike, stated once: a recipe's own config inherits them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from interp_plugins.pairs import Pair, read_pairs
from interp_plugins.pairs.pair import Layout

import interp_core as ic
from interp_core import runs


class DeviceConfig(ic.Config):
    """Where a model is loaded, and in which numbers.

    Attributes:
        device: of the model: cpu, cuda, cuda:1 (None: the first CUDA device, if there is one).
        dtype: of the weights (None: as stored).
    """

    device: str | None = None
    dtype: str | None = None


class PairsConfig(DeviceConfig):
    """A study of aligned pairs, two contexts that share their targets (docs/moe_pairs.md).

    Attributes:
        model_path: a folder, a hub id, or a toy; it needs no tokenizer to read pairs.
        layout: of the assisted context: packed or padded (None: as the file has it).
        max_samples: the first so many samples of the file.
        strict: the first sample that cannot be used ends the run; without it, it is left out and listed.
    """

    model_path: str
    layout: Layout | None = None
    max_samples: int | None = None
    strict: bool = False

    def load(self) -> ic.Model:
        """The model."""
        return ic.load(self.model_path, device=self.device, dtype=self.dtype)

    def read(self, path: Path, layout: Layout | None = None) -> tuple[list[Pair], list[dict[str, str]]]:
        """Pairs of a file; and `sample` and `reason` of those that were left out.

        Args:
            path: of the file.
            layout: instead of the setting.

        Raises:
            LoadError: none can be used, or one cannot and the run is strict.
        """
        dropped: list[dict[str, str]] = []
        drop = None if self.strict else partial(self.leave_out, dropped)
        pairs = read_pairs(path, layout=layout or self.layout, max_samples=self.max_samples, bad=drop)
        if not pairs:
            why = f"the first: {dropped[0]['reason']}" if dropped else "it is empty"
            raise ic.LoadError(f"{path}: no sample can be used; {why}")
        return pairs, dropped

    def leave_out(self, dropped: list[dict[str, str]], name: str, error: ic.InterpError) -> None:
        """Note and say that a sample cannot be used.

        Raises:
            InterpError: that one, if the run is strict.
        """
        if self.strict:
            raise error
        print(f"  left out {name}: {error}", file=sys.stderr)
        dropped.append({"sample": name, "reason": str(error)})


class TreeConfig(PairsConfig):
    """A study that may write into the tree of others.

    Attributes:
        out_dir: the tree for figures and tables, which several recipes may share, with the run's record beside it
            (None: a folder of the run's own, results/{model}/{dataset}/{timestamp}-{recipe}-{hash}).
        overwrite: replace files in `out_dir` that another run wrote.
    """

    out_dir: Path | None = None
    overwrite: bool = False

    def open(self, identity: Mapping[str, Any], pairs: Sequence[Pair], **about: Any) -> runs.RunFolder:
        """The run's folder.

        Args:
            identity: on what the numbers depend, beside model and pairs.
            pairs: that are used.
            about: as of `runs.open`.
        """
        resolved = {**identity, "pairs": runs.digest([pair.record() for pair in pairs])}
        if self.out_dir is None:
            return runs.open(None, resolved, **about)
        return runs.publish(self.out_dir, resolved, **about, overwrite=self.overwrite)


def words(names: Sequence[str] | str) -> list[str]:
    """Names that are given one by one, or joined by commas as the published commands take them."""
    listed = [names] if isinstance(names, str) else names
    return [word.strip() for part in listed for word in part.split(",") if word.strip()]


def balanced(devices: Iterable[int]) -> dict[str, Any]:
    """How a model is loaded over several CUDA devices: as Hugging Face balances it over all that it can see."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))  # before the first tensor goes to one of them
    return {"device_map": "balanced"}
