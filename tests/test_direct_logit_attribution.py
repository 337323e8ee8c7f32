"""Direct logit attribution equals sums written by hand in float64, and its parts add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled, tiny_model, toy_model
from reference import Reference
from studying import ANSWERS, CLEAN, IDS, tokens
from tolerances import close
from torch import Tensor, nn

import interp_core as ic
from interp_core import testing

U: dict[str, Any] = {"answer": ANSWERS["answer"], "rival": ANSWERS["other"]}


def attribute(model: ic.Model, x: Any = None, **settings: Any) -> Any:
    given = (tokens(IDS), U | settings) if x is None else (x, settings)
    return ic.method("direct_logit_attribution")(model, given[0], **given[1])


def held(norm: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """A norm with the scale that it has at x as a function, and its bias; written out for the classes that there are."""
    kind, weight = type(norm).__name__, norm.weight.double()
    gain = 1 + weight if kind == "Gemma2RMSNorm" else weight
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    if isinstance(norm, nn.LayerNorm):
        sigma = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return lambda c: (c - c.mean(-1, keepdim=True)) / sigma * gain, norm.bias.double()
    sigma = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return lambda c: c / sigma * gain, torch.zeros_like(weight)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gptj", "opt", "granitemoe"])
@torch.no_grad()
def test_it_equals_sums_by_hand(family: str) -> None:
    """Parts, heads and neurons: LayerNorm, RMSNorm, Gemma's 1 + w, post-norms, multipliers, biases, parallel blocks."""
    model = tiny_model(family, torch.float64)
    hf, hooks = model.hf, Reference(family, model.hf)
    layers = range(model.n_layers)
    dense = [] if family == "granitemoe" else [1]
    found = attribute(model, neurons=dense or None)

    def read(site: str, layer: int = 0) -> Tensor:
        return hooks.value(site, layer, {"input_ids": IDS})[:, -1].double()

    y = read("resid_post", model.n_layers - 1)
    norm, beta = held(hf.get_submodule(hooks.layout["norm"]), y)
    head = hf.get_output_embeddings()
    scale = 1 / hf.config.logits_scaling if family == "granitemoe" else 1.0
    answer, rival = torch.tensor(U["answer"]), torch.tensor(U["rival"])
    u = (head.weight[answer] - head.weight[rival]).double() * scale
    b = torch.zeros(2).double() if head.bias is None else (head.bias[answer] - head.bias[rival]).double() * scale
    wanted = {"embed": read("resid_pre"), "final norm's bias": None}
    wanted |= {f"{site}[{layer}]": read(site, layer) for layer in layers for site in ("attn_out", "mlp_out")}
    for name, part in wanted.items():
        mine = found.parts[:, found.names.index(name)]
        close(mine, u @ beta if part is None else (norm(part) * u).sum(-1), model)
    close(found.parts[:, -1], b, model)

    for layer in layers:
        o = hooks.module("o", layer)
        weight = (o.weight.T if isinstance(o, nn.Linear) else o.weight).detach().double()
        z = read("z", layer)
        post = lambda c: c * hooks.scale  # noqa: E731
        if family in ("gemma2", "olmo2"):
            x = z.flatten(1) @ weight
            post, _ = held(hooks.module("", layer).post_attention_layernorm, x)
        for h in range(model.n_heads):
            own = post(z[:, h] @ weight[h * model.d_head : (h + 1) * model.d_head])
            close(found.heads[:, layer, h], (norm(own) * u).sum(-1), model)
    for layer in dense:
        down = hooks.module("down", layer)
        weight = (down.weight.T if isinstance(down, nn.Linear) else down.weight).detach().double()
        act = read("mlp_act", layer)
        post = lambda c: c  # noqa: E731
        if family in ("gemma2", "olmo2"):
            post, _ = held(hooks.module("", layer).post_feedforward_layernorm, act @ weight)
        own = torch.stack([(norm(post(act[:, n, None] * weight[n])) * u).sum(-1) for n in range(act.shape[1])], 1)
        close(found.neurons[:, 0], own, model)


@pytest.mark.parametrize("family", sampled())
def test_parts_add_up_to_the_models_own_logits(family: str) -> None:
    """Before the cap, which is undone here; families whose stream is no such sum are refused by name."""
    model = tiny_model(family)
    found = attribute(model)
    logits = model.run(tokens(IDS), logits=-1).logits.plain
    cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
    assert found.capped == bool(cap)
    bare = torch.atanh(logits.double() / cap) * cap if cap else logits.double()
    rows, (answer, rival) = torch.arange(2), (torch.tensor(U[name]) for name in ("answer", "rival"))
    close(found.parts.sum(1).double(), bare[rows, answer] - bare[rows, rival], model)
    close(found.after_cap, logits[rows, answer] - logits[rows, rival], model)
    assert (found.rest.abs() < 1e-4 * found.parts.abs().sum(1)).all() and not found.unexplained


