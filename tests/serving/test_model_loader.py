"""How a model is to be computed, as far as the settings say."""

import pytest
import torch

from engine import available_cores
from serving.model_loader import choose_num_threads, choose_precision
from serving.settings import Settings


def test_precision_is_what_the_settings_name() -> None:
    assert choose_precision(Settings(dtype="float32"))["dtype"] == torch.float32


def test_threads_beyond_the_cores_are_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cores = available_cores()
    assert choose_num_threads(Settings(torch_num_threads=cores)) == cores
    assert not caplog.messages
    assert choose_num_threads(Settings(torch_num_threads=cores + 1)) == cores + 1
    assert f"more than the cores that the process may use ({cores})" in caplog.text
