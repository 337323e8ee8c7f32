"""The page of an attribution, and the recipe that writes one: every number that is shown is the method's."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import sampled
from interp_plugins.attribution import page
from interp_plugins.attribution.method import AttributionResult
from interp_plugins.attribution.named import NAMES, named
from interp_recipes.attribute import AttributeConfig, attribute
from typer.testing import CliRunner

import interp_core as ic
from interp_core.cli import app

NASTY = "<script>alert('x')</script>\"&"
PROMPT = "Q: big\nA: small\n\nQ: hot\nA:"


def tips(body: str) -> list[str]:
    return [unescape(tip) for tip in re.findall(r'data-tip="([^"]*)"', body)]


def copied(body: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<pre class='whole'>(.*?)</pre>", body, re.S)]


def test_a_page_shows_what_it_is_given() -> None:
    """Scores on hover in every layer, spans in the tips, text and scores to copy; nothing unescaped."""
    tokens = [NASTY, " a", "\n", "b"]
    layers = page.layers_of([0.5, -0.25, math.nan, 0.0], [[1, 2, 3, 4], [0, 0, 0, 1]], [0.5, 0.004])
    assert list(layers) == [page.WHOLE, "hop 0 (passes on 50 %)", "hop 1 (passes on 0.4 %)"]
    body = page.strip_page(tokens, layers, {"prompt": (0, 2), "sink": (3, 4)}, title=NASTY, scale=NASTY)
    assert "<script" not in body and "alert('x')" not in body and not re.search(r"(src|href)=|url\(|https?:", body)
    shown = tips(body)
    assert len(shown) == 12 and shown[:4] == [f"{NASTY}: 0.5\nprompt", "·a: -0.25\nprompt", "⏎: nan", "b: 0\nsink"]
    assert [tip.partition("\n")[0].rpartition(" ")[2] for tip in shown[4:]] == ["1", "2", "3", "4", "0", "0", "0", "1"]
    text, scores = copied(body)
    assert text == "".join(tokens)
    head, *lines = (line.split("\t") for line in scores.split("\n"))
    assert head == ["pos", "token", *layers] and [json.loads(line[1]) for line in lines] == tokens
    assert [line[2] for line in lines] == ["0.5", "-0.25", "nan", "0"]
    assert body.count("type='radio'") == 3 and body.count(" checked>") == 1


def test_one_layer_has_no_buttons() -> None:
    assert page.layers_of([1.0]) == {"score": [1.0]} and page.layers_of([1.0], []) == {"score": [1.0]}
    assert "<input" not in page.strip_page(["a"], {"score": [1.0]})


def test_top_tokens() -> None:
    scores = [0.25, 0.5, math.nan, 0.5, -0.75, 9.0]
    rows = page.top_tokens(list("abcdef"), scores, {"prompt": (0, 4), "sink": (5, 6)}, k=3, stop=5)
    assert [row["token"] for row in rows] == [
        "e",
        "b",
        "d",
    ]  # by size; ties in the order of the text, none of the target
    assert rows[1] == {"pos": 1, "token": "b", "score": 0.5, "share": 0.5 / 11, "in": "prompt"}
    assert page.top_tokens(["a"], [0.0])[0]["share"] == 0.0
    with pytest.raises(ic.PlanError, match="2 values of 'score' for 1 tokens"):
        page.strip_page(["a"], {"score": [1.0, 2.0]})


# The recipe


def test_attribute_writes_what_the_method_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "target": " cold", "n_hops": 1, "out": tmp_path}
    attribute(AttributeConfig(**given))
    said = capsys.readouterr().out
    model = ic.load("toy:text")
    result = ic.method("ifr")(model, PROMPT, target=" cold", variant="multi_hop_both", n_hops=1)
    data = json.loads((tmp_path / "attribution.json").read_text())
    assert data["tokens"] == list(result.labels[0]) and data["prompt"] == PROMPT and data["model"] == "toy:text"
    assert data["scores"] == result.scores[0].tolist() and data["hops"] == result.hops[0].tolist()
    assert data["spans"]["sink"] == [[10, 11]] and data["spans"]["prompt"] == [[0, 10]]
    assert data["top"][0]["token"] == " hot" and "' hot'" in said.partition("token")[2].splitlines()[1]
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>") and result.html() in text and not re.search(r"(src|href)=|https?:", text)
    assert copied(text)[0] == PROMPT + " cold" and text.count("type='radio'") == 3
    assert AttributionResult.load(tmp_path / "result").labels == result.labels

    attribute(AttributeConfig(**given, top=2))  # the same run goes on: what it has is read
    assert "kept result" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "attribution.json").read_text())["top"]) == 2
    with pytest.raises(ic.PlanError, match="holds another run: n_hops was 1, is 2; give another folder"):
        attribute(AttributeConfig(**given | {"n_hops": 2}))
    assert result._repr_html_().startswith("<style>")


def test_without_a_target_the_model_writes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is said, and explained; its parts are found in it, and what stands before the sink is its reasoning."""
    attribute(AttributeConfig(prompt=PROMPT, sink="young", max_new_tokens=8, out=tmp_path))
    assert "the model wrote 8 tokens, cut off at --max_new_tokens 8:\n  ' cold" in capsys.readouterr().out
    data = json.loads((tmp_path / "attribution.json").read_text())
    written = ic.load("toy:text").generate(PROMPT, max_new_tokens=8)
    assert "".join(data["tokens"]) == PROMPT + written.texts[0]
    (sink,), (thinking,), (target,) = (data["spans"][name] for name in ("sink", "thinking", "target"))
    assert data["tokens"][sink[0] : sink[1]] == [" young"] and target == [10, 18] and thinking == [10, sink[0]]


