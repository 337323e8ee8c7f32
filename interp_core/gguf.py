"""GGUF files, the format of llama.cpp: one file holds weights, mostly quantised, with tokenizer and chat template.

transformers reads them, with the package `gguf`: weights are dequantised, so that what runs is a plain model whose
weights are the numbers that the file's blocks stand for. It leaves some of a file aside without a word; that is warned
about here.
"""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from .errors import LoadError, nearest
from .progress import Progress


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        settings: its metadata; of lists of strings only the lengths.
        tensors: names of what it holds.
    """

    settings: Mapping[str, Any]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the family."""
        return str(self.settings["general.architecture"])


def is_gguf(path: str) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.lower().endswith(".gguf") and not Path(path).is_dir()


def header(path: str) -> Header:
    """The file's head, read in milliseconds.

    Raises:
        LoadError: no file, no GGUF file, or nothing installed that reads one.
    """
    if not Path(path).is_file():
        raise LoadError(f"there is no file {path}; give the path of a .gguf file, a folder, or a hub id")
    if lacking := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise LoadError(
            f"{path} is a GGUF file, which transformers reads with the package {' and '.join(lacking)}: "
            f"pip install {' '.join(lacking)} (or interp-core[real])"
        )
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        settings, tensors = read_gguf_metadata(path)
    except (OSError, ValueError, OverflowError, MemoryError, struct.error) as error:
        raise LoadError(f"{path} is no readable GGUF file ({error}); download or copy it again") from error
    return Header(settings, tuple(tensors))


@contextmanager
def alone(path: str) -> Iterator[str]:
    """A folder that holds nothing but this file: transformers would take the tokenizer of another model beside it."""
    with TemporaryDirectory(prefix="interp-gguf-") as folder:
        (Path(folder) / Path(path).name).symlink_to(Path(path).resolve())
        yield folder


def reading(path: str) -> Progress:
    """What is said if reading takes long."""
    size = Path(path).stat().st_size / 1e6
    said = f"{path}: reading and dequantising {size:,.0f} MB, each time that it is opened (docs/real_model.md: once)"
    return Progress(said, 0)


def dequantised(config: Any) -> dict[str, Any]:
    """Options with which transformers gives a plain model: no packed weights, which could not be edited or saved."""
    from transformers import GgufConfig

    return {"config": config, "quantization_config": GgufConfig(dequantize=True)}


def warn_of_what_is_left(path: str, head: Header, model: Any, unexpected: Iterable[str]) -> None:
    """Warn if the model computes without something that the file holds."""
    left = sorted({*unexpected, *_without_place(head, model)})
    scaling = head.settings.get(f"{head.architecture}.rope.scaling.type", "none")
    if scaling != "none" and _plain_rotary(model.config):
        left.append(f"{head.architecture}.rope.scaling ({scaling})")
    if left:
        warnings.warn(
            f"transformers leaves out of {path}: {', '.join(left[:6])}{' …' * (len(left) > 6)}. Its numbers may differ "
            "from llama.cpp's and from the original model's; for these, load the original weights (safetensors)",
            stacklevel=5,  # where `load` is called
        )


def cannot(path: str, head: Header, error: str) -> str:
    """The message for a file that transformers does not read."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted({*GGUF_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    others = "" if head.architecture in known else f" {nearest(head.architecture, known, len(known))}"
    return (
        f"transformers cannot read {path}, architecture {head.architecture!r}: {error.rstrip('.')}.{others} Download "
        "or copy it again if it may be damaged; else load the model's original weights (safetensors), or pass "
        "tokenizer=… if only its vocabulary is the matter"
    )


def _without_place(head: Header, model: Any) -> list[str]:
    """Tensors that transformers' older reader, which drops them, knows no parameter for."""
    from transformers.integrations.gguf import GGUF_ARCHS

    if head.architecture in GGUF_ARCHS:  # the newer reader reports them by itself
        return []
    from transformers import modeling_gguf_pytorch_utils as reader

    kind = reader.TENSOR_PROCESSORS.get(head.architecture, reader.TensorProcessor)
    known = reader.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    # Experts are known without their suffix.
    return [n for n in head.tensors if n not in known and n.removesuffix(".weight") not in known]


def _plain_rotary(config: Any) -> bool:
    rotary = getattr(config, "rope_parameters", None) or {}
    return bool(rotary.get("rope_type", "default") == "default")
