"""The worker with a process that makes nothing: who waits, who is told what, what dies."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backends.base import Client, Deadline, DeadlineExceeded, JobFailed, JobRefused, MediaQueueFull
from engine import EngineStoppedError
from media import worker as worker_module
from media.job import Job
from media.messages import Made, Step
from media.worker import DIED, CannotLoad, Worker
from tests.support import until, wait_until


def new_worker(marks: Path, maker: str = "StandIn", max_queue_size: int = 2) -> Worker:
    return Worker("stand-in", f"tests.media.stand_ins:{maker}", {"marks": marks}, 1, max_queue_size)


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def worker(marks: Path) -> Iterator[Worker]:
    worker = new_worker(marks)
    worker.begin_loading()
    worker.finish_loading()
    worker.start()
    yield worker
    worker.stop()


def submit(worker: Worker, prompt: str, steps: int = 3, client: str = "a", **options: Any) -> Job:
    fields = {"prompt": prompt, "steps": steps}
    deadline = Deadline(time.monotonic(), options.pop("timeout_seconds", 60))
    job = Job(worker.name, fields, Client(client), deadline, options.pop("wants_steps", False))
    worker.submit(job)
    return job


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def in_time() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(in_time())


async def made(worker: Worker, prompt: str, **options: Any) -> bytes:
    return (await submit(worker, prompt, **options).complete()).content


def test_job_is_told_of_steps_then_of_its_result(worker: Worker) -> None:
    async def updates() -> list[Any]:
        return [each async for each in submit(worker, "told", wants_steps=True).updates()]

    first, *_, last, result = run(updates())
    assert first == Step(1, 3, b"a preview")
    assert last == Step(3, 3, None)  # the result is there at once
    assert result == Made(b"TOLD", "text/plain")


def test_job_that_wants_no_steps_is_told_of_none(worker: Worker) -> None:
    async def updates() -> list[Any]:
        return [each async for each in submit(worker, "quiet").updates()]

    assert run(updates()) == [Made(b"QUIET", "text/plain")]


@pytest.mark.parametrize(
    ("prompt", "error", "reason"),
    [
        ("lack memory", JobFailed, "There is not enough memory"),
        ("fail", JobFailed, "Model inference failed"),
        ("refuse", JobRefused, "it takes no such thing"),
        ("die", JobFailed, DIED),
    ],
)
def test_job_that_fails_ends_alone(
    worker: Worker, prompt: str, error: type[JobFailed], reason: str
) -> None:
    async def fail_before_another() -> tuple[JobFailed, bytes]:
        failing, other = submit(worker, prompt), submit(worker, "other")
        with pytest.raises(error) as failed:
            await failing.complete()
        return failed.value, (await other.complete()).content

    failed, other = run(fail_before_another())
    assert type(failed) is error
    assert failed.reason.startswith(reason)
    assert other == b"OTHER"


def test_process_that_dies_while_idle_is_started_again(worker: Worker) -> None:
    assert worker._process
    dead = worker._process.pid
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: worker.is_healthy and getattr(worker._process, "pid", dead) != dead)
    assert run(made(worker, "again")) == b"AGAIN"


def test_job_whose_client_leaves_ends_with_its_next_step(worker: Worker, marks: Path) -> None:
    async def leave() -> bytes:
        job = submit(worker, "left", steps=10_000)
        await until((marks / "left-1").exists)
        job.abort()
        return await made(worker, "after it")

    assert run(leave()) == b"AFTER IT"
    assert not (marks / "left-10000").exists()


def test_job_whose_client_leaves_the_queue_is_never_begun(worker: Worker, marks: Path) -> None:
    async def leave() -> int:
        first, second = submit(worker, "first"), submit(worker, "never")
        second.abort()
        num_waiting = worker.num_waiting
        await first.complete()
        await made(worker, "later")
        return num_waiting

    assert run(leave()) <= 1
    assert not (marks / "never-1").exists()


def test_job_past_its_deadline_ends(worker: Worker, marks: Path) -> None:
    async def wait() -> bytes:
        with pytest.raises(DeadlineExceeded):
            await made(worker, "late", steps=10_000, timeout_seconds=0.1)
        return await made(worker, "in time")

    assert run(wait()) == b"IN TIME"
    assert not (marks / "late-10000").exists()


def test_process_that_hangs_after_its_client_has_left_is_ended(
    worker: Worker, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 0.05)

    async def leave() -> bytes:
        job = submit(worker, "hang")
        await until((marks / "hang-1").exists)
        job.abort()
        return await made(worker, "unharmed")

    assert run(leave()) == b"UNHARMED"


def test_queue_has_places_for_each_client_and_twice_as_many_for_all(worker: Worker) -> None:
    async def fill() -> None:
        jobs = [submit(worker, "running", steps=10_000)]
        await until(lambda: worker.num_running and not worker.num_waiting)
        jobs += [submit(worker, "waits", client=client) for client in "aabb"]
        for client in "ac":
            with pytest.raises(MediaQueueFull) as full:
                submit(worker, "one more", client=client)
            assert full.value.retry_after_seconds >= 1
        for job in jobs:
            job.abort()

    run(fill())


def test_clients_take_turns(worker: Worker, marks: Path) -> None:
    """However much one has queued before."""

    async def queue() -> None:
        running = submit(worker, "begun", client="many", steps=10_000)
        await until(lambda: worker.num_running and not worker.num_waiting)
        jobs = [submit(worker, name, client="many") for name in ("second", "third")]
        jobs.append(submit(worker, "guest", client="few"))
        running.abort()
        await asyncio.gather(*(job.complete() for job in jobs))

    run(queue())
    begun = {
        name: (marks / f"{name}-1").stat().st_mtime_ns for name in ("second", "third", "guest")
    }
    assert sorted(begun, key=lambda name: begun[name]) == ["guest", "second", "third"]


def test_stopped_worker_ends_its_jobs_and_starts_again(tmp_path: Path) -> None:
    worker = new_worker(tmp_path)
    worker.start()  # which loads too

    async def stop() -> None:
        jobs = [submit(worker, "running", steps=10_000), submit(worker, "waiting")]
        await until((tmp_path / "running-1").exists)
        await asyncio.to_thread(worker.stop)
        for job in jobs:
            with pytest.raises(EngineStoppedError):
                await job.complete()
        with pytest.raises(EngineStoppedError):
            submit(worker, "refused")

    run(stop())
    worker.start()
    assert run(made(worker, "again")) == b"AGAIN"
    worker.stop()


def test_process_does_not_run_the_main_module_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python main.py` loaded and served everything in the model's process too, and ended there."""
    main_module = ModuleType("__main__")
    main_module.__file__ = str(tmp_path / "main.py")
    (tmp_path / "main.py").write_text("raise SystemExit(7)")
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    worker = new_worker(tmp_path)
    worker.begin_loading()
    worker.finish_loading()
    worker.kill()
    assert worker.loaded
    assert sys.modules["__main__"] is main_module


@pytest.mark.parametrize(
    ("maker", "reason"),
    [
        ("Unloadable", "no such model"),
        ("DiesLoading", "its process ended while it loaded, with status 3"),
    ],
)
def test_model_that_cannot_be_loaded_says_why(tmp_path: Path, maker: str, reason: str) -> None:
    worker = new_worker(tmp_path, maker)
    worker.begin_loading()
    with pytest.raises(CannotLoad) as refused:
        worker.finish_loading()
    assert str(refused.value) == reason
