"""What a number depends on, as digests: plain data, tensors, functions with all that they see, and models.

A digest stands for everything that can change what a value does, so that equal digests mean equal numbers. Functions
are told apart by their code, defaults, closure and the globals that they read, and so on inwards; what installed
packages and the standard library hold by name and version. What cannot be told apart is refused, never guessed.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ._version import version_of
from .architectures.parameters import is_numbers, parameter, runs_own_forward
from .errors import CapabilityError
from .tensors import digest

if TYPE_CHECKING:
    from .structure import Structure

PLAIN = (bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.layout, torch.Size)
SINGLE = (None, ..., NotImplemented)
DESCRIPTORS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)
ENGINES = {"nnsight": ("nnsight",), "transformer_lens": ("transformer-lens",)}
"""What an engine computes with beside torch."""
SLOTS = (types.GetSetDescriptorType, types.MemberDescriptorType)
INSTALLED = ("site-packages", "dist-packages")
"""Folders of packages whose code is known by their version."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
PASSING = (
    "max_seq_len_cached", "rope_deltas", "warnings_issued", "_output_capturing_hooks_installed", "_is_hf_initialized",
    "name_or_path", "hf_device_map",
)  # fmt: skip
"""Attributes of modules that passes leave behind, or that say where a model is and not what it does."""
PLACES = ("layer_idx", "layer_id", "layer_number", "idx", "number")
"""What a module calls its place among its like."""
NAMING = ("_name_or_path", "transformers_version", "architectures", "_commit_hash")


class NoIdentityError(Exception):
    """It cannot be told whether a value is the same as another; says which and why."""


@dataclass(frozen=True, repr=False)
class Keyed:
    """A function with a key that stands for it; see `keyed`."""

    fn: Callable[..., Any]
    key: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return self.key


def keyed(fn: Callable[..., Any], key: str) -> Keyed:
    """A function under a key that a sweep's folder knows it by: `S.resid_post[5].apply(ic.keyed(clamp, "clamp to 3"))`.

    A sweep with `out=` asks for one where a function uses something whose content cannot be compared. Whoever gives a
    key promises to give another when the function does something else.
    """
    return Keyed(fn, key)


def identity(value: Any) -> str:
    """Digest of everything that can change what a value does.

    Raises:
        NoIdentityError: that cannot be told.
    """
    return _Walk().of(value)


def release(package: str) -> str:
    """A package and its version."""
    version = version_of(package)
    return f"{package} {getattr(sys.modules.get(package), '__version__', '') if version is None else version}"


