"""Laws of runs, held for every causal model type of transformers that loads: sweeps are full passes, generation with edits
is the teacher-forced run, and a position's numbers do not depend on what stands behind it.

The fast suite has a fixed sample of each; `slow` has all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import FAR
from parity import apart
from sweeping import JUDGED, everywhere, tokens
from torch import Tensor

import interp_core as ic
from interp_core import sites as S
from interp_core import testing
from interp_core.compatibility import matrix
from interp_core.testing.types import types

SWEPT = ("bart", "dots3_note_text", "gemma4_text", "roberta")
"""Decoders that cannot be told positions, or count them from behind the padding id, and layers with other heads."""
GENERATED = ("bart", "deepseek_v32", "falcon", "roberta")
CUT = ("moshi",)
"""Types whose cache is cut to a window that their forward pass does not know, in transformers itself."""
PROMPT = torch.tensor([[5, 17, 33, 8, 61, 40, 22]])

pytestmark = pytest.mark.filterwarnings(
    "ignore:Casting complex values to real:UserWarning"
)  # as Llama 4's tower is built


def every(sample: tuple[str, ...], *, but: tuple[str, ...] = ()) -> Any:
    """All types that load, a sample of them in the fast suite."""
    rows = matrix()["types"]
    loading = [name for name in types() if rows[name]["torch"]["word"] in ("verified", "partial") and name not in but]
    cases = [pytest.param(name, marks=[] if name in sample else [pytest.mark.slow]) for name in loading]
    return pytest.mark.parametrize("model_type", cases)


def loaded(model_type: str) -> ic.Model:
    """A tiny model, in float64 where all its parts run in it."""
    try:
        return ic.load(testing.tiny(model_type, dtype=torch.float64))
    except ic.CapabilityError:
        return ic.load(testing.tiny(model_type))


@every(SWEPT)
def test_sweeps_are_full_passes(model_type: str) -> None:
    model = loaded(model_type)
    edits = everywhere(model)
    swept, full = (model.sweep(tokens(), edits, JUDGED, strategy=name) for name in ("auto", "full"))
    assert apart(swept.values - full.values) <= FAR * apart(full.values)


@every(GENERATED, but=CUT)
def test_generation_with_edits_is_the_teacher_forced_run(model_type: str) -> None:
    model = loaded(model_type)
    edits, reads = steady(model)
    assert edits and reads
    if model_type == "openai-gpt":
        with pytest.raises(ic.CapabilityError, match="keeps nothing from step to step"):
            model.generate(PROMPT, edits, max_new_tokens=5)
        assert model.generate(PROMPT, max_new_tokens=5).ids.shape == (1, 5)
        return
    made = model.generate(PROMPT, edits, reads, max_new_tokens=5, stop_at_eos=False)
    text = torch.cat([PROMPT, made.ids.cpu()], 1)[:, :-1]
    forced = model.run({"input_ids": text, "attention_mask": torch.ones_like(text)}, read=reads, edits=edits)
    assert forced.logits[0, -5:].argmax(-1).tolist() == made.ids[0].tolist()
    for site in reads:
        assert apart(made[site].plain - forced[site].plain) <= FAR * apart(forced[site].plain), site


@pytest.mark.parametrize("model_type", CUT)
def test_types_left_out_contradict_themselves(model_type: str) -> None:
    hf = testing.tiny(model_type, dtype=torch.float64)
    with torch.no_grad():
        steps = hf.generate(
            input_ids=PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        forced = hf(input_ids=steps.sequences[:, :-1], use_cache=False).logits[0, -5:]
    assert apart(torch.cat(steps.logits).to(forced) - forced) > 1e-3 * apart(forced)


METHODS = (
    "ablations", "activation_patching", "attention_rollout", "attention_summary", "attnlrp", "attribution_patching",
    "direct_logit_attribution", "head_detectors", "ifr", "ifr_routes", "input_x_gradient", "integrated_gradients",
    "leave_out", "logit_lens", "path_patching", "random_attribution", "router",
)  # fmt: skip


@every(("bloom", "dots3_note_text"))
def test_methods_answer_or_say_why_not(model_type: str) -> None:
    model = ic.load(testing.tiny(model_type))
    answered = 0
    for name in METHODS:
        settings = {"corrupted": PROMPT.flip(1), "score": ic.score.logprob(33)} if "patching" in name else {}
        try:
            ic.method(name)(model, PROMPT, **settings)
            answered += 1
        except ic.InterpError:
            continue
    assert answered


def steady(model: ic.Model) -> tuple[list[ic.Edit], list[ic.Site]]:
    """Edits and reads that mean the same in a step as in a run over all the text."""
    edits: list[ic.Edit] = []
    for name in ("embed", "z", "head_out", "attn_out", "mixer_out", "mlp_in", "mlp_out", "resid_post"):
        if having(model, name, "write"):
            site = S.named(name) if name == "embed" else S.named(name)[model.atlas.layers(name)[-1]]
            edits += [site.scale(1.3), site.at(4).scale(0.5)]
    names = (
        "resid_post",
        "mixer_in",
        "mixer_out",
        "z",
        "q",
        "k",
        "rot_k",
        "mlp_in",
        "mlp_act",
        "mixer_gate",
        "router_weights",
    )
    return edits, [S.named(name)[model.atlas.layers(name)[0]] for name in names if having(model, name, "read")]


def having(model: ic.Model, name: str, use: str) -> bool:
    return not model.can(name, use) and not model.can(name, "generate")


@every(("bart", "glm_moe_dsa"))
def test_positions_do_not_see_what_stands_behind(model_type: str) -> None:
    """Of models that say so; tiny ones must not decide by ties, as indexers of few heads do."""
    model = loaded(model_type)
    if "causal" in model.atlas.lacking:
        with pytest.raises(ic.CapabilityError, match="see later ones"):
            model.generate(PROMPT)
        return
    text = torch.cat([PROMPT, PROMPT.flip(1)], 1)
    whole = model.run(text).logits.as_subclass(Tensor)
    for n in (3, 7, 10):
        part = model.run(text[:, :n]).logits.as_subclass(Tensor)
        assert apart(part - whole[:, :n]) <= FAR * apart(whole)
