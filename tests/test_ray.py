"""The service behind Ray Serve: `make test-ray`. Slow: it starts Ray three times.

The tests marked `contract` run here again, through Ray's proxy and of two replicas.
"""

import asyncio
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

import main
from serving.settings import Settings
from tests.support import PROMPT, ROOT, Served, free_port, metric, redis_server, wait_until

pytestmark = pytest.mark.slow

CONFIG = yaml.safe_load((ROOT / "serve.yaml").read_text())
OPTIONS = CONFIG["applications"][0]["deployments"][0]
DIED = {"detail": "The replica that worked on this has died; try again"}
LONG = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}  # which nothing shortens


def family(parent: int) -> dict[int, str]:
    """The command lines of all processes below one, by process id."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found: dict[int, str] = {}
    below = {parent}
    while below:
        children = {int(pid): args for pid, ppid, args in rows if int(ppid) in below}
        below = set(children) - set(found)
        found |= children
    return found


class RayService(Served):
    def read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            print(line, end="")  # pytest shows it when a test fails

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "".join(self.lines)
        return any("is ready at" in line for line in self.lines)

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.address, headers=headers, timeout=120, follow_redirects=True
        )

    def replica_pids(self) -> set[int]:
        below = family(self.process.pid)
        return {pid for pid, args in below.items() if args.startswith("ray::ServeReplica")}

    def metrics(self) -> str:
        return httpx.get(f"{self.address}/metrics", timeout=120).text

    def num_running(self) -> float:
        return metric(self.metrics(), "vllm:num_requests_running")


def by_replica(metrics: str, name: str) -> dict[str, float]:
    """A metric's last sample of each replica."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('replica="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


