"""toy:vision answers by what it sees, and its generator, its processor and its training are what the docs say."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import interp_core as ic
from interp_core import sites as S
from interp_core.toys import evaluate_vision as evaluate
from interp_core.toys import vision


@cache
def toy() -> ic.Model:
    return ic.load("toy:vision", check=False)


def held_out(number: int, kinds: tuple[str, ...] = evaluate.HELD) -> list[vision.Question]:
    """Questions that training did not see: it draws with integer seeds."""
    return vision.questions(random.Random("test-vision"), number, kinds)


def demand_seeing(shares: dict[str, dict[str, float]]) -> None:
    seen, blind = shares["original"], [shares[how]["all"] for how in evaluate.BLIND]
    assert seen["all"] >= 0.92 and seen["all"] - max(blind) >= 0.5, shares
    assert min(seen[kind] for kind in evaluate.HELD) >= 0.75, seen


@pytest.mark.parametrize("number", [56, pytest.param(420, marks=pytest.mark.slow)])
def test_it_answers_by_what_it_sees(number: int) -> None:
    """To the letter, and with `<|im_end|>` after it."""
    demand_seeing(evaluate.accuracies(toy(), held_out(number)))


def test_a_conversation_with_a_picture() -> None:
    question = next(q for q in held_out(14) if q.kind == "color")
    parts = [{"type": "image", "image": question.images[0]}, {"type": "text", "text": question.question}]
    tokens = toy().chat([{"role": "user", "content": parts}])
    made = toy().generate(tokens, max_new_tokens=8)
    assert made.texts == list(question.answers) and made.ended == [True]
    grid = toy().visual_grid(tokens)[0]
    assert [token.position for token in grid] == [*range(evaluate.FIRST, evaluate.FIRST + 16)]
    (left, top, right, bottom), (seen,) = question.meta["boxes"][0], question.meta["tokens"]
    box = grid[seen].box
    assert box is not None and box[0] <= left < right <= box[2] and box[1] <= top < bottom <= box[3]


def test_a_picture_of_another_question_gives_its_answer() -> None:
    """The picture decides, not the question: the answer follows it."""
    asked = [q for q in held_out(140) if q.kind == "tallest"]
    swapped = evaluate.blinded(asked, "random")
    answers = [other.answers for other in [*asked[1:], asked[0]]]
    followed = [vision.Question(q.name, q.images, q.question, a, q.kind) for q, a in zip(swapped, answers, strict=True)]
    assert np.mean(evaluate.right(toy(), followed)) >= 0.9


def test_the_curve_starts_at_the_blind_run_and_falls() -> None:
    asked = held_out(14)
    effects = evaluate.curve(toy(), asked, "random")
    blind = evaluate.blinded(asked, "random")
    for row in (0, 5):
        answer = int(toy().tokens(asked[row].answers[0]).ids[0, 0])
        clean, other = (
            toy().run(evaluate.prompts(toy(), [q]), logits=-1).logits[0].log_softmax(-1)[answer]
            for q in (asked[row], blind[row])
        )
        torch.testing.assert_close(float(effects[row, 0]), float(clean - other), atol=1e-3, rtol=1e-3)
    mean = effects.mean(0)
    assert mean[0] > 2 and mean[-1] < 0.1 * mean[0] and 0 < evaluate.cliff(mean) < 8, mean


def test_curves_by_text_rows_equal_curves_by_visual_rows() -> None:
    """The definition by hand: visual rows and DeepStack of a blind run put into the clean one."""
    asked = [q for q in held_out(7) if q.kind == "value"]
    blind = evaluate.prompts(toy(), evaluate.blinded(asked, "black"))
    wanted = evaluate.curve(toy(), asked, "black")
    answer = int(toy().tokens(asked[0].answers[0]).ids[0, 0])
    visual, added = S.resid_pre.at("vision"), S.deepstack
    other = toy().run(blind, read=[visual, added])
    clean = evaluate.prompts(toy(), asked)
    base = toy().run(clean, logits=-1).logits[0].log_softmax(-1)[answer]
    for layer in range(8):
        edits = [S.resid_pre[layer].at("vision").set(other[S.resid_pre[layer].at("vision")])]
        if layer == 0:
            edits.append(S.deepstack[0].set(other[S.deepstack[0]]))
        changed = toy().run(clean, edits=edits, logits=-1).logits[0].log_softmax(-1)[answer]
        torch.testing.assert_close(float(base - changed), float(wanted[0, layer]), atol=1e-3, rtol=1e-3)


def test_what_is_asked_about_is_what_matters() -> None:
    """By how far the answer falls where each thing asked about decides it; by how far it moves, wherever it is asked."""
    asked = held_out(28, evaluate.HELD)
    effects = evaluate.importance(toy(), asked)
    scores, moved = evaluate.localisation(effects, asked), evaluate.localisation(effects.abs(), asked)
    assert scores["decides"][0] >= 0.9 and scores["decides"][1] >= 18, scores
    assert moved["all"][0] >= 0.9 and moved["all"][1] >= 20 and moved["decides"][0] >= 0.98, moved


def about(q: vision.Question) -> list[vision.Thing]:
    """The things that the question's words speak of."""
    things, words = q.meta["scene"].things, q.question.rstrip("?").split()
    if q.kind == "tallest":
        return [max(things, key=lambda t: t.height)]
    colors, shapes = [w for w in words if w in vision.COLORS], [w for w in words if w in vision.SHAPES]
    things = [t for t in things if (not colors or t.color in colors) and (not shapes or t.shape in shapes)]
    return sorted(things, key=lambda t: colors.index(t.color) if colors else 0)


