"""Where a model's weights are to be: on a device, on several and on disk, in several processes, or on a server."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import LoadError, first_line, wrong


@dataclass(frozen=True)
class Placement:
    """Where `ic.load` was told to have the weights; see there.

    Attributes:
        elsewhere: plans run on another machine, so that the device "meta" holds all that is needed here.
    """

    device: Any = None
    device_map: Any = None
    offload_folder: Any = None
    tp_plan: Any = None
    elsewhere: bool = False

    @property
    def empty(self) -> bool:
        """Whether no weights are read."""
        return self.elsewhere and str(self.device) == "meta"

    def check(self, in_memory: bool) -> None:
        """Refuse places that do not go together, or that transformers would stumble over later.

        Raises:
            LoadError: saying which.
        """
        places = {"device": self.device, "device_map": self.device_map, "tp_plan": self.tp_plan}
        named = [name for name, place in places.items() if place is not None]
        if len(named) > 1:
            raise LoadError(f"give {' or '.join(named)}, not both")
        kinds = (str, int, Mapping, torch.device)
        if self.device_map is not None and not isinstance(self.device_map, kinds):
            raise LoadError(wrong("device_map=", "'auto', a device, or a device per module", self.device_map))
        folder = self.offload_folder
        if folder is not None and (not isinstance(folder, (str, Path)) or self.device_map is None):
            raise LoadError(wrong("offload_folder=", "a folder, beside device_map=", folder))
        plan, config = self.tp_plan, type(self.tp_plan).__name__ == "DistributedConfig"
        if plan is not None and plan != "auto" and not isinstance(plan, Mapping) and not config:
            raise LoadError(wrong("tp_plan=", "'auto', a style per module, or transformers' DistributedConfig", plan))
        if in_memory and named and named != ["device"]:
            raise LoadError(f"a model in memory is taken as it is; have transformers load it with {named[0]}=")
        if not in_memory and not self.empty:
            self._device()  # before weights are read, which may take minutes

    @contextmanager
    def options(self) -> Iterator[dict[str, Any]]:
        """What transformers is told of it, while it loads. Weights on disk that are not as the model's own files have
        them need a folder; one that is made here goes when the model does (see `settle`), or now if none came of it."""
        options: dict[str, Any] = {}
        if self.tp_plan is not None:
            options["distributed_config"] = _shared_out(self.tp_plan)
        if self.device_map is None:
            yield options
            return
        own = "" if self.offload_folder is not None else tempfile.mkdtemp(prefix="interp-offload-")
        options |= {"device_map": self.device_map, "offload_folder": own or str(self.offload_folder)}
        try:
            yield options
        except BaseException:
            shutil.rmtree(own or "no folder", ignore_errors=True)
            raise

    def settle(self, model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """A model that was loaded with these options, where it is to be."""
        if self.device_map is not None and self.offload_folder is None:
            weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
        if self.empty or self.device_map is not None or self.tp_plan is not None:  # its parts are placed
            return model
        return model.to(self._device())

    def _device(self) -> torch.device:
        """The device, if it is there.

        Raises:
            LoadError: no device of that name, or none here.
        """
        device = self.device
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            raise LoadError(wrong("device=", "a device like 'cpu' or 'cuda:0'", device))
        try:
            checked = torch.device(device)
            torch.empty(0, device=checked)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            have = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
            raise LoadError(
                f"there is no device {device!r} ({first_line(error)}): this PyTorch, {torch.__version__}, sees {have}. "
                "Leave device out for the best that is there, or give 'cpu'."
            ) from error
        if checked.type == "meta":
            raise LoadError(
                "device='meta' holds no weights, which is enough for plans that run elsewhere alone (engine='nnsight', "
                "engine_options={'remote': True}); give 'cpu', a CUDA device, or a device_map"
            )
        return checked


def _shared_out(tp_plan: Any) -> Any:
    """What transformers is told of a model that the processes of this run share.

    Raises:
        LoadError: this is a process by itself.
    """
    from torch import distributed
    from transformers.distributed import DistributedConfig

    if not distributed.is_available() or not (distributed.is_initialized() or "WORLD_SIZE" in os.environ):
        raise LoadError(
            "tp_plan= shares the model out between several processes, and this is one by itself: start all of them "
            "with `torchrun --nproc-per-node N script.py`, or give device_map='auto' for one process on several devices"
        )
    if isinstance(tp_plan, DistributedConfig):
        return tp_plan
    ways = distributed.get_world_size() if distributed.is_initialized() else int(os.environ["WORLD_SIZE"])
    return DistributedConfig(tp_plan=tp_plan if tp_plan == "auto" else dict(tp_plan), tp_size=ways)
