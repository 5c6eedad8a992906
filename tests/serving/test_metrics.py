"""What `/metrics` says after something has happened, and what the dashboard makes of it."""

import itertools
import json
import re

import pytest
from fastapi.testclient import TestClient

import main
from tests.support import PROMPT, ROOT, fail, metric

client = TestClient(main.app, raise_server_exceptions=False)


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


def test_metrics_count_what_the_prefix_cache_finds() -> None:
    if not main.engine.runner.is_exact:
        pytest.skip("no int8 kernel on this processor, so nothing is shared")
    names = ["vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"]
    names.append("vllm:prefix_cache_hits_total")
    texts = [client.get("/metrics").text]
    for _ in range(2):
        body = {"prompt": list(range(7, 77)), "max_tokens": 1}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        main.engine.stop()  # what a step did is counted after its answer has gone out
        main.engine.start()
        texts.append(client.get("/metrics").text)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 64}
    counted = [[metric(text, name) for name in names] for text in texts]
    gained = [
        [after - before for before, after in zip(*pair, strict=True)]
        for pair in itertools.pairwise(counted)
    ]
    assert gained == [[70, 70, 0], [70, 70, 64]]


def test_metrics_labels_are_bounded() -> None:
    for number in range(5):
        client.request(f"FOO{number}", "/generate")
        client.get(f"/nothing/here/{number}")
    text = client.get("/metrics").text
    assert 'method="other"' in text
    assert "FOO" not in text
    assert "nothing" not in text


def test_metrics_count_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    before = metric(client.get("/metrics").text, "failed_requests_total")
    monkeypatch.setattr(main.engine.model, "forward", fail)
    assert client.post("/generate", json={"prompt": PROMPT}).status_code == 500
    assert "error" in client.post("/generate", json={"prompt": PROMPT, "stream": True}).text
    monkeypatch.undo()
    after = client.get("/metrics").text
    assert metric(after, "failed_requests_total") == before + 2
    assert metric(after, 'engine_healthy{model_name="gpt2-tales"}') == 1


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
