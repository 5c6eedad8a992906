"""Runs a loaded model over the running sequences."""

import itertools
import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel

from engine.activations import RowwiseActivation
from engine.attention import supply_attention
from engine.batch import ForwardBatch
from engine.cache import KVCache
from engine.kernels import Kernel
from engine.prefix_cache import BlockScores, PrefixCache, ScoresKind, split_scores
from engine.processor import instruction_set
from engine.request import EngineRequest, InferenceError, PositionLogprobs, Sequence
from engine.sampler import NO_LOGPROBS, collect_logprobs
from engine.scheduler import SHORT_PROMPT_TOKENS, is_long
from engine.weights import prepare_weights

logger = logging.getLogger("engine")

SCORED_TOKENS = 256  # of a prompt, whose logits are there at a time


@dataclass(slots=True)
class StepPlan:
    """How one step goes through the model: in which passes, and whose logits come out where."""

    batches: list[ForwardBatch] = field(default_factory=list)
    logit_row_of: list[int] = field(default_factory=list)  # for each running row
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # cache row, to, num_tokens
    # Each prompt, its cache row, and how many of its tokens are not computed.
    prompts: list[tuple[EngineRequest, int, int]] = field(default_factory=list)
    # Requests whose prompt's tokens get log probabilities, in which pass its rows begin where, and
    # with which token.
    scored: list[tuple[EngineRequest, ForwardBatch, int, int]] = field(default_factory=list)
    # What comes of these, for the prefix cache: by the request's id, and the block's number.
    scores: dict[int, dict[int, BlockScores]] = field(default_factory=dict)

    @property
    def num_logit_rows(self) -> int:
        return sum(len(batch.logit_rows) for batch in self.batches)


