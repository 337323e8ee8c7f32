"""Sweeps equal loops of runs, cost what they change, and say what they do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pictures
import pytest
import torch
from conftest import sampled, tiny_model
from layouts import VISUAL
from sweeping import COARSER, JUDGED, everywhere, same, tokens, variants
from tolerances import close, rounding

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S
from interp_core.bench.allocations import peak_bytes
from interp_core.sweep import staircase


@pytest.mark.parametrize("family", sampled())
def test_every_strategy_equals_full_forward_passes(family: str) -> None:
    model = tiny_model(family, torch.float64)
    edits = variants(model)
    wanted = model.sweep(tokens(), edits, JUDGED, strategy="full")
    auto = model.sweep(tokens(), edits, JUDGED)
    assert auto.plan.strategy == ("restart" if family in COARSER else "staircase"), auto.plan.why
    for swept in (auto, *(model.sweep(tokens(), edits, JUDGED, strategy=name) for name in ("batched", "restart"))):
        assert not any(swept.plan.singles)
        same(swept, wanted, model)


def test_it_equals_a_loop_of_runs() -> None:
    model = tiny_model("llama")
    edits = variants(model)
    swept = model.sweep(tokens(), edits, score.logprob(torch.tensor([3, 7])))
    for number in (0, 7, 14, len(edits) - 1):
        edit = edits[number]
        run = model.run(tokens(), edits=edit, logits=-1)
        torch.testing.assert_close(swept.values[number], score.logprob(torch.tensor([3, 7]))(run), atol=1e-5, rtol=1e-5)
    assert swept.effects.shape == (len(edits), 2)
    strongest = int(swept.effects.mean(-1).abs().argmax())
    assert swept.top(1)[0] == (strongest, swept.variants[strongest], float(swept.effects[strongest].mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", dtype)
    swept = [model.sweep(tokens(), variants(model), JUDGED, strategy=name) for name in ("auto", "full")]
    assert swept[0].plan.strategy == "staircase"
    scale = swept[1].values.abs().max()
    assert (swept[0].values - swept[1].values).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2) * scale


def test_it_executes_the_token_layers_that_the_plan_says() -> None:
    """Counted at the attention modules: rows × columns of every call."""
    model = tiny_model("llama")
    edits = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    strategies = ("auto", "restart", "batched", "prefix", "full")
    for strategy in strategies:  # tries it on the model
        model.sweep(tokens(), edits[:1], JUDGED, strategy=strategy)
    seen: list[int] = []
    blocks = [model.engine.modules[f"model.layers.{at}.self_attn"] for at in range(3)]
    handles = [
        block.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
        )
        for block in blocks
    ]
    try:
        for strategy in strategies:
            seen.clear()
            swept = model.sweep(tokens(), edits, JUDGED, strategy=strategy)
            assert sum(seen) == swept.plan.token_layers, strategy
    finally:
        for handle in handles:
            handle.remove()
    best = model.sweep(tokens(), edits, JUDGED)
    assert best.plan.token_layers == 3 * (8 + 5) + 2 * 4 * (3 + 2 + 1)  # a clean pass, then each head's own column
    assert best.plan.naive == 12 * 3 * (8 + 5)


def test_the_published_count() -> None:
    """12 layers × 12 heads at the last of 96 tokens: 2,088 token-layers against 165,888."""
    hf = testing.tiny(
        "llama", num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, head_dim=8, hidden_size=96
    )
    model = ic.load(hf)
    ids = torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(0))
    plan = model.sweep(ids, [S.z[at, head].at(-1).zero() for at, head in model.heads], score.rank(5)).plan
    assert (plan.token_layers, plan.naive) == (2088, 165888)
    assert "2,088 against 165,888" in plan.explain()
    assert "79.4× fewer" in plan.explain()
    dear = model.sweep(ids, [S.resid_pre[0].scale(2)], score.logit(5)).plan  # the clean pass comes on top
    assert dear.token_layers >= dear.naive and "fewer" not in dear.explain()


def test_chunks_fit_the_budget_and_shrink_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    edits = variants(model)
    whole = model.sweep(tokens(), edits, JUDGED)
    small = model.sweep(tokens(), edits, JUDGED, memory_budget=3 * whole.plan.row_bytes)
    assert max(len(sweep_pass.steps) for sweep_pass in small.plan.passes if sweep_pass.columns == 8) <= 3
    assert len(small.plan.passes) > len(whole.plan.passes)
    torch.testing.assert_close(small.values, whole.values, atol=1e-5, rtol=1e-5)
    with pytest.raises(ic.PlanError, match="one variant takes about .* the memory budget is 0.0 MiB"):
        model.sweep(tokens(), edits, JUDGED, memory_budget=10)
    climb = staircase.Staircase.run

    def narrow(self: staircase.Staircase, *args: object) -> object:
        if len(self.start_layers) > 5:
            raise torch.OutOfMemoryError("on purpose")
        return climb(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(staircase.Staircase, "run", narrow)
    torch.testing.assert_close(model.sweep(tokens(), edits, JUDGED).values, whole.values, atol=1e-5, rtol=1e-5)


def test_scores() -> None:
    model = tiny_model("llama")
    edits = [S.resid_post[0].at(-1).scale(0.5), S.z[2, 0].at(-1).zero()]
    logits = [model.run(tokens(), edits=e, logits=-1).logits.as_subclass(torch.Tensor) for e in ([], *edits)]
    swept = model.sweep(tokens(), edits, score.kl())
    for number, changed in enumerate(logits[1:]):
        wanted = torch.nn.functional.kl_div(
            changed.log_softmax(-1), logits[0].log_softmax(-1), reduction="none", log_target=True
        )
        torch.testing.assert_close(swept.values[number], wanted.sum(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(swept.clean, torch.zeros(2))
    with pytest.raises(ic.PlanError, match="compares with a clean run"):
        score.kl()(model.run(tokens(), logits=-1))
    own = score.Score("norm", lambda x: x.norm(dim=-1))
    torch.testing.assert_close(model.sweep(tokens(), edits, own).clean, logits[0].norm(dim=-1), atol=1e-4, rtol=1e-5)
    earlier = model.sweep(tokens(), [S.resid_pre[1].at(0).scale(2.0)], score.logprob(3, at=2))
    assert earlier.plan.lengths == [3, 3]
    wanted = model.run(tokens(), edits=S.resid_pre[1].at(0).scale(2.0)).logits.at(2)
    torch.testing.assert_close(
        earlier.values[0], wanted.as_subclass(torch.Tensor).log_softmax(-1)[:, 3], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", sampled())
def test_every_site_goes_into_passes_of_many(family: str) -> None:
    """Also those whose value is computed beside the forward pass: routers, experts' and heads' outputs, resid_mid."""
    model = tiny_model(family, torch.float64)
    edits = everywhere(model)
    swept = model.sweep(tokens(), edits, JUDGED)
    ends = [i for i, edit in enumerate(edits) if edit.site.name in ("final_norm", "logits")]
    assert swept.plan.singles == [ends, ends]
    full = model.sweep(tokens(), edits, JUDGED, strategy="full")
    same(swept, full, model)


def test_several_scores_of_the_same_passes() -> None:
    model = tiny_model("llama")
    target, edits = torch.tensor([3, 7]), variants(model)
    judged = [score.logprob(target), score.rank(target), score.kl(), JUDGED]
    model.sweep(tokens(), edits[:1], JUDGED)  # tries the strategy on the model
    ran: list[int] = []
    handle = model.hf.register_forward_hook(lambda *_: ran.append(1))
    try:
        many = model.sweep(tokens(), edits, judged)
        together = len(ran)
        alone = [model.sweep(tokens(), edits, single) for single in judged]
    finally:
        handle.remove()
    assert len(ran) == 5 * together
    for swept, wanted in zip(many, alone, strict=True):
        assert swept.score == wanted.score
        torch.testing.assert_close(swept.values, wanted.values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(swept.clean, wanted.clean, atol=1e-5, rtol=1e-5)
    with pytest.raises(ic.PlanError, match="scores logprob and rank read different places; sweep once for each"):
        model.sweep(tokens(), edits, [score.logprob(3), score.rank(3, at=2)])
    with pytest.raises(ic.PlanError, match="a sweep needs a score"):
        model.sweep(tokens(), edits, [])


def test_edits_of_one_variant_follow_each_other() -> None:
    """At one place of one row, and beside other variants' edits there."""
    model = tiny_model("llama", torch.float64)
    vector = torch.linspace(-2, 2, 64, dtype=torch.float64)
    at = S.resid_pre[1].at(-1)
    edits = [
        [at.add(vector), at.scale(2.0)], [at.scale(2.0), at.add(vector)], at.zero(), [at.zero(), at.add(vector)],
        [S.head_out[1, 0].at(-1).scale(2.0), S.head_out[1, 0].at(-1).zero(), S.head_out[1, 1].at([1, 3, 4]).zero()],
        [S.resid_pre[1].at([0, 1, 3]).zero(), S.resid_pre[1].apply(lambda x: x + 1)], [],
    ]  # fmt: skip
    swept, full = (model.sweep(tokens(), edits, JUDGED, strategy=name) for name in ("auto", "full"))
    assert swept.plan.singles == [[6], [6]]
    same(swept, full, model)
    assert len(set(full.values[:4, 0].tolist())) == 4
    torch.testing.assert_close(full.values[6], full.clean)


