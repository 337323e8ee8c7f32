"""Other packages' tools in the benchmark of hooks, each on its own copy of the model where it changes it.

They are the baselines that interp_core's numbers are held against, so each is written as its own documentation has it.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

import interp_core as ic
from interp_core.bench.tools import NEW_TOKENS, TOOLS, Ours, Tool
from interp_core.engines.nnsight.base import library
from interp_core.engines.transformer_lens import build_bridge


class OursOnNNsight(Ours):
    """The same calls on engine `nnsight`."""

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
        super().__init__(model.on("nnsight"), ids)


class OursOnBridge(Ours):
    """The same calls on engine `transformer_lens`."""

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
        super().__init__(model.on("transformer_lens"), ids)


class NNsight(Tool):
    """nnsight's own traces, on a copy."""

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
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

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        self.bridge = build_bridge(copy.deepcopy(model.hf))

    def _hooked(self, name: str, hook: Any) -> Any:
        return self.bridge.run_with_hooks(self.ids, fwd_hooks=[(f"blocks.{self.layer}.{name}", hook)])

    def _cached(self, suffix: str) -> Any:
        names = {f"blocks.{i}.{suffix}" for i in self.layers}
        logits, cache = self.bridge.run_with_cache(self.ids, names_filter=lambda name: name in names)
        return logits, cache.cache_dict

    def plain(self) -> Any:
        return self.bridge(self.ids)

    def resid(self) -> Any:
        return self._cached("hook_out")

    def z(self) -> Any:
        return self._cached("attn.hook_z")

    def pattern(self) -> Any:
        return self._cached("attn.hook_pattern")

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

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
        super().__init__(model, ids)
        import pyvene

        self.pyvene, self.copy = pyvene, copy.deepcopy(model.hf)
        self.reader = self._reader("resid_post", "output")
        self.readers_z = self._reader("z", "input")

    def _reader(self, site: str, side: str) -> Any:
        collect = self.pyvene.CollectIntervention
        parts = [{"component": f"{self.path(site, i)}.{side}", "intervention": collect(keep_last_dim=True)}
                 for i in self.layers]  # fmt: skip
        model = self.pyvene.IntervenableModel(self.pyvene.IntervenableConfig(parts), model=self.copy)
        model.set_device(str(self.model.device))
        return model

    def resid(self) -> Any:
        return self.reader({"input_ids": self.ids})

    def z(self) -> Any:
        return self.readers_z({"input_ids": self.ids})


class InterpEngine(Tool):
    """interp-engine's capture, on copies (patterns need one in eager attention)."""

    def __init__(self, model: ic.Model, ids: Tensor) -> None:
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


PEERS: dict[str, tuple[Callable[[ic.Model, Tensor], Tool], str]] = {
    "nnsight": (NNsight, "nnsight"),
    "interp_core on nnsight": (OursOnNNsight, "nnsight"),
    "TransformerLens bridge": (Bridge, "transformer_lens"),
    "interp_core on the bridge": (OursOnBridge, "transformer_lens"),
    "pyvene": (Pyvene, "pyvene"),
    "interp-engine": (InterpEngine, "interp_engine"),
}
"""The tool and the package that it needs."""


def installed() -> dict[str, Callable[[ic.Model, Tensor], Tool]]:
    """interp_core's own tools and those of the packages that are installed."""
    peers = {name: kind for name, (kind, package) in PEERS.items() if importlib.util.find_spec(package) is not None}
    return TOOLS | peers
