"""One attribution: which tokens of a prompt an answer comes from, as a table, as JSON and as a page.

    interp attribute --model toy:text --prompt 'Q: big
    A: small

    Q: hot
    A:' --target ' cold' --method ifr_multi_hop_both --n_hops 1 --out out/hot

Methods go by the names of the published evaluation (`interp_plugins.attribution.named`) or by their own. Without a
target the model writes one, greedily, and that is explained. In the folder: `page.html` (the text coloured, hops to
switch between, text and scores to copy), `attribution.json` (all of it as plain data) and `result/` (the `Result`).
Python and notebooks have the same from the method itself: `ic.method("ifr")(model, prompt, target=…)` is a result that
shows itself, and `result.to_html(path)` writes it.
"""

from __future__ import annotations

import itertools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from interp_plugins.attribution.layout import layout_of
from interp_plugins.attribution.method import AttributionResult
from interp_plugins.attribution.named import named

import interp_core as ic
from interp_core import runs, vision

from .configs import DeviceConfig

Part = str | tuple[int, int]


class AttributeConfig(DeviceConfig):
    """What is asked, and which attribution explains the answer.

    Attributes:
        prompt: what the model is asked.
        target: the answer that is explained, with its leading space (default: the model's own, written greedily).
        model: toy:text, a folder, or a hub id.
        chat: put the prompt into the tokenizer's chat template, as the user's message.
        image: pictures that a vision-language model sees with the prompt (several, one after the other).
        method: by its name or that of the published evaluation (ifr_all_positions, attnlrp, ifr_multi_hop_both, …).
        n_hops: hops back through the reasoning (default: the method's).
        sink: the part of the target that is explained: text of it (the last such place), or tokens of it as START:STOP
            without the last (default: all of it, without the token that ends a text).
        thinking: its reasoning, in the same way (default: what stands before the sink, if anything does).
        profile: sound, or reference to do as the published code does where that differs.
        settings: further settings of the method, as JSON.
        max_new_tokens: how much the model may write where there is no target.
        top: how many tokens the table has.
        out: folder of the run (default: results/{model}/{dataset}/{timestamp}-attribute-{hash}).
    """

    prompt: str
    target: str | None = None
    model: str = "toy:text"
    chat: bool = False
    image: list[Path] | None = None
    method: str = "ifr_multi_hop_both"
    n_hops: int | None = None
    sink: Part | None = None
    thinking: Part | None = None
    profile: Literal["sound", "reference"] = "sound"
    settings: dict[str, Any] | None = None
    max_new_tokens: int = 64
    top: int = 10
    out: Path | None = None

    def check(self) -> None:
        """Refuse what asks for nothing.

        Raises:
            PlanError, TextError: numbers below 1, an empty prompt.
        """
        if self.max_new_tokens < 1 or self.top < 1:
            raise ic.PlanError(f"max_new_tokens is {self.max_new_tokens}, top {self.top}: give at least 1 of each")
        if not self.prompt.strip():
            raise ic.TextError("the prompt is empty; give --prompt what the model is asked")

    def chosen_method(self) -> tuple[ic.Method, dict[str, Any]]:
        """The method and its settings, before any model is loaded.

        Raises:
            PlanError: no such method, or a setting that it does not have.
        """
        name, settings = named(self.method)
        method = ic.method(name)
        if self.n_hops is not None and "n_hops" not in method.Config.model_fields:
            raise ic.PlanError(f"{self.method} has no hops; leave --n_hops out, or take ifr_multi_hop_both")
        hops = {} if self.n_hops is None else {"n_hops": self.n_hops}
        settings = {**settings, "profile": self.profile, **hops, **(self.settings or {})}
        method.configured(settings)
        return method, settings


def attribute(config: AttributeConfig) -> None:
    """Attribute an answer to the tokens before it; prints the top tokens, and writes JSON and a page.

    Raises:
        TextError: an empty prompt, one longer than the context, a target that changes its tokens, an image that cannot
            be read or has no place in the prompt.
        CapabilityError: images, and a model that takes none.
        PlanError, PositionError: no such method, setting or part of the target; another run's folder.
    """
    config.check()
    method, settings = config.chosen_method()
    images = [vision.open_picture(path, "--image") for path in config.image or ()]
    model = ic.load(config.model, dtype=config.dtype, device=config.device)
    tokens = _tokens(model, config.prompt, images, config.target, config.chat)
    identity = config.model_dump(exclude={"out", "top"})  # how many rows are shown changes no number
    run = runs.open(config.out, identity, recipe="attribute", model=model, dataset="texts")
    run.claim(["page.html", "attribution.json"])
    print(model, flush=True)
    whole = tokens if config.target is not None else _answered(model, tokens, config.max_new_tokens)
    whole = _with_parts(model, whole, _part("sink", config.sink), _part("thinking", config.thinking))
    with run:
        if run.kept("result"):
            result = typing.get_type_hints(method.run)["return"].load(run.path / "result")
        else:
            result = method(model, whole, **settings)
            run.result("result", result)
        paths = [str(path) for path in config.image or ()]
        about = {"model": model.source, "prompt": config.prompt, "chat": config.chat, "images": paths}
        _tell(run, result, about, config.top)
        run.page("page.html", _answer(result, _shown(whole, images)), model)
        print(f"\n{run.path / 'attribution.json'}\n{run.path / 'page.html'}")


