"""Continuous batching for one causal language model: many clients, one model, few cores.

The engine knows token ids, tensors and the text they decode to; it knows no HTTP.
Each step runs the model once for every running sequence. A new request joins at the next
step, a finished one leaves at once (iteration-level scheduling: Orca, Yu et al., OSDI 2022).
All engines of a process compute in one thread, a step of each in turn.

    event loop                             the computing thread
    Engine.submit(prompt_token_ids, …) --> Scheduler.waiting (bounded; full = refused at once)
                                           Engine.step: schedule -> forward -> sample -> postprocess
    Engine.stream(request)             <-- one loop.call_soon_threadsafe a step, all deltas together
    Engine.abort(request)              --> left out of the next step

Ownership: only that thread touches the model, the cache, the running set and the text of
a sequence. `Engine._lock` guards what both sides touch: the waiting queue and whether the
engine has its next turn. A `Request` is read by its client through its queue alone.

A model may leave memory (`Engine.unload`) and come back (`Engine.load`); meanwhile requests
wait in the queue, under the same limits as ever.

Life of a sequence: WAITING -> RUNNING -> FINISHED with a finish reason (`stop`, `length`,
`content_filter`), or with an error, or with none when its client has gone.

One prompt or generated token is one row of the forward pass, whichever sequence it
belongs to: rows of short prompts ride along with the running sequences' next tokens.
Seeds mean the same text in any company because a row's numbers do not depend on the
rows beside it. The engine checks that on the loaded model, bit by bit, and from that
chooses how many rows it runs at once (`Engine._measure_batch_invariance`).
"""

import asyncio
import bisect
import contextlib
import ctypes
import enum
import gc
import itertools
import logging
import math
import mmap
import os
import random
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger("engine")

FinishReason = Literal["stop", "length", "content_filter"]

SHORT_PROMPT_TOKENS = 32  # prompts up to here share a step with the batch; longer ones run alone
CONTEXT_TOKENS = 32  # of the prompt: what the decoder needs to know before the first token
KEY_BLOCK_TOKENS = 64  # keys are kept for this many tokens, or twice as many, or …
SUMMED_KEYS = 128  # at a time, by kernels that sum more in an order that depends on the capacity
MAX_ROLLBACKS = 8  # of a sequence, and one more for each token that it has
MAX_FAILED_STEPS = 3  # in a row, before the engine counts as unhealthy
PROBE_SECONDS = 1.0  # between attempts of an unhealthy engine to run one token
HUGE_PAGE_BYTES = 2 << 20
MAX_GAP_BYTES = 64 << 10  # between weights that count as one piece of memory
MADV_COLLAPSE = 25  # at once, not some time: Linux 6.1; `mmap` does not have it yet


# --- Errors -------------------------------------------------------------------------------------
# EngineError
#  +- QueueFullError     the waiting queue is full: try again later. Recoverable.
#  +- InferenceError     the step that held the request failed; the engine goes on. Recoverable.
#  +- EngineStoppedError the engine was shut down. Unrecoverable.


class EngineError(Exception):
    """Base of everything the engine raises on its own account."""


class QueueFullError(EngineError):
    """The waiting queue is full; nothing was queued. Recoverable."""


class InferenceError(EngineError):
    """The model failed in a step that held this request; `__cause__` says how. Recoverable."""


class EngineStoppedError(EngineError):
    """The engine was shut down. Unrecoverable."""


# --- Requests and sequences ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Validated by the caller; the engine trusts the ranges."""

    max_new_tokens: int = 50  # >= 0; cut to what fits in the model's context
    temperature: float = 1.0  # >= 0; 0 = greedy
    top_k: int = 0  # >= 0; 0 keeps every token
    top_p: float = 1.0  # (0, 1]; 1 keeps every token
    min_p: float = 0.0  # [0, 1]; drops tokens less likely than min_p times the likeliest
    repetition_penalty: float = 1.0  # > 0; of tokens in prompt or output (CTRL, Keskar et al. 2019)
    presence_penalty: float = 0.0  # subtracted once from the logit of a token in the output
    frequency_penalty: float = 0.0  # subtracted for each time it is in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added; -inf bans
    min_tokens: int = 0  # no end-of-text and no stop string before so many tokens
    ignore_eos: bool = False  # end-of-text is a token like any other
    stop: tuple[str, ...] = ()  # ends before the first of these; the text leaves it out
    num_logprobs: int | None = None  # None: none; else of the token and so many likeliest ones
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    seed: int | None = None  # 0 … 2^63-1; None draws one

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed for more than a rolled-back token."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and penalties."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence of a request has gained: whole tokens, valid UTF-8, filtered."""

    index: int  # of the sequence in its request, or among those submitted together
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None  # set in the last delta of the sequence


@dataclass(slots=True)
class StepStats:
    """What one step did, for whoever keeps count. Seconds are since the request came, but for
    `inter_token_seconds`, which are since the sequence's token before."""

    num_rows: int  # tokens that went through the model
    num_prompt_tokens: int  # of these
    queue_seconds: list[float]  # of requests that left the queue
    time_to_first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    finished: list[tuple[FinishReason, float]] = field(default_factory=list)
    num_rollbacks: int = 0
    num_untimed_tokens: int = 0  # generated besides those that the lists of seconds tell of


