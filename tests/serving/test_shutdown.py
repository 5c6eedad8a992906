"""SIGTERM to a real uvicorn: running work ends whole, or in so many words at the deadline."""

import asyncio
import signal
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.support import PROMPT, Served, served, wait_until

LONG = {"prompt": PROMPT, "max_new_tokens": 200, "seed": 1, "stream": True}


async def read_streams(
    service: Served, count: int, then: Any, body: dict[str, Any] = LONG
) -> list[str]:
    """The bodies of so many streams; once each has begun, `then` is called."""
    begun = asyncio.Semaphore(0)

    async def read() -> str:
        async with (
            httpx.AsyncClient(base_url=service.address, timeout=60) as http,
            http.stream("POST", "/generate", json=body) as response,
        ):
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                begun.release()
            return text

    reading = [asyncio.create_task(read()) for _ in range(count)]
    for _ in range(count):
        await begun.acquire()
    await asyncio.to_thread(then)
    return await asyncio.gather(*reading)


@pytest.mark.parametrize(
    ("arguments", "number"), [(("--reload",), signal.SIGTERM), ((), signal.SIGHUP)]
)
def test_drain_completes_streams_and_exits_with_zero(
    arguments: tuple[str, ...], number: signal.Signals
) -> None:
    """SIGHUP, the end of its terminal, ended the process at once. SIGTERM is the next test's."""
    with served(*arguments, TORCH_NUM_THREADS="1") as service:
        with service.client() as kept:
            kept.get("/health")

            def stop() -> None:
                service.process.send_signal(number)
                wait_until(lambda: kept.get("/ready").status_code == 503)
                assert kept.get("/ready").json()["status"] == "draining"
                refused = kept.post("/generate", json={"prompt": PROMPT})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert kept.get("/health").status_code == 200

            texts = asyncio.run(read_streams(service, 16, stop, LONG | {"max_new_tokens": 100}))
        assert [text.count('"model_name"') for text in texts] == [1] * 16
        assert service.process.wait(30) == 0


def test_drain_ends_streams_at_the_deadline() -> None:
    with served(through=("nohup",), DRAIN_TIMEOUT_SECONDS="0", TORCH_NUM_THREADS="1") as service:
        service.process.send_signal(signal.SIGHUP)  # which is ignored
        assert httpx.get(f"{service.address}/ready").status_code == 200
        texts = asyncio.run(read_streams(service, 16, service.process.terminate))
        assert {"model_name" in text for text in texts} | {True} == {True, False}
        for text in texts:
            assert text.endswith(
                'event: error\ndata: {"detail": "The service is stopping"}\n\n'
            ) or ('"model_name"' in text)
        assert any("event: error" in text for text in texts)
        assert service.process.wait(30) == 0


def test_drain_closes_clients_that_neither_read_nor_leave() -> None:
    """Each of them held the process for ever."""
    file = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    half = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9\r\n\r\n{"
    )
    with ExitStack() as stack, served(DRAIN_TIMEOUT_SECONDS="0") as service:
        host, port = service.address.removeprefix("http://").split(":")
        for sent in (b"", b"GET", half, file * 10):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(sent)
        num_answered = -1
        while num_answered < (now := len(service.lines)):  # until no more of it is taken
            num_answered = now
            time.sleep(0.5)
        service.process.terminate()
        assert service.process.wait(30) == 0
    (line,) = [line for line in service.log() if "that are left" in line["message"]]
    assert line["message"] == "closing 2 connections that are left"


def test_drain_second_signal_ends_at_once() -> None:
    with served(TORCH_NUM_THREADS="1", DRAIN_TIMEOUT_SECONDS="60") as service:

        def stop() -> None:
            service.process.send_signal(signal.SIGTERM)
            with service.client() as other:
                wait_until(lambda: other.get("/ready").status_code == 503)
            service.process.send_signal(signal.SIGTERM)

        with pytest.raises(httpx.HTTPError):
            asyncio.run(read_streams(service, 60, stop))
        assert service.process.wait(10) == -signal.SIGTERM
