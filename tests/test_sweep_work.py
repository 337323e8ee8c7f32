"""Sweeps as data: planned here, carried out by another process on its own model; engines that say what they can."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from conftest import tiny_model
from sweeping import JUDGED, tokens, variants

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S
from interp_core.engines.torch import TorchEngine
from interp_core.sweep.choose import cheapest_strategy
from interp_core.sweep.place import Placer
from interp_core.sweep.plan import SweepWork
from interp_core.sweep.runner import Runner
from interp_core.sweep.store import SweepStore

CARRIED_OUT = """
import sys, pickle, torch
import interp_core as ic
from interp_core import testing
from interp_core.progress import Progress
from interp_core.sweep.plan import SweepWork
from interp_core.sweep.runner import Runner
from interp_core.sweep.store import SweepStore
torch.set_num_threads(int(sys.argv[1]))
values = {}
for name, family, data in pickle.load(open(sys.argv[2], "rb")):
    model, work = ic.load(testing.tiny(family)), SweepWork.from_bytes(data)
    shape = work.plan.n_variants, len(work.tokens), len(work.scores)
    store = SweepStore(None, {}, shape, torch.float32)
    with Progress("sweep") as told:
        Runner(model, work.tokens, work.plan, work.scores, store).run(told)
    values[name] = store.values[..., 0], store.clean[..., 0], store.moved
torch.save(values, sys.argv[3])
"""
"""Another process: it has the bytes of a plan, and a model of its own."""


def half(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


def planned(model: ic.Model, x: Any, edits: list[Any], judged: score.Score) -> SweepWork:
    """What `Model.sweep` would carry out."""
    text = model.input(x)
    listed = [(edit,) if isinstance(edit, ic.Edit) else tuple(edit) for edit in edits]
    scores = (judged.on(model, len(text)),)
    strategy, why, _ = cheapest_strategy(model, text, "auto")
    plan = Placer(model, text, listed, scores, None).plan(strategy, why, model.strategy_checks.reliefs)
    return SweepWork(text, plan, scores)


def cases() -> dict[str, tuple[str, Any, list[Any], score.Score]]:
    """Several texts of unequal length, one text, an inner site, a span, images."""
    text, some = tokens(), variants(tiny_model("llama"))
    spans = {"answer": ((ic.Span(4, 7),), (ic.Span(3, 5),))}
    images = pictures.inputs("qwen3_vl", [[pictures.picture("qwen3_vl")]])
    inner = score.projection(S.resid_post[1].at(-1), torch.linspace(-1, 1, 64))
    heads = [S.z[at, 1].at(1).zero() for at in range(2)]
    return {
        "several texts": ("llama", text, [*some, S.mlp_out[1].at(-1).apply(torch.sin), S.logits.scale(0.5)], JUDGED),
        "one text": ("llama", text.row(0), some[:14], score.logprob(3)),
        "inner site": ("llama", text, heads, inner),
        "span": ("gpt_neo", replace(text, spans=spans), heads, score.nll(replace(text, spans=spans), "answer")),
        "images": (
            "qwen3_vl", images, [S.resid_pre[at].at("vision").scale(2.0) for at in range(3)] + [S.vision_embed.zero()],
            score.kl(),
        ),
    }  # fmt: skip


def test_a_plan_made_here_is_carried_out_by_another_process(tmp_path: Path) -> None:
    """On its own freshly loaded model, with exactly these numbers."""
    wanted, sent = {}, []
    for name, (family, x, edits, judged) in cases().items():
        model = ic.load(testing.tiny(family))
        sweep = model.sweep(x, edits, judged)
        wanted[name] = sweep.values, sweep.clean, sweep.moved
        sent.append((name, family, planned(model, x, edits, judged).to_bytes()))
    (tmp_path / "work.pkl").write_bytes(pickle.dumps(sent))
    arguments = [str(torch.get_num_threads()), str(tmp_path / "work.pkl"), str(tmp_path / "values.pt")]
    subprocess.run([sys.executable, "-c", CARRIED_OUT, *arguments], check=True)
    values = torch.load(tmp_path / "values.pt")
    assert values.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for there, here in zip(values[name], tensors, strict=True):
            assert torch.equal(there, here), name


def test_what_cannot_travel_is_named_and_parts_of_tensors_travel_alone() -> None:
    model, text = tiny_model("llama"), tokens()
    good = S.resid_pre[1].at(-1)
    work = planned(model, text, [good.scale(2.0), good.apply(lambda x: x * 2)], JUDGED)
    with pytest.raises(ic.PlanError, match=r"edit resid_pre\[1\]@\d apply.* cannot go to another process.*top level"):
        work.to_bytes()
    own = score.Score("mine", lambda x: x[:, 3])
    with pytest.raises(ic.PlanError, match="score mine cannot go to another process"):
        planned(model, text, [good.scale(2.0)], own).to_bytes()
    planned(model, text, [good.apply(half)], score.Score("sum", partial(torch.sum, dim=-1))).to_bytes()
    large = torch.randn(2, 8, 64, 500)[..., 0]
    assert len(planned(model, text, [S.resid_pre[1].set(large)], JUDGED).to_bytes()) < large.numel() * 8


def test_a_plan_of_another_model_is_refused_before_anything_runs() -> None:
    work = planned(tiny_model("llama"), tokens(), [S.resid_pre[1].at(-1).scale(2.0)], JUDGED)
    store = SweepStore(None, {}, (1, len(work.tokens), 1), torch.float32)
    other = ic.load(testing.tiny("llama", dtype=torch.float64))
    with pytest.raises(ic.PlanError, match="is for llama of .* float32, and the model is llama of .* float64"):
        Runner(other, work.tokens, work.plan, work.scores, store)


def test_every_score_pickles_and_is_of_the_class_that_it_is() -> None:
    text = replace(tokens(), spans={"answer": ((ic.Span(4, 7),), (ic.Span(3, 5),))})
    site = S.resid_post[1].at(-1)
    many = {
        score.Score: [score.logprob(3), score.probability(3), score.logit(3), JUDGED, score.rank(3), score.kl()],
        score.SpanScore: [score.nll(text, "answer"), score.Score("own", half, [1, 2], span=True)],
        score.SiteScore: [score.projection(site, torch.ones(64)), score.Score("own", half, of=site)],
    }
    for kind, scores in many.items():
        for judged in scores:
            again = pickle.loads(pickle.dumps(judged))
            assert type(judged) is type(again) is kind
            assert (again.name, again.at, again.of) == (judged.name, judged.at, judged.of)


class Declared(TorchEngine):
    """Somebody's engine that says that sweeps may run rows on it."""

    name = "declared"
    runs_rows = True


