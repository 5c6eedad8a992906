"""The chunks of another server's answer, whoever wrote that server.

What makes the text is required; all else is an ornament. One that is missing or of another form
is left out, and the text stays.
"""

from collections.abc import AsyncGenerator
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WrapValidator
from pydantic_core import from_json

import models
from engine import LOWEST_LOGPROB, FinishReason

MAX_EVENT_BYTES = 8 << 20  # one event may hold the log probabilities of a long prompt
MAX_ANSWER_BYTES = 64 << 20  # far more than any text has: a stream without an end is an error
DONE = b"[DONE]"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# What ends a text in the words of other servers; whatever is not here is a `stop`, as are TGI's
# `eos_token` and `stop_sequence`. A text that its server gave up is not whole either.
FINISH_REASONS: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "abort": "length",
    "error": "length",
    "content_filter": "content_filter",
}

Logprobs = models.CompletionLogprobs | models.ChatLogprobs


class BrokenStream(Exception):
    """What came is no answer in OpenAI's form; the message quotes nothing of it."""


def _known_reason(reason: Any) -> FinishReason | None:
    """None for what says that the text goes on: null, or the empty string of some servers."""
    return FINISH_REASONS.get(str(reason), "stop") if reason else None


def _joined(content: Any) -> Any:
    """The text of a content in parts; Mistral's models that think send those, and their thoughts
    are no text."""
    if not isinstance(content, list):
        return content or ""
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(str(part.get("text") or "") for part in parts)


def _or_nothing(value: Any, validate: Any) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


def _finite(logprob: Any) -> Any:
    return max(logprob, LOWEST_LOGPROB) if isinstance(logprob, float) else logprob


Text = Annotated[str, BeforeValidator(_joined)]
Logprob = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_finite)]


class UpstreamTop(BaseModel):
    token: str
    logprob: Logprob
    bytes: list[int] | None = None


class UpstreamToken(UpstreamTop):
    top_logprobs: Annotated[
        list[UpstreamTop], BeforeValidator(lambda top: top or []), Field(default_factory=list)
    ]


class UpstreamChatLogprobs(BaseModel):
    """OpenAI's for chat, which llama.cpp's server uses for completions too."""

    content: list[UpstreamToken]

    def as_chat(self) -> models.ChatLogprobs:
        return models.ChatLogprobs.model_validate(self.model_dump())

    def as_completion(self, start: int) -> models.CompletionLogprobs:
        """In the form of completions; start: where in the text the first token begins."""
        offsets = []
        for token in self.content:
            offsets.append(start)
            start += len(token.token)
        return models.CompletionLogprobs(
            tokens=[token.token for token in self.content],
            token_logprobs=[token.logprob for token in self.content],
            top_logprobs=[
                {top.token: top.logprob for top in (*token.top_logprobs, token)}
                for token in self.content
            ],
            text_offset=offsets,
        )


class UpstreamCompletionLogprobs(models.CompletionLogprobs):
    token_logprobs: list[Logprob | None]
    top_logprobs: list[dict[str, Logprob] | None] | None = None
    text_offset: list[int] = Field(default_factory=list)


class UpstreamMessage(BaseModel):
    content: Text = ""


UpstreamLogprobs = UpstreamChatLogprobs | UpstreamCompletionLogprobs
Message = Annotated[UpstreamMessage, BeforeValidator(lambda message: message or {})]


class UpstreamChoice(BaseModel):
    """A choice of a chunk, or of an answer that was not streamed, on either route."""

    index: Annotated[int, Field(ge=0), BeforeValidator(lambda index: index or 0)] = 0
    text: Text = ""
    delta: Message = UpstreamMessage()
    message: Message = UpstreamMessage()
    finish_reason: Annotated[FinishReason | None, BeforeValidator(_known_reason)] = None
    stop_reason: Any = None
    logprobs: Annotated[UpstreamLogprobs | None, WrapValidator(_or_nothing)] = None

    @property
    def added(self) -> str:
        """The text of the chunk."""
        return self.text + self.delta.content + self.message.content


class UpstreamPromptDetails(BaseModel):
    cached_tokens: int = Field(ge=0, lt=1 << 31)


class UpstreamUsage(BaseModel):
    prompt_tokens: int = Field(ge=0, lt=1 << 31)
    completion_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    prompt_tokens_details: Annotated[UpstreamPromptDetails | None, WrapValidator(_or_nothing)] = (
        None
    )


class UpstreamChunk(BaseModel):
    usage: Annotated[UpstreamUsage | None, WrapValidator(_or_nothing)] = None
    choices: Annotated[list[UpstreamChoice], BeforeValidator(lambda choices: choices or [])] = []


def parse_chunk(event: bytes) -> UpstreamChunk:
    """The chunk that an event holds. Raises BrokenStream, also for an error event."""
    try:
        content = from_json(event)  # unlike json's, it takes no lone surrogate
    except ValueError:
        raise BrokenStream("it sent no JSON") from None
    is_error = isinstance(content, dict) and (
        content.get("error") is not None or content.get("object") == "error"
    )
    if is_error:
        raise BrokenStream("it sent an error")
    try:
        return UpstreamChunk.model_validate(content)
    except ValidationError:
        raise BrokenStream("it sent a chunk of another form") from None


async def read_events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The data of each server-sent event; an answer that is no stream counts as one event and
    DONE. Raises BrokenStream for more than is allowed."""
    if response.headers.get("content-type", "").startswith("application/json"):
        whole = await read_beginning(response)
        if len(whole) > MAX_EVENT_BYTES:
            raise BrokenStream("it sent too much")
        yield whole.removeprefix(BYTE_ORDER_MARK)
        yield DONE
        return
    rest, num_bytes = b"", 0
    async for part in response.aiter_bytes():
        num_bytes += len(part)
        # A line may end with CR, LF or both (https://html.spec.whatwg.org, 9.2.6), and no JSON
        # in one line has either.
        *lines, rest = (rest + part).replace(b"\r", b"\n").split(b"\n")
        if max(map(len, (rest, *lines))) > MAX_EVENT_BYTES or num_bytes > MAX_ANSWER_BYTES:
            raise BrokenStream("it sent too much")
        for line in lines:
            if event := _event(line):
                yield event
    if event := _event(rest):  # the last line need not end
        yield event


def _event(line: bytes) -> bytes:
    """What a line of a stream says; empty for a comment, and all that is no data."""
    line = line.removeprefix(BYTE_ORDER_MARK)
    return line[5:].strip() if line.startswith(b"data:") else b""


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
