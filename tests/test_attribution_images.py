"""`interp attribute --image`: text and pictures through a processor, and a page with the pictures under the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interp_recipes.attribute import AttributeConfig, attribute
from PIL import Image

import interp_core as ic
from interp_core import testing

PROMPT = "Q: big\nA: small\n\nQ: hot\nA:"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{{ '\\nA:' }}"
)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA with a processor and the toy's tokenizer, in a folder."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip import CLIPImageProcessorPil

    tokenizer = ic.open_tokenizer("toy:text")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = testing.tiny("llava").config
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_index = config.image_token_id = len(tokenizer) - 1
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size), tokenizer=tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    paths = [folder / "one.png", folder / "two.png"]
    for path in paths:
        pixels = torch.randint(0, 256, (20, 24, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


@pytest.mark.parametrize(("chat", "count"), [(False, 2), (True, 1)])
def test_scores_are_those_of_the_method_on_what_the_processor_gives(
    count: int, chat: bool, seeing: str, pictures: list[Path], tmp_path: Path
) -> None:
    some = pictures[:count]
    config = AttributeConfig(
        prompt=PROMPT,
        target=" cold",
        model=seeing,
        chat=chat,
        image=some,
        method="attnlrp",
        dtype="float64",
        out=tmp_path,
    )
    attribute(config)
    record = json.loads((tmp_path / "attribution.json").read_text())
    assert record["images"] == [str(path) for path in some] and record["tokens"].count("<image>") == 16 * count
    model = ic.load(seeing, dtype="float64")
    text = "<image>" * count + PROMPT + ("\nA:" if chat else "")
    values = model.processor(text=[text + " cold"], images=[Image.open(path) for path in some], return_tensors="pt")
    last = values["input_ids"].shape[1] - 1
    said = {"prompt": ic.Span(0, last - 2)} if chat else {}  # image and words, without the template's "\nA:"
    whole = model.tokens({**values, "pixel_values": values["pixel_values"].double()})
    whole = whole.name(target=ic.Span(last, last + 1), **said)
    wanted: Any = ic.method("attnlrp")(model, whole, variant="hop0")
    torch.testing.assert_close(torch.tensor(record["scores"]), wanted.scores[0].float(), atol=1e-5, rtol=1e-4)
    page = (tmp_path / "page.html").read_text()
    assert "Over the images" in page and page.count("<image ") >= count
    (tmp_path / "page.html").unlink()
    attribute(config)
    again = (tmp_path / "page.html").read_text()
    assert again.partition("What it cost")[0] == page.partition("What it cost")[0] and "What it cost" in page


def test_the_model_answers_itself(
    seeing: str, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attribute(
        AttributeConfig(
            prompt=f"<image>{PROMPT}",
            model=seeing,
            image=pictures[:1],
            max_new_tokens=2,
            out=tmp_path,
            method="ifr_span",
        )
    )
    assert "the model wrote 2 tokens" in capsys.readouterr().out
    spans = json.loads((tmp_path / "attribution.json").read_text())["spans"]
    assert spans["target"][0][1] - spans["target"][0][0] == 2


def test_bad_input(seeing: str, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"image": [tmp_path / "none.png"]}, ic.TextError, "--image: there is no file"),
        ({"image": [tmp_path]}, ic.TextError, "--image: there is no file"),
        ({"image": [tmp_path / "no.png"]}, ic.TextError, "is no picture that can be read"),
        ({"image": pictures, "prompt": "<image> Q: hot\nA:"}, ic.TextError, "1 places for images .* 2 images"),
        ({"image": pictures[:1], "target": ""}, ic.TextError, "target"),
    ]
    for settings, error, says in calls:
        with pytest.raises(error, match=says):
            attribute(
                AttributeConfig(
                    **{"prompt": PROMPT, "target": " cold", "model": seeing, "out": tmp_path / "out", **settings}
                )
            )
    with pytest.raises(ic.CapabilityError, match="toy:text .* takes no images"):
        attribute(AttributeConfig(prompt=PROMPT, target=" cold", image=pictures[:1], out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ic.TextError, match="put the target into its text"):
        ic.load("toy:text").tokens({"input_ids": torch.tensor([[1, 2]])}, " cold")
