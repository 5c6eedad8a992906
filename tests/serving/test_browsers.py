"""What pages of other sites may make a browser send: the app in this process under addresses and
names of all kinds, and behind settings of its own."""

import json

import httpx
import pytest
from fastapi import Response
from fastapi.testclient import TestClient

import main
from serving.browsers import BrowserMiddleware, read_allowed_hosts
from serving.settings import Settings
from tests.support import PROMPT, serve_in_thread

LOCAL = "http://127.0.0.1:8000"
client = TestClient(main.app, base_url=LOCAL)

LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Sec-Fetch-User": "?1"}
IMAGE = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
FETCH = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty", "Origin": "https://evil.example"}
FRAME = LINK | {"Sec-Fetch-Dest": "iframe"}
REDIRECT = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def guarded(hosts: str = "", origins: tuple[str, ...] = (), needs_key: bool = False) -> TestClient:
    """Of something on a loopback address that answers 200 behind these settings."""
    allowed = read_allowed_hosts(Settings(allowed_hosts=hosts))
    within = BrowserMiddleware(Response(), allowed, list(origins), needs_key)
    return TestClient(within, base_url=LOCAL)


# --- Host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1:8000", "127.8.9.1", "localhost", "LOCALHOST:1", "localhost.:80",
        "my.app.localhost:8000", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:8000",
    ],
)  # fmt: skip
def test_host_of_the_machine_itself_is_taken(host: str) -> None:
    for address in (LOCAL, "http://127.0.0.2:80", "http://[::1]:8000"):
        with_address = TestClient(main.app, base_url=address)
        assert with_address.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "evillocalhost", "128.0.0.1",
        "192.168.0.1:8000", "0.0.0.0:8000", "[::]:8000", "[fe80::1]", "a@localhost", "localhost:a",
        "evil.example/.localhost", "127.0.0.1.evil.example", "[", "é", "localhost, evil.example",
    ],
)  # fmt: skip
@pytest.mark.parametrize("address", [LOCAL, "http://[::1]:8000", "http://[::ffff:127.0.0.1]:80"])
def test_host_that_a_page_may_have_made_up_is_refused(host: str, address: str) -> None:
    """A page under a name that leads to 127.0.0.1 could ask for texts, and read them."""
    headers = {"Host": host.encode("latin-1")}
    with_address = TestClient(main.app, base_url=address)
    for method, path in (("GET", "/"), ("GET", "/Once"), ("POST", "/generate"), ("GET", "/docs")):
        answer = with_address.request(method, path, headers=headers)
        assert (answer.status_code, set(answer.json())) == (421, {"detail"})
        assert "ALLOWED_HOSTS" in answer.json()["detail"]
    assert with_address.get("/v1/models", headers=headers).json()["error"]["code"] is None
    assert with_address.get("/health", headers=headers).status_code == 200
    assert with_address.get("/ready", headers=headers).status_code == 200


def test_host_is_free_on_other_addresses_and_with_keys() -> None:
    headers = {"Host": "api.example.com"}
    for address in ("http://192.0.2.1", "http://[2001:db8::1]:8000", "http://testserver"):
        with_address = TestClient(main.app, base_url=address)
        assert with_address.get("/v1/models", headers=headers).status_code == 200
    assert guarded(needs_key=True).get("/v1/models", headers=headers).status_code == 200
    assert guarded().get("/v1/models", headers=headers).status_code == 421


def test_host_is_looked_at_by_a_real_server() -> None:
    with serve_in_thread(main.app) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 200
        foreign = httpx.get(f"{address}/v1/models", headers={"Host": "evil.example"})
    assert foreign.status_code == 421


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("api.example.com", 200), ("API.example.com:443", 200), ("a.b.example.org", 200),
        ("[2001:db8::1]:80", 200), ("example.org", 421), ("evilexample.org", 421),
        ("localhost", 421), ("127.0.0.1", 421), ("api.example.com.evil.example", 421),
    ],
)  # fmt: skip
def test_host_is_one_of_those_allowed(host: str, status: int) -> None:
    http = guarded("api.Example.com, *.example.org, [2001:db8::1]", needs_key=True)
    assert http.get("/v1/models", headers={"Host": host}).status_code == status
    assert guarded("*").get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "hosts", ["https://example.com", "example.com:8000", "a,*b.example", "ex*.com", "a b", "::1"]
)
def test_hosts_that_cannot_be_allowed_stop_the_start(hosts: str) -> None:
    with pytest.raises(SystemExit, match="ALLOWED_HOSTS: is to have names"):
        read_allowed_hosts(Settings(allowed_hosts=hosts))


# --- Pages of other sites -----------------------------------------------------------------------


@pytest.fixture
def idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is generated is an error."""
    monkeypatch.setattr(main.engine, "submit", pytest.fail)


@pytest.mark.usefixtures("idle_engine")
@pytest.mark.parametrize("path", ["/Once%20upon", "/generate/text?prompt=Once", "/v1/models"])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "unheard-of"])
@pytest.mark.parametrize("sent", [IMAGE, FETCH, FRAME, REDIRECT, {}])
def test_page_of_another_site_is_refused(path: str, site: str, sent: dict[str, str]) -> None:
    """`<img src="http://localhost:8000/Once%20upon">` had every reader of a page generate."""
    answer = client.get(path, headers=sent | {"Sec-Fetch-Site": site})
    assert answer.status_code == 403
    assert "CORS_ORIGINS" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "none"} | LINK,
        {"Sec-Fetch-Site": "same-origin"} | IMAGE,
        {"Sec-Fetch-Site": "cross-site"} | LINK,
    ],
)
def test_page_of_our_own_and_links_are_answered(headers: dict[str, str]) -> None:
    answer = client.get("/Once%20upon?max_new_tokens=1", headers=headers)
    assert answer.status_code == 200


def test_page_of_another_site_may_ask_for_what_is_open() -> None:
    for path in ("/", "/health", "/ready", "/static/page.js"):
        headers = {"Sec-Fetch-Site": "cross-site"} | IMAGE
        assert client.get(path, headers=headers).status_code == 200


def test_page_of_an_origin_of_cors_may_ask_for_all() -> None:
    headers = {"Sec-Fetch-Site": "cross-site"} | FETCH
    for origins, status in ((("https://evil.example",), 200), (("*",), 200), (("https://a",), 403)):
        assert guarded(origins=origins).get("/v1/models", headers=headers).status_code == status


@pytest.mark.usefixtures("idle_engine")
@pytest.mark.parametrize("path", ["/generate", "/generate-text/", "/generate/text"])
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_post_that_needs_no_preflight_does_not_generate(
    path: str, content_type: str | None
) -> None:
    """What a page can post without being asked about CORS; older browsers do not say from where."""
    headers = {"Content-Type": content_type} if content_type else {}
    for more in ({}, {"Sec-Fetch-Site": "cross-site"} | LINK):
        content = json.dumps({"prompt": PROMPT})
        answer = client.post(path, content=content, headers=headers | more)
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["detail"]
    answer = client.post(path, json={"prompt": PROMPT}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403
