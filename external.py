"""Generation by another server that speaks OpenAI's protocol, with the surface of `engine.Engine`.

    main.py                                    upstream
    await ExternalEngine.submit(route, body) -> POST {url}/{route}, always as a stream
    ExternalEngine.stream(request)           <- an event a chunk, filtered here, as `Delta`
    ExternalEngine.abort(request)            -> the connection is closed, which ends it there

Everything runs on the event loop. One task owns the connection of each open request, and
cancelling the task closes it: so a client that leaves, a deadline and a shutdown are one path.

A request that may have reached upstream is never sent twice: only a connection that could not
be made is tried again. Nothing that upstream says in an error goes on to a client or the log,
since it may quote the prompt.
"""

import asyncio
import logging
import random
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import httpx
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

import models
from engine import (
    Delta,
    EngineError,
    EngineRequest,
    EngineStoppedError,
    FinishReason,
    InferenceError,
    QueueFullError,
    SamplingParams,
    StepStats,
    TextFilter,
)

logger = logging.getLogger("external")

CONNECT_TIMEOUT_SECONDS = 5.0  # all else is bounded by the request's deadline
RETRY_PAUSES_SECONDS = (0.1, 0.4)  # after a connection that could not be made, give or take half
PROBE_SECONDS = 2.0  # between attempts to reach an upstream that could not be reached
KEEPALIVE_SECONDS = 2.0  # below the 5 of uvicorn and Node: who closes first gets no request
TAIL_SECONDS = 1.0  # for what follows the last text: the usage, the end of the stream
MAX_EVENT_BYTES = 8 << 20  # the log probabilities of a long prompt come in one
MAX_ANSWER_BYTES = 64 << 20  # far more than any text: a stream without an end is an error
FILTER_TAIL_CHARACTERS = 1000  # at the end of a prompt, where a forbidden word may begin
LOOK_BACK_CHARACTERS = 200  # before a forbidden word, where the filter looks for letters

Route = Literal["completions", "chat/completions"]
Logprobs = models.CompletionLogprobs | models.ChatLogprobs


# --- Errors: beside them, what `engine.Engine` raises -------------------------------------------


class UnreachableError(EngineError):
    """No connection could be made; nothing was sent. Recoverable."""


class BusyError(EngineError):
    """Upstream takes no more requests for now. Recoverable."""

    def __init__(self, retry_after_seconds: int):
        super().__init__()
        self.retry_after_seconds = retry_after_seconds


class RefusedError(EngineError):
    """Upstream does not take this request as it is. Recoverable, with another request."""

    def __init__(self, code: str | None):
        super().__init__()
        self.code = code  # one of KEPT_CODES


class _BrokenStreamError(Exception):
    """What came is no answer in OpenAI's form; the message quotes nothing of it."""


KEPT_CODES = ("context_length_exceeded", "content_filter")

# --- What comes from upstream -------------------------------------------------------------------


class _Choice(BaseModel, ABC):
    index: int = Field(ge=0)
    finish_reason: FinishReason | None = None
    logprobs: Any = None

    @property
    @abstractmethod
    def added(self) -> str:
        """The text of the chunk."""


class _CompletionChoice(_Choice):
    text: str | None = None
    logprobs: models.CompletionLogprobs | None = None

    @property
    def added(self) -> str:
        return self.text or ""


class _ChatChoice(_Choice):
    delta: models.MessageDelta
    logprobs: models.ChatLogprobs | None = None

    @property
    def added(self) -> str:
        return self.delta.content or ""


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0, lt=1 << 31)
    completion_tokens: int = Field(default=0, ge=0, lt=1 << 31)


class _Chunk(BaseModel):
    usage: _Usage | None = None
    choices: Sequence[_Choice]


class _CompletionChunk(_Chunk):
    choices: list[_CompletionChoice]


class _ChatChunk(_Chunk):
    choices: list[_ChatChoice]


CHUNKS: dict[Route, type[_Chunk]] = {
    "completions": _CompletionChunk,
    "chat/completions": _ChatChunk,
}


