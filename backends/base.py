"""What a route knows of a served model, whether it runs here or on another server.

A `Backend` is asked for text and gives a `Generation`, whose deltas are the text as it is made.
It raises errors of the domain, never HTTP ones:

EngineError (engine)
 +- QueueFullError, InferenceError, EngineStoppedError (engine)
 |   +- MediaQueueFull, JobFailed, JobRefused  the same of what media/ makes. Recoverable.
 +- BackendError
     +- ForbiddenPrompt    the content filter found a forbidden word. Recoverable.
     +- InvalidField       a field cannot be had, for this model or this prompt. Recoverable.
     +- ContextExceeded    the prompt leaves no room for the text. Recoverable.
     +- NoChatTemplate     the model takes no conversation. Unrecoverable.
     +- Refused            the other server does not take the request as it is. Recoverable.
     +- Unreachable        no connection could be made; nothing was sent. Recoverable.
     +- Busy               the other server takes no more requests for now. Recoverable.
     +- DeadlineExceeded   the request took too long. Recoverable.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import models
from engine import (
    Engine,
    EngineError,
    FinishReason,
    InferenceError,
    QueueFullError,
    StopReason,
    TextFilter,
)


class BackendError(EngineError):
    """Base of what a backend raises besides its engine's errors."""


class ForbiddenPrompt(BackendError):
    """A prompt holds a forbidden word; nothing was generated."""

    def __init__(self, field: str):
        super().__init__(field)
        self.field = field  # that holds it: `prompt` or `messages`


class InvalidField(BackendError):
    """A field has a value that cannot be had; `reason` says why, without repeating the value."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class ContextExceeded(BackendError):
    """The prompt leaves no room in the model's context."""

    def __init__(self, num_prompt_tokens: int, context_tokens: int):
        super().__init__()
        self.num_prompt_tokens = num_prompt_tokens
        self.context_tokens = context_tokens


class NoChatTemplate(BackendError):
    """The model has no chat template."""

    def __init__(self, model_name: str):
        super().__init__()
        self.model_name = model_name


class Refused(BackendError):
    """The other server does not take this request as it is."""

    def __init__(self, code: str | None):
        super().__init__()
        self.code = code  # OpenAI's `context_length_exceeded` or `content_filter`, else None


class Unreachable(BackendError):
    """No connection could be made; nothing was sent."""


class Busy(BackendError):
    """The other server takes no more requests for now."""

    def __init__(self, retry_after_seconds: int):
        super().__init__()
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(BackendError):
    """The request took longer than it may."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds


class MediaQueueFull(QueueFullError):
    """So many sounds, pictures, videos or shapes wait for their model that no more may."""

    def __init__(self, retry_after_seconds: int):
        super().__init__()
        self.retry_after_seconds = retry_after_seconds


class JobFailed(InferenceError):
    """A model of media/ did not make what it was to make; `reason` is for the client."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class JobRefused(JobFailed):
    """A model of media/ does not take the fields as they are."""


async def reserve_nothing(num_prompt_tokens: int, num_new_tokens: int) -> None:
    """Takes any number."""


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a request is from.

    identity: whom shares and limits are counted for: a key's name or an address.
    reserve: awaited once, before the request is queued, with the tokens of its prompts (an
    estimate, where another server counts them), and those that may be generated at most; raises
    what refuses them.
    key_name: whose prompts alone share keys and values with those of this one; "" where no key is
    needed, and all do.
    """

    identity: str
    reserve: Callable[[int, int], Awaitable[None]] = reserve_nothing
    key_name: str = ""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a request has taken too long."""

    arrived_seconds: float  # on time.monotonic
    timeout_seconds: float

    @property
    def left_seconds(self) -> float:
        return self.arrived_seconds + self.timeout_seconds - time.monotonic()

    @asynccontextmanager
    async def limit(self) -> AsyncGenerator[None]:
        """Ends the block with DeadlineExceeded once the time is over."""
        try:
            async with asyncio.timeout(self.left_seconds):
                yield
        except TimeoutError:
            raise DeadlineExceeded(self.timeout_seconds) from None