class _Walk:
    """One walk through a value and what it holds. `within` are the values on the way, which may hold themselves."""

    def __init__(self) -> None:
        self.within: dict[int, int] = {}

    def of(self, value: Any) -> str:
        """The digest of any value."""
        kind = type(value)
        if kind in PLAIN or any(value is single for single in SINGLE):
            return _hashed(kind.__name__, [repr(value)])
        if isinstance(value, Tensor):
            return _hashed("tensor", [_content(value)])
        if id(value) in self.within:
            # By the depth at which it was met, not by its address, which the next process does not share.
            return _hashed("itself", [str(self.within[id(value)])])
        self.within[id(value)] = len(self.within)
        try:
            return _hashed(kind.__qualname__, self._inside(value))
        finally:
            del self.within[id(value)]

    def _inside(self, value: Any) -> Iterator[str]:
        """What a value consists of."""
        if isinstance(value, Keyed):
            yield value.key
        elif isinstance(value, types.ModuleType):
            yield known(value.__name__)
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
            yield from (value.__name__, self.of(value.__self__))
        elif isinstance(value, DESCRIPTORS):
            yield from (value.__name__, self.of(value.__objclass__))
        elif isinstance(value, (staticmethod, classmethod)):
            yield self.of(value.__func__)
        elif isinstance(value, property):
            yield from map(self.of, (value.fget, value.fset))
        elif isinstance(value, nn.Module):
            yield from (self.modules(value), weights(value))
        else:
            yield self.of(type(value))
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            yield from (self.of(part) for item in value.items() for part in item)
        elif isinstance(value, (tuple, list)):
            yield from map(self.of, value)
        elif isinstance(value, (set, frozenset)):  # their order changes with the process (hash randomisation)
            yield from sorted(map(self.of, value))
        elif isinstance(value, functools.partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, enum.Enum):
            yield value.name
        elif isinstance(value, re.Pattern):
            yield repr((value.pattern, value.flags))
        elif isinstance(value, Path):
            yield str(value)
        elif type(value).__module__ == "numpy":
            if value.dtype.hasobject:
                raise NoIdentityError("it uses an array of objects, whose content cannot be compared")
            yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        elif hasattr(value, "__wrapped__"):  # functools.cache: what it remembers is no part of what it does
            yield self.of(value.__wrapped__)
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            for name in _attributes(value):
                yield from (name, self.of(getattr(value, name)))
        else:
            kind = type(value)
            raise NoIdentityError(f"it uses a {kind.__module__}.{kind.__qualname__}, whose content cannot be compared")

    def _class(self, kind: type) -> Iterator[str]:
        """A class by its place in a package, else by all that it defines."""
        yield f"{kind.__module__}:{kind.__qualname__}"
        if _is_known(kind.__module__):
            yield known(kind.__module__)
            return
        yield from map(self.of, kind.__bases__)
        for name, value in sorted(vars(kind).items()):
            # Of names with two underscores methods alone: the others are where Python keeps what it knows of the class.
            method = isinstance(value, (types.FunctionType, staticmethod, classmethod, property))
            if method or not (name.startswith(("__", "_abc_")) or isinstance(value, SLOTS)):
                yield from (name, self.of(value))

    def _function(self, fn: types.FunctionType) -> Iterator[str]:
        """A function by its place in a package, else by its code and all that this can see."""
        if _is_known(fn.__module__) and _at_home(fn):
            yield from (f"{fn.__module__}:{fn.__qualname__}", known(fn.__module__))
            return
        yield self._code(fn.__code__)
        yield from map(self.of, (fn.__defaults__, fn.__kwdefaults__))
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            yield name
            if _is_filled(cell):
                yield self.of(cell.cell_contents)
        reads, imports = _reaches(fn.__code__)
        for name in reads:
            yield name
            # A name that is nowhere yet would be an error when called, and is told apart by the name alone.
            if name in fn.__globals__ or hasattr(builtins, name):
                yield self.of(fn.__globals__.get(name, getattr(builtins, name, None)))
        yield from map(known, imports)

    def _code(self, code: types.CodeType) -> str:
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        consts = [self._code(x) if isinstance(x, types.CodeType) else self.of(x) for x in code.co_consts]
        parts = [code.co_code.hex(), code.co_exceptiontable.hex(), repr(counts), repr(names), *consts]
        # Bytecode differs between Python versions for the same source: then a sweep is worked out again, not mixed.
        return _hashed(sys.implementation.cache_tag or "code", parts)

    def modules(self, root: nn.Module) -> str:
        """What a module and those in it do with their weights: classes, settings, and what was hung on them."""
        configs: dict[int, Any] = {}
        parts: list[str] = []
        for path, module in root.named_modules():
            own = vars(module)
            if hasattr(own.get("config"), "to_dict"):
                configs[id(own["config"])] = own["config"]
            parts += [path, self.of(type(module))]
            parts += [f"{name}={value!r}" for name, value in sorted(own.items()) if _is_setting(name, value)]
            hung = [hook for kind in HOOKS for hook in own[kind].values() if not _is_noting(hook)]
            if not runs_own_forward(module):
                hung.append(own["forward"])
            if "interp_rule" in own:  # what has its attention for a while; see `engines/replace.py`
                hung.append(own["interp_rule"][1])
            parts += map(self.of, hung)
        return _hashed("modules", [*parts, *(self.of(_settings(config)) for config in configs.values())])