class Silent(TorchEngine):
    """One that says nothing of it."""

    name = "silent"


def test_an_engine_says_whether_sweeps_run_rows_on_it() -> None:
    edits = [S.z[1, 0].at(-1).zero(), S.resid_pre[2].at(-1).scale(2.0)]
    wanted = tiny_model("llama").sweep(tokens(), edits, JUDGED)
    for kind, strategy in ((Declared, "staircase"), (Silent, "full")):
        model = ic.load(testing.tiny("llama"))
        model.engine = kind(model.hf)
        swept = model.sweep(tokens(), edits, JUDGED)
        assert swept.plan.strategy == strategy
        assert ("engine 'silent' runs one variant after the other" in swept.plan.why) == (strategy == "full")
        torch.testing.assert_close(swept.values, wanted.values, atol=1e-5, rtol=1e-5)


def test_what_trying_gave_is_forgotten_when_the_model_is_opened_again() -> None:
    model = ic.load(testing.tiny("llama"))
    model.sweep(tokens(), [S.z[1, 0].at(-1).zero()], JUDGED)
    assert {strategy for strategy, _ in model.strategy_checks.strategies} == {"staircase"}
    with model.turn:
        model.reopen()
    assert not model.strategy_checks.strategies


def test_a_trial_that_breaks_off_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it tried a strategy, a model does not take this for one that holds."""
    from interp_core.sweep import choose

    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    model = ic.load(testing.tiny("llama"))
    monkeypatch.setattr(choose, "_compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.sweep(tokens(), [S.z[1, 0].at(-1).zero()], JUDGED)
    assert not model.strategy_checks.strategies


@pytest.mark.parametrize("strategy", ["auto", "full"])
def test_a_finished_sweep_runs_nothing(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that never swept: no pass, no trial."""
    edits = variants(tiny_model("llama"))[:5]
    first = ic.load(testing.tiny("llama")).sweep(
        tokens(), edits, [JUDGED, score.logit(3)], strategy=strategy, out=tmp_path
    )
    model, ran = ic.load(testing.tiny("llama")), list[int]()
    for kind in (type(model.hf), type(model.hf.model.layers[0])):  # a hook would make it another model
        monkeypatch.setattr(kind, "forward", lambda *_, **__: ran.append(1))
    again = model.sweep(tokens(), edits, [JUDGED, score.logit(3)], strategy=strategy, out=tmp_path)
    assert not ran and not again[0].plan.token_layers
    assert "all scores are in the folder" in again[0].plan.explain()
    for kept, swept in zip(again, first, strict=True):
        for tensor in ("values", "clean", "moved"):
            assert torch.equal(getattr(kept, tensor), getattr(swept, tensor))


def test_layers_of_different_sizes_are_swept() -> None:
    """Gemma 4's heads are wider in every third layer, and its config has no size of them all."""
    model = ic.load(testing.tiny("gemma4_text", dtype=torch.float64))
    ids, edits = torch.tensor([[5, 17, 33, 8, 61]]), [S.z[1, 0].zero(), S.resid_post[0].at(2).zero()]
    swept = model.sweep(ids, edits, score.logit(3, at=-1))
    by_runs = torch.tensor([model.run(ids, edits=edit).logits[0, -1, 3] for edit in edits])
    assert torch.allclose(swept.values[:, 0].double(), by_runs.double(), atol=1e-6)
