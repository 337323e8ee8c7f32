"""Finding and opening models: a hub id, a local folder, a GGUF file, a toy, the real model, or a model in memory."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import gguf, real
from .architectures.unfit import class_for, encoder_decoder
from .errors import LoadError, first_line, nearest, wrong
from .placement import Placement
from .progress import Progress
from .snapshot import demand_plain
from .wrappers import unwrapped, with_its_head

TOYS = ("moe", "text", "vision")
GATED = " is gated: ask for access on its page, then run `hf auth login` or set HF_TOKEN"
OPEN_ATTENTION = ("sdpa", "eager")
_GIVE_TOKENIZER = "put a tokenizer.json that works into the folder, or in Python pass tokenizer=…"
OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Opened(NamedTuple):
    """A model with what reads its text and its images; `no_processor` says why nothing reads images."""

    model: Any
    tokenizer: Any
    processor: Any
    source: str
    no_processor: str = ""


class Files(NamedTuple):
    """Where transformers reads a model.

    Attributes:
        name: what messages call it.
        folder: a folder, or a hub id.
        options: what transformers is told of them.
        head: of a GGUF file.
    """

    name: str
    folder: str
    options: Mapping[str, Any]
    head: gguf.Header | None = None


def open_model(
    source: Any,
    placement: Placement,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Open what `ic.load` was given; see there."""
    _check_kinds(tokenizer, processor, dtype, attn_implementation, revision)
    _check_attention(attn_implementation)
    placement.check(isinstance(source, nn.Module))
    if isinstance(source, nn.Module):
        return _in_memory(source, tokenizer, processor, dtype, placement.device, attn_implementation)
    if not isinstance(source, (str, Path)) or not str(source):
        raise LoadError(wrong("load", "a hub id, a folder, a .gguf file, 'toy:text' or a Hugging Face model", source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    kinds: dict[str, Any] = {"dtype": dtype or "auto"}
    if attn_implementation is not None:
        kinds["attn_implementation"] = attn_implementation
    path = _resolved(source)
    if not gguf.is_gguf(path):
        _check_folder(path)
        if not placement.empty:
            _check_weights(Path(path))
    with Progress(f"loading {source}", 0), _files(path, options) as files, placement.options() as places:
        model = (_without_weights if placement.empty else _weights)(files, {**kinds, **places})
        model = placement.settle(model, places)
        if tokenizer is None:
            tokenizer = processor.tokenizer if processor is not None else _tokenizer(files)
        why = ""
        if processor is None and getattr(model.config, "vision_config", None) is not None:
            processor, why = _processor(files, model.config, tokenizer)
    return Opened(model.eval(), tokenizer, processor, str(source), why)


def _processor(files: Files, config: Any, tokenizer: Any) -> tuple[Any, str]:
    """The processor that comes with a model, or None and the reason."""
    folder = Path(files.folder)
    if files.head is not None:
        return None, "a .gguf file holds no image processor"
    if tokenizer is None or (folder.is_dir() and not any((folder / name).is_file() for name in OF_PROCESSORS)):
        return None, f"{files.name} has no {'tokenizer' if tokenizer is None else ' or '.join(OF_PROCESSORS)}"
    from .vision.processors import open_processor

    processor, why = open_processor(files.folder, config, tokenizer, files.options)
    if why:
        logging.getLogger(__name__).warning("%s: %s; it reads text only, or pass processor=…", files.name, why)
    return processor, why


def open_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a hub id, a folder or a toy, without its model.

    Raises:
        LoadError: there is none.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise LoadError(wrong("open_tokenizer", "a hub id, a folder or 'toy:text'", source))
    path = _resolved(source)
    if not gguf.is_gguf(path) and not Path(path).is_dir() and _looks_local(path):
        raise LoadError(f"there is no folder {path}; give a folder with a tokenizer, a hub id, or 'toy:text'")
    with _files(path, {"trust_remote_code": False}) as files:
        tokenizer = _tokenizer(files)
    if tokenizer is None:
        raise LoadError(f"{path} has no tokenizer; give a folder with tokenizer.json, a hub id, or 'toy:text'")
    return tokenizer


def open_config(source: str | Path) -> Any:
    """The config of a `config.json`, a folder (weights or none), a hub id, a .gguf file or a toy; no weights are read.

    Raises:
        LoadError: there is none, or none that transformers knows.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise LoadError(wrong("a config", "a config.json, a folder with one, a hub id or 'toy:text'", source))
    path = _resolved(source)
    if Path(path).suffix == ".json":
        if not Path(path).is_file():
            raise LoadError(f"there is no file {path}; give a config.json, a folder with one, or a hub id")
    elif not gguf.is_gguf(path):
        _check_folder(path)
    with _files(path, {"trust_remote_code": False}) as files:
        return _attempt(files, "AutoConfig")


def toy_folder(name: str) -> str:
    """Folder of a toy model of the package.

    Raises:
        LoadError: no such toy.
    """
    toy = name.removeprefix("toy:")
    if toy not in TOYS:
        raise LoadError(f"there is no toy {name!r}. {nearest(toy, TOYS)}")
    return str(resources.files("interp_core.toys").joinpath(f"data/{toy}"))


def _resolved(source: str | Path) -> str:
    """The folder, file or hub id that a name stands for. A folder of the real model's name comes before it."""
    name = str(source)
    if name.startswith("toy:"):
        return toy_folder(name)
    return real.real_model() if name == real.NAME and not Path(name).exists() else name


@contextmanager
def _files(path: str, options: Mapping[str, Any]) -> Iterator[Files]:
    """What transformers reads of a folder, a hub id or a .gguf file, which gets a folder of its own."""
    if not gguf.is_gguf(path):
        yield Files(path, path, options)
        return
    head = gguf.header(path)
    with gguf.alone(path) as folder, gguf.reading(path):
        yield Files(path, folder, {**options, "gguf_file": Path(path).name}, head)


def _weights(files: Files, options: Mapping[str, Any]) -> Any:
    """The model that files hold, all of it."""
    config = _attempt(files, "AutoConfig")
    auto = _auto(files, config)
    packed = {} if files.head is None else gguf.dequantised(config)
    model, info = _attempt(files, auto, **options, **packed, output_loading_info=True)
    if lacking := sorted(info["missing_keys"]):
        raise LoadError(
            f"the weights of {files.name} lack {', '.join(lacking[:4])}{' …' * (len(lacking) > 4)} of "
            f"{type(model).__name__}, which would be filled at random; give the checkpoint of the whole language model"
        )
    if files.head is not None:
        gguf.warn_of_what_is_left(files.name, files.head, model, info["unexpected_keys"])
        model.config.name_or_path = files.name
    return with_its_head(model)


def _without_weights(files: Files, options: Mapping[str, Any]) -> Any:
    """The modules of a model, on the meta device: from its config alone."""
    import transformers

    config = _attempt(files, "AutoConfig")
    auto = _auto(files, config)
    dtype = options["dtype"] if options["dtype"] != "auto" else config.dtype or torch.float32
    trusted = {"trust_remote_code": files.options["trust_remote_code"]}
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config, **{**options, "dtype": dtype}, **trusted)
    model.config.name_or_path = files.folder
    return with_its_head(model)


def _in_memory(
    model: Any, tokenizer: Any, processor: Any, dtype: Any, device: Any, attn_implementation: str | None
) -> Opened:
    model = unwrapped(model)
    demand_plain(model)
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise LoadError(f"{type(model).__name__} is no Hugging Face transformers model (it has no config)")
    if dtype is not None or device is not None:
        raise LoadError("a model in memory is taken as it is; call model.to(dtype=…, device=…) before load")
    if model.training:
        raise LoadError("the model is in training mode, where dropout makes runs differ; call model.eval() before load")
    if attn_implementation is not None:
        raise LoadError("a model in memory is taken as it is; call model.set_attn_implementation(…) before load")
    model = with_its_head(model)
    if tokenizer is None and processor is not None:
        tokenizer = processor.tokenizer
    return Opened(model, tokenizer, processor, getattr(model.config, "name_or_path", "") or type(model).__name__)


def _auto(files: Files, config: Any) -> str:
    """The class of transformers that opens what a config is of: a classifier with its head (with tied embeddings a
    language model would open it, too, and be another model), an encoder with its head for masked tokens, where its
    config names that, or no other.

    Raises:
        LoadError: an encoder-decoder of which no part can be opened alone.
    """
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        if any(name.endswith(f"For{kind}") for name in named):
            return f"AutoModelFor{kind}"
    causal, masked = (class_for(task, config.model_type) for task in ("CAUSAL_LM", "MASKED_LM"))
    whole = getattr(config, "is_encoder_decoder", False) and causal not in named
    if whole or (not (causal or masked) and class_for("SEQ_TO_SEQ_CAUSAL_LM", config.model_type)):
        raise LoadError(f"{files.name} {encoder_decoder(config)}")
    if hasattr(config, "vision_config"):
        return "AutoModelForImageTextToText"
    return "AutoModelForMaskedLM" if masked and (masked in named or not causal) else "AutoModelForCausalLM"


def _check_kinds(tokenizer: Any, processor: Any, dtype: Any, attn_implementation: Any, revision: Any) -> None:
    """Refuse options that transformers would stumble over later."""
    if tokenizer is not None and not all(hasattr(tokenizer, name) for name in ("decode", "convert_ids_to_tokens")):
        how = "; of a name, ic.open_tokenizer(name) opens it" if isinstance(tokenizer, (str, Path)) else ""
        raise LoadError(wrong("tokenizer=", "a tokenizer of transformers", tokenizer) + how)
    if processor is not None and not hasattr(processor, "tokenizer"):
        raise LoadError(wrong("processor=", "a processor of transformers, with its tokenizer", processor))
    named = isinstance(dtype, str) and (dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype))
    if dtype is not None and not isinstance(dtype, torch.dtype) and not named:
        raise LoadError(wrong("dtype=", "a dtype like torch.bfloat16, or 'bfloat16', 'float16', 'float32'", dtype))
    for name, value in (("attn_implementation=", attn_implementation), ("revision=", revision)):
        if value is not None and (not isinstance(value, str) or not value):
            raise LoadError(wrong(name, "a name", value))


