"""Who runs in the next step: numbers only, no tensors."""

import math
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from engine.request import EngineRequest, QueueFullError, Sequence, Status

SHORT_PROMPT_TOKENS = 32  # prompts up to here share a step with the batch; longer ones run alone
MOST_FOR_EACH_FREE = 7  # of something that is shared a client has at most so many for each free one
MOST_OWED = 7  # times what a long prompt took: whoever else is there, a client has an eighth
COPIED_TOKENS = 64  # of a prompt, which was known, take no longer than one that is computed
RECENT_SECONDS = 0.25  # of steps: who was here so lately may come again at once
BRIEF_TOKENS = 64  # who generates no more than so many frees its row soon


def is_within_share(num_own: int, num_free: int) -> bool:
    """Whether a client that has so many may take one more: seven eighths are for one client, and
    less for each of several, so that whoever comes next finds one free."""
    return num_own < MOST_FOR_EACH_FREE * num_free


def is_long(num_computed_tokens: int) -> bool:
    """Whether so many tokens of a prompt make a step long; those that are known do not count."""
    return num_computed_tokens > SHORT_PROMPT_TOKENS


class Scheduler:
    """Shares rows and queue among clients; of each client, first come, first served.

    `running[i]` owns row i of the cache: rows 0 … num_running-1 are always the running
    ones, because the last row moves into the hole that a finished sequence leaves.

    Rows: a free one goes to the client that has the fewest, in turns where several do, and to none
    that has its even part of all rows already: a row more makes each step longer for everybody, so
    rows that others do not need stay free. Who was here a moment ago still counts for that: texts
    that began together end together, and then their clients ask for more. Beyond `is_within_share`
    a client, also one that is alone, gets rows for brief sequences only: so a newcomer finds one
    free, or one that soon will be.

    Queue: counted in sequences for which no row is free, those of `reserve` among them. A client
    may have as many as places are left then, of twice max_queue_size: max_queue_size if it is
    alone, half of the rest if another one has so many already.
    """

    def __init__(self, max_num_seqs: int, max_queue_size: int):
        self.max_num_seqs = max_num_seqs
        self.max_queue_size = max_queue_size
        self.running: list[Sequence] = []
        self.waiting: dict[str, deque[Sequence]] = {}  # by client, who was served last at the end
        self.num_queued: Counter[str | None] = Counter()  # of each client: reserved and waiting
        self.step_seconds = 0.0  # that all steps have taken
        self.long_prompt_client: str | None = None  # whose prompt made the last step long
        self.owing_clients: dict[str, float] = {}  # until step_seconds have come to so much
        self.recent_clients: dict[str, float] = {}  # and what step_seconds were when they were here

    @property
    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    @property
    def num_waiting(self) -> int:
        return self.num_queued.total()

    def has_room(self, num_sequences: int, client: str | None = None) -> bool:
        """Whether the queue takes so many more of a client; None: of one that has none in it."""
        num_free = self.max_num_seqs - len(self.running)
        num_own = max(0, self.num_queued[client] + num_sequences - num_free)
        num_all = max(0, self.num_waiting + num_sequences - num_free)
        return num_own <= 2 * self.max_queue_size - num_all

    def reserve(self, client: str, num_sequences: int) -> None:
        """Counts so many sequences as waiting. Raises QueueFullError, then counts none."""
        if not self.has_room(num_sequences, client):
            raise QueueFullError("too many sequences are waiting already")
        self.num_queued[client] += num_sequences

    def give_back(self, client: str, num_sequences: int) -> None:
        """Counts so many no more: reserved ones that do not come, or what has left the queue."""
        self.num_queued[client] -= num_sequences
        if not self.num_queued[client]:
            del self.num_queued[client]

    def add(self, seqs: SequenceOf[Sequence]) -> None:
        """Queues sequences of one client, for which it has reserved places."""
        self.waiting.setdefault(seqs[0].request.client, deque()).extend(seqs)

    def has_waiting(self, before_id: float = math.inf) -> bool:
        """Whether a request with a lower id waits."""
        return any(queue[0].request.id < before_id for queue in self.waiting.values())

    def schedule(
        self,
        end_id: float = math.inf,
        num_cached_tokens: Callable[[EngineRequest], int] = lambda request: 0,
    ) -> list[Sequence]:
        """Moves waiting sequences to free rows and returns them, in row order; of requests with
        ids below end_id alone.

        num_cached_tokens: how many of a request's prompt need not be computed. Each sequence is
        told of them, and what is said of prompts below is said of the rest.

        One step takes prompts of SHORT_PROMPT_TOKENS together, or one longer prompt, so
        that the running ones never wait for more than one prompt. While others are running a
        client waits after a longer one, see `count_step`: else one that sends hundreds would make
        all steps of others long. Sequences that share a prompt count once, and run together where
        rows are free.
        """
        admitted: list[Sequence] = []
        num_cached: dict[int, int] = {}  # by the request's id
        budget_tokens = SHORT_PROMPT_TOKENS
        self.long_prompt_client = None
        self.owing_clients = {
            client: until_seconds
            for client, until_seconds in self.owing_clients.items()
            if until_seconds > self.step_seconds
        }
        num_rows = Counter(seq.request.client for seq in self.running)
        self.recent_clients |= dict.fromkeys(num_rows.keys() | self.waiting, self.step_seconds)
        self.recent_clients = {
            client: seconds
            for client, seconds in self.recent_clients.items()
            if seconds > self.step_seconds - RECENT_SECONDS
        }
        even_part = math.ceil(self.max_num_seqs / max(1, len(self.recent_clients)))

        def num_computed_tokens(request: EngineRequest) -> int:
            if request.id not in num_cached:
                num_cached[request.id] = num_cached_tokens(request)
            return request.num_prompt_tokens - num_cached[request.id]

        def may_run(client: str) -> bool:
            seq, num_own = self.waiting[client][0], num_rows[client]
            if num_own >= even_part or not self._may_run(seq, num_own, end_id):
                return False
            is_in_turn = client not in self.owing_clients or num_rows.total() == num_own
            return is_in_turn or not is_long(num_computed_tokens(seq.request))

        while clients := [client for client in self.waiting if may_run(client)]:
            client = min(clients, key=num_rows.__getitem__)
            queue = self.waiting[client]
            request = queue[0].request
            budget_tokens -= num_computed_tokens(request)
            budget_tokens -= num_cached[request.id] // COPIED_TOKENS
            if admitted and budget_tokens < 0:
                break
            while queue and queue[0].request is request and may_run(client):
                seq = queue.popleft()
                seq.status, seq.num_cached_tokens = Status.RUNNING, num_cached[request.id]
                self.running.append(seq)
                admitted.append(seq)
                num_rows[client] += 1
                self.give_back(client, 1)
            del self.waiting[client]
            if queue:
                self.waiting[client] = queue
            if is_long(num_computed_tokens(request)):
                self.long_prompt_client = client
        return admitted

    def count_step(self, seconds: float) -> None:
        """Takes note of how long the step took for which `schedule` chose.

        Who had a long prompt in it owes as much time to each other client that was running, to
        MOST_OWED of them at most: the next one has to wait until steps have taken that long.
        """
        self.step_seconds += seconds
        client = self.long_prompt_client
        if client is not None:
            num_others = len({seq.request.client for seq in self.running} - {client})
            owed_seconds = seconds * min(num_others, MOST_OWED)
            self.owing_clients[client] = self.step_seconds + owed_seconds

    def _may_run(self, seq: Sequence, num_own: int, end_id: float) -> bool:
        num_free = self.max_num_seqs - len(self.running)
        if num_free <= 0 or seq.request.id >= end_id:
            return False
        return seq.params.max_new_tokens <= BRIEF_TOKENS or is_within_share(num_own, num_free)

    def take_waiting(self, before_id: float = math.inf) -> list[Sequence]:
        """Takes those of requests with lower ids out of the queue, and returns them."""
        return self._take(lambda seq: seq.request.id < before_id)

    def drop_aborted(self) -> None:
        """Takes those out of the queue whose client has gone."""
        self._take(lambda seq: seq.request.is_aborted)

    def _take(self, is_taken: Callable[[Sequence], bool]) -> list[Sequence]:
        taken = [seq for queue in self.waiting.values() for seq in queue if is_taken(seq)]
        for client in {seq.request.client for seq in taken}:
            queue = self.waiting[client]
            kept = deque(seq for seq in queue if not is_taken(seq))
            self.give_back(client, len(queue) - len(kept))
            if kept:
                self.waiting[client] = kept
            else:
                del self.waiting[client]
        return taken

    def finish(self, seq: Sequence) -> tuple[int, int] | None:
        """Frees the sequence's row; (from, to) when the last row must move into it."""
        row = self.running.index(seq)
        seq.status = Status.FINISHED
        last = self.running.pop()
        if last is seq:
            return None
        self.running[row] = last
        return len(self.running), row
