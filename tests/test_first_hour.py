"""What goes wrong in the first hour: each mistake ends in a message that names what was asked, what is there and how it
is written right.

A row is a mistake, the class of its error, and the parts of its message. Mistakes are made on the toy with `t.model`,
`t.text`, `t.run` (of the residual stream and z) and `t.vector` (zeros, as wide as the stream).
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tiny_model, toy_model

import interp_core as ic
from interp_core import foreign, score
from interp_core import sites as S
from interp_core.sites import SITES

TEXT = "Q: big\nA: small\n\nQ: hot\nA:"
OTHER = "Q: big\nA: small\n\nQ: dry\nA:"


class Held(NamedTuple):
    """What mistakes are made with."""

    model: ic.Model
    text: str
    run: ic.Run
    vector: torch.Tensor


@pytest.fixture(scope="module")
def held() -> Held:
    model = toy_model()
    return Held(model, TEXT, model.run(TEXT, read=[S.resid_post, S.z]), torch.zeros(128))


def patched(t: Held, **settings: Any) -> Any:
    return ic.method("activation_patching")(t.model, t.text, **settings)


def lens(t: Held) -> Any:
    return ic.method("logit_lens")(t.model, t.text, at=-1)


def swept(t: Held) -> ic.Sweep:
    return t.model.sweep(t.text, ZERO, score.logprob(" cold"))


def training(t: Held) -> None:
    t.model.hf.train()
    try:
        ic.load(t.model.hf, tokenizer=t.model.tokenizer)
    finally:
        t.model.hf.eval()


def in_place(x: torch.Tensor) -> None:
    x[:] = 0


ZERO = [S.z[1].zero()]
ROWS: list[tuple[str, Callable[[Held], Any], type[Exception], list[str]]] = [
    # what there is in a model
    ("1 a site's name", lambda t: S.resid, ic.SiteError, ["'resid'", "Did you mean 'resid_pre' or"]),
    ("2 a hook's name", lambda t: S.hook_z, ic.SiteError, ["'hook_z'", "here it is S.z"]),
    ("2 a hook's path", lambda t: t.model.run(t.text, read="blocks.2.hook_resid_post"), ic.SiteError,
     ["'blocks.2.hook_resid_post'", "here it is S.resid_post[2]"]),
    ("2 a hook's path of a run", lambda t: t.run["blocks.2.attn.hook_z"], ic.SiteError, ["here it is S.z[2]"]),
    ("3 a layer", lambda t: t.model.run(t.text, read=S.resid_post[12]), ic.SiteError,
     ["resid_post[12]", "no layer 12", "there are 6, 0 to 5"]),
    ("4 a head", lambda t: t.model.run(t.text, read=S.z[2, 7]), ic.SiteError,
     ["z[2,7]", "no head 7", "there are 4, 0 to 3"]),
    # values of edits
    ("6 axes swapped", lambda t: t.model.run(t.text, edits=S.z[2].set(t.run[S.z[2]].plain.mT)), ic.PlanError,
     ["[1, 10, 32, 4]", "[batch 1, pos 10, head 4, d_head 32]", "write value.transpose(2, 3)"]),
    ("7 a sequence for a position", lambda t: t.model.run(t.text, edits=S.resid_post[2].at(-1).set(
        t.run[S.resid_post[2]])), ic.PlanError, ["[1, 10, 128]", "[batch 1, d_model 128]", "run[site].at(-1)"]),
    ("8 .at forgotten", lambda t: t.model.run(t.text, edits=S.z[2, 2].set(t.run[S.z[2, 2]].at(-1))), ic.PlanError,
     ["[1, 32]", "[batch 1, pos 10, d_head 32]", "write z[2,2].at(-1)"]),
    ("8 .at forgotten in a sweep", lambda t: t.model.sweep(t.text, [S.z[2, 2].add(t.run[S.z[2, 2]].at(-1))],
     score.logprob(5)), ic.PlanError, ["[1, 32]", "write z[2,2].at(-1)"]),
    ("8 .at forgotten, two rows", lambda t: t.model.run([t.text] * 2, edits=S.z[2, 2].add(torch.ones(2, 32))),
     ic.PlanError, ["[2, 32]", "[batch 2, pos 10, d_head 32]", "write z[2,2].at(-1)"]),
    ("8 .at forgotten, as many rows as positions", lambda t: t.model.run(["Q: big", "Q: hot"], edits=S.z[2, 2].set(
        torch.ones(2, 32))), ic.PlanError,
     ["[2, 32]", "may be batch or pos", "write z[2,2].at(-1)", "value.expand(2, -1, -1)"]),
    ("8 .at forgotten, as many rows as positions in a sweep", lambda t: t.model.sweep(["Q: big", "Q: hot"],
     [S.z[2, 2].set(torch.ones(2, 32))], score.logprob(5)), ic.PlanError, ["may be batch or pos"]),
    ("9 a dtype", lambda t: t.model.run(t.text, edits=S.resid_post[2].add(t.vector.half())), ic.PlanError,
     ["torch.float16", "torch.float32", "write value.to(torch.float32)"]),
    ("10 an array", lambda t: S.resid_post[2].add(np.zeros(128)), ic.PlanError,
     ["add takes a torch tensor", "not ndarray", "torch.as_tensor"]),
    ("43 no numbers", lambda t: t.model.run(t.text, edits=S.resid_post[1].at(-1).add(t.vector * float("nan"))),
     ic.EffectError, ["resid_post[1]@-1 add", "128 of 128 numbers", "NaN", "allow_noop=True"]),
    ("43 no factor", lambda t: S.resid_post[1].scale(float("nan")), ic.PlanError, ["a finite number", "nan"]),
    # arguments that lie in the wrong place
    ("11 an edit as reads", lambda t: t.model.run(t.text, S.resid_post[2].zero()), ic.PlanError,
     ["read= takes sites", "not Edit resid_post[2] zero", "goes into edits="]),
    ("12 an edit among reads", lambda t: t.model.run(t.text, read=[S.resid_post[2].zero()]),
     ic.PlanError, ["read= takes sites", "not Edit", "goes into edits="]),
    ("13 a site as edits", lambda t: t.model.run(t.text, edits=S.resid_post[2]), ic.PlanError,
     ["edits= takes edits", "not Site resid_post[2]", ".set(value), .add(value), .zero()"]),
    ("14 a position", lambda t: t.model.run(t.text, read=S.resid_post[2].at(99)), ic.PositionError,
     ["no position 99 in row 0", "10 tokens, 0 to 9"]),
    ("15 a position's name", lambda t: t.model.run(t.text, read=S.resid_post[2].at("subject")), ic.PositionError,
     ["'subject'", "There are: 'last', 'all', 'prompt'", "tokens.name(subject=…)"]),
    ("16 a router", lambda t: t.model.run(t.text, read=S.router_logits), ic.CapabilityError,
     ["router_logits", "qwen3 has no mixture-of-experts router"]),
    ("17 an unread site", lambda t: t.run[S.mlp_out[2]], ic.ReadError, ["mlp_out[2]", "It holds: resid_post, z"]),
    ("18 a run's index", lambda t: t.run["resid_post", 3], ic.ReadError,
     ["sites like S.resid_post[3]", "tuple"]),
    # scores
    ("19 an id", lambda t: score.logprob(99999)(t.run), ic.PlanError, ["no token id 99999", "1469, 0 to 1468"]),
    ("19 an id in a sweep", lambda t: t.model.sweep(t.text, ZERO, score.logprob(99999)), ic.PlanError,
     ["no token id 99999", "1469, 0 to 1468"]),
    ("20 a word of several tokens", lambda t: score.logit_diff(" John", " cold")(t.run), ic.PlanError,
     ["score logit_diff", "' John' is 5 tokens (' ', 'J', 'o', 'h', 'n')", "give its first"]),
    ("20 words of too many rows", lambda t: score.logprob([" hot", " cold"])(t.run), ic.PlanError,
     ["2 targets for 1 rows", "one per row, or one for all"]),
    ("21 a score's name", lambda t: t.model.sweep(t.text, ZERO, "rank"), ic.PlanError,
     ["score= takes a score", "not str 'rank'", "ic.score.rank(' Paris')"]),
    ("22 a function for a score", lambda t: t.model.sweep(t.text, ZERO, len), ic.PlanError,
     ["score= takes a score", "not builtin", "ic.score.Score('mine', fn)"]),
    ("22 a score of no run", lambda t: score.logprob(" cold")(t.text), ic.PlanError,
     ["takes a run", "not str", "score(model.run(text))"]),
    ("22 a direction of another width", lambda t: score.projection(S.resid_post[1].at(-1), torch.ones(3))(t.run),
     ic.PlanError, ["3 numbers", "[1, 128]"]),
    ("23 one edit", lambda t: t.model.sweep(t.text, S.z[1].zero(), score.logprob(5)), ic.PlanError,
     ["a list of variants", "not Edit z[1] zero", "[edit]"]),
    ("24 text and variants swapped", lambda t: t.model.sweep(ZERO, t.text, score.logprob(5)), ic.PlanError,
     ["a list of variants", "not str 'Q: big", "model.sweep(text, variants, score)"]),
    ("24 score and variants swapped", lambda t: t.model.sweep(t.text, score.logprob(5), ZERO), ic.PlanError,
     ["a list of variants", "not Score", "model.sweep(text, variants, score)"]),
    # methods
    ("25 an answer of several tokens", lambda t: patched(t, corrupted=OTHER, answer=" John", other=" small"),
     ic.PlanError, ["the answer ' John' is 5 tokens", "give its first"]),
    ("26 another length", lambda t: patched(t, corrupted="Q: hot\nA:"), ic.PlanError,
     ["[10] tokens", "[4]", "the same in both"]),
    ("27 the same prompt", lambda t: patched(t, corrupted=t.text), ic.PlanError,
     ["' cold' for both prompts", "give answer=[…] and other=[…], or prompts that differ"]),
    ("28 a method", lambda t: ic.method("logitlens"), ic.PluginError, ["'logitlens'", "Did you mean 'logit_lens'"]),
    ("28 a setting", lambda t: ic.method("logit_lens")(t.model, t.text, topk=3), ic.PlanError,
     ["no setting 'topk'", "Did you mean 'top_k'"]),
    ("28 a setting's kind", lambda t: ic.method("logit_lens")(t.model, t.text, top_k="many"), ic.PlanError,
     ["setting top_k", "integer", "'many'"]),
    ("29 a model's name", lambda t: ic.method("logit_lens")("toy:text", t.text), ic.PlanError,
     ["a model of ic.load first, then the text", "not str 'toy:text'"]),
    ("29 model and text swapped", lambda t: ic.method("logit_lens")(t.text, t.model), ic.PlanError,
     ["a model of ic.load first, then the text", "not str"]),
    ("45 a second prompt", lambda t: ic.method("activation_patching")(t.model, t.text, OTHER), ic.PlanError,
     ["method activation_patching takes a model and text, then settings by name", "not str 'Q: big",
      "Write corrupted=…"]),
    ("45 a prompt's target", lambda t: ic.method("ifr")(t.model, t.text, " cold"), ic.PlanError,
     ["not str ' cold'", "Write target=… or"]),
    ("45 several prompts", lambda t: ic.method("logit_lens")(t.model, t.text, OTHER), ic.PlanError,
     ["There are: 'at', 'targets', 'top_k'", "several prompts are a list: [text, …]"]),
    # load
    ("30 training mode", training, ic.LoadError, ["in training mode", "call model.eval() before load"]),
    ("31 no tokenizer", lambda t: tiny_model("qwen3").run(t.text), ic.TextError,
     ["without a tokenizer", "pass ids, or load(..., tokenizer=…)", "command line, put a tokenizer.json into"]),
    ("32 a foreign tokenizer", lambda t: ic.load(tiny_model("qwen3").hf, tokenizer=t.model.tokenizer), ic.TextError,
     ["the tokenizer has 1469 tokens, the model 96", "that the model was trained with"]),
    ("33 a tokenizer's name", lambda t: ic.load("toy:text", tokenizer="toy:text"), ic.LoadError,
     ["a tokenizer of transformers", "not str 'toy:text'", "ic.open_tokenizer(name)"]),
    ("34 attention of a package", lambda t: ic.load("toy:text", attn_implementation="flash_attention_2"), ic.LoadError,
     ["attn_implementation='flash_attention_2' needs FlashAttention 2, which", "Leave it out, or give 'sdpa' or 'eager'"]),
    ("34 a kernel of the hub", lambda t: ic.load("toy:text", attn_implementation="a/b"), ic.LoadError,
     ["attn_implementation='a/b' needs kernels", "Leave it out, or give 'sdpa' or 'eager'"]),
    ("34 no attention at all", lambda t: ic.load("toy:text", attn_implementation="spda"), ic.LoadError,
     ["no attn_implementation='spda'", "Did you mean 'sdpa'"]),
    ("35 a dtype's name", lambda t: ic.load("toy:text", dtype="fp16"), ic.LoadError,
     ["'bfloat16', 'float16', 'float32'", "not str 'fp16'"]),
    ("35 a device", lambda t: ic.load("toy:text", device="cuda:99"), ic.LoadError,
     ["no device 'cuda:99'", "Leave device out"]),
    # what a run shows, or would
    ("36 nothing changed", lambda t: t.model.run(t.text, edits=S.resid_post[3].scale(1)), ic.EffectError,
     ["resid_post[3] scale 1 changed nothing", "pass allow_noop=True"]),
    ("37 all keys", lambda t: t.model.run(t.text, edits=S.pattern[1].knockout(query=-1, key="all")), ic.PlanError,
     ["position 9 of row 0", "nothing left to attend to", "or keep a key"]),
    ("38 no such word", lambda t: t.model.tokens(t.text).find("smell"), ic.PositionError,
     ["'smell' occurs not at all in row 0", "Did you mean 'small'"]),
    ("39 a space too early", lambda t: t.model.tokens("Q: big\nA: ", "small"), ic.TextError,
     ["tokens of the prompt change", "'Q: big\\nA: |small'", "Move spaces"]),
    ("40 ids in a list", lambda t: t.model.run([1, 2, 3]), ic.TextError,
     ["ids as a tensor [batch pos]", "not list [1, 2, 3]", "write torch.tensor(ids)"]),
    ("40 ids of several lengths", lambda t: t.model.run([[1, 2, 3], [1, 2]]), ic.TextError,
     ["ids as a tensor", "not list [[1, 2, 3], [1, 2]]", "ic.Tokens.stack([model.tokens({'input_ids': "]),
    ("41 the gradient of a vector", lambda t: t.model.run(t.text, read=S.z[1], grad=lambda logits: logits[0, -1]),
     ic.ReadError, ["returns one number", "[1469]"]),
    ("41 the gradient of nothing", lambda t: t.model.run(t.text, grad=lambda logits: logits[0, -1, 5]), ic.PlanError,
     ["the sites that are read, and none is", "read=S.resid_post"]),
    ("42 a hook's function", lambda t: S.z[1].apply(lambda x, hook: x), ic.PlanError,
     ["z[1]", "a function of the value x", "(x, hook)", "write lambda x: …"]),
    ("42 a function that returns nothing", lambda t: t.model.run(t.text, edits=S.z[1].apply(in_place)),
     ic.PlanError, ["returned NoneType", "[1, 10, 4, 32]", "it returns the new value"]),
    ("B7 a run in a pickle", lambda t: pickle.dumps(t.run), ic.PlanError, ["run.save(folder)", "ic.open_run(folder)"]),
    # other libraries' names, all of which are in interp_core/foreign.py
    ("44 a cached run", lambda t: t.model.run_with_cache(t.text), AttributeError, ["'run_with_cache'", "read=["]),
    ("44 ids", lambda t: t.model.to_tokens(t.text), AttributeError, ["'to_tokens'", "model.tokens(text)"]),
    ("44 sizes", lambda t: t.model.cfg.n_layers, AttributeError, ["'cfg'", "model.n_layers", "model.hf.config"]),
    ("44 a trace", lambda t: t.model.trace(t.text), AttributeError, ["'trace'", "model.run(text", "engine='nnsight'"]),
    ("44 a device", lambda t: t.model.to("cpu"), AttributeError, ["'to'", "ic.load(…, device="]),
    ("44 an unembedding", lambda t: t.model.W_U, AttributeError, ["'W_U'", "model.weights(S.logits)"]),
    ("44 layers' outputs", lambda t: t.model.layers_output[2], AttributeError, ["'layers_output'", "read=S.resid_post"]),
    ("44 a head", lambda t: t.model.lm_head, AttributeError, ["'lm_head'", "model.unembed(normed)"]),
    ("44 a typing error", lambda t: t.model.genrate(t.text), AttributeError, ["'genrate'", "Did you mean 'generate'"]),
    ("44 a call", lambda t: t.model(t.text), ic.PlanError, ["not called", "model.run(text).logits"]),
    ("44 a cache", lambda t: t.run.cache, AttributeError, ["'cache'", "run[S.z[3]]", "run.to_cache()"]),
    ("44 a site of a run", lambda t: t.run.resid_post, AttributeError, ["'resid_post'", "run[S.resid_post]"]),
    ("44 a class", lambda t: ic.HookedTransformer, AttributeError, ["'HookedTransformer'", "ic.load('gpt2')"]),
    ("44 a hook that is no site", lambda t: S.hook_pre, ic.SiteError, ["'hook_pre'", "S.mlp_act"]),
    ("45 a lens' probabilities", lambda t: lens(t).probs, AttributeError,
     ["a LogitLensResult has no 'probs'", "write result.target_logprob.exp()"]),
    ("45 a lens' logits", lambda t: lens(t).logits, AttributeError, ["'logits'", "result.target_logprob"]),
    ("45 a field, mistyped", lambda t: lens(t).entrpy, AttributeError, ["'entrpy'", "Did you mean 'entropy'"]),
    ("45 a field that is nowhere", lambda t: lens(t).zzz, AttributeError,
     ["'zzz'", "There are: 'top_ids', 'top_logprob', 'target_ids'"]),
    ("45 scores of a patching study", lambda t: patched(t, corrupted=OTHER).scores, AttributeError,
     ["'scores'", "result.effect"]),
    ("45 a sweep's table", lambda t: swept(t).effects_df, AttributeError,
     ["a Sweep has no 'effects_df'", "result.to_dataframe()"]),
    ("45 a sweep's picture", lambda t: swept(t).savefig("x.png"), AttributeError, ["'savefig'", "result.png(path)"]),
    ("45 a name of a difference", lambda t: (lens(t) - lens(t)).entrpy, AttributeError,
     ["'entrpy'", "Did you mean 'entropy'"]),
    ("45 a method of a difference", lambda t: (lens(t) - lens(t)).tops(), AttributeError,
     ["tops is a method of both sides", "difference.sides[0]"]),
    ("44 a weight for a site", lambda t: t.model.weights("W_O"), ic.SiteError, ["'W_O'", "model.weights(S.z)"]),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "kind", "parts"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_message_has_the_way_out(
    held: Held, mistake: Callable[[Held], Any], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        mistake(held)
    said = str(caught.value)
    assert not [part for part in parts if part not in said], said
    assert isinstance(caught.value, ic.InterpError) or kind is AttributeError


def test_what_is_no_mistake(held: Held) -> None:
    """Row 5: slices end where layers end, as in numpy. B1: a whole head takes a whole head. Words, ids and lists."""
    assert held.model.run(TEXT, read=S.resid_post[2:99])[S.resid_post[2:99]].shape[0] == 4
    other = held.model.run(OTHER, read=S.z[2, 2])
    assert held.model.run(TEXT, edits=S.z[2, 2].set(other[S.z[2, 2]])).receipts[0].fired == 1
    cold, small = (int(held.model.tokens(word, bos=False).ids) for word in (" cold", " small"))
    wanted = held.run.logits[0, -1, cold] - held.run.logits[0, -1, small]
    for first, second in ((" cold", " small"), ([cold], " small"), (torch.tensor([cold]), [" small"]), (cold, small)):
        assert torch.equal(score.logit_diff(first, second)(held.run), wanted[None])
    nan = S.resid_post[1].at(-1).add(held.vector * float("nan"))
    assert held.model.run(TEXT, edits=nan, allow_noop=True).logits[0, -1].isnan().all()


def test_every_name_abroad_has_one_here(held: Held) -> None:
    """The table names sites that there are, and nothing that a model, a run or the package has by itself."""
    assert set(foreign.SITES.values()) <= set(SITES)
    assert not {name for name in foreign.SITES if name in SITES} and not set(foreign.ABSENT) & set(SITES)
    things: list[tuple[Any, dict[str, str]]] = [
        (held.model, foreign.MODEL), (held.run, foreign.RUN), (ic, foreign.PACKAGE), (S.z, foreign.SITE),
        (held.model.generate(TEXT, max_new_tokens=1), foreign.GENERATION)]  # fmt: skip
    for thing, names in things:
        for name in names:
            assert name == "__call__" or not hasattr(thing, name), (thing, name)
            if name != "__call__":
                with pytest.raises(AttributeError, match=f"no '{name}', write "):
                    getattr(thing, name)
    for name in foreign.SITES:
        assert ic.Site.parse(foreign.ours(name, SITES).removeprefix("S.")).name in SITES


def test_every_way_of_a_result_is_one_of_some_result(held: Held) -> None:
    """No row of the table is stale: each way begins with a name that some class of result has."""
    for name in ic.registry("methods").names():
        ic.registry("methods").get(name)
    classes, names = [ic.Result], set[str]()
    while classes:
        kind = classes.pop()
        classes += kind.__subclasses__()
        names |= {*dir(kind), *(field.name for field in fields(kind))}
    stale = {way for ways in foreign.RESULT.values() for way in ways if re.split(r"\W", way)[0] not in names}
    assert not stale and foreign.RESULT


def test_names_that_python_and_notebooks_ask_for_are_plainly_not_there(held: Held) -> None:
    """Copies, pickles and IPython's probes see what they see of any object; a difference has the names of its sides."""
    one = lens(held)
    for thing in (one, swept(held), one - one):
        assert copy.deepcopy(thing) == copy.copy(thing) == pickle.loads(pickle.dumps(thing)) == thing
        for probe in (
            "_repr_mimebundle_",
            "_ipython_display_",
            "_ipython_canary_method_should_not_exist_",
            "__array__",
        ):
            with pytest.raises(AttributeError) as caught:
                getattr(thing, probe)
            assert str(caught.value) == f"{type(thing).__name__!r} object has no attribute {probe!r}"
        assert not [name for name in dir(thing) if name.startswith("_")]
    assert {"kl", "entropy", "sides", "table"} <= set(dir(one - one))


