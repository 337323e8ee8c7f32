"""Interventions on visual tokens: truncation is deletion, replacement at layer 0 is the other image, and the laws between
them, over every vision family."""

from __future__ import annotations

from typing import Any

import deletion
import numpy as np
import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from layouts import DEEPSTACK, LAYOUT, LINEAR, VISUAL
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import visual

FAMILIES = sampled(VISUAL, ("qwen3_vl", "gemma3_vision"))
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-14}
"""Of the largest logit: some forty roundings of each dtype."""


def exact(family: str, float64: float = 1e-12) -> float:
    """How close float64 models come; linear attention is worked out in float32 in them, too."""
    return 1e-4 if family in LINEAR else float64


def inputs(family: str, dtype: torch.dtype, *seeds: tuple[int, ...]) -> dict[str, Any]:
    """A batch whose rows have pictures of these seeds."""
    rows = [[pictures.picture(family, seed) for seed in row] for row in seeds]
    made = pictures.inputs(family, rows)
    return {k: v.to(dtype) if k == "pixel_values" else v for k, v in made.items()}


def columns(values: dict[str, Any], row: int = 0) -> list[int]:
    """Columns of a row's visual tokens."""
    return torch.nonzero(values["input_ids"][row] == pictures.IMAGE).flatten().tolist()


def first(family: str) -> int:
    """The first layer from which tokens can be hidden."""
    return max(LINEAR.get(family, [-1])) + 1


