"""The orderly end of the process."""

import asyncio
import signal
import threading
import time
from functools import partial
from logging import getLogger
from typing import Any

import uvicorn

from serving.registry import ModelRegistry

logger = getLogger("service")


class GracefulShutdown:
    """From the first SIGTERM or SIGINT on: `/ready` says no, new work is refused, running work
    ends, or is ended after `timeout_seconds`; then the server exits. A second signal ends it
    at once."""

    def __init__(self, registry: ModelRegistry, timeout_seconds: float) -> None:
        self.registry = registry
        self.timeout_seconds = timeout_seconds
        self.has_begun = False
        self.task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Puts itself before the server's own handlers, which would close the listening socket
        first and leave the process with the signal as its exit status."""
        if threading.current_thread() is not threading.main_thread():
            return  # under a test client: no signals there
        for number in (signal.SIGTERM, signal.SIGINT):
            server = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(server, uvicorn.Server):
                begin = partial(self._begin, asyncio.get_running_loop(), server)
                signal.signal(number, begin)

    def _begin(
        self, loop: asyncio.AbstractEventLoop, server: uvicorn.Server, number: int, _: Any
    ) -> None:
        if self.has_begun:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.has_begun = True

        def start() -> None:
            self.task = loop.create_task(self._finish(server))

        loop.call_soon_threadsafe(start)

    async def _finish(self, server: uvicorn.Server) -> None:
        logger.info("stopping: %d sequences are left", self.registry.num_unfinished)
        deadline_seconds = time.monotonic() + self.timeout_seconds
        while self.registry.num_unfinished and time.monotonic() < deadline_seconds:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await self.registry.stop_backends()
        server.should_exit = True
