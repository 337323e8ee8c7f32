"""Path patching equals two forward passes per path with hand-written hooks, and keeps the laws of paths."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins import _direct
from reference import Reference
from studying import CLEAN, FRENCH, IDS, JUDGED, OTHER, judged, study, tokens
from tolerances import close, rounding
from torch import Tensor

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S


def paths(model: ic.Model, *x: Any, **settings: Any) -> Any:
    return study("path_patching", model, *x, **settings)


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
            return JUDGED.rows(direct) - JUDGED.rows(clean)

        def put(end: S.Site) -> object:
            def fn(x: Tensor) -> Tensor:
                new = x.clone()
                part = (slice(None), slice(None)) if end.units is None else (slice(None), slice(None), end.units)
                new[part] = held[str(end)][part]
                return new

            return fn

        return JUDGED.rows(self.logits([(end.name, end.layers, put(end)) for end in ends])) - JUDGED.rows(clean)


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


BY_HAND = [
    pytest.param(family, at, through, marks=() if (at == "all") == through or family == "llama" else pytest.mark.slow)
    for family in ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "qwen3_moe", "granitemoe", "gptj")
    for at, through in itertools.product(("all", [2, 4]), (False, True))
]


@pytest.mark.parametrize(("family", "at", "through_mlps"), BY_HAND)
def test_it_equals_hooks_by_hand(family: str, at: object, through_mlps: bool) -> None:
    model = tiny_model(family, torch.float64)
    hand = ByHand(family, model.hf, IDS, OTHER)
    found = paths(
        model, senders=SENDERS, receivers=RECEIVERS, at=at, through_mlps=through_mlps, direction="noising",
    )  # fmt: skip
    places = list(range(7)) if at == "all" else at
    scale = (found.source - found.base)[:, None, None]
    effect, biggest = found.effect * scale, 0.0
    size = float(torch.maximum(found.source.abs(), found.base.abs()).max())
    for i, sender in enumerate(SENDERS):
        for j, receiver in enumerate(RECEIVERS):
            both = [[end] if isinstance(end, str) else end for end in (sender, receiver)]
            wanted = hand.effect(*both, places, through_mlps)
            biggest = max(biggest, float(wanted.abs().max()))
            assert (effect[:, i, j] - wanted).abs().max() <= rounding(model) * max(size, biggest), (sender, receiver)
    assert biggest > 1e-3


def test_layers_without_heads_are_frozen_whole() -> None:
    model = tiny_model("qwen3_5", torch.float64)
    hand = ByHand("qwen3_5", model.hf, IDS, OTHER)
    found = paths(
        model, senders=["attn_out[0]", "attn_out[1]"], receivers=["k[2,0]", "logits"],
    )  # fmt: skip
    for i, sender in enumerate(found.senders):
        for j, receiver in enumerate(found.receivers):
            wanted = hand.effect([sender], [receiver], list(range(7)), False)
            close(found.effect[:, i, j] * (found.source - found.base), wanted, model)


@pytest.mark.parametrize("family", ["jamba", "mamba"])
def test_layers_that_are_not_attention_are_frozen_too(family: str) -> None:
    """All senders together bring the whole difference, and none of them more than its own direct path: a state space
    model that computed on would bring its part a second time."""
    model = tiny_model(family)
    everything = [
        site for site in ("embed", "z", "mixer_out", "mlp_out") if site == "embed" or model.layers(S.named(site))
    ]
    whole = paths(model, senders=[everything], receivers=["logits"])
    torch.testing.assert_close(whole.effect.as_subclass(Tensor), torch.ones_like(whole.effect), atol=1e-2, rtol=0)
    first = "mixer_out[0]"
    alone = paths(model, senders=[first], receivers=["logits"], at=2, score=score.logprob(7))
    assert float(alone.effect.abs().max()) < 1e-5  # it sends to its own position alone, and the score is at the last


def test_heads_beside_another_mixer_are_refused() -> None:
    with pytest.raises(ic.CapabilityError, match="heads are not all that mixes tokens.*falcon_h1"):
        paths(tiny_model("falcon_h1"), senders="z", receivers=["logits"])


def test_a_receiver_below_the_sender_gets_nothing() -> None:
    found = paths(tiny_model("llama"), senders="z", receivers=["q", "k", "v", "mlp_in"], at=-1)
    for i, sender in enumerate(map(S.Site.parse, found.senders)):
        for j, receiver in enumerate(map(S.Site.parse, found.receivers)):
            below = receiver.layers < sender.layers or (receiver.layers == sender.layers and receiver.name != "mlp_in")
            # a key or value at the last position is read by no later one, but by its own query
            assert bool(found.effect[:, i, j].any()) == (not below), (sender, receiver)
    above = int(found.explain.split("of which ")[1].split()[0])
    assert above == sum(bool(x) for x in found.effect.abs().sum(0).flatten())


@pytest.mark.parametrize("through_mlps", [False, True])
def test_all_senders_together_bring_the_whole_difference(through_mlps: bool) -> None:
    """Everything that is added to the stream from the other run is the other run."""
    everything = ["embed", "z", "mlp_out"]
    found = paths(
        tiny_model("qwen3", torch.float64), senders=[everything], receivers=["logits", "resid_pre[1]"],
        through_mlps=through_mlps,
    )  # fmt: skip
    torch.testing.assert_close(found.effect, torch.ones_like(found.effect))
    heads = paths(tiny_model("qwen3", torch.float64), senders=[everything], receivers=[["q[2]", "k[2]", "v[2]"]])
    model = tiny_model("qwen3", torch.float64)
    source = model.run(tokens(OTHER), read=[S.q[2], S.k[2], S.v[2]])
    edits = [site.set(source[site].as_subclass(Tensor)) for site in (S.q[2], S.k[2], S.v[2])]
    wanted = (judged(model, tokens(IDS), edits) - heads.base) / (heads.source - heads.base)
    close(heads.effect[:, 0, 0], wanted, model)


def test_the_direct_effect_is_what_the_readout_makes_of_it() -> None:
    """The head's contribution from the other run in place of its own, read out at once."""
    model = tiny_model("llama", torch.float64)
    found = paths(model, at=-1)
    last = S.resid_post[2].at(-1)
    runs = [model.run(tokens(ids), read=[S.head_out.at(-1), last]) for ids in (IDS, OTHER)]
    for i, (layer, head) in enumerate(model.heads):
        here, there = (run[S.head_out[layer].at(-1)][:, head].as_subclass(Tensor) for run in runs)
        logits = model.readout(runs[0][last].as_subclass(Tensor) + there - here)
        wanted = (JUDGED.rows(logits) - found.base) / (found.source - found.base)
        close(found.effect[:, i, 0], wanted, model)
    assert found.senders[5] == "z[1,1]" and found.receivers == ("logits",)
    final = paths(model, at=-1, receivers="resid_post[-1]")
    close(final.effect, found.effect, model)


