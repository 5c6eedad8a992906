"""What an operator needs: keys, limits, metrics, logs, drain."""

import asyncio
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from limits.errors import StorageError
from starlette.routing import Route

import main

ROOT = Path(__file__).parent
PROMPT = "Once upon a time"
client = TestClient(main.app, raise_server_exceptions=False)


class Served:
    """A service in a process of its own, and what it has written."""

    def __init__(self, process: subprocess.Popen[str], address: str):
        self.process = process
        self.address = address
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout
        self.lines.extend(self.process.stdout)  # extends as the lines come

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)


@contextmanager
def served(*arguments: str, port: int = 0, **settings: str) -> Iterator[Served]:
    """A uvicorn, on a free port if none is given, ended with SIGTERM unless it has ended before."""
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    service = Served(process, f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: is_ready(service))
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        service.reader.join()
        process.stdout.close()


def is_ready(service: Served) -> bool:
    assert service.process.poll() is None, "".join(service.lines)
    try:
        return httpx.get(f"{service.address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, lines))


# --- API keys -----------------------------------------------------------------------------------


def gated(monkeypatch: pytest.MonkeyPatch, **update: Any) -> TestClient:
    """The app behind a gate of its own, with these settings."""
    monkeypatch.setattr(main, "settings", main.settings.model_copy(update=update))
    return TestClient(main.RequestContext(main.Gate(main.app, main.read_api_keys())))


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    return gated(monkeypatch, api_keys=main.SecretStr("alice:two, three"))


def test_keys_every_route_needs_one_but_three(keyed: TestClient) -> None:
    """Walks the app's own routes, so that a new one is never open by accident."""
    opened = set()
    for route in main.app.routes:
        if not isinstance(route, APIRoute | Route):
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
    assert opened == {"/", "/health", "/ready"}
    assert keyed.get("/static-offline-docs/swagger-ui.css").status_code == 401
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


def test_keys_metrics_have_a_switch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for needs_key, status in ((True, 401), (False, 200)):
        keys = main.SecretStr("one")
        keyed = gated(monkeypatch, api_keys=keys, metrics_need_key=needs_key)
        assert keyed.get("/metrics").status_code == status


def test_keys_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice:one\n\ntwo\n")
    update = {"api_keys_file": file}
    monkeypatch.setattr(main, "settings", main.settings.model_copy(update=update))
    names = main.read_api_keys()
    assert names == {main.digest("one"): "alice", main.digest("two"): "key-2"}
    file.write_text("\n")
    with pytest.raises(SystemExit, match="holds no key"):
        main.read_api_keys()


@pytest.mark.parametrize("keys", ["alice:", "one, alice: ,two", ":"])
def test_keys_without_a_key_stop_the_start(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """An empty key was the key of everybody who sent none."""
    with pytest.raises(SystemExit, match="has a name and no key"):
        gated(monkeypatch, api_keys=main.SecretStr(keys))


# --- Limits, logs, usage: one service with all of them ------------------------------------------


NAMES = ("alice", "bob", "carol", "dora", "eve", "fay")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    usage_log = tmp_path_factory.mktemp("usage") / "usage.csv"
    settings = {
        "API_KEYS": ",".join(f"{name}:secret-{name[0]}" for name in NAMES),
        "RATE_LIMIT": "5",
        "TOKEN_RATE_LIMIT": "60",
        "CORS_ORIGINS": "https://example.com",
        "USAGE_LOG": str(usage_log),
        "USAGE_LOG_MAX_BYTES": "1000",
    }
    with served(**settings) as service:
        yield service


def test_rate_limit_of_requests_by_key(limited: Served) -> None:
    with limited.client(**{"X-API-Key": "secret-a"}) as alice:
        answers = [alice.get("/v1/models") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == list("432100")
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "5"
    with limited.client(**{"X-API-Key": "secret-b"}) as bob:
        assert bob.get("/v1/models").status_code == 200


def test_rate_limit_of_tokens(limited: Served) -> None:
    with limited.client(Authorization="Bearer secret-c") as carol:
        body = {"prompt": PROMPT, "max_new_tokens": 80, "seed": 1}
        first = carol.post("/generate", json=body)
        refused = carol.post("/generate", json=body)
    assert (first.status_code, refused.status_code) == (200, 429)
    assert refused.json() == {"detail": "Over the limit of 60 tokens a minute"}
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_rate_limit_of_tokens_counts_what_nobody_waited_for(limited: Served) -> None:
    """A client that leaves has used what was generated until then."""
    body = {"prompt": PROMPT, "max_new_tokens": 200, "stream": True}
    with limited.client(Authorization="Bearer secret-e") as eve:
        with eve.stream("POST", "/generate", json=body) as answer:
            next(answer.iter_bytes())
        wait_until(lambda: any(line.get("key") == "eve" for line in limited.log()))
        left = next(line for line in limited.log() if line.get("key") == "eve")
        remaining = eve.get("/v1/models").headers["x-ratelimit-remaining-tokens"]
    assert left["status"] in (200, 499)
    assert left["generated_tokens"] > 0
    assert int(remaining) == max(0, 60 - left["generated_tokens"])


@pytest.mark.parametrize("error", [StorageError(OSError("gone")), None])
def test_rate_limit_is_off_while_its_storage_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    async def fail(*_: Any, **__: Any) -> int:
        if error:
            raise error
        await asyncio.sleep(60)
        return 0

    client.get("/health")  # builds the app's own gate, which shall not have this storage
    storage = main.open_storage(main.settings.rate_limit_storage)
    monkeypatch.setattr(main, "open_storage", lambda _: storage)
    monkeypatch.setattr(main, "STORAGE_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(main, "STORAGE_PAUSE_SECONDS", 0.3)
    http = gated(monkeypatch, rate_limit=1)
    with monkeypatch.context() as broken:
        broken.setattr(storage, "incr", fail)
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200] * 3
    logged = [line for line in caplog.messages if "no rate limits for 0.3 s" in line]
    assert len(logged) == 1
    assert ("gone" if error else "TimeoutError") in logged[0]
    wait_until(lambda: http.get("/v1/models").status_code == 429)


def test_openai_client_raises_its_own_errors(limited: Served) -> None:
    def ask(key: str) -> None:
        with openai.OpenAI(base_url=f"{limited.address}/v1", api_key=key, max_retries=0) as client:
            client.models.list()

    with pytest.raises(openai.AuthenticationError) as refused:
        ask("wrong")
    assert refused.value.code == "invalid_api_key"
    for _ in range(5):
        ask("secret-f")
    with pytest.raises(openai.RateLimitError) as limit:
        ask("secret-f")
    assert limit.value.code == "rate_limit_exceeded"


def test_cors_preflight_needs_no_key(limited: Served) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Origin": "https://example.com"}
    with limited.client(**asked) as browser:
        allowed = browser.options("/generate")
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.com"
        browser.headers["Origin"] = "https://elsewhere.example"
        assert browser.options("/generate").status_code == 400


def test_log_has_a_json_line_for_a_request(limited: Served) -> None:
    headers = {"X-API-Key": "secret-d", "X-Request-ID": "the-one"}
    with limited.client(**headers) as dora:
        answer = dora.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 3})
    assert answer.status_code == 200
    wait_until(lambda: any(line.get("request_id") == "the-one" for line in limited.log()))
    (line,) = [line for line in limited.log() if line.get("request_id") == "the-one"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/generate", 200)
    assert (line["model"], line["key"], line["finish_reason"]) == ("gpt2-tales", "dora", "length")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (4, 3)
    assert 0 <= line["queue_seconds"] <= line["seconds"] < 10
    assert line["level"] == "INFO"


def test_log_holds_no_secret_and_no_prompt(limited: Served) -> None:
    with limited.client(**{"X-API-Key": "secret-d"}) as dora:
        dora.get("/A%20very%20private%20prompt%0Awith%20a%20line?max_new_tokens=2")
    written = "".join(limited.lines)
    assert "secret-" not in written
    assert "private" not in written
    assert '"api_keys": "**********"' in written.replace("'", '"')
    assert all(line["level"] for line in limited.log())


def read_rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_usage_log_has_a_row_for_each_generation(limited: Served) -> None:
    with limited.client(**{"X-API-Key": "secret-d"}) as dora:
        dora.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 2})
    folder = next(
        Path(line["message"].split("'usage_log': '")[1].split("'")[0]).parent
        for line in limited.log()
        if "'usage_log'" in line["message"]
    )
    wait_until(lambda: "dora" in "".join(f.read_text() for f in folder.iterdir()))
    rows = [row for file in folder.iterdir() for row in read_rows(file)]
    row = next(row for row in rows if row["key"] == "dora")
    assert list(row) == list(main.USAGE_COLUMNS)
    assert (row["route"], row["status"], row["model"]) == ("/generate", "200", "gpt2-tales")
    assert {row["route"] for row in rows} <= {"/generate", "/{prompt}"}


