"""Continuous batching for one causal language model: many clients, one model, few cores.

The engine knows token ids, tensors and the text they decode to; it knows no HTTP.
Each step runs the model once for every running sequence. A new request joins at the next
step, a finished one leaves at once (iteration-level scheduling: Orca, Yu et al., OSDI 2022).
All engines of a process compute in one thread, a step of each in turn.

    event loop                             the computing thread
    Engine.place(client, …)            --> Scheduler.num_queued (bounded; full = refused at once)
    Engine.submit_all(prompts, …)      --> Scheduler.waiting
                                            Engine.step: schedule    (scheduler.py, prefix_cache.py)
                                                        draft       (drafts.py)
                                                        masks       (masks.py, beside the next)
                                                        forward     (model_runner.py, attention.py)
                                                        sample      (sampler.py)
                                                        postprocess (output.py)
    Engine.stream(request)             <-- one loop.call_soon_threadsafe a step, all deltas together
    Engine.abort(request)              --> left out of the next step

Ownership: only that thread touches the model, the cache, the running set and the text of
a sequence. `Engine._lock` guards what both sides touch: the waiting queue and whether the
engine has its next turn. An `EngineRequest` is read by its client through its queue alone.

When a model is loaded, what the engine computes is compared with what the model computes by
itself (model_check.py); one that would give wrong text is refused.

A model may leave memory (`Engine.unload`) and come back (`Engine.load`); meanwhile requests
wait in the queue, under the same limits as ever.

Life of a sequence: WAITING -> RUNNING -> FINISHED with a finish reason (`stop`, `length`,
`content_filter`), or with an error, or with none when its client has gone.

One prompt or generated token is one row of the forward pass, whichever sequence it
belongs to: rows of short prompts ride along with the running sequences' next tokens. A prompt
that begins as a recent one did takes that one's keys and values, and has rows for the rest alone.
While few sequences run, guesses at what comes next ride along too. Each that turns out to be what
the sampler draws saves a step (drafts.py), and no text depends on them.
Seeds mean the same text in any company because a row's numbers do not depend on the
rows beside it. In int8 that is so by construction; else the engine checks it on the
loaded model, bit by bit, and from that chooses how many rows it runs at once
(`ModelRunner.measure_batch_invariance`).
"""

from engine.constraint import Constraint, TextMatcher, TokenMask
from engine.engine import Engine
from engine.kernels import choose_kernel
from engine.processor import instruction_set, native_dtype
from engine.request import (
    CANNOT_BE_FOLLOWED,
    LOWEST_LOGPROB,
    ConstraintFailed,
    Delta,
    EngineError,
    EngineRequest,
    EngineStoppedError,
    FinishReason,
    InferenceError,
    Place,
    PositionLogprobs,
    Prompt,
    QueueFullError,
    SamplingParams,
    StepStats,
    StopReason,
    TextFilter,
    TextReading,
)
from engine.scheduler import is_within_share
from engine.threads import available_cores
from engine.token_rules import TokenRules

__all__ = [
    "CANNOT_BE_FOLLOWED",
    "LOWEST_LOGPROB",
    "Constraint",
    "ConstraintFailed",
    "Delta",
    "Engine",
    "EngineError",
    "EngineRequest",
    "EngineStoppedError",
    "FinishReason",
    "InferenceError",
    "Place",
    "PositionLogprobs",
    "Prompt",
    "QueueFullError",
    "SamplingParams",
    "StepStats",
    "StopReason",
    "TextFilter",
    "TextMatcher",
    "TextReading",
    "TokenMask",
    "TokenRules",
    "available_cores",
    "choose_kernel",
    "instruction_set",
    "is_within_share",
    "native_dtype",
]
