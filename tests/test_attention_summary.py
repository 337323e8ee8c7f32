"""Attention in numbers equals sums written out term by term; padding and batches change nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model
from interp_plugins.attention_summary import MEASURES, measured, sinks_of
from studying import IDS, tokens
from tolerances import close

import interp_core as ic
from interp_core import sites as S
from interp_core import testing

TEXTS = ["Q: big\nA: small\n\nQ: hot\nA:", " moon tree dog moon", "Q: wet\nA:"]


def summary(model: ic.Model, x: Any = None, **settings: Any) -> Any:
    return ic.method("attention_summary")(model, tokens(IDS) if x is None else x, **settings)


def by_hand(a: list[list[float]], queries: list[int], threshold: float = 0.3) -> list[float]:
    """The measures of one head, key by key."""
    n, sinks = len(a), []
    for k in range(n):
        after = [a[i][k] for i in range(k + 1, n)]
        if after and len(after) >= n / 4 and sum(after) / len(after) >= threshold:
            sinks.append(k)
    sums = [0.0] * 5
    for i in queries:
        off = 1 - sum(a[i])
        shares = [p for p in [*a[i], off if off > 1e-5 else 0.0] if p > 0]
        sums[0] -= sum(p * math.log(p) for p in shares)
        sums[1] += a[i][0]
        sums[2] += sum(a[i][k] for k in sinks)
        sums[3] += off if off > 1e-5 else 0.0
        sums[4] += sum(p * (i - j) for j, p in enumerate(a[i])) / sum(a[i])
    return [total / len(queries) for total in sums]


@pytest.mark.parametrize(
    ("family", "at"), [("toy", None), ("toy", -1), ("gpt2", [0, 3]), ("gemma2", None), ("gpt_oss", None)]
)
def test_it_equals_sums_term_by_term(family: str, at: Any) -> None:
    """Windows and learnt sinks included."""
    model = toy_model() if family == "toy" else tiny_model(family)
    x = model.tokens(TEXTS[0]) if family == "toy" else tokens(IDS)
    found, run = summary(model, x, at=at), model.run(x, read=S.pattern)
    queries = x.columns(at)
    for row in range(len(x)):
        for layer in range(model.n_layers):
            for head, pattern in enumerate(run[S.pattern[layer]].plain[row].tolist()):
                wanted = by_hand(pattern, queries[row])
                mine = [float(getattr(found, name)[row, layer, head]) for name in MEASURES]
                assert mine == pytest.approx(wanted, abs=2e-5), (layer, head)
    assert bool((found.off > 0).any()) == (family == "gpt_oss")


def test_heads_whose_numbers_are_known() -> None:
    n = 8
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    first = torch.zeros(n, n)
    first[:, 0] = 1
    itself = torch.eye(n)
    third = torch.eye(n)
    third[3:] = 0
    third[3:, 2] = 1  # everything after the third token looks at it
    a = torch.stack([even, first, itself, third])
    sinks = sinks_of(a, 0.3)
    assert [row.nonzero().flatten().tolist() for row in sinks] == [[], [0], [], [2]]
    found = measured(a, torch.arange(n), sinks)
    assert found[0, 0] == pytest.approx(sum(math.log(i) for i in range(1, n + 1)) / n)
    torch.testing.assert_close(found[0, 1:], torch.zeros(3))
    torch.testing.assert_close(found[1], torch.tensor([sum(1 / i for i in range(1, n + 1)) / n, 1, 1 / n, 1 / n]))
    torch.testing.assert_close(found[2], torch.tensor([0, 1, 0, 6 / 8]))
    torch.testing.assert_close(found[4], torch.tensor([3.5 / 2, 3.5, 0, (1 + 2 + 3 + 4 + 5) / 8]))
    assert not found[3].any()


def test_padding_is_no_key_and_batches_change_nothing() -> None:
    model = toy_model()
    together, parts = summary(model, TEXTS), summary(model, TEXTS, batch_size=2)
    for row, text in enumerate(TEXTS):
        alone = summary(model, text)
        for name in (*MEASURES, "even"):
            close(getattr(together, name)[row], getattr(alone, name)[0], model)
            close(getattr(parts, name)[row], getattr(alone, name)[0], model)
        assert together.sinks[row] == alone.sinks[0] == parts.sinks[row]


def test_a_head_that_looks_back_one_token() -> None:
    """The toy's previous-token heads are one token away, and even attention is what the result says it is."""
    found = summary(toy_model(), TEXTS)
    assert (found.mean("distance")[1, :2] - 1).abs().max() < 0.5
    lengths = [len(toy_model().tokens(text).ids[0]) for text in TEXTS]
    assert found.even[:, 4].tolist() == pytest.approx([(n - 1) / 4 for n in lengths])


@pytest.mark.usefixtures("rough_figures")
def test_pages_and_files(tmp_path: Path) -> None:
    found = summary(toy_model(), TEXTS, layers=[1, 2])
    mean = float(found.first.mean())
    assert f"{mean:.0%} of attention goes to the first token" in found.finding and "of 3 prompts" in found.finding
    page = found.to_html(tmp_path / "page.html").read_text()
    sinks = replace(found, sinks=(((0, "Q:", 3), (7, " hot", 1)), (), ()))
    assert sinks.prompt_rows()[0]["sinks"] == "position 0, 'Q:': 3 heads; position 7, ' hot': 1 head"
    assert "off       share that a learnt sink takes, which is no token" in str(found)
    assert "Even attention" in page and "Attention on sinks" in page and "on the learnt sink" not in page
    assert found.png(tmp_path / "map.png").stat().st_size > 1_000 and len(found.charts()) == 4
    assert type(found).load(found.save(tmp_path / "saved")) == found and len(found.table()) == 8
    assert found.layers == (1, 2) and len(summary(tiny_model("gpt_oss")).charts()) == 5


def test_layers_of_linear_attention_are_left_out() -> None:
    model = tiny_model("qwen3_5")
    assert list(summary(model).layers) == model.layers(S.pattern) != list(range(model.n_layers))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
def test_it_passes_the_kit(family: str) -> None:
    testing.check_method("attention_summary", tiny_model(family)).raise_if_failed()


def test_bad_input() -> None:
    for settings, message in (
        ({"at": 40}, "no position 40"),
        ({"layers": [9]}, "no layer 9"),
        ({"layers": []}, "an empty list"),
        ({"threshold": 0}, "threshold"),
    ):
        with pytest.raises(ic.InterpError, match=message):
            summary(toy_model(), TEXTS, **settings)
