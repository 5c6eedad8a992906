"""Hostile input: generated requests, half-open connections, clients that leave at random."""

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from tests.support import PROMPT, ROOT, Served, metric, new_client, served, wait_until

client = new_client(raise_server_exceptions=False)


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    """Eight places, 64 requests may wait. Texts are short: it is not they that are hostile."""
    limits = {"MAX_NUM_SEQS": "8", "MAX_QUEUE_SIZE": "64", "MAX_MODEL_LEN": "24"}
    with served(LOG_LEVEL="WARNING", **limits) as made:
        yield made
        assert made.process.poll() is None


def num_unfinished(service: Served) -> float:
    text = httpx.get(f"{service.address}/metrics").text
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(metric(text, name) for name in names)


def test_schemathesis_finds_nothing(service: Served) -> None:
    """Every check, over the whole OpenAPI document; schemathesis.toml says what may be refused."""
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()",
        "--config-file", str(ROOT / "schemathesis.toml"),
        "run", f"{service.address}/openapi.json", "--checks", "all",
        "--phases", "examples,coverage,fuzzing",
        "--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "2"),
        "--suppress-health-check", "all", "--generation-deterministic",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    (generated,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(generated) > 1000


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=200), st.text(max_size=200), st.sampled_from(["hate", "HATEFUL", "violence"])
)
def test_filter_finds_a_word_between_any_texts(before: str, after: str, word: str) -> None:
    text = f"{before} {word} {after}"
    start, end = main.content_filter.find(text) or (0, 0)
    assert 0 <= start < end <= len(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300), st.integers(0, 300))
def test_filter_safe_length_is_kept(text: str, cut: int) -> None:
    """What was safe to send before stays so, and holds the beginning of no word found later."""
    reading = main.content_filter.read(text[:cut])
    _, safe = reading.scan()
    reading.append(text[cut:])
    assert safe <= reading.scan()[1]
    found = main.content_filter.find(text)
    assert found is None or found[0] >= safe


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from([
    "prompt", "max_length", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "model", "stream", "num_return_sequences", "n", "best_of", "echo", "logprobs", "max_tokens",
    "logit_bias", "stream_options", "messages", "min_tokens", "suffix", "tools",
])  # fmt: skip
ROUTES = [
    "/generate",
    "/generate-text/",
    "/generate/text",
    "/v1/completions",
    "/v1/chat/completions",
]


@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=100, deadline=None)
@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_body_is_answered_in_the_shape_of_its_route(path: str, fields: dict[str, Any]) -> None:
    fields = {"prompt": PROMPT, "max_new_tokens": 1, **fields}
    if path.startswith("/v1"):
        fields = {"max_tokens": 1, **fields}
        fields.pop("max_new_tokens")
    content = json.dumps(fields)
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 422)
    if answer.status_code != 200:
        assert set(answer.json()) == ({"error"} if path.startswith("/v1") else {"detail"})


def test_slow_and_half_closed_connections_hold_nobody_up(service: Served) -> None:
    host, port = service.address.removeprefix("http://").split(":")
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for number in range(200):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 3 == 0:
                connection.sendall(head[: 10 + number % 40])
            elif number % 3 == 1:
                connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            else:
                connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
                connection.shutdown(socket.SHUT_WR)
        body = {"prompt": PROMPT, "max_new_tokens": 3}
        assert httpx.post(f"{service.address}/generate", json=body).status_code == 200
        assert num_unfinished(service) == 0


def test_a_thousand_idle_connections_hold_nobody_up(service: Served) -> None:
    async def idle() -> int:
        host, port = service.address.removeprefix("http://").split(":")
        opened = await asyncio.gather(
            *(asyncio.open_connection(host, int(port)) for _ in range(1000))
        )
        for _, writer in opened:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for reader, _ in opened:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        body = {"prompt": PROMPT, "max_new_tokens": 3}
        async with httpx.AsyncClient(base_url=service.address, timeout=60) as http:
            status: int = (await http.post("/generate", json=body)).status_code
        for _, writer in opened:
            writer.close()
        return status

    assert asyncio.run(idle()) == 200


def test_overload_of_256_clients_is_only_200_and_503(service: Served) -> None:
    """Every 503 says when to come back; health answers meanwhile."""

    health_seconds: list[float] = []
    is_over = threading.Event()

    def ask_health() -> None:
        with service.client() as http:
            while not is_over.is_set():
                started = time.monotonic()
                assert http.get("/health").status_code == 200
                health_seconds.append(time.monotonic() - started)
                time.sleep(0.01)

    async def overload() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.address, limits=limits, timeout=60) as http:
            body = {"prompt": PROMPT, "max_new_tokens": 20}
            return await asyncio.gather(*(http.post("/generate", json=body) for _ in range(256)))

    with ThreadPoolExecutor(1) as other:
        asking = other.submit(ask_health)
        try:
            answers = asyncio.run(overload())
        finally:
            is_over.set()
        asking.result()
    outcomes = Counter(answer.status_code for answer in answers)
    assert set(outcomes) == {200, 503}
    assert outcomes[200] >= 64
    for answer in answers:
        assert (answer.status_code == 503) == ("retry-after" in answer.headers)
    assert sorted(health_seconds)[len(health_seconds) // 2] < 1


def test_clients_that_leave_at_random_moments_leave_nothing(service: Served) -> None:
    seeded = {"prompt": PROMPT, "max_new_tokens": 20, "seed": 7}
    expected = httpx.post(f"{service.address}/generate", json=seeded).json()
    count = int(os.environ.get("HOSTILE_REQUESTS", "300"))

    async def send() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        slots = asyncio.Semaphore(50)

        async def one(number: int, http: httpx.AsyncClient) -> None:
            async with slots:
                body = {**seeded, "stream": number % 4 == 1} if number % 2 else seeded
                try:
                    async with asyncio.timeout(random.random() * 0.2 if number % 2 else 60):
                        answer = await http.post("/generate", json=body)
                except TimeoutError:
                    outcomes["left"] += 1
                    return
                outcomes[str(answer.status_code)] += 1
                if not number % 2 and answer.status_code == 200:
                    assert answer.json() == expected

        async with httpx.AsyncClient(base_url=service.address, timeout=60) as http:
            await asyncio.gather(*(one(number, http) for number in range(count)))
        return outcomes

    outcomes = asyncio.run(send())
    assert set(outcomes) <= {"200", "503", "left"}
    assert outcomes["left"] > 0
    wait_until(lambda: num_unfinished(service) == 0)
