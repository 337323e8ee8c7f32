"""Path patching equals two forward passes per path with hand-written hooks, and keeps the laws of paths."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from conftest import tiny_model
from reference import Reference
from torch import Tensor

import interp_core as ic
from interp_core import sites as S

IDS = torch.tensor([[5, 17, 33, 8, 61, 40, 22], [9, 54, 12, 70, 3, 28, 45]])
OTHER = torch.tensor([[5, 17, 50, 8, 23, 40, 61], [9, 31, 12, 70, 66, 28, 7]])
ANSWERS = {"answer": [3, 7], "other": [9, 11]}
CLEAN = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:"
FRENCH = "Q: big\nA: grand\n\nQ: hot\nA: chaud\n\nQ: wet\nA:"


def tokens(ids: Tensor) -> ic.Tokens:
    return ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def paths(model: ic.Model, x: object, **settings: object) -> object:
    return ic.method("path_patching")(model, x, **settings)  # type: ignore[arg-type]


class ByHand:
    """Two passes per path, whole texts, with the hooks of `reference`."""

    def __init__(self, family: str, hf: torch.nn.Module, base: Tensor, source: Tensor) -> None:
        self.hooks, self.base, self.source = Reference(family, hf), base, source
        self.seen: dict[tuple[str, int, bool], Tensor] = {}

    def value(self, site: str, layer: int, source: bool) -> Tensor:
        key = site, layer, source
        if key not in self.seen:
            self.seen[key] = self.hooks.value(site, layer, {"input_ids": self.source if source else self.base})
        return self.seen[key]

    def logits(self, changes: list[tuple[str, int, object]]) -> Tensor:
        self.hooks.shape = self.base.shape
        with ExitStack() as stack, torch.no_grad():
            for site, layer, fn in changes:
                stack.enter_context(self.hooks.hooked(site, layer, fn))  # type: ignore[arg-type]
            return self.hooks.hf(input_ids=self.base, use_cache=False).logits[:, -1]

    def sent(self, site: S.Site, places: list[int]) -> tuple[str, int, object]:
        name, layer, unit = ("resid_pre", 0, None) if site.name == "embed" else (site.name, site.layers, site.units)
        value = self.value(name, layer, source=True)
        others = self.value(name, layer, source=False)  # heads beside it are frozen too

        def change(x: Tensor) -> Tensor:
            new = others.clone()
            at = (slice(None), places) if unit is None else (slice(None), places, unit)
            new[at] = value[at]
            return new

        return name, layer, change

    def effect(self, senders: list[str], receivers: list[str], places: list[int], through_mlps: bool) -> Tensor:
        """Logit difference of the path minus that of the base run."""
        sending = [S.Site.parse(name) for name in senders]
        own = {(site.name, site.layers) for site in sending}
        changes = [self.sent(site, places) for site in sending]
        for layer in range(self.hooks.n_layers):
            for part, site in (("attn_out", "z"), ("mlp_out", "mlp_out")):
                if not {(part, layer), (site, layer)} & own and not (part == "mlp_out" and through_mlps):
                    frozen = self.value(part, layer, source=False)
                    changes.append((part, layer, lambda x, frozen=frozen: frozen))
        held: dict[str, Tensor] = {}

        def keep(name: str) -> object:
            def fn(x: Tensor) -> Tensor:
                held[name] = x.clone()
                return x

            return fn

        ends = [S.Site.parse(name) for name in receivers if name != "logits"]
        direct = self.logits([*changes, *((end.name, end.layers, keep(str(end))) for end in ends)])
        clean = self.logits([])
        if not ends:
            return difference(direct) - difference(clean)

        def put(end: S.Site) -> object:
            def fn(x: Tensor) -> Tensor:
                new = x.clone()
                part = (slice(None), slice(None)) if end.units is None else (slice(None), slice(None), end.units)
                new[part] = held[str(end)][part]
                return new

            return fn

        return difference(self.logits([(end.name, end.layers, put(end)) for end in ends])) - difference(clean)


def difference(logits: Tensor) -> Tensor:
    rows = torch.arange(2)
    return logits[rows, ANSWERS["answer"]] - logits[rows, ANSWERS["other"]]


SENDERS = ["embed", "z[0,1]", "z[1,2]", "mlp_out[0]", "mlp_out[1]", ["z[0,0]", "mlp_out[1]", "z[1,3]"]]
RECEIVERS = [
    "q[1,2]",
    "k[2,0]",
    "v[2,1]",
    "mlp_in[1]",
    "mlp_in[2]",
    "attn_in[2]",
    ["q[1,0]", "v[2,0]"],
    "resid_pre[2]",
    "logits",
]


@pytest.mark.parametrize("through_mlps", [False, True])
@pytest.mark.parametrize("at", ["all", [2, 4]])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "qwen3_moe", "granitemoe", "gptj"])
def test_it_equals_hooks_by_hand(family: str, at: object, through_mlps: bool) -> None:
    model = tiny_model(family, torch.float64)
    hand = ByHand(family, model.hf, IDS, OTHER)
    found = paths(
        model, tokens(IDS), corrupted=tokens(OTHER), senders=SENDERS, receivers=RECEIVERS, at=at,
        through_mlps=through_mlps, **ANSWERS,
    )  # fmt: skip
    places = list(range(7)) if at == "all" else at
    scale = (found.source - found.base)[:, None, None]
    effect, biggest = found.effect * scale, 0.0
    for i, sender in enumerate(SENDERS):
        for j, receiver in enumerate(RECEIVERS):
            both = [[end] if isinstance(end, str) else end for end in (sender, receiver)]
            wanted = hand.effect(*both, places, through_mlps)
            biggest = max(biggest, float(wanted.abs().max()))
            tolerance = 1e-6 if family == "gptj" else 1e-10  # its rotary embedding is float32 always
            assert (effect[:, i, j] - wanted).abs().max() <= tolerance * max(1, biggest), (sender, receiver)
    assert biggest > 1e-3


def test_layers_without_heads_are_frozen_whole() -> None:
    model = tiny_model("qwen3_5", torch.float64)
    hand = ByHand("qwen3_5", model.hf, IDS, OTHER)
    found = paths(
        model, tokens(IDS), corrupted=tokens(OTHER), senders=["attn_out[0]", "attn_out[1]"], receivers=["k[2,0]", "logits"],
        **ANSWERS,
    )  # fmt: skip
    for i, sender in enumerate(found.senders):
        for j, receiver in enumerate(found.receivers):
            wanted = hand.effect([sender], [receiver], list(range(7)), False)
            torch.testing.assert_close(
                found.effect[:, i, j] * (found.source - found.base), wanted, atol=1e-9, rtol=1e-9
            )
