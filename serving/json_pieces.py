"""JSON that may be long, written and sent piece by piece: others have their turn in between."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

PIECE_VALUES = 10_000  # texts or numbers that are written at a time
PIECE_LISTS = 200  # lists or objects, each of some twenty values
FEW = 8  # lists or objects, each of which may be long
PIECE_CHARACTERS = 200_000  # of one text
SENT_BYTES = 65_536  # that are handed over at a time, as much as waits for a slow reader


def in_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def json_pieces(content: Any) -> list[bytes]:
    """What `in_json` gives, in pieces."""
    return [piece async for piece in _pieces(content)]


async def _pieces(content: Any) -> AsyncGenerator[bytes]:
    """Of a list of more than a few, each element is short."""
    if isinstance(content, str) and len(content) > PIECE_CHARACTERS:
        yield b'"'
        async for piece in _slices(content, PIECE_CHARACTERS):
            yield in_json(piece)[1:-1]
        yield b'"'
    elif isinstance(content, dict):
        before = b"{"
        for name, value in content.items():
            yield before + in_json(name) + b":"
            async for piece in _pieces(value):
                yield piece
            before = b","
        yield b"}" if content else b"{}"
    elif isinstance(content, list) and content:
        async for piece in _list_pieces(content):
            yield piece
    else:
        yield in_json(content)


async def _list_pieces(values: list[Any]) -> AsyncGenerator[bytes]:
    is_flat = not isinstance(values[-1], dict | list)  # the first may be a null
    before = b"["
    if not is_flat and len(values) <= FEW:
        for value in values:
            yield before
            async for piece in _pieces(value):
                yield piece
            before = b","
            await asyncio.sleep(0)
    else:
        async for some in _slices(values, PIECE_VALUES if is_flat else PIECE_LISTS):
            yield before + in_json(some)[1:-1]
            before = b","
    yield b"]"


async def _slices(whole: Sequence[Any], size: int) -> AsyncGenerator[Any]:
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
        await asyncio.sleep(0)


class PiecewiseJson(Response):
    """An answer of which nobody who does not read it makes more wait than a piece."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]):
        self.pieces = _joined(pieces)
        self.status_code, self.background = 200, None
        self.init_headers({"Content-Length": str(sum(map(len, self.pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for number, piece in enumerate(self.pieces, start=1):
            has_more = number < len(self.pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": has_more})
            if has_more:
                await asyncio.sleep(0)


def _joined(pieces: list[bytes]) -> list[bytes]:
    """The pieces, those together that are sent at a time."""
    joined: list[bytes] = []
    some: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        some.append(piece)
        num_bytes += len(piece)
        if num_bytes >= SENT_BYTES:
            joined.append(b"".join(some))
            some, num_bytes = [], 0
    return [*joined, b"".join(some)] if some else joined
