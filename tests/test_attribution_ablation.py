"""Leave one out equals one forward pass per unit by every convention; the surrogate's fit is optimal on the values of one
forward pass per mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pictures
import pytest
import torch
from conftest import FAMILIES, SAMPLED, sampled, tiny_model, toy_model
from interp_plugins.attribution.ablations.blurring import blurred, gaussian
from interp_plugins.attribution.ablations.lasso import drawn, lasso
from interp_plugins.attribution.ablations.units import sentences, words
from interp_plugins.attribution.surrogate import logit_scaled
from tolerances import close, rounding

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.testing.visual import VISUAL

TEXT, ANSWER = "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:", " dry"
IDS = [5, 17, 33, 8, 61, 40, 22, 9, 54, 12]
PROMPT, TARGET = range(2, 6), range(8, 10)
WINDOWS = ("mistral", "gemma2", "gemma3", "gpt_neo", "mixtral", "gpt_oss", "llama4")
TEXTUAL = [name for name in FAMILIES if name not in VISUAL]
KIT = [
    pytest.param(name, family, settings, marks=() if (name, family) == ("leave_out", "gemma2") else pytest.mark.slow)
    for name, settings in (
        ("leave_out", {}),
        ("leave_out", {"convention": "mask", "reduce": "mean"}),
        ("surrogate", {"units": "token", "convention": "replace", "ablations": 8}),
    )
    for family in ("gpt2", "gemma2")
    if not (name == "leave_out" and family == "gemma2" and settings)
]


def text(ids: list[int] = IDS, prompt: range = PROMPT, target: range = TARGET) -> ic.Tokens:
    """One row of ids with its parts."""
    table = torch.tensor([ids])
    spans = {"prompt": ((ic.Span(prompt.start, prompt.stop),),), "target": ((ic.Span(target.start, target.stop),),)}
    return ic.Tokens(table, torch.ones_like(table, dtype=torch.bool), spans=spans)


def by_hand(model: ic.Model, ids: list[int], answer: list[int], at: list[int], **inputs: Any) -> float:
    """Summed log-probability of an answer, by the Hugging Face model itself."""
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False, **inputs).logits[0].double()
    return float(torch.log_softmax(logits, -1)[at, answer].sum())


@pytest.mark.parametrize("family", sampled(TEXTUAL, set(SAMPLED) & {"gpt2", "llama", "opt", "gptj", "qwen3_5"}))
def test_deleting_and_replacing_equal_passes_by_hand(family: str) -> None:
    model, method = tiny_model(family, torch.float64), ic.method("leave_out")
    answer = IDS[8:]
    full = by_hand(model, IDS, answer, [7, 8])
    replaced = [full - by_hand(model, [*IDS[:p], 11, *IDS[p + 1 :]], answer, [7, 8]) for p in PROMPT]
    deleted = [full - by_hand(model, IDS[:p] + IDS[p + 1 :], answer, [6, 7]) for p in PROMPT]
    for convention, wanted in (("replace", replaced), ("delete_tokens", deleted)):
        found = method(model, text(), convention=convention, replacement=11)
        close(found.scores[0, 2:6], torch.tensor(wanted, dtype=torch.float64), model, size=abs(full))
        assert not found.scores[0, [0, 1, 6, 7, 8, 9]].any()
        notes = found.notes[0]
        assert notes["full"] == pytest.approx(full, abs=rounding(model) * abs(full))
        assert (notes["convention"], notes["explains"]) == (convention, "sum of the answer's logprobs")
    mean = method(model, text(), convention="delete_tokens", reduce="mean")
    close(mean.scores[0, 2:6] * 2, torch.tensor(deleted, dtype=torch.float64), model, size=abs(full))


@pytest.mark.parametrize(
    "family", sampled(TEXTUAL, set(SAMPLED) & {"gpt2", "llama", "opt", "gptj", "gemma2", "qwen3_5"})
)
def test_hiding_keys_is_keeping_positions_and_not_counting_anew(family: str) -> None:
    """In every family, or it is refused by name: where windows count what is left, and where a layer has no pattern."""
    model, method = tiny_model(family, torch.float64), ic.method("leave_out")
    anew = method(model, text(), convention="delete_tokens").scores
    if len(model.layers(S.pattern)) < model.n_layers:
        with pytest.raises(ic.CapabilityError, match=r"layers \[0\] have no pattern: they are recurrent or linear"):
            method(model, text(), convention="mask")
        kept = method(model, text(), convention="delete_keep_positions").scores
        assert (kept - anew).abs().max() > 1e-4  # the layers with rotary positions see the gap
        return
    masked = method(model, text(), convention="mask").scores
    assert (masked - anew).abs().max() > 1e-4
    if family in WINDOWS:
        with pytest.raises(ic.CapabilityError, match="do not keep their positions when others are deleted"):
            method(model, text(), convention="delete_keep_positions")
        return
    close(method(model, text(), convention="delete_keep_positions").scores, masked, model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_hiding_keys_is_an_attention_mask_with_positions(family: str) -> None:
    """OPT takes positions from the mask where none are given: that is counting anew."""
    model, method = tiny_model(family, torch.float64), ic.method("leave_out")
    answer, full = IDS[8:], by_hand(tiny_model(family, torch.float64), IDS, IDS[8:], [7, 8])
    for convention, positions in (("mask", True), ("delete_tokens", False)):
        if not positions and family != "opt":
            continue
        wanted = []
        for p in PROMPT:
            mask = torch.ones(1, 10, dtype=torch.long)
            mask[0, p] = 0
            inputs = {"position_ids": torch.arange(10)[None]} if positions else {}
            wanted.append(full - by_hand(model, IDS, answer, [7, 8], attention_mask=mask, **inputs))
        found = method(model, text(), convention=convention)
        close(found.scores[0, 2:6], torch.tensor(wanted, dtype=torch.float64), model)


def test_gaps_in_positions_do_not_part_a_text_in_linear_layers() -> None:
    model = tiny_model("qwen3_5", torch.float64)
    ids = torch.tensor([IDS[:3] + IDS[4:]])
    gap = torch.tensor([[0, 1, 2, 4, 5, 6, 7, 8, 9]])
    mask = torch.ones_like(ids)
    kept = model.run({"input_ids": ids, "position_ids": gap, "attention_mask": mask}, read=S.resid_post)
    anew = model.run(ids, read=S.resid_post)
    close(kept[S.resid_post[0]], anew[S.resid_post[0]], model)
    assert (kept[S.resid_post[2]] - anew[S.resid_post[2]]).abs().max() > 1e-4


@pytest.mark.parametrize("convention", ["mask", "delete_keep_positions", "delete_tokens", "replace"])
def test_a_unit_that_holds_the_predictor(convention: str) -> None:
    """The last token that is kept predicts, and is read where it stands; a replacement predicts itself."""
    model = tiny_model("llama", torch.float64)
    row = text(IDS, range(4, 8), range(8, 10)).name(tail=ic.Span(6, 8), end=ic.Span(7, 8))
    found = ic.method("leave_out")(
        model, row, units="span", spans=["tail", "end"], convention=convention, replacement=11
    ).notes[0]["units"]
    full = by_hand(model, IDS, IDS[8:], [7, 8])
    for unit, gone in zip(found, ([6, 7], [7]), strict=True):
        kept = [p for p in range(10) if p not in gone]
        at = [kept.index(8) - 1, kept.index(8)]
        if convention == "replace":
            wanted = by_hand(model, [11 if p in gone else x for p, x in enumerate(IDS)], IDS[8:], [7, 8])
        else:
            positions = kept if convention != "delete_tokens" else list(range(len(kept)))
            inputs = {"position_ids": torch.tensor([positions]), "attention_mask": torch.ones(1, len(kept)).long()}
            wanted = by_hand(model, [IDS[p] for p in kept], IDS[8:], at, **inputs)
        assert unit["loss"] == pytest.approx(full - wanted, abs=rounding(model) * abs(full)), unit
    alone = text(IDS, range(4, 8), range(8, 9)).name(end=ic.Span(7, 8))
    if convention == "mask":  # nothing that is judged sees the key: the token before says it
        loss = ic.method("leave_out")(model, alone, units="span", spans=["end"], convention="mask").notes[0]["units"][0]
        wanted = by_hand(model, IDS, IDS[8:9], [7]) - by_hand(model, IDS, IDS[8:9], [6])
        assert loss["loss"] == pytest.approx(wanted, abs=rounding(model) * abs(full))


def test_text_without_its_units_is_tokenised_again() -> None:
    """The white space before a unit goes with it, and that before the first which is kept; ids of the target stay."""
    toy, method = toy_model(), ic.method("leave_out")
    answer = toy.tokens(ANSWER).ids[0].tolist()
    texts = [
        "A: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:", "Q: big\n\nQ: hot\nA: cold\n\nQ: wet\nA:",
        "Q: big\nA: small\nA: cold\n\nQ: wet\nA:", "Q: big\nA: small\n\nQ: hot\n\nQ: wet\nA:",
        "Q: big\nA: small\n\nQ: hot\nA: cold\nA:", "Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet",
    ]  # fmt: skip
    found = method(toy, TEXT, target=ANSWER, units="sentence", convention="delete_text", batch_tokens=1)
    full = by_hand(toy, toy.tokens(TEXT + ANSWER).ids[0].tolist(), answer, [15])
    for unit, left in zip(found.notes[0]["units"], texts, strict=True):
        ids = toy.tokens(left).ids[0].tolist()
        wanted = full - by_hand(toy, ids + answer, answer, [len(ids) - 1])
        assert unit["loss"] == pytest.approx(wanted, abs=rounding(toy) * 30), unit
    spread = [float(found.scores[0, unit["positions"]].sum()) for unit in found.notes[0]["units"]]
    assert spread == pytest.approx([unit["loss"] for unit in found.notes[0]["units"]], abs=1e-4)
    again = method(toy, toy.tokens(TEXT, ANSWER), units="sentence", convention="delete_text")
    close(again.scores, found.scores, toy)


def test_template_and_special_tokens_are_never_taken_away() -> None:
    toy, method = toy_model(), ic.method("leave_out")
    tokens = toy.tokens(TEXT, ANSWER).name(prompt=[(8, 31)])
    found = method(toy, tokens, units="word", convention="delete_tokens")
    inside = set(tokens.spans["prompt"][0][0])
    taken = [p for unit in found.notes[0]["units"] for p in unit["positions"]]
    assert inside >= set(taken) and len(taken) == len(set(taken)) > 5
    with pytest.raises(ic.PositionError, match="none of the user's prompt: template and target are never taken away"):
        method(toy, tokens, units="span", spans=[(0, 4)])
    part = tokens.name(fact=(8, 15))
    few = method(toy, part, within="fact", convention="delete_text").notes[0]["units"]
    assert {p for unit in few for p in unit["positions"]} <= set(part.spans["fact"][0][0])


@pytest.mark.parametrize("convention", ["replace", "mask", "delete_tokens", "delete_keep_positions", "delete_text"])
def test_rows_do_not_see_each_other(convention: str) -> None:
    """A padded batch gives what its rows give alone, and small passes what large ones give."""
    toy, method = toy_model(), ic.method("leave_out")
    prompts = [TEXT, "Q: big\nA: small\n\nQ: hot\nA:"]
    batch = method(toy, prompts, target=[ANSWER, " cold"], convention=convention, units="word")
    for number, (prompt, answer) in enumerate(zip(prompts, (ANSWER, " cold"), strict=True)):
        alone = method(toy, prompt, target=answer, convention=convention, units="word", batch_tokens=1)
        close(batch.scores[number, batch.columns(number)], alone.scores[0], toy, size=30)


def test_one_token_against_another() -> None:
    """Contrastive scores are differences of logits, and so of log-probabilities."""
    toy = toy_model()
    both = ic.method("leave_out")(toy, TEXT, target=ANSWER, against=" wet")
    parts = [ic.method("leave_out")(toy, TEXT, target=answer) for answer in (ANSWER, " wet")]
    close(both.scores[0, :16], (parts[0].scores - parts[1].scores)[0, :16], toy, size=30)
    fit = ic.method("surrogate")(
        toy, TEXT, target=ANSWER, against=" wet", units="word", convention="replace", ablations=12
    ).notes[0]
    assert fit["explains"] == "sum of the answer's differences of logits"
    assert fit["target_scale"] == "difference of logits"


def test_what_it_costs_is_told_before_and_is_what_runs() -> None:
    """Token-layers are counted at the model's own modules."""
    toy, method = toy_model(), ic.method("leave_out")
    seen: list[int] = []
    block = [toy.module("mlp", layer) for layer in range(toy.n_layers)]
    prices = {}
    for convention in ("replace", "mask", "delete_tokens", "delete_keep_positions"):
        settings: dict[str, Any] = {"target": ANSWER, "convention": convention, "batch_tokens": 40}
        (price,) = method.price(toy, TEXT, **settings)
        method(toy, TEXT, **settings)
        handles = [
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
            for module in block
        ]
        seen.clear()
        found = method(toy, TEXT, **settings)
        for handle in handles:
            handle.remove()
        prices[convention] = price.token_layers
        assert found.notes[0]["token_layers"] == price.token_layers and str(price).startswith("token-layers")
        around = 17 * 3 + 32  # the stream halfway up, for sinks; the replacement's embedding; last layers in part
        assert abs(sum(seen) - price.token_layers) <= around + 16 * 16, convention
    naive = 16 * 16 * toy.n_layers
    assert prices["replace"] <= 0.6 * naive and prices["mask"] <= 0.6 * naive <= prices["delete_tokens"] <= 1.1 * naive