class TextFilter(Protocol):
    """What the engine asks of a content filter (see `main.ContentFilter`)."""

    def scan(self, text: str, start: int, final: bool) -> tuple[tuple[int, int] | None, int]:
        """(span of the first forbidden word that begins at or after `start`, else None; the
        length of the longest prefix in which none can begin, whatever text follows)."""


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """A prompt and the sequences that are drawn from it; made by `Engine.submit`."""

    ids = itertools.count()

    def __init__(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt_text: str,
        num_safe_characters: int,
        streams: bool,
        loop: asyncio.AbstractEventLoop,
        *,
        num_sequences: int = 1,
        first_index: int = 0,
        deltas: asyncio.Queue[Delta | Exception] | None = None,
    ):
        self.id = next(self.ids)
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.prompt_text = prompt_text  # a forbidden word may begin in it
        self.num_safe_characters = num_safe_characters  # of it: in these it cannot
        self.streams = streams  # else the only delta of a sequence is its last
        self.is_aborted = False
        self.arrived_seconds = time.monotonic()
        self.queue_seconds: float | None = None  # how long it waited; None while it does
        self.num_generated_tokens = 0  # by all its sequences, without what was rolled back
        self.finish_reasons: set[FinishReason] = set()  # of its sequences that have finished
        # Of each prompt token but the first; set ahead of the first delta, if asked for.
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.loop = loop
        self.num_sequences = num_sequences
        self.first_index = first_index  # of its sequences among those submitted together
        self.deltas = asyncio.Queue() if deltas is None else deltas

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class Sequence:
    """One continuation of a request's prompt: its tokens, its text, its random stream."""

    def __init__(self, request: Request, index: int, seed: int):
        self.request = request
        self.index = index
        self.params = request.params
        self.status = Status.WAITING
        self.rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        self.output_token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""  # what the output tokens decode to, stop string left out
        self.text_ends: list[int] = []  # len(text) after each output token
        self.num_released_tokens = 0  # of the output, already handed to the client
        # Of prompt and text: no forbidden word can begin before.
        self.num_safe_characters = request.num_safe_characters
        self.banned: dict[int, list[int]] = {}  # output position -> token ids rolled back there
        self.num_rollbacks = 0
        self.last_token_seconds: float | None = None  # when the last token came
        self.decode_stream: DecodeStream | None = None

    @property
    def num_tokens(self) -> int:
        """Of prompt and output together."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_token_id(self) -> int:
        return (self.output_token_ids or self.request.prompt_token_ids)[-1]

    def token_start(self, index: int) -> int:
        """Where in the text the token that holds text[index] begins; 0 for index < 0."""
        token = bisect.bisect_right(self.text_ends, index)
        return self.text_ends[token - 1] if token else 0


class Scheduler:
    """Who runs in the next step. First come, first served; knows no tensors.

    `running[i]` owns row i of the cache: rows 0 … num_running-1 are always the running
    ones, because the last row moves into the hole that a finished sequence leaves.
    """

    def __init__(self, max_num_seqs: int, max_queue_size: int):
        self.max_num_seqs = max_num_seqs
        self.max_queue_size = max_queue_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def num_waiting_requests(self, new: SequenceOf[Sequence] = ()) -> int:
        """Of those in the queue, with `new` at its end, for which no place is free."""
        num_free = self.max_num_seqs - len(self.running)
        beyond = itertools.islice(itertools.chain(self.waiting, new), max(0, num_free), None)
        return len({seq.request.id for seq in beyond})

    def add(self, seqs: SequenceOf[Sequence]) -> None:
        """Queues the sequences of one or more requests. Raises QueueFullError, then queues none."""
        if self.num_waiting_requests(seqs) > self.max_queue_size:
            raise QueueFullError(f"{self.max_queue_size} requests are waiting already")
        self.waiting.extend(seqs)

    def schedule(self, end_id: float = math.inf) -> list[Sequence]:
        """Moves waiting sequences to free rows and returns them, in row order; of requests with
        ids below end_id alone.

        One step takes prompts of SHORT_PROMPT_TOKENS together, or one longer prompt, so
        that the running ones never wait for more than one prompt. Sequences that share a
        prompt count once.
        """
        admitted: list[Sequence] = []
        budget_tokens = SHORT_PROMPT_TOKENS
        while self.waiting and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.request.id >= end_id:
                break
            if not admitted or admitted[-1].request is not seq.request:
                budget_tokens -= len(seq.request.prompt_token_ids)
                if admitted and budget_tokens < 0:
                    break
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            admitted.append(seq)
        return admitted

    def finish(self, seq: Sequence) -> tuple[int, int] | None:
        """Frees the sequence's row; (from, to) when the last row must move into it."""
        row = self.running.index(seq)
        seq.status = Status.FINISHED
        last = self.running.pop()
        if last is seq:
            return None
        self.running[row] = last
        return len(self.running), row


# --- The cache, and attention over it -----------------------------------------------------------


@dataclass(slots=True)
class Rows:
    """One forward pass: rows of the running sequences first, then whole prompts.

    Row i of the pass is a token: `token_ids[i]` at position `positions[i]` of the
    sequence in cache row `cache_rows[i]`.
    """

    decode_start: int = 0  # the running sequences decode_start … decode_end-1, a row each
    decode_end: int = 0
    prompts: list[tuple[int, int]] = field(default_factory=list)  # (first row, num_tokens)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cache_rows: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)  # rows whose logits are wanted

    def add_prompt(self, token_ids: SequenceOf[int], cache_row: int) -> None:
        self.prompts.append((len(self.token_ids), len(token_ids)))
        self.token_ids += token_ids
        self.positions += range(len(token_ids))
        self.cache_rows += [cache_row] * len(token_ids)


