"""Reads prompts beside the event loop: tokenizing, decoding and filtering them takes long."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, TypeVar

from backends.base import Client, Deadline
from engine import TextFilter, TextReading

# So much is read on the event loop, in less than a millisecond.
SHORT_CHARACTERS = 600
PROMPT_CHARACTERS = 50  # count as much as a prompt itself, however short
REST_TURNS = 3  # for so many times as long as a piece took, none is read
PIECE_CHARACTERS = 5_000  # that are filtered before others have their turn, in up to 50 ms

T = TypeVar("T")
Pieces = Generator[None, None, T]  # work that can be left off at each `yield`
Prompts = Sequence[str | list[int]]


@dataclass(slots=True)
class PendingRead:
    pieces: Pieces[Any]
    context: Context = field(default_factory=copy_context)  # of the request, for its log line
    outcome: Future[Any] = field(default_factory=Future)


class Reader:
    """One thread, which does a piece of work for each client in turn.

    It rests after each piece for REST_TURNS as long as that took: the engine's thread and the event
    loop need Python's lock and a core too. Work whose client has left is not gone on with.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "reader")
        self._lock = threading.Lock()
        self._pending: dict[str, deque[PendingRead]] = {}  # by client, last served at the end

    async def read(
        self, client: Client, deadline: Deadline, prompts: Prompts, pieces: Pieces[T]
    ) -> T:
        """What the pieces give in the end; leaves them off when it is cancelled. prompts: all that
        they read; what is short is read at once.

        Raises what the pieces do, and DeadlineExceeded.
        """
        if sum(PROMPT_CHARACTERS + len(prompt) for prompt in prompts) <= SHORT_CHARACTERS:
            return read_at_once(pieces)
        return await self.work(client, deadline, pieces)

    async def work(self, client: Client, deadline: Deadline, pieces: Pieces[T]) -> T:
        """The same for pieces that may take long whatever they read. Raises as `read`."""
        pending = PendingRead(pieces)
        with self._lock:
            if not self._pending:
                self._thread.submit(self._take_turn)
            self._pending.setdefault(client.identity, deque()).append(pending)
        async with deadline.limit():
            return await asyncio.wrap_future(pending.outcome)

    def _take_turn(self) -> None:
        started_seconds = time.thread_time()
        with self._lock:
            client, queue = next(iter(self._pending.items()))
            pending = queue[0]
        is_over = self._do_piece(pending)
        with self._lock:
            if is_over:
                queue.popleft()
            del self._pending[client]
            if queue:
                self._pending[client] = queue
            is_idle = not self._pending
        if not is_idle:
            time.sleep(REST_TURNS * (time.thread_time() - started_seconds))
            self._thread.submit(self._take_turn)

    def _do_piece(self, pending: PendingRead) -> bool:
        """Whether nothing is left to do."""
        outcome = pending.outcome
        try:
            if not outcome.cancelled():
                pending.context.run(next, pending.pieces)
                return False
        except StopIteration as end:
            if outcome.set_running_or_notify_cancel():
                outcome.set_result(end.value)
        except Exception as error:
            if outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)
        return True


def read_at_once(pieces: Pieces[T]) -> T:
    """What the pieces give in the end, without a turn for others in between."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def find_in_pieces(text_filter: TextFilter, text: str) -> Pieces[bool]:
    """Whether a whole text holds a forbidden word."""
    reading = text_filter.read("")
    for start in range(0, len(text), PIECE_CHARACTERS):
        if start:
            yield
        reading.append(text[start : start + PIECE_CHARACTERS])
        hit, safe = reading.scan(None, final=False)
        if hit:
            return True
        reading.forget(safe)
    return reading.scan(None, final=True)[0] is not None


def read_in_pieces(text_filter: TextFilter, text: str) -> Pieces[TextReading]:
    """A text that will be read on."""
    reading = text_filter.read("")
    for start in range(0, len(text), PIECE_CHARACTERS):
        if start:
            yield
        reading.append(text[start : start + PIECE_CHARACTERS])
        reading.forget(reading.scan(None, final=False)[1])
    return reading
