"""How much a connection may send, how slowly, and how many there may be.

uvicorn parses HTTP with httptools and has no limit to the head of a request, no time limits but
that between requests, and none to what waits for a client that does not read. All of that is
before or beyond the app, so it is done here, in uvicorn's own protocol. The times are looked at
in one sweep over all connections, not with a timer for each.
"""

import asyncio
import logging
import sys
import uuid
from collections import Counter
from functools import partial
from typing import Any, Literal

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.errors import error_response
from serving.logs import log_request, request_id
from serving.metrics import CLOSED_CONNECTIONS, HTTP_REQUESTS
from serving.middleware import EVERY_ANSWERS_HEADERS, MAX_HEADERS_BYTES, MAX_URL_BYTES
from serving.settings import Settings

if sys.platform != "win32":
    import resource

logger = logging.getLogger("service")

SWEEP_SECONDS = 0.5
# What the parser gets at a time: it goes on to the end of it, whatever it finds.
PIECE_BYTES = 16_384
MAX_REQUESTS_AHEAD = 16  # sent before the last one is answered; together MAX_HEADERS_BYTES at most
# What a client that was refused may still send until it has read why; then it is cut off.
LINGER_SECONDS = 2.0
LINGER_BYTES = 1_000_000

# What is to come next from the client: a request, the rest of its head, or the rest of its body.
Awaited = Literal["request", "head", "body"]


