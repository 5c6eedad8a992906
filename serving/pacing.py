"""The event loop leaves the engines time."""

import asyncio
import sys
import time
from collections.abc import Callable

SHORT_TURN_SECONDS = 0.01  # after which it is looked at again where it computes much
LONG_TURN_SECONDS = 0.1  # and where it does not: each look takes an engine some of its time, too
MOST_SHARE = 0.25  # of the time, that the loop may compute
MOST_REST_SECONDS = 0.05
# For which a thread waits at most for Python's lock while another one runs Python, which is 5 ms
# otherwise: as long as a step of a small model.
SWITCH_SECONDS = 0.0005


async def pace_event_loop(is_computing: Callable[[], bool]) -> None:
    """Runs until it is cancelled: after a turn in which the running event loop computed for more
    than its share of the time, lets it stand still until it is no more than that. Sets Python's
    switch interval for the whole process, too.

    An engine needs Python's lock for each of some hundred operations a step, and a core for each of
    its threads, and waits for either whenever the loop is at work. A few clients who send nonsense
    as fast as they can keep the loop at work all the time; without rests everybody's text takes
    thirty times as long.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    turn_seconds = LONG_TURN_SECONDS
    while True:
        started_seconds, computed_seconds = time.monotonic(), time.thread_time()
        await asyncio.sleep(turn_seconds)
        computed_seconds = time.thread_time() - computed_seconds
        rest_seconds = computed_seconds / MOST_SHARE - (time.monotonic() - started_seconds)
        if rest_seconds > 0 and is_computing():
            time.sleep(min(rest_seconds, MOST_REST_SECONDS))  # noqa: ASYNC251
            turn_seconds = SHORT_TURN_SECONDS
        else:
            turn_seconds = min(2 * turn_seconds, LONG_TURN_SECONDS)
