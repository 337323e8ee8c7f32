"""Generation: edits and reads at every step mean what they say, and batches equal single rows."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import FAMILIES, nth, sampled, tiny_model
from tolerances import agreeing, close, rounding, same_choice

import interp_core as ic
from interp_core import sites as S
from interp_core.bench import count_calls
from interp_core.engines.program import HookProgram
from interp_core.positions import Rows, Slice, position, selects_newest, settled

NARROW = {"num_hidden_layers": 4, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
NEW = 6


def by_recomputing(
    model: ic.Model, tokens: ic.Tokens, edits_at: object, new: int = NEW, like: torch.Tensor | None = None
) -> list[int]:
    """Greedy tokens without a cache: the whole sequence again at every step, edits given for the sequence so far.

    Where the two largest logits lie within rounding of a tie, the token of `like` `[new]` is as good.
    """
    ids = tokens.ids
    for step in range(new):
        row = ic.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        logits = model.run(row, edits=edits_at(ids.shape[1])).logits[0, -1].as_subclass(torch.Tensor)  # type: ignore[operator]
        best = int(logits.argmax())
        if like is not None and same_choice(int(like[step]), best, logits, rounding(model)):
            best = int(like[step])
        ids = torch.cat([ids, torch.tensor([[best]])], 1)
    return ids[0, tokens.ids.shape[1] :].tolist()


@cache
def on_engine(family: str, engine: str) -> ic.Model:
    """A model on an engine; the bridge's own attention gives NaN in float64 for rows of padding."""
    dtype = torch.float32 if engine == "transformer_lens" else torch.float64
    return tiny_model(family, dtype) if engine == "torch" else tiny_model(family, dtype).on(engine)


def single(ids: list[int]) -> ic.Tokens:
    return ic.Tokens(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))


PROMPT = [5, 17, 33, 8, 61, 40, 22]
VECTOR = torch.linspace(-3, 3, 64, dtype=torch.float64)


@pytest.mark.parametrize("family", sampled())
def test_positions_mean_the_same_with_and_without_cache(family: str) -> None:
    model = tiny_model(family, torch.float64)
    n, first = len(PROMPT), nth(model, "v", 0)
    keys = S.k if "k" in model.sites else S.rot_k
    cases = {
        "everything": (S.resid_post[0].add(VECTOR), lambda _: S.resid_post[0].add(VECTOR)),
        "one position": (S.mlp_out[1].at(2).zero(), lambda _: S.mlp_out[1].at(2).zero()),
        "prompt": (S.attn_out[1].at("prompt").scale(2.0), lambda _: S.attn_out[1].at(slice(0, n)).scale(2.0)),
        "values": (S.v[first, 0].at(slice(0, 3)).zero(), lambda _: S.v[first, 0].at(slice(0, 3)).zero()),
        "keys": (keys[1].at([1, 2]).scale(-1.0), lambda _: keys[1].at([1, 2]).scale(-1.0)),
        "knockout": (
            S.pattern[1].knockout(query=slice(5, None), key=[4]),
            lambda length: S.pattern[1].knockout(query=slice(5, length), key=[4]),
        ),
        "generated": (
            S.resid_post[1].at("generated").add(VECTOR),
            lambda length: S.resid_post[1].at(slice(n, None)).add(VECTOR) if length > n else (),
        ),
        "last, then all since": (
            S.resid_post[1].at(-1).add(VECTOR),
            lambda _: S.resid_post[1].at(slice(n - 1, None)).add(VECTOR),
        ),
    }
    for name, (edit, again) in cases.items():
        made = model.generate(single(PROMPT), edits=edit, max_new_tokens=NEW, stop_at_eos=False, allow_noop=True)
        assert made.ids[0].tolist() == by_recomputing(model, single(PROMPT), again, like=made.ids[0]), name


