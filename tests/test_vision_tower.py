"""Sites of the vision tower, against hooks written by hand on the Hugging Face module."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pictures
import pytest
import torch
from conftest import tiny_model
from tolerances import rounding
from towers import LAYOUT, Tower, count

import interp_core as ic
from interp_core import sites as S

FAST = ("qwen2_5_vl", "qwen3_vl", "llava", "internvl")
"""Windows, one row for all images; a class token and a layer that nobody reads; factors per feature."""
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUT]
NAMES = [name for name, info in S.SITES.items() if info.tower]
BY_HAND = [name for name in NAMES if name != "vision_head_out"]


def rows_of(family: str) -> list[list[torch.Tensor]]:
    """Rows with two images and with one; of two sizes where the family has sizes."""
    made = [pictures.picture(family, seed).double() for seed in range(3)]
    if family in pictures.QWEN:
        made[1] = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(7)).double()
    return [made[:2], made[2:]]


@cache
def given(family: str) -> dict[str, Any]:
    return pictures.inputs(family, rows_of(family))


@cache
def by_hand(family: str) -> Tower:
    tower = Tower(family, tiny_model(family, torch.float64).hf)
    tower.learn_order(given(family))
    return tower


def site(name: str, layer: int) -> S.Site:
    return S.named(name)[layer] if S.SITES[name].layered else S.named(name)


def layers(model: ic.Model, name: str) -> list[int]:
    return model.atlas.layers(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_equal_hand_written_hooks(family: str) -> None:
    model, tower = tiny_model(family, torch.float64), by_hand(family)
    assert [name for name in NAMES if name not in model.sites] == (["vision_pre_merger"] if family == "llava" else [])
    run = model.run(given(family), read=[S.named(name) for name in NAMES if name in model.sites])
    for name in BY_HAND:
        for layer in layers(model, name):
            wanted = tower.rows(tower.value(name, layer, given(family)), rows_of(family))
            for row, alone in zip(run.rows(site(name, layer)), wanted, strict=True):
                torch.testing.assert_close(row.as_subclass(torch.Tensor), alone, atol=1e-12, rtol=1e-12)
    weight = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.0.{LAYOUT[family]['out']}")
    scale = model.hf.get_submodule(f"{LAYOUT[family]['blocks']}.0").lambda_1 if family == "internvl" else 1.0
    for heads, added in zip(run.rows(S.vision_head_out[0]), run.rows(S.vision_attn_out[0]), strict=True):
        torch.testing.assert_close((heads.sum(1) + weight.bias) * scale, added.as_subclass(torch.Tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_equal_hand_written_hooks(family: str) -> None:
    """At the second image of each row that has one, in every kind of site."""
    model, tower = tiny_model(family, torch.float64), by_hand(family)
    values, rows = given(family), rows_of(family)
    real = values["attention_mask"].bool()
    lengths = [[count(family, image) for image in row] for row in rows]
    tiles = family == "smolvlm"  # an image of its own each
    start, stop = (16, 32) if tiles else (lengths[0][0], sum(lengths[0]))
    at = torch.arange(start, stop)
    if tiles:
        at = torch.cat([at, at + sum(lengths[0])])
    if tower.order is not None:
        at = tower.order[at]
    plain = model.run(values).logits.plain
    moved = 0
    for name in BY_HAND:
        if name not in model.sites:
            continue
        layer = layers(model, name)[-1] if family != "llava" else 0
        hand = "vision_attn_out" if name == "vision_resid_mid" else name  # ln2's input is one use of the stream
        part = site(name, layer).at("image_1")
        size = model.sizes(name)
        noise = torch.linspace(-2, 2, size.get("d_head") or size.get("d_mlp") or size["d_model"]).double()
        changes: list[tuple[ic.Edit, Any]] = [(part.add(noise), lambda x, noise=noise: x + noise)]
        if name in ("vision_z", "vision_mlp_out", "vision_resid_pre"):
            changes += [(part.scale(-0.5), lambda x: -0.5 * x), (part.zero(), torch.zeros_like)]
            changes += [(part.set(noise), lambda x, noise=noise: noise.expand_as(x))]
        for edit, change in changes:

            def at_the_image(x: torch.Tensor, change: Any = change) -> torch.Tensor:
                x = x.clone()
                x[at] = change(x[at])
                return x

            with torch.no_grad():
                wanted = tower.logits(hand, layer, values, at_the_image)
            run = model.run(values, edits=edit)
            torch.testing.assert_close(run.logits.plain[real], wanted[real], atol=1e-9, rtol=1e-8)
            assert run.receipts[0].positions == tuple(
                tuple(range(start, stop)) if row == 0 or tiles else () for row in range(2)
            )
            moved += not torch.allclose(plain[real], wanted[real], atol=1e-6)
    assert moved >= 20  # nothing was compared with itself


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_own_values(family: str) -> None:
    model = tiny_model(family, torch.float64)
    last = 0 if family == "llava" else -1
    plain = model.run(given(family), read=[S.vision_resid_post[last], S.vision_z[0, 1], S.vision_head_out[0]])
    own = torch.cat(plain.rows(S.vision_resid_post[last])).as_subclass(torch.Tensor)
    same = model.run(given(family), edits=S.vision_resid_post[last].set(own), allow_noop=True)
    assert torch.equal(same.logits.plain, plain.logits.plain)
    assert [row.shape[1:] for row in plain.rows(S.vision_z[0, 1])] == [(16,), (16,)]
    # a head without its z, and without what it adds, is one thing
    by_z = model.run(given(family), edits=S.vision_z[0, 1].zero()).logits.plain
    by_out = model.run(given(family), edits=S.vision_head_out[0, 1].zero()).logits.plain
    real = given(family)["attention_mask"].bool()
    torch.testing.assert_close(by_z[real], by_out[real], atol=1e-9, rtol=1e-8)
    assert not torch.allclose(by_z[real], plain.logits.plain[real], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows(family: str) -> None:
    """Rows with other images beside them, with none, stacked again, saved and opened again."""
    model = tiny_model(family, torch.float64)
    rows = rows_of(family)
    tokens = model.tokens(pictures.inputs(family, [*rows, rows[0][:1]]))
    singles = [tokens.row(i) for i in range(3)]
    text = ic.Tokens(torch.tensor([[5, 17, 33]]), torch.ones(1, 3, dtype=torch.bool))
    reads = [S.vision_resid_post[0], S.vision_z[1].at("image_0")]
    batch = model.run(ic.Tokens.stack([singles[1], text, singles[0], singles[2]]), read=reads)
    for row, number in ((0, 1), (2, 0), (3, 2)):
        alone = model.run(singles[number], read=reads)
        for read in reads:
            torch.testing.assert_close(
                batch.rows(read)[row].as_subclass(torch.Tensor), alone.rows(read)[0].as_subclass(torch.Tensor)
            )
            assert len(alone.rows(read)[0])
    assert not len(batch.rows(reads[0])[1])


def test_saved_runs_know_patches(tmp_path: Any) -> None:
    run = tiny_model("qwen2_5_vl", torch.float64).run(given("qwen2_5_vl"), read=S.vision_z[1])
    run.save(tmp_path)
    again = ic.open_run(tmp_path)
    for site in (S.vision_z[1], S.vision_z[1, 0], S.vision_z[-1].at("image_0"), S.vision_z[1].at(slice(0, 2))):
        for one, two in zip(again.rows(site), run.rows(site), strict=True):
            assert torch.equal(one.as_subclass(torch.Tensor), two.as_subclass(torch.Tensor))
    assert again[S.vision_z[1].at([0, 5])].shape == (2, 2, 2, 16) and again[S.vision_z[1, 1].at(-1)].shape == (2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_agree(family: str) -> None:
    model = tiny_model(family)
    other = model.on("nnsight")
    values = {k: x.float() if k == "pixel_values" else x for k, x in given(family).items()}
    reads = [S.vision_resid_post[0], S.vision_z[0], S.vision_head_out[0, 0]]
    edits = [S.vision_z[0, 1].at("image_0").scale(2.0), S.vision_resid_post[0].at(0).add(torch.ones(32))]
    one, two = (m.run(values, read=reads, edits=edits) for m in (model, other))
    assert torch.equal(one.logits.plain, two.logits.plain)
    for read in reads:
        assert all(torch.equal(a, b) for a, b in zip(one.rows(read), two.rows(read), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_gradients(family: str) -> None:
    model = tiny_model(family, torch.float64)
    values = given(family)
    edit = S.vision_mlp_out[0].at("image_0").zero()
    made = model.generate(values, edits=edit, read=S.vision_resid_post[0], max_new_tokens=2, stop_at_eos=False)
    assert made.receipts[0].fired == 1
    run = model.run(values, edits=edit, read=S.vision_resid_post[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(made.steps[0].rows(S.vision_resid_post[0]), run.rows(S.vision_resid_post[0]), strict=True)
    )
    assert torch.equal(made.ids[:, -2], run.logits.plain[:, -1].argmax(-1))
    other = model.on("nnsight").generate(
        values, edits=edit, read=[S.embed, S.vision_resid_post[0]], max_new_tokens=2, stop_at_eos=False
    )
    assert torch.equal(other.ids, made.ids) and other.receipts[0].norm == made.receipts[0].norm
    reads = [S.vision_resid_pre[0], S.vision_z[0], S.vision_attn_out[0]]
    graded = model.run(values, read=reads, grad=lambda logits: logits[:, -1, 3].sum())
    tower = by_hand(family)
    for read in reads:
        leaves: list[torch.Tensor] = []

        def leaf(x: torch.Tensor, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[0]

        score = tower.logits(read.name, 0, values, leaf)[:, -1, 3].sum()
        (slope,) = torch.autograd.grad(score, leaves)
        for ours, wanted in zip(graded.grad.rows(read), tower.rows(slope, rows_of(family)), strict=True):
            torch.testing.assert_close(ours.as_subclass(torch.Tensor), wanted, atol=1e-9, rtol=1e-7)
        assert any(part.any() for part in graded.grad.rows(read))


@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_run_the_tower_again(family: str) -> None:
    model, values = tiny_model(family, torch.float64), given(family)
    variants = [
        S.vision_resid_pre[0].at("image_0").zero(), S.vision_z[0, 1].scale(3.0), S.resid_pre[1].at("vision").zero(),
        S.vision_mlp_out[0].at([0, 2]).add(torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0)).double()),
    ]  # fmt: skip
    score = ic.score.logit_diff(3, 9)
    found = model.sweep(values, variants, score)
    plain = model.run(values).logits.plain[:, -1]
    for number, edit in enumerate(variants):
        last = model.run(values, edits=edit).logits.plain[:, -1]
        off = (found.values[number] - (last[:, 3] - last[:, 9])).abs().max()
        assert off <= rounding(model) * last.abs().max()
        assert not torch.allclose(last, plain, atol=1e-6)


def test_windows_are_undone() -> None:
    """Qwen2.5-VL orders patches by windows; here they come as the processor lays them out, four per visual token."""
    model = tiny_model("qwen2_5_vl", torch.float64)
    assert by_hand("qwen2_5_vl").order is not None
    assert by_hand("qwen2_5_vl").order.tolist() != sorted(by_hand("qwen2_5_vl").order.tolist())  # type: ignore[union-attr]
    values = given("qwen2_5_vl")
    embedded = model.hf.model.visual.patch_embed(values["pixel_values"])
    run = model.run(values, read=[S.vision_resid_pre[0], S.vision_pre_merger, S.vision_embed])
    assert torch.equal(torch.cat(run.rows(S.vision_resid_pre[0])).as_subclass(torch.Tensor), embedded)
    with torch.no_grad():
        merged = model.hf.model.visual.merger(torch.cat(run.rows(S.vision_pre_merger)).as_subclass(torch.Tensor))
    torch.testing.assert_close(merged, torch.cat(run.rows(S.vision_embed)).as_subclass(torch.Tensor))


def test_what_is_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ic.CapabilityError, match="this gpt2 has no vision tower; resid_post is its language model's"):
        tiny_model("gpt2").run(ids, read=S.vision_resid_post[0])
    model = tiny_model("llava", torch.float64)
    with pytest.raises(ic.CapabilityError, match="takes what it sees from layer 0 of its tower"):
        model.run(given("llava"), edits=S.vision_z[1].zero())
    with pytest.raises(ic.CapabilityError, match="read vision_resid_post of the layer"):
        model.run(given("llava"), read=S.vision_pre_merger)
    with pytest.raises(ic.SiteError, match="no layer 2, there are 2, 0 to 1"):
        model.run(given("llava"), read=S.vision_z[2])
    with pytest.raises(ic.PositionError, match="the text comes without images"):
        model.run(ids, read=S.vision_z[0])
    with pytest.raises(ic.PositionError, match="no position 99 in row 0"):
        model.run(given("llava"), read=S.vision_z[0].at(99))
    with pytest.raises(ic.PositionError, match="different numbers"):
        model.run(given("llava"), read=S.vision_z[0])[S.vision_z[0]]
    with pytest.raises(ic.PlanError, match="vision_z"):
        model.run(given("llava"), edits=S.vision_z[0].set(torch.zeros(3, 5)))
    with pytest.raises(ic.PlanError, match="scores sites of the language model"):
        model.sweep(given("llava"), [S.vision_z[0].zero()], ic.score.projection(S.vision_resid_post[0], torch.ones(32)))
    with pytest.raises(ic.SiteError, match="Did you mean .vision_resid_post."):
        S.named("vision_resid_pots")


def test_hooks_of_transformers_keep_their_order() -> None:
    """LLaVA's projector is handed what transformers records of a layer; the order of its hooks is as before a run."""
    model = ic.load(copy.deepcopy(tiny_model("llava", torch.float64).hf))
    block = model.hf.get_submodule(f"{LAYOUT['llava']['blocks']}.0")
    handle = block.register_forward_hook(lambda *_: None)
    before = [*block._forward_hooks]
    assert len(before) == 2
    plain = model.run(given("llava")).logits.plain
    assert not torch.equal(model.run(given("llava"), edits=S.vision_resid_post[0].zero()).logits.plain, plain)
    assert [*block._forward_hooks] == before
    handle.remove()


def test_the_self_check_holds_towers() -> None:
    """A family file that splits queries otherwise than the model fails, and takes nothing else with it."""
    found = {row.site for row in tiny_model("qwen3_vl").check.rows}  # type: ignore[union-attr]
    assert {*NAMES} <= found
    hf = ic.testing.tiny("internvl")
    block = hf.get_submodule(f"{LAYOUT['internvl']['blocks']}.0")
    original = type(block).forward

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return original(self, hidden_states) + 1

    block.__class__ = Other
    model = ic.load(hf)
    assert model.atlas.layers("vision_mlp_out") == [1] and "adds up" in model.atlas.withdrawn["vision_mlp_out", 0]
    assert model.atlas.layers("vision_z") == [0, 1]
    with pytest.raises(ic.SiteError, match="layer 0 has no vision_mlp_out"):
        model.run(
            {**given("internvl"), "pixel_values": given("internvl")["pixel_values"].float()}, read=S.vision_mlp_out[0]
        )
