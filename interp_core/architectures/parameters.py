"""Parameters of modules as numbers, wherever they are kept: the one place through which weights are read.

A model that is larger than its device has parts elsewhere. What accelerate has offloaded (`device_map`) is on the meta
device between calls of its module, and comes from the map that its hook loads it from; what transformers has shared out
between processes (tensor parallelism) is a DTensor, and is gathered, which all of them have to do together.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CapabilityError

SHARING = ("transformers.distributed.", "transformers.integrations.")
"""Where transformers' code is that shares a module's work out between processes."""
COMPILED = "_torchdynamo_orig_callable"
"""Where a compiled function has the one that it was made of."""
LENT = "_interp_lent"
"""An attribute of a causal model that runs the modules of a classifier (`wrappers.py`): that one, and by the names of
its own modules the names that they have there."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""How configs call what no logit is above."""
ROWS = 1024
"""Unit vectors or ids that go through a module at a time."""


class Weights(NamedTuple):
    """A matrix, `[in out]` or in a site's axes, or the gains of a norm; and the bias (zeros where there is none)."""

    weight: Tensor
    bias: Tensor


def layer_config(config: Any, layer: int) -> Any:
    """The config of a layer: the model's own, but where layers differ (heads, widths, windows)."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def sizes_of(config: Any, name: str) -> list[int]:
    """A setting of a model that is a number, in each layer where layers differ; [] if it has none."""
    layers = range(config.num_hidden_layers if getattr(config, "is_heterogeneous", False) else 1)
    settings = [getattr(layer_config(config, layer), name, None) for layer in layers]
    return [number for number in settings if isinstance(number, int)]


def parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter or buffer of a module, or of one in it (`"inner.weight"`), whole and where that module computes.

    Raises:
        CapabilityError: it is on the meta device, and nothing brings it.
    """
    path, _, name = name.rpartition(".")
    module = attrgetter(path)(module) if path else module
    held = getattr(module, name)
    assert isinstance(held, Tensor)
    if held.is_meta:
        kept = _kept(module)
        if kept is None:
            raise CapabilityError(
                f"the {name} of {type(module).__name__} is on the meta device, which holds no numbers, and nothing "
                "brings it: load the model with its weights"
            )
        return kept[name].to(device_of(module), held.dtype)
    gather = getattr(held, "full_tensor", None)  # a DTensor, of which this process has a part
    return held if gather is None else gather()


def bias_of(module: nn.Module) -> Tensor | None:
    """A module's bias as `parameter` gives it, None if it has none."""
    return None if getattr(module, "bias", None) is None else parameter(module, "bias")


def is_numbers(weight: Any) -> bool:
    """Whether a weight is a tensor of its numbers: not packed, nor of a library that computes in its own way."""
    own = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    return own and bool(weight.is_floating_point() or weight.is_complex())


def is_plain(module: nn.Module) -> bool:
    """Whether it is exactly torch's linear layer, or transformers' Conv1D, on a matrix of numbers."""
    from transformers.pytorch_utils import Conv1D

    known = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return known and runs_own_forward(module) and is_numbers(module.weight)


def is_special(module: nn.Module) -> bool:
    """Whether it is a linear layer of a class of its own (quantised, adapted), or on a library's kind of weights."""
    if type(module).forward is nn.Linear.forward:
        return not is_numbers(module.weight)
    # Adapters around an embedding have a width, too.
    return isinstance(getattr(module, "in_features", None), int) and not isinstance(base_of(module), nn.Embedding)


def base_of(module: nn.Module) -> nn.Module:
    """What an adapter is put around; anything else as it is."""
    inside: Any = getattr(module, "get_base_layer", None)
    return inside() if callable(inside) else module


def widths(module: nn.Module) -> tuple[int, int]:
    """How many numbers a linear module takes and gives: by its matrix where it is plain, else as it declares; packed
    weights have other shapes.

    Raises:
        CapabilityError: it does not say.
    """
    if not is_plain(module):
        inner = base_of(module)
        for layer in (module, inner):
            takes, gives = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if isinstance(takes, int) and isinstance(gives, int):
                return takes, gives
        module = inner
    weight: Any = getattr(module, "weight", None)
    if not is_numbers(weight) or weight.ndim != 2:
        raise CapabilityError(
            f"{type(module).__name__} does not say how many numbers it takes and gives (in_features, out_features), "
            "and its weights do not show it"
        )
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def declared(module: nn.Module, end: int, otherwise: int) -> int:
    """How many numbers a linear module takes (0) or gives (1); what the config says where the module does not."""
    try:
        return widths(module)[end]
    except CapabilityError:
        return otherwise


def tokens_of(head: Any, config: Any) -> int:
    """How many tokens an unembedding has (of a classifier, labels): as it declares, where its weights are packed."""
    rows = None if is_plain(head) else getattr(head, "out_features", None)
    if isinstance(rows, int):
        return rows
    weight: Any = getattr(head, "weight", None)
    return len(weight) if is_numbers(weight) else int(config.vocab_size)


@torch.no_grad()
def matrix(module: nn.Module, like: Tensor, units: Tensor | None = None) -> Weights:
    """The matrix and bias of a linear module as it computes at present.

    Args:
        like: a tensor of the dtype and on the device that the module takes.
        units: ids of inputs, whose rows alone are wanted.

    Raises:
        CapabilityError: what it computes is not linear to rounding (it rounds what it is given to fewer bits).
    """
    if is_plain(module):
        weight, added = parameter(module), bias_of(module)
        weight = weight.mT if isinstance(module, nn.Linear) else weight
        weight = weight if units is None else weight[units]
        return Weights(weight, weight.new_zeros(weight.shape[1]) if added is None else added)
    # Not by calling the module: a run's hooks, and those of others, would see it.
    weights = by_unit_vectors(module.forward, like, widths(module)[0], units)
    if weights is None:
        own = f" on a {type(module.weight).__name__}" if isinstance(getattr(module, "weight", None), Tensor) else ""
        raise CapabilityError(
            f"{module._get_name()}{own} is no linear map to the rounding of {like.dtype}: it rounds what it is given "
            "more coarsely, so that what it makes of parts does not add up to what it makes of their sum"
        )
    return weights


