"""External models: this service in front of a second instance of itself.

The upstream is a process of its own with the bundled model, an API key and little room; the
front is this process's app with nothing but that external model. What no honest server sends
comes from a scripted one.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr

import main
from backends.external import ExternalBackend
from backends.upstream import RETRY_PAUSES_SECONDS
from serving.content_filter import ContentFilter
from serving.errors import BUSY, FORBIDDEN_PROMPT, OVERLOADED, REFUSED, STOPPING, UNREACHABLE
from serving.middleware import ApiKeyMiddleware, RequestContextMiddleware
from serving.model_loader import ModelLoader
from serving.rate_limits import RateLimitMiddleware
from serving.registry import load_models
from serving.settings import Settings
from tests.support import (
    FOLDER,
    PROMPT,
    ROOT,
    Served,
    events,
    metric,
    read_all,
    refused_fields,
    serve_in_thread,
    served,
    wait_until,
)

NAME, UPSTREAM_NAME = "org/tales", "gpt2-tales"
KEY = "a-secret-of-upstream"
LOCAL = main.registry.default
PARAMS = {"seed": 1, "top_k": 50, "max_new_tokens": 20}
LONG = {"prompt": PROMPT, "max_tokens": 400, "n": 8, "ignore_eos": True}  # seconds
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


class Upstream:
    """The second instance, which can be killed and come back where it was."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = 0
        self.stack = ExitStack()
        self.service: Served

    def start(self, **settings: str) -> None:
        settings |= {
            "MODEL_NAME": str(self.folder), "API_KEYS": KEY, "METRICS_NEED_KEY": "false",
            "MAX_NUM_SEQS": "8", "MAX_QUEUE_SIZE": "2", "TORCH_NUM_THREADS": "1",
        }  # fmt: skip
        self.service = self.stack.enter_context(served(port=self.port, **settings))
        self.port = int(self.service.address.rpartition(":")[2])

    def post(self, path: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(self.service.address + path, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        return answer.json()

    def figure(self, name: str) -> float:
        return metric(httpx.get(self.service.address + "/metrics").text, name)

    def is_idle(self) -> bool:
        return self.figure("vllm:num_requests_running") == 0


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    folder = tmp_path_factory.mktemp("models") / UPSTREAM_NAME
    shutil.copytree(FOLDER, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = Upstream(folder)
    with made.stack:
        made.start()
        yield made


def connected(address: str, **update: Any) -> ExternalBackend:
    """The backend that MODEL_NAME makes of the upstream at this address, with these settings."""
    update = {"external_api_key": SecretStr(KEY)} | update
    settings = main.settings.model_copy(update=update)
    loader = ModelLoader(settings, main.content_filter, pytest.fail, pytest.fail)
    return loader.connect_external(NAME, f"{address}/v1#{UPSTREAM_NAME}")


@contextmanager
def in_front(backend: ExternalBackend, app: Any = main.app) -> Iterator[httpx.Client]:
    """A client of the app with this model alone; nothing is left open afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.app.state.service.registry, "backends", {NAME: backend})
        patch.setattr(main.app, "openapi_schema", None)  # it tells of the models
        with serve_in_thread(app) as address:
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client
            wait_until(lambda: not backend._generations)
            backend.stop()


@pytest.fixture(scope="module")
def engine(upstream: Upstream) -> ExternalBackend:
    return connected(upstream.service.address)


@pytest.fixture(scope="module")
def module_client(engine: ExternalBackend) -> Iterator[httpx.Client]:
    with in_front(engine) as client:
        yield client


@pytest.fixture
def client(module_client: httpx.Client, engine: ExternalBackend) -> Iterator[httpx.Client]:
    """No test leaves anything open, here or upstream."""
    yield module_client
    wait_until(lambda: not engine._generations)


def pools(engine: ExternalBackend) -> list[Any]:
    transports: list[Any] = [client._transport for client in engine.upstream._clients.values()]
    return [transport._pool for transport in transports]


def connections(engine: ExternalBackend) -> list[Any]:
    """Those that a request holds: an idle one waits for the next, and a closed one, which stays
    in the pool until the next request comes, holds nothing."""
    every = [connection for pool in pools(engine) for connection in pool.connections]
    return [each for each in every if not (each.is_idle() or each.is_closed())]


def read_events(client: httpx.Client, body: Any, path: str = "/v1/completions") -> list[Any]:
    body = {**body, "stream": True}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return events(answer.text.removesuffix("data: [DONE]\n\n"))


# --- The same answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", [{}, {"max_length": 30, "max_new_tokens": None}, {"stop": [","], "temperature": 0.5}]
)
def test_generate_gives_upstreams_text(
    client: httpx.Client, upstream: Upstream, length: dict[str, Any]
) -> None:
    body = {name: value for name, value in {**PARAMS, **length}.items() if value is not None}
    answer = client.post("/generate", json={"prompt": PROMPT, **body})
    expected = upstream.post("/generate", {"prompt": PROMPT, **body})["generated_text"]
    assert answer.json() == {"generated_text": expected, "model_name": NAME}
    *deltas, (_, last) = read_events(client, {"prompt": PROMPT, **body}, "/generate")
    assert last == answer.json()
    assert PROMPT + "".join(delta["text"] for _, delta in deltas) == expected


def test_generate_texts_gives_upstreams_texts(client: httpx.Client, upstream: Upstream) -> None:
    body = {"prompt": PROMPT, "num_return_sequences": 3, **PARAMS}
    expected = upstream.post("/generate-text/", body)["generated_texts"][UPSTREAM_NAME]
    answer = client.post("/generate-text/", json=body)
    assert answer.json() == {"generated_texts": {NAME: expected}}
    assert len(set(expected)) == 3
    path = client.get(f"/{PROMPT}", params={"num_return_sequences": 3, **PARAMS})
    assert path.json() == {"generated_sequences": expected}


def test_generate_text_gives_the_text(client: httpx.Client, upstream: Upstream) -> None:
    body = {"prompt": PROMPT, **PARAMS}
    expected = upstream.post("/generate", body)["generated_text"]
    assert PROMPT + client.post("/generate/text", json=body).text == expected
    assert PROMPT + client.get("/generate/text", params=body).text == expected


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3, "logprobs": 2},
        {"prompt": [PROMPT, "The old king"], "n": 2},
        {"prompt": [PROMPT, "The old king"], "n": 2, "best_of": 4},
        {"echo": True, "logprobs": 1, "stop": "\n"},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"max_tokens": 20, "temperature": 0, "frequency_penalty": 1, "logit_bias": {"11": -100}},
        {"max_tokens": -1, "stop": ["e"], "include_stop_str_in_output": True},
        {"stop_token_ids": [11], "logit_bias": {"11": 100}, "seed": 2**64 - 1},
    ],
)
def test_completion_is_upstreams(client: httpx.Client, upstream: Upstream, body: Any) -> None:
    body = {"prompt": PROMPT, "seed": 1, **body}
    expected = upstream.post("/v1/completions", body)
    answer = client.post("/v1/completions", json=body).json()
    for name in ("choices", "usage", "object"):
        assert answer[name] == expected[name]
    assert (answer["model"], answer["id"] == expected["id"]) == (NAME, False)


def test_completion_streams_what_upstream_says(client: httpx.Client, upstream: Upstream) -> None:
    body = {"prompt": [PROMPT, "A fox"], "n": 2, "seed": 1, "logprobs": 1, "max_tokens": 20}
    expected = upstream.post("/v1/completions", body)
    texts, tokens = [""] * 4, [[], [], [], []]
    options = {"stream_options": {"include_usage": True}}
    *chunks, (_, last) = read_events(client, {**body, **options})
    for _, chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
    assert texts == [choice["text"] for choice in expected["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in expected["choices"]]
    assert (last["choices"], last["usage"]) == ([], expected["usage"])
    assert len(chunks) > 40


@pytest.mark.parametrize("streams", [False, True])
def test_chat_through_openais_client(
    client: httpx.Client, upstream: Upstream, streams: bool
) -> None:
    body: Any = {
        "messages": [{"role": "user", "content": "Hello"}], "seed": 1, "max_tokens": 12,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    expected = upstream.post("/v1/chat/completions", body)["choices"][0]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as made:
        answer = made.chat.completions.create(model=NAME, stream=streams, **body)
        chunks = list(answer) if streams else [answer]
    parts = [c.delta if streams else c.message for chunk in chunks for c in chunk.choices]
    tokens = [c.logprobs.content for chunk in chunks for c in chunk.choices if c.logprobs]
    assert "".join(part.content or "" for part in parts) == expected["message"]["content"]
    assert parts[0].role == "assistant"
    given = [token.model_dump() for content in tokens for token in content]
    assert given == expected["logprobs"]["content"]
    assert chunks[-1].choices[0].finish_reason == expected["finish_reason"]


def test_connection_is_used_again(upstream: Upstream) -> None:
    engine, used = connected(upstream.service.address), set()
    with in_front(engine) as client:
        for body in ({}, {"stream": True}, {}):
            assert client.post("/generate", json={"prompt": PROMPT, **body}).status_code == 200
            (pool,) = pools(engine)
            used |= set(pool.connections)
    assert len(used) == 1


def test_generate_texts_beside_a_local_model(upstream: Upstream) -> None:
    engine, body = connected(upstream.service.address), {"prompt": PROMPT, **PARAMS}
    with in_front(engine) as client, pytest.MonkeyPatch.context() as patch:
        patch.setitem(main.registry.backends, LOCAL.name, LOCAL)
        texts = client.post("/generate-text/", json=body).json()["generated_texts"]
        assert list(texts) == [NAME, LOCAL.name]
        assert all(text.startswith(PROMPT) for each in texts.values() for text in each)
        before = metric(client.get("/metrics").text, "filter_hits_total")
        answer = client.post("/generate-text/", json={"prompt": "I hate it"})
        assert (answer.status_code, answer.json()) == (400, {"detail": FORBIDDEN_PROMPT})
        assert metric(client.get("/metrics").text, "filter_hits_total") == before + 1
        patch.setattr(engine.upstream, "url", "http://127.0.0.1:9/v1")
        answer = client.post("/generate-text/", json={**body, "max_new_tokens": 200})
        assert (answer.status_code, answer.json()) == (503, {"detail": UNREACHABLE})
        wait_until(lambda: LOCAL.num_running == 0)


def test_log_metrics_and_request_id_tell_of_it(
    client: httpx.Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    monkeypatch.setattr(
        logging.getLogger("service"), "info", lambda *_, extra: lines.append(extra["facts"])
    )
    before = client.get("/metrics").text
    body = {"prompt": PROMPT, "max_new_tokens": 7, "seed": 1}
    client.post("/generate", json=body, headers={"X-Request-ID": "the-same"})
    wait_until(lambda: len(lines) == 2)
    facts = {"model": NAME, "prompt_tokens": 4, "generated_tokens": 7, "finish_reason": "length"}
    assert facts.items() <= lines[1].items()
    wait_until(lambda: any('"the-same"' in line for line in upstream.service.lines))
    after = client.get("/metrics").text
    for name, difference in (
        ("vllm:generation_tokens_total", 7),
        ("vllm:prompt_tokens_total", 4),
        ("vllm:request_success_total", 1),
        ("vllm:time_to_first_token_seconds_count", 1),
    ):
        assert metric(after, name) - metric(before, name) == difference


def test_service_routes_know_external_models(client: httpx.Client, engine: ExternalBackend) -> None:
    engine.upstream._read_models(b'{"data": [{"id": "gpt2-tales", "max_model_len": 512}]}')
    models = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["owned_by"], m["max_model_len"]) for m in models] == [
        (NAME, "external", 512)
    ]
    ready = client.get("/ready").json()
    assert (ready["status"], ready["model_names"], ready["loaded_model_names"]) == (
        "ready", [NAME], []
    )  # fmt: skip
    assert client.get("/openapi.json").status_code == 200


# --- Refusals -----------------------------------------------------------------------------------


def test_forbidden_prompt_is_refused_here(client: httpx.Client, upstream: Upstream) -> None:
    body = {"prompt": "I hate it"}
    num_lines = len(upstream.service.lines)
    answer = client.post("/generate", json=body)
    assert (answer.status_code, answer.json()) == (400, {"detail": FORBIDDEN_PROMPT})
    answer = client.post("/v1/completions", json={"prompt": [PROMPT, "I hate it"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    chat = {"messages": [{"role": "user", "content": "I hate it"}]}
    answer = client.post("/v1/chat/completions", json=chat)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
    assert len(upstream.service.lines) == num_lines


def test_max_length_counts_the_prompts_tokens(client: httpx.Client) -> None:
    body = {"prompt": PROMPT * 10, "max_length": 20}
    answer = client.post("/generate", json=body)
    (problem,) = answer.json()["detail"]
    assert answer.status_code == 422
    assert problem["loc"] == ["body", "max_length"]
    assert re.search(r"20 tokens.* 4\d tokens", problem["msg"])


def test_max_new_tokens_is_cut_to_the_context(
    client: httpx.Client, engine: ExternalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.upstream, "max_model_len", 16)
    monkeypatch.setattr(engine.upstream, "_read_models", lambda _: None)
    body = {"prompt": PROMPT, "max_new_tokens": 100, "num_return_sequences": 1}
    before = metric(client.get("/metrics").text, "vllm:generation_tokens_total")
    assert client.post("/generate-text/", json=body).status_code == 200
    after = metric(client.get("/metrics").text, "vllm:generation_tokens_total")
    assert after - before == 1 + 12  # one to count the prompt's four


def test_limits_hold_and_refuse_before_anything_is_sent(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt was sent to be counted before the limit was looked at."""
    backend = connected(upstream.service.address)
    monkeypatch.setattr(backend.upstream, "max_model_len", None)
    monkeypatch.setattr(backend.upstream, "_read_models", lambda _: None)
    limited = RateLimitMiddleware(main.app, Settings(token_rate_limit=100))
    app = RequestContextMiddleware(ApiKeyMiddleware(limited, {}, True, False))
    completion = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    with in_front(backend, app) as http:
        assert http.post("/v1/completions", json=completion).status_code == 200
        assert http.get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "36"
        num_prompt_tokens = upstream.figure("vllm:prompt_tokens_total")
        answers = [
            http.post("/generate", json={"prompt": PROMPT, "max_length": 50}),
            http.post("/generate", json={"prompt": PROMPT, "max_length": 150}),
            http.post("/v1/chat/completions", json=chat),
        ]
    assert [answer.status_code for answer in answers] == [429, 422, 400]
    assert "more than the limit of 100 tokens" in answers[2].json()["error"]["message"]
    assert upstream.figure("vllm:prompt_tokens_total") == num_prompt_tokens


def test_native_request_is_reserved_once(upstream: Upstream) -> None:
    """Its tokens were reserved twice, so half of the limit was refused as more than all of it."""
    limited = RateLimitMiddleware(main.app, Settings(token_rate_limit=100))
    app = RequestContextMiddleware(ApiKeyMiddleware(limited, {}, True, False))
    with in_front(connected(upstream.service.address), app) as http:
        answer = http.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 60})
    assert (answer.status_code, answer.json()["model_name"]) == (200, NAME)


def test_tokens_of_another_server_are_refused(client: httpx.Client) -> None:
    """Its tokenizer is there, and what it says of tokens is not read."""
    for response in (
        client.post("/tokenize", json={"prompt": PROMPT}),
        client.post("/detokenize", json={"tokens": [1]}),
        client.get("/tokenizer_info"),
    ):
        assert refused_fields(response)[0][-1] == "model"
    for field, value in (("return_token_ids", True), ("prompt_logprobs", 0)):
        answer = client.post("/v1/completions", json={"prompt": PROMPT, field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_token_ids_are_refused(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": [1, 2]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_too_long_prompt_keeps_its_code(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": "king " * 600})
    assert answer.status_code == 400
    error = {"message": REFUSED, "type": "invalid_request_error", "param": None}
    assert answer.json() == {"error": {**error, "code": "context_length_exceeded"}}


def test_upstreams_refusal_is_a_422_of_native_routes(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "top_k": 10_000_000}
    answer = client.post("/generate", json=body)
    problem = {"loc": ["body"], "msg": REFUSED, "type": "value_error"}
    assert (answer.status_code, answer.json()) == (422, {"detail": [problem]})


@pytest.mark.parametrize("key", [None, SecretStr("another-secret")])
def test_without_upstreams_key_the_model_fails(
    upstream: Upstream, capfd: pytest.CaptureFixture[str], key: Any
) -> None:
    engine = connected(upstream.service.address, external_api_key=key)
    with in_front(engine) as client:
        answer = client.post("/generate", json={"prompt": PROMPT})
    assert (answer.status_code, answer.json()) == (500, {"detail": "Model inference failed"})
    assert "another-secret" not in answer.text + "".join(capfd.readouterr())


def test_full_upstream_is_a_503(client: httpx.Client, upstream: Upstream) -> None:
    with ExitStack() as open_streams:
        for n in (8, 2):  # eight sequences run, two wait
            body = {**LONG, "n": n, "stream": True}
            open_streams.enter_context(client.stream("POST", "/v1/completions", json=body))
        answer = client.post("/generate", json={"prompt": PROMPT})
    assert (answer.status_code, answer.json()) == (503, {"detail": BUSY})
    assert answer.headers["retry-after"] == "1"
    wait_until(upstream.is_idle)


def test_so_many_requests_are_open_at_once_and_no_more(upstream: Upstream) -> None:
    engine = connected(upstream.service.address, max_num_seqs=1, max_queue_size=1)
    with in_front(engine) as client, ExitStack() as open_streams:
        for _ in range(2):
            body = {**LONG, "n": 1, "stream": True}
            open_streams.enter_context(client.stream("POST", "/v1/completions", json=body))
        answer = client.post("/generate", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()) == (503, {"detail": OVERLOADED})
        assert client.get("/ready").status_code == 503


def test_one_client_leaves_requests_for_others(upstream: Upstream) -> None:
    """One client had all requests that may be open at a time."""
    engine = connected(upstream.service.address, max_num_seqs=1, max_queue_size=8)
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with in_front(engine) as client, ExitStack() as open_streams:

        def ask(from_address: str) -> int:
            headers = {"X-Forwarded-For": from_address}
            answer = client.stream("POST", "/v1/completions", json=body, headers=headers)
            return open_streams.enter_context(answer).status_code

        assert [ask("10.0.0.1") for _ in range(9)] == [200] * 8 + [503]
        assert client.get("/ready").status_code == 200
        assert [ask("10.0.0.2"), ask("10.0.0.3")] == [200, 503]


# --- The filter on what upstream says -----------------------------------------------------------


def word_of_several_tokens(tokens: list[str]) -> str:
    """One that upstream says, after a space, in more than one chunk."""
    for first, second in pairwise(tokens):
        if re.fullmatch(r" [a-z]{2,}", first) and re.fullmatch(r"[a-z]{2,}", second):
            return re.search(rf"{first.strip()}{second}[a-z]*", "".join(tokens))[0]
    raise AssertionError("no such word")


@pytest.mark.parametrize("streams", [False, True])
def test_forbidden_word_ends_the_choice(upstream: Upstream, streams: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 300, "seed": 4, "logprobs": 0, "ignore_eos": True}
    said = upstream.post("/v1/completions", body)["choices"][0]
    words = ContentFilter(word_of_several_tokens(said["logprobs"]["tokens"]))
    engine = connected(upstream.service.address)
    engine.text_filter = words
    with in_front(engine) as client:
        if streams:
            choices = [chunk["choices"][0] for _, chunk in read_events(client, body)]
        else:
            choices = client.post("/v1/completions", json=body).json()["choices"]
    expected = said["text"][: words.find(said["text"])[0]]
    assert "".join(choice["text"] for choice in choices) == expected
    assert choices[-1]["finish_reason"] == "content_filter"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert expected.startswith("".join(tokens))
    wait_until(upstream.is_idle)


def test_forbidden_alternatives_are_left_out(upstream: Upstream) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 5, "temperature": 0}
    (top,) = upstream.post("/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"]
    word = next(text for text in list(top)[1:] if re.fullmatch(" [a-z]{2,}", text))
    engine = connected(upstream.service.address)
    engine.text_filter = ContentFilter(word)
    with in_front(engine) as client:
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
    del top[word]
    assert choice["logprobs"]["top_logprobs"] == [top]


# --- Clients that leave, deadlines --------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_client_that_leaves_frees_its_place_upstream(
    client: httpx.Client, engine: ExternalBackend, upstream: Upstream, streams: bool
) -> None:
    body = {**LONG, "stream": streams}
    before = upstream.figure("vllm:generation_tokens_total")

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=client.base_url) as leaving:
            await asyncio.wait_for(leaving.post("/v1/completions", json=body), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    wait_until(upstream.is_idle)
    num_generated = upstream.figure("vllm:generation_tokens_total") - before
    assert num_generated < LONG["n"] * LONG["max_tokens"]
    wait_until(lambda: not connections(engine))  # one may be looking for upstream


@pytest.mark.parametrize(("path", "body"), [("/generate", {}), ("/v1/completions", {"n": 2})])
def test_client_that_leaves_before_upstream_answers(path: str, body: dict[str, Any]) -> None:
    with scripted(b"", stays=True) as address:
        engine = connected(address)
        with in_front(engine) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json={"prompt": PROMPT, **body}, timeout=0.3)
            wait_until(lambda: not engine._generations)
            assert not connections(engine)


