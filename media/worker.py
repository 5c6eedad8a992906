"""The process of one model, seen from the service: who waits for it, and what becomes of it."""

import atexit
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from logging import getLogger
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from backends.base import JobFailed, JobRefused, MediaQueueFull
from engine import EngineStoppedError
from media.job import Job
from media.messages import Cancel, Cancelled, Failed, Loaded, Made, Order, Step, Unloadable
from media.process import serve

CANCEL_SECONDS = 60.0  # that a step may still take, before the process is ended
MAX_PAUSE_SECONDS = 30.0  # between attempts to load the model again
POLL_SECONDS = 1.0  # between looks at whether the process lives, or a cancelled step hangs
DIED = "The model's process died while it made this; it starts again"

logger = getLogger("service")
main_module_lock = threading.Lock()


@contextmanager
def without_main_module() -> Iterator[None]:
    """Around the start of a process: multiprocessing has it run the module that this one was
    started with once more, and `python main.py` would load and serve everything again there."""
    with main_module_lock:
        module = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = module


class CannotLoad(Exception):
    """The model cannot be loaded; the message is one line."""


class Worker:
    """A queue of jobs, the process that works them off, and the thread between the two.

    maker, options, num_threads: as `serve` in process.py takes them. max_queue_size: jobs of one
    client that may wait; of all clients twice as many. on_end is told of every job that was begun:
    what became of it, and how many seconds it took.
    """

    def __init__(
        self,
        name: str,
        maker: str,
        options: dict[str, Any],
        num_threads: int,
        max_queue_size: int,
        on_end: Callable[[str, float], None] = lambda outcome, seconds: None,
    ):
        self.name = name
        self.arguments = (maker, options, num_threads)
        self.max_queue_size = max_queue_size
        self.on_end = on_end
        self.loaded: Loaded | None = None  # what the model takes, once that is known
        self.is_healthy = False
        self._changed = threading.Condition()  # guards all that follows
        self._is_stopped = True
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._turns: dict[str, int] = {}  # the last order of each client that still waits
        self._num_orders = 0
        self._job_seconds = 1.0  # that the last one took
        self._cancelled_seconds: float | None = None  # when the order under way was cancelled
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        atexit.register(self.kill)  # it leaves signals to us

    # --- Whoever asks ---------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return int(self._running is not None)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues it. Raises MediaQueueFull, EngineStoppedError."""
        with self._changed:
            if self._is_stopped:
                raise EngineStoppedError
            of_client = [each.client.identity for each in self._waiting].count(job.client.identity)
            if of_client >= self.max_queue_size or len(self._waiting) >= 2 * self.max_queue_size:
                raise MediaQueueFull(max(1, round(self._job_seconds)))
            job.on_abort = partial(self._abort, job)
            self._waiting.append(job)
            self._changed.notify_all()

    def _abort(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is self._running and self._connection:
                self._cancelled_seconds = time.monotonic()
                with suppress(OSError):  # it has died, which the thread is about to find
                    self._connection.send(Cancel(self._num_orders))

    # --- Its life -------------------------------------------------------------------------------

    def begin_loading(self) -> None:
        """Starts the process, which then loads the model."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, *self.arguments), name=f"media-{self.name}", daemon=True
        )
        with without_main_module():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def finish_loading(self) -> None:
        """Waits until the model is there. Raises CannotLoad."""
        assert self._connection
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            message = Unloadable(f"its process ended while it loaded, {self._bury()}")
        if isinstance(message, Unloadable):
            self._bury()
            raise CannotLoad(message.reason)
        self.loaded, self.is_healthy = message, True

    def start(self) -> None:
        """Takes jobs, again after `stop`."""
        with self._changed:
            if self._is_stopped:
                self._is_stopped = False
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Refuses jobs from here on; ends those it has with EngineStoppedError, and the process."""
        with self._changed:
            self._is_stopped = True
            jobs, self._waiting = self._waiting, []
            self._changed.notify_all()
            self.kill()
        for job in jobs:
            job.tell(EngineStoppedError())
        if self._thread:
            self._thread.join()

    def kill(self) -> None:
        """Ends the process, whatever it is at; the thread finds its end."""
        if self._process and self._process.is_alive():
            self._process.kill()

    def _bury(self) -> str:
        """Puts away what is left of the process. Says how it ended."""
        with self._changed:
            process, connection = self._process, self._connection
            self._process = self._connection = None
            self.is_healthy = False
        if not process or not connection:
            return "never begun"
        process.kill()
        process.join()
        connection.close()
        code = process.exitcode or 0
        return f"by signal {-code}" if code < 0 else f"with status {code}"

    # --- The thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        pause_seconds = 1.0
        while not self._is_stopped:
            try:
                if not self._process:
                    self._load_again()
            except CannotLoad as error:
                logger.error("%s cannot be loaded again: %s", self.name, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopped, pause_seconds)
                pause_seconds = min(2 * pause_seconds, MAX_PAUSE_SECONDS)
                continue
            pause_seconds = 1.0
            if job := self._next():
                self._work_off(job)
        self._bury()

    def _load_again(self) -> None:
        with self._changed:
            if self._is_stopped:
                return
            self.begin_loading()
        self.finish_loading()
        logger.info("%s is loaded again", self.name)

    def _next(self) -> Job | None:
        """The job whose turn it is, already ordered; None if there is none for a while, or if the
        process has died meanwhile."""
        with self._changed:
            has_come = self._changed.wait_for(
                lambda: self._waiting or self._is_stopped, POLL_SECONDS
            )
            if self._process and not self._process.is_alive():
                logger.error("the process of %s ended, %s", self.name, self._bury())
                return None
            if not has_come or self._is_stopped or not self._connection:
                return None
            # Whoever has had no turn for longest.
            job = min(self._waiting, key=lambda each: self._turns.get(each.client.identity, 0))
            self._waiting.remove(job)
            self._running = job
            self._num_orders += 1
            self._turns[job.client.identity] = self._num_orders
            still = {each.client.identity for each in (*self._waiting, job)}
            self._turns = {each: turn for each, turn in self._turns.items() if each in still}
            self._cancelled_seconds = None
            with suppress(OSError):  # it has just died, which whoever waits for the answer finds
                # Under the lock, so that no Cancel comes before it.
                self._connection.send(Order(self._num_orders, job.fields, job.wants_steps))
        return job

    def _work_off(self, job: Job) -> None:
        job.begin()
        started_seconds = time.monotonic()
        answer: Made | Failed | Cancelled | str
        try:
            answer = self._answer(job)
        except (EOFError, OSError):
            answer = self._bury()
        seconds = time.monotonic() - started_seconds
        with self._changed:
            self._running = None
        outcome = self._tell(job, answer)
        if outcome == "made":
            self._job_seconds = seconds
        self.on_end(outcome, seconds)

    def _answer(self, job: Job) -> Made | Failed | Cancelled:
        """What has become of it. Raises EOFError or OSError once the process has died."""
        connection = self._connection
        assert connection
        while True:
            if connection.poll(POLL_SECONDS):
                message: Step | Made | Failed | Cancelled = connection.recv()
                if not isinstance(message, Step):
                    return message
                job.tell(message)
            since_seconds = self._cancelled_seconds
            if since_seconds and time.monotonic() > since_seconds + CANCEL_SECONDS:
                self.kill()

    def _tell(self, job: Job, answer: Made | Failed | Cancelled | str) -> str:
        """Tells the job, and gives how it ended in a word. answer: a text if the process died."""
        if isinstance(answer, Made):
            job.tell(answer)
            return "made"
        if isinstance(answer, Cancelled) or (not job.is_wanted and isinstance(answer, str)):
            return "cancelled"
        if isinstance(answer, Failed):
            if answer.log:
                logger.error("%s: %s", self.name, answer.log)
            job.tell(JobRefused(answer.reason) if answer.is_refused else JobFailed(answer.reason))
            return "refused" if answer.is_refused else "failed"
        if self._is_stopped:
            job.tell(EngineStoppedError())
            return "stopped"
        logger.error("the process of %s ended in the middle of a job, %s", self.name, answer)
        job.tell(JobFailed(DIED))
        return "died"
