"""Attack: what hostile clients can send, beside ten ordinary clients who should not notice.

    python scripts/attack.py                    # two minutes of attacks
    python scripts/attack.py --seconds 20

Starts the service as it is by default, its log in a pipe that nobody reads. Ten clients ask for
texts and one for /health: first alone, then, after a first round of attacks, while a process of
attackers sends ATTACKS in rotation from addresses of their own. In the middle of a last round the
service gets SIGTERM. Prints what came of each attack, and what the ordinary clients had of it; the
exit status is 1 if that is more than allowed. All goes to a service of its own on this machine, and
ends by itself; Linux only.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from soak import settle, start_service

NUM_CLIENTS = 10
QUIET_SECONDS = 20.0
FIRST_SECONDS = 60.0  # of a first round of attacks, before memory is measured
NUM_ATTACKERS = 3
HOLD_SECONDS = 8.0  # that an attacker keeps connections open
ATTACK_SECONDS = 15.0  # the longest that one attack takes
MOST_RATIO, MOST_HEALTH_SECONDS, MOST_GROWTH_MB = 3.0, 0.1, 100.0

# --- Attacks: what is sent, and from where ------------------------------------------------------


@dataclass
class Target:
    """The service, as one attacker reaches it."""

    host: str
    port: int
    source: str

    @asynccontextmanager
    async def connect(
        self, receive_buffer_bytes: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        connection = socket.socket()
        if receive_buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.setblocking(False)
        connection.bind((self.source, 0))
        try:
            await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
            reader, writer = await asyncio.open_connection(sock=connection)
        except OSError:
            connection.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def send(self, pieces: Iterable[bytes], waits: bool = True) -> str:
        """The status of the answer, `closed`, or `left` after the last piece."""
        async with self.connect() as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if not waits:
                await asyncio.sleep(0.05)
                return "left"
            words = (await reader.readline()).split()
            return words[1].decode() if len(words) > 1 else "closed"


def head(method: str, path: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode()


def post(path: str, body: str) -> list[bytes]:
    headers = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    return [head("POST", path, *headers) + b"\r\n", body.encode()]


def completion(prompt: Any, **fields: Any) -> list[bytes]:
    return post("/v1/completions", json.dumps({"prompt": prompt, **fields}, separators=(",", ":")))


def listed(before: str, element: str, after: str) -> str:
    """A body just below the limit that is a list of the same."""
    return before + ",".join([element] * (980_000 // (len(element) + 1))) + after


async def send_many(target: Target, pieces: list[bytes], count: int, waits: bool = True) -> str:
    """What most of them came to."""
    sent = (target.send(pieces, waits) for _ in range(count))
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    told = Counter(each if isinstance(each, str) else "closed" for each in outcomes)
    return told.most_common(1)[0][0]


async def hold(target: Target, count: int, first: bytes, drip: bytes = b"", buffer: int = 0) -> str:
    """Opens connections, reads nothing, and sends a drip on each every half a second."""
    async with AsyncExitStack() as stack:
        writers = []
        try:
            for _ in range(count):
                _, writer = await stack.enter_async_context(target.connect(buffer))
                writer.write(first)
                writers.append(writer)
            until = time.monotonic() + HOLD_SECONDS
            while time.monotonic() < until:
                await asyncio.sleep(0.5)
                for writer in writers:
                    writer.write(drip)
        except OSError:
            return "closed"
        return "held"


def body_without_end() -> Iterable[bytes]:
    yield head("GET", "/Once?max_new_tokens=200", "Transfer-Encoding: chunked") + b"\r\n"
    yield from repeat(b"10000\r\n" + b"a" * 65_536 + b"\r\n", 40)


def chunked_head() -> bytes:
    json_type = "Content-Type: application/json"
    return head("POST", "/generate", json_type, "Transfer-Encoding: chunked") + b"\r\n"


READS_NOTHING = completion(["Once"] * 8, n=8, max_tokens=200, logprobs=5, stream=True)
PLACEHOLDERS = quote("".join(map(chr, range(0xE000, 0xF900))))
SIXTEEN_MB = 250  # in pieces of 64 KB
IMAGE = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image")
TWO_REQUESTS = head("GET", "/Once?max_new_tokens=200") + b"\r\n"

# By the number of what they were found under; each makes what it sends anew or sends little.
ATTACKS: dict[str, Callable[[Target], Awaitable[str]]] = {
    "1 fractions": lambda t: t.send(post("/v1/completions", listed('{"prompt":[', "1.5", "]}"))),
    "2 empty messages": lambda t: t.send(
        post("/v1/chat/completions", listed('{"messages":[', "{}", "]}"))
    ),
    "2 numbers": lambda t: t.send(post("/v1/chat/completions", listed('{"messages":[', "1", "]}"))),
    "2 biases": lambda t: t.send(
        completion("a", logit_bias={f"x{number}": 1 for number in range(70_000)})
    ),
    "2 many bodies": lambda t: send_many(t, completion([[1] * 115] * 4000, model="none"), 8),
    "3 a long header": lambda t: t.send(
        [head("GET", "/health") + b"X: ", *repeat(b"a" * 65_536, SIXTEEN_MB), b"\r\n\r\n"]
    ),
    "3 many headers": lambda t: t.send(
        [head("GET", "/health"), *repeat(b"a: b\r\n" * 10_000, SIXTEEN_MB), b"\r\n"]
    ),
    "3 a long URL": lambda t: t.send([b"GET /", *repeat(b"a" * 65_536, SIXTEEN_MB)]),
    "3 a long extension": lambda t: t.send(
        [chunked_head() + b"1;", *repeat(b"a" * 65_536, SIXTEEN_MB)]
    ),
    "3 long trailers": lambda t: t.send(
        [chunked_head() + b"0\r\n", *repeat(b"a: b\r\n" * 10_000, SIXTEEN_MB)]
    ),
    "4 reads nothing": lambda t: hold(t, 8, b"".join(READS_NOTHING), buffer=2048),
    "5 token ids": lambda t: t.send(completion([1] * 480_000, max_tokens=1)),
    "5 lists of ids": lambda t: t.send(completion([[100] * 250] * 250, max_tokens=1)),
    "5 many, then leaves": lambda t: send_many(
        t, completion(["Once upon a time " * 55] * 250, max_tokens=1), 8, waits=False
    ),
    "6 dashes": lambda t: t.send(completion(["-" * 400] * 16, max_tokens=50)),
    "6 many dashes": lambda t: t.send(completion(["-" * 57_600], max_tokens=50)),
    "6 invisible": lambda t: t.send(completion(["a\u200b" * 40] * 16, max_tokens=50)),
    "6 digits as letters": lambda t: t.send(completion(["1!" * 100] * 16, max_tokens=50)),
    "8 the whole queue": lambda t: t.send(completion(["Once"] * 40, n=8, max_tokens=200)),
    "9 scores": lambda t: t.send(
        completion(["Once upon a time " * 40] * 200, max_tokens=0, echo=True, logprobs=5)
    ),
    "9 scores of megabytes": lambda t: t.send(
        completion([[1] * 400] * 300, max_tokens=0, prompt_logprobs=20)
    ),
    "9 a long text": lambda t: t.send(post("/detokenize", json.dumps({"tokens": [1] * 131_072}))),
    "10 idle": lambda t: hold(t, 400, b""),
    "10 slow heads": lambda t: hold(t, 100, head("GET", "/health"), b"a"),
    "10 slow bodies": lambda t: hold(t, 100, chunked_head(), b"1\r\na\r\n"),
    "11 no HTTP": lambda t: send_many(t, [b"no HTTP\r\n\r\n"], 100),
    "12 foreign host": lambda t: send_many(t, [b"GET /Once HTTP/1.1\r\nHost: evil\r\n\r\n"], 50),
    "12 image": lambda t: send_many(t, [head("GET", "/Once", *IMAGE) + b"\r\n"], 50),
    "13 placeholders": lambda t: t.send([head("GET", f"/{PLACEHOLDERS}%2f") + b"\r\n"]),
    "13 body of a GET": lambda t: t.send(body_without_end()),
    "13 two, then leaves": lambda t: send_many(t, [TWO_REQUESTS * 2], 20, waits=False),
    "13 two hosts": lambda t: t.send([head("GET", "/health", "Host: b") + b"\r\n"]),
}  # fmt: skip


async def attack(address: str, seconds: float, outcomes: Counter[tuple[str, str]]) -> None:
    url = urlsplit(address)
    until = time.monotonic() + seconds

    async def keep_attacking(number: int) -> None:
        target = Target(str(url.hostname), url.port or 0, f"127.0.0.{2 + number}")
        names = list(ATTACKS)
        random.Random(number).shuffle(names)
        while time.monotonic() < until:
            for name in names:
                if time.monotonic() >= until:
                    return
                try:
                    async with asyncio.timeout(ATTACK_SECONDS):
                        outcome = await ATTACKS[name](target)
                except TimeoutError:
                    outcome = f"left after {ATTACK_SECONDS:g} s"
                except OSError:
                    outcome = "closed"
                outcomes[name, outcome] += 1

    await asyncio.gather(*map(keep_attacking, range(NUM_ATTACKERS)))


def run_attackers(address: str, seconds: float) -> Counter[tuple[str, str]]:
    """What came of each attack. Runs in a process of its own, which gives way to the service."""
    os.nice(10)
    outcomes: Counter[tuple[str, str]] = Counter()
    asyncio.run(attack(address, seconds, outcomes))
    return outcomes


# --- Ordinary clients ---------------------------------------------------------------------------


@dataclass
class Seen:
    """What ordinary clients have seen."""

    seconds: list[float] = field(default_factory=list)  # of each request for a text
    health_seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def num_failed(self) -> int:
        return self.statuses.total() - self.statuses["200"]


async def watch(address: str, seconds: float) -> Seen:
    """Ten clients, each from an address of its own, and one who asks for /health."""
    seen, until = Seen(), time.monotonic() + seconds

    async def keep_asking(source: str, times: list[float], ask: Callable[..., Any]) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=source)
        async with httpx.AsyncClient(transport=transport, base_url=address, timeout=120) as http:
            while time.monotonic() < until:
                started = time.monotonic()
                try:
                    status = str((await ask(http)).status_code)
                except httpx.HTTPError as error:
                    status = type(error).__name__
                times.append(time.monotonic() - started)
                seen.statuses[status] += 1
                await asyncio.sleep(0.05)

    def ask_text(http: httpx.AsyncClient) -> Awaitable[httpx.Response]:
        return http.post("/generate", json={"prompt": "Once upon a time", "max_new_tokens": 20})

    asking = [keep_asking(f"127.0.1.{n + 1}", seen.seconds, ask_text) for n in range(NUM_CLIENTS)]
    asking.append(keep_asking("127.0.2.1", seen.health_seconds, lambda http: http.get("/health")))
    await asyncio.gather(*asking)
    return seen


def percentile_ms(seconds: list[float], percent: float) -> float:
    return 1000 * sorted(seconds)[int((len(seconds) - 1) * percent / 100)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    # Nobody reads what comes out of these pipes.
    server, address = start_service({}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    attackers = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        asyncio.run(watch(address, 5))  # warms up
        quiet = asyncio.run(watch(address, QUIET_SECONDS))

        def attack_beside_clients(seconds: float) -> tuple[Seen, Counter[tuple[str, str]]]:
            attacking = attackers.submit(run_attackers, address, seconds)
            return asyncio.run(watch(address, seconds)), attacking.result()

        # What serving at its full width takes is taken once: a first round is not counted.
        attack_beside_clients(min(seconds, FIRST_SECONDS))
        start = asyncio.run(settle(address, server.pid))
        attacked, outcomes = attack_beside_clients(seconds)
        end = asyncio.run(settle(address, server.pid))
        last = attackers.submit(run_attackers, address, 10)
        time.sleep(5)
        server.send_signal(signal.SIGTERM)
        last.result()
        exit_status: int | None = server.wait(60)
    except subprocess.TimeoutExpired:
        exit_status = None  # it is still there
    finally:
        server.kill()
        attackers.shutdown()
    print(f"\n{'attack':<24}{'outcome':<20}{'count':>6}")
    for (name, outcome), count in sorted(
        outcomes.items(), key=lambda each: int(each[0][0].split()[0])
    ):
        print(f"{name:<24}{outcome:<20}{count:>6}")
    return report(quiet, attacked, start["resident MB"], end["resident MB"], exit_status)


def report(
    quiet: Seen, attacked: Seen, start_mb: float, end_mb: float, exit_status: int | None
) -> int:
    """Prints the table; 1 if something in it is more than allowed."""
    print(f"\n{'':<34}{'quiet':>10}{'attacked':>10}{'allowed':>10}")

    def row(name: str, figures: list[float], allowed: str = "") -> None:
        print(f"{name:<34}{figures[0]:>10.0f}{figures[1]:>10.0f}{allowed:>10}")

    both = (quiet, attacked)
    slowest_ms = [percentile_ms(each.seconds, 99) for each in both]
    ratio = slowest_ms[1] / slowest_ms[0]
    health_ms = [percentile_ms(each.health_seconds, 99) for each in both]
    row("requests for a text", [len(each.seconds) for each in both])
    row("requests not answered 200", [each.num_failed for each in both], "0")
    row("a text, median, ms", [percentile_ms(each.seconds, 50) for each in both])
    row("a text, 99 %, ms", slowest_ms, f"x {MOST_RATIO:g}")
    row("/health, 99 %, ms", health_ms, f"{1000 * MOST_HEALTH_SECONDS:g}")
    row("resident memory, MB", [start_mb, end_mb], f"+ {MOST_GROWTH_MB:g}")
    print(f"\n99 % under attack / quiet: {ratio:.1f}; statuses {dict(attacked.statuses)}; ", end="")
    print(f"exit status after SIGTERM {exit_status}")
    is_fine = (
        not attacked.num_failed
        and ratio <= MOST_RATIO
        and health_ms[1] <= 1000 * MOST_HEALTH_SECONDS
        and end_mb - start_mb <= MOST_GROWTH_MB
        and exit_status == 0
    )
    return int(not is_fine)


if __name__ == "__main__":
    sys.exit(main())
