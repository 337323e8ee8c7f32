"""What one holds shows itself: in a few lines, in a notebook, whatever has become of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from torch import nn

import interp_core as ic
from interp_core import sites as S
from interp_core.views import HEAD, TAIL, Part, Shown, Table, View

TEXTS = ["Q: big\nA: small\n\nQ: hot\nA: cold\n\nQ: wet\nA:", "Q: big\nA:"]
NASTY = "<script>alert('x')</script>\x1b[31m\u202e\n&\""


def full_run(model: ic.Model, x: Any = None) -> ic.Run:
    """A padded batch with reads, edits, gradients and logits."""
    return model.run(
        TEXTS if x is None else x,
        read=[S.resid_post, S.z[1], S.attn_out[1].at(-1), S.mlp_out[0].at(slice(1, None))],
        edits=[S.z[0, 1].at(-1).zero(), S.mlp_out.scale(0.9)],
        grad=lambda logits: logits[0, -1, 4],
    )


def looks(thing: Any) -> str:
    """Its lines, which are few and narrow, once its HTML is well formed and stands in the page's style."""
    page = thing._repr_html_()
    assert "<div class='ic'>" in page and "<script>alert" not in page
    checker = Nesting()
    checker.feed(page)
    assert not checker.open, checker.open
    text = repr(thing)
    lines = text.splitlines()
    assert text.isascii() or not any(c in text for c in "\x1b\u202e")
    assert len(lines) <= 10 and max(map(len, lines)) <= 100, text
    return text