def _tokens(model: ic.Model, prompt: str, images: Sequence[Any], target: str | None, chat: bool) -> ic.Tokens:
    """The prompt with its images, which stand first where the prompt does not place them."""
    if not chat:
        return model.tokens(prompt, target, images=images or None)
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return model.chat([{"role": "user", "content": parts if images else prompt}], target)


def _shown(tokens: ic.Tokens, images: Sequence[Any]) -> Sequence[Any]:
    """The pictures as the model saw them, resized and cut, where the processor gives it one per image; else the files',
    which it has then resized alone."""
    pixels = tokens.inputs.get("pixel_values")
    return list(pixels) if pixels is not None and pixels.ndim == 4 and len(pixels) == len(images) else images


def _answered(model: ic.Model, tokens: ic.Tokens, most: int) -> ic.Tokens:
    """The prompt and what the model writes after it, as the span `target`; its text can be searched like a prompt's."""
    written = model.generate(tokens, max_new_tokens=most)
    new, ended = written.tokens, written.ended[0]
    span = new.spans["generated"][0][0]
    how = "it ended by itself" if ended else f"cut off at --max_new_tokens {most}"
    print(f"no --target: the model wrote {len(span)} tokens, {how}:\n  {written.texts[0]!r}", flush=True)
    spans = {name: rows for name, rows in new.spans.items() if name != "generated"} | {"target": ((span,),)}
    if ended and len(span) > 1:
        spans["sink"] = ((ic.Span(span.start, span.stop - 1),),)
    labels = new.labels[0]
    ends = [0, *itertools.accumulate(map(len, labels))]
    offsets = (tuple(itertools.pairwise(ends)),)
    return replace(new, spans=spans, texts=("".join(labels),), offsets=offsets)


def _part(name: str, value: Part | None) -> Part | None:
    """START:STOP as a range; text as it is."""
    if isinstance(value, str) and (ends := re.fullmatch(r"(\d+):(\d+)", value)):
        return int(ends[1]), int(ends[2])
    if value == "":
        raise ic.PositionError(f"{name} is empty; give text of the target, START:STOP, or leave it out")
    return value


def _with_parts(model: ic.Model, tokens: ic.Tokens, sink: Part | None, thinking: Part | None) -> ic.Tokens:
    """The tokens with the spans of sink and thinking; what stands before a sink in the target is its reasoning.

    Raises:
        PositionError: a part that the target does not have.
    """
    layout = layout_of(model, tokens, sink=sink, thinking=thinking)
    spans = {"sink": layout.sink}
    if thinking is not None:
        spans["thinking"] = layout.thinking
    elif sink is not None and layout.target.start < layout.sink.start:
        spans["thinking"] = range(layout.target.start, layout.sink.start)
    rows = {name: ((ic.Span(part.start, part.stop),),) for name, part in spans.items()}
    return replace(tokens, spans={**tokens.spans, **rows})


# What comes out


def _tell(run: runs.RunFolder, result: AttributionResult, about: Mapping[str, Any], top: int) -> None:
    """Print the top tokens, and write JSON."""
    _show(result, top)
    run.put({"attribution.json": runs.json_text({**about, **_record(result, top)})})


def _show(result: AttributionResult, top: int) -> None:
    """The top tokens as a table."""
    spans = {name: f"{start}:{stop}" for name, ((start, stop), *_) in result.spans[0].items() if name != "explained"}
    print(f"\n{result.method}\n  " + "  ".join(f"{name} {place}" for name, place in spans.items()))
    print(f"  {'pos':>5}  {'score':>10}  {'share':>6}  token")
    for row in result.top(0, top):
        print(f"  {row['pos']:>5}  {row['score']:>10.4g}  {row['share']:>6.1%}  {row['token']!r}")
    print(
        f"  of the mass {float(result.first_share[0]):.1%} lies on the first token, "
        f"{float(result.sink_share[0]):.1%} on attention sinks"
    )


def _record(result: AttributionResult, top: int) -> dict[str, Any]:
    """The result as plain data."""
    hops = None if result.hops is None else result.hops[0].tolist()
    return {
        "method": result.method,
        "tokens": list(result.labels[0]),
        "spans": result.spans[0],
        "scores": result.scores[0].tolist(),
        "hops": hops,
        "mass": None if result.mass is None else result.mass[0].tolist(),
        "first_share": float(result.first_share[0]),
        "sink_share": float(result.sink_share[0]),
        "notes": json.loads(json.dumps(result.notes[0], default=str)),
        "top": result.top(0, top),
    }


def _answer(result: AttributionResult, images: Sequence[Any]) -> ic.report.Answer:
    """The result's own page, with its scores over the images where each is one picture to the model."""
    if not images or {place[2] for place in result.visual[0]} != {0}:
        return result.page()
    over = "".join(overlay.html() for overlay in result.over_images(images).values())
    return result.page()._replace(
        sections=[ic.report.Section("Over the images", "Boxes are visual tokens, coloured by their scores.", over)]
    )