def test_what_leaves_a_block_is_changed_before_what_enters_the_next() -> None:
    """Whatever order the edits are written in: the site of the one is where the tensor passes first."""
    model = tiny_model("llama", torch.float64)
    vector = torch.linspace(-1, 1, 64, dtype=torch.float64)
    post, mid, pre = S.resid_post[0].at(-1).add(vector), S.resid_mid[1].at(1).scale(2.0), S.resid_pre[1].at(-1)
    edits = [[pre.scale(3.0), post], [post, pre.scale(3.0)], [pre.zero(), mid, post, post]]
    for strategy in ("auto", "restart", "batched"):
        swept, full = (model.sweep(tokens(), edits, JUDGED, strategy=name) for name in (strategy, "full"))
        same(swept, full, model)
        assert not any(swept.plan.singles) and float(swept.values[0, 0]) == float(swept.values[1, 0])


def test_other_engines_run_one_after_the_other() -> None:
    model = ic.load(testing.tiny("llama"), engine="nnsight")
    edits = variants(model)[:4]
    swept = model.sweep(tokens(), edits, JUDGED)
    assert swept.plan.strategy == "full" and "engine 'nnsight' runs one variant after the other" in swept.plan.explain()
    torch.testing.assert_close(
        swept.values, tiny_model("llama").sweep(tokens(), edits, JUDGED).values, atol=1e-5, rtol=1e-5
    )


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")

    def state() -> list[object]:
        modules = model.engine.modules.values()
        return [(dict(m._forward_pre_hooks), dict(m._forward_hooks), m.__dict__.get("forward")) for m in modules]

    logits, before = model.run(tokens()).logits, state()
    bad = [S.resid_post[1].at(-1).set(torch.ones(64)), S.z[1, 0].at(-1).set(torch.ones(16))]
    with pytest.raises(ic.PlanError, match=r"the value is \[16\]"):
        model.sweep(tokens(), bad, JUDGED)
    assert state() == before
    assert torch.equal(model.run(tokens()).logits, logits)