class SlotCache:
    """Keys and values of every running sequence: (2, rows, kv_heads, capacity, head_dim) a layer.

    One row more than there can be sequences: the last takes the rows of padding. The
    capacity in tokens follows the longest running sequence, so that `attend` reads tensors
    without holes. The memory for max_model_len is reserved, and used as far as it is needed:
    keys from its beginning on, values from its middle on.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_model_len: int):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.group_size = heads // kv_heads
        self.shape = (num_rows + 1, kv_heads, head_dim)
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.capacity = 0
        size = 2 * math.prod(self.shape) * max_model_len
        layers = range(config.num_hidden_layers)
        reserved = [_reserved_zeros(size, model.dtype, model.device) for _ in layers]
        self.vectors = [each.view(-1, head_dim) for each in reserved]
        self.layers = reserved  # which `resize` gives their shape
        self.resize(1, 0)

    def resize(self, num_tokens: int, num_rows: int) -> None:
        """Makes room for sequences of `num_tokens`, keeping the first `num_rows` rows."""
        capacity = KEY_BLOCK_TOKENS
        while capacity < num_tokens:
            capacity *= 2
        capacity = min(capacity, self.max_model_len)
        if capacity == self.capacity:
            return
        kept_tokens = min(capacity, self.capacity)
        rows, heads, head_dim = self.shape
        views = []
        for vectors, old in zip(self.vectors, self.layers, strict=True):
            kept = old[:, :num_rows, :, :kept_tokens].clone() if num_rows else None
            new = vectors.view(2, -1, head_dim)[:, : rows * heads * capacity]
            new = new.view(2, rows, heads, capacity, head_dim)
            if kept is not None:
                new[:, :num_rows, :, :kept_tokens] = kept
            views.append(new)
        self.layers, self.capacity = views, capacity
        # Views that each step needs, made once: many small calls are a part of a step.
        self.transposed_keys = [layer[0].flatten(0, 1).transpose(1, 2) for layer in views]
        self.values = [layer[1].flatten(0, 1) for layer in views]

    def begin(self, rows: Rows) -> None:
        """Sets what `attend` does until the next call."""
        device, kv_heads = self.vectors[0].device, self.shape[1]
        self.prompts, self.num_decode = rows.prompts, rows.decode_end - rows.decode_start
        self.decode_heads = slice(rows.decode_start * kv_heads, rows.decode_end * kv_heads)
        self.positions = torch.tensor(rows.positions, device=device)
        # (rows, 2, kv_heads): which of a layer's `vectors` a row's keys and values become.
        heads = torch.tensor(rows.cache_rows, device=device)[:, None] * kv_heads
        heads = heads + torch.arange(kv_heads, device=device)
        places = heads * self.capacity + self.positions[:, None]
        self.places = torch.stack((places, places + len(self.vectors[0]) // 2), dim=1)
        decode_positions = self.positions[: self.num_decode]
        is_hidden = torch.arange(self.capacity, device=device) > decode_positions[:, None]
        mask = torch.zeros(is_hidden.shape, dtype=self.vectors[0].dtype, device=device)
        mask.masked_fill_(is_hidden, -math.inf)
        mask = mask[:, None, None].expand(-1, kv_heads, self.group_size, -1)
        self.mask = mask.flatten(0, 1)

    def attend(self, layer: int, query: Tensor, keys_values: Tensor, scale: float) -> Tensor:
        """Stores keys and values of all rows, (rows, 2, kv_heads, head_dim), then attends:
        queries (rows, heads, head_dim) to as many outputs."""
        self.vectors[layer][self.places] = keys_values
        parts = []
        if self.num_decode:
            # Plain products: on some CPUs the fused kernel gives a row other bits in other
            # company, and for one query a row it is no faster.
            grouped = query[: self.num_decode].reshape(-1, self.group_size, query.shape[-1])
            keys = self.transposed_keys[layer][self.decode_heads]
            values = self.values[layer][self.decode_heads]
            weights = torch.softmax(torch.baddbmm(self.mask, grouped, keys, alpha=scale), dim=-1)
            if self.group_size > 1 and weights.dtype == torch.float32:
                # One query a key is summed in one order anyway, and pieces take twice the time.
                pieces = (weights.split(SUMMED_KEYS, -1), values.split(SUMMED_KEYS, -2))
                attended = reduce(torch.add, map(torch.bmm, *pieces))
            else:
                attended = torch.bmm(weights, values)
            parts.append(attended.view(self.num_decode, *query.shape[1:]))
        for first, length in self.prompts:
            prompt = slice(first, first + length)
            attended = F.scaled_dot_product_attention(
                query[prompt].transpose(0, 1)[None].contiguous(),
                keys_values[prompt, 0].transpose(0, 1)[None].contiguous(),
                keys_values[prompt, 1].transpose(0, 1)[None].contiguous(),
                is_causal=True,
                scale=scale,
                enable_gqa=self.group_size > 1,
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Gives `target` the first `num_tokens` positions of `source`."""
        for layer in self.layers:
            layer[:, target, :, :num_tokens] = layer[:, source, :, :num_tokens]


def _reserved_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,) zeros that, on a CPU, take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = size * dtype.itemsize
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=dtype)


def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    slot_cache: SlotCache,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer: (1, heads, rows, dim) in,
    (1, rows, heads, dim) out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, keys_values = query[0].transpose(0, 1), torch.cat((key, value)).permute(2, 0, 1, 3)
    return slot_cache.attend(cast(int, module.layer_idx), query, keys_values, scale)[None], None


ALL_ATTENTION_FUNCTIONS.register("slots", _slot_attention)


def gpt2_forward(model: GPT2LMHeadModel) -> Callable[..., CausalLMOutput]:
    """A function that computes what GPT2LMHeadModel.forward does here, to the last bit.

    Without what transformers' own does for training, beams and cross-attention, and without the
    call of a module around each product: on two cores they take a tenth of a step of eight rows.
    """
    body, head = model.transformer, model.lm_head.forward
    heads, head_dim = body.h[0].attn.num_heads, body.h[0].attn.head_dim
    layers = [
        (
            block.ln_1.forward,
            block.attn.c_attn.forward,
            block.attn.c_proj.forward,
            block.ln_2.forward,
            block.mlp.c_fc.forward,
            block.mlp.act.forward,
            block.mlp.c_proj.forward,
            block.attn.scaling,
        )
        for block in body.h
    ]

    def forward(
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        slot_cache: SlotCache,
        **_: Any,
    ) -> CausalLMOutput:
        hidden = body.wte(input_ids[0]) + body.wpe(position_ids[0])
        for layer, (ln_1, c_attn, c_proj, ln_2, c_fc, act, mlp_c_proj, scale) in enumerate(layers):
            projected = c_attn(ln_1(hidden)).view(-1, 3, heads, head_dim)
            attended = slot_cache.attend(layer, projected[:, 0], projected[:, 1:], scale)
            hidden = c_proj(attended.view(hidden.shape)).add_(hidden)
            hidden = mlp_c_proj(act(c_fc(ln_2(hidden)))).add_(hidden)
        return CausalLMOutput(logits=head(body.ln_f(hidden[logits_to_keep]))[None])

    return forward


# --- Weights ------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """x @ weight.T + bias with the weight packed once for oneDNN: (…, in) to (…, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        post_op: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if self.gelu else ("none", [], "")
        )
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *post_op)


class OutputLinear(PackedLinear):
    """The logits of a bfloat16 model in float32: (…, in) bfloat16 to (…, vocab) float32.

    Logits far from zero have few bits left for their differences (GPT-2's lie around -100,
    where bfloat16 has steps of 0.5). What all tokens have in common is taken out of the
    weight before it is packed, and added again in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        common = weight.float().mean(dim=0)
        super().__init__((weight.float() - common).to(weight.dtype), bias)
        self.common = common

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().add_((x.float() * self.common).sum(-1, keepdim=True))


class Int8Linear(nn.Module):
    """The same with int8 weights, one scale a row, and inputs quantised as they come.

    An input's scale is that of the whole batch, so results depend on the company.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-9)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated, without a successor that packs weights
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(
            quantized, bias.float() if bias is not None else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed)


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32


def available_cores() -> int:
    """The cores this process may use: its affinity, cut by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = math.inf
    v2, v1 = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    try:
        if v2.exists():
            limit, period = v2.read_text().split()
            quota = math.inf if limit == "max" else int(limit) / int(period)
        elif v1.exists() and (limit_us := int(v1.read_text())) > 0:
            quota = limit_us / int(v1.with_name("cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        pass  # an unreadable quota is no quota
    return max(1, math.ceil(min(cores or 1, quota)))


def prepare_weights(model: PreTrainedModel, quantization: str | None) -> None:
    """Packs every linear layer of a CPU model in place and frees the unpacked weights.

    quantization: None or "int8". Activations of int8 layers are float32.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        if quantization:
            raise ValueError("QUANTIZATION=int8 needs a CPU that oneDNN supports")
        return
    if quantization:
        has_amx = torch.cpu._is_amx_tile_supported()
        torch.backends.quantized.engine = "onednn" if has_amx else "fbgemm"  # as measured

    output = model.get_output_embeddings()

    def pack(linear: Any, gelu: bool = False) -> nn.Module:
        weight = linear.weight.detach()
        if isinstance(linear, Conv1D):
            weight = weight.T.contiguous()
        bias = None if linear.bias is None else linear.bias.detach()
        if linear is output and weight.dtype == torch.bfloat16:
            return OutputLinear(weight, bias)
        return Int8Linear(weight, bias) if quantization else PackedLinear(weight, bias, gelu)

    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and module.act.__class__ in (
            ACT2FN["gelu_new"].__class__,
            ACT2FN["gelu_pytorch_tanh"].__class__,
        ):  # two spellings of one function, which oneDNN fuses into the product before it
            module.act = nn.GELU(approximate="tanh") if quantization else nn.Identity()
            module.c_fc = pack(module.c_fc, gelu=True)
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, pack(child))
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        model.forward = gpt2_forward(model)
    return_freed_memory()
    move_to_huge_pages(
        module.weight for module in model.modules() if isinstance(module, PackedLinear)
    )


