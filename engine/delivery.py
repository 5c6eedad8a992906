"""From the computing thread to the clients' event loops."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from engine.request import Delta, EngineError, EngineRequest, Sequence


class Outbox:
    """The deltas of one step, sent with one call to each event loop."""

    def __init__(self) -> None:
        self.by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EngineRequest, Delta]]] = {}

    def add(self, request: EngineRequest, delta: Delta) -> None:
        self.by_loop.setdefault(request.loop, []).append((request, delta))

    def send(self) -> None:
        for loop, outputs in self.by_loop.items():
            call_soon(loop, deliver, outputs)


def deliver(outputs: list[tuple[EngineRequest, Delta]]) -> None:
    """Called on the event loop on which the requests were submitted."""
    for request, delta in outputs:
        request.deltas.put_nowait(delta)


def fail(seqs: Iterable[Sequence], error: EngineError) -> None:
    """Tells the clients of these sequences what ended them."""
    for request in {seq.request.id: seq.request for seq in seqs}.values():
        request.is_aborted = True
        call_soon(request.loop, request.deltas.put_nowait, error)


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
        loop.call_soon_threadsafe(callback, *args)