def test_bad_input() -> None:
    model = tiny_model("llama")
    good = S.z[1, 0].at(-1).zero()
    for call, message in (
        (lambda: model.sweep(tokens(), [], JUDGED), "a sweep needs variants"),
        (lambda: model.sweep(tokens(), [S.z[1]], JUDGED), "a variant is edits, not Site"),
        (lambda: model.sweep(tokens(), [["z"]], JUDGED), "a variant is edits, not str"),
        (
            lambda: model.sweep(tokens(), [good], JUDGED, strategy="stairs"),
            "no strategy 'stairs'. Did you mean 'staircase'",
        ),
        (lambda: model.sweep(tokens(), [good], score.logprob(3, at=1)), "reads position 1: nothing can change"),
        (
            lambda: model.sweep(tokens(), [good], score.logprob(3, at=[1, 2])),
            "reads 2 positions of row 0; it takes one",
        ),
        (lambda: model.sweep(tokens(), [S.z[9, 0].zero()], JUDGED), "9"),
        (lambda: score.rank(3, at=2)(model.run(tokens(), logits=-1)), "reads logits at 2, the run kept logits@-1"),
        (lambda: score.rank(3)(model.run(tokens(), read=S.resid_post[0], logits=False)), "logits"),
    ):
        with pytest.raises((ic.InterpError, TypeError), match=message):
            call()
    with pytest.raises(ic.CapabilityError, match="strategy 'staircase' cannot be had here: layer 0 has no attention"):
        tiny_model("gpt_neo").sweep(tokens(), [S.resid_post[0].at(-1).zero()], JUDGED, strategy="staircase")


