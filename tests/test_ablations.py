"""Ablations equal runs made by hand, for every kind of value and every score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins import ablations
from studying import CLEAN, FRENCH, IDS, OTHER, judged, study, tokens
from tolerances import close, rounding
from torch import Tensor

import interp_core as ic
from interp_core import score, testing
from interp_core import sites as S

PLURAL = "Q: cat\nA: cats\n\nQ: dog\nA: dogs\n\nQ: horse\nA:"
ROWS = torch.randint(3, 90, (5, 7), generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([3, 7])
LOGPROB = score.logprob(TARGET)


def ablate(model: ic.Model, x: Any = None, **settings: Any) -> Any:
    """On two rows of ids, their answers 3 and 7, unless there is a text."""
    settings = settings if x is not None or "score" in settings else {"answer": [3, 7]} | settings
    return study("ablations", model, tokens(IDS) if x is None else x, **settings)


def by_hand(model: ic.Model, one: S.Site, value: Tensor, by: score.Score = LOGPROB) -> Tensor:
    """Effect of one full forward pass in which a site is a value, the same in both rows."""
    return judged(model, tokens(IDS), one.set(value), by) - judged(model, tokens(IDS), by=by)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe", "gpt_neox"])
def test_zero(family: str) -> None:
    model = tiny_model(family, torch.float64)
    for site, layer, head, place in (("z", 1, 3, -1), ("mlp_out", 2, 0, 4), ("attn_out", 0, 0, 2)):
        found = ablate(model, site=site, at=[place])
        one = (S.z[layer, head] if site == "z" else S.named(site)[layer]).at(place)
        wanted = judged(model, tokens(IDS), one.zero(), LOGPROB) - found.base
        close(found.effect[:, layer, head, 0], wanted, model, size=found.base.abs().max())


@pytest.mark.parametrize("chunk", [16, 2])
def test_means(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By position and over all tokens; heads, layers, streams; with reference prompts in one run or in several."""
    monkeypatch.setattr(ablations, "CHUNK", chunk)
    model = tiny_model("llama", torch.float64)
    ref = model.run(ROWS, read=[S.z, S.resid_mid, S.resid_post, S.mlp_out])
    z, mid, post, mlp = (ref[site].as_subclass(Tensor) for site in (S.z, S.resid_mid, S.resid_post, S.mlp_out))
    given = {"kind": "mean", "reference": tokens(ROWS)}
    found = ablate(model, at=[-1, 2], **given)
    wanted = by_hand(model, S.z[1, 2].at(2), z[1][:, 2, 2].mean(0))
    close(found.effect[:, 1, 2, 1], wanted, model)
    everywhere = ablate(model, at="all", over="all", **given)
    wanted = by_hand(model, S.z[1, 2].at("all"), z[1][:, :, 2].mean((0, 1)))
    close(everywhere.effect[:, 1, 2, 0], wanted, model)
    for site, value in (("resid_post", post[1][:, 3].mean(0)), ("resid_mid", mid[1][:, 3].mean(0))):
        found = ablate(model, site=site, at=[3], **given)
        close(found.effect[:, 1, 0, 0], by_hand(model, S.named(site)[1].at(3), value), model)
    spans = ablate(model, site="mlp_out", at=[[1, 4]], **given)
    close(
        spans.effect[:, 2, 0, 0],
        by_hand(model, S.mlp_out[2].at([1, 4]), mlp[2][:, [1, 4]].mean(0).expand(2, -1, -1)),
        model,
    )
    layer = ablate(model, by="layer", **given)
    close(layer.effect[:, 0, 0, 0], by_hand(model, S.z[0].at(-1), z[0][:, -1].mean(0)), model)


def test_a_mean_over_tokens_counts_no_padding() -> None:
    model = tiny_model("qwen3", torch.float64)
    rows = [tokens(ROWS[:1]), tokens(ROWS[1:2, :4])]
    found = ablate(model, site="mlp_out", at=3, kind="mean", over="all", reference=ic.Tokens.stack(rows))
    values = [model.run(row, read=S.mlp_out[1])[S.mlp_out[1]].as_subclass(Tensor)[0] for row in rows]
    wanted = by_hand(model, S.mlp_out[1].at(3), torch.cat(values).mean(0))
    close(found.effect[:, 1, 0, 0], wanted, model)
    last = ablate(model, kind="mean", reference=ic.Tokens.stack(rows))  # -1 is the last of each
    ends = [model.run(row, read=S.z[1, 0].at(-1))[S.z[1, 0].at(-1)].as_subclass(Tensor)[0] for row in rows]
    wanted = by_hand(model, S.z[1, 0].at(-1), torch.stack(ends).mean(0))
    close(last.effect[:, 1, 0, 0], wanted, model)


