"""Runs a loaded model over the running sequences."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.batch import ForwardBatch
from engine.cache import KVCache
from engine.kernels import Kernel
from engine.processor import instruction_set
from engine.request import EngineRequest, Sequence
from engine.sampler import collect_logprobs
from engine.scheduler import SHORT_PROMPT_TOKENS
from engine.weights import prepare_weights


@dataclass(slots=True)
class StepPlan:
    """How one step goes through the model: in which passes, and whose logits come out where."""

    batches: list[ForwardBatch] = field(default_factory=list)
    logit_row_of: list[int] = field(default_factory=list)  # for each running row
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # cache row, to, num_tokens
    scored: list[tuple[EngineRequest, int]] = field(default_factory=list)  # and its first logit row

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
        model.eval().set_attn_implementation("engine_cache")
        self.uses_huge_pages = prepare_weights(model, kernel)
        self.model, self.kernel = model, kernel
        self.max_num_seqs = max_num_seqs
        self.cache = KVCache(model, max_num_seqs, max_model_len)
        # The fewest and most rows of a pass, until they are measured.
        self.min_rows, self.max_rows = 1, max_num_seqs + SHORT_PROMPT_TOKENS

    @property
    def description(self) -> str:
        """How the model is computed: for the log."""
        pages = "2 MiB pages" if self.uses_huge_pages else "ordinary pages"
        return f"{self.model.dtype}, {self.kernel.name}, {instruction_set()}, {pages}"

    def forward(self, running: list[Sequence], num_admitted: int) -> Tensor:
        """Logits (num_running, vocab) float32 of the next token of every running sequence.

        The last `num_admitted` sequences are new: their prompts go through the model too.
        """
        num_decode = len(running) - num_admitted
        self.cache.resize(max(seq.num_tokens for seq in running), num_decode)
        plan = StepPlan()
        self._plan_decode(plan, running[:num_decode])
        self._plan_prompts(plan, running[num_decode:])
        parts = [self.run(batch) for batch in plan.batches]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        for request, first in plan.scored:
            prompt = request.prompt_token_ids
            request.prompt_logprobs = collect_logprobs(
                logits[first : first + len(prompt) - 1],
                prompt[1:],
                request.params.num_prompt_logprobs or 0,
            )
        for source, target, num_tokens in plan.copies:
            self.cache.copy_row(source, target, num_tokens)
        return logits[plan.logit_row_of] if plan.copies or plan.scored else logits

    def _plan_decode(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        """A row for each sequence's last token, in as many passes as it takes."""
        for start in range(0, len(seqs), self.max_rows):
            batch = ForwardBatch(start, min(start + self.max_rows, len(seqs)))
            for row in range(batch.decode_start, batch.decode_end):
                batch.token_ids.append(seqs[row].last_token_id)
                batch.positions.append(seqs[row].num_tokens - 1)
                batch.cache_rows.append(row)
            batch.logit_rows = list(range(len(batch.token_ids)))
            plan.batches.append(batch)
        plan.logit_row_of += range(len(seqs))

    def _plan_prompts(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        """Each request's prompt once; its other sequences get copies of keys and values."""
        for request, group in itertools.groupby(seqs, key=lambda seq: seq.request):
            prompt, row = request.prompt_token_ids, len(plan.logit_row_of)
            num_sequences = len(list(group))
            is_long = len(prompt) > SHORT_PROMPT_TOKENS
            if (
                is_long
                or not plan.batches
                or len(plan.batches[-1].token_ids) + len(prompt) > self.max_rows
            ):
                plan.batches.append(ForwardBatch())
            num_wanted = 1
            if request.params.num_prompt_logprobs is not None and request.prompt_logprobs is None:
                num_wanted = len(prompt)
                plan.scored.append((request, plan.num_logit_rows))
            batch = plan.batches[-1]
            batch.add_prompt(prompt, row)
            end = len(batch.token_ids)
            batch.logit_rows += range(end - num_wanted, end)
            plan.logit_row_of += [plan.num_logit_rows - 1] * num_sequences
            others = range(row + 1, row + num_sequences)
            plan.copies += [(row, other, len(prompt)) for other in others]

    def run(self, batch: ForwardBatch) -> Tensor:
        """Logits (len(batch.logit_rows), vocab) float32 of one forward pass.

        The output layer, too, gets min_rows rows at least: the last one again and again.
        """
        if (missing := self.min_rows - len(batch.token_ids)) > 0:
            batch.add_prompt([0] * missing, self.cache.padding_row)
        num_wanted = len(batch.logit_rows)
        logit_rows = batch.logit_rows + batch.logit_rows[-1:] * (self.min_rows - num_wanted)
        self.cache.begin_pass(batch)
        output = self.model(
            input_ids=torch.tensor([batch.token_ids], device=self.model.device),
            position_ids=self.cache.positions[None],
            logits_to_keep=torch.tensor(logit_rows, device=self.model.device),
            use_cache=False,
            kv_cache=self.cache,
        )
        return output.logits[0, :num_wanted].float()

    def probe(self) -> None:
        """Runs one token; raises what the model raises."""
        batch = ForwardBatch(logit_rows=[0])
        batch.add_prompt([0], self.cache.padding_row)
        self.run(batch)

    @torch.inference_mode()
    def measure_batch_invariance(self) -> tuple[int, int]:
        """(fewest, most) rows a pass may have so that each row's logits stay the same bits.

        Matrix kernels sum in another order from some number of rows on (a single row, more
        than 32, …), which depends on the processor. Where no range is found, every pass
        has exactly 16 rows: the same shape takes the same kernel.
        """
        most = self.max_num_seqs + SHORT_PROMPT_TOKENS
        if self.model.device.type != "cpu":
            return 1, most
        vocab_size = self.model.config.get_text_config().vocab_size
        token_ids = np.random.default_rng(0).integers(0, vocab_size, most).tolist()

        def logits(num_rows: int) -> Tensor:
            num_decode = min(num_rows, self.max_num_seqs)
            batch = ForwardBatch(0, num_decode)
            batch.token_ids = token_ids[:num_decode]
            batch.positions = [0] * num_decode
            batch.cache_rows = list(range(num_decode))
            for token_id in token_ids[num_decode:num_rows]:
                batch.add_prompt([token_id], self.cache.padding_row)
            batch.logit_rows = list(range(num_rows))
            return self.run(batch)

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
