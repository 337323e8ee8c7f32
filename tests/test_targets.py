"""Targets of scores: ids, words, and lists of them, on runs, in sweeps and in studies; words of several tokens say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, toy_model

import interp_core as ic
from interp_core import score
from interp_core import sites as S

TEXTS = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: wet\nA:"]
SCORES: dict[str, Callable[[Any], score.Score]] = {
    "logprob": score.logprob,
    "probability": score.probability,
    "logit": score.logit,
    "rank": score.rank,
    "logit_diff": lambda target: score.logit_diff(target, " big"),
}


def ids(*words: str) -> list[int]:
    return [int(toy_model().tokens(word, bos=False).ids[0, 0]) for word in words]


@pytest.mark.parametrize("name", SCORES)
def test_words_and_lists_are_their_ids(name: str) -> None:
    """One for all rows or one per row, ids and words mixed; on a run and in a sweep the same numbers to the bit."""
    model, make, (cold, dry) = toy_model(), SCORES[name], ids(" cold", " dry")
    run = model.run(TEXTS)
    variants = [S.z[2, 1].at(-1).zero(), S.mlp_out[3].at(-1).zero()]
    for target, wanted in (
        (" cold", cold),
        ([" cold", " dry"], torch.tensor([cold, dry])),
        ([cold, " dry"], [cold, dry]),
    ):
        assert torch.equal(make(target)(run), make(wanted)(run))
        swept, same = model.sweep(TEXTS, variants, (make(target), make(wanted)))
        assert torch.equal(swept.values, same.values) and torch.equal(swept.clean, same.clean)
        assert swept.values.shape == (2, 2)


def test_a_folder_knows_a_word_by_its_id(tmp_path: Path) -> None:
    model, variants = toy_model(), [S.z[2, 1].at(-1).zero()]
    first = model.sweep(TEXTS[0], variants, score.logprob(" cold"), out=tmp_path)
    again = model.sweep(TEXTS[0], variants, score.logprob(ids(" cold")[0]), out=tmp_path)
    assert torch.equal(first.values, again.values)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (" cold wet", r"score logprob: the target ' cold wet' is 2 tokens \(' cold', ' wet'\), a score reads one; give its first"),
        ([" cold", " dry", " wet"], "score logprob: 3 targets for 2 rows; give one per row, or one for all"),
        (torch.tensor([1]), "score logprob has targets of 1 rows, there are 2"),
        ([" cold", 5000], "score logprob: the target 5000 is no token id: the model has 1469, 0 to 1468"),
        ([5, -1], "the target -1 is no token id"),
        ("", "takes a token id, a word"),
        ([], "takes a token id, a word"),
        ([" cold", 2.5], "takes a token id, a word"),
        ([[1]], "takes a token id, a word"),
    ],
)  # fmt: skip
def test_wrong_targets(target: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a run, and in a sweep before anything runs."""
    model = toy_model()
    run = model.run(TEXTS)
    with pytest.raises(ic.PlanError, match=says):
        score.logprob(target)(run)
    monkeypatch.setattr(model.hf, "forward", None)
    with pytest.raises(ic.PlanError, match=says):
        model.sweep(TEXTS, [S.z[1].zero()], score.logprob(target))


def test_words_need_a_tokenizer(tmp_path: Path) -> None:
    model, texts = tiny_model("llama"), torch.tensor([[5, 17, 33]])
    with pytest.raises(ic.TextError, match="loaded without a tokenizer: pass ids"):
        score.logit(" cold")(model.run(texts))
    assert torch.equal(score.logit([7])(model.run(texts)), score.logit(7)(model.run(texts)))
    saved = ic.open_run(toy_model().run(TEXTS[0]).save(tmp_path))
    with pytest.raises(ic.PlanError, match="' cold' is a word, and there is no model to say which token: give its id"):
        score.logit(" cold")(saved)
    assert torch.equal(score.logit(ids(" cold"))(saved), score.logit(" cold")(toy_model().run(TEXTS[0])))


@pytest.mark.parametrize("name", ["activation_patching", "attribution_patching", "ablations"])
def test_studies_take_scores_with_words(name: str) -> None:
    model, settings = toy_model(), {"layers": [1]}
    one = ic.method(name)(model, TEXTS, score=score.logprob([" cold", " dry"]), **settings)
    other = ic.method(name)(model, TEXTS, score=score.logprob(torch.tensor(ids(" cold", " dry"))), **settings)
    assert torch.equal(one.effect, other.effect) and torch.equal(one.base, other.base)


def test_a_score_of_one_position_takes_one(toy: ic.Model) -> None:
    """In sweeps and of runs alike; once a run gave the numbers of all positions together."""
    text = "Q: big\nA: small\n\nQ: hot\nA:"

    def own(at: Any) -> score.Score:
        return score.Score("own", lambda logits: logits[..., 5], at=at)

    with pytest.raises(ic.PlanError, match=r"score own: at= takes a position such as -1.*not None"):
        own(None)
    for at in (slice(0, 3), "all", [2, 3]):
        with pytest.raises(ic.PlanError, match=r"score own reads \d+ positions.*it takes one, or several with span"):
            own(at)(toy.run(text))
        with pytest.raises(ic.PlanError, match=r"score own reads \d+ positions.*it takes one, or several with span"):
            toy.sweep(text, [S.z[2, 1].zero()], own(at))
    run = toy.run(text)
    for at in (2, [[2]], ic.PerRow(((2,),))):
        clean = toy.sweep(text, [S.z[2, 1].zero()], own(at)).clean
        assert own(at)(run).shape == clean.shape and torch.allclose(own(at)(run), clean, rtol=1e-4)
