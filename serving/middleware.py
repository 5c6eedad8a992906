"""Pure ASGI middleware, one job each. From the outside in:

RequestContextMiddleware  the request's id, its log line, headers that every answer has
HeadLimitMiddleware       414, 431 and 400: a URL or headers that are too long, two hosts or none;
                          encoded slashes
BrowserMiddleware         421 and 403, in browsers.py: pages of other sites
ApiKeyMiddleware          401: who may pass
ShutdownMiddleware        503: the service is stopping
RateLimitMiddleware       429: requests and tokens a minute (serving/rate_limits.py)
UnexpectedErrorMiddleware 500: what nobody else has caught
BodyLimitMiddleware       413: a body that is too large

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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import STOPPING, UNEXPECTED, error_response, retry_after, route_path
from serving.logs import add_to_log, log_request, request_facts, request_id
from serving.metrics import HTTP_REQUESTS
from serving.settings import Settings, refuse_setting
from serving.shutdown import GracefulShutdown

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
MAX_URL_BYTES = 16_384  # of the path and query; 500 characters, percent-encoded, take 6,000
MAX_HEADERS_BYTES = 65_536
EVERY_ANSWERS_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # a path may be a prompt
    (b"x-frame-options", b"DENY"),
)
# Stands for an encoded slash while routing: `GET /{prompt}` takes one segment, which may hold one.
# The first that the path does not hold itself is taken: a URL has no room for all of them.
ENCODED_SLASHES = [chr(code) for code in range(0xE000, 0xF900)]

# Which orchestrators ask for under a pod's own address.
PROBES = frozenset({"/health", "/healthz", "/livez", "/ping", "/ready", "/readyz"})
PAGE_FILES = "/static/"
DOCS = frozenset({"/docs", "/redoc", "/openapi.json"})
DOCS_FILES = "/static-offline-docs/"


def is_open(path: str) -> bool:
    """Whether everybody may ask for this, at any time. A new route never is by accident."""
    return path == "/" or path in PROBES or path.startswith(PAGE_FILES)


class RequestContextMiddleware:
    """Gives a request its id, its log line, and the headers that every answer has."""

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
        started_seconds = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", id_.encode()),
                    *EVERY_ANSWERS_HEADERS,
                ]
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
    """Refuses a URL or headers that are too long, and a host that is not said once; reads the path
    of the others.

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
            keep_encoded_slashes(scope)
        await self.app(scope, receive, send)


def read_api_keys(settings: Settings) -> dict[bytes, str]:
    """The name of every API key, by the key's digest; empty: no key is needed."""
    listed = settings.api_keys.get_secret_value().split(",") if settings.api_keys else []
    file = settings.api_keys_file
    # What is no UTF-8 is refused below; a byte order mark, which editors add, is no part of a key.
    lines = file.read_text("utf-8-sig", "replace").splitlines() if file else []
    entries = [("API_KEYS", entry.strip()) for entry in listed]
    entries += [("API_KEYS_FILE", line.strip()) for line in lines]
    names = {}
    for number, (variable, entry) in enumerate((each for each in entries if each[1]), start=1):
        name, colon, key = (part.strip() for part in entry.rpartition(":"))
        if not key:  # an empty key would be that of everybody who sends none
            refuse_setting(variable, f"entry {number} has a name and no key")
        if not re.fullmatch("[!-~]+", key):  # which no header brings as it is written here
            reason = "has blanks, or other than ASCII letters, digits and signs"
            refuse_setting(variable, f"the key of entry {number} {reason}")
        names[key_digest(key)] = name if colon else f"key-{number}"
    if (listed or file) and not names:
        refuse_setting("API_KEYS_FILE" if file else "API_KEYS", "holds no key")
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

    Says in `scope["client_identity"]` whom limits are counted for, and in `scope["key_name"]` whose
    key it is.
    key_names: by the key's digest; empty: no key is needed.
    """

    def __init__(
        self,
        app: ASGIApp,
        key_names: dict[bytes, str],
        metrics_need_key: bool,
        docs_need_key: bool,
    ):
        self.app = app
        self.key_names = key_names
        self.metrics_need_key = metrics_need_key
        self.docs_need_key = docs_need_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(route_path(scope)):
            return await self.app(scope, receive, send)
        scope["client_identity"] = address_identity(scope.get("client"))
        if self.key_names and self.needs_key(route_path(scope)):
            name = self.key_name(Headers(scope=scope))
            if name is None:
                headers = {"WWW-Authenticate": "Bearer"}
                detail = "An API key is needed: Authorization: Bearer <key>, or X-API-Key"
                refusal = error_response(scope, 401, detail, headers, code="invalid_api_key")
                return await refusal(scope, receive, send)
            scope["client_identity"], scope["key_name"] = f"key {name}", name
            add_to_log(key=name)
        await self.app(scope, receive, send)

    def needs_key(self, path: str) -> bool:
        if path == "/metrics":
            return self.metrics_need_key
        return self.docs_need_key or not (path in DOCS or path.startswith(DOCS_FILES))

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
            path = route_path(scope)
            if not is_open(path) and path != "/metrics":
                refusal = error_response(scope, 503, STOPPING, retry_after())
                return await refusal(scope, receive, send)
        await self.app(scope, receive, send)


class UnexpectedErrorMiddleware:
    """Answers 500 where others can still add their headers, and raises the error on for the log."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception:
            if scope["type"] == "http" and not has_begun:
                await error_response(scope, 500, UNEXPECTED)(scope, receive, send)
            raise


class BodyLimitMiddleware:
    """Refuses a body that is too large, as soon as its length says so or too much has come of it:
    also one that no route reads."""

    def __init__(self, app: ASGIApp, max_body_bytes: int):
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        num_bytes, has_begun = 0, False

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            # A client that has gone is what the app knows how to end its work for.
            return message if num_bytes <= self.max_body_bytes else {"type": "http.disconnect"}

        async def send_within_limit(message: Message) -> None:
            nonlocal has_begun
            if has_begun or num_bytes <= self.max_body_bytes:
                has_begun = True
                await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"")
        is_too_large = length.isdigit() and int(length) > self.max_body_bytes
        if not is_too_large:
            await self.app(scope, receive_within_limit, send_within_limit)
        if not has_begun and (is_too_large or num_bytes > self.max_body_bytes):
            detail = f"Request body is larger than {self.max_body_bytes} bytes"
            await error_response(scope, 413, detail)(scope, receive, send)
