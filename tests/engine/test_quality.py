"""What int8 costs in quality, as a number, and what becomes of it where it costs too much."""

import logging

import pytest
import torch

from engine import Engine
from engine.kernels import Kernel, int8_kernels, what_is_wrong_with
from engine.quality import TEXT, keeps_quality, measure_quality
from engine.weights import pack_layers
from tests.support import FOLDER, load, one, tokenizer

INT8 = {kernel.name: kernel for kernel in int8_kernels()}
CARD = (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "most_loss", "least_agreement"),
    [("int8 onednn", 0.003, 0.95), ("int8 fbgemm", 0.0075, 0.85)],
)
@pytest.mark.parametrize("text", [TEXT, CARD], ids=["text", "card"])
def test_quality_of_int8(name: str, most_loss: float, least_agreement: float, text: str) -> None:
    """Bits per byte and greedy agreement; docs/performance.md has the figures."""
    if name not in INT8 or what_is_wrong_with(INT8[name], torch.float32):
        pytest.skip(f"{name} is not right on this processor")
    model = load()
    before = measure_quality(model, tokenizer, text)
    pack_layers(model, INT8[name])
    after = measure_quality(model, tokenizer, text)
    assert 0.5 < before.bits_per_byte < 5
    assert after.bits_per_byte < before.bits_per_byte * (1 + most_loss)
    assert after.agreement(before) >= least_agreement


class Coarse(torch.nn.Module):
    """Weights of two bits."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        step = weight.abs().amax() / 2
        self.weight, self.bias = (weight / step).round() * step, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


COARSE = Kernel("coarse", lambda weight, bias, _: Coarse(weight, bias), is_exact=True)


def test_what_costs_too_much_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    before = measure_quality(model, tokenizer)
    assert not keeps_quality(model, tokenizer, COARSE)
    assert measure_quality(model, tokenizer).bits_per_byte == before.bits_per_byte
    (line,) = [each for each in caplog.records if each.name == "engine"]
    assert line.levelno == logging.WARNING
    assert f"{before.bits_per_byte:.4f} before" in line.getMessage()


def test_auto_keeps_float_where_int8_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """And remembers that when the model comes back."""
    choose = {"auto": COARSE}
    monkeypatch.setattr(
        "engine.engine.choose_kernel", lambda dtype, device, name: choose.get(name, Kernel("plain"))
    )
    auto = Engine(load(), tokenizer, quantization="auto", num_threads=1)
    plain = Engine(load(), tokenizer, num_threads=1)
    try:
        assert auto.kernel.name == "plain"
        assert one(auto, "A fox", seed=1) == one(plain, "A fox", seed=1)
        auto.unload()
        auto.load(load())
        assert one(auto, "A fox", seed=1) == one(plain, "A fox", seed=1)
    finally:
        auto.stop()
        plain.stop()


def test_auto_takes_int8_where_it_keeps_quality() -> None:
    auto = Engine(load(), tokenizer, quantization="auto", num_threads=1)
    int8 = Engine(load(), tokenizer, quantization="int8", num_threads=1)
    try:
        if not auto.kernel.is_exact:
            pytest.skip("int8 is not the fastest here")
        assert one(auto, "A fox", seed=1) == one(int8, "A fox", seed=1)
    finally:
        auto.stop()
        int8.stop()
