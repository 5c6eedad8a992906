"""Pure ASGI middleware, one job each. From the outside in:

RequestContextMiddleware  the request's id, its log line, headers that every answer has
HeadLimitMiddleware       414 and 431: a URL or headers that are too long
ApiKeyMiddleware          401: who may pass
ShutdownMiddleware        503: the service is stopping
RateLimitMiddleware       429: requests and tokens a minute (serving/rate_limits.py)

Not BaseHTTPMiddleware, under which a route never hears that its client has gone.
"""

import hashlib
import hmac
import re
import time
import uuid
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import quote, unquote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import STOPPING, error_response, retry_after
from serving.logs import add_to_log, log_request, request_facts, request_id
from serving.metrics import HTTP_REQUESTS
from serving.settings import Settings, refuse_setting
from serving.shutdown import GracefulShutdown

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
MAX_URL_BYTES = 16_384  # of the path and query; 500 characters, percent-encoded, take 6,000
MAX_HEADERS_BYTES = 65_536
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
    """Refuses a URL or headers that are too long."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
                refusal = error_response(scope, 414, f"URL is longer than {MAX_URL_BYTES} bytes")
                return await refusal(scope, receive, send)
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS_BYTES:
                refusal = error_response(scope, 431, f"Headers exceed {MAX_HEADERS_BYTES} bytes")
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


def address_identity(client: tuple[str, int] | None) -> str:
    """Whom an address stands for: itself, or its /64, all of which one client has. However it is
    written; `unknown` for what is none, such as a socket's path."""
    try:
        address = ip_address(client[0].partition("%")[0] if client else "")
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        if not address.ipv4_mapped:
            return f"address {IPv6Address(int(address) >> 64 << 64)}/64"
        address = address.ipv4_mapped
    return f"address {address}"


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
        scope["client_identity"] = address_identity(scope.get("client"))
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
