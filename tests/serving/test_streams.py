"""The service on a real uvicorn: streams, disconnects, overload, deadlines, failures.

TestClient buffers whole bodies, so it proves nothing of this. One server for all tests, on
a free port of the loopback, in a thread: so that a test may look at the engine meanwhile,
and break it. `slow` makes every step take a while, so that nothing hangs on the machine.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

import main
from engine.request import Sequence
from tests.support import (
    PROMPT,
    events,
    fail,
    metric,
    read_all,
    serve_in_thread,
    stream,
    until,
    wait_until,
)

engine = main.engine

STEP_SECONDS = 0.01
LONG = {"prompt": PROMPT, "max_new_tokens": 200, "seed": 1}  # of a `slow` model: 2 s and more
LONG_STREAM = {**LONG, "stream": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve_in_thread(main.app) as address:
        yield address


@pytest.fixture(autouse=True)
def _idle_afterwards() -> Iterator[None]:
    """No test leaves anything running or waiting."""
    yield
    wait_until(is_idle)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at least STEP_SECONDS."""
    forward = engine.model.forward

    def wait_and_forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", wait_and_forward)


@pytest.fixture
def crowded(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places, two requests may wait."""
    monkeypatch.setattr(engine.scheduler, "max_num_seqs", 2)
    monkeypatch.setattr(engine.scheduler, "max_queue_size", 2)


@asynccontextmanager
async def client(address: str, from_address: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    """from_address: as a proxy would tell it."""
    limits = httpx.Limits(max_connections=200)
    headers = {"X-Forwarded-For": from_address}
    async with httpx.AsyncClient(
        base_url=address, timeout=60, limits=limits, headers=headers
    ) as made:
        yield made


def is_idle() -> bool:
    return engine.num_running == engine.num_waiting == 0


def post(address: str, body: Any, path: str = "/generate", **options: Any) -> httpx.Response:
    return httpx.post(address + path, json=body, timeout=60, **options)


@asynccontextmanager
async def occupied(http: httpx.AsyncClient, running: int, waiting: int = 0) -> AsyncIterator[None]:
    """So many long requests run, so many wait; all are left at the end of the block."""
    tasks = [asyncio.ensure_future(http.post("/generate", json=LONG)) for _ in range(running)]
    await until(lambda: engine.num_running == running)
    for i in range(waiting):
        tasks.append(asyncio.ensure_future(http.post("/generate", json=LONG)))
        await until(lambda count=i + 1: engine.num_waiting == count)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


# --- Streams ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
def test_first_event_arrives_before_the_last_token_is_made(address: str) -> None:
    with stream(address, LONG_STREAM) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()  # kept: the connection closes with it
        first = next(lines)
        assert engine.num_running == 1
    assert list(json.loads(first.removeprefix("data: "))) == ["text"]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_first_text_arrives_before_the_last_token_is_made(address: str, method: str) -> None:
    place = {"params": LONG} if method == "GET" else {"json": LONG}
    with httpx.stream(method, address + "/generate/text", timeout=60, **place) as response:
        assert response.headers["content-type"].startswith("text/plain")
        chunks = response.iter_text()  # kept: the connection closes with it
        assert next(chunks)
        assert engine.num_running == 1


@pytest.mark.parametrize("seed", range(4))
def test_event_stream_says_what_the_whole_answer_says(address: str, seed: int) -> None:
    body = {"prompt": PROMPT, "seed": seed, "max_new_tokens": 60, "temperature": 1.5}
    whole = post(address, body).json()
    streamed = post(address, {**body, "stream": True})
    *parts, (_, last) = events(streamed.text)
    assert last == whole
    assert all(name is None and list(content) == ["text"] for name, content in parts)
    assert PROMPT + "".join(content["text"] for _, content in parts) == whole["generated_text"]
    assert len(parts) > 5


@pytest.mark.parametrize("seed", range(2))
def test_plain_stream_says_what_the_whole_answer_says(address: str, seed: int) -> None:
    body = {"prompt": PROMPT, "seed": seed, "max_new_tokens": 60}
    whole = post(address, body).json()["generated_text"]
    assert PROMPT + post(address, body, "/generate/text").text == whole
    assert PROMPT + httpx.get(address + "/generate/text", params=body).text == whole


def test_stream_headers(address: str) -> None:
    response = post(address, {**LONG_STREAM, "max_new_tokens": 2}, headers={"X-Request-ID": "me"})
    assert response.headers["x-request-id"] == "me"
    assert response.headers["cache-control"] == "no-store"
    assert "content-length" not in response.headers


@pytest.mark.parametrize("stop", ["e", " the", "ing"])
def test_stream_with_stop_string(address: str, stop: str) -> None:
    body = {"prompt": PROMPT, "seed": 3, "max_new_tokens": 100, "stop": [stop, "zzz"]}
    whole = post(address, body).json()["generated_text"]
    *parts, (_, last) = events(post(address, {**body, "stream": True}).text)
    assert last["generated_text"] == whole
    assert stop not in whole.removeprefix(PROMPT)
    assert PROMPT + "".join(content["text"] for _, content in parts) == whole


def test_refusal_of_a_stream_is_an_ordinary_answer(address: str) -> None:
    response = post(address, {**LONG_STREAM, "prompt": "I hate you"})
    assert response.status_code == 400
    assert response.json() == {"detail": "Prompt contains inappropriate content"}


# --- Clients that go away -----------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("path", ["/generate", "/generate-text/", "/generate/text"])
def test_client_that_leaves_frees_its_place(address: str, path: str) -> None:
    async def leave() -> Sequence:
        async with client(address) as http:
            body = {k: v for k, v in LONG.items() if path != "/generate/text" or k != "stream"}
            task = asyncio.ensure_future(http.post(path, json=body))
            await until(lambda: engine.num_running == 1)
            (sequence,) = engine.scheduler.running
            task.cancel()
            await until(is_idle)
            return sequence

    assert asyncio.run(leave()).request.num_generated_tokens < LONG["max_new_tokens"] / 2


@pytest.mark.usefixtures("slow")
def test_client_that_leaves_a_stream_frees_its_place(address: str) -> None:
    with stream(address, LONG_STREAM) as response:
        lines = response.iter_lines()  # kept: the connection closes with it
        next(lines)
        (sequence,) = engine.scheduler.running
    wait_until(is_idle)
    assert sequence.request.num_generated_tokens < LONG["max_new_tokens"] / 2


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("streams", [False, True])
def test_client_that_leaves_the_queue_frees_its_place(address: str, streams: bool) -> None:
    async def leave() -> None:
        async with client(address) as http, occupied(http, running=2):
            task = asyncio.ensure_future(http.post("/generate", json={**LONG, "stream": streams}))
            await until(lambda: engine.num_waiting == 1)
            task.cancel()
            await until(lambda: engine.num_waiting == 0)
            assert engine.num_running == 2

    asyncio.run(leave())


@pytest.mark.usefixtures("crowded")
def test_clients_that_leave_change_no_other_text(address: str) -> None:
    stays = {"prompt": PROMPT, "seed": 5, "max_new_tokens": 60}

    async def leave() -> tuple[Any, Any]:
        async with client(address) as http:
            alone = (await http.post("/generate", json=stays)).json()
            stay = asyncio.ensure_future(http.post("/generate", json=stays))
            for _ in range(5):
                task = asyncio.ensure_future(http.post("/generate", json=LONG))
                await until(lambda: engine.num_running == 2 or stay.done())
                task.cancel()
                await until(lambda: engine.num_running < 2)
            return alone, (await stay).json()

    alone, together = asyncio.run(leave())
    assert together == alone


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"POST /gene",
        b"POST /generate HTTP/1.1\r\nHost: [::1]\r\n",
        b"POST /generate HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 99\r\n\r\n",
        b'POST /generate HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 99\r\n\r\n{"prompt": "Onc',
        b'POST /generate HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"pro',
        b"\0\xff\r\n\r\n",
        b"GET /Once%20upon?max_new_tokens=200 HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    ],
)
def test_broken_off_request_does_no_harm(address: str, head: bytes) -> None:
    host, port = address.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head)
    wait_until(is_idle)
    assert post(address, {"prompt": PROMPT, "max_new_tokens": 2}).status_code == 200


# --- Overload -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", LONG),
        ("/generate", LONG_STREAM),
        ("/generate-text/", {"prompt": PROMPT}),
        ("/generate/text", LONG),
    ],
)
def test_full_queue_refuses_at_once(address: str, path: str, body: Any) -> None:
    async def overload() -> tuple[httpx.Response, float]:
        async with client(address) as http, occupied(http, running=2, waiting=2):
            sent = time.monotonic()
            response = await http.post(path, json=body)
            seconds = time.monotonic() - sent
            assert (engine.num_running, engine.num_waiting) == (2, 2)
            return response, seconds

    response, seconds = asyncio.run(overload())
    assert response.status_code == 503
    assert response.json() == {"detail": "Too many requests are waiting; try again shortly"}
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-request-id"]
    assert seconds < 1


@pytest.mark.usefixtures("crowded")
def test_ready_says_that_the_queue_is_full_for_everybody(address: str) -> None:
    """What one client has queued keeps nobody else out."""

    async def overload() -> list[httpx.Response]:
        async with client(address) as http, client(address, "10.0.0.2") as another:
            async with occupied(http, running=2, waiting=2):
                answers = [await another.get("/ready")]
                last = asyncio.ensure_future(another.post("/generate", json=LONG))
                await until(lambda: engine.num_waiting == 3)
                answers.append(await another.get("/ready"))
                last.cancel()
            await until(is_idle)
            return [*answers, await http.get("/ready")]

    taken, full, free = asyncio.run(overload())
    assert (taken.status_code, full.status_code, free.status_code) == (200, 503, 200)
    assert "full" in full.json()["status"]
    assert free.json()["status"] == "ready"


def test_health_answers_under_load(address: str) -> None:
    async def load() -> list[float]:
        num_running = engine.scheduler.max_num_seqs * 7 // 8  # as many as one client may have
        async with client(address) as http, occupied(http, running=num_running):
            seconds = []
            for _ in range(10):
                sent = time.monotonic()
                assert (await http.get("/health")).json() == {"health": "ok"}
                seconds.append(time.monotonic() - sent)
            return seconds

    assert sorted(asyncio.run(load()))[5] < 0.25


def test_many_different_requests_are_all_answered(address: str) -> None:
    async def send(http: httpx.AsyncClient, i: int) -> httpx.Response:
        body = {"prompt": PROMPT, "max_new_tokens": 1 + i % 40, "temperature": (i % 5) / 2}
        if i % 4 == 0:
            return await http.post("/generate", json={**body, "stream": True})
        if i % 4 == 1:
            return await http.post("/generate-text/", json={**body, "num_return_sequences": 3})
        if i % 4 == 2:
            return await http.get("/generate/text", params={**body, "prompt": PROMPT * (1 + i % 9)})
        return await http.get("/" + PROMPT, params={"max_new_tokens": 5, "top_k": i})

    async def load() -> list[httpx.Response]:
        async with client(address) as http:
            return await asyncio.gather(*(send(http, i) for i in range(64)))

    responses = asyncio.run(load())
    assert [response.status_code for response in responses] == [200] * 64
    assert len({response.headers["x-request-id"] for response in responses}) == 64
    assert all(events(response.text)[-1][1]["model_name"] for response in responses[::4])


# --- Deadlines ----------------------------------------------------------------------------------


@pytest.fixture
def short_deadline(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.registry.default, "request_timeout_seconds", 0.3)


TOO_LATE = {"detail": "The request took longer than 0.3 seconds"}


@pytest.mark.usefixtures("short_deadline")
@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", LONG), ("/generate-text/", {**LONG, "num_return_sequences": 2})],
)
def test_deadline(address: str, path: str, body: Any) -> None:
    response = post(address, body, path)
    assert response.status_code == 504
    assert response.json() == TOO_LATE
    assert response.headers["x-request-id"]
    wait_until(is_idle, seconds=100 * STEP_SECONDS)


@pytest.mark.usefixtures("short_deadline")
def test_deadline_of_an_event_stream(address: str) -> None:
    response = post(address, LONG_STREAM)
    assert response.status_code == 200
    *parts, last = events(response.text)
    assert parts
    assert last == ("error", TOO_LATE)


@pytest.mark.usefixtures("short_deadline")
def test_deadline_breaks_plain_text_off(address: str) -> None:
    with stream(address, LONG, "/generate/text") as response:
        assert response.headers["x-request-id"]
        got, is_whole = read_all(response.iter_text())
    assert got.endswith("\n[The request took longer than 0.3 seconds]\n")
    assert not is_whole


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("streams", [False, True])
def test_deadline_holds_in_the_queue(
    address: str, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait() -> httpx.Response:
        async with client(address) as http, occupied(http, running=2):
            with monkeypatch.context() as hurried:
                hurried.setattr(main.registry.default, "request_timeout_seconds", 0.3)
                return await http.post("/generate", json={**LONG, "stream": streams})

    response = asyncio.run(wait())
    if streams:
        assert events(response.text) == [("error", TOO_LATE)]
    else:
        assert (response.status_code, response.json()) == (504, TOO_LATE)


@pytest.mark.usefixtures("short_deadline")
def test_deadline_of_a_stream_that_nobody_reads(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline waited to be sent after what its client did not read, for ever, and meanwhile
    the text was made to its end."""
    monkeypatch.setattr("serving.streams.LAST_WORDS_SECONDS", 0.1)
    failed = timed_out(address)
    content = json.dumps({**LONG_STREAM}).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            await asyncio.Event().wait()  # as uvicorn does while its buffer is full

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"a"), (b"content-type", b"application/json")], "state": {},
        "client": None, "server": None,
    }  # fmt: skip

    async def ask() -> Sequence:
        asking = asyncio.ensure_future(main.app(scope, receive, send))
        await until(lambda: engine.num_running == 1)
        (sequence,) = engine.scheduler.running
        await asyncio.wait_for(asking, 60)
        return sequence

    assert asyncio.run(ask()).request.num_generated_tokens < LONG["max_new_tokens"] / 2
    assert timed_out(address) == failed + 1


