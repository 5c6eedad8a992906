"""The engine: takes requests from event loops, makes their tokens in the computing thread."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.attention import refuse_other_attention
from engine.delivery import Outbox, fail
from engine.drafts import Drafter
from engine.kernels import choose_kernel
from engine.masks import begin_masks
from engine.model_check import checked_runner
from engine.model_runner import ModelRunner
from engine.output import OutputProcessor
from engine.prefix_cache import PrefixCache
from engine.quality import QualityTrial
from engine.request import (
    CacheSalt,
    ConstraintFailed,
    Delta,
    EngineRequest,
    EngineStoppedError,
    FinishReason,
    InferenceError,
    Place,
    Prompt,
    SamplingParams,
    Sequence,
    Status,
    StepStats,
    TextFilter,
)
from engine.sampler import sample_tokens
from engine.scheduler import Scheduler
from engine.threads import computing_thread, use_threads, useful_threads
from engine.weights import cast_parameters, return_freed_memory

logger = logging.getLogger("engine")

MAX_FAILED_STEPS = 3  # in a row, before the engine counts as unhealthy
Result = TypeVar("Result")
PROBE_SECONDS = 1.0  # between attempts of an unhealthy engine to run one token


class Engine:
    """Serves one causal language model to many clients; see the package's docstring.

    model: any transformers causal LM whose attention can be replaced; it is changed in
        place (weights packed, attention set) and belongs to the engine from here on.
    max_model_len: prompt and output together; cut to the model's context.
    speculative_tokens: what a sequence may be drafted in one step (`engine.drafts`); 0 for none.
        None where a row's bits depend on its company either, since texts would change.
    text_filter: what generated text must not contain; None lets everything pass.
    on_step: called in the computing thread after each step; must not raise.
    on_model_needed: called with a request, wherever that is submitted, when the model is not
        loaded or about to leave; to see to it that `load` is called.

    quantization: None, "int8", or "auto": int8 where `engine.quality` finds that it keeps quality.
    dtype: what the model computes in where it is not quantized; None is what it was loaded in.
    num_threads: that compute; None is as many as are useful to this model.
    prefix_cache_bytes: memory for the beginnings of prompts, so that others that begin in the same
        way take their keys and values; used where that changes no bit of a text.
    Raises ValueError for a model of which it would make another text than the model does by
    itself (`engine.model_check`), for one whose attention cannot be replaced, and as
    `choose_kernel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int = 64,
        max_queue_size: int = 256,
        max_model_len: int | None = None,
        speculative_tokens: int = 15,
        quantization: str | None = None,
        dtype: torch.dtype | None = None,
        prefix_cache_bytes: int = 0,
        num_threads: int | None = None,
        text_filter: TextFilter | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        on_model_needed: Callable[[], None] | None = None,
    ):
        refuse_other_attention(model)
        config = model.config.get_text_config()
        self.max_model_len = _max_model_len(config, max_model_len)
        self.vocab_size: int = config.vocab_size
        self.tokenizer = tokenizer
        self.dtype = dtype or model.dtype
        self.kernel = choose_kernel(self.dtype, model.device.type, quantization)
        self.prefix_cache_bytes = prefix_cache_bytes
        self.on_step = on_step
        self.on_model_needed = on_model_needed
        self.eos_token_ids = _eos_token_ids(model, tokenizer, self.vocab_size)
        self.scheduler = Scheduler(max_num_seqs, max_queue_size)
        self.drafter = Drafter(speculative_tokens)
        self.output = OutputProcessor(tokenizer, text_filter, self.eos_token_ids)
        self.num_failed_steps = 0  # in a row
        self.last_request_id = -1
        self._runner: ModelRunner | None = None  # None while the model is not loaded
        self._row_range: tuple[int, int] | None = None  # of a pass, once it has been measured
        self._lock = threading.Lock()
        self.num_threads = num_threads or useful_threads(model)
        self._computing_thread = computing_thread()
        self._turn_pending = False  # `_take_turn` is under way or to come
        self._is_stopping = False
        self._is_on_trial = quantization == "auto" and self.kernel.is_exact
        self._unload_before_id = math.inf  # unload before a request with an id from here on runs
        self._unloaded = threading.Event()
        self.load(model)

    # Loading and unloading: any thread, one call at a time.

    @property
    def is_loaded(self) -> bool:
        return self._runner is not None

    @property
    def runner(self) -> ModelRunner:
        """Raises ValueError while the model is not loaded."""
        if self._runner is None:
            raise ValueError("the model is not loaded")
        return self._runner

    @property
    def model(self) -> PreTrainedModel:
        """Raises ValueError while it is not loaded."""
        return self.runner.model

    def load(self, model: PreTrainedModel) -> None:
        """Takes the model, the same one as ever; what waits runs from here on.

        The first time, it is checked: raises ValueError for a model that would give wrong text.
        """
        cast_parameters(model, torch.float32 if self.kernel.is_exact else self.dtype)
        new_runner = partial(
            ModelRunner,
            model,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        if self._row_range is None:
            runner = self._compute(self._first_runner, model, new_runner)
            self.kernel = runner.kernel
            self._row_range = self._compute(runner.measure_batch_invariance)
            if self.drafter.max_tokens and not runner.is_invariant:
                logger.info("no tokens are drafted: that could change the text of a seed here")
                self.drafter.max_tokens = 0
        else:
            runner = new_runner(kernel=self.kernel)
        runner.min_rows, runner.max_rows = self._row_range
        runner.prefixes = self._new_prefix_cache(runner)
        with self._lock:
            self._unload_before_id = math.inf
            self._runner = runner
            self._wake()

    def _first_runner(
        self, model: PreTrainedModel, new_runner: Callable[..., ModelRunner]
    ) -> ModelRunner:
        """A runner that has been checked; of a float kernel if int8 was on trial and costs too
        much."""
        new_served_runner = partial(new_runner, kernel=self.kernel)
        if self._is_on_trial:
            trial = QualityTrial(model, self.tokenizer, self.max_model_len)
            otherwise = choose_kernel(self.dtype, model.device.type, None)
            new_served_runner = partial(
                trial.choose_runner, new_runner, self.kernel, otherwise, self.dtype
            )
        arguments = (model, self.kernel, self.max_model_len, new_runner, new_served_runner)
        return checked_runner(*arguments)

    def _new_prefix_cache(self, runner: ModelRunner) -> PrefixCache | None:
        """None where it is switched off, or cannot be used: a line in the log says why."""
        if not self.prefix_cache_bytes:
            return None
        if not runner.is_exact:
            reason = "a token's bits depend on how many others are computed with it"
        else:
            try:
                return PrefixCache(runner.cache, self.prefix_cache_bytes)
            except ValueError as error:
                reason = str(error)
        name = type(runner.model).__name__
        logger.info("%s, %s: prefixes are not cached: %s", name, runner.kernel.name, reason)
        return None

    def _compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function gives in the computing thread."""

        def compute() -> Result:
            use_threads(self.num_threads)
            return function(*arguments)

        return self._computing_thread.submit(compute).result()

    def unload(self) -> None:
        """Gives the model's memory back as soon as all requests of before have finished.

        Blocks until then; requests that come meanwhile wait for the next `load`.
        """
        with self._lock:
            self._unload_before_id = next(EngineRequest.ids)
            self._unloaded.clear()
            self._wake()
        self._unloaded.wait()
        return_freed_memory()

    def fail_waiting(self) -> None:
        """Ends what waits with InferenceError: the model cannot be loaded."""
        with self._lock:
            waiting = self.scheduler.take_waiting()
        fail(waiting, InferenceError("the model cannot be loaded"))

    # The clients' side: any thread, any event loop.

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, those of prompts among them that are still being read."""
        return self.scheduler.num_waiting

    @property
    def is_full(self) -> bool:
        """Whether a client that has nothing in the queue would be refused now."""
        with self._lock:
            return not self.scheduler.has_room(1)

    @property
    def is_healthy(self) -> bool:
        """False once steps have failed MAX_FAILED_STEPS times in a row, until one succeeds."""
        return self.num_failed_steps < MAX_FAILED_STEPS and not self._is_stopping

    @contextlib.contextmanager
    def place(self, client: str, num_sequences: int = 1) -> Generator[Place]:
        """Room in the queue, for which `submit_all` has to come before the end of the block.

        So a request is admitted before its prompts are read, which may take long. client: with
        whom others share the engine fairly.
        Raises QueueFullError at once when the queue is full for it, EngineStoppedError after
        `stop`.
        """
        with self._lock:
            self._refuse_when_stopping()
            self.scheduler.reserve(client, num_sequences)
        place = Place(client, num_sequences, time.monotonic())
        try:
            yield place
        finally:
            if not place.is_taken:
                with self._lock:
                    self.scheduler.give_back(client, num_sequences)

    def read_prompt(self, prompt_token_ids: list[int]) -> Prompt:
        """What `submit_all` takes, in any thread: a long prompt takes long."""
        return self.output.read_prompt(prompt_token_ids)

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        num_sequences: int = 1,
        streams: bool = False,
        client: str = "",
    ) -> EngineRequest:
        """A queued request, whose deltas the running event loop will receive; see `stream`.

        Raises as `place` and `submit_all` do.
        """
        with self.place(client, num_sequences) as place:
            prompt = self.read_prompt(prompt_token_ids)
            (request,) = self.submit_all([prompt], params, place=place, streams=streams)
        return request

    def submit_all(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        *,
        place: Place,
        streams: bool = False,
        cache_salt: CacheSalt = (),
    ) -> list[EngineRequest]:
        """A request for each prompt, all queued, to be given to one `stream`.

        The place's sequences are shared out among the prompts: with two each, those of prompt i
        have the indexes 2 i and 2 i + 1. Each prompt is sampled as if it had been submitted alone.
        Raises EngineStoppedError after `stop`, ValueError for a prompt without room for a token.
        """
        num_sequences = place.num_sequences // len(prompts)
        deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        requests, seqs = [], []
        for i, prompt in enumerate(prompts):
            request = EngineRequest(
                prompt,
                params.fitted(len(prompt.token_ids), self.max_model_len),
                streams,
                asyncio.get_running_loop(),
                client=place.client,
                cache_salt=cache_salt,
                arrived_seconds=place.arrived_seconds,
                num_sequences=num_sequences,
                first_index=i * num_sequences,
                deltas=deltas,
            )
            requests.append(request)
            seqs += request.new_sequences()
        with self._lock:
            self._refuse_when_stopping()
            self.scheduler.add(seqs)
            place.is_taken = True
            self.last_request_id = requests[-1].id
            self._wake()
            is_needed = not self.is_loaded or self._unload_before_id < math.inf
        if is_needed and self.on_model_needed:
            self.on_model_needed()
        return requests

    async def stream(
        self, *requests: EngineRequest, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Delta]:
        """The deltas of all sequences of requests submitted together, as they are made.

        Raises what ended a request: InferenceError, EngineStoppedError, or TimeoutError.
        However the loop over it ends, requests that are not finished are aborted.
        """
        deltas = requests[0].deltas
        # One timer for all of them: a timeout around each `get` costs as much as the `get`.
        deadline = None
        if timeout_seconds is not None:
            loop = asyncio.get_running_loop()
            deadline = loop.call_later(timeout_seconds, deltas.put_nowait, TimeoutError())
        try:
            num_unfinished = sum(request.num_sequences for request in requests)
            while num_unfinished:
                delta = await deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                if delta.finish_reason:
                    num_unfinished -= 1
                yield delta
        finally:
            if deadline:
                deadline.cancel()
            self.abort(*requests)

    def abort(self, *requests: EngineRequest) -> None:
        """Frees the requests' places before the next step; a no-op when they are finished."""
        with self._lock:
            for request in requests:
                request.is_aborted = True
            self._wake()

    def start(self) -> None:
        """Takes requests again after `stop`."""
        self._is_stopping = False

    def stop(self) -> None:
        """Refuses requests from here on; what it held ends with EngineStoppedError."""
        with self._lock:
            self._is_stopping = True
        self._computing_thread.submit(self._end).result()

    def _refuse_when_stopping(self) -> None:
        if self._is_stopping:
            raise EngineStoppedError("the engine was stopped")

    def _wake(self) -> None:
        """Gives the engine a turn, unless it has one. Under the lock."""
        if not self._turn_pending:
            self._turn_pending = True
            self._computing_thread.submit(self._take_turn)

    # The engine's side: the computing thread alone.

    @torch.inference_mode()
    def _take_turn(self) -> None:
        """One step, if there is anything to do; then the other engines have their turns."""
        use_threads(self.num_threads)
        try:
            self._remove_aborted()
            with self._lock:
                can_step = self._can_step()
            if can_step:
                self.step()
                self.num_failed_steps = 0
            elif self.is_loaded and self.num_failed_steps >= MAX_FAILED_STEPS:
                self._probe()
        except Exception as error:
            self._fail_step(error)
        with self._lock, contextlib.suppress(RuntimeError):  # raised while the process ends
            self._turn_pending = False
            if self._can_step():
                self._wake()
            elif self.is_loaded and self._unload_before_id < math.inf:
                self._leave()
            elif not self.is_healthy and not self._is_stopping:
                self._turn_pending = True
                pause = threading.Timer(
                    PROBE_SECONDS, self._computing_thread.submit, [self._take_turn]
                )
                pause.daemon = True
                pause.start()

    def _can_step(self) -> bool:
        """Under the lock."""
        if not self.is_healthy or not self.is_loaded:
            return False
        scheduler = self.scheduler
        return bool(scheduler.running) or scheduler.has_waiting(self._unload_before_id)

    def step(self) -> None:
        """Everyone running gains a token, or several where its draft is right, or gives some back
        to the filter."""
        started_seconds = time.monotonic()
        with self._lock:
            admitted = self.scheduler.schedule(
                self._unload_before_id, self.runner.num_cached_tokens
            )
        running = list(self.scheduler.running)
        # None beside prompts: those who are new would wait longer for their first token.
        until_renewal = self.runner.num_tokens_until_renewal
        drafts = [] if admitted else self.drafter.draft(running, until_renewal)
        stats = _begin_stats(admitted, len(running) - len(admitted), drafts)
        if self.runner.prefixes:
            stats.num_queried_tokens = stats.num_prompt_tokens + stats.num_cached_tokens
        masks = begin_masks(running)
        logits = self.runner.forward(running, len(admitted), drafts)
        logits, *drafted = logits.split([len(running), *map(len, drafts)])
        token_ids = sample_tokens(logits, running, self.eos_token_ids, masks.result())
        self.scheduler.count_step(time.monotonic() - started_seconds)
        self._advance(running, token_ids, drafts, drafted, stats)
        if self.on_step:
            self.on_step(stats)
        if all(isinstance(token_id, InferenceError) for token_id in token_ids):
            self.runner.probe()  # raises if it is the model, and not what clients ask for

    def _advance(
        self,
        running: list[Sequence],
        token_ids: list[int | FinishReason | InferenceError],
        drafts: list[list[int]],
        drafted: list[Tensor],
        stats: StepStats,
    ) -> None:
        """Gives each sequence its token, one more to those whose drafted one it is, and so on;
        hands out deltas, frees what has finished.

        drafted: of each draft, the logits (tokens, vocab) of what comes behind its tokens.
        """
        num_before = [len(seq.output_token_ids) for seq in running]
        num_rollbacks, outbox = self.output.num_rollbacks, Outbox()
        try:
            self._postprocess(running, token_ids, stats, outbox)
            rows: SequenceOf[int] = range(len(running))
            for depth in range(max(map(len, drafts), default=0)):
                rows = [
                    row
                    for row in rows
                    if len(drafts[row]) > depth
                    and _has_gained(running[row], num_before[row], drafts[row][: depth + 1])
                ]
                if not rows:
                    break
                stats.num_accepted_tokens += len(rows)
                seqs = [running[row] for row in rows]
                logits = torch.cat([drafted[row][depth : depth + 1] for row in rows])
                masks = begin_masks(seqs).result()
                token_ids = sample_tokens(logits, seqs, self.eos_token_ids, masks)
                self._postprocess(seqs, token_ids, stats, outbox)
            stats.num_rollbacks = self.output.num_rollbacks - num_rollbacks
            # Not before: a sequence that moves takes along keys and values of the tokens it has.
            for seq in running:
                if seq.status is Status.FINISHED:
                    self._free(seq)
        finally:  # so that an error at one sequence takes nothing from those before it
            outbox.send()

    def _postprocess(
        self,
        seqs: list[Sequence],
        token_ids: list[int | FinishReason | InferenceError],
        stats: StepStats,
        outbox: Outbox,
    ) -> None:
        """Adds each sequence's token, or ends it with a reason or an error of its own."""
        now_seconds = time.monotonic()
        for seq, token_id in zip(seqs, token_ids, strict=True):
            try:
                delta = self._append(seq, token_id)
            except InferenceError as failure:
                _fail_sequence(seq, failure)
                self.runner.cache.clear_row(self.scheduler.running.index(seq))
                continue
            since_arrival_seconds = now_seconds - seq.request.arrived_seconds
            if seq.last_token_seconds is None:
                stats.time_to_first_token_seconds.append(since_arrival_seconds)
            else:
                stats.inter_token_seconds.append(now_seconds - seq.last_token_seconds)
            seq.last_token_seconds = now_seconds
            if delta:
                outbox.add(seq.request, delta)
                if delta.finish_reason:
                    seq.request.finish_reasons.add(delta.finish_reason)
                    stats.finished.append((delta.finish_reason, since_arrival_seconds))
                    seq.status = Status.FINISHED

    def _append(self, seq: Sequence, token_id: int | FinishReason | InferenceError) -> Delta | None:
        """What the client gains by this token, or by the end of the text. Raises InferenceError
        where there is neither, or the text cannot go on."""
        if seq.request.failure:
            raise seq.request.failure
        if isinstance(token_id, InferenceError):
            raise token_id
        try:
            if isinstance(token_id, str):
                return self.output.finish(seq, token_id)
            return self.output.append(seq, token_id)
        except InferenceError:
            raise
        except Exception as error:
            raise InferenceError("the text of a sequence could not be written") from error

    def _free(self, seq: Sequence) -> None:
        if move := self.scheduler.finish(seq):
            source, target = move
            num_tokens = self.scheduler.running[target].num_tokens
            self.runner.cache.copy_row(source, target, num_tokens)

    def _remove_aborted(self) -> None:
        with self._lock:
            self.scheduler.drop_aborted()
        for seq in [seq for seq in self.scheduler.running if seq.request.is_aborted]:
            self._free(seq)

    def _fail_step(self, error: Exception) -> None:
        """Ends every sequence that the step held."""
        self.num_failed_steps += 1
        if self.num_failed_steps <= MAX_FAILED_STEPS:
            logger.exception("a step failed; its %d sequences end", self.num_running)
        failure = InferenceError("a step of the model failed")
        failure.__cause__ = error
        fail(self.scheduler.running, failure)
        self.scheduler.running = []

    def _probe(self) -> None:
        """Runs one token, to see whether an unhealthy engine has recovered."""
        with self._lock:
            waiting = self.scheduler.take_waiting()
        fail(waiting, InferenceError("the model keeps failing"))
        self.runner.probe()
        self.num_failed_steps = 0
        logger.info("the model answers again")

    def _leave(self) -> None:
        """Lets the model go. Under the lock."""
        # Requests older than the unload would wait for ever: fail them.
        older = self.scheduler.take_waiting(self._unload_before_id)
        fail(older, InferenceError("the model keeps failing"))
        self._runner, self.num_failed_steps = None, 0
        self._unloaded.set()

    def _end(self) -> None:
        fail([*self.scheduler.running, *self.scheduler.take_waiting()], EngineStoppedError())
        self.scheduler.running = []


def _max_model_len(config: PretrainedConfig, wanted: int | None) -> int:
    """Tokens that a sequence may have: as many as are wanted, if the model can read them.

    Raises ValueError where neither says how many.
    """
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    lengths = [*(getattr(config, name, None) for name in names), wanted]
    known = [length for length in lengths if length]
    if not known:
        raise ValueError("the model's configuration names no context: max_model_len has to")
    return min(known)


def _eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> set[int]:
    """The token ids that end a text, by the model's configuration and by its tokenizer's; without
    those that the model never says, as it has no such token."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    named = {id_ for id_ in (*ids, tokenizer.eos_token_id) if id_ is not None}
    return {id_ for id_ in named if 0 <= id_ < vocab_size}


def _fail_sequence(seq: Sequence, failure: InferenceError) -> None:
    """Ends the request of one sequence, unless it has ended; the next turn frees its places."""
    if seq.request.is_aborted:
        return
    if isinstance(failure, ConstraintFailed):  # it is the client's
        logger.warning("a sequence ends: %s", failure)
    else:
        logger.error("a sequence failed; its request ends: %s", failure, exc_info=failure)
    fail([seq], failure)


def _has_gained(seq: Sequence, num_before: int, token_ids: list[int]) -> bool:
    """Whether a sequence goes on, and these are its tokens behind the first `num_before`."""
    goes_on = seq.status is Status.RUNNING and not seq.request.is_aborted
    return goes_on and seq.output_token_ids[num_before:] == token_ids


def _begin_stats(admitted: list[Sequence], num_decode: int, drafts: list[list[int]]) -> StepStats:
    """What a step is about to do; the admitted requests leave the queue now."""
    prompts = {seq.request.id: seq for seq in admitted}.values()
    queue_seconds = []
    for seq in prompts:
        request = seq.request
        if request.queue_seconds is None:  # else its first sequences came in a step before
            request.queue_seconds = time.monotonic() - request.arrived_seconds
            request.num_cached_tokens = seq.num_cached_tokens
            queue_seconds.append(request.queue_seconds)
    num_cached_tokens = sum(seq.num_cached_tokens for seq in prompts)
    num_prompt_tokens = sum(seq.request.num_prompt_tokens for seq in prompts) - num_cached_tokens
    num_draft_tokens = sum(map(len, drafts))
    return StepStats(
        num_rows=num_decode + num_prompt_tokens + num_draft_tokens,
        num_prompt_tokens=num_prompt_tokens,
        queue_seconds=queue_seconds,
        num_cached_tokens=num_cached_tokens,
        num_drafts=sum(map(bool, drafts)),
        num_draft_tokens=num_draft_tokens,
    )
