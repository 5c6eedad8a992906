"""Soak: mixed traffic for a while, then what happened and what was left behind.

    python scripts/soak.py                      # a minute
    python scripts/soak.py --seconds 600

Starts the service with few places and a short queue, so that overload is part of it. Clients
keep taking one of ACTIONS at random: all routes, streams and not, invalid and forbidden
requests, clients that leave at once, in the middle of a stream, or while they wait. Prints
the outcomes of each action, and slots, threads, file descriptors and resident memory after
warm-up and at the end. The exit status is 1 if an outcome was not expected, a slot leaked or
the service did not end well. Linux only: it reads /proc.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"MAX_NUM_SEQS": "16", "MAX_QUEUE_SIZE": "16", "LOG_LEVEL": "WARNING"}
NUM_CLIENTS = 48
PROMPTS = ["Once upon a time", "The old king said", "A fox", "In the wood " * 30]
BUSY = {"200", "503"}  # what a valid request may be answered


def body(**more: object) -> dict[str, object]:
    return {"prompt": random.choice(PROMPTS), "max_new_tokens": random.randint(1, 60), **more}


def completion(**more: object) -> dict[str, object]:
    return {"prompt": random.choice(PROMPTS), "max_tokens": random.randint(1, 60), **more}


async def post(client: httpx.AsyncClient, path: str, content: object) -> str:
    return str((await client.post(path, json=content)).status_code)


async def read_stream(client: httpx.AsyncClient, path: str, content: object, end: str) -> str:
    async with client.stream("POST", path, json=content) as response:
        text = (await response.aread()).decode()
    if response.status_code == 200 and end not in text:
        return "200 without its end"
    return str(response.status_code)


async def leave_stream(client: httpx.AsyncClient, path: str, content: object) -> str:
    async with client.stream("POST", path, json=content) as response:
        async for _ in response.aiter_bytes():
            if random.random() < 0.3:
                return "left"
    return str(response.status_code)


async def leave_early(client: httpx.AsyncClient, path: str, content: object) -> str:
    try:
        async with asyncio.timeout(random.random() * 0.3):
            return await post(client, path, content)
    except TimeoutError:
        return "left"


async def get(client: httpx.AsyncClient, path: str) -> str:
    return str((await client.get(path)).status_code)


Action = Callable[[httpx.AsyncClient], Awaitable[str]]
ACTIONS: dict[str, tuple[set[str], Action]] = {
    "generate": (BUSY, lambda c: post(c, "/generate", body())),
    "generate, streamed": (
        BUSY, lambda c: read_stream(c, "/generate", body(stream=True), "generated_text")
    ),
    "generate/text": (BUSY, lambda c: read_stream(c, "/generate/text", body(), "")),
    "generate-text": (BUSY, lambda c: post(c, "/generate-text/", body(num_return_sequences=3))),
    "path": (BUSY, lambda c: get(c, f"/{quote(random.choice(PROMPTS))}?max_new_tokens=20")),
    "v1": (BUSY, lambda c: post(c, "/v1/completions", completion(n=2, logprobs=2))),
    "v1, streamed": (
        BUSY, lambda c: read_stream(c, "/v1/completions", completion(stream=True), "[DONE]")
    ),
    "v1, scored": (
        BUSY,
        lambda c: post(c, "/v1/completions", completion(echo=True, logprobs=1) | {"max_tokens": 0}),
    ),
    "left in a stream": (
        BUSY | {"left"}, lambda c: leave_stream(c, "/generate", body(stream=True))
    ),
    "left early": (BUSY | {"left"}, lambda c: leave_early(c, "/generate", body())),
    "left early, v1": (
        BUSY | {"left"}, lambda c: leave_early(c, "/v1/completions", completion(n=4))
    ),
    "forbidden": ({"400"}, lambda c: post(c, "/generate", {"prompt": "I h.a.t.e this"})),
    "invalid": ({"422"}, lambda c: post(c, "/generate", {"prompt": ""})),
    "invalid, v1": ({"400"}, lambda c: post(c, "/v1/completions", {"prompt": []})),
    "too large": ({"413"}, lambda c: post(c, "/generate", {"prompt": "a" * 1_100_000})),
    "health": ({"200"}, lambda c: get(c, "/health")),
    "ready": (BUSY, lambda c: get(c, "/ready")),
    "metrics": ({"200"}, lambda c: get(c, "/metrics")),
    "models": ({"200"}, lambda c: get(c, "/v1/models")),
}  # fmt: skip


def start_service(settings: dict[str, str], **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    """A service on a free port, and its address, once it is ready. options: of Popen."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {"MODEL_NAME": str(ROOT / "gpt2-tales"), **settings, **os.environ}
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    command += ["--log-level", "warning", "--timeout-graceful-shutdown", "25"]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    while server.poll() is None:
        try:
            httpx.get(f"{address}/ready").raise_for_status()
            return server, address
        except httpx.HTTPError:
            time.sleep(0.1)
    sys.exit("the service does not start")


