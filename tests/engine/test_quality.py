"""What int8 costs in quality, as a number, and what becomes of it where it costs too much."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine import Engine
from engine.kernels import PLAIN, Kernel, int8_kernels, what_is_wrong_with
from engine.model_runner import ModelRunner
from engine.quality import MIN_TOKENS, TEXT, QualityTrial
from tests.support import FOLDER, fail, load, one, tiny_llama, tokenizer

INT8 = {kernel.name: kernel for kernel in int8_kernels()}
CARD = (FOLDER / "README.md").read_text()
MAX_MODEL_LEN = 512


def runners_of(model: Any) -> partial[ModelRunner]:
    return partial(ModelRunner, model, max_num_seqs=2, max_model_len=MAX_MODEL_LEN)


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
    trial = QualityTrial(model, tokenizer, MAX_MODEL_LEN, text)
    after = trial.measure(runners_of(model)(kernel=INT8[name]))
    assert 0.5 < trial.before.bits_per_byte < 5
    assert after.bits_per_byte < trial.before.bits_per_byte * (1 + most_loss)
    assert after.agreement(trial.before) >= least_agreement


def test_quality_is_measured_with_less_text_of_a_large_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.quality.MAX_WORK", 1)
    trial = QualityTrial(load(), tokenizer, MAX_MODEL_LEN)
    assert len(trial.token_ids) == MIN_TOKENS
    assert len(trial.before.greedy_token_ids) == MIN_TOKENS - 1


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
    trial = QualityTrial(model, tokenizer, MAX_MODEL_LEN)
    runner = trial.choose_runner(runners_of(model), COARSE, PLAIN, torch.float32)
    assert runner.kernel is PLAIN
    assert not [each for each in model.modules() if isinstance(each, Coarse)]
    kept = trial.measure(runner).bits_per_byte
    assert kept == pytest.approx(trial.before.bits_per_byte, rel=1e-5)
    (line,) = [each for each in caplog.records if each.name == "engine"]
    assert line.levelno == logging.WARNING
    assert f"{trial.before.bits_per_byte:.4f} before" in line.getMessage()


def test_auto_keeps_float_where_int8_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """And remembers that when the model comes back."""
    choose = {"auto": COARSE}
    monkeypatch.setattr(
        "engine.engine.choose_kernel", lambda dtype, device, name: choose.get(name, PLAIN)
    )
    auto = Engine(load(), tokenizer, quantization="auto", num_threads=1)
    plain = Engine(load(), tokenizer, num_threads=1)
    try:
        assert auto.kernel is PLAIN
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


def test_auto_refuses_a_model_that_fails_by_itself() -> None:
    model = tiny_llama()
    model.forward = fail
    with pytest.raises(ValueError, match="does not run by itself: RuntimeError: injected"):
        Engine(model, tokenizer, quantization="auto", num_threads=1)


@pytest.mark.parametrize(
    ("activation", "is_exact"), [("gelu_new", True), ("gelu", True), ("relu", False)]
)
def test_rows_are_taken_for_exact_only_where_what_is_between_products_is_known(
    activation: str, is_exact: bool
) -> None:
    """Every GPT-2's were, though another activation's bits may depend on a row's place."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, activation_function=activation))
    runner = ModelRunner(model, max_num_seqs=1, max_model_len=64, kernel=COARSE)
    assert runner.is_exact is is_exact


def test_int8_of_a_dense_model_of_another_kind_is_not_said_to_lose_seeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is between the products of such a model is measured; a mixture of experts is warned
    of."""
    llama = Engine(tiny_llama(), tokenizer, quantization="int8", num_threads=1)
    llama.stop()
    assert "the same seed" not in caplog.text