def test_an_attention_output_is_all_its_heads() -> None:
    model = tiny_model("llama", torch.float64)
    ends = {"receivers": ["q[2,1]", "logits"], "through_mlps": True}
    whole = paths(model, senders="attn_out[1]", **ends)
    heads = paths(model, senders=[[f"z[1,{head}]" for head in range(4)]], **ends)
    assert torch.equal(whole.effect, heads.effect) and heads.senders == ("z[1,0]+z[1,1]+z[1,2]+z[1,3]",)


def test_without_another_prompt_the_sender_is_zero() -> None:
    model = tiny_model("llama", torch.float64)
    found = paths(model, tokens(IDS), senders=["z[1,2]", "mlp_out[0]"], at=-1)
    answer = model.run(IDS, logits=-1).logits.as_subclass(Tensor).argmax(-1)
    run = model.run(IDS, read=[S.head_out[1, 2].at(-1), S.mlp_out[0].at(-1), S.resid_post[2].at(-1)])
    for i, site in enumerate((S.head_out[1, 2].at(-1), S.mlp_out[0].at(-1))):
        logits = model.readout(run[S.resid_post[2].at(-1)].as_subclass(Tensor) - run[site].as_subclass(Tensor))
        wanted = score.logprob(answer).rows(logits) - found.base
        close(found.effect[:, i, 0], wanted, model)
    assert (found.kind, found.unit) == ("zero", "nats")


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64)
    settings: dict[str, Any] = {"senders": ["z", "mlp_out"], "receivers": ["v", "logits"], "through_mlps": True}
    whole = paths(model, **settings)
    monkeypatch.setattr(_direct, "CHUNK_BYTES", 1)
    singly = paths(model, **settings)
    close(singly.effect, whole.effect, model)
    assert singly.explain != whole.explain  # each chunk has a row that sends nothing