def test_scores_that_are_no_numbers_are_named() -> None:
    model = tiny_model("llama")
    poison = torch.full((64,), float("nan"))
    swept = model.sweep(tokens(), [S.resid_pre[1].at(-1).add(poison), S.z[1, 0].at(-1).zero()], JUDGED)
    assert swept.failed == ["resid_pre[1]@-1 add float32[64]"]
    assert torch.isfinite(swept.values[1]).all()


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    edits = variants(model)
    whole = model.sweep(tokens(), edits, JUDGED)
    climb = staircase.Staircase.run
    passes: list[int] = []

    def stopping(self: staircase.Staircase, *args: object) -> object:
        passes.append(len(self.start_layers))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return climb(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(staircase.Staircase, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        model.sweep(tokens(), edits, JUDGED, out=tmp_path)
    done = sum(passes[:2])
    again = model.sweep(tokens(), edits, JUDGED, out=tmp_path)
    assert sum(passes[3:]) == 2 * len(edits) - done  # what was done is not done again
    torch.testing.assert_close(again.values, whole.values, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again.moved, whole.moved)
    count = len(passes)
    torch.testing.assert_close(
        model.sweep(tokens(), edits, JUDGED, out=tmp_path).values, whole.values, atol=1e-6, rtol=1e-6
    )
    assert len(passes) == count
    with pytest.raises(ic.PlanError, match="holds another sweep"):
        model.sweep(tokens(), edits[1:], JUDGED, out=tmp_path)
    (tmp_path / "sweep.safetensors").write_bytes(b"nothing")
    with pytest.raises(ic.LoadError, match="holds a sweep that cannot be read"):
        model.sweep(tokens(), edits, JUDGED, out=tmp_path)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.sweep(tokens(), variants(model), JUDGED, progress=True)
    shown = capsys.readouterr().err
    assert shown.endswith("\n") and f"sweep {2 * len(variants(model))} of {2 * len(variants(model))}, " in shown
    model.sweep(tokens(), variants(model), JUDGED)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_likelihood_of_spans(family: str) -> None:
    """Rows have spans of different lengths; what lies before the first scored position comes from the clean pass."""
    model = tiny_model(family, torch.float64)
    spans = {"answer": ((ic.Span(4, 7),), (ic.Span(3, 5),))}
    text = replace(tokens(), spans=spans)
    judged = score.nll(text, "answer")
    edits = [S.resid_pre[1].at(1).scale(2.0), S.z[0, 1].at(2).zero(), S.mlp_out[2].at(3).scale(0.0)]
    swept = model.sweep(text, edits, judged)
    for number, edit in enumerate([None, *edits]):
        for row, chosen in enumerate(((4, 5, 6), (3, 4))):
            logits = model.run(text.row(row), edits=edit or ()).logits.as_subclass(torch.Tensor)[0].log_softmax(-1)
            wanted = -sum(float(logits[i - 1, text.row(row).ids[0, i]]) for i in chosen)
            value = swept.clean[row] if edit is None else swept.values[number - 1, row]
            assert float(value) == pytest.approx(wanted, abs=rounding(model) * float(swept.clean.max()))
    single = replace(text.row(0), spans={"answer": ((ic.Span(4, 7),),)})
    run = model.run(single)
    assert float(score.nll(single, "answer")(run)) == pytest.approx(float(swept.clean[0]), rel=rounding(model))
    with pytest.raises(ic.PlanError, match="the rows' spans differ in length"):
        judged(model.run(text))
    with pytest.raises(ic.PlanError, match="no span 'answr'. Did you mean 'answer'"):
        score.nll(text, "answr")
    with pytest.raises(ic.PlanError, match="nothing before it to be predicted from"):
        score.nll(replace(text, spans={"answer": ((ic.Span(0, 2),), (ic.Span(3, 5),))}), "answer")


@pytest.mark.parametrize("family", VISUAL)
def test_texts_with_images(family: str) -> None:
    """Heads, streams and attention at a token behind the image; what the tower hands over is edited one by one."""
    model = tiny_model(family, torch.float64)
    values = pictures.inputs(family, [[pictures.picture(family)]])
    values = {k: v.double() if k == "pixel_values" else v for k, v in values.items()}
    vector = torch.linspace(-2, 2, 64, dtype=torch.float64)
    edits: list[ic.Edit | list[ic.Edit]] = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    edits += [S.resid_pre[at].at("vision").add(vector) for at in range(3)]
    edits += [S.vision_embed.scale(0.5), S.mlp_out[2].at(2).zero()]
    if not model.can("pattern", "write"):
        edits.append(S.pattern[2].knockout(query=-1, key="vision"))
    judged = score.logit_diff(3, 9)
    swept, full = (model.sweep(values, edits, judged, strategy=name) for name in ("auto", "full"))
    assert swept.plan.strategy == ("restart" if family in COARSER else "staircase")
    assert [edits[number] for number in swept.plan.singles[0]] == [S.vision_embed.scale(0.5)]
    same(swept, full, model)


INNER = {
    "resid_post": S.resid_post[1].at(-1), "resid_pre": S.resid_pre[1].at(3), "z": S.z[1, 2].at(-1),
    "pattern": S.pattern[1, 2].at(query=-1, key=1), "patterns": S.pattern[1].at(query=[1, 3, 4]),
    "rot_k": S.rot_k[1, 0].at([0, 2, 3]), "head_out": S.head_out[1, [0, 3]].at(-2), "whole": S.mlp_out[1],
}  # fmt: skip


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("strategy", ["auto", "batched", "prefix"])
def test_scores_of_inner_sites(name: str, strategy: str) -> None:
    model = tiny_model("llama", torch.float64)
    judged = score.Score("size", lambda x: x.reshape(len(x), -1).square().sum(-1), of=INNER[name])
    edits = [S.z[0, head].at(1).zero() for head in range(4)] + [S.resid_pre[1].at(1).scale(2.0), S.embed.at(0).zero()]
    swept, full = (model.sweep(tokens(), edits, judged, strategy=taken) for taken in (strategy, "full"))
    close(swept.values, full.values, model)
    close(swept.clean, full.clean, model)
    assert swept.plan.singles == [[], []]
    for number, edit in enumerate([None, *edits]):
        run = model.run(tokens().row(1), read=INNER[name], edits=edit or (), logits=False, allow_noop=True)
        wanted = swept.clean[1] if edit is None else swept.values[number - 1, 1]
        close(judged(run)[0], wanted, model, size=full.values.abs().max())


def test_passes_end_where_an_inner_site_is_scored() -> None:
    model = tiny_model("llama")
    edits = [S.z[0, 1].at(-1).zero(), S.resid_pre[1].at(-1).scale(2.0)]
    judged = score.projection(S.resid_post[1].at(-1), torch.linspace(-1, 1, 64))
    model.sweep(tokens(), edits, judged)
    ran: list[int] = []
    handles = [
        model.engine.modules[f"model.layers.{at}.self_attn"].register_forward_pre_hook(lambda *_, at=at: ran.append(at))
        for at in range(3)
    ]
    try:
        swept = model.sweep(tokens(), edits, judged)
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) == {0, 1}
    assert swept.plan.token_layers == 2 * (8 + 5) + 2 * (2 + 1)
    wanted = model.run(tokens(), read=S.resid_post[1].at(-1), edits=edits[0])[S.resid_post[1].at(-1)]
    torch.testing.assert_close(
        swept.values[0], wanted.as_subclass(torch.Tensor) @ torch.linspace(-1, 1, 64), atol=1e-5, rtol=1e-5
    )
    for site, message in (
        (S.z[2, 0].at(-1).zero(), r"z\[2,0\]@-1 zero lies above resid_post\[1\]@-1, which score projection of"),
        (S.resid_pre[2].at(-1).zero(), "it can change nothing; leave it out, or score a site above it"),
    ):
        with pytest.raises(ic.PlanError, match=message):
            model.sweep(tokens(), [edits[0], site], judged)
    with pytest.raises(ic.PlanError, match=r"reads resid_post@-1; it takes a site of one layer, as resid_post\[0\]"):
        model.sweep(tokens(), edits, score.projection(S.resid_post.at(-1), torch.ones(64)))


def test_only_the_logits_that_a_score_looks_at_are_computed() -> None:
    model = tiny_model("llama")
    model.sweep(tokens(), variants(model)[:1], JUDGED)  # tries the strategy on the model
    widths: list[int] = []
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, output: widths.append(output.shape[-1]))
    try:
        model.sweep(tokens(), variants(model), score.logit_diff(torch.tensor([3, 7]), 3))
        assert set(widths) == {1, 2}  # in the first row both tokens are one
        widths.clear()
        model.sweep(tokens(), variants(model), score.logprob(3))
        assert set(widths) == {model.atlas.shape.d_vocab}
    finally:
        handle.remove()
    assert "forward" not in head.__dict__
    logits = score.logit(torch.tensor([3, 7]))
    run = model.run(tokens(), edits=S.z[1, 0].at(-1).zero(), logits=-1)
    torch.testing.assert_close(
        model.sweep(tokens(), [S.z[1, 0].at(-1).zero()], logits).values[0], logits(run), atol=1e-5, rtol=1e-5
    )