class ModelRunner:
    """One model with its packed weights and its cache.

    model: changed in place; it belongs to the runner from here on.
    max_num_seqs: rows of the cache. max_model_len: tokens that each has room for.
    kernel: how its products are computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_num_seqs: int,
        max_model_len: int,
        kernel: Kernel,
    ):
        model.eval()
        self.uses_huge_pages = prepare_weights(model, kernel)
        self.model, self.kernel = model, kernel
        # Of other models, what is between the products is not known to be.
        self.is_exact = (
            kernel.is_exact
            and isinstance(model, GPT2LMHeadModel)
            and all(isinstance(block.mlp.act, RowwiseActivation) for block in model.transformer.h)
        )
        self.max_num_seqs = max_num_seqs
        self.cache = KVCache(model, max_num_seqs, max_model_len, attends_in_blocks=self.is_exact)
        self.prefixes: PrefixCache | None = None
        supply_attention(model, self.cache)
        # The fewest and most rows of a pass, until they are measured.
        self.min_rows, self.max_rows = 1, max_num_seqs + SHORT_PROMPT_TOKENS
        # Whether with so many rows a row's bits do not depend on its company; so is that.
        self.is_invariant = self.is_exact

    @property
    def description(self) -> str:
        """How the model is computed: for the log."""
        pages = "2 MiB pages" if self.uses_huge_pages else "ordinary pages"
        return f"{self.model.dtype}, {self.kernel.name}, {instruction_set()}, {pages}"

    def num_cached_tokens(self, request: EngineRequest) -> int:
        """How many of a prompt's tokens need not be computed."""
        if not self.prefixes:
            return 0
        kind = _scores_kind(request) if _is_scored(request) else None
        prompt = request.prompt_token_ids
        return self.prefixes.num_cached_tokens(prompt, request.cache_salt, kind)

    def forward(
        self, running: list[Sequence], num_admitted: int, drafts: SequenceOf[list[int]] = ()
    ) -> Tensor:
        """Logits (num_running, vocab) float32 of the next token of every running sequence.

        The last `num_admitted` sequences are new: their prompts go through the model too.
        drafts: if there are any, a list for each running sequence, none of which is new: what may
        come next. Behind the others are the logits of what follows each of these tokens.
        """
        num_decode = len(running) - num_admitted
        num_drafted = max(map(len, drafts), default=0)
        self.cache.resize(max(seq.num_tokens for seq in running) + num_drafted, num_decode)
        for row, seq in enumerate(running[:num_decode]):
            if seq.num_tokens - 1 == self.cache.rope_switch_tokens:
                self._renew(row, seq)
        plan = StepPlan()
        self._plan_decode(plan, running[:num_decode])
        if drafts:
            _plan_drafts(plan.batches[0], running, drafts)
        self._plan_prompts(plan, running[num_decode:])
        for request, row, start in plan.prompts:
            if start and self.prefixes:
                self.prefixes.load(request.prompt_token_ids, request.cache_salt, start, row)
        parts = []
        for batch in plan.batches:
            is_scored = any(of is batch for _, of, _, _ in plan.scored)
            parts.append(self._run_and_score(plan, batch) if is_scored else self.run(batch))
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        for request, row, _ in plan.prompts:
            if self.prefixes:
                scores = plan.scores.get(request.id)
                self.prefixes.store(request.prompt_token_ids, request.cache_salt, row, scores)
        for source, target, num_tokens in plan.copies:
            self.cache.copy_row(source, target, num_tokens)
        return logits[plan.logit_row_of] if plan.copies else logits

    def num_tokens_until_renewal(self, seq: Sequence) -> float:
        """How many tokens a sequence may gain before its keys and values are computed anew."""
        switch = self.cache.rope_switch_tokens
        return math.inf if switch is None or seq.num_tokens > switch else switch - seq.num_tokens

    def _renew(self, row: int, seq: Sequence) -> None:
        """Computes a sequence's keys and values anew, for the length that it has now."""
        batch = ForwardBatch(logit_rows=[0])
        batch.add_prompt([*seq.request.prompt_token_ids, *seq.output_token_ids], row)
        self.run(batch)

    def _plan_decode(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        """A row for each sequence's last token, in as many passes as it takes."""
        for start in range(0, len(seqs), self.max_rows):
            batch = ForwardBatch()
            rows = range(start, min(start + self.max_rows, len(seqs)))
            last_token_ids = [seqs[row].last_token_id for row in rows]
            batch.add_run(rows, last_token_ids, [seqs[row].num_tokens - 1 for row in rows])
            batch.logit_rows = list(range(len(rows)))
            plan.batches.append(batch)
        plan.logit_row_of += range(len(seqs))

    def _plan_prompts(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        """What is not known of each request's prompt, once; its other sequences get copies of keys
        and values."""
        for request, group in itertools.groupby(seqs, key=lambda seq: seq.request):
            prompt, row = request.prompt_token_ids, len(plan.logit_row_of)
            group_seqs = list(group)
            num_sequences, start = len(group_seqs), group_seqs[0].num_cached_tokens
            num_rows = len(prompt) - start
            if (
                is_long(num_rows)
                or not plan.batches
                or len(plan.batches[-1].token_ids) + num_rows > self.max_rows
            ):
                plan.batches.append(ForwardBatch())
            batch = plan.batches[-1]
            if _is_scored(request):
                plan.scored.append((request, batch, len(batch.token_ids), start))
            batch.add_prompt(prompt[start:], row, start)
            plan.prompts.append((request, row, start))
            batch.logit_rows.append(len(batch.token_ids) - 1)
            plan.logit_row_of += [plan.num_logit_rows - 1] * num_sequences
            others = range(row + 1, row + num_sequences)
            plan.copies += [(row, other, len(prompt)) for other in others]

    def run(self, batch: ForwardBatch) -> Tensor:
        """Logits (len(batch.logit_rows), vocab) float32 of one forward pass.

        The output layer, too, gets min_rows rows at least.
        """
        logits = self._compute(batch, self._padded(batch.logit_rows))
        return logits[: len(batch.logit_rows)].float()

    def _compute(self, batch: ForwardBatch, rows: list[int]) -> Tensor:
        """What the model gives for these rows of a pass: (len(rows), vocab), its dtype."""
        if (missing := self.min_rows - len(batch.token_ids)) > 0:
            batch.add_prompt([0] * missing, self.cache.padding_row)
        self.cache.begin_pass(batch)
        output = self.model(
            input_ids=torch.tensor([batch.token_ids], device=self.model.device),
            # Without one, transformers makes masks of the positions themselves.
            attention_mask=self.cache.positions.new_ones(1, len(batch.token_ids)),
            position_ids=self.cache.positions[None],
            logits_to_keep=torch.tensor(rows, device=self.model.device),
            use_cache=False,
            kv_cache=self.cache,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _padded(self, rows: list[int]) -> list[int]:
        """Rows for the output layer: the last one again and again where they are too few."""
        return rows + rows[-1:] * (self.min_rows - len(rows))

    def _run_and_score(self, plan: StepPlan, batch: ForwardBatch) -> Tensor:
        """As `run`; and gives the scored requests in this pass their log probabilities."""
        hidden, head = self._hidden_states(batch)
        for request, of, first, start in plan.scored:
            if of is batch:
                rows = hidden[first : first + request.num_prompt_tokens - start]
                plan.scores[request.id] = self._score(request, start, rows, head)
        logits = head(hidden[self._padded(batch.logit_rows)])
        return logits[: len(batch.logit_rows)].float()

    def _score(
        self, request: EngineRequest, start: int, hidden: Tensor, head: Callable[[Tensor], Tensor]
    ) -> dict[int, BlockScores]:
        """Gives a request the log probabilities of its prompt, of which those before token `start`
        are known. For the prefix cache, the same of blocks.

        hidden: (num_rows, hidden_size), what the output layer gets, from token `start` on. The
        layer works in pieces: the logits of 32,000 tokens of a vocabulary of 150,000 would take
        20 GB.
        """
        prompt, kind = request.prompt_token_ids, _scores_kind(request)
        logprobs: list[PositionLogprobs] = []
        request.prompt_logprobs = logprobs
        if start and self.prefixes:
            known = self.prefixes.scores(prompt, request.cache_salt, start)
            logprobs += [each for block in known for each in block.logprobs]
            hidden = torch.cat((known[-1].last_hidden[None], hidden))
        for at in range(0, len(hidden) - 1, SCORED_TOKENS):
            next_token_ids = prompt[len(logprobs) + 1 :][:SCORED_TOKENS]
            rows = list(range(at, at + len(next_token_ids)))
            logits = head(hidden[self._padded(rows)])[: len(rows)]
            for each in collect_logprobs(logits, next_token_ids, *kind):
                if each is None:
                    request.failure = InferenceError(NO_LOGPROBS)
                    return {}
                logprobs.append(each)
        return split_scores(logprobs, kind, hidden) if self.prefixes else {}

    def _hidden_states(self, batch: ForwardBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the output layer gets, of every row, and the output layer."""
        rows = list(range(len(batch.token_ids)))
        if getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            return self._compute(batch, rows), lambda logits: logits  # they are bent behind it
        head = self.model.get_output_embeddings()
        self.model.set_output_embeddings(nn.Identity())
        try:
            return self._compute(batch, rows), head.forward
        finally:
            self.model.set_output_embeddings(head)

    def probe(self) -> None:
        """Runs one token; raises what the model raises, ValueError if it computes no numbers."""
        batch = ForwardBatch(logit_rows=[0])
        batch.add_prompt([0], self.cache.padding_row)
        if not self.run(batch).amax().isfinite():
            raise ValueError("the model's logits are NaN or infinite")

    @torch.inference_mode()
    def measure_batch_invariance(self) -> tuple[int, int]:
        """(fewest, most) rows a pass may have so that each row's logits stay the same bits.

        Matrix kernels sum in another order from some number of rows on (a single row, more
        than 32, …), which depends on the processor. Where no range is found, every pass
        has exactly 16 rows: the same shape takes the same kernel. No range helps a mixture of
        experts, each of which gets as many rows as there are tokens for it: a WARNING says so.
        Where rows are exact by construction, there is nothing to measure.
        """
        most = self.max_num_seqs + SHORT_PROMPT_TOKENS
        if self.model.device.type != "cpu" or self.is_exact:
            return 1, most
        vocab_size = self.model.config.get_text_config().vocab_size
        token_ids = np.random.default_rng(0).integers(0, vocab_size, most).tolist()

        def logits(token_ids: list[int]) -> Tensor:
            num_rows = len(token_ids)
            num_decode = min(num_rows, self.max_num_seqs)
            batch = ForwardBatch()
            batch.add_run(range(num_decode), token_ids[:num_decode], [0] * num_decode)
            for token_id in token_ids[num_decode:]:
                batch.add_prompt([token_id], self.cache.padding_row)
            batch.logit_rows = list(range(num_rows))
            return self.run(batch)

        sizes = [n for n in (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 33, 48, 64) if n < most] + [most]
        measured = {n: logits(token_ids[:n]) for n in sizes}

        def in_other_company(num_rows: int, num_kept: int) -> Tensor:
            return logits(token_ids[:num_kept] + token_ids[:1] * (num_rows - num_kept))

        if not all(
            torch.equal(in_other_company(n, n // 2)[: n // 2], measured[n][: n // 2])
            for n in (4, 8, 16, most)
        ):
            logger.warning(
                "%s: the same seed gives the same text only for requests that run alone, as what "
                "is computed for a token depends on which others are there",
                type(self.model).__name__,
            )
            return 1, most
        self.is_invariant = True
        for fewest in (1, 2, 4):
            last = fewest
            for smaller, larger in itertools.pairwise(n for n in sizes if n >= fewest):
                if not torch.equal(measured[larger][:smaller], measured[smaller]):
                    break
                last = larger
            if last >= min(16, most):
                return fewest, last
        return 16, 16


def _is_scored(request: EngineRequest) -> bool:
    """Whether the tokens of its prompt are to get log probabilities, and have none yet."""
    return request.params.num_prompt_logprobs is not None and request.prompt_logprobs is None


def _scores_kind(request: EngineRequest) -> ScoresKind:
    return request.params.num_prompt_logprobs or 0, request.params.ranks_prompt


def _plan_drafts(
    batch: ForwardBatch, running: list[Sequence], drafts: SequenceOf[list[int]]
) -> None:
    """Adds rows for what is drafted, to a pass that has one for each running sequence: first the
    first token of every draft, then the second of those that have one, …: a cache row takes one
    query at a time."""
    at: dict[tuple[int, int], int] = {}  # in the pass, by sequence and place in its draft
    for depth in range(max(map(len, drafts))):
        for rows in _runs([row for row, draft in enumerate(drafts) if len(draft) > depth]):
            at |= {(row, depth): len(batch.token_ids) + i for i, row in enumerate(rows)}
            token_ids = [drafts[row][depth] for row in rows]
            batch.add_run(rows, token_ids, [running[row].num_tokens + depth for row in rows])
    batch.logit_rows += [at[key] for key in sorted(at)]


def _runs(rows: list[int]) -> list[range]:
    """The same numbers, which ascend, as ranges."""
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs
