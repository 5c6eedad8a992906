"""Who runs and who waits, with integers: no model, no tensors."""

import pytest

from engine import QueueFullError
from engine.request import Sequence, Status
from engine.scheduler import SHORT_PROMPT_TOKENS, Scheduler
from tests.support import sequences


def prompts(*lengths: int) -> list[Sequence]:
    return [seq for n in lengths for seq in sequences(prompt=[1] * n)]


def test_scheduler_first_come_first_served() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=9)
    seqs = prompts(1, 1, 1)
    for seq in seqs:
        scheduler.add([seq])
    assert scheduler.schedule() == seqs[:2] == scheduler.running
    assert [seq.status for seq in seqs] == [Status.RUNNING, Status.RUNNING, Status.WAITING]


def test_scheduler_full_queue_refuses_at_once_and_queues_nothing() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=2)
    scheduler.add(sequences(count=3))
    scheduler.add(sequences(count=3))
    with pytest.raises(QueueFullError):
        scheduler.add(sequences(count=2))
    assert len(scheduler.waiting) == 6
    assert scheduler.num_waiting_requests() == 2


def test_scheduler_accepts_again_after_admission() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=1)
    scheduler.add(sequences())
    scheduler.schedule()
    scheduler.add(sequences())
    assert scheduler.num_waiting_requests() == 1


def test_scheduler_free_places_are_no_queue() -> None:
    """A burst was refused although there were places for it."""
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=1)
    for _ in range(4):
        scheduler.add(sequences())
    with pytest.raises(QueueFullError):
        scheduler.add(sequences())
    assert len(scheduler.waiting) == 4


def test_scheduler_short_prompts_join_together() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    half = SHORT_PROMPT_TOKENS // 2
    for seq in prompts(half, half, half):
        scheduler.add([seq])
    assert [len(scheduler.schedule()) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("lengths", [(99, 99, 1), (1, 99, 99), (99, 1, 99)])
def test_scheduler_long_prompt_joins_alone(lengths: tuple[int, ...]) -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(*lengths)
    for seq in seqs:
        scheduler.add([seq])
    assert [scheduler.schedule() for _ in seqs] == [[seq] for seq in seqs]


def test_scheduler_sequences_of_one_request_count_once() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    scheduler.add(sequences(prompt=[1] * 99, count=4))
    scheduler.add(sequences())
    assert [len(scheduler.schedule()) for _ in range(2)] == [4, 1]


def test_scheduler_sequences_of_one_request_wait_for_places_apart() -> None:
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=9)
    seqs = sequences(count=4)
    scheduler.add(seqs)
    assert scheduler.schedule() == seqs[:3]
    assert scheduler.schedule() == []
    scheduler.finish(seqs[0])
    assert scheduler.schedule() == seqs[3:]


def test_scheduler_admits_only_requests_before_an_id() -> None:
    """What comes after an unload waits for the next load, also where places are free."""
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(1, 1, 1)
    for seq in seqs:
        scheduler.add([seq])
    assert scheduler.schedule(end_id=seqs[1].request.id) == seqs[:1]
    assert scheduler.schedule() == seqs[1:]


def test_scheduler_takes_out_what_waits() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    seqs = prompts(1, 1, 1, 1)
    for seq in seqs:
        scheduler.add([seq])
    scheduler.schedule()
    assert scheduler.take_waiting(before_id=seqs[2].request.id) == seqs[1:2]
    assert scheduler.take_waiting() == seqs[2:]
    assert not scheduler.waiting
    assert scheduler.running == seqs[:1]


def test_scheduler_drops_what_was_aborted() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    first, second, third = (sequences(count=2) for _ in range(3))
    for seqs in (first, second, third):
        scheduler.add(seqs)
    second[0].request.is_aborted = True
    scheduler.drop_aborted()
    assert list(scheduler.waiting) == first + third


def test_scheduler_finish_moves_last_row_into_the_hole() -> None:
    scheduler = Scheduler(max_num_seqs=4, max_queue_size=9)
    a, b, c, d = seqs = sequences(count=4)
    scheduler.add(seqs)
    scheduler.schedule()
    assert scheduler.finish(b) == (3, 1)
    assert scheduler.running == [a, d, c]
    assert scheduler.finish(c) is None
    assert scheduler.running == [a, d]
    assert b.status is c.status is Status.FINISHED


def test_scheduler_is_finished() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    assert scheduler.is_finished
    (seq,) = sequences()
    scheduler.add([seq])
    assert not scheduler.is_finished
    scheduler.schedule()
    assert not scheduler.is_finished
    scheduler.finish(seq)
    assert scheduler.is_finished
