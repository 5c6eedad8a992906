"""Tests of serving/pacing.py."""

import asyncio
import time

import pytest

from serving.pacing import pace_event_loop


async def computed_share(is_computing: bool, turn_seconds: float) -> float:
    """The part of half a second that an event loop computes which always has something to do."""
    pacing = asyncio.create_task(pace_event_loop(lambda: is_computing))
    started_seconds, computed_seconds = time.monotonic(), time.thread_time()
    while time.monotonic() < started_seconds + 0.5:
        until_seconds = time.thread_time() + turn_seconds
        while time.thread_time() < until_seconds:
            pass
        await asyncio.sleep(0)
    pacing.cancel()
    computed_seconds = time.thread_time() - computed_seconds
    return computed_seconds / (time.monotonic() - started_seconds)


@pytest.mark.parametrize(("turn_seconds", "most"), [(0.0002, 0.5), (0.03, 0.75)])
def test_pacing_leaves_engines_time(turn_seconds: float, most: float) -> None:
    """Three clients who sent lists of numbers kept the loop at work all the time: the engine got
    Python's lock every 5 ms, and everybody's text took thirty times as long."""
    assert asyncio.run(computed_share(True, turn_seconds)) < most


def test_pacing_rests_for_nobody_while_engines_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("time.sleep", rests.append)
    # As if all of the time was this thread's, which a busy machine does not give it.
    monkeypatch.setattr("time.thread_time", time.monotonic)
    asyncio.run(computed_share(False, 0.005))
    assert rests == []
    asyncio.run(computed_share(True, 0.005))
    assert rests
