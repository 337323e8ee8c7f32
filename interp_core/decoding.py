"""How the next token is decided: what may be asked of transformers' own generation, and what is handed to it.

Every option is honoured exactly or refused by name before the model runs. What a model's own `generation_config`
holds decides nothing but which ids end a text and fill it up: all else is said by the caller, or is plain greedy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from .errors import PlanError, nearest
from .session import Session
from .text import Tokens

OWN = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k")
SERVED = (
    *OWN, "max_length", "min_length", "min_new_tokens", "max_time", "stop_strings", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "renormalize_logits",
    "remove_invalid_values", "watermarking_config", "cache_implementation", "cache_config", "max_cache_len",
    "disable_compile", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Fields of transformers' `GenerationConfig` that are honoured."""
KEYWORDS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer")
"""Arguments of transformers' `generate` that are honoured."""

_ROWS = "it changes the rows or steps that positions refer to; leave it out"
_TWO_PASSES = "it calls the model more than once per token, and edits would act on each call; leave it out"
_READS = "reads give that: read=S.logits, S.pattern, S.resid_post, … and generation.steps[i][site]"
_INPUT = "it belongs to the input: pass it in x, {'input_ids': …, …}"
_COMPILED = "hooks do not act inside compiled code; leave it out"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("num_beams", "num_return_sequences", "early_stopping", "length_penalty", "diversity_penalty",
         "num_beam_groups", "constraints", "force_words_ids", "use_cache", "prefill_chunk_size", "token_healing",
         "continuous_batching_config", "custom_generate", "decoder_start_token_id", "trust_remote_code"),
        _ROWS,
    ),
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp",
         "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
         "speculation_type", "guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask",
         "penalty_alpha", "low_memory", "dola_layers"),
        _TWO_PASSES,
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        _READS,
    ),
    **dict.fromkeys(("inputs", "input_ids", "attention_mask", "position_ids", "inputs_embeds"), _INPUT),
    "past_key_values": "a step's positions start at the first token; pass the whole text instead of a cache",
    "logits_to_keep": "it is set by what the plan reads and edits; leave it out",
    "compile_config": _COMPILED,
    "synced_gpus": "steps that other processes ask for have no text; leave it out",
}  # fmt: skip
"""What is not honoured, and why: all other fields and arguments of transformers 5.24."""
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "guidance_scale": 1.0, "use_cache": True, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10,
}  # fmt: skip
"""Values that ask for nothing, where that is not False; None never does."""
_PADDED = {
    "max_length": None, "min_length": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "forced_bos_token_id": None,
}  # fmt: skip
"""Options that count padding as text, and the values with which they do nothing."""
_NO_FIELDS = ("transformers_version", "_from_model_config")


class Said(GenerationConfig):  # type: ignore[misc]
    """A configuration that takes nothing from the model's own: transformers fills it from there before it generates."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **fields: Any) -> dict[str, Any]:
        """Take fields over, unless they are the model's (the only call that allows for entries of its own making)."""
        if allow_custom_entries:
            return {}
        unused: dict[str, Any] = super().update(defaults_only=defaults_only, **fields)
        return unused


class Ends:
    """When each row ends: at an end-of-sequence token, or where a criterion says so. Called by transformers after
    every new token.

    Attributes:
        eos: the end-of-sequence tokens.
        follow: called with the number of columns so far, after every new token.
    """

    def __init__(self, eos: Sequence[int], criteria: Sequence[Any]) -> None:
        self.eos, self._criteria = tuple(eos), tuple(criteria)
        self.follow: Callable[[int], None] | None = None
        self._tokens = torch.tensor(self.eos, dtype=torch.long)
        self._done: list[Tensor] = []
        self._endless = not (self.eos or self._criteria)

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Which rows have ended `[batch]`, given all ids so far `[batch pos]`."""
        # Where nothing ends a row, one answer serves for all steps: no tensor is made or kept at each.
        if not self._done or not self._endless:
            self._done.append(self._ended(ids, scores, more))
        if self.follow is not None:
            self.follow(ids.shape[1])
        return self._done[-1]

    def _ended(self, ids: Tensor, scores: Any, more: Mapping[str, Any]) -> Tensor:
        if self._tokens.device != ids.device:
            self._tokens = self._tokens.to(ids.device)
        done = torch.isin(ids[:, -1], self._tokens)
        for criterion in self._criteria:
            done = done | criterion(ids, scores, **more)
        return done | self._done[-1] if self._done else done

    def now(self) -> list[bool]:
        """Which rows have ended; empty before the first new token."""
        return self._done[-1].tolist() if self._done else []

    def lengths(self, new: int) -> list[int]:
        """New tokens of each row, the one that ends it included, of at most `new`."""
        if self._endless:
            return [new] * len(self._done[-1])
        going = (~torch.stack(self._done[:new])).sum(0) + 1
        return going.clamp(max=new).tolist()


class Decoding(NamedTuple):
    """What transformers' `generate` is told.

    Attributes:
        new: at most so many new tokens.
        ends: when each row ends.
        arguments: of transformers' `generate`, beside the model's inputs.
        inputs: options that are further inputs of the model.
    """

    new: int
    ends: Ends
    arguments: dict[str, Any]
    inputs: dict[str, Any]


def decoding(
    model: Session, tokens: Tokens, options: Mapping[str, Any], own: Mapping[str, Any], stop: bool
) -> Decoding:
    """What transformers is told, from all that the caller said.

    Args:
        options: further options, as transformers calls them.
        own: those of `OWN` that were said; they go before `generation_config`.
        stop: end rows at end-of-sequence tokens.

    Raises:
        PlanError: an option that is refused, unknown, or not possible with this input.
    """
    said = dict(options)
    said = {**_fields(said.pop("generation_config", None)), **said}
    said |= {name: value for name, value in own.items() if value is not None}
    inputs = {name: said.pop(name) for name in _model_inputs(model) & set(said)}
    _check(said, tokens)
    said = {name: said[name] for name in said if name not in REFUSED and said[name] is not None}
    keywords = {name: said.pop(name) for name in KEYWORDS if name in said}
    new = _new_tokens(said, tokens.ids.shape[1])
    eos = _special(model, said, stop)
    if not eos and said.get("exponential_decay_length_penalty") is not None:
        raise PlanError("exponential_decay_length_penalty raises end-of-sequence tokens, and this text has none")
    criteria = _criteria(model, said, keywords)
    # transformers warns of settings of sampling beside greedy decoding; and its own defaults sample from 50 tokens.
    if not said.setdefault("do_sample", False):
        said = {name: value for name, value in said.items() if name not in ("temperature", "top_p", "top_k")}
    else:
        said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | said
    try:
        # It would compile the forward pass by itself where the cache is static, and hooks do not act in compiled code.
        config = Said(**{**said, "max_new_tokens": new, "disable_compile": True, "use_cache": True})
    except (ValueError, TypeError) as error:
        raise PlanError(f"transformers does not take these options: {error}") from error
    ends = Ends(eos, criteria)
    return Decoding(new, ends, {**keywords, "generation_config": config, "stopping_criteria": [ends]}, inputs)


def _fields(config: Any) -> dict[str, Any]:
    """What a `GenerationConfig` of the caller says."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise PlanError(f"generation_config is a transformers.GenerationConfig, not {type(config).__name__}")
    return {name: value for name, value in vars(config).items() if value is not None and name not in _NO_FIELDS}


