"""A model on another server that speaks OpenAI's protocol.

    routes                                     the other server
    await backend.submit_…(…)               -> POST {url}/{route}, as a stream if it can
    generation.deltas()                     <- an event a chunk, filtered here
    generation.abort()                      -> the connection is closed, which ends it there

Everything runs on the event loop. One task owns the connection of each open request, and
cancelling the task closes it: so a client that leaves, a deadline and a shutdown are one path.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import httpx

import models
from backends.ask import Ask
from backends.base import (
    About,
    Backend,
    Client,
    Deadline,
    DeadlineExceeded,
    ForbiddenPrompt,
    Generation,
    InvalidField,
    TextDelta,
    Tokens,
    check_num_sequences,
    holds_forbidden_word,
    new_token_budget,
)
from backends.chunks import (
    DONE,
    BrokenStream,
    Logprobs,
    UpstreamChatLogprobs,
    UpstreamChoice,
    UpstreamLogprobs,
    UpstreamUsage,
    parse_chunk,
    read_events,
)
from backends.dialect import Route, TakesOne
from backends.held_text import HeldText
from backends.reader import Pieces, Reader, find_in_pieces, read_in_pieces
from backends.upstream import Upstream
from engine import (
    EngineError,
    EngineStoppedError,
    FinishReason,
    InferenceError,
    QueueFullError,
    StepStats,
    TextFilter,
    TextReading,
    is_within_share,
)

logger = logging.getLogger("external")

BYTES_A_TOKEN = 4  # of a prompt, about; only the other server can count them
END = UpstreamChoice(finish_reason="stop")  # what [DONE] says of a text
TAIL_SECONDS = 1.0  # what follows the last text gets this long: the usage, the stream's end
# Fields of the client's body that the other server gets in another form, or not at all.
OUR_FIELDS = {"model", "stream", "stream_options", "best_of"}
# Extensions that it gets only where they ask for something: some servers know none of them.
EXTENSIONS = {
    "temperature_last", "repetition_penalty_range", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "return_token_ids",
}  # fmt: skip
MOST_TOKENS = {"max_tokens", "max_completion_tokens"}
STOPS_STAY = ("echo", "min_tokens", "include_stop_str_in_output")  # fields that leave them in
NUM_AT_ONCE = 8  # requests for one of our own, where the other server makes one text a request


class ExternalGeneration(Generation):
    """The choices of one request to another server.

    Tokens are counted there: until its usage has come, each chunk with text counts as one, and
    the prompt's are not known.
    """

    def __init__(
        self, model_name: str, choices: list[HeldText], client: Client, deadline: Deadline
    ):
        self.model_name = model_name
        self.client = client
        self.choices = choices
        self.deadline = deadline
        self.usages: dict[int, UpstreamUsage] = {}  # of each Ask, by its first choice
        self.num_chunks = 0  # with text
        self.has_begun = False  # to be answered, with status 200
        self.is_answered = asyncio.Event()  # with whatever
        self.gained: asyncio.Queue[TextDelta | Exception] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None  # which owns the connection
        self._finish_reasons: set[FinishReason] = set()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(usage.prompt_tokens for usage in self.usages.values())

    @property
    def num_cached_tokens(self) -> int | None:
        told = [usage.prompt_tokens_details for usage in self.usages.values()]
        known = [details.cached_tokens for details in told if details]
        return sum(known) if known and len(known) == len(told) else None

    @property
    def num_generated_tokens(self) -> int:
        if not self.usages:
            return self.num_chunks
        return sum(usage.completion_tokens for usage in self.usages.values())

    @property
    def num_completion_tokens(self) -> int:
        return self.num_generated_tokens

    @property
    def queue_seconds(self) -> float | None:
        return None

    @property
    def finish_reasons(self) -> set[FinishReason]:
        return self._finish_reasons

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    async def deltas(self) -> AsyncGenerator[TextDelta]:
        assert self.task
        expired = DeadlineExceeded(self.deadline.timeout_seconds)
        timer = asyncio.get_running_loop().call_later(
            self.deadline.left_seconds, self.gained.put_nowait, expired
        )
        try:
            num_unfinished = len(self.choices)
            while num_unfinished:
                delta = await self.gained.get()
                if isinstance(delta, Exception):
                    raise delta
                if delta.finish_reason:
                    num_unfinished -= 1
                yield delta
            # The answer is whole; its usage may follow, and the end, after which the
            # connection can serve another request.
            await asyncio.wait({self.task}, timeout=TAIL_SECONDS)
        finally:
            timer.cancel()
            self.abort()

    def abort(self) -> None:
        if self.task:
            self.task.cancel()


class ExternalBackend(Backend):
    """Sends requests to one model of another server.

    content_filter: what prompts must not hold; text_filter: what generated text must not, None
    lets everything pass. reader: where prompts are read. max_num_sequences: in one request.
    request_id: called for the id of the request under way, which the other server is told.
    on_step: called for each chunk.
    """

    num_waiting = 0  # in a queue, if at all, there
    takes_chat = True
    is_loaded = False
    max_num_seqs = None
    vocab_size = None
    owned_by = "external"
    about = About("external", "external", "external", "external")

    def __init__(
        self,
        upstream: Upstream,
        *,
        content_filter: TextFilter,
        text_filter: TextFilter | None,
        request_timeout_seconds: float,
        reader: Reader,
        max_num_sequences: int,
        request_id: Callable[[], str] = lambda: "-",
        on_step: Callable[[StepStats], None] | None = None,
        log_prompts: Callable[[str | list[str]], None] | None = None,
    ):
        self.name = upstream.name
        self.upstream = upstream
        self.content_filter = content_filter
        self.text_filter = text_filter
        self.request_timeout_seconds = request_timeout_seconds
        self.reader = reader
        self.max_num_sequences = max_num_sequences
        self.request_id = request_id
        self.on_step = on_step or (lambda stats: None)
        self.log_prompts = log_prompts or (lambda prompts: None)
        self._is_stopping = False
        self._generations: set[ExternalGeneration] = set()
        self._is_forbidden = lru_cache(1 << 14)(
            lambda text: bool(self.text_filter and self.text_filter.find(text))
        )

    @property
    def max_model_len(self) -> int | None:
        return self.upstream.max_model_len

    @property
    def num_running(self) -> int:
        return sum(len(generation.choices) for generation in self._generations)

    @property
    def is_full(self) -> bool:
        """Whether a client that has no request open would be refused now."""
        return len(self._generations) >= self.upstream.max_num_requests

    @property
    def is_healthy(self) -> bool:
        return self.upstream.is_reachable and not self._is_stopping

    @property
    def is_reachable(self) -> bool:
        return self.is_healthy

    @property
    def problem(self) -> str | None:
        return f"the queue of {self.name} is full" if self.is_full else None

    def start(self) -> None:
        self._is_stopping = False
        self.upstream.start()

    def stop(self) -> None:
        self._is_stopping = True
        for loop in self.upstream.running_loops:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        tasks = [generation.task for generation in self._generations if generation.task]
        tasks = [task for task in tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.upstream.close()

    async def submit_text(
        self,
        prompt: str,
        params: models.TextFields,
        *,
        client: Client,
        num_sequences: int = 1,
        streams: bool = False,
        is_chat: bool = False,
    ) -> Generation:
        self.log_prompts(prompt)
        deadline = self._new_deadline()
        if holds_forbidden_word(self.content_filter, prompt):
            raise ForbiddenPrompt("prompt")
        context_tokens = self.max_model_len or sys.maxsize
        num_new_tokens = params.max_new_tokens or params.max_length
        await client.reserve(estimated_tokens(prompt), num_sequences * num_new_tokens)
        num_prompt_tokens = 0  # while it makes no difference: to count them costs a request
        counts_prompt = params.max_new_tokens is None and "max_length" in params.model_fields_set
        # A token is a byte or more, but for the one that some models begin with.
        if counts_prompt or len(prompt.encode()) + 1 + num_new_tokens > context_tokens:
            num_prompt_tokens = await self._count_prompt_tokens(prompt, client, deadline)
        sent = {
            "prompt": prompt,
            "max_tokens": new_token_budget(params, num_prompt_tokens, context_tokens),
            # Not every server takes 0 for the likeliest token.
            "temperature": params.temperature if params.top_p else 0,
            "top_p": params.top_p or 1,
            "n": num_sequences,
        }
        if params.seed is not None:
            sent["seed"] = params.seed
        if params.stop:
            sent["stop"] = params.stop
        if isinstance(params, models.Structured) and params.structured_outputs:
            sent["structured_outputs"] = params.structured_outputs.model_dump(exclude_unset=True)
        if "top_k" in params.model_fields_set:  # no field of OpenAI's own
            sent["top_k"] = params.top_k
        reading = self._read_prompt(prompt)
        held = [HeldText(streams, reading, params.stop) for _ in range(num_sequences)]
        with self._place(held, client, deadline) as generation:
            return await self._ask("completions", sent, generation)

    async def submit_completion(
        self, body: models.CompletionRequest, *, client: Client
    ) -> Generation:
        num_sequences = len(body.prompts) * body.num_drawn
        check_num_sequences("prompt", num_sequences, self.max_num_sequences)
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
        if len(texts) < len(body.prompts):
            raise InvalidField(
                "prompt", f"must be text for {self.name}, which is an external model"
            )
        changes: dict[str, Any] = {"max_tokens": body.max_tokens}  # llama.cpp's default has no end
        if body.num_drawn > body.n:  # not every server draws several for one, and none in a stream
            changes |= {"n": body.num_drawn, "logprobs": body.logprobs or 0}
        # The text of an echo begins with the prompt, so that the filter need not be told of it.
        before = ["" for _ in texts] if body.echo else texts
        context_tokens = self.max_model_len or sys.maxsize
        max_tokens = context_tokens if body.most_tokens is None else body.most_tokens
        num_new_tokens = num_sequences * min(max_tokens, context_tokens)
        return await self._submit_openai(
            "completions", body, texts, before, changes, client, num_new_tokens
        )

    async def submit_chat(
        self, body: models.ChatCompletionRequest, *, client: Client
    ) -> Generation:
        texts = [message.text for message in body.messages]
        num_prompt_tokens = sum(map(estimated_tokens, texts))
        # Without a bound at either end it may cost more than any limit.
        context_tokens = self.max_model_len or sys.maxsize
        room_tokens = max(0, context_tokens - num_prompt_tokens)
        max_tokens = room_tokens if body.most_tokens is None else min(body.most_tokens, room_tokens)
        return await self._submit_openai(
            "chat/completions", body, texts, [""], {}, client, body.n * max_tokens
        )

    async def tokenize(self, body: models.TokenizeRequest, *, client: Client) -> Tokens:
        raise self._has_no_tokenizer()

    async def detokenize(self, body: models.DetokenizeRequest, *, client: Client) -> str:
        raise self._has_no_tokenizer()

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        raise self._has_no_tokenizer()

    def _has_no_tokenizer(self) -> InvalidField:
        return InvalidField("model", f"{self.name} is on another server, and so is its tokenizer")

    async def _submit_openai(
        self,
        route: Route,
        body: models.CompletionRequest | models.ChatCompletionRequest,
        texts: list[str],
        before: list[str],
        changes: dict[str, Any],
        client: Client,
        num_new_tokens: int,
    ) -> Generation:
        """texts: what a prompt filter reads; before: what the answers follow on; changes: to the
        client's body; num_new_tokens: as many as may be generated."""
        if body.asks_of_prompt:
            field = "return_token_ids" if body.return_token_ids else "prompt_logprobs"
            raise InvalidField(field, f"cannot be had of {self.name}, an external model")
        deadline = self._new_deadline()
        self.log_prompts(texts)
        # A null stands for a seed that is to be drawn.
        sent = body.model_dump(exclude_unset=True, exclude_none=True, exclude=OUR_FIELDS) | changes
        for name in EXTENSIONS & sent.keys():
            if sent[name] == type(body).model_fields[name].default:
                del sent[name]
        if route == "chat/completions" and body.most_tokens is None:  # as is said by leaving it out
            sent = {name: sent[name] for name in sent if name not in MOST_TOKENS}
        num_sequences = sent.get("n", 1)
        # Where the text may hold a stop string, only the other server knows which of them ends it.
        is_kept = any(sent.get(name) for name in STOPS_STAY)
        stop = [] if is_kept else body.stop
        held = [HeldText(body.stream, stop=stop) for _ in range(len(before) * num_sequences)]
        with self._place(held, client, deadline) as generation:
            reading = self._read_prompts(route, texts, before, held)
            await self.reader.read(client, deadline, texts, reading)
            await client.reserve(sum(map(estimated_tokens, texts)), num_new_tokens)
            return await self._ask(route, sent, generation)

    def _read_prompts(
        self, route: Route, texts: list[str], before: list[str], held: list[HeldText]
    ) -> Pieces[None]:
        """Raises ForbiddenPrompt; else the choices know what they follow on."""
        for text in texts:
            if (yield from find_in_pieces(self.content_filter, text)):
                raise ForbiddenPrompt("prompt" if route == "completions" else "messages")
            yield
        if not self.text_filter:
            return
        num_sequences = len(held) // len(before)
        for at, text in enumerate(before):
            reading = yield from read_in_pieces(self.text_filter, text)
            for choice in held[at * num_sequences : (at + 1) * num_sequences]:
                choice.reading = reading.copy()
            yield

    def _read_prompt(self, prompt: str) -> TextReading | None:
        """What the filter has read before the first chunk."""
        return self.text_filter.read(prompt) if self.text_filter else None

    def _new_deadline(self) -> Deadline:
        return Deadline(time.monotonic(), self.request_timeout_seconds)

    async def _count_prompt_tokens(self, prompt: str, client: Client, deadline: Deadline) -> int:
        """How many tokens the other server makes of a prompt: it says so when it generates one
        more."""
        sent = {"prompt": prompt, "max_tokens": 1}
        # Its text goes nowhere, and it has to come to its end: it is not filtered.
        held = [HeldText(streams=False)]
        with self._place(held, client, deadline) as generation:
            await self._ask("completions", sent, generation)
        await generation.complete()
        if not generation.usages:
            logger.warning("%s: upstream does not say how many tokens a prompt has", self.name)
            raise InferenceError("upstream sent no usage")
        return generation.num_prompt_tokens

    # One request, in a task of its own.

    @contextmanager
    def _place(
        self, choices: list[HeldText], client: Client, deadline: Deadline
    ) -> Generator[ExternalGeneration]:
        """A generation that counts as open from here on; for which `_ask` has to come before the
        end of the block."""
        num_own = sum(each.client.identity == client.identity for each in self._generations)
        num_free = self.upstream.max_num_requests - len(self._generations)
        if not is_within_share(num_own, num_free):
            raise QueueFullError("too many requests are open already")
        generation = ExternalGeneration(self.name, choices, client, deadline)
        self._generations.add(generation)
        try:
            yield generation
        finally:
            if generation.task is None:
                self._generations.discard(generation)

    async def _ask(
        self, route: Route, body: dict[str, Any], generation: ExternalGeneration
    ) -> ExternalGeneration:
        """The generation, which the other server has begun to answer; where that fails, nothing
        is left open. body: without `model` and what streaming needs."""
        if self._is_stopping:
            raise EngineStoppedError("the engine was stopped")
        body = body | {
            "model": self.upstream.upstream_name,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ask = Ask(route, body, 0, len(generation.choices))
        running = self._run(generation, ask, self.request_id())
        generation.task = asyncio.create_task(running)
        generation.task.add_done_callback(partial(self._end, generation))
        try:
            async with generation.deadline.limit():
                await generation.is_answered.wait()
        except BaseException:
            generation.abort()
            raise
        if not generation.has_begun:
            refusal = await generation.gained.get()
            assert isinstance(refusal, Exception)
            raise refusal
        return generation

    async def _run(self, generation: ExternalGeneration, ask: Ask, request_id: str) -> None:
        failure: Exception | None = None
        try:
            await self._serve(generation, ask, request_id)
        except EngineError as error:  # once a client has an answer, it is told no more than this
            failure = InferenceError("upstream failed") if generation.has_begun else error
        except (httpx.HTTPError, BrokenStream) as error:
            said = str(error) if isinstance(error, BrokenStream) else type(error).__name__
            logger.warning("%s: upstream broke off: %s", self.name, said)
            failure = InferenceError("upstream broke off")
        except Exception:
            logger.exception("%s: an answer of upstream's could not be read", self.name)
            failure = InferenceError("the answer could not be read")
        finally:
            if failure:
                generation.gained.put_nowait(failure)
            if generation.usages:
                self._count(generation)

    async def _serve(self, generation: ExternalGeneration, ask: Ask, request_id: str) -> None:
        """Has the other server make these choices: in one request, or in as many as it needs, of
        which the first finds out what it takes."""
        try:
            async with self.upstream.open(ask.route, ask.body, request_id) as response:
                generation.has_begun = True
                generation.is_answered.set()
                await self._read(generation, ask, response)
            return
        except TakesOne:
            choices = generation.choices
            parts = [part for part in ask.split() if not choices[part.first].finish_reason]
        first, *rest = parts
        await self._serve(generation, first, request_id)
        for start in range(0, len(rest), NUM_AT_ONCE):
            try:
                async with asyncio.TaskGroup() as group:
                    for part in rest[start : start + NUM_AT_ONCE]:
                        group.create_task(self._serve(generation, part, request_id))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None

    def _end(self, generation: ExternalGeneration, task: asyncio.Task[None]) -> None:
        """Called once the request's task is done, also if it was cancelled before it began."""
        self._generations.discard(generation)
        if task.cancelled():
            generation.gained.put_nowait(EngineStoppedError("the engine was stopped"))
        generation.is_answered.set()

    async def _read(
        self, generation: ExternalGeneration, ask: Ask, response: httpx.Response
    ) -> None:
        """Takes in an answer to its end: what follows the last text gets TAIL_SECONDS. Raises
        BrokenStream, and TakesOne where fewer choices came than were asked for."""
        choices = generation.choices[ask.first : ask.first + ask.num_choices]
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as limit, aclosing(read_events(response)) as received:
                async for event in received:
                    self._take_in(generation, ask, event)
                    if all(choice.is_cut and not choice.is_ended for choice in choices):
                        return  # closes the connection: the other server need not go on
                    if limit.when() is None and all(choice.finish_reason for choice in choices):
                        limit.reschedule(asyncio.get_running_loop().time() + TAIL_SECONDS)
        num_finished = sum(choice.finish_reason is not None for choice in choices)
        if 0 < num_finished < len(choices) and not isinstance(ask.body.get("prompt"), list):
            self.upstream.tell_it_takes_one()
            raise TakesOne
        if num_finished < len(choices):
            raise BrokenStream("it ended too soon")

    def _take_in(self, generation: ExternalGeneration, ask: Ask, event: bytes) -> None:
        if event == DONE:  # some servers give no reason for it
            for index in range(ask.first, ask.first + ask.num_choices):
                if generation.choices[index].last_chunk_seconds is not None:
                    self._append(generation, ask, index, END)
            return
        chunk = parse_chunk(event)
        if chunk.usage:
            generation.usages[ask.first] = chunk.usage
        for choice in chunk.choices:
            if choice.index >= ask.num_choices:
                raise BrokenStream("it sent more choices than were asked for")
            self._append(generation, ask, ask.first + choice.index, choice)

    def _append(
        self, generation: ExternalGeneration, ask: Ask, index: int, received: UpstreamChoice
    ) -> None:
        choice = generation.choices[index]
        if choice.finish_reason:
            choice.is_ended |= received.finish_reason is not None
            return
        arrived_seconds = generation.deadline.arrived_seconds
        stats = StepStats(num_rows=0, num_prompt_tokens=0, queue_seconds=[])
        now_seconds = time.monotonic()
        logprobs = in_form(ask.route, received.logprobs, choice.num_received)
        if received.added:
            generation.num_chunks += 1
            if choice.last_chunk_seconds is None:
                stats.time_to_first_token_seconds.append(now_seconds - arrived_seconds)
            else:
                stats.inter_token_seconds.append(now_seconds - choice.last_chunk_seconds)
            choice.last_chunk_seconds = now_seconds
        self._leave_out_forbidden(logprobs)
        gained = choice.add(received.added, logprobs, received.finish_reason)
        if finish_reason := choice.finish_reason:
            generation.finish_reasons.add(finish_reason)
            stats.finished.append((finish_reason, now_seconds - arrived_seconds))
            stats.num_rollbacks = int(choice.is_cut and finish_reason == "content_filter")
        if gained:
            text, logprobs = gained
            delta = text_delta(index, text, logprobs, finish_reason)
            if finish_reason == "stop" and isinstance(received.stop_reason, int | str):
                delta = replace(delta, stop_reason=received.stop_reason)
            generation.gained.put_nowait(delta)
        self.on_step(stats)

    def _leave_out_forbidden(self, logprobs: Logprobs | None) -> None:
        """Takes alternatives that are forbidden words out of a chunk's log probabilities; the
        chosen tokens are text, and filtered as that."""
        if isinstance(logprobs, models.ChatLogprobs):
            for token in logprobs.content:
                token.top_logprobs = [
                    top for top in token.top_logprobs if not self._is_forbidden(top.token)
                ]
        elif logprobs and logprobs.top_logprobs:
            chosen_tops = zip(logprobs.tokens, logprobs.top_logprobs, strict=False)
            for at, (chosen, top) in enumerate(chosen_tops):
                if top:
                    logprobs.top_logprobs[at] = {
                        text: logprob
                        for text, logprob in top.items()
                        if text == chosen or not self._is_forbidden(text)
                    }

    def _count(self, generation: ExternalGeneration) -> None:
        """Puts the other server's own count in place of that of the chunks."""
        num_more = max(0, generation.num_generated_tokens - generation.num_chunks)
        num_prompt_tokens = generation.num_prompt_tokens
        self.on_step(StepStats(0, num_prompt_tokens, [], num_untimed_tokens=num_more))


def in_form(
    route: Route, logprobs: UpstreamLogprobs | None, num_characters: int
) -> Logprobs | None:
    """A chunk's log probabilities as this route has them, if they can be; num_characters: of the
    text before it."""
    if isinstance(logprobs, UpstreamChatLogprobs):
        is_chat = route == "chat/completions"
        return logprobs.as_chat() if is_chat else logprobs.as_completion(num_characters)
    return logprobs if route == "completions" else None


def estimated_tokens(text: str) -> int:
    """About how many tokens a prompt has, at least 1."""
    return len(text.encode()) // BYTES_A_TOKEN + 1


def text_delta(
    index: int, text: str, logprobs: Logprobs | None, finish_reason: FinishReason | None
) -> TextDelta:
    token_logprobs: list[float] = []
    if isinstance(logprobs, models.CompletionLogprobs):
        token_logprobs = [each for each in logprobs.token_logprobs if each is not None]
    written = logprobs.model_dump() if logprobs else None
    return TextDelta(index, text, written, token_logprobs, finish_reason)
