"""What the log and the usage log say: in this process, and of a service in one of its own."""

import csv
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import httpx
import pytest
from fastapi.testclient import TestClient

import main
from backends.local import LocalBackend
from backends.reader import Reader
from engine import available_cores
from serving.logs import USAGE_COLUMNS, JsonLines, LineQueue, TextFormatter, UsageFile
from serving.model_loader import ModelLoader
from tests.forked import run_python
from tests.support import FOLDER, NAME, PROMPT, ROOT, Served, fail, served, wait_until

client = TestClient(main.app)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    usage_log = tmp_path_factory.mktemp("usage") / "usage.csv"
    settings = {"USAGE_LOG": str(usage_log), "USAGE_LOG_MAX_BYTES": "1000"}
    with served(API_KEYS="dora:secret-d", **settings) as service:
        yield service


# --- In this process ----------------------------------------------------------------------------


def test_log_in_text_cannot_be_forged() -> None:
    record = logging.makeLogRecord(
        {"msg": "GET -", "request_id": "a", "facts": {"prompt": "x\n2026 forged", "status": 200}}
    )
    assert TextFormatter().format(record).count("\n") == 0
    assert json.loads(JsonLines().format(record))["prompt"] == "x\n2026 forged"


def read_rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_usage_file_is_rotated_and_begins_with_its_columns(tmp_path: Path) -> None:
    file = UsageFile(tmp_path / "usage.csv", maxBytes=1000, backupCount=5)
    for number in range(40):
        facts = {"request_id": number, "route": '=cmd|"a"', "status": 200}
        file.handle(logging.makeLogRecord({"msg": facts}))
    file.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    for each in files:
        assert each.stat().st_size <= 1000
        rows = read_rows(each)
        assert list(rows[0]) == list(USAGE_COLUMNS)
        assert rows[0]["route"] == '=cmd|"a"'


def test_log_names_the_route_and_never_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.get("/Sesame?max_new_tokens=1")
        client.post(
            "/generate", json={"prompt": "Sesame", "max_new_tokens": 1, "unknown": "Sesame"}
        )
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert [(f["route"], f["status"]) for f in facts] == [("/{prompt}", 200), ("/generate", 422)]
    ours = [r.getMessage() for r in caplog.records if r.name in ("service", "engine")]
    assert not [line for line in ours if "Sesame" in line]


def test_log_has_prompts_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for logs_prompts in (False, True):
        settings = main.settings.model_copy(update={"log_prompts": logs_prompts})
        backend = LocalBackend(
            NAME,
            main.generator,
            main.engine,
            content_filter=main.content_filter,
            request_timeout_seconds=60,
            reader=Reader(),
            log_prompts=ModelLoader(settings, main.content_filter, fail, fail).log_prompts,
        )
        monkeypatch.setitem(main.registry.backends, NAME, backend)
        caplog.clear()
        with caplog.at_level("INFO", logger="service"):
            client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1})
            client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
        assert [f.get("prompt") for f in facts] == (
            [PROMPT, [PROMPT]] if logs_prompts else [None] * 2
        )


# --- Lines that nobody reads --------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    """Its reading and writing end. It is a short one where that can be had."""
    reading, writing = os.pipe()
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with open(reading) as reader, open(writing, "w") as writer:
        yield reader, writer


def say(queue: LineQueue, text: str) -> None:
    queue.handle(logging.makeLogRecord({"msg": text, "levelname": "INFO"}))


