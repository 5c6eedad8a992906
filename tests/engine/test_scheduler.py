"""Who runs and who waits, with integers: no model, no tensors."""

from collections import Counter

import pytest

from engine import QueueFullError, SamplingParams
from engine.request import Sequence, Status
from engine.scheduler import BRIEF_TOKENS, RECENT_SECONDS, SHORT_PROMPT_TOKENS, Scheduler
from tests.support import sequences

BRIEF = SamplingParams(max_new_tokens=BRIEF_TOKENS)
LONG = SamplingParams(max_new_tokens=BRIEF_TOKENS + 1)


def prompts(*lengths: int) -> list[Sequence]:
    return [seq for n in lengths for seq in sequences(prompt=[1] * n)]


def add(scheduler: Scheduler, seqs: list[Sequence]) -> None:
    """As the engine queues the sequences of a request."""
    scheduler.reserve(seqs[0].request.client, len(seqs))
    scheduler.add(seqs)


def fill(scheduler: Scheduler, client: str) -> int:
    """Queues sequences of a client until one is refused; how many were not."""
    for count in range(1000):
        try:
            add(scheduler, sequences(client=client))
        except QueueFullError:
            return count
    raise AssertionError("it takes any number")


def clients_of(seqs: list[Sequence]) -> str:
    return "".join(seq.request.client for seq in seqs)


def test_scheduler_first_come_first_served() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=9)
    seqs = prompts(1, 1, 1)
    for seq in seqs:
        add(scheduler, [seq])
    assert scheduler.schedule() == seqs[:2] == scheduler.running
    assert [seq.status for seq in seqs] == [Status.RUNNING, Status.RUNNING, Status.WAITING]


def test_scheduler_full_queue_refuses_at_once_and_queues_nothing() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_queue_size=4)
    add(scheduler, sequences(count=3))
    with pytest.raises(QueueFullError):
        add(scheduler, sequences(count=4))
    add(scheduler, sequences(count=3))
    with pytest.raises(QueueFullError):
        add(scheduler, sequences())
    assert scheduler.num_waiting == 6


def test_scheduler_counts_a_place_until_it_is_given_back() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=1)
    scheduler.reserve("a", 2)
    assert scheduler.schedule() == []
    with pytest.raises(QueueFullError):
        scheduler.reserve("a", 1)
    scheduler.give_back("a", 2)
    assert scheduler.num_waiting == 0
    scheduler.reserve("a", 1)


def test_scheduler_accepts_again_after_admission() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=1)
    add(scheduler, sequences())
    scheduler.schedule()
    add(scheduler, sequences())
    assert scheduler.num_waiting == 1


def test_scheduler_free_places_are_no_queue() -> None:
    """A burst was refused although there were places for it."""
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=1)
    for _ in range(4):
        add(scheduler, sequences())
    with pytest.raises(QueueFullError):
        add(scheduler, sequences())
    assert scheduler.num_waiting == 4


def test_scheduler_short_prompts_join_together() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    half = SHORT_PROMPT_TOKENS // 2
    for seq in prompts(half, half, half):
        add(scheduler, [seq])
    assert [len(scheduler.schedule()) for _ in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("lengths", [(99, 99, 1), (1, 99, 99), (99, 1, 99)])
def test_scheduler_long_prompt_joins_alone(lengths: tuple[int, ...]) -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(*lengths)
    for seq in seqs:
        add(scheduler, [seq])
    assert [scheduler.schedule() for _ in seqs] == [[seq] for seq in seqs]


def test_scheduler_sequences_of_one_request_count_once() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    add(scheduler, sequences(prompt=[1] * 99, count=4))
    add(scheduler, sequences())
    assert [len(scheduler.schedule()) for _ in range(2)] == [4, 1]


def test_scheduler_sequences_of_one_request_wait_for_places_apart() -> None:
    scheduler = Scheduler(max_num_seqs=3, max_queue_size=9)
    seqs = sequences(count=4)
    add(scheduler, seqs)
    assert scheduler.schedule() == seqs[:3]
    assert scheduler.schedule() == []
    scheduler.finish(seqs[0])
    assert scheduler.schedule() == seqs[3:]


def test_scheduler_admits_only_requests_before_an_id() -> None:
    """What comes after an unload waits for the next load, also where places are free."""
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(1, 1, 1)
    for seq in seqs:
        add(scheduler, [seq])
    assert scheduler.schedule(end_id=seqs[1].request.id) == seqs[:1]
    assert scheduler.schedule() == seqs[1:]


def test_scheduler_takes_out_what_waits() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    seqs = prompts(1, 1, 1, 1)
    for seq in seqs:
        add(scheduler, [seq])
    scheduler.schedule()
    assert scheduler.take_waiting(before_id=seqs[2].request.id) == seqs[1:2]
    assert scheduler.take_waiting() == seqs[2:]
    assert scheduler.num_waiting == 0
    assert not scheduler.waiting
    assert scheduler.running == seqs[:1]


def test_scheduler_drops_what_was_aborted() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    first, second, third = (sequences(count=2) for _ in range(3))
    for seqs in (first, second, third):
        add(scheduler, seqs)
    second[0].request.is_aborted = True
    scheduler.drop_aborted()
    assert scheduler.num_waiting == 4
    assert scheduler.take_waiting() == first + third


# --- Several clients ------------------------------------------------------------------------------


def test_scheduler_full_queue_of_one_client_takes_another() -> None:
    """One client with many prompts held the queue: everybody else was refused."""
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=8)
    add(scheduler, sequences(client="a"))
    scheduler.schedule()
    assert fill(scheduler, "a") == 8
    assert fill(scheduler, "b") == 4
    assert fill(scheduler, "c") == 2
    assert scheduler.has_room(1)
    add(scheduler, sequences(client="d"))
    assert not scheduler.has_room(1)
    assert scheduler.num_waiting < 2 * 8