def test_what_the_cap_bends_is_told() -> None:
    hf = testing.tiny("gemma2")
    hf.config.final_logit_softcapping = 2.0
    found = attribute(ic.load(hf))
    assert found.capped and (found.after_cap - found.logit_diff).abs().max() > 1e-3
    close(found.parts.sum(1), found.logit_diff, ic.load(hf))
    assert "before the cap" in found.details()["How it adds up"]


def test_half_precision_leaves_its_rounding_apart() -> None:
    model = tiny_model("llama", torch.bfloat16)
    found = attribute(model)
    close(found.parts.sum(1) + found.rest, found.logit_diff, tiny_model("llama"))
    assert 0 < found.rest.abs().max() < 0.05 * found.parts.abs().sum(1).max()


def test_answers_that_are_not_given_are_what_the_model_says() -> None:
    model = toy_model()
    first, second = model.run(CLEAN, logits=-1).logits.plain[0].topk(2).indices.tolist()
    both = attribute(model, CLEAN)
    assert (int(both.answer), int(both.rival)) == (first, second)
    swapped = attribute(model, CLEAN, rival=first)
    assert (int(swapped.answer), int(swapped.rival)) == (second, first)
    torch.testing.assert_close(swapped.parts, -both.parts)
    named = attribute(model, CLEAN, answer=" dry", rival=" cold")
    assert named.prompt_rows()[0] | {"answer": "' dry'", "rival": "' cold'"} == named.prompt_rows()[0]
    earlier = attribute(model, CLEAN, at=3)
    run = model.run(CLEAN).logits[0, 3]
    close(earlier.logit_diff, run[earlier.answer] - run[earlier.rival], model)


def test_many_prompts_are_each_its_own() -> None:
    model = toy_model()
    texts = ["Q: big\nA:", "Q: big\nA: small\n\nQ: hot\nA:", "Q: wet\nA:", CLEAN, "Q: old\nA: young\n\nQ: big\nA:"]
    settings: dict[str, Any] = {"rival": [" dog", " cat", " small", " hot", " cold"], "neurons": [2, 4]}
    together = attribute(model, texts, batch_size=2, **settings)
    for row, text in enumerate(texts):
        alone = attribute(model, text, **settings | {"rival": settings["rival"][row]})
        for name in ("parts", "heads", "neurons", "logit_diff"):
            close(getattr(together, name)[row], getattr(alone, name)[0], model)
    assert together.finding.startswith("The answers lead their rivals by") and "mean of 5 prompts" in together.finding


@pytest.mark.usefixtures("rough_figures")
def test_pages_and_pictures(tmp_path: Path) -> None:
    found = attribute(toy_model(), CLEAN, neurons=3)
    names = dict(zip(found.names, found.parts[0].tolist(), strict=True))
    largest = max(names, key=lambda name: abs(names[name]))
    assert f"of the components {largest} does most, with {names[largest]:+.3g}" in found.finding
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "rounding of stream" in page and "mlp_act[3," in page and "z[2,2]" in page
    assert found.png(tmp_path / "map.png").stat().st_size > 1_000 and len(found.charts()) == 2
    assert type(found).load(found.save(tmp_path / "saved")) == found
    plain = attribute(toy_model(), CLEAN, heads=False)
    assert plain.heads is None and plain.neurons is None and len(plain.charts()) == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_it_passes_the_kit(family: str) -> None:
    """The toy's turn is in test_kit, which every method goes through."""
    model = tiny_model(family)
    settings = {} if family == "qwen3_moe" else {"neurons": [1], "rival": 7}
    testing.check_method("direct_logit_attribution", model, settings=settings).raise_if_failed()


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"at": [1, 2]}, "explains the logits of one position"),
        ({"at": 40}, "no position 40"),
        ({"answer": " dry", "rival": " dry"}, "both ' dry'"),
        ({"answer": " dry dry"}, "is 2 tokens"),
        ({"neurons": 9}, "no layer 9"),
        ({"answer": [1, 2]}, "2"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            attribute(model, CLEAN, **settings)
    with pytest.raises(ic.CapabilityError, match="no neurons to tell apart"):
        attribute(tiny_model("mixtral"), neurons=1)
    with pytest.raises(ic.CapabilityError, match="direct_logit_attribution needs"):
        attribute(ic.load(testing.tiny("opt", do_layer_norm_before=False)))


def test_a_stream_that_is_no_sum_is_refused() -> None:
    """An edit of the model itself that adds to the stream outside attention and MLP."""
    hf = testing.tiny("llama")
    hf.model.layers[1].register_forward_hook(lambda _m, _x, out: out + 1.0)
    with pytest.raises(ic.CapabilityError, match="is not the sum of its embeddings"):
        attribute(ic.load(hf, check=False))
