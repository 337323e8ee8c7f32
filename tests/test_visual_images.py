"""Texts with images: what the processor makes of them, where everything is, batches against rows, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import close

import interp_core as ic
from interp_core import sites as S
from interp_core.batches import padded_on, some_rows
from interp_core.vision import SMALLEST
from interp_core.vision.processors import differing

FAMILIES = sorted(ic.testing.VISUAL)
FEW = ("gemma3_vision", "qwen3_vl_moe", "smolvlm")
MOST = [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in FAMILIES]
QUESTIONS = ["Which shape is it?", "is it red or blue?", "how many"]
_MODELS: dict[str, ic.Model] = {}


def seeing(family: str) -> ic.Model:
    """A tiny model with its processor."""
    if family not in _MODELS:
        _MODELS[family] = ic.load(ic.testing.tiny(family), processor=ic.testing.processor(family))
    return _MODELS[family]


def drawn() -> list[Image.Image]:
    """Two square pictures, a wide and a tall one."""
    wide, tall = (ic.testing.pictures(1, size, seed=7)[0] for size in ((32, 16), (16, 32)))
    return [*ic.testing.pictures(2), wide, tall]


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message."""
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def plain(run: ic.Run) -> torch.Tensor:
    return run.logits.as_subclass(torch.Tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_what_the_processor_makes_of_the_whole(family: str) -> None:
    """Its own call on text and images together, which goes another way."""
    model, pictures = seeing(family), drawn()
    place = model.processor.image_token
    text = f"the {place} and the {place} is it red?"
    tokens = model.tokens(text, images=pictures[1:3])
    out = model.processor(text=[text], images=[pictures[1:3]], return_tensors="pt")
    assert torch.equal(tokens.ids, out["input_ids"])
    assert {"pixel_values"} <= set(tokens.inputs) and set(tokens.inputs) <= set(out)
    for name, value in tokens.inputs.items():
        assert torch.equal(value, out[name]), name
    with torch.no_grad():
        wanted = model.hf(**out, use_cache=False).logits
    torch.testing.assert_close(plain(model.run(tokens)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_what_is_in_the_text(family: str) -> None:
    model, pictures = seeing(family), drawn()
    tokens = model.tokens("Which shape is it? answer:", " red", images=pictures[0])
    labels = tokens.labels[0]
    (target,), (question,) = tokens.spans["target"][0], tokens.spans["question"][0]
    assert [label.strip() for label in labels[target.start : target.stop]] == ["red"]
    assert [label.strip() for label in labels[question.start : question.stop]] == [
        "Which",
        "shape",
        "is",
        "it",
        "?",
        "answer",
        ":",
    ]
    assert tokens.spans["prompt"][0] == (ic.Span(0, target.start),) and target.stop == tokens.lengths[0]
    visual, text = (tokens.rows.names[name][0] for name in ("vision", "text"))
    assert sorted([*visual, *text]) == list(range(tokens.lengths[0])) and not set(visual) & set(text)
    assert set(tokens.ids[0, visual].tolist()) == {90}
    grid = model.visual_grid(tokens)[0]
    assert [token.position for token in grid] == visual
    images = [name for name in tokens.spans if name.startswith("image_")]
    assert sorted({f"image_{token.image}" for token in grid}) == sorted(images)
    chat = model.chat(user({"type": "image", "image": pictures[0]}, "Which shape is it?"), "red")
    (asked,) = chat.spans["question"][0]
    assert chat.spans["user"] == chat.spans["message_0"] == ((asked,),)
    assert [label.strip() for label in chat.labels[0][asked.start : asked.stop]] == ["Which", "shape", "is", "it", "?"]
    assert chat.spans["target"][0] == (ic.Span(chat.lengths[0] - 1, chat.lengths[0]),)
    assert len(chat.rows.names["vision"][0]) == len(visual)


@pytest.mark.parametrize("family", MOST)
def test_batches_of_images_are_their_rows(family: str) -> None:
    """Different numbers and sizes of images, and none, padded on either side; split, stacked and picked."""
    model, (one, two, wide, tall) = seeing(family), drawn()
    images = [[one, wide], [two], [], [tall]]
    texts = [*QUESTIONS, "is it red?"]
    batch = model.tokens(texts, " red", images=images)
    alone = [model.tokens(text, " red", images=row) for text, row in zip(texts, images, strict=True)]
    runs = [model.run(tokens) for tokens in alone]
    for side in ("left", "right") if family != "qwen3_5_vision" else ("left",):
        run = model.run(padded_on(batch, side)[0])
        for number, other in enumerate(runs):
            real = padded_on(batch, side)[0].mask[number]
            torch.testing.assert_close(plain(run)[number][real], plain(other)[0], atol=2e-4, rtol=1e-3)
    for number, (row, single) in enumerate(zip(batch, alone, strict=True)):
        assert torch.equal(row.ids, single.ids) and row.spans == single.spans and row.labels == single.labels
        assert set(row.inputs) == set(single.inputs) and row.shares == single.shares
        torch.testing.assert_close(plain(model.run(row)), plain(runs[number]), atol=1e-5, rtol=1e-5)
    again = ic.Tokens.stack([batch.row(1), batch.row(0)])
    picked = some_rows(batch, [1, 0])
    for other in (again, picked):
        torch.testing.assert_close(
            plain(model.run(other))[:, -1], plain(model.run(batch))[[1, 0], -1], atol=2e-4, rtol=1e-3
        )
    assert torch.equal(again.inputs["pixel_values"], picked.inputs["pixel_values"])
    assert again.shares == picked.shares and again.spans.keys() == batch.spans.keys()


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma3_vision", "llava_onevision"])
def test_generated_text_of_a_batch_is_that_of_its_rows(family: str) -> None:
    model, (one, _, wide, _) = seeing(family), drawn()
    batch = model.tokens(QUESTIONS[:2], images=[[one], [wide, one]])
    made = model.generate(batch, max_new_tokens=4, stop_at_eos=False)
    for number, row in enumerate(batch):
        alone = model.generate(row, max_new_tokens=4, stop_at_eos=False)
        assert torch.equal(made.ids[number], alone.ids[0])


def test_methods_and_collections_take_batches_of_images(tmp_path: Path) -> None:
    model, (one, two, wide, _) = seeing("qwen3_vl"), drawn()
    batch = model.tokens(QUESTIONS, images=[[one], [two, wide], [wide]])
    lens = ic.method("logit_lens")
    whole, parts = (lens(model, batch, at=-1, **more) for more in ({}, {"batch_size": 1}))
    torch.testing.assert_close(whole.entropy, parts.entropy, atol=1e-5, rtol=1e-4)
    site = S.resid_post[1]
    acts = model.collect(list(batch), [site], out=tmp_path / "acts", batch_size=3)
    for number, row in enumerate(batch):
        alone = model.run(row, read=site)[site][0].as_subclass(torch.Tensor)
        torch.testing.assert_close(acts[site, number].as_subclass(torch.Tensor), alone, atol=1e-4, rtol=1e-4)
    run = model.run(batch, read=[site.at("vision"), S.vision_embed])
    run.save(tmp_path / "run")
    opened = ic.open_run(tmp_path / "run").tokens
    assert opened.shares == batch.shares and torch.equal(
        opened.row(1).inputs["image_grid_thw"], torch.tensor([[1, 4, 4], [1, 4, 8]])
    )


def test_every_form_of_an_image(tmp_path: Path) -> None:
    model, picture = seeing("qwen3_vl"), drawn()[0]
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    wanted = model.tokens("red?", images=picture)
    forms = [picture, [picture], str(tmp_path / "a.png"), tmp_path / "a.png", array, torch.tensor(array)]
    for form in forms:
        assert torch.equal(model.tokens("red?", images=form).inputs["pixel_values"], wanted.inputs["pixel_values"])
    for part in ({"image": picture}, {"path": str(tmp_path / "a.png")}, {"url": f"file://{tmp_path}/a.png"}):
        seen = model.chat(user({"type": "image", **part}, "red?"))
        assert torch.equal(seen.inputs["pixel_values"], wanted.inputs["pixel_values"])
    grey = model.tokens("red?", images=array[..., 0])
    assert torch.equal(
        grey.inputs["pixel_values"], model.tokens("red?", images=picture.getchannel(0)).inputs["pixel_values"]
    )
    turned = Image.new("RGB", (16, 32), (9, 9, 9))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert model.tokens("red?", images=tmp_path / "b.jpg").inputs["image_grid_thw"].tolist() == [[1, 4, 8]]


def test_a_target_keeps_the_rules_of_text() -> None:
    model, picture = seeing("llava"), drawn()[0]
    assert model.tokens("red?", " blue", images=picture).spans["target"][0][0].start == 18
    with pytest.raises(ic.TextError, match="row 0: the target is empty"):
        model.tokens("red?", "", images=picture)
    with pytest.raises(ic.TextError, match="boundary is 'strict' or 'concat'"):
        model.tokens("red?", "blue", images=picture, boundary="nowhere")
    with pytest.raises(ic.TextError, match="1 targets for 2 texts"):
        model.tokens(["a", "b"], ["c"], images=[[], []])
    with pytest.raises(ic.TextError, match="the target '<image>' names an image"):
        model.tokens("red?", "<image>", images=picture)
    begun = model.tokens("red?", bos=True, images=picture)
    assert begun.ids[0, 0] == 1 and begun.spans["vision"][0] == (ic.Span(1, 17),)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    drawn()[0].resize((64, 64)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def test_pictures_that_cannot_be_seen(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All before the model runs."""
    model, picture = seeing("qwen3_vl"), drawn()[0]
    monkeypatch.setattr(model.hf, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    for image, message in (
        (damaged / "none.png", "row 0: image 0: there is no file .*none.png"),
        (damaged / "cut.png", "cut.png is no picture that can be read .*damaged"),
        (damaged / "text.png", "text.png is no picture that can be read"),
        ("https://example.org/a.png", "is a web address .* nothing is downloaded: save it"),
        (Image.new("RGB", (40, SMALLEST - 1)), f"is 40 x 3 pixels; at least {SMALLEST} a side"),
        (np.zeros((16, 16, 3)), "array of uint8 .* not float64"),
        (np.zeros((3, 16, 16), np.uint8), "put the colours last"),
        (np.zeros((0, 16, 3), np.uint8), "has no pixels"),
        (7, "image 0 takes a PIL image, the path of a file, or an array"),
        (Image.new("RGB", (4, 4000)), r"does not take these images \(4 x 4000 pixels\): absolute aspect ratio"),
    ):
        with pytest.raises(ic.TextError, match=message):
            model.run(model.tokens("red?", images=[image]))
    monkeypatch.setattr("interp_core.vision.pictures.LARGEST", 3000)
    for limit in (2000, 4000):  # Pillow refuses, and Pillow warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for image in (damaged / "whole.png", Image.new("RGB", (64, 64))):
            with pytest.raises(ic.TextError, match="has more than 3000 pixels .*4096|64 x 64.* make it smaller"):
                model.tokens("red?", images=image)
    with pytest.raises(ic.TextError, match=r"row 1: image 0: there is no file"):
        model.tokens(["red?", "blue?"], images=[[picture], ["gone.png"]])


def test_images_and_places_must_fit() -> None:
    model, picture = seeing("qwen3_vl"), drawn()[0]
    place = "<|image_pad|>"
    for call, message in (
        (lambda: model.tokens(f"{place} {place}", images=[picture]), "has 2 places for images .* and 1 images are given"),
        (lambda: model.tokens(f"{place}", images=[picture] * 2), "has 1 places for images .* and 2 images are given"),
        (lambda: model.tokens(f"say {place}"), "row 0: the text has a place for an image or video .* no images are given"),
        (lambda: model.tokens(f"say {place}", images=[]), "has 1 places for images .* and 0 images"),
        (lambda: model.tokens("<|video_pad|> red?", images=[picture]), "would be read as a visual token"),
        (lambda: model.tokens(["a", "b"], images=[[picture]]), "images= has 1 items for 2 texts"),
        (lambda: model.tokens(["a", "b"], images=picture), "for several texts, a list with the images of each"),
        (lambda: model.chat(user({"type": "image", "image": picture}, f"say {place}")), "in its text, which would be read"),
        (lambda: model.chat(user(f"say {place}")), "the text has a place for an image or video"),
        (lambda: model.chat(user({"type": "image"}, "red?")), "message 0 has an image part with no image"),
        (lambda: model.chat(user({"type": "image", "image": picture, "path": "a"})), "with several images"),
        (lambda: model.chat(user({"type": "video", "path": "a.mp4"}, "red?")), "videos are not supported: pass its frames"),
        (lambda: model.chat(user({"type": "image", "image": picture}), chat_template="{{ messages[0].role }}"),
         "the chat template shows 0 places for 1 images"),
        (lambda: model.tokens({"input_ids": torch.tensor([[1]])}, images=[picture]), "is tokens already"),
    ):  # fmt: skip
        with pytest.raises(ic.TextError, match=message):
            call()
    with pytest.raises(ic.CapabilityError, match="takes no images: it has no vision tower"):
        ic.load("toy:text", check=False).tokens("red?", images=[picture])
    bare = ic.load(ic.testing.tiny("llava"), check=False)
    with pytest.raises(ic.CapabilityError, match=r"no processor for images .* pass load\(\.\.\., processor="):
        bare.tokens("red?", images=[picture])


def test_the_place_of_an_image_is_no_text() -> None:
    """Gemma 3 has another token for the place than for visual tokens; without images neither is taken for text."""
    for family in ("gemma3_vision", "qwen3_vl", "llava"):
        model = seeing(family)
        text = f"say {model.processor.image_token}"
        for read, said in ((model.tokens, text), (model.chat, user(text))):
            with pytest.raises(ic.TextError, match="row 0: the text has a place for an image or video"):
                read(said)


def test_a_thin_picture_leaves_ends_of_rows_alone() -> None:
    """LLaVA-OneVision cuts the padding of its high resolution away: of a very thin picture no column is left."""
    model = seeing("llava_onevision")
    for size in ((4, 2000), (2000, 4)):
        tokens = model.tokens("Which shape?", images=Image.new("RGB", size, (200, 10, 30)))
        cells = model.visual_grid(tokens)[0]
        assert len(cells) == int((tokens.ids == 90).sum()) and all(cell.col is None for cell in cells if cell.tile)
        assert model.run(tokens).logits.isfinite().all()


def test_pixels_and_places_come_together() -> None:
    """transformers takes places without pixels, or marked as text, for text; and lets videos fall that it does not know."""
    for family in ("qwen3_vl", "gemma3_vision", "llava"):
        model = seeing(family)
        whole = model.tokens("red?", images=drawn()[0])
        inputs = {"input_ids": whole.ids, **whole.inputs}
        kinds = next((name for name in inputs if name.endswith("token_type_ids")), None)
        cases = [
            (
                {k: v for k, v in inputs.items() if k != "pixel_values"},
                r"has \d+ visual tokens, and no pixels come with",
            ),
            (
                {**inputs, "input_ids": torch.full_like(whole.ids, 7)},
                "have pixel_values, and no text has a place for an",
            ),
        ]
        if kinds:
            moved = inputs[kinds].roll(1, -1)
            cases += [({**inputs, kinds: 0 * moved}, f"{kinds} marks 0 tokens as visual, and the text has"),
                      ({**inputs, kinds: moved}, f"{kinds} marks .* visual tokens, others")]  # fmt: skip
        if family != "qwen3_vl":
            cases.append(
                ({**inputs, "pixel_values_videos": inputs["pixel_values"]}, "takes no videos; pass their frames")
            )
        for case, message in cases:
            with pytest.raises(ic.TextError, match=message):
                model.run(case)


def test_zeros_that_the_model_would_drop() -> None:
    model = seeing("smolvlm")
    model.processor.image_processor.image_mean, mean = [128 / 255] * 3, model.processor.image_processor.image_mean
    try:
        with pytest.raises(ic.TextError, match="5 of 5 tiles hold nothing but zeros .* smolvlm takes for padding"):
            model.tokens("red?", images=Image.new("RGB", (16, 16), (128, 128, 128)))
    finally:
        model.processor.image_processor.image_mean = mean
    assert model.run(model.tokens("red?", images=Image.new("RGB", (16, 16)))).logits.isfinite().all()


def test_processors_of_other_families_are_refused() -> None:
    for family, other in (("qwen3_vl", "smolvlm"), ("llava", "qwen3_vl"), ("gemma3_vision", "llava")):
        processor = ic.testing.processor(other)
        processor.image_token_id = 17
        if hasattr(processor, "_image_token_ids"):
            processor._image_token_ids = [17]
        with pytest.raises(ic.LoadError, match=r"does not belong to this .*: its image token \(.*\) has the id 17"):
            ic.load(ic.testing.tiny(family), processor=processor, check=False)
    for name, value in (("patch_size", 8), ("merge_size", 1), ("temporal_patch_size", 2)):
        processor = ic.testing.processor("qwen3_vl")
        setattr(processor.image_processor, name, value)
        with pytest.raises(ic.LoadError, match=f"its {name} is {value}, the model's [124]"):
            ic.load(ic.testing.tiny("qwen3_vl"), processor=processor, check=False)
    for family, name in (
        ("internvl", "image_seq_length"),
        ("smolvlm", "image_seq_len"),
        ("llava_onevision", "num_image_tokens"),
    ):
        processor = ic.testing.processor(family)
        setattr(processor, name, 9)
        with pytest.raises(ic.LoadError, match="its tokens per tile is 9"):
            ic.load(ic.testing.tiny(family), processor=processor, check=False)


def test_processors_by_what_they_count() -> None:
    """The tiny families share their image token's id, so only what else differs can tell them apart."""
    alike = [{"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vision"}, {"internvl", "gemma3_vision"}]
    for family in FAMILIES:
        config = ic.testing.tiny(family).config
        for other in FAMILIES:
            same = family == other or any({family, other} <= group for group in alike)
            assert bool(list(differing(ic.testing.processor(other), config))) != same, (family, other)


def test_inputs_that_are_not_of_the_text() -> None:
    model, (one, two, *_) = seeing("llava"), drawn()
    tokens = model.tokens("red?", images=[one, two])
    inputs = {"input_ids": tokens.ids, "pixel_values": tokens.inputs["pixel_values"]}
    assert model.tokens(inputs).shares == {"pixel_values": (2,)}
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(ic.TextError, match="stand for 16 visual tokens, the text has 32 placeholders"):
        model.tokens(inputs)
    tiles = seeing("internvl").tokens("red?", images=drawn()[2])
    inputs = {"input_ids": tiles.ids, "pixel_values": tiles.inputs["pixel_values"][:2]}
    with pytest.raises(ic.TextError, match="pixel_values has 2 entries, and the text has visual tokens for 3"):
        seeing("internvl").tokens(inputs)


def saved(family: str, folder: Path) -> ic.Model:
    """A model in a folder, with the files that a processor is made of."""
    model = seeing(family)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    model.processor.image_processor.save_pretrained(folder)
    processor = model.processor
    own = ("image_seq_length", "image_seq_len", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy",
           "num_image_tokens")  # fmt: skip
    settings = {name: value for name in own if (value := getattr(processor, name, None)) is not None}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": type(processor).__name__, **settings}))
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    return model


@pytest.mark.parametrize("family", MOST)
def test_a_folder_has_its_processor(family: str, tmp_path: Path) -> None:
    """Built without torchvision: it is not there, and nothing runs to fetch it."""
    model, picture = saved(family, tmp_path), drawn()[2]
    own = model.tokenizer if family == "qwen3_5_vision" else None  # transformers puts its own rules for Qwen3.5 in
    opened = ic.load(tmp_path, tokenizer=own, device="cpu", check=False)
    message = user({"type": "image", "image": picture}, "Which shape?")
    one, other = opened.chat(message), model.chat(message)
    assert torch.equal(one.ids, other.ids) and one.spans == other.spans
    for name, value in other.inputs.items():
        assert torch.equal(one.inputs[name], value), name
    close(plain(opened.run(one)), plain(model.run(other)), model)  # weights from a file may lie otherwise in memory
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("form", ["plain", pytest.param("fast", marks=pytest.mark.slow), "nested"])
def test_every_form_of_a_folders_settings(form: str, tmp_path: Path) -> None:
    """Class names with and without a backend, pixels by their older names, settings in one file, a video part."""
    model, picture = saved("qwen2_5_vl", tmp_path), drawn()[2]
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "Qwen2VLImageProcessor" + "Fast" * (form == "fast")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if form == "fast":
        size = settings.pop("size")
        older = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **older}))
        (tmp_path / "processor_config.json").unlink()
    if form == "nested":
        (tmp_path / "preprocessor_config.json").unlink()
        video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4}
        whole = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": settings, "video_processor": video}
        (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    opened = ic.load(tmp_path, device="cpu", check=False)
    assert type(opened.processor).__name__ == "Qwen2_5_VLProcessor" and opened.no_processor == ""
    one, other = (each.tokens("red?", images=picture) for each in (opened, model))
    assert torch.equal(one.ids, other.ids) and torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])


