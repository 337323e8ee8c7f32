"""Hand-written hooks, family by family: what a careful person would write without interp_core.

Nothing here uses the atlas, the taps or the engine; the module names are written out. `reads` gives the values of all
sites of a forward pass, `edited` the logits after one value was changed by a function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]

_LLAMA = {
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "attn": "self_attn",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "mlp": "mlp", "down": "mlp.down_proj", "mid": "post_attention_layernorm",
    "attn_out": "self_attn", "mlp_out": "mlp",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "mid": "pre_feedforward_layernorm", "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm",
}  # fmt: skip
_GPT = {
    "embed": "transformer.wte", "blocks": "transformer.h", "norm": "transformer.ln_f", "attn": "attn", "mlp": "mlp",
    "attn_out": "attn", "mlp_out": "mlp",
}  # fmt: skip
LAYOUT: dict[str, dict[str, str]] = {
    "gpt2": _GPT | {"qkv": "attn.c_attn", "o": "attn.c_proj", "down": "mlp.c_proj", "mid": "ln_2"},
    "gptj": _GPT | {
        "q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj", "down": "mlp.fc_out",
        "pattern": "attn.attn_dropout",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in", "blocks": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm",
        "attn": "attention", "qkv": "attention.query_key_value", "o": "attention.dense", "mlp": "mlp",
        "down": "mlp.dense_4h_to_h", "attn_out": "attention", "mlp_out": "mlp",
    },
    "phi3": {k: v for k, v in _LLAMA.items() if k not in "qkv"} | {"qkv": "self_attn.qkv_proj"},
    "gemma2": _GEMMA, "gemma3": _GEMMA,
    "olmo2": _LLAMA | {"mid": "mlp", "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "qwen3_moe": _LLAMA | {"router": "mlp.gate"},
    "qwen3_vl": _LLAMA | {
        "embed": "model.language_model.embed_tokens", "blocks": "model.language_model.layers",
        "norm": "model.language_model.norm",
    },
} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA)  # fmt: skip
ATTENTION = ("rot_q", "rot_k", "scores", "pattern")


class Reference:
    """A tiny model of one family, in eager attention, with hooks written by hand."""

    def __init__(self, family: str, hf: nn.Module) -> None:
        self.family, self.hf, self.layout = family, hf, LAYOUT[family]
        config = hf.config.get_text_config()
        self.n_layers = config.num_hidden_layers
        self.n_heads = config.num_attention_heads
        self.n_kv = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads

    # Where things are

    def sites(self) -> list[str]:
        """Sites that this family has."""
        names = ["embed", "resid_pre", "attn_in", "q", "k", "v", "z", "head_out", "attn_out", "mlp_in", "mlp_out"]
        names += ["resid_post", "final_norm", "logits", "pattern", "mlp_act"]
        if "mid" in self.layout:
            names.append("resid_mid")
        if self.family not in ("gptj",):
            names.append("scores")
        if self.family not in ("gptj", "gpt2"):
            names += ["rot_q", "rot_k"]
        if "router" in self.layout:
            names += ["router_logits", "router_weights"]
        return names

    def layers(self, site: str) -> list[int]:
        """Layers that have the site."""
        if site in ("embed", "final_norm", "logits"):
            return [0]
        everywhere = list(range(self.n_layers))
        if self.family == "qwen3_moe":  # layer 1 is dense, the others are mixtures
            dense = [1]
            return (
                [i for i in everywhere if i not in dense]
                if "router" in site
                else dense
                if site == "mlp_act"
                else everywhere
            )
        return everywhere

    def module(self, key: str, layer: int) -> nn.Module:
        block = f"{self.layout['blocks']}.{layer}"
        return self.hf.get_submodule(f"{block}.{self.layout[key]}" if key else block)

    def split(self, x: Tensor, part: str) -> Tensor:
        """q, k or v `[batch pos head d_head]` out of what a projection returned."""
        b, s, _ = x.shape
        if "qkv" not in self.layout:
            return x.reshape(b, s, -1, self.d_head)
        index = "qkv".index(part)
        if self.family == "gpt_neox":
            return x.reshape(b, s, self.n_heads, 3, self.d_head)[:, :, :, index]
        sizes = [self.n_heads * self.d_head, self.n_kv * self.d_head, self.n_kv * self.d_head]
        return x.split(sizes, -1)[index].reshape(b, s, -1, self.d_head)

    def joined(self, x: Tensor, part: str, new: Tensor) -> Tensor:
        """What the projection would have to return for q, k or v to be `new`."""
        if "qkv" not in self.layout:
            return new.reshape(x.shape)
        parts = {name: new if name == part else self.split(x, name) for name in "qkv"}
        if self.family == "gpt_neox":
            return torch.stack([parts[name] for name in "qkv"], 3).reshape(x.shape)
        return torch.cat([parts[name].flatten(2) for name in "qkv"], -1)

    # Hooks

    @contextmanager
    def hooked(self, site: str, layer: int, fn: Change) -> Iterator[None]:
        """`fn` sees and replaces the site's value."""
        with self._context(site, layer, fn):
            yield

    def _context(self, site: str, layer: int, fn: Change) -> Any:
        heads = (self.n_heads, self.d_head)
        if site in ATTENTION and not (site == "pattern" and "pattern" in self.layout):
            return self._attention(layer, site, fn)
        if site == "pattern":
            return _output(self.module("pattern", layer), fn)
        if site in ("embed", "final_norm"):
            return _output(self.hf.get_submodule(self.layout["embed" if site == "embed" else "norm"]), fn)
        if site == "logits":
            return _logits(self.hf, fn)
        if site == "resid_pre":
            return _input(self.module("", layer), fn)
        if site == "resid_post":
            return _output(self.module("", layer), fn)
        if site in ("attn_in", "mlp_in"):
            return _input(self.module(site.removesuffix("_in"), layer), fn)
        if site in ("attn_out", "mlp_out"):
            return _output(self.module(site, layer), fn)
        if site == "mlp_act":
            return _input(self.module("down", layer), fn)
        if site == "resid_mid":
            return self._mid(layer, fn)
        if site == "z":
            return _input(self.module("o", layer), lambda x: fn(x.unflatten(-1, heads)).flatten(-2))
        if site == "head_out":
            return self._head_out(layer, fn)
        if site in ("router_logits", "router_weights"):
            return self._router(layer, site, fn)
        return _output(
            self.module("qkv" if "qkv" in self.layout else site, layer),
            lambda x: self.joined(x, site, fn(self.split(x, site))),
        )

    @contextmanager
    def _mid(self, layer: int, fn: Change) -> Iterator[None]:
        """The stream after attention lives in a local variable: change what attention adds to it."""
        start: list[Tensor] = []

        def remember(x: Tensor) -> Tensor:
            start[:] = [x]
            return x

        with (
            _input(self.module("", layer), remember),
            _output(self.module("attn_out", layer), lambda x: fn(start[0] + x) - start[0]),
        ):
            yield

    @contextmanager
    def _head_out(self, layer: int, fn: Change) -> Iterator[None]:
        module = self.module("o", layer)
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
    def _router(self, layer: int, site: str, fn: Change) -> Iterator[None]:
        module = self.module("router", layer)

        def hook(m: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits, weights, chosen = output
            if site == "router_logits":
                logits = fn(logits.reshape(self.shape[0], self.shape[1], -1)).reshape(logits.shape)
                best = torch.sort(torch.softmax(logits.float(), -1), descending=True)
                chosen, weights = best.indices[:, : m.top_k], best.values[:, : m.top_k]
                weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
            else:
                dense = torch.zeros_like(logits)
                for token in range(len(dense)):
                    dense[token, chosen[token]] = weights[token]
                dense = fn(dense.reshape(self.shape[0], self.shape[1], -1)).reshape(dense.shape)
                weights = torch.stack([dense[token, chosen[token]] for token in range(len(dense))])
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

        def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
            if module is not attn:
                return original(module, q, k, v, mask, scaling=scaling, **rest)
            if part == "rot_q":
                q = fn(q.transpose(1, 2)).transpose(1, 2)
            if part == "rot_k":
                k = fn(k.transpose(1, 2)).transpose(1, 2)
            group = q.shape[1] // k.shape[1]
            heads = [h // group for h in range(q.shape[1])]
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k[:, heads]) * scaling
            if rest.get("softcap"):
                scores = rest["softcap"] * torch.tanh(scores / rest["softcap"])
            scores = scores + mask
            if part == "scores":
                scores = fn(scores)
            pattern = scores.softmax(-1, dtype=torch.float32 if half else None).to(q.dtype)
            if part == "pattern":
                pattern = fn(pattern)
            return torch.einsum("bhqk,bhkd->bqhd", pattern, v[:, heads]), pattern

        home.eager_attention_forward = by_hand
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
        return held[0]

    def logits(self, site: str, layer: int, inputs: dict[str, Tensor], fn: Change) -> Tensor:
        """Logits of a forward pass in which `fn` changed one site."""
        self.shape = inputs["input_ids"].shape
        with torch.no_grad(), self.hooked(site, layer, fn):
            return self.hf(**inputs, use_cache=False).logits


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
def _output(module: nn.Module, fn: Change) -> Iterator[None]:
    def hook(_m: nn.Module, _args: Any, output: Any) -> Any:
        return (fn(output[0]), *output[1:]) if isinstance(output, tuple) else fn(output)

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
