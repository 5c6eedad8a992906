"""Each middleware: the app in this process behind another one of it.

Tests marked `contract` may be sent to another service; so only the others import main.py.
"""

import asyncio
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient
from starlette.routing import Route

from serving.middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    RequestContextMiddleware,
    UnexpectedErrorMiddleware,
    address_identity,
    key_digest,
    read_api_keys,
)
from serving.settings import Settings
from tests.forked import run_python
from tests.support import new_client, refused_fields, served, wait_until

client = new_client()


@pytest.fixture
def app() -> Any:
    """The app in this process."""
    import main

    return main.app


# --- Ids, headers that every answer has ---------------------------------------------------------


@pytest.mark.contract
@pytest.mark.parametrize("sent", ["abc", "A-1_2.3", "x" * 64])
def test_request_id_of_the_client_is_kept(sent: str) -> None:
    response = client.get("/health", headers={"X-Request-ID": sent})
    assert (response.status_code, response.headers["X-Request-ID"]) == (200, sent)


@pytest.mark.contract
@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "a\tb", "é".encode()])
def test_request_id_that_is_invalid_is_replaced(sent: str | bytes) -> None:
    response = client.get("/health", headers={"X-Request-ID": sent})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])


def test_every_answer_has_security_headers() -> None:
    for path in ("/", "/docs", "/nothing/here"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"


# --- Long heads ---------------------------------------------------------------------------------


def test_url_and_headers_are_limited() -> None:
    assert client.get("/generate/text?prompt=" + "a" * 17_000).status_code == 414
    headers = {f"x-{number}": "a" * 4000 for number in range(20)}
    assert client.get("/health", headers=headers).status_code == 431


PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]  # one stands for an encoded slash


def test_url_that_leaves_no_placeholder_for_slashes_is_refused() -> None:
    """A path of all the placeholders was a 500 without a line in the log."""
    answer = client.get(f"/{quote(''.join(PRIVATE_USE))}%2f")
    assert (answer.status_code, set(answer.json())) == (414, {"detail"})
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("count", [1, 20, 1800])
def test_url_of_placeholders_keeps_its_slashes(count: int) -> None:
    prompt = f"{''.join(PRIVATE_USE[:count])}/a/"
    answer = client.get(f"/{quote(prompt, safe='')}?max_new_tokens=1")
    if count > 500:
        assert refused_fields(answer) == [["path", "prompt"]]
    else:
        assert answer.json()["generated_sequences"][0].startswith(prompt)


# --- API keys -----------------------------------------------------------------------------------


def read_keys(**settings: Any) -> dict[bytes, str]:
    return read_api_keys(Settings(**settings))


def keyed_client(
    app: Any, metrics_need_key: bool = True, docs_need_key: bool = False, root_path: str = ""
) -> TestClient:
    """Of the app behind keys."""
    names = read_keys(api_keys="alice:two, three")
    keyed = ApiKeyMiddleware(app, names, metrics_need_key, docs_need_key)
    return TestClient(RequestContextMiddleware(keyed), root_path=root_path)


@pytest.fixture
def keyed(app: Any) -> TestClient:
    return keyed_client(app)


def test_keys_every_route_needs_one_but_page_probes_and_docs(app: Any, keyed: TestClient) -> None:
    """Walks the app's own routes, so that a new one is never open by accident."""
    probes = {"/health", "/healthz", "/livez", "/ping", "/ready", "/readyz"}
    docs = {"/docs", "/redoc", "/openapi.json"}
    opened = set()
    for route in iter_route_contexts(app.routes):
        if not isinstance(route.original_route, APIRoute | Route):
            assert route.path in ("/static-offline-docs", "/static"), f"who may pass here? {route}"
            continue
        path = re.sub(r"\{.*?\}", "something", route.path)
        for method in route.methods or ():
            answer = keyed.request(method, path)
            if answer.status_code != 401:
                opened.add(route.path)
            else:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "key is needed" in answer.text or method == "HEAD"
    assert opened == {"/"} | probes | docs
    assert keyed.get("/static-offline-docs/swagger-ui.css").status_code == 200
    assert keyed.get("/static/page.js").status_code == 200  # the page's own, which asks for a key
    assert keyed.get("/static").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer two"}, 200),
        ({"Authorization": "bearer three"}, 200),
        ({"X-API-Key": "three"}, 200),
        ({"Authorization": "Bearer alice"}, 401),
        ({"Authorization": "Bearer alice:two"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic three"}, 401),
        ({"X-API-Key": ""}, 401),
        ({"X-API-Key": "thre"}, 401),
        ({"X-API-Key": "thr\xe9e"}, 401),
        ({}, 401),
    ],
)
def test_keys_are_compared_whole(keyed: TestClient, headers: dict[str, str], status: int) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = keyed.get("/v1/models", headers=encoded)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_metrics_have_a_switch_of_their_own(app: Any) -> None:
    for needs_key, status in ((True, 401), (False, 200)):
        keyed = keyed_client(app, metrics_need_key=needs_key)
        assert keyed.get("/metrics").status_code == status


