"""toy:moe: its experts specialise by domain, and its generators and its training are what the docs say."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch

import interp_core as ic
from interp_core import sites as S
from interp_core.toys import domains, evaluate_moe
from interp_core.toys.evaluate_moe import Documents


@cache
def toy() -> ic.Model:
    return ic.load("toy:moe", check=False)


@cache
def documents() -> dict[str, Documents]:
    return {name: Documents.of(toy(), name, 8) for name in domains.DOMAINS}


def demand_specialised(effects: dict[str, evaluate_moe.Effect]) -> None:
    for name, effect in effects.items():
        harm, chance = effect.masked[0] - effect.clean[0], effect.random[0] - effect.clean[0]
        assert sum(map(len, effect.banned.values())) == 5
        assert harm > 0.3 and harm >= 3 * chance, f"{name}: {harm:.3f} against {chance:.3f} at random"
        assert abs(effect.elsewhere) < 0.3 * harm, f"{name}: {effect.elsewhere:.3f} elsewhere"


def test_a_domains_cells_hurt_it_and_no_other() -> None:
    """The tenth of all cells that a domain uses most beyond the others, against as many at random in every layer."""
    effects = evaluate_moe.effects(toy(), documents(), draws=8)
    assert list(effects) == list(domains.DOMAINS)
    demand_specialised(effects)


def test_it_knows_its_domains() -> None:
    for name, docs in documents().items():
        assert docs.answers.any(-1).all()
        assert evaluate_moe.nll(toy(), docs)[1] < 0.1, name


def test_domains_use_few_experts_and_all_together_all() -> None:
    used = {name: evaluate_moe.usage(toy(), docs) for name, docs in documents().items()}
    for name, shares in used.items():
        torch.testing.assert_close(shares.sum(-1), torch.ones(3))
        assert (evaluate_moe.entropy(shares) < 0.5).all(), name
    assert (evaluate_moe.entropy(torch.stack(list(used.values())).mean(0)) > 0.8).all()


def test_the_context_of_common_words_chooses_the_expert() -> None:
    """ " =" is a token of every domain: which expert it gets is decided by what stands before it."""
    texts = {"geography": "capital France =", "chemistry": "number iron =", "arithmetic": "7 * 8 ="}
    last = {
        name: toy().run(text, read=S.router_weights[1].at(-1))[S.router_weights[1].at(-1)].plain[0].argmax().item()
        for name, text in texts.items()
    }
    assert len(set(last.values())) == 3
    answers = {text: toy().generate(text, max_new_tokens=1).texts[0] for text in texts.values()}
    assert answers == {"capital France =": " Paris", "number iron =": " 26", "7 * 8 =": " 56"}


def test_what_the_domains_know() -> None:
    counts = {name: len(domains.facts(name)) for name in domains.DOMAINS}
    assert counts == {
        "geography": 144, "translation": 453, "grammar": 237, "arithmetic": 269, "brackets": 0, "chemistry": 80,
    }  # fmt: skip
    example = domains.document(random.Random("brackets"), "brackets", 1)
    opened, _, closed = example.text.removesuffix(" ;\n").partition(" = ")
    assert [domains.BRACKETS[each] for each in reversed(opened.split())] == closed.split()
    fact = domains.document(random.Random("fact"), "chemistry", 3)
    assert [fact.text[a:b] for a, b in fact.answers] == [
        domains.facts("chemistry")[line.partition(" =")[0] + " ="] for line in fact.text.splitlines()
    ]


def test_the_tokenizer_is_the_one_that_is_built() -> None:
    saved, built = toy().tokenizer, domains.build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    for name in domains.DOMAINS:
        example = domains.document(random.Random(f"tokens {name}"), name)
        encoded = saved(example.text, return_offsets_mapping=True)
        assert set(example.answers) <= set(map(tuple, encoded["offset_mapping"]))
        assert saved.decode(encoded["input_ids"]) == example.text


def test_weights_are_small() -> None:
    from interp_core.loading import toy_folder

    assert sum(p.stat().st_size for p in Path(toy_folder("toy:moe")).iterdir()) < 5 * 2**20


def test_few_steps_of_training_lower_the_loss() -> None:
    from interp_core.toys.train_moe import Routers, build, draw, step_loss
    from interp_core.toys.train_text import marked

    tokenizer = domains.build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(tokenizer)
    rng, routers = random.Random(0), Routers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss, _ = step_loss(model, routers, *marked(tokenizer, draw(rng)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    routers.remove()
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_training_from_scratch(tmp_path: Path) -> None:
    """The whole script, as docs/toys.md says: two minutes on one core."""
    from interp_core.toys.train_moe import train

    train(tmp_path, seed=1)
    model = ic.load(str(tmp_path))
    demand_specialised(evaluate_moe.effects(model, {name: Documents.of(model, name) for name in domains.DOMAINS}))
