"""The event loop leaves the engines time."""

import asyncio
import time
from collections.abc import Callable

TURN_SECONDS = 0.01  # how often it is looked at while engines compute
IDLE_SECONDS = 0.1  # and while they do not
MOST_SHARE = 0.5  # of a turn, that the loop may compute
MOST_REST_SECONDS = 0.05


async def pace_event_loop(is_computing: Callable[[], bool]) -> None:
    """Runs until it is cancelled: after a turn in which the running event loop computed for most
    of the time, lets it stand still for as long.

    An engine needs Python's lock for each of some hundred operations a step, and waits up to 5 ms
    for it whenever the loop is at work. A few clients who send nonsense as fast as they can keep
    the loop at work all the time; without rests everybody's text takes thirty times as long.
    """
    while True:
        started_seconds, computed_seconds = time.monotonic(), time.thread_time()
        is_needed = is_computing()
        await asyncio.sleep(TURN_SECONDS if is_needed else IDLE_SECONDS)
        turn_seconds = time.monotonic() - started_seconds
        share = (time.thread_time() - computed_seconds) / turn_seconds
        if is_needed and share > MOST_SHARE:
            time.sleep(min(turn_seconds, MOST_REST_SECONDS))  # noqa: ASYNC251
