"""Matrix products with weights: which kernels there are, and which of them this processor gets.

A kernel is not believed to work because of what the processor is called: it is tried.
"""

import ctypes
import logging
import math
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
    """The same with int8 weights: (…, in) to (…, out), both float32.

    Each output of the weight has a scale, and each row of the input has one of its own. Products
    are summed as 32-bit integers, which is exact in any order; what comes before and after rounds
    each number by itself. So a row's bits depend on that row alone, for any number of rows and
    threads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = None if bias is None else bias.float()
        weight = weight.float()
        self.scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-9)
        self.pack((weight / self.scales[:, None]).round_().to(torch.int8))

    def pack(self, quantized: Tensor) -> None:
        """Keeps quantized (out, in) int8 in the order that the kernel reads."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """x (rows, in) float32, multiplied, and the bias added: (rows, out) float32 that nothing
        else refers to."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.multiply(x)
        return self.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _scaled(self, product: Tensor, scale: Tensor) -> Tensor:
        """A product in place: (rows, out) times (rows, 1), plus the bias."""
        if self.bias is None:
            return product.mul_(scale)
        return torch.addcmul(self.bias, product, scale, out=product)


def _row_scale(x: Tensor, most: int) -> Tensor:
    """(rows, 1): what turns a row's largest value into `most`."""
    return x.abs().amax(dim=-1, keepdim=True).div_(most).clamp_(min=1e-12)


class OnednnInt8Linear(Int8Linear):
    """With inputs of eight bits, from a row's smallest value (0) to its largest (255).

    Of a layer that is wide, as the one of logits is, from 1 to 255 with 128 for zero: half as
    precise, but then its outputs need no more than to be scaled, and they are most of the work.
    So it is where the number of inputs is no multiple of four, behind which no float may lie.
    Right with VNNI or AMX. Without, pairs of products may be summed in 16 bits and saturate.
    """

    WIDE = 8  # so many outputs for an input

    def pack(self, quantized: Tensor) -> None:
        self.zero_points = torch.zeros(len(quantized), dtype=torch.int32)
        num_outputs, num_inputs = quantized.shape
        self.is_symmetric = num_outputs > self.WIDE * num_inputs or num_inputs % 4 > 0
        if self.is_symmetric:
            self.weight = torch.ops.onednn.qlinear_prepack(quantized, None)
            return
        # `byte_prepack` leaves a row's scale and smallest value in eight bytes behind it, which are
        # multiplied too: with zeros. That is cheaper than to copy the row without them.
        padded = F.pad(quantized, (0, 8))
        self.weight = torch.ops.onednn.qlinear_prepack(padded, None)
        self.sums = quantized.sum(dim=1, dtype=torch.int32) * self.scales

    def multiply(self, x: Tensor) -> Tensor:
        if self.is_symmetric:
            scale = _row_scale(x, 127)
            quantized = (x / scale).round_().add_(128).to(torch.uint8)
            return self._scaled(self._sum(quantized, 128), scale)
        quantized = torch.ops.quantized.embedding_bag_byte_prepack(x.contiguous())
        ends = quantized.view(torch.float32)
        _, scale, smallest = ends.split_with_sizes((ends.shape[1] - 2, 1, 1), dim=1)
        if self.bias is None:
            return (smallest * self.sums).addcmul_(self._sum(quantized, 0), scale)
        product = self._sum(quantized, 0)
        return torch.addcmul(self.bias, smallest, self.sums).addcmul_(product, scale)

    def _sum(self, quantized: Tensor, zero_point: int) -> Tensor:
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, zero_point, self.weight, self.scales, self.zero_points, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return output