def test_what_the_table_says_is_true(held: Held) -> None:
    """The expressions that answer for weights and sizes have the shapes that the table says."""
    model = held.model
    sizes = {"layer": model.n_layers, "head": model.n_heads, "d_head": model.d_head, "d_model": model.d_model,
             "d_mlp": model.d_mlp, "d_vocab": model.d_vocab}  # fmt: skip
    checked = 0
    for name in ("W_E", "W_U", "W_Q", "W_O", "W_out"):
        expression, axes = foreign.MODEL[name].split(", [")
        shape = eval(expression, {"model": model, "S": S}).shape
        assert list(shape) == [sizes[axis] for axis in axes.partition("]")[0].split()], name
        checked += 1
    assert checked == 5


def test_tab_completion_shows_public_names() -> None:
    assert dir(S) == sorted({*S.__all__, *SITES}) and dir(score) == score.__all__
    listed = dir(toy_model())
    assert {"run", "sweep", "generate", "tokens", "sites", "n_layers", "hf"} <= set(listed)
    assert not [name for name in listed if name.startswith("_") or name in ("atlas", "engine", "turn", "renew")]


def test_an_unknown_site_goes_to_other_processes_as_the_error_that_it_is_shown_as() -> None:
    with pytest.raises(ic.SiteError) as caught:
        _ = S.reisd_post
    assert type(caught.value).__qualname__ == "SiteError" and isinstance(caught.value, AttributeError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ic.SiteError and str(again) == str(caught.value)


def test_a_property_that_fails_says_its_own_error(held: Held) -> None:
    class Failing(ic.Model):
        @property
        def broken(self) -> int:
            """Reaches for something that there is not."""
            return self.hf.nowhere.at_all

    model = object.__new__(Failing)
    model.hf = held.model.hf
    with pytest.raises(AttributeError, match="nowhere"):
        _ = model.broken
    assert not hasattr(model, "_missing")


def test_collected_from_the_wrong_kinds(held: Held, tmp_path: Path) -> None:
    for texts, read, says in (
        ("abc", S.z[1], "takes texts, one by one, not str"),
        ([TEXT], S.z[1].zero(), "an edit goes into edits="),
        ([3], S.z[1], "text 0: .* not int 3"),
    ):
        with pytest.raises(ic.InterpError, match=says):
            held.model.collect(texts, read, out=tmp_path / "out")
