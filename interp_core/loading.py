"""Finding and opening models: a hub id, a local folder, a toy of the package, or a model in memory."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import LoadError, nearest

TOYS = ("text",)


class Opened(NamedTuple):
    """A model with what reads its text."""

    model: Any
    tokenizer: Any
    processor: Any
    source: str


def open_model(
    source: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Open what `ic.load` was given; see there."""
    if device is not None and device_map is not None:
        raise LoadError("give device or device_map, not both")
    if isinstance(source, nn.Module):
        return _in_memory(source, tokenizer, processor, dtype, device, attn_implementation)
    if not isinstance(source, (str, Path)):
        raise LoadError(
            f"load takes a hub id, a folder, 'toy:text' or a Hugging Face model, not {type(source).__name__}"
        )
    path = toy_folder(str(source)) if str(source).startswith("toy:") else str(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    _check_folder(path)
    config = _attempt(path, "config", options)
    kinds = {"dtype": dtype or "auto", "device_map": device_map, "attn_implementation": attn_implementation}
    options_model = options | {key: value for key, value in kinds.items() if value is not None}
    auto = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    model = _attempt(path, auto, options_model)
    if device_map is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = tokenizer or _attempt(path, "AutoTokenizer", options)
    return Opened(model.eval(), tokenizer, processor, str(source))


def open_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a hub id, a folder or a toy, without its model.

    Raises:
        LoadError: there is none.
    """
    path = toy_folder(str(source)) if str(source).startswith("toy:") else str(source)
    if not Path(path).is_dir() and (path.startswith(("/", "./", "../", "~")) or path.count("/") > 1):
        raise LoadError(f"there is no folder {path}; give a folder with a tokenizer, a hub id, or 'toy:text'")
    return _attempt(path, "AutoTokenizer", {"trust_remote_code": False})


def toy_folder(name: str) -> str:
    """Folder of a toy model of the package.

    Raises:
        LoadError: no such toy.
    """
    toy = name.removeprefix("toy:")
    if toy not in TOYS:
        raise LoadError(f"there is no toy {name!r}. {nearest(toy, TOYS)}")
    return str(resources.files("interp_core.toys").joinpath(f"data/{toy}"))


def _in_memory(
    model: Any, tokenizer: Any, processor: Any, dtype: Any, device: Any, attn_implementation: str | None
) -> Opened:
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise LoadError(f"{type(model).__name__} is no Hugging Face transformers model (it has no config)")
    if model.get_output_embeddings() is None:
        raise LoadError(
            f"{type(model).__name__} has no output embeddings; pass the model with its language modelling head, "
            f"such as {type(model).__name__.removesuffix('Model')}ForCausalLM"
        )
    if dtype is not None or device is not None:
        raise LoadError("a model in memory is taken as it is; call model.to(dtype=…, device=…) before load")
    if model.training:
        raise LoadError("the model is in training mode, where dropout makes runs differ; call model.eval() before load")
    if attn_implementation is not None:
        raise LoadError("a model in memory is taken as it is; call model.set_attn_implementation(…) before load")
    if tokenizer is None and processor is not None:
        tokenizer = processor.tokenizer
    return Opened(model, tokenizer, processor, getattr(model.config, "name_or_path", "") or type(model).__name__)


def _check_folder(path: str) -> None:
    """Refuse what looks like a folder but holds no model, before transformers takes it for a hub id."""
    folder = Path(path)
    if folder.is_file():
        raise LoadError(f"{path} is a file; give the folder that holds config.json and the weights")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            held = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
            raise LoadError(f"{path} holds no config.json, so it is no transformers model (it holds {held})")
        try:
            json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise LoadError(f"{path}/config.json is not JSON ({error}); copy the file again") from error
    elif path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise LoadError(f"there is no folder {path}; give a folder, a hub id like 'Qwen/Qwen3-0.6B', or 'toy:text'")


def _attempt(path: str, what: str, options: dict[str, Any]) -> Any:
    """Let transformers load something, and say what to do when it cannot."""
    import transformers
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from safetensors import SafetensorError

    try:
        if what == "config":
            return transformers.AutoConfig.from_pretrained(path, **options)
        return getattr(transformers, what).from_pretrained(path, **options)
    except GatedRepoError as error:
        raise LoadError(
            f"{path} is gated: ask for access on its page, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"the hub has no model {path!r}, or it is private: check the name, or log in") from error
    except SafetensorError as error:
        raise LoadError(f"the weights of {path} are damaged ({error}); download or copy them again") from error
    except (OSError, HfHubHTTPError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise LoadError(_advice(path, what, error)) from error


def _advice(path: str, what: str, error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(path).is_dir():
        if what == "AutoTokenizer":
            return f"{path} has no usable tokenizer ({text}); pass tokenizer=…, or add tokenizer.json to the folder"
        return f"{path} cannot be loaded as a language model: {text}"
    if "gated" in str(error).lower():
        return f"{path} is gated: ask for access on its page, then run `hf auth login` or set HF_TOKEN"
    if any(word in str(error).lower() for word in ("offline", "connect", "cached", "internet", "resolve")):
        return (
            f"{path} is neither a folder here nor in the local cache, and the hub cannot be reached. Download it where "
            f"there is a network (`hf download {path}`), or give a local folder."
        )
    return f"{path} cannot be loaded: {text}"
