"""Arguments of the wrong kind: every public function says what it takes, in an error of the tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_model

import interp_core as ic
from interp_core import score
from interp_core import sites as S
from interp_core.loading import open_tokenizer
from interp_core.plan import Plan

WRONG: list[Any] = [
    None, 3, -1, 3.5, float("nan"), True, "", b"x", "nonsense", [], {}, (), set(), object(), {"a": 1}, [None], [3], [[]],
    [""], ("a", 3), range(3), torch.zeros(2), torch.zeros(0), S.z[1], S.z[1].zero(), type, Exception("x"),
]  # fmt: skip
PARROT = "{% for m in messages %}{{ m.content }}{% endfor %}"
HELLO = [{"role": "user", "content": "big"}]


def calls(model: ic.Model, tokens: ic.Tokens, folder: Path) -> dict[str, Callable[[Any], Any]]:
    """What users call, with one argument left open."""
    hf, one, goal = model.hf, torch.tensor([[1]]), score.logprob(5)
    zero, run = [S.z[1].zero()], model.run(tokens, read=S.z[1])
    return {
        "load": lambda x: ic.load(x) if not isinstance(x, str) else None,
        **{
            f"load({name}=)": lambda x, name=name: ic.load(hf, check=False, **{name: x})
            for name in ("tokenizer", "processor", "engine", "engine_options", "dtype", "device", "attn_implementation")
        },
        "load(revision=)": lambda x: ic.load("toy:txt", revision=x),
        "load(device_map=)": lambda x: ic.load("toy:txt", device_map=x),
        "open_tokenizer": lambda x: open_tokenizer(x) if not isinstance(x, str) else None,
        "on": model.on,
        "can": lambda x: model.can(x, "read"),
        "can(use)": lambda x: model.can("z", x),
        "tokens": model.tokens,
        "tokens(target=)": lambda x: model.tokens("big", target=x),
        "tokens(boundary=)": lambda x: model.tokens("big", target=" cold", boundary=x),
        "tokens(bos=)": lambda x: model.tokens("big", bos=x),
        "chat": lambda x: model.chat(x, chat_template=PARROT),
        "chat(target=)": lambda x: model.chat(HELLO, x, chat_template=PARROT),
        "chat(role)": lambda x: model.chat([{"role": x, "content": "big"}], chat_template=PARROT),
        "chat(content)": lambda x: model.chat([{"role": "user", "content": x}], chat_template=PARROT),
        "word": model.word,
        "visual_grid": model.visual_grid,
        "readout": model.readout,
        "project": lambda x: model.project(x, 1),
        "project(layer)": lambda x: model.project(torch.zeros(1, 8, 16), x),
        "Tokens(ids=)": lambda x: ic.Tokens(x, one.bool()),
        "Tokens(mask=)": lambda x: ic.Tokens(one, x),
        "find": tokens.find,
        "find(row=)": lambda x: tokens.find("big", row=x),
        "find(nth=)": lambda x: tokens.find("big", nth=x),
        "name": lambda x: tokens.name(x=x),
        "chars": tokens.chars,
        "row": tokens.row,
        "stack": ic.Tokens.stack,
        "site[]": lambda x: S.z[x],
        "site[,]": lambda x: S.z[1, x],
        "at": S.z[1].at,
        "at(key=)": lambda x: S.pattern[1].at(key=x),
        "knockout": lambda x: S.pattern[1].knockout(x, x),
        "mask": S.router_logits[1].mask,
        "parse": ic.Site.parse,
        **{
            f"edit {op}": lambda x, op=op: model.run(tokens, edits=getattr(S.resid_post[1], op)(x))
            for op in ("set", "add", "scale", "project")
        },
        "apply": lambda x: model.run(tokens, edits=S.resid_post[1].apply(lambda _: x)),
        "run": model.run,
        "run(read=)": lambda x: model.run(tokens, read=x),
        "run(edits=)": lambda x: model.run(tokens, edits=x),
        "run(logits=)": lambda x: model.run(tokens, read=S.z[1], logits=x),
        "run(grad=)": lambda x: model.run(tokens, read=S.z[1], grad=x if not callable(x) else False),
        "run[]": lambda x: run[x],
        "compile": model.compile,
        "score()": goal,
        "projection": lambda x: score.projection(x, torch.zeros(128)),
        "projection(direction)": lambda x: score.projection(S.resid_post[1].at(-1), x),
        "nll": score.nll,
        "collect": lambda x: model.collect(x, S.z[1], out=folder),
        "collect(read=)": lambda x: model.collect(["Q:"], x, out=folder),
        "layers": model.layers,
        "weights": model.weights,
        "generate": lambda x: model.generate(x, max_new_tokens=1),
        "generate(max_new_tokens=)": lambda x: model.generate(tokens, max_new_tokens=x) if x is not True else None,
        "generate(read=)": lambda x: model.generate(tokens, read=x, max_new_tokens=1),
        "sweep": lambda x: model.sweep(x, zero, goal),
        "sweep(variants)": lambda x: model.sweep(tokens, x, goal),
        "sweep(score)": lambda x: model.sweep(tokens, zero, x),
        "sweep(strategy=)": lambda x: model.sweep(tokens, zero, goal, strategy=x),
        "sweep(memory_budget=)": lambda x: model.sweep(tokens, zero, goal, memory_budget=x),
        "sweep(out=)": lambda x: model.sweep(tokens, zero, goal, out=x) if not isinstance(x, str) else None,
        "logprob": lambda x: model.sweep(tokens, zero, score.logprob(x)),
        "method": ic.method,
        "method()": lambda x: ic.method("logit_lens")(x, "big"),
        "method(,)": lambda x: ic.method("logit_lens")(model, x),
        "Plan.of": Plan.of,
        "Plan.from_json": Plan.from_json,
        "Plan.load": Plan.load,
        "Plan.save": lambda x: Plan.of(S.z).save(x) if not isinstance(x, str) else None,
        "Result.load": ic.Result.load,
    }


def test_every_function_takes_it_or_says_why_not(tmp_path: Path) -> None:
    """The law, over every pair: the call goes well, or ends in an error that names what came."""
    model = toy_model()
    raw: list[str] = []
    refused = 0
    for name, call in calls(model, model.tokens("Q: big\nA:"), tmp_path / "all").items():
        for value in WRONG:
            try:
                call(value)
            except ic.InterpError as error:
                refused += 1
                if not str(error).strip():
                    raw.append(f"{name} {value!r:.40}: no message")
            except Exception as error:
                raw.append(f"{name} {value!r:.40}: {type(error).__name__} {error}")
    assert not raw, "\n".join(raw)
    assert refused > 1000


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda m: m.run(3), ic.TextError, "takes text, texts, Tokens, .* or ids, not int 3"),
        (lambda m: m.tokens([3]), ic.TextError, r"a string or a list of strings, not list \[3\]"),
        (lambda m: m.run("Q:", read=3), ic.PlanError, "read= takes sites like .*, not int 3"),
        (
            lambda m: m.run("Q:", edits=S.z[1]),
            ic.PlanError,
            "edits= takes edits like .*, not Site z.*say what to do there",
        ),
        (lambda m: S.z[2.5], ic.SiteError, r"z\[2.5\]: a layer or unit is an integer"),
        (lambda m: S.z[[1.5, 2]], ic.SiteError, "a layer or unit is an integer"),
        (lambda m: m.can("z", "raed"), ic.PlanError, "a site has no use 'raed'. Did you mean 'read'"),
        (
            lambda m: m.sweep("Q:", [S.z[1].zero()], "logprob"),
            ic.PlanError,
            "score= takes a score such as .*, or several, not str",
        ),
        (lambda m: score.logprob(2.5), ic.PlanError, "takes a token id, a word, .* not float 2.5"),
        (lambda m: score.logprob(["a", True]), ic.PlanError, r"takes a token id, .* not list \['a', True\]"),
        (
            lambda m: m.sweep("Q:", [S.z[1].zero()], score.logprob(5000)),
            ic.PlanError,
            "no token id 5000, there are 1469",
        ),
        (lambda m: ic.method("logit_lens")("Q:", m), ic.PlanError, "takes a model of ic.load first, then the text"),
        (lambda m: ic.method(3), ic.PluginError, "a method takes its name, not int 3"),
        (lambda m: m.word(5000), ic.TextError, "token id 5000 does not exist: the model has 1469"),
        (lambda m: m.tokens("Q:").row(1), ic.PositionError, "row takes a row of the batch, 0 to 0, not int 1"),
        (
            lambda m: m.project(torch.zeros(3), 1),
            ic.PlanError,
            r"project takes a tensor of numbers \[… \d+ \d+\], not .* \[3\]",
        ),
    ],
)
def test_what_the_messages_say(toy: ic.Model, call: Callable[[ic.Model], Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        call(toy)


def test_own_functions_raise_their_own_errors(toy: ic.Model) -> None:
    def fails(_: Any) -> Any:
        raise ZeroDivisionError("mine")

    for run in (
        lambda: toy.run("Q:", edits=S.z[1].apply(fails)),
        lambda: toy.run("Q:", read=S.z[1], grad=fails),
    ):
        with pytest.raises(ZeroDivisionError, match="mine"):
            run()
    assert toy.run("Q:", read=S.z[1])[S.z[1]].shape[0] == 1  # no hook stayed


def test_what_only_the_run_can_tell(toy: ic.Model, tmp_path: Path) -> None:
    """Errors that come while the model runs leave it as it was."""
    before = toy.run("Q: big").logits
    for fn in (lambda x: x[..., :3], lambda x: x.double(), lambda x: None):
        with pytest.raises(ic.PlanError, match="the function returned"):
            toy.run("Q: big", edits=S.resid_post[1].apply(fn))
    assert torch.equal(toy.run("Q: big").logits, before)