def _check_attention(name: str | None) -> None:
    """Refuse ways to compute attention that are not installed, before anything is opened.

    Raises:
        LoadError: FlashAttention or a kernel of the hub without its package, or a name that nothing has.
    """
    if name in (None, *OPEN_ATTENTION):
        return
    from transformers import utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert name is not None
    kind, keys = name.removeprefix("paged|"), {*ALL_ATTENTION_FUNCTIONS.valid_keys(), *OPEN_ATTENTION}
    own = {key for key in keys if not key.startswith("interp_core")}
    flash = getattr(utils, f"is_{kind.replace('flash_attention', 'flash_attn')}_available", None)
    if flash is None and "/" not in kind:
        if kind not in own and name not in own:
            raise LoadError(f"there is no attn_implementation={name!r}. {nearest(name, sorted(own))}")
    elif not utils.is_kernels_available() and not (flash and flash()):  # kernels brings FlashAttention, too
        version = kind.rpartition("_")[2]
        what = f"FlashAttention {version}, which is not installed, or finds no device for it" if flash else "kernels"
        absent = "" if flash else ", a package that is not installed"
        raise LoadError(
            f"attn_implementation={name!r} needs {what}{absent}. Leave it out, or give 'sdpa' or 'eager', which need "
            "no package and have the sites inside attention."
        )