ANSWERS = {
    "exist": lambda things: "yes" if things else "no",
    "color": lambda things: things[0].color,
    "shape": lambda things: things[0].shape,
    "count": lambda things: str(len(things)),
    "where": lambda things: "left" if things[0].box[2] <= 16 else "right",
    "value": lambda things: str(things[0].height),
    "tallest": lambda things: things[0].color,
    "compare": lambda things: "yes" if things[0].height > things[1].height else "no",
}


def test_answers_follow_from_scenes() -> None:
    """Each answer again, from the scene and the question's words."""
    asked = vision.questions(random.Random("scenes"), 800)
    assert [q.kind for q in asked[:8]] == list(vision.KINDS) and len({q.name for q in asked}) == len(asked)
    for q in asked:
        things = about(q)
        assert q.answers == (ANSWERS[q.kind](things),), q
        assert sorted(q.meta["boxes"]) == sorted(t.box for t in things)
        assert q.kind not in ("color", "shape", "where", "value") or len(things) == 1


def test_pictures_show_their_scenes() -> None:
    for q in vision.questions(random.Random("pictures"), 80):
        left_over = (q.images[0] != vision.BACKGROUND).any(-1)
        for thing in q.meta["scene"].things:
            left, top, right, bottom = thing.box
            part = q.images[0][top:bottom, left:right]
            own = (part == thing.rgb).all(-1)
            assert own[-1].any() and own[:, 0].any() and own[:, -1].any(), thing
            assert thing.shape != "bar" or (own.all() and own.shape == (4 * thing.height, 6))
            left_over[top:bottom, left:right] &= ~own
        assert not left_over.any()
        cells = {(y // 8) * 4 + x // 8 for a, b, c, d in q.meta["boxes"] for x in range(a, c) for y in range(b, d)}
        assert q.meta["tokens"] == tuple(sorted(cells))


def test_questions_are_the_same_every_time() -> None:
    a, b = (vision.questions(random.Random(3), 24) for _ in range(2))
    for one, other in zip(a, b, strict=True):
        assert np.array_equal(one.images[0], other.images[0])
        assert (one.question, one.answers, one.meta) == (other.question, other.answers, other.meta)


def test_unknown_kinds_are_told() -> None:
    with pytest.raises(ic.TextError, match="no questions of the kind 'colour'. Did you mean 'color'"):
        vision.questions(random.Random(0), 1, ["colour"])


def test_training_reads_what_the_processor_and_the_chat_template_give() -> None:
    from interp_core.toys.train_vision import add, opening

    asked = vision.questions(random.Random("pixels"), 8)
    tokens = evaluate.prompts(toy(), asked)
    for q, ids, mask in zip(asked, tokens.ids, tokens.mask, strict=True):
        line = opening(toy().tokenizer)
        add(line, toy().tokenizer, q.question, q.answers[0], q.kind, 1)
        assert ids[mask].tolist() == line.ids[:-2] and line.target[-3:] == [*line.ids[-2:], -100]
    packed = np.concatenate([vision.patches(q.images[0]) for q in asked])
    assert torch.equal(tokens.inputs["pixel_values"], torch.from_numpy(packed))


def test_packed_questions_are_alone() -> None:
    """A row of training is as many conversations of one turn as it has questions."""
    from interp_core.toys.train_vision import batch

    tokenizer = toy().tokenizer
    made = batch(tokenizer, random.Random(1), pictures=2)
    with torch.no_grad():
        packed = toy().hf(**made.inputs, use_cache=False).logits
    compared = 0
    for row, (ids, kinds) in enumerate(zip(made.inputs["input_ids"], made.kinds, strict=True)):
        for end in torch.nonzero(kinds >= 0).flatten().tolist():
            ends = torch.nonzero(ids[:end] == tokenizer.eos_token_id).flatten().tolist()
            head = 4 + 16 + 1  # the last question begins after the answer before it, whose end is two back
            start = head if len(ends) == 1 else ends[-2] + 1
            alone = torch.cat([ids[:head], ids[start : end + 1]])[None]
            pixels = made.inputs["pixel_values"].view(2, 64, -1)[row]
            with torch.no_grad():
                logits = toy().hf(
                    input_ids=alone, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 8, 8]]),
                    mm_token_type_ids=(alone == toy().hf.config.image_token_id).int(), use_cache=False,
                ).logits[0, -1]  # fmt: skip
            torch.testing.assert_close(packed[row, end], logits, atol=2e-3, rtol=1e-3)
            compared += 1
    toy().hf.model.rope_deltas = None
    assert compared == 12


