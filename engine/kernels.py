"""Matrix products with weights: which kernels there are, and which of them this processor gets.

A kernel is not believed to work because of what the processor is called: it is tried.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.processor import has_onednn, instruction_set

logger = logging.getLogger("engine")


class PackedLinear(nn.Module):
    """x @ weight.T + bias with the weight packed once for oneDNN: (…, in) to (…, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        post_op: tuple[str, list[float], str] = (
            ("gelu", [], "tanh") if self.gelu else ("none", [], "")
        )
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *post_op)


class OutputLinear(PackedLinear):
    """The logits of a bfloat16 model in float32: (…, in) bfloat16 to (…, vocab) float32.

    Logits far from zero have few bits left for their differences (GPT-2's lie around -100,
    where bfloat16 has steps of 0.5). What all tokens have in common is taken out of the
    weight before it is packed, and added again in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        common = weight.float().mean(dim=0)
        super().__init__((weight.float() - common).to(weight.dtype), bias)
        self.common = common

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().add_((x.float() * self.common).sum(-1, keepdim=True))


class Int8Linear(nn.Module):
    """The same with int8 weights, one scale a row, and inputs quantised as they come.

    An input's scale is that of the whole batch, so results depend on the company.

    backend: of torch.backends.quantized.supported_engines. seven_bits: of inputs, instead of
        eight: what adds pairs of products in 16 bits would saturate (`vpmaddubsw`, before VNNI).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, backend: str, seven_bits: bool):
        super().__init__()
        self.seven_bits = seven_bits
        torch.backends.quantized.engine = backend  # which `linear_prepack` packs for
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-9)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated, without a successor that packs weights
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(
            quantized, bias.float() if bias is not None else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.seven_bits)


Pack = Callable[[Tensor, Tensor | None, bool], nn.Module]  # weight (out, in), bias, fuses GELU


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a model's products are computed."""

    name: str  # for logs and metrics
    pack: Pack | None = None  # None: layers stay as they are
    fuses_gelu: bool = False


PLAIN = Kernel("plain")
ONEDNN = Kernel("onednn", PackedLinear, fuses_gelu=True)


def int8_kernels() -> list[Kernel]:
    """The int8 kernels that may be tried here, the fastest first, as measured.

    Torch's onednn uses AVX without asking: on a processor that has none, it ends the process.
    """
    backends = ["fbgemm", "onednn", "qnnpack"]
    if instruction_set() == "amx":
        backends = ["onednn", "fbgemm", "qnnpack"]
    elif instruction_set() == "sse41":
        backends.remove("onednn")

    def kernel(backend: str, seven_bits: bool) -> Kernel:
        def pack(weight: Tensor, bias: Tensor | None, gelu: bool) -> nn.Module:
            return Int8Linear(weight, bias, backend, seven_bits)

        return Kernel(f"int8 {backend}, 7-bit inputs" if seven_bits else f"int8 {backend}", pack)

    return [
        kernel(backend, seven_bits)
        for backend in backends
        if backend in torch.backends.quantized.supported_engines
        for seven_bits in ((False,) if backend == "qnnpack" else (False, True))
    ]


@cache
def choose_kernel(dtype: torch.dtype, device_type: str, quantization: str | None) -> Kernel:
    """The fastest kernel that computes right here; a line in the log says what had to be left out.

    Raises ValueError for int8 on a GPU, and for bfloat16 on a CPU without a kernel for it: what
    torch does there instead takes up to four times as long as float32 (docs/performance.md).
    """
    if device_type != "cpu":
        if quantization:
            raise ValueError("int8 needs a CPU")
        return PLAIN
    if quantization:
        for kernel in int8_kernels():
            if not (problem := what_is_wrong_with(kernel, torch.float32)):
                return kernel
            logger.debug("%s is not used: %s", kernel.name, problem)
        logger.warning("int8 is left out: torch has no int8 kernel that is right here")
    problem = what_is_wrong_with(ONEDNN, dtype)
    if not problem:
        return ONEDNN
    if dtype == torch.bfloat16:
        raise ValueError(
            "bfloat16 needs a processor with AVX-512 (avx512bw, avx512vl, avx512dq) or "
            f"AVX-NE-CONVERT, and oneDNN; this one has {instruction_set()} at most: {problem}"
        )
    logger.warning("weights are not packed, which makes steps slower: %s", problem)
    return PLAIN


def what_is_wrong_with(kernel: Kernel, dtype: torch.dtype) -> str:
    """Why a kernel cannot be used, in a few words; "" if it computes what it should.

    The layer is one that saturates where pairs of 8-bit products are added in 16 bits.
    """
    if kernel is ONEDNN and not has_onednn():
        return "torch has no oneDNN, or it is switched off"
    assert kernel.pack
    weight = torch.ones(64, 64, dtype=dtype)
    weight[1::2] = -1
    x = torch.ones(2, 64, dtype=dtype)
    x[:, 0] = 0
    try:
        got = kernel.pack(weight, torch.ones(64, dtype=dtype), False)(x)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"torch refuses ({str(error).splitlines()[0]})"
    wanted = F.linear(x.float(), weight.float(), torch.ones(64))
    is_right = torch.allclose(got.float(), wanted, rtol=0.02)
    return "" if is_right else "its results are wrong on this processor"
