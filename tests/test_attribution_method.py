"""What all attribution methods share: where prompt, target and its parts stand, the gate, rows of a batch, mass shares,
and results over images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from conftest import tiny_model
from interp_plugins.attribution.gate import demand_additive
from interp_plugins.attribution.layout import Layout, layout_of
from interp_plugins.attribution.method import MASSIVE, Attribution, AttributionResult, attention_sinks, stream_site
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

PROMPT = "Q: big\nA: small\n\nQ: hot\nA:"
FLOWS = ("ifr", "ifr_routes", "attention_rollout")
ADDITIVE = (*FLOWS, "attnlrp")
OTHERS = ("input_x_gradient", "integrated_gradients", "random_attribution", "leave_out")


def ids(*rows: list[int], target: int = 0) -> ic.Tokens:
    """Rows padded on the left; the last so many tokens are the target."""
    width = max(map(len, rows))
    spans = {"target": tuple((ic.Span(len(row) - target, len(row)),) for row in rows)} if target else {}
    return ic.Tokens(
        torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        spans=spans,
    )


LONG, SHORT = [5, 9, 33, 12, 60, 7, 21, 80, 44, 3], [5, 9, 61, 12, 60, 7, 22]


# Layout


@pytest.fixture(scope="module")
def toy() -> ic.Model:
    return ic.load("toy:text")


def test_where_things_stand(toy: ic.Model) -> None:
    """Without parts, sink, thinking and explained are the target; parts are text of it, tokens of it, or spans."""
    tokens = toy.tokens(PROMPT, " cold\n\nQ: up\nA: down")
    start, stop = tokens.spans["target"][0][0].start, tokens.spans["target"][0][0].stop
    plain = layout_of(toy, tokens)
    assert plain.target == plain.sink == plain.thinking == plain.explained == range(start, stop)
    assert plain.prompt == tuple(range(start)) and plain.projected == tuple(range(stop)) and plain.length == stop
    assert plain.predictors == tuple(range(start - 1, stop - 1)) and plain.answer == tuple(
        tokens.ids[0, start:].tolist()
    )
    by_text = layout_of(toy, tokens, sink=" down", thinking=" cold")
    assert "".join(tokens.labels[0][p] for p in by_text.sink) == " down" and by_text.sink == by_text.explained
    assert "".join(tokens.labels[0][p] for p in by_text.thinking) == " cold"
    relative = {name: (part.start - start, part.stop - start) for name, part in
                (("sink", by_text.sink), ("thinking", by_text.thinking))}  # fmt: skip
    assert layout_of(toy, tokens, **relative) == by_text
    spans = {"sink": by_text.sink, "thinking": by_text.thinking, "explained": by_text.thinking}
    named = ic.Tokens(
        tokens.ids, tokens.mask, tokens.texts, tokens.offsets,
        {**tokens.spans, **{name: ((ic.Span(part.start, part.stop),),) for name, part in spans.items()}},
        labels=tokens.labels,
    )  # fmt: skip
    from_spans = layout_of(toy, named)
    assert (from_spans.sink, from_spans.thinking, from_spans.explained) == tuple(spans.values())
    assert layout_of(toy, named, sink=" cold").sink == by_text.thinking  # a setting goes before a span
    assert from_spans.spans() == {
        "prompt": [[0, start]], "target": [[start, stop]], **{n: [[p.start, p.stop]] for n, p in spans.items()}
    }  # fmt: skip


def test_without_a_target_the_next_token_is_explained(toy: ic.Model) -> None:
    tokens = toy.tokens(PROMPT)
    layout = layout_of(toy, tokens)
    last = layout.length - 1
    assert not len(layout.target) and layout.answer == () and layout.predictors == (last,)
    assert layout.prompt == tuple(range(last + 1)) and layout.spans() == {"prompt": [[0, last + 1]]}
    logits = toy.run(tokens, logits=[last]).logits.plain
    assert float(layout.objective(logits)) == float(logits.max())


def test_the_objective_is_by_hand(toy: ic.Model) -> None:
    """Logits of the sink's tokens at the positions before them, weighted, less those of another token."""
    tokens = toy.tokens(PROMPT, " cold\n")
    layout = layout_of(toy, tokens, sink=" cold", against=" small")
    logits = toy.run(tokens).logits.plain
    other = toy.tokens(" small", bos=False).ids[0, 0]
    assert len(layout.sink) == 1 and layout.against == other
    seen = logits[:, list(layout.predictors)]
    p = layout.sink.start
    assert float(layout.objective(seen)) == float(logits[0, p - 1, tokens.ids[0, p]] - logits[0, p - 1, other])
    two = layout_of(toy, toy.tokens(PROMPT, " cold\n\nQ"))
    given = torch.arange(float(len(two.sink) * toy.d_vocab)).view(1, len(two.sink), -1)
    weights = torch.tensor([2.0, *[0.5] * (len(two.sink) - 1)])
    wanted = sum(w * given[0, i, token] for i, (w, token) in enumerate(zip(weights, two.answer, strict=True)))
    assert float(two.objective(given, weights)) == float(wanted)