def test_it_executes_the_token_layers_that_it_says() -> None:
    model = tiny_model("llama")
    settings: dict[str, Any] = {"senders": "z", "receivers": ["q", "v[1,0]"], "at": [2, -1]}
    paths(model, **settings)  # tries the sweep on the model
    seen: list[int] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
        )
        for layer in model.hf.model.layers
    ]
    try:
        found = paths(model, **settings)
    finally:
        for handle in handles:
            handle.remove()
    said = int(found.explain.split("together")[1].split()[0].replace(",", ""))
    both = 2 * 2 * 7 * 3  # both prompts, both rows
    assert sum(seen) - both == said
    assert "at 2 position(s)" in found.explain


def test_other_engines_give_the_same() -> None:
    hf = testing.tiny("llama")
    settings: dict[str, Any] = {
        "senders": ["z[0]", "mlp_out[1]"],
        "receivers": ["q[2,1]", "logits"],
        "through_mlps": True,
    }
    both = [paths(ic.load(hf, engine=engine), **settings) for engine in ("torch", "nnsight")]
    torch.testing.assert_close(both[0].effect, both[1].effect, atol=1e-5, rtol=1e-4)


def test_the_toy_reads_the_relation_where_its_examples_answer() -> None:
    """The values of layer 2, read by the heads that decide, get the relation from the first MLPs at the answers."""
    found = paths(
        toy_model(), CLEAN, corrupted=FRENCH, senders=["embed", "mlp_out", "z"], receivers=["q[2]", "k[2]", "v[2]"],
        through_mlps=True,
    )  # fmt: skip
    best = max(found.table(), key=lambda row: row["effect"])
    assert best["receiver"] == "v[2,1]" and best["sender"] == "mlp_out[0]" and best["effect"] > 0.8


@pytest.mark.parametrize("family", ["toy:text", "gpt2", "llama", "qwen3_moe"])
def test_it_passes_the_kit(family: str) -> None:
    model = toy_model() if ":" in family else tiny_model(family)
    other = "Q: dog\nA: cats\n\nQ: hot\nA:" if ":" in family else tokens(OTHER[:1])
    last = {"at": -1, "through_mlps": True, "senders": ["mlp_out", "z"]}
    for settings in ({}, {"corrupted": other, "receivers": ["q", "mlp_in"]}, last):
        testing.check_method("path_patching", model, settings=settings).raise_if_failed()


def test_pictures_and_pages(tmp_path: Path) -> None:
    found = paths(toy_model(), CLEAN, corrupted=FRENCH, senders=["z", "mlp_out"])
    assert found.png(tmp_path / "map.png").stat().st_size > 10_000
    (one,) = found.pictures()
    assert one.rows[2] == "layer 2" and one.columns == ["z 0", "z 1", "z 2", "z 3", "mlp_out"]
    assert one.values[2][3] == float(found.mean[found.senders.index("z[2,3]"), 0])
    page = found.to_html(tmp_path / "map.html").read_text()
    assert (
        "two full forward passes per path" in page and "noising of paths 30 senders → logits at all positions" in page
    )
    assert type(found).load(found.save(tmp_path)) == found
    assert len(found.table()) == 30 and "z[2,2] → logits" in str(found)
    both = paths(
        toy_model(), CLEAN, corrupted=FRENCH, senders=["z[1]", ["z[0,0]", "embed"]], receivers=["v[2]", "logits"]
    )
    assert both.pictures()[0].rows == list(both.senders) and both.senders[-1] == "z[0,0]+embed"
    one_sender = paths(toy_model(), CLEAN, corrupted=FRENCH, senders="embed", receivers=["q", "k"])
    assert one_sender.pictures()[0].columns == ["q 0", "q 1", "q 2", "q 3", "k 0", "k 1"]


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"senders": "pattern"}, "pattern as one of the senders: senders are embed, z, attn_out, mixer_out, mlp_out"),
        ({"receivers": "z[1,2]"}, "receivers are mixer_in, attn_in, q, k, v"),
        ({"receivers": "q[1,2]@-1"}, "positions are given by at="),
        ({"senders": "zz"}, "no site is called 'zz'"),
        ({"senders": "z[9]"}, "no layer 9"),
        ({"receivers": "k[1,3]"}, "no head 3, there are 2"),
        ({"senders": []}, "senders names nothing"),
        ({"senders": [[]]}, "senders names nothing"),
        ({"at": 40}, "no position 40"),
        ({"corrupted": FRENCH[:20]}, "path_patching: the prompts have"),
        ({"at": 3, "score": score.logprob(3, at=1)}, "nothing can change"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            paths(model, CLEAN, **settings)
    with pytest.raises(ic.PlanError, match="choose positions that all have"):
        paths(model, [CLEAN, CLEAN[:30]])