def test_lines_come_in_order_and_whole(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    os.set_blocking(writer.fileno(), False)
    queue = LineQueue(writer)
    texts = [str(number) + "\u00e9" * 3000 for number in range(20)]
    for text in texts:
        say(queue, text)
    assert [reader.readline() for _ in texts] == [f"{text}\n" for text in texts]
    queue.flush()
    assert (len(queue.lines), queue.num_waiting_bytes, queue.num_lost) == (0, 0, 0)


def test_lines_that_do_not_fit_are_counted(
    pipe: tuple[TextIO, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.logs.MAX_WAITING_BYTES", 200_000)
    monkeypatch.setattr("serving.logs.FLUSH_SECONDS", 0.1)
    reader, writer = pipe
    queue = LineQueue(writer)
    say(queue, "x" * 149_999)  # more than the pipe holds
    for _ in range(1000):
        say(queue, "y" * 99)
    assert (queue.num_waiting_bytes, queue.num_lost) == (200_000, 500)
    queue.flush()  # comes back
    assert [len(reader.readline()) for _ in range(501)] == [150_000] + [100] * 500
    queue.flush()
    say(queue, "after")
    assert reader.readline().endswith("lost, since nobody read it: 500\n")
    say(queue, "again")
    assert [reader.readline(), reader.readline()] == ["after\n", "again\n"]


def test_lines_whose_reader_has_gone_are_lost(pipe: tuple[TextIO, TextIO]) -> None:
    reader, writer = pipe
    queue = LineQueue(writer)
    reader.close()
    for _ in range(100):
        say(queue, "x" * 1000)
        queue.flush()
    assert (queue.num_lost >= 100, queue.num_waiting_bytes) == (True, 0)


def test_log_that_nobody_reads_holds_nobody_up(pipe: tuple[TextIO, TextIO]) -> None:
    """Stopped the service for good after some 268 requests; what is no HTTP has a line too, on
    standard error."""
    reader, writer = pipe
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            wait_until(lambda: answers(http))
            for _ in range(320):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
                    other.sendall(b"no HTTP\r\n\r\n")
                    assert other.recv(100).startswith(b"HTTP/1.1 400")
                assert http.get("/health").status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
    writer.close()
    lines = reader.read().splitlines()
    assert any('"message": "settings: ' in line for line in lines)


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_log_of_a_start_that_fails_is_whole() -> None:
    too_many = str(available_cores() + 1)
    settings = {"TORCH_NUM_THREADS": too_many, "MODEL_NAME": f"/no/such/folder,{FOLDER}"}
    ran = run_python("-m", "uvicorn", "main:app", **settings)
    assert (ran.returncode, ran.stderr.count("MODEL_NAME: cannot load")) == (1, 1)
    messages = [json.loads(line)["message"] for line in ran.stdout.splitlines()]
    assert messages[0].startswith(f"TORCH_NUM_THREADS is {too_many}")
    assert messages[-1].startswith("loaded gpt2-tales")


# --- In a process of its own --------------------------------------------------------------------


def test_log_has_a_json_line_for_a_request(service: Served) -> None:
    headers = {"X-API-Key": "secret-d", "X-Request-ID": "the-one"}
    with service.client(**headers) as dora:
        answer = dora.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 3})
    assert answer.status_code == 200
    wait_until(lambda: any(line.get("request_id") == "the-one" for line in service.log()))
    (line,) = [line for line in service.log() if line.get("request_id") == "the-one"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/generate", 200)
    assert (line["model"], line["key"], line["finish_reason"]) == ("gpt2-tales", "dora", "length")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (4, 3)
    assert 0 <= line["queue_seconds"] <= line["seconds"] < 10
    assert line["level"] == "INFO"


def test_log_holds_no_secret_and_no_prompt(service: Served) -> None:
    with service.client(**{"X-API-Key": "secret-d"}) as dora:
        dora.get("/A%20very%20private%20prompt%0Awith%20a%20line?max_new_tokens=2")
        dora.get("/v1/models", headers={"X-API-Key": "secret-that-nobody-has"})
    written = "".join(service.lines)
    assert "secret-" not in written
    assert "private" not in written
    assert '"api_keys": "**********"' in written.replace("'", '"')
    assert all(line["level"] for line in service.log())


def test_usage_log_has_a_row_for_each_generation(service: Served) -> None:
    with service.client(**{"X-API-Key": "secret-d"}) as dora:
        dora.get("/v1/models")
        dora.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 2})
    folder = next(
        Path(line["message"].split("'usage_log': '")[1].split("'")[0]).parent
        for line in service.log()
        if "'usage_log'" in line["message"]
    )
    wait_until(lambda: "dora" in "".join(f.read_text() for f in folder.iterdir()))
    rows = [row for file in folder.iterdir() for row in read_rows(file)]
    row = next(row for row in rows if row["key"] == "dora")
    assert list(row) == list(USAGE_COLUMNS)
    assert (row["route"], row["status"], row["model"]) == ("/generate", "200", "gpt2-tales")
    assert {row["route"] for row in rows} <= {"/generate", "/{prompt}"}
