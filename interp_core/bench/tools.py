"""The tools of the benchmark that need nothing else: the model as it is, hooks by hand, and interp_core.

A tool's methods are the benchmark's operations; one that it has not is not measured.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import sites as S
from ..errors import PlanError, nearest

if TYPE_CHECKING:
    from ..model import Model

NEW_TOKENS = 32


class Tool:
    """What all tools know: the model, the ids, and where its parts are."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        self.model, self.ids, self.hf = model, ids, model.hf
        self.layers = range(model.n_layers)
        self.layer = model.n_layers // 2
        self.head = 0
        entry = model.atlas.entries["z", self.layer]
        self.shape = (entry.sizes["head"], entry.sizes["d_head"])
        self.vector = torch.ones(model.atlas.shape.d_model, dtype=model.dtype, device=model.device)
        self.masked = torch.ones_like(ids)
        self.settings = {
            "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
            "temperature": None, "top_p": None, "top_k": None,
        }  # fmt: skip

    def path(self, site: str, layer: int) -> str:
        """Module at which a site is read."""
        tap = self.model.atlas.entries[site, layer].read
        assert tap is not None
        return tap.module

    def module(self, site: str, layer: int) -> nn.Module:
        return self.hf.get_submodule(self.path(site, layer))


class Bare(Tool):
    """The model as it is."""

    def plain(self) -> Any:
        return self.hf(input_ids=self.ids, use_cache=False).logits

    def generate(self) -> Any:
        return self.hf.generate(input_ids=self.ids, attention_mask=self.masked, **self.settings)


class ByHand(Tool):
    """What a careful person writes: hooks for just this, removed in any case."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        self.blocks = [self.module("resid_post", i) for i in self.layers]
        self.outputs = [self.module("z", i) for i in self.layers]
        self.eager: Any = None

    def _run(self, hooks: list[tuple[nn.Module, str, Any]], call: Any = None) -> Any:
        handles = []
        try:
            for module, kind, hook in hooks:
                register = module.register_forward_hook if kind == "out" else module.register_forward_pre_hook
                handles.append(register(hook))
            with torch.no_grad():
                return self.hf(input_ids=self.ids, use_cache=False).logits if call is None else call()
        finally:
            for handle in handles:
                handle.remove()

    def resid(self) -> Any:
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_m: nn.Module, _args: Any, output: Any) -> None:
                kept[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        return self._run([(block, "out", keep(i)) for i, block in enumerate(self.blocks)]), kept

    def z(self) -> Any:
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_m: nn.Module, args: Any) -> None:
                kept[layer] = args[0]

            return hook

        return self._run([(module, "in", keep(i)) for i, module in enumerate(self.outputs)]), kept

    def pattern(self) -> Any:
        """transformers' own way: eager attention in every layer."""
        if self.eager is None:
            self.eager = copy.deepcopy(self.hf)
            self.eager.set_attn_implementation("eager")
        with torch.no_grad():
            out = self.eager(input_ids=self.ids, use_cache=False, output_attentions=True)
        return out.logits, out.attentions

    def ablate(self) -> Any:
        heads, width = self.shape

        def hook(_m: nn.Module, args: Any) -> Any:
            x = args[0].clone()
            x.view(*x.shape[:2], heads, width)[:, :, self.head] = 0
            return (x, *args[1:])

        return self._run([(self.outputs[self.layer], "in", hook)])

    def patch(self) -> Any:
        def hook(_m: nn.Module, _args: Any, output: Any) -> Any:
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, -1] = self.vector
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return self._run([(self.blocks[self.layer], "out", hook)])

    def generate(self) -> Any:
        def hook(_m: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + self.vector, *output[1:])
            return output + self.vector

        call = lambda: self.hf.generate(input_ids=self.ids, attention_mask=self.masked, **self.settings)  # noqa: E731
        return self._run([(self.blocks[self.layer], "out", hook)], call)


class Ours(Tool):
    """interp_core, through its ordinary calls."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        self.tokens = model.input({"input_ids": ids.cpu()})
        self.everything = [S.named(name) for name in model.sites if name != "expert_out"]
        self.edits = {
            "ablate": S.z[self.layer, self.head].zero(),
            "patch": S.resid_post[self.layer].at(-1).set(self.vector),
            "generate": S.resid_post[self.layer].add(self.vector),
        }

    def plain(self) -> Any:
        return self.model.run(self.tokens).logits

    def _read(self, sites: Any) -> Any:
        run = self.model.run(self.tokens, read=sites)
        return run.logits, run._passed.values

    def resid(self) -> Any:
        return self._read(S.resid_post)

    def z(self) -> Any:
        return self._read(S.z)

    def pattern(self) -> Any:
        return self._read(S.pattern)

    def cache(self) -> Any:
        return self._read(self.everything)

    def ablate(self) -> Any:
        return self.model.run(self.tokens, edits=self.edits["ablate"]).logits

    def patch(self) -> Any:
        return self.model.run(self.tokens, edits=self.edits["patch"]).logits

    def generate(self) -> Any:
        generation = self.model.generate(
            self.tokens, edits=self.edits["generate"], max_new_tokens=NEW_TOKENS, stop_at_eos=False
        )
        return generation.ids


TOOLS: dict[str, Callable[[Model, Tensor], Tool]] = {"bare": Bare, "by hand": ByHand, "interp_core": Ours}
"""The wheel's own; `benchmarks/peers.py` holds other packages' tools beside them."""


def ready(
    tools: Mapping[str, Callable[[Model, Tensor], Tool]], model: Model, ids: Tensor, only: Sequence[str] | None = None
) -> dict[str, Tool]:
    """The tools, made ready for a model; `bare` is always among them, since the others are held against it.

    Raises:
        PlanError: a name that is no tool.
    """
    for name in only or ():
        if name not in tools:
            raise PlanError(f"no tool {name!r} in the benchmark. {nearest(name, tools)}")
    kinds = {name: kind for name, kind in tools.items() if only is None or name in only or name == "bare"}
    with warnings.catch_warnings():  # what other packages warn of while they wrap a model is not what is measured
        warnings.simplefilter("ignore")
        return {name: kind(model, ids) for name, kind in kinds.items()}