def _tokenizer(files: Files) -> Any:
    """The tokenizer that comes with a model, or None if there is none: transformers makes up an empty one."""
    path, folder = files.name, Path(files.folder)
    if files.head is not None:
        bare = "tokenizer.ggml.tokens" not in files.head.settings
    else:
        bare = folder.is_dir() and not any(_is_of_tokenizer(item.name) for item in folder.iterdir())
    if bare:
        return None
    tokenizer = _attempt(files, "AutoTokenizer")
    tokenizer.name_or_path = path
    if set(tokenizer.get_vocab()) <= set(tokenizer.added_tokens_encoder):  # made up, too
        if folder.is_dir():
            raise LoadError(
                f"{path} has no usable tokenizer (no vocabulary beside {type(tokenizer).__name__}'s settings); "
                f"{_GIVE_TOKENIZER}"
            )
        return None
    return tokenizer


def _is_of_tokenizer(name: str) -> bool:
    parts = ("tokeniz", "vocab", "merges", "tekken", "special_tokens_map", "added_tokens")
    return any(part in name for part in parts) or Path(name).suffix in (".model", ".tiktoken", ".spm", ".bpe")


def _check_weights(folder: Path) -> None:
    """Refuse a model's folder without its weights; anything else is none of this."""
    if not folder.is_dir():
        return
    _check_index(folder)
    names = sorted(item.name for item in folder.iterdir())
    if not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        raise LoadError(
            f"{folder} holds a config.json but no weights, model.safetensors or the like (it holds "
            f"{', '.join(names[:8])}); copy them there, or give the folder that has both"
        )