def test_usage_file_is_rotated_and_begins_with_its_columns(tmp_path: Path) -> None:
    file = main.UsageFile(tmp_path / "usage.csv", maxBytes=1000, backupCount=5)
    for number in range(40):
        facts = {"request_id": number, "route": '=cmd|"a"', "status": 200}
        file.handle(main.logging.makeLogRecord({"msg": facts}))
    file.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    for each in files:
        assert each.stat().st_size <= 1000
        rows = read_rows(each)
        assert list(rows[0]) == list(main.USAGE_COLUMNS)
        assert rows[0]["route"] == '=cmd|"a"'


def test_log_in_text_cannot_be_forged() -> None:
    record = main.logging.makeLogRecord(
        {"msg": "GET -", "request_id": "a", "facts": {"prompt": "x\n2026 forged", "status": 200}}
    )
    assert main.TextFormatter().format(record).count("\n") == 0
    assert json.loads(main.JsonLines().format(record))["prompt"] == "x\n2026 forged"


# --- Metrics ------------------------------------------------------------------------------------


def test_metrics_count_what_happened() -> None:
    def read() -> str:
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.text

    before = read()
    body = {"prompt": PROMPT, "max_new_tokens": 7, "seed": 1}
    assert client.post("/generate", json=body).status_code == 200
    assert client.post("/generate", json={"prompt": "I hate it"}).status_code == 400
    assert client.get("/some%20prompt?max_new_tokens=1").status_code == 200
    main.engine.stop()  # what a step did is counted after its answer has gone out
    main.engine.start()
    after = read()
    gained = {
        name: metric(after, name) - metric(before, name)
        for name in (
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:time_to_first_token_seconds_count",
            "vllm:e2e_request_latency_seconds_count",
            "vllm:request_queue_time_seconds_count",
            "vllm:inter_token_latency_seconds_count",
            "vllm:request_success_total",
        )
    }
    assert list(gained.values()) == [4 + 2, 8, 2, 2, 2, 6, 2]
    assert 'http_requests_total{method="GET",route="/{prompt}",status="200"}' in after
    assert 'filter_hits_total{where="prompt"}' in after
    assert "some" not in after.replace("some of", "")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert metric(after, name) == 0
    assert metric(after, "model_load_seconds") > 0
    assert f'version="{main.VERSION}"' in after