def test_scheduler_share_of_the_queue_is_of_what_waits_now() -> None:
    """Once others wait, a client that had all of the queue gets no more until it has its share."""
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=6)
    add(scheduler, sequences(client="a"))
    scheduler.schedule()
    assert (fill(scheduler, "a"), fill(scheduler, "b")) == (6, 3)
    scheduler.give_back("a", 3)
    assert (fill(scheduler, "a"), fill(scheduler, "b")) == (1, 1)


def test_scheduler_serves_clients_in_turns() -> None:
    """A newcomer waited for all that another client had queued before."""
    scheduler = Scheduler(max_num_seqs=1, max_queue_size=9)
    for client in "aaabbc":
        add(scheduler, sequences(client=client))
    order = ""
    while not scheduler.is_finished:
        (seq,) = scheduler.schedule()
        order += seq.request.client
        scheduler.finish(seq)
    assert order == "abcaba"


def test_scheduler_row_goes_to_whoever_has_fewest() -> None:
    scheduler = Scheduler(max_num_seqs=8, max_queue_size=99)
    add(scheduler, sequences(client="a", count=20))
    a = scheduler.schedule()
    assert clients_of(a) == "a" * 8
    for _ in range(8):
        add(scheduler, sequences(client="b"))
    for seq in a[:5]:
        scheduler.finish(seq)
    assert clients_of(scheduler.schedule()) == "bbbab"  # four rows each


def test_scheduler_long_prompt_owes_its_time_to_others() -> None:
    """250 prompts of one client came into as many steps, and made all of them long; later into
    every eighth, which took as long as the other seven together, with three such clients more."""
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=99)
    for client in "ad":
        add(scheduler, sequences(client=client))
    for client in "bbbbc":
        add(scheduler, sequences(client=client, prompt=[1] * (SHORT_PROMPT_TOKENS + 1)))

    def step() -> str:
        clients = clients_of(scheduler.schedule())
        is_long = clients in ("b", "c")
        scheduler.count_step(2.0 if is_long else 1.0)
        return clients

    # b owes 2 s to each of a and d, c to b also.
    assert [step() for _ in range(11)] == [
        "ad",
        "b",
        "c",
        "",
        "",
        "b",
        "",
        "",
        "",
        "",
        "",
    ]
    for seq in [seq for seq in scheduler.running if seq.request.client != "b"]:
        scheduler.finish(seq)
    assert [step() for _ in range(2)] == ["b", "b"]


def test_scheduler_long_prompts_keep_an_eighth_of_the_time() -> None:
    """Among sixty others, a client would have waited for sixty times as long as its prompt took."""
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=99)
    for number in range(40):
        add(scheduler, sequences(client=f"other {number}"))
    while scheduler.waiting:
        scheduler.schedule()
    add(scheduler, sequences(client="b", prompt=[1] * 99))
    add(scheduler, sequences(client="b", prompt=[1] * 99))
    assert clients_of(scheduler.schedule()) == "b"
    scheduler.count_step(2.0)
    for _ in range(7):
        assert scheduler.schedule() == []
        scheduler.count_step(2.0)
    assert clients_of(scheduler.schedule()) == "b"


