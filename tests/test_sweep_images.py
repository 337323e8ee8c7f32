"""Sweeps of texts with images: what one run per variant gives, in the columns and layers that a variant changes, with one
pass of the vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pictures
import pytest
import torch
import transformers
from conftest import tiny_model
from layouts import DEEPSTACK, VISUAL
from sweeping import COARSER, same
from tolerances import close
from torch import Tensor, nn

import interp_core as ic
from interp_core import score, testing, visual
from interp_core import sites as S
from interp_core.batches import some_rows
from interp_core.engines.called import Called
from interp_core.engines.tower import Tower
from interp_core.sweep import runner
from interp_core.sweep.place import SHORT
from interp_core.vision.corner import shorter

JUDGED = score.logit_diff(3, 9)
FAST = ("qwen3_vl", "gemma3_vision")


def some(*fast: str) -> list[object]:
    """All families, those that are not named as slow tests."""
    return [family if family in fast else pytest.param(family, marks=pytest.mark.slow) for family in VISUAL]


def values(family: str, dtype: torch.dtype = torch.float64, n_images: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A text with images."""
    return values_of(family, [pictures.picture(family, seed + i) for i in range(n_images)], dtype)


def values_of(family: str, images: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A text with these images."""
    inputs = pictures.inputs(family, [images])
    return {key: x.to(dtype) if key == "pixel_values" else x for key, x in inputs.items()}


def visual_tokens(inputs: dict[str, Tensor]) -> int:
    """How many of one of its images, all as large."""
    return len(places(inputs)[0]) // len(inputs["image_grid_thw"])


def places(inputs: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """Visual positions, and those after the last one."""
    ids = inputs["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(ids) if token == pictures.IMAGE]
    return visual, list(range(visual[-1] + 1, len(ids)))


def variants(model: ic.Model, inputs: dict[str, Tensor]) -> list[ic.Edit | list[ic.Edit]]:
    """Edits of text behind the images, of whole images, of single visual tokens, inside attention, in several layers."""
    visual, after = places(inputs)
    vector = torch.linspace(-2, 2, 64, dtype=model.dtype)
    out: list[ic.Edit | list[ic.Edit]] = [S.z[at, 1].at(-1).zero() for at, head in model.heads if head == 1]
    for at in range(3):
        out += [S.resid_pre[at].at(after).zero(), S.resid_pre[at].at("vision").add(vector)]
        out += [S.resid_pre[at].at("image_1").zero(), S.resid_pre[at].at(visual[1]).scale(3.0)]
        out += [S.resid_post[at].at(pos).add(vector) for pos in (1, visual[0], visual[-1], -2)]
    out += [S.mlp_out[2].scale(0.5), [S.mlp_out[0].at(visual[2]).zero(), S.resid_pre[2].at(-1).scale(2.0)]]
    if not model.can("pattern", "write"):
        layers = model.atlas.layers("pattern")
        out += [S.pattern[at].knockout(query=after, key="vision") for at in layers]
        out += [[S.pattern[over].knockout(query=after, key="vision") for over in layers if over >= at] for at in layers]
        out += [S.pattern[layers[-1]].knockout(query=-1, key="image_0")]
    return out


@pytest.mark.parametrize("family", some(*FAST))
def test_a_sweep_equals_a_run_for_each_variant(family: str) -> None:
    model, inputs = tiny_model(family, torch.float64), values(family)
    edits = variants(model, inputs)
    swept, full = (model.sweep(inputs, edits, JUDGED, strategy=name) for name in ("auto", "full"))
    assert swept.plan.strategy == ("restart" if family in COARSER else "staircase"), swept.plan.why
    assert not any(swept.plan.singles) and [len(numbers) for numbers in full.plan.singles] == [len(edits)]
    same(swept, full, model)
    logits = model.run(inputs, edits=edits[1]).logits[0, -1]
    assert float(swept.values[1, 0]) == pytest.approx(float(logits[3] - logits[9]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", VISUAL)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_half_the_digits_and_by_steps(family: str, attention: str) -> None:
    model, inputs = tiny_model(family, torch.float32, attention), values(family, torch.float32)
    for strategy in ("auto", "restart", "batched"):
        swept, full = (
            model.sweep(inputs, variants(model, inputs), JUDGED, strategy=name) for name in (strategy, "full")
        )
        same(swept, full, model)


def computed(tower: nn.Module) -> nn.Module:
    """A module inside of a tower that runs once where the tower computes."""
    return next(module for name, module in tower.named_modules() if name and not list(module.children()))


@contextmanager
def counted(model: ic.Model) -> Iterator[tuple[list[int], list[int]]]:
    """Sizes of calls of a part of the vision tower, and tokens of each call of a layer's attention."""
    tower, towers, tokens = Tower(model.hf).module, list[int](), list[int]()
    assert tower is not None
    attentions = [
        model.engine.modules[model.atlas.entries["resid_pre", at].read.module].self_attn  # type: ignore[union-attr,operator]
        for at in range(model.n_layers)
    ]
    handles = [computed(tower).register_forward_hook(lambda _m, args, _o: towers.append(args[0].shape[:-1].numel()))]
    for module in attentions:
        assert isinstance(module, nn.Module)
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, _a, kwargs: tokens.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
            )
        )
    try:
        yield towers, tokens
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", [p for p in some("qwen3_vl") if "qwen3_5_vision" not in getattr(p, "values", ())])
def test_the_tower_runs_once_and_only_what_changes(family: str) -> None:
    """The trial's passes among them, which take an image's corner where it can be cut; edits of what the tower hands
    over have passes of their own, and the same image. (Counted in `self_attn`, which linear attention is not.)"""
    model, inputs = ic.load(testing.tiny(family)), values(family, torch.float32)
    visual, after = places(inputs)
    n = inputs["input_ids"].shape[1]
    edits: list[ic.Edit] = [S.resid_pre[at].at(after).scale(2.0) for at in range(3)]
    edits += [S.pattern[at:].knockout(query=after, key="vision") for at in range(3)]
    with counted(model) as (towers, tokens):
        cold = model.sweep(inputs, [*edits, S.vision_embed.scale(0.5)], JUDGED)
        corner = [4 / visual_tokens(inputs)] if family in pictures.QWEN else []
        assert [size / towers[-1] for size in towers] == [*corner, 1]
        tokens.clear()
        plan = model.sweep(inputs, edits, JUDGED).plan
        assert towers[-1] == towers[-2] and len(towers) == len(corner) + 2
    assert sum(tokens) == plan.token_layers == 3 * n + 2 * len(after) * (3 + 2 + 1)
    assert cold.plan.trial is not None and "once per model" in plan.explain()
    wide = ic.Sweep.planned(model, inputs, [S.resid_pre[1].at("vision").zero()], JUDGED)
    start = 0 if SHORT * visual[0] <= n - visual[0] else visual[0]
    assert wide.token_layers == 3 * n + 2 * (n - start)


