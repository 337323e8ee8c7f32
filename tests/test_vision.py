"""Images: text and visual positions, what the tower hands over, which pixels a token stands for, and no state left."""

from __future__ import annotations

import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from layouts import DEEPSTACK, LAYOUT, VISUAL
from reference import Reference

import interp_core as ic
from interp_core import sites as S

IMAGE = 90
FAMILIES = sampled(VISUAL, ("qwen3_vl", "llava", "gemma3_vision"))
"""DeepStack and positions by row and column; pictures in a plain language model; pictures that attend both ways."""


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


def batch(family: str) -> dict[str, object]:
    """Three rows with two images, one and one, padded on the left."""
    made = [pictures.picture(family, seed) for seed in range(4)]
    return pictures.inputs(family, [made[:2], made[2:3], made[3:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_images_equal_single_rows(family: str) -> None:
    model = tiny_model(family)
    made = [pictures.picture(family, seed) for seed in range(3)]
    run = model.run(pictures.inputs(family, [made[:2], made[2:]]), read=[S.resid_post[2], S.vision_embed])
    for row, images in enumerate((made[:2], made[2:])):
        alone = model.run(pictures.inputs(family, [images]), read=[S.resid_post[2], S.vision_embed])
        n = alone.logits.shape[1]
        torch.testing.assert_close(run.logits[row, -n:], alone.logits[0], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            run.rows(S.vision_embed)[row], alone[S.vision_embed][0].as_subclass(torch.Tensor), atol=1e-4, rtol=1e-3
        )
    with torch.no_grad():
        bare = model.hf(**pictures.inputs(family, [made[:2]]), use_cache=False).logits
    alone = model.run(pictures.inputs(family, [made[:2]]), read=S.vision_embed)
    assert torch.equal(alone.logits, bare)


@pytest.mark.parametrize("family", VISUAL)
def test_images_have_names(family: str) -> None:
    model = tiny_model(family)
    run = model.run(batch(family), read=[S.resid_pre[0], S.vision_embed, S.resid_pre[0].at("image_1")])
    ids, mask = batch(family)["input_ids"], batch(family)["attention_mask"]
    for row, features in enumerate(run.rows(S.vision_embed)):
        visual = (ids[row] == pictures.IMAGE) & mask[row].bool()  # type: ignore[index]
        assert torch.equal(run[S.resid_pre[0]][row][visual], features)
    grid = model.visual_grid(batch(family))
    per_image = [[sum(token.image == i for token in row) for i in range(row[-1].image + 1)] for row in grid]
    tiles = family == "smolvlm"
    n = pictures.count(family, pictures.picture(family))
    assert per_image == ([[4, 4] * 2, [4, 4], [4, 4]] if tiles else [[n, n], [n], [n]])
    second = run.rows(S.resid_pre[0].at("image_1"))
    assert [len(row) for row in second] == ([4, 4, 4] if tiles else [n, 0, 0])
    assert torch.equal(second[0], run.rows(S.vision_embed)[0][len(second[0]) : 2 * len(second[0])])


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_edits_equal_hand_written_hooks(family: str) -> None:
    """`vision_embed`, by hand: the language model's `inputs_embeds` at the placeholders."""
    model = tiny_model(family, torch.float64)
    values = {k: v.double() if k == "pixel_values" else v for k, v in batch(family).items()}  # type: ignore[attr-defined]
    noise = torch.linspace(-2, 2, 64, dtype=torch.float64)
    run = model.run(values, edits=S.vision_embed.add(noise), read=S.vision_embed)
    places = (values["input_ids"] == pictures.IMAGE) & values["attention_mask"].bool()

    def hook(_module: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> object:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + places[..., None] * noise}

    language = model.hf.get_submodule(LAYOUT[family]["blocks"].rpartition(".")[0])
    handle = language.register_forward_pre_hook(hook, with_kwargs=True)
    extra = {} if family in pictures.QWEN else {"position_ids": (values["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        wanted = model.hf(**values, **extra, use_cache=False).logits
    handle.remove()
    real = values["attention_mask"].bool()
    torch.testing.assert_close(run.logits.as_subclass(torch.Tensor)[real], wanted[real], atol=1e-9, rtol=1e-7)
    assert [len(row) for row in run.receipts[0].positions] == [len(row) for row in run.rows(S.vision_embed)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_with_images_equals_hand_written_hooks(family: str) -> None:
    model = tiny_model(family, torch.float64, "eager")
    reference = Reference(family, model.hf)
    values = pictures.inputs(family, [[pictures.picture(family)]])
    values = {k: v.double() if k == "pixel_values" else v for k, v in values.items()}
    layers = {name: reference.layers(name)[-1] for name in reference.sites()}
    sites = {name: S.named(name)[layer] if S.SITES[name].layered else S.named(name) for name, layer in layers.items()}
    run = model.run(values, read=list(sites.values()))
    for name, site in sites.items():
        wanted = reference.value(name, layers[name], values)
        torch.testing.assert_close(run[site].as_subclass(torch.Tensor), wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", DEEPSTACK)
def test_deepstack_is_what_is_added(family: str) -> None:
    model = tiny_model(family)
    run = model.run(batch(family), read=[S.deepstack[0], S.resid_post[0], S.resid_pre[1]])
    added = (run[S.resid_pre[1]] - run[S.resid_post[0]]).as_subclass(torch.Tensor)
    places = batch(family)["input_ids"] == pictures.IMAGE
    torch.testing.assert_close(torch.cat(run.rows(S.deepstack[0])), added[places], atol=1e-5, rtol=1e-4)
    gone = model.run(batch(family), edits=S.deepstack[0].zero(), read=[S.resid_post[0], S.resid_pre[1]])
    assert torch.equal(gone[S.resid_post[0]], gone[S.resid_pre[1]])
    made = model.generate(batch(family), edits=S.deepstack[0].scale(0.5), max_new_tokens=3, stop_at_eos=False)
    assert made.receipts[0].fired == 1
    assert [len(row) for row in made.receipts[0].positions] == [len(row) for row in run.rows(S.deepstack[0])]
    assert model.atlas.select(S.deepstack[-1]) == model.atlas.select(S.deepstack[0])
    with pytest.raises(ic.SiteError, match="no layer 1, there are 1, 0 to 0"):
        model.run(batch(family), read=S.deepstack[1])


def _without_mixing(family: str) -> torch.nn.Module:
    """A tower whose attention adds nothing: every token then knows its own pixels only."""
    hf = ic.testing.tiny(family, dtype=torch.float64)
    for name, module in hf.named_modules():
        tower = any(part in name for part in ("visual", "vision_tower", "vision_model"))
        if tower and name.endswith(("attn.proj", "attn.out_proj", "attention.projection_layer")):
            module.weight.data.zero_()
            module.bias.data.zero_()
    return hf


@pytest.mark.parametrize("family", VISUAL)
def test_boxes_are_the_pixels_a_token_stands_for(family: str) -> None:
    """Change the pixels of one box: no other token of that tile changes."""
    model = ic.load(_without_mixing(family), check=False)
    image = pictures.picture(family).double()

    def features(tiles_of: torch.Tensor) -> torch.Tensor:
        values = pictures.inputs(family, [[tiles_of]])
        return model.run({**values, "pixel_values": values["pixel_values"].double()}, read=S.vision_embed)[
            S.vision_embed
        ][0]

    plain, tokens = features(image), model.visual_grid(pictures.inputs(family, [[image]]))[0]
    assert len(tokens) == len(plain) == pictures.count(family, image)
    across = {"internvl": 16, "smolvlm": 16}.get(family, 0)  # tiles lie side by side
    checked = 0
    for number, token in enumerate(tokens):
        if token.box is None or (family == "llava_onevision" and token.tile == 0):
            continue
        left, top, right, bottom = map(int, token.box)
        shift = across * (token.image if family == "smolvlm" else token.tile)
        other = image.clone()
        other[:, top:bottom, left + shift : right + shift] += 1
        changed = {i for i, d in enumerate((features(other) - plain).abs().amax(-1).tolist()) if d > 1e-9}
        same_tile = {i for i in changed if (tokens[i].tile, tokens[i].image) == (token.tile, token.image)}
        assert same_tile == {number}, (token, changed)
        checked += 1
    assert checked >= 4


def test_llava_onevision_without_padding_and_with_newlines() -> None:
    model = tiny_model("llava_onevision")
    tall = torch.randn(3, 32, 16)
    tokens = model.visual_grid(pictures.inputs("llava_onevision", [[tall]]))[0]
    assert [t.col for t in tokens[16:21]] == [0, 1, 2, 3, None] and tokens[20].box is None
    assert tokens[21].row == 1 and tokens[21].box == (0, 4, 4, 8)
    values = pictures.inputs("llava_onevision", [[torch.randn(3, 16, 32)]])
    values["image_sizes"] = torch.tensor([[10, 40]])  # twice as wide as its canvas of 16x32: half of that is padding
    values["input_ids"] = torch.tensor([[5, *[pictures.IMAGE] * (16 + 2 * 9), 8]])
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    tokens = model.visual_grid(values)[0]
    assert tokens[16].box == (0, 4, 4, 8) and len(model.run(values, read=S.vision_embed)[S.vision_embed][0]) == 34


def test_what_the_processor_returned_is_wanted_whole() -> None:
    values = pictures.inputs("qwen2_5_vl", [[pictures.picture("qwen2_5_vl")]])
    del values["mm_token_type_ids"]
    with pytest.raises(ic.TextError, match="qwen2_5_vl with images needs mm_token_type_ids"):
        tiny_model("qwen2_5_vl").run(values)
    values = pictures.inputs("gemma3_vision", [[pictures.picture("gemma3_vision")]])
    del values["token_type_ids"]
    with pytest.raises(ic.TextError, match="gemma3 with images needs token_type_ids"):
        tiny_model("gemma3_vision").run(values)
    values = pictures.inputs("llava", [[pictures.picture("llava")]])
    values["input_ids"][0, 4] = 7
    with pytest.raises(ic.TextError, match="stand for 16 visual tokens, the text has 15 placeholders"):
        tiny_model("llava").run(values)
    with pytest.raises(ic.CapabilityError, match="it is not known how this llava lays"):
        tiny_model("llava").visual_grid({**values, "image_sizes": torch.tensor([[16, 16]])})
    values = pictures.inputs("qwen3_vl", [[pictures.picture("qwen3_vl")]])
    values["input_ids"][0, 4] = 7
    with pytest.raises(ic.TextError, match="stand for 6 visual tokens, the text has 5 placeholders"):
        tiny_model("qwen3_vl").run(values)
    values["input_ids"][0, 4] = 91
    with pytest.raises(ic.CapabilityError, match="the input has videos"):
        tiny_model("qwen3_vl").visual_grid(values)
    with pytest.raises(ic.TextError, match="the input has no images"):
        tiny_model("llava").visual_grid(torch.tensor([[1, 2]]))
    with pytest.raises(ic.PositionError, match="no positions called 'vision'"):
        tiny_model("llava").run(torch.tensor([[1, 2]]), read=S.vision_embed)
    with pytest.raises(ic.SiteError, match="vision_embed has no positions to select"):
        S.vision_embed.at(0)
    with pytest.raises(ic.CapabilityError, match="this gpt2 has no vision tower"):
        tiny_model("gpt2").run(torch.tensor([[1, 2]]), read=S.vision_embed)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_after_an_image_is_as_before(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    before = model.run(ids).logits
    grown = model.generate(ids[:1], max_new_tokens=3, stop_at_eos=False)
    made = model.generate(batch(family), edits=S.vision_embed.scale(0.5), max_new_tokens=2, stop_at_eos=False)
    assert made.receipts[0].fired == 1  # the prompt's pass; later steps have no images
    model.run(batch(family))
    assert torch.equal(model.run(ids).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=3, stop_at_eos=False).ids, grown.ids)


def test_gradients_of_visual_features() -> None:
    model = tiny_model("llava", torch.float64)
    values = pictures.inputs("llava", [[pictures.picture("llava").double()]])
    run = model.run(values, read=[S.vision_embed, S.resid_pre[0]], grad=lambda logits: logits[0, -1, 3])
    assert torch.equal(run.grad[S.vision_embed], run.grad[S.resid_pre[0]][:, 3:19])


def test_llava_with_the_towers_own_token() -> None:
    """Strategy `full` keeps a first token that stands for the whole picture."""
    model = ic.load(ic.testing.tiny("llava"), check=False)
    model.hf.config.vision_feature_select_strategy = "full"
    values = pictures.inputs("llava", [[pictures.picture("llava")]])
    values["input_ids"] = torch.tensor([[5, *[pictures.IMAGE] * 17, 8]])
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    tokens = model.visual_grid(values)[0]
    assert tokens[0].box is None and tokens[1].box == (0, 0, 4, 4) and tokens[16].box == (12, 12, 16, 16)
    assert model.run(values, read=S.vision_embed)[S.vision_embed].shape == (1, 17, 64)
