"""The connection to another server that speaks OpenAI's protocol, and what it sends.

A request that may have reached it is never sent twice: only a connection that could not be
made is tried again. Nothing that it says in an error goes on to a client or the log, since it
may quote the prompt.
"""

import asyncio
import logging
import random
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import httpx
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

import models
from backends.base import Busy, Refused, Unreachable
from engine import EngineError, FinishReason, InferenceError

logger = logging.getLogger("external")

CONNECT_TIMEOUT_SECONDS = 5.0  # all else is bounded by the request's deadline
# Pauses after a connection that could not be made, give or take half.
RETRY_PAUSES_SECONDS = (0.1, 0.4)
PROBE_SECONDS = 2.0  # between attempts to reach a server that could not be reached
# Less than the 5 seconds of uvicorn and Node, which may close a connection just as it is used.
KEEPALIVE_SECONDS = 2.0
MAX_EVENT_BYTES = 8 << 20  # one event may hold the log probabilities of a long prompt
MAX_ANSWER_BYTES = 64 << 20  # far more than any text has: a stream without an end is an error
KEPT_CODES = ("context_length_exceeded", "content_filter")  # of errors; they quote nothing

Route = Literal["completions", "chat/completions"]
Logprobs = models.CompletionLogprobs | models.ChatLogprobs


class BrokenStream(Exception):
    """What came is no answer in OpenAI's form; the message quotes nothing of it."""


# --- What it sends ------------------------------------------------------------------------------


class UpstreamChoice(BaseModel, ABC):
    index: int = Field(ge=0)
    finish_reason: FinishReason | None = None
    stop_reason: Any = None
    logprobs: Any = None

    @property
    @abstractmethod
    def added(self) -> str:
        """The text of the chunk."""


class UpstreamCompletionChoice(UpstreamChoice):
    text: str | None = None
    logprobs: models.CompletionLogprobs | None = None

    @property
    def added(self) -> str:
        return self.text or ""


class UpstreamChatChoice(UpstreamChoice):
    delta: models.MessageDelta
    logprobs: models.ChatLogprobs | None = None

    @property
    def added(self) -> str:
        return self.delta.content or ""


class UpstreamUsage(BaseModel):
    prompt_tokens: int = Field(ge=0, lt=1 << 31)
    completion_tokens: int = Field(default=0, ge=0, lt=1 << 31)


class UpstreamChunk(BaseModel):
    usage: UpstreamUsage | None = None
    choices: Sequence[UpstreamChoice]


class CompletionChunk(UpstreamChunk):
    choices: list[UpstreamCompletionChoice]


class ChatChunk(UpstreamChunk):
    choices: list[UpstreamChatChoice]


CHUNKS: dict[Route, type[UpstreamChunk]] = {
    "completions": CompletionChunk,
    "chat/completions": ChatChunk,
}


def parse_chunk(route: Route, event: bytes) -> UpstreamChunk:
    """The chunk that an event holds. Raises BrokenStream, also for an error event."""
    try:
        content = from_json(event, allow_inf_nan=False)  # unlike json's, it takes no lone surrogate
    except ValueError:
        raise BrokenStream("it sent no JSON") from None
    if isinstance(content, dict) and content.get("error") is not None:
        raise BrokenStream("it sent an error")
    try:
        return CHUNKS[route].model_validate(content)
    except ValidationError:
        raise BrokenStream("it sent a chunk of another form") from None


async def read_events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The data of each server-sent event. Raises BrokenStream for more than is allowed."""
    rest, num_bytes = b"", 0
    async for part in response.aiter_bytes():
        num_bytes += len(part)
        *lines, rest = (rest + part).split(b"\n")
        if max(map(len, (rest, *lines))) > MAX_EVENT_BYTES or num_bytes > MAX_ANSWER_BYTES:
            raise BrokenStream("it sent too much")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def read_beginning(response: httpx.Response) -> bytes:
    """The body, or the first MAX_EVENT_BYTES and some of it."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_EVENT_BYTES:
            break
    return body


def merge_logprobs(parts: list[Logprobs]) -> Logprobs | None:
    """The log probabilities of several chunks as those of one."""
    if not parts:
        return None
    whole, *rest = parts
    for part in rest:
        for name, more in part:
            if isinstance(more, list) and isinstance(known := getattr(whole, name), list):
                known += more
    return whole


# --- The connection -----------------------------------------------------------------------------


