"""What generation_config.json asks for comes true as in transformers, or is named as left out."""

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import main
import models
from backends.base import Client, Generation
from backends.generation_config import AuthorsDefaults, read_generation_config
from engine import Engine, SamplingParams
from tests.support import PROMPT, complete, ids, run, tiny_llama, tokenizer

BACKEND = main.registry.default
NUM_TOKENS = 10
# One token alone, which what may be forced first follows; of the others the model says 5439, 921,
# 2603, 7902, 3267, … and 6952, 767, 7146, … .
PROMPTS = [ids(PROMPT), ids("The old king had"), [5]]
OFTEN = [[[11], 100.0], [[12], 99.0], [[13], 98.0]]  # else it repeats nothing so soon
TO_END = [[[0], 100.0]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(tiny_llama(), tokenizer, max_num_seqs=8, num_threads=1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_llama()


def generated(reference: Any, prompt: list[int], **asked: Any) -> list[int]:
    """What `generate` of transformers makes of a prompt."""
    prompt_ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=0, pad_token_id=0, **asked
    )
    output = reference.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=config
    )
    token_ids: list[int] = output[0, len(prompt) :].tolist()
    return token_ids


def texts(engine: Engine, *params: SamplingParams) -> list[list[int]]:
    """What the engine makes of each prompt with each of these parameters, all of them at once."""

    async def ask(prompt: list[int], each: SamplingParams) -> list[int]:
        (delta,) = await complete(engine, engine.submit(prompt, each))
        return delta.token_ids

    return run(*(ask(prompt, each) for each in params for prompt in PROMPTS))


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.5, "sequence_bias": OFTEN},
        {"suppress_tokens": [5439, 767, -1, 9000]},
        {"begin_suppress_tokens": [5439]},
        {"begin_suppress_tokens": [7, 8], "forced_bos_token_id": 7, "sequence_bias": [[[8], 99.0]]},
        {"bad_words_ids": [[921, 2603], [6952], [0]]},
        {"bad_words_ids": [[tokenizer.eos_token_id]], "sequence_bias": TO_END},
        {"sequence_bias": [[[5439], -2.5], [[5439, 921], -50.0], [ids("The old king had"), 1.0]]},
        {"sequence_bias": [[[*ids(PROMPT)[-2:], 11], 100.0], [[5, 12, 13], 100.0], [[12], 50.0]]},
        {"no_repeat_ngram_size": 1, "sequence_bias": OFTEN},
        {"no_repeat_ngram_size": 2, "sequence_bias": OFTEN},
        {"no_repeat_ngram_size": 4, "sequence_bias": OFTEN},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 0},
        {"forced_eos_token_id": [0, 9], "suppress_tokens": [0]},
        {"min_length": 8, "sequence_bias": TO_END},
        {"min_new_tokens": 3, "min_length": 9, "sequence_bias": TO_END},
        {"exponential_decay_length_penalty": [3, 1.5]},
        {"exponential_decay_length_penalty": [2, 3.0], "min_new_tokens": 6},
    ],
)
def test_text_is_that_of_transformers(
    engine: Engine, reference: Any, asked: dict[str, Any]
) -> None:
    """What the file asked for was ignored without a word, all but end-of-text."""
    plain = SamplingParams(temperature=0, max_new_tokens=NUM_TOKENS)
    read = read_generation_config(GenerationConfig(eos_token_id=0, **asked), engine.vocab_size)
    assert not read.not_applied
    ruled = replace(plain, rules=read.rules, **read.sampling)
    got = texts(engine, ruled, plain)
    without = got[len(PROMPTS) :]
    assert without == [generated(reference, prompt) for prompt in PROMPTS]
    assert got[: len(PROMPTS)] == [generated(reference, prompt, **asked) for prompt in PROMPTS]
    assert got[: len(PROMPTS)] != without


def test_rules_for_the_end_are_left_aside_where_it_is_ignored(engine: Engine) -> None:
    asked = GenerationConfig(
        eos_token_id=0, forced_eos_token_id=0, min_new_tokens=9,
        exponential_decay_length_penalty=(1, 9.0), sequence_bias=TO_END,
    )  # fmt: skip
    rules = read_generation_config(asked, engine.vocab_size).rules
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, rules=rules)
    assert texts(engine, params) == [[0, 0, 0, 0]] * len(PROMPTS)


