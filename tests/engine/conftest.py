"""Engines that are loaded once for tests that only ask them, and one for those that break it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine import Engine
from engine.kernels import ONEDNN, what_is_wrong_with
from serving.content_filter import ContentFilter
from tests.support import load, tiny_llama, tokenizer


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """One thread is as fast with so small a model, and in nobody's way."""
    made = Engine(load(), tokenizer, num_threads=1)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def parallel_engine() -> Iterator[Engine]:
    """As many threads as there are cores, which is the default."""
    made = Engine(load(), tokenizer)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def bfloat16_engine() -> Iterator[Engine]:
    if what_is_wrong_with(ONEDNN, torch.bfloat16):
        pytest.skip("no bfloat16 kernel on this processor")
    made = Engine(load(torch.bfloat16), tokenizer)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def llama_engine() -> Iterator[Engine]:
    made = Engine(tiny_llama(), tokenizer, max_num_seqs=4, num_threads=1)
    yield made
    made.stop()


@pytest.fixture
def small_engine() -> Iterator[Engine]:
    """Two places, two requests may wait; its own model, so that a test may break it."""
    sizes = {"max_num_seqs": 2, "max_queue_size": 2, "max_model_len": 128}
    made = Engine(load(), tokenizer, **sizes, num_threads=1)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def reference() -> Any:
    """The model as transformers runs it."""
    return load().eval()


@pytest.fixture
def filtered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Engine]:
    """The engine under a filter for the given words, until the end of the test."""

    def set_filter(words: str) -> Engine:
        monkeypatch.setattr(engine.output, "text_filter", ContentFilter(words))
        return engine

    return set_filter
