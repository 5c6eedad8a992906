"""How a body may come: as JSON, in how many parts, in how much time.

A body is parsed and checked on the event loop, where all others wait meanwhile. A thread would
not help: the parser keeps Python's lock until it is done, and threads that are busy in Python
hold up the engine's. So a body has a limit to what there is to parse.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

# Texts (names of fields too), lists, objects, fractions and truth values: the longest conversation
# that models.py takes has 20,000. Whole numbers are not among them: token ids come by the hundred
# thousand, and are parsed faster than anything else.
MAX_PARTS = 30_000


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
            is_long = len(text) > MAX_PARTS  # no text has more parts than characters
            if is_long and count_parts(text) > MAX_PARTS:
                raise TooManyParts
            self._json = json.loads(text)
            if is_long:
                # All others have a turn before it is checked: `sleep(0)` would go before those
                # who became ready while it was parsed.
                await asyncio.sleep(1e-6)
        return self._json


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