class FbgemmInt8Linear(Int8Linear):
    """With inputs of seven bits, from -63 to 63: what adds pairs of products in 16 bits
    (`vpmaddubsw`, before VNNI) would saturate with eight."""

    def pack(self, quantized: Tensor) -> None:
        torch.backends.quantized.engine = "fbgemm"  # which `linear_prepack` packs for
        zeros = torch.zeros(len(quantized), dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated, without a successor that packs weights
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch._make_per_channel_quantized_tensor(
                quantized, self.scales.double(), zeros, 0
            )
        self.packed = torch.ops.quantized.linear_prepack(tensor, None)

    def multiply(self, x: Tensor) -> Tensor:
        scale = _row_scale(x, 63)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return self._scaled(multiply(x / scale, 1.0, 64, self.packed), scale)


class Int8Embedding(nn.Module):
    """An embedding of eight bits with a scale for each token: (…) int64 to (…, dim) float32.

    weight: empty; some models ask it for its dtype or device.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.empty(0, weight.shape[1])
        self.packed = torch.ops.quantized.embedding_bag_byte_prepack(weight.float())

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = torch.ops.quantized.embedding_bag_byte_unpack(self.packed[token_ids.reshape(-1)])
        unpacked: Tensor = rows.view(*token_ids.shape, -1)
        return unpacked


class OutputEmbedding(nn.Module):
    """The embedding that is also the output layer's weight, read out of it: (…) int64 to (…, dim)
    float32.

    weight: empty; some models ask it for its dtype or device.
    Raises ValueError where it cannot be read: oneDNN may choose another order than the known one,
    of words of four numbers of eight bits (`BA16a64b4a`).
    """

    WIDTH = 64  # outputs that lie together
    DEPTH = 16  # words of each of them, a multiple of which there is

    def __init__(self, output: nn.Module, weight: Tensor):
        super().__init__()
        num_tokens, dim = weight.shape
        num_blocks = math.ceil(num_tokens / self.WIDTH)
        if not isinstance(output, OnednnInt8Linear) or dim % 4:
            raise ValueError("the output layer is not one of oneDNN in int8")
        self.weight = torch.empty(0, dim)
        self.packed, self.scales = output.weight, output.scales
        words = _words(self.packed)
        depth = len(words) // (num_blocks * self.WIDTH) // self.DEPTH * self.DEPTH
        if depth < dim // 4:
            raise ValueError("the output layer has no room for the numbers in the known order")
        words = words[: num_blocks * depth * self.WIDTH]  # what is behind them are sums
        self.words = words.view(num_blocks, depth, self.WIDTH)[:, : dim // 4]
        for token_ids in torch.arange(num_tokens).split(4096):
            difference = self(token_ids) - weight[token_ids]
            if (difference.abs().amax(dim=1) > self.scales[token_ids] * 0.51).any():
                raise ValueError("the output layer's numbers lie in an order that is not known")

    def forward(self, token_ids: Tensor) -> Tensor:
        flat = token_ids.reshape(-1)
        block = torch.div(flat, self.WIDTH, rounding_mode="floor")
        words = self.words[block, :, flat % self.WIDTH].contiguous()
        rows = words.view(torch.int8) * self.scales[flat, None]
        return rows.view(*token_ids.shape, -1)


def _words(packed: Tensor) -> Tensor:
    """(num_words,) int32: the memory of a packed weight, which must be kept as long as these."""
    num_words = torch.ops.mkldnn._nbytes(packed) // 4
    memory = (ctypes.c_int32 * num_words).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.int32)


Pack = Callable[[Tensor, Tensor | None, bool], nn.Module]  # weight (out, in), bias, fuses GELU


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a model's products are computed."""

    name: str  # for logs and metrics
    pack: Pack | None = None  # None: layers stay as they are
    fuses_gelu: bool = False
    # Whether a row's bits depend on that row alone by construction, which needs no measuring.
    is_exact: bool = False


PLAIN = Kernel("plain")
ONEDNN = Kernel("onednn", PackedLinear, fuses_gelu=True)


def _packs(layer: type[Int8Linear]) -> Pack:
    return lambda weight, bias, gelu: layer(weight, bias)


INT8_ONEDNN = Kernel("int8 onednn", _packs(OnednnInt8Linear), is_exact=True)
INT8_FBGEMM = Kernel("int8 fbgemm", _packs(FbgemmInt8Linear), is_exact=True)
HAVE_VNNI = ("avx512_vnni", "avx512_bf16", "amx")
INT8_IS_FASTEST = ("avx2", "avx512", *HAVE_VNNI)  # as measured: docs/performance.md


def int8_kernels() -> list[Kernel]:
    """The int8 kernels that may be tried here, the fastest first, as measured: by a rule, since a
    race at each start would not always have the same winner, and texts would change with it.

    Torch's onednn uses AVX without asking: on a processor that has none, it ends the process.
    """
    if instruction_set() == "sse41":
        return [INT8_FBGEMM]
    if instruction_set() in HAVE_VNNI:
        return [INT8_ONEDNN, INT8_FBGEMM]
    return [INT8_FBGEMM, INT8_ONEDNN]


@cache
def choose_kernel(dtype: torch.dtype, device_type: str, quantization: str | None) -> Kernel:
    """The fastest kernel that computes right here; a line in the log says what had to be left out.

    quantization: None, "int8", or "auto": int8 where it has been measured to be the fastest, which
        is with AVX2 and above. dtype: of what is not quantized.
    Raises ValueError for int8 on a GPU, and for bfloat16 on a CPU without a kernel for it: what
    torch does there instead takes up to four times as long as float32 (docs/performance.md).
    """
    if device_type != "cpu":
        if quantization == "int8":
            raise ValueError("int8 needs a CPU")
        return PLAIN
    if quantization == "int8" or (quantization == "auto" and instruction_set() in INT8_IS_FASTEST):
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


def rounds_alike() -> bool:
    """Whether `addcmul` gives a number the same bits wherever in a tensor it lies.

    Where it was compiled to multiply and add in one step, it rounds once, else twice. torch
    computes some numbers at a time and the last ones by themselves, which might differ in that.
    """
    numbers = torch.arange(1.0, 1 + 3 * 67).sqrt().view(3, 67)
    together = torch.addcmul(*numbers)
    alone = [torch.addcmul(*column) for column in numbers.split(1, dim=1)]
    return torch.equal(torch.cat(alone), together)


def what_is_wrong_with(kernel: Kernel, dtype: torch.dtype) -> str:
    """Why a kernel cannot be used, in a few words; "" if it computes what it should.

    The layer is one that saturates where pairs of 8-bit products are added in 16 bits.
    """
    if kernel in (ONEDNN, INT8_ONEDNN) and not has_onednn():
        return "torch has no oneDNN, or it is switched off"
    if kernel.is_exact and not rounds_alike():
        return "torch rounds a number in one way or another, as it lies in memory"
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