class PromptTokens(NamedTuple):
    """What a client may be told of a prompt's tokens."""

    token_ids: list[int]
    logprobs: list[dict[str, Any] | None] | None  # each a models.PromptLogprob by its token's id


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one choice has gained: whole characters, filtered."""

    index: int  # of the choice
    text: str  # the first one of a choice begins with the prompt, where an echo was asked for
    logprobs: dict[str, Any] | None  # models.CompletionLogprobs or ChatLogprobs, if asked for
    token_logprobs: list[float]  # of its tokens, if asked for
    finish_reason: FinishReason | None  # set in the last delta of the choice
    stop_reason: StopReason | None = None  # the stop string or token that ended it
    token_ids: list[int] = field(default_factory=list)  # of a model that runs here
    prompt: PromptTokens | None = None  # in the first delta of a choice, if asked for


class Generation(ABC):
    """The texts that a backend makes for one request: its choices, numbered from 0."""

    model_name: str
    deadline: Deadline  # at which `deltas` raises DeadlineExceeded

    @property
    @abstractmethod
    def num_prompt_tokens(self) -> int:
        """Of all prompts; 0 while it is not known."""

    @property
    @abstractmethod
    def num_cached_tokens(self) -> int | None:
        """Of all prompts, how many need not be computed; None while, or where it is not known."""

    @property
    @abstractmethod
    def num_generated_tokens(self) -> int:
        """By all choices until now, whether or not the client has got them."""

    @property
    @abstractmethod
    def num_completion_tokens(self) -> int:
        """Of the deltas until now: what a client is told."""

    @property
    @abstractmethod
    def queue_seconds(self) -> float | None:
        """The longest wait in the queue; None while all wait, or where there is no queue."""

    @property
    @abstractmethod
    def finish_reasons(self) -> set[FinishReason]:
        """Of the choices that have finished."""

    @abstractmethod
    def deltas(self) -> AsyncGenerator[TextDelta]:
        """What each choice gains, as it is made; of one that does not stream, all at its end.

        Raises what ended the request: InferenceError, EngineStoppedError or DeadlineExceeded.
        However the loop over it ends, what has not finished is aborted.
        """

    @abstractmethod
    def abort(self) -> None:
        """Frees the places of what has not finished."""

    async def complete(self) -> list[TextDelta]:
        """Every choice of a request that does not stream as one delta, in order.

        Raises as `deltas` does."""
        async with aclosing(self.deltas()) as deltas:
            whole = {delta.index: delta async for delta in deltas}
        return [whole[index] for index in sorted(whole)]


class Tokens(NamedTuple):
    """What a tokenizer makes of a text."""

    token_ids: list[int]
    token_strs: list[str] | None  # as the vocabulary spells them, if asked for


class About(NamedTuple):
    """How a model is computed; the labels of its `model_info`."""

    dtype: str
    device: str
    kernel: str
    instruction_set: str


class Backend(ABC):
    """One served model.

    `submit_…` admit a request: they return once it is queued here, or once another server has
    begun to answer it. All of them raise ForbiddenPrompt, InvalidField, QueueFullError,
    EngineStoppedError; one of another server Refused, Unreachable, Busy, InferenceError and
    DeadlineExceeded too.
    """

    name: str
    owned_by: str  # as OpenAI's list of models has it
    # The pipeline and the engine of a model that runs here, else None.
    generator: Any = None
    engine: Engine | None = None
    about: About
    request_timeout_seconds: float

    @property
    @abstractmethod
    def max_model_len(self) -> int | None:
        """Tokens of prompt and text together; None where it is not known."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Tokens that there are; None where it is not known."""

    @property
    @abstractmethod
    def takes_chat(self) -> bool:
        """Whether it takes conversations; True where only another server knows."""

    @property
    @abstractmethod
    def max_num_seqs(self) -> int | None:
        """Sequences that can run at once; None where it is not known."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Sequences being generated."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Sequences in the queue."""

    @property
    @abstractmethod
    def is_healthy(self) -> bool:
        """False while the model keeps failing, or its server cannot be reached."""

    @property
    @abstractmethod
    def is_loaded(self) -> bool:
        """Whether the model is in this process's memory."""

    @property
    @abstractmethod
    def is_reachable(self) -> bool:
        """False while another server that the model is on cannot be reached."""

    @property
    @abstractmethod
    def problem(self) -> str | None:
        """What keeps the service from taking requests for this model, else None."""

    @abstractmethod
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
        """Continuations of one prompt; is_chat: as an answer to it, if the model has a template."""

    @abstractmethod
    async def submit_completion(
        self, body: models.CompletionRequest, *, client: Client
    ) -> Generation:
        """The choices of `/v1/completions`. Raises ContextExceeded too."""

    @abstractmethod
    async def submit_chat(
        self, body: models.ChatCompletionRequest, *, client: Client
    ) -> Generation:
        """The choices of `/v1/chat/completions`. Raises ContextExceeded, NoChatTemplate too."""

    @abstractmethod
    async def tokenize(self, body: models.TokenizeRequest, *, client: Client) -> Tokens:
        """The tokens of a text or a conversation. Raises NoChatTemplate too, DeadlineExceeded, and
        InvalidField for a model on another server, as do the two below."""

    @abstractmethod
    async def detokenize(self, body: models.DetokenizeRequest, *, client: Client) -> str:
        """The text of token ids, special ones too."""

    @property
    @abstractmethod
    def tokenizer_config(self) -> dict[str, Any]:
        """models.TokenizerConfig."""

    @abstractmethod
    def start(self) -> None:
        """Takes requests, again after `stop`. To be called on the event loop."""

    @abstractmethod
    def stop(self) -> None:
        """Refuses requests from here on; ends what it held with EngineStoppedError.

        Blocks, so it is not to be called on the event loop."""


def new_token_budget(
    params: models.LengthFields, num_prompt_tokens: int, context_tokens: int
) -> int:
    """How many tokens to generate. Raises InvalidField when there is no room."""
    if num_prompt_tokens >= context_tokens:
        reason = f"The prompt has {num_prompt_tokens} tokens; the model takes {context_tokens - 1}"
        raise InvalidField("prompt", reason)
    if params.max_new_tokens is not None:
        budget = params.max_new_tokens
    elif "max_length" in params.model_fields_set:
        budget = params.max_length - num_prompt_tokens
        if budget < 1:
            reason = (
                f"max_length is {params.max_length} tokens, which the prompt's "
                f"{num_prompt_tokens} tokens already fill"
            )
            raise InvalidField("max_length", reason)
    else:
        # Nobody asked for a length: the default is counted after the prompt.
        budget = params.max_length
    return min(budget, context_tokens - num_prompt_tokens)


def check_num_sequences(field: str, num_sequences: int, max_num_sequences: int) -> None:
    """Raises InvalidField for more than ever find room."""
    if num_sequences > max_num_sequences:
        reason = f"at most {max_num_sequences} texts in one request, of all prompts together"
        raise InvalidField(field, reason)


def holds_forbidden_word(content_filter: TextFilter, *texts: str) -> bool:
    """Whether one of the texts holds a forbidden word."""
    return any(content_filter.find(text) for text in texts)