def by_unit_vectors(
    call: Callable[[Tensor], Tensor], like: Tensor, width: int, units: Tensor | None = None
) -> Weights | None:
    """What a linear map consists of, from what it gives: for nothing its bias, and a row of the matrix is what a unit
    vector adds to that. None if it is not linear to rounding, by what it gives for random numbers."""
    units = torch.arange(width) if units is None else units.cpu()

    def output_of(x: Tensor) -> Tensor:
        return call(x.to(like.device, like.dtype))

    zero = output_of(torch.zeros(1, width))
    rows = [output_of(nn.functional.one_hot(part, width)) - zero for part in units.split(ROWS)]
    weights = Weights(torch.cat(rows), zero[0])
    # Normal numbers, the same every time, that leave torch's own random state alone.
    x = torch.zeros(8, width)
    x[:, units] = torch.randn(8, len(units), generator=torch.Generator().manual_seed(0))
    x = x.to(like.device, like.dtype)
    x64, w64, b64 = x[:, units.to(x.device)].double(), weights.weight.double(), weights.bias.double()
    size = x64.abs() @ w64.abs() + b64.abs()
    # A sum is rounded as it grows, in float32 at least, and as it is given; and the weights are, beside the bias.
    summed = math.sqrt(width) * torch.finfo(torch.promote_types(like.dtype, torch.float32)).eps * size
    ours, once = x64 @ w64 + b64, torch.finfo(like.dtype).eps * size / math.sqrt(width)
    passed = call(x)
    slack = 8 * summed + 4 * once + 4 * torch.finfo(passed.dtype).eps * ours.abs()
    return weights if bool(((passed - ours).abs() <= slack).all()) else None


def without_gradient(model: nn.Module, dtype: torch.dtype) -> str:
    """The first linear layer of a model whose output autograd does not follow back to its input, as kernels on packed
    weights may have it: a gradient would end there, or go on by other ways alone. "" if there is none."""
    for path, module in model.named_modules():
        width, place = getattr(module, "in_features", 0), device_of(module)
        if not is_special(module) or place.type == "meta":
            continue
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kernels of which this is to find out
            x = torch.linspace(-1, 1, width, dtype=dtype, device=place)[None].requires_grad_()
            if not _takes(module, x):  # rows of another shape: groups of features, say
                continue
            try:
                (followed,) = torch.autograd.grad(module.forward(x).sum(), x, allow_unused=True)
            except (TypeError, AttributeError):  # it gives more than one tensor: experts, a router
                continue
            except RuntimeError:
                followed = None
        if followed is None or not followed.any():
            return f"{path} ({module._get_name()})"
    return ""


def _takes(module: nn.Module, x: Tensor) -> bool:
    """Whether a module can be called with rows of so many features."""
    try:
        with torch.no_grad():
            module.forward(x.detach())
    except (RuntimeError, TypeError, AttributeError):
        return False
    return True


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these modules that has parameters computes: where they are, or will be when it is called."""
    for part in (part for module in modules for part in module.modules()):
        for held in (*part._parameters.values(), *part._buffers.values()):
            if held is not None:
                return _execution_device(part) if held.is_meta else held.device
    return torch.device("cpu")


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a module computes what its class says, with nobody's function in the place of its forward: that of
    accelerate brings its weights, that of transformers' tensor parallelism shares its work out, that of torch's
    compiler is made of it, and all then call it.
    """
    forward = vars(module).get("forward")
    while forward is not None:
        if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
            forward = vars(module).get("_old_forward")
        elif hasattr(forward, COMPILED):
            forward = getattr(forward, COMPILED)
        elif is_shared(module) and getattr(forward, "__name__", "") in ("tp_forward", "ep_forward"):
            forward = _free(forward).get("original_forward")
        else:
            return getattr(forward, "__func__", None) is type(module).forward
    return True


class Sharing(NamedTuple):
    """How transformers shares a module's work out: the style, which says how tensors come and go, and the processes."""

    style: Any
    mesh: Any


def sharing(module: nn.Module) -> Sharing | None:
    """How a module's work is shared out, None if it is not, or in a way that is not known here."""
    free = _free(vars(module)["forward"]) if is_shared(module) else {}
    mesh = free.get("mesh", free.get("ep_mesh"))
    return Sharing(free["self"], mesh) if "self" in free and mesh is not None else None


def _free(function: Any) -> dict[str, Any]:
    """What a function has of the one that made it, by name."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def is_shared(module: nn.Module) -> bool:
    """Whether transformers has put a function in the place of a module's forward that shares its work out."""
    forward = vars(module).get("forward")
    return str(getattr(forward, "__module__", "")).startswith(SHARING)


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate has given a module its place, and brings what it needs there."""
    return "_hf_hook" in vars(module)


def _hook(module: nn.Module) -> Any:
    """Accelerate's hook of a module that moves its weights, or None."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])  # several in a row are one
    return next((hook for hook in hooks if getattr(hook, "execution_device", None) is not None), None)


def _kept(module: nn.Module) -> Any:
    """What accelerate loads a module's weights from, by name; None if it does not."""
    return getattr(_hook(module), "weights_map", None)


def _execution_device(module: nn.Module) -> torch.device:
    place = getattr(_hook(module), "execution_device", "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
