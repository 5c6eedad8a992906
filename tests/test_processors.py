"""The service on other processors than this one: each a process that is told to use less.

`simulated_processor.py` is what runs in them. What they are told makes no difference to some
processors (ARM's, for most of it), and the service has to be right on those as well.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.processors

ROOT = Path(__file__).parents[1]
Process = subprocess.CompletedProcess[str]

SIMULATED: dict[str, list[str]] = {  # what each is told
    "onednn with avx2": ["ONEDNN_MAX_CPU_ISA=AVX2"],
    "onednn with sse4.1": ["ONEDNN_MAX_CPU_ISA=SSE41"],
    "aten with avx2": ["ATEN_CPU_CAPABILITY=avx2"],
    "aten without vectors": ["ATEN_CPU_CAPABILITY=default"],
    "without onednn": ["--without-onednn", "QUANTIZATION=none"],
}
OTHERS = {
    "one core": ["TORCH_NUM_THREADS=2", "--one-core"],
    "int8 with avx2": ["ONEDNN_MAX_CPU_ISA=AVX2", "FBGEMM_ENABLE_INSTRUCTIONS=AVX2"],
    "bfloat16 where it is native": ["QUANTIZATION=none"],
    "bfloat16 with avx2": ["DTYPE=bfloat16", "ONEDNN_MAX_CPU_ISA=AVX2"],
}

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
LACKING = [] if torch.cpu._is_avx2_supported() or not IS_X86 else ["aten with avx2"]
needs_x86 = pytest.mark.skipif(not IS_X86, reason="instruction sets are limited on x86 alone")


def start(told: list[str]) -> Process:
    """What comes of the process; it computes in one thread unless it is told otherwise."""
    arguments = [each for each in told if each.startswith("--")]
    environment = dict(each.split("=") for each in told if each not in arguments)
    environment = {
        "MODEL_NAME": str(ROOT / "gpt2-tales"), "PYTHONPATH": str(ROOT), "TORCH_NUM_THREADS": "1",
    } | environment  # fmt: skip
    return subprocess.run(
        [sys.executable, "tests/simulated_processor.py", *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], Process]]:
    """The processes by name; two at a time run from the first test on."""

    def result(name: str) -> Process:
        if name in LACKING:  # torch would believe what it is told, and end the process
            pytest.skip(f"{name}: this processor has no AVX2")
        return futures[name].result()

    every = {name: told for name, told in (SIMULATED | OTHERS).items() if name not in LACKING}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(start, told) for name, told in every.items()}
        yield result


def found(process: Process) -> dict[str, Any]:
    """What the process says of itself in its last line."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stderr.splitlines()[-1])


def messages(process: Process) -> list[str]:
    """Of the log."""
    return [json.loads(line)["message"] for line in process.stdout.splitlines()]


@pytest.mark.parametrize("name", SIMULATED)
def test_service_is_right_on(name: str, started: Callable[[str], Process]) -> None:
    """Parity with transformers' own `generate`, and a seed's text alone and among others."""
    about = found(started(name))
    assert about["greedy"] == about["generated"], about
    assert about["is_same_bits_alone"], about
    assert about["is_same_bits_cached"], about
    assert about["num_cached_tokens"] == (480 if about["kernel"].startswith("int8") else 0), about
    assert len(set(about["seeded"].values())) == 1, about


@pytest.mark.parametrize("name", SIMULATED)
def test_log_says_what_computes_on(name: str, started: Callable[[str], Process]) -> None:
    about, lines = found(started(name)), messages(started(name))
    chosen = "{dtype}, {kernel}, {instruction_set}, ".format(**about)
    assert [line for line in lines if line.startswith(f"loaded gpt2-tales ({chosen}")]


@needs_x86
@pytest.mark.parametrize("name", ["onednn with avx2", "onednn with sse4.1"])
def test_dtype_auto_is_float32_on(name: str, started: Callable[[str], Process]) -> None:
    about = found(started(name))
    assert about["dtype"] == "torch.float32"
    assert about["instruction_set"] in ("sse41", "avx", "avx2")


def test_weights_stay_unpacked_without_onednn(started: Callable[[str], Process]) -> None:
    process = started("without onednn")
    about = found(process)
    assert (about["dtype"], about["kernel"]) == ("torch.float32", "plain")
    assert sum("weights are not packed" in line for line in messages(process)) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a core cannot be taken away here")
def test_service_is_right_on_one_core(started: Callable[[str], Process]) -> None:
    process = started("one core")
    about = found(process)
    assert about["greedy"] == about["generated"], about
    assert len(set(about["seeded"].values())) == 1, about
    (line,) = [line for line in messages(process) if line.startswith("TORCH_NUM_THREADS is 2")]
    assert "cores that the process may use (1)" in line


def test_int8_is_right_where_pairs_are_added_in_16_bits(started: Callable[[str], Process]) -> None:
    """It gave 32.4 for 63 on processors without VNNI, and a seed other texts in other company."""
    about = found(started("int8 with avx2"))
    if IS_X86 and torch.cpu._is_avx2_supported():
        assert about["kernel"] == "int8 fbgemm"
        assert about["adversarial_sum"] == pytest.approx(63, rel=0.01)
        assert about["num_cached_tokens"] == 480
        assert about["is_same_bits_cached"], about
    assert len(set(about["seeded"].values())) == 1, about
    assert about["greedy"] == about["generated"], about  # of the float32 engine beside it


def test_quantization_none_leaves_weights_as_dtype_says(started: Callable[[str], Process]) -> None:
    about = found(started("bfloat16 where it is native"))
    assert about["kernel"] in ("onednn", "plain")
    if about["instruction_set"] in ("avx512_bf16", "amx"):
        assert (about["dtype"], about["kernel"]) == ("torch.bfloat16", "onednn")
    assert len(set(about["seeded"].values())) == 1, about


@needs_x86
def test_bfloat16_that_the_processor_lacks_stops_the_start(
    started: Callable[[str], Process],
) -> None:
    """It was refused as if MODEL_NAME were wrong, with the kernel's own words alone."""
    process = started("bfloat16 with avx2")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("Invalid settings. DTYPE: bfloat16 needs a processor with AVX-512")
    assert "this one has " in line