def parse(route: Route, event: bytes) -> _Chunk:
    """The chunk that an event holds. Raises _BrokenStreamError, also for an error event."""
    try:
        content = from_json(event, allow_inf_nan=False)  # unlike json's, it takes no lone surrogate
    except ValueError:
        raise _BrokenStreamError("it sent no JSON") from None
    if isinstance(content, dict) and content.get("error") is not None:
        raise _BrokenStreamError("it sent an error")
    try:
        return CHUNKS[route].model_validate(content)
    except ValidationError:
        raise _BrokenStreamError("it sent a chunk of another form") from None


async def events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The data of each server-sent event. Raises _BrokenStreamError for more than is allowed."""
    rest, num_bytes = b"", 0
    async for part in response.aiter_bytes():
        num_bytes += len(part)
        *lines, rest = (rest + part).split(b"\n")
        if max(map(len, (rest, *lines))) > MAX_EVENT_BYTES or num_bytes > MAX_ANSWER_BYTES:
            raise _BrokenStreamError("it sent too much")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def beginning(response: httpx.Response) -> bytes:
    """The body, or the first MAX_EVENT_BYTES and some of it."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_EVENT_BYTES:
            break
    return body


def merge(parts: list[Logprobs]) -> Logprobs | None:
    """The log probabilities of several chunks as those of one."""
    if not parts:
        return None
    whole, *rest = parts
    for part in rest:
        for name, more in part:
            if isinstance(more, list) and isinstance(known := getattr(whole, name), list):
                known += more
    return whole


# --- Requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExternalDelta(Delta):
    """A delta with upstream's log probabilities; token ids are known to upstream alone."""

    upstream_logprobs: Logprobs | None


class Choice:
    """The text of one choice, held back while a forbidden word may have begun in it.

    Upstream's chunks are held back whole, so that log probabilities are withheld with the
    text that they spell. Over HTTP nothing can be rolled back: a forbidden word ends the choice.
    """

    def __init__(self, text_filter: TextFilter | None, prompt_text: str, streams: bool):
        self.text_filter = text_filter
        self.streams = streams
        # What the filter still has to see; a forbidden word may begin in the prompt.
        self.window = prompt_text[-FILTER_TAIL_CHARACTERS - LOOK_BACK_CHARACTERS :]
        self.num_safe = max(0, len(self.window) - FILTER_TAIL_CHARACTERS)  # of the window
        self.held: deque[tuple[str, Logprobs | None]] = deque()  # chunks, at the window's end
        self.num_held = 0  # characters of them
        self.text = ""  # passed, and not given out yet
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.is_cut = False  # by a forbidden word, whatever upstream still sends
        self.last_chunk_seconds: float | None = None

    def add(
        self, text: str, logprobs: Logprobs | None, finish_reason: FinishReason | None
    ) -> tuple[str, Logprobs | None] | None:
        """What the client gains by a chunk, if it is to be told."""
        self.held.append((text, logprobs))
        self.num_held += len(text)
        self.window += text
        self.finish_reason = finish_reason
        self._release(self._num_passed(is_last=finish_reason is not None))
        if not self.finish_reason and not (self.streams and self.text):
            return None  # a chunk without text goes out with the next text
        gained = self.text, merge(self.logprobs)
        self.text, self.logprobs = "", []
        return gained

    def _num_passed(self, is_last: bool) -> int:
        """How many characters of the held chunks may go out; below 0: none, nor an empty chunk."""
        if not self.text_filter:
            self.window = ""
            return self.num_held
        hit, self.num_safe = self.text_filter.scan(self.window, self.num_safe, final=is_last)
        num_passed = (hit[0] if hit else self.num_safe) - (len(self.window) - self.num_held)
        if hit:
            self.is_cut, self.finish_reason = True, "content_filter"
        return num_passed

    def _release(self, num_passed: int) -> None:
        while self.held and len(self.held[0][0]) <= num_passed:
            text, logprobs = self.held.popleft()
            num_passed -= len(text)
            self.num_held -= len(text)
            self.text += text
            if logprobs:
                self.logprobs.append(logprobs)
        if self.is_cut and self.held:
            self.text += self.held[0][0][: max(0, num_passed)]
        num_seen = min(self.num_safe, len(self.window) - self.num_held) - LOOK_BACK_CHARACTERS
        if num_seen > 0:
            self.window = self.window[num_seen:]
            self.num_safe -= num_seen


