"""Which kernels compute right here, and what takes the place of one that does not.

Whatever the processor has is tested; one line says what it lacks.
"""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from engine import choose_kernel, instruction_set, native_dtype
from engine.kernels import (
    HAVE_VNNI,
    INT8_IS_FASTEST,
    INT8_ONEDNN,
    ONEDNN,
    PLAIN,
    Int8Embedding,
    Kernel,
    OutputEmbedding,
    int8_kernels,
    rounds_alike,
    what_is_wrong_with,
)
from engine.processor import has_onednn
from engine.weights import move_to_huge_pages, pack_layers

INT8 = {kernel.name: kernel for kernel in int8_kernels()}


@pytest.fixture(autouse=True)
def _choose_anew() -> Iterator[None]:
    """What one test makes of the processor is forgotten before the next."""
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.fixture
def without_onednn() -> Iterator[None]:
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(was_enabled)


def missing(*_: object) -> None:
    raise AttributeError("no such operation")


def refusing(*_: object) -> None:
    raise RuntimeError("this processor is too old\nand a stack of C++")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def skip_unless_right(kernel: Kernel, dtype: torch.dtype) -> None:
    if problem := what_is_wrong_with(kernel, dtype):
        pytest.skip(f"{kernel.name} in {dtype}, on {instruction_set()}: {problem}")


# --- What kernels compute -----------------------------------------------------------------------


def worst_error(kernel: Kernel, dtype: torch.dtype, num_rows: int) -> float:
    """Of a random layer, as a part of the largest result."""
    assert kernel.pack
    torch.manual_seed(num_rows)
    weight, bias = torch.randn(96, 200).to(dtype), torch.randn(96).to(dtype)
    x = torch.randn(num_rows, 200).to(dtype)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    got = kernel.pack(weight, bias, False)(x)
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_onednn_computes_a_random_layer(dtype: torch.dtype, most: float, num_rows: int) -> None:
    skip_unless_right(ONEDNN, dtype)
    assert worst_error(ONEDNN, dtype, num_rows) < most


@pytest.fixture
def restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


NUM_ROWS = (1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 65, 97, 150)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", INT8)
def test_int8_row_has_the_same_bits_in_any_company(
    name: str, num_threads: int, restored_threads: None
) -> None:
    """One scale for the whole batch gave a row other bits beside a row of larger values; of rows
    of 30 numbers, onednn failed."""
    skip_unless_right(INT8[name], torch.float32)
    torch.manual_seed(0)
    for num_inputs, num_outputs in ((96, 288), (100, 50), (256, 1030), (40, 700), (30, 90)):
        layer = INT8[name].pack(
            torch.randn(num_outputs, num_inputs), torch.randn(num_outputs), False
        )
        x = torch.randn(150, num_inputs) * torch.linspace(0.01, 100, 150)[:, None]
        torch.set_num_threads(1)
        alone = torch.cat([layer(row[None]) for row in x])
        torch.set_num_threads(num_threads)
        for num_rows in NUM_ROWS:
            assert torch.equal(layer(x[-num_rows:]), alone[-num_rows:]), (num_inputs, num_rows)


def test_int8_row_of_zeros() -> None:
    """Its scale would be 0."""
    for kernel in INT8.values():
        if not what_is_wrong_with(kernel, torch.float32):
            layer = kernel.pack(torch.randn(8, 64), torch.ones(8), False)
            assert torch.equal(layer(torch.zeros(2, 64)), torch.ones(2, 8))


def test_int8_embedding_gives_what_the_embedding_gives() -> None:
    embedding, token_ids = torch.nn.Embedding(50, 64), torch.tensor([[3, 49, 3]])
    got = Int8Embedding(embedding.weight.detach())(token_ids)
    assert torch.allclose(got, embedding(token_ids), atol=0.02)