def test_metrics_labels_are_bounded() -> None:
    for number in range(5):
        client.request(f"FOO{number}", "/generate")
        client.get(f"/nothing/here/{number}")
    text = client.get("/metrics").text
    assert 'method="other"' in text
    assert "FOO" not in text
    assert "nothing" not in text


def test_dashboard_shows_only_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    exposed = client.get("/metrics").text + " process_open_fds process_resident_memory_bytes "
    families = set(re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE))
    names = {n for e in expressions for n in re.findall(r"\b(?:vllm:|[a-z]+_)[a-z0-9_:]+\b", e)}
    words = {"model_name", "finished_reason", "histogram_quantile", "label_values", "group_left"}
    stripped = {re.sub("_(bucket|sum|count)$", "", name) for name in names - words}
    assert stripped
    assert stripped - families - {"process_open_fds", "process_resident_memory_bytes"} == set()


def test_metrics_count_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    before = metric(client.get("/metrics").text, "failed_requests_total")
    monkeypatch.setattr(main.engine.model, "forward", fail)
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 500
    assert "error" in client.post("/generate", json={"prompt": PROMPT, "stream": True}).text
    monkeypatch.undo()
    after = client.get("/metrics").text
    assert metric(after, "failed_requests_total") == before + 2
    assert metric(after, "engine_healthy") == 1


