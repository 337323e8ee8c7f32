"""Runs in many threads: on any models that share modules they give the numbers of one after the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nth
from torch import Tensor, nn

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.engines.turns import Turn, turn_of

Job = Callable[[], Any]


def test_tiles_of_logits_wait_for_their_turn() -> None:
    """They are made when they are asked for, when another thread may be in a pass."""
    model = ic.load(testing.tiny("llama"), check=False)
    tiles = model.unembed_tiles(torch.ones(1, model.d_model), 40)
    made: list[Tensor] = []
    other = threading.Thread(target=lambda: made.extend(tiles))
    with model.turn:
        other.start()
        other.join(0.3)
        assert other.is_alive() and not made
    other.join(30)
    assert sum(tile.shape[-1] for tile in made) == model.d_vocab


def flat(value: Any) -> Tensor:
    """What a job gave, as one tensor."""
    return value.detach().as_subclass(Tensor).double().flatten()


def jobs(models: dict[str, ic.Model], ids: Tensor) -> dict[str, Job]:
    """Runs, generation, sweeps and gradients, on each model with an edit of its own."""
    found: dict[str, Job] = {}
    ids = ids[:1]
    for number, (name, model) in enumerate(models.items()):
        factor = 0.5 + number
        edit = S.resid_post[1].at(-1).scale(factor)
        heads = [
            S.z[i, h].at(-1).scale(factor - 0.7) for i, h in model.heads[: 6 if model.engine.name == "torch" else 2]
        ]

        def run(model: ic.Model = model, edit: Any = edit) -> Tensor:
            pattern = S.pattern[nth(model, "pattern", 0)]
            run = model.run(ids, read=[S.z, pattern], edits=edit)
            return torch.cat([flat(run.logits), flat(run[S.z]), flat(run[pattern])])

        def gradient(model: ic.Model = model, edit: Any = edit) -> Tensor:
            return flat(model.run(ids, read=S.resid_post, edits=edit, grad=lambda x: x[0, -1, 3]).grad[S.resid_post])

        def sampled(model: ic.Model = model, edit: Any = edit, seed: int = number) -> Tensor:
            made = model.generate(ids, edits=edit, max_new_tokens=3, do_sample=True, seed=seed, stop_at_eos=False)
            return flat(made.ids)

        def narrow(model: ic.Model = model, heads: Any = heads) -> Tensor:
            return flat(model.sweep(ids, heads, ic.score.logit_diff(5, 6)).values)

        def wide(model: ic.Model = model, heads: Any = heads) -> Tensor:
            return flat(model.sweep(ids, heads, ic.score.logprob(5)).values)

        def lens(model: ic.Model = model, factor: float = factor) -> Tensor:
            return flat(model.readout(torch.linspace(-factor, 1, model.atlas.shape.d_model)[None]))

        own = {"run": run, "gradient": gradient, "generate": sampled, "narrow": narrow, "wide": wide, "lens": lens}
        found |= {f"{name}: {kind}": job for kind, job in own.items()}
    return found


def tally(found: dict[str, Job], n_threads: int, times: int) -> Counter[str]:
    """Every job `times` times in each thread, in another order: how often it was right, wrong, or raised what."""
    wanted = {name: job() for name, job in found.items()}
    names, counts, start = list(found), Counter[str](), threading.Barrier(n_threads)

    def work(number: int) -> None:
        start.wait()
        for turn in range(times * len(names)):
            name = names[(turn * (2 * number + 1) + number) % len(names)]
            try:
                value = found[name]()
                right = value.shape == wanted[name].shape and torch.allclose(value, wanted[name], atol=1e-4, rtol=1e-4)
                counts["right" if right else f"{name} wrong"] += 1
            except Exception as error:
                counts[f"{name} {type(error).__name__}: {error}"] += 1

    together(*[lambda number=number: work(number) for number in range(n_threads)])
    return counts


def together(*works: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "threads wait for each other"


def siblings(family: str, engines: tuple[str, ...]) -> dict[str, ic.Model]:
    """Models that share modules: loaded twice, and on other engines."""
    hf = testing.tiny(family)
    one = ic.load(hf)
    return {"one": one, "again": ic.load(hf)} | {engine: one.on(engine) for engine in engines}


@pytest.mark.parametrize(("family", "engines"), [("llama", ("nnsight", "transformer_lens")), ("gpt2", ())])
def test_any_mix_gives_what_one_after_the_other_gives(family: str, engines: tuple[str, ...], ids: Tensor) -> None:
    found = jobs(siblings(family, engines), ids)
    assert tally(found, 2, 1) == {"right": 2 * len(found)}


@pytest.mark.slow
@pytest.mark.parametrize("family", testing.families())
def test_any_mix_at_length(family: str, ids: Tensor) -> None:
    found = jobs(siblings(family, ("nnsight",)), ids)
    assert tally(found, 4, 5) == {"right": 20 * len(found)}


def test_the_first_sweeps_of_a_model_try_a_strategy_once(ids: Tensor) -> None:
    model = ic.load(testing.tiny("mistral"))
    heads = [S.z[i, h].at(-1).zero() for i, h in model.heads]
    wanted = ic.load(model.hf).sweep(ids, heads, ic.score.logprob(5), strategy="full").values
    found: list[Tensor] = []
    together(*[lambda: found.append(model.sweep(ids, heads, ic.score.logprob(5)).values)] * 4)
    assert [torch.allclose(value, wanted, atol=1e-4) for value in found] == [True] * 4


def test_samples_of_a_seed_belong_to_the_thread(ids: Tensor) -> None:
    """Models that share nothing run at the same time; the process' generator is nobody's to seed."""
    models = [ic.load(testing.tiny(family)) for family in ("llama", "gpt2")]

    def draw(model: ic.Model, seed: int) -> Tensor:
        return model.generate(ids, max_new_tokens=6, do_sample=True, seed=seed, stop_at_eos=False).ids

    wanted = [[draw(model, seed) for seed in range(6)] for model in models]
    found: list[list[Tensor]] = [[], []]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    together(*[lambda i=i: found[i].extend(draw(models[i], seed) for seed in range(6)) for i in (0, 1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(found[i], wanted[i], strict=True))


def test_a_seed_draws_what_transformers_draws(ids: Tensor) -> None:
    model = ic.load(testing.tiny("llama"))
    made = model.generate(ids, max_new_tokens=8, do_sample=True, seed=3, stop_at_eos=False)
    torch.manual_seed(3)
    plain = model.hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(made.tokens.ids, plain)


def test_models_on_nnsight_take_turns(ids: Tensor) -> None:
    models = [ic.load(testing.tiny(family), engine="nnsight") for family in ("llama", "gpt2")]
    found = {str(i): lambda m=m: flat(m.run(ids, read=S.z[1]).logits) for i, m in enumerate(models)}
    assert tally(found, 2, 4) == {"right": 16}


def nested(outer: ic.Model, inner: Callable[[], Any], ids: Tensor) -> Any:
    """An edit of the outer model that runs something inside."""
    return S.resid_post[0].apply(lambda x: (inner(), x)[1])


def test_a_run_inside_a_run_is_refused_whichever_model_of_the_modules_runs_it(ids: Tensor) -> None:
    hf = testing.tiny("llama")
    model, other = ic.load(hf), ic.load(hf)
    for inner in (
        lambda: other.run(ids),
        lambda: other.generate(ids, max_new_tokens=1),
        lambda: other.sweep(ids, [S.z[0, 0].zero()], ic.score.logprob(3)),
        lambda: ic.load(hf),
        lambda: model.on("nnsight"),
    ):
        edit = nested(model, inner, ids)
        for outer in (
            lambda edit=edit: model.run(ids, edits=edit, allow_noop=True),
            lambda edit=edit: model.generate(ids, edits=edit, max_new_tokens=1, allow_noop=True),
            lambda edit=edit: model.sweep(ids, [edit], ic.score.logprob(3)),
            lambda edit=edit: model.sweep(ids, [edit], ic.score.logprob(3), strategy="full"),
        ):
            with pytest.raises(ic.PlanError, match="the model is running"):
                outer()
    assert torch.equal(model.run(ids).logits, other.run(ids).logits)


def test_other_modules_may_run_inside_a_run(ids: Tensor) -> None:
    """Copies with the same weights among them, as ever; and a score may run the model itself."""
    model = ic.load(testing.tiny("llama"))
    apart, copied = ic.load(testing.tiny("gpt2")), model.on("nnsight")
    wanted = [m.run(ids).logits for m in (apart, copied)]
    found: list[Tensor] = []
    for other in (apart, copied):
        edit = nested(model, lambda other=other: found.append(other.run(ids).logits), ids)
        model.run(ids, edits=edit, allow_noop=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    score = ic.score.Score("own", lambda logits: logits[:, 3] - model.run(ids[:1]).logits[0, -1, 3])
    assert model.sweep(ids[:1], [S.z[0, 0].zero()], score).values.isfinite().all()


def test_models_nested_both_ways_do_not_wait_forever(ids: Tensor) -> None:
    """One of the two goes on, the other is refused or came first."""
    models = [ic.load(testing.tiny(family)) for family in ("llama", "gpt2")]
    inside, outcomes = threading.Barrier(2), Counter[str]()

    def work(outer: ic.Model, inner: ic.Model) -> None:
        def meet() -> None:
            inside.wait(60)
            inner.run(ids)

        try:
            outer.run(ids, edits=nested(outer, meet, ids), allow_noop=True)
            outcomes["ran"] += 1
        except ic.PlanError as error:
            outcomes[str(error)[:43]] += 1

    together(lambda: work(*models), lambda: work(*models[::-1]))
    assert outcomes == {"ran": 1, "two threads would wait for each other: this": 1}


class Pair(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def test_modules_that_come_together_later_have_one_turn() -> None:
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    first, second, third = turn_of(a), turn_of(b), turn_of(c)
    with first, second, first:  # held while they are joined: what is held stays held, and can be let go
        both = turn_of(Pair(a, b))
        assert not taken(both) and not taken(first) and not taken(second) and taken(third)
    assert taken(first) and taken(second) and taken(both)
    with second:
        assert not taken(first)
    with turn_of(Pair(b, c)):
        assert not taken(first) and not taken(third)


def taken(turn: Turn) -> bool:
    """Whether another thread could take a turn now."""
    got: list[bool] = []

    def work() -> None:
        lock = turn._into._lock
        got.append(lock.acquire(False))
        if got[0]:
            lock.release()

    together(work)
    return got[0]