def batch(model: ic.Model, family: str) -> ic.Tokens:
    """Texts of nearly one length: two images, two of other sizes or one token less, and none."""
    images = [pictures.picture(family, seed) for seed in range(3)]
    rows = [model.input(values_of(family, images[:2], model.dtype))]
    if family in pictures.QWEN:
        rows.append(
            model.input(values_of(family, [torch.randn(3, 16, 48, generator=torch.manual_seed(3))], model.dtype))
        )
    else:
        second = model.input(values_of(family, images[1:], model.dtype))
        rows.append(shorter(second, model.hf.config, model.atlas.family))
    words = 10 + torch.arange(rows[0].ids.shape[1] - 1)[None] % 40
    return ic.Tokens.stack([*rows, ic.Tokens(words, words > 0)])


@pytest.mark.parametrize("family", some("qwen3_vl"))
def test_texts_share_a_clean_pass(family: str) -> None:
    """Unequal texts, with images and without, get the numbers of forward passes of each text alone, from one clean pass;
    where some layer takes no keys of it, only equally long ones do."""
    model = tiny_model(family, torch.float64)
    text = batch(model, family)
    edits: list[ic.Edit] = [S.resid_pre[at].at(pos).scale(3.0) for at in range(3) for pos in (0, 5, -4, -1)]
    edits += [S.z[at, 1].at([-2, -1]).scale(2.0) for at, head in model.heads if head == 1]
    judged = score.logit_diff(torch.tensor([3, 4, 5]), 9)
    swept, full = (model.sweep(text, edits, judged, strategy=name) for name in ("auto", "full"))
    same(swept, full, model)
    assert not swept.plan.why or family in COARSER
    assert [group.texts for group in swept.plan.groups] == ([(0,), (1,), (2,)] if family in COARSER else [(0, 1, 2)])
    if model.can("pattern", "write"):
        return
    layers, pair = model.atlas.layers("pattern"), some_rows(text, [0, 1])
    hidden = [S.pattern[at].knockout(query=-1, key="vision") for at in layers]
    hidden += [S.pattern[at].knockout(query=[-2, -1], key="image_0") for at in layers[-1:]]
    swept, full = (model.sweep(pair, hidden, JUDGED, strategy=name) for name in ("auto", "full"))
    same(swept, full, model)
    if family not in COARSER:
        assert [group.texts for group in swept.plan.groups] == [(0, 1)]
        assert all(len({step.text for step in sweep_pass.steps}) == 1 for sweep_pass in swept.plan.passes)