def test_keys_docs_have_a_switch_of_their_own(app: Any) -> None:
    for needs_key, status in ((True, 401), (False, 200)):
        keyed = keyed_client(app, docs_need_key=needs_key)
        for path in ("/docs", "/redoc", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert keyed.get(path).status_code == status


def test_keys_are_asked_for_under_a_prefix_too(app: Any) -> None:
    """Behind a proxy with `--root-path`, probes and the page needed a key."""
    keyed = keyed_client(app, root_path="/svc")
    for path in ("/", "/health", "/ready", "/livez", "/static/page.js", "/docs"):
        assert keyed.get(f"/svc{path}").status_code == 200
    assert keyed.get("/svc/metrics").status_code == 401
    refused = keyed.get("/svc/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    allowed = keyed.get("/svc/v1/models", headers={"Authorization": "Bearer two"})
    assert allowed.status_code == 200


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice:one\n\ntwo\n")
    names = read_keys(api_keys_file=file)
    assert names == {key_digest("one"): "alice", key_digest("two"): "key-2"}
    file.write_text("\n")
    with pytest.raises(SystemExit, match="API_KEYS_FILE: holds no key"):
        read_keys(api_keys_file=file)


@pytest.mark.parametrize("keys", ["alice:", "one, alice: ,two", ":"])
def test_keys_without_a_key_stop_the_start(keys: str) -> None:
    """An empty key was the key of everybody who sent none."""
    with pytest.raises(SystemExit, match=r"API_KEYS: entry . has a name and no key"):
        read_keys(api_keys=keys)


@pytest.mark.parametrize("key", ["schlüssel", "a b", "a\tb", "a\x7fb", "\ufeffa", "\uff41"])
def test_keys_that_no_header_brings_stop_the_start(key: str, tmp_path: Path) -> None:
    """They were taken, and never matched."""
    file = tmp_path / "keys"
    for entry in (key, f"name:{key}"):
        with pytest.raises(SystemExit, match=r"API_KEYS: the key of entry 2 has blanks") as stopped:
            read_keys(api_keys=f"fine,{entry}")
        assert key not in str(stopped.value)
        file.write_text(f"fine\n{entry}\n", encoding="utf-8")
        with pytest.raises(SystemExit, match=r"API_KEYS_FILE: the key of entry 2 has blanks"):
            read_keys(api_keys_file=file)


def test_keys_from_a_file_of_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n", encoding="utf-8-sig")
    assert read_keys(api_keys_file=file) == {key_digest("one"): "key-1"}
    file.write_text("schlüssel\n", encoding="latin-1")
    with pytest.raises(SystemExit, match="API_KEYS_FILE: the key of entry 1"):
        read_keys(api_keys_file=file)


# --- Shutdown -----------------------------------------------------------------------------------


def test_page_is_served_while_draining(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.state.service.shutdown, "has_begun", True)
    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == client.get("/static/page.js").status_code == 200


# --- Bodies that are too large, unexpected errors -----------------------------------------------

TOO_LARGE = {"detail": "Request body is larger than 1000000 bytes"}


@pytest.mark.parametrize("path", ["/Once?max_new_tokens=200", "/generate/text?prompt=a", "/health"])
def test_body_that_no_route_reads_is_limited_by_its_length(path: str) -> None:
    answer = client.request("GET", path, content=b"a" * 1_000_001)
    assert (answer.status_code, answer.json()) == (413, TOO_LARGE)


def test_body_that_no_route_reads_is_limited_as_it_comes(app: Any) -> None:
    """Was a 499: to the route it looked as if its client had gone."""
    statuses = []
    bodies = [b"a" * 600_000] * 2

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": bodies.pop(), "more_body": True}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    path = "/Once"
    scope = {
        "type": "http", "http_version": "1.0", "method": "GET", "path": path,
        "raw_path": path.encode(), "query_string": b"max_new_tokens=200", "headers": [],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert statuses == [413, None]
    wait_until(lambda: app.state.service.registry.num_unfinished == 0)


@pytest.mark.parametrize("too_much", [True, False])
def test_body_that_breaks_a_stream_off_is_not_answered_twice(too_much: bool) -> None:
    """Too much of a body, or an error, after the answer has begun."""
    sent = []

    async def stream(_: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if too_much:
            assert (await receive())["type"] == "http.disconnect"
        else:
            raise ZeroDivisionError

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"abc", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    limited = UnexpectedErrorMiddleware(BodyLimitMiddleware(stream, max_body_bytes=2))
    with nullcontext() if too_much else pytest.raises(ZeroDivisionError):
        asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert sent == ["http.response.start"]


def test_413_and_500_have_the_headers_of_every_answer() -> None:
    """They came from outside of the middleware that adds those of CORS and limits."""
    code = """if True:
        import json, main
        from fastapi.testclient import TestClient
        main.service.registry.get = lambda name: 1 / 0
        http = TestClient(main.app, raise_server_exceptions=False)
        for prompt in ("a", "a" * 2000):
            answer = http.post("/generate", json={"prompt": prompt}, headers={"Origin": "https://a"})
            print(json.dumps([answer.status_code, answer.json(), dict(answer.headers)]))
    """
    settings = {"CORS_ORIGINS": "https://a", "RATE_LIMIT": "9", "MAX_BODY_BYTES": "1500"}
    ran = run_python("-c", code, LOG_LEVEL="ERROR", **settings)
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(status, body["detail"]) for status, body, _ in answers] == [
        (500, "Internal server error"),
        (413, "Request body is larger than 1500 bytes"),
    ]
    for number, (_, _, headers) in enumerate(answers, start=1):
        assert headers["access-control-allow-origin"] == "https://a"
        assert headers["x-ratelimit-remaining-requests"] == str(9 - number)
        assert headers["x-request-id"]
        assert headers["x-frame-options"] == "DENY"


# --- Whom limits are for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "identity"),
    [
        (("192.0.2.1", "::ffff:192.0.2.1", "::FFFF:C000:201", "::ffff:c000:0201"), "192.0.2.1"),
        (
            ("2001:db8:0:1::1", "2001:DB8:0:1:ffff::", "2001:0db8:0000:0001:0:0:0:a%eth0"),
            "2001:db8:0:1::/64",
        ),
        (("2001:db8:0:2::1",), "2001:db8:0:2::/64"),
        (("fe80::1%eth0", "fe80::2%3"), "fe80::/64"),
        (("::1",), "::/64"),
    ],
)
def test_identity_is_an_ipv4_address_or_a_network(written: tuple[str, ...], identity: str) -> None:
    """Whoever has an IPv6 address has 2^64 of them, and each had limits of its own."""
    assert {address_identity((host, 1)) for host in written} == {f"address {identity}"}


@pytest.mark.parametrize("client", [None, ("", 0), ("unix:", 0), ("a" * 60_000, 0), ("1.2.3", 0)])
def test_identity_of_what_is_no_address(client: tuple[str, int] | None) -> None:
    assert address_identity(client) == "unknown"


def test_identity_is_what_routes_are_told() -> None:
    told = []

    async def app(scope: Any, *_: Any) -> None:
        told.append(scope["client_identity"])

    async def ask(host: str) -> None:
        scope = {"type": "http", "path": "/generate", "headers": [], "client": (host, 1)}
        await ApiKeyMiddleware(app, {}, True, False)(scope, None, None)  # type: ignore[arg-type]

    for host in ("2001:db8::1", "2001:db8::2", "::ffff:192.0.2.1"):
        asyncio.run(ask(host))
    assert told == ["address 2001:db8::/64"] * 2 + ["address 192.0.2.1"]


def test_name_of_a_key_is_what_routes_are_told() -> None:
    told = []

    async def app(scope: Any, *_: Any) -> None:
        told.append((scope["client_identity"], scope.get("key_name")))

    async def ask(key_names: dict[bytes, str], key: bytes) -> None:
        headers = [(b"x-api-key", key)]
        scope = {"type": "http", "path": "/generate", "headers": headers, "client": ("10.0.0.1", 1)}
        await ApiKeyMiddleware(app, key_names, True, False)(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(ask({key_digest("secret"): "alice"}, b"secret"))
    asyncio.run(ask({}, b"secret"))
    assert told == [("key alice", "alice"), ("address 10.0.0.1", None)]


# --- CORS ---------------------------------------------------------------------------------------


def test_cors_preflight_needs_no_key() -> None:
    asked = {"Access-Control-Request-Method": "POST", "Origin": "https://example.com"}
    with (
        served(API_KEYS="one", CORS_ORIGINS="https://example.com") as service,
        service.client(**asked) as browser,
    ):
        # What OpenAI's client in a browser sends, and Chrome for a private address.
        named = "authorization,content-type,openai-beta,traceparent,x-stainless-retry-count"
        browser.headers["Access-Control-Request-Headers"] = named
        browser.headers["Access-Control-Request-Private-Network"] = "true"
        allowed = browser.options("/generate")
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.com"
        assert allowed.headers["access-control-allow-headers"] == named
        assert allowed.headers["access-control-allow-private-network"] == "true"
        browser.headers["Origin"] = "https://elsewhere.example"
        assert browser.options("/generate").status_code == 400