def footprint(pid: int, metrics: str) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    busy = [
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    ]
    return {
        "sequences running or waiting": sum(busy),
        "threads": float(fields["Threads"]),
        "file descriptors": float(len(os.listdir(f"/proc/{pid}/fd"))),
        "resident MB": round(int(fields["VmRSS"].split()[0]) / 1024, 1),
    }


async def settle(address: str, pid: int) -> dict[str, float]:
    """The footprint once nothing runs, or after ten seconds."""
    async with httpx.AsyncClient(base_url=address) as client:
        for _ in range(100):
            left = footprint(pid, (await client.get("/metrics")).text)
            if not left["sequences running or waiting"]:
                break
            await asyncio.sleep(0.1)
    return left


async def send_traffic(address: str, seconds: float, outcomes: Counter[tuple[str, str]]) -> None:
    until = time.monotonic() + seconds

    async def keep_sending() -> None:
        while time.monotonic() < until:
            async with httpx.AsyncClient(base_url=address, timeout=120) as client:
                for _ in range(random.randint(1, 20)):
                    name = random.choice(list(ACTIONS))
                    try:
                        outcome = await ACTIONS[name][1](client)
                    except httpx.HTTPError as error:
                        outcome = type(error).__name__
                    outcomes[name, outcome] += 1
                    if outcome == "503":
                        await asyncio.sleep(random.random())

    await asyncio.gather(*(keep_sending() for _ in range(NUM_CLIENTS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    server, address = start_service(SETTINGS)
    try:
        warm_up: Counter[tuple[str, str]] = Counter()
        asyncio.run(send_traffic(address, min(20, seconds / 4), warm_up))
        start = asyncio.run(settle(address, server.pid))
        outcomes: Counter[tuple[str, str]] = Counter()
        asyncio.run(send_traffic(address, seconds, outcomes))
        end = asyncio.run(settle(address, server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        exit_status = server.wait(60)
    unexpected = 0
    print(f"\n{'action':<22}{'outcome':<24}{'count':>8}")
    for (name, outcome), count in sorted(outcomes.items()):
        is_expected = outcome in ACTIONS[name][0]
        unexpected += 0 if is_expected else count
        print(f"{name:<22}{outcome:<24}{count:>8}{'' if is_expected else '  unexpected'}")
    print(f"\n{'':<32}{'warmed up':>12}{'at the end':>12}")
    for name in start:
        print(f"{name:<32}{start[name]:>12g}{end[name]:>12g}")
    total, leaked = sum(outcomes.values()), end["sequences running or waiting"]
    print(f"\n{total} requests in {seconds:g} s, {unexpected} unexpected outcomes, ", end="")
    print(f"{leaked:g} leaked sequences, exit status {exit_status}")
    return int(bool(unexpected or leaked or exit_status))


if __name__ == "__main__":
    sys.exit(main())
