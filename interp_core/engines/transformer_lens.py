"""Engine `transformer_lens`: the same plan on a `TransformerBridge`.

The bridge swaps a model's modules for its own, with a `HookPoint` at every place that it names. It is built around a
copy of the model that shares the weights, so the user's own model stays as it is; the atlas' hook points move to the
bridge's hook points, and the rest is the `torch` engine's. `model.engine.bridge` is the bridge, for TransformerLens'
tools; `run.to_cache()` gives them our runs.

With `engine_options={"fold": True}` the copy has weights of its own, processed as TransformerLens does by default
(layer norms folded, writing weights and unembedding centred, value biases folded); the engine's name then says so.

What the self-check finds wrong on the bridge is refused with the reason, like everywhere.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor, nn

from ..architectures import hook_points
from ..architectures.atlas import ROUTED, Atlas, Entry
from ..architectures.family import View, split_heads
from ..architectures.hook_points import HookPoint
from ..errors import CapabilityError
from ..sites import SITES
from .copies import demand_copyable, with_same_weights
from .torch import TorchEngine, TorchProgram

_INSIDE = {"q": "q", "k": "k", "v": "v", "z": "o"}
"""The bridge's own projections, also where the family fuses them."""
_ATTENTION = {"rot_q": "hook_rot_q", "rot_k": "hook_rot_k", "scores": "hook_attn_scores", "pattern": "hook_pattern"}
_OUTSIDE = ("logits", "vision_embed", "deepstack")
"""What passes modules that the bridge does not swap."""
_NO_ROUTER = (
    "on the bridge a hook at the router sees one tensor of what the block goes on with, and an edit there does not "
    "re-route; load with engine='torch' or 'nnsight'"
)
CACHE_NAMES = {
    "embed": "hook_embed", "final_norm": "ln_final.hook_out", "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid", "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out", "mlp_out": "blocks.{}.hook_mlp_out", "mlp_act": "blocks.{}.mlp.hook_post",
    "q": "blocks.{}.attn.hook_q", "k": "blocks.{}.attn.hook_k", "v": "blocks.{}.attn.hook_v",
    "rot_q": "blocks.{}.attn.hook_rot_q", "rot_k": "blocks.{}.attn.hook_rot_k", "z": "blocks.{}.attn.hook_z",
    "scores": "blocks.{}.attn.hook_attn_scores", "pattern": "blocks.{}.attn.hook_pattern",
    "head_out": "blocks.{}.attn.hook_result",
}  # fmt: skip
"""Our sites under TransformerLens' names in an `ActivationCache`."""

_BUILDING = Lock()
"""Held while a bridge is built, for which a method of TransformerLens is another one."""
_PROCESS = nn.Module()
"""Stands for the list of warnings that are not shown, which is one for all bridges of the process."""