def test_rotated_keys_stay_edited_while_generating() -> None:
    model = tiny_model("llama", torch.float64)
    edit = S.rot_k[1].at([1, 3]).scale(-2.0)
    made = model.generate(single(PROMPT), edits=edit, max_new_tokens=NEW, stop_at_eos=False)
    assert made.ids[0].tolist() == by_recomputing(model, single(PROMPT), lambda _: edit, like=made.ids[0])
    assert made.receipts[0].fired == 1  # on the prompt; from then on it is what the steps attend to


def test_sliding_windows_keep_absolute_key_positions() -> None:
    for family in ("mistral", "gemma3"):
        model = tiny_model(family, torch.float64)
        edit = S.pattern[0].knockout(query=slice(6, None), key=[5])
        made = model.generate(single(PROMPT), edits=edit, max_new_tokens=NEW, stop_at_eos=False)
        wanted = by_recomputing(
            model,
            single(PROMPT),
            lambda length: S.pattern[0].knockout(query=slice(6, length), key=[5]),
            like=made.ids[0],
        )
        assert made.ids[0].tolist() == wanted, family


@pytest.mark.parametrize("family", sampled())
def test_padded_batches_equal_single_rows(family: str, padded: ic.Tokens) -> None:
    dtype = torch.float32 if family == "gemma2" else torch.float64  # see test_padding_changes_nothing
    model = tiny_model(family, dtype)
    vector = VECTOR.to(dtype)
    edits = [
        S.resid_post[1].at(-1).add(vector),
        S.z[nth(model, "z", 0), 1].at(0).zero(),
        S.v[2].at("prompt").scale(0.5),
    ]
    reads = [S.resid_post[2], S.z[1], S.logits]
    batch = model.generate(padded, edits=edits, read=reads, max_new_tokens=NEW, stop_at_eos=False)
    for i, row in enumerate(padded):
        alone = model.generate(row, edits=edits, read=reads, max_new_tokens=NEW, stop_at_eos=False)
        logits = torch.stack([step[S.logits][0, -1] for step in alone.steps])
        n = row.lengths[0] + NEW - 1
        start = batch.tokens.ids.shape[1] - 1 - n
        same = n - NEW + agreeing(batch.ids[i], alone.ids[0], logits, rounding(model))
        for site in (S.resid_post[2], S.z[1, 2]):
            close(batch[site][i, start : start + same], alone[site][0, :same], model)
    assert batch.receipts[0].positions == tuple(tuple(range(n - 1, n + NEW - 1)) for n in padded.lengths)
    assert batch.receipts[1].positions == ((0,),) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_over_steps_equal_one_pass(family: str) -> None:
    model = tiny_model(family)
    values = S.v[nth(model, "v", 0)]
    sites = [S.resid_post, S.z[1], values] + ([S.rot_k[1]] if model.atlas.layers("rot_k") else [])
    made = model.generate(single(PROMPT), read=sites, max_new_tokens=NEW, stop_at_eos=False)
    whole = model.run(single([*PROMPT, *made.ids[0, :-1].tolist()]), read=sites)
    for site in (S.resid_post, S.z[1, 3], values) + ((S.rot_k[1],) if len(sites) > 3 else ()):
        close(made[site], whole[site], model)
    assert len(made.steps) == NEW
    assert made.steps[0][S.resid_post[1]].shape[1] == len(PROMPT)
    assert made.steps[3][S.resid_post[1]].shape[1] == 1
    assert made[S.resid_post[1]].at(-1).shape == (1, 64)
    assert torch.equal(made.steps[0][S.resid_post[1]].at(2), made[S.resid_post[1]][:, 2])
    assert torch.equal(made.steps[2][S.resid_post[1]].at(-1), made[S.resid_post[1]][:, len(PROMPT) + 1])


def test_patterns_by_step(toy: ic.Model) -> None:
    text = "Q: big\nA: small\n\nQ: hot\nA:"
    made = toy.generate(text, read=S.pattern[2], max_new_tokens=4, stop_at_eos=False)
    n = made.tokens.lengths[0] - 4
    assert [tuple(step[S.pattern[2]].shape[2:]) for step in made.steps] == [(n, n), (1, n + 1), (1, n + 2), (1, n + 3)]
    with pytest.raises(ic.ReadError, match="keys grow with every step"):
        made[S.pattern[2]]
    with pytest.raises(ic.ReadError, match="was not read in this step"):
        made.steps[0][S.resid_post[1]]


