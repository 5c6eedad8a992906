"""Packed weights in larger pages of memory: the same numbers, read faster."""

import os
import re
from pathlib import Path

import pytest
import torch

from engine.kernels import PackedLinear
from engine.weights import move_to_huge_pages


def gives_huge_pages() -> bool:
    """Whether this system gives huge pages to those who ask, and only to them, at once."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2]))
    return setting.exists() and "[madvise]" in setting.read_text() and release >= (6, 1)


def huge_kib() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall("AnonHugePages: *([0-9]+)", rollup)[0])


@pytest.mark.skipif(not gives_huge_pages(), reason="needs Linux 6.1 with huge pages on request")
def test_weights_move_to_huge_pages() -> None:
    layer = PackedLinear(torch.randn(4096, 4096), None)  # 64 MiB
    x = torch.randn(2, 4096)
    before, before_kib = layer(x), huge_kib()
    move_to_huge_pages([layer.weight])
    assert huge_kib() >= before_kib + (16 << 10)
    assert torch.equal(layer(x), before)
