"""What mixes tokens in a block: attention, linear attention, a state space model, a recurrence, a convolution.

Its ends are `mixer_in` and `mixer_out` in every layer of every family, and `attn_in` and `attn_out` besides where it is
attention and nothing else. Mixers that are no softmax attention may have a gate: a projection that multiplies what they
put out, as a module of its own or a part of what the input is projected to. (Softmax attention with a gate has `z`
after it.) A law of the tests holds for each: where a gate is far below zero, the mixer gives nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

from . import hook_points
from .family import View
from .hook_points import HookPoint
from .parameters import widths

NAMES = ("mamba", "conv", "mixer", "temporal_block", "mlstm_layer")
"""What transformers calls modules that mix tokens and are no attention. A block's mixer is its attention, or else the
first of these that it has."""
GATES = ("in_proj_z", "g_proj", "g_b_proj", "ogate_preact", "linear_y", "output_gate", "receptance")
"""What transformers calls projections that are a gate and nothing else, as they are called in linear attention, xLSTM,
RecurrentGemma, MiniMax and RWKV."""


def mixer_of(block: str, parts: Mapping[str, str], modules: Container[str]) -> str | None:
    """The path of what mixes tokens in a block, of the block's path and those of its components."""
    paths = (path for name in NAMES if (path := f"{block}.{name}") in modules and path != parts.get("mlp"))
    return parts.get("mixer") or parts.get("attn") or parts.get("linear_attn") or next(paths, None)


def mixer_ends(block: Any) -> None:
    """`mixer_in`, `mixer_out`, of attention `attn_in` and `attn_out` too, and `resid_mid` after it."""
    mixer, stack = block.parts.get("mixer"), block.stack
    if mixer is None:
        return
    out = block.addition("attn_out", block.parts.get("ln1_post", mixer))
    into = block.placed("attn_in", stack.point(mixer, "in"))
    if "attn" in block.parts or "linear_attn" in block.parts:
        block.view("attn_in", into, block.d_model)
        block.view("attn_out", out, block.d_model)
    if stack.text:
        out = _mixer_ends(block, into, out)
    if not stack.parallel:
        _between(block, out)


def _mixer_ends(block: Any, into: HookPoint, out: HookPoint) -> HookPoint:
    """What the block's mixers read and add, of which attention may be one; the hook point of what they add."""
    out = block.whole("attn_out", out)
    block.view("mixer_in", block.placed("mixer_in", into), block.d_model)
    block.view("mixer_out", out, block.d_model)
    return out


def _between(block: Any, attn_out: HookPoint) -> None:
    """The stream between mixer and MLP. What a module gives is the stream itself; what a module reads is a use of it
    beside others, so there changes go in by `attn_out`."""
    parts, family = block.parts, block.stack.family
    module = parts.get("ln2", parts.get("mlp"))
    if "resid_mid" not in block.stack.places and (module is None or "mlp" not in parts):
        return
    point = block.placed("resid_mid", block.stack.point(str(module), "in"))
    if point.side == "out":
        block.view("resid_mid", point, block.d_model)
        return
    why = {"grad": "the stream also goes on past the module where it is read"} if point.layout else {}
    join = partial(family.join, block.module, "resid_mid") if family.join else None
    write = hook_points.resid_mid(block.stack.point(block.path, "in"), attn_out, join)
    block.add("resid_mid", point, write, block.d_model, why)


def gate(block: Any) -> None:
    """`mixer_gate`, of mixers that are no softmax attention."""
    mixer, modules, entries = block.parts.get("mixer"), block.stack.modules, block.stack.atlas.entries
    beside = block.stack.family.beside.get("attn_out")
    if beside:
        mixer = f"{block.path}.{beside}"
    elif mixer is None or (mixer == block.parts.get("attn") and ("z", block.layer) in entries):
        return
    _gate(block, mixer, modules)
    if beside and (entry := entries.get(("mixer_gate", block.layer))):  # it is called before attention
        entry.order = entries["mixer_in", block.layer].order + 0.5


def _gate(block: Any, mixer: str, modules: Mapping[str, Any]) -> None:
    for name in GATES:
        if (path := f"{mixer}.{name}") in modules:
            block.view("mixer_gate", block.stack.point(path, "out"), {"d_mixer": widths(modules[path])[1]})
            return
    into, out = f"{mixer}.in_proj", modules.get(f"{mixer}.out_proj")
    if into in modules and out is not None:
        width = widths(out)[0]
        if view := _part(modules[mixer], widths(modules[into])[1], width):
            block.view("mixer_gate", block.stack.point(into, "out", view=view), {"d_mixer": width})


def _part(mixer: Any, projected: int, width: int) -> View | None:
    """Where the gate lies in what a mixer projects its input to."""
    if hasattr(mixer, "conv") and projected == 3 * width:  # LFM2: gate of the input, gate of the output, input
        return lambda x: x[..., width : 2 * width]
    if projected == 2 * width and hasattr(mixer, "n_mamba_heads"):  # Zamba: input and gate by turns
        return lambda x: x[..., 1::2]
    if projected == 2 * width:  # Mamba: input, gate
        return lambda x: x[..., width:]
    if hasattr(mixer, "A_log") and hasattr(mixer, "conv1d"):  # Mamba-2: gate, input with B and C, steps
        return lambda x: x[..., :width]
    return None


def recurrent_gemma_state(block: Any) -> None:
    """`ssm_state` of RecurrentGemma, whose unit gives its state after every position, and nothing else."""
    path = "temporal_block.rg_lru"
    if hasattr(block.module.temporal_block, "rg_lru"):
        width = int(block.module.temporal_block.lru_width)
        why = {"write": "it is only read: the unit has already gone on from it; edit mixer_in or mixer_gate"}
        block.add("ssm_state", block.point(path, "out"), None, {"d_state": width}, why)


def state_reason(name: str, recurrent: bool) -> str:
    """Why a family has no `ssm_state`."""
    if not recurrent:
        return f"no layer of this {name} keeps a state beside keys and values"
    return f"the state of this {name} stays inside its scan: no module takes or gives it in a pass without a cache"