def test_resampling_is_mean_and_spread_over_draws() -> None:
    model = tiny_model("llama", torch.float64)
    z = model.run(ROWS, read=S.z[1, 2].at(-1))[S.z[1, 2].at(-1)].as_subclass(Tensor)
    each = torch.stack([by_hand(model, S.z[1, 2].at(-1), value) for value in z])
    whole = ablate(model, kind="resample", reference=tokens(ROWS))
    close(whole.effect[:, 1, 2, 0], each.mean(0), model)
    close(whole.spread[:, 1, 2, 0], each.std(0), model)
    assert whole.draws == 5
    some = [ablate(model, kind="resample", reference=tokens(ROWS), draws=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert some[0] == some[1] and any(not torch.equal(some[0].effect, other.effect) for other in some[2:])
    pairs = [each[[i, j]] for i in range(5) for j in range(i)]
    assert any(torch.allclose(some[0].effect[:, 1, 2, 0], pair.mean(0)) for pair in pairs)
    one = ablate(model, kind="resample", reference=tokens(ROWS), draws=1)
    assert one.spread is None
    same = ablate(model, kind="resample", reference=tokens(IDS[:1]))
    assert (
        same.effect[0].abs().max() < rounding(model) * same.base.abs().max() and same.effect[1].abs().max() > 1e-3
    )  # the first row's own values


def test_scores() -> None:
    model = tiny_model("llama", torch.float64)
    one = S.z[1, 2].at(-1).zero()
    for name, by in (
        ("logprob", LOGPROB), ("probability", score.probability(TARGET)),
        ("logit_diff", score.logit_diff(TARGET, torch.tensor([9, 9]))),
    ):  # fmt: skip
        found = ablate(model, score=name, answer=[3, 7], other=9)
        wanted = judged(model, tokens(IDS), one, by)
        close(found.base + found.effect[:, 1, 2, 0], wanted, model)
    found = ablate(model, score="kl")
    clean, changed = (model.run(IDS, edits=e, logits=-1).logits.as_subclass(Tensor).log_softmax(-1) for e in ((), one))
    close(found.effect[:, 1, 2, 0], (clean.exp() * (clean - changed)).sum(-1), model)
    assert not found.base.any() and found.unit == "nats"
    text = replace(tokens(IDS), spans={"target": ((ic.Span(4, 7),), (ic.Span(4, 7),))})
    found = ablate(model, text, score="nll", at=3)
    logprob = model.run(text, edits=S.z[1, 2].at(3).zero()).logits.as_subclass(Tensor).log_softmax(-1)
    wanted = -sum(logprob[torch.arange(2), i - 1, IDS[:, i]] for i in (4, 5, 6))
    close(found.base + found.effect[:, 1, 2, 0], wanted, model)
    own = score.Score("norm", lambda x: x.norm(dim=-1))
    assert ablate(model, score=own).unit == "norm"


def test_the_toy_needs_the_heads_of_layer_two() -> None:
    """Resampled from prompts with other relations, the heads that read the relation are what matters most."""
    found = ablate(toy_model(), CLEAN, kind="resample", reference=[FRENCH, PLURAL], score="kl", by="layer")
    assert int(found.mean[:, 0].argmax()) == 2
    assert float(found.mean[2, 0]) > 10 * float(found.mean[[0, 1, 3, 4, 5], 0].max())


def test_other_engines_give_the_same() -> None:
    hf = testing.tiny("llama")
    both = [
        ablate(ic.load(hf, engine=engine), kind="resample", reference=tokens(ROWS[:2]), site="mlp_out")
        for engine in ("torch", "nnsight")
    ]
    torch.testing.assert_close(both[0].effect, both[1].effect, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["toy:text", "gpt2", "llama", "qwen3_moe"])
def test_it_passes_the_kit(family: str) -> None:
    model = toy_model() if ":" in family else tiny_model(family)
    reference = ["Q: dog\nA: cats\n\nQ: hot\nA:", PLURAL] if ":" in family else tokens(OTHER)
    mean = {"kind": "mean", "reference": reference, "over": "all", "site": "mlp_out"}
    resample = {"kind": "resample", "reference": reference, "score": "kl", "by": "layer"}
    for settings in ({}, mean, resample):
        testing.check_method("ablations", model, settings=settings).raise_if_failed()


def test_pictures_and_pages(tmp_path: Path) -> None:
    found = ablate(toy_model(), CLEAN, kind="resample", reference=[FRENCH, PLURAL], score="kl")
    assert found.png(tmp_path / "map.png").stat().st_size > 10_000
    page = found.to_html(tmp_path / "map.html").read_text()
    assert (
        " nats<br>resample ablation of z at the last position, &#x27;A:&#x27;<" in page
        and "standard deviation over 2 draws" in page
    )
    assert type(found).load(found.save(tmp_path)) == found
    assert {"effect", "spread"} <= set(found.table()[0])
    zero = ablate(toy_model(), CLEAN)
    assert "spread" not in zero.table()[0] and "zero ablation of z" in str(zero)


def test_the_page_says_which_answer_is_lost(tmp_path: Path) -> None:
    lost = ablate(toy_model(), [CLEAN, CLEAN], batch_size=1)
    assert [row["answer"] for row in lost.prompt_rows()] == ["' dry'", "' dry'"]
    rival = ablate(toy_model(), CLEAN, score="logit_diff", other=" wet")
    assert "answer</th>" in rival.to_html(tmp_path / "page.html").read_text() and rival.answer == ("' dry' - ' wet'",)
    assert ablate(toy_model(), [CLEAN, CLEAN], score="kl", batch_size=1).answer == ("", "")


def test_bad_input() -> None:
    model = toy_model()
    for settings, message in (
        ({"kind": "mean"}, r"kind='mean' needs reference=\[…\] prompts"),
        ({"reference": [FRENCH]}, r"kind='zero' takes no reference"),
        ({"kind": "resample", "reference": [FRENCH], "draws": 3}, "3 draws of 1 reference prompts"),
        ({"kind": "resample", "reference": [FRENCH], "draws": 0}, "0 draws"),
        ({"kind": "mean", "reference": ["Q: big"], "at": "each"}, "a reference prompt lacks a position .*over='all'"),
        ({"kind": "mean", "reference": [FRENCH], "site": "pattern", "over": "all"}, "a mean by position only"),
        ({"kind": "mean", "reference": [FRENCH, "Q:"], "site": "pattern"}, "over prompts of one length"),
        ({"score": "logit_diff"}, "needs other="),
        ({"score": "nll"}, "no span 'target'"),
        ({"score": "loss"}, "score"),
        ({"answer": [1, 2]}, "ablations: 2 answers for 1 rows"),
        ({"kind": "median"}, "kind"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            ablate(model, CLEAN, **settings)