def test_reads_at_positions_by_step(toy: ic.Model) -> None:
    made = toy.generate(
        "Q: big\nA:", read=[S.resid_post[2].at(0), S.resid_post[2].at(-1)], max_new_tokens=3, stop_at_eos=False
    )
    assert made.steps[0][S.resid_post[2].at(0)].shape == (1, 128)
    assert made.steps[1][S.resid_post[2].at(-1)].shape == (1, 128)
    with pytest.raises(ic.ReadError, match="this pass has none of its positions"):
        made.steps[1][S.resid_post[2].at(0)]
    with pytest.raises(ic.ReadError, match="read the site without positions"):
        made[S.resid_post[2].at(0)]


def test_without_edits_equals_transformers(toy: ic.Model) -> None:
    tokens = toy.tokens("Q: big\nA: small\n\nQ: hot\nA:")
    made = toy.generate(tokens, max_new_tokens=8)
    plain = toy.hf.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=8, do_sample=False)
    assert made.ids[0].tolist() == plain[0, tokens.ids.shape[1] :].tolist()
    assert made.texts[0].startswith(" cold\n\nQ:")
    assert str(made) == made.texts[0]
    assert made.tokens.rows.names["generated"][0][0] == tokens.lengths[0]


def test_sampling_repeats_under_seed_and_leaves_the_generator(toy: ic.Model) -> None:
    state = torch.get_rng_state()
    runs = [
        toy.generate("Q:", max_new_tokens=8, do_sample=True, temperature=1.5, seed=s).ids.tolist() for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        toy.generate("Q:", max_new_tokens=4, do_sample=True, top_k=1, seed=0).ids.tolist()
        == toy.generate("Q:", max_new_tokens=4).ids.tolist()
    )


def test_rows_stop_at_their_own_end(toy: ic.Model) -> None:
    push = torch.zeros(2, 1469)
    push[0, toy.tokenizer.eos_token_id] = 1000.0
    texts = ["VAR V3 84.\n? V3", "Q: big\nA: small\n\nQ: hot\nA:"]
    made = toy.generate(texts, edits=S.logits.at(-1).add(push), max_new_tokens=6)
    assert made.texts[0] == "" and made.texts[1].startswith(" cold")
    free = toy.generate(texts, max_new_tokens=6)
    assert free.texts[0].startswith(" 84") and free.texts[1] == made.texts[1]