def timed_out(address: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return metric(text, 'failed_requests_total{reason="timeout"}')


# --- Failures -----------------------------------------------------------------------------------


def test_failed_step_is_a_500_and_the_next_request_works(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "forward", fail)
        response = post(address, LONG)
    assert response.status_code == 500
    assert response.json() == {"detail": "Model inference failed"}
    assert response.headers["x-request-id"]
    assert post(address, {"prompt": PROMPT, "max_new_tokens": 2}).status_code == 200


@pytest.mark.usefixtures("slow")
def test_failed_step_in_an_event_stream_is_an_error_event(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        monkeypatch.context() as broken,
        stream(address, LONG_STREAM) as response,
    ):
        chunks = response.iter_text()
        body = next(chunks)
        broken.setattr(engine.model, "forward", fail)
        body += "".join(chunks)
    assert response.headers["x-request-id"]
    assert events(body)[-1] == ("error", {"detail": "Model inference failed"})
    assert post(address, {"prompt": PROMPT, "max_new_tokens": 2}).status_code == 200


@pytest.mark.usefixtures("slow")
def test_failed_step_breaks_plain_text_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        monkeypatch.context() as broken,
        stream(address, LONG, "/generate/text") as response,
    ):
        chunks = response.iter_text()
        assert next(chunks)
        broken.setattr(engine.model, "forward", fail)
        got, is_whole = read_all(chunks)
    assert got.endswith("\n[Model inference failed]\n")
    assert not is_whole
    assert post(address, {"prompt": PROMPT, "max_new_tokens": 2}).status_code == 200


def test_ready_tells_of_an_engine_that_keeps_failing(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.engine.PROBE_SECONDS", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "forward", fail)
        assert [post(address, LONG).status_code for _ in range(4)] == [500] * 4
        response = httpx.get(address + "/ready")
        assert response.status_code == 503
        assert "failing" in response.json()["status"]
        assert httpx.get(address + "/health").status_code == 200
    wait_until(lambda: httpx.get(address + "/ready").status_code == 200)
    assert post(address, {"prompt": PROMPT, "max_new_tokens": 2}).status_code == 200
