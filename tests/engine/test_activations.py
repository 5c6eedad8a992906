"""A row's bits depend on that row alone, whichever rows and threads there are beside it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MptConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.activations import ROWWISE, RowwiseActivation
from engine.kernels import choose_kernel
from engine.model_runner import ModelRunner

NUM_ROWS = (1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 65, 97, 150)
LEARNED = {"prelu", "xielu"}  # these have parameters, and a dtype with them


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@torch.inference_mode()
def assert_rowwise(compute: Callable[[Tensor], Tensor], x: Tensor, num_threads: int) -> None:
    torch.set_num_threads(1)
    alone = torch.cat([compute(row[None]) for row in x])
    torch.set_num_threads(num_threads)
    for num_rows in NUM_ROWS:
        assert torch.equal(compute(x[-num_rows:]), alone[-num_rows:]), num_rows


def as_served(name: str) -> nn.Module:
    activation = ACT2FN[name]
    return ROWWISE[type(activation)](activation) if type(activation) in ROWWISE else activation


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [1024, 1000, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_activation_gives_a_row_the_same_bits_in_any_company(
    dtype: torch.dtype, width: int, num_threads: int
) -> None:
    """torch's own computes the last numbers of a thread's part in another way."""
    x = torch.randn(150, width, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    for name in ACT2FN.keys() - LEARNED:
        assert_rowwise(as_served(name), x, num_threads)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "mish"])
def test_rowwise_activation_gives_what_the_activation_gives(name: str) -> None:
    """Also of what is a part of each row of a larger tensor, as in Phi-3."""
    x = torch.randn(2, 5, 66)
    got, wanted = as_served(name)(x[..., :33]), ACT2FN[name](x[..., :33])
    assert got.shape == wanted.shape
    assert torch.allclose(got, wanted, atol=1e-6)


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


BETWEEN_PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "norm": rms_norm,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "rotary positions": lambda x: torch.cat((x.cos(), x.sin()), dim=-1),
    "softcap": lambda x: torch.tanh(x / 30) * 30,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "erf": torch.erf,
    "cube": lambda x: torch.pow(x, 3.0),
    "root": lambda x: x.abs().sqrt(),
}


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", BETWEEN_PRODUCTS)
def test_what_models_compute_between_products_is_rowwise(name: str, num_threads: int) -> None:
    """torch's own, of which models are believed to be made."""
    for width in (1024, 1000, 33):
        x = torch.randn(150, width, generator=torch.Generator().manual_seed(0)) * 3
        assert_rowwise(BETWEEN_PRODUCTS[name], x, num_threads)


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(intermediate_size=100, **SIZES),
    "gpt_neox": GPTNeoXConfig(intermediate_size=100, **SIZES),
    "mpt": MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=64),
    "gpt2 with another activation": GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, activation_function="gelu"
    ),
}


def activations_of(model: PreTrainedModel) -> list[nn.Module]:
    """Those that its layers call."""
    kinds = (RowwiseActivation, *ROWWISE)
    callers = [each for each in model.modules() if not isinstance(each, RowwiseActivation)]
    return [each for caller in callers for each in caller.children() if isinstance(each, kinds)]


@pytest.mark.parametrize("kernel", [None, "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_a_served_model_are_rowwise(name: str, kernel: str | None) -> None:
    """Other requests could change the text of a seed: with three threads, or rows of an odd width,
    and for some numbers of rows only, so that the measurement at start did not see it."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    chosen = choose_kernel(torch.float32, "cpu", kernel)
    ModelRunner(model, max_num_seqs=2, max_model_len=64, kernel=chosen)
    found = activations_of(model)
    assert found
    for activation in found:
        x = torch.randn(150, 100, generator=torch.Generator().manual_seed(0)) * 3
        assert_rowwise(activation, x, 3)