def test_the_token_that_ends_a_text_is_not_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose next line break ends its text."""
    folder = toy_with(tmp_path, ends="\n\n")
    attribute(AttributeConfig(prompt=PROMPT, model=folder, out=tmp_path / "o"))
    assert "the model wrote 2 tokens, it ended by itself" in capsys.readouterr().out
    spans = json.loads((tmp_path / "o/attribution.json").read_text())["spans"]
    assert spans["target"] == [[10, 12]] and spans["sink"] == [[10, 11]]


def toy_with(tmp_path: Path, chat_template: str | None = None, ends: str = "") -> str:
    """The toy in a folder of its own, with a chat template, or with a token that ends a text."""
    model = ic.load("toy:text", check=False)
    model.tokenizer.chat_template = chat_template
    if ends:
        model.hf.generation_config.eos_token_id = int(model.tokens(ends).ids[0, 0])
    model.hf.save_pretrained(tmp_path / "toy")
    model.tokenizer.save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def test_in_a_chat_the_prompt_is_what_the_user_says(tmp_path: Path) -> None:
    template = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:"
    attribute(
        AttributeConfig(
            prompt="hot",
            target=" cold",
            model=toy_with(tmp_path, chat_template=template),
            chat=True,
            out=tmp_path / "o",
        )
    )
    data = json.loads((tmp_path / "o/attribution.json").read_text())
    assert data["tokens"] == ["Q:", " hot", "\n", "A:", " cold"]
    assert data["spans"]["prompt"] == [[1, 2]] and data["spans"]["target"] == [[4, 5]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "ifr_multi_hop_bth"}, "no attribution method is called 'ifr_multi_hop_bth'. Did you mean 'ifr_mul"),
        ({"method": "random", "n_hops": 1}, "random has no hops; leave --n_hops out"),
        ({"settings": {"chunk_token": 3}}, "ifr has no setting 'chunk_token'. Did you mean 'chunk_tokens'"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "big " * 400}, r"40\d tokens do not fit the model's context of 256"),
        ({"target": ""}, "the target is empty"),
        ({"sink": "warm"}, "sink 'warm' does not occur in the target ' cold'"),
        ({"sink": "1:3"}, "sink is tokens 1 to 3 of a target that has 1"),
        ({"thinking": ""}, "thinking is empty; give text of the target"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chat": True}, "this tokenizer has no chat template"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_said_before_anything_is_written(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ic.InterpError, match=says):
        attribute(AttributeConfig(**{"prompt": PROMPT, "target": " cold", "out": tmp_path / "o"} | given))
    assert not (tmp_path / "o").exists()


def test_ctrl_c_leaves_a_folder_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("interp_plugins.attribution.ifr.IFR.attribute", stopped)
        with pytest.raises(KeyboardInterrupt):
            attribute(AttributeConfig(prompt=PROMPT, target=" cold", out=tmp_path))
    assert ic.runs.manifest(tmp_path)["state"] == "stopped" and not (tmp_path / "page.html").exists()
    attribute(AttributeConfig(prompt=PROMPT, target=" cold", out=tmp_path))
    assert ic.runs.manifest(tmp_path)["state"] == "done" and (tmp_path / "page.html").exists()


@pytest.mark.parametrize("method", sampled([*NAMES, "ifr_routes", "attention_rollout"], ("ifr_routes", "surrogate")))
def test_every_method_goes_by_its_name(method: str, tmp_path: Path) -> None:
    """And a second run over the first tells the same again, but for what it cost."""
    more = {"IG": {"steps": 2}, "surrogate": {"units": "token", "convention": "replace", "ablations": 8}}
    given: dict[str, Any] = {"method": method, "settings": more.get(method), "out": tmp_path}

    def told() -> tuple[str, bytes]:
        attribute(AttributeConfig(prompt=PROMPT, target=" cold", **given))
        before, _, after = (tmp_path / "page.html").read_text().partition("What it cost")
        return before + after.partition("</details>")[2], (tmp_path / "attribution.json").read_bytes()

    first = told()
    (tmp_path / "page.html").unlink()
    assert first == told() and "Settings" in first[0]


@pytest.mark.parametrize(
    ("name", "says"), [("logit_lens", "logit_lens is no attribution"), ("ifr_rout", "'ifr_routes'")]
)
def test_what_is_no_attribution_method(name: str, says: str) -> None:
    with pytest.raises(ic.PlanError, match=says):
        named(name)


def test_the_command(tmp_path: Path) -> None:
    """`interp attribute` is `interp run attribute`."""
    flags = ["--prompt", PROMPT, "--target= cold", "--method", "ifr_multi_hop", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["attribute", *flags])
    assert done.exit_code == 0 and "' hot'" in done.output, done.output
    record = ic.runs.manifest(tmp_path)
    assert record["recipe"] == "attribute" and record["passed"]["method"] == "ifr_multi_hop"