class ExternalRequest(EngineRequest):
    """What `engine.Request` is to its client. Tokens are counted by upstream: until its usage
    has come, each chunk with text counts as one, and the prompt's are not known."""

    def __init__(self, choices: list[Choice], streams: bool, arrived_seconds: float):
        loop = asyncio.get_running_loop()
        super().__init__([], SamplingParams(), "", 0, streams, loop, num_sequences=len(choices))
        self.arrived_seconds = arrived_seconds
        self.choices = choices
        self.usage: _Usage | None = None
        self.has_begun = False  # to answer, with status 200
        self.is_answered = asyncio.Event()  # with whatever
        self.task: asyncio.Task[None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return self.usage.prompt_tokens if self.usage else 0

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)


# --- The engine ---------------------------------------------------------------------------------


class ExternalEngine:
    """Sends requests to one model of an upstream server; its surface is that of `Engine`."""

    num_waiting = 0  # in a queue, if at all, upstream

    def __init__(
        self,
        name: str,
        url: str,
        *,
        upstream_name: str,
        api_key: str | None = None,
        max_num_requests: int = 320,
        text_filter: TextFilter | None = None,
        on_step: Callable[[StepStats], None] | None = None,
    ):
        self.name = name
        self.url = url
        self.upstream_name = upstream_name
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.max_num_requests = max_num_requests
        self.max_model_len: int | None = None  # not known
        self.text_filter = text_filter
        self.on_step = on_step
        self.is_reachable = True  # until it could not be reached
        self._is_stopping = False
        self._requests: set[ExternalRequest] = set()
        self._watching: asyncio.Task[None] | None = None
        self._clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self._is_forbidden = lru_cache(1 << 14)(
            lambda text: bool(self.text_filter and self.text_filter.scan(text, 0, True)[0])
        )

    @property
    def num_running(self) -> int:
        return sum(request.num_sequences for request in self._requests)

    @property
    def is_full(self) -> bool:
        """Whether a request submitted now would be refused."""
        return len(self._requests) >= self.max_num_requests

    @property
    def is_healthy(self) -> bool:
        """False once upstream could not be reached, until it is."""
        return self.is_reachable and not self._is_stopping

    async def submit(
        self,
        route: Route,
        body: dict[str, Any],
        *,
        prompt_texts: list[str],
        num_sequences: int = 1,
        streams: bool = False,
        is_filtered: bool = True,
        request_id: str,
        arrived_seconds: float,
        timeout_seconds: float,
    ) -> ExternalRequest:
        """A request that upstream has begun to answer.

        body: of the route, without `model` and what streaming needs. prompt_texts: what the
        answers follow on, `num_sequences` of them on each. The deadline counts from
        arrived_seconds. Raises QueueFullError, EngineStoppedError, UnreachableError,
        BusyError, RefusedError, InferenceError and TimeoutError; then nothing is left open.
        """
        if self._is_stopping:
            raise EngineStoppedError("the engine was stopped")
        if self.is_full:
            raise QueueFullError(f"{self.max_num_requests} requests are open already")
        text_filter = self.text_filter if is_filtered else None
        choices = [
            Choice(text_filter, text, streams)
            for text in prompt_texts
            for _ in range(num_sequences)
        ]
        request = ExternalRequest(choices, streams, arrived_seconds)
        body = body | {
            "model": self.upstream_name,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request.task = asyncio.create_task(self._run(request, route, body, request_id))
        self._requests.add(request)
        request.task.add_done_callback(partial(self._end, request))
        try:
            async with asyncio.timeout(arrived_seconds + timeout_seconds - time.monotonic()):
                await request.is_answered.wait()
        except BaseException:
            self.abort(request)
            raise
        if not request.has_begun:
            refusal = await request.deltas.get()
            assert isinstance(refusal, Exception)
            raise refusal
        return request

    async def count_prompt_tokens(
        self, prompt: str, *, request_id: str, arrived_seconds: float, timeout_seconds: float
    ) -> int:
        """How many tokens upstream makes of a prompt: it says so when it generates one more.

        Raises as `submit` and `stream` do."""
        request = await self.submit(
            "completions",
            {"prompt": prompt, "max_tokens": 1},
            prompt_texts=[prompt],
            is_filtered=False,  # its text goes nowhere, and it has to come to its end
            request_id=request_id,
            arrived_seconds=arrived_seconds,
            timeout_seconds=timeout_seconds,
        )
        async for _ in self.stream(request, timeout_seconds=timeout_seconds):
            pass
        if request.usage is None:
            logger.warning("%s: upstream does not say how many tokens a prompt has", self.name)
            raise InferenceError("upstream sent no usage")
        return request.num_prompt_tokens

    async def stream(
        self, *requests: EngineRequest, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Delta]:
        """The deltas of a request, as they come; the deadline counts from its arrival.

        Raises what ended it: InferenceError, EngineStoppedError, or TimeoutError. However
        the loop over it ends, the request is aborted if it is not finished.
        """
        (request,) = requests
        assert isinstance(request, ExternalRequest)
        assert request.task
        deltas, timer = request.deltas, None
        if timeout_seconds is not None:
            timer = request.loop.call_later(
                request.arrived_seconds + timeout_seconds - time.monotonic(),
                deltas.put_nowait,
                TimeoutError(),
            )
        try:
            num_unfinished = request.num_sequences
            while num_unfinished:
                delta = await deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                num_unfinished -= delta.finish_reason is not None
                yield delta
            # The answer is whole; its usage may follow, and the end, after which the
            # connection can serve another request.
            await asyncio.wait({request.task}, timeout=TAIL_SECONDS)
        finally:
            if timer:
                timer.cancel()
            self.abort(request)

    def abort(self, *requests: EngineRequest) -> None:
        """Closes the requests' connections; a no-op when they are finished."""
        for request in requests:
            assert isinstance(request, ExternalRequest)
            request.is_aborted = True
            if request.task:
                request.task.cancel()

    def start(self) -> None:
        """Begins to look for upstream, on the running event loop."""
        self._is_stopping = False
        self._watch()

    def stop(self) -> None:
        """Ends what runs with EngineStoppedError, and closes every connection. To be called
        outside of the event loop, for which it waits."""
        self._is_stopping = True
        clients, self._clients = self._clients, {}
        for loop, client in clients.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(self._close(loop, client), loop).result()

    async def _close(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
        tasks = [request.task for request in self._requests if request.task]
        tasks += [self._watching] if self._watching else []
        tasks = [task for task in tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
                headers={**self.headers, "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
                limits=httpx.Limits(
                    max_connections=most,
                    max_keepalive_connections=most,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                ),
            )
        return self._clients[loop]

    # Looking for upstream: at the start, and whenever it could not be reached.

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._find())

    async def _find(self) -> None:
        """Returns once upstream answers, and it is known how long its model's texts may be."""
        while True:
            try:
                timeout = httpx.Timeout(CONNECT_TIMEOUT_SECONDS)
                get = self._client().stream("GET", f"{self.url}/models", timeout=timeout)
                async with get as response:
                    listed = await beginning(response)
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
        self._watch()

    def _reach(self) -> None:
        if not self.is_reachable:
            logger.info("%s: upstream answers again", self.name)
        self.is_reachable = True

    # One request, in a task of its own.

    async def _run(
        self, request: ExternalRequest, route: Route, body: dict[str, Any], request_id: str
    ) -> None:
        failure: Exception | None = None
        try:
            async with self._open(route, body, request_id) as response:
                request.has_begun = True
                request.is_answered.set()
                await self._read(request, route, response)
        except EngineError as error:
            failure = error
        except (httpx.HTTPError, _BrokenStreamError) as error:
            said = str(error) if isinstance(error, _BrokenStreamError) else type(error).__name__
            logger.warning("%s: upstream broke off: %s", self.name, said)
            failure = InferenceError("upstream broke off")
        except Exception:
            logger.exception("%s: an answer of upstream's could not be read", self.name)
            failure = InferenceError("the answer could not be read")
        finally:
            if failure:
                request.deltas.put_nowait(failure)
            if request.usage:
                self._count(request, request.usage)

    def _end(self, request: ExternalRequest, task: asyncio.Task[None]) -> None:
        """Called once the request's task is done, also if it was cancelled before it began."""
        self._requests.discard(request)
        if task.cancelled():
            request.deltas.put_nowait(EngineStoppedError("the engine was stopped"))
        request.is_answered.set()

    @asynccontextmanager
    async def _open(
        self, route: Route, body: dict[str, Any], request_id: str
    ) -> AsyncGenerator[httpx.Response]:
        """Upstream's answer, with status 200. Raises what `submit` says."""
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
                    raise UnreachableError from None
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
            return BusyError(max(1, int(wait)) if re.fullmatch("[0-9]{1,4}", wait) else 1)
        if status not in (400, 413, 422):
            return InferenceError("upstream failed")
        code = None
        with suppress(ValueError, KeyError, TypeError, httpx.HTTPError):  # the status says enough
            code = from_json(await beginning(response))["error"]["code"]
        return RefusedError(code if code in KEPT_CODES else None)

    async def _read(self, request: ExternalRequest, route: Route, response: httpx.Response) -> None:
        async with aclosing(events(response)) as received:
            async for event in received:
                if event == b"[DONE]":
                    if not request.is_finished:
                        break
                    continue  # to the end, after which the connection can be used again
                chunk = parse(route, event)
                request.usage = chunk.usage or request.usage
                for choice in chunk.choices:
                    if choice.index >= request.num_sequences:
                        raise _BrokenStreamError("it sent more choices than were asked for")
                    self._append(request, choice)
                if all(choice.is_cut for choice in request.choices):
                    return  # closes the connection: upstream need not go on
        if not request.is_finished:
            raise _BrokenStreamError("it ended too soon")

    def _append(self, request: ExternalRequest, received: _Choice) -> None:
        choice = request.choices[received.index]
        if choice.finish_reason:
            return
        stats = StepStats(num_rows=0, num_prompt_tokens=0, queue_seconds=[])
        now_seconds = time.monotonic()
        if received.added:
            request.num_generated_tokens += 1
            if choice.last_chunk_seconds is None:
                stats.time_to_first_token_seconds.append(now_seconds - request.arrived_seconds)
            else:
                stats.inter_token_seconds.append(now_seconds - choice.last_chunk_seconds)
            choice.last_chunk_seconds = now_seconds
        logprobs = received.logprobs
        self._leave_out_forbidden(logprobs)
        gained = choice.add(received.added, logprobs, received.finish_reason)
        if finish_reason := choice.finish_reason:
            request.finish_reasons.add(finish_reason)
            stats.finished.append((finish_reason, now_seconds - request.arrived_seconds))
            stats.num_rollbacks = int(choice.is_cut)
        if gained:
            text, logprobs = gained
            request.deltas.put_nowait(
                ExternalDelta(received.index, text, [], [], finish_reason, logprobs)
            )
        if self.on_step:
            self.on_step(stats)

    def _leave_out_forbidden(self, logprobs: Logprobs | None) -> None:
        """Takes alternatives that are forbidden words out of a chunk's log probabilities; the
        chosen tokens are text, and filtered as that."""
        if isinstance(logprobs, models.ChatLogprobs):
            for token in logprobs.content:
                token.top_logprobs = [
                    top for top in token.top_logprobs if not self._is_forbidden(top.token)
                ]
        elif logprobs:
            logprobs.top_logprobs = logprobs.top_logprobs and [
                top
                and {
                    text: logprob
                    for text, logprob in top.items()
                    if text == chosen or not self._is_forbidden(text)
                }
                for chosen, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=False)
            ]

    def _count(self, request: ExternalRequest, usage: _Usage) -> None:
        """Puts upstream's own count in place of that of the chunks."""
        num_more = max(0, usage.completion_tokens - request.num_generated_tokens)
        request.num_generated_tokens = usage.completion_tokens
        if self.on_step:
            stats = StepStats(0, usage.prompt_tokens, [], num_untimed_tokens=num_more)
            self.on_step(stats)
