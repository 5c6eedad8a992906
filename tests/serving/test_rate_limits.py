"""Limits a minute: the app in this process behind limits of its own, and one service in a process
of its own."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from backends.base import Client, Deadline
from backends.chunks import UpstreamUsage
from backends.external import ExternalGeneration
from engine import QueueFullError
from serving import counts, logs
from serving.counts import StorageError
from serving.middleware import ApiKeyMiddleware, RequestContextMiddleware
from serving.rate_limits import AboveLimit, Allowance, LimitReached, RateLimitMiddleware, RateLimits
from serving.settings import Settings
from tests.support import PROMPT, Served, ids, serve_in_thread, served, tokenizer, wait_until

NUM_PROMPT_TOKENS = len(ids(PROMPT))
ENDS_AT_ONCE = {"logit_bias": {str(tokenizer.eos_token_id): 100}}


@pytest.fixture
def app() -> Any:
    """The app in this process."""
    import main

    return main.app


def limited_app(app: Any, **settings: Any) -> RequestContextMiddleware:
    """The app behind limits of its own, and without keys."""
    limiting = RateLimitMiddleware(app, Settings(**settings))
    return RequestContextMiddleware(ApiKeyMiddleware(limiting, {}, True, False))


def limited_client(app: Any, **settings: Any) -> TestClient:
    return TestClient(limited_app(app, **settings))


def remaining(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-tokens"])


# --- What a request may cost --------------------------------------------------------------------

COMPLETIONS, SIDE_BY_SIDE, PATH = "/v1/completions", "/generate-text/", f"/{PROMPT}"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/generate", {"max_new_tokens": 101}),
        ("/generate", {"max_length": 200, "stream": True}),
        ("/generate/text", {"max_new_tokens": 101}),
        (SIDE_BY_SIDE, {"max_length": 40, "num_return_sequences": 8}),
        (COMPLETIONS, {"max_tokens": 101}),
        (COMPLETIONS, {"max_tokens": 40, "n": 3}),
        (COMPLETIONS, {"max_tokens": 40, "best_of": 3}),
        (COMPLETIONS, {"max_tokens": 40, "prompt": [PROMPT] * 3}),
        (COMPLETIONS, {"max_tokens": 0, "echo": True, "prompt": [[1] * 101]}),
    ],
)
def test_request_above_the_limit_is_refused(app: Any, path: str, asked: dict[str, Any]) -> None:
    """One request had as many tokens as it wanted: 8,000 under a limit of 100."""
    http = limited_client(app, token_rate_limit=100)
    answer = http.post(path, json={"prompt": PROMPT, **asked})
    reason = "may cost more than the limit of 100 tokens a minute: ask for fewer"
    if path == COMPLETIONS:
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"body: {reason}"
    else:
        assert answer.status_code == 422
        problem = {"loc": ["body"], "msg": reason, "type": "value_error"}
        assert answer.json() == {"detail": [problem]}
    assert remaining(answer) == remaining(http.get("/v1/models")) == 100


def test_path_above_the_limit_is_refused(app: Any) -> None:
    http = limited_client(app, token_rate_limit=100)
    answer = http.get(PATH, params={"num_return_sequences": 8, "max_new_tokens": 20})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query"]


@pytest.mark.parametrize("body", [{}, {"n": 2}, {"stream": True}])
def test_concurrent_requests_stay_within_the_limit(app: Any, body: dict[str, Any]) -> None:
    """Tokens counted once a request had ended: 40 at the same time had them all."""
    asked = {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True, **body}

    async def ask_all(address: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            asking = (http.post(COMPLETIONS, json=asked) for _ in range(40))
            answers = await asyncio.gather(*asking)
            answers.append(await http.get("/v1/models"))
            return answers

    with serve_in_thread(limited_app(app, token_rate_limit=250)) as address:
        *answers, last = asyncio.run(ask_all(address))
    cost = NUM_PROMPT_TOKENS + 30 * body.get("n", 1)
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * (250 // cost) + [429] * (40 - 250 // cost)
    assert remaining(last) == 250 % cost
    for refused in answers:
        if refused.status_code == 429:
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-ratelimit-limit-tokens"] == "250"
            assert remaining(refused) < cost


@pytest.mark.parametrize("counts_prompts", [True, False])
def test_prompts_cost_their_tokens(app: Any, counts_prompts: bool) -> None:
    """Scoring a prompt, which generates nothing, cost nothing."""
    http = limited_client(app, token_rate_limit=200, rate_limit_prompts=counts_prompts)
    body = {"prompt": [PROMPT] * 5, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    body = {"prompt": PROMPT, "max_new_tokens": 10, "temperature": 0}
    assert http.post("/generate", json=body).status_code == 200
    num_prompts = 6 if counts_prompts else 0
    assert remaining(http.get("/v1/models")) == 200 - 10 - num_prompts * NUM_PROMPT_TOKENS


@pytest.mark.parametrize("streams", [False, True])
def test_what_was_not_used_is_given_back(app: Any, streams: bool) -> None:
    http = limited_client(app, token_rate_limit=100)
    body = {"prompt": PROMPT, "max_tokens": 90, "stream": streams, **ENDS_AT_ONCE}
    cost = NUM_PROMPT_TOKENS + 1
    for number in range(3):
        answer = http.post(COMPLETIONS, json={**body, "max_tokens": 100 - cost * (number + 1)})
        assert answer.status_code == 200
        assert remaining(http.get("/v1/models")) == 100 - cost * (number + 1)


def test_what_could_not_be_queued_is_given_back(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import main

    def refuse(*_: Any, **__: Any) -> Any:
        raise QueueFullError

    monkeypatch.setattr(main.engine, "submit_all", refuse)
    http = limited_client(app, token_rate_limit=100)
    for _ in range(3):
        answer = http.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 60})
        assert answer.status_code == 503
    assert remaining(http.get("/v1/models")) == 100


# --- What one request reserves ------------------------------------------------------------------


def new_allowance(limits: RateLimits) -> Allowance:
    return Allowance(limits, "address 127.0.0.1")


def test_reserved_for_several_models_counts_together() -> None:
    async def reserve() -> None:
        limits = RateLimits(Settings(token_rate_limit=100))
        several = new_allowance(limits)
        await several.reserve(10, 50)
        with pytest.raises(AboveLimit):
            await several.reserve(10, 50)
        await several.reserve(10, 20)
        assert several.headers["X-RateLimit-Remaining-Tokens"] == "10"
        with pytest.raises(LimitReached):
            await new_allowance(limits).reserve(1, 10)
        await several.settle()
        await several.settle()  # as happens at the last byte, and when the request has ended
        await new_allowance(limits).reserve(0, 100)

    asyncio.run(reserve())


def test_reserved_in_a_window_that_has_ended_is_not_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counts, "WINDOW_SECONDS", 0.2)

    async def reserve() -> None:
        limits = RateLimits(Settings(token_rate_limit=100))
        old = new_allowance(limits)
        await old.reserve(0, 60)
        await asyncio.sleep(0.3)
        await old.reserve(0, 30)
        await new_allowance(limits).reserve(0, 70)
        await old.settle()  # what is left of 90, of which only 30 are this window's
        await new_allowance(limits).reserve(0, 30)
        with pytest.raises(LimitReached):
            await new_allowance(limits).reserve(0, 1)

    asyncio.run(reserve())


@pytest.mark.parametrize(
    ("usage", "left"),
    [((20, 30), 50), ((5, 40), 55), ((5, 5), 90), (None, 85)],
)
def test_cost_that_another_server_counts(usage: tuple[int, int] | None, left: int) -> None:
    """More than was reckoned with is charged; a prompt that it has not counted stays so."""

    async def reserve() -> None:
        generation = ExternalGeneration("big", [], Client("a"), Deadline(time.monotonic(), 60))
        if usage:
            told = UpstreamUsage(prompt_tokens=usage[0], completion_tokens=usage[1])
            generation.usages[0] = told
        logs.request_facts.set({"generations": [generation]})
        limits = RateLimits(Settings(token_rate_limit=100))
        allowance = new_allowance(limits)
        await allowance.reserve(15, 25)
        await allowance.settle()
        await new_allowance(limits).reserve(0, left)
        with pytest.raises(LimitReached):
            await new_allowance(limits).reserve(0, 1)

    asyncio.run(reserve())


# --- Time, and a storage that fails -------------------------------------------------------------


def test_clock_that_is_set_back_locks_nobody_out(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an hour back nobody over a limit was let in for an hour."""
    http = limited_client(app, rate_limit=1)
    assert [http.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    wall_seconds, monotonic_seconds = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: wall_seconds() - 3600)
    assert int(http.get("/v1/models").headers["retry-after"]) <= 60
    monkeypatch.setattr(time, "monotonic", lambda: monotonic_seconds() + 61)
    assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("error", [StorageError("gone"), None])
