"""Options of generation: each of transformers' is honoured exactly, or refused by name before the model runs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from conftest import tiny_model
from transformers import GenerationConfig, GenerationMixin, WatermarkingConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    TemperatureLogitsWarper,
)

import interp_core as ic
from interp_core import decoding
from interp_core import sites as S
from interp_core.testing import tiny

IDS = torch.tensor([[5, 17, 33, 8, 61], [9, 54, 12, 70, 3]])
NEW = 6
NOTHING = S.resid_post[1].scale(1.0)


class Never(LogitsProcessor):
    """Takes one token out."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


class After(StoppingCriteria):
    """Ends a row at a token that is no end-of-sequence token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def plain(model: ic.Model, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    """New tokens of transformers' own `generate`."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    torch.manual_seed(3)
    return model.hf.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def model() -> ic.Model:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def greedy(model: ic.Model) -> torch.Tensor:
    return plain(model)


SAMPLED = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.6, "top_k": 3, "min_p": 0.3, "top_h": 0.3, "typical_p": 0.4,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3,
}  # fmt: skip
HONOURED = {
    "max_new_tokens": 3, "max_length": 9, "min_length": 9, "min_new_tokens": 4, "max_time": 100.0,
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (1, 3.0), "renormalize_logits": True,
    "remove_invalid_values": True, "watermarking_config": WatermarkingConfig(bias=20.0),
    "cache_implementation": "static", "cache_config": {}, "max_cache_len": 32, "disable_compile": True,
    "pad_token_id": 7, "bos_token_id": 3, "forced_bos_token_id": 9, "forced_eos_token_id": 11,
}  # fmt: skip
"""By name, a value; those that name tokens of the greedy text are made in `told`."""
IDLE = (
    "max_time", "renormalize_logits", "remove_invalid_values", "cache_implementation", "cache_config", "max_cache_len",
    "disable_compile", "bos_token_id", "forced_bos_token_id",
)  # fmt: skip
"""Options that change no token of this text."""


def told(name: str, greedy: torch.Tensor) -> dict[str, Any]:
    """An option as both sides are given it, with a value that acts on this text where one can."""
    first, second = int(greedy[0, 0]), int(greedy[1, 1])
    named = {
        "bad_words_ids": [[first, second], [second]], "sequence_bias": [[[first], -50.0]], "suppress_tokens": [first],
        "begin_suppress_tokens": [first], "eos_token_id": [second, int(greedy[0, 3])],
    }  # fmt: skip
    more: dict[str, Any] = {}
    if name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty", "pad_token_id"):
        more["eos_token_id"] = second
    if name == "max_cache_len":
        more["cache_implementation"] = "static"
    if name in SAMPLED:
        return {"do_sample": True, "top_k": 0, name: SAMPLED[name]}
    return {name: named[name] if name in named else HONOURED[name], **more}


@pytest.mark.parametrize("name", [name for name in decoding.SERVED if name != "stop_strings"])  # see test_stop_strings
def test_honoured_as_transformers_does(name: str, model: ic.Model, greedy: torch.Tensor) -> None:
    options = told(name, greedy)
    theirs = {key: value for key, value in options.items() if not (name == "max_length" and key == "max_new_tokens")}
    wanted = plain(model, **({"max_new_tokens": None} if name == "max_length" else {}), **theirs)
    said = options if "max_length" in options or "max_new_tokens" in options else {"max_new_tokens": NEW, **options}
    made = model.generate(IDS, edits=NOTHING, allow_noop=True, seed=3, **said)
    assert made.ids.tolist() == wanted.tolist()
    without = plain(model, **{key: value for key, value in options.items() if key != name})
    assert (wanted.tolist() == without.tolist()) is (name in IDLE), "it should act on this text"
    config = GenerationConfig(**said)
    again = model.generate(IDS, edits=NOTHING, allow_noop=True, seed=3, generation_config=config)
    assert again.ids.tolist() == wanted.tolist()


def test_every_option_of_transformers_is_in_one_list() -> None:
    fields = {name for name in vars(GenerationConfig()) if name not in decoding._NO_FIELDS}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs", "generation_config"}
    known = {*decoding.SERVED, *decoding.KEYWORDS, *decoding.REFUSED}
    assert fields | arguments <= known, sorted((fields | arguments) - known)
    assert not {*decoding.SERVED, *decoding.KEYWORDS} & set(decoding.REFUSED)


