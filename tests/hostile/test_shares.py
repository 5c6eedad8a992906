"""Clients that ask for much: what they want is admitted first, and others are served meanwhile."""

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support import PROMPT, Served, metric, served, tokenizer, wait_until

GREEDY, ORDINARY = {"X-Forwarded-For": "10.0.0.1"}, {"X-Forwarded-For": "10.0.0.2"}
MAX_NUM_SEQS = 16
NUM_PROMPTS, NUM_PROMPT_TOKENS = 256, 500
TIMEOUT_SECONDS = 3


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    settings = {"MAX_NUM_SEQS": str(MAX_NUM_SEQS), "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS)}
    with served(MODEL_NAME="gpt2-tales", LOG_LEVEL="WARNING", **settings) as made:
        yield made


def big_body(seed: int) -> dict[str, Any]:
    """640 KB of token ids: as many prompts as may wait, each as long as may be, as to its tokens
    and their text."""
    vocabulary = tokenizer.get_vocab()
    longest = [vocabulary[token] for token in sorted(vocabulary, key=len)[-1000:]]
    ids = random.Random(seed).choices(longest, k=NUM_PROMPT_TOKENS)
    prompts = [ids[i % 50 :] + ids[: i % 50] for i in range(NUM_PROMPTS)]
    return {"prompt": prompts, "max_tokens": 10}


def figures(service: Served) -> str:
    return httpx.get(f"{service.address}/metrics", timeout=60).text


def is_idle(service: Served) -> bool:
    text = figures(service)
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(metric(text, name) for name in names) == 0


def cpu_seconds(service: Served) -> float:
    return metric(figures(service), "process_cpu_seconds_total")


async def leave_at_once(service: Served) -> None:
    """Sends eight big bodies, and closes each connection once it has been taken."""
    host, port = service.address.removeprefix("http://").split(":")
    for seed in range(8):
        request = httpx.Request("POST", f"{service.address}/v1/completions", json=big_body(seed))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"X-Forwarded-For: 10.0.1.{seed}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(request.content)}\r\n\r\n"
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + request.content)
        await writer.drain()
        writer.close()


def test_nothing_is_read_for_clients_that_have_left(service: Served) -> None:
    """Eight such requests had all their tokens decoded and filtered, half a minute of CPU time
    for nobody."""
    asyncio.run(leave_at_once(service))
    wait_until(lambda: is_idle(service))
    before_seconds = cpu_seconds(service)
    time.sleep(1)
    assert is_idle(service)
    assert cpu_seconds(service) - before_seconds < 0.3


def test_deadline_covers_the_reading(service: Served) -> None:
    """966 KB of token ids were answered after 17.8 s under a deadline of 3 s. And health answers
    meanwhile, where it took 4 s."""
    health_seconds = []
    with ThreadPoolExecutor(1) as pool, service.client() as http:
        started = time.monotonic()
        asking = pool.submit(
            httpx.post, f"{service.address}/v1/completions", json=big_body(9), timeout=60
        )
        while not asking.done():
            sent = time.monotonic()
            assert http.get("/health").status_code == 200
            health_seconds.append(time.monotonic() - sent)
            time.sleep(0.01)
        seconds = time.monotonic() - started
    assert asking.result().status_code == 504
    assert seconds < 3 * TIMEOUT_SECONDS
    assert max(health_seconds) < 1
    wait_until(lambda: is_idle(service))


def test_one_client_holds_up_nobody(service: Served) -> None:
    """Everybody else waited a whole deadline for 256 prompts with n 8."""
    greedy = {"prompt": [PROMPT] * 32, "n": 8, "max_tokens": 400, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool, service.client(**ORDINARY) as http:
        asking = [
            pool.submit(
                httpx.post,
                f"{service.address}/v1/completions",
                json=greedy,
                headers=GREEDY,
                timeout=60,
            )
            for _ in range(3)
        ]
        wait_until(lambda: metric(figures(service), "vllm:num_requests_running") >= 14)
        brief = {"prompt": PROMPT, "max_new_tokens": 3}
        answers = [http.post("/generate", json=brief) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        statuses = sorted(each.result().status_code for each in asking)
    assert statuses == [503, 503, 504]
