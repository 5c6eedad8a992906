"""How a body may come: as JSON, in how many parts, in how much time.

A body is parsed and checked on the event loop, where all others wait meanwhile. A thread would
not help: the parser keeps Python's lock until it is done, and threads that are busy in Python
hold up the engine's. So a body has a limit to what there is to parse, and of several long ones
that are here one is parsed at a time, with some time for everybody else in between.
"""

import asyncio
import json
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from serving.errors import OVERLOADED, retry_after
from serving.metrics import QUEUE_REFUSALS

# Texts (names of fields too), lists, objects, fractions and truth values: the longest conversation
# that models.py takes has 20,000. Whole numbers are not among them: token ids come by the hundred
# thousand, and are parsed faster than anything else.
MAX_PARTS = 30_000
MAX_WAITING_BODIES = 64  # long ones of one client
# For so many times as long as a long body took to parse, no other one is. It is checked in that
# time, too, which takes up to as long again.
REST_TURNS = 8


class BodyTurns:
    """Lets in one long body at a time, of each client in turn."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.is_taken = False
        self.rest_until_seconds = 0.0

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncGenerator[None]:
        """Waits until no other body is being parsed, or was a moment ago. Raises a 503 when too
        many of the client's wait already."""
        queue = self.waiting.setdefault(client, deque())
        if len(queue) >= MAX_WAITING_BODIES:
            QUEUE_REFUSALS.inc()
            raise HTTPException(503, OVERLOADED, retry_after())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        parse_seconds = 0.0
        try:
            self._give()
            await turn
            # `sleep(0)` would go before those who became ready while another one was parsed.
            await asyncio.sleep(1e-6)
            started_seconds = time.thread_time()
            try:
                yield
            finally:
                parse_seconds = time.thread_time() - started_seconds
        finally:
            if turn.done() and not turn.cancelled():
                self.is_taken = False
                self.rest_until_seconds = time.monotonic() + REST_TURNS * parse_seconds
            else:
                turn.cancel()
            self._give()

    def _give(self) -> None:
        rest_seconds = self.rest_until_seconds - time.monotonic()
        if self.waiting and rest_seconds > 0:
            asyncio.get_running_loop().call_later(rest_seconds, self._give)
            return
        while self.waiting and not self.is_taken:
            client, queue = self.waiting.popitem(last=False)
            if not queue:
                continue
            turn = queue.popleft()
            if queue:
                self.waiting[client] = queue
            if not turn.cancelled():
                self.is_taken = True
                turn.set_result(None)


class TooManyParts(HTTPException):
    """A body takes too long to parse. FastAPI lets nothing but HTTPException out of `json`."""

    def __init__(self) -> None:
        super().__init__(422, f"at most {MAX_PARTS} texts, lists, objects and fractions")


def count_parts(text: str) -> int:
    """How many parts JSON has, or a number above MAX_PARTS, without parsing it."""
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    pieces = without_escapes.split('"', 2 * MAX_PARTS + 2)
    outside_of_texts = "".join(pieces[::2])
    return len(pieces) // 2 + sum(map(outside_of_texts.count, "[{.eEN"))


class BoundedRequest(Request):
    async def body(self) -> bytes:
        """All of it. Raises a 408 when it takes too long to arrive."""
        seconds: float = self.app.state.service.settings.body_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await super().body()
        except TimeoutError:
            detail = f"The body of the request took longer than {seconds:g} seconds"
            raise HTTPException(408, detail, {"Connection": "close"}) from None

    async def json(self) -> Any:
        """The body. Raises TooManyParts, and what `json.loads` does."""
        if not hasattr(self, "_json"):
            body = await self.body()
            text = body.decode(json.detect_encoding(body), "surrogatepass")
            if len(text) <= MAX_PARTS:  # no text has more parts than characters
                self._json = json.loads(text)
            else:
                turns: BodyTurns = self.app.state.service.body_turns
                async with turns.turn(self.scope["client_identity"]):
                    self._json = parse_long(text)
                await asyncio.sleep(1e-6)  # all others have a turn before it is checked
        return self._json


def parse_long(text: str) -> Any:
    """What the JSON says. Raises TooManyParts, and what `json.loads` does."""
    if count_parts(text) > MAX_PARTS:
        raise TooManyParts
    return json.loads(text)


def refuse_media_type(headers: Headers) -> None:
    """Raises a 415 for a body that is compressed, or does not come as JSON. A page of another site
    can post one that does not come as JSON without its browser asking first (CORS)."""
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        reason = "A compressed body is not accepted: send it without Content-Encoding"
        raise HTTPException(415, reason, {"Accept-Encoding": "identity"})
    sent = Message()
    sent["content-type"] = headers.get("content-type", "")
    subtype = sent.get_content_subtype()
    is_json = subtype == "json" or subtype.endswith("+json")
    if sent.get_content_maintype() != "application" or not is_json:  # as FastAPI has it
        reason = "Send JSON with the header Content-Type: application/json"
        raise HTTPException(415, reason, {"Accept-Post": "application/json"})


class BoundedRoute(APIRoute):
    """Reads its body as a BoundedRequest (FastAPI: Custom Request and APIRoute class)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.method == "POST":
                refuse_media_type(request.headers)
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle
