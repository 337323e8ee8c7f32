"""Faithfulness: published numbers, direct implementations, counts of what runs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from evaluation_golden import EXAMPLES, drawn, example, golden
from interp_plugins.attribution.evaluation import forms as forms_module
from interp_plugins.attribution.evaluation.areas import areas
from interp_plugins.attribution.evaluation.faithfulness import Faithfulness, faithfulness, metrics
from interp_plugins.attribution.evaluation.forms import forms, normalised
from interp_plugins.attribution.evaluation.orders import deletion_steps, ordered, step_sizes
from interp_plugins.attribution.evaluation.perturbed import Perturbed, log_odds, log_probs
from interp_plugins.attribution.evaluation.recovery import recovery
from interp_plugins.attribution.evaluation.soft import soft
from tolerances import close, rounding
from torch import Tensor

import interp_core as ic
from interp_core import testing

MODELS = DATA / "attribution" / "models"
PROMPT, TARGET = 12, 4


@cache
def published_model(name: str) -> ic.Model:
    return ic.load(str(MODELS / name))


@cache
def llama() -> ic.Model:
    return ic.load(testing.tiny("llama"))


def row_of(ids: Tensor, start: int, stop: int, target: int) -> ic.Tokens:
    spans = {"prompt": ((ic.Span(start, stop),),), "target": ((ic.Span(target, ids.shape[-1]),),)}
    return ic.Tokens(ids.view(1, -1), torch.ones(1, ids.shape[-1], dtype=torch.bool), spans=spans)


def text(model: ic.Model | None = None, seed: int = 0, **options: Any) -> Perturbed:
    ids = torch.randint(5, 90, (PROMPT + TARGET + 4,), generator=torch.Generator().manual_seed(seed))
    return Perturbed(model or llama(), row_of(ids, 2, 2 + PROMPT, 4 + PROMPT), **{"replace_id": 3, **options})


def slow_log_prob(perturbed: Perturbed, gone: Tensor) -> float:
    """One whole pass by the model itself, and a log-softmax of everything."""
    ids = perturbed.tokens.ids.clone()
    for column, is_gone in zip(perturbed.places.prompt, gone.tolist(), strict=True):
        if is_gone:
            ids[0, column] = perturbed.replace_id
    with torch.no_grad():
        every = perturbed.model.hf(input_ids=ids).logits[0].float().log_softmax(-1)
    wanted = perturbed.tokens.ids[0]
    return sum(float(every[position - 1, wanted[position]]) for position in perturbed.places.target)


# Forms


def slow_forms(matrix: Tensor, span: range) -> tuple[Tensor, Tensor, Tensor]:
    clean = torch.where(torch.isnan(matrix), 0.0, matrix.double()).clamp(min=0)
    rows = torch.stack([row / (row.sum() + 1e-8) for row in clean])
    prompt, rec = matrix.shape[1] - len(matrix), torch.zeros(matrix.shape[1], dtype=torch.float64)
    for token in span:
        r = rows[token].clone()
        for k in range(token - 1, -1, -1):
            r = r + rows[k] * r[prompt + k]
            r[prompt + k] = 0
        rec += r
    return rows.sum(0), sum(rows[t] for t in span), rec


@pytest.mark.parametrize("span", [range(0, 7), range(2, 5), range(6, 7), range(0, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_forms_are_those_of_the_slow_recursion(span: range, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(7, 16, generator=torch.Generator().manual_seed(len(span)))
    if causal:
        matrix = matrix.masked_fill(torch.ones(7, 16).triu(10).bool(), 0.0)
    matrix[1], matrix[3, 4] = torch.nan, torch.nan
    for block in (forms_module.BLOCK, 20):
        monkeypatch.setattr(forms_module, "BLOCK", block)
        found = forms(matrix, span)
        for one, wanted in zip((found.seq, found.row, found.rec), slow_forms(matrix, span), strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-13, rtol=1e-12)
    assert found.prompt == 9 and not found.replicated


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_forms_are_the_published_ones(model: str) -> None:
    numbers = golden("forms.npz")
    names = [key.split("/")[3] for key in numbers if key.startswith(f"{model}/") and key.endswith("/matrix")]
    assert len(names) == 7
    span = example(f"{model}/ex1")["sink"].tolist()
    kinds = set()
    for name in names:
        key = f"{model}/ex1/matrix/{name}"
        found = forms(numbers[f"{key}/matrix"], ic.Span(span[0], span[1] + 1))
        for form in ("row", "rec"):
            torch.testing.assert_close(getattr(found, form), numbers[f"{key}/{form}"].double(), atol=5e-5, rtol=0)
        torch.testing.assert_close(found.seq, normalised(numbers[f"{key}/matrix"]).sum(0), atol=1e-12, rtol=1e-12)
        kinds.add(found.replicated)
        assert found.replicated == name.startswith(("attnlrp_ft", "ft_", "ifr_multi"))
    assert kinds == {True, False}


def test_forms_of_one_vector_keep_its_ties_and_its_order() -> None:
    """Prompt parts that are equal to the bit give one ordering, whatever the rows hold of the target."""
    prompt = (drawn(30) * 5).round() / 7
    matrix = torch.full((6, 36), torch.nan)
    for token in (1, 3, 4):
        matrix[token] = torch.cat(
            [prompt.float(), torch.where(torch.arange(6) < token, drawn(6, seed=token).float(), 0.0)]
        )
    found = forms(matrix, range(1, 5))
    weights = found.prompt_weights
    steps = deletion_steps(ordered(weights, torch.ones(30, dtype=torch.bool)), 20, 30)
    assert found.replicated and torch.equal(steps[0], steps[1]) and torch.equal(steps[0], steps[2])
    for row in weights:
        assert torch.equal(row.unique(return_inverse=True)[1], prompt.unique(return_inverse=True)[1])
    for one, wanted in zip((found.seq, found.row, found.rec), slow_forms(matrix, range(1, 5)), strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-13, rtol=1e-12)


# RISE and MAS


@pytest.mark.parametrize("name", EXAMPLES)
def test_metrics_are_the_published_ones(name: str) -> None:
    """All scored vectors, given their curve and order."""
    of = example(name)
    steps = of["steps"].long()
    found = metrics(of["curves"], of["weights"], steps)
    assert len(found.scores) >= 28
    torch.testing.assert_close(found.scores, of["scores"], atol=2e-7, rtol=0)
    assert torch.equal(found.degenerate, of["curves"][:, -1] > of["curves"][:, 0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_steps_are_the_published_ones_where_nothing_is_tied(name: str) -> None:
    of, free = example(name), 0
    for weights, wanted in zip(of["weights"].double(), of["steps"].long(), strict=True):
        kept = wanted >= 0
        if len(weights[kept].unique()) == int(kept.sum()):
            free += 1
            assert torch.equal(deletion_steps(ordered(weights[None], kept), 20, len(kept))[0], wanted)
    assert free >= 15


@pytest.mark.parametrize("name", ["llama/ex1", "llama/ex4", "qwen3/ex1"])
def test_curves_are_the_published_ones(name: str) -> None:
    """From the text on: our passes, their order; with stop words and without."""
    of, model = example(name), published_model(name.split("/")[0])
    start, stop, target = of["places"].tolist()
    perturbed = Perturbed(model, row_of(of["ids"], start, stop, target))
    assert perturbed.replace_id == 2
    kinds: dict[int, int] = {}
    for number, steps in enumerate(of["steps"].long()):
        kinds.setdefault(int((steps >= 0).sum()), number)
    assert len(kinds) == 2
    for number in kinds.values():
        weights, steps = of["weights"][number : number + 1], of["steps"][number].long()
        order = (steps + 1000 * (steps < 0)).argsort(stable=True)[: int((steps >= 0).sum())]
        found = faithfulness(perturbed, weights, kept=steps >= 0, order=order)
        assert torch.equal(found.steps[0], steps) and found.order == "given"
        curve = of["curves"][number]
        close(found.curve[0], curve, model)
        slack = 4 * rounding(model) * float(curve.abs().max() / (curve[0] - curve[-1]).abs())
        torch.testing.assert_close(found.scores[0], of["scores"][number], atol=slack, rtol=0)


def test_curves_that_say_nothing_are_marked() -> None:
    steps = torch.tensor([[0, 1, 2, 3]])
    likelier = metrics(torch.tensor([[-5.0, -4, -6, -3, -1]]), torch.ones(1, 4), steps)
    assert likelier.degenerate.item() and likelier.scores[0, 0] == 0
    still = metrics(torch.full((1, 5), -2.0), torch.ones(1, 4), steps)
    assert not still.degenerate.item() and still.scores[0, 0] == 1
    one = metrics(torch.tensor([[-1.0, -2, -3, -4, -5]]), torch.ones(1, 4), steps)  # falls as the weight does
    torch.testing.assert_close(one.scores[0], torch.full((3,), 0.5, dtype=torch.float64))
    none = metrics(torch.tensor([[-1.0, -2, -3, -4, -5]]), -torch.ones(1, 4), steps)
    torch.testing.assert_close(none.density[0], torch.linspace(1, 0, 5, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_5"])
def test_perturbed_is_one_whole_pass_each(family: str) -> None:
    """Batched, only at the positions that predict, against the model's own forward; also from a padded row."""
    model = llama() if family == "llama" else ic.load(testing.tiny(family))
    perturbed = text(model, tokens_at_once=50)
    gone = torch.stack([torch.zeros(PROMPT).bool(), *(drawn(5, PROMPT) > 0.5)])
    wanted = torch.tensor([slow_log_prob(perturbed, row) for row in gone], dtype=torch.float64)
    close(perturbed.log_prob(gone), wanted, model)
    assert perturbed.cost.passes == 6 and perturbed.cost.batches == 3
    if family == "llama":
        tokens = perturbed.tokens
        wide = torch.cat([torch.full((1, 3), 3), tokens.ids], 1)
        padded = replace(tokens, ids=wide, mask=torch.arange(wide.shape[1])[None] >= 3)
        torch.testing.assert_close(Perturbed(model, padded, replace_id=3).log_prob(gone), perturbed.log_prob(gone))


