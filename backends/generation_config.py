"""What a model's author asks for in its `generation_config.json`.

Two kinds of things stand there. How tokens are drawn is a default: a request of `/v1` may name
another value, and native routes have defaults of their own. Which tokens make a right text of this
model, and where it ends, holds for every text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

import models
from engine import TokenRules

# The defaults that a request of `/v1` gets, those that vLLM takes
# (https://docs.vllm.ai/en/v0.8.4/serving/openai_compatible_server.html).
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What else changes a text of transformers' `generate`, and the values with which it does not.
NOT_APPLIED: dict[str, Any] = {
    "num_beams": 1, "guidance_scale": 1, "penalty_alpha": 0, "dola_layers": None,
    "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None,
    "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0,
    "forced_decoder_ids": [], "max_time": None, "remove_invalid_values": False,
    "token_healing": False, "watermarking_config": None,
}  # fmt: skip


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, int | str) else value


def _pairs(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


TokenIds = Annotated[list[int], BeforeValidator(_one_or_more)]
Phrase = Annotated[list[int], Field(min_length=1)]  # token ids in a row
Bias = Annotated[float, Field(lt=math.inf)]
Decay = tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, lt=math.inf)]]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_more)]


class _Asked(BaseModel):
    """The fields that are applied, each with the value that changes nothing."""

    temperature: float = Field(default=1, ge=0, lt=math.inf)
    top_p: float = Field(default=1, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0, ge=0, le=1)
    repetition_penalty: float = Field(default=1, gt=0, lt=math.inf)
    max_new_tokens: int | None = Field(default=None, ge=1)
    suppress_tokens: TokenIds = []
    begin_suppress_tokens: TokenIds = []
    bad_words_ids: list[Phrase] = []
    sequence_bias: Annotated[list[tuple[Phrase, Bias]], BeforeValidator(_pairs)] = []
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    forced_bos_token_id: TokenIds = []
    forced_eos_token_id: TokenIds = []
    min_length: int = Field(default=0, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)
    exponential_decay_length_penalty: Decay | None = None
    stop_strings: Texts = []


@dataclass(frozen=True, slots=True)
class AuthorsDefaults:
    """What a model's author asks for, as far as that changes a text.

    sampling: for those of SAMPLING_FIELDS that a request of `/v1` does not name.
    max_new_tokens: of a chat that names no length.
    stop, rules: of every text; stop strings count as end-of-text.
    rule_names: the fields that these come from. not_applied: those that are left out.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    rules: TokenRules | None = None
    rule_names: tuple[str, ...] = ()
    not_applied: tuple[str, ...] = ()

    def sampling_of(
        self, body: models.CompletionRequest | models.ChatCompletionRequest
    ) -> dict[str, Any]:
        """SAMPLING_FIELDS: as the request names them, else the author, else the route."""
        of_route = {name: getattr(body, name) for name in SAMPLING_FIELDS}
        named = {name: of_route[name] for name in SAMPLING_FIELDS if name in body.model_fields_set}
        return {**of_route, **self.sampling, **named}


def read_generation_config(config: Any, vocab_size: int) -> AuthorsDefaults:
    """What a model's GenerationConfig asks for. A field that is not as `generate` takes it is
    among those not applied."""
    asked, not_applied = _read_fields(config)
    known = range(vocab_size)  # what the model does not have never comes, so it needs no ban
    can_be_forced = set(known) - set(asked.suppress_tokens)
    forced_bos = [id_ for id_ in asked.forced_bos_token_id if id_ in can_be_forced]
    forced_eos = [id_ for id_ in asked.forced_eos_token_id if id_ in can_be_forced]
    if asked.forced_bos_token_id and not forced_bos:
        not_applied.add("forced_bos_token_id")
    if asked.forced_eos_token_id and not forced_eos:
        not_applied.add("forced_eos_token_id")
    rules = TokenRules(
        sequence_bias=_biases(asked, config.eos_token_id, known),
        begin_suppress_tokens=[id_ for id_ in asked.begin_suppress_tokens if id_ in known],
        no_repeat_ngram_size=asked.no_repeat_ngram_size,
        forced_bos_token_ids=forced_bos,
        forced_eos_token_ids=forced_eos,
        min_length=0 if "min_new_tokens" in asked.model_fields_set else asked.min_length,
        min_new_tokens=asked.min_new_tokens,
        exponential_decay_length_penalty=asked.exponential_decay_length_penalty,
    )
    applied = _changing(asked) - not_applied
    sampling = {name: getattr(asked, name) for name in SAMPLING_FIELDS if name in applied}
    if "top_k" in sampling:  # -1 keeps all
        sampling["top_k"] = max(0, min(sampling["top_k"], vocab_size))
    rule_names = applied - {*SAMPLING_FIELDS, "max_new_tokens"}
    return AuthorsDefaults(
        sampling=sampling,
        max_new_tokens=asked.max_new_tokens,
        stop=tuple(asked.stop_strings),
        rules=rules if rule_names - {"stop_strings"} else None,
        rule_names=tuple(sorted(rule_names)),
        not_applied=tuple(sorted(not_applied)),
    )


def _read_fields(config: Any) -> tuple[_Asked, set[str]]:
    """The fields that can be applied, and the names of those that cannot."""
    given = {name: getattr(config, name, None) for name in (*_Asked.model_fields, *NOT_APPLIED)}
    given = {name: value for name, value in given.items() if value is not None}
    not_applied = {
        name for name in NOT_APPLIED if given.pop(name, None) not in (None, NOT_APPLIED[name])
    }
    try:
        return _Asked.model_validate(given), not_applied
    except ValidationError as error:
        invalid = {str(problem["loc"][0]) for problem in error.errors()}
    valid = {name: value for name, value in given.items() if name not in invalid}
    return _Asked.model_validate(valid), not_applied | invalid


def _changing(asked: _Asked) -> set[str]:
    """The fields with which texts are not as they would be without."""
    fields = type(asked).model_fields
    return {name for name in asked.model_fields_set if getattr(asked, name) != fields[name].default}


def _biases(asked: _Asked, eos_token_ids: Any, known: range) -> dict[tuple[int, ...], float]:
    """What is added to the logit of the last of these tokens where the others came before. As in
    `generate`, a bad word that is nothing but end-of-text is none."""
    ends = [[token_id] for token_id in _one_or_more(eos_token_ids) or []]
    banned = [[token_id] for token_id in asked.suppress_tokens]
    banned += [phrase for phrase in asked.bad_words_ids if phrase not in ends]
    biases = [*asked.sequence_bias, *((phrase, -math.inf) for phrase in banned)]
    return {tuple(phrase): bias for phrase, bias in biases if all(id_ in known for id_ in phrase)}
