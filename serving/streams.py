"""Answers that are sent as they are made, and what happens when their client goes."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from backends.base import Deadline, Generation
from serving.json_pieces import SENT_BYTES, json_pieces
from serving.logs import add_generation_to_log, add_to_log
from serving.metrics import FAILED_REQUESTS

LAST_WORDS_SECONDS = 1.0  # in which a client takes what tells it that its deadline has passed
PING_SECONDS = 15.0  # between comments in an event stream, which keep idle proxies from closing
EVENT_STREAM = "text/event-stream"
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Unfinished(Protocol):
    """What is being made for a client: a Generation, or a Job of media/."""

    deadline: Deadline

    def abort(self) -> None:
        """Nobody wants it any more."""


class Awaited(Unfinished, Protocol[T_co]):
    """The same, of which only the whole is wanted."""

    async def complete(self) -> T_co:
        """The whole, once it is there."""


class ClientGone(Exception):
    """The client went away before its answer was ready; nobody reads what is sent now."""


class StreamAborted(Exception):
    """Ends a stream without its proper end."""


async def client_gone(receive: Receive) -> None:
    """Returns once the client has closed the connection; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(http: Request, work: Awaitable[T]) -> T:
    """What work returns. Raises ClientGone, and cancels it, once the client goes."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(client_gone(http.receive))
    pending: set[asyncio.Future[Any]] = {working, gone}
    try:
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        working.add_done_callback(lambda _: working.cancelled() or working.exception())


async def admit(http: Request, submitting: Awaitable[Generation]) -> Generation:
    """What a backend's `submit_…` gives, put down for the request's log line."""
    generation = await cancel_on_disconnect(http, submitting)
    add_generation_to_log(generation)
    return generation


async def finish(http: Request, *generations: Awaited[T]) -> list[T]:
    """What each of them comes to: of a generation, every choice as one delta, in order.

    Whatever happens, nothing is left running. Raises what `complete` does, and ClientGone.
    """
    finished = asyncio.gather(*(generation.complete() for generation in generations))
    try:
        return await cancel_on_disconnect(http, finished)
    finally:
        for generation in generations:
            generation.abort()


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {json.dumps(content)}\n\n"


async def long_event(content: dict[str, Any]) -> str:
    """One that may have megabytes, written piece by piece."""
    return f"data: {b''.join(await json_pieces(content)).decode()}\n\n"


class GenerationStream(Response):
    """Sends chunks as they are made, and closes their source as soon as the client goes, or has
    taken too long to read them: then nobody asks the source for its deadline.

    Starlette's StreamingResponse hears of that only when it next sends, which a request
    that waits in the queue does not. An event stream is pinged with comments.
    """

    def __init__(
        self, chunks: AsyncGenerator[str], generation: Unfinished, media_type: str = EVENT_STREAM
    ):
        self.chunks, self.generation = chunks, generation
        self.status_code, self.background = 200, None
        self.media_type = media_type
        self.chunk_turn = asyncio.Lock()  # a comment does not come within a chunk
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.create_task(self.send_chunks(send))
        gone = asyncio.create_task(client_gone(receive))
        pinging = asyncio.create_task(self.send_pings(send))
        timeout_seconds = self.generation.deadline.left_seconds + LAST_WORDS_SECONDS
        try:
            await asyncio.wait(
                {sending, gone}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout_seconds
            )
            if sending.done():
                pinging.cancel()
                if isinstance(sending.exception(), StreamAborted):
                    return
                sending.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif gone.done():
                add_to_log(client_gone=True)
            else:  # it takes no bytes, so it could not be told
                FAILED_REQUESTS.labels("timeout").inc()
        finally:
            gone.cancel()
            pinging.cancel()
            sending.cancel()
            self.generation.abort()

    async def send_pings(self, send: Send) -> None:
        while self.media_type == EVENT_STREAM:
            await asyncio.sleep(PING_SECONDS)
            ping = {"type": "http.response.body", "body": b": ping\n\n", "more_body": True}
            async with self.chunk_turn:
                await send(ping)

    async def send_chunks(self, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                whole = chunk.encode()
                async with self.chunk_turn:
                    for start in range(0, len(whole), SENT_BYTES):
                        body = whole[start : start + SENT_BYTES]
                        await send({"type": "http.response.body", "body": body, "more_body": True})
