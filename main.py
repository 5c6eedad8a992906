"""Text generation with GPT-2-class models behind an HTTP API.

    uvicorn main:app            # then open http://localhost:8000

Routes: `POST /generate` (JSON, or server-sent events with `"stream": true`),
`POST /generate-text/`, `GET|POST /generate/text` (plain text as it is generated),
`GET /{prompt}`, OpenAI's `POST /v1/completions`, `POST /v1/chat/completions` and
`GET /v1/models`, `GET /health`, `GET /ready`, `GET /metrics`, `GET /docs`, and `GET /`, the page.

The path of a request: RequestContext (request id, log line) -> CORS -> Gate (API key, drain,
rate limits) -> body limit -> schema in models.py -> content filter -> tokens ->
`Engine.submit`, which refuses at once when its queue is full -> text, filtered again ->
response. Everything in this module runs on the event loop and never computes for long, or
in a short-lived thread; the engine's thread owns the model (engine.py). For a model on another
server, text goes to `ExternalEngine.submit` (external.py) in place of tokens.
"""

import asyncio
import atexit
import codecs
import copy
import csv
import gc
import hashlib
import hmac
import io
import json
import logging
import math
import mimetypes
import os
import queue
import re
import signal
import sys
import threading
import time
import unicodedata
import uuid
from abc import ABC, abstractmethod
from base64 import b64encode
from bisect import bisect_left
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from io import TextIOWrapper
from itertools import groupby
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar, cast
from urllib.parse import quote, unquote

# What is loaded from here on stays. To look through it for garbage again and again makes the start
# a fifth longer, and later holds everybody up for a fifth of a second each time.
gc.disable()
# Read once, when torch is loaded: how long its threads spin before they sleep. The default, some
# milliseconds, makes a step ten times as slow as soon as something else wants a core; so few
# rounds make it no slower when nothing does.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import httpx
import regex
import torch
import transformers
import uvicorn
from dotenv import load_dotenv
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from limits import RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, Info, generate_latest
from pydantic import BaseModel, Field, FilePath, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import pipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as transformers_logging

import models
from engine import (
    Delta,
    Engine,
    EngineRequest,
    EngineStoppedError,
    InferenceError,
    PositionLogprobs,
    QueueFullError,
    SamplingParams,
    StepStats,
    available_cores,
    choose_kernel,
    instruction_set,
    native_dtype,
)
from external import BusyError, ExternalDelta, ExternalEngine, RefusedError, UnreachableError

gc.freeze()
gc.enable()

logger = logging.getLogger("service")
T = TypeVar("T")

BUNDLED_MODEL = Path(__file__).parent / "gpt2-tales"
HUB_PROBE_SECONDS = 3.0
RETRY_AFTER_SECONDS = 1
RELOAD_PAUSE_SECONDS = 5.0  # after a model could not be swapped in
PING_SECONDS = 15.0  # between comments in an event stream, which keep idle proxies from closing
STORAGE_TIMEOUT_SECONDS = 1.0  # of the counts that rate limits look up for a request
STORAGE_PAUSE_SECONDS = 10.0  # after a failure, for which nothing is limited

# --- Settings -----------------------------------------------------------------------------------


