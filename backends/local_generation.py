"""What an engine generates for one client, in the form that routes know."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

from backends.base import Deadline, DeadlineExceeded, Generation, PromptTokens, TextDelta
from backends.logprobs import ChoiceLogprobs, TokenSpelling
from engine import Delta, Engine, EngineRequest, FinishReason

LogprobsForm = Literal["completion", "chat"] | None


class LocalGeneration(Generation):
    """The sequences of requests that were submitted to an engine together.

    logprobs_form: of which route's log probabilities; None: none are wanted.
    num_top: of so many likeliest tokens; None: as many as there are.
    echo: the text of each request's prompt, if answers begin with it.
    tells_prompt: whether the first delta of a choice has the tokens of its prompt.
    strips_start: whether a text begins with its first word: what follows `Assistant:` in a play
    has a blank before it.
    """

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        spelling: TokenSpelling,
        requests: list[EngineRequest],
        deadline: Deadline,
        *,
        logprobs_form: LogprobsForm = None,
        num_top: int | None = None,
        echo: list[str] | None = None,
        tells_prompt: bool = False,
        strips_start: bool = False,
    ):
        self.model_name = model_name
        self.engine = engine
        self.spelling = spelling
        self.requests = requests
        self.deadline = deadline
        self.logprobs_form = logprobs_form
        self.num_top = num_top
        self.echo = echo
        self.tells_prompt = tells_prompt
        self.strips_start = strips_start
        self._num_completion_tokens = 0
        self._logprobs: dict[int, ChoiceLogprobs] = {}  # of each choice that has begun
        self._prompts: dict[int, PromptTokens] = {}  # by request, as far as they are told
        self._with_text: set[int] = set()  # choices of which a client has more than nothing

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_cached_tokens(self) -> int:
        return sum(request.num_cached_tokens for request in self.requests)

    @property
    def num_generated_tokens(self) -> int:
        return sum(request.num_generated_tokens for request in self.requests)

    @property
    def num_completion_tokens(self) -> int:
        return self._num_completion_tokens

    @property
    def queue_seconds(self) -> float | None:
        waited = [request.queue_seconds for request in self.requests]
        return max((seconds for seconds in waited if seconds is not None), default=None)

    @property
    def finish_reasons(self) -> set[FinishReason]:
        return {reason for request in self.requests for reason in request.finish_reasons}

    async def deltas(self) -> AsyncGenerator[TextDelta]:
        left_seconds = self.deadline.left_seconds
        stream = self.engine.stream(*self.requests, timeout_seconds=left_seconds)
        begun: set[int] = set()
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    yield await self._text_delta(delta, is_first=delta.index not in begun)
                    begun.add(delta.index)
                    # These are long to write, and many may be here already.
                    if self.logprobs_form or self.tells_prompt:
                        await asyncio.sleep(0)
        except TimeoutError:
            raise DeadlineExceeded(self.deadline.timeout_seconds) from None

    def abort(self) -> None:
        self.engine.abort(*self.requests)

    async def _text_delta(self, delta: Delta, is_first: bool) -> TextDelta:
        self._num_completion_tokens += len(delta.token_ids)
        text, logprobs, prompt = delta.text, None, None
        at = delta.index // self.requests[0].num_sequences
        if self.echo and is_first:
            prompt = (self.echo[at], self.requests[at])
            text = self.echo[at] + text
        if self.strips_start and delta.index not in self._with_text:
            text = text.lstrip()
            if text:
                self._with_text.add(delta.index)
        if self.logprobs_form:
            if is_first:
                self._logprobs[delta.index] = ChoiceLogprobs(self.spelling)
            written = self._logprobs[delta.index]
            if self.logprobs_form == "chat":
                logprobs = await written.chat(delta)
            else:
                logprobs = await written.completion(delta, prompt, self.num_top)
        return TextDelta(
            delta.index,
            text,
            logprobs,
            [token.logprob for token in delta.logprobs],
            delta.finish_reason,
            delta.stop_reason,
            delta.token_ids,
            await self._prompt_tokens(at) if self.tells_prompt and is_first else None,
        )

    async def _prompt_tokens(self, at: int) -> PromptTokens:
        """Of a request; spelled once, whatever number of choices tells them."""
        if at not in self._prompts:
            request = self.requests[at]
            has_logprobs = request.params.ranks_prompt
            logprobs = await self.spelling.of_prompt(request) if has_logprobs else None
            self._prompts[at] = PromptTokens(request.prompt_token_ids, logprobs)
        return self._prompts[at]
