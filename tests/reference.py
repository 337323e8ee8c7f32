"""Hand-written hooks, family by family: what a careful person would write without interp_core.

Nothing here uses the atlas, the taps or the engine; the module names are written out. `reads` gives the values of all
sites of a forward pass, `edited` the logits after one value was changed by a function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from attention_by_hand import OWN, UPCAST, by_hand
from hybrid_layouts import ADDED, BESIDE, BIASES, CALLED_ALIKE, FACTORS, KEPT, OTHERWISE, STATES
from layouts import OWN_ATTENTION
from projected import Projected
from routed import route
from torch import Tensor, nn
from type_layouts import (
    DENSE,
    GATES,
    KIN,
    LACKS,
    LAYOUT,
    LINEAR,
    MIXED_VALUES,
    MIXERS,
    SCALES,
    SOME,
)
from visual_layouts import AROUND

Change = Callable[[Tensor], Tensor]

ATTENTION = ("rot_q", "rot_k", "scores", "pattern")


class Reference(Projected):
    """A tiny model of one family, in eager attention, with hooks written by hand."""

    def __init__(self, family: str, hf: nn.Module) -> None:
        self.hf, self.layout = hf, LAYOUT[family]
        family = self.family = AROUND.get(family, (family, ""))[0]
        self.kin = KIN.get(family, family)
        if family in OTHERWISE:
            self.layout = self.layout | OTHERWISE[family](hf.config.get_text_config())
        self.n_layers = len(hf.get_submodule(self.layout["blocks"]))
        self.at(0)
        self.scale = SCALES[family](hf.config.get_text_config()) if family in SCALES else 1.0

    # Where things are

    def sites(self) -> list[str]:
        """Sites that this family has."""
        names = ["embed", "resid_pre", "attn_in", "q", "k", "v", "z", "head_out", "attn_out", "mlp_in", "mlp_out"]
        names += ["resid_post", "final_norm", "logits", "pattern", "mlp_act", "resid_mid", "scores", "rot_q", "rot_k"]
        if "router" in self.layout:
            names += ["router_logits", "router_weights"]
        names += ["mixer_in", "mixer_out", *(["mixer_gate"] if self.family in GATES else [])]
        names += ["ssm_state"] if self.family in STATES else []
        settings = self.hf.config.get_text_config().to_dict()
        serial = {settings.get("use_parallel_residual"), settings.get("parallel_attn")} <= {False, None}
        there = {"resid_mid"} if serial and self.family in ("falcon", "gpt_neox") else set()
        return [name for name in names if name in there or name not in LACKS.get(self.family, ())]

    def layers(self, site: str) -> list[int]:
        """Layers that have the site."""
        if site in ("embed", "final_norm", "logits"):
            return [0]
        everywhere = list(range(self.n_layers))
        if site in ("mixer_gate", "ssm_state"):
            return [*MIXERS.get(self.family, LINEAR.get(self.family, everywhere))]
        if site in SOME.get(self.family, ()):
            return SOME[self.family][site]
        if site == "mlp_act":
            return DENSE.get(self.family, everywhere)
        if "router" in site:
            return [i for i in everywhere if i not in DENSE[self.family]]
        if site in (*ATTENTION, "q", "k", "v", "z", "head_out"):
            everywhere = [i for i in everywhere if i not in LINEAR.get(self.family, ())]
        if site in (*ATTENTION, "q", "k", "v", "z", "head_out", "attn_in", "attn_out") and self.family not in BESIDE:
            return [i for i in everywhere if i not in MIXERS.get(self.family, ())]
        return everywhere

    def module(self, key: str, layer: int) -> nn.Module:
        """A module of a block ("": the block), or what mixes tokens there, attention or not ("mixer")."""
        block, of_layers = f"{self.layout['blocks']}.{layer}", MIXERS.get(self.family, {})
        if key == "beside":
            return self.hf.get_submodule(f"{block}.{BESIDE[self.family][0]}")
        if key == "mixer" and self.family not in BESIDE and layer in of_layers:
            return self.hf.get_submodule(f"{block}.{of_layers[layer]}")
        name = self.layout["attn" if key == "mixer" else key] if key else ""
        if layer in LINEAR.get(self.family, ()) and name == "self_attn" and self.family not in CALLED_ALIKE:
            name = "linear_attn"
        return self.hf.get_submodule(f"{block}.{name}" if name else block)

    def adding(self, site: str, layer: int) -> nn.Module:
        """The module that gives what attention (another mixer too) or the MLP adds, before the block's factor."""
        usual = self.layout.get(site, self.layout["attn"])
        name = ADDED.get(self.family, {}).get(layer, {}).get(site, usual)
        if name == self.layout["attn"]:
            return self.module("mixer", layer)
        return self.hf.get_submodule(f"{self.layout['blocks']}.{layer}.{name}")

    def factor(self, site: str, layer: int) -> float | Tensor:
        """What the block multiplies that by."""
        if self.family in FACTORS:
            return FACTORS[self.family](self.module("", layer), site)
        return self.scale

    # Hooks

    @contextmanager
    def hooked(self, site: str, layer: int, fn: Change) -> Iterator[None]:
        """`fn` sees and replaces the site's value."""
        with self._context(site, layer, fn):
            yield

    def _context(self, site: str, layer: int, fn: Change) -> Any:
        self.at(layer)
        heads = (self.n_heads, self.d_head)
        if site == "v" and self.family in MIXED_VALUES:
            return self._attention(layer, site, fn)
        own = self.family in OWN and (self.family != "gptj" or "gptj" in OWN_ATTENTION)
        if site in ATTENTION and (own or (self.family in UPCAST and self.hf.config.reorder_and_upcast_attn)):
            return by_hand(self, layer, site, fn)
        if site in ATTENTION:
            return self._attention(layer, site, fn)
        if site in ("embed", "final_norm"):
            return _output(self.hf.get_submodule(self.layout["embed" if site == "embed" else "norm"]), fn)
        if site == "logits":
            return _logits(self.hf, fn)
        if site == "resid_pre":
            return _input(self.module("", layer), fn)
        if site == "resid_post":
            return _output(self.module("", layer), fn)
        if site == "mixer_gate":
            path, part = GATES[self.family]
            mixer = self.module("beside" if self.family in BESIDE else "mixer", layer)
            return _output(mixer.get_submodule(path), lambda x: _written(x, part, fn))
        if site == "ssm_state":
            return _output(self.module("", layer).get_submodule(STATES[self.family]), fn)
        if site in ("attn_in", "mixer_in") and (key := next((k for k in (site, "reads") if k in self.layout), "")):
            return _output(self.module(key, layer), fn)
        if site == "mlp_in" and "mlp_reads" in self.layout:
            return _output(self.module("mlp_reads", layer), fn)
        if site in ("attn_in", "mixer_in", "mlp_in"):
            key = "mlp" if site == "mlp_in" else "attn" if site == "attn_in" and layer in self.layers("q") else "mixer"
            return _input(self.module(key, layer), self._shaped(fn))
        if site in ("attn_out", "mixer_out"):
            return self._mixed(layer, lambda added, _start: fn(added))
        if site == "mlp_out" and "mlp_beside" in self.layout:
            return self._both(layer, fn)
        if site == "mlp_out":
            factor = self.factor(site, layer)
            return _output(self.adding(site, layer), self._shaped(lambda x: fn(x * factor) / factor))
        if site == "mlp_act":
            return _input(self.module("down", layer), self._shaped(fn))
        if site == "resid_mid" and "mid_out" in self.layout:
            return _output(self.module("mid_out", layer), fn)
        if site == "resid_mid":
            kept = partial(KEPT[self.family], self.module("", layer)) if self.family in KEPT else lambda x: x
            return self._mixed(layer, lambda added, start: fn(kept(start) + added) - kept(start))
        if site in ("q", "z") and "slots" in self.layout:
            return self._of_slots(layer, site, fn)
        if site == "z":
            return _input(self.module("o", layer), lambda x: fn(x.reshape(*x.shape[:2], *heads)).reshape(x.shape))
        if site == "head_out":
            return self._head_out(layer, fn)
        if site in ("router_logits", "router_weights"):
            return self._router(layer, site, fn)
        return _output(
            self.module("qkv" if "qkv" in self.layout else site, layer),
            lambda x: self.joined(x, site, fn(self.split(x, site))),
            part=1 if self.family == "zaya" and site == "k" else 0,
        )

    def _shaped(self, fn: Change) -> Change:
        """The same for modules that see batch and pos as one axis."""
        return lambda x: fn(x) if x.ndim > 2 else fn(x.reshape(*self.shape, -1)).reshape(x.shape)

    @contextmanager
    def _both(self, layer: int, fn: Change) -> Iterator[None]:
        """The MLP's output with that of a module that runs before it beside it: change the MLP's."""
        given: list[Tensor] = []

        def remember(x: Tensor) -> Tensor:
            given[:] = [x]
            return x

        with (
            _output(self.module("mlp_beside", layer), remember),
            _output(self.module("mlp_out", layer), lambda x: fn((given[0] + x) * self.scale) / self.scale - given[0]),
        ):
            yield

    @contextmanager
    def _mixed(self, layer: int, fn: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """`fn` changes what attention or another mixer adds, given that and the stream before: the stream after it lives
        in a local variable, and what adds a second part beside goes first."""
        factor, block = self.factor("attn_out", layer), self.module("", layer)
        seen: dict[str, Any] = {"beside": BIASES[self.family](block) if self.family in BIASES else 0.0}

        def into(added: Tensor) -> Tensor:
            whole = added * factor + seen["beside"]
            return added + (fn(whole, seen["start"]) - whole) / factor

        with ExitStack() as stack:
            stack.enter_context(_input(block, lambda x: _kept(seen, "start", x)))
            if self.family in BESIDE:
                times = BESIDE[self.family][1](block)
                stack.enter_context(
                    _output(self.module("beside", layer), lambda x: _kept(seen, "beside", x * times, x))
                )
            stack.enter_context(_output(self.adding("attn_out", layer), self._shaped(into)))
            yield

    @contextmanager
    def _head_out(self, layer: int, fn: Change) -> Iterator[None]:
        module = self.module("o", layer)
        if "o_last" in self.layout:
            with self._grouped(layer, fn):
                yield
            return
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight

        def hook(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = args[0].unflatten(-1, (self.n_heads, self.d_head))
            parts = torch.stack(
                [z[:, :, h] @ weight[h * self.d_head : (h + 1) * self.d_head] for h in range(self.n_heads)], 2
            )
            return output + (fn(parts) - parts).sum(2)

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _of_slots(self, layer: int, site: str, fn: Change) -> Iterator[None]:
        """Each slot of a token has heads of its own, in rows sorted by expert."""
        experts, order = self.module("slots", layer), list[int]()

        def sent(_m: nn.Module, _args: Any, output: Any) -> None:
            order[:] = output[0].tolist()

        def changed(rows: Tensor) -> Tensor:
            slots = torch.stack([rows[order.index(i)] for i in range(len(order))])
            slots = fn(slots.reshape(*self.shape, self.n_heads, -1)).reshape(rows.shape)
            return torch.stack([slots[i] for i in order])

        handle = experts.router.register_forward_hook(sent)
        into = _output(experts.input_linear, changed) if site == "q" else _input(experts.output_linear, changed)
        try:
            with into:
                yield
        finally:
            handle.remove()

    @contextmanager
    def _grouped(self, layer: int, fn: Change) -> Iterator[None]:
        """Heads are projected in groups, and what comes of these together."""
        first, last, z = self.module("o", layer), self.module("o_last", layer), list[Tensor]()
        size, rank, d = self.n_heads // first.n_groups, first.out_features // first.n_groups, self.d_head

        def head(h: int) -> Tensor:
            group, place = divmod(h, size)
            rows = slice(group * rank, (group + 1) * rank)
            low = z[0][:, :, group, place * d : (place + 1) * d] @ first.weight[rows, place * d : (place + 1) * d].T
            return low @ last.weight[:, rows].T

        def added(x: Tensor) -> Tensor:
            parts = torch.stack([head(h) for h in range(self.n_heads)], 2)
            return x + (fn(parts) - parts).sum(2)

        with _input(first, lambda x: z.append(x) or x), _output(last, added):
            yield

    @contextmanager
    def _router(self, layer: int, site: str, fn: Change) -> Iterator[None]:
        module = self.module("router", layer)

        config, inputs = self.hf.config.get_text_config(), self.kin == "llama4"

        def batched(x: Tensor) -> Tensor:
            return fn(x.reshape(*self.shape, -1)).reshape(x.shape)

        def hook(m: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if inputs:  # dense weights on the experts' inputs
                weights, logits = output
                if site == "router_weights":
                    return batched(weights), logits
                logits = batched(logits)
                return route(self.kin, config, m, logits), logits
            logits, weights, chosen = output
            if site == "router_logits":
                logits = batched(logits)
                dense = route(self.kin, config, m, logits)
                chosen = torch.stack([(row != 0).nonzero()[:, 0] for row in dense])
            else:
                dense = weights.new_zeros(logits.shape)
                for token in range(len(dense)):
                    dense[token, chosen[token]] = weights[token]
                dense = batched(dense)
            weights = torch.stack([dense[token, chosen[token]] for token in range(len(dense))]).to(weights.dtype)
            return logits, weights, chosen

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _attention(self, layer: int, part: str, fn: Change) -> Iterator[None]:
        """Replace the family's eager attention function by one that shows its steps in one layer."""
        attn = self.module("attn", layer)
        home = sys.modules[type(attn).__module__]
        original = home.eager_attention_forward
        half = "float32" in original.__code__.co_names

        def instead(module: nn.Module, *args: Any, **rest: Any) -> Any:
            return (by_hand if module is attn else original)(module, *args, **rest)

        def by_hand(
            _m: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, scaling: float | None = None, **rest: Any
        ) -> Any:
            scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
            mask = rest.get("attention_mask", mask)
            if part == "v":
                v = fn(v.transpose(1, 2)).transpose(1, 2)
            if part == "rot_q":
                q = fn(q.transpose(1, 2)).transpose(1, 2)
            if part == "rot_k":
                k = fn(k.transpose(1, 2)).transpose(1, 2)
            group = q.shape[1] // k.shape[1]
            heads = [h // group for h in range(q.shape[1])]
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k[:, heads]) * scaling
            if rest.get("softcap"):
                scores = rest["softcap"] * torch.tanh(scores / rest["softcap"])
            if rest.get("position_bias") is not None:
                scores = scores + rest["position_bias"]
            scores = scores if mask is None else scores + mask
            if part == "scores":
                scores = fn(scores)
            sink = rest.get("sinks")  # for each query
            if rest.get("s_aux") is not None:  # for all of them
                sink = rest["s_aux"].reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            if sink is not None:
                pattern = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
            else:
                pattern = scores.softmax(-1, dtype=torch.float32 if half else None).to(q.dtype)
            if part == "pattern":
                pattern = fn(pattern)
            return torch.einsum("bhqk,bhkd->bqhd", pattern, v[:, heads]).contiguous(), pattern

        home.eager_attention_forward = instead
        try:
            yield
        finally:
            home.eager_attention_forward = original

    # What comes out

    def value(self, site: str, layer: int, inputs: dict[str, Tensor]) -> Tensor:
        """The value of one site."""
        held: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            held.append(x.clone())
            return x

        self.logits(site, layer, inputs, keep)
        return held[-1]  # NanoChat norms embeddings by its final norm too

    def logits(self, site: str, layer: int, inputs: dict[str, Tensor], fn: Change) -> Tensor:
        """Logits of a forward pass in which `fn` changed one site."""
        self.shape = inputs["input_ids"].shape
        with torch.no_grad(), self.hooked(site, layer, fn):
            return self.hf(**inputs, use_cache=False).logits


def _kept(seen: dict[str, Any], name: str, x: Tensor, passed: Tensor | None = None) -> Tensor:
    """Remember a tensor where it passes (or what is made of it)."""
    seen[name] = x
    return x if passed is None else passed


def _written(x: Tensor, part: Callable[[Tensor], Tensor], fn: Change) -> Tensor:
    """A tensor whose part, a view of it, `fn` has changed."""
    x = x.clone()
    view = part(x)
    view.copy_(fn(view.clone()))
    return x


@contextmanager
def _input(module: nn.Module, fn: Change) -> Iterator[None]:
    def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _output(module: nn.Module, fn: Change, part: int = 0) -> Iterator[None]:
    def hook(_m: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, (tuple, list)):
            return fn(output)
        return type(output)((*output[:part], fn(output[part]), *output[part + 1 :]))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _logits(module: nn.Module, fn: Change) -> Iterator[None]:
    def hook(_m: nn.Module, _args: Any, output: Any) -> None:
        output.logits = fn(output.logits)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
