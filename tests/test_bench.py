"""What scripts/bench.py makes of rounds, and of a peer that is asked over pipes."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support import FOLDER, ROOT

# A peer that gives each prompt as many tokens as it has itself.
PEER = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    batches = json.loads(line)["batches"]
    counts = [[len(prompt) for prompt in batch] for batch in batches]
    print(json.dumps({"seconds": [0.5] * len(batches), "num_new_tokens": counts}), flush=True)
"""


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts" / "bench.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_medians_tell_how_steady_rounds_were(bench: Any) -> None:
    rounds = [
        {"server": "ours", "concurrency": 1, "tokens_per_second": speed, "num_requests": 8}
        for speed in (90.0, 100.0, 110.0)
    ]
    (row,) = bench.medians(rounds)
    assert row["tokens_per_second"] == 100
    assert row["tokens_per_second_spread"] == pytest.approx(0.2)
    assert row["num_requests"] == 24


def measured(bench: Any, program: str, tmp_path: Path) -> Any:
    """One row: three prompts of four tokens each, in batches of two, in processes without HTTP."""
    tokenizer = bench.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    args = argparse.Namespace(max_new_tokens=4, tokenizer=tokenizer)
    command = [sys.executable, "-c", program]
    server = bench.Server("peer", "", bench.SAMPLING, command, is_in_process=True)
    assert bench.start(server, tmp_path / "log")
    try:
        return bench.measure(server, 2, 3, 1000, args)
    finally:
        bench.stop(server)


def test_peer_without_http_is_measured_by_its_own_seconds(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PROMPTS", ("The king went home",))
    row = measured(bench, PEER, tmp_path)
    assert row["num_failures"] == 0
    assert row["tokens_per_second"] == pytest.approx(3 * 4 / 1.0)
    assert row["ttft_p50_seconds"] is None


@pytest.mark.parametrize("program", ["print('ready')", PEER.replace("len(prompt)", "3")])
def test_peer_that_gives_too_little_fails(bench: Any, program: str, tmp_path: Path) -> None:
    row = measured(bench, program, tmp_path)
    assert row["num_failures"] == 3
    assert row["tokens_per_second"] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_baseline_answers_as_many_tokens_as_it_is_asked_for(bench: Any, temperature: float) -> None:
    """Greedy, as the repetitive text is asked for, it was answered 500, and each run failed."""
    fields = bench.SAMPLING | {"temperature": temperature, "max_new_tokens": 3}
    client = TestClient(bench.baseline_app(str(FOLDER)))
    response = client.post("/generate", json=fields | {"prompt": "The king"})
    assert response.status_code == 200
    assert response.json()["generated_text"].startswith("The king")
    assert response.json()["model_name"] == FOLDER.name
