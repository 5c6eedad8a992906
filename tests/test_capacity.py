"""The capacity model of docs/scaling.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A step of 10 ms and 1 ms for each sequence.
RESULTS = [
    {"server": "ours", "concurrency": n, "tokens_per_second": n / (0.010 + 0.001 * n)}
    for n in (1, 8, 32)
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "bench.txt").write_text(f"a table\n{json.dumps({'results': RESULTS})}\n")
    return tmp_path / "bench.txt"


def capacity(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/capacity.py", str(bench), "--parameters", "100e6"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_capacity_follows_from_the_measured_steps(bench: Path) -> None:
    done = capacity(bench, "--requests-per-second", "40", "--inter-token-seconds", "0.0305")
    assert done.stdout.splitlines() == [
        "a step: 10.0 ms and 1.00 ms for each sequence",
        "sequences at once: 20",
        "tokens per second and replica: 667",
        "replicas: 5",  # 40 * 50 / 0.7 / 667 = 4.3
        "memory of each: 1.0 GB",
    ]


def test_capacity_of_a_larger_model_scales_the_step(bench: Path) -> None:
    larger = ["--requests-per-second", "1", "--for-parameters", "200e6"]
    done = capacity(bench, *larger, "--inter-token-seconds", "0.041")
    assert "a step: 20.0 ms and 2.00 ms" in done.stdout
    assert "sequences at once: 10" in done.stdout


def test_capacity_says_when_no_replica_is_fast_enough(bench: Path) -> None:
    done = capacity(bench, "--requests-per-second", "1", "--inter-token-seconds", "0.005")
    assert done.returncode == 1
    assert "No number of such replicas is fast enough" in done.stderr