class BridgeProgram(TorchProgram):
    """As on the model itself. The bridge warns of edits that it discards; the self-check finds these at load."""

    def execute(self, method: str, inputs: Mapping[str, Any]) -> Any:
        """See `HookProgram.execute`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A hook on .* returned a modified tensor")
            return super().execute(method, inputs)


class BridgeEngine(TorchEngine):
    """Plans on a bridge.

    Args:
        model: a Hugging Face model; its modules are not touched.
        fold: process the weights (of an own copy) as TransformerLens does by default.

    Attributes:
        bridge: the `TransformerBridge`.

    Raises:
        CapabilityError: TransformerLens has no adapter for the model, or cannot process its weights.
    """

    name = "transformer_lens"
    program = BridgeProgram
    attends = False  # the bridge does attention by itself

    def __init__(self, model: Any, *, fold: bool = False) -> None:
        demand_copyable(model)
        inner = copy.deepcopy(model) if fold else with_same_weights(model)
        self.bridge = build_bridge(inner)
        if fold:
            self.name = "transformer_lens (weights folded)"
            _fold(self.bridge)
        super().__init__(inner, model, _PROCESS)
        # A module and what the bridge has put around it are called alike here: the outer one by name, then the inner.
        self._paths = {path.replace("._original_component", ""): path for path in reversed(self.modules)}
        self._own = {path.replace("._original_component", ""): path for path in self.modules}
        self._path_of = {id(module): path for path, module in self.modules.items()}

    def adapt(self, atlas: Atlas) -> None:
        """Move the atlas' hook points to the bridge's hook points; what has none is refused."""
        for name in ROUTED:
            if atlas.layers(name):
                atlas.drop(name, f"{name}: {_NO_ROUTER}")
        moved = {key: None if SITES[entry.name].tower else self._moved(entry) for key, entry in atlas.entries.items()}
        derived = ("resid_mid", "head_out")  # worked out from others, so after them
        for name, layer in sorted(moved, key=lambda key: key[0] in derived):
            entry = atlas.entries[name, layer]
            if name in _OUTSIDE:
                continue
            elif SITES[name].tower:  # the bridge leaves a tower's own modules as they are, in wrappers
                shared, entry.read = entry.write is entry.read, self._wrapped(entry.read)
                entry.write = entry.read if shared else self._wrapped(entry.write)
                continue
            elif name == "resid_mid":
                is_stream = entry.write is not None and entry.write.get is None  # a module gives the stream itself
                entry.read = moved[name, layer]
                entry.write = entry.read if is_stream else self._resid_mid(atlas, layer) if entry.read else None
            elif name == "head_out":
                entry.read = entry.write = self._head_out(atlas, layer)
            else:
                entry.read = entry.write = moved[name, layer]
            if entry.read is None or entry.write is None:
                del atlas.entries[name, layer]
                atlas.lacking[name] = f"TransformerLens' bridge for this family has no hook point for {name}"

    def _moved(self, entry: Entry) -> HookPoint | None:
        """A hook point at the hook point that has the site's tensor."""
        point, attention = entry.read, self._attention(entry.layer)
        assert point is not None
        if entry.name == "mixer_out" and point.get is not None:  # a sum, which no hook point of the bridge's has
            return None
        if entry.name in _ATTENTION:
            view = hook_points.transposed if entry.name.startswith("rot") else None
            return self._point(getattr(attention, _ATTENTION[entry.name], None), view)
        if entry.name in _INSIDE:
            part = getattr(attention, _INSIDE[entry.name], None)
            if entry.name == "z":
                entry.module = getattr(part, "original_component", None)
            point = getattr(part, "hook_in" if entry.name == "z" else "hook_out", None)
            return self._point(point, split_heads(entry.sizes["head"], entry.sizes["d_head"]))
        part = self.modules.get(self._paths.get(point.module, ""))
        moved = self._point(getattr(part, f"hook_{point.side}", None), point.view)
        return moved and replace(moved, layout=point.layout)

    def _wrapped(self, point: HookPoint | None) -> HookPoint | None:
        """A hook point of the model, at the path where the bridge has put that module of the model's."""
        if point is None or point.module not in self._own:
            return None
        needs = tuple(need for need in map(self._wrapped, point.needs) if need is not None)
        return replace(point, module=self._own[point.module], needs=needs)

    def _attention(self, layer: int) -> Any:
        return getattr(self.bridge.blocks[layer], "attn", None)

    def _point(self, point: Any, view: View | None) -> HookPoint | None:
        path = self._path_of.get(id(point))
        return None if path is None else HookPoint(path, "out", view=view)

    def _resid_mid(self, atlas: Atlas, layer: int) -> HookPoint | None:
        before, added = (atlas.entries.get((name, layer)) for name in ("resid_pre", "mixer_out"))
        if before is None or added is None or before.read is None or added.write is None:
            return None
        join, block = atlas.family.join, before.module
        return hook_points.resid_mid(before.read, added.write, join and block and partial(join, block, "resid_mid"))

    def _head_out(self, atlas: Atlas, layer: int) -> HookPoint | None:
        z = atlas.entries.get(("z", layer))
        point = self._point(getattr(getattr(self._attention(layer), "o", None), "hook_out", None), None)
        if z is None or z.read is None or z.module is None or point is None:
            return None
        return hook_points.head_out(z.read, point, z.module, z.sizes["head"], z.sizes["d_head"])