def test_half_precision_is_summed_in_float32() -> None:
    model = ic.load(testing.tiny("llama").bfloat16())
    perturbed = text(model)
    scores = perturbed.log_prob(drawn(4, PROMPT) > 0.5)
    assert scores.dtype == torch.float64
    logits = torch.tensor([[3.0, 2.9, 1.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(log_probs(logits, torch.tensor([1])), logits.float().log_softmax(-1)[:, 1].double())
    with_odds = log_odds(torch.tensor([[40.0, 0, 0]]), torch.tensor([0]))  # p is 1 in float32
    torch.testing.assert_close(with_odds, torch.tensor([40 - math.log(2)], dtype=torch.float64), rtol=1e-6, atol=0)


class Unembedded:
    """Counts the texts and positions that reach a model's unembedding."""

    def __init__(self, model: ic.Model) -> None:
        self.positions, self.texts = 0, 0
        self.handle = model.hf.lm_head.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.texts += args[0].shape[0]
        self.positions += args[0].shape[0] * args[0].shape[1]


@pytest.fixture
def unembedded() -> Iterator[Unembedded]:
    counter = Unembedded(llama())
    yield counter
    counter.handle.remove()


def test_each_text_runs_once_and_no_logits_of_the_prompt(unembedded: Unembedded) -> None:
    """63 passes become 21 for vectors of one order; two orders share both ends; a second question is free."""
    ids = torch.randint(5, 90, (60,), generator=torch.Generator().manual_seed(2))
    perturbed = Perturbed(llama(), row_of(ids, 5, 50, 52), replace_id=3)
    weights = drawn(45)
    found = faithfulness(perturbed, torch.stack([weights, 3 * weights, weights**2]))
    assert (found.asked, found.passes, found.logits) == (63, 21, 21 * 8)
    assert (unembedded.texts, unembedded.positions) == (21, 21 * 8)
    again = faithfulness(perturbed, weights)
    assert again.passes == 0 and unembedded.texts == 21
    other = faithfulness(perturbed, torch.stack([weights, drawn(45, seed=5)]))
    assert other.passes == 19 and other.asked == 42
    assert areas(perturbed, weights, ks=()).deletion.isfinite().all() and unembedded.texts == 21 + 19 + 19  # insertion


def test_steps_split_as_evenly_as_can_be() -> None:
    assert step_sizes(104, 20) == [6] * 4 + [5] * 16 and step_sizes(3, 20) == [1, 1, 1] and step_sizes(7, 1) == [7]
    order = torch.tensor([[4, 0, 2, 1]])
    assert deletion_steps(order, 3, 5).tolist() == [[0, 2, 1, -1, 0]]


def test_ties_have_a_rule_and_a_range() -> None:
    perturbed = text(seed=3)
    weights = torch.stack([torch.zeros(PROMPT).double(), drawn(PROMPT).round(), drawn(PROMPT)])
    found = faithfulness(perturbed, weights, tie_orders=6, names=("none", "some", "all"))
    assert found.tied.tolist() == [1, 1, 0] and found.tie_range is not None
    assert found.steps[0].tolist() == list(range(PROMPT))  # lower positions first
    low, mean, high = found.tie_range.unbind(-1)
    assert (low <= found.scores).all() and (found.scores <= high).all() and (low <= mean).all() and (mean <= high).all()
    assert (low[0] < high[0]).any() and torch.equal(low[2], high[2]) and torch.equal(mean[2], found.scores[2])
    assert faithfulness(perturbed, weights, tie_orders=6, names=("none", "some", "all")).tie_range.equal(
        found.tie_range
    )
    four = weights[0, :4][None]
    orders = torch.tensor(list(permutations(range(4))))
    small = Perturbed(llama(), row_of(perturbed.tokens.ids[0], 2, 6, 10), replace_id=3)
    every = faithfulness(small, four.expand(24, 4), order=orders).scores
    some = faithfulness(small, four, tie_orders=60).tie_range[0]
    torch.testing.assert_close(some[:, 0], every.amin(0))
    torch.testing.assert_close(some[:, 2], every.amax(0))


def test_kept_tokens_alone_are_ranked_and_deleted() -> None:
    perturbed, kept = text(), torch.arange(PROMPT) % 3 != 0
    by_mask, by_index = (faithfulness(perturbed, drawn(PROMPT), kept=k) for k in (kept, kept.nonzero()[:, 0]))
    assert by_mask.steps[0][~kept].tolist() == [-1] * int((~kept).sum()) and by_mask.scores.equal(by_index.scores)
    gone = (by_mask.steps[0] >= 0)[None]
    torch.testing.assert_close(perturbed.log_prob(gone)[0], by_mask.curve[0, -1])


def test_results_are_kept_and_print(tmp_path: Any) -> None:
    found = faithfulness(text(), drawn(2, PROMPT), names=("seq", "row"), tie_orders=2)
    found.save(tmp_path)
    assert Faithfulness.load(tmp_path) == found
    assert "seq: RISE" in str(found) and [row["vector"] for row in found.table()] == ["seq", "row"]
    assert {"RISE", "MAS", "RISE+AP", "degenerate", "tied", "RISE ties low"} <= set(found.table()[0])


# Areas and soft metrics


def test_areas_are_those_of_a_plain_loop() -> None:
    perturbed = text(odds=True)
    weights = drawn(PROMPT)
    found = areas(perturbed, weights, steps=5, ks=(1, 4))
    order = weights.argsort(descending=True)
    groups = np.split(order.numpy(), np.cumsum(step_sizes(PROMPT, 5))[:-1])
    gone, curves = torch.zeros(PROMPT, dtype=torch.bool), []
    for begin in (False, True):
        gone[:] = begin
        curve = [slow_log_prob(perturbed, gone)]
        for group in groups:
            gone[group] = not begin
            curve.append(slow_log_prob(perturbed, gone))
        curves.append(np.array(curve))
    down, up = ((c - curves[0][-1]) / (curves[0][0] - curves[0][-1]) for c in curves)
    shares = np.cumsum([0, *step_sizes(PROMPT, 5)]) / PROMPT
    wanted = (
        np.trapezoid(np.minimum.accumulate(down.clip(0, 1)), shares),
        np.trapezoid(np.maximum.accumulate(up.clip(0, 1)), shares),
    )
    slack = 8 * rounding(llama()) * np.abs(curves).max() / abs(curves[0][0] - curves[0][-1])
    assert np.allclose([float(found.deletion), float(found.insertion)], wanted, atol=slack, rtol=0)
    best = torch.zeros(PROMPT, dtype=torch.bool)
    best[order[:4]] = True
    assert abs(float(found.drop[0, 1]) - (curves[0][0] - slow_log_prob(perturbed, best))) < 1e-3
    odds = perturbed.log_odds(torch.stack([torch.zeros_like(best), best]))
    torch.testing.assert_close(found.odds_drop[0, 1], odds[0] - odds[1])
    assert set(found.table()[0]) >= {"deletion AUC", "insertion AUC", "drop@4", "log-odds drop@1"}


def test_a_target_that_the_prompt_does_not_move_gives_straight_lines() -> None:
    model = published_model("llama")
    ids = torch.randint(5, 90, (14,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = model.hf.lm_head.weight.clone()
        model.hf.lm_head.weight.zero_()
        found = areas(Perturbed(model, row_of(ids, 0, 10, 11)), drawn(10), steps=4)
        model.hf.lm_head.weight.copy_(kept)
    assert found.degenerate.all()
    torch.testing.assert_close(torch.cat([found.deletion, found.insertion]), torch.full((2,), 0.5).double())


def test_soft_metrics_at_their_ends() -> None:
    """Everything important: the prediction stays, and goes; nothing important: the other way round."""
    perturbed = text()
    weights = torch.stack([torch.ones(PROMPT), torch.zeros(PROMPT), -torch.ones(PROMPT)])
    for distance in ("probability", "hellinger"):
        found = soft(perturbed.model, perturbed.tokens, weights, distance=distance, draws=2)
        assert found.nothing > 0 and found.passes == 2 + 2 * 2 * 3
        wanted = torch.tensor([1.0, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(found.sufficiency, wanted, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.comprehensiveness, wanted, atol=1e-3, rtol=0)
        assert float(found.sufficiency_noise.max()) < 1e-3


def test_soft_metrics_are_those_of_a_plain_loop() -> None:
    perturbed, weights = text(), drawn(2, PROMPT)
    model, tokens, places = perturbed.model, perturbed.tokens, perturbed.places
    found = soft(model, tokens, weights, draws=3, seed=7)
    hf, ids = model.hf, tokens.ids
    embedded = hf.get_input_embeddings()(ids).detach()

    def probabilities(mask: Tensor) -> Tensor:
        changed = embedded.clone()
        changed[0, places.prompt] *= mask
        with torch.no_grad():
            p = hf(inputs_embeds=changed).logits[0].double().softmax(-1)
        return torch.stack([p[position - 1, ids[0, position]] for position in places.target])

    generator, width = torch.Generator().manual_seed(7), embedded.shape[-1]
    whole = probabilities(torch.ones(PROMPT, width))
    nothing = (whole - probabilities(torch.zeros(PROMPT, width))).clamp(min=0).mean()
    ratios = torch.zeros(3, 2, 2, dtype=torch.float64)
    for draw in range(3):
        u = torch.rand(PROMPT, width, generator=generator, dtype=torch.float64)
        for vector, row in enumerate(weights):
            for kind, q in enumerate((row / row.max(), 1 - row / row.max())):
                away = (whole - probabilities((u < q[:, None]).float())).clamp(min=0).mean()
                ratios[draw, kind, vector] = away / nothing
    slack = {"atol": 20 * rounding(model) / float(nothing), "rtol": 0}
    torch.testing.assert_close(found.sufficiency, 1 - ratios.mean(0)[0], **slack)
    torch.testing.assert_close(found.comprehensiveness, ratios.mean(0)[1], **slack)
    torch.testing.assert_close(found.comprehensiveness_noise, ratios.std(0)[1] / 3**0.5, **slack)
    apart = soft(model, tokens, weights, draws=3, seed=7, tokens_at_once=1)
    torch.testing.assert_close(apart.sufficiency, found.sufficiency, **slack)
    assert not soft(model, tokens, weights, draws=3, seed=8).sufficiency.equal(found.sufficiency)


# Bad input


def test_weights_that_do_not_fit_are_refused_before_the_model_runs(unembedded: Unembedded) -> None:
    perturbed = text()
    for weights, options, said in (
        (drawn(PROMPT + TARGET), {}, rf"weights \[vector, {PROMPT}\].*not \[{PROMPT + TARGET}\]"),
        (drawn(PROMPT).index_fill(0, torch.tensor([4]), torch.nan), {}, "prompt token 4 in vector 0 is nan"),
        (drawn(PROMPT), {"kept": [PROMPT]}, "takes tokens of the prompt"),
        (drawn(PROMPT), {"kept": torch.zeros(PROMPT, dtype=torch.bool)}, "leaves no prompt token"),
        (drawn(PROMPT), {"kept": torch.ones(3, dtype=torch.bool)}, r"mask of \[3\]"),
        (drawn(PROMPT), {"order": [0] * PROMPT}, "once, highest weight first"),
        (drawn(PROMPT), {"steps": 0}, "steps= takes"),
        (drawn(PROMPT), {"tie_orders": -1}, "tie_orders= takes"),
        (drawn(PROMPT), {"names": ("a", "b")}, "2 names for 1 vectors"),
    ):
        with pytest.raises(ic.PlanError, match=said):
            faithfulness(perturbed, weights, **options)
    for options, said in (
        ({"ks": (PROMPT + 1,)}, "ks= takes"),
        ({"ks": (0,)}, "ks= takes"),
        ({"steps": 0}, "areas: steps= takes a whole number from 1 on"),
        ({"kept": []}, "areas: kept= leaves no prompt token"),
    ):
        with pytest.raises(ic.PlanError, match=said):
            areas(perturbed, drawn(PROMPT), **options)
    with pytest.raises(ic.PlanError, match="odds=True"):
        perturbed.log_odds(torch.zeros(1, PROMPT, dtype=torch.bool))
    for options, said in (({"draws": 1}, "draws= takes"), ({"distance": "hellinge"}, "Did you mean 'hellinger'")):
        with pytest.raises(ic.PlanError, match=said):
            soft(perturbed.model, perturbed.tokens, drawn(PROMPT), **options)
    with pytest.raises(ic.PlanError, match="share= takes"):
        recovery(drawn(5), [1], share=0)
    assert unembedded.texts == 0


def test_texts_that_do_not_fit_are_refused_before_the_model_runs(unembedded: Unembedded) -> None:
    tokens = text().tokens
    two = ic.Tokens.stack([tokens, tokens])
    unnamed = replace(tokens, spans={"prompt": tokens.spans["prompt"]})
    turned = replace(tokens, spans={"prompt": tokens.spans["target"], "target": tokens.spans["prompt"]})
    for row, options, said in (
        (two, {}, "not of 2 rows"),
        (unnamed, {}, "no span 'target'"),
        (turned, {}, "must come before the target"),
        (tokens, {"scored": "prompt"}, "takes target tokens"),
        (tokens, {"replace_id": 10**6}, "replace_id= takes a token id"),
        (tokens, {"tokens_at_once": 0}, "tokens_at_once= takes"),
    ):
        with pytest.raises(ic.PlanError, match=said):
            Perturbed(llama(), row, **{"replace_id": 3, **options})
    with pytest.raises(ic.PlanError, match="give replace_id="):
        model = ic.load(testing.tiny("llama"))
        model.hf.config.eos_token_id = None
        Perturbed(model, tokens)
    assert unembedded.texts == 0


def test_matrices_that_do_not_fit_are_refused() -> None:
    for matrix, span, said in (
        (drawn(4, 4), range(0, 2), "there must be more than 4"),
        (drawn(4, 9), range(2, 5), "2:5 lie outside the target"),
        (drawn(4, 9).index_fill(1, torch.tensor([3]), torch.inf), range(0, 2), r"infinite at \[0, 3\]"),
        (torch.ones(4, 9, dtype=torch.long), range(0, 2), "floats"),
    ):
        with pytest.raises(ic.PlanError, match=said):
            forms(matrix, span)
