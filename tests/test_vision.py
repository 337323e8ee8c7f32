"""Qwen3-VL with images: text and visual positions, and no state left from one image to the next text."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

import interp_core as ic
from interp_core import sites as S

IMAGE = 90


def inputs(n_images: int = 1) -> dict[str, torch.Tensor]:
    """Two 4x4-patch images become 4 visual tokens each."""
    picture = [92, *[IMAGE] * 4, 93]
    ids = torch.tensor([[5, 17, *picture * n_images, 33, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(16 * n_images, 48, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * n_images),
    }


def test_text_and_visual_positions() -> None:
    model = tiny_model("qwen3_vl")
    with torch.no_grad():
        plain = model.hf(**inputs(2), use_cache=False).logits
    run = model.run(
        inputs(2), read=[S.resid_post[0], S.resid_post[0].at("vision"), S.resid_post[0].at("text"), S.pattern[1]]
    )
    torch.testing.assert_close(run.logits.as_subclass(torch.Tensor), plain, atol=1e-5, rtol=1e-5)
    visual = [3, 4, 5, 6, 9, 10, 11, 12]
    assert torch.equal(run[S.resid_post[0].at("vision")], run[S.resid_post[0]][:, visual])
    assert run[S.resid_post[0].at("text")].shape[1] == run.logits.shape[1] - len(visual)


def test_blinding_and_knocking_out() -> None:
    model = tiny_model("qwen3_vl")
    plain = model.run(inputs())
    blind = model.run(inputs(), edits=S.resid_pre[1].at("vision").zero())
    assert blind.receipts[0].positions == ((3, 4, 5, 6),)
    assert not torch.allclose(blind.logits[:, -1], plain.logits[:, -1], atol=1e-4)
    assert torch.allclose(blind.logits[:, :3], plain.logits[:, :3], atol=1e-5)
    run = model.run(
        inputs(), read=S.pattern[2], edits=S.pattern[2].knockout(query="text", key="vision"), allow_noop=True
    )
    assert not run[S.pattern[2]][:, :, 7:, 3:7].any()
    made = model.generate(
        inputs(),
        edits=S.pattern.knockout(query=-1, key="vision"),
        read=S.pattern[0],
        max_new_tokens=3,
        stop_at_eos=False,
    )
    assert all(not step[S.pattern[0]][:, :, -1, 3:7].any() for step in made.steps)


def test_deepstack_lies_between_the_blocks() -> None:
    model = tiny_model("qwen3_vl")
    run = model.run(inputs(), read=[S.resid_post[0], S.resid_pre[1], S.resid_post[1], S.resid_pre[2]])
    added = (run[S.resid_pre[1]] - run[S.resid_post[0]]).abs().sum(-1)[0]
    assert (added[3:7] > 0).all() and not added[:3].any() and not added[7:].any()
    assert torch.equal(run[S.resid_pre[2]], run[S.resid_post[1]])


def test_an_image_leaves_nothing_for_the_next_text(ids: torch.Tensor) -> None:
    model = ic.load(ic.testing.tiny("qwen3_vl"))
    before = model.generate(ids[:1], max_new_tokens=3, stop_at_eos=False)
    model.run(inputs())
    model.generate(inputs(), max_new_tokens=2, stop_at_eos=False)
    assert model.hf.model.rope_deltas is None
    after = model.generate(ids[:1], max_new_tokens=3, stop_at_eos=False)
    assert torch.equal(before.ids, after.ids)


def test_text_only_models_know_no_vision(toy: ic.Model) -> None:
    with pytest.raises(ic.PositionError, match="no positions called 'vision'"):
        toy.run("Q:", read=S.resid_post.at("vision"))
