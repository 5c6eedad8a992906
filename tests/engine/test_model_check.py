"""Models of which the engine would make another text are refused when they are loaded."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from engine import Engine, engine
from engine.kernels import ONEDNN, what_is_wrong_with
from engine.model_check import choose_lengths, difference, in_float32
from tests.support import fail, load, tiny_llama, tokenizer

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip


class SeesOthers(LlamaForCausalLM):
    """It says something else when there are other texts in the pass."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(*args, position_ids=position_ids, **kwargs)
        if position_ids is not None and (position_ids.diff() != 1).any():
            output.logits = output.logits.roll(1, -1)
        return output


class ForgetsItsBeginning(LlamaForCausalLM):
    """By itself it reads no more than the last 64 tokens."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if "kv_cache" not in kwargs:
            input_ids = input_ids[:, -64:]
        return super().forward(input_ids, **kwargs)


def llama_as(kind: type[LlamaForCausalLM]) -> Any:
    model = tiny_llama()
    model.__class__ = kind
    model.config.original_max_position_embeddings = 64  # a limit, beyond which is compared too
    return model


def make(model_class: Any, config_class: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config_class(**SIZES, **more)).eval()


WRONG = {
    "an encoder": (lambda: make(BertLMHeadModel, BertConfig), "depends on those that come after"),
    "two attentions in a layer": (
        lambda: make(DiffLlamaForCausalLM, DiffLlamaConfig),
        "11 tokens, alone, its logits are",
    ),
    "convolutions": (
        lambda: make(Lfm2ForCausalLM, Lfm2Config, layer_types=["conv", "full_attention"]),
        r"\(it has layers of the kind conv\)",
    ),
    "sees others": (lambda: llama_as(SeesOthers), "beside others, its logits are"),
    "forgets": (lambda: llama_as(ForgetsItsBeginning), "96 tokens, beside others, its logits are"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make_model", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_model_is_refused_with_the_reason(
    make_model: Any, reason: str, dtype: torch.dtype
) -> None:
    """They were served: fluent wrong text with status 200."""
    if what_is_wrong_with(ONEDNN, dtype):
        pytest.skip("no kernel for this on this processor")
    with pytest.raises(ValueError, match=reason) as error:
        Engine(make_model().to(dtype), tokenizer, num_threads=1)
    assert "\n" not in str(error.value)


def test_wrong_model_is_refused_with_int8() -> None:
    """What eight bits round would hide what is wrong, so it is looked at before."""
    with pytest.raises(ValueError, match="its logits are"):
        Engine(llama_as(SeesOthers), tokenizer, num_threads=1, quantization="int8")


def test_model_that_fails_by_itself_is_refused() -> None:
    model = tiny_llama()
    model.forward = fail
    with pytest.raises(ValueError, match="does not run by itself: RuntimeError: injected"):
        Engine(model, tokenizer, num_threads=1)


def test_model_that_keeps_tensors_of_a_pass_is_served() -> None:
    """The check ran in inference mode: the frequencies that this model keeps could not be changed
    afterwards, and it was refused."""
    if what_is_wrong_with(ONEDNN, torch.bfloat16):
        pytest.skip("no kernel for this on this processor")
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    }
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    more = {"original_max_position_embeddings": 64, "rope_parameters": rope, "pad_token_id": 0}
    model = make(Phi3ForCausalLM, Phi3Config, sliding_window=None, **more)
    made = Engine(model.to(torch.bfloat16), tokenizer, num_threads=1)
    assert made.is_loaded
    made.stop()


def test_model_is_checked_once_and_not_each_time_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Engine(tiny_llama(), tokenizer, num_threads=1)
    monkeypatch.setattr(engine, "checked_runner", fail)
    made.unload()
    made.load(tiny_llama())
    assert made.is_loaded
    made.stop()


def test_model_is_as_before_after_it_was_float32() -> None:
    model = load(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_float32(model):
        assert model.dtype == torch.float32
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_lengths_pass_each_limit_that_can_be_afforded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_as(ForgetsItsBeginning)
    assert choose_lengths(model, 256) == [11, 1, 5, 40, 96]
    assert choose_lengths(model, 70) == [11, 1, 5, 40, 66]
    assert choose_lengths(model, 60) == [11, 1, 5, 40]
    num_parameters = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr("engine.model_check.MAX_WORK", 20 * num_parameters)
    with caplog.at_level("INFO", "engine"):
        assert choose_lengths(model, 256) == [11, 1, 5]
    assert "only in texts of less than 64 tokens" in caplog.text


def test_difference_is_a_part_of_the_spread() -> None:
    wanted = torch.tensor([0.0, 2.0, 4.0, 6.0, -torch.inf])
    assert difference(wanted + 5, wanted) == 0.0  # which changes no probability
    got = wanted + torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    assert difference(got, wanted) == pytest.approx(1 / 5**0.5)
    assert difference(wanted * torch.nan, wanted) == torch.inf