class OpenConnections:
    """The connections of this process, from the oldest to the newest, and their limits."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.max_connections = settings.max_connections
        self.members: dict[BoundedProtocol, None] = {}
        self.num_closed: Counter[str] = Counter()  # by reason, since the last sweep

    def watch(self, server: uvicorn.Server) -> None:
        """From now on the server's connections are bounded; to be called before it listens."""
        self.max_connections = self._affordable_connections()
        # Until all that wait in the listening socket have been accepted, none of them is counted.
        server.config.backlog = min(server.config.backlog, max(1, self.max_connections // 2))
        server.config.http_protocol_class = partial(BoundedProtocol, self)  # type: ignore[assignment]
        self.sweep()

    def _affordable_connections(self) -> int:
        """MAX_CONNECTIONS, or half of the files that the process may open, if that is less: the
        other half is for its own, and for a connection to another server for each of these."""
        wanted = self.settings.max_connections
        if sys.platform == "win32":
            return wanted
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < 2 * wanted:
            soft = 2 * wanted if hard == resource.RLIM_INFINITY else min(2 * wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if soft < 2 * wanted:
                logger.warning(
                    "MAX_CONNECTIONS: %d at most, of %d files that may be open", soft // 2, soft
                )
                return soft // 2
        return wanted

    def add(self, connection: "BoundedProtocol") -> None:
        if len(self.members) >= self.max_connections:
            self._make_room()
        self.members[connection] = None
        if len(self.members) > self.max_connections:
            connection.cut_off("limit")  # all others are at work

    def _make_room(self) -> None:
        """Closes a sixteenth of those that nothing is being done for: first those of the client
        that has most, of them the oldest. One at a time would mean to look at all each time."""
        num_of_client = Counter(each.client_address for each in self.members)
        waiting = [each for each in self.members if not each.is_worked_for]
        waiting.sort(key=lambda each: -num_of_client[each.client_address])
        for connection in waiting[: max(1, self.max_connections // 16)]:
            connection.cut_off("limit")

    def sweep(self) -> None:
        """Ends what has taken too long, now and then again."""
        loop = asyncio.get_running_loop()
        loop.call_later(SWEEP_SECONDS, self.sweep)
        now_seconds = loop.time()
        for connection in list(self.members):
            connection.check_times(now_seconds)
        if self.num_closed:
            total, by_reason = self.num_closed.total(), dict(self.num_closed)
            logger.warning("closed %d connections: %s", total, by_reason)
            self.num_closed.clear()


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Every byte that is not of a body is counted, request by request."""

    def __init__(self, peers: OpenConnections, **options: Any):
        super().__init__(**options)
        self.ws_protocol_class = None  # there is no WebSocket here, and it would escape the limits
        self.peers = peers
        settings = peers.settings
        self.write_timeout_seconds = settings.write_timeout_seconds
        self.patience_seconds: dict[Awaited, float] = {
            "request": self.timeout_keep_alive,
            "head": settings.head_timeout_seconds,
            "body": settings.body_timeout_seconds,
        }
        self.url = b""
        self.answering: RequestResponseCycle | None = None  # `cycle` is of the newest request
        self.is_refused = False
        self.num_head_bytes = 0  # of the request that is coming in; of a piece too many, at most
        self.num_body_bytes = 0  # of the present piece
        self.num_bytes_ahead = 0
        self.num_unsent_bytes = 0  # at the last sweep
        self.sent_seconds = self.loop.time()  # when a sweep last saw fewer, or none
        self.expect("request")

    def new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # As uvicorn has it: requests that were sent ahead of an answer are parsed all the same.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def expect(self, awaited: Awaited) -> None:
        self.awaited = awaited
        self.since_seconds = self.loop.time()

    @property
    def client_address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def has_unanswered(self) -> bool:
        return self.answering is not None and not self.answering.response_complete

    @property
    def is_worked_for(self) -> bool:
        """Whether a request is here as a whole and its client takes what is sent."""
        is_whole = self.has_unanswered and not (self.answering and self.answering.more_body)
        return is_whole and not self.flow.write_paused

    # --- What comes in --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.peers.members.pop(self, None)
        self.tell_of_disconnect()
        super().connection_lost(exc)

    def tell_of_disconnect(self) -> None:
        """uvicorn tells only the newest request, which may wait behind the one at work."""
        if self.answering and self.has_unanswered:
            self.answering.disconnected = True
            self.answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():
                return
            self.piece_received(data[start : start + PIECE_BYTES])

    def piece_received(self, piece: bytes) -> None:
        if self.is_refused:
            self.num_head_bytes += len(piece)
            if self.num_head_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        if self.awaited == "request":
            self.expect("head")
        self.num_body_bytes = 0
        self.parse(piece)
        self.num_head_bytes += len(piece) - self.num_body_bytes
        if self.num_head_bytes > MAX_HEADERS_BYTES and not self.is_refused:
            if len(self.url) > MAX_URL_BYTES:
                self.refuse(414, f"URL is longer than {MAX_URL_BYTES} bytes")
            else:
                self.refuse(431, f"Headers exceed {MAX_HEADERS_BYTES} bytes")
        if self.pipeline:
            self.num_bytes_ahead += len(piece)
            is_too_much = self.num_bytes_ahead > MAX_HEADERS_BYTES
            if is_too_much or len(self.pipeline) > MAX_REQUESTS_AHEAD:
                self.cut_off("pipelined")

    def parse(self, piece: bytes) -> None:
        """What uvicorn does with it, but that an upgrade which the client offers is ignored (RFC
        9110, 7.8). JDK's HttpClient offers HTTP/2 with its first request on a connection."""
        self._unset_keepalive_if_required()
        try:
            while piece:
                try:
                    self.parser.feed_data(piece)
                    return
                except httptools.HttpParserUpgrade as offer:
                    (num_parsed_bytes,) = offer.args
                    self.parse_head_without_offer()
                    piece = piece[num_parsed_bytes:]
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def parse_head_without_offer(self) -> None:
        """Has a new parser begin the request again. httptools takes all that follows a head with an
        offer for another protocol's, whatever length the head tells."""
        num_head_bytes = self.num_head_bytes
        lines = [b"%b: %b" % each for each in self.headers if each[0] != b"upgrade"]
        start = self.parser.get_method() + b" " + self.url
        start += b" HTTP/" + self.parser.get_http_version().encode()
        self.parser = self.new_parser()
        self.parser.feed_data(b"\r\n".join([start, *lines, b"", b""]))
        self.num_head_bytes = num_head_bytes

    @property
    def has_offer(self) -> bool:
        """Whether the request that is being parsed comes again without its upgrade."""
        return self.parser.should_upgrade()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.num_head_bytes = 0
        if self.awaited == "request":  # another one in the same piece
            self.expect("head")

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("only a proxy connects to others")
        if self.has_offer:
            return
        super().on_headers_complete()
        self.expect("body")
        if self.pipeline:
            # uvicorn would read no further, and would not hear its client leave.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self.num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.has_offer:
            return
        self.expect("request")
        super().on_message_complete()

    # --- What goes out --------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.answering = cycle
        if cycle.scope["http_version"] != "1.1":
            app = partial(answer_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self.awaited != "body":  # of which the rest may still come, in the time that is left
            self.expect(self.awaited)
        super().on_response_complete()
        if not self.pipeline:
            self.num_bytes_ahead = 0

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, detail: str) -> None:
        """Answers in the app's place, and lets nothing follow."""
        if self.answering and self.has_unanswered:
            if not self.answering.more_body:  # it is the next request that is wrong
                self.answering.keep_alive = False
                self.pipeline.clear()
                return self.ignore_the_rest()
            if self.answering.response_started:
                return self.cut_off("body")
        elif self.awaited == "body":  # of a request that has been answered
            return self.cut_off("body")
        seconds = self.loop.time() - self.since_seconds
        token = request_id.set(uuid.uuid4().hex)
        headers = {"Connection": "close", "X-Request-ID": request_id.get()}
        response = error_response({"path": self.url.decode("latin-1")}, status, detail, headers)
        lines = [*self.server_state.default_headers, *response.raw_headers, *EVERY_ANSWERS_HEADERS]
        head = b"".join(b"%b: %b\r\n" % line for line in lines)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(response.body))
        log_request("other", "-", status, seconds, {})
        HTTP_REQUESTS.labels("other", "-", status).inc()
        request_id.reset(token)
        self.tell_of_disconnect()
        # To close while more comes in would take from the client what it has not read yet.
        self.ignore_the_rest()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:  # TLS
            self.transport.close()

    def ignore_the_rest(self) -> None:
        self.is_refused = True
        self.num_head_bytes = 0
        self.since_seconds = self.loop.time()
        self.flow.resume_reading()

    def cut_off(self, reason: str) -> None:
        self.transport.abort()
        self.peers.members.pop(self, None)
        self.peers.num_closed[reason] += 1
        CLOSED_CONNECTIONS.labels(reason).inc()

    # --- How long it takes ----------------------------------------------------------------------

    def check_times(self, now_seconds: float) -> None:
        """Ends the connection if its client has been too slow."""
        num_unsent_bytes = self.transport.get_write_buffer_size()
        if num_unsent_bytes == 0 or num_unsent_bytes < self.num_unsent_bytes:
            self.sent_seconds = now_seconds
        self.num_unsent_bytes = num_unsent_bytes
        waited_seconds = now_seconds - self.since_seconds
        if now_seconds - self.sent_seconds > self.write_timeout_seconds:
            self.cut_off("unread")
        elif self.has_unanswered:
            pass
        elif self.is_refused:
            if waited_seconds > LINGER_SECONDS:
                self.transport.abort()
        elif waited_seconds <= self.patience_seconds[self.awaited]:
            pass
        elif self.awaited == "request":
            self.transport.close()
        else:
            seconds = self.patience_seconds[self.awaited]
            self.refuse(
                408, f"The {self.awaited} of the request took longer than {seconds:g} seconds"
            )


async def answer_without_chunks(
    app: Any, cycle: RequestResponseCycle, scope: Any, receive: Any, send: Any
) -> None:
    """Runs the app for a client of HTTP/1.0, which knows no chunks: the end of the connection is
    that of the answer. uvicorn sends chunks to everybody."""

    is_sized = True

    async def send_plainly(message: Any) -> None:
        nonlocal is_sized
        if message["type"] == "http.response.start":
            is_sized = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not is_sized:
                cycle.chunked_encoding = False
        elif not is_sized:  # each piece is as long as it is
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plainly)
