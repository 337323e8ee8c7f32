"""The tools of the benchmark, each doing the same operations on its own copy of the model where it changes it."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import sites as S
from ..engines.nnsight.base import library
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
        made = self.model.generate(
            self.tokens, edits=self.edits["generate"], max_new_tokens=NEW_TOKENS, stop_at_eos=False
        )
        return made.ids


class OursOnNNsight(Ours):
    """The same calls on engine `nnsight`."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model.on("nnsight"), ids)


class OursOnBridge(Ours):
    """The same calls on engine `transformer_lens`."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model.on("transformer_lens"), ids)


class NNsight(Tool):
    """nnsight's own traces, on a copy."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        self.nnsight = library()
        self.traced = self.nnsight.NNsight(copy.deepcopy(model.hf))
        self.generator = None
        if model.tokenizer is not None:
            self.generator = self.nnsight.TransformersModel(copy.deepcopy(model.hf), tokenizer=model.tokenizer)
        else:
            self.generate = None  # type: ignore[assignment]

    def _envoy(self, site: str, layer: int, root: Any = None) -> Any:
        envoy = root or self.traced
        for part in self.path(site, layer).split("."):
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy

    def plain(self) -> Any:
        with self.traced.trace(input_ids=self.ids, use_cache=False):
            logits = self.traced.output.logits.save()
        return logits

    def resid(self) -> Any:
        envoys = [self._envoy("resid_post", i) for i in self.layers]
        with self.traced.trace(input_ids=self.ids, use_cache=False):
            kept = self.nnsight.save([])
            for envoy in envoys:
                kept.append(envoy.output)
            logits = self.traced.output.logits.save()
        return logits, kept

    def z(self) -> Any:
        envoys = [self._envoy("z", i) for i in self.layers]
        with self.traced.trace(input_ids=self.ids, use_cache=False):
            kept = self.nnsight.save([])
            for envoy in envoys:
                kept.append(envoy.input)
            logits = self.traced.output.logits.save()
        return logits, kept

    def cache(self) -> Any:
        with self.traced.trace(input_ids=self.ids, use_cache=False) as tracer:
            kept = tracer.cache()
        return [kept[path].output for path in kept.keys()]  # noqa: SIM118 (no mapping)

    def ablate(self) -> Any:
        envoy, (heads, width) = self._envoy("z", self.layer), self.shape
        with self.traced.trace(input_ids=self.ids, use_cache=False):
            z = envoy.input.clone()
            z.view(*z.shape[:2], heads, width)[:, :, self.head] = 0
            envoy.input = z
            logits = self.traced.output.logits.save()
        return logits

    def patch(self) -> Any:
        envoy = self._envoy("resid_post", self.layer)
        with self.traced.trace(input_ids=self.ids, use_cache=False):
            stream = envoy.output
            stream = (stream[0] if isinstance(stream, tuple) else stream).clone()
            stream[:, -1] = self.vector
            envoy.output = (stream, *envoy.output[1:]) if isinstance(envoy.output, tuple) else stream
            logits = self.traced.output.logits.save()
        return logits

    def generate(self) -> Any:
        generator = self.generator
        assert generator is not None
        envoy = self._envoy("resid_post", self.layer, generator)
        inputs = {"input_ids": self.ids, "attention_mask": self.masked}
        with generator.generate(inputs, **self.settings) as tracer:
            for _ in tracer.iter[:NEW_TOKENS]:
                stream = envoy.output
                (stream[0] if isinstance(stream, tuple) else stream)[:] += self.vector
            ids = tracer.result.save()
        return ids