def test_what_texts_that_go_together_cost() -> None:
    """One call of the tower, one clean pass, and passes over the variants of all texts, inside attention of each."""
    model = ic.load(testing.tiny("qwen3_vl"))
    rows = [[pictures.picture("qwen3_vl", seed)] for seed in range(4)]
    text = model.input(pictures.inputs("qwen3_vl", rows))
    n = text.ids.shape[1]
    edits = [S.resid_pre[at].at(-1).zero() for at in range(3)]
    hidden = [S.pattern[at].knockout(query=-1, key="vision") for at in range(3)]
    model.sweep(text, edits, JUDGED)
    for variants, passes in ((edits, 1), (hidden, 4)):
        with counted(model) as (towers, tokens):
            plan = model.sweep(text, variants, JUDGED).plan
        assert (len(plan.groups), len(plan.passes), len(towers)) == (1, passes, 1)
        assert sum(tokens) == plan.token_layers == 4 * (3 * n + 3 + 2 + 1)
    with counted(model) as (towers, _):
        plan = model.sweep(text, [*edits, S.vision_embed.scale(0.5)], JUDGED).plan
    assert len(plan.groups) == len(towers) == 4  # passes of their own have the images of their text


def test_a_large_image_makes_no_larger_trial() -> None:
    """Where images have as many tokens as they have patches, a corner stands for them."""
    edits = [S.resid_pre[at].at("vision").scale(2.0) for at in range(3)]
    trials = []
    for size in ((16, 24), (64, 64)):
        inputs = values_of("qwen3_vl", [torch.randn(3, *size, generator=torch.manual_seed(0))], torch.float32)
        trials.append(ic.Sweep.planned(ic.load(testing.tiny("qwen3_vl")), inputs, edits, JUDGED).trial)
    assert trials[0] == trials[1] and trials[0] is not None
    n, from_image, after = 3 + 4 + 3, 4 + 3, 3  # text, corner, text
    assert trials[0].token_layers == 2 * (3 * n + n) + 2 * from_image + (2 + 1) * after