def test_positions_beyond_the_prompt(toy: ic.Model) -> None:
    n = toy.tokens("Q: big\nA:").lengths[0]
    made = toy.generate(
        "Q: big\nA:", edits=S.resid_post[1].at([1, n + 1]).scale(2.0), max_new_tokens=4, stop_at_eos=False
    )
    assert made.receipts[0].positions == ((1, n + 1),) and made.receipts[0].fired == 2
    made = toy.generate(
        "Q: big\nA:", edits=S.mlp_out[1].at(ic.Span(n, n + 2)).zero(), max_new_tokens=4, stop_at_eos=False
    )
    assert made.receipts[0].positions == ((n, n + 1),)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_beams": 4}, ic.PlanError, "num_beams"),
        ({"num_return_sequences": 2}, ic.PlanError, "num_return_sequences"),
        ({"use_cache": False}, ic.PlanError, "use_cache"),
        ({"max_new_tokens": 0}, ic.PlanError, "at least 1"),
        ({"max_new_tokens": 300}, ic.TextError, "do not fit the model's context of 256"),
        ({"edits": S.resid_post[9].zero()}, ic.SiteError, "no layer 9"),
        ({"edits": S.resid_post[0].at(40).zero()}, ic.PositionError, "no position 40"),
        ({"edits": S.resid_post[0].at(slice(1, None)).set(torch.zeros(3, 128))}, ic.PlanError, "these positions move"),
        ({"edits": S.resid_post[0].set(torch.zeros(1, 4, 128))}, ic.PlanError, "these positions move"),
    ],
)
def test_bad_requests(toy: ic.Model, options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        toy.generate("Q: big\nA:", **{"max_new_tokens": 4, **options})  # type: ignore[arg-type]


def test_values_per_position_act_on_the_prompt(toy: ic.Model) -> None:
    text = "Q: big\nA: small\n\nQ: hot\nA:"
    n = toy.tokens(text).lengths[0]
    other = toy.run(text.replace("small", "grand"), read=S.resid_post[1])[S.resid_post[1]]
    for place in ("prompt", ic.Span(0, n)):
        made = toy.generate(text, edits=S.resid_post[1].at(place).set(other), max_new_tokens=3)
        assert made.receipts[0].fired == 1


def test_an_edit_that_never_fires_is_an_error(toy: ic.Model) -> None:
    with pytest.raises(ic.PositionError, match="selects no position in any row"):
        toy.generate("Q: big\nA:", edits=S.resid_post[1].at("generated").zero(), max_new_tokens=1)
    push = torch.zeros(1469)
    push[toy.tokenizer.eos_token_id] = 1000.0
    with pytest.raises(ic.EffectError, match="never fired"):  # the text ends before its position comes
        toy.generate("Q: big\nA:", edits=[S.logits.add(push), S.resid_post[1].at("generated").zero()], max_new_tokens=3)


LAYOUTS = {
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]],
    "mixed": [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]],
    "holes": [[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0]],
}
ROWS = [[5, 17, 33], [9, 54, 12, 70, 3, 28], [7, 30]]
KINDS = ("gpt2", "llama", "gemma3", "qwen3_moe", "qwen3_next", "falcon")


def laid_out(layout: str) -> dict[str, torch.Tensor]:
    mask = torch.tensor(LAYOUTS[layout])
    ids = torch.full_like(mask, 11)
    ids[mask.bool()] = torch.tensor([token for row in ROWS for token in row])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", [f if f in KINDS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_padding_anywhere_equals_single_rows(family: str) -> None:
    model = tiny_model(family, torch.float32 if family == "gemma2" else torch.float64)
    edits = [S.resid_post[1].at(-1).scale(1.5), S.mlp_out[0].at(1).zero(), S.resid_post[2].at("prompt").scale(0.5)]
    singles = [model.generate(single(row), edits, S.resid_post[2], max_new_tokens=4, stop_at_eos=False) for row in ROWS]
    # windows and states go by columns, holes included: there it is transformers' generate that counts (test_inputs)
    for layout in LAYOUTS if family in ("gpt2", "llama", "qwen3_moe") else ("right", "mixed"):
        x = laid_out(layout)
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[range(3), x["attention_mask"].argmax(1)] = True  # each row's first token, in the caller's columns
        same = S.resid_post[2].at(mask).scale(1.0)
        made = model.generate(x, [*edits, same], S.resid_post[2], max_new_tokens=4, stop_at_eos=False, allow_noop=True)
        assert made.ids.tolist() == [alone.ids[0].tolist() for alone in singles], layout
        assert made.receipts[3].positions == ((0,),) * 3
        for number in range(3):
            alone = [run.receipts[number] for run in singles]
            assert made.receipts[number].positions == tuple(receipt.positions[0] for receipt in alone)  # type: ignore[index]
        for row, run in enumerate(singles):
            read = made[S.resid_post[2]][row, made.tokens.mask[row, :-1]]
            torch.testing.assert_close(read, run[S.resid_post[2]][0].as_subclass(torch.Tensor), atol=1e-3, rtol=1e-3)


