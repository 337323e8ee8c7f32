"""AttnLRP: the published implementations' numbers, spans, rows and hops, and the method around them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, tiny_model, toy_model
from interp_plugins.attribution.attnlrp import AttnLRP, AttnLRPConfig
from interp_plugins.attribution.layout import Layout
from interp_plugins.attribution.relevance import rules as R
from interp_plugins.attribution.relevance.passes import Relevances, relevance, relevance_rows
from tolerances import close

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

TOLERANCE = 5e-6
"""Of relevances of up to 5 in float32, as the golden files' own float64 check says (3.8e-6)."""
GOLDEN = DATA / "attribution"


@cache
def published(name: str) -> tuple[ic.Model, dict[str, Any], Layout]:
    """A tiny model, published numbers, and the text that they are about."""
    with np.load(GOLDEN / "relevance" / f"{name}.npz") as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files}
    start, ids = len(numbers["prompt_ids"]), torch.cat([numbers["prompt_ids"], numbers["generation_ids"]])[None]
    sink, thinking = (
        range(start + int(numbers[part][0]), start + int(numbers[part][1]) + 1)
        for part in ("sink_span", "thinking_span")
    )
    tokens = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    prompt = tuple(numbers["user_prompt_indices"].tolist())
    layout = Layout(tokens, prompt, range(start, ids.shape[1]), sink, thinking, sink)
    return ic.load(str(GOLDEN / "models" / name)), numbers, layout


@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp", "gradient"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_relevance_is_that_of_lxt(name: str, rule: str) -> None:
    """Rows, their sum by one backward pass, the largest logit, and every block's output."""
    model, numbers, layout = published(name)
    start, ids = layout.target.start, layout.tokens.ids[0].tolist()
    far = TOLERANCE if rule != "gradient" else 4 * TOLERANCE  # true gradients of patterns are that much larger
    chosen, picked = R.rules(rule), numbers["rows"].tolist()
    at = [start - 1 + g for g in picked]
    rows = relevance_rows(model, layout.tokens, chosen, at, [ids[p + 1] for p in at])
    torch.testing.assert_close(rows, numbers[f"lxt/{rule}/rows"], atol=far, rtol=0)
    span = relevance(model, layout.tokens, chosen, range(start - 1, len(ids) - 1), ids[start:])
    torch.testing.assert_close(span.tokens, numbers[f"lxt/{rule}/sum"], atol=2 * far, rtol=0)
    largest = relevance(model, layout.tokens, chosen, [start - 1]).tokens
    torch.testing.assert_close(largest, numbers[f"lxt/{rule}/largest"], atol=far, rtol=0)
    inner = relevance(model, layout.tokens, chosen, [start - 1], [ids[start]], sites=[S.resid_post]).relevance
    torch.testing.assert_close(torch.stack(list(inner.values())), numbers[f"lxt/{rule}/stream"], atol=far, rtol=0)