class Bridge(Tool):
    """TransformerLens' own bridge, on a copy, built without any path that installs packages."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        from ..engines.transformer_lens import build_bridge

        hf = copy.deepcopy(model.hf)
        self.bridge = build_bridge(hf)

    def _hooked(self, name: str, hook: Any) -> Any:
        return self.bridge.run_with_hooks(self.ids, fwd_hooks=[(f"blocks.{self.layer}.{name}", hook)])

    def _cached(self, suffix: str) -> Any:
        names = {f"blocks.{i}.{suffix}" for i in self.layers}
        return self.bridge.run_with_cache(self.ids, names_filter=lambda name: name in names)

    def plain(self) -> Any:
        return self.bridge(self.ids)

    def resid(self) -> Any:
        logits, cache = self._cached("hook_out")
        return logits, cache.cache_dict

    def z(self) -> Any:
        logits, cache = self._cached("attn.hook_z")
        return logits, cache.cache_dict

    def pattern(self) -> Any:
        logits, cache = self._cached("attn.hook_pattern")
        return logits, cache.cache_dict

    def cache(self) -> Any:
        logits, cache = self.bridge.run_with_cache(self.ids)
        return logits, cache.cache_dict

    def ablate(self) -> Any:
        def hook(z: Tensor, hook: Any) -> Tensor:
            z[:, :, self.head] = 0
            return z

        return self._hooked("attn.hook_z", hook)

    def patch(self) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            x[:, -1] = self.vector
            return x

        return self._hooked("hook_out", hook)

    def generate(self) -> Any:
        name = f"blocks.{self.layer}.hook_out"
        with self.bridge.hooks(fwd_hooks=[(name, lambda x, hook: x + self.vector)]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # TransformerLens 4.3 uses it
            return self.bridge.generate(
                self.ids, max_new_tokens=NEW_TOKENS, do_sample=False, verbose=False, stop_at_eos=False
            )


class Pyvene(Tool):
    """pyvene by module paths, on a copy (its named components know no recent family)."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        import pyvene

        self.pyvene, self.copy = pyvene, copy.deepcopy(model.hf)
        resid = [self._part("resid_post", i, "output", pyvene.CollectIntervention) for i in self.layers]
        self.reader = self._intervenable(resid)
        self.readers_z = self._intervenable(
            [self._part("z", i, "input", pyvene.CollectIntervention) for i in self.layers]
        )

    def _part(self, site: str, layer: int, side: str, kind: Any) -> dict[str, Any]:
        return {"component": f"{self.path(site, layer)}.{side}", "intervention": kind(keep_last_dim=True)}

    def _intervenable(self, parts: list[dict[str, Any]]) -> Any:
        config = self.pyvene.IntervenableConfig(parts)
        model = self.pyvene.IntervenableModel(config, model=self.copy)
        model.set_device(str(self.model.device))
        return model

    def resid(self) -> Any:
        return self.reader({"input_ids": self.ids})

    def z(self) -> Any:
        return self.readers_z({"input_ids": self.ids})


class InterpEngine(Tool):
    """interp-engine's capture, on copies (patterns need one in eager attention)."""

    def __init__(self, model: Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        import interp_engine

        self.package = interp_engine
        self.loaded = self._load("sdpa")
        self.eager = self._load("eager")

    def _load(self, attention: str) -> Any:
        hf = copy.deepcopy(self.hf)
        hf.set_attn_implementation(attention)
        return self.package.EagerModel(
            "bench", hf_model=hf, tokenizer=self.model.tokenizer, device=str(self.model.device), dtype=self.model.dtype
        )

    def _capture(self, point: str, model: Any) -> Any:
        points = [self.package.Address(point, i) for i in self.layers]
        cache = self.package.capture(model, self.ids, points)
        return [cache[p] for p in points]

    def resid(self) -> Any:
        return self._capture("resid_post", self.loaded)

    def z(self) -> Any:
        return self._capture("z", self.loaded)

    def pattern(self) -> Any:
        return self._capture("attn_probs", self.eager)


TOOLS: dict[str, tuple[type[Tool], str | None]] = {
    "bare": (Bare, None),
    "by hand": (ByHand, None),
    "interp_core": (Ours, None),
    "nnsight": (NNsight, "nnsight"),
    "interp_core on nnsight": (OursOnNNsight, "nnsight"),
    "TransformerLens bridge": (Bridge, "transformer_lens"),
    "interp_core on the bridge": (OursOnBridge, "transformer_lens"),
    "pyvene": (Pyvene, "pyvene"),
    "interp-engine": (InterpEngine, "interp_engine"),
}


def peers(model: Model, ids: Tensor, only: Sequence[str] | None = None) -> dict[str, Tool]:
    """The tools that are installed, made ready for a model.

    Raises:
        PlanError: a name that is no tool.
    """
    for name in only or ():
        if name not in TOOLS:
            raise PlanError(f"no tool {name!r} in the benchmark. {nearest(name, TOOLS)}")
    found: dict[str, Tool] = {}
    for name, (kind, package) in TOOLS.items():
        if only is not None and name not in only and name != "bare":
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = kind(model, ids)
    return found
