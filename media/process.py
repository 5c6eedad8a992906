"""The process of one model: loads it, and makes what it is ordered."""

import importlib
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from media.messages import (
    Cancel,
    Cancelled,
    Failed,
    Made,
    Maker,
    Order,
    RefusedFields,
    Step,
    Unloadable,
)

NICENESS = 5  # text goes first
OOM_SCORE = 500  # of -1000 to 1000: this process is to be ended before the service's
STEP_SECONDS = 0.1  # between two that are told, so that those of a fast model disturb nobody
PREVIEW_SHARE = 0.1  # of the time that goes into previews, at most


class Unwanted(BaseException):
    """Ends an order that nobody wants. No Exception: libraries catch those."""


class Steps:
    """Tells the worker of an order's steps, and ends the order once it is cancelled."""

    def __init__(self, connection: Connection, order: Order):
        self.connection = connection
        self.order = order
        self.told_step, self.told_seconds = 0, 0.0
        self.next_preview_seconds = 0.0

    def __call__(
        self, step: int, of: int | None, preview: Callable[[], bytes | None] | None = None
    ) -> None:
        is_due = time.monotonic() - self.told_seconds >= STEP_SECONDS or step in (1, of)
        is_due = is_due and step != self.told_step
        try:
            while self.connection.poll():
                if self.connection.recv() == Cancel(self.order.number):
                    raise Unwanted
            if self.order.wants_steps and is_due:
                self.connection.send(Step(step, of, self.picture(preview) if step != of else None))
                self.told_step, self.told_seconds = step, time.monotonic()
        except (EOFError, OSError):
            sys.exit()  # the service has gone

    def picture(self, preview: Callable[[], bytes | None] | None) -> bytes | None:
        """A preview, unless the last one was made so recently that they would take too long."""
        started_seconds = time.monotonic()
        if preview is None or started_seconds < self.next_preview_seconds:
            return None
        picture = preview()
        took_seconds = time.monotonic() - started_seconds
        self.next_preview_seconds = time.monotonic() + took_seconds / PREVIEW_SHARE
        return picture


def serve(connection: Connection, maker: str, options: dict[str, object], num_threads: int) -> None:
    """Loads a model and fills orders, until the other end of the connection is closed.

    maker: `module:Class`; options: what the class takes.
    """
    stand_back()
    with suppress(EOFError, OSError):  # the service has gone
        try:
            made = load(maker, options, num_threads)
        except Exception as error:  # of many libraries, each with errors of its own
            connection.send(Unloadable(first_line(error)))
            return
        connection.send(made.loaded)
        while True:
            message = connection.recv()
            if isinstance(message, Order):  # else a Cancel that came too late
                connection.send(fill(made, message, Steps(connection, message)))


def stand_back() -> None:
    """Leaves signals to the service, which ends this process by itself; its standard output too,
    which is the log; and the machine, when text wants it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    sys.stdout = sys.stderr
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text(str(OOM_SCORE))


def load(maker: str, options: dict[str, object], num_threads: int) -> Maker:
    module, _, name = maker.partition(":")
    # What libraries warn of may quote the prompt.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # which torch reads when it is imported
    made: Maker = getattr(importlib.import_module(module), name)(**options)
    return made


def fill(maker: Maker, order: Order, steps: Steps) -> Made | Failed | Cancelled:
    """What has become of an order."""
    try:
        return maker.make(order.fields, steps)
    except Unwanted:
        return Cancelled()
    except RefusedFields as error:
        return Failed(str(error), is_refused=True)
    except Exception as error:
        if is_lack_of_memory(error):
            reason = "There is not enough memory for this: ask for less, or a smaller size"
            return Failed(reason, log=first_line(error))
        return Failed("Model inference failed", log=traceback.format_exc())


def is_lack_of_memory(error: Exception) -> bool:
    """Whether it is one of the three ways that Python and torch say so: torch's for the CPU is a
    RuntimeError like any other (c10/core/impl/alloc_cpu.cpp)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