@pytest.mark.parametrize("name", decoding.REFUSED)
def test_refused_by_name(name: str, model: ic.Model) -> None:
    with pytest.raises(ic.PlanError, match=rf"generate\({name}=…\)"):
        model.generate(IDS, **{name: object()})
    neutral = decoding._NEUTRAL.get(name)
    assert model.generate(IDS, max_new_tokens=1, **{name: neutral}).ids.shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_model_defaults": False}, "no option 'use_model_defaults'"),
        ({"min_new_token": 3}, "Did you mean 'min_new_tokens'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"cache_implementation": "stative"}, "transformers does not take these options"),
        ({"disable_compile": False}, "disable_compile=False"),
        ({"min_p": 3.0, "do_sample": True}, "transformers does not take these options"),
        ({"bad_words_ids": [5]}, "transformers does not take these options"),
        ({"max_length": 4}, "at least 1, not -1"),
        ({"stop_strings": "x"}, "need a tokenizer"),
        ({"eos_token_id": 5, "stop_at_eos": False}, "leave one of them out"),
        ({"exponential_decay_length_penalty": (1, 2.0), "stop_at_eos": False}, "has none"),
        ({"generation_config": {"min_p": 0.3}}, "is a transformers.GenerationConfig, not dict"),
        ({"generation_config": GenerationConfig(num_beams=3)}, r"generate\(num_beams=…\)"),
        ({"stopping_criteria": [MaxLengthCriteria(9)]}, "say max_new_tokens=… instead"),
        ({"stopping_criteria": [EosTokenCriteria(9)]}, "say eos_token_id=… instead"),
    ],
)
def test_refused_before_the_pass(options: dict[str, Any], says: str, model: ic.Model) -> None:
    calls = []
    handle = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ic.PlanError, match=says):
            model.generate(IDS, **options)
    finally:
        handle.remove()
    assert not calls


@pytest.mark.parametrize("engine", ["torch", "nnsight", "transformer_lens"])
def test_the_models_own_settings_decide_nothing(engine: str, greedy: torch.Tensor) -> None:
    """Whatever a model's `generation_config` holds, only ids that end and fill up texts are taken from it."""
    hf = tiny("llama")
    first, second = int(greedy[0, 0]), int(greedy[0, 1])
    own = {
        **SAMPLED, **HONOURED, "max_new_tokens": 2, "bad_words_ids": [[first]], "sequence_bias": [[[second], -50.0]],
        "suppress_tokens": [first], "begin_suppress_tokens": [first], "num_beams": 3, "num_return_sequences": 2,
        "guidance_scale": 3.0, "max_time": 0.0, "return_dict_in_generate": True, "output_scores": True,
        "use_cache": False, "penalty_alpha": 0.5, "prompt_lookup_num_tokens": 3, "prefill_chunk_size": 2,
        "stop_strings": ["x"], "assistant_early_exit": 1, "token_healing": True,
    }  # fmt: skip
    for name, value in own.items():
        setattr(hf.generation_config, name, value)
    hf.generation_config.cache_implementation = None
    before = copy.deepcopy(vars(hf.generation_config))
    model = ic.load(hf, engine=engine, check=False)
    made = model.generate(IDS, edits=NOTHING, allow_noop=True, max_new_tokens=NEW)
    assert made.ids.tolist() == greedy.tolist()
    assert vars(hf.generation_config) == before


def test_functions_and_further_inputs(model: ic.Model, greedy: torch.Tensor) -> None:
    first = int(greedy[0, 0])
    cases: list[dict[str, Any]] = [
        {"logits_processor": [Never(first)]},
        {"logits_processor": [TemperatureLogitsWarper(0.3)]},
        {"prefix_allowed_tokens_fn": lambda _row, ids: [int(ids[-1]), 4]},
        {"stopping_criteria": [After(first)]},
    ]
    for options in cases:
        wanted = plain(model, **options)
        made = model.generate(IDS, edits=NOTHING, allow_noop=True, max_new_tokens=NEW, **options)
        assert made.ids.tolist() == wanted.tolist(), options
    moe = tiny_model("qwen3_moe")
    assert moe.generate(IDS, max_new_tokens=3, output_router_logits=True).ids.tolist() == (
        plain(moe, max_new_tokens=3, output_router_logits=True).tolist()
    )


def test_a_streamer_sees_the_tokens(model: ic.Model, greedy: torch.Tensor) -> None:
    class Seen:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Seen()
    model.generate(IDS[:1], max_new_tokens=NEW, streamer=streamer)
    assert streamer.tokens == [*IDS[0].tolist(), *greedy[0].tolist(), -1]


def test_stop_strings(toy: ic.Model) -> None:
    texts = ["Q: big\nA: small\n\nQ: hot\nA:", "Q: big\nA: small\n\nQ: wet\nA:"]
    tokens = toy.tokens(texts)
    wanted = plain(toy, tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=8, stop_strings=["\n"],
                   tokenizer=toy.tokenizer, pad_token_id=None)  # fmt: skip
    made = toy.generate(texts, edits=S.resid_post[1].scale(1.0), allow_noop=True, max_new_tokens=8, stop_strings=["\n"])
    assert made.ids.tolist() == wanted.tolist()
    assert [text.count("\n") > 0 for text in made.texts] == [True, True]


def test_options_that_count_padding(model: ic.Model) -> None:
    x = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}
    for name in decoding._PADDED:
        with pytest.raises(ic.PlanError, match=rf"generate\({name}=…\) counts padding as text"):
            model.generate(x, **{name: 7})
    made = model.generate(x, max_new_tokens=NEW, repetition_penalty=5.0)
    alone = model.generate(IDS[:1, 2:], max_new_tokens=NEW, repetition_penalty=5.0)
    assert made.ids[0].tolist() == alone.ids[0].tolist()
