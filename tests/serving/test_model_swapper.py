"""Several models in one process, and more of them than fit into memory (MAX_LOADED_MODELS)."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import FOLDER, PROMPT, Served, metric, served, wait_until

NAMES = ["one", "two", "three"]
ENDLESS = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model under several names."""
    parent = tmp_path_factory.mktemp("models")
    for name in NAMES:
        (parent / name).mkdir()
        for file in FOLDER.iterdir():
            (parent / name / file.name).symlink_to(file)
    return parent


def folders(parent: Path, *names: str) -> str:
    return ",".join(str(parent / name) for name in names)


@pytest.fixture(scope="module")
def swapping(parent: Path) -> Iterator[Served]:
    """Three models, of which one is in memory."""
    settings = {"MODEL_NAME": folders(parent, *NAMES), "MAX_LOADED_MODELS": "1"}
    with served(**settings, REQUEST_TIMEOUT_SECONDS="60") as service:
        yield service


def generate(service: Served, model: str, **body: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_new_tokens": 5, "seed": 1, "model": model, **body}
    return httpx.post(f"{service.address}/generate", json=body, timeout=90)


def loaded(service: Served) -> list[str]:
    names: list[str] = httpx.get(f"{service.address}/ready").json()["loaded_model_names"]
    return names


def figure(service: Served, name: str, model: str) -> float:
    """A metric of one model."""
    text = httpx.get(f"{service.address}/metrics").text
    return metric(text, f'{name}{{model_name="{model}"}}')


def resident_bytes(service: Served) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def test_default_model_is_loaded_at_start(swapping: Served) -> None:
    answer = httpx.get(f"{swapping.address}/ready")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ready",
        "model_names": NAMES,
        "loaded_model_names": ["one"],
        "loading_model_name": None,
    }


def test_model_out_of_memory_is_swapped_in(swapping: Served) -> None:
    answers = [generate(swapping, name) for name in ("two", "one", "three")]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.json()["model_name"] for answer in answers] == ["two", "one", "three"]
    assert len({answer.json()["generated_text"] for answer in answers}) == 1  # one seed, one model
    assert loaded(swapping) == ["three"]
    assert [figure(swapping, "model_loaded", name) for name in NAMES] == [0, 0, 1]


def test_one_request_may_need_every_model(swapping: Served) -> None:
    body = {"prompt": PROMPT, "max_length": 20}
    answer = httpx.post(f"{swapping.address}/generate-text/", json=body, timeout=90)
    assert answer.status_code == 200
    assert sorted(answer.json()["generated_texts"]) == sorted(NAMES)


def test_stream_under_way_is_finished_before_its_model_leaves(swapping: Served) -> None:
    assert generate(swapping, "one").status_code == 200
    body = {"model": "one", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{swapping.address}/v1/completions", json=body, timeout=90
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(generate, swapping, "two")
            rest = [line for line in lines if line]
            assert waiting.result().json()["model_name"] == "two"
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-2]


def test_requests_for_two_models_at_once_all_get_answers(swapping: Served) -> None:
    names = NAMES[:2] * 12
    with ThreadPoolExecutor(len(names)) as clients:
        answers = list(clients.map(lambda name: generate(swapping, name), names))
    assert [answer.status_code for answer in answers] == [200] * len(names)
    assert [answer.json()["model_name"] for answer in answers] == names


def test_memory_is_that_of_one_model_after_many_swaps(swapping: Served) -> None:
    for name in NAMES:
        assert generate(swapping, name).status_code == 200
    before_bytes = resident_bytes(swapping)
    for name in NAMES[:2] * 6:
        assert generate(swapping, name).json()["model_name"] == name
    assert resident_bytes(swapping) < before_bytes + 30_000_000


def test_client_that_leaves_does_not_wait_for_the_swap(swapping: Served) -> None:
    assert generate(swapping, "one").status_code == 200
    body = {"prompt": PROMPT, "model": "three"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{swapping.address}/generate", json=body, timeout=0.05)
    wait_until(lambda: figure(swapping, "vllm:num_requests_waiting", "three") == 0)
    assert generate(swapping, "one").status_code == 200


def test_model_that_no_longer_loads_is_an_error_until_it_does(
    swapping: Served, parent: Path
) -> None:
    """Each request for it used to cost another model its place, only to fail again."""
    assert generate(swapping, "one").status_code == 200
    (parent / "two" / "config.json").rename(parent / "config.json")
    for names in ([], ["one"]):
        answer = generate(swapping, "two")
        assert (answer.status_code, answer.json()) == (500, {"detail": "Model inference failed"})
        assert loaded(swapping) == names
        assert generate(swapping, "one").status_code == 200
    (parent / "config.json").rename(parent / "two" / "config.json")
    wait_until(lambda: generate(swapping, "two").status_code == 200)


def test_sigterm_while_a_model_is_loaded_is_an_orderly_end(parent: Path) -> None:
    """The process used to crash in the middle of the load, with exit status 134. And the idle
    model leaves, though the busy one was asked for before it."""
    body = {**ENDLESS, "model": "two"}
    settings = {"MAX_LOADED_MODELS": "2", "DRAIN_TIMEOUT_SECONDS": "0"}
    with served(MODEL_NAME=folders(parent, *NAMES), **settings) as service:
        with httpx.stream("POST", f"{service.address}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert generate(service, "one").status_code == 200
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{service.address}/generate",
                    json={"prompt": PROMPT, "model": "three"},
                    timeout=0.2,
                )
            service.process.terminate()
            list(lines)
        assert service.process.wait(60) == 0
    unloaded = [line["message"] for line in service.log() if "unloaded" in line["message"]]
    assert unloaded == ["unloaded one"]


def test_request_past_its_deadline_does_not_wait_for_the_swap(parent: Path) -> None:
    settings = {"MODEL_NAME": folders(parent, "one", "two"), "MAX_LOADED_MODELS": "1"}
    with served(**settings, REQUEST_TIMEOUT_SECONDS="0.01") as service:
        answer = generate(service, "two")
        assert answer.status_code == 504
        assert answer.json() == {"detail": "The request took longer than 0.01 seconds"}


def test_two_models_run_side_by_side(parent: Path) -> None:
    """Their engines take turns in one thread: neither waits for the other's requests."""
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    names = NAMES[:2]

    def num_events(service: Served, name: str) -> int:
        request, url = {**body, "model": name}, f"{service.address}/v1/completions"
        with httpx.stream("POST", url, json=request, timeout=60) as answer:
            return sum(line.startswith("data: {") for line in answer.iter_lines())

    with (
        served(MODEL_NAME=folders(parent, "one", "two")) as service,
        ThreadPoolExecutor(2) as clients,
    ):
        events = clients.map(num_events, [service] * 2, names)
        wait_until(
            lambda: [figure(service, "vllm:num_requests_running", name) for name in names] == [1, 1]
        )
        assert min(events) > 150
        assert loaded(service) == names