def gap(a: Tensor, b: Tensor) -> float:
    a, b = a.as_subclass(Tensor).double(), b.as_subclass(Tensor).double()
    assert a.shape == b.shape and a.numel()
    return float((a - b).abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_is_deletion(family: str, dtype: torch.dtype) -> None:
    """From every layer on; rows of a padded batch as each row alone."""
    model = tiny_model(family, dtype)
    rows = ((0, 1), (2,))
    both = inputs(family, dtype, *rows)
    limit = TOLERANCE[dtype] if dtype == torch.float32 else exact(family, TOLERANCE[dtype])
    for layer in range(first(family), model.n_layers + 1):
        run = model.run(both, edits=visual.truncated(model, layer))
        clean = model.run(both).logits
        for i, row in enumerate(rows):
            alone = inputs(family, dtype, row)
            wanted, kept = deletion.logits(family, model.hf, alone, layer, columns(alone))
            n = alone["input_ids"].shape[1]
            assert gap(run.logits[i, -n:][kept], wanted[0]) <= limit * float(wanted.abs().max()), layer
            if layer < model.n_layers:
                assert gap(clean[i, -1], wanted[0, -1]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_goes_on_while_generating(family: str) -> None:
    """Tokens and logits of every step, with a cache, as of deletion without one."""
    model = tiny_model(family, torch.float64)
    rows = ((0, 1), (2,))
    both = inputs(family, torch.float64, *rows)
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_at_eos": False, "suppress_tokens": [pictures.IMAGE]}
    for layer in (first(family), model.n_layers - 1):
        made = model.generate(both, visual.truncated(model, layer), read=S.logits, **options)
        for i, row in enumerate(rows):
            alone = inputs(family, torch.float64, row)
            ids, logits = deletion.generated(family, model.hf, alone, layer, columns(alone), 4)
            assert made.ids[i, -4:].tolist() == ids
            steps = torch.stack([step[S.logits][i, -1].as_subclass(Tensor) for step in made.steps])
            assert gap(steps, logits) <= exact(family)
        assert made.receipts[0].layers == tuple(range(layer, model.n_layers))


def test_masking_the_prompt_alone_is_another_thing() -> None:
    """The names "text" and "after_vision" hold what is generated too."""
    model = tiny_model("qwen3_vl", torch.float64)
    values = inputs("qwen3_vl", torch.float64, (0,))
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_at_eos": False, "read": S.logits}
    n = values["input_ids"].shape[1]
    prompt = S.pattern.knockout(query=slice(0, n), key="vision")
    every = [S.pattern.knockout(query=name, key="vision") for name in ("text", "after_vision")]
    short, *whole = (model.generate(values, edit, allow_noop=True, **options) for edit in (prompt, *every))
    assert gap(whole[0].steps[2][S.logits], whole[1].steps[2][S.logits]) == 0
    assert gap(short.steps[2][S.logits], whole[0].steps[2][S.logits]) > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_handed_to_the_kernel(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, heads and windows: as attention opened whole, without opening it."""
    from interp_core.engines.attention import AttentionHook

    model = tiny_model(family, torch.float64, attention)
    rows = ((0, 1), (2,)) if attention == "sdpa" else ((0, 1),)  # transformers' eager attention gives NaN for padding
    both = inputs(family, torch.float64, *rows)
    layers = range(first(family), model.n_layers)
    last = layers[-1]
    for edits in (
        visual.blocked(model, last),
        visual.blocked(model, layers, heads=[0, 2]),
        visual.blocked(model, last, query="last", heads=1),
        visual.blocked(model, last, query="last", key=[-2]),
        visual.blocked(model, layers, query="text", key="image_0"),
    ):
        found = model.run(both, edits=edits)
        with monkeypatch.context() as patch:
            patch.setattr(AttentionHook, "has_kernel", False)
            wanted = model.run(both, edits=edits)
        mask = both["attention_mask"].bool()
        assert gap(found.logits[mask], wanted.logits[mask]) <= 1e-12
        assert found.receipts[0].norm == pytest.approx(wanted.receipts[0].norm, rel=1e-9)
        assert found.receipts[0].positions == wanted.receipts[0].positions


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_at_layer_0_is_the_run_with_it(family: str) -> None:
    for dtype in TOLERANCE:
        model = tiny_model(family, dtype)
        clean, blind = (inputs(family, dtype, *rows) for rows in (((0, 1), (2,)), ((3, 4), (5,))))
        source = model.run(blind, read=visual.reads(model))
        run = model.run(clean, edits=visual.replaced(source, 0))
        assert gap(run.logits, source.logits) == 0
        assert gap(run.logits, model.run(clean).logits) > 1e-3
        if family in DEEPSTACK:
            kept = model.run(clean, edits=visual.replaced(source, 0, "keep"))
            assert gap(kept.logits[:, -1], source.logits[:, -1]) > 1e-5
            # both policies are the same once nothing is added any more
            later = [model.run(clean, edits=visual.replaced(source, 1, policy)) for policy in visual.POLICIES]
            assert gap(later[0].logits, later[1].logits) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_own_rows_change_nothing_and_the_last_ones_nothing_else(family: str) -> None:
    model = tiny_model(family, torch.float64)
    values, other = inputs(family, torch.float64, (0, 1), (2,)), inputs(family, torch.float64, (3, 4), (5,))
    clean, blind = (model.run(x, read=visual.reads(model)) for x in (values, other))
    for layer in range(model.n_layers + 1):
        same = model.run(values, edits=visual.replaced(clean, layer), allow_noop=True)
        assert gap(same.logits, clean.logits) == 0, layer
    run = model.run(values, edits=visual.replaced(blind, model.n_layers))
    text = torch.ones_like(values["input_ids"]).bool() & (values["input_ids"] != pictures.IMAGE)
    assert gap(run.logits[text], clean.logits[text]) == 0
    assert gap(run.logits[~text], clean.logits[~text]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_is_deletion_of_the_rest(family: str) -> None:
    """Some of the visual tokens gone from a layer on, from the prompt and while generating; all of them, and none."""
    model = tiny_model(family, torch.float64)
    rows = ((0, 1), (2,))
    both, layer = inputs(family, torch.float64, *rows), first(family)
    ranks = visual.ranked(model, both, "random", seed=3)
    edits = visual.pruned(model, both, ranks, 0.5, range(layer, model.n_layers))
    run = model.run(both, edits=edits)
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_at_eos": False, "suppress_tokens": [pictures.IMAGE]}
    made = model.generate(both, edits, read=S.logits, **options)
    for i, (row, kept) in enumerate(zip(rows, visual.top(ranks, 0.5), strict=True)):
        alone = inputs(family, torch.float64, row)
        places = columns(alone)
        assert len(kept) == -(-len(places) // 2)
        gone = [place for j, place in enumerate(places) if j not in kept]
        wanted, left = deletion.logits(family, model.hf, alone, layer, gone)
        assert gap(run.logits[i, -alone["input_ids"].shape[1] :][left], wanted[0]) <= exact(family)
        ids, logits = deletion.generated(family, model.hf, alone, layer, gone, 3)
        assert made.ids[i, -3:].tolist() == ids
        steps = torch.stack([step[S.logits][i, -1].as_subclass(Tensor) for step in made.steps])
        assert gap(steps, logits) <= exact(family)
    none = model.run(both, edits=visual.pruned(model, both, ranks, 0, range(layer, model.n_layers)))
    text = (both["input_ids"] != pictures.IMAGE) & both["attention_mask"].bool()
    assert gap(none.logits[text], model.run(both, edits=visual.truncated(model, layer)).logits[text]) <= exact(family)
    assert visual.pruned(model, both, ranks, 1, range(layer, model.n_layers)) == []


def test_a_band_is_its_layers_alone() -> None:
    model = tiny_model("qwen3_vl", torch.float64)
    values = inputs("qwen3_vl", torch.float64, (0,))
    band = model.run(values, edits=visual.truncated(model, 1, stop=2), read=S.pattern)
    seen = [float(band[S.pattern[i]][..., -2:, columns(values)].sum()) for i in range(model.n_layers)]
    assert [x > 0 for x in seen] == [True, False, True] and seen[1] == 0
    assert visual.truncated(model, model.n_layers) == [] == visual.truncated(model, 2, stop=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_transplant_leaves_the_last_token_alone_to_go_on(family: str) -> None:
    """By hand: in every later block the question's rows are what they were, and the image is deleted."""
    model = tiny_model(family, torch.float64)
    values, layer = inputs(family, torch.float64, (0, 1)), first(family)
    clean = model.run(values, read=S.resid_pre[layer])
    run = model.run(values, edits=visual.state_transplant(clean, layer))
    width, places = values["input_ids"].shape[1], columns(values)
    question = [i for i in range(places[0], width - 1) if i not in places]
    assert question
    kept = [i for i in range(width) if i not in places]
    rows, held = [kept.index(i) for i in question], clean[S.resid_pre[layer]].as_subclass(Tensor)[:, question]

    def hold(_module: Any, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        x[:, rows] = held
        return (x, *args[1:])

    blocks = model.hf.get_submodule(LAYOUT[family]["blocks"])
    with deletion.deleted(family, model.hf, layer, places, width):
        handles = [block.register_forward_pre_hook(hold) for block in list(blocks)[layer + 1 :]]
        try:
            with torch.no_grad(), model.fresh():
                wanted = model.hf(**values, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
    assert gap(run.logits[0, -1], wanted[0, -1]) <= exact(family)
    assert gap(run.logits[0, -1], model.run(values, edits=visual.truncated(model, layer)).logits[0, -1]) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_rankings(family: str) -> None:
    model = tiny_model(family, torch.float64)
    rows = ((0, 1), (2,))
    both, layer = inputs(family, torch.float64, *rows), first(family) + 1
    found = {by: visual.ranked(model, both, by, layer=layer) for by in visual.RANKINGS}
    for i, row in enumerate(rows):
        alone = inputs(family, torch.float64, row)
        places = columns(alone)
        pattern = model.run(alone, read=S.pattern[layer - 1])[S.pattern[layer - 1]].as_subclass(Tensor)[0].mean(0)
        assert gap(found["last_token"][i], pattern[-1, places]) <= exact(family)
        text = [q for q in range(places[0], len(pattern)) if q not in places]
        wanted = torch.stack([pattern[[q for q in text if q > v], v].mean() for v in places])
        assert gap(found["mean_text"][i], wanted) <= exact(family)
        for by in visual.RANKINGS:
            assert gap(found[by][i], visual.ranked(model, alone, by, layer=layer)[0]) <= exact(family)
            assert [len(visual.top(found[by], f)[i]) for f in (0, 0.1, 1)] == [0, -(-len(places) // 10), len(places)]


def test_uniform_is_even_at_every_fraction() -> None:
    """Of a 4x4 grid, a quarter is every second row and column, a half a checkerboard; whatever is kept stays."""
    model = tiny_model("llava")
    (ranks,) = visual.ranked(model, inputs("llava", torch.float32, (0,)), "uniform")
    assert visual.top([ranks], 0.25) == [[0, 2, 8, 10]]
    assert visual.top([ranks], 0.5) == [[0, 2, 5, 7, 8, 10, 13, 15]]
    seen: set[int] = set()
    for n in range(17):
        (kept,) = visual.top([ranks], n / 16)
        assert len(kept) == n and seen <= set(kept)
        seen = set(kept)


def test_what_rows_are_replaced_by() -> None:
    model = tiny_model("qwen3_vl", torch.float64)
    values = inputs("qwen3_vl", torch.float64, (0, 1), (2,))
    clean = model.run(values, read=visual.reads(model))
    rows = [row.as_subclass(Tensor) for row in clean.rows(S.resid_pre[1].at("vision"))]
    added = [row.as_subclass(Tensor) for row in clean.rows(S.deepstack[0])]
    assert len({len(row) for row in rows}) == 2

    def after(source: Any, layer: int = 1) -> list[Tensor]:
        run = model.run(values, edits=visual.replaced(source, layer), read=S.resid_pre[layer])
        return [row.as_subclass(Tensor) for row in run.rows(S.resid_pre[layer].at("vision"))]

    assert all(not row.any() for row in after(visual.zeros(clean)))
    assert all(torch.equal(a, b.mean(0).expand_as(b)) for a, b in zip(after(visual.own_mean(clean)), rows, strict=True))
    alone = [model.run(inputs("qwen3_vl", torch.float64, row), read=visual.reads(model)) for row in ((0, 1), (2,))]
    mean = torch.cat(rows).mean(0)
    assert all(gap(row, mean.expand_as(row)) <= 1e-12 for row in after(visual.dataset_mean(iter(alone))))
    assert gap(visual.dataset_mean([clean]).additions[0], torch.cat(added).mean(0)) <= 1e-12

    noised = after(visual.noise(clean, seed=5, scale=2.0))
    again = [after_alone(model, row, run) for row, run in zip(((0, 1), (2,)), alone, strict=True)]
    assert all(gap(a, b) <= 1e-12 for a, b in zip(noised, again, strict=True))
    assert gap(noised[0], after(visual.noise(clean, seed=6, scale=2.0))[0]) > 0.1
    same = visual.noise(clean, seed=5, scale=0).streams[1]
    assert all(torch.equal(a, b) for a, b in zip(same, rows, strict=True))
    change = torch.cat([(a - b) / b.std(correction=0) for a, b in zip(noised, rows, strict=True)])
    assert 1.8 < float(change.std()) < 2.2


def after_alone(model: ic.Model, row: tuple[int, ...], run: ic.Run) -> Tensor:
    edits = visual.replaced(visual.noise(run, seed=5, scale=2.0), 1)
    made = model.run(inputs("qwen3_vl", torch.float64, row), edits=edits, read=S.resid_pre[1].at("vision"))
    return made[S.resid_pre[1].at("vision")][0].as_subclass(Tensor)


def test_a_sink_does_not_widen_the_noise() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = x.clone()
    wide[3] *= 1000
    plain, sink = (visual.noise(visual.States({0: (rows,)}, {}, 1), seed=0).streams[0][0] - rows for rows in (x, wide))
    assert gap(sink, plain * wide[torch.arange(200) != 3].std(correction=0) / x.std(correction=0)) <= 1e-12


def test_sustained_replacement_and_text_rows() -> None:
    """At several layers the rows are the source's at each; the text's rows of another run leave the image's."""
    model = tiny_model("qwen3_vl", torch.float64)
    values, other = inputs("qwen3_vl", torch.float64, (0,)), inputs("qwen3_vl", torch.float64, (3,))
    assert [visual.window(model, layer, 3) for layer in range(3)] == [(0, 1), (0, 1, 2), (1, 2)]
    zeros = visual.zeros(model.run(values, read=visual.reads(model)))
    run = model.run(values, edits=visual.replaced(zeros, visual.window(model, 1, 3)), read=S.resid_pre.at("vision"))
    assert run.receipts[0].layers == (0,) and len(run.receipts) == 4
    assert not any(run[S.resid_pre[i].at("vision")].any() for i in range(3))
    blind = model.run(other, read=[*visual.reads(model), *visual.reads(model, "text")])
    both = [*visual.replaced(blind, 2), *visual.replaced(blind, 2, at="text")]
    assert gap(model.run(values, edits=both).logits, blind.logits) == 0
    text = model.run(values, edits=visual.replaced(blind, 2, at="text"), read=S.resid_pre[2].at("vision"))
    clean = model.run(values, read=S.resid_pre[2].at("vision"))
    assert gap(text[S.resid_pre[2].at("vision")], clean[S.resid_pre[2].at("vision")]) == 0
    assert gap(text.logits, clean.logits) > 1e-3


@pytest.mark.parametrize("at", ["vision", "text"])
def test_rows_go_to_the_row_that_they_came_from(at: str) -> None:
    """A text with as many visual tokens in all, but others in each row, is another text: nothing of it is replaced."""
    model = tiny_model("qwen3_vl", torch.float64)
    both, swapped = inputs("qwen3_vl", torch.float64, (0, 1), (2,)), inputs("qwen3_vl", torch.float64, (2,), (0, 1))
    source = model.run(both, read=visual.reads(model, at))
    edits = visual.replaced(source, 1, at=at)
    plan = ic.Plan.of(edits=edits)
    assert ic.Plan.from_json(plan.to_json(), plan.tensors()) == plan
    again = model.run(both, edits=edits, allow_noop=True)
    assert gap(again.logits, source.logits) == 0
    places = r"selects \d+ tokens of row 0, and the value has \d+ for it; give values of as many tokens in each row"
    with pytest.raises(ic.PositionError, match=places):
        model.run(swapped, edits=edits)
    with pytest.raises(ic.PositionError, match="positions for 2 rows, the batch has 1"):
        model.run(inputs("qwen3_vl", torch.float64, (0, 1, 2)), edits=edits)


def test_layers_are_whole_numbers_of_any_kind() -> None:
    """As sites take them; what is none is refused by every edit, by name."""
    model = tiny_model("qwen3_vl", torch.float64)
    values = inputs("qwen3_vl", torch.float64, (0,))
    run = model.run(values, read=[S.resid_pre, *visual.reads(model)])
    makers: list[Any] = [
        lambda layer: visual.blocked(model, layer),
        lambda layer: visual.removed(model, values, [3], layer),
        lambda layer: visual.truncated(model, layer),
        lambda layer: visual.truncated(model, 0, stop=layer),
        lambda layer: visual.replaced(run, layer),
        lambda layer: visual.state_transplant(run, layer),
        lambda layer: visual.window(model, layer),
        lambda layer: visual.ranked(model, values, "last_token", layer=layer)[0].tolist(),
    ]
    for maker in makers:
        assert maker(np.int64(1)) == maker(torch.tensor(1)) == maker(1)
        for wrong in (1.5, "1", slice(-2, None), True, torch.tensor(1.0)):
            with pytest.raises(ic.SiteError, match="layer takes a number from 0 to"):
                maker(wrong)
    for several in makers[0], makers[1], makers[4]:
        assert several({2, 1}) == several([1, 2, 2]) == several(np.arange(1, 3))
        with pytest.raises(ic.SiteError, match="layer takes a number from 0 to .*, not str '1'"):
            several([0, "1"])
    with pytest.raises(ic.PlanError, match="a band from layer 2 to before layer 1 is none; give stop= from 2 on"):
        visual.truncated(model, 2, stop=1)


@pytest.mark.parametrize("family", ["gemma3_vision", "llava"])
def test_a_visual_query_keeps_a_key(family: str) -> None:
    """Gemma 3's images look both ways: a query that is left its own image's later tokens has something to attend to."""
    model = tiny_model(family, torch.float64)
    values = inputs(family, torch.float64, (0, 1))
    places, edges = columns(values), []
    run = model.run(values, read=S.pattern)
    for layer in range(model.n_layers):
        pattern = run[S.pattern[layer]].as_subclass(Tensor)[0].amax(0)
        for query in (places[0], places[3], places[-1]):
            seen = torch.nonzero(pattern[query]).flatten().tolist()
            edges.append(seen[-1] > query)
            with pytest.raises(ic.PlanError, match="nothing left to attend to"):
                model.run(values, edits=S.pattern[layer].knockout(query=query, key=seen))
            left = model.run(
                values, edits=S.pattern[layer].knockout(query=query, key=seen[:-1]), read=S.pattern[layer].at(query)
            )
            assert torch.nonzero(left[S.pattern[layer].at(query)][0].amax(0)).flatten().tolist() == seen[-1:]
    assert any(edges) == (family == "gemma3_vision")


def test_bad_input_is_refused_by_name() -> None:
    model = tiny_model("qwen3_vl")
    values, wide = inputs("qwen3_vl", torch.float32, (0,)), inputs("qwen3_vl", torch.float32, (0, 1))
    clean = model.run(values, read=visual.reads(model))
    with pytest.raises(ic.PlanError, match="deepstack='folow' is no policy. Did you mean 'follow'"):
        visual.replaced(clean, 0, "folow")
    for layer in (4, -1):
        with pytest.raises(ic.SiteError, match=f"no layer {layer}: there are 0 to 2, and 3 for the final norm's input"):
            visual.replaced(clean, layer)
        with pytest.raises(
            ic.SiteError, match=f"no layer {layer}: there are 0 to 3, where the last takes nothing away"
        ):
            visual.truncated(model, layer)
        with pytest.raises(ic.SiteError, match=f"no layer {layer}: there are 0 to 2"):
            visual.window(model, layer)
    with pytest.raises(ic.SiteError, match="layer takes a number from 0 to 3, not str '2'"):
        visual.replaced(clean, "2")  # type: ignore[arg-type]
    with pytest.raises(ic.PlanError, match=r"the value is \[1, 6, 64\], the site has \[batch 1, pos 12, d_model 64\]"):
        model.run(wide, edits=visual.replaced(clean, 1))
    with pytest.raises(ic.ReadError, match=r"has not read the residual stream at vision; run with read=visual.reads"):
        visual.replaced(model.run(values), 1)
    with pytest.raises(ic.ReadError, match="the run holds no rows of layer 2 at vision, but of layers 1; run with"):
        visual.replaced(model.run(values, read=S.resid_pre[1]), 2)
    with pytest.raises(ic.PositionError, match="no positions called 'vision'"):
        model.run(torch.tensor([[5, 6]]), read=visual.reads(model))
    with pytest.raises(ic.PositionError, match="no positions called 'after_vision'"):
        model.run(torch.tensor([[5, 6]]), edits=visual.truncated(model, 1))
    with pytest.raises(ic.PositionError, match="no positions called 'vision'"):
        visual.ranked(model, torch.tensor([[5, 6]]), "random")
    with pytest.raises(ic.CapabilityError, match="no visual tokens: this llama has no vision tower"):
        visual.truncated(tiny_model("llama"), 0)
    with pytest.raises(
        ic.CapabilityError, match=r"layer 0 of this qwen3_5 has no attention that can be masked.* layers 1"
    ):
        visual.truncated(tiny_model("qwen3_5_vision"), 0)
    with pytest.raises(ic.PlanError, match="width takes an odd number of layers"):
        visual.window(model, 1, 2)
    with pytest.raises(ic.PlanError, match="no ranking is called 'rnadom'. Did you mean 'random'"):
        visual.ranked(model, values, "rnadom")
    with pytest.raises(ic.PlanError, match="ranking by last_token takes layer=, from 1 on"):
        visual.ranked(model, values, "last_token", layer=0)
    ranks = visual.ranked(model, values, "random")
    with pytest.raises(ic.PlanError, match="fraction takes a number from 0 to 1, not float 1.5"):
        visual.pruned(model, values, ranks, 1.5, 1)
    with pytest.raises(ic.PlanError, match=r"ranks of \[6\] visual tokens per row, the text has \[12\]"):
        visual.pruned(model, wide, ranks, 0.5, 1)
    with pytest.raises(ic.ReadError, match=r"resid_pre\[1\]"):
        visual.state_transplant(model.run(values, read=S.resid_pre[2]), 1)
    with pytest.raises(ic.PlanError, match="2 seeds for 1 rows"):
        visual.noise(clean, [1, 2])
    with pytest.raises(ic.PlanError, match="dataset_mean: there are no rows"):
        visual.dataset_mean([])
    means = visual.dataset_mean([clean])
    with pytest.raises(ic.PlanError, match="the dataset mean is one vector for all rows"):
        visual.own_mean(means)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_on_every_cache_and_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """Each step's logits are those of one pass over the same tokens, whose kernel sees another mask."""
    model = tiny_model(family, dtype)
    values, edits = inputs(family, dtype, (0, 1)), visual.truncated(tiny_model(family, dtype), first(family))
    for options in ({}, {"cache_implementation": "static"}):
        made = model.generate(values, edits, read=S.logits, max_new_tokens=4, stop_at_eos=False, **options)
        ids = made.tokens.ids[:, :-1]
        more = ids.shape[1] - values["input_ids"].shape[1]
        grown = {**values, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in values:
                grown[name] = torch.nn.functional.pad(values[name], (0, more))
        one = model.run(grown, edits=edits).logits[:, -4:]
        steps = torch.stack([step[S.logits][:, -1].as_subclass(Tensor) for step in made.steps], 1)
        assert gap(steps, one) <= (exact(family) if dtype == torch.float64 else 0.05) * float(one.abs().max())
