"""What a model that runs here does before it asks its engine."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

import main
import models
from backends.base import (
    Client,
    ContextExceeded,
    DeadlineExceeded,
    ForbiddenPrompt,
    Generation,
    InvalidField,
)
from backends.local import LocalBackend
from engine import QueueFullError
from tests.support import FOLDER, PROMPT, ids, run

BACKEND = main.registry.default
ENGINE = main.engine
NUM_PROMPT_TOKENS = len(ids(PROMPT))
LONG_TEXT = PROMPT + " and so" * 200


def completion(**fields: Any) -> models.CompletionRequest:
    return models.CompletionRequest.model_validate({"prompt": PROMPT, "max_tokens": 5, **fields})


def is_idle() -> bool:
    return ENGINE.num_running == ENGINE.num_waiting == 0


async def submit_text(client: Client) -> Generation:
    params = models.TextRequest(prompt=PROMPT, max_new_tokens=7)
    return await BACKEND.submit_text(PROMPT, params, client=client, num_sequences=3)


async def submit_short(client: Client) -> Generation:
    return await BACKEND.submit_completion(completion(n=2), client=client)


async def submit_without_a_limit(client: Client) -> Generation:
    body = completion(prompt=[[1] * 500, [1] * 510], n=2, max_tokens=-1, ignore_eos=True)
    return await BACKEND.submit_completion(body, client=client)


async def submit_many(client: Client) -> Generation:
    return await BACKEND.submit_completion(completion(prompt=[PROMPT] * 20, n=2), client=client)


@pytest.mark.parametrize(
    ("submit", "num_tokens"),  # of prompts, and new ones
    [
        (submit_text, (NUM_PROMPT_TOKENS, 3 * 7)),
        (submit_short, (NUM_PROMPT_TOKENS, 2 * 5)),
        (submit_without_a_limit, (1010, 2 * (12 + 2))),
        (submit_many, (20 * NUM_PROMPT_TOKENS, 20 * 2 * 5)),
    ],
)
def test_client_is_asked_for_what_a_request_may_cost(
    submit: Callable[[Client], Awaitable[Generation]], num_tokens: tuple[int, int]
) -> None:
    reserved = []

    async def reserve(num_prompt_tokens: int, num_new_tokens: int) -> None:
        assert ENGINE.num_running == 0
        reserved.append((num_prompt_tokens, num_new_tokens))

    async def ask() -> None:
        generation = await submit(Client("a", reserve))
        await generation.complete()

    assert run(ask()) == [None]
    assert reserved == [num_tokens]


async def refuse(num_prompt_tokens: int, num_new_tokens: int) -> None:
    raise QueueFullError("refused")


@pytest.mark.parametrize(
    ("fields", "client", "expected"),
    [
        ({}, Client("a", refuse), QueueFullError),
        ({"prompt": ["I hate it"]}, Client("a"), ForbiddenPrompt),
        ({"prompt": LONG_TEXT + " hate"}, Client("a"), ForbiddenPrompt),
        ({"prompt": [PROMPT] * 300 + ["I hate it"]}, Client("a"), ForbiddenPrompt),
        ({"prompt": [[1, 2], [8192]]}, Client("a"), InvalidField),
        ({"prompt": [LONG_TEXT * 2]}, Client("a"), ContextExceeded),
    ],
)
def test_refused_request_gives_its_place_back(
    fields: dict[str, Any], client: Client, expected: type[Exception]
) -> None:
    (error,) = run(BACKEND.submit_completion(completion(**fields), client=client))
    assert isinstance(error, expected)
    assert is_idle()


def test_request_has_its_place_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts were tokenized, decoded and filtered for whoever came, also for a queue that was
    full in the end."""
    monkeypatch.setattr(ENGINE.scheduler, "max_num_seqs", 1)
    monkeypatch.setattr(ENGINE.scheduler, "max_queue_size", 30)
    body = completion(prompt=[PROMPT] * 20)

    async def ask() -> None:
        first = asyncio.create_task(BACKEND.submit_completion(body, client=Client("a")))
        await asyncio.sleep(0)
        assert ENGINE.num_waiting == 20
        with pytest.raises(QueueFullError):
            await BACKEND.submit_completion(body, client=Client("a"))
        first.cancel()
        await asyncio.wait({first})

    assert run(ask()) == [None]
    assert is_idle()


