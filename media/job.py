"""What one request has ordered, as its route sees it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from backends.base import Client, Deadline
from engine import FinishReason
from media.messages import Made, Step


class Job:
    """One thing to be made. `updates` are its steps, then the result.

    Made on the event loop that is to be told; a worker's thread tells it. The log line and the
    usage log ask it what they ask a text.
    """

    num_prompt_tokens = num_generated_tokens = 0

    def __init__(
        self,
        model_name: str,
        fields: dict[str, Any],
        client: Client,
        deadline: Deadline,
        wants_steps: bool,
    ):
        self.model_name = model_name
        self.fields = fields
        self.client = client
        self.deadline = deadline
        self.wants_steps = wants_steps
        self.queue_seconds: float | None = None  # None while it waits
        self.finish_reasons: set[FinishReason] = set()
        self.on_abort: Callable[[], None] = lambda: None
        self.is_wanted = True
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Step | Made | Exception] = asyncio.Queue()

    def begin(self) -> None:
        """It waits no longer."""
        self.queue_seconds = time.monotonic() - self.deadline.arrived_seconds

    def tell(self, update: Step | Made | Exception) -> None:
        """From any thread: a step, or how it ended."""
        if isinstance(update, Made):
            self.finish_reasons = {"stop"}
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def updates(self) -> AsyncGenerator[Step | Made]:
        """Steps, if they were asked for, then the result. Raises JobFailed, EngineStoppedError or
        DeadlineExceeded. However the loop over it ends, the job is aborted."""
        try:
            while True:
                async with self.deadline.limit():
                    update = await self._updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if isinstance(update, Made):
                    return
        finally:
            self.abort()

    async def complete(self) -> Made:
        """The result. Raises as `updates` does."""
        async for update in self.updates():
            if isinstance(update, Made):
                return update
        raise AssertionError("updates end with a result or an error")

    def abort(self) -> None:
        """Nobody wants it any more: it leaves the queue, or ends with its next step."""
        if self.is_wanted:
            self.is_wanted = False
            self.on_abort()
