"""Steps behind a prompt, in models where what transformers hands on from one to the next is odd: they are those of one
pass over the whole text, of padded rows too, or refused by name."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

import interp_core as ic
from interp_core import sites as S

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 40, 22]])
VECTOR = torch.linspace(-3, 3, 64, dtype=torch.float64)


@pytest.mark.parametrize("name", ["camembert", "xmod", "whisper"])
def test_steps_are_those_of_one_pass(name: str) -> None:
    """RoBERTa's kin count positions from behind the padding id, Whisper's forward does not name them."""
    model = tiny_model(name, torch.float64)
    edits, site = [S.resid_post[0].at(2).add(VECTOR), S.mixer_out[1].at(4).scale(1.5)], S.resid_post[-1]
    made = model.generate(PROMPT, edits, site, max_new_tokens=4, stop_at_eos=False)
    forced = model.run(torch.cat([PROMPT, made.ids], 1)[:, :-1], read=site, edits=edits)
    assert forced.logits.plain[0, -4:].argmax(-1).tolist() == made.ids[0].tolist()
    torch.testing.assert_close(made[site].plain, forced[site].plain, atol=1e-6, rtol=1e-6)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    both = model.generate(ic.Tokens(PROMPT.repeat(2, 1), mask), read=site, max_new_tokens=4, stop_at_eos=False)
    alone = model.generate(PROMPT[:, 3:], read=site, max_new_tokens=4, stop_at_eos=False)
    assert both.ids[1].tolist() == alone.ids[0].tolist()
    torch.testing.assert_close(both.steps[3][site].plain[1], alone.steps[3][site].plain[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["minimax", "git"])
def test_padding_that_steps_take_for_text_is_refused(name: str) -> None:
    """Their passes over a padded text are right."""
    model, mask = tiny_model(name), torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    padded = ic.Tokens(PROMPT.repeat(2, 1), mask)
    assert model.generate(PROMPT, max_new_tokens=2, stop_at_eos=False).ids.shape == (1, 2)
    with pytest.raises(ic.CapabilityError, match=f"a row of this {name} that is padded gets other logits from what"):
        model.generate(padded, max_new_tokens=2)
    torch.testing.assert_close(
        model.run(padded).logits.plain[1, 3:], model.run(PROMPT[:, 3:]).logits.plain[0], atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "why"), [("moshi", "gets other logits from what"), ("openai-gpt", "computes the whole text again")]
)
def test_steps_of_another_text_are_refused(name: str, why: str) -> None:
    """Moshi's cache forgets what its attention sees in one pass, the first GPT has none."""
    with pytest.raises(ic.CapabilityError, match=f"generate: this {name} .*{why}"):
        tiny_model(name).generate(PROMPT, S.resid_post[0].scale(1.1), max_new_tokens=2)


@pytest.mark.parametrize("name", ["xlstm", "whisper"])
def test_logits_of_every_step_can_be_read(name: str) -> None:
    """Of models that cannot leave logits out, too."""
    made = tiny_model(name).generate(PROMPT, read=S.logits, max_new_tokens=2, stop_at_eos=False)
    assert made.steps[0][S.logits].shape == (1, 7, 96) and made.steps[1][S.logits].shape == (1, 1, 96)
