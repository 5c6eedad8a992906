"""What the engine is asked for, what it gives, and how it fails.

A client holds an `EngineRequest`; the engine draws one or more `Sequence`s from its prompt and
hands out what they gain as `Delta`s.
"""

import asyncio
import enum
import itertools
import random
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from tokenizers.decoders import DecodeStream

from engine.constraint import Constraint, TextMatcher
from engine.token_rules import TokenRules

FinishReason = Literal["stop", "length", "content_filter"]
StopReason = int | str  # the id of a stop token, or a stop string
# Prompts find keys and values of those alone that have the same one.
CacheSalt = tuple[str, ...]

# EngineError
#  +- QueueFullError     the waiting queue is full: try again later. Recoverable.
#  +- InferenceError     the step, or a sequence of the request failed; the engine goes on.
#  |   |                 Recoverable.
#  |   +- ConstraintFailed  what a text may be cannot be followed on. Unrecoverable.
#  +- EngineStoppedError the engine was shut down. Unrecoverable.


CANNOT_BE_FOLLOWED = "is too complex, or goes on where the model has no token for it"


class EngineError(Exception):
    """Base of everything the engine raises on its own account."""


class QueueFullError(EngineError):
    """The waiting queue is full; nothing was queued. Recoverable."""


class InferenceError(EngineError):
    """The model failed in a step that held this request, or one of its sequences could not go on;
    `__cause__` says how. Recoverable."""


class ConstraintFailed(InferenceError):
    """A constraint came to the limits that keep it from holding others up, or to where no token of
    the model goes on; `field` of the request asked for it."""

    def __init__(self, field: str):
        super().__init__(f"{field}: {CANNOT_BE_FOLLOWED}")
        self.field = field


class EngineStoppedError(EngineError):
    """The engine was shut down. Unrecoverable."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Validated by the caller; the engine trusts the ranges."""

    max_new_tokens: int = 50  # >= 0; cut to what fits in the model's context
    temperature: float = 1.0  # >= 0; 0 = greedy
    top_k: int = 0  # >= 0; 0 keeps every token
    top_p: float = 1.0  # (0, 1]; 1 keeps every token
    min_p: float = 0.0  # [0, 1]; drops tokens less likely than min_p times the likeliest
    temperature_last: bool = False  # top_k, top_p and min_p go by probabilities at temperature 1
    repetition_penalty: float = 1.0  # > 0; of tokens in prompt or output (CTRL, Keskar et al. 2019)
    repetition_penalty_range: int = 0  # of so many last ones; 0: of all
    presence_penalty: float = 0.0  # subtracted once from the logit of a token in the output
    frequency_penalty: float = 0.0  # subtracted for each time it is in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added; -inf bans
    min_tokens: int = 0  # no end-of-text and no stop string before so many tokens
    ignore_eos: bool = False  # end-of-text is a token like any other, also before min_tokens
    stop: tuple[str, ...] = ()  # ends before the first of these; the text leaves it out
    # Token ids that end the text, each with what is told as the reason: itself, or the stop string
    # that it stands for.
    stop_token_ids: Mapping[int, StopReason] = field(default_factory=dict)
    includes_stop: bool = False  # the text ends after the stop string or token instead
    num_logprobs: int | None = None  # None: none; else of the token and so many likeliest ones
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    ranks_prompt: bool = False  # whether these have a rank: a third more work
    seed: int | None = None  # any integer, of which 64 bits count; None draws one
    rules: TokenRules | None = None  # of the model, for all its texts
    constraint: Constraint | None = None  # what the text may be; comes before min_tokens

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed for more than a rolled-back token."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or (self.min_tokens and (self.stop_token_ids or not self.ignore_eos))
            or self.rules
        )

    def fitted(self, num_prompt_tokens: int, max_model_len: int) -> "SamplingParams":
        """With no more new tokens than fit into the context after the prompt.

        Raises ValueError for a prompt that is empty, or leaves no room for a token.
        """
        most_tokens = max_model_len - (self.max_new_tokens > 0)
        if not 0 < num_prompt_tokens <= most_tokens:
            raise ValueError(f"a prompt has 1 to {most_tokens} tokens")
        room_tokens = max_model_len - num_prompt_tokens
        if self.max_new_tokens <= room_tokens:
            return self
        return replace(self, max_new_tokens=room_tokens)


LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not; as vLLM writes it


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural-log probabilities at one position, before temperature and penalties; none is below
    LOWEST_LOGPROB."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first
    text_offset: int = 0  # of a generated token: where in the sequence's text it begins
    rank: int | None = None  # one more than there are likelier tokens, if it was asked for


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence of a request has gained: whole tokens, valid UTF-8, filtered."""

    index: int  # of the sequence in its request, or among those submitted together
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    finish_reason: FinishReason | None  # set in the last delta of the sequence
    stop_reason: StopReason | None = None  # what ended it, if it was asked to end there


@dataclass(slots=True)
class StepStats:
    """What one step did, for whoever keeps count.

    Seconds count from the request's arrival; those of `inter_token_seconds` from the sequence's
    token before.
    """

    num_rows: int  # tokens that went through the model
    num_prompt_tokens: int  # how many of them were prompt tokens
    queue_seconds: list[float]  # how long each request waited that left the queue
    time_to_first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    finished: list[tuple[FinishReason, float]] = field(default_factory=list)
    num_rollbacks: int = 0
    num_untimed_tokens: int = 0  # generated, but in no list of seconds above
    num_drafts: int = 0  # sequences for which tokens were drafted
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # how many of them were the ones that were drawn
    num_queried_tokens: int = 0  # of prompts, looked for in the prefix cache
    num_cached_tokens: int = 0  # how many of them were found there


class TextFilter(Protocol):
    """What the engine asks of a content filter (`serving.content_filter` has one)."""

    def find(self, text: str) -> tuple[int, int] | None:
        """Span of a forbidden word in a whole text, else None."""

    def read(self, text: str) -> "TextReading":
        """A text that will be read on."""


class TextReading(Protocol):
    """A text that is looked through while it is written."""

    length: int  # of the text until now, in characters

    def append(self, text: str) -> None:
        """Reads on."""

    def scan(self, end: int | None, final: bool) -> tuple[tuple[int, int] | None, int]:
        """(span of a forbidden word in text[:end], else None; the length of the longest prefix in
        which none can begin, whatever text follows). final: none does."""

    def forget(self, length: int) -> None:
        """Lets go of text[:length], in which no word can begin any more."""

    def copy(self) -> "TextReading":
        """One that can be read on by itself."""


class Prompt(NamedTuple):
    """A prompt as the engine needs it; made by `Engine.read_prompt`."""

    token_ids: list[int]
    reading: TextReading | None  # a forbidden word may begin in it; None: nothing is filtered


@dataclass(slots=True)
class Place:
    """Room in the queue for one client's request, from its arrival on; see `Engine.place`."""

    client: str
    num_sequences: int
    arrived_seconds: float  # on time.monotonic
    is_taken: bool = False  # by requests, which the queue counts from then on


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class EngineRequest:
    """A prompt and the sequences that are drawn from it; made by `Engine.submit`."""

    ids = itertools.count()

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        streams: bool,
        loop: asyncio.AbstractEventLoop,
        *,
        client: str = "",
        cache_salt: CacheSalt = (),
        arrived_seconds: float = 0.0,
        num_sequences: int = 1,
        first_index: int = 0,
        deltas: asyncio.Queue[Delta | Exception] | None = None,
    ):
        self.id = next(self.ids)
        self.prompt_token_ids, self.reading = prompt
        self.params = params
        self.client = client  # whoever shares rows and queue with others
        self.cache_salt = cache_salt
        self.streams = streams  # False: each sequence has one delta, its last
        self.is_aborted = False
        self.arrived_seconds = arrived_seconds
        self.queue_seconds: float | None = None  # how long it waited; None while it does
        self.num_cached_tokens = 0  # of the prompt, when its first sequences left the queue
        self.num_generated_tokens = 0  # by all its sequences, without what was rolled back
        self.finish_reasons: set[FinishReason] = set()  # those of its sequences that have finished
        # Those of each prompt token but the first. If asked for, they are here before any delta.
        self.prompt_logprobs: list[PositionLogprobs] | None = None
        self.failure: InferenceError | None = None  # why its prompt cannot be scored
        self.loop = loop
        self.num_sequences = num_sequences
        self.first_index = first_index  # of its sequences among those submitted together
        self.deltas = asyncio.Queue() if deltas is None else deltas

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def new_sequences(self) -> "list[Sequence]":
        """The sequences to draw from the prompt, each with a random stream of its own."""
        seed = random.getrandbits(63) if self.params.seed is None else self.params.seed
        return [Sequence(self, index, seed) for index in range(self.num_sequences)]


class Sequence:
    """One continuation of a request's prompt: its tokens, its text, its random stream."""

    def __init__(self, request: EngineRequest, index: int, seed: int):
        self.request = request
        self.index = index
        self.params = request.params
        self.status = Status.WAITING
        self.num_cached_tokens = 0  # of the prompt, which need not be computed when it begins
        key = np.array([seed % 2**64, index], dtype=np.uint64)
        self.rng = np.random.Generator(np.random.Philox(key=key))
        self.output_token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.text = ""  # what the output tokens decode to, stop string left out
        self.stop_reason: StopReason | None = None
        self.text_ends: list[int] = []  # len(text) after each output token
        self.num_released_tokens = 0  # of the output, already handed to the client
        self.reading = request.reading and request.reading.copy()  # of prompt and text
        self.banned: dict[int, list[int]] = {}  # output position -> token ids rolled back there
        self.num_rollbacks = 0
        self.last_token_seconds: float | None = None  # when the last token came
        self.decode_stream: DecodeStream | None = None
        self.guess: list[int] = []  # what `engine.drafts` said would follow …
        self.num_tokens_before_guess = 0  # … the tokens that there were then
        self.hit_rate = 0.3  # of its guesses; none have been made, and most texts say new things
        self.matcher: TextMatcher | None = None  # of the constraint, once it has been asked

    @property
    def num_tokens(self) -> int:
        """Of prompt and output together."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_token_id(self) -> int:
        return (self.output_token_ids or self.request.prompt_token_ids)[-1]

    def token_start(self, index: int) -> int:
        """Where in the text the token that holds text[index] begins; 0 for index < 0."""
        token = bisect_right(self.text_ends, index)
        return self.text_ends[token - 1] if token else 0

    def num_tokens_within(self, length: int) -> int:
        """How many output tokens, at least those released, end within text[:length]."""
        num_tokens = self.num_released_tokens
        while num_tokens < len(self.output_token_ids) and self.text_ends[num_tokens] <= length:
            num_tokens += 1
        return num_tokens