ENDING = {
    "last, a value per row": lambda i, dtype: (
        S.resid_post[1].at(-1).add(torch.stack([VECTOR, VECTOR * 2, -VECTOR])[i].to(dtype))
    ),
    "generated": lambda _, __: S.resid_post[1].at("generated").scale(1.5),
    "slice, a function": lambda _, __: S.z[1, 2].at(slice(1, None)).apply(lambda z: z * 2 + 1),
    "everywhere": lambda _, __: S.mlp_out[1].scale(1.2),
    "units everywhere": lambda _, __: S.z[1, [0, 2]].scale(1.3),
    "keys": lambda _, __: S.pattern[1].knockout(query=-1, key=[1]),
    "a head's pattern": lambda _, __: S.pattern[1, 0].at(query=-1, key=[0, 1]).scale(0.5),
    "rotated keys": lambda _, __: S.rot_k[0].at(-1).scale(1.5),
}


@pytest.mark.parametrize("case", ENDING)
@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_rows_that_end_early_equal_the_row_alone(engine: str, case: str) -> None:
    """Ids, lengths, receipts and reads: what follows a row's end is neither text nor changed for it."""
    model, make = on_engine("llama", engine), lambda i: ENDING[case](i, model.dtype)
    near = {"atol": 1e-9, "rtol": 1e-9} if model.dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-3}
    reads = [S.resid_post[2], S.z[0].at(-1)]
    free = [model.generate(single(row), make([i]), max_new_tokens=6, stop_at_eos=False) for i, row in enumerate(ROWS)]
    eos = [int(free[0].ids[0, 2]), int(free[2].ids[0, 4])]
    options = {"max_new_tokens": 6, "eos_token_id": eos, "allow_noop": True}
    singles = [model.generate(single(row), make([i]), reads, **options) for i, row in enumerate(ROWS)]
    assert len({run.ids.shape[1] for run in singles}) > 1
    made = model.generate(laid_out("right"), make(slice(None)), reads, **options)
    assert made.tokens.lengths == [run.tokens.lengths[0] for run in singles]
    assert [list(span) for (span,) in made.tokens.spans["generated"]] == [
        list(run.tokens.spans["generated"][0][0]) for run in singles
    ]
    for row, run in enumerate(singles):
        new = run.ids.shape[1]
        assert made.ids[row, :new].tolist() == run.ids[0].tolist()
        assert made.tokens.labels[row] == run.tokens.labels[0]
        whole = run[S.resid_post[2]][0].as_subclass(torch.Tensor)
        n = made.tokens.rows.real[row][-1]  # the last token of a row was never fed
        torch.testing.assert_close(made[S.resid_post[2]][row, n - len(whole) : n], whole, **near)
        torch.testing.assert_close(made[S.resid_post[2]].at(-1)[row], whole[-1], **near)
        for step in range(made.ids.shape[1]):
            held = made.steps[step].rows(reads[1])[row]
            assert len(held) == (step < new), (row, step)
            if step < new:
                wanted = run.steps[step][reads[1]].as_subclass(torch.Tensor)
                torch.testing.assert_close(held, wanted, **near)
    receipt, alone = made.receipts[0], [run.receipts[0] for run in singles]
    torch.testing.assert_close(receipt.norm, sum(one.norm**2 for one in alone) ** 0.5, rtol=1e-3, atol=0)
    if receipt.positions is not None:
        assert receipt.positions == tuple(one.positions[0] for one in alone)  # type: ignore[index]


def test_positions_of_a_row_that_has_ended() -> None:
    model = tiny_model("llama", torch.float64)
    free = model.generate(laid_out("right"), max_new_tokens=6, stop_at_eos=False)
    options = {"max_new_tokens": 6, "eos_token_id": int(free.ids[2, 1])}
    made = model.generate(laid_out("right"), read=S.resid_post[1], **options)
    assert made.tokens.lengths == [9, 12, 4]
    with pytest.raises(ic.PositionError, match="different numbers of positions per row"):
        made.steps[-1][S.resid_post[1].at(-1)]
    assert [len(row) for row in made.steps[-1].rows(S.resid_post[1].at([-1]))] == [1, 1, 0]
    with pytest.raises(ic.EffectError, match="never fired"):  # position 4 of the last row would be filler
        model.generate(
            laid_out("right"), S.resid_post[1].at([slice(8, 8), slice(11, 11), slice(4, 5)]).zero(), **options
        )


