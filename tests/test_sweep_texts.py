"""Texts of about one length go through sweeps together, and get the numbers that they get alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import sampled, tiny_model
from sweeping import COARSER, same, variants
from tolerances import close

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S
from interp_core.strategy_checks import Relief
from interp_core.sweep import clean, staircase

ROWS = ([5, 17, 33, 8, 61, 40, 22, 9], [9, 54, 12, 70, 3, 44, 31, 18], [21, 7, 55, 30, 62, 11, 4])
JUDGED = score.logit_diff(torch.tensor([3, 7, 12]), torch.tensor([9, 11, 2]))


def texts(rows: tuple[list[int], ...] = ROWS) -> ic.Tokens:
    ids = [torch.tensor([row]) for row in rows]
    return ic.Tokens.stack([ic.Tokens(row, torch.ones_like(row, dtype=torch.bool)) for row in ids])


def edits(model: ic.Model) -> list[ic.Edit | list[ic.Edit]]:
    """Those that leave attention's inside alone, and one with a value per text."""
    some = [variant for variant in variants(model) if isinstance(variant, list) or variant.site.name != "pattern"]
    values = torch.linspace(-1, 1, 3 * 64, dtype=model.dtype).view(3, 64)
    some = [variant for variant in some if isinstance(variant, list) or variant.op != "set"]
    return [*some, S.resid_pre[1].at(1).set(values), S.embed.at(-1).scale(2.0), S.mlp_out[1].at([1, -1]).scale(0.5)]


@pytest.mark.parametrize("family", sampled())
def test_texts_together_equal_full_forward_passes(family: str) -> None:
    model = tiny_model(family, torch.float64)
    swept, full = (model.sweep(texts(), edits(model), JUDGED, strategy=name) for name in ("auto", "full"))
    groups = [group.texts for group in swept.plan.groups]
    assert groups == ([(0, 1), (2,)] if family in COARSER else [(0, 1, 2)]), swept.plan.why
    assert not any(swept.plan.singles)
    same(swept, full, model)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("mistral", torch.float32), ("mistral", torch.bfloat16), ("gemma2", torch.float32), ("gpt_oss", torch.float32)],
)
def test_windows_caps_and_sinks(family: str, dtype: torch.dtype) -> None:
    """Texts longer than a sliding window, which begins at another key in each."""
    model = tiny_model(family, dtype)
    window = model.hf.config.get_text_config().sliding_window
    rows = tuple([(7 * i + at) % 90 + 3 for i in range(3 * window - at)] for at in range(3))
    assert window and len(rows[0]) > window
    some = [S.z[at, head].at(-1).scale(3.0) for at, head in model.heads] + [S.resid_pre[1].at([-3, -1]).scale(2.0)]
    swept, full = (model.sweep(texts(rows), some, JUDGED, strategy=name) for name in ("auto", "full"))
    assert [group.texts for group in swept.plan.groups] == [(0, 1, 2)]
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    assert (swept.values - full.values).abs().max() <= limit * full.values.abs().max()


def test_token_layers_are_those_of_the_filled_up_texts() -> None:
    model = tiny_model("llama")
    some = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    model.sweep(texts(), some[:1], JUDGED)  # tries the strategy on the model
    attended: list[int] = []
    fed: list[int] = []
    last = model.engine.modules["model.layers.2.mlp.down_proj"]
    handles = [
        model.engine.modules[f"model.layers.{at}.self_attn"].register_forward_pre_hook(
            lambda _m, _a, kwargs: attended.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
        )
        for at in range(3)
    ]
    handles.append(last.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[:2].numel())))
    try:
        swept = model.sweep(texts(), some, JUDGED)
    finally:
        for handle in handles:
            handle.remove()
    assert sum(attended) == swept.plan.token_layers == 3 * 3 * 8 + 3 * 4 * (3 + 2 + 1)
    assert fed == [3, 3 * 12]  # of the clean pass the last MLP gets the scored tokens alone
    assert "1 clean, 1 with up to 36 variants" in swept.plan.explain()