def tied_model(vocab_size: int, dim: int) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=vocab_size, n_embd=dim, n_layer=1, n_head=1, n_positions=8)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("vocab_size", "dim"), [(50, 100), (700, 32), (130, 264), (65, 30)])
@pytest.mark.parametrize("name", INT8)
def test_int8_embedding_of_a_tied_model(name: str, vocab_size: int, dim: int) -> None:
    """Read from the output layer or kept beside it, it is the one that the model had."""
    skip_unless_right(INT8[name], torch.float32)
    model, token_ids = tied_model(vocab_size, dim), torch.arange(vocab_size)[None]
    before = model.transformer.wte(token_ids)
    pack_layers(model, INT8[name])
    after = model.transformer.wte(token_ids)
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    assert torch.allclose(after, before, atol=0.001)


def test_int8_embedding_and_output_layer_are_one_where_their_order_is_known() -> None:
    """oneDNN has this order for all processors with AVX-512."""
    if instruction_set() not in ("avx512", *HAVE_VNNI):
        pytest.skip(f"weights are packed otherwise on {instruction_set()}")
    skip_unless_right(INT8_ONEDNN, torch.float32)
    model = tied_model(700, 32)
    pack_layers(model, INT8_ONEDNN)
    assert model.transformer.wte.packed is model.lm_head.weight