def move_to_huge_pages(packed: Iterable[Tensor]) -> None:
    """Moves packed weights to pages of 2 MiB, where Linux gives some to those who ask.

    A step reads all weights once, so most of its time goes into reading memory; with larger
    pages a product of few rows takes a tenth less. Changes no address and no bit.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:  # not Linux, where the same numbers may mean something else
        return
    spans: list[tuple[int, int]] = []
    for weight in sorted(packed, key=torch.ops.mkldnn.data_ptr):
        start = torch.ops.mkldnn.data_ptr(weight)
        end = start + torch.ops.mkldnn._nbytes(weight)
        if spans and start - spans[-1][1] < MAX_GAP_BYTES:
            start = spans.pop()[0]
        spans.append((start, end))
    madvise = ctypes.CDLL(None).madvise
    for start, end in spans:
        first, last = -(-start // HUGE_PAGE_BYTES), end // HUGE_PAGE_BYTES
        if first < last:
            address = ctypes.c_void_p(first * HUGE_PAGE_BYTES)
            num_bytes = ctypes.c_size_t((last - first) * HUGE_PAGE_BYTES)
            madvise(address, num_bytes, advice)  # where it fails, all stays as it was
            madvise(address, num_bytes, MADV_COLLAPSE)


def return_freed_memory() -> None:
    """Gives what was freed back to the system, where the C library lets one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


# --- Sampling -----------------------------------------------------------------------------------


GREEDY, ALL = 0, -1  # in place of a number of candidates
BLOCK_TOKENS = 256  # of the vocabulary, from which one token is drawn in the end


def edit_logits(logits: Tensor, seqs: SequenceOf[Sequence], eos_token_ids: Iterable[int]) -> None:
    """Applies penalties, biases and bans to logits (B, vocab) float32, in place."""
    for row, seq in enumerate(seqs):
        params, output = seq.params, seq.output_token_ids
        if banned := seq.banned.get(len(output)):
            logits[row, banned] = -math.inf
        if not params.edits_logits:
            continue
        if params.repetition_penalty != 1.0:
            ids = torch.tensor(sorted({*seq.request.prompt_token_ids, *output}))
            seen = logits[row, ids]
            penalty = params.repetition_penalty
            logits[row, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if output and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(output).unique(return_counts=True)
            # With a dtype, always: loading a model in another thread changes the default one.
            penalties = params.presence_penalty + params.frequency_penalty * counts.to(logits)
            logits[row, ids] -= penalties
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            biases = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
            logits[row, ids] += biases.to(logits.device)
        if len(output) < params.min_tokens:
            logits[row, list(eos_token_ids)] = -math.inf


def sample(logits: Tensor, seqs: SequenceOf[Sequence]) -> list[int]:
    """One token id a row of logits (B, vocab) float32; row i draws from seqs[i].rng.

    What a row gives depends on that row alone, to the last bit: rows are computed in
    classes of fixed width, and a sum over a row never sees how many others there are.
    """
    token_ids = [0] * len(seqs)
    vocab_size = logits.shape[1]
    classes: dict[int, list[int]] = {}
    for row, seq in enumerate(seqs):
        params = seq.params
        if params.temperature == 0:
            width = GREEDY
        elif 0 < params.top_k <= 64:
            width = 64
        elif params.top_k > 1024 or (params.top_k == 0 and params.top_p == 1):
            width = ALL
        else:
            width = 1024
        classes.setdefault(min(width, vocab_size), []).append(row)
    for width, rows in classes.items():
        part = logits if len(rows) == len(seqs) else logits[rows]
        chosen = [seqs[row] for row in rows]
        draws = [seq.rng.random() for seq in chosen]
        if width == GREEDY:
            picked = part.argmax(dim=-1).tolist()
        elif width == ALL:
            picked = []
            for at in range(0, len(rows), 8):  # what is larger gets new memory in every step
                few = slice(at, at + 8)
                picked += _draw_of_all(part[few], chosen[few], draws[few])
        else:
            picked = _draw_of_likeliest(part, chosen, draws, width)
        for row, token_id in zip(rows, picked, strict=True):
            token_ids[row] = token_id
    return token_ids


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    """(B, 1) float64."""
    return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]


def _weights(logits: Tensor, seqs: SequenceOf[Sequence]) -> Tensor:
    """What each token weighs, (B, vocab) float32; the likeliest 1."""
    temperatures = _column((seq.params.temperature for seq in seqs), logits.device).float()
    temperatures.clamp_(min=torch.finfo(torch.float32).tiny)  # what rounds to 0 divides nothing
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()


def _keep_likeliest(weights: Tensor, amounts: Tensor, limit: float) -> None:
    """Leaves of weights (vocab,) float32 the likeliest until their amounts reach the limit.

    In place. Floats that are not negative are ordered as their bits are: the upper half of
    the bits sorts tokens into buckets, and only the bucket in which the limit is reached has
    to be sorted further. That takes a tenth of the time of sorting everything.
    """
    buckets = weights.view(torch.int32) >> 16
    sums = buckets.bincount(amounts.double()).flip(0).cumsum(0)  # from the likeliest on
    at = min(int(torch.searchsorted(sums, limit)), len(sums) - 1)
    bucket = len(sums) - 1 - at
    last = (buckets == bucket).nonzero()[:, 0]
    last = last[weights[last].argsort(descending=True, stable=True)]
    ends = amounts[last].double().cumsum(0) + (sums[at - 1] if at else 0)
    weights.masked_fill_(buckets < bucket, 0)
    weights[last[1:][ends[:-1] >= limit]] = 0