def test_where_padding_tells_texts_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were texts filled up on the left, earlier columns would not be theirs: the trial sees it, and the plan says so."""
    monkeypatch.setattr(runner, "padded_on", lambda tokens, side: (tokens, None))
    model = ic.load(testing.tiny("qwen3_vl", dtype=torch.float64))
    text = batch(model, "qwen3_vl")
    edits = [S.resid_pre[at].at(pos).scale(3.0) for at in range(3) for pos in (0, -1)]
    swept, full = (model.sweep(text, edits, JUDGED, strategy=name) for name in ("auto", "full"))
    same(swept, full, model)
    assert swept.plan.strategy == "staircase" and [group.texts for group in swept.plan.groups] == [(0,), (1,), (2,)]
    assert "texts go one by one: its numbers differ from full forward passes by" in swept.plan.explain()


@pytest.mark.parametrize("strategy", ["auto", "full"])
@pytest.mark.parametrize("family", DEEPSTACK)
def test_rows_without_an_image_and_values_of_all_rows(family: str, strategy: str) -> None:
    """What images hand over is changed where there are images; a value for all rows is shared out by their tokens."""
    model = ic.load(testing.tiny(family, dtype=torch.float64))
    images = [pictures.picture(family, seed).double() for seed in range(6)]
    clear, blind = (
        pictures.inputs(family, rows) for rows in ((images[:2], [], images[2:3]), (images[3:5], [], images[5:]))
    )
    source = model.run(blind, read=visual.reads(model))
    edits = [visual.replaced(source, at) for at in range(4)] + [[S.deepstack[0].scale(2.0)], [S.vision_embed.zero()]]
    swept = model.sweep(clear, edits, JUDGED, strategy=strategy)
    for number, edit in enumerate(edits):
        logits = model.run(clear, edits=edit, allow_noop=True).logits[:, -1]
        close(swept.values[number], logits[:, 3] - logits[:, 9], model)


def test_few_columns_before_an_image_are_run_too() -> None:
    """Over a handful of earlier keys, attention in two parts costs more than these columns in the model's own kernel."""
    model = tiny_model("llava")
    inputs = values("llava", torch.float32, 3)
    plan = ic.Sweep.planned(model, inputs, [S.resid_pre[1].at("vision").zero()], JUDGED)
    assert places(inputs)[0][0] == 3 and plan.passes[0].columns == inputs["input_ids"].shape[1] > 16 * 3
    swept, full = (
        model.sweep(inputs, [S.resid_pre[1].at("vision").zero()], JUDGED, strategy=s) for s in ("auto", "full")
    )
    same(swept, full, model)


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("family", some("qwen3_vl"))
def test_a_blind_curve_is_a_sweep_of_the_blind_text(family: str, n_images: int) -> None:
    """Replacing visual rows of the clean run by the blind run's, DeepStack following, equals putting the text rows after
    the first visual token into the blind run. With one image no visual row runs again."""
    model = tiny_model(family, torch.float64)
    clear, blind = values(family, n_images=n_images), values(family, n_images=n_images, seed=7)
    visual, _ = places(clear)
    after = [i for i in range(visual[0], clear["input_ids"].shape[1]) if i not in visual]
    reads = [*(S.resid_pre[at] for at in range(3)), *([S.deepstack[0]] if family in DEEPSTACK else [])]
    seen, unseen = model.run(clear, read=S.resid_pre), model.run(blind, read=reads)
    edits = [S.resid_pre[at].at(after).set(seen[S.resid_pre[at]][:, after]) for at in range(3)]
    swept = model.sweep(blind, edits, JUDGED)
    if family not in COARSER and after[0] == visual[-1] + 1:
        assert swept.plan.token_layers == 3 * clear["input_ids"].shape[1] + len(after) * (3 + 2 + 1)
    for at in range(3):
        wanted = _patched_by_hand(model, clear, visual, at, unseen[S.resid_pre[at]], family, unseen)
        assert float(swept.values[at, 0]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def _patched_by_hand(
    model: ic.Model, clear: dict[str, Tensor], visual: list[int], layer: int, rows: Tensor, family: str, blind: ic.Run
) -> float:
    """Visual rows at a layer's input, and what is added to them from there on, replaced in a plain forward pass."""
    block = model.engine.modules[model.atlas.entries["resid_pre", layer].read.module]  # type: ignore[union-attr]

    def patch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[:, visual] = rows[:, visual].as_subclass(Tensor)
        return (x, *args[1:])

    handles = [block.register_forward_pre_hook(patch)]
    if family in DEEPSTACK and layer == 0:
        features = torch.cat(blind.rows(S.deepstack[0]))
        handles.append(
            model.hf.model.language_model.register_forward_pre_hook(
                lambda _m, args, kwargs: (args, {**kwargs, "deepstack_visual_embeds": [features]}), with_kwargs=True
            )
        )
    try:
        with torch.no_grad():
            logits = model.hf(**clear, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return float(logits[3] - logits[9])


def test_several_additions_and_one_after_the_last_block() -> None:
    """DeepStack after two blocks of three, and after both of two, where variants get passes of their own."""
    for depth, layers in ((3, 3), (3, 2)):
        hf = testing.tiny("qwen3_vl", num_hidden_layers=layers)
        hf.config.vision_config.deepstack_visual_indexes = [0, 1]
        vision = {**hf.config.vision_config.to_dict(), "depth": depth, "deepstack_visual_indexes": [0, 1]}
        torch.manual_seed(0)
        config = transformers.Qwen3VLConfig(
            text_config=hf.config.text_config.to_dict(), vision_config=vision, image_token_id=pictures.IMAGE,
            video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        )  # fmt: skip
        model = ic.load(transformers.Qwen3VLForConditionalGeneration(config).double().eval(), check=False)
        inputs = values("qwen3_vl")
        edits = [S.resid_pre[at].at("vision").scale(3.0) for at in range(layers)]
        edits += [S.resid_post[at].at(4).scale(3.0) for at in range(layers)]
        swept, full = (model.sweep(inputs, edits, JUDGED, strategy=name) for name in ("auto", "full"))
        assert swept.plan.strategy == ("staircase" if layers == 3 else "full")
        assert ("after the last layer" in swept.plan.why) == (layers == 2)
        same(swept, full, model)


def test_an_inner_site_and_a_span_are_scored() -> None:
    model, inputs = tiny_model("qwen3_vl", torch.float64), values("qwen3_vl")
    _, after = places(inputs)
    tokens = model.input(inputs)
    spans = {**tokens.spans, "answer": ((ic.Span(len(tokens.labels[0]) - 2, len(tokens.labels[0])),),)}
    text = replace(tokens, spans=spans)
    inner = score.projection(S.resid_post[1].at(-2), torch.linspace(-1, 1, 64, dtype=torch.float64))
    edits = [S.resid_pre[at].at(pos).scale(3.0) for at in range(2) for pos in ("vision", after[0])]
    for judged in (inner, score.nll(text, "answer"), score.kl()):
        swept, full = (model.sweep(text, edits, judged, strategy=name) for name in ("auto", "full"))
        assert swept.plan.strategy == "staircase"
        same(swept, full, model)


def test_a_model_whose_blocks_are_told_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were positions those of text, the trial would see it."""
    told = Called.told

    def wrongly(self: Called, *args: object) -> object:
        self.blocks = [(more, {**named, "position_embeddings": _first(named)}) for more, named in self.blocks]
        return told(self, *args)  # type: ignore[arg-type]

    def _first(named: dict[str, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(x.flip(-2) for x in named["position_embeddings"])

    monkeypatch.setattr(Called, "told", wrongly)
    model = ic.load(testing.tiny("qwen3_vl"))
    plan = model.sweep(values("qwen3_vl", torch.float32), [S.resid_pre[1].at("vision").zero()], JUDGED).plan
    assert plan.strategy == "full" and "its numbers differ from full forward passes by" in plan.why


def test_images_that_see_themselves_both_ways_are_run_whole() -> None:
    """Gemma 3: an edit of one visual token changes those before it in the same image."""
    model, inputs = tiny_model("gemma3_vision", torch.float64), values("gemma3_vision")
    visual, _ = places(inputs)
    second = visual[4]
    edits = [S.resid_pre[0].at(second + 2).scale(3.0), S.resid_pre[0].at(second - 1).scale(3.0)]
    swept, full = (model.sweep(inputs, edits, JUDGED, strategy=name) for name in ("auto", "full"))
    width = inputs["input_ids"].shape[1]
    assert sorted(sweep_pass.columns for sweep_pass in swept.plan.passes) == [width - second, width - (second - 1)]
    same(swept, full, model)


def test_a_text_with_a_hidden_column_has_passes_of_its_own() -> None:
    """Beside others, which the trial then takes; alone, where there is nothing to try."""
    model, inputs = ic.load(testing.tiny("qwen3_vl", dtype=torch.float64)), values("qwen3_vl")
    holed = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holed["attention_mask"][0, -3] = 0
    edits = [S.resid_pre[at].at(-1).scale(3.0) for at in range(3)]
    for x in (holed, ic.Tokens.stack([model.input(holed), model.input(inputs)])):
        swept, full = (model.sweep(x, edits, JUDGED, strategy=name) for name in ("auto", "full"))
        same(swept, full, model)
        assert len(swept.plan.singles[0]) == len(edits)
        assert swept.plan.strategy == ("full" if len(swept.plan.lengths) == 1 else "staircase")