def _model_inputs(model: Session) -> set[str]:
    """Further inputs of the model's forward pass, those that generation sets itself left out."""
    takes = inspect.signature(type(model.hf).forward).parameters.values()
    named = {parameter.name for parameter in takes if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    return named - {"self", "labels", "return_dict", "cache_params", "cache_position"} - set(REFUSED) - set(SERVED)


def _check(said: Mapping[str, Any], tokens: Tokens) -> None:
    """Refuse what is not honoured, by name."""
    for name, value in said.items():
        if name in REFUSED:
            plain = isinstance(value, (bool, int, float, str)) and value == _NEUTRAL.get(name, False)
            if value is not None and not plain:
                raise PlanError(f"generate({name}=…): {REFUSED[name]}")
        elif name not in SERVED and name not in KEYWORDS:
            raise PlanError(f"generate has no option {name!r}. {nearest(name, [*OWN, *SERVED, *KEYWORDS])}")
    for name, neutral in _PADDED.items():
        if tokens.padded and said.get(name) not in (None, neutral):
            raise PlanError(f"generate({name}=…) counts padding as text; generate the rows one by one")
    if said.get("cache_implementation") == "paged":
        raise PlanError(f"generate(cache_implementation='paged'): {_ROWS}")
    if said.get("disable_compile") is False:
        raise PlanError(f"generate(disable_compile=False): {_COMPILED}")


def _new_tokens(said: dict[str, Any], width: int) -> int:
    """How many tokens at most; as in transformers, `max_new_tokens` goes before `max_length`."""
    total, new = said.pop("max_length", None), said.pop("max_new_tokens", None)
    if new is None:
        new = 32 if total is None else total - width if isinstance(total, int) else total
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise PlanError(f"max_new_tokens is a number, at least 1, not {new!r:.60}")
    return new


def _special(model: Session, said: dict[str, Any], stop: bool) -> list[int]:
    """Settle which tokens end a text and fill it up, as the caller says, the model or the tokenizer; returns the
    former."""
    model_says, chosen = model.hf.generation_config, said.pop("eos_token_id", None)
    if chosen is not None and not stop:
        raise PlanError("stop_at_eos=False ends no row at eos_token_id; leave one of them out")
    eos = model_says.eos_token_id if chosen is None else chosen
    if eos is None and model.tokenizer is not None:
        eos = model.tokenizer.eos_token_id
    listed = [] if eos is None else [int(token) for token in torch.as_tensor(eos).flatten()]
    pad, top = model_says.pad_token_id, model.atlas.shape.d_vocab
    # Some configs name an id that the model does not have (-1, or one behind the vocabulary), which it could not embed.
    pad = pad if pad is not None and 0 <= pad < top else (listed or [0])[0]
    said.setdefault("pad_token_id", pad)
    said["eos_token_id"] = listed if stop and listed else None
    return listed if stop else []


def _criteria(model: Session, said: dict[str, Any], keywords: dict[str, Any]) -> list[Any]:
    """Stopping criteria of the caller's, and one for `stop_strings`; what has an option of its own is refused."""
    criteria, tokenizer = list(keywords.pop("stopping_criteria", ())), keywords.pop("tokenizer", model.tokenizer)
    for criterion in criteria:
        for kind, name in ((MaxLengthCriteria, "max_new_tokens"), (EosTokenCriteria, "eos_token_id")):
            if isinstance(criterion, kind):
                raise PlanError(f"stopping_criteria with {kind.__name__}: say {name}=… instead")
    strings = said.pop("stop_strings", None)
    if strings is not None:
        if tokenizer is None:
            raise PlanError("stop_strings need a tokenizer: pass tokenizer=…, or load the model with one")
        criteria.append(StopStringCriteria(tokenizer, strings))
    return criteria