def test_scheduler_gives_nobody_more_than_its_part_while_others_are_there() -> None:
    """One client's 62 sequences made every step of two others four times as long."""
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=99)
    for client, count in (("a", 99), ("b", 1), ("c", 1)):
        add(scheduler, sequences(BRIEF, client=client, count=count))
    assert Counter(clients_of(scheduler.schedule())) == {"a": 22, "b": 1, "c": 1}
    for seq in [seq for seq in scheduler.running if seq.request.client != "a"]:
        scheduler.finish(seq)
    scheduler.count_step(RECENT_SECONDS)
    assert clients_of(scheduler.schedule()) == "a" * 42


def test_scheduler_keeps_the_parts_of_those_who_were_here_a_moment_ago() -> None:
    """The texts of ten clients ended in one step; before they asked again, three others had taken
    all rows for seconds."""
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=999)
    for client in "abcdefghij":
        add(scheduler, sequences(BRIEF, client=client))
    ended = scheduler.schedule()
    for client in "xyz":
        add(scheduler, sequences(BRIEF, client=client, count=64))
    assert Counter(clients_of(scheduler.schedule())) == {"x": 5, "y": 5, "z": 5}
    for seq in ended:
        scheduler.finish(seq)
    scheduler.count_step(RECENT_SECONDS / 2)
    assert scheduler.schedule() == []
    for client in "abcdefghij":
        add(scheduler, sequences(BRIEF, client=client))
    assert sorted(clients_of(scheduler.schedule())) == list("abcdefghij")


def test_scheduler_keeps_rows_for_newcomers() -> None:
    """All rows were one client's for as long as its texts were long."""
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=99)
    add(scheduler, sequences(LONG, client="a", count=99))
    assert len(scheduler.schedule()) == 56
    add(scheduler, sequences(LONG, client="b", count=9))
    assert clients_of(scheduler.schedule()) == "bbbbbbb"
    add(scheduler, sequences(LONG, client="c"))
    assert clients_of(scheduler.schedule()) == "c"


def test_scheduler_gives_all_rows_to_who_frees_them_soon() -> None:
    scheduler = Scheduler(max_num_seqs=64, max_queue_size=99)
    add(scheduler, sequences(BRIEF, client="a", count=99))
    assert len(scheduler.schedule()) == 64


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7])
def test_scheduler_few_rows_are_all_used(max_num_seqs: int) -> None:
    scheduler = Scheduler(max_num_seqs, max_queue_size=99)
    for client in "ba":
        add(scheduler, sequences(LONG, client=client, count=9))
    assert len(scheduler.schedule()) == max_num_seqs


def test_scheduler_request_before_an_id_runs_past_clients_whose_requests_are_not() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    older, newer = sequences(client="a"), sequences(client="b")
    for seqs in (newer, older):
        add(scheduler, seqs)
    end_id = newer[0].request.id
    assert scheduler.has_waiting(end_id)
    assert scheduler.schedule(end_id) == older
    assert not scheduler.has_waiting(end_id)
    assert scheduler.has_waiting()


def test_scheduler_finish_moves_last_row_into_the_hole() -> None:
    scheduler = Scheduler(max_num_seqs=4, max_queue_size=9)
    a, b, c, d = seqs = sequences(count=4)
    add(scheduler, seqs)
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
    add(scheduler, [seq])
    assert not scheduler.is_finished
    scheduler.schedule()
    assert not scheduler.is_finished
    scheduler.finish(seq)
    assert scheduler.is_finished


def test_scheduler_counts_of_a_prompt_what_is_not_known() -> None:
    """So a long prompt runs beside others; what is copied of it counts for a little."""
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    seqs = prompts(200, 200, 200, 200)
    for seq in seqs:
        add(scheduler, [seq])
    num_cached = dict(zip([seq.request.id for seq in seqs], (0, 192, 192, 192), strict=True))
    admitted = [scheduler.schedule(num_cached_tokens=lambda r: num_cached[r.id]) for _ in range(3)]
    assert admitted == [seqs[:1], seqs[1:3], seqs[3:]]
    assert [seq.num_cached_tokens for seq in seqs] == [0, 192, 192, 192]


def test_scheduler_lets_a_client_that_owes_time_run_what_is_known() -> None:
    scheduler = Scheduler(max_num_seqs=9, max_queue_size=9)
    add(scheduler, sequences(client="b"))
    scheduler.schedule()
    for _ in range(2):
        add(scheduler, sequences(prompt=[1] * 99, client="a"))
    assert clients_of(scheduler.schedule()) == "a"
    scheduler.count_step(1.0)
    assert clients_of(scheduler.schedule()) == ""
    assert clients_of(scheduler.schedule(num_cached_tokens=lambda request: 96)) == "a"