def _check_folder(path: str) -> None:
    """Refuse what looks like a folder but holds no model, before transformers takes it for a hub id."""
    folder = Path(path)
    if folder.is_file():
        raise LoadError(f"{path} is a file; give the folder that holds config.json and the weights, or a .gguf file")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise LoadError(
                    f"{path} holds an adapter, not a model: open its base model with transformers, put it on with "
                    "peft.PeftModel.from_pretrained(base, folder), and load that (docs/wrapped.md)"
                )
            held = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
            raise LoadError(f"{path} holds no config.json, so it is no transformers model (it holds {held})")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{path}/config.json is not JSON ({error}); copy the file again") from error
        if not isinstance(config, dict):
            raise LoadError(f"{path}/config.json holds no settings, but a {type(config).__name__}; copy the file again")
    elif _looks_local(path):
        raise LoadError(f"there is no folder {path}; give a folder, a hub id like 'Qwen/Qwen3-0.6B', or 'toy:text'")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _check_index(folder: Path) -> None:
    """Refuse lists of weights that are none, or that name files elsewhere."""
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if not index.is_file():
            continue
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise LoadError(f"{index} lists no weights ({type(error).__name__}); copy the file again") from error
        if outside := sorted(str(n) for n in names if os.path.isabs(str(n)) or os.path.normpath(str(n))[:2] == ".."):
            raise LoadError(f"{index} names weights outside of the folder ({outside[0]!r}); do not trust it")


def _attempt(files: Files, what: str, **more: Any) -> Any:
    """Let transformers load something, and say what to do when it cannot."""
    import transformers
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    path = files.name
    try:
        with _no_bars():
            return getattr(transformers, what).from_pretrained(files.folder, **files.options, **more)
    except GatedRepoError as error:
        raise LoadError(path + GATED) from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"the hub has no model {path!r}, or it is private: check the name, or log in") from error
    except SafetensorError as error:
        raise LoadError(f"the weights of {path} are damaged ({error}); download or copy them again") from error
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"the weights of {path} are pickled, and hold more than tensors or are damaged: they are not opened, since "
            "a pickle can run code. Convert them to safetensors where you trust them."
        ) from error
    except Exception as error:  # the code of others, on files of others
        attention = more.get("attn_implementation")
        also = "" if attention in (None, *OPEN_ATTENTION) else (
            f" Asked for was attn_implementation={attention!r}: leave it out, or give 'sdpa' or 'eager', which need no "
            "package and have the sites inside attention."
        )  # fmt: skip
        raise LoadError(_advice(files, what, error) + also) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bar for every model that it opens, which stands in pipes and notebooks too; downloads, by
    another library, keep theirs."""
    from transformers.utils import logging as said

    before = said.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        said.set_tqdm_hook(before)


def _advice(files: Files, what: str, error: Exception) -> str:
    path = files.name
    text = first_line(error)
    if files.head is not None:
        return gguf.cannot(path, files.head, text)
    if Path(path).is_dir():
        if what == "AutoTokenizer":
            why = "" if text.rstrip().endswith(":") else f" ({text})"  # what only announces a list says nothing
            return f"{path} has no usable tokenizer{why}; {_GIVE_TOKENIZER}"
        return f"{path} cannot be loaded as a language model: {text}"
    # transformers raises an OSError for a gated model as for a missing one: its words alone tell them apart.
    if "gated" in str(error).lower():
        return path + GATED
    if any(word in str(error).lower() for word in ("offline", "connect", "cached", "internet", "resolve")):
        return (
            f"{path} is neither a folder here nor in the local cache, and the hub cannot be reached. Download it where "
            f"there is a network (`hf download {path}`), or give a local folder."
        )
    return f"{path} cannot be loaded: {text}"