@pytest.mark.parametrize("operation", [missing, refusing, lambda _: 4])
def test_int8_embedding_is_kept_beside_an_output_layer_in_an_order_that_is_not_known(
    operation: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_right(INT8_ONEDNN, torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_nbytes", operation, raising=False)
    model = tied_model(700, 32)
    pack_layers(model, INT8_ONEDNN)
    assert type(model.transformer.wte) is Int8Embedding


def test_int8_embedding_whose_numbers_are_others_is_not_the_output_layer() -> None:
    """The order is not believed: each number is compared."""
    skip_unless_right(INT8_ONEDNN, torch.float32)
    weight = torch.randn(700, 32)
    output = INT8_ONEDNN.pack(weight, None, False)
    weight[699, 31] += 1
    with pytest.raises(ValueError, match="order"):
        OutputEmbedding(output, weight)


@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize("name", INT8)
def test_int8_computes_a_random_layer(name: str, num_rows: int) -> None:
    skip_unless_right(INT8[name], torch.float32)
    assert worst_error(INT8[name], torch.float32, num_rows) < 0.03


def test_onednn_fuses_gelu() -> None:
    skip_unless_right(ONEDNN, torch.float32)
    weight, x = torch.randn(64, 64), torch.randn(5, 64)
    got = ONEDNN.pack(weight, None, True)(x)
    assert torch.allclose(got, F.gelu(x @ weight.T, approximate="tanh"), atol=1e-4)


def test_int8_does_not_saturate() -> None:
    """Without VNNI pairs of products were added in 16 bits: 32.4 came out for 63. Processors with
    VNNI are made to do the same in test_processors.py."""
    weight, x = torch.ones(8, 64), torch.ones(3, 64)
    x[:, 0] = 0
    kernel = choose_kernel(torch.float32, "cpu", "int8")
    if kernel.pack is None:
        pytest.skip("no int8 kernel is right on this processor, and none is chosen")
    assert torch.allclose(kernel.pack(weight, None, False)(x), x @ weight.T, rtol=0.01)


def test_what_is_wrong_with_a_kernel_that_saturates() -> None:
    class Saturating(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 64), 33.0)

    kernel = Kernel("saturating", lambda *_: Saturating())
    assert what_is_wrong_with(kernel, torch.float32) == "its results are wrong on this processor"


def test_what_is_wrong_with_int8_where_a_numbers_place_changes_its_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `addcmul` would, if torch rounded the last numbers of a tensor twice and others once."""
    assert rounds_alike()
    monkeypatch.setattr(
        torch, "addcmul", lambda a, b, c: a + b * c if len(a) == 1 else (a + b.double() * c).float()
    )
    assert "as it lies in memory" in what_is_wrong_with(INT8_ONEDNN, torch.float32)


# --- What is chosen in whose place --------------------------------------------------------------


@pytest.mark.parametrize("operation", [missing, refusing])
def test_choose_kernel_float32_stays_unpacked_where_packing_fails(
    operation: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", operation, raising=False)
    assert choose_kernel(torch.float32, "cpu", None) is PLAIN
    (line,) = warnings_of(caplog)
    assert line.startswith("weights are not packed, which makes steps slower: torch")
    assert "C++" not in line


def test_choose_kernel_float32_stays_unpacked_without_onednn(
    without_onednn: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_onednn()
    assert choose_kernel(torch.float32, "cpu", None) is PLAIN
    (line,) = warnings_of(caplog)
    assert line.endswith("torch has no oneDNN, or it is switched off")


@pytest.mark.parametrize("operation", [missing, refusing])
@pytest.mark.parametrize("quantization", ["int8", "auto"])
def test_choose_kernel_int8_falls_back_to_float32(
    operation: object,
    quantization: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if instruction_set() not in INT8_IS_FASTEST:
        pytest.skip(f"int8 is not chosen on {instruction_set()}")
    expected = choose_kernel(torch.float32, "cpu", None)
    caplog.clear()
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack", operation, raising=False)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", operation, raising=False)
    assert choose_kernel(torch.float32, "cpu", quantization) is expected
    assert "int8 is left out" in warnings_of(caplog)[0]


@pytest.mark.parametrize("operation", [missing, refusing])
def test_choose_kernel_bfloat16_says_what_is_lacking(
    operation: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", operation, raising=False)
    with pytest.raises(ValueError, match=r"^bfloat16 needs a processor with AVX-512") as refused:
        choose_kernel(torch.bfloat16, "cpu", None)
    assert f"this one has {instruction_set()}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_choose_kernel_int8_needs_a_cpu() -> None:
    with pytest.raises(ValueError, match="needs a CPU"):
        choose_kernel(torch.float32, "cuda", "int8")
    assert choose_kernel(torch.float32, "cuda", None) is PLAIN
    assert choose_kernel(torch.float32, "cuda", "auto") is PLAIN


def test_choose_kernel_auto_leaves_float_where_int8_has_not_been_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = choose_kernel(torch.float32, "cpu", None)
    monkeypatch.setattr("engine.kernels.instruction_set", lambda: "aarch64 default")
    assert choose_kernel(torch.float32, "cpu", "auto") is expected


def test_int8_kernels_of_torchs_onednn_are_not_tried_without_avx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They ended the process with an illegal instruction (QEMU's Nehalem)."""
    monkeypatch.setattr("engine.kernels.instruction_set", lambda: "sse41")
    assert not [kernel.name for kernel in int8_kernels() if "onednn" in kernel.name]


# --- The processor ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["SSE41", "AVX2", "AVX512_CORE", "avx512_core_vnni"])
def test_native_dtype_is_float32_where_bfloat16_is_not_native(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if " " in instruction_set():
        pytest.skip(f"limits of oneDNN's instruction set count on x86, this is {instruction_set()}")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert instruction_set() in ("sse41", "avx2", "avx512", "avx512_vnni")
    assert native_dtype() == torch.float32


def test_native_dtype_is_float32_without_onednn(without_onednn: None) -> None:
    assert native_dtype() == torch.float32


@pytest.mark.parametrize("name", ["data_ptr", "_nbytes"])
@pytest.mark.parametrize("operation", [missing, refusing])
def test_huge_pages_are_left_out_where_an_operation_is_missing(
    name: str, operation: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_right(ONEDNN, torch.float32)
    layer, x = ONEDNN.pack(torch.randn(2048, 2048), None, False), torch.randn(2, 2048)
    before = layer(x)
    monkeypatch.setattr(torch.ops.mkldnn, name, operation, raising=False)
    assert move_to_huge_pages([layer.weight]) is False
    assert torch.equal(layer(x), before)


def test_huge_pages_of_nothing() -> None:
    assert move_to_huge_pages([]) is False
