"""Streaming reads: `run(each=)` hands a layer's readings over as soon as they have passed, and lets them go."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import sampled, tiny_model
from sweeping import tokens

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.bench.allocations import peak_bytes

MIXED = [S.pattern, S.v, S.resid_pre, S.attn_out.at(-1), S.mlp_out, S.resid_post, S.embed]


def sites_of(model: ic.Model) -> list[ic.Site]:
    """Those of `MIXED`, and one part, that this family has."""
    return [site for site in (*MIXED, S.z.at([0, -1])) if not model.can(site.name, "read")]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("family", sampled())
def test_each_layer_is_handed_what_a_run_holds(family: str, stop: bool) -> None:
    """Every family, a padded batch, with an edit, with and without an early end."""
    model = tiny_model(family)
    reads, batch = sites_of(model), tokens() if "left padding" not in model.atlas.lacking else tokens().row(0)
    edits = [S.resid_pre[0].at(-1).scale(1.5)]
    whole = model.run(batch, read=reads, edits=edits)
    calls: list[int] = []

    def each(layer: int, values: ic.LayerReadings) -> None:
        calls.append(layer)
        for site in reads:
            if site.info.layered and layer in model.atlas.layers(site.name):
                of_layer = ic.Site(site.name, layer, site.units, site.pos, site.key)
                assert torch.equal(values[site], whole[of_layer]) and torch.equal(values[of_layer], whole[of_layer])

    run = model.run(batch, read=reads, edits=edits, each=each, logits=not stop)
    assert calls == list(range(model.n_layers))
    assert run.receipts == whole.receipts
    if not stop:
        assert torch.equal(run.logits, whole.logits)
    assert torch.equal(run[S.embed], whole[S.embed])  # sites without layers stay
    with pytest.raises(ic.ReadError, match="resid_post was handed to each= as it passed"):
        run[S.resid_post[0]]


@pytest.mark.parametrize("engine", ["nnsight", "transformer_lens"])
def test_on_other_engines(engine: str) -> None:
    model, reads = ic.load(testing.tiny("llama"), engine=engine), [S.pattern, S.resid_post]
    whole = model.run(tokens(), read=reads)
    layers: dict[int, torch.Tensor] = {}
    run = model.run(tokens(), read=reads, each=lambda layer, values: layers.update({layer: values[S.pattern].clone()}))
    assert list(layers) == [0, 1, 2]
    for layer, pattern in layers.items():
        assert torch.equal(pattern, whole[S.pattern[layer]])
    assert torch.equal(run.logits, whole.logits)


def test_plans_that_travel_refuse_it() -> None:
    model = ic.load(testing.tiny("llama"), engine="nnsight", engine_options={"remote": "local"}, check=False)
    with pytest.raises(ic.CapabilityError, match="the function each= does not travel"):
        model.run(tokens().row(0), read=S.resid_post, each=lambda layer, values: None)


def test_a_tensor_that_the_model_writes_into_is_handed_over_once_as_it_was() -> None:
    """OPT-like: found out in the middle of a pass, which is then made again; nothing is handed over twice or wrong."""
    hf = testing.tiny("llama")

    class Adding(type(hf.model.layers[1])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            residual = hidden_states
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            residual = residual + attended
            return self.mlp(self.post_attention_layernorm(residual)).add_(residual)

    for layer in hf.model.layers:
        layer.__class__ = Adding
    model, reads = ic.load(hf, check=False), [S.mlp_out, S.resid_post]
    wanted = [
        model.run(tokens(), read=S.mlp_out[layer].at([0, -1]))[S.mlp_out[layer].at([0, -1])] for layer in range(3)
    ]
    fresh, seen = ic.load(hf, check=False), list[int]()

    def each(layer: int, values: ic.LayerReadings) -> None:
        seen.append(layer)
        assert torch.equal(values[S.mlp_out].at([0, -1]), wanted[layer])

    fresh.run(tokens(), read=reads, each=each)
    assert seen == [0, 1, 2]


def test_what_a_function_does_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    plain = model.run(tokens()).logits

    def fails(layer: int, values: ic.LayerReadings) -> None:
        raise ZeroDivisionError(str(layer)) if layer == 1 else KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(tokens(), read=S.pattern, each=fails)
    with pytest.raises(ic.PlanError, match="inside another"):
        model.run(tokens(), read=S.pattern, each=lambda layer, values: model.run(tokens()))
    assert torch.equal(model.run(tokens()).logits, plain)
    others: list[bool] = []  # and no other thread waits for it
    thread = threading.Thread(target=lambda: others.append(torch.equal(model.run(tokens()).logits, plain)))
    thread.start()
    thread.join()
    assert others == [True]


def test_what_cannot_be_handed_over_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ic.PlanError, match="each= lets values go .* leave grad="):
        model.run(tokens(), read=S.pattern, each=lambda layer, values: None, grad=lambda logits: logits.sum())
    with pytest.raises(ic.PlanError, match="each= is called with what is read of a layer, and nothing is"):
        model.run(tokens(), read=S.embed, each=lambda layer, values: None)
    with pytest.raises(ic.PlanError, match="each= takes a function"):
        model.run(tokens(), read=S.pattern, each=3)  # type: ignore[arg-type]


def test_reading_all_patterns_holds_one_layers() -> None:
    """12 layers, 1,024 tokens, 4 heads: 16 MiB a pattern. Above a plain pass at most a sixth of holding all of them."""
    hf = testing.tiny("llama", num_hidden_layers=12, max_position_embeddings=2048)
    model, ids = ic.load(hf), torch.randint(3, 90, (1, 1024), generator=torch.Generator().manual_seed(0))
    peaks = {}
    ways = {"plain": {}, "all": {"read": [S.pattern, S.v]}, "each": {"read": [S.pattern, S.v], "each": lambda *_: None}}
    for name, arguments in ways.items():
        peaks[name] = peak_bytes(lambda arguments=arguments: model.run(ids, logits=-1, **arguments))  # type: ignore[misc]
    holding = peaks["all"] - peaks["plain"]
    assert holding > 11 * 4 * 1024 * 1024 * 4  # or nothing was counted
    assert peaks["each"] - peaks["plain"] <= holding / 6


@pytest.mark.parametrize("site", ["rot_q", "rot_k", "v"])
def test_reads_before_the_scores_keep_the_layers_kernel(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scores are made in the open, and logits are the model's to the bit."""
    from interp_core.engines import attention

    model = tiny_model("llama")
    plain = model.run(tokens()).logits
    opened: list[int] = []
    products = attention.products
    monkeypatch.setattr(attention, "products", lambda *operands: (opened.append(1), products(*operands))[1])
    run = model.run(tokens(), read=S.named(site))
    assert not opened and torch.equal(run.logits, plain)
    model.run(tokens(), read=S.pattern)
    assert opened