def _draw_of_all(logits: Tensor, seqs: SequenceOf[Sequence], draws: SequenceOf[float]) -> list[int]:
    """One token id a row of logits (B, vocab); draws: in [0, 1). First a block of tokens is drawn,
    then one of the block: sums in double precision over everything would take most of the time."""
    weights = _weights(logits, seqs)
    for each, seq in zip(weights, seqs, strict=True):
        if seq.params.top_k:
            _keep_likeliest(each, torch.ones_like(each), seq.params.top_k)
        if seq.params.top_p < 1:
            everything = each.sum(dtype=torch.float64).item()
            _keep_likeliest(each, each.clone(), seq.params.top_p * everything)
    if any(seq.params.min_p for seq in seqs):
        weights[weights < _column((seq.params.min_p for seq in seqs), weights.device).float()] = 0
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK_TOKENS)).view(len(seqs), -1, BLOCK_TOKENS)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = _column(draws, weights.device) * ends[:, -1:]
    drawn = torch.searchsorted(ends, targets, right=True)
    targets -= F.pad(ends, (1, 0)).gather(1, drawn)
    inside = blocks[torch.arange(len(seqs), device=drawn.device), drawn[:, 0]]
    inside = inside.cumsum(dim=-1, dtype=torch.float64)
    last = torch.searchsorted(inside, inside.amax(dim=-1, keepdim=True))  # that weighs something
    token = torch.searchsorted(inside, targets, right=True).minimum(last)
    return (drawn * BLOCK_TOKENS + token)[:, 0].tolist()


def _draw_of_likeliest(
    logits: Tensor, seqs: SequenceOf[Sequence], draws: list[float], width: int
) -> list[int]:
    """The same from the `width` likeliest tokens, and from all where these are not enough."""
    device, vocab_size = logits.device, logits.shape[1]
    temperatures = _column((seq.params.temperature for seq in seqs), device)
    top_k = _column((seq.params.top_k or vocab_size for seq in seqs), device)
    top_p = _column((seq.params.top_p for seq in seqs), device)
    values, ids = torch.topk(logits, width, dim=-1)
    weights = torch.exp((values.double() - values[:, :1].double()) / temperatures)
    weights[torch.arange(width, device=device)[None, :] >= top_k] = 0
    cumulative = weights.cumsum(dim=-1)
    total, is_cut = cumulative[:, -1:], []
    if 64 < width < vocab_size:
        # top_p is a share of the top_k tokens, or of all: more than were looked at?
        everything = _weights(logits, seqs).sum(dim=-1, dtype=torch.float64, keepdim=True)
        total = torch.where(top_k > width, everything, total)
        is_cut = (cumulative[:, -1:] < top_p * total).nonzero()[:, 0].tolist()
    weights[cumulative - weights >= top_p * total] = 0
    weights[weights < _column((seq.params.min_p for seq in seqs), device)] = 0
    cumulative = weights.cumsum(dim=-1)
    targets = _column(draws, device) * cumulative[:, -1:]
    picked = ids.gather(1, torch.searchsorted(cumulative, targets, right=True))[:, 0].tolist()
    for row in is_cut:  # a flat distribution
        (picked[row],) = _draw_of_all(logits[row : row + 1], [seqs[row]], [draws[row]])
    return picked


def collect_logprobs(
    logits: Tensor, token_ids: SequenceOf[int], num_top: int
) -> list[TokenLogprobs]:
    """Of token_ids[i] and the `num_top` likeliest tokens, at each row of logits (B, vocab)."""
    collected = []
    for row, token_id in zip(logits, token_ids, strict=True):  # one at a time: B may be large
        logprobs = torch.log_softmax(row.float(), dim=-1)
        values, ids = logprobs.topk(num_top)
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        collected.append(TokenLogprobs(token_id, logprobs[token_id].item(), top))
    return collected


# --- The engine ---------------------------------------------------------------------------------


@cache
def computing_thread(num_threads: int) -> ThreadPoolExecutor:
    """The thread in which engines compute, with num_threads - 1 others that help it.

    Every thread that computes in parallel gets helpers of its own, and once there are more of
    them than cores none waits actively any more: a step of one row then takes half as long
    again. So engines take turns in one thread, and the threads that load models compute alone
    (main.py).
    """
    return ThreadPoolExecutor(1, "engine", torch.set_num_threads, (num_threads,))


