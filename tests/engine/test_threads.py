"""How many cores the process may use: by affinity, and by its control group's quota."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine import Engine, available_cores
from engine.threads import useful_threads
from tests.support import load, tokenizer


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [
        ("50000 100000", 1),  # half a core
        ("100000 100000", 1),
        ("150000 100000", 2),  # rounded up
        ("1000000 100000", 4),
        ("max 100000", 4),
        ("", 4),
        ("nonsense", 4),
        ("1 0 0", 4),
    ],
)
def test_available_cores_of_a_control_group(tmp_path: Path, cpu_max: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("250000", 3), ("-1", 4), ("0", 4)])
def test_available_cores_of_a_control_group_of_the_first_version(
    tmp_path: Path, quota: str, cores: int
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert available_cores(tmp_path) == cores


def test_available_cores_without_a_control_group(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "missing") == 4


def test_available_cores_of_a_quota_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").mkdir()  # whoever reads it, root too
    assert available_cores(tmp_path) == 4


def test_available_cores_where_affinity_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cores(tmp_path) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a core cannot be taken away here")
def test_available_cores_of_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own, which alone loses the others."""
    monkeypatch.undo()

    def count() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return available_cores(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(count).result() == 1


@pytest.mark.parametrize(("width", "num_threads"), [(256, 1), (768, 4)])
def test_useful_threads_of_a_small_and_of_a_large_model(width: int, num_threads: int) -> None:
    """A small model took all cores, whose threads waited for the event loop at every product: with
    32 clients on two cores it made 1,760 tokens a second, where one thread made 2,500."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=4))
    assert useful_threads(model) == num_threads


def test_engines_share_a_thread_and_keep_their_numbers_of_threads() -> None:
    engines = [Engine(load(), tokenizer), Engine(load(), tokenizer, num_threads=2)]
    assert engines[0]._computing_thread is engines[1]._computing_thread
    assert [each._compute(torch.get_num_threads) for each in engines * 2] == [1, 2, 1, 2]