def test_deadline_is_a_504(
    client: httpx.Client,
    engine: ExternalBackend,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "request_timeout_seconds", 0.3)
    answer = client.post("/v1/completions", json=LONG)
    message = "The request took longer than 0.3 seconds"
    assert (answer.status_code, answer.json()["error"]["message"]) == (504, message)
    wait_until(upstream.is_idle)


def test_deadline_of_a_stream_is_an_error_event(
    client: httpx.Client,
    engine: ExternalBackend,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy machine may make no chunk within a short deadline; then a longer one is tried."""
    for seconds in (0.3, 1, 3, 9):
        monkeypatch.setattr(engine, "request_timeout_seconds", seconds)
        answer = client.post("/v1/completions", json={**LONG, "stream": True})
        *chunks, (_, last) = events(answer.text) if answer.status_code == 200 else [(None, {})]
        if chunks:
            break
    assert chunks
    assert last["error"]["message"] == f"The request took longer than {seconds:g} seconds"
    wait_until(upstream.is_idle)


def test_deadline_holds_before_upstream_answers() -> None:
    with (
        scripted(b"", stays=True) as address,
        in_front(connected(address, request_timeout_seconds=0.2)) as client,
    ):
        answer = client.post("/generate", json={"prompt": PROMPT, "stream": True})
        assert answer.status_code == 504


def test_stopping_ends_what_runs(
    client: httpx.Client, engine: ExternalBackend, upstream: Upstream
) -> None:
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        chunks = response.iter_text()
        next(chunks)
        engine.stop()
        rest, _ = read_all(chunks)
    assert events(rest)[-1][1]["error"]["message"] == STOPPING
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 503
    engine._is_stopping = False  # `start` would look for upstream on this thread's event loop
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 200


# --- Upstreams that misbehave -------------------------------------------------------------------


@contextmanager
def scripted(answer: bytes, stays: bool = False) -> Iterator[str]:
    """The address of a server that says this and closes the connection, or keeps it open."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:  # closed: the end of the test
                return
            with suppress(OSError):  # of a client that has heard enough
                connection.recv(65536)
                connection.sendall(answer)
                if stays:
                    kept.append(connection)
                    continue
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # a close before all is read is a reset, and
                    pass  # takes the answer with it
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in kept:
            connection.close()


def streamed(*contents: Any, status: bytes = b"200 OK") -> bytes:
    lines = [c if isinstance(c, bytes) else b"data: " + json.dumps(c).encode() for c in contents]
    return b"HTTP/1.1 " + status + b"\r\n\r\n" + b"".join(line + b"\n\n" for line in lines)


CHUNK = {"choices": [{"index": 0, "text": " there", "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "text": " was", "finish_reason": "stop"}]}
DONE = b"data: [DONE]"


@pytest.mark.parametrize(
    "answer",
    [
        streamed(CHUNK),
        streamed(CHUNK, {"object": "error", "message": PROMPT, "code": 400}, DONE),
        streamed(CHUNK, {"error": {"message": PROMPT, "code": 500}}),
        streamed(CHUNK, b"data: {"),
        streamed(CHUNK, b"data: " + b"[" * 100_000),
        streamed(CHUNK, {"choices": [{"index": 1, "text": "a"}]}),
        streamed(CHUNK, {"choices": [{"index": -1, "text": "a"}]}),
        streamed(CHUNK, {"choices": [{"index": 0, "text": "\ud800"}]}),
        streamed(CHUNK, b"data: 3"),
        streamed(CHUNK, {"choices": [{"index": 0, "text": 3}]}),
        streamed(CHUNK, {"choices": [], "usage": {"prompt_tokens": -1}}),
        streamed(CHUNK, b"data: {" + b" " * 9_000_000),
        streamed(CHUNK).replace(b"\r\n\r\n", b"\r\nContent-Length: 10000\r\n\r\n"),
    ],
    ids=range(13),
)
def test_broken_stream_is_an_error(answer: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with scripted(answer) as address, in_front(connected(address)) as client:
        whole = client.post("/generate", json={"prompt": PROMPT})
        assert (whole.status_code, whole.json()) == (500, {"detail": "Model inference failed"})
        *chunks, last = read_events(client, {"prompt": PROMPT}, "/generate")
        assert last == ("error", {"detail": "Model inference failed"})
        assert chunks == [(None, {"text": " there"})]
        (error,) = [e for _, e in read_events(client, {"prompt": PROMPT}) if "error" in e]
        assert error["error"]["message"] == "Model inference failed"
    assert PROMPT not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 500),
        (b"nonsense\r\n\r\n", 500),
        (streamed(status=b"500 Oops"), 500),
        (streamed(status=b"307 Elsewhere\r\nLocation: /v2"), 500),
        (streamed(status=b"403 No"), 500),
        (streamed(b"[" * 100_000, status=b"400 Bad"), 422),
        (streamed(status=b"400 Bad\r\nContent-Length: 100"), 422),
        (streamed(status=b"404 Not Found"), 500),
        (streamed(status=b"503 Busy\r\nRetry-After: 7"), 503),
        (streamed(status=b"429 Busy\r\nRetry-After: <script>"), 503),
    ],
)
def test_refusal_has_a_status_of_its_own(answer: bytes, status: int) -> None:
    with scripted(answer) as address, in_front(connected(address)) as client:
        response = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert response.status_code == status
    if status == 503:
        assert response.headers["retry-after"] == ("7" if b"Retry-After: 7" in answer else "1")


def test_stream_without_its_last_line_is_whole() -> None:
    """Some servers send no usage, no [DONE], or keep the connection open."""
    for ending in ((), (DONE,)):
        with (
            scripted(streamed(CHUNK, b": a comment", LAST, *ending), stays=True) as address,
            in_front(connected(address)) as client,
        ):
            answer = client.post("/generate", json={"prompt": PROMPT})
            assert answer.json()["generated_text"] == PROMPT + " there was"


FOREIGN = {"choices": [{"index": 0, "text": " was", "finish_reason": "eos_token"}]}
LOGPROBS = {"content": [{"id": 1, "token": " there", "logprob": float("-inf"), "top_logprobs": []}]}
WITH_LOGPROBS = {"choices": [{"index": 0, "text": " there", "logprobs": LOGPROBS}]}
UNREASONED = {"choices": [{"index": 0, "text": " was", "finish_reason": ""}]}


@pytest.mark.parametrize(
    "answer",
    [
        streamed(CHUNK, FOREIGN, DONE),
        streamed(CHUNK, UNREASONED, DONE),
        streamed(CHUNK, {"usage": {"prompt_tokens": 4, "completion_tokens": 2}}, LAST, DONE),
        streamed(CHUNK, {"choices": None, "usage": {}}, LAST, DONE),
        streamed(WITH_LOGPROBS, LAST, DONE),
        streamed(b"\xef\xbb\xbfdata: " + json.dumps(CHUNK).encode(), LAST, DONE),
        streamed(CHUNK, LAST, DONE).replace(b"\n\n", b"\r\r"),
    ],
    ids=range(7),
)
def test_text_is_not_lost_over_an_ornament(answer: bytes) -> None:
    """Each of these was a 500. TGI ends with `eos_token`; others with no reason, with usage and no
    choices, with log probabilities of another form, a byte order mark, CR alone."""
    with scripted(answer) as address, in_front(connected(address)) as client:
        whole = client.post("/v1/completions", json={"prompt": PROMPT, "logprobs": 0}).json()
        (choice,) = whole["choices"]
        assert (choice["text"], choice["finish_reason"]) == (" there was", "stop")


# --- Upstream goes, and returns -----------------------------------------------------------------


def test_unreachable_upstream_is_tried_again_and_then_a_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    engine = connected(address)
    send, attempts = httpx.AsyncClient.send, []

    async def count(self: Any, request: httpx.Request, **options: Any) -> httpx.Response:
        attempts.append(request.url.path)
        return await send(self, request, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", count)
    with in_front(engine) as client:
        assert client.get("/ready").status_code == 200
        began = time.monotonic()
        answer = client.post("/generate", json={"prompt": PROMPT})
        assert time.monotonic() - began > sum(RETRY_PAUSES_SECONDS) / 2
        assert (answer.status_code, answer.json()) == (503, {"detail": UNREACHABLE})
        assert answer.headers["retry-after"] == "1"
        assert attempts.count("/v1/completions") == 3
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["status"] == "no external model can be reached"
        monkeypatch.setitem(main.registry.backends, LOCAL.name, LOCAL)
        assert client.get("/ready").status_code == 200


def test_service_of_external_models_alone_starts_without_them() -> None:
    code = (
        "import main, sys, time\n"
        "from fastapi.testclient import TestClient\n"
        "with TestClient(main.app) as client:\n"
        "    while client.get('/ready').status_code == 200: time.sleep(0.01)\n"
        "    told = [client.get('/openapi.json').status_code, main.registry.default.is_healthy]\n"
        "    told.append(client.get('/v1/models').json()['data'][0]['max_model_len'])\n"
        "print(told, file=sys.stderr)\n"
    )
    settings = {"MODEL_NAME": "far=http://127.0.0.1:9/v1,https=https://127.0.0.1:9/v1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.endswith("[200, False, None]\n")
    assert run.stdout.count("far: upstream cannot be reached") == 1


@pytest.mark.parametrize(
    "entry",
    [
        "a=http://", "a=http://user:pass@host/v1", "a=https://host/v1?key=1", "a=http://h:x/v1",
        "a=ftp://host/v1", "=http://host/v1", "a=http://host:99999/v1",
    ],
)  # fmt: skip
def test_bad_address_stops_the_start(entry: str) -> None:
    settings = main.settings.model_copy(update={"model_name": entry})
    with pytest.raises(SystemExit, match=r"MODEL_NAME: 'a?' is to be served") as stopped:
        load_models(settings, main.content_filter, pytest.fail)
    assert "pass" not in str(stopped.value)


def test_bad_key_stops_the_start() -> None:
    with pytest.raises(SystemExit, match="EXTERNAL_API_KEY: has") as stopped:
        connected("http://host", external_api_key=SecretStr("two\nlines"))
    assert "two" not in str(stopped.value)


def test_killed_upstream_ends_streams_and_serves_again_once_back(
    client: httpx.Client, engine: ExternalBackend, upstream: Upstream
) -> None:
    """The last test but one: upstream comes back with a rate limit."""
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        chunks = response.iter_text()
        next(chunks)
        upstream.service.process.send_signal(signal.SIGKILL)
        rest, is_whole = read_all(chunks)
    assert is_whole
    assert rest.endswith(
        'data: {"error": {"message": "Model inference failed", "type": "server_error", '
        '"param": null, "code": null}}\n\n'
    )
    upstream.service.process.wait(60)  # until then its socket still takes connections
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 503
    assert not engine._generations
    wait_until(lambda: not connections(engine))  # one may be looking for upstream
    upstream.start(RATE_LIMIT="4")
    wait_until(lambda: client.get("/ready").status_code == 200)
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 200
    tasks = {task for loop in engine.upstream._clients for task in asyncio.all_tasks(loop)}
    assert not [task for task in tasks if "ExternalBackend" in repr(task)]
    assert not [task for task in tasks if "Upstream" in repr(task)]


def test_rate_limited_upstream_is_a_503(client: httpx.Client) -> None:
    while (answer := client.post("/generate", json={"prompt": PROMPT})).status_code == 200:
        pass
    assert (answer.status_code, answer.json()) == (503, {"detail": BUSY})
    assert 1 <= int(answer.headers["retry-after"]) <= 60
