"""A model that runs in this process: its tokenizer, and the engine that has its weights."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

from jinja2 import TemplateError

import models
from backends.base import (
    About,
    Backend,
    Client,
    ContextExceeded,
    Deadline,
    DeadlineExceeded,
    ForbiddenPrompt,
    Generation,
    InvalidField,
    NoChatTemplate,
    PromptTokens,
    TextDelta,
    Tokens,
    check_num_sequences,
    new_token_budget,
)
from backends.conversations import as_template_reads, find_turn_ends, texts_of
from backends.generation_config import AuthorsDefaults
from backends.logprobs import ChoiceLogprobs, TokenSpelling
from backends.reader import Pieces, Reader, find_in_pieces, read_at_once, read_in_pieces
from backends.structure import StructureCompiler, read_structure
from engine import (
    Constraint,
    Delta,
    Engine,
    EngineRequest,
    FinishReason,
    Place,
    Prompt,
    SamplingParams,
    TextFilter,
    instruction_set,
)

PIECE_TOKENS = 10_000  # that are looked up before others have their turn
MAX_PROMPT_LOGPROBS = 500_000  # in an answer, which is about 35 MB then, and 200 more to make it

LogPrompts = Callable[[str | list[str]], None]


class LocalBackend(Backend):
    """A text-generation pipeline, to whose engine its model belongs.

    generator: the pipeline; its tokenizer stays while its model is out of memory.
    content_filter: what prompts must not hold. reader: where long prompts are read.
    defaults: what the model's author asks for, where that is to be followed.
    log_prompts: called with each request's prompts; None where they are not to be logged.
    """

    engine: Engine

    def __init__(
        self,
        name: str,
        generator: Any,
        engine: Engine,
        *,
        content_filter: TextFilter,
        request_timeout_seconds: float,
        reader: Reader,
        defaults: AuthorsDefaults | None = None,
        log_prompts: LogPrompts | None = None,
    ):
        self.name = name
        self.owned_by = name.rpartition("/")[0] or "local"
        self.generator = generator
        # What tokenizer.json says of training batches; transformers, too, does neither unasked.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        self.engine = engine
        self.content_filter = content_filter
        self.request_timeout_seconds = request_timeout_seconds
        self.reader = reader
        self.defaults = defaults or AuthorsDefaults()
        self.log_prompts = log_prompts or (lambda prompts: None)
        self.is_base_model = False  # which continues texts, whatever template it was given
        self.turn_ends: tuple[str, ...] = ()  # strings that end an answer in a conversation
        model = engine.model
        kernel = engine.kernel.name
        self.about = About(str(model.dtype), model.device.type, kernel, instruction_set())

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer

    @cached_property
    def spelling(self) -> TokenSpelling:
        return TokenSpelling(self.tokenizer, self.engine.output.text_filter)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids that the model can generate of tokens that are no text."""
        added = self.tokenizer.added_tokens_decoder
        return {
            token.content: token_id
            for token_id, token in added.items()
            if token.special and token_id < self.vocab_size
        }

    @cached_property
    def structures(self) -> StructureCompiler:
        special_ids = {*self.special_tokens.values(), *self.engine.eos_token_ids}
        return StructureCompiler(self.spelling, self.vocab_size, special_ids)

    @cached_property
    def longest_token_characters(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def takes_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def max_num_seqs(self) -> int:
        return self.engine.scheduler.max_num_seqs

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy

    @property
    def is_loaded(self) -> bool:
        return self.engine.is_loaded

    @property
    def is_reachable(self) -> bool:
        return True

    @property
    def problem(self) -> str | None:
        if not self.is_healthy:
            return f"the engine of {self.name} keeps failing"
        if self.engine.is_full and self.is_loaded:
            return f"the queue of {self.name} is full"
        return None

    def set_chat_template(self, template: str) -> None:
        """Has conversations read by this template; an answer ends where the next turn would begin.
        Raises InvalidField for a template that does not work."""
        self.is_base_model = not self.tokenizer.chat_template
        self.tokenizer.chat_template = template
        self.turn_ends = find_turn_ends(partial(self._apply_chat_template, "messages"))

    def unload(self) -> None:
        """Takes the model out of memory, once it has answered what came before. Blocks."""
        self.generator.model = None
        self.engine.unload()

    def start(self) -> None:
        self.engine.start()

    def stop(self) -> None:
        self.engine.stop()

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
        if params.top_k > self.vocab_size:
            raise InvalidField("top_k", f"Input should be less than or equal to {self.vocab_size}")
        self._check_num_sequences("num_return_sequences", num_sequences)
        with self.engine.place(client.identity, num_sequences) as place:
            # Prompts are short here.
            read = read_at_once(self._text_prompt(prompt, is_chat))
            num_prompt_tokens = len(read.token_ids)
            asked = params.structure if isinstance(params, models.Structured) else None
            stop = (*params.stop, *(() if asked else self.defaults.stop))
            sampling = SamplingParams(
                max_new_tokens=new_token_budget(params, num_prompt_tokens, self.max_model_len),
                temperature=params.temperature if params.top_p else 0,
                top_p=params.top_p,
                top_k=max(0, params.top_k),
                seed=params.seed,
                stop=stop,
                stop_token_ids=self._special_stops(stop),
                rules=self.defaults.rules,
            )
            sampling = await self._constrained(sampling, asked, client, self._deadline(place))
            await client.reserve(num_prompt_tokens, num_sequences * sampling.max_new_tokens)
            salt = (client.key_name, "")
            requests = self.engine.submit_all(
                [read], sampling, place=place, streams=streams, cache_salt=salt
            )
        return LocalGeneration(self, requests, self._deadline(place))

    async def submit_completion(
        self, body: models.CompletionRequest, *, client: Client
    ) -> Generation:
        num_logprobs = body.logprobs
        if body.num_drawn > body.n and num_logprobs is None:
            num_logprobs = 0  # the tokens' own, by which the best choices are picked
        sampling = self._sampling_params(
            body, body.most_tokens, num_logprobs, body.logprobs if body.echo else None
        )
        num_sequences = len(body.prompts) * body.num_drawn
        self._check_num_sequences("prompt", num_sequences)
        self._check_sizes(body.prompts, body.most_tokens)
        with self.engine.place(client.identity, num_sequences) as place:
            deadline = self._deadline(place)
            sampling = await self._constrained(sampling, body.structure, client, deadline)
            reading = self._completion_prompts(body)
            texts, prompts = await self.reader.read(client, deadline, body.prompts, reading)
            num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            check_num_logprobs(body, sampling, num_prompt_tokens * body.num_drawn)
            rooms = (self._num_new_tokens(prompt, body.most_tokens) for prompt in prompts)
            await client.reserve(num_prompt_tokens, body.num_drawn * sum(rooms))
            salt = (client.key_name, body.cache_salt or "")
            requests = self.engine.submit_all(
                prompts, sampling, place=place, streams=body.stream, cache_salt=salt
            )
        return LocalGeneration(
            self,
            requests,
            deadline,
            logprobs_form=None if body.logprobs is None else "completion",
            num_top=body.logprobs,
            echo=texts if body.echo else None,
            tells_prompt=body.asks_of_prompt,
        )

    async def submit_chat(
        self, body: models.ChatCompletionRequest, *, client: Client
    ) -> Generation:
        if not self.takes_chat:
            raise NoChatTemplate(self.name)
        texts = texts_of(body.messages)
        self._check_num_sequences("n", body.n)
        self._check_sizes(["".join(texts)], body.most_tokens)
        with self.engine.place(client.identity, body.n) as place:
            deadline = self._deadline(place)
            prompt = await self.reader.read(client, deadline, texts, self._chat_prompt(body, texts))
            num_prompt_tokens = len(prompt.token_ids)
            num_logprobs = body.top_logprobs if body.logprobs else None
            most_tokens = body.most_tokens if body.names_length else self.defaults.max_new_tokens
            sampling = self._sampling_params(
                body, most_tokens, num_logprobs, turn_ends=self.turn_ends
            )
            sampling = await self._constrained(sampling, body.structure, client, deadline)
            check_num_logprobs(body, sampling, num_prompt_tokens * body.n)
            num_new_tokens = self._num_new_tokens(prompt, most_tokens)
            await client.reserve(num_prompt_tokens, body.n * num_new_tokens)
            salt = (client.key_name, body.cache_salt or "")
            requests = self.engine.submit_all(
                [prompt], sampling, place=place, streams=body.stream, cache_salt=salt
            )
        return LocalGeneration(
            self,
            requests,
            deadline,
            logprobs_form="chat" if body.logprobs else None,
            tells_prompt=body.asks_of_prompt,
            strips_start=self.is_base_model and not body.structure,
        )

    async def tokenize(self, body: models.TokenizeRequest, *, client: Client) -> Tokens:
        if body.messages is not None and not self.takes_chat:
            raise NoChatTemplate(self.name)
        texts = [body.prompt or ""] if body.messages is None else texts_of(body.messages)
        with self.engine.place(client.identity) as place:  # all that it takes of the engine
            pieces = self._tokens(body)
            return await self.reader.read(client, self._deadline(place), texts, pieces)

    async def detokenize(self, body: models.DetokenizeRequest, *, client: Client) -> str:
        num_tokens = max(self.vocab_size, len(self.tokenizer))
        if max(body.tokens, default=0) >= num_tokens:
            raise InvalidField("tokens", f"token ids go up to {num_tokens - 1}")
        with self.engine.place(client.identity) as place:
            pieces = self._decoded(body.tokens)
            return await self.reader.read(client, self._deadline(place), [body.tokens], pieces)

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        tokenizer, template = self.tokenizer, self.tokenizer.chat_template
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "model_max_length": self.max_model_len,
            "eos_token": None,
            **tokenizer.special_tokens_map,
            # Some have several, by name.
            "chat_template": template.get("default") if isinstance(template, dict) else template,
        }

    def _deadline(self, place: Place) -> Deadline:
        return Deadline(place.arrived_seconds, self.request_timeout_seconds)

    def _check_num_sequences(self, field: str, num_sequences: int) -> None:
        scheduler = self.engine.scheduler
        check_num_sequences(field, num_sequences, scheduler.max_num_seqs + scheduler.max_queue_size)

    def _num_new_tokens(self, prompt: Prompt, most_tokens: int | None) -> int:
        """How many tokens there may be after the prompt; most_tokens: that were asked for."""
        room_tokens = self.max_model_len - len(prompt.token_ids)
        return room_tokens if most_tokens is None else min(most_tokens, room_tokens)

    def _check_sizes(self, prompts: SequenceOf[str | list[int]], most_tokens: int | None) -> None:
        """Raises ContextExceeded for prompts that are seen to be too long without reading them:
        by their token ids, or even if each token was the longest there is."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                self._check_length(len(prompt), most_tokens)
                continue
            at_least = math.ceil(len(prompt) / self.longest_token_characters)
            if at_least > self.max_model_len:
                self._check_length(at_least, most_tokens)

    def _sampling_params(
        self,
        body: models.CompletionRequest | models.ChatCompletionRequest,
        most_tokens: int | None,
        num_logprobs: int | None,
        num_echo_logprobs: int | None = None,
        turn_ends: tuple[str, ...] = (),
    ) -> SamplingParams:
        """The engine's parameters. Raises InvalidField for what depends on the model."""
        logit_bias = {int(token_id): bias for token_id, bias in body.logit_bias.items()}
        if body.top_k > self.vocab_size:
            raise InvalidField("top_k", f"goes up to {self.vocab_size}")
        if max(logit_bias, default=0) >= self.vocab_size:
            raise InvalidField("logit_bias", f"token ids go up to {self.vocab_size - 1}")
        if max(body.stop_token_ids, default=0) >= self.vocab_size:
            raise InvalidField("stop_token_ids", f"token ids go up to {self.vocab_size - 1}")
        # Cut by the engine to what fits after the prompt.
        max_tokens = self.max_model_len if most_tokens is None else most_tokens
        if body.min_tokens > max_tokens:
            reason = f"must not be above the {max_tokens} tokens to generate"
            raise InvalidField("min_tokens", reason)
        stop_tokens = {token_id: token_id for token_id in body.stop_token_ids}
        stop = tuple(body.stop)
        if not (body.ignore_eos or body.structure):  # which says itself where it ends
            stop += (*self.defaults.stop, *turn_ends)
        of_prompt = [n for n in (num_echo_logprobs, body.prompt_logprobs) if n is not None]
        sampling = self.defaults.sampling_of(body)
        sampling["top_k"] = max(0, sampling["top_k"])
        if sampling["top_p"] == 0:
            sampling["temperature"] = 0
        return SamplingParams(
            **sampling,
            max_new_tokens=max_tokens,
            temperature_last=body.temperature_last,
            repetition_penalty_range=max(0, body.repetition_penalty_range),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=logit_bias,
            min_tokens=body.min_tokens,
            ignore_eos=body.ignore_eos,
            stop=stop,
            stop_token_ids={**stop_tokens, **self._special_stops(stop)},
            includes_stop=body.include_stop_str_in_output,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=max(of_prompt, default=None),
            ranks_prompt=body.prompt_logprobs is not None,
            seed=body.seed,
            rules=self.defaults.rules,
        )

    async def _constrained(
        self,
        sampling: SamplingParams,
        asked: tuple[str, models.StructuredOutputs] | None,
        client: Client,
        deadline: Deadline,
    ) -> SamplingParams:
        """The parameters, with the constraint that a request asks for. What the model's author
        says of tokens does not hold under one: it might leave none that may come."""
        if asked is None:
            return sampling
        constraint = await self.reader.work(client, deadline, self._compile(*asked))
        return replace(sampling, constraint=constraint, rules=None)

    def _compile(self, field: str, asked: models.StructuredOutputs) -> Pieces[Constraint]:
        structure = read_structure(field, asked)
        yield
        return self.structures.compile(structure)

    def _special_stops(self, stops: SequenceOf[str]) -> dict[int, str]:
        """The stop strings that are special tokens, which the text leaves out, by their ids."""
        return {self.special_tokens[stop]: stop for stop in stops if stop in self.special_tokens}

    def _text_prompt(self, text: str, is_chat: bool) -> Pieces[Prompt]:
        """A prompt; is_chat: what a conversation begins with, if the model takes one."""
        options = {}
        written = text
        if is_chat and self.takes_chat and not self.is_base_model:
            text = self._apply_chat_template("prompt", [{"role": "user", "content": text}])
            options = {"add_special_tokens": False}
        return (yield from self._prompt("prompt", [written], self._encode(text, **options)))

    def _completion_prompts(
        self, body: models.CompletionRequest
    ) -> Pieces[tuple[list[str], list[Prompt]]]:
        """The prompts as text, and as the engine takes them."""
        texts: list[str] = []
        prompts: list[Prompt] = []
        for prompt in body.prompts:
            if isinstance(prompt, str) and (token_ids := self._encode(prompt)):
                text = prompt
            elif isinstance(prompt, str):
                token_ids = self._beginning()
                text = self.tokenizer.decode(token_ids)
            elif max(prompt) >= self.vocab_size:
                raise InvalidField("prompt", f"token ids go up to {self.vocab_size - 1}")
            else:
                text, token_ids = self.tokenizer.decode(prompt), prompt
            self._check_length(len(token_ids), body.most_tokens)
            texts.append(text)
            self.log_prompts(texts)
            yield
            prompts.append((yield from self._prompt("prompt", [text], token_ids)))
        return texts, prompts

    def _chat_prompt(self, body: models.ChatCompletionRequest, texts: list[str]) -> Pieces[Prompt]:
        """A conversation, by the model's own template. texts: of its messages."""
        self.log_prompts(texts)
        prompt = self._apply_chat_template("messages", as_template_reads(body.messages))
        yield
        token_ids = self._encode(prompt, add_special_tokens=False)
        self._check_length(len(token_ids), body.most_tokens)
        return (yield from self._prompt("messages", texts, token_ids))

    def _tokens(self, body: models.TokenizeRequest) -> Pieces[Tokens]:
        """What the tokenizer makes of a text or a conversation."""
        adds_special_tokens = body.add_special_tokens
        if body.messages is not None:
            messages = as_template_reads(body.messages)
            text = self._apply_chat_template("messages", messages, body.add_generation_prompt)
            yield
        else:
            text = body.prompt or ""
            adds_special_tokens = adds_special_tokens is not False
        token_ids = self._encode(text, add_special_tokens=bool(adds_special_tokens))
        if not body.return_token_strs:
            return Tokens(token_ids, None)
        token_strs: list[str] = []
        for start in range(0, len(token_ids), PIECE_TOKENS):
            yield
            piece = token_ids[start : start + PIECE_TOKENS]
            token_strs += self.tokenizer.convert_ids_to_tokens(piece)
        return Tokens(token_ids, token_strs)

    def _decoded(self, token_ids: list[int]) -> Pieces[str]:
        yield
        # `decode` would keep Python's lock.
        backend = self.tokenizer.backend_tokenizer
        (text,) = backend.decode_batch([token_ids], skip_special_tokens=False)
        return str(text)

    def _apply_chat_template(
        self, field: str, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model reads it. Raises InvalidField, whatever the template does,
        which is a program that came with the model."""
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            reason = f"the model's chat template failed ({type(error).__name__})"
            if type(error) is TemplateError:  # of a template's own `raise_exception`
                reason = "the model's chat template does not take these roles in this order"
            raise InvalidField(field, reason) from None
        return prompt

    def _encode(self, text: str, **options: bool) -> list[int]:
        # `encode` would keep Python's lock, and hold everybody up: a megabyte takes half a second.
        (encoding,) = self.tokenizer.backend_tokenizer.encode_batch_fast([text], **options)
        token_ids: list[int] = encoding.ids
        return token_ids

    def _beginning(self) -> list[int]:
        """What a text begins after that follows on nothing: as in the pipeline, the token that
        begins a text, which GPT-2's end-of-text token does too."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return [token_id]
        raise InvalidField("prompt", "must hold at least one token")

    def _check_length(self, num_prompt_tokens: int, most_tokens: int | None) -> None:
        """Raises ContextExceeded for a prompt that leaves no room for a token, or none for itself
        where nothing is to be generated."""
        if num_prompt_tokens + (most_tokens != 0) > self.max_model_len:
            raise ContextExceeded(num_prompt_tokens, self.max_model_len)

    def _prompt(self, field: str, texts: list[str], token_ids: list[int]) -> Pieces[Prompt]:
        """A prompt as the engine takes it. Raises InvalidField for one that the model cannot read;
        ForbiddenPrompt after a look at it as it was written, and as the model reads it: past a
        special token in the middle of a word."""
        if not token_ids:
            raise InvalidField(field, "must hold at least one token")
        if max(token_ids) >= self.vocab_size:
            reason = f"holds a token that is not among the model's {self.vocab_size}"
            raise InvalidField(field, reason)
        read = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        for text in dict.fromkeys([*texts, read]):
            if (yield from find_in_pieces(self.content_filter, text)):
                raise ForbiddenPrompt(field)
            yield
        text_filter = self.engine.output.text_filter
        reading = (yield from read_in_pieces(text_filter, read)) if text_filter else None
        return Prompt(token_ids, reading)


def check_num_logprobs(
    body: models.OpenAIRequest, sampling: SamplingParams, num_positions: int
) -> None:
    """Raises InvalidField for more log probabilities of prompts than an answer may hold;
    num_positions: tokens of all prompts, for each choice."""
    if sampling.num_prompt_logprobs is None:
        return
    if num_positions * (sampling.num_prompt_logprobs + 1) > MAX_PROMPT_LOGPROBS:
        field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        reason = (
            f"at most {MAX_PROMPT_LOGPROBS} of all prompts together, for each choice: send fewer "
            "prompts, or ask for fewer of each token"
        )
        raise InvalidField(field, reason)


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
        backend: LocalBackend,
        requests: list[EngineRequest],
        deadline: Deadline,
        *,
        logprobs_form: LogprobsForm = None,
        num_top: int | None = None,
        echo: list[str] | None = None,
        tells_prompt: bool = False,
        strips_start: bool = False,
    ):
        self.model_name = backend.name
        self.backend = backend
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
        stream = self.backend.engine.stream(*self.requests, timeout_seconds=left_seconds)
        begun: set[int] = set()
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    yield await self._text_delta(delta, is_first=delta.index not in begun)
                    begun.add(delta.index)
                    if (
                        self.logprobs_form or self.tells_prompt
                    ):  # long to write, and many may be here already
                        await asyncio.sleep(0)
        except TimeoutError:
            raise DeadlineExceeded(self.deadline.timeout_seconds) from None

    def abort(self) -> None:
        self.backend.engine.abort(*self.requests)

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
                self._logprobs[delta.index] = ChoiceLogprobs(self.backend.spelling)
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
            logprobs = await self.backend.spelling.of_prompt(request) if has_logprobs else None
            self._prompts[at] = PromptTokens(request.prompt_token_ids, logprobs)
        return self._prompts[at]