class Nesting(HTMLParser):
    """Which tags are open; every cell that names others says which."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "meta"):
            self.open.append(tag)
        given = dict(attrs)
        assert tag != "th" or given.get("scope") in ("col", "row"), attrs
        assert "data-tip" not in given or ("tabindex" in given and "aria-label" in given), attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_a_run(engine: str) -> None:
    model = toy_model() if engine == "torch" else toy_model().on(engine)
    run = full_run(model)
    text = looks(run)
    assert text.startswith(f"Run of toy:text (qwen3, engine {engine}): 2 rows of 16 and 4 tokens\n")
    assert "0:Q: 1:·big 2:⏎ 3:A:" in text and "z[0,1]@-1 zero: fired 1×" in text
    assert "resid_post [layer 6, batch 2, pos 16, d_model 128] float32" in text and "run.grad" in text
    word = model.word(int(run.logits.plain[0, -1].argmax())).replace(" ", "·")
    chance = float(run.logits.plain[0, -1].softmax(-1).max())
    assert f"row 0, after 15:A:  {word} {chance:.1%}" in text
    page = run._repr_html_()
    for said in (
        "<caption",
        "attn_out[1]@-1",
        "[batch 2, d_model 128]",
        "mlp_out[0]@1:",
        "[selected 18, d_model 128]",
    ):
        assert said in page, said


def test_shapes_are_those_that_indexing_gives() -> None:
    run = full_run(toy_model())
    page = run._repr_html_()
    for site in run:
        if site.pos is None or site.pos == -1:
            assert [int(part.split()[1]) for part in shape_of(page, site).split(", ")] == list(run[site].shape)
            named = zip(run[site].axes, run[site].shape, strict=True)
            assert ", ".join(f"{axis} {size}" for axis, size in named) == shape_of(page, site)
            assert repr(run[site]).startswith(f"Reading of {site}: [{shape_of(page, site)}] float32\ntensor(")


def shape_of(page: str, site: ic.Site) -> str:
    return page.partition(f"<th scope='row'>{site}</th><td>[")[2].partition("]")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_runs_of_other_dtypes_and_without_a_tokenizer(dtype: torch.dtype, padded: ic.Tokens) -> None:
    run = full_run(tiny_model("llama", dtype), padded)
    text = looks(run)
    assert str(dtype).removeprefix("torch.") in text and "3 rows of 2 to 7 tokens" in text and "0:5 1:17" in text
    best = int(run.logits.plain[0, -1].argmax())
    assert f"row 0, after 4:61  {best} " in text
    assert "padded to 7" in looks(run.tokens)


def test_whatever_has_become_of_a_run() -> None:
    model, text = toy_model(), TEXTS[0]
    assert "logits=False" in looks(model.run(text, read=S.resid_post, logits=False))
    assert "handed to each=" in looks(model.run(text, read=S.pattern, each=lambda layer, values: None))
    assert "after 3:A: " in looks(model.run(text, logits=3))
    assert "logits are kept at [0,-1] alone" in looks(model.run(text, logits=[0, -1]))
    assert "nothing" in looks(model.run(text, logits=False, read=S.z[0])).replace("z[0]", "nothing")
    run = model.run(TEXTS)
    for logits, said in ((run.logits.plain * float("nan"), "not numbers"), (run.logits.plain.to("meta"), "meta")):
        broken = ic.Run.__new__(ic.Run)
        vars(broken).update(vars(run))
        broken._logits = logits
        assert said in looks(broken)
    broken._logits = torch.zeros(1)
    assert "not shown" in looks(broken) and "0:Q:" in looks(broken)
    empty = ic.Run.__new__(ic.Run)
    assert "not shown" in looks(empty)


def test_looking_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = full_run(toy_model()), toy_model().generate(TEXTS, max_new_tokens=3)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a module was called")

    monkeypatch.setattr(nn.Module, "__call__", refuse)
    for thing in (run, run.grad, run.tokens, run.logits, made, made.steps[1], toy_model(), toy_model().sites):
        assert thing._repr_html_() and "not shown" not in repr(thing)


def test_a_saved_run(tmp_path: Path) -> None:
    run = full_run(toy_model())
    run.save(tmp_path)
    text, original = looks(ic.open_run(tmp_path)), looks(run)
    assert text.startswith("SavedRun of toy:text: 2 rows of 16 and 4 tokens") and "next" in text and "#" in text
    assert text.splitlines()[1:7] == original.splitlines()[1:7]


def test_no_folder_of_this_machine_is_shown(tmp_path: Path) -> None:
    model = copy.copy(toy_model())
    model.source = str(tmp_path / "my_model")
    run = model.run(TEXTS[0])
    run.save(tmp_path / "run")
    acts = toy_model().collect(TEXTS, S.z[0], out=tmp_path / "acts")
    for thing in (run, ic.open_run(tmp_path / "run"), model.compile(S.z[0]), acts):
        assert str(tmp_path) not in repr(thing) + thing._repr_html_()
    assert "my_model" in looks(run) and str(tmp_path) not in model._repr_html_() and "my_model" in model._repr_html_()


def test_generations() -> None:
    edits = S.resid_post[3].at(-1).scale(1.5)
    made = toy_model().generate(TEXTS, edits=edits, read=S.z[2], max_new_tokens=4)
    text = looks(made)
    assert text.startswith("Generation of toy:text (qwen3, engine torch): 2 rows") and "4 new" in text
    assert repr(made.texts[0]) in text and "(4 tokens, stopped)" in text and "z[2] at each of 4 steps" in text
    assert "resid_post[3]@-1 scale 1.5: fired" in text
    assert looks(made.steps[1]).startswith("Step, indexed by sites") and "[batch 2, pos 1, head 4" in looks(
        made.steps[1]
    )
    ids = torch.tensor([[5, 17, 33]])
    assert "[" in looks(tiny_model("llama").generate(ids, max_new_tokens=2)).splitlines()[1], "ids without a tokenizer"


def test_tokens() -> None:
    tokens = toy_model().tokens(TEXTS, [" dry", " small"]).name(first=ic.Span(0, 1))
    text = looks(tokens)
    assert text.startswith("Tokens: 2 rows of 17 and 5 tokens, padded to 17\n") and "16:·dry" in text
    assert "prompt 0:16, target 16:17, first 0:1 in row 0" in text
    assert repr(pickle.loads(pickle.dumps(tokens))) == text == repr(copy.deepcopy(tokens))
    assert "<th scope='col'>row 1</th>" in tokens._repr_html_() and "<td>4:5</td>" in tokens._repr_html_()


def test_long_and_many_rows_are_shortened_with_a_count() -> None:
    ids = torch.arange(3, 63)[None].repeat(50, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :20] = mask[2, :40] = False
    tokens = ic.Tokens(ids, mask)
    assert "… and 42 more" in looks(tokens) and "59:62" in looks(tokens)
    page = tokens._repr_html_()
    assert f"{60 - HEAD - TAIL} more" in page and "50 rows, the first 8 are shown" in page
    rows = [row.count("<td>") for row in page.partition("<tbody>")[2].split("</tr>")[:3]]
    assert rows == [HEAD + 1 + TAIL] * 3, "also of rows that are shorter than what is shown"
    run = tiny_model("llama").run(ids, edits=[S.z[0, 1].scale(0.5)] * 60)
    start = time.process_time()
    assert "… and 5" in looks(run)
    assert time.process_time() - start < 0.5


def test_hostile_text_is_written_out() -> None:
    tokens = ic.Tokens(torch.tensor([[5, 6]]), torch.ones(1, 2).bool(), labels=((NASTY, NASTY * 9),))
    text = looks(tokens.name(**{"first": ic.Span(0, 1)}))
    assert "0:<script>alert('x')</scr… 1:" in text
    escaped = ic.Tokens(tokens.ids, tokens.mask, labels=(("\x1b[31m", "\u202ea\n"),))
    assert "0:\\x1b[31m 1:\\u202ea⏎" in looks(escaped)
    assert "&lt;script&gt;" in tokens._repr_html_()


def test_plans_and_methods() -> None:
    plan = toy_model().compile([S.z[2], "resid_post"], [S.z[3, head].zero() for head in range(4)] * 5)
    text = looks(plan)
    assert (
        text.startswith("CompiledPlan for toy:text (qwen3, engine torch)\n  reads  z[2]\n") and "… and 14 more" in text
    )
    assert "reads  nothing" in looks(toy_model().compile())
    for name in ("logit_lens", "activation_patching", "visual"):
        assert looks(ic.method(name)).startswith(f"Method {name}: ")
    assert (
        "top_k=5" in looks(ic.method("logit_lens"))
        and "<th scope='row'>top_k</th>" in ic.method("logit_lens")._repr_html_()
    )


def test_models_and_stored_activations(tmp_path: Path) -> None:
    model = toy_model()
    page = model._repr_html_()
    assert "Model toy:text: qwen3, 6 layers" in page and "<th scope='row'>resid_post</th>" in page
    assert "<th scope='row'>resid_post</th>" in model.sites._repr_html_() and "\n" not in repr(model)
    acts = model.collect(TEXTS, [S.resid_post, S.z[3].at(-1), S.pattern[2]], out=tmp_path / "acts")
    text = looks(acts)
    assert text.startswith("Activations of 2 texts in acts\n") and "resid_post [layer 6, pos, d_model 128]" in text
    assert "z[3]@-1 [head 4, d_head 32]" in text and "pattern[2] [head 4, query, key]" in text


def test_readings_print_as_tensors_too() -> None:
    reading = toy_model().run(TEXTS, read=[S.z])[S.z[2, 1]]
    assert repr(reading) == f"Reading of z[2,1]: [batch 2, pos 16, d_head 32] float32\n{reading.plain!r}"
    assert "Reading of z[2,1]" in reading._repr_html_() and "tensor(" in str(reading)
    assert repr(reading + 1) == repr(reading.plain + 1) and repr(pickle.loads(pickle.dumps(reading))).startswith(
        "tensor"
    )
    assert repr(torch.zeros(2).as_subclass(ic.Reading)) == "Reading of None: [2] float32\ntensor([0., 0.])"


def test_a_view_keeps_to_its_size() -> None:
    parts = [Part(f"part {i}", [f"line {j} " + "x" * 200 for j in range(i)], more=i) for i in range(1, 6)]
    assert len(looks(Fixed(View("t" * 200, parts))).splitlines()) <= 10
    table = View("t", [Part("p", (), Table(["a", "b"], [("1", "y" * 400), ("2", "z" * 200)]))]).html()
    assert f"aria-label='{'y' * 400}'" in table and f"{'y' * 299}…<" in table and f">{'z' * 200}</td>" in table


class Fixed(Shown):
    """Shows a view."""

    def __init__(self, view: View) -> None:
        self.view = view

    def _view(self) -> View:
        return self.view


def test_importing_stays_light() -> None:
    code = "import sys, interp_core.views; print(sorted({'torch', 'matplotlib', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
