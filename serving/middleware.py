"""Pure ASGI middleware, one job each. From the outside in:

RequestContextMiddleware  the request's id, its log line, headers that every answer has
HeadLimitMiddleware       414, 431 and 400: a URL or headers that are too long, two hosts or none
ApiKeyMiddleware          401: who may pass
ShutdownMiddleware        503: the service is stopping
RateLimitMiddleware       429: requests and tokens a minute

Not BaseHTTPMiddleware, under which a route never hears that its client has gone.
"""

import asyncio
import hashlib
import hmac
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from logging import getLogger
from typing import Any
from urllib.parse import quote, unquote

from limits import RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import STOPPING, error_response, retry_after
from serving.logs import (
    add_to_log,
    first_line,
    log_request,
    num_generated_tokens,
    request_facts,
    request_id,
)
from serving.metrics import HTTP_REQUESTS, RATE_LIMIT_REFUSALS
from serving.settings import Settings, open_storage, refuse_setting
from serving.shutdown import GracefulShutdown

logger = getLogger("service")

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
MAX_URL_BYTES = 16_384  # of the path and query; 500 characters, percent-encoded, take 6,000
MAX_HEADERS_BYTES = 65_536
EVERY_ANSWERS_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # a path may be a prompt
    (b"x-frame-options", b"DENY"),
)
STORAGE_TIMEOUT_SECONDS = 1.0  # for the counts that a request's limits look up
STORAGE_PAUSE_SECONDS = 10.0  # for which nothing is limited, after the storage has failed
# Stands for an encoded slash while routing: `GET /{prompt}` takes one segment, which may hold one.
# The first that the path does not hold itself is taken.
ENCODED_SLASHES = [chr(code) for code in range(0xE000, 0xF900)]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
PAGE_FILES = "/static/"


def is_open(path: str) -> bool:
    """Whether everybody may ask for this, at any time. A new route never is by accident."""
    return path in OPEN_PATHS or path.startswith(PAGE_FILES)


class RequestContextMiddleware:
    """Gives a request its id and its log line, and a 413 the shape of other errors."""

    VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        id_ = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id_ = scope["request_id"] = id_ if self.VALID_ID.fullmatch(id_) else uuid.uuid4().hex
        request_id.set(id_)
        facts: dict[str, Any] = {}
        request_facts.set(facts)
        keep_encoded_slashes(scope)
        started_seconds = time.monotonic()
        status, too_large = 0, JSONResponse(None)

        async def send_with_id(message: Message) -> None:
            nonlocal status, too_large
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 413:  # the body limit answers in plain text
                    detail = f"Request body is larger than {self.max_body_bytes} bytes"
                    too_large = error_response(scope, 413, detail)
                    message["headers"] = too_large.raw_headers
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", id_.encode()),
                    *EVERY_ANSWERS_HEADERS,
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
            route = getattr(scope.get("route"), "path", "-")
            method = scope["method"] if scope["method"] in METHODS else "other"
            log_request(method, route, status or 500, time.monotonic() - started_seconds, facts)
            HTTP_REQUESTS.labels(method, route, status or 500).inc()


def keep_encoded_slashes(scope: Scope) -> None:
    """Puts a placeholder in place of each encoded slash of the path; see `with_slashes`."""
    raw_path = scope.get("raw_path", b"").decode("latin-1")
    if "%2f" in raw_path.lower():
        slash = next(char for char in ENCODED_SLASHES if char not in scope["path"])
        scope["encoded_slash"] = slash
        scope["path"] = unquote(re.sub("%2[fF]", quote(slash), raw_path))


def with_slashes(scope: Scope, segment: str) -> str:
    """A segment of the path as the client meant it."""
    return segment.replace(scope.get("encoded_slash", "/"), "/")