def _is_noting(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers notes outputs, and hangs up when it first does."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(type(item) in PLAIN for item in value)
    if type(value) is dict:
        return name not in PASSING and all(type(item) in PLAIN for pair in value.items() for item in pair)
    return name not in PASSING and (type(value) in PLAIN or value is None)


def settings_of(module: nn.Module) -> str:
    """How a module and those in it are built: classes, settings and shapes; not where it stands in a model."""
    parts, skipped = [], {*vars(nn.Module()), *PLACES} - {"training"}  # which says whether dropout acts
    for path, each in module.named_modules():
        own = [(name, x) for name, x in vars(each).items() if name not in skipped]
        kept = sorted((name, repr(x)) for name, x in own if _is_setting(name, x))
        shapes = [(name, tuple(x.shape)) for name, x in each.named_parameters(recurse=False)]
        parts.append(f"{path} {type(each).__qualname__} {kept} {shapes}")
    return "\n".join(parts)


def _settings(config: Any) -> dict[str, Any]:
    """A config without where it came from, and with which attention and experts' kernels it names."""
    # Of these `to_dict` says nothing.
    kernels = {name: getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")}
    return {key: value for key, value in config.to_dict().items() if key not in NAMING} | kernels


def _attributes(value: Any) -> list[str]:
    """Names of what an object was made with; of those that are not dataclasses all but what they keep for speed."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.init]
    cached = functools.cached_property
    return sorted(name for name in vars(value) if not isinstance(getattr(type(value), name, None), cached))


def _is_known(module: str | None) -> bool:
    """Whether a module's code is known by a version: that of Python, of this package, or of an installed one."""
    root = (module or "").partition(".")[0]
    if root == "interp_core" or (root in sys.stdlib_module_names and root != "__main__"):
        return True
    try:
        spec = importlib.util.find_spec(root) if root and root != "__main__" else None
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec is not None else []
    return any(part in INSTALLED for place in places for part in Path(place).parts)


def known(module: str) -> str:
    """The release that a module's code is known by.

    Raises:
        NoIdentityError: it is the user's own, whose code may change.
    """
    if not _is_known(module):
        raise NoIdentityError(f"it uses the module {module}, whose code may change")
    root = module.partition(".")[0]
    return f"{module} {sys.version_info[:2]}" if root in sys.stdlib_module_names else f"{module} {release(root)}"


def _at_home(fn: types.FunctionType) -> bool:
    """Whether a function is what its module has under its name."""
    value: Any = sys.modules.get(fn.__module__)
    for part in fn.__qualname__.split("."):
        value = getattr(value, part, None)
    return value is fn


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _reaches(code: types.CodeType) -> tuple[list[str], list[str]]:
    """Globals that a code reads, and modules that it imports.

    Raises:
        NoIdentityError: it also writes what is there after the call, so that one call need not be as the next.
    """
    reads: set[str] = set()
    imports: set[str] = set()
    todo = [code]
    while todo:
        each = todo.pop()
        todo += [const for const in each.co_consts if isinstance(const, types.CodeType)]
        for step in dis.get_instructions(each):
            kept = step.opname == "STORE_DEREF" and each is code and step.argval in code.co_freevars
            if kept or step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise NoIdentityError(f"it changes {step.argval}, so that one call need not be as the next")
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                reads.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                imports.add(step.argval)
    return sorted(reads), sorted(imports)


def _hashed(kind: str, parts: Iterable[str]) -> str:
    sha = hashlib.sha256(kind.encode())
    for part in parts:
        sha.update(f"\n{len(part)} {part}".encode())  # with lengths, so that ("ab", "c") is not ("a", "bc")
    return sha.hexdigest()


def _content(tensor: Tensor) -> str:
    try:
        return digest(tensor)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise NoIdentityError(f"a {type(tensor).__name__} of {tensor.device} cannot be read ({error})") from error


_KNOWN: Any = WeakTensorKeyDictionary()  # by identity: a plain weak dictionary would compare tensors number by number
"""Per tensor, what it was when its digest was worked out, and the digest."""
WORDS = 64
"""Words of eight bytes that are summed up to see whether a tensor is still the same."""


def weights(root: nn.Module) -> str:
    """Digest of every weight and buffer of a module, whole; worked out once while a tensor stays as it is.

    That a tensor does is told by its place, its version, and the sums of every few of its words: a write through
    `.data` changes no version.

    Raises:
        NoIdentityError: weights that are not here.
    """
    # A tied weight counts once; where it is offloaded, its names have an empty tensor each.
    tied = getattr(root, "all_tied_weights_keys", {})
    held = [(name, x) for name, x in root.named_parameters() if not (x.is_meta and name in tied)]
    named = [*held, *((name, x) for name, x in root.named_buffers() if not _is_passing(root, name))]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing lets other threads run
        # What is shared out is gathered, in one order by all processes.
        one_by_one = any(hasattr(x, "full_tensor") for _, x in named)
        digests = list((map if one_by_one else pool.map)(lambda item: _weight(root, *item), named))
    parts = [part for (name, _), own in zip(named, digests, strict=True) for part in (name, own)]
    return _hashed("weights", [*parts, *_packed(root, {name for name, _ in named})])


def _packed(root: nn.Module, known: Collection[str]) -> Iterator[str]:
    """Digests of what quantised layers keep beside parameters and buffers (scales, packed weights), by which they
    name it in their state."""
    for path, module in root.named_modules():
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            state: dict[str, Any] = {}
            module._save_to_state_dict(state, f"{path}.", True)
            for name, kept in state.items():
                if name not in known:
                    yield from (name, *map(_content, _tensors(name, kept)))


def _tensors(name: str, kept: Any) -> Iterator[Tensor]:
    """The tensors that a layer's state consists of, numbers among them, as tensors of numbers.

    Raises:
        NoIdentityError: it is something else.
    """
    if isinstance(kept, (tuple, list)):
        yield from (tensor for each in kept for tensor in _tensors(name, each))
    elif isinstance(kept, Tensor):
        yield kept.dequantize() if kept.is_quantized else kept
    elif isinstance(kept, (bool, int, float)):
        yield torch.tensor(kept)
    elif kept is not None and not isinstance(kept, (torch.dtype, str)):
        raise NoIdentityError(f"{name} is a {type(kept).__name__}, whose content cannot be compared")


def _weight(root: nn.Module, name: str, tensor: Tensor) -> str:
    whole = _whole(root, name, tensor)
    if whole is not tensor:
        return _content(whole)
    if not is_numbers(tensor) and hasattr(tensor, "__tensor_flatten__"):  # a library's own tensor, of several
        names, how = tensor.__tensor_flatten__()
        return _hashed("tensors", [repr(how), *(_weight(root, name, getattr(tensor, part)) for part in names)])
    version = None if tensor.is_inference() else tensor._version
    state = tensor.data_ptr(), version, tensor.shape, tensor.dtype, _sums(tensor)
    if (before := _KNOWN.get(tensor)) is None or before[0] != state:
        _KNOWN[tensor] = before = state, _content(tensor)
    return before[1]


def _sums(tensor: Tensor) -> str:
    """A digest of sums, at the speed at which memory is read."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    data = data if data.storage_offset() % 8 == 0 else data.clone()  # words of 8 bytes must begin at one
    count = len(data) // (8 * WORDS)
    words, rest = data[: count * 8 * WORDS].view(torch.int64), data[count * 8 * WORDS :]
    return digest(words.view(count, WORDS).sum(-1)) + digest(rest)


def _whole(root: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight or buffer with all its numbers, wherever it is kept.

    Raises:
        NoIdentityError: it is nowhere.
    """
    if not tensor.is_meta and not hasattr(tensor, "full_tensor"):
        return tensor
    path, _, own = name.rpartition(".")
    try:
        return parameter(root.get_submodule(path), own)
    except CapabilityError as error:
        raise NoIdentityError(f"the content of {name} is not here: {error}") from error


def _is_passing(root: nn.Module, name: str) -> bool:
    """Whether a buffer is what the last pass left: frequencies stretched to its text, beside the original ones."""
    path, _, own = name.rpartition(".")
    stretched = str(getattr(root.get_submodule(path), "rope_type", "")) in ("dynamic", "longrope")
    return stretched and "inv_freq" in own and "original" not in own


def model_parts(model: Structure) -> dict[str, str]:
    """Everything in which one model's numbers may differ from another's, short parts in words.

    Raises:
        NoIdentityError: something of it cannot be told.
    """
    hf, engine = model.engine.model, model.engine
    packages = ["interp_core", "torch", "transformers", *ENGINES.get(engine.name.partition(" ")[0], ())]
    remote = getattr(engine, "remote", False)
    return {
        "releases": ", ".join(map(release, packages)),
        "model": type(model.hf).__name__,
        "config and modules": _Walk().modules(hf),
        "weights": weights(hf),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(getattr(model.hf.config, "_attn_implementation", "")),
        "engine": f"{engine.name} at {remote}" if remote else engine.name,
        "device": model.device.type,
        "arithmetic": f"{torch.get_float32_matmul_precision()} {torch.is_autocast_enabled(model.device.type)}",
    }


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Digest of what a tokenizer makes of text: vocabulary, merges, rules, special tokens and chat template.

    How the last call padded and truncated, which fast tokenizers keep in themselves, is no part of it.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules |= {"padding": None, "truncation": None}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = str(getattr(tokenizer, "chat_template", None))
    return _hashed("tokenizer", [json.dumps(rules, sort_keys=True), json.dumps(special, sort_keys=True), template])