def _spans(toy: ic.Model, **parts: list[tuple[int, int]]) -> ic.Tokens:
    tokens = toy.tokens(PROMPT, " cold\n\nQ")
    spans = {name: (tuple(ic.Span(*part) for part in listed),) for name, listed in parts.items()}
    return ic.Tokens(
        tokens.ids, tokens.mask, tokens.texts, tokens.offsets, {**tokens.spans, **spans}, labels=tokens.labels
    )


@pytest.mark.parametrize(
    ("spans", "settings", "error", "says"),
    [
        ({}, {"sink": " warm"}, ic.PositionError, r"sink ' warm' does not occur in the target ' cold"),
        ({}, {"sink": ""}, ic.PositionError, "sink '' does not occur"),
        ({}, {"sink": "hot"}, ic.PositionError, "'hot' does not occur in the target"),  # the prompt has it
        ({}, {"thinking": (1, 1)}, ic.PositionError, r"thinking is tokens 1 to 1 of a target that has \d"),
        ({}, {"sink": (0, 99)}, ic.PositionError, r"tokens 0 to 99 of a target that has \d: give a half-open range"),
        ({"sink": [(0, 2)]}, {}, ic.PositionError, r"sink is tokens 0 to 2, the target \d+ to \d+"),
        ({"sink": [(1, 2), (3, 4)]}, {}, ic.PositionError, "span 'sink' is 2 pieces"),
        ({}, {"against": " small"}, ic.PlanError, r"against= is held against one token, the sink has \d"),
        ({"target": []}, {"sink": " x"}, ic.PlanError, "sink is a part of the target, and there is none"),
        ({"target": [], "thinking": [(0, 1)]}, {}, ic.PlanError, "thinking is a part of the target"),
        ({"target": [(0, 3)]}, {}, ic.PlanError, "begins with the first token, which nothing predicts"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(
    toy: ic.Model, spans: dict[str, Any], settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        layout_of(toy, _spans(toy, **spans), **settings)


def test_targets_follow_prompts(toy: ic.Model) -> None:
    """One for all, or one each; a target changes no token of the prompt."""
    method = ic.method("random_attribution")
    prompts = [PROMPT, "Q: up\nA: down\n\nQ: fast\nA:"]
    one = method(toy, prompts, target=[" cold", " slow"])
    assert ["".join(labels[start:stop]) for labels, spans in zip(one.labels, one.spans, strict=True)
            for start, stop in spans["target"]] == [" cold", " slow"]  # fmt: skip
    assert method(toy, toy.tokens(prompts), target=[" cold", " slow"]) == one
    assert method(toy, toy.tokens(PROMPT), target=" cold") == method(toy, PROMPT, target=" cold")
    with pytest.raises(ic.PlanError, match="1 targets for 2 prompts"):
        method(toy, toy.tokens(prompts), target=[" cold"])
    with pytest.raises(ic.PlanError, match="have a target already"):
        method(toy, toy.tokens(PROMPT, " cold"), target=" cold")
    with pytest.raises(ic.TextError, match="carry no text for target= to follow"):
        method(toy, ids(LONG), target=" cold")
    with pytest.raises(ic.TextError, match="tokens"):
        method(toy, "Q: hot\nA: co", target="ld")


# A batch


@pytest.mark.parametrize("name", [*ADDITIVE, *OTHERS])
def test_rows_of_a_batch_are_those_alone(name: str) -> None:
    """Padding has no numbers; settings that are lists are one per row; batches join to the same."""
    model, settings = tiny_model("qwen2"), {"steps": 3} if name == "integrated_gradients" else {}
    batch = ids(LONG, SHORT, LONG[::-1], target=3)
    parts: dict[str, Any] = {"sink": [(0, 1), (1, 3), (2, 3)]}
    found = ic.method(name)(model, batch, **settings, **parts)
    assert bool(found.scores[~batch.mask].isnan().all()) and bool(found.scores[batch.mask].isfinite().all())
    assert torch.equal(found.real, batch.mask) and found.labels == batch.labels
    for row, (alone, sink) in enumerate(zip(batch, parts["sink"], strict=True)):
        single = ic.method(name)(model, alone, **settings, sink=sink)
        real = batch.mask[row]
        assert torch.equal(single.scores[0], found.scores[row, real])
        assert single.spans[0] == found.spans[row] and single.notes[0] == found.notes[row]
        if single.rows is not None:
            both = found.rows[row][real][:, real]
            torch.testing.assert_close(single.rows[0], both, rtol=0, atol=0, equal_nan=True)
        assert float(single.first_share[0]) == float(found.first_share[row])
    joined = ic.method(name)(model, batch, batch_size=1, **settings, **parts)
    assert joined == found and joined.html() == found.html() and str(joined) == str(found)
    for wrong in ({"sink": [(0, 1)]}, {"thinking": [(0, 1)] * 4}):
        with pytest.raises(ic.PlanError, match=rf"has {len(next(iter(wrong.values())))} items for 3 prompts"):
            ic.method(name)(model, batch, **settings, **wrong)


def test_one_token_against_another_in_each_row() -> None:
    model, batch = tiny_model("qwen2"), ids(LONG, SHORT, target=1)
    found = ic.method("attnlrp")(model, batch, against=[4, 8])
    for row, other in enumerate((4, 8)):
        alone = ic.method("attnlrp")(model, batch.row(row), against=other)
        assert torch.equal(alone.scores[0], found.scores[row, batch.mask[row]])
    assert not torch.equal(found.scores[0], ic.method("attnlrp")(model, batch.row(0), against=8).scores[0])
    for name in FLOWS:
        with pytest.raises(ic.PlanError, match=f"{name} explains states, not logits"):
            ic.method(name)(model, batch, against=4)


# Mass


class Given(Attribution):
    """Scores that the test says."""

    name = "given"
    additive = False

    def __init__(self, scores: Tensor, stream: Tensor | None = None) -> None:
        super().__init__()
        self.scores, self.stream = scores, stream

    def attribute(self, model: ic.Model, layout: Layout, config: Any) -> Any:
        from interp_plugins.attribution.method import Attributed

        return Attributed(self.scores, hops=self.scores[None], stream=self.stream)


def test_shares_and_what_is_left_out() -> None:
    """Shares are those of all scores, also where the first token or sinks are left out of the result."""
    model, tokens = tiny_model("qwen2"), ids(LONG[:5])
    scores, stream = torch.tensor([4.0, -1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, MASSIVE + 0.1, 1.0, MASSIVE])
    method = Given(scores, stream)
    kept = {
        "nothing": [4.0, -1.0, 2.0, 1.0, 0.0], "first": [0.0, -1.0, 2.0, 1.0, 0.0], "sinks": [0.0, -1.0, 0.0, 1.0, 0.0]
    }  # fmt: skip
    for left_out, wanted in kept.items():
        found = method(model, tokens, leave_out=left_out)
        assert found.scores[0].tolist() == wanted == found.hops[0, 0].tolist()
        assert float(found.first_share[0]) == 0.5 and float(found.sink_share[0]) == 0.25
        assert found.sinks[0].tolist() == [False, False, True, False, False]
    assert float(Given(torch.zeros(5), stream)(model, tokens).first_share[0]) == 0.0
    with pytest.raises(ic.ReadError, match="given gave scores that are no numbers; see dtype torch.float32"):
        Given(torch.tensor([1.0, float("nan"), 0, 0, 0]), stream)(model, tokens)


def test_what_counts_most_goes_by_size(toy: ic.Model) -> None:
    """Also what speaks against the answer, which a sentence says; a token with its position, as readers name it."""
    found = ic.method("input_x_gradient")(toy, "Q: big\nA: small\n\nQ: hot\nA:", target=" cold")
    best = found.top(0, 1)[0]
    stop = len(found.labels[0]) - 1  # the target is left out
    assert abs(best["score"]) == float(found.scores[0, :stop].abs().max())
    spoken = ["owes most to", "is held back most by"]
    for result, verb in (
        (found, spoken[best["score"] < 0]),
        (replace(found, scores=-found.scores), spoken[best["score"] > 0]),
    ):
        where = "the last position" if best["pos"] < 0 else f"position {best['pos']}"
        assert result.finding == f"The answer {verb} the token at {where}, '{best['token'].replace(chr(10), '⏎')}'."


def test_attention_sinks_are_long_streams() -> None:
    """A token whose stream is made long is one; a method's own pass and a pass for it agree."""
    model = tiny_model("qwen2")
    layout = layout_of(model, ids(LONG, target=2))
    site = stream_site(model)
    assert not attention_sinks(model, layout).any()
    length = model.run(layout.tokens, read=site, logits=False)[site].plain[0].norm(dim=-1)
    long = length.clone()
    long[3] = length.median() * (MASSIVE + 1)
    assert attention_sinks(model, layout, long).tolist() == [i == 3 for i in range(len(LONG))]
    found = ic.method("ifr")(model, layout.tokens)
    assert found.sinks[0].tolist() == attention_sinks(model, layout).tolist()


# The gate


def scaled(family: str, layer: int = 1, factor: float = 1.01) -> ic.Model:
    """A model whose block multiplies what leaves it, as some families do; nothing tells the engine."""
    hf = testing.tiny(family)
    block = ic.load(testing.tiny(family)).module("block", layer)
    inner = next(m for name, m in hf.named_modules() if type(m) is type(block) and name.endswith(f".{layer}"))
    forward = inner.forward

    def multiplied(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    inner.forward = multiplied
    return ic.load(hf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_model_that_does_not_add_up_is_refused(family: str) -> None:
    """By name, layer and what is left over, before anything else runs; methods that stand on no sum go on."""
    model, fine = scaled(family), tiny_model(family)
    values = model.run(ids(LONG), read=[S.resid_pre[1], S.resid_post[1]], logits=False)
    assert not torch.equal(values[S.resid_post[1]], values[S.resid_pre[1]])
    says = (  # the self-check has withdrawn what does not add up, and says by how much
        rf"in layer 1 of {model.source} it does not add up: resid_pre.* is off resid_post by .* of its norm "
        r"\(at most 1e-04 in float32\).*layer 1 has no mlp_out \(self-check: .* is resid_post fails \(9\.9e-03\)\)"
    )
    for name in ADDITIVE:
        for tokens in (ids(LONG), ids(LONG, SHORT, target=2)):
            with pytest.raises(ic.CapabilityError, match=f"{name} shares out what is added to the stream, and {says}"):
                ic.method(name)(model, tokens)
        assert bool(ic.method(name)(fine, ids(LONG)).scores.isfinite().all())
    for name in OTHERS[:2]:
        assert bool(ic.method(name)(model, ids(LONG), **({"steps": 2} if "ated" in name else {})).scores.any())


def test_a_model_that_changes_is_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at once; and again where a block was given another forward, or a hook."""
    hf = testing.tiny("llama")
    model, runs, run = ic.load(hf), list[int](), ic.Model.run
    monkeypatch.setattr(ic.Model, "run", lambda self, *a, **k: runs.append(1) or run(self, *a, **k))
    demand_additive("x", model, ids(LONG))
    demand_additive("x", model, ids(LONG))
    assert len(runs) == 1
    block = hf.model.layers[1]
    hook = block.register_forward_hook(lambda module, args, out: out * 1.3)
    with pytest.raises(ic.CapabilityError, match="in layer 1 of LlamaForCausalLM it does not add up"):
        demand_additive("x", model, ids(LONG))
    hook.remove()
    demand_additive("x", model, ids(LONG))
    forward = block.forward
    block.forward = lambda *args, **named: forward(*args, **named) * 1.3
    with pytest.raises(ic.CapabilityError, match="in layer 1 of LlamaForCausalLM it does not add up"):
        demand_additive("x", model, ids(LONG))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_gate_is_as_fine_as_the_dtype(dtype: torch.dtype) -> None:
    demand_additive("x", tiny_model("qwen2", dtype), ids(LONG))


@pytest.mark.slow
@pytest.mark.parametrize("family", testing.families())
def test_every_family_adds_up(family: str) -> None:
    demand_additive("x", tiny_model(family), ids(LONG))


# Over images


@pytest.mark.parametrize("family", [pytest.param("qwen3_vl", marks=pytest.mark.slow), "llava", "llava_onevision"])
def test_scores_over_images(family: str, tmp_path: Path) -> None:
    """Every box has the number of its visual token; pictures lie behind; pages and files."""
    model = tiny_model(family)
    images = [pictures.picture(family), pictures.picture(family, 1)]
    values = pictures.inputs(family, [images])
    found = ic.method("ifr")(model, values, variant="span")
    grid = [token for token in model.visual_grid(values)[0] if token.box is not None]
    drawn = found.over_images()
    tiles = sorted({(token.image, token.tile) for token in grid})
    several = {image: sum(i == image for i, _ in tiles) > 1 for image, _ in tiles}
    assert list(drawn) == [f"image {i}" + (f", tile {t}" if several[i] else "") for i, t in tiles]
    for (image, tile), overlay in zip(tiles, drawn.values(), strict=True):
        own = [token for token in grid if (token.image, token.tile) == (image, tile)]
        assert list(overlay.boxes) == [token.box for token in own]
        there = found.map(image=image, tile=tile)
        assert there.numel() == len(own)
        assert all(there[token.row, token.col] == found.scores[0, token.position] for token in own)
        for name, layer in overlay.layers.items():
            vector = found.scores[0] if name == "all hops" else found.hops[0, 0]
            assert layer == vector[[token.position for token in own]].tolist()
    assert {overlay.ends("all hops") for overlay in drawn.values()} == {next(iter(drawn.values())).ends("all hops")}
    page = found.html()
    assert page.count("<svg") == 2 * len(drawn) and "<image" not in page and "image 0" in page
    behind = images if family != "llava_onevision" else values["pixel_values"]
    over = found.over_images(behind)
    for number, overlay in enumerate(over.values()):
        assert overlay.html().count("<image") == 2 and "href='data:image/png;base64," in overlay.html()
        assert overlay.png(tmp_path / f"{number}.png").stat().st_size > 1000
    found.save(tmp_path / "kept")
    again = AttributionResult.load(tmp_path / "kept")
    assert again == found and again.html() == page
    with pytest.raises(ic.PlanError, match="1 pictures for 2 images of the row; give one per image"):
        found.over_images(images[:1])
    if family == "llava_onevision":
        with pytest.raises(ic.PlanError, match=r"one of 2 that the tower was given .*; give a list of 2 pictures"):
            found.over_images([images[0][None], images[1]])


def test_texts_have_no_images() -> None:
    found = ic.method("random_attribution")(tiny_model("llava"), ids(LONG, SHORT))
    assert found.visual == ((), ()) and found.over_images(row=1) == {} and "<svg" not in found.html()
    with pytest.raises(ic.PositionError, match="no tile 0 of image 0; the row has no images"):
        found.map()
    with pytest.raises(ic.PlanError, match="1 pictures for 0 images"):
        found.over_images([torch.zeros(3, 4, 4)])