@contextmanager
def ray_service(deployment: dict[str, Any] | None = None, **settings: str) -> Iterator[RayService]:
    """serve.yaml's two replicas on a free port; afterwards no process and no file is left."""
    port = free_port()
    options = OPTIONS | {"autoscaling_config": None, "num_replicas": 2} | (deployment or {})
    application = CONFIG["applications"][0] | {"deployments": [options]}
    http_options = CONFIG["http_options"] | {"port": port}
    home = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a longer path is too long for a socket
    config = Path(home, "serve.yaml")
    config.write_text(
        yaml.safe_dump(CONFIG | {"http_options": http_options, "applications": [application]})
    )
    places = {"RAY_TMPDIR": home, "HOME": home, "DTYPE": "float32"}
    process = subprocess.Popen(
        [sys.executable, "ray_serve.py", str(config)],
        cwd=ROOT,
        env=os.environ | places | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    service = RayService(process, f"http://127.0.0.1:{port}")
    started: set[int] = set()
    try:
        wait_until(service.is_ready, seconds=180)
        started = set(family(process.pid))
        yield service
    finally:
        started |= set(family(process.pid))
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(120)
            wait_until(lambda: not any(map(is_alive, started)), seconds=60)
        finally:
            for pid in filter(is_alive, {process.pid, *started}):
                os.kill(pid, signal.SIGKILL)
            service.reader.join()
            process.stdout.close()
            shutil.rmtree(home)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gather(
    service: RayService, count: int, body: dict[str, Any], **headers: str
) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(
        base_url=service.address, timeout=120, limits=limits, headers=headers
    ) as http:
        return await asyncio.gather(*(http.post("/generate", json=body) for _ in range(count)))


async def read_streams(
    service: RayService, count: int, path: str, body: dict[str, Any], then: Callable[[], Any]
) -> list[tuple[str, bool]]:
    """So many streams, and whether each came to a proper end; `then` is called once all have
    begun."""
    begun = asyncio.Semaphore(0)

    async def read() -> tuple[str, bool]:
        text = ""
        async with (
            httpx.AsyncClient(base_url=service.address, timeout=120) as http,
            http.stream("POST", path, json=body | {"stream": True}) as response,
        ):
            assert response.status_code == 200
            try:
                async for chunk in response.aiter_text():
                    if not text:
                        begun.release()
                    text += chunk
            except httpx.RemoteProtocolError:
                return text, False
        return text, True

    reading = [asyncio.create_task(read()) for _ in range(count)]
    for _ in range(count):
        await begun.acquire()
    await asyncio.to_thread(then)
    return await asyncio.gather(*reading)


# --- The numbers of serve.yaml ------------------------------------------------------------------


def test_numbers_agree_with_the_settings() -> None:
    settings = {name: field.default for name, field in Settings.model_fields.items()}
    admitted = settings["max_num_seqs"] + 2 * settings["max_queue_size"]
    assert OPTIONS["max_ongoing_requests"] > admitted
    assert OPTIONS["autoscaling_config"]["target_ongoing_requests"] < settings["max_num_seqs"]
    assert OPTIONS["graceful_shutdown_timeout_s"] == settings["drain_timeout_seconds"]
    assert CONFIG["http_options"]["request_timeout_s"] > settings["request_timeout_seconds"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, while it is imported
def test_health_check_fails_with_the_engine_and_not_with_a_full_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = importlib.import_module("ray_serve").Replica()
    monkeypatch.setattr(main.engine.scheduler, "has_room", lambda num_sequences: False)
    assert main.engine.is_full
    replica.check_health()
    monkeypatch.setattr(main.engine, "num_failed_steps", 3)
    with pytest.raises(RuntimeError, match="the engine of gpt2-tales keeps failing"):
        replica.check_health()


# --- Limits that all replicas share -------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with redis_server(tmp_path) as server:
        yield server


def test_limits_are_shared_and_open_without_their_storage(redis: subprocess.Popen[bytes]) -> None:
    settings = {
        "API_KEYS": "alice:one,bob:two",
        "RATE_LIMIT": "20",
        "RATE_LIMIT_STORAGE": f"redis://127.0.0.1:{redis.args[2]}",
        "MAX_NUM_SEQS": "1",
        "MAX_QUEUE_SIZE": "1",
    }
    with ray_service(**settings) as service, service.client(**{"X-API-Key": "one"}) as alice:
        assert httpx.get(f"{service.address}/metrics", timeout=120).status_code == 401
        answers = [alice.get("/v1/models") for _ in range(25)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 5
        refused = answers[-1]
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        counted = httpx.get(f"{service.address}/metrics", headers={"X-API-Key": "two"}).text
        assert len(by_replica(counted, "http_requests_total")) == 2  # both had a part

        overloaded = asyncio.run(
            gather(service, 15, {"prompt": PROMPT, "max_new_tokens": 100}, **{"X-API-Key": "two"})
        )
        assert {answer.status_code for answer in overloaded} == {200, 503}
        for answer in overloaded:
            if answer.status_code == 503:
                detail = "Too many requests are waiting; try again shortly"
                assert answer.json() == {"detail": detail}
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["x-request-id"]

        redis.kill()
        redis.wait()
        answers = [alice.get("/v1/models") for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert "x-ratelimit-limit-requests" not in answers[-1].headers
        wait_until(lambda: any("no rate limits for 10 s" in line for line in service.lines))
        assert not any("Traceback" in line for line in service.lines)


# --- SIGTERM, and what the proxy itself answers -------------------------------------------------


def test_overload_and_sigterm_are_answered_in_our_words() -> None:
    """The limits are the proxy's here, lower than the service's own. Streams that run at SIGTERM
    end whole, and so does the process."""
    numbers = {"max_ongoing_requests": 8, "max_queued_requests": 12}
    with ray_service(numbers | {"graceful_shutdown_timeout_s": 120}) as service:
        overloaded = asyncio.run(gather(service, 60, {"prompt": PROMPT, "max_new_tokens": 100}))
        full = [answer for answer in overloaded if answer.status_code != 200]
        assert 0 < len(full) < 60
        for answer in full:
            assert answer.json() == {"detail": "Too many requests are waiting; try again shortly"}
        refusals = list(full)

        def stop() -> None:
            assert service.num_running() > 0
            service.process.terminate()
            wait_until(
                lambda: httpx.get(f"{service.address}/health", timeout=120).status_code == 503
            )
            refusals.append(httpx.post(f"{service.address}/v1/completions", json={}, timeout=120))

        streams = asyncio.run(read_streams(service, 8, "/v1/completions", LONG, stop))
        assert [(text[-14:], is_whole) for text, is_whole in streams] == (
            [("data: [DONE]\n\n", True)] * 8
        )
        assert service.process.wait(180) == 0
    for answer in refusals:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert len(answer.headers.get_list("x-request-id")) == 1
    assert refusals[-1].json()["error"] == {
        "message": "The service is starting or stopping",
        "type": "server_error", "param": None, "code": None,
    }  # fmt: skip


# --- Through the proxy --------------------------------------------------------------------------

CONTRACT = (
    "test_main.py",
    "tests/test_models.py",
    "tests/serving/test_documentation.py",
    "tests/serving/test_middleware.py",
    "tests/serving/test_routes.py",
    "tests/serving/openai/test_openai_routes.py",
)


@pytest.fixture(scope="module")
def service() -> Iterator[RayService]:
    with ray_service() as service:
        yield service


@pytest.fixture
def client(service: RayService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_contract_holds_behind_the_proxy(service: RayService) -> None:
    """The tests that look at nothing but what is sent and answered, in a process of their own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "contract", "-p", "no:cacheprovider", *CONTRACT],
        cwd=ROOT,
        env=environment | {"SERVICE_ADDRESS": service.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 170


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["gpt2-tales"]
    assert client.models.retrieve("gpt2-tales").id == "gpt2-tales"


def test_stream_arrives_before_the_last_token_is_made(service: RayService) -> None:
    body = LONG | {"stream": True}
    with httpx.stream("POST", f"{service.address}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = response.iter_lines()
        first = json.loads(next(chunks).removeprefix("data: "))
        assert service.num_running() == 1
        assert sum(1 for line in chunks if line) > 100
    assert first["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("streams", [False, True])
def test_client_that_leaves_frees_its_place(service: RayService, streams: bool) -> None:
    before = metric(service.metrics(), "vllm:generation_tokens_total")
    body = LONG | {"n": 4, "stream": streams}
    with service.client() as http:
        if streams:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: service.num_running() == 0, seconds=60)
    assert metric(service.metrics(), "vllm:generation_tokens_total") - before < 4 * 400


def test_metrics_are_of_every_replica_once(service: RayService) -> None:
    text = service.metrics()
    assert len(by_replica(service.metrics(), "process_resident_memory_bytes")) == 2
    assert len(by_replica(service.metrics(), "build_info")) == 2
    samples = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(set(samples)) == len(samples)
    assert len(set(types)) == len(types)
    assert all('replica="' in sample for sample in samples)


def test_log_names_the_replica_and_never_the_prompt(service: RayService) -> None:
    """Asked again while nothing is seen: Ray's monitor once did not bring a line in 20 seconds."""
    with service.client(**{"X-Request-ID": "log-me"}) as http:

        def lines_after_a_request() -> list[str]:
            assert http.get("/Sesame?max_new_tokens=1").status_code == 200
            return [line for line in service.lines if '"log-me"' in line]

        wait_until(lines_after_a_request, seconds=60)
    lines = [line for line in service.lines if '"log-me"' in line]
    assert all('"replica": "' in line for line in lines)
    assert not [line for line in service.lines if "Sesame" in line]


def test_killed_replica_loses_only_what_it_worked_on(service: RayService) -> None:
    """Every stream ends whole or with an error event, every other request with 200 or 503. Ray
    once gave all the streams to one replica, so none needs to be left over."""
    before = service.replica_pids()
    assert len(before) == 2
    outcomes: Counter[int] = Counter()
    running: dict[str, float] = {}
    is_over = threading.Event()

    def ask() -> None:
        with service.client() as http:
            while not is_over.is_set():
                answer = http.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 10})
                outcomes[answer.status_code] += 1
                if answer.status_code != 200:
                    assert (answer.status_code, answer.json()) == (503, DIED)
                    assert answer.headers["retry-after"] == "1"

    def kill() -> None:
        running.update(by_replica(service.metrics(), "vllm:num_requests_running"))
        busiest = max(running, key=running.__getitem__)
        line = re.search(rf'pid=(\d+)\).*"replica": "{busiest}"', "".join(service.lines))
        assert line
        os.kill(int(line[1]), signal.SIGKILL)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        streams = asyncio.run(read_streams(service, 16, "/v1/completions", LONG, kill))
        wait_until(lambda: len(by_replica(service.metrics(), "build_info")) == 2, seconds=120)
        is_over.set()
        for each in asking:
            each.result()
    assert all(is_whole for _, is_whole in streams)
    ends = Counter(text.rstrip().rsplit("\n\n", 1)[-1] for text, _ in streams)
    num_done = ends.pop("data: [DONE]", 0)
    ((error, num_lost),) = ends.items()  # all others say the same
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == DIED["detail"]
    assert num_done + num_lost == 16
    assert num_lost <= max(running.values())
    assert outcomes[503] <= 4  # each asks for one thing at a time
    assert outcomes[200] > 20
    after = service.replica_pids()
    assert len(after) == 2
    assert len(after - before) == 1