def test_the_sampler_is_the_published_one() -> None:
    masks = drawn(2, 8, 0.5, 0)
    assert masks.astype(int).tolist() == [[1, 1, 1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert (drawn(1, 8, 0.5, 1)[0] == masks[1]).all()


def test_the_fit_is_optimal_and_shrinks_as_it_says() -> None:
    """A planted sparse model is found, its weights too small by α t / deviation."""
    masks, planted = drawn(64, 10, 0.5, 0), np.zeros(10)
    planted[[1, 4, 7]] = 3.0, -2.0, 1.5
    every = (np.arange(1024)[:, None] >> np.arange(10)) % 2 == 1  # so that columns are orthogonal
    for tokens in (1, 10):
        assert lasso(masks, masks @ planted - 4.0, 0.01, tokens).kkt <= 1e-13
        fit = lasso(every, every @ planted - 4.0, 0.01, tokens)
        assert np.flatnonzero(np.abs(fit.weights) > 1e-9).tolist() == [1, 4, 7]
        assert np.abs(planted - fit.weights)[[1, 4, 7]] == pytest.approx(0.02 * tokens, rel=1e-9)
    exact = lasso(masks, masks @ planted - 4.0, 0.0)
    assert exact.weights == pytest.approx(planted, abs=1e-10) and exact.intercept == pytest.approx(-4.0)
    never = masks.copy()
    never[:, 3] = True
    assert lasso(never, never @ planted, 0.01).weights[3] == 0


def test_redundant_sources() -> None:
    """Either of two sources is enough: the surrogate gives both weight, leaving one out costs nothing."""
    masks = drawn(64, 6, 0.5, 0)
    value = np.where(masks[:, 1] | masks[:, 3], 2.0, -5.0)
    fit = lasso(masks, value, 0.01)
    assert fit.weights[[1, 3]].min() > 2.5 * np.abs(np.delete(fit.weights, [1, 3])).max()
    whole = np.ones(6, dtype=bool)
    enough = lambda mask: 2.0 if mask[1] or mask[3] else -5.0  # noqa: E731
    for source in (1, 3):
        without = whole.copy()
        without[source] = False
        assert enough(whole) - enough(without) == 0


def test_the_surrogate_on_a_model() -> None:
    """Values are those of one forward pass per mask; the record has its tests; scores add up to a source's weight."""
    toy = toy_model()
    settings: dict[str, Any] = {"units": "word", "convention": "delete_tokens", "ablations": 20, "seed": 5}
    tokens = toy.tokens(TEXT, ANSWER).name(prompt=[(0, 31)])
    found = ic.method("surrogate")(toy, tokens, held_out=10, top_k=[1, 2], **settings)
    notes, masks = found.notes[0], drawn(30, 8, 0.5, 5)
    units = ic.method("leave_out")(toy, tokens, units="word").notes[0]["units"]
    ids, answer = tokens.ids[0].tolist(), int(tokens.ids[0, -1])

    def log_p(mask: np.ndarray) -> float:
        gone = {p for unit, keep in zip(units, mask, strict=True) if not keep for p in unit["positions"]}
        kept = [x for p, x in enumerate(ids) if p not in gone]
        return by_hand(toy, kept, [answer], [len(kept) - 2])

    y = logit_scaled(torch.tensor([log_p(mask) for mask in masks[:20]])).numpy()
    wanted = lasso(masks[:20], y, 0.01)
    assert [unit["weight"] for unit in notes["units"]] == pytest.approx(wanted.weights.tolist(), abs=5e-3)
    assert notes["kkt"] <= 1e-12 and -1 <= notes["lds"] <= 1 and set(notes["drop"]) == {"1", "2"}
    best = int(np.argmax(wanted.weights))
    assert notes["drop"]["1"] == pytest.approx(
        log_p(np.ones(8, dtype=bool)) - log_p(np.arange(8) != best), abs=rounding(toy) * 30
    )
    sums = [float(found.scores[0, unit["positions"]].sum()) for unit in notes["units"]]
    assert sums == pytest.approx([unit["weight"] for unit in notes["units"]], abs=1e-5)
    assert notes["sampler"] == "numpy RandomState(i + 5), each source kept with probability 0.5"


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("the big small hot cold up down left right of day and night", "the prompt is one sentence"),
        ("The big small hot cold up. The down left right of day", "a mask leaves none of the few sentences"),
    ],
)
def test_words_where_sentences_cannot_be_sources(prompt: str, why: str) -> None:
    """Refused before; the result says so, and is that by words. Sentences that can be sources are."""
    surrogate, toy = ic.method("surrogate"), toy_model()
    tokens = toy.tokens(prompt, " cold")
    by_word = surrogate(toy, tokens, units="word", ablations=16)
    found = surrogate(toy, tokens, ablations=16)
    assert found.notes[0]["sources"] == f"words, not sentences: {why}" and by_word.notes[0]["sources"] == "words"
    assert torch.equal(found.scores, by_word.scores) and len(found.notes[0]["units"]) == len(prompt.split())
    kept = surrogate(toy, toy.tokens(f"{prompt}. ? A", " cold").name(prompt=[(0, len(prompt))]), ablations=8)
    assert kept.notes[0]["sources"] == ("sentences" if "." in prompt else f"words, not sentences: {why}")