def build_bridge(model: Any) -> Any:
    """A bridge around a model in memory, which it changes.

    TransformerLens' own way to a bridge may install packages; this one reads nothing and installs nothing. Its check
    for packages that only its image processing needs is left out, since inputs come ready here.

    Raises:
        CapabilityError: no adapter for this class of models.
    """
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    kind = type(model).__name__
    with _BUILDING:
        check = ArchitectureAdapter._check_required_libraries
        ArchitectureAdapter._check_required_libraries = lambda self: None
        try:
            bridge = build_bridge_from_module(model, kind, hf_config=model.config)
            blocks = list(bridge.blocks)
        except Exception as error:  # adapters fail in many ways on what they do not expect
            raise CapabilityError(
                f"TransformerLens builds no bridge around a {kind} ({type(error).__name__}: {error}); load with "
                "engine='torch' or 'nnsight'"
            ) from error
        finally:
            ArchitectureAdapter._check_required_libraries = check
    for block in blocks:
        _hand_on_the_cache(getattr(block, "attn", None), "past_key_values")
        _hand_on_the_cache(getattr(block, "linear_attn", None), "cache_params")
    return bridge


def _hand_on_the_cache(attention: Any, name: str) -> None:
    """From transformers 5.24 on blocks call attention with `cache`; the bridge's own looks for it under its former
    name, and without it every later step of a generation would attend to itself alone."""
    inner = getattr(attention, "original_component", None)
    if inner is None or "cache" not in inspect.signature(inner.forward).parameters:
        return

    def under_both_names(_m: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {name: kwargs["cache"]} if "cache" in kwargs else kwargs

    def under_its_own(_m: Any, args: Any, kwargs: Any) -> Any:
        return args, {key: value for key, value in kwargs.items() if key != name}

    attention.register_forward_pre_hook(under_both_names, with_kwargs=True)
    inner.register_forward_pre_hook(under_its_own, with_kwargs=True)


def _fold(bridge: Any) -> None:
    try:
        bridge.enable_compatibility_mode(disable_warnings=True)
    except Exception as error:
        raise CapabilityError(
            f"TransformerLens cannot fold the weights of this model ({error}); load without fold"
        ) from error


def cache_of(values: Mapping[tuple[str, int], Tensor], bridge: Any) -> Any:
    """An `ActivationCache` of the values of whole sites by name (of `CACHE_NAMES`) and layer; see `Run.to_cache`.

    Args:
        bridge: what its analysis tools take weights from, or None.
    """
    from transformer_lens import ActivationCache

    cache = {CACHE_NAMES[name].format(layer): value for (name, layer), value in values.items()}
    if bridge is not None:
        cache |= _scales(values, bridge.cfg)
    return ActivationCache(cache, bridge)


def _scales(held: Mapping[tuple[str, int], Tensor], cfg: Any) -> dict[str, Tensor]:
    """What norms divide by, and learnt position embeddings, which TransformerLens' tools look for."""
    names = {"resid_pre": "blocks.{}.ln1.hook_scale", "resid_mid": "blocks.{}.ln2.hook_scale"}
    at = {names[name].format(layer): value for (name, layer), value in held.items() if name in names}
    if (last := held.get(("resid_post", cfg.n_layers - 1))) is not None:
        at["ln_final.hook_scale"] = last
    centred = str(cfg.normalization_type).startswith("LN")
    scales = {}
    for name, x in at.items():
        x = x - x.mean(-1, keepdim=True) if centred else x
        scales[name] = (x.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
    if cfg.positional_embedding_type == "standard" and ("embed", 0) in held and ("resid_pre", 0) in held:
        scales["hook_pos_embed"] = held["resid_pre", 0] - held["embed", 0]
    return scales
