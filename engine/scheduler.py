"""Who runs in the next step: integers only, no tensors."""

import itertools
import math
from collections import deque
from collections.abc import Sequence as SequenceOf

from engine.request import QueueFullError, Sequence, Status

SHORT_PROMPT_TOKENS = 32  # prompts up to here share a step with the batch; longer ones run alone


class Scheduler:
    """First come, first served.

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

    def take_waiting(self, before_id: float = math.inf) -> list[Sequence]:
        """Takes those of requests with lower ids out of the queue, and returns them."""
        taken = [seq for seq in self.waiting if seq.request.id < before_id]
        self.waiting = deque(seq for seq in self.waiting if seq.request.id >= before_id)
        return taken

    def drop_aborted(self) -> None:
        """Takes those out of the queue whose client has gone."""
        if any(seq.request.is_aborted for seq in self.waiting):
            self.waiting = deque(seq for seq in self.waiting if not seq.request.is_aborted)

    def finish(self, seq: Sequence) -> tuple[int, int] | None:
        """Frees the sequence's row; (from, to) when the last row must move into it."""
        row = self.running.index(seq)
        seq.status = Status.FINISHED
        last = self.running.pop()
        if last is seq:
            return None
        self.running[row] = last
        return len(self.running), row