def attributed(name: str, **settings: Any) -> Any:
    model, _, layout = published(name)
    return AttnLRP().attribute(model, layout, AttnLRPConfig(profile="reference", **settings))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_hops_are_the_published_ones(name: str) -> None:
    """Vectors, their mass and the rows that they are copied into, for each way of shaping."""
    _, numbers, layout = published(name)
    where = list(layout.projected)
    for variant in ("hop0", "multi_hop"):
        for neg in ("drop", "abs"):
            for norm in ("norm", "no_norm"):
                key = f"{variant}/{neg}/{norm}"
                found = attributed(name, variant=variant, n_hops=2, neg_handling=neg, norm_mode=norm)
                far = 1e-6 if norm == "norm" else 2e-5  # relevances of relevances: each pass multiplies by up to 4
                torch.testing.assert_close(found.hops[:, where], numbers[f"{key}/hops"], atol=far, rtol=0)
                rows = found.rows[numbers["rows"]][:, where]
                torch.testing.assert_close(rows, numbers[f"{key}/rows"], atol=far, rtol=0, equal_nan=True)
                if norm == "norm":
                    torch.testing.assert_close(found.mass, numbers[f"{key}/mass"].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def test_rows_and_spans_are_the_published_ones(name: str) -> None:
    _, numbers, layout = published(name)
    where = list(layout.projected)
    for objective in ("generated", "max"):
        rows = attributed(name, variant="per_token", objective=objective).rows[numbers["rows"]][:, where]
        torch.testing.assert_close(rows, numbers[f"per_token/{objective}"], atol=TOLERANCE, rtol=0, equal_nan=True)
    mean = attributed(name, normalise=True)
    torch.testing.assert_close(mean.scores[where], numbers["span_mean"], atol=TOLERANCE, rtol=0)


PROMPT, TARGET = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:", " dry"


def test_the_method_explains_a_target() -> None:
    result = AttnLRP()(toy_model(), PROMPT, target=TARGET)
    assert result.rows is None and result.hops is None
    assert "attnlrp (norm, activation, product halved" in result.notes[0]["rules"]
    logit = result.notes[0]["objective"]
    assert result.notes[0]["residue"] == pytest.approx(logit - float(result.scores.sum()), abs=1e-4)
    assert not result.scores[0, -1]  # the target itself is behind what predicts it


def test_what_is_conserved_leaves_no_residue() -> None:
    model = toy_model()
    biases = [name for name, _ in model.hf.named_parameters() if name.endswith("bias")]
    assert not biases
    notes = AttnLRP()(model, PROMPT, target=TARGET, rules="cp_lrp").notes[0]
    assert abs(notes["residue"]) < 1e-3 * abs(notes["objective"])


def test_variants_agree_where_they_must() -> None:
    """A span is the sum of its rows; the first hop is the span, shaped; without hops there is but the first."""
    model, tokens = toy_model(), toy_model().tokens(PROMPT + " dry\n\nQ: big\nA:", " small\n\nQ:")
    span = AttnLRP()(model, tokens, variant="span")
    rows = AttnLRP()(model, tokens, variant="per_token")
    close(rows.scores, span.scores, model)
    assert rows.rows is not None
    target = tokens.spans["target"][0][0]
    for query in range(rows.rows.shape[1]):
        computed = ~rows.rows[0, query].isnan()
        assert int(computed.sum()) == (query if query in range(target.start, target.stop) else 0)
    hop = AttnLRP()(model, tokens, variant="hop0", norm_mode="no_norm")
    close(hop.scores, span.scores.clamp(min=0), model)
    none = AttnLRP()(model, tokens, variant="multi_hop", n_hops=0)
    assert none.hops is not None and none.hops.shape[1] == 1
    halves = AttnLRP()(model, tokens, variant="span", normalise=True)
    close(halves.scores * (target.stop - target.start), span.scores, model)


def test_the_next_token_without_a_target() -> None:
    model = toy_model()
    result = AttnLRP()(model, PROMPT)
    assert result.notes[0]["objective"] == pytest.approx(float(model.run(PROMPT).logits.plain[0, -1].max()), rel=1e-5)
    for variant in ("per_token", "hop0", "multi_hop"):
        assert AttnLRP()(model, PROMPT, variant=variant).scores.shape == result.scores.shape


def test_against_another_token() -> None:
    model = toy_model()
    one, other = (AttnLRP()(model, PROMPT, target=target) for target in (" dry", " cold"))
    both = AttnLRP()(model, PROMPT, target=" dry", against=" cold")
    close(both.scores, one.scores - other.scores, model, size=one.scores.abs().max())


def test_rows_of_a_batch_are_those_alone() -> None:
    model = toy_model()
    prompts = [PROMPT, "Q: big\nA: small\n\nQ: hot\nA:"]
    together = AttnLRP()(model, prompts, target=[" dry", " cold"])
    alone = AttnLRP()(model, prompts[1], target=" cold")
    close(together.scores[1][~together.scores[1].isnan()], alone.scores[0], model)


def test_positions_are_counted_with_their_tokens() -> None:
    model = toy_model()
    settings: dict[str, Any] = {"target": TARGET, "rules": "pa_lrp"}
    sound, published_form = (AttnLRP()(model, PROMPT, profile=p, **settings) for p in ("sound", "reference"))
    notes = sound.notes[0]
    assert notes["positions_absolute"] > abs(notes["positions"]) > 0
    assert notes["residue"] == pytest.approx(notes["objective"] - float(sound.scores.sum()), abs=1e-3)
    assert float(published_form.scores.abs().max()) == pytest.approx(1.0)


def test_what_makes_no_sense_is_refused() -> None:
    model = toy_model()
    with pytest.raises(ic.PlanError, match="n_hops=-1"):
        AttnLRP()(model, PROMPT, n_hops=-1)
    with pytest.raises(ic.PlanError, match="rules"):
        AttnLRP()(model, PROMPT, rules="attn")
    with pytest.raises(ic.CapabilityError, match="not handed cosines and sines"):
        AttnLRP()(tiny_model("llama4"), torch.tensor([[5, 17, 33]]), rules="pa_lrp")


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "qwen3_moe"])
def test_the_conformance_kit(family: str) -> None:
    testing.check_method("attnlrp", tiny_model(family)).raise_if_failed()


def test_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass; one backward pass, and one more per hop."""
    from interp_plugins.attribution.relevance.passes import Explained

    model, forward, backward = toy_model(), list[int](), list[int]()
    run, ask = ic.Model.run, Explained.relevance

    def counted(self: Explained, *args: Any, **named: Any) -> Relevances:
        backward.append(1)
        return ask(self, *args, **named)

    monkeypatch.setattr(ic.Model, "run", lambda *a, **k: forward.append(1) or run(*a, **k))
    monkeypatch.setattr(Explained, "relevance", counted)
    tokens = model.tokens(PROMPT, " dry\n\nQ:")
    for settings, passes in (({"variant": "span"}, 1), ({"variant": "multi_hop", "n_hops": 3}, 4)):
        forward.clear(), backward.clear()
        AttnLRP().run(model, tokens, AttnLRPConfig(**settings))
        assert len(backward) == passes and len(forward) == 2  # one more for the lengths of attention sinks


def test_results_are_kept(tmp_path: Path) -> None:
    result = AttnLRP()(toy_model(), PROMPT, target=TARGET, variant="multi_hop")
    result.save(tmp_path / "kept")
    assert type(result).load(tmp_path / "kept") == result
