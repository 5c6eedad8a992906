"""What a connection may send, how slowly, and how many there may be: a real uvicorn with short
times, and one that may open few files."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import PROMPT, Served, metric, served, wait_until

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT = {"prompt": PROMPT, "max_new_tokens": 2}
LONG = {"prompt": PROMPT, "max_tokens": 250, "n": 8, "ignore_eos": True, "logprobs": 5}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    seconds = {"HEAD": "2", "BODY": "2", "WRITE": "2"}
    settings = {f"{name}_TIMEOUT_SECONDS": value for name, value in seconds.items()}
    with served("--timeout-keep-alive", "2", TORCH_NUM_THREADS="1", **settings) as made:
        yield made
        assert made.process.poll() is None


def connect(service: Served, from_address: str = "127.0.0.1", **options: Any) -> socket.socket:
    host, port = service.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30, (from_address, 0), **options)


def read_until_closed(connection: socket.socket) -> bytes:
    got = b""
    try:
        while piece := connection.recv(65_536):
            got += piece
    except ConnectionResetError:
        pass
    return got


def exchange(service: Served, *pieces: bytes) -> bytes:
    """All that is answered until the connection closes."""
    with connect(service) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_until_closed(connection)


def as_request(fields: dict[str, Any], path: str = "/generate", more: bytes = b"") -> bytes:
    body = json.dumps(fields).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    return POST.replace(b"/generate", path.encode()) + more + length + b"\r\n" + body


def refusal(answer: bytes) -> tuple[int, Any]:
    """Status and body, after a look at what every refusal has."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "connection: close" in lines
    assert "x-content-type-options: nosniff" in lines
    assert any(line.startswith("x-request-id: ") for line in lines)
    return int(head.split()[1]), json.loads(body)


def metrics(service: Served) -> str:
    return httpx.get(f"{service.address}/metrics", timeout=60).text


def num_closed(service: Served, reason: str) -> float:
    return metric(metrics(service), f'closed_connections_total{{reason="{reason}"}}')


# --- The head of a request ----------------------------------------------------------------------