def backend_with(other: Any) -> LocalBackend:
    """The bundled model behind another tokenizer."""
    return LocalBackend(
        "other",
        SimpleNamespace(tokenizer=other, model=None),
        ENGINE,
        content_filter=BACKEND.prompts.content_filter,
        request_timeout_seconds=60,
        reader=BACKEND.reader,
    )


def own_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_prompt_is_neither_truncated_nor_padded() -> None:
    """As tokenizer.json said: 17 tokens were read as their first 8, 2 became 8."""
    other = own_tokenizer()
    other.backend_tokenizer.enable_truncation(8)
    other.backend_tokenizer.enable_padding(length=8)
    backend = backend_with(other)

    async def num_tokens(prompt: str) -> int:
        generation = await backend.submit_completion(completion(prompt=prompt), client=Client("a"))
        generation.abort()
        return generation.num_prompt_tokens

    for prompt in (PROMPT, PROMPT * 5):
        assert run(num_tokens(prompt)) == [len(ids(prompt))]


def test_prompt_with_a_token_beyond_the_model_is_refused() -> None:
    """It ended all sequences: the model has no row for it."""
    other = own_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    other.chat_template = "{{ messages[0].content }}"
    backend, prompt = backend_with(other), PROMPT + "<new>"
    chat = models.ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": prompt}]}
    )
    params = models.TextRequest(prompt=prompt)
    errors = run(
        backend.submit_completion(completion(prompt=prompt), client=Client("a")),
        backend.submit_chat(chat, client=Client("a")),
        backend.submit_text(prompt, params, client=Client("a")),
    )
    assert [type(error) for error in errors] == [InvalidField] * 3
    assert [error.field for error in errors] == ["prompt", "messages", "prompt"]
    assert "holds a token that is not among the model's 8192" in errors[0].reason
    assert is_idle()


def test_deadline_counts_from_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """It began once the prompts had been read."""
    monkeypatch.setattr(BACKEND, "request_timeout_seconds", 1e-3)

    async def ask() -> None:
        generation = await BACKEND.submit_completion(completion(), client=Client("a"))
        assert generation.deadline.left_seconds < 1e-3
        assert generation.requests[0].arrived_seconds == generation.deadline.arrived_seconds
        generation.abort()

    assert run(ask()) == [None]


def test_deadline_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """All was read, whatever the deadline: 12.9 s under one of 3 s."""
    monkeypatch.setattr(BACKEND, "request_timeout_seconds", 0.1)
    body = completion(prompt=[[n + 1] * 500 for n in range(256)])
    (error,) = run(BACKEND.submit_completion(body, client=Client("a")))
    assert isinstance(error, DeadlineExceeded)
    assert is_idle()


def test_too_long_a_prompt_is_refused_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND.reader, "read", pytest.fail)
    for prompt in (PROMPT * 1000, [[1] * 10] * 5 + [[1] * 1000]):
        body = completion(prompt=prompt)
        (error,) = run(BACKEND.submit_completion(body, client=Client("a")))
        assert isinstance(error, ContextExceeded)


def test_prompts_share_keys_and_values_only_with_the_same_key_and_salt() -> None:
    """Else a client could tell by the time that it takes how another's prompt begins."""
    if not ENGINE.runner.is_exact:
        pytest.skip("no int8 kernel on this processor, so nothing is shared")

    async def ask(key_name: str, **fields: str) -> int | None:
        client = Client("a", key_name=key_name)
        body = completion(prompt=list(range(100)), **fields)
        generation = await BACKEND.submit_completion(body, client=client)
        await generation.complete()
        return generation.num_cached_tokens

    asked = [("k", {}), ("l", {}), ("k", {"cache_salt": "s"}), ("l", {"cache_salt": "s"})]
    for num_cached_tokens in (0, 96):
        for key_name, fields in asked:
            assert run(ask(key_name, **fields)) == [num_cached_tokens]