class Engine:
    """Serves one causal language model to many clients; see the module's docstring.

    model: any transformers causal LM whose attention can be replaced; it is changed in
        place (weights packed, attention set) and belongs to the engine from here on.
    max_model_len: prompt and output together; cut to the model's context.
    text_filter: what generated text must not contain; None lets everything pass.
    on_step: called in the computing thread after each step; must not raise.
    on_need: called with a request, wherever that is submitted, when the model is not loaded
        or about to leave; to see to it that `load` is called.

    Raises ValueError for a model whose attention cannot be replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int = 64,
        max_queue_size: int = 256,
        max_model_len: int | None = None,
        quantization: str | None = None,
        num_threads: int | None = None,
        text_filter: TextFilter | None = None,
        on_step: Callable[[StepStats], None] | None = None,
        on_need: Callable[[], None] | None = None,
    ):
        if not model._supports_attention_backend:
            raise ValueError(f"{type(model).__name__} does not let its attention be replaced")
        config = model.config.get_text_config()
        windows = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
        self.max_model_len = min(n for n in (*windows, max_model_len) if n)
        self.vocab_size: int = config.vocab_size
        self.tokenizer = tokenizer
        self.quantization = quantization
        self.text_filter = text_filter
        self.on_step = on_step
        self.on_need = on_need
        self.eos_token_ids = self._eos_token_ids(model)
        self.scheduler = Scheduler(max_num_seqs, max_queue_size)
        self.num_rollbacks = 0
        self.num_failed_steps = 0  # in a row
        self._lock = threading.Lock()
        self._computing_thread = computing_thread(num_threads or available_cores())
        self._has_turn = False  # `_advance` is under way or to come
        self._is_stopping = False
        self.last_request_id = -1
        self._leaves_at_id = math.inf  # unloads before it runs a request with an id from here on
        self._has_left = threading.Event()
        self.load(model)
        self.min_rows, self.max_rows = self._computing_thread.submit(
            self._measure_batch_invariance
        ).result()

    def _eos_token_ids(self, model: PreTrainedModel) -> set[int]:
        configured = model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return {id_ for id_ in (*ids, self.tokenizer.eos_token_id) if id_ is not None}

    # Loading and unloading: any thread, one call at a time.

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> PreTrainedModel:
        """Raises ValueError while it is not loaded."""
        if self._model is None:
            raise ValueError("the model is not loaded")
        return self._model

    def load(self, model: PreTrainedModel) -> None:
        """Takes the model, the same one as ever; what waits runs from here on."""
        model.eval().set_attn_implementation("slots")
        prepare_weights(model, self.quantization)
        self.cache = SlotCache(model, self.scheduler.max_num_seqs, self.max_model_len)
        with self._lock:
            self._leaves_at_id = math.inf
            self._model: PreTrainedModel | None = model
            self._wake()

    def unload(self) -> None:
        """Gives the model's memory back as soon as all requests of before have finished.

        Blocks until then; requests that come meanwhile wait for the next `load`.
        """
        with self._lock:
            self._leaves_at_id = next(Request.ids)
            self._has_left.clear()
            self._wake()
        self._has_left.wait()
        return_freed_memory()

    def fail_waiting(self) -> None:
        """Ends what waits with InferenceError: the model cannot be loaded."""
        with self._lock:
            waiting, self.scheduler.waiting = self.scheduler.waiting, deque()
        self._fail(waiting, InferenceError("the model cannot be loaded"))

    # The clients' side: any thread, any event loop.

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def is_full(self) -> bool:
        """Whether a request submitted now would be refused."""
        with self._lock:
            return self.scheduler.num_waiting_requests() >= self.scheduler.max_queue_size

    @property
    def is_healthy(self) -> bool:
        """False once steps have failed MAX_FAILED_STEPS times in a row, until one succeeds."""
        return self.num_failed_steps < MAX_FAILED_STEPS and not self._is_stopping

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        num_sequences: int = 1,
        streams: bool = False,
    ) -> Request:
        """A queued request, whose deltas the running event loop will receive; see `stream`.

        Raises QueueFullError at once when the queue is full, EngineStoppedError after
        `stop`, and ValueError when the prompt leaves no room for a token.
        """
        (request,) = self.submit_all(
            [prompt_token_ids], params, num_sequences=num_sequences, streams=streams
        )
        return request

    def submit_all(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        num_sequences: int = 1,
        streams: bool = False,
    ) -> list[Request]:
        """A request for each prompt, all queued or none, to be given to one `stream`.

        The sequences of prompt i have the indexes i * num_sequences and following. Each
        prompt is sampled as if it had been submitted alone. Raises as `submit` does.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        requests, seqs = [], []
        most = self.max_model_len - (params.max_new_tokens > 0)
        for i, prompt_token_ids in enumerate(prompts):
            if not 0 < len(prompt_token_ids) <= most:
                raise ValueError(f"a prompt has 1 to {most} tokens")
            text, num_safe = "", 0
            if self.text_filter:
                text = self.tokenizer.decode(prompt_token_ids, skip_special_tokens=True)
                num_safe = self.text_filter.scan(text, 0, final=False)[1]
            request = Request(
                prompt_token_ids,
                params,
                text,
                num_safe,
                streams,
                loop,
                num_sequences=num_sequences,
                first_index=i * num_sequences,
                deltas=deltas,
            )
            requests.append(request)
            seed = random.getrandbits(63) if params.seed is None else params.seed
            seqs += [Sequence(request, index, seed) for index in range(num_sequences)]
        with self._lock:
            if self._is_stopping:
                raise EngineStoppedError("the engine was stopped")
            self.scheduler.add(seqs)
            self.last_request_id = requests[-1].id
            self._wake()
            is_needed = not self.is_loaded or self._leaves_at_id < math.inf
        if is_needed and self.on_need:
            self.on_need()
        return requests

    async def stream(
        self, *requests: Request, timeout_seconds: float | None = None
    ) -> AsyncGenerator[Delta]:
        """The deltas of all sequences of requests submitted together, as they are made.

        Raises what ended a request: InferenceError, EngineStoppedError, or TimeoutError.
        However the loop over it ends, requests that are not finished are aborted.
        """
        deltas = requests[0].deltas
        # One timer for all of them: a timeout around each `get` costs as much as the `get`.
        deadline = timeout_seconds and asyncio.get_running_loop().call_later(
            timeout_seconds, deltas.put_nowait, TimeoutError()
        )
        try:
            unfinished = sum(request.num_sequences for request in requests)
            while unfinished:
                delta = await deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            if deadline:
                deadline.cancel()
            self.abort(*requests)

    def abort(self, *requests: Request) -> None:
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

    def _wake(self) -> None:
        """Gives the engine a turn, unless it has one. Under the lock."""
        if not self._has_turn:
            self._has_turn = True
            self._computing_thread.submit(self._advance)

    # The engine's side: the computing thread alone.

    @torch.inference_mode()
    def _advance(self) -> None:
        """One step, if there is anything to do; then the other engines have their turns."""
        try:
            self._remove_aborted()
            if self._can_step():
                self.step()
                self.num_failed_steps = 0
            elif self.is_loaded and self.num_failed_steps >= MAX_FAILED_STEPS:
                self._probe()
        except Exception as error:
            self.num_failed_steps += 1
            if self.num_failed_steps <= MAX_FAILED_STEPS:
                logger.exception("a step failed; its %d sequences end", self.num_running)
            failure = InferenceError("a step of the model failed")
            failure.__cause__ = error
            self._fail(self.scheduler.running, failure)
            self.scheduler.running = []
        with self._lock, contextlib.suppress(RuntimeError):  # which says that the process ends
            self._has_turn = False
            if self._can_step():
                self._wake()
            elif self.is_loaded and self._leaves_at_id < math.inf:
                # Left of those who came before, for whom nobody would load it again: it fails.
                waiting, at = self.scheduler.waiting, self._leaves_at_id
                self._fail(
                    [seq for seq in waiting if seq.request.id < at],
                    InferenceError("the model keeps failing"),
                )
                self.scheduler.waiting = deque(seq for seq in waiting if seq.request.id >= at)
                self._model, self.num_failed_steps = None, 0
                del self.cache
                self._has_left.set()
            elif not self.is_healthy and not self._is_stopping:
                self._has_turn = True
                pause = threading.Timer(
                    PROBE_SECONDS, self._computing_thread.submit, [self._advance]
                )
                pause.daemon = True
                pause.start()

    def _can_step(self) -> bool:
        if not self.is_healthy or not self.is_loaded:
            return False
        waiting = self.scheduler.waiting
        may_admit = bool(waiting) and waiting[0].request.id < self._leaves_at_id
        return may_admit or bool(self.scheduler.running)

    def _end(self) -> None:
        self._fail([*self.scheduler.running, *self.scheduler.waiting], EngineStoppedError())
        self.scheduler.running, self.scheduler.waiting = [], deque()

    def step(self) -> None:
        """Everyone running gains a token, or gives some back to the filter."""
        with self._lock:
            admitted = self.scheduler.schedule(self._leaves_at_id)
        prompts = {seq.request.id: seq.request for seq in admitted}.values()
        new = [request for request in prompts if request.queue_seconds is None]
        for request in new:
            request.queue_seconds = time.monotonic() - request.arrived_seconds
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in prompts)
        num_decode = self.num_running - len(admitted)
        stats = StepStats(
            num_rows=num_decode + num_prompt_tokens,
            num_prompt_tokens=num_prompt_tokens,
            queue_seconds=[request.queue_seconds or 0.0 for request in new],
        )
        logits = self._forward(admitted)
        token_ids = self._sample(logits)
        self._postprocess(token_ids, stats)
        if self.on_step:
            self.on_step(stats)

    def _probe(self) -> None:
        """Runs one token, to see whether an unhealthy engine has recovered."""
        with self._lock:
            waiting, self.scheduler.waiting = self.scheduler.waiting, deque()
        self._fail(waiting, InferenceError("the model keeps failing"))
        rows = Rows(logit_rows=[0])
        rows.add_prompt([0], self.cache.padding_row)
        self._run_model(rows)
        self.num_failed_steps = 0
        logger.info("the model answers again")

    def _remove_aborted(self) -> None:
        with self._lock:
            waiting = self.scheduler.waiting
            if any(seq.request.is_aborted for seq in waiting):
                kept = [seq for seq in waiting if not seq.request.is_aborted]
                self.scheduler.waiting = deque(kept)
        for seq in [seq for seq in self.scheduler.running if seq.request.is_aborted]:
            self._free(seq)

    def _free(self, seq: Sequence) -> None:
        if move := self.scheduler.finish(seq):
            source, target = move
            self.cache.copy_row(source, target, self.scheduler.running[target].num_tokens)

    def _fail(self, seqs: Iterable[Sequence], error: EngineError) -> None:
        for request in {seq.request.id: seq.request for seq in seqs}.values():
            request.is_aborted = True
            _call_soon(request.loop, request.deltas.put_nowait, error)

    def _forward(self, admitted: list[Sequence]) -> Tensor:
        """Logits (num_running, vocab) float32 of the next token of every running sequence."""
        running = self.scheduler.running
        num_decode = len(running) - len(admitted)
        self.cache.resize(max(seq.num_tokens for seq in running), num_decode)
        passes: list[Rows] = []
        for start in range(0, num_decode, self.max_rows):
            rows = Rows(start, min(start + self.max_rows, num_decode))
            for row in range(rows.decode_start, rows.decode_end):
                rows.token_ids.append(running[row].last_token_id)
                rows.positions.append(running[row].num_tokens - 1)
                rows.cache_rows.append(row)
            rows.logit_rows = list(range(len(rows.token_ids)))
            passes.append(rows)
        logits_of = list(range(num_decode))  # for each running row, the row of its logits
        copies: list[tuple[int, int, int]] = []
        scored: list[tuple[Request, int]] = []  # (request, row of its first token's logits)
        for request, seqs in itertools.groupby(admitted, key=lambda seq: seq.request):
            prompt, row = request.prompt_token_ids, len(logits_of)
            num_rows = len(passes[-1].token_ids) + len(prompt) if passes else self.max_rows + 1
            if len(prompt) > SHORT_PROMPT_TOKENS or num_rows > self.max_rows:
                passes.append(Rows())
            num_wanted = 1
            if request.params.num_prompt_logprobs is not None and request.prompt_logprobs is None:
                num_wanted = len(prompt)
                scored.append((request, sum(len(rows.logit_rows) for rows in passes)))
            passes[-1].add_prompt(prompt, row)
            end = len(passes[-1].token_ids)
            passes[-1].logit_rows += range(end - num_wanted, end)
            logits_of += [sum(len(rows.logit_rows) for rows in passes) - 1] * len(list(seqs))
            copies += [(row, other, len(prompt)) for other in range(row + 1, len(logits_of))]
        parts = [self._run_model(rows) for rows in passes]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        for request, first in scored:
            prompt = request.prompt_token_ids
            request.prompt_logprobs = collect_logprobs(
                logits[first : first + len(prompt) - 1],
                prompt[1:],
                request.params.num_prompt_logprobs or 0,
            )
        for copy in copies:  # the sequences of one request share the prompt of the first
            self.cache.copy_row(*copy)
        return logits[logits_of] if copies or scored else logits

    def _run_model(self, rows: Rows) -> Tensor:
        """Logits (len(rows.logit_rows), vocab) float32 of one forward pass."""
        if (missing := self.min_rows - len(rows.token_ids)) > 0:
            rows.add_prompt([0] * missing, self.cache.padding_row)
        self.cache.begin(rows)
        output = self.model(
            input_ids=torch.tensor([rows.token_ids], device=self.model.device),
            position_ids=self.cache.positions[None],
            logits_to_keep=torch.tensor(rows.logit_rows, device=self.model.device),
            use_cache=False,
            slot_cache=self.cache,
        )
        return output.logits[0].float()

    @torch.inference_mode()
    def _measure_batch_invariance(self) -> tuple[int, int]:
        """(fewest, most) rows a pass may have so that each row's logits stay the same bits.

        Matrix kernels sum in another order from some number of rows on (a single row, more
        than 32, …), which depends on the processor. Where no range is found, every pass
        has exactly 16 rows: the same shape takes the same kernel.
        """
        most = self.scheduler.max_num_seqs + SHORT_PROMPT_TOKENS
        self.min_rows = 1
        if self.model.device.type != "cpu":
            return 1, most
        token_ids = np.random.default_rng(0).integers(0, self.vocab_size, most).tolist()

        def logits(num_rows: int) -> Tensor:
            num_decode = min(num_rows, self.scheduler.max_num_seqs)
            rows = Rows(0, num_decode)
            rows.token_ids = token_ids[:num_decode]
            rows.positions = [0] * num_decode
            rows.cache_rows = list(range(num_decode))
            for token_id in token_ids[num_decode:num_rows]:
                rows.add_prompt([token_id], self.cache.padding_row)
            rows.logit_rows = list(range(num_rows))
            return self._run_model(rows)

        sizes = [n for n in (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 33, 48, 64) if n < most] + [most]
        measured = {n: logits(n) for n in sizes}
        for fewest in (1, 2, 4):
            last = fewest
            for smaller, larger in itertools.pairwise(n for n in sizes if n >= fewest):
                if not torch.equal(measured[larger][:smaller], measured[smaller]):
                    break
                last = larger
            if last >= min(16, most):
                return fewest, last
        return 16, 16

    def _sample(self, logits: Tensor) -> list[int]:
        running = self.scheduler.running
        wanting = [row for row, seq in enumerate(running) if seq.params.num_logprobs is not None]
        raw = logits[wanting] if wanting else logits[:0]  # a copy: edits come next
        edit_logits(logits, running, self.eos_token_ids)
        token_ids = sample(logits, running)
        for row, row_logits in zip(wanting, raw, strict=True):
            seq = running[row]
            seq.logprobs += collect_logprobs(
                row_logits[None], [token_ids[row]], seq.params.num_logprobs or 0
            )
        return token_ids

    def _postprocess(self, token_ids: list[int], stats: StepStats) -> None:
        """Adds each running sequence's token; hands out deltas, frees what has finished."""
        now_seconds, num_rollbacks = time.monotonic(), self.num_rollbacks
        deltas: dict[asyncio.AbstractEventLoop, list[tuple[Request, Delta]]] = {}
        try:
            for seq, token_id in zip(list(self.scheduler.running), token_ids, strict=True):
                since_arrival_seconds = now_seconds - seq.request.arrived_seconds
                if seq.last_token_seconds is None:
                    stats.time_to_first_token_seconds.append(since_arrival_seconds)
                else:
                    stats.inter_token_seconds.append(now_seconds - seq.last_token_seconds)
                seq.last_token_seconds = now_seconds
                if delta := self._append(seq, token_id):
                    deltas.setdefault(seq.request.loop, []).append((seq.request, delta))
                    if delta.finish_reason:
                        seq.request.finish_reasons.add(delta.finish_reason)
                        stats.finished.append((delta.finish_reason, since_arrival_seconds))
                        self._free(seq)
            stats.num_rollbacks = self.num_rollbacks - num_rollbacks
        finally:  # an error at one sequence takes nothing from those before it
            for loop, outputs in deltas.items():
                _call_soon(loop, _deliver, outputs)

    def _append(self, seq: Sequence, token_id: int) -> Delta | None:
        """What the client gains by this token: text that nothing to come can take back."""
        params, request = seq.params, seq.request
        if params.max_new_tokens == 0:  # the prompt was all there was to do
            return self._release(seq, 0, "length")
        seq.output_token_ids.append(token_id)
        request.num_generated_tokens += 1
        old_length = len(seq.text)
        seq.text += self._decode(seq, token_id)
        seq.text_ends.append(len(seq.text))
        num_output = len(seq.output_token_ids)

        finish_reason: FinishReason | None = None
        if token_id in self.eos_token_ids and not params.ignore_eos:
            finish_reason = "stop"
        elif num_output >= params.max_new_tokens or seq.num_tokens >= self.max_model_len:
            finish_reason = "length"
        if num_output > params.min_tokens:
            begins = (seq.text.find(s, max(0, old_length - len(s) + 1)) for s in params.stop)
            if found := [at for at in begins if at >= 0]:
                finish_reason = "stop"
                seq.text = seq.text[: min(found)]

        # What is released stays: neither a stop string nor a roll-back may reach it, nor what
        # it depended on. So what may be the beginning of a stop string is looked at later.
        settled = len(seq.text) if finish_reason else self._before_stop(seq, len(seq.text))
        safe = settled
        if self.text_filter:
            prompt = request.prompt_text
            # Less than was safe may be left: a roll-back takes whole tokens.
            start = min(seq.num_safe_characters, len(prompt) + settled)
            hit, safe = self.text_filter.scan(
                prompt + seq.text[:settled], start, final=finish_reason is not None
            )
            if hit:
                return self._roll_back(seq, hit[0] - len(prompt))
            if safe < len(prompt) + settled:
                # A forbidden word may have begun; then its first token will be drawn anew.
                settled = self._before_stop(seq, seq.token_start(safe - len(prompt)))
                start = min(start, len(prompt) + settled)
                _, safe = self.text_filter.scan(prompt + seq.text[:settled], start, final=False)
            seq.num_safe_characters = safe
            safe -= len(prompt)
        if finish_reason:
            return self._release(seq, num_output, finish_reason)
        if not request.streams:
            return None
        safe = min(safe, settled)
        num_safe = seq.num_released_tokens
        while num_safe < num_output and seq.text_ends[num_safe] <= safe:
            num_safe += 1
        return self._release(seq, num_safe, None)

    def _before_stop(self, seq: Sequence, end: int) -> int:
        """Where in text[:end] a stop string may have begun at its end; else `end`."""
        begun = (
            n
            for stop in seq.params.stop
            for n in range(1, min(len(stop) - 1, end) + 1)
            if seq.text.endswith(stop[:n], 0, end)
        )
        return end - max(begun, default=0)

    def _release(
        self, seq: Sequence, num_tokens: int, finish_reason: FinishReason | None
    ) -> Delta | None:
        """The output tokens up to `num_tokens` that the client has not got yet."""
        released = seq.num_released_tokens
        start = seq.text_ends[released - 1] if released else 0
        if finish_reason:
            end = len(seq.text)
        elif num_tokens == 0 or (end := seq.text_ends[num_tokens - 1]) == start:
            return None  # tokens without text go out with the next text
        seq.num_released_tokens = num_tokens
        return Delta(
            index=seq.request.first_index + seq.index,
            text=seq.text[start:end],
            token_ids=seq.output_token_ids[released:num_tokens],
            logprobs=seq.logprobs[released:num_tokens],
            finish_reason=finish_reason,
        )

    def _roll_back(self, seq: Sequence, hit_start: int) -> Delta | None:
        """Takes the tokens from `hit_start` of the text on back, and bans the first of them
        there; after too many of these the sequence ends with `content_filter`."""
        kept = bisect.bisect_right(seq.text_ends, hit_start)
        seq.banned = {at: ids for at, ids in seq.banned.items() if at <= kept}
        seq.banned.setdefault(kept, []).append(seq.output_token_ids[kept])
        seq.num_rollbacks += 1
        self.num_rollbacks += 1
        seq.request.num_generated_tokens -= len(seq.output_token_ids) - kept
        del seq.output_token_ids[kept:], seq.text_ends[kept:], seq.logprobs[kept:]
        seq.text = seq.text[: seq.text_ends[-1] if kept else 0]
        if seq.num_rollbacks > MAX_ROLLBACKS + kept:
            return self._release(seq, kept, "content_filter")
        seq.decode_stream = None
        for token_id in seq.output_token_ids:
            self._decode(seq, token_id)
        return None

    def _decode(self, seq: Sequence, token_id: int) -> str:
        """The text that the next token completes: whole characters, so often none."""
        if seq.decode_stream is None:
            ids = seq.request.prompt_token_ids[-CONTEXT_TOKENS:]
            # After half a character the stream would give its context out again.
            while ids and self.tokenizer.decode(ids, skip_special_tokens=True).endswith("\ufffd"):
                ids = ids[:-1]
            seq.decode_stream = DecodeStream(ids=ids, skip_special_tokens=True)
        return seq.decode_stream.step(self.tokenizer.backend_tokenizer, token_id) or ""


def _call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear
        loop.call_soon_threadsafe(callback, *args)


def _deliver(outputs: list[tuple[Request, Delta]]) -> None:
    for request, delta in outputs:
        request.deltas.put_nowait(delta)