def test_the_tokenizer_is_the_one_that_is_built() -> None:
    saved, built = toy().tokenizer, vision.build_tokenizer()
    assert saved.get_vocab() == built.get_vocab() and saved.chat_template == built.chat_template
    for q in held_out(80, tuple(vision.KINDS)):
        assert len(saved(q.answers[0])["input_ids"]) == 1
        assert len(saved(q.question)["input_ids"]) == len(q.question.rstrip("?").split()) + 1
        assert saved.decode(saved(q.question)["input_ids"]) == q.question


def test_weights_are_small() -> None:
    from interp_core.loading import toy_folder

    assert sum(p.stat().st_size for p in Path(toy_folder("toy:vision")).iterdir()) < 5 * 2**20


def test_few_steps_of_training_lower_the_loss() -> None:
    """The training script runs and learns; the whole of it takes a quarter of an hour."""
    from interp_core.toys.train_vision import MOST, batch, build, step_loss

    tokenizer = vision.build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(tokenizer)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(6):
        made = batch(tokenizer, rng, MOST[step % 3], pictures=4)
        assert ((made.kinds >= 0).sum(-1) == 6).all()
        loss, _ = step_loss(model, made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_training_from_scratch(tmp_path: Path) -> None:
    """The whole script, as docs/toys.md says."""
    from interp_core.toys.train_vision import train

    train(tmp_path, seed=1)
    demand_seeing(evaluate.accuracies(ic.load(str(tmp_path)), held_out(700)))
