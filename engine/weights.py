"""How weights are stored: packed once for the processor's matrix kernels."""

import contextlib
import ctypes
import gc
import mmap
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from engine.gpt2 import gpt2_forward

HUGE_PAGE_BYTES = 2 << 20
MAX_GAP_BYTES = 64 << 10  # weights that lie closer together count as one piece of memory
MADV_COLLAPSE = 25  # at once, not some time: Linux 6.1; `mmap` does not have it yet


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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
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
        return torch.ops.quantized.linear_dynamic(x, self.packed)


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32


def prepare_weights(model: PreTrainedModel, quantization: str | None) -> None:
    """Packs every linear layer of a CPU model in place and frees the unpacked weights.

    quantization: None or "int8". Activations of int8 layers are float32.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        if quantization:
            raise ValueError("QUANTIZATION=int8 needs a CPU that oneDNN supports")
        return
    if quantization:
        has_amx = torch.cpu._is_amx_tile_supported()
        torch.backends.quantized.engine = "onednn" if has_amx else "fbgemm"  # as measured

    output = model.get_output_embeddings()

    def pack(linear: Any, gelu: bool = False) -> nn.Module:
        weight = linear.weight.detach()
        if isinstance(linear, Conv1D):
            weight = weight.T.contiguous()
        bias = None if linear.bias is None else linear.bias.detach()
        if linear is output and weight.dtype == torch.bfloat16:
            return OutputLinear(weight, bias)
        return Int8Linear(weight, bias) if quantization else PackedLinear(weight, bias, gelu)

    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and module.act.__class__ in (
            ACT2FN["gelu_new"].__class__,
            ACT2FN["gelu_pytorch_tanh"].__class__,
        ):  # two spellings of one function, which oneDNN fuses into the product before it
            module.act = nn.GELU(approximate="tanh") if quantization else nn.Identity()
            module.c_fc = pack(module.c_fc, gelu=True)
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, pack(child))
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        model.forward = gpt2_forward(model)
    return_freed_memory()
    move_to_huge_pages(
        module.weight for module in model.modules() if isinstance(module, PackedLinear)
    )


def move_to_huge_pages(packed: Iterable[Tensor]) -> None:
    """Moves packed weights to pages of 2 MiB, where Linux gives some to those who ask.

    A step reads all weights once, so most of its time goes into reading memory; with larger
    pages a product of few rows takes a tenth less. Changes no address and no bit.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:  # not Linux, where the same numbers may mean something else
        return
    spans: list[tuple[int, int]] = []
    for weight in sorted(packed, key=torch.ops.mkldnn.data_ptr):
        start = torch.ops.mkldnn.data_ptr(weight)
        end = start + torch.ops.mkldnn._nbytes(weight)
        if spans and start - spans[-1][1] < MAX_GAP_BYTES:
            start = spans.pop()[0]
        spans.append((start, end))
    madvise = ctypes.CDLL(None).madvise
    for start, end in spans:
        first, last = -(-start // HUGE_PAGE_BYTES), end // HUGE_PAGE_BYTES
        if first < last:
            address = ctypes.c_void_p(first * HUGE_PAGE_BYTES)
            num_bytes = ctypes.c_size_t((last - first) * HUGE_PAGE_BYTES)
            madvise(address, num_bytes, advice)  # where it fails, all stays as it was
            madvise(address, num_bytes, MADV_COLLAPSE)


def return_freed_memory() -> None:
    """Gives what was freed back to the system, where the C library lets one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
