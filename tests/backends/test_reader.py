"""Work that is left off, taken up again, and shared out among clients."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backends.reader
from backends.base import Client, Deadline, DeadlineExceeded
from backends.reader import Pieces, Reader, find_in_pieces, read_at_once, read_in_pieces
from serving.content_filter import ContentFilter
from tests.support import run, until

LONG = ["x" * 10_000]


def in_time(seconds: float = 60) -> Deadline:
    return Deadline(time.monotonic(), seconds)


def pieces(name: str, count: int, done: list[str], wait: float = 0) -> Pieces[str]:
    for _ in range(count):
        time.sleep(wait)
        done.append(name)
        yield
    return name * 2


async def read(reader: Reader, client: str, work: Pieces[str], seconds: float = 60) -> str:
    return await reader.read(Client(client), in_time(seconds), LONG, work)


@pytest.fixture
def held() -> Iterator[tuple[Reader, threading.Event]]:
    """A reader that is at work until the event is set."""
    reader, may_go_on = Reader(), threading.Event()

    def hold() -> None:
        may_go_on.wait(60)

    reader._thread.submit(hold)
    yield reader, may_go_on
    may_go_on.set()


def test_reader_gives_what_the_pieces_do() -> None:
    def fails() -> Pieces[str]:
        yield
        raise ValueError("a piece failed")

    reader, done = Reader(), list[str]()
    assert run(read(reader, "a", pieces("a", 3, done))) == ["aa"]
    assert done == ["a"] * 3
    (error,) = run(read(reader, "a", fails()))
    assert isinstance(error, ValueError)


def test_reader_reads_what_is_short_at_once() -> None:
    """A thread would take longer."""

    async def ask() -> str:
        work = pieces(threading.current_thread().name, 1, [])
        coroutine = Reader().read(Client("a"), in_time(), ["short"], work)
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)
        return str(stop.value.value)

    assert run(ask()) == ["MainThread" * 2]


def test_reader_takes_clients_in_turn(held: tuple[Reader, threading.Event]) -> None:
    """One client's 256 prompts were read before anybody else's."""
    reader, may_go_on = held
    done: list[str] = []

    async def together() -> None:
        work = [("a", 4), ("a", 1), ("b", 2)]
        reading = [
            asyncio.create_task(read(reader, name, pieces(name, count, done)))
            for name, count in work
        ]
        await until(lambda: sum(map(len, reader._pending.values())) == 3)
        may_go_on.set()
        await asyncio.gather(*reading)

    run(together())
    assert "".join(done) == "ababaaa"


def test_reader_leaves_off_when_nobody_waits(held: tuple[Reader, threading.Event]) -> None:
    """Work went on for clients that had left."""
    reader, may_go_on = held
    done: list[str] = []

    async def leave() -> None:
        reading = [
            asyncio.create_task(read(reader, "a", pieces("a", 1000, done, 0.001))) for _ in range(8)
        ]
        await until(lambda: reader._pending)
        may_go_on.set()
        await until(lambda: done)
        for each in reading:
            each.cancel()
        await until(lambda: not reader._pending)

    assert run(leave()) == [None]
    assert len(done) < 500


def test_reader_keeps_the_deadline(held: tuple[Reader, threading.Event]) -> None:
    (error,) = run(read(held[0], "a", pieces("a", 1, []), seconds=0.01))
    assert isinstance(error, DeadlineExceeded)
    assert error.seconds == 0.01


content_filter = ContentFilter("hate*,violence,kill")
texts = st.lists(st.sampled_from([*"hateviolnckl 1!.-4\u0301", "h.a.t.e", "violence"])).map("".join)


@given(texts)
def test_piecewise_search_finds_what_a_search_of_the_whole_finds(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.reader, "PIECE_CHARACTERS", 3)
        found = read_at_once(find_in_pieces(content_filter, text))
    assert found == (content_filter.find(text) is not None)


@given(texts, texts)
def test_text_read_in_pieces_reads_on_like_one_read_at_once(text: str, more: str) -> None:
    if content_filter.find(text):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.reader, "PIECE_CHARACTERS", 3)
        piecewise = read_at_once(read_in_pieces(content_filter, text))
    whole = content_filter.read(text)
    for reading in (piecewise, whole):
        reading.append(more)
    assert piecewise.scan(None, final=True) == whole.scan(None, final=True)


@pytest.mark.parametrize("filtering", [find_in_pieces, read_in_pieces])
def test_filter_leaves_off_within_a_long_text(filtering: Callable[..., Pieces[object]]) -> None:
    """A megabyte was one piece of up to half a minute, which no deadline ended."""
    text = "h.a.t." * 5000
    assert sum(1 for _ in filtering(content_filter, text)) >= 5