def test_certain_and_hopeless_answers_stay_finite() -> None:
    scaled = logit_scaled(torch.tensor([0.0, -1e-30, -0.5, -800.0]))
    assert bool(scaled.isfinite().all()) and scaled[0] == scaled[1] == pytest.approx(27.63, abs=0.01)
    assert scaled[2] == pytest.approx(float(np.log(np.exp(-0.5) / (1 - np.exp(-0.5)))))


def test_units_keep_their_offsets() -> None:
    said = 'Dr. Li met J. Roe at 3.5 km. "Why?" he asked! Then\nhe left…  Yes. no more'
    parts = [said[a:b] for a, b in sentences(said)]
    assert parts == ["Dr. Li met J. Roe at 3.5 km.", '"Why?" he asked!', "Then", "he left…  Yes. no more"]
    assert words("a  bc\nd") == [(0, 1), (3, 5), (6, 7)]
    assert sentences("\n \n") == [] and sentences("One. Two? Three!") == [(0, 4), (5, 9), (10, 16)]


def test_blocks_of_an_image() -> None:
    """Hidden keys, and blurred pixels; each equals one forward pass."""
    picture = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = tiny_model("llava", torch.float64)
    values = pictures.inputs("llava", [[picture]])
    values["pixel_values"] = values["pixel_values"].double()
    method = ic.method("leave_out")
    for convention in ("mask", "blur"):
        found = method(model, values, units="visual", convention=convention)
        assert len(found.notes[0]["units"]) == 16 and bool(found.scores.any())
        unit, answer = found.notes[0]["units"][5], found.notes[0]["answer"][0]
        if convention == "blur":
            pixels = values["pixel_values"].clone()
            pixels[0, :, 4:8, 4:8] = gaussian(pixels[0], 16 / 12)[:, 4:8, 4:8]
            run = model.run({**values, "pixel_values": pixels}, logits=-1)
        else:
            after = list(range(unit["positions"][-1] + 1, values["input_ids"].shape[1]))
            run = model.run(values, edits=S.pattern.knockout(query=after, key=unit["positions"]), logits=-1)
        wanted = found.notes[0]["full"] - float(torch.log_softmax(run.logits.plain[0], -1)[answer])
        assert unit["loss"] == pytest.approx(wanted, abs=rounding(model) * 10)
    tiled = pictures.inputs("internvl", [[torch.randn(3, 32, 16)]])
    internvl = tiny_model("internvl")
    for tile in (0, 1):
        after = blurred("leave_out", internvl, internvl.input(tiled), [(0, tile, 1, 1)]).inputs["pixel_values"]
        assert (after != tiled["pixel_values"]).flatten(1).any(1).tolist() == [tile == 0, tile == 1]
    with pytest.raises(ic.CapabilityError, match="there are 2 tiles, made of 3 pictures"):
        fine = pictures.inputs("llava_onevision", [[torch.randn(3, 32, 16)]])
        method(tiny_model("llava_onevision"), fine, units="visual", convention="blur")
    flat = gaussian(torch.ones(3, 8, 8), 1.0)
    torch.testing.assert_close(flat, torch.ones(3, 8, 8))
    patches = pictures.inputs("qwen3_vl", [[picture]])
    with pytest.raises(ic.CapabilityError, match="cut into patches by their processor"):
        method(tiny_model("qwen3_vl"), patches, units="visual", convention="blur")
    with pytest.raises(ic.CapabilityError, match="delete_tokens does not fit .*pixel_values"):
        method(tiny_model("qwen3_vl"), patches, convention="delete_tokens")
    with pytest.raises(ic.PlanError, match="blocks of an image are blurred or masked"):
        method(tiny_model("qwen3_vl"), patches, units="visual")


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"convention": "blur"}, ic.PlanError, "blur is for blocks of an image"),
        ({"units": "span"}, ic.PlanError, "spans= and units='span' go together"),
        ({"units": "span", "spans": ["promt"]}, ic.PositionError, "no span 'promt'. Did you mean 'prompt'"),
        ({"units": "visual"}, ic.PositionError, "no image to take apart"),
        ({"units": "word"}, ic.TextError, "words are found in a text, and these tokens carry none"),
        ({"convention": "delete_text"}, ic.TextError, "delete_text needs the tokens' text"),
        ({"replacement": 96}, ic.PlanError, "no token id 96"),
        ({"batch_tokens": 0}, ic.PlanError, "take one at least"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ic.method("leave_out")(tiny_model("llama"), text(), **settings)


def test_nothing_left_is_refused_before_anything_runs() -> None:
    method, row = ic.method("leave_out"), text(IDS, range(0, 8), range(8, 10)).name(all=ic.Span(0, 8))
    for convention in ("mask", "delete_tokens", "delete_keep_positions"):
        with pytest.raises(ic.PositionError, match="takes away every token before the answer"):
            method(tiny_model("llama"), row, units="span", spans=["all"], convention=convention)
    assert bool(method(tiny_model("llama"), row, units="span", spans=["all"]).scores.any())
    for settings in ({"ablations": 1}, {"held_out": 1}, {"keep": 1.0}, {"alpha": -1.0}, {"top_k": [0]}):
        with pytest.raises(ic.PlanError, match="surrogate: "):
            ic.method("surrogate")(tiny_model("llama"), row, units="token", convention="replace", **settings)


@pytest.mark.parametrize(("name", "family", "settings"), KIT)
def test_conformance(name: str, family: str, settings: dict[str, Any]) -> None:
    testing.check_method(name, tiny_model(family), settings=settings).raise_if_failed()


def test_a_sweep_is_planned_without_a_sweep() -> None:
    """The plan is that of the sweep itself, and no variant runs."""
    toy = toy_model()
    edits = [S.z[layer, head].at(-1).zero() for layer, head in toy.heads[:6]]
    score = ic.score.logprob(ANSWER)
    plan = ic.Sweep.planned(toy, TEXT, edits, score)
    assert plan.explain() == toy.sweep(TEXT, edits, score).plan.explain() and isinstance(plan.token_layers, int)
    with pytest.raises(ic.PlanError, match="no strategy"):
        ic.Sweep.planned(toy, TEXT, edits, score, strategy="none")