def test_rate_limit_is_off_while_its_storage_fails(
    app: Any,
    error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        if error:
            raise error
        await asyncio.sleep(60)

    monkeypatch.setattr("serving.rate_limits.STORAGE_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("serving.rate_limits.STORAGE_PAUSE_SECONDS", 0.3)
    limiting = RateLimitMiddleware(app, Settings(rate_limit=1))
    http = TestClient(RequestContextMiddleware(ApiKeyMiddleware(limiting, {}, True, False)))
    with monkeypatch.context() as broken:
        broken.setattr(limiting.limits.counts, "add", fail)
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200] * 3
    logged = [line for line in caplog.messages if "no rate limits for 0.3 s" in line]
    assert len(logged) == 1
    assert ("gone" if error else "TimeoutError") in logged[0]
    wait_until(lambda: http.get("/v1/models").status_code == 429)


@pytest.mark.parametrize("failing", ["add", "give_back"])
def test_storage_that_fails_in_the_middle_of_a_request_fails_no_request(
    app: Any, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiting = RateLimitMiddleware(app, Settings(token_rate_limit=100))
    real = getattr(limiting.limits.counts, failing)

    async def fail(key: str, amount: int, *rest: Any) -> Any:
        if amount:
            raise StorageError("gone")
        return await real(key, amount, *rest)

    monkeypatch.setattr(limiting.limits.counts, failing, fail)
    http = TestClient(RequestContextMiddleware(ApiKeyMiddleware(limiting, {}, True, False)))
    body = {"prompt": PROMPT, "max_tokens": 20, **ENDS_AT_ONCE}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    assert limiting.limits.is_paused


# --- One service with keys and limits -----------------------------------------------------------

NAMES = ("alice", "bob", "carol", "eve", "fay")


@pytest.fixture(scope="module")
def limited() -> Iterator[Served]:
    settings = {
        "API_KEYS": ",".join(f"{name}:secret-{name[0]}" for name in NAMES),
        "RATE_LIMIT": "5",
        "TOKEN_RATE_LIMIT": "300",
    }
    with served(**settings) as service:
        yield service


def test_rate_limit_of_requests_by_key(limited: Served) -> None:
    with limited.client(**{"X-API-Key": "secret-a"}) as alice:
        answers = [alice.get("/v1/models") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == list("432100")
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "5"
    with limited.client(**{"X-API-Key": "secret-b"}) as bob:
        assert bob.get("/v1/models").status_code == 200


def test_rate_limit_of_tokens(limited: Served) -> None:
    with limited.client(Authorization="Bearer secret-c") as carol:
        body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
        first, refused = [carol.post(COMPLETIONS, json=body) for _ in range(2)]
        body["max_tokens"] = 100 - 2 * NUM_PROMPT_TOKENS  # and the rest
        assert carol.post(COMPLETIONS, json=body).status_code == 200
        used_up = carol.get("/v1/models")
    assert (first.status_code, refused.status_code) == (200, 429)
    assert "Over the limit of 300 tokens a minute" in refused.text
    assert remaining(first) == remaining(refused) == 100 - NUM_PROMPT_TOKENS
    assert (used_up.status_code, remaining(used_up)) == (429, 0)


def test_rate_limit_of_tokens_counts_what_nobody_waited_for(limited: Served) -> None:
    """A client that leaves has used what was generated until then, and its prompt."""
    body = {"prompt": PROMPT, "max_new_tokens": 200, "stream": True}
    with limited.client(Authorization="Bearer secret-e") as eve:
        with eve.stream("POST", "/generate", json=body) as answer:
            next(answer.iter_bytes())
        wait_until(lambda: any(line.get("key") == "eve" for line in limited.log()))
        left = next(line for line in limited.log() if line.get("key") == "eve")
        models = eve.get("/v1/models")
    assert left["status"] in (200, 499)
    assert 0 < left["generated_tokens"] < 200
    assert remaining(models) == 300 - NUM_PROMPT_TOKENS - left["generated_tokens"]


def test_openai_client_raises_its_own_errors(limited: Served) -> None:
    def ask(key: str) -> None:
        with openai.OpenAI(base_url=f"{limited.address}/v1", api_key=key, max_retries=0) as client:
            client.models.list()

    with pytest.raises(openai.AuthenticationError) as refused:
        ask("wrong")
    assert refused.value.code == "invalid_api_key"
    for _ in range(5):
        ask("secret-f")
    with pytest.raises(openai.RateLimitError) as limit:
        ask("secret-f")
    assert limit.value.code == "rate_limit_exceeded"