def test_which_texts_go_alone() -> None:
    model = tiny_model("llama")
    head = S.z[1, 0].at(-1).zero()

    def groups(rows: tuple[list[int], ...], edit: ic.Edit, judged: score.Score = JUDGED) -> list[tuple[int, ...]]:
        return [group.texts for group in model.sweep(texts(rows), [edit], judged).plan.groups]

    assert groups(ROWS, head) == [(0, 1, 2)]
    assert groups((ROWS[0], ROWS[1][:3], ROWS[2]), head) == [(0, 2), (1,)]  # filled up, one would cost too much
    inside = model.sweep(texts(), [S.pattern[1].knockout(query=-1, key=1)], JUDGED).plan
    assert [group.texts for group in inside.groups] == [(0, 1, 2)]  # rows of each text then have a pass of their own
    assert [{step.text for step in sweep_pass.steps} for sweep_pass in inside.passes] == [{0}, {1}, {2}]
    inner = score.projection(S.resid_post[1].at(-1), torch.linspace(-1, 1, 64))
    assert groups(ROWS, head, inner) == [(0,), (1,), (2,)]
    hf = testing.tiny("llama")
    hf.config.rope_parameters = {**hf.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    stretched = ic.load(hf)
    assert [group.texts for group in stretched.sweep(texts(), [head], JUDGED).plan.groups] == [(0, 1), (2,)]


def test_a_group_is_no_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    some = [S.z[at, head].at(-1).zero() for at, head in model.heads]
    whole = model.sweep(texts(), some, JUDGED)
    passing = clean.clean_pass
    sizes: list[int] = []

    def narrow(*args: object, **kwargs: object) -> clean.CleanPass:
        sizes.append(len(args[3].real))  # type: ignore[attr-defined]
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("on purpose")
        return passing(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("interp_core.sweep.runner.clean_pass", narrow)
    torch.testing.assert_close(model.sweep(texts(), some, JUDGED).values, whole.values, atol=1e-5, rtol=1e-5)
    assert sizes == [3, 1, 2, 1, 1]
    monkeypatch.undo()
    small = model.sweep(texts(), some, JUDGED, memory_budget=2 * whole.plan.row_bytes)
    assert max(len(sweep_pass.steps) for sweep_pass in small.plan.passes) <= 2
    torch.testing.assert_close(small.values, whole.values, atol=1e-5, rtol=1e-5)


def test_a_model_that_takes_no_texts_together_takes_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    climb = staircase.Staircase.run

    def alone(self: staircase.Staircase, *args: object) -> object:
        if len(set(self.texts)) > 1:
            raise RuntimeError("these shapes do not fit")
        return climb(self, *args)  # type: ignore[arg-type]

    wanted = tiny_model("llama").sweep(texts(), [S.z[1, 0].at(-1).zero()], JUDGED)
    monkeypatch.setattr(staircase.Staircase, "run", alone)
    model = ic.load(testing.tiny("llama"))
    swept = model.sweep(texts(), [S.z[1, 0].at(-1).zero()], JUDGED)
    assert swept.plan.strategy == "staircase" and [group.texts for group in swept.plan.groups] == [(0,), (1,), (2,)]
    assert "these shapes do not fit" in model.strategy_checks.reliefs[Relief.APART]
    torch.testing.assert_close(swept.values, wanted.values, atol=1e-5, rtol=1e-5)


def test_spans_of_different_lengths_and_what_is_done_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64)
    spans = {"answer": ((ic.Span(4, 7),), (ic.Span(3, 8),), (ic.Span(5, 6),))}
    text = replace(texts(), spans=spans)
    judged = score.nll(text, "answer")
    some = [
        S.resid_pre[1].at(1).scale(2.0),
        S.z[0, 1].at(2).zero(),
        S.mlp_out[2].at(3).scale(0.0),
        S.z[1, 1].at(1).zero(),
    ]
    full, _ = (model.sweep(text, some, judged, strategy=name) for name in ("full", "auto"))
    climb = staircase.Staircase.run
    rows: list[int] = []

    def stopping(self: staircase.Staircase, *args: object) -> object:
        if len(rows) == 2:
            rows.append(0)
            raise KeyboardInterrupt
        rows.append(len(self.start_layers))
        return climb(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(staircase.Staircase, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        model.sweep(text, some, judged, out=tmp_path)
    swept = model.sweep(text, some, judged, out=tmp_path)
    assert sum(rows) == 3 * len(some) and 0 < sum(rows[:2]) < sum(rows)  # what was done is not done again
    close(swept.values, full.values, model)
    close(swept.clean, full.clean, model)
