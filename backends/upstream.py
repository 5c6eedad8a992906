"""The connection to another server that speaks OpenAI's protocol, and what it is found to take.

A request that may have begun there is never sent twice: a connection that could not be made is
tried again, and what the server refused is sent without what it refused, if that leaves the
answer what it is. What was found out holds for all requests to come. Nothing that the server says
in an error goes on to a client or the log, since it may quote the prompt.
"""

import asyncio
import logging
import random
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from pydantic_core import from_json

from backends.base import Busy, InvalidField, Refused, Unreachable
from backends.chunks import read_beginning
from backends.dialect import NO_BOUND, Dialect, Route
from backends.refusals import Refusal, read_refusal
from engine import EngineError, InferenceError

logger = logging.getLogger("external")

CONNECT_TIMEOUT_SECONDS = 5.0  # all else is bounded by the request's deadline
# Pauses after a connection that could not be made, give or take half.
RETRY_PAUSES_SECONDS = (0.1, 0.4)
PROBE_SECONDS = 2.0  # between attempts to reach a server that could not be reached
# Less than the 5 seconds of uvicorn and Node, which may close a connection just as it is used.
KEEPALIVE_SECONDS = 2.0
BUSY_STATUSES = (429, 503, 529)  # the last is Anthropic's `overloaded_error`
REFUSED_STATUSES = (400, 413, 422)  # of the request itself; their bodies say why
# A refusal that names one of these is of the whole request.
ESSENTIAL_FIELDS = ("model", "prompt", "messages", "stream", "n", "max_tokens")


class Upstream:
    """One model of another server. Everything runs on the event loop.

    name: what the model is called here, for the log. upstream_name: what it is called there.
    url: the base of its OpenAI routes. max_num_requests: open at the same time. key_setting: the
    variable that its key is, or would be, in. has_chat_only: whether it is known to have no
    `completions`; else that is found out.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        upstream_name: str,
        api_key: str | None,
        max_num_requests: int,
        key_setting: str = "EXTERNAL_API_KEY",
        has_chat_only: bool = False,
    ):
        self.name = name
        self.url = url
        self.upstream_name = upstream_name
        self.max_num_requests = max_num_requests
        self.key_setting = key_setting
        self.dialect = Dialect(has_completions=False if has_chat_only else None)
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

    # Asking it.

    @asynccontextmanager
    async def open(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> AsyncGenerator[httpx.Response]:
        """The answer, with status 200, to be read in the block; to a request in another form if
        the server takes it in no other: it may be one of `chat/completions`.

        Raises TakesOne, InvalidField, Unreachable, Busy, Refused, InferenceError, httpx.HTTPError.
        """
        through_chat = False
        while True:
            written_route, written = self.dialect.write(route, body, through_chat)
            response = await self._send(written_route, written, request_id)
            try:
                if response.status_code == 200:
                    self._find_out(route, written_route, written)
                    yield response
                    return
                refusal = await self._read_refusal(response)
            finally:
                await response.aclose()
            if (
                refusal.has_no_completions
                and written_route == "completions"
                and self.dialect.has_completions is None
            ):
                logger.info("%s: upstream answered %d to completions", self.name, refusal.status)
                through_chat = True
                continue
            if written.get("max_tokens") == NO_BOUND and refusal.status in (400, 422):
                body = body | {"max_tokens": None}
                continue
            for news in self.dialect.learn(written, refusal):
                logger.warning("%s: upstream refuses %s from now on", self.name, news)
            if self.dialect.write(route, body, through_chat) == (written_route, written):
                raise self._error(refusal, body, response.headers.get("retry-after", ""))

    async def _send(self, route: Route, body: dict[str, Any], request_id: str) -> httpx.Response:
        """The answer, whose body has not been read."""
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
        return response

    def _find_out(self, route: Route, answered_route: Route, answered: dict[str, Any]) -> None:
        """Keeps in mind what a request showed by being answered: how it says that a text has no
        bound, and whether there are completions."""
        if answered.get("max_tokens", 0) is None and self.dialect.takes_no_bound:
            self.dialect.takes_no_bound = False
            logger.warning("%s: upstream refuses max_tokens -1: it is sent as null", self.name)
        if route != "completions" or self.dialect.has_completions is not None:
            return
        self.dialect.has_completions = answered_route == route
        if not self.dialect.has_completions:
            logger.warning(
                "%s: upstream has no completions: prompts are sent to chat/completions from now on",
                self.name,
            )

    def tell_it_takes_one(self) -> None:
        """To be called when fewer choices came than were asked for."""
        if self.dialect.takes_several:
            logger.warning("%s: upstream ignores n: one text at a time is asked for", self.name)
        self.dialect.takes_several = False

    async def _read_refusal(self, response: httpx.Response) -> Refusal:
        body = b""
        if response.status_code in REFUSED_STATUSES:
            with suppress(httpx.HTTPError):  # the status says enough
                body = await read_beginning(response)
        return read_refusal(response.status_code, body)

    def _error(self, refusal: Refusal, body: dict[str, Any], retry_after: str) -> EngineError:
        status = refusal.status
        advice = {
            401: f"; is {self.key_setting} right?",
            403: f"; is {self.key_setting} right?",
            404: "; are the address and the model's name in MODEL_NAME right?",
        }
        level = logging.ERROR if status in advice else logging.WARNING
        logger.log(level, "%s: upstream answered %d%s", self.name, status, advice.get(status, ""))
        if status in BUSY_STATUSES:
            is_number = re.fullmatch("[0-9]{1,4}", retry_after)
            return Busy(max(1, int(retry_after)) if is_number else 1)
        if status not in REFUSED_STATUSES:
            return InferenceError("upstream failed")
        for field in refusal.fields:
            name = field.name
            if name == "top_logprobs" and name not in body:  # sent for completions' `logprobs`
                name = "logprobs"
            if name in body and name not in ESSENTIAL_FIELDS:
                return InvalidField(name, f"is not supported by {self.name}, an external model")
        return Refused(refusal.code)
