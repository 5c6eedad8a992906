"""What the service writes: a line for each request, and the usage log."""

import atexit
import csv
import io
import json
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from contextvars import ContextVar
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from typing import Any, Protocol, TextIO, cast

from pythonjsonlogger.json import JsonFormatter

from engine import FinishReason
from serving.settings import Settings, refuse_setting

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# What the log line of the request under way will say; None outside of one. Texts that are made
# for it are under "generations".
request_facts: ContextVar[dict[str, Any] | None] = ContextVar("request_facts", default=None)

USAGE_COLUMNS = (
    "time", "request_id", "route", "model", "prompt_tokens", "generated_tokens", "seconds",
    "status", "key",
)  # fmt: skip

MAX_WAITING_BYTES = 4_000_000  # of lines that nobody reads; then they are counted only
FLUSH_SECONDS = 1.0  # that the exit waits for whoever reads the log

logger = logging.getLogger("service")
usage_logger = logging.getLogger("usage")


class Counted(Protocol):
    """What is made for a request, as far as the log tells of it: a Generation, or a Job of
    media/."""

    model_name: str

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_generated_tokens(self) -> int: ...

    @property
    def queue_seconds(self) -> float | None: ...

    @property
    def finish_reasons(self) -> set[FinishReason]: ...


def add_to_log(**facts: Any) -> None:
    """Adds to the log line of the request under way."""
    if (noted := request_facts.get()) is not None:
        noted.update(facts)


class TextFormatter(logging.Formatter):
    """One line for people; the facts of a request follow its message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        written = (f" {name}={json.dumps(fact)}" for name, fact in facts.items())
        return super().formatMessage(record) + "".join(written)


class JsonLines(JsonFormatter):
    """One JSON object a line, so that nothing that a client sends can forge a line."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(request_id)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
        )

    def add_fields(
        self, log_record: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_record, record, message_dict)
        log_record.update(log_record.pop("facts", {}))


class LineQueue(logging.Handler):
    """Lines on their way to standard output or error, written by a thread of its own: a pipe that
    nobody reads holds up no request. Lines that do not fit into MAX_WAITING_BYTES are lost, which
    is said before the next one that fits."""

    def __init__(self, stream: TextIO | None):
        super().__init__()
        # Past the stream's own buffer, whose lock a write that hangs would hold at the exit.
        self.file_descriptor = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
        self.changed = threading.Condition()
        self.lines: deque[bytes] = deque()  # the first is being written
        self.num_waiting_bytes = 0
        self.num_lost = self.num_lost_told = 0
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:
            return self.handleError(record)
        with self.changed:
            if self.num_waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self.num_lost += 1
                return
            if self.num_lost > self.num_lost_told:
                self._append(self._line(self._tell_of_loss()))
            self._append(line)
            self.changed.notify_all()

    def flush(self) -> None:
        """Waits until all is written, but not for ever. Called at the exit."""
        with self.changed:
            self.changed.wait_for(lambda: not self.lines, FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _append(self, line: bytes) -> None:
        self.lines.append(line)
        self.num_waiting_bytes += len(line)

    def _tell_of_loss(self) -> logging.LogRecord:
        self.num_lost_told = self.num_lost
        text = f"lines of this log that were lost, since nobody read it: {self.num_lost}"
        record = logging.makeLogRecord({"name": "service", "levelname": "WARNING", "msg": text})
        self.filter(record)
        return record

    def _write_lines(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines)
                line = self.lines[0]
            is_written = write_whole(self.file_descriptor, line)
            with self.changed:
                self.lines.popleft()
                self.num_waiting_bytes -= len(line)
                self.num_lost += not is_written
                self.changed.notify_all()


def write_whole(file_descriptor: int, line: bytes) -> bool:
    """Whether that could be done: the reader may have gone, or the disk be full."""
    while line:
        try:
            line = line[os.write(file_descriptor, line) :]
        except BlockingIOError:  # somebody who shares the pipe has made it so
            time.sleep(0.05)
        except OSError:
            return False
    return True


class UsageFile(RotatingFileHandler):
    """A CSV file that begins with the names of its columns, also after a rotation."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        if stream.tell() == 0:
            stream.write(",".join(USAGE_COLUMNS) + "\n")
        return stream

    def format(self, record: logging.LogRecord) -> str:
        row = io.StringIO()
        facts = cast(dict[str, Any], record.msg)
        csv.writer(row, lineterminator="").writerow(facts.get(name, "") for name in USAGE_COLUMNS)
        return row.getvalue()


class UsageQueue(QueueHandler):
    """Leaves the record as it is: the row is written out in the other thread."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def set_up_logging(settings: Settings) -> None:
    """Gives every line the id of its request; puts our access log in uvicorn's place.

    uvicorn logs whole paths, and the path of `GET /{prompt}` is a prompt. All that is written is
    written by threads, and flushed at exit.
    """
    handler = LineQueue(sys.__stdout__)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextFormatter())

    def add_request_id(record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True

    handler.addFilter(add_request_id)
    for name in ("service", "engine", "external"):
        logging.getLogger(name).handlers[:] = [handler]
        logging.getLogger(name).setLevel(settings.log_level)
    logging.getLogger("uvicorn.access").disabled = True
    uvicorn = logging.getLogger("uvicorn")  # has a line for whatever is no HTTP, on standard error
    for number, theirs in enumerate(uvicorn.handlers):
        if type(theirs) is logging.StreamHandler:  # and no file of a --log-config
            uvicorn.handlers[number] = ours = LineQueue(theirs.stream)
            ours.setFormatter(theirs.formatter)
            ours.setLevel(theirs.level)
    usage_logger.propagate = False
    if settings.usage_log:
        try:
            file = UsageFile(
                settings.usage_log, maxBytes=settings.usage_log_max_bytes, backupCount=5
            )
        except OSError as error:
            refuse_setting("USAGE_LOG", f"cannot be written ({error.strerror})")
        rows: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        usage_logger.handlers[:] = [UsageQueue(rows)]
        usage_logger.setLevel(logging.INFO)
        listener = QueueListener(rows, file)
        listener.start()
        atexit.register(listener.stop)


def add_generation_to_log(generation: Counted) -> None:
    """The log line of the request under way will tell of this."""
    facts = request_facts.get()
    if facts is not None:
        facts.setdefault("generations", []).append(generation)
        name = generation.model_name
        facts["model"] = f"{facts['model']},{name}" if "model" in facts else name


def request_generations() -> list[Counted]:
    """All that is made for the request under way."""
    generations: list[Counted] = (request_facts.get() or {}).get("generations", [])
    return generations


def log_request(
    method: str, route: str, status: int, seconds: float, facts: dict[str, Any]
) -> None:
    """Writes the line of a request that has ended, and its row of the usage log."""
    generations: list[Counted] = facts.pop("generations", [])
    if generations:
        facts["prompt_tokens"] = sum(each.num_prompt_tokens for each in generations)
        facts["generated_tokens"] = sum(each.num_generated_tokens for each in generations)
    waited = [each.queue_seconds for each in generations if each.queue_seconds is not None]
    if waited:
        facts["queue_seconds"] = round(max(waited), 4)
    if reasons := {reason for each in generations for reason in each.finish_reasons}:
        facts["finish_reason"] = "+".join(sorted(reasons))
    facts = {
        "method": method, "route": route, "status": status, "seconds": round(seconds, 4), **facts,
    }  # fmt: skip
    logger.info("%s %s", method, route, extra={"facts": facts})
    if generations and usage_logger.handlers:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        usage_logger.info({"time": now, "request_id": request_id.get(), **facts})


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