@pytest.mark.parametrize(
    ("asked", "not_applied"),
    [
        ({"num_beams": 4, "do_sample": True, "typical_p": 0.9}, ("num_beams", "typical_p")),
        ({"penalty_alpha": 0.6, "max_time": 3.0}, ("max_time", "penalty_alpha")),
        ({"top_p": 0.0, "repetition_penalty": -1.0}, ("repetition_penalty", "top_p")),
        ({"forced_eos_token_id": 100}, ("forced_eos_token_id",)),
        ({"forced_bos_token_id": -1}, ("forced_bos_token_id",)),
        ({"suppress_tokens": "all", "stop_strings": [""]}, ("stop_strings", "suppress_tokens")),
        ({"bad_words_ids": [[]]}, ("bad_words_ids",)),
        ({"sequence_bias": [[[1], float("inf")]]}, ("sequence_bias",)),
    ],
)
def test_what_cannot_be_applied_is_named(
    asked: dict[str, Any], not_applied: tuple[str, ...]
) -> None:
    """One bad field takes nothing from the others."""
    read = read_generation_config(GenerationConfig(temperature=0.5, **asked), vocab_size=100)
    assert read.not_applied == not_applied
    assert (read.sampling, read.rules, read.rule_names) == ({"temperature": 0.5}, None, ())


def test_what_changes_nothing_is_left_out() -> None:
    neutral = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert neutral.num_beams == 1
    neutral.top_k, neutral.eos_token_id = 0, [0, 1]
    assert read_generation_config(neutral, 100) == AuthorsDefaults()
    assert BACKEND.defaults == AuthorsDefaults()  # of the bundled model


def test_top_k_stays_within_the_vocabulary() -> None:
    for asked, taken in ((-1, 0), (40, 40), (300, 100)):
        assert read_generation_config(GenerationConfig(top_k=asked), 100).sampling["top_k"] == taken


# --- What becomes of a request ------------------------------------------------------------------

RULES = read_generation_config(GenerationConfig(suppress_tokens=[1], eos_token_id=0), 8192).rules
DEFAULTS = AuthorsDefaults(
    sampling={"temperature": 0.25, "top_k": 7, "repetition_penalty": 1.5},
    max_new_tokens=9,
    stop=("END",),
    rules=RULES,
)
OF_AUTHOR = {"temperature": 0.25, "top_k": 7, "top_p": 1.0, "repetition_penalty": 1.5}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[Coroutine[Any, Any, Generation]], Any]:
    """Gives the engine's parameters of a request to the bundled model, which has DEFAULTS now."""
    monkeypatch.setattr(BACKEND, "defaults", DEFAULTS)
    monkeypatch.setattr(BACKEND.tokenizer, "chat_template", "{{ messages[0].content }}")

    async def params_of(submitting: Coroutine[Any, Any, Generation]) -> SamplingParams:
        generation = await submitting
        generation.abort()
        params: SamplingParams = generation.requests[0].params
        return params

    return lambda submitting: run(params_of(submitting))[0]


def completion(**fields: Any) -> Coroutine[Any, Any, Generation]:
    body = models.CompletionRequest.model_validate({"prompt": PROMPT, **fields})
    return BACKEND.submit_completion(body, client=Client("a"))


def chat(**fields: Any) -> Coroutine[Any, Any, Generation]:
    messages = [{"role": "user", "content": PROMPT}]
    body = models.ChatCompletionRequest.model_validate({"messages": messages, **fields})
    return BACKEND.submit_chat(body, client=Client("a"))


@pytest.mark.parametrize("submit", [completion, chat])
@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, OF_AUTHOR),
        ({"temperature": None, "top_k": None}, OF_AUTHOR),
        # Also where that is what the route would take by itself.
        ({"temperature": 1}, {**OF_AUTHOR, "temperature": 1}),
        ({"top_k": 0, "top_p": 0.5}, {**OF_AUTHOR, "top_k": 0, "top_p": 0.5}),
        ({"repetition_penalty": 1.0}, {**OF_AUTHOR, "repetition_penalty": 1.0}),
    ],
)
def test_openai_routes_take_the_authors_defaults(
    ask: Any, submit: Any, named: dict[str, Any], expected: dict[str, Any]
) -> None:
    params = ask(submit(**named))
    assert {name: getattr(params, name) for name in expected} == expected
    assert (params.stop, params.rules) == (("END",), RULES)


def test_native_routes_keep_their_own_defaults(ask: Any) -> None:
    """But what makes a right text of the model holds there too."""
    body = models.GenerateRequest(prompt=PROMPT, stop=["a"])
    params = ask(BACKEND.submit_text(PROMPT, body, client=Client("a")))
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 0.9, 50)
    assert params.repetition_penalty == 1.0
    assert (params.stop, params.rules) == (("a", "END"), RULES)


def test_stop_strings_of_the_model_count_as_end_of_text(ask: Any) -> None:
    assert ask(completion(stop="a")).stop == ("a", "END")
    assert ask(completion(stop="a", ignore_eos=True)).stop == ("a",)


def test_length_of_a_chat_is_the_authors_where_it_names_none(ask: Any) -> None:
    """A completion has one of its own, 16, as at OpenAI's."""
    num_tokens = [ask(each).max_new_tokens for each in (chat(), chat(max_tokens=30), completion())]
    assert num_tokens == [9, 30, 16]


def test_length_of_a_chat_stays_within_the_context(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKEND, "defaults", AuthorsDefaults(max_new_tokens=100_000))
    assert ask(chat()).max_new_tokens == BACKEND.max_model_len - len(ids(PROMPT))
