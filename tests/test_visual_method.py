"""Method `visual`: every intervention against hooks on the model's own modules, and what must be refused.

By hand: image_hooks.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_hooks import (
    ANSWER,
    TEXT,
    hidden_by_hand,
    hooked,
    logp_by_hand,
    model_of,
    places,
    replaced_by_hand,
    seen,
    texts,
)
from interp_plugins.visual import interventions
from interp_plugins.visual.interventions import Intervention
from interp_plugins.visual.records import Records
from interp_plugins.visual.sample import AnswerScores, sample_of
from layouts import DEEPSTACK

import interp_core as ic
from interp_core import testing

FAMILIES = ("qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "llava")


@pytest.mark.parametrize("family", FAMILIES)
def test_replacements_equal_hooks(family: str) -> None:
    model, (clean, blind, _) = model_of(family), texts(family)
    (visual, behind, _), (inputs, added) = places(clean), seen(model, family, clean)
    other, others = seen(model, family, blind)
    assert bool(added) == (family in DEEPSTACK)
    names = ["replace:blind", "replace:zero", "replace:mean", "text:blind"]
    found = ic.method("visual")(model, clean, blind={"random": blind}, interventions=names)
    kept = ic.method("visual")(model, clean, blind={"random": blind}, interventions=names[:3], deepstack="keep")
    zeros, means = [torch.zeros_like(x) for x in added], [x.mean(0).expand_as(x) for x in added]
    for layer in range(model.n_layers):
        rows = inputs[layer][0, visual]
        for i, (value, additions) in enumerate(
            [(other[layer][0, visual], others), (torch.zeros_like(rows), zeros), (rows.mean(0), means)]
        ):
            wanted = replaced_by_hand(model, family, clean, layer, visual, value, additions).mean()
            torch.testing.assert_close(found.mean[0, i, layer], wanted, atol=1e-6, rtol=0)
            wanted = replaced_by_hand(model, family, clean, layer, visual, value).mean()
            torch.testing.assert_close(kept.mean[0, i, layer], wanted, atol=1e-6, rtol=0)
        wanted = replaced_by_hand(model, family, clean, layer, behind, other[layer][0, behind]).mean()
        torch.testing.assert_close(found.mean[0, 3, layer], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean[0, 0, 0], logp_by_hand(model, blind).mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.delta[0, 0, 0], found.delta_blind[0, 0], atol=1e-6, rtol=0)
    assert (found.mean[0, 0, 0] - kept.mean[0, 0, 0]).abs() > 1e-3 or not added  # kept additions are another thing
    torch.testing.assert_close(found.delta[0, 3, 0], torch.zeros((), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "family", ["qwen3_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "llava"))]
)
def test_knockouts_and_truncation_equal_masks(family: str) -> None:
    model, clean = model_of(family), texts(family)[0]
    visual, behind, p0 = places(clean)
    last, question = list(range(p0, clean.ids.shape[1])), list(clean.rows.names["question"][0])
    method, n = ic.method("visual"), model.n_layers
    names = ["knockout:text", "knockout:question", "knockout:last", "knockout:last,question", "truncation", "band:2"]
    groups = [(behind, visual), (question, visual), (last, visual), (last, question), *[(behind, visual)] * 2]
    for window in (1, 3):
        found = method(model, clean, interventions=names, window=window)
        for i, (query, key) in enumerate(groups):
            for layer in range(n):
                middle = range(max(0, layer - window // 2), min(n, layer + window // 2 + 1))
                hit = {"truncation": range(layer, n), "band:2": range(layer, min(n, layer + 2))}.get(names[i], middle)
                wanted = hidden_by_hand(model, family, clean, hit, query, key).mean()
                torch.testing.assert_close(found.mean[0, i, layer], wanted, atol=1e-6, rtol=0)
                assert found.hit[i][layer] == len(hit)
    assert len({round(float(x), 6) for x in found.mean[0, :5, 0]}) == 5  # each of them hides something else
    torch.testing.assert_close(found.mean[0, 0, 1], found.mean[0, 4, 0], atol=1e-6, rtol=0)


def test_scores_are_those_of_a_plain_pass() -> None:
    """Defect 1: read where the answer is predicted, never at positions of the prompt."""
    model, (clean, blind, _) = model_of("qwen3_vl"), texts("qwen3_vl")
    foil = int(model.tokens(" blue").ids[0, 0])
    found = ic.method("visual")(model, clean, blind=blind, foil=foil)
    each, other = logp_by_hand(model, clean), logp_by_hand(model, blind)
    with torch.no_grad():
        logits, blinded = (
            model.hf(input_ids=x.ids, attention_mask=x.mask.long(), **x.inputs, use_cache=False).logits[0]
            for x in (clean, blind)
        )
    p0, answer = places(clean)[2], clean.ids[0, places(clean)[2] + 1]
    values, theirs = (
        dict(zip(found.scores, found.clean[0], strict=True)),
        dict(zip(found.scores, found.blind[0, 0], strict=True)),
    )
    assert (int(found.m[0]), found.modes) == (len(each), ("image",)) and len(each) > 1
    for got, wanted in [
        (values["mean"], each.mean()), (values["first"], each[0]), (values["p"], each[0].exp()), (theirs["mean"], other.mean()),
        (values["foil"], logits[p0, answer] - logits[p0, foil]), (values["kl"], torch.zeros(())),
        (theirs["kl"], torch.nn.functional.kl_div(blinded[p0].log_softmax(-1), logits[p0].softmax(-1), reduction="sum")),
    ]:  # fmt: skip
        torch.testing.assert_close(got, wanted.double(), atol=1e-6, rtol=0)
    assert int(values["token"]) == int(logits[p0].argmax()) and int(theirs["token"]) == int(blinded[p0].argmax())
    right = model.tokens(TEXT, model.word(int(logits[p0].argmax())), images=testing.pictures(3, (16, 16))[0])
    right_ids = right.ids[0, -1]
    assert int(right_ids) == int(logits[p0].argmax())
    assert (
        ic.method("visual")(model, right, interventions=["truncation"]).clean[0, list(found.scores).index("right")] == 1
    )


def test_noise_is_seeded_and_averaged() -> None:
    model, clean = model_of("qwen3_vl"), texts("qwen3_vl")[0]
    found = ic.method("visual")(model, clean, interventions=["replace:noise"], draws=5, seed=3, layers=[1])
    again = ic.method("visual")(model, clean, interventions=["replace:noise"], draws=5, seed=3)
    torch.testing.assert_close(found.mean[0, 0, 0], again.mean[0, 0, 1], atol=1e-9, rtol=0)
    (visual, *_), (inputs, added) = places(clean), seen(model, "qwen3_vl", clean)
    rows, each = inputs[1][0, visual], []
    for draw in range(5):
        states = ic.visual.noise(
            model.run(clean, read=ic.visual.reads(model)), interventions.noise_seed(sample_of(clean), 3 + draw)
        )
        noisy = states.streams[1][0]
        assert float((noisy - rows).std()) == pytest.approx(float(rows.std()), rel=0.3)
        each.append(replaced_by_hand(model, "qwen3_vl", clean, 1, visual, noisy, added).mean())
    torch.testing.assert_close(found.mean[0, 0, 0], torch.stack(each).mean(), atol=1e-6, rtol=0)
    assert len({round(float(x), 9) for x in each}) == 5


def test_a_data_set_mean_can_be_put_in() -> None:
    model, (clean, *others) = model_of("llava"), texts("llava")
    reads = ic.visual.reads(model)
    mean = ic.visual.dataset_mean(model.run(one, read=reads) for one in others)
    found = ic.method("visual")(model, clean, interventions=["replace:mean_dataset"], reference=mean)
    visual = places(clean)[0]
    for layer in range(model.n_layers):
        rows = torch.cat([seen(model, "llava", one)[0][layer][0, visual] for one in others]).mean(0)
        wanted = replaced_by_hand(model, "llava", clean, layer, visual, rows.expand(len(visual), -1)).mean()
        torch.testing.assert_close(found.mean[0, 0, layer], wanted, atol=1e-6, rtol=0)


def test_images_of_different_sizes_have_their_own_positions() -> None:
    """Defect 3: no sample's visual range is another's. Rows of a batch are what they are alone."""
    model = model_of("qwen3_vl")
    small, large = testing.pictures(1, (16, 16))[0], testing.pictures(1, (32, 16))[0]
    batch = model.tokens([TEXT, "is it red ?"], ANSWER, images=[[small], [large]])
    names = ["replace:zero", "knockout:text", "truncation"]
    found = ic.method("visual")(model, batch, interventions=names)
    for row, (text, image) in enumerate([(TEXT, small), ("is it red ?", large)]):
        alone = ic.method("visual")(model, model.tokens(text, ANSWER, images=image), interventions=names)
        torch.testing.assert_close(found.delta[row], alone.delta[0], atol=1e-6, rtol=0)
    assert len(sample_of(batch.row(0)).visual) != len(sample_of(batch.row(1)).visual)


def test_records_hold_what_the_result_says(tmp_path: Path) -> None:
    model, (clean, blind, swap) = model_of("llava"), texts("llava")
    names = ["replace:blind", "replace:swap", "knockout:text"]
    found = ic.method("visual")(
        model,
        ic.Tokens.stack([clean, swap]),
        blind=[{"random": blind}] * 2,
        swap=[swap, clean],
        interventions=names,
        window=3,
    )
    records = found.records(["a", "b"], ["x", "x"], pilots=[True, False])
    assert len(records.rows) == 2 * (1 + 3 * model.n_layers)
    assert records.interventions == [
        ("blind", "random"), ("replace:blind", "random"), ("replace:swap", "image"), ("knockout:text", "window 3"),
    ]  # fmt: skip
    for i, name in enumerate(names):
        for pilot, row in ((True, 0), (False, 1)):
            effects = records.effects(name, pilot=pilot)
            np.testing.assert_allclose(effects.values[0], found.delta[row, i].numpy(), rtol=1e-12)
            assert effects.images == ("x",) and effects.layers.numbers == found.layers
    np.testing.assert_allclose(records.blind(records.effects(names[0])), found.delta_blind[1:, 0].numpy(), rtol=1e-12)
    assert records.rows[-1]["hit"] == 2  # the window is clipped at the last layer
    assert Records.of(records.rows).hash == records.hash
    found.save(tmp_path / "result")
    assert type(found).load(tmp_path / "result") == found and "<svg" in found.html()
    assert len(found.table()) == 3 * model.n_layers and "knockout:text window 3" in str(found)


def test_what_is_refused_before_the_model_runs() -> None:
    model, (clean, blind, _) = model_of("qwen3_vl"), texts("qwen3_vl")
    method, text = ic.method("visual"), model.tokens(TEXT, ANSWER)
    large = model.tokens(TEXT, ANSWER, images=testing.pictures(1, (32, 16))[0])
    for tokens, settings, error, match in [
        (text, {}, ic.PlanError, "row 0 has no visual tokens"),
        (model.tokens(TEXT, images=testing.pictures(1, (16, 16))[0]), {}, ic.PlanError, "no span 'target'"),
        (clean, {}, ic.PlanError, "replace:blind needs another image"),
        (clean, {"interventions": ["replace:blank"]}, ic.PlanError, "Did you mean 'replace:blind'"),
        (clean, {"interventions": []}, ic.PlanError, "name one or more"),
        (clean, {"interventions": ["knockout"], "window": 2}, ic.PlanError, "an odd number"),
        (clean, {"interventions": ["replace:mean_dataset"]}, ic.PlanError, "needs reference="),
        (clean, {"blind": large}, ic.PlanError, "processed to another grid"),
        (clean, {"blind": model.tokens("is it red ?", ANSWER, images=testing.pictures(1, (16, 16))[0])}, ic.PlanError, "more than its image"),
        (clean, {"blind": [blind, blind]}, ic.PlanError, "2 items for 1 rows"),
        (clean, {"blind": 5}, ic.PlanError, "tokens of the same text"),
        (clean, {"blind": blind, "layers": [7]}, ic.SiteError, "no layer 7"),
        (clean, {"blind": blind, "foil": 9999}, ic.PlanError, "no token id"),
    ]:  # fmt: skip
        calls = []
        handle = model.hf.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with hooked([handle]), pytest.raises(error, match=match):
            method(model, tokens, **settings)  # type: ignore[arg-type]
        assert not calls, match


def test_answers_must_lie_behind_the_image() -> None:
    clean = texts("llava")[0]
    for span, match in [((0, 2), "behind the image"), ((clean.lengths[0] - 1, clean.lengths[0]), "")]:
        moved = clean.name(answer=ic.Span(*span))
        if match:
            with pytest.raises(ic.PlanError, match=match):
                sample_of(moved, "answer")
        else:
            assert sample_of(moved, "answer").reads == [span[0] - 1]


def test_names_of_interventions() -> None:
    assert Intervention.parse("knockout") == Intervention("knockout", "knockout", "text", "vision")
    assert Intervention.parse("knockout:last,question").key == "question"
    assert [Intervention.parse(name).sources for name in ("replace:swap", "text:blind", "truncation")] == [
        "swap",
        "blind",
        "",
    ]


def test_scores_look_at_logits_once() -> None:
    sample = sample_of(texts("llava")[0])
    scores = AnswerScores(sample)
    logits = torch.randn(3, len(sample.ids), 96, dtype=torch.float64)
    listed = scores.listed()
    assert [score.name for score in listed] == list(sample.names)
    first = listed[0].fn(logits, None)
    assert first is scores.of(logits)["mean"] and listed[1].fn(logits, None) is scores.of(logits)["first"]
    assert scores.of(logits.clone())["mean"] is not first


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_conforms(family: str) -> None:
    model, images = model_of(family), testing.pictures(3, (16, 16))
    asked = zip([TEXT, TEXT, "is it red ?"], images, strict=True)
    rows = [model.tokens(text, " red", images=image) for text, image in asked]
    settings = {"interventions": ["replace:zero", "truncation"], "layers": [1]}
    testing.check_method("visual", model, rows=rows, settings=settings).raise_if_failed()


def test_keeps_the_rules_of_methods() -> None:
    """What the whole kit checks at length, once: equal results, batches joined, a folder gone on with, saved and loaded."""
    model, images = model_of("llava"), testing.pictures(2, (16, 16))
    tokens = model.tokens([TEXT, "is it red ?"], " red", images=[[image] for image in images])
    settings = {"interventions": ["knockout"], "layers": [1]}
    whole = ic.method("visual")(model, tokens, **settings)
    assert whole == ic.method("visual")(model, tokens, **settings)
    parts = ic.method("visual")(model, tokens, batch_size=1, **settings)
    torch.testing.assert_close(parts.delta, whole.delta, atol=1e-6, rtol=0)