KILOBYTE = b"a" * 1024
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
TOO_LONG = {"detail": "Headers exceed 65536 bytes"}


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (b"GET /", KILOBYTE, 414),
        (GET, KILOBYTE, 431),
        (GET + b"a: ", KILOBYTE, 431),
        (GET, b"a: b\r\n" * 170, 431),
        (b"", b"\r\n" * 512, 431),
        (CHUNKED + b"1;", KILOBYTE, 431),
        (CHUNKED, b"1\r\n \r\n" * 170, 431),
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 170, 431),
    ],
    ids=["url", "name", "value", "headers", "line ends", "extension", "chunks", "trailers"],
)
def test_head_without_an_end_is_refused(
    service: Served, start: bytes, more: bytes, status: int
) -> None:
    """All of it was parsed before it was refused, if at all: 100 MB of a header took 17 seconds."""
    with connect(service) as connection:
        num_sent, end = 0, 32 * 1024
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(start)
            while num_sent < end:
                connection.sendall(more)
                num_sent += 1
        assert num_sent < end / 2
    answered, body = refusal(exchange(service, start + more * (100_000 // len(more))))
    assert answered == status
    assert body == (TOO_LONG if status == 431 else {"detail": "URL is longer than 16384 bytes"})


def test_refusal_of_a_head_has_the_shape_of_its_route_and_is_logged(service: Served) -> None:
    before = metric(metrics(service), "http_requests_total")
    start = GET.replace(b"/health", b"/v1/models")
    status, body = refusal(exchange(service, start + b"a: " + KILOBYTE * 70))
    assert status == 431
    assert body["error"]["message"] == TOO_LONG["detail"]
    assert metric(metrics(service), "http_requests_total") == before + 2  # and the scrape
    wait_until(lambda: any(line.get("status") == 431 for line in service.log()))


def test_head_and_body_within_the_limits_are_taken_in_any_pieces(service: Served) -> None:
    head = GET + b"a: " + b"b" * 60_000 + b"\r\nConnection: close\r\n\r\n"
    assert exchange(service, head).startswith(b"HTTP/1.1 200")
    assert exchange(service, *(head[i : i + 999] for i in range(0, len(head), 999))).startswith(
        b"HTTP/1.1 200"
    )
    long = {"model": "a" * 900_000, "prompt": PROMPT}
    content = json.dumps(long).encode()
    pieces = [content[i : i + 1024] for i in range(0, len(content), 1024)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    for request in (as_request(long), CHUNKED + chunks + b"0\r\n\r\n"):
        assert exchange(service, request).startswith(b"HTTP/1.1 422")


def test_bytes_that_are_not_http_are_refused_in_our_shape(service: Served) -> None:
    status, body = refusal(exchange(service, b"\0\xff\r\n\r\n"))
    assert (status, body) == (400, {"detail": "Invalid HTTP request received."})


@pytest.mark.parametrize("path", [b"/health", b"/v1/models"])
@pytest.mark.parametrize("hosts", [b"", b"Host: a\r\nHost: b\r\n", b"Host: a\r\nhost: a\r\n"])
def test_one_host_is_needed(service: Served, path: bytes, hosts: bytes) -> None:
    """Two were taken."""
    answer = exchange(service, b"GET " + path + b" HTTP/1.1\r\n" + hosts + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"There must be one Host header" in answer


def test_http_1_0_needs_no_host(service: Served) -> None:
    assert exchange(service, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("version", [b"0.9", b"1.0"])
def test_http_1_0_gets_no_chunks(service: Served, version: bytes) -> None:
    """A text came in chunks, which HTTP/1.0 does not know: their lengths stood in the text."""
    query = b"/generate/text?prompt=Once&max_new_tokens=8&seed=1 HTTP/"
    head, _, body = exchange(service, b"GET " + query + version + b"\r\n\r\n").partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    whole = httpx.get(f"{service.address}/generate/text?prompt=Once&max_new_tokens=8&seed=1")
    assert body == whole.content
    sized = exchange(service, as_request(SHORT).replace(b"HTTP/1.1", b"HTTP/" + version))
    head, _, body = sized.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head.lower()
    assert json.loads(body)["generated_text"].startswith(PROMPT)


# --- Offers of another protocol -----------------------------------------------------------------

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_upgrade_that_is_offered_is_ignored(service: Served, offer: bytes) -> None:
    """The request lost its body: 422 `Field required`; and those after it were lost."""
    request = as_request(SHORT, more=offer)
    body = json.dumps(SHORT).encode()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    chunked = POST + offer + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    last = GET + offer + b"X-Request-ID: last\r\nConnection: close\r\n\r\n"
    sent = request + chunked + GET + offer + b"\r\n" + last
    for pieces in ([sent], [sent[i : i + 100] for i in range(0, len(sent), 100)]):
        answer = exchange(service, *pieces)
        assert answer.count(b"HTTP/1.1 200") == 4
        assert answer.count(b'"generated_text":"Once upon a time') == 2
        assert b"x-request-id: last" in answer


def test_upgrade_that_is_offered_lifts_no_limit(service: Served) -> None:
    start = CHUNKED.replace(b"\r\n\r\n", b"\r\n" + OFFERS["h2c"] + b"a: " + KILOBYTE * 40)
    long = exchange(service, start + b"\r\nConnection: close\r\n\r\n0\r\n\r\n")
    assert long.startswith(b"HTTP/1.1 422")
    trailers = b"\r\n\r\n0\r\n" + b"a: b\r\n" * 5000
    assert refusal(exchange(service, start, trailers)) == (431, TOO_LONG)
    both = b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert refusal(exchange(service, POST + OFFERS["h2c"] + both))[0] == 400


@pytest.mark.parametrize("target", [b"localhost:80", b"/health"])
def test_connect_is_refused_with_all_that_follows(service: Served, target: bytes) -> None:
    connect = b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = exchange(service, connect + GET + b"\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert refusal(answer) == (400, {"detail": "Invalid HTTP request received."})


def test_curl_that_offers_http_2_posts(service: Served) -> None:
    curl = shutil.which("curl")
    if (
        not curl
        or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout
    ):
        pytest.skip("no curl with HTTP/2")
    json_type = "Content-Type: application/json"
    command = [curl, "-s", "--http2", "-H", json_type, "-d", json.dumps(SHORT)]
    ran = subprocess.run([*command, f"{service.address}/generate"], capture_output=True, timeout=60)
    assert json.loads(ran.stdout)["generated_text"].startswith(PROMPT)


JAVA_CLIENT = """
import java.net.URI;
import java.net.http.*;

class Client {
    public static void main(String[] args) throws Exception {
        var client = HttpClient.newHttpClient();  // as it comes: offers HTTP/2
        var body = HttpRequest.BodyPublishers.ofString(args[1]);
        var request = HttpRequest.newBuilder(URI.create(args[0]))
            .header("Content-Type", "application/json").POST(body).build();
        for (int i = 0; i < 2; i++) {
            var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body());
        }
    }
}
"""


def test_java_posts_with_its_own_client(service: Served, tmp_path: Path) -> None:
    """JDK's HttpClient with its defaults could not post at all."""
    if not shutil.which("java") or not shutil.which("javac"):
        pytest.skip("no JDK")
    file = tmp_path / "Client.java"
    file.write_text(JAVA_CLIENT)
    command = ["java", str(file), f"{service.address}/generate", json.dumps(SHORT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [line[:3] for line in ran.stdout.splitlines()] == ["200", "200"]
    assert json.loads(ran.stdout.splitlines()[1][4:])["generated_text"].startswith(PROMPT)


# --- Slow clients -------------------------------------------------------------------------------


def drip(connection: socket.socket, piece: bytes) -> bytes:
    """All that is answered to a client that sends a little more all the time."""
    connection.settimeout(0.1)
    got = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            connection.sendall(piece)
            received = connection.recv(65_536)
        except TimeoutError:
            continue
        except OSError:
            return got
        if not received:
            return got
        got += received
    raise AssertionError("never closed")


@pytest.mark.parametrize(
    ("start", "piece", "detail"),
    [
        (GET, b"", "The head of the request took longer than 2 seconds"),
        (GET, b"a: b\r\n", "The head of the request took longer than 2 seconds"),
        (b"", b"\r\n", "The head of the request took longer than 2 seconds"),
        (
            POST + b"Content-Length: 999\r\n\r\n{",
            b"",
            "The body of the request took longer than 2 seconds",
        ),
        (
            POST + b"Content-Length: 999\r\n\r\n{",
            b" ",
            "The body of the request took longer than 2 seconds",
        ),
        (CHUNKED, b"1\r\n \r\n", "The body of the request took longer than 2 seconds"),
    ],
)
def test_slow_request_is_answered_408(
    service: Served, start: bytes, piece: bytes, detail: str
) -> None:
    """There was no limit to it."""
    with connect(service) as connection:
        connection.sendall(start)
        assert refusal(drip(connection, piece)) == (408, {"detail": detail})


def test_client_that_sends_nothing_is_closed(service: Served) -> None:
    """Only one that had sent a request was."""
    assert exchange(service) == b""
    assert exchange(service, GET + b"\r\n").startswith(b"HTTP/1.1 200")


def test_body_that_goes_on_after_the_answer_is_closed(service: Served) -> None:
    with connect(service) as connection:
        connection.sendall(GET + b"Content-Length: 999\r\n\r\n")
        assert drip(connection, b" ").count(b"HTTP/1.1") == 1
    chunks = GET + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000
    assert exchange(service, chunks).count(b"HTTP/1.1") == 1


def test_client_that_reads_nothing_is_closed(service: Served) -> None:
    """What waited for it stayed for as long as it did."""
    path = b"/static-offline-docs/swagger-ui-bundle.js"  # more than a megabyte
    with connect(service) as connection:
        connection.sendall((GET.replace(b"/health", path) + b"\r\n") * 16)
        wait_until(lambda: num_closed(service, "unread") == 1)
        assert read_until_closed(connection).count(b"HTTP/1.1 200") < 16
    wait_until(lambda: any("unread" in line["message"] for line in service.log()))


# --- Several requests at once -------------------------------------------------------------------


def test_requests_ahead_are_answered_in_order(service: Served) -> None:
    ids = [b"X-Request-ID: %d\r\n" % number for number in range(3)]
    close = b"Connection: close\r\n"
    requests = [as_request(SHORT, more=ids[0]), GET + ids[1] + b"\r\n", GET + ids[2] + close]
    answer = exchange(service, b"".join(requests) + b"\r\n")
    assert re.findall(rb"x-request-id: (\d)", answer) == [b"0", b"1", b"2"]
    assert answer.count(b"HTTP/1.1 200") == 3


def num_running(service: Served) -> float:
    return metric(metrics(service), "vllm:num_requests_running")


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("ahead", [b"GET", GET + b"\r\n", as_request({"prompt": "a" * 40_000})])
def test_client_that_leaves_with_a_request_ahead_frees_its_place(
    service: Served, ahead: bytes, streams: bool
) -> None:
    """uvicorn stopped reading, and told only the request that waited."""
    id_ = f"ahead-{streams}-{len(ahead)}"
    header = f"X-Request-ID: {id_}\r\n".encode()
    with connect(service) as connection:
        connection.sendall(as_request({**LONG, "stream": streams}, "/v1/completions", header))
        wait_until(lambda: num_running(service) == 8)
        connection.sendall(ahead)
    wait_until(lambda: any(line["request_id"] == id_ for line in service.log()))
    (line,) = [line for line in service.log() if line["request_id"] == id_]
    assert line["generated_tokens"] < 8 * 250 / 2
    wait_until(lambda: num_running(service) == 0)  # the engine lets go of it in its next turn


@pytest.mark.parametrize("ahead", [(GET + b"\r\n") * 20, as_request({"prompt": "a" * 40_000}) * 2])
def test_client_that_sends_too_much_ahead_is_cut_off(service: Served, ahead: bytes) -> None:
    with connect(service) as connection:
        connection.sendall(as_request(LONG, "/v1/completions"))
        wait_until(lambda: num_running(service) == 8)
        connection.sendall(ahead)
        assert read_until_closed(connection) == b""
    wait_until(lambda: num_running(service) == 0)
    assert num_closed(service, "pipelined") > 0


@pytest.mark.parametrize("ahead", [GET + b"a: " + KILOBYTE * 65, b"\0\xff\r\n\r\n"])
def test_request_ahead_that_is_refused_leaves_the_answer_whole(
    service: Served, ahead: bytes
) -> None:
    answer = exchange(service, as_request(LONG | {"max_tokens": 50}, "/v1/completions"), ahead)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]) == 8


# --- Many connections ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """A service that may open 400 files, as one under `ulimit -n 400`."""
    through = ("sh", "-c", 'ulimit -n 400 && exec "$@"', "sh")
    timeouts = {"HEAD_TIMEOUT_SECONDS": "60", "BODY_TIMEOUT_SECONDS": "60"}
    with served("--timeout-keep-alive", "60", through=through, **timeouts) as made:
        yield made
        assert made.process.poll() is None


@pytest.mark.parametrize(
    "sent", [b"", b"GET", GET + b"\r\n", POST + b"Content-Length: 999\r\n\r\n{"]
)
def test_connections_of_one_client_lock_nobody_out(narrow: Served, sent: bytes) -> None:
    """400 idle connections took all files, and nobody else was accepted."""
    with ExitStack() as stack, narrow.client() as kept:
        assert kept.get("/health").status_code == 200
        for _ in range(450):
            connection = stack.enter_context(connect(narrow, "127.0.0.2"))
            connection.sendall(sent)
        for _ in range(5):
            with narrow.client() as other:
                assert other.post("/generate", json=SHORT).status_code == 200
        assert kept.post("/generate", json=SHORT).status_code == 200
        text = kept.get("/metrics").text
    assert metric(text, "process_open_fds") < 390
    assert num_closed(narrow, "limit") > 0
    assert any("MAX_CONNECTIONS: 200 at most" in line for line in narrow.lines)
    wait_until(lambda: any("'limit'" in line["message"] for line in narrow.log()))
