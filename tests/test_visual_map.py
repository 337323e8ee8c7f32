"""Maps by knockout of blocks of visual tokens: against one run per block, and against a mask by hand."""

from __future__ import annotations

from pathlib import Path

import pictures
import pytest
import torch
from conftest import tiny_model
from interp_plugins.localisation import evidence, hits
from interp_plugins.visual_map import VisualMap, VisualMapResult
from PIL import Image

import interp_core as ic
from interp_core import sites as S

FAMILIES = ("qwen3_vl", "llava", "llava_onevision", "gemma3_vision")
MORE = ("qwen3_vl_moe", "qwen2_5_vl", "internvl", "smolvlm")


def pictured(family: str, count: int = 1) -> tuple[ic.Model, ic.Tokens]:
    model = tiny_model(family)
    return model, model.tokens(pictures.inputs(family, [[pictures.picture(family, seed) for seed in range(count)]]))


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def test_each_block_equals_a_run_without_it(family: str) -> None:
    model, tokens = pictured(family)
    found = VisualMap()(model, tokens, answer=[11], block=2)
    (grid,), compared = model.visual_grid(tokens), 0

    def logprob(edits: list[ic.Edit]) -> float:
        return float(model.run(tokens, edits=edits, logits=-1).logits.plain[0].log_softmax(-1)[11])

    assert float(found.clean) == pytest.approx(logprob([]), abs=1e-4)
    blocks: dict[tuple[int, ...], list[int]] = {}
    for i, token in enumerate(grid):
        if token.box is not None:
            blocks.setdefault((token.image, token.tile, token.row // 2, token.col // 2), []).append(i)
        else:
            assert found.loss[0, i].isnan() and found.cells[0][i][3] == -1
    for block in list(blocks.values())[:3]:
        loss = logprob([]) - logprob([S.pattern.knockout(query="text", key=[grid[i].position for i in block])])
        for i in block:
            assert float(found.loss[0, i]) == pytest.approx(loss, abs=1e-4)
            compared += 1
    assert compared and len(found.table()) == len(blocks)
    assert found.table()[0]["loss"] == pytest.approx(float(found.loss[~found.loss.isnan()].max()))


def test_a_mask_by_hand() -> None:
    """LLaVA with the mask that transformers adds to its scores: nothing of ours."""
    model, tokens = pictured("llava")
    found = VisualMap()(model, tokens, answer=[11], block=2)
    visual = [token.position for token in model.visual_grid(tokens)[0]]
    block = [visual[row * 4 + col] for row in (2, 3) for col in (0, 1)]
    size, low = tokens.ids.shape[1], torch.finfo(torch.float32).min
    mask = torch.full((size, size), low).triu(1)
    text = [position for position in range(size) if position not in visual]
    with torch.no_grad():
        values = []
        for hidden in ([], block):
            mask[torch.tensor(text)[:, None], torch.tensor(hidden, dtype=torch.long)] = low
            logits = model.hf(
                input_ids=tokens.ids, attention_mask=mask[None, None], position_ids=torch.arange(size)[None],
                pixel_values=tokens.inputs["pixel_values"], use_cache=False,
            ).logits  # fmt: skip
            values.append(float(logits[0, -1].log_softmax(-1)[11]))
    assert float(found.map()[2, 0]) == pytest.approx(values[0] - values[1], abs=1e-4)
    assert abs(values[0] - values[1]) > 1e-2


def test_the_target_is_what_is_judged_where_there_is_one() -> None:
    model, tokens = pictured("qwen3_vl")
    last = tokens.lengths[0]
    named = tokens.name(target=ic.Span(last - 2, last))
    found = VisualMap()(model, named)
    logits = model.run(tokens).logits.plain[0].log_softmax(-1)
    mean = (logits[last - 3, tokens.ids[0, last - 2]] + logits[last - 2, tokens.ids[0, last - 1]]) / 2
    assert float(found.clean) == pytest.approx(float(mean), abs=1e-4) and "mean" in found.score
    position = model.visual_grid(tokens)[0][1].position
    hidden = model.run(tokens, edits=S.pattern.knockout(query="text", key=[position])).logits.plain[0].log_softmax(-1)
    lost = mean - (hidden[last - 3, tokens.ids[0, last - 2]] + hidden[last - 2, tokens.ids[0, last - 1]]) / 2
    assert float(found.loss[0, 1]) == pytest.approx(float(lost), abs=1e-4)


def test_maps_of_several_images_and_of_some_layers() -> None:
    model, tokens = pictured("qwen3_vl", 2)
    found = VisualMap()(model, tokens, answer=[11])
    assert found.map(image=0).shape == found.map(image=1).shape == (2, 3)
    flat = torch.cat([found.map(image=image).flatten() for image in (0, 1)])
    assert torch.equal(flat, found.loss[0]) and len(set(flat.tolist())) == 12
    first = VisualMap()(model, tokens, answer=[11], layers=[0])
    every = VisualMap()(model, tokens, answer=[11], layers=list(range(model.n_layers)))
    torch.testing.assert_close(every.loss, found.loss, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first.loss, found.loss, atol=1e-3)
    score = hits(found.map(image=1), evidence([(0, 0, 8, 8)], (2, 3), (16, 24)))
    assert 0 <= score.pointing <= 1 and score.recall[0.2] in (0, 1)


def test_saved_shown_and_laid_over_the_picture(tmp_path: Path) -> None:
    model, tokens = pictured("llava_onevision")
    found = VisualMap()(model, tokens, answer=[11], block=2)
    assert VisualMapResult.load(found.save(tmp_path / "map")) == found
    assert list(found.overlays()) == ["image 0, tile 0", "image 0, tile 1"] and found.html().count("<svg") == 2
    one, shown = pictured("qwen3_vl")
    drawn = VisualMap()(one, shown, answer=[11]).overlays([Image.new("RGB", (24, 16), "white")])
    assert len(drawn["image 0"].boxes) == 6 and "<svg" in drawn["image 0"].html()


def test_what_is_refused() -> None:
    model, tokens = pictured("qwen3_vl")
    visual_map = VisualMap()
    with pytest.raises(ic.PositionError, match="a row has no image"):
        visual_map(model, torch.tensor([[5, 17, 33]]))
    with pytest.raises(ic.PlanError, match="block takes a whole number from 1"):
        visual_map(model, tokens, block=0)
    with pytest.raises(ic.SiteError, match="no attention in layer 9"):
        visual_map(model, tokens, layers=[9])
    with pytest.raises(ic.PlanError, match="judges one answer"):
        visual_map(model, tokens, answer=[1], other=[2])
    with pytest.raises(ic.CapabilityError, match="vision_embed"):
        visual_map(tiny_model("llama"), torch.tensor([[5, 17, 33]]))
    found = visual_map(model, tokens, answer=[11])
    for asked in ({"row": 1}, {"image": 1}, {"tile": 1}):
        with pytest.raises(ic.PositionError, match="there is no row 1|has no tile"):
            found.map(**asked)


@pytest.mark.slow
def test_it_keeps_the_rules_of_methods() -> None:
    model, tokens = pictured("qwen3_vl")
    report = ic.testing.check_method(VisualMap, model, rows=[tokens])
    assert report.ok, str(report)
