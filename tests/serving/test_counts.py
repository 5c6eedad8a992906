"""What is counted, in memory and in a Redis of its own; many clients, and what is no storage."""

import asyncio
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from serving import counts as counting
from serving.counts import Count, Counts, MemoryCounts, StorageError
from serving.settings import open_counts
from tests.support import redis_server


async def work_with(work: Callable[[Counts], Awaitable[None]], address: str) -> None:
    counts = open_counts(SecretStr(address))
    await work(counts)
    if redis := getattr(counts, "redis", None):
        await redis.aclose()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[Callable[[Counts], Awaitable[None]]], None]]:
    """Runs a coroutine with the counts of either storage."""
    address = "memory://"
    with ExitStack() as stack:
        if request.param == "redis":
            server = stack.enter_context(redis_server(tmp_path))
            address = f"redis://127.0.0.1:{server.args[2]}"
        yield lambda work: asyncio.run(work_with(work, address))


def amounts(count: Count) -> tuple[bool, int]:
    return count.is_within, count.amount


def test_counts_stop_at_the_limit(run: Any) -> None:
    async def work(counts: Counts) -> None:
        assert amounts(await counts.add("a", 0, 10)) == (True, 0)
        first = await counts.add("a", 6, 10)
        assert amounts(first) == (True, 6)
        assert 55 < first.left_seconds <= 60
        assert amounts(await counts.add("a", 5, 10)) == (False, 6)
        assert amounts(await counts.add("a", 4, 10)) == (True, 10)
        assert amounts(await counts.add("a", 0, 10)) == (True, 10)
        assert amounts(await counts.add("b", 10, 10)) == (True, 10)

    run(work)


def test_counts_at_the_same_time_stop_at_the_limit(run: Any) -> None:
    async def work(counts: Counts) -> None:
        added = await asyncio.gather(*(counts.add("a", 7, 100) for _ in range(40)))
        assert sum(count.is_within for count in added) == 14
        assert (await counts.add("a", 0, 100)).amount == 98

    run(work)


def test_counts_are_given_back_in_their_own_window_alone(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "WINDOW_SECONDS", 0.2)

    async def work(counts: Counts) -> None:
        first = await counts.add("a", 8, 10)
        await counts.give_back("a", 3, first.window)
        assert (await counts.add("a", 0, 10)).amount == 5
        await counts.give_back("a", -2, first.window)
        assert (await counts.add("a", 0, 10)).amount == 7
        await asyncio.sleep(0.3)
        await counts.give_back("a", 7, first.window)
        second = await counts.add("a", 4, 10)
        assert amounts(second) == (True, 4)
        assert second.window != first.window
        await counts.give_back("a", 7, first.window)
        assert (await counts.add("a", 0, 10)).amount == 4

    run(work)


@pytest.mark.slow
def test_counts_of_redis_end_though_its_clock_is_set_back(tmp_path: Path) -> None:
    """A window that by Redis's clock has hours to go has been begun before that was set back."""

    async def work(counts: Any) -> None:
        await counts.add("a", 10, 10)
        await counts.redis.expire("limits/a", 3600)
        assert 55 < (await counts.add("a", 1, 10)).left_seconds <= 60
        assert await counts.redis.ttl("limits/a") <= 60

    with redis_server(tmp_path) as server:
        asyncio.run(work_with(work, f"redis://127.0.0.1:{server.args[2]}"))


@pytest.mark.slow
def test_counts_of_redis_that_is_gone(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:

        async def work(counts: Counts) -> None:
            await counts.add("a", 1, 10)
            server.kill()
            server.wait()
            with pytest.raises(StorageError):
                await counts.add("a", 1, 10)

        asyncio.run(work_with(work, f"redis://127.0.0.1:{server.args[2]}"))


def address(number: int) -> str:
    return f"requests/address 2001:db8:{number:x}::/64"


def test_counts_of_many_clients_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request walked through all clients: 100,000 of them took hours."""
    monkeypatch.setattr(counting, "MAX_WINDOWS", 30_000)

    async def work() -> None:
        counts = MemoryCounts()
        for number in range(45_000):
            await counts.add(address(number), 1, 10)
        assert len(counts) == counting.MAX_WINDOWS
        assert (await counts.add(address(0), 0, 10)).amount == 0  # dropped as one of the oldest
        assert (await counts.add(address(44_999), 0, 10)).amount == 1
        now_seconds = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_seconds + 61)  # when all have ended
        await counts.add(address(45_000), 1, 10)
        assert len(counts) == counting.MAX_WINDOWS - 1  # no call has to drop them all
        for number in range(30_000):
            await counts.add(address(number), 1, 10)
        assert len(counts) == counting.MAX_WINDOWS

    started_seconds = time.perf_counter()
    asyncio.run(work())
    assert time.perf_counter() - started_seconds < 20


def test_counts_of_many_clients_are_small() -> None:
    async def work() -> int:
        counts = MemoryCounts()
        tracemalloc.start()
        for number in range(10_000):
            await counts.add(address(number), 1, 10)
        num_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return num_bytes

    assert asyncio.run(work()) < 10_000 * 1000


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nowhere://me:secret@host",
        pytest.param("redis://me:secret@host:x", marks=pytest.mark.slow),
    ],
)
def test_storage_that_is_none_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(ValueError, match=r"is neither memory|is no address") as refused:
        open_counts(SecretStr(address))
    assert "secret" not in str(refused.value)


def test_storage_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "serving.redis_counts", raising=False)
    with pytest.raises(ValueError, match=r"needs what requirements-ray\.txt installs"):
        open_counts(SecretStr("redis://127.0.0.1:6379"))