def test_a_folder_whose_processor_is_broken_reads_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved("qwen3_vl", tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "merge_size": 1}))
    with caplog.at_level(logging.WARNING, "interp_core"):
        opened = ic.load(tmp_path, device="cpu", check=False)
    assert "its processor does not fit the model: its merge_size is 1, the model's 2; it reads text only" in caplog.text
    assert torch.equal(opened.tokens("red?").ids, model.tokens("red?").ids)
    with pytest.raises(ic.CapabilityError, match="no processor for images .*merge_size is 1"):
        opened.tokens("red?", images=drawn()[0])
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ic.CapabilityError, match="has no preprocessor_config.json or processor_config.json"):
        ic.load(tmp_path, device="cpu", check=False).tokens("red?", images=drawn()[0])
    given = ic.load(tmp_path, processor=ic.testing.processor("qwen3_vl"), device="cpu", check=False)
    assert torch.equal(given.tokens("red?", images=drawn()[0]).ids, model.tokens("red?", images=drawn()[0]).ids)


def test_rows_of_unknown_layout_stay_together() -> None:
    model = seeing("qwen3_vl")
    batch = model.tokens(QUESTIONS[:2], images=[drawn()[:1], drawn()[1:2]])
    unknown = replace(batch, shares={})
    with pytest.raises(ic.TextError, match="a batch with pixel_values, image_grid_thw cannot be split into rows"):
        unknown.row(0)
    with pytest.raises(ic.TextError, match="pixel_values are laid out differently"):
        ic.Tokens.stack(
            [
                batch.row(0),
                replace(batch.row(1), inputs={"pixel_values": torch.zeros(1, 3)}, shares={"pixel_values": None}),
            ]
        )
    with pytest.raises(ic.TextError, match=r"pixel_values of \[16, 48\] and \[16, 12\] cannot be one tensor"):
        small = batch.row(1).inputs["pixel_values"][:, :12]
        ic.Tokens.stack([batch.row(0), replace(batch.row(1), inputs={**batch.row(1).inputs, "pixel_values": small})])
