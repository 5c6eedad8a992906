"""A model that runs in this process: its tokenizer, and the engine that has its weights."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import models
from backends.base import (
    About,
    Backend,
    Client,
    Deadline,
    Generation,
    InvalidField,
    NoChatTemplate,
    Tokens,
    check_num_sequences,
    new_token_budget,
)
from backends.conversations import find_turn_ends, texts_of
from backends.generation_config import AuthorsDefaults
from backends.local_generation import LocalGeneration
from backends.logprobs import TokenSpelling
from backends.prompts import LogPrompts, Prompts
from backends.reader import Pieces, Reader, read_at_once
from backends.structure import StructureCompiler, read_structure
from engine import (
    Constraint,
    Engine,
    EngineRequest,
    Place,
    Prompt,
    SamplingParams,
    TextFilter,
    instruction_set,
)

MAX_PROMPT_LOGPROBS = 500_000  # in an answer, which is about 35 MB then, and 200 more to make it


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
        self.request_timeout_seconds = request_timeout_seconds
        self.reader = reader
        self.defaults = defaults or AuthorsDefaults()
        self.prompts = Prompts(
            self.tokenizer, engine, content_filter, log_prompts or (lambda prompts: None)
        )
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
        self.turn_ends = find_turn_ends(partial(self.prompts.apply_chat_template, "messages"))

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
        if params.top_k > self.vocab_size:
            raise InvalidField("top_k", f"Input should be less than or equal to {self.vocab_size}")
        self._check_num_sequences("num_return_sequences", num_sequences)
        with self.engine.place(client.identity, num_sequences) as place:
            # Prompts are short here.
            is_chat = is_chat and self.takes_chat and not self.is_base_model
            read = read_at_once(self.prompts.of_text(prompt, is_chat))
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
        return self._generation(requests, self._deadline(place))

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
        self.prompts.check_sizes(body.prompts, body.most_tokens)
        with self.engine.place(client.identity, num_sequences) as place:
            deadline = self._deadline(place)
            sampling = await self._constrained(sampling, body.structure, client, deadline)
            reading = self.prompts.of_completion(body)
            texts, prompts = await self.reader.read(client, deadline, body.prompts, reading)
            num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            check_num_logprobs(body, sampling, num_prompt_tokens * body.num_drawn)
            rooms = (self._num_new_tokens(prompt, body.most_tokens) for prompt in prompts)
            await client.reserve(num_prompt_tokens, body.num_drawn * sum(rooms))
            salt = (client.key_name, body.cache_salt or "")
            requests = self.engine.submit_all(
                prompts, sampling, place=place, streams=body.stream, cache_salt=salt
            )
        return self._generation(
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
        self.prompts.check_sizes(["".join(texts)], body.most_tokens)
        with self.engine.place(client.identity, body.n) as place:
            deadline = self._deadline(place)
            prompt = await self.reader.read(
                client, deadline, texts, self.prompts.of_chat(body, texts)
            )
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
        return self._generation(
            requests,
            deadline,
            logprobs_form="chat" if body.logprobs else None,
            tells_prompt=body.asks_of_prompt,
            strips_start=self.is_base_model and not body.structure,
        )

    def _generation(
        self, requests: list[EngineRequest], deadline: Deadline, **form: Any
    ) -> LocalGeneration:
        return LocalGeneration(self.name, self.engine, self.spelling, requests, deadline, **form)

    async def tokenize(self, body: models.TokenizeRequest, *, client: Client) -> Tokens:
        if body.messages is not None and not self.takes_chat:
            raise NoChatTemplate(self.name)
        texts = [body.prompt or ""] if body.messages is None else texts_of(body.messages)
        with self.engine.place(client.identity) as place:  # all that it takes of the engine
            pieces = self.prompts.tokens(body)
            return await self.reader.read(client, self._deadline(place), texts, pieces)

    async def detokenize(self, body: models.DetokenizeRequest, *, client: Client) -> str:
        num_tokens = max(self.vocab_size, len(self.tokenizer))
        if max(body.tokens, default=0) >= num_tokens:
            raise InvalidField("tokens", f"token ids go up to {num_tokens - 1}")
        with self.engine.place(client.identity) as place:
            pieces = self.prompts.decoded(body.tokens)
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
