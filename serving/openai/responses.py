"""What a `/v1` route answers, whole or as a stream of chunks."""

import hashlib
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from fastapi import Request, Response

import models
from backends.base import Backend, Generation, TextDelta
from engine import ConstraintFailed, InferenceError
from serving.error_handlers import FAILURES, count_failure, failure_message
from serving.errors import openai_error
from serving.json_pieces import PiecewiseJson, json_pieces
from serving.settings import Settings
from serving.streams import GenerationStream, event, finish, long_event

Body = TypeVar("Body", models.CompletionRequest, models.ChatCompletionRequest)


def system_fingerprint(backend: Backend, settings: Settings) -> str:
    """Changes with what may change the text of a seed: the kernel too, which `auto` chooses by the
    processor and by the model."""
    described = (backend.name, backend.about, torch.__version__, settings.generation_config)
    return "fp_" + hashlib.sha256(repr(described).encode()).hexdigest()[:10]


class ResponseBuilder(ABC, Generic[Body]):
    """Puts what a generation gives into the form of one route."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(self, body: Body, generation: Generation, backend: Backend, settings: Settings):
        self.body: Body = body
        self.generation = generation
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": generation.model_name,
            "system_fingerprint": system_fingerprint(backend, settings),
        }

    @abstractmethod
    def choice(self, delta: TextDelta) -> dict[str, Any]:
        """A choice of the full answer."""

    @abstractmethod
    def chunk_choices(self, delta: TextDelta, is_first: bool) -> list[dict[str, Any]]:
        """What a delta adds to a streamed choice: of as many chunks, the choices."""

    def about_prompt(self, delta: TextDelta) -> dict[str, Any]:
        """What the answer itself tells of the prompt, beside its choices; delta: its first."""
        return {}

    def best(self, deltas: list[TextDelta]) -> list[TextDelta]:
        """Those of all choices that the client gets."""
        return deltas

    def usage(self) -> dict[str, Any]:
        num_prompt_tokens = self.generation.num_prompt_tokens
        num_completion_tokens = self.generation.num_completion_tokens
        num_cached_tokens = self.generation.num_cached_tokens
        details = None if num_cached_tokens is None else {"cached_tokens": num_cached_tokens}
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": details,
        }

    async def respond(self, http: Request) -> Any:
        """The response that the client asked for."""
        if self.body.stream:
            return GenerationStream(self.stream(), self.generation)
        return await self.full(http)

    async def full(self, http: Request) -> Response:
        (deltas,) = await finish(http, self.generation)
        head = {**self.head, "usage": self.usage(), "object": self.object_name}
        pieces: list[bytes] = await json_pieces({**head, **self.about_prompt(deltas[0])})
        pieces[-1:] = [b',"choices":[']  # instead of its brace
        for index, delta in enumerate(self.best(deltas)):
            # Its place among those given, not among those drawn.
            pieces.extend(await json_pieces({**self.choice(delta), "index": index}))
            pieces.append(b",")
        pieces[-1:] = [b"]}"]
        return PiecewiseJson(pieces)

    async def stream(self) -> AsyncGenerator[str]:
        options = self.body.stream_options
        head = {**self.head, "object": self.chunk_object_name}
        begun: set[int] = set()
        try:
            async with aclosing(self.generation.deltas()) as deltas:
                async for delta in deltas:
                    usage = self.usage() if options.continuous_usage_stats else None
                    about = {} if begun else self.about_prompt(delta)
                    is_first = delta.index not in begun
                    for choice in self.chunk_choices(delta, is_first):
                        chunk = {**head, "choices": [choice], "usage": usage, **about}
                        # What is told of a prompt may be long, and comes with the first.
                        tells_prompt = is_first and (about or delta.prompt or delta.logprobs)
                        yield await long_event(chunk) if tells_prompt else event(chunk)
                        about = {}
                    begun.add(delta.index)
            if options.include_usage:
                yield event({**head, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except FAILURES as error:
            count_failure(error)
            if isinstance(error, ConstraintFailed):
                yield event(openai_error(400, failure_message(error), param=error.field))
                return
            status = 500 if isinstance(error, InferenceError) else 503
            yield event(openai_error(status, failure_message(error)))


def told_tokens(body: models.OpenAIRequest, delta: TextDelta) -> dict[str, Any]:
    """What a choice gains in tokens, if the client wants to know."""
    return {"token_ids": delta.token_ids} if body.return_token_ids else {}


def told_prompt(body: models.OpenAIRequest, delta: TextDelta) -> dict[str, Any]:
    """The prompt's tokens as far as the client wants to know them, once for each choice."""
    if not delta.prompt:
        return {}
    told: dict[str, Any] = {}
    if body.return_token_ids:
        told["prompt_token_ids"] = delta.prompt.token_ids
    if body.prompt_logprobs is not None:
        told["prompt_logprobs"] = delta.prompt.logprobs
    return told


NO_COMPLETION_LOGPROBS: dict[str, Any] = {
    "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
}  # fmt: skip
NO_CHAT_LOGPROBS: dict[str, Any] = {"content": [], "refusal": None}


class CompletionBuilder(ResponseBuilder[models.CompletionRequest]):
    id_prefix, object_name, chunk_object_name = "cmpl", "text_completion", "text_completion"

    def choice(self, delta: TextDelta) -> dict[str, Any]:
        wants_logprobs = self.body.logprobs is not None
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": (delta.logprobs or NO_COMPLETION_LOGPROBS) if wants_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **told_tokens(self.body, delta),
            **told_prompt(self.body, delta),
        }

    def chunk_choices(self, delta: TextDelta, is_first: bool) -> list[dict[str, Any]]:
        return [self.choice(delta)]

    def best(self, deltas: list[TextDelta]) -> list[TextDelta]:
        """Of each prompt's choices those whose tokens are the likeliest on average."""
        num_drawn, num_given = self.body.num_drawn, self.body.n
        if num_drawn == num_given:
            return deltas

        def mean_logprob(delta: TextDelta) -> float:
            return fmean(delta.token_logprobs) if delta.token_logprobs else -math.inf

        best: list[TextDelta] = []
        for start in range(0, len(deltas), num_drawn):
            drawn = deltas[start : start + num_drawn]
            best += sorted(drawn, key=mean_logprob, reverse=True)[:num_given]
        return best


class ChatBuilder(ResponseBuilder[models.ChatCompletionRequest]):
    id_prefix, object_name = "chatcmpl", "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def about_prompt(self, delta: TextDelta) -> dict[str, Any]:
        return told_prompt(self.body, delta)

    def choice(self, delta: TextDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, **self._besides_text(delta)}

    def chunk_choices(self, delta: TextDelta, is_first: bool) -> list[dict[str, Any]]:
        added = {"delta": {"content": delta.text}, **self._besides_text(delta)}
        if not is_first:
            return [added]
        role = {"role": "assistant", "content": ""}
        start = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
        return [start | {"stop_reason": None}, added]

    def _besides_text(self, delta: TextDelta) -> dict[str, Any]:
        logprobs = (delta.logprobs or NO_CHAT_LOGPROBS) if self.body.logprobs else None
        return {
            "index": delta.index,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **told_tokens(self.body, delta),
        }