class Upstream:
    """One model of another server. Everything runs on the event loop.

    name: what the model is called here, for the log. upstream_name: what it is called there.
    url: the base of its OpenAI routes. max_num_requests: open at the same time.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        upstream_name: str,
        api_key: str | None,
        max_num_requests: int,
    ):
        self.name = name
        self.url = url
        self.upstream_name = upstream_name
        self.max_num_requests = max_num_requests
        self.max_model_len: int | None = None  # not known
        self.is_reachable = True  # until it could not be reached
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._watching: asyncio.Task[None] | None = None
        self._clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    def start(self) -> None:
        """Begins to look for the server, on the running event loop."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._find())

    @property
    def running_loops(self) -> list[asyncio.AbstractEventLoop]:
        """The event loops on which connections may be open."""
        return [loop for loop in self._clients if loop.is_running()]

    async def close(self) -> None:
        """Closes every connection of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._watching and self._watching.get_loop() is loop:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if client := self._clients.pop(loop, None):
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            most = self.max_num_requests + 1  # and one to look for upstream
            self._clients = {
                each: client for each, client in self._clients.items() if not each.is_closed()
            }
            self._clients[loop] = httpx.AsyncClient(
                # Compressed, a stream would be held up, and could be any size.
                headers={**self._headers, "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
                limits=httpx.Limits(
                    max_connections=most,
                    max_keepalive_connections=most,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                ),
            )
        return self._clients[loop]

    # Looking for the server: at the start, and whenever it could not be reached.

    async def _find(self) -> None:
        """Returns once the server answers, and it is known how long its model's texts may be."""
        while True:
            try:
                timeout = httpx.Timeout(CONNECT_TIMEOUT_SECONDS)
                get = self._client().stream("GET", f"{self.url}/models", timeout=timeout)
                async with get as response:
                    listed = await read_beginning(response)
            except httpx.HTTPError as error:
                self._lose(error)
            else:
                self._reach()
                if response.status_code != 503:  # else it is still loading the model
                    self._read_models(listed)
                    return
            await asyncio.sleep(PROBE_SECONDS)

    def _read_models(self, listed: bytes) -> None:
        # Not every server has this list, nor says there what vLLM and this service say.
        with suppress(ValueError, KeyError, TypeError):
            for model in from_json(listed)["data"]:
                if model["id"] == self.upstream_name and type(model["max_model_len"]) is int:
                    self.max_model_len = max(1, model["max_model_len"])

    def _lose(self, error: Exception) -> None:
        if self.is_reachable:
            logger.warning("%s: upstream cannot be reached (%s)", self.name, type(error).__name__)
        self.is_reachable = False
        self.start()

    def _reach(self) -> None:
        if not self.is_reachable:
            logger.info("%s: upstream answers again", self.name)
        self.is_reachable = True

    @asynccontextmanager
    async def open(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> AsyncGenerator[httpx.Response]:
        """The answer, with status 200, to be read in the block.

        Raises Unreachable, Busy, Refused, InferenceError, and httpx.HTTPError.
        """
        client = self._client()
        headers = {"X-Request-ID": request_id}
        sent = client.build_request("POST", f"{self.url}/{route}", json=body, headers=headers)
        for pause_seconds in (*RETRY_PAUSES_SECONDS, None):
            try:
                response = await client.send(sent, stream=True)
                break
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if pause_seconds is None:
                    self._lose(error)
                    raise Unreachable from None
                await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.5))
        self._reach()
        try:
            if response.status_code != 200:
                raise await self._refusal(response)
            yield response
        finally:
            await response.aclose()

    async def _refusal(self, response: httpx.Response) -> EngineError:
        status = response.status_code
        advice = {
            401: "; is EXTERNAL_API_KEY right?",
            403: "; is EXTERNAL_API_KEY right?",
            404: "; are the address and the model's name in MODEL_NAME right?",
        }
        level = logging.ERROR if status in advice else logging.WARNING
        logger.log(level, "%s: upstream answered %d%s", self.name, status, advice.get(status, ""))
        if status in (429, 503):
            wait = response.headers.get("retry-after", "")
            return Busy(max(1, int(wait)) if re.fullmatch("[0-9]{1,4}", wait) else 1)
        if status not in (400, 413, 422):
            return InferenceError("upstream failed")
        code = None
        with suppress(ValueError, KeyError, TypeError, httpx.HTTPError):  # the status says enough
            code = from_json(await read_beginning(response))["error"]["code"]
        return Refused(code if code in KEPT_CODES else None)