class HeadLimitMiddleware:
    """Refuses a URL or headers that are too long, and a host that is not said once.

    By then a server has parsed them: uvicorn none that are longer (serving/http_protocol.py),
    Ray's proxy whatever comes.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
                refusal = error_response(scope, 414, f"URL is longer than {MAX_URL_BYTES} bytes")
                return await refusal(scope, receive, send)
            num_bytes = num_hosts = 0
            for name, value in scope["headers"]:
                num_bytes += len(name) + len(value)
                num_hosts += name == b"host"
            if num_bytes > MAX_HEADERS_BYTES:
                refusal = error_response(scope, 431, f"Headers exceed {MAX_HEADERS_BYTES} bytes")
                return await refusal(scope, receive, send)
            # RFC 9112, section 3.2: of two, a proxy in front may have gone by the other one.
            if num_hosts > 1 or (num_hosts == 0 and scope["http_version"] == "1.1"):
                refusal = error_response(scope, 400, "There must be one Host header")
                return await refusal(scope, receive, send)
        await self.app(scope, receive, send)


def read_api_keys(settings: Settings) -> dict[bytes, str]:
    """The name of every API key, by the key's digest; empty: no key is needed."""
    entries = (settings.api_keys.get_secret_value() if settings.api_keys else "").split(",")
    if settings.api_keys_file:
        entries += settings.api_keys_file.read_text().splitlines()
    names = {}
    for number, entry in enumerate(filter(None, map(str.strip, entries)), start=1):
        name, colon, key = (part.strip() for part in entry.rpartition(":"))
        if not key:  # an empty key would be that of everybody who sends none
            refuse_setting("API_KEYS", f"entry {number} has a name and no key")
        names[key_digest(key)] = name if colon else f"key-{number}"
    if (settings.api_keys or settings.api_keys_file) and not names:
        refuse_setting("API_KEYS", "holds no key")
    return names


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class ApiKeyMiddleware:
    """Lets nobody pass without a key, where there are keys, but to what `is_open`.

    Says in `scope["client_identity"]` whom limits are counted for.
    key_names: by the key's digest; empty: no key is needed.
    """

    def __init__(self, app: ASGIApp, key_names: dict[bytes, str], metrics_need_key: bool):
        self.app = app
        self.key_names = key_names
        self.metrics_need_key = metrics_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            return await self.app(scope, receive, send)
        client = scope.get("client")
        scope["client_identity"] = f"address {client[0]}" if client else "unknown"
        is_free = scope["path"] == "/metrics" and not self.metrics_need_key
        if self.key_names and not is_free:
            name = self.key_name(Headers(scope=scope))
            if name is None:
                headers = {"WWW-Authenticate": "Bearer"}
                detail = "An API key is needed: Authorization: Bearer <key>, or X-API-Key"
                refusal = error_response(scope, 401, detail, headers, code="invalid_api_key")
                return await refusal(scope, receive, send)
            scope["client_identity"] = f"key {name}"
            add_to_log(key=name)
        await self.app(scope, receive, send)

    def key_name(self, headers: Headers) -> str | None:
        """The name of the key that the request brings, compared in constant time."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        sent_digest, found = key_digest(sent), None
        for known, name in self.key_names.items():
            if hmac.compare_digest(known, sent_digest):
                found = name
        return found


class ShutdownMiddleware:
    """Refuses new work once the service is stopping."""

    def __init__(self, app: ASGIApp, shutdown: GracefulShutdown):
        self.app = app
        self.shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.shutdown.has_begun:
            path = scope["path"]
            if not is_open(path) and path != "/metrics":
                refusal = error_response(scope, 503, STOPPING, retry_after())
                return await refusal(scope, receive, send)
        await self.app(scope, receive, send)


class RateLimitMiddleware:
    """Counts requests and generated tokens a minute for each `client_identity`.

    Requests count as they come, tokens once they are made: also those of a client that has gone.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.limiter = FixedWindowRateLimiter(open_storage(settings.rate_limit_storage))
        self.paused_until_seconds = 0.0
        amounts = {"requests": settings.rate_limit, "tokens": settings.token_rate_limit}
        self.limits = {
            name: RateLimitItemPerMinute(amount) for name, amount in amounts.items() if amount
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_limited = scope["type"] == "http" and bool(self.limits) and not self.is_paused
        if not is_limited or is_open(scope["path"]) or scope["path"] == "/metrics":
            return await self.app(scope, receive, send)
        headers: dict[str, str] = {}
        refusal: Response | None = None
        async with self.counting():
            refusal, headers = await self.admit(scope)
        if refusal:
            refusal.headers.update(headers)
            return await refusal(scope, receive, send)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            cost = num_generated_tokens()
            if "tokens" in self.limits and cost and not self.is_paused:
                identity = scope["client_identity"]
                async with self.counting():
                    await self.limiter.hit(self.limits["tokens"], "tokens", identity, cost=cost)

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self.paused_until_seconds

    @asynccontextmanager
    async def counting(self) -> AsyncGenerator[None]:
        """Around look-ups of counts. Fail open: while their storage is down, nothing is limited;
        and it is not asked again for every request."""
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_SECONDS):
                yield
        except (StorageError, TimeoutError) as error:
            if not self.is_paused:
                pause = STORAGE_PAUSE_SECONDS
                logger.error("no rate limits for %g s: %s", pause, first_line(error))
            self.paused_until_seconds = time.monotonic() + STORAGE_PAUSE_SECONDS

    async def admit(self, scope: Scope) -> tuple[Response | None, dict[str, str]]:
        """The refusal, if it is one, and the headers that tell of the limits."""
        headers: dict[str, str] = {}
        refused = None
        identity = scope["client_identity"]
        for name, limit in self.limits.items():
            if name == "requests":
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
                    retry_after(wait_seconds),
                    code="rate_limit_exceeded",
                )
        return refused, headers


def cors_options(settings: Settings) -> dict[str, Any]:
    """What Starlette's CORSMiddleware is to allow."""
    told = [
        f"X-RateLimit-{what}-{of}"
        for what in ("Limit", "Remaining", "Reset")
        for of in ("Requests", "Tokens")
    ]
    return {
        "allow_origins": [origin.strip() for origin in settings.cors_origins.split(",")],
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
        "expose_headers": ["X-Request-ID", "Retry-After", *told],
    }
