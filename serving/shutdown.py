"""The orderly end of the process."""

import asyncio
import signal
import sys
import threading
import time
from functools import partial
from logging import getLogger
from typing import Any

import uvicorn

from serving.registry import ModelRegistry

logger = getLogger("service")


LAST_WORDS_SECONDS = 2.0  # in which clients take what tells them that the service is stopping
# SIGHUP: the terminal that the service was started in is gone.
SIGNALS = [signal.SIGTERM, signal.SIGINT]
if sys.platform != "win32":
    SIGNALS.append(signal.SIGHUP)


def running_server() -> uvicorn.Server | None:
    """The uvicorn that runs this app, known by its signal handlers; None under a test client, or
    another server."""
    if threading.current_thread() is not threading.main_thread():
        return None
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


class GracefulShutdown:
    """From the first of SIGNALS on: `/ready` says no, new work is refused, running work
    ends, or is ended after `timeout_seconds`; then the server exits. A second signal ends it
    at once."""

    def __init__(self, registry: ModelRegistry, timeout_seconds: float) -> None:
        self.registry = registry
        self.timeout_seconds = timeout_seconds
        self.has_begun = False
        self.task: asyncio.Task[None] | None = None

    def listen(self, server: uvicorn.Server) -> None:
        """Puts itself before the server's own handlers, which would close the listening socket
        first and leave the process with the signal as its exit status."""
        begin = partial(self._begin, asyncio.get_running_loop(), server)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has SIGHUP ignored
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
        # The server waits for its connections to end, and some clients neither read nor leave.
        left_seconds = max(0, deadline_seconds - time.monotonic())
        await asyncio.sleep(left_seconds + LAST_WORDS_SECONDS)
        connections: set[Any] = server.server_state.connections
        if connections:
            logger.warning("closing %d connections that are left", len(connections))
        for connection in list(connections):
            connection.transport.abort()