SELECTED = (
    None, -1, -2, 0, 3, 9, "last", "all", "generated", "prompt", slice(None), slice(1, None), slice(9, None),
    slice(12, None), slice(None, -1), slice(None, 9), slice(2, 12), slice(-3, None), slice(None, None, 2), slice(2, 5),
    [0, 3], [-1, 0], [-1, 11], ic.Span(0, 4), ic.Span(6, 11),
)  # fmt: skip


def test_what_is_settled_does_not_change() -> None:
    """`settled` may say no too often, but never yes where a later token is selected otherwise."""
    for chosen in map(position, SELECTED):
        newest = []
        for length in range(1, 60):
            rows = Rows([list(range(length))], {"subject": [[0]]}, length, [7], growing=True)
            newest.append((selects_newest(chosen, rows, 0), settled(chosen, rows, 0)))
        first = next((i for i, (_, done) in enumerate(newest) if done), None)
        assert (first is None) == (chosen == Slice(None, None, 2)), chosen
        if first is not None:
            assert {at for at, _ in newest[first:]} == {newest[first][0]}, chosen


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_steps_that_are_not_looked_up_anew_do_the_same(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, receipts and reads of every selection, with rows that end early and without, as with each step bound."""
    model = on_engine("llama", engine)
    value = VECTOR.to(model.dtype)
    free = model.generate(laid_out("right"), max_new_tokens=12, stop_at_eos=False)
    ending = {"eos_token_id": int(free.ids[2, 4])}
    cases = [
        (single(PROMPT), {"stop_at_eos": False}),
        (laid_out("right"), {"stop_at_eos": False}),
        (laid_out("right"), ending),
    ]

    def made() -> list[ic.Generation]:
        found = []
        for chosen in SELECTED if engine == "torch" else SELECTED[::6]:
            site = S.resid_post[0] if chosen is None else S.resid_post[0].at(chosen)
            edits = [site.add(value), S.z[:, 1].at(-1).scale(1.5)]
            for given, options in cases:
                read = [S.mlp_out[1].at(-1), S.resid_pre[2]]
                found.append(model.generate(given, edits, read, max_new_tokens=12, allow_noop=True, **options))
        return found

    lookups = 0
    steady = HookProgram.steady

    def count(program: HookProgram, rows: Rows) -> object:
        nonlocal lookups
        lookups += 1
        return steady(program, rows)

    monkeypatch.setattr(HookProgram, "steady", count)
    ours = made()
    some = lookups
    monkeypatch.setattr(HookProgram, "steady", lambda program, rows: count(program, rows) and None)
    for one, other in zip(ours, made(), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert [(r.fired, r.positions, r.norm) for r in one.receipts] == [
            (r.fired, r.positions, r.norm) for r in other.receipts
        ]
        for a, b in zip(one.steps, other.steps, strict=True):
            assert [x.tolist() for x in a.rows(S.mlp_out[1].at(-1))] == [
                x.tolist() for x in b.rows(S.mlp_out[1].at(-1))
            ]
        assert torch.equal(one[S.resid_pre[2]], other[S.resid_pre[2]])
    assert some < 0.6 * (lookups - some)


def test_python_calls_of_a_steered_generation() -> None:
    """32 steered tokens add at most 800 to transformers' own, and a step costs the same however long the text is."""
    model = tiny_model("llama", **NARROW)
    ids = torch.randint(3, 90, (1, 8))
    vector = torch.ones(96)
    said = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    model.hf.generation_config.eos_token_id = None

    def calls(new: int) -> tuple[int, int]:
        edit = S.resid_post[1].at(-1).add(vector)
        plain = count_calls(lambda: model.hf.generate(ids, max_new_tokens=new, **said))
        return plain, count_calls(lambda: model.generate(ids, edits=edit, max_new_tokens=new, stop_at_eos=False))

    model.generate(ids, max_new_tokens=2)  # its steps are tried before the first generation
    (plain, ours), (longer, steered) = calls(32), calls(96)
    assert ours - plain <= 800
    assert (steered - longer) - (ours - plain) <= 23 * 64