class Settings(BaseSettings):
    """Read once, from the environment or `.env`; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True)

    model_name: str | None = Field(
        default=None,
        description="Hugging Face ids or folders, or `name=https://host/v1` for a model on "
        "another server, comma-separated; the first is the default. "
        "Unset: `gpt2` from the local cache or the hub, else the bundled `gpt2-tales`.",
    )
    max_loaded_models: int | None = Field(
        default=None,
        ge=1,
        description="Models in memory at the same time; a request for another one swaps it in. "
        "Unset: all.",
    )
    external_api_key: SecretStr | None = Field(
        default=None, description="Sent to every external server as its bearer token."
    )
    forbidden_words: str = Field(
        default="hate*,violence",
        description="Comma-separated; a trailing `*` matches any ending; a lone comma turns "
        "the filter off.",
    )
    filter_output: bool = Field(
        default=True, description="Whether generated text is filtered as prompts are."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="`auto` is bfloat16 where the processor computes in it natively.",
    )
    quantization: Literal["int8"] | None = Field(
        default=None,
        description="`int8` packs weights to 8 bits (CPU only); seeds then hold only for "
        "requests that run alone.",
    )
    torch_num_threads: int | None = Field(
        default=None, ge=1, description="Unset: the cores that the process may use."
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=1024, description="Sequences that are generated at the same time."
    )
    max_queue_size: int = Field(
        default=256, ge=1, description="Requests that may wait; one more is answered 503."
    )
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        description="Tokens of prompt and text together. Unset: the model's context.",
    )
    request_timeout_seconds: float = Field(
        default=120, gt=0, description="A request that takes longer is answered 504."
    )
    max_body_bytes: int = Field(
        default=1_000_000, ge=1024, description="A larger request body is answered 413."
    )
    drain_timeout_seconds: float = Field(
        default=20,
        ge=0,
        description="After SIGTERM, requests that still run then are ended with an error.",
    )
    api_keys: SecretStr | None = Field(
        default=None,
        description="Comma-separated `key` or `name:key`; unset: open to everybody.",
    )
    api_keys_file: FilePath | None = Field(
        default=None, description="A file with one such key a line, besides `API_KEYS`."
    )
    metrics_need_key: bool = Field(
        default=True, description="Whether `/metrics` needs a key where there are keys."
    )
    rate_limit: int | None = Field(
        default=None, ge=1, description="Requests a minute by key, else by client address."
    )
    token_rate_limit: int | None = Field(
        default=None, ge=1, description="Generated tokens a minute, the same way."
    )
    rate_limit_storage: SecretStr = Field(
        default=SecretStr("memory://"),
        description="Where limits are counted: `redis://host:6379` for all replicas together.",
    )
    cors_origins: str = Field(
        default="", description="Comma-separated origins whose pages may call the API, or `*`."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Of the service's own log."
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="Of the service's own log, on standard output."
    )
    log_prompts: bool = Field(default=False, description="Whether prompts are in the log.")
    usage_log: Path | None = Field(
        default=None, description="A CSV file that gets a row for each request that generates."
    )
    usage_log_max_bytes: int = Field(
        default=10_000_000, ge=1000, description="It is rotated at this size; five old ones stay."
    )

    @field_validator("rate_limit_storage")
    @classmethod
    def can_be_opened(cls, address: SecretStr) -> SecretStr:
        try:
            open_storage(address)
        except ConfigurationError as error:  # whose text repeats the address, password and all
            raise ValueError(str(error).replace(address.get_secret_value(), "***")) from None
        return address


def open_storage(address: SecretStr) -> Any:
    """The counts of rate limits there; a connection is made with the first look-up."""
    uri = f"async+{address.get_secret_value()}"
    return storage_from_string(uri, wrap_exceptions=True, implementation="redispy")


def read_settings() -> Settings:
    """The settings. Ends the process with a line for each variable that is not allowed."""
    load_dotenv()  # into the environment, so that HF_TOKEN and the like may stand there too
    try:
        return Settings()
    except ValidationError as invalid:
        problems = (f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in invalid.errors())
        sys.exit("Invalid settings. " + "; ".join(problems))


settings = read_settings()

# --- Logs ---------------------------------------------------------------------------------------

request_id: ContextVar[str] = ContextVar("request_id", default="-")
# What the log line of the request under way will say; None outside of one.
request_facts: ContextVar[dict[str, Any] | None] = ContextVar("request_facts", default=None)

USAGE_COLUMNS = (
    "time", "request_id", "route", "model", "prompt_tokens", "generated_tokens", "seconds",
    "status", "key",
)  # fmt: skip


def note(**facts: Any) -> None:
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


usage_logger = logging.getLogger("usage")


def set_up_logging() -> None:
    """Gives every line the id of its request; puts our access log in uvicorn's place.

    uvicorn logs whole paths, and the path of `GET /{prompt}` is a prompt. The usage log is
    written by a thread of its own, and flushed at exit.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextFormatter())

    def add_request_id(record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True

    handler.addFilter(add_request_id)
    for name in ("service", "engine", "external"):
        logging.getLogger(name).handlers[:] = [handler]
        logging.getLogger(name).setLevel(settings.log_level)
    logging.getLogger("uvicorn.access").disabled = True
    transformers_logging.disable_progress_bar()
    usage_logger.propagate = False
    if settings.usage_log:
        try:
            file = UsageFile(
                settings.usage_log, maxBytes=settings.usage_log_max_bytes, backupCount=5
            )
        except OSError as error:
            sys.exit(f"Invalid settings. USAGE_LOG: cannot be written ({error.strerror})")
        rows: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        usage_logger.handlers[:] = [UsageQueue(rows)]
        usage_logger.setLevel(logging.INFO)
        listener = QueueListener(rows, file)
        listener.start()
        atexit.register(listener.stop)


class UsageQueue(QueueHandler):
    """Leaves the record as it is: the row is written out in the other thread."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


set_up_logging()

# --- Content filter -----------------------------------------------------------------------------

# By shape, so case matters: Cyrillic capital EN reads as H, small en does not.
LOOK_ALIKES = str.maketrans(
    "аеорсухіјѕһԁԛԝѵткӏВМНІӀαβενικορτυχγωηΗΜΝΖΥΙհօսոցզյɑɩə℮"  # noqa: RUF001
    "ᎪᏴᏟᎠᎬᎻᎫᏦᏞᎷᏢᏚᎢᏙᎳᏃᎡᏂᎥⲁⲃⲉⲏⲓⲕⲙⲛⲟⲣⲥⲧⲩⲭꓮꓐꓚꓓꓰꓝꓖꓧꓲꓙꓗꓡꓟꓠꓳꓑꓣꓢꓔꓴꓦꓪꓫꓬꓜ",
    "aeopcyxijshdqwvtklbmhIIabevikoptuxywnhmnzyIhounqqjaiee"
    "abcdehjklmpstvwzrhiabehikmnopctyxabcdefghIjklmnoprstuvwxyz",
)
# Latin letters that Unicode does not decompose (ø, small capitals, 🅷), read off their names.
LOOK_ALIKES |= {
    code: ord(name[1].lower())
    for first, last in ((0xE0, 0x2AF), (0x1D00, 0x1DBF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF),
                        (0xAB30, 0xAB6F), (0x1F150, 0x1F189))
    for code in range(first, last + 1)
    if code not in LOOK_ALIKES and not unicodedata.decomposition(chr(code))
    if (name := re.search(r"LATIN .*\b([A-Z])(?: WITH .*)?$", unicodedata.name(chr(code), "")))
}  # fmt: skip
# Digits and signs read as letters. They stay themselves in canonical text, as they are numbers
# and punctuation too: "1hate" holds a word, a price of $455 does not.
STAND_INS = {
    "a": "4@", "b": "8", "c": "¢", "e": "3€", "g": "69", "i": "I1!|¡", "l": "I1|",
    "o": "0", "s": "5$", "t": "7+", "z": "2",
}  # fmt: skip
FLAGS = "\U0001f1e6-\U0001f1ff"  # regional indicators: letters in a word, else part of a flag
LETTER = r"\p{L}\p{Mc}"
INVISIBLE = regex.compile(r"[\p{Mn}\p{Me}\p{Cf}\p{DI}]|(?!\s)\p{Cc}")
WORD = regex.compile(r"[\p{L}\p{M}\p{Nd}]+(?:[-'’][\p{L}\p{M}\p{Nd}]+)*\*?")  # noqa: RUF001


@lru_cache(maxsize=1 << 16)
def canonical(char: str) -> str:
    """What one source character reads as: lower-case letters without marks; may be empty.

    Accents are seen through, so French "hâte" reads as the forbidden "hate". "I" stays a
    capital, since it passes for "l" too.
    """
    shapes = INVISIBLE.sub("", unicodedata.normalize("NFKD", char.translate(LOOK_ALIKES)))
    shapes = shapes.translate(LOOK_ALIKES)
    folded = "I".join(map(str.casefold, shapes.split("I"))).translate(LOOK_ALIKES)
    return folded.strip("()") or folded  # U+24A3 decomposes to "(h)"


def spell(word: str) -> list[tuple[str, int]]:
    """Runs of equal letters in word: (regex class of what passes for the letter, count)."""
    classes = []
    for char in word:
        cases = {canonical(char.lower()), canonical(char.upper())}
        for letters in [cases] if {len(c) for c in cases} == {1} else map(set, canonical(char)):
            flags = {chr(0x1F1E6 + ord(c) - ord("a")) for c in letters if "a" <= c <= "z"}
            stand_ins = {s for c in letters for s in STAND_INS.get(c, "")}
            classes.append("".join(map(regex.escape, sorted(letters | flags | stand_ins))))
    return [(f"[{letters}]", len(list(run))) for letters, run in groupby(classes)]


def any_of(paths: list[list[str]]) -> str:
    """One pattern for several sequences of patterns, what they begin with in common once."""
    branches: dict[str, list[list[str]]] = {}
    for head, *tail in filter(None, paths):
        branches.setdefault(head, []).append(tail)
    if not branches:
        return ""
    return f"(?:{'|'.join(head + any_of(tails) for head, tails in branches.items())})"


class ContentFilter:
    """Finds forbidden words in text, also in text that is still being written.

    forbidden_words: "hate*,violence": comma-separated; a trailing * matches any ending.
    Raises: ValueError for a word of other than letters, digits, inner hyphens and apostrophes.

    A word is not preceded, an exact one not followed, by a letter. Its letters may be repeated,
    or set apart by one separator of 1 to 3 non-letters: "h.a.t.e". There a letter before it
    shields it, as in "w h a t e v e r", unless that is a word itself: "I h a t e".
    """

    def __init__(self, forbidden_words: str) -> None:
        words = {}
        for word in filter(None, map(str.strip, forbidden_words.split(","))):
            if not WORD.fullmatch(word) or not canonical(word[0]):
                raise ValueError(
                    f"forbidden word {word!r}: allowed are letters, digits, inner hyphens and "
                    "apostrophes, and one * at the end"
                )
            words[word] = [spell(part) for part in regex.split("[-'’]", word.rstrip("*"))]  # noqa: RUF001
        # Longer runs of one character are cut to this, so that every quantifier is bounded.
        self.max_run = max([3, *(n for parts in words.values() for runs in parts for _, n in runs)])
        # Canonical characters that a word may take, with what its end looks at.
        self.max_span = 12 * self.max_run * max(map(len, words), default=0)
        paths = [path for word, parts in words.items() for path in self._paths(word, parts)]
        # A word begins after a non-letter and not inside a number.
        begin = rf"(?<![{LETTER}])(?<!\d(?=\d))"
        self.pattern = regex.compile(begin + any_of(paths), regex.DOTALL) if words else None

    def _paths(self, word: str, parts: list[list[tuple[str, int]]]) -> list[list[str]]:
        """Patterns to match in turn for word as it is, and for word set apart."""
        letters = [letter for part in parts for letter, n in part for _ in range(n)]
        is_prefix, is_number = word.endswith("*"), not any(map(str.isalpha, word))
        # Stand-ins alone are a number: "113" is no "lie".
        spelled = "" if is_number else rf"(?<![^{LETTER}{FLAGS}]{{{len(letters)}}})"
        joined: list[str] = []
        for part in parts:
            joined += [rf"[^{LETTER}\d]?"] if joined else []  # for a hyphen or an apostrophe
            joined += [f"{letter}{{{n},{self.max_run}}}" for letter, n in part]
        # An end needs to see what follows it, so that it does not match while more may follow.
        digit = r"\d" if word[-1].isdigit() else ""
        joined += [spelled if is_prefix else rf"{spelled}(?=[^{LETTER}{digit}])"]
        if len(letters) < 3 or is_number:  # "a b" and "1 9 8 4" are no words
            return [joined]
        first, *middle, last = letters
        gap = "(?P=gap)"
        apart = [  # the gap is greedy: regex loses partial matches of a lazy one
            rf"{first}(?P<gap>[^{LETTER}]{{1,3}})"
            rf"(?<!(?<![{LETTER}])(?![aiouI])[{LETTER}]{gap}.{gap})(?:{first}{gap}){{0,2}}",
            *(f"{letter}(?:{gap}{letter}){{0,2}}{gap}" for letter in middle),
            rf"{last}(?:{gap}{last}){{0,2}}",
            rf"{spelled}(?=[^{LETTER}])",
            "" if is_prefix else rf"(?!{gap}[{LETTER}][^{LETTER}])(?=.{{5}})",
        ]
        return [joined, apart]

    def find(self, text: str, final: bool = True) -> tuple[int, int] | None:
        """Span in text of the first forbidden word; final=False: that no further text undoes."""
        return self.scan(text, final=final)[0]

    def scan(
        self, text: str, start: int = 0, final: bool = False
    ) -> tuple[tuple[int, int] | None, int]:
        """Span of the first forbidden word that begins at or after start, and the safe length.

        final: no text follows. Without a hit the safe length never shrinks as text grows, so the
        last one may be passed as start: then only what follows start is read, and max_run + 5
        canonical characters before it.
        """
        if self.pattern is None:
            return None, len(text)
        chars, source = self._read(text, start)
        if final:
            chars += "\0" * 5  # what ends look at; canonical text itself holds no NUL
        source += [len(text)] * 6
        first = bisect_left(source, start)
        if match := self.pattern.search(chars, first):
            return (source[match.start()], source[match.end()]), source[match.start()]
        if final:
            return None, len(text)
        match = self.pattern.search(chars, max(first, len(chars) - self.max_span), partial=True)
        return None, source[match.start()] if match else len(text)

    def _read(self, text: str, start: int) -> tuple[str, list[int]]:
        """Canonical text from shortly before start on, and the source index of each character."""
        first, before = start, ""
        while first and len(before) < self.max_run + 5:
            first -= 1
            for char in reversed(canonical(text[first])):
                if before[-self.max_run :] != char * self.max_run:
                    before += char
        chars: list[str] = []
        source: list[int] = []
        last, run = "", 0
        for index in range(first, len(text)):
            for char in canonical(text[index]):
                run = run + 1 if char == last else 1
                last = char
                if run <= self.max_run:
                    chars.append(char)
                    source.append(index)
        return "".join(chars), source


try:
    content_filter = ContentFilter(settings.forbidden_words)
except ValueError as invalid_word:
    sys.exit(f"Invalid settings. FORBIDDEN_WORDS: {invalid_word}")

# --- Metrics: vLLM's names where it has the same figure, so that its dashboards carry over ------

REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

HTTP_REQUESTS = Counter(
    "http_requests", "Answered requests, by route template.", ["method", "route", "status"]
)
FILTER_HITS = Counter(
    "filter_hits", "Forbidden words found: prompts refused, texts rolled back.", ["where"]
)
FAILED_REQUESTS = Counter(
    "failed_requests", "Admitted requests that ended with an error, also in a stream.", ["reason"]
)
QUEUE_REFUSALS = Counter("queue_refusals", "Requests refused because the queue was full.")
RATE_LIMIT_REFUSALS = Counter("rate_limit_refusals", "Requests refused with 429.", ["limit"])
BUILD = Info("build", "Versions of the service and of what it stands on.")

seconds_histogram = partial(Histogram, labelnames=["model_name"], buckets=REQUEST_SECONDS)


class ModelMetrics:
    """The figures of one served model, kept by `observe`, which its engine calls."""

    RUNNING = Gauge("vllm:num_requests_running", "Sequences being generated.", ["model_name"])
    WAITING = Gauge("vllm:num_requests_waiting", "Sequences in the queue.", ["model_name"])
    HEALTHY = Gauge("engine_healthy", "0 while the model keeps failing.", ["model_name"])
    SLOTS = Gauge("vllm:max_num_seqs", "Sequences that can run at once.", ["model_name"])
    PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Prompt tokens computed.", ["model_name"])
    GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens generated.", ["model_name"])
    FINISHED = Counter(
        "vllm:request_success", "Sequences finished.", ["model_name", "finished_reason"]
    )
    QUEUE = seconds_histogram("vllm:request_queue_time_seconds", "Time in the queue.")
    FIRST_TOKEN = seconds_histogram(
        "vllm:time_to_first_token_seconds", "From arrival to the first token."
    )
    NEXT_TOKEN = Histogram(
        "vllm:inter_token_latency_seconds", "From one token to the next.", ["model_name"],
        buckets=TOKEN_SECONDS,
    )  # fmt: skip
    REQUEST = seconds_histogram(
        "vllm:e2e_request_latency_seconds", "From arrival to the last token."
    )
    STEP = Histogram(
        "vllm:iteration_tokens_total", "Tokens that go through the model in one step.",
        ["model_name"], buckets=ROWS,
    )  # fmt: skip
    LOAD = Gauge("model_load_seconds", "How long the model took to load last.", ["model_name"])
    LOADED = Gauge("model_loaded", "0 while the model is not in memory.", ["model_name"])
    ABOUT = Gauge(
        "model_info",
        "1, for every served model.",
        ["model_name", "dtype", "device", "kernel", "instruction_set"],
    )

    def __init__(self, name: str):
        self.name = name
        self.prompt_tokens = self.PROMPT_TOKENS.labels(name)
        self.generation_tokens = self.GENERATION_TOKENS.labels(name)
        self.queue = self.QUEUE.labels(name)
        self.first_token = self.FIRST_TOKEN.labels(name)
        self.next_token = self.NEXT_TOKEN.labels(name)
        self.request = self.REQUEST.labels(name)
        self.step = self.STEP.labels(name)
        self.rolled_back = FILTER_HITS.labels("output")

    def observe(self, stats: StepStats) -> None:
        """Called in the engine's thread, after each step."""
        if stats.num_rows:  # None of what an external server computes is known.
            self.step.observe(stats.num_rows)
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.generation_tokens.inc(
            len(stats.time_to_first_token_seconds)
            + len(stats.inter_token_seconds)
            + stats.num_untimed_tokens
        )
        for histogram, seconds in (
            (self.queue, stats.queue_seconds),
            (self.first_token, stats.time_to_first_token_seconds),
            (self.next_token, stats.inter_token_seconds),
        ):
            for each in seconds:
                histogram.observe(each)
        for finish_reason, request_seconds in stats.finished:
            self.FINISHED.labels(self.name, finish_reason).inc()
            self.request.observe(request_seconds)
        self.rolled_back.inc(stats.num_rollbacks)

    def watch(self, served: Engine | ExternalEngine) -> None:
        """From now on a scrape reads the engine's own counts."""
        self.RUNNING.labels(self.name).set_function(lambda: served.num_running)
        self.WAITING.labels(self.name).set_function(lambda: served.num_waiting)
        self.HEALTHY.labels(self.name).set_function(lambda: served.is_healthy)
        if isinstance(served, ExternalEngine):
            self.ABOUT.labels(self.name, *["external"] * 4).set(1)
            return
        self.LOADED.labels(self.name).set_function(lambda: served.is_loaded)
        self.SLOTS.labels(self.name).set(served.scheduler.max_num_seqs)
        model, kernel = served.model, served.kernel.name
        about = (str(model.dtype), model.device.type, kernel, instruction_set())
        self.ABOUT.labels(self.name, *about).set(1)


VERSION = "0.1.0"
BUILD.info(
    {"version": VERSION, "torch": torch.__version__, "transformers": transformers.__version__}
)

# --- Models: loaded here, at import -------------------------------------------------------------


def cached_folder(name: str) -> str | None:
    """The folder in the hub's local cache that holds all of model `name`, else None."""

    def cached(*files: str) -> str | None:
        found = (try_to_load_from_cache(name, file) for file in files)
        return next((path for path in found if isinstance(path, str)), None)

    try:
        config = cached("config.json")
    except HFValidationError:  # no name that the hub could know
        return None
    weights = cached("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    tokenizer = cached("tokenizer.json", "vocab.json", "tokenizer.model")
    return str(Path(config).parent) if config and weights and tokenizer else None


def hub_has(name: str) -> bool:
    """Whether the hub answers for model `name` right now; the hub's own client retries for
    23 seconds before it says no."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        response = httpx.head(url, timeout=HUB_PROBE_SECONDS, follow_redirects=True)
        return response.is_success
    except httpx.HTTPError:
        return False


EXTERNAL = re.compile(r"([^=]*?)\s*=\s*(\w+://.*)")


def find_models(model_name: str) -> dict[str, str]:
    """For each model to serve, by the name it is served under, the folder, id or URL to load."""
    sources = {}
    for entry in filter(None, (part.strip() for part in model_name.split(","))):
        is_folder = Path(entry).is_dir()
        external = EXTERNAL.fullmatch(entry)
        name = Path(entry).resolve().name if is_folder else external[1] if external else entry
        if name in sources:
            sys.exit(f"Invalid settings. MODEL_NAME: names {name!r} twice")
        if external:
            sources[name] = external[2]
        else:
            sources[name] = entry if is_folder else cached_folder(entry) or entry
    return sources


def connect(name: str, source: str) -> tuple[None, ExternalEngine]:
    """The engine of a model on another server, which need not answer yet. source: the base of
    its OpenAI routes, and after a `#` the model's name there if it is another."""
    try:
        url = httpx.URL(source)
    except httpx.InvalidURL:
        url = httpx.URL()
    is_address = url.scheme in ("http", "https") and url.host and (url.port or 0) < 65536
    if not name or not is_address or url.userinfo or url.query:  # URLs end up in logs
        sys.exit(
            f"Invalid settings. MODEL_NAME: {name!r} is to be served from an address that is not "
            "https://host/v1; a key belongs in EXTERNAL_API_KEY"
        )
    key = settings.external_api_key
    if key and not re.fullmatch("[!-~]+", key.get_secret_value()):
        sys.exit("Invalid settings. EXTERNAL_API_KEY: has other than ASCII letters and signs")
    metrics = ModelMetrics(name)
    served = ExternalEngine(
        name,
        str(url.copy_with(fragment=None)).rstrip("/"),
        upstream_name=unquote(url.fragment) or name,
        api_key=key.get_secret_value() if key else None,
        max_num_requests=settings.max_num_seqs + settings.max_queue_size,
        text_filter=content_filter if settings.filter_output else None,
        on_step=metrics.observe,
    )
    metrics.watch(served)
    logger.info("%s is on %s", name, served.url)
    return None, served


def chosen_precision() -> tuple[torch.dtype, str]:
    """(dtype, device) that models are loaded with. Ends the process where DTYPE cannot be had."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"auto": native_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = torch.float32 if settings.quantization else dtypes[settings.dtype]
    try:
        choose_kernel(dtype, device, settings.quantization)
    except ValueError as error:
        variable = "QUANTIZATION" if settings.quantization else "DTYPE"
        sys.exit(f"Invalid settings. {variable}: {error}")
    return dtype, device


def load_pipeline(source: str) -> Any:
    dtype, device = chosen_precision()
    return pipeline("text-generation", model=source, dtype=dtype, device=device)


def tell_of_load(name: str, served: Engine, started_seconds: float) -> None:
    seconds = time.monotonic() - started_seconds
    ModelMetrics.LOAD.labels(name).set(seconds)
    logger.info("loaded %s (%s) in %.1f s", name, served.description, seconds)


def chosen_num_threads() -> int:
    """How many threads compute; more than there are cores are warned of."""
    cores = available_cores()
    if (settings.torch_num_threads or 0) > cores:
        logger.warning(
            "TORCH_NUM_THREADS is %d and the process may use %d core%s: threads that wait for a "
            "core make every step slower",
            settings.torch_num_threads,
            cores,
            "s" * (cores > 1),
        )
    return settings.torch_num_threads or cores


def load_generator(name: str, source: str) -> tuple[Any, Engine]:
    """A text-generation pipeline, and the engine to which its model belongs from here on."""
    started_seconds = time.monotonic()
    loaded = load_pipeline(source)
    metrics = ModelMetrics(name)
    served = Engine(
        loaded.model,
        loaded.tokenizer,
        max_num_seqs=settings.max_num_seqs,
        max_queue_size=settings.max_queue_size,
        max_model_len=settings.max_model_len,
        quantization=settings.quantization,
        num_threads=chosen_num_threads(),
        text_filter=content_filter if settings.filter_output else None,
        on_step=metrics.observe,
        on_model_needed=partial(swap.needed.put, (name, source)),
    )
    metrics.watch(served)
    tell_of_load(name, served, started_seconds)
    return loaded, served


class Swap:
    """Loads a model that is needed in place of an idle one, or if none is idle of the one that
    was asked for least recently, which first answers what came before.

    Requests wait meanwhile in their engine's queue, under its limit and their own deadlines.
    """

    def __init__(self) -> None:
        self.needed: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self.loading: str | None = None
        self.max_loaded: int | None = None
        self.thread: threading.Thread | None = None
        self.retry_at_seconds: dict[str, float] = {}  # of models that could not be loaded

    def start(self) -> None:
        """Begins to swap, or does so again after `stop`, if there is anything to swap."""
        if self.max_loaded and not (self.thread and self.thread.is_alive()):
            self.thread = threading.Thread(target=self.run, name="swap", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """Waits for a load under way: a process that ends in the middle of one crashes."""
        if self.thread and self.thread.is_alive():
            self.needed.put(None)
            self.thread.join()

    def run(self) -> None:
        torch.set_num_threads(1)  # of this thread; `computing_thread` tells why
        while entry := self.needed.get():
            self.loading, source = entry
            self.swap_in(self.loading, source)
            self.loading = None

    def swap_in(self, name: str, source: str) -> None:
        needed = local_engine(name)
        if needed.is_loaded or not needed.num_waiting:
            return  # another request for it came first
        if time.monotonic() < self.retry_at_seconds.get(name, 0):
            return needed.fail_waiting()  # before it costs another model its place

        def last_use(each: str) -> tuple[bool, int]:
            served = local_engine(each)
            return served.num_running + served.num_waiting > 0, served.last_request_id

        try:
            while len(loaded := loaded_names()) >= cast(int, self.max_loaded):
                oldest = min(loaded, key=last_use)
                unload(generators[oldest], local_engine(oldest))
                logger.info("unloaded %s", oldest)
            if needed.num_waiting:  # still
                started_seconds = time.monotonic()
                generators[name].model = load_pipeline(source).model
                needed.load(generators[name].model)
                tell_of_load(name, needed, started_seconds)
        except Exception:
            logger.exception("cannot load %s", name)
            generators[name].model = None
            self.retry_at_seconds[name] = time.monotonic() + RELOAD_PAUSE_SECONDS
            needed.fail_waiting()


def unload(loaded: Any, served: Engine) -> None:
    """Takes a model out of memory; its tokenizer stays."""
    loaded.model = None
    served.unload()


def loaded_names() -> list[str]:
    """The models that run here and are in memory."""
    return [name for name in generators if local_engine(name).is_loaded]


swap = Swap()


def load_all(model_name: str | None) -> dict[str, tuple[Any, Engine | ExternalEngine]]:
    """The models to serve by name, the default first.

    A named model that cannot be loaded ends the process with one line. Without a name it is
    `gpt2` where that can be had within seconds, else the bundled model, with a warning.
    """
    if model_name is None:
        try:
            if (folder := cached_folder("gpt2")) or hub_has("gpt2"):
                return {"gpt2": load_generator("gpt2", folder or "gpt2")}
            reason = "neither in the local cache nor to be had from the hub"
        except Exception as error:  # whatever is wrong with it, there is another
            reason = f"not to be loaded ({first_line(error)})"
        name = BUNDLED_MODEL.name
        logger.warning("gpt2 is %s: serving %s, the small bundled model", reason, name)
        return {name: load_generator(name, str(BUNDLED_MODEL))}
    sources = find_models(model_name)
    external = [name for name in sources if "://" in sources[name]]
    local = [name for name in sources if name not in external]
    most = settings.max_loaded_models or len(local)
    loaded: dict[str, tuple[Any, Engine | ExternalEngine]] = {
        name: connect(name, sources[name]) for name in external
    }
    for number, name in reversed(list(enumerate(local, start=1))):  # the default one stays
        try:
            loaded[name] = generator, engine = load_generator(name, sources[name])
            if number > most:
                unload(generator, engine)
        except Exception as error:  # of many libraries, each with errors of its own
            logger.debug("cannot load %s", name, exc_info=True)
            sys.exit(f"MODEL_NAME: cannot load {name!r}: {first_line(error)}")
    if not loaded:
        sys.exit("Invalid settings. MODEL_NAME: names no model")
    if most < len(local):
        swap.max_loaded = most
    return {name: loaded[name] for name in sources}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


torch.set_num_threads(1)  # of this thread; `computing_thread` tells why
served_models = load_all(settings.model_name)
generators = {name: loaded for name, (loaded, _) in served_models.items() if loaded}
engines = {name: served for name, (_, served) in served_models.items()}
default_model_name = next(iter(engines))
swap.start()
generator, engine = served_models[default_model_name]
# Not before what they say of models has been checked: a URL may hold a password.
logger.info("settings: %s", settings.model_dump(mode="json"))


def local_engine(name: str) -> Engine:
    """The engine of a model that runs here."""
    return cast(Engine, engines[name])


# --- The app ------------------------------------------------------------------------------------


class OpenAIError(HTTPException):
    """An error of a `/v1` route, with what OpenAI's clients look at."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(status, message)
        self.body = openai_error(status, message, param=param, code=code)


def openai_error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """https://platform.openai.com/docs/guides/error-codes"""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    scope: Scope,
    status: int,
    detail: Any,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error in the words of the route's family; code: of OpenAI's."""
    if scope["path"].startswith("/v1/"):
        return JSONResponse(openai_error(status, detail, code=code), status, headers)
    return JSONResponse({"detail": detail}, status, headers)


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
MAX_URL_BYTES = 16_384  # of the path and query; 500 characters, percent-encoded, take 6,000
MAX_HEADERS_BYTES = 65_536

# Stands for an encoded slash while routing: `GET /{prompt}` takes one segment, which may hold one.
# One that the path does not hold itself is taken.
ENCODED_SLASHES = [chr(code) for code in range(0xE000, 0xF900)]


class RequestContext:
    """Pure ASGI middleware: the request's id, its log line, its headers, the shape of a 413.

    Not BaseHTTPMiddleware, under which a route never hears that its client has gone.
    """

    VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        id_ = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id_ = scope["request_id"] = id_ if self.VALID_ID.fullmatch(id_) else uuid.uuid4().hex
        request_id.set(id_)
        facts: dict[str, Any] = {}
        request_facts.set(facts)
        raw_path = scope.get("raw_path", b"").decode("latin-1")
        if "%2f" in raw_path.lower():
            slash = next(char for char in ENCODED_SLASHES if char not in scope["path"])
            scope["encoded_slash"] = slash
            scope["path"] = unquote(re.sub("%2[fF]", quote(slash), raw_path))
        started_seconds = time.monotonic()
        status, too_large = 0, JSONResponse(None)

        async def send_with_id(message: Message) -> None:
            nonlocal status, too_large
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 413:  # the body limit answers in plain text
                    detail = f"Request body is larger than {settings.max_body_bytes} bytes"
                    too_large = error_response(scope, 413, detail)
                    message["headers"] = too_large.raw_headers
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", id_.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),  # a path may be a prompt
                    (b"x-frame-options", b"DENY"),
                ]
            elif status == 413:
                message["body"] = too_large.body
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if facts.pop("client_gone", False):
                status = 499
            # Without a status the app has raised, and the outermost layer answers.
            self.log(scope, facts, status or 500, time.monotonic() - started_seconds)

    def log(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        """Writes the request's log line, its row of the usage log, and counts it."""
        route = getattr(scope.get("route"), "path", "-")
        method = scope["method"] if scope["method"] in METHODS else "other"
        requests: list[EngineRequest] = facts.pop("requests", [])
        if requests:
            facts["prompt_tokens"] = sum(request.num_prompt_tokens for request in requests)
            facts["generated_tokens"] = num_generated_tokens(requests)
        waited = [r.queue_seconds for r in requests if r.queue_seconds is not None]
        if waited:
            facts["queue_seconds"] = round(max(waited), 4)
        if reasons := {reason for request in requests for reason in request.finish_reasons}:
            facts["finish_reason"] = "+".join(sorted(reasons))
        facts = {
            "method": method, "route": route, "status": status, "seconds": round(seconds, 4),
            **facts,
        }  # fmt: skip
        logger.info("%s %s", method, route, extra={"facts": facts})
        HTTP_REQUESTS.labels(method, route, status).inc()
        if requests and settings.usage_log:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            usage_logger.info({"time": now, "request_id": scope["request_id"], **facts})


def read_api_keys() -> dict[bytes, str]:
    """The name of every API key, by the key's digest; empty: no key is needed."""
    entries = (settings.api_keys.get_secret_value() if settings.api_keys else "").split(",")
    if settings.api_keys_file:
        entries += settings.api_keys_file.read_text().splitlines()
    names = {}
    for number, entry in enumerate(filter(None, map(str.strip, entries)), start=1):
        name, colon, key = (part.strip() for part in entry.rpartition(":"))
        if not key:  # else everybody who sends none would have it
            sys.exit(f"Invalid settings. API_KEYS: entry {number} has a name and no key")
        names[digest(key)] = name if colon else f"key-{number}"
    if (settings.api_keys or settings.api_keys_file) and not names:
        sys.exit("Invalid settings. API_KEYS: holds no key")
    return names


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """Pure ASGI middleware: who may pass. Size of the head, API key, drain, rate limits.

    Everything needs a key but OPEN_PATHS and the page's files, so that a new route is never
    open by accident.
    """

    OPEN_PATHS = frozenset({"/", "/health", "/ready"})
    PAGE_FILES = "/static/"

    def __init__(self, app: ASGIApp, key_names: dict[bytes, str]):
        self.app = app
        self.key_names = key_names
        self.limiter = FixedWindowRateLimiter(open_storage(settings.rate_limit_storage))
        self.paused_until_seconds = 0.0
        self.limits = {
            name: RateLimitItemPerMinute(amount)
            for name, amount in (
                ("requests", settings.rate_limit),
                ("tokens", settings.token_rate_limit),
            )
            if amount
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal, limit_headers = await self.admit(scope)
        if refusal:
            refusal.headers.update(limit_headers)
            return await refusal(scope, receive, send)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and limit_headers:
                MutableHeaders(scope=message).update(limit_headers)
            await send(message)

        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            # Also what was generated for a client that has gone.
            requests = (request_facts.get() or {}).get("requests", [])
            cost = num_generated_tokens(requests)
            if "tokens" in self.limits and cost and not self.is_paused:
                identity = scope["client_identity"]
                async with self.counting():
                    await self.limiter.hit(self.limits["tokens"], "tokens", identity, cost=cost)

    async def admit(self, scope: Scope) -> tuple[Response | None, dict[str, str]]:
        """The refusal, if it is one, and the headers that tell of rate limits."""
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
            return error_response(scope, 414, f"URL is longer than {MAX_URL_BYTES} bytes"), {}
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS_BYTES:
            return error_response(scope, 431, f"Headers exceed {MAX_HEADERS_BYTES} bytes"), {}
        path = scope["path"]
        if path in self.OPEN_PATHS or path.startswith(self.PAGE_FILES):
            return None, {}
        is_metrics = path == "/metrics"
        identity = f"address {scope['client'][0]}" if scope.get("client") else "unknown"
        if self.key_names and not (is_metrics and not settings.metrics_need_key):
            name = self.key_name(Headers(scope=scope))
            if name is None:
                headers = {"WWW-Authenticate": "Bearer"}
                detail = "An API key is needed: Authorization: Bearer <key>, or X-API-Key"
                return error_response(scope, 401, detail, headers, "invalid_api_key"), {}
            identity = f"key {name}"
            note(key=name)
        scope["client_identity"] = identity
        if is_metrics:
            return None, {}
        if drain.has_begun:
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return error_response(scope, 503, STOPPING, headers), {}
        if self.limits and not self.is_paused:
            async with self.counting():
                return await self.limit(scope, identity)
        return None, {}

    def key_name(self, headers: Headers) -> str | None:
        """The name of the key that the request brings, compared in constant time."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        sent_digest, found = digest(sent), None
        for known, name in self.key_names.items():
            if hmac.compare_digest(known, sent_digest):
                found = name
        return found

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self.paused_until_seconds

    @asynccontextmanager
    async def counting(self) -> AsyncGenerator[None]:
        """Around look-ups of counts. When their storage fails, nothing is limited for a while:
        it would be a pity to refuse everybody, and slow to try again for every request."""
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_SECONDS):
                yield
        except (StorageError, TimeoutError) as error:
            if not self.is_paused:
                pause = STORAGE_PAUSE_SECONDS
                logger.error("no rate limits for %g s: %s", pause, first_line(error))
            self.paused_until_seconds = time.monotonic() + STORAGE_PAUSE_SECONDS

    async def limit(self, scope: Scope, identity: str) -> tuple[Response | None, dict[str, str]]:
        headers: dict[str, str] = {}
        refused = None
        for name, limit in self.limits.items():
            if name == "requests":  # counted now; tokens are once they are made
                is_within = await self.limiter.hit(limit, name, identity)
            else:
                is_within = await self.limiter.test(limit, name, identity)
            window = await self.limiter.get_window_stats(limit, name, identity)
            wait_seconds = max(1, math.ceil(window.reset_time - time.time()))
            headers[f"X-RateLimit-Limit-{name.title()}"] = str(limit.amount)
            headers[f"X-RateLimit-Remaining-{name.title()}"] = str(max(0, window.remaining))
            headers[f"X-RateLimit-Reset-{name.title()}"] = str(wait_seconds)
            if not is_within and not refused:
                RATE_LIMIT_REFUSALS.labels(name).inc()
                refused = error_response(
                    scope,
                    429,
                    f"Over the limit of {limit.amount} {name} a minute",
                    {"Retry-After": str(wait_seconds)},
                    "rate_limit_exceeded",
                )
        return refused, headers


class Drain:
    """From the first SIGTERM or SIGINT on: `/ready` says no, new work is refused, running work
    ends, or is ended after DRAIN_TIMEOUT_SECONDS; then the server exits. A second signal ends
    it at once."""

    def __init__(self) -> None:
        self.has_begun = False
        self.task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Puts itself before the server's own handlers, which would close the listening socket
        first and leave the process with the signal as its exit status."""
        if threading.current_thread() is not threading.main_thread():
            return  # under a test client: no signals there
        for number in (signal.SIGTERM, signal.SIGINT):
            server = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(server, uvicorn.Server):
                begin = partial(self.begin, asyncio.get_running_loop(), server)
                signal.signal(number, begin)

    def begin(
        self, loop: asyncio.AbstractEventLoop, server: uvicorn.Server, number: int, _: Any
    ) -> None:
        if self.has_begun:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.has_begun = True

        def start() -> None:
            self.task = loop.create_task(self.finish(server))

        loop.call_soon_threadsafe(start)

    async def finish(self, server: uvicorn.Server) -> None:
        logger.info("stopping: %d sequences are left", num_unfinished())
        deadline_seconds = time.monotonic() + settings.drain_timeout_seconds
        while num_unfinished() and time.monotonic() < deadline_seconds:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await stop_engines()
        server.should_exit = True


def num_unfinished() -> int:
    return sum(each.num_running + each.num_waiting for each in engines.values())


async def stop_engines() -> None:
    """Whatever they still hold ends with EngineStoppedError."""
    await asyncio.gather(*(asyncio.to_thread(each.stop) for each in engines.values()))


drain = Drain()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    drain.listen()
    for each in engines.values():
        each.start()
    swap.start()
    yield
    await stop_engines()
    await asyncio.to_thread(swap.stop)


app = FastAPIOffline(
    title="GPT-2 text generation",
    version=VERSION,
    description="Text generation with GPT-2-class language models. "
    "Generated text can be wrong or offensive; check it before you use it.",
    lifespan=lifespan,
    # A redirect would repeat the path, which may be a prompt.
    redirect_slashes=False,
)
app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.max_body_bytes)
app.add_middleware(Gate, key_names=read_api_keys())
if settings.cors_origins:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
        expose_headers=["X-Request-ID", "Retry-After"]
        + [
            f"X-RateLimit-{what}-{of}"
            for what in ("Limit", "Remaining", "Reset")
            for of in ("Requests", "Tokens")
        ],
    )
app.add_middleware(RequestContext)

# --- Errors -------------------------------------------------------------------------------------

OVERLOADED = "Too many requests are waiting; try again shortly"
STOPPING = "The service is stopping"
FORBIDDEN_PROMPT = "Prompt contains inappropriate content"
UNREACHABLE = "The external model cannot be reached; try again shortly"
BUSY = "The external model takes no more requests; try again shortly"
REFUSED = "The external model refused the request"


class ClientGoneError(Exception):
    """The client went away before its answer was ready; nobody reads what is sent now."""


@app.exception_handler(RequestValidationError)
async def refuse_invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    """422, on `/v1` 400, without the input, which may be long, secret, or no valid JSON."""

    def name(part: str | int) -> str | int:
        return part if isinstance(part, int) else part[:100].encode(errors="replace").decode()

    problems = [
        {"loc": [name(part) for part in e["loc"]], "msg": e["msg"], "type": e["type"]}
        for e in error.errors()[:20]
    ]
    if not http.scope["path"].startswith("/v1/"):
        return error_response(http.scope, 422, problems)
    first = error.errors()[0]
    path = [str(part) for part in problems[0]["loc"][1:] if first["type"] != "json_invalid"]
    param = path[0] if path else first.get("ctx", {}).get("param")
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{'.'.join(path) or param or 'body'}: {reason}"
    return JSONResponse(openai_error(400, message, param=param), 400)


@app.exception_handler(StarletteHTTPException)
async def report_refusal(http: Request, error: StarletteHTTPException) -> JSONResponse:
    if error.detail == FORBIDDEN_PROMPT:
        FILTER_HITS.labels("prompt").inc()
    if isinstance(error, OpenAIError):
        return JSONResponse(error.body, error.status_code, error.headers)
    if error.status_code == 400 and error.detail == "There was an error parsing the body":
        return await refuse_invalid(http, invalid("body", msg="not valid JSON"))
    headers = dict(error.headers or {})
    if error.status_code == 405:  # of all routes on this path, not of the first alone
        routes = [route for route in app.routes if isinstance(route, Route)]
        matching = (route.path for route in routes if route.path_regex.match(http.scope["path"]))
        path = next(matching, None)  # None: a file
        methods = {m for route in routes if route.path == path for m in route.methods or ()}
        headers["Allow"] = ", ".join(sorted(methods or {"GET", "HEAD"}))
    return error_response(http.scope, error.status_code, error.detail, headers)


@app.exception_handler(QueueFullError)
@app.exception_handler(EngineStoppedError)
@app.exception_handler(UnreachableError)
@app.exception_handler(BusyError)
async def refuse_for_now(http: Request, error: Exception) -> JSONResponse:
    if isinstance(error, QueueFullError):
        QUEUE_REFUSALS.inc()
    seconds = error.retry_after_seconds if isinstance(error, BusyError) else RETRY_AFTER_SECONDS
    detail = {
        QueueFullError: OVERLOADED,
        EngineStoppedError: STOPPING,
        UnreachableError: UNREACHABLE,
        BusyError: BUSY,
    }[type(error)]
    return error_response(http.scope, 503, detail, {"Retry-After": str(seconds)})


@app.exception_handler(RefusedError)
async def report_refused(http: Request, error: RefusedError) -> JSONResponse:
    if http.scope["path"].startswith("/v1/"):
        return JSONResponse(openai_error(400, REFUSED, code=error.code), 400)
    source = "query" if http.method == "GET" else "body"
    return await refuse_invalid(http, invalid(source, msg=REFUSED))


@app.exception_handler(InferenceError)
async def report_failed_inference(http: Request, error: InferenceError) -> JSONResponse:
    return error_response(http.scope, 500, describe(error))


@app.exception_handler(TimeoutError)
async def report_timeout(http: Request, error: TimeoutError) -> JSONResponse:
    return error_response(http.scope, 504, describe(error))


@app.exception_handler(ClientGoneError)
async def close_for_nobody(_: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)


@app.exception_handler(Exception)
async def report_unexpected(http: Request, error: Exception) -> JSONResponse:
    """500 from outside RequestContext, so it brings the id itself."""
    headers = {"X-Request-ID": http.scope["request_id"]}
    return error_response(http.scope, 500, "Internal server error", headers)


def describe(error: Exception) -> str:
    """What a client is told of an error that ended its request, which is counted here; the
    cause is in the log."""
    if isinstance(error, TimeoutError):
        FAILED_REQUESTS.labels("timeout").inc()
        return f"The request took longer than {settings.request_timeout_seconds:g} seconds"
    if isinstance(error, EngineStoppedError):
        FAILED_REQUESTS.labels("stopping").inc()
        return STOPPING
    FAILED_REQUESTS.labels("inference").inc()
    return "Model inference failed"


# --- Generation ---------------------------------------------------------------------------------


def invalid(*loc: str, msg: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": loc, "msg": msg}])


def served_name(model: str | None) -> str:
    """The name of the model that answers. Raises HTTPException 404 for one not served."""
    if model is None:
        return default_model_name
    if model not in engines:
        raise HTTPException(404, f"No such model; served: {', '.join(engines)}")
    return model


def new_token_budget(
    body: models.LengthParams, num_prompt_tokens: int, context_tokens: int, source: str
) -> int:
    """How many tokens to generate. Raises RequestValidationError when there is no room."""
    sent = body.model_fields_set
    if num_prompt_tokens >= context_tokens:
        raise invalid(
            source,
            "prompt",
            msg=f"The prompt has {num_prompt_tokens} tokens; the model takes {context_tokens - 1}",
        )
    if body.max_new_tokens is not None:
        budget = body.max_new_tokens
    elif "max_length" in sent:
        budget = body.max_length - num_prompt_tokens
        if budget < 1:
            raise invalid(
                source,
                "max_length",
                msg=f"max_length is {body.max_length} tokens, which the prompt's "
                f"{num_prompt_tokens} tokens already fill",
            )
    else:
        budget = body.max_length  # the default, here counted after the prompt
    return min(budget, context_tokens - num_prompt_tokens)


def is_forbidden_prompt(model_name: str, *texts: str, token_ids: list[int]) -> bool:
    """Whether a prompt holds a forbidden word, as it was written or as the model reads it: past
    a special token in the middle of a word. token_ids: none of a model that is not here."""
    read = ""
    if token_ids:
        read = generators[model_name].tokenizer.decode(token_ids, skip_special_tokens=True)
    return any(map(content_filter.find, (*texts, read)))


async def submit(
    http: Request,
    model_name: str,
    prompt: str,
    body: Any,
    *,
    source: str = "body",
    num_sequences: int = 1,
    streams: bool = False,
    is_chat: bool = False,
) -> EngineRequest:
    """The request, queued. body: has the fields of models.SamplingParams and LengthParams.

    Raises HTTPException 400 for a forbidden prompt, RequestValidationError for one that
    does not fit, QueueFullError, and what `ExternalEngine.submit` does.
    """
    if settings.log_prompts:
        note(prompt=prompt)
    if isinstance(engines[model_name], ExternalEngine):
        sending = submit_external(model_name, prompt, body, source, num_sequences, streams)
        return await unless_client_goes(http, sending)
    tokenizer, chosen = generators[model_name].tokenizer, local_engine(model_name)
    written = prompt
    if is_chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoding = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False)
    else:
        encoding = tokenizer.backend_tokenizer.encode(prompt)
    if is_forbidden_prompt(model_name, written, token_ids=encoding.ids):
        raise HTTPException(400, FORBIDDEN_PROMPT)
    if body.top_k > chosen.vocab_size:
        raise invalid(
            source, "top_k", msg=f"Input should be less than or equal to {chosen.vocab_size}"
        )
    params = SamplingParams(
        max_new_tokens=new_token_budget(body, len(encoding), chosen.max_model_len, source),
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=tuple(body.stop),
    )
    request = chosen.submit(encoding.ids, params, num_sequences=num_sequences, streams=streams)
    note_submitted(model_name, [request])
    return request


async def submit_external(
    model_name: str, prompt: str, body: Any, source: str, num_sequences: int, streams: bool
) -> EngineRequest:
    """The same for a model on another server: the request, which has begun to be answered."""
    chosen = cast(ExternalEngine, engines[model_name])
    if is_forbidden_prompt(model_name, prompt, token_ids=[]):
        raise HTTPException(400, FORBIDDEN_PROMPT)
    place: dict[str, Any] = {
        "request_id": request_id.get(),
        "arrived_seconds": time.monotonic(),
        "timeout_seconds": settings.request_timeout_seconds,
    }
    context_tokens = chosen.max_model_len or sys.maxsize
    num_new_tokens = body.max_new_tokens or body.max_length
    num_prompt_tokens = 0  # while it makes no difference: to count them costs a request
    counts_prompt = body.max_new_tokens is None and "max_length" in body.model_fields_set
    # A token is a byte or more, but for the one that some models begin with.
    if counts_prompt or len(prompt.encode()) + 1 + num_new_tokens > context_tokens:
        num_prompt_tokens = await chosen.count_prompt_tokens(prompt, **place)
    sent = {
        "prompt": prompt,
        "max_tokens": new_token_budget(body, num_prompt_tokens, context_tokens, source),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "n": num_sequences,
    }
    if body.seed is not None:
        sent["seed"] = body.seed
    if body.stop:
        sent["stop"] = body.stop
    if "top_k" in body.model_fields_set:  # no field of OpenAI's own
        sent["top_k"] = body.top_k
    request = await chosen.submit(
        "completions",
        sent,
        prompt_texts=[prompt],
        num_sequences=num_sequences,
        streams=streams,
        **place,
    )
    note_submitted(model_name, [request])
    return request


def note_submitted(model_name: str, requests: list[EngineRequest]) -> None:
    """Puts a request and its model down for its log line."""
    facts = request_facts.get()
    if facts is not None:
        known: list[EngineRequest] = facts.setdefault("requests", [])
        known += requests
        facts["model"] = f"{facts['model']},{model_name}" if "model" in facts else model_name


def num_generated_tokens(requests: list[EngineRequest]) -> int:
    return sum(request.num_generated_tokens for request in requests)


async def client_gone(receive: Receive) -> None:
    """Returns once the client has closed the connection; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_goes(http: Request, work: Awaitable[T]) -> T:
    """What work returns. Raises ClientGoneError, and cancels it, once the client goes."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(client_gone(http.receive))
    pending: set[asyncio.Future[Any]] = {working, gone}
    try:
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        working.add_done_callback(lambda _: working.cancelled() or working.exception())


def deltas_in_time(model_name: str, *requests: EngineRequest) -> aclosing[AsyncGenerator[Delta]]:
    """`Engine.stream`, to be closed at the end of a `with`, with the service's deadline."""
    timeout_seconds = settings.request_timeout_seconds
    return aclosing(engines[model_name].stream(*requests, timeout_seconds=timeout_seconds))


async def last_deltas(model_name: str, requests: list[EngineRequest]) -> list[Delta]:
    """Every sequence of requests that are not streamed as one delta, in order."""
    async with deltas_in_time(model_name, *requests) as deltas:
        last = {delta.index: delta async for delta in deltas}
    return [last[index] for index in sorted(last)]


async def complete(
    http: Request, submitted: Iterable[tuple[str, list[EngineRequest]]]
) -> list[list[Delta]]:
    """For each model, every sequence of its requests as one delta, in order.

    Whatever happens, nothing is left running. Raises what `Engine.stream` does, and
    ClientGoneError.
    """
    submitted = list(submitted)
    finished = asyncio.gather(*(last_deltas(name, requests) for name, requests in submitted))
    try:
        return await unless_client_goes(http, finished)
    finally:
        for name, requests in submitted:
            engines[name].abort(*requests)


class BrokenOffError(Exception):
    """Ends a stream without its proper end."""


class GenerationStream(Response):
    """Sends chunks as they are made, and closes their source as soon as the client goes.

    Starlette's StreamingResponse hears of that only when it next sends, which a request
    that waits in the queue does not. An event stream is pinged with comments.
    """

    def __init__(self, chunks: AsyncGenerator[str], abort: Callable[[], None], media_type: str):
        self.chunks, self.abort = chunks, abort
        self.status_code, self.background = 200, None
        self.media_type = media_type
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        sending = asyncio.create_task(self.send_chunks(send))
        gone = asyncio.create_task(client_gone(receive))
        pinging = asyncio.create_task(self.send_pings(send))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                pinging.cancel()
                if isinstance(sending.exception(), BrokenOffError):
                    return
                sending.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                note(client_gone=True)
        finally:
            gone.cancel()
            pinging.cancel()
            sending.cancel()
            self.abort()

    async def send_pings(self, send: Send) -> None:
        while self.media_type == "text/event-stream":
            await asyncio.sleep(PING_SECONDS)
            await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})

    async def send_chunks(self, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                body = chunk.encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    prefix = f"event: {name}\n" if name else ""
    return f"{prefix}data: {json.dumps(content)}\n\n"


async def generate_events(
    model_name: str, prompt: str, request: EngineRequest
) -> AsyncGenerator[str]:
    """The deltas of the text as events, then the whole response as one."""
    text = prompt
    try:
        async with deltas_in_time(model_name, request) as deltas:
            async for delta in deltas:
                text += delta.text
                if delta.text:
                    yield event({"text": delta.text})
        yield event({"generated_text": text, "model_name": model_name})
    except (TimeoutError, InferenceError, EngineStoppedError) as error:
        yield event({"detail": describe(error)}, name="error")


async def generate_plain(model_name: str, request: EngineRequest) -> AsyncGenerator[str]:
    """The text as it is made. Plain text has no place for an error, so that one is said in
    words and then breaks the response off, which every client notices."""
    try:
        async with deltas_in_time(model_name, request) as deltas:
            async for delta in deltas:
                yield delta.text
    except (TimeoutError, InferenceError, EngineStoppedError) as error:
        yield f"\n[{describe(error)}]\n"
        raise BrokenOffError from error


# --- Routes -------------------------------------------------------------------------------------

Responses = dict[int | str, dict[str, Any]]
INVALID: Responses = {422: {"model": models.ValidationErrors, "description": "Invalid request"}}
ERRORS: Responses = {
    400: {"model": models.Error, "description": FORBIDDEN_PROMPT},
    404: {"model": models.Error, "description": "No such model"},
    413: {"model": models.Error, "description": "Request body too large"},
    **INVALID,
    500: {"model": models.Error, "description": "Model inference failed"},
    503: {"model": models.Error, "description": "Overloaded or stopping; see Retry-After"},
    504: {"model": models.Error, "description": "The request took too long"},
}
EVENTS = {
    "schema": {"type": "string"},
    "example": 'data: {"text": " there was a king"}\n\n'
    'data: {"generated_text": "Once upon a time there was a king", "model_name": "gpt2"}\n\n',
}
PLAIN_TEXT: Responses = {
    200: {
        "description": "The generated text, sent as it is made",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": " there was a king"}},
    }
}
STATIC = Path(__file__).parent / "static"
PAGE = (STATIC / "index.html").read_text(encoding="utf-8")
STYLE = PAGE.partition("<style>")[2].partition("</style>")[0]
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Vary": "Accept",
    # No inline code at all, and no inline style but the page's own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; img-src 'self'; "
    f"style-src 'sha256-{b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class PageFiles(StaticFiles):
    """Files that a browser keeps, and asks each time whether they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


mimetypes.add_type("text/javascript", ".js")  # Windows may know it as plain text
app.mount("/static", PageFiles(directory=STATIC))


@app.head("/", include_in_schema=False)
@app.get("/", response_model=models.Health, tags=["service"])
async def root(http: Request) -> Any:
    """A page for browsers (`Accept: text/html`), `{"health": "ok"}` for everything else."""
    if "text/html" in http.headers.get("accept", ""):
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)
    return JSONResponse({"health": "ok"}, headers={"Vary": "Accept"})


async def exposition() -> bytes:
    """What `/metrics` shows. ray_serve.py puts that of all replicas in its place."""
    return generate_latest()


@app.get("/metrics", response_class=Response, tags=["service"])
async def metrics() -> Response:
    """Prometheus text; vLLM's names where it has the same figure."""
    return Response(await exposition(), media_type=CONTENT_TYPE_LATEST)


@app.head("/health", include_in_schema=False)
@app.get("/health", response_model=models.Health, tags=["service"])
async def health() -> Any:
    """Liveness: 200 while the process can answer."""
    return {"health": "ok"}


@app.head("/ready", include_in_schema=False)
@app.get(
    "/ready",
    response_model=models.Readiness,
    responses={503: {"model": models.Readiness, "description": "A request would be refused"}},
    tags=["service"],
)
async def ready() -> Any:
    """Readiness: 200 once a request would be accepted, else 503 and why not."""
    status = "ready"
    # What runs elsewhere holds up only a service that has nothing else to answer with.
    if all(isinstance(each, ExternalEngine) and not each.is_healthy for each in engines.values()):
        status = "no external model can be reached"
    for name, each in engines.items():
        if not isinstance(each, ExternalEngine) and not each.is_healthy:
            status = f"the engine of {name} keeps failing"
        elif each.is_full and (name not in generators or local_engine(name).is_loaded):
            status = f"the queue of {name} is full"
    if drain.has_begun:
        status = "draining"
    content = {
        "status": status,
        "model_names": list(engines),
        "loaded_model_names": loaded_names(),
        "loading_model_name": swap.loading,
    }
    return JSONResponse(content, 200 if status == "ready" else 503)


@app.post(
    "/generate",
    response_model=models.GenerateResponse,
    responses=ERRORS | {200: {"content": {"text/event-stream": EVENTS}}},
    tags=["generation"],
)
async def generate(http: Request, body: models.GenerateRequest) -> Any:
    """Continues a prompt. With `"stream": true` the text comes as server-sent events:
    `{"text": delta}` as it is made, then one with the whole response."""
    name = served_name(body.model)
    request = await submit(http, name, body.prompt, body, streams=body.stream)
    if body.stream:
        events = generate_events(name, body.prompt, request)
        return GenerationStream(events, lambda: engines[name].abort(request), "text/event-stream")
    ((delta,),) = await complete(http, [(name, [request])])
    return {"generated_text": body.prompt + delta.text, "model_name": name}


@app.post("/generate-text", include_in_schema=False)
@app.post(
    "/generate-text/",
    response_model=models.GenerateTextResponse,
    responses=ERRORS,
    tags=["generation"],
)
async def generate_texts(http: Request, body: models.GenerateTextRequest) -> Any:
    """Every served model continues the same prompt, side by side."""
    answers = await asyncio.gather(
        *(
            submit(http, name, body.prompt, body, num_sequences=body.num_return_sequences)
            for name in engines
        ),
        return_exceptions=True,
    )
    submitted = {
        name: [answer]
        for name, answer in zip(engines, answers, strict=True)
        if isinstance(answer, EngineRequest)
    }
    for answer in answers:
        if isinstance(answer, BaseException):
            for name, requests in submitted.items():
                engines[name].abort(*requests)
            raise answer
    drawn = await complete(http, submitted.items())
    return {
        "generated_texts": {
            name: [body.prompt + delta.text for delta in deltas]
            for name, deltas in zip(submitted, drawn, strict=True)
        }
    }


async def stream_plain(
    http: Request, body: models.TextRequest | models.TextQuery, source: str
) -> Response:
    name = served_name(body.model)
    request = await submit(http, name, body.prompt, body, source=source, streams=True, is_chat=True)
    chunks = generate_plain(name, request)
    return GenerationStream(chunks, lambda: engines[name].abort(request), "text/plain")


@app.get(
    "/generate/text", responses=ERRORS | PLAIN_TEXT, response_class=Response, tags=["generation"]
)
async def generate_text_from_query(
    http: Request, query: Annotated[models.TextQuery, Query()]
) -> Response:
    """The continuation as plain text while it is generated, for `curl -N`."""
    return await stream_plain(http, query, "query")


@app.post(
    "/generate/text", responses=ERRORS | PLAIN_TEXT, response_class=Response, tags=["generation"]
)
async def generate_text(http: Request, body: models.TextRequest) -> Response:
    """The same with a JSON body."""
    return await stream_plain(http, body, "body")


# --- OpenAI routes ------------------------------------------------------------------------------

LOADED_AT_SECONDS = int(time.time())
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def openai_model(model: str | None) -> str:
    """The name of the model that answers. Raises OpenAIError 404 for one not served."""
    if model is not None and model not in engines:
        message = f"The model does not exist; served: {', '.join(engines)}"
        raise OpenAIError(404, message, param="model", code="model_not_found")
    return model or default_model_name


@cache
def longest_token_characters(model_name: str) -> int:
    return max(map(len, generators[model_name].tokenizer.get_vocab()))


def check_length(num_tokens: int, max_tokens: int, context_tokens: int) -> None:
    """Raises OpenAIError 400 for a prompt that is empty or too long."""
    if num_tokens == 0:
        raise OpenAIError(400, "prompt: must hold at least one token", param="prompt")
    if num_tokens + max_tokens > context_tokens:
        raise OpenAIError(
            400,
            f"This model's maximum context length is {context_tokens} tokens, however you "
            f"requested {num_tokens + max_tokens} tokens ({num_tokens} in your prompt; "
            f"{max_tokens} for the completion)",
            param="prompt",
            code="context_length_exceeded",
        )


def encode(model_name: str, text: str, max_tokens: int, **options: bool) -> list[int]:
    """The token ids of text. Raises OpenAIError 400, and does so without encoding it when it is
    too long by its characters alone: a megabyte would hold everybody up for a second."""
    context_tokens = local_engine(model_name).max_model_len
    at_least = math.ceil(len(text) / longest_token_characters(model_name))
    if at_least > context_tokens:
        check_length(at_least, max_tokens, context_tokens)
    encoding = generators[model_name].tokenizer.backend_tokenizer.encode(text, **options)
    token_ids: list[int] = encoding.ids
    check_length(len(token_ids), max_tokens, context_tokens)
    return token_ids


def listed_prompts(body: models.CompletionRequest) -> list[str | list[int]]:
    """Each prompt, as a text or as token ids. Raises OpenAIError 400 for too many."""
    is_one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts = cast(list[str | list[int]], [body.prompt] if is_one else body.prompt)
    if len(prompts) > settings.max_queue_size:
        message = f"prompt: at most {settings.max_queue_size} in one request"
        raise OpenAIError(400, message, param="prompt")
    return prompts


def completion_prompts(
    model_name: str, body: models.CompletionRequest
) -> tuple[list[str], list[list[int]]]:
    """The prompts as text and as token ids. Raises OpenAIError 400."""
    tokenizer, chosen = generators[model_name].tokenizer, local_engine(model_name)
    prompts = listed_prompts(body)
    prompt_texts: list[str] = []
    prompts_token_ids: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            text, token_ids = prompt, encode(model_name, prompt, body.max_tokens)
        elif max(prompt) >= chosen.vocab_size:
            message = f"prompt: token ids go up to {chosen.vocab_size - 1}"
            raise OpenAIError(400, message, param="prompt")
        else:
            check_length(len(prompt), body.max_tokens, chosen.max_model_len)
            text, token_ids = tokenizer.decode(prompt), prompt
        if settings.log_prompts:
            note(prompt=[*prompt_texts, text])
        if is_forbidden_prompt(model_name, text, token_ids=token_ids):
            raise OpenAIError(400, FORBIDDEN_PROMPT, param="prompt", code="content_filter")
        prompt_texts.append(text)
        prompts_token_ids.append(token_ids)
    return prompt_texts, prompts_token_ids


def chat_prompt(model_name: str, body: models.ChatCompletionRequest) -> list[int]:
    """The token ids of a conversation, by the model's own template. Raises OpenAIError 400."""
    tokenizer = generators[model_name].tokenizer
    if not tokenizer.chat_template:
        message = f"{model_name} has no chat template: use /v1/completions"
        raise OpenAIError(400, message, param="model")
    if settings.log_prompts:
        note(prompt=[message.text for message in body.messages])
    max_tokens = body.max_completion_tokens or body.max_tokens or 1
    try:
        text = tokenizer.apply_chat_template(
            [
                {"role": "system" if m.role == "developer" else m.role, "content": m.text}
                for m in body.messages
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
    except TemplateError:
        message = "messages: the model's chat template does not take these roles in this order"
        raise OpenAIError(400, message, param="messages") from None
    token_ids = encode(model_name, text, max_tokens, add_special_tokens=False)
    texts = (message.text for message in body.messages)
    if is_forbidden_prompt(model_name, *texts, token_ids=token_ids):
        raise OpenAIError(400, FORBIDDEN_PROMPT, param="messages", code="content_filter")
    return token_ids


def openai_params(
    model_name: str,
    body: models.CompletionRequest | models.ChatCompletionRequest,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters. Raises OpenAIError 400 for what depends on the model."""
    vocab_size = local_engine(model_name).vocab_size
    logit_bias = {int(token_id): bias for token_id, bias in body.logit_bias.items()}
    if body.top_k > vocab_size:
        raise OpenAIError(400, f"top_k: goes up to {vocab_size}", param="top_k")
    if max(logit_bias, default=0) >= vocab_size:
        message = f"logit_bias: token ids go up to {vocab_size - 1}"
        raise OpenAIError(400, message, param="logit_bias")
    if body.min_tokens > max_tokens:
        message = f"min_tokens: must not be above the {max_tokens} tokens to generate"
        raise OpenAIError(400, message, param="min_tokens")
    return SamplingParams(
        max_new_tokens=max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=logit_bias,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=tuple(body.stop),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        seed=body.seed,
    )


@lru_cache(maxsize=1 << 16)
def token_bytes(model_name: str, token_id: int) -> bytes:
    """The bytes that a token stands for; of a special token, its name."""
    tokenizer = generators[model_name].tokenizer
    piece = tokenizer.convert_ids_to_tokens(token_id) or ""
    if token_id in tokenizer.all_special_ids:
        return bytes(piece, "utf-8")
    if tokenizer.convert_tokens_to_ids("Ġ") not in (None, tokenizer.unk_token_id):  # byte-level
        return bytes(BYTE_OF[character] for character in piece if character in BYTE_OF)
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    return bytes(piece.replace("▁", " "), "utf-8")


def token_string(model_name: str, token_id: int) -> str:
    """A token as OpenAI writes it: no two tokens the same."""
    raw = token_bytes(model_name, token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@lru_cache(maxsize=1 << 16)
def is_forbidden(model_name: str, token_id: int) -> bool:
    """Whether a token alone holds a forbidden word, and generated text is filtered."""
    text = token_bytes(model_name, token_id).decode(errors="replace")
    return settings.filter_output and content_filter.find(text) is not None


class Choice:
    """The tokens of one choice in OpenAI's form. Those that reach beyond the text, into a stop
    string, are left out, as what they say is unfiltered; the end-of-text token is not."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.special_ids = set(generators[model_name].tokenizer.all_special_ids)
        self.num_characters = 0  # of text so far
        self.offset = 0  # where in the text the next token begins
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def text_offset(self, token_id: int, is_prompt: bool = False) -> int:
        """Where in the text this token begins, in characters; called for each in turn."""
        start = self.offset
        if is_prompt or token_id not in self.special_ids:
            self.offset += len(self.decoder.decode(token_bytes(self.model_name, token_id)))
        return start

    def kept(self, delta: Delta) -> list[PositionLogprobs]:
        """The delta's tokens that end within the text."""
        self.num_characters += len(delta.text)
        if delta.finish_reason != "stop":
            return delta.logprobs
        decoder, end, kept = copy.deepcopy(self.decoder), self.offset, []
        for token in delta.logprobs:
            if token.token_id not in self.special_ids:
                end += len(decoder.decode(token_bytes(self.model_name, token.token_id)))
            if end > self.num_characters:
                break
            kept.append(token)
        return kept

    def completion_logprobs(
        self, delta: Delta, prompt: tuple[str, EngineRequest] | None
    ) -> dict[str, Any]:
        """prompt: one to be echoed; its first token has no probability."""
        tokens, offsets = [], []
        first_token_id = None
        if prompt:
            text, request = prompt
            self.num_characters += len(text)
            tokens += request.prompt_logprobs or []
            first_token_id = request.prompt_token_ids[0]
            offsets = [self.text_offset(id_, is_prompt=True) for id_ in request.prompt_token_ids]
        generated = self.kept(delta)
        offsets += [self.text_offset(token.token_id) for token in generated]
        tokens += generated
        token_ids = [token.token_id for token in tokens]
        token_logprobs: list[float | None] = [token.logprob for token in tokens]
        top: list[dict[str, float] | None] = [self.top(token) for token in tokens]
        if first_token_id is not None:
            token_ids.insert(0, first_token_id)
            token_logprobs.insert(0, None)
            top.insert(0, None)
        return {
            "tokens": [token_string(self.model_name, token_id) for token_id in token_ids],
            "token_logprobs": token_logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def top(self, token: PositionLogprobs) -> dict[str, float]:
        """The likeliest tokens and the token itself, each once."""
        likeliest = [*self.alternatives(token), (token.token_id, token.logprob)]
        return {token_string(self.model_name, id_): logprob for id_, logprob in likeliest}

    def alternatives(self, token: PositionLogprobs) -> list[tuple[int, float]]:
        """The likeliest tokens without those that are forbidden words."""
        return [(id_, lp) for id_, lp in token.top if not is_forbidden(self.model_name, id_)]

    def chat_logprobs(self, delta: Delta) -> dict[str, Any]:
        def written(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": token_string(self.model_name, token_id),
                "logprob": logprob,
                "bytes": list(token_bytes(self.model_name, token_id)),
            }

        content = [
            written(token.token_id, token.logprob)
            | {"top_logprobs": [written(*each) for each in self.alternatives(token)]}
            for token in self.kept(delta)
        ]
        return {"content": content, "refusal": None}


class UpstreamChoice:
    """The log probabilities of one choice as an external server gives them."""

    def completion_logprobs(
        self, delta: Delta, prompt: tuple[str, EngineRequest] | None
    ) -> dict[str, Any]:
        given = cast(ExternalDelta, delta).upstream_logprobs
        fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return given.model_dump() if given else {name: [] for name in fields}

    def chat_logprobs(self, delta: Delta) -> dict[str, Any]:
        given = cast(ExternalDelta, delta).upstream_logprobs
        return given.model_dump() if given else {"content": [], "refusal": None}


class Answer(ABC):
    """What a `/v1` route answers, whole or as a stream of chunks."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        model_name: str,
        body: models.CompletionRequest | models.ChatCompletionRequest,
        requests: list[EngineRequest],
    ):
        self.model_name = model_name
        self.requests = requests
        self.body = body
        num_choices = sum(request.num_sequences for request in requests)
        self.choices = [self.new_choice() for _ in range(num_choices)]
        self.num_completion_tokens = 0
        described = (model_name, torch.__version__, settings.dtype, settings.quantization)
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": "fp_" + hashlib.sha256(repr(described).encode()).hexdigest()[:10],
        }

    def new_choice(self) -> Choice | UpstreamChoice:
        return Choice(self.model_name)

    def usage(self) -> dict[str, int]:
        num_prompt_tokens = sum(request.num_prompt_tokens for request in self.requests)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt_tokens + self.num_completion_tokens,
        }

    @abstractmethod
    def choice(self, delta: Delta) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abstractmethod
    def chunk_choices(self, delta: Delta, is_first: bool) -> list[dict[str, Any]]:
        """What a delta adds to a streamed choice: of as many chunks, the choices."""

    def chosen(self, deltas: list[Delta]) -> list[Delta]:
        """Those of all sequences that the client gets."""
        return deltas

    async def whole(self, http: Request) -> dict[str, Any]:
        (deltas,) = await complete(http, [(self.model_name, self.requests)])
        self.num_completion_tokens = sum(len(delta.token_ids) for delta in deltas)
        choices = [self.choice(delta) for delta in self.chosen(deltas)]
        return {
            **self.head, "object": self.whole_object, "choices": choices, "usage": self.usage()
        }  # fmt: skip

    async def chunks(self) -> AsyncGenerator[str]:
        options = self.body.stream_options
        head = {**self.head, "object": self.chunk_object}
        begun = set()
        try:
            async with deltas_in_time(self.model_name, *self.requests) as deltas:
                async for delta in deltas:
                    self.num_completion_tokens += len(delta.token_ids)
                    usage = self.usage() if options.continuous_usage_stats else None
                    for choice in self.chunk_choices(delta, delta.index not in begun):
                        yield event({**head, "choices": [choice], "usage": usage})
                    begun.add(delta.index)
            if options.include_usage:
                yield event({**head, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except (TimeoutError, InferenceError, EngineStoppedError) as error:
            status = 500 if isinstance(error, InferenceError) else 503
            yield event(openai_error(status, describe(error)))

    async def response(self, http: Request) -> Any:
        if not self.body.stream:
            return await self.whole(http)
        chosen = engines[self.model_name]
        return GenerationStream(
            self.chunks(), lambda: chosen.abort(*self.requests), "text/event-stream"
        )


class CompletionAnswer(Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    body: models.CompletionRequest

    def __init__(
        self,
        model_name: str,
        body: models.CompletionRequest,
        requests: list[EngineRequest],
        prompt_texts: list[str],
    ):
        super().__init__(model_name, body, requests)
        self.prompt_texts = prompt_texts

    def choice(self, delta: Delta, is_first: bool = True) -> dict[str, Any]:
        text, prompt = delta.text, None
        if self.body.echo and is_first:
            at = delta.index // self.requests[0].num_sequences
            prompt = (self.prompt_texts[at], self.requests[at])
            text = self.prompt_texts[at] + text
        written = self.choices[delta.index].completion_logprobs
        return {
            "index": delta.index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else written(delta, prompt),
            "finish_reason": delta.finish_reason,
        }

    def chunk_choices(self, delta: Delta, is_first: bool) -> list[dict[str, Any]]:
        return [self.choice(delta, is_first)]

    def chosen(self, deltas: list[Delta]) -> list[Delta]:
        num_drawn, num_given = self.body.best_of or self.body.n, self.body.n
        if num_drawn == num_given:
            return deltas

        def mean_logprob(delta: Delta) -> float:
            logprobs = self.logprobs(delta)
            return fmean(logprobs) if logprobs else -math.inf

        best = []
        for start in range(0, len(deltas), num_drawn):
            drawn = deltas[start : start + num_drawn]
            best += sorted(drawn, key=mean_logprob, reverse=True)[:num_given]
        return best

    def logprobs(self, delta: Delta) -> list[float]:
        """Of the tokens of a choice."""
        return [token.logprob for token in delta.logprobs]

    async def whole(self, http: Request) -> dict[str, Any]:
        answer = await super().whole(http)
        for index, choice in enumerate(answer["choices"]):
            choice["index"] = index  # of those given, not of those drawn
        return answer


class ChatAnswer(Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: models.ChatCompletionRequest

    def rest(self, delta: Delta) -> dict[str, Any]:
        written = self.choices[delta.index].chat_logprobs
        return {
            "index": delta.index,
            "logprobs": written(delta) if self.body.logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, **self.rest(delta)}

    def chunk_choices(self, delta: Delta, is_first: bool) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        start = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
        return [start] * is_first + [{"delta": {"content": delta.text}, **self.rest(delta)}]


class FromUpstream(Answer):
    """An answer whose log probabilities and usage are those of an external server. It has one
    request, whatever the number of prompts."""

    def new_choice(self) -> UpstreamChoice:
        return UpstreamChoice()

    def usage(self) -> dict[str, int]:
        self.num_completion_tokens = num_generated_tokens(self.requests)
        return super().usage()


class UpstreamCompletion(FromUpstream, CompletionAnswer):
    def logprobs(self, delta: Delta) -> list[float]:
        given = self.choices[delta.index].completion_logprobs(delta, None)["token_logprobs"]
        return [logprob for logprob in given if logprob is not None]


class UpstreamChat(FromUpstream, ChatAnswer):
    pass


async def submit_upstream(
    model_name: str,
    route: Literal["completions", "chat/completions"],
    body: models.CompletionRequest | models.ChatCompletionRequest,
    texts: list[str],
    prompt_texts: list[str],
    **changes: Any,
) -> EngineRequest:
    """The request, which an external server has begun to answer. texts: what the filter reads;
    prompt_texts: what the answers follow on. changes: to the client's body.

    Raises OpenAIError 400 for a forbidden prompt, and what `ExternalEngine.submit` does.
    """
    arrived_seconds = time.monotonic()
    if settings.log_prompts:
        note(prompt=texts)
    # In a thread, because prompts may be long here.
    if await asyncio.to_thread(is_forbidden_prompt, model_name, *texts, token_ids=[]):
        param = "prompt" if route == "completions" else "messages"
        raise OpenAIError(400, FORBIDDEN_PROMPT, param=param, code="content_filter")
    ours = {"model", "stream", "stream_options", "best_of"}
    sent = body.model_dump(exclude_unset=True, exclude=ours) | changes
    request = await cast(ExternalEngine, engines[model_name]).submit(
        route,
        sent,
        prompt_texts=prompt_texts,
        num_sequences=sent.get("n", 1),
        streams=body.stream,
        request_id=request_id.get(),
        arrived_seconds=arrived_seconds,
        timeout_seconds=settings.request_timeout_seconds,
    )
    note_submitted(model_name, [request])
    return request


async def complete_upstream(
    http: Request, name: str, body: models.CompletionRequest, num_drawn: int
) -> Any:
    """The answer of an external server to `/v1/completions`."""
    prompts = listed_prompts(body)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        message = f"prompt: must be text for {name}, which is an external model"
        raise OpenAIError(400, message, param="prompt")
    changes: dict[str, Any] = {}
    if num_drawn > body.n:  # not every server draws several for one, and none in a stream
        changes = {"n": num_drawn, "logprobs": body.logprobs or 0}
    prompt_texts = [""] * len(texts) if body.echo else texts  # the text begins with it
    sending = submit_upstream(name, "completions", body, texts, prompt_texts, **changes)
    request = await unless_client_goes(http, sending)
    return await UpstreamCompletion(name, body, [request], [""]).response(http)


OPENAI_REFUSALS: dict[int | str, str] = {
    400: "Invalid, forbidden (`content_filter`) or too long (`context_length_exceeded`)",
    404: "No such model (`model_not_found`)",
    413: "Request body too large",
    "4XX": "Any other refusal",  # and no 422, which FastAPI would put here by itself
    500: "Model inference failed",
    503: "Overloaded or stopping; see Retry-After",
    504: "The request took too long",
}
OPENAI_ERRORS: Responses = {
    status: {"model": models.OpenAIError, "description": description}
    for status, description in OPENAI_REFUSALS.items()
}


def or_chunks(chunk: type[BaseModel], example: str) -> Responses:
    """200 in the OpenAPI document: with `"stream": true`, chunks as server-sent events."""
    described = f"Chunks, ended by `data: [DONE]`; each is `data:` and a `{chunk.__name__}`"
    events = {"schema": {"type": "string", "description": described}, "example": example}
    return {200: {"content": {"text/event-stream": events}}}


@app.post(
    "/v1/completions",
    response_model=models.Completion,
    responses=OPENAI_ERRORS
    | or_chunks(
        models.Completion,
        'data: {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": '
        '"gpt2", "choices": [{"index": 0, "text": " there", "logprobs": null, '
        '"finish_reason": null}], "usage": null}\n\ndata: [DONE]\n\n',
    ),
    tags=["openai"],
)
async def create_completion(http: Request, body: models.CompletionRequest) -> Any:
    """OpenAI's completions: continues one or more prompts, given as text or as token ids."""
    num_drawn = body.best_of or body.n
    if num_drawn < body.n:
        raise OpenAIError(400, "best_of: must not be below n", param="best_of")
    if num_drawn > body.n and body.stream:
        raise OpenAIError(400, "best_of: must be n in a stream", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise OpenAIError(400, "max_tokens: 0 needs echo", param="max_tokens")
    name = openai_model(body.model)
    if isinstance(engines[name], ExternalEngine):
        return await complete_upstream(http, name, body, num_drawn)
    num_logprobs = 0 if body.logprobs is None and num_drawn > body.n else body.logprobs
    num_prompt_logprobs = body.logprobs if body.echo else None
    params = openai_params(name, body, body.max_tokens, num_logprobs, num_prompt_logprobs)
    # In a thread, because prompts may be long here.
    prompt_texts, prompts = await asyncio.to_thread(completion_prompts, name, body)
    requests = local_engine(name).submit_all(
        prompts, params, num_sequences=num_drawn, streams=body.stream
    )
    note_submitted(name, requests)
    return await CompletionAnswer(name, body, requests, prompt_texts).response(http)


@app.post(
    "/v1/chat/completions",
    response_model=models.ChatCompletion,
    responses=OPENAI_ERRORS
    | or_chunks(
        models.ChatCompletionChunk,
        'data: {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, '
        '"model": "gpt2", "choices": [{"index": 0, "delta": {"content": " there"}, "logprobs": '
        'null, "finish_reason": null}], "usage": null}\n\ndata: [DONE]\n\n',
    ),
    tags=["openai"],
)
async def create_chat_completion(http: Request, body: models.ChatCompletionRequest) -> Any:
    """OpenAI's chat completions, for models with a chat template."""
    if body.top_logprobs and not body.logprobs:
        raise OpenAIError(400, "top_logprobs: needs logprobs", param="top_logprobs")
    name = openai_model(body.model)
    chosen = engines[name]
    if isinstance(chosen, ExternalEngine):
        texts = [message.text for message in body.messages]
        sending = submit_upstream(name, "chat/completions", body, texts, [""])
        sent = await unless_client_goes(http, sending)
        return await UpstreamChat(name, body, [sent]).response(http)
    prompt = await asyncio.to_thread(chat_prompt, name, body)
    max_tokens = body.max_completion_tokens or body.max_tokens or chosen.max_model_len - len(prompt)
    params = openai_params(name, body, max_tokens, body.top_logprobs if body.logprobs else None)
    request = chosen.submit(prompt, params, num_sequences=body.n, streams=body.stream)
    note_submitted(name, [request])
    return await ChatAnswer(name, body, [request]).response(http)


def describe_model(name: str) -> dict[str, Any]:
    is_external = isinstance(engines[name], ExternalEngine)
    return {
        "id": name,
        "object": "model",
        "created": LOADED_AT_SECONDS,
        "owned_by": "external" if is_external else name.rpartition("/")[0] or "local",
        "max_model_len": engines[name].max_model_len,
    }


@app.get("/v1/models", response_model=models.ModelList, tags=["openai"])
async def list_models() -> Any:
    """The served models, the default one first."""
    return {"object": "list", "data": [describe_model(name) for name in engines]}


@app.get(
    "/v1/models/{model_id:path}",
    response_model=models.Model,
    responses={404: OPENAI_ERRORS[404], "4XX": OPENAI_ERRORS["4XX"]},
    tags=["openai"],
)
async def retrieve_model(http: Request, model_id: str) -> Any:
    """One served model."""
    model_id = model_id.replace(http.scope.get("encoded_slash", "/"), "/")
    return describe_model(openai_model(model_id))


# What browsers and crawlers ask for by themselves.
NOT_A_PROMPT = re.compile(
    r"\..*|static-offline-docs|.*\.(ico|txt|xml|png|svg|jpg|css|js|map|json|webmanifest|php|html?)",
    re.IGNORECASE,
)


@app.get(
    "/{prompt}",
    response_model=models.GeneratedSequences,
    responses=ERRORS,
    tags=["generation"],
)
async def generate_from_path(
    http: Request,
    response: Response,
    prompt: Annotated[models.Prompt, PathParameter()],
    query: Annotated[models.PromptQuery, Query()],
) -> Any:
    """Continues the URL-encoded path: `/Once%20upon%20a%20time?max_new_tokens=50`."""
    if NOT_A_PROMPT.fullmatch(prompt):
        raise HTTPException(404, "Not Found")
    prompt = prompt.replace(http.scope.get("encoded_slash", "/"), "/")
    name = served_name(query.model)
    request = await submit(
        http, name, prompt, query, source="query", num_sequences=query.num_return_sequences
    )
    (deltas,) = await complete(http, [(name, [request])])
    response.headers["Cache-Control"] = "no-store"
    return {"generated_sequences": [prompt + delta.text for delta in deltas]}


# --- The OpenAPI document -----------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    """FastAPI's document, in which `top_k` ends at the vocabulary, as it does in fact."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        sizes = [each.vocab_size for each in engines.values() if isinstance(each, Engine)]
        fields = [s.get("properties", {}) for s in document["components"]["schemas"].values()]
        for operations in document["paths"].values():
            for operation in operations.values():
                parameters = operation.get("parameters", ())
                fields.append({each["name"]: each["schema"] for each in parameters})
        for each in fields:
            if "top_k" in each and sizes:
                each["top_k"]["maximum"] = min(sizes)
    return app.openapi_schema or {}


# As FastAPI's own documentation has it (Advanced: Extending OpenAPI).
app.openapi = openapi  # type: ignore[method-assign]