def test_log_has_prompts_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(main.logger, "propagate", True)
    for logs_prompts in (False, True):
        update = {"log_prompts": logs_prompts}
        monkeypatch.setattr(main, "settings", main.settings.model_copy(update=update))
        caplog.clear()
        with caplog.at_level("INFO", logger="service"):
            client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})
            client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
        assert [f.get("prompt") for f in facts] == (
            [PROMPT, [PROMPT]] if logs_prompts else [None] * 2
        )


# --- Hostile heads ------------------------------------------------------------------------------


def test_url_and_headers_are_limited() -> None:
    assert client.get("/generate/text?prompt=" + "a" * 17_000).status_code == 414
    headers = {f"x-{number}": "a" * 4000 for number in range(20)}
    assert client.get("/health", headers=headers).status_code == 431


def test_every_answer_has_security_headers() -> None:
    for path in ("/", "/docs", "/nothing/here"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"


# --- Drain --------------------------------------------------------------------------------------

LONG = {"prompt": PROMPT, "max_new_tokens": 200, "seed": 1, "stream": True}


async def read_streams(
    service: Served, count: int, then: Any, body: dict[str, Any] = LONG
) -> list[str]:
    """The bodies of so many streams; once each has begun, `then` is called."""
    begun = asyncio.Semaphore(0)

    async def read() -> str:
        async with (
            httpx.AsyncClient(base_url=service.address, timeout=60) as http,
            http.stream("POST", "/generate", json=body) as response,
        ):
            text = ""
            async for chunk in response.aiter_text():
                text += chunk
                begun.release()
            return text

    reading = [asyncio.create_task(read()) for _ in range(count)]
    for _ in range(count):
        await begun.acquire()
    await asyncio.to_thread(then)
    return await asyncio.gather(*reading)


@pytest.mark.parametrize("arguments", [(), ("--reload",)])
def test_drain_completes_streams_and_exits_with_zero(arguments: tuple[str, ...]) -> None:
    with served(*arguments, TORCH_NUM_THREADS="1") as service:
        with service.client() as kept:
            kept.get("/health")

            def stop() -> None:
                service.process.send_signal(signal.SIGTERM)
                wait_until(lambda: kept.get("/ready").status_code == 503)
                assert kept.get("/ready").json()["status"] == "draining"
                refused = kept.post("/generate", json={"prompt": PROMPT})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert kept.get("/health").status_code == 200

            texts = asyncio.run(read_streams(service, 16, stop, LONG | {"max_new_tokens": 100}))
        assert [text.count('"model_name"') for text in texts] == [1] * 16
        assert service.process.wait(30) == 0


def test_drain_ends_streams_at_the_deadline() -> None:
    with served(DRAIN_TIMEOUT_SECONDS="0", TORCH_NUM_THREADS="1") as service:
        texts = asyncio.run(read_streams(service, 16, service.process.terminate))
        assert {"model_name" in text for text in texts} | {True} == {True, False}
        for text in texts:
            assert text.endswith(
                'event: error\ndata: {"detail": "The service is stopping"}\n\n'
            ) or ('"model_name"' in text)
        assert any("event: error" in text for text in texts)
        assert service.process.wait(30) == 0


def test_drain_second_signal_ends_at_once() -> None:
    with served(TORCH_NUM_THREADS="1", DRAIN_TIMEOUT_SECONDS="60") as service:

        def stop() -> None:
            service.process.send_signal(signal.SIGTERM)
            with service.client() as other:
                wait_until(lambda: other.get("/ready").status_code == 503)
            service.process.send_signal(signal.SIGTERM)

        with pytest.raises(httpx.HTTPError):
            asyncio.run(read_streams(service, 60, stop))
        assert service.process.wait(10) == -signal.SIGTERM