def test_an_edit_of_one_number() -> None:
    """One neuron at one position: nothing is left of the row but its batch axis."""
    model = tiny_model("llama", torch.float64)
    edits = [S.mlp_act[1, n].at(2).set(torch.tensor(1.5, dtype=torch.float64)) for n in (5, 7)]
    edits.append(S.mlp_act[1, 5].at(2).zero())
    swept, full = (model.sweep(tokens(), edits, JUDGED, strategy=name) for name in ("auto", "full"))
    same(swept, full, model)


def test_padding_cannot_be_edited() -> None:
    model = tiny_model("llama")
    assert tokens().padded
    mask = ~tokens().mask
    with pytest.raises(ic.PlanError, match="of row 1 is padding; a sweep edits and scores real tokens"):
        model.sweep(tokens(), [S.resid_pre[1].at(mask).zero()], JUDGED)


def test_a_folder_knows_ragged_targets_and_other_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    text = replace(tokens(), spans={"answer": ((ic.Span(4, 7),), (ic.Span(3, 5),))})
    edits = [S.z[1, 0].at(1).zero()]
    swept = model.sweep(text, edits, score.nll(text, "answer"), out=tmp_path)
    assert torch.equal(model.sweep(text, edits, score.nll(text, "answer"), out=tmp_path).values, swept.values)
    other = ic.load(testing.tiny("llama", seed=1))
    with pytest.raises(ic.PlanError, match="holds another sweep"):
        other.sweep(text, edits, score.nll(text, "answer"), out=tmp_path)


def test_memory_is_that_of_a_clean_pass_and_the_rows() -> None:
    """Bytes allocated at most at a time: no more than 1.5 × a forward pass with cache, and what the rows take alone."""
    hf = testing.tiny("llama", num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16, hidden_size=128)
    model = ic.load(hf)
    ids = torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(0))
    edits = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    model.sweep(ids, edits[:2], score.rank(5))
    with torch.no_grad():
        clean = peak_bytes(lambda: hf(ids, use_cache=True, logits_to_keep=1))
        rows = peak_bytes(lambda: hf(ids[:, :1].expand(len(edits), -1), use_cache=False))
    swept = peak_bytes(lambda: model.sweep(ids, edits, score.rank(5)))
    plan = model.sweep(ids, edits, score.rank(5)).plan
    assert len(plan.passes) == 1
    attention = len(edits) * 16 * 96 * 4  # scores of every row over the text, which rows of one token do not have
    assert swept <= 1.5 * clean + rows + attention, (swept, clean, rows, attention)
    assert swept <= clean + plan.row_bytes * len(edits)
