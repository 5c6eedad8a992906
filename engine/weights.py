"""How a model's weights are stored: packed once for the processor's matrix kernels."""

import contextlib
import ctypes
import gc
import logging
import math
import mmap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from engine.activations import make_activations_rowwise
from engine.gpt2 import gpt2_forward
from engine.kernels import (
    Int8Embedding,
    Kernel,
    OnednnInt8Linear,
    OutputEmbedding,
    OutputLinear,
    PackedLinear,
)

logger = logging.getLogger("engine")

HUGE_PAGE_BYTES = 2 << 20
MAX_GAP_BYTES = 64 << 10  # weights that lie closer together count as one piece of memory
# Makes huge pages at once instead of some time (Linux 6.1); Python's `mmap` does not name it yet.
MADV_COLLAPSE = 25


def prepare_weights(model: PreTrainedModel, kernel: Kernel) -> bool:
    """Packs every linear layer of a CPU model in place and frees the unpacked weights; what lies
    between the layers gives a row the same bits in any company.

    True if they then lie in memory pages of 2 MiB.
    """
    if model.device.type != "cpu":
        return False
    pack_layers(model, kernel)
    make_activations_rowwise(model)
    if kernel.pack is not None:
        # What stays is a part of the file, which is mapped into memory as long as a part is used.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        model.forward = gpt2_forward(model)
    if kernel.pack:  # else nothing was freed
        return_freed_memory()
    layers = (PackedLinear, OnednnInt8Linear)
    return move_to_huge_pages([m.weight for m in model.modules() if isinstance(m, layers)])


Replaced = list[tuple[nn.Module, str, nn.Module]]  # where, under which name, what was there


def pack_layers(model: PreTrainedModel, kernel: Kernel) -> Replaced:
    """Puts the kernel's layers in place of the model's own; those may be put back.

    Linear layers, GPT-2's GELU between them, and with int8 the embedding of tokens, which else
    would be most of what is left; not one of a class of its own, which may do more than look up.
    Where that is the output layer's weight too, it is read from there if it can be.
    """
    replaced: Replaced = []
    if kernel.pack is None:
        return replaced
    pack_weight, output = kernel.pack, model.get_output_embeddings()

    def pack(linear: Any, gelu: bool = False) -> nn.Module:
        weight = linear.weight.detach()
        if isinstance(linear, Conv1D):
            weight = weight.T.contiguous()
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if linear is output and weight.dtype == torch.bfloat16:
            return OutputLinear(weight, bias)
        return pack_weight(weight, bias, gelu)

    def replace(module: nn.Module, name: str, new: nn.Module) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    embedding = model.get_input_embeddings()
    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and module.act.__class__ in (
            ACT2FN["gelu_new"].__class__,
            ACT2FN["gelu_pytorch_tanh"].__class__,
        ):  # these two are one function, which oneDNN fuses into the product before it
            gelu = nn.GELU(approximate="tanh")
            replace(module, "act", nn.Identity() if kernel.fuses_gelu else gelu)
            replace(module, "c_fc", pack(module.c_fc, gelu=kernel.fuses_gelu))
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                replace(module, name, pack(child))
    for module in list(model.modules()):  # once more, as the output layer may come last
        for name, child in list(module.named_children()):
            if child is embedding and kernel.is_exact and type(child) is nn.Embedding:
                is_tied = getattr(output, "weight", None) is child.weight
                packed_output = model.get_output_embeddings() if is_tied else None
                replace(module, name, _int8_embedding(child.weight.detach(), packed_output))
    return replaced


def _int8_embedding(weight: Tensor, packed_output: nn.Module | None) -> nn.Module:
    """packed_output: the output layer, if it has the same weight."""
    if packed_output is not None:
        try:
            return OutputEmbedding(packed_output, weight)
        except (AttributeError, RuntimeError, ValueError) as problem:
            logger.debug("the embedding is kept beside the output layer: %s", problem)
    return Int8Embedding(weight)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the parameters of a model another dtype; buffers, such as the frequencies of rotary
    positions, keep their precision."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def put_back(replaced: Replaced) -> None:
    """Undoes `pack_layers`."""
    for module, name, old in replaced:
        setattr(module, name, old)


def move_to_huge_pages(packed: Iterable[Tensor]) -> bool:
    """Moves packed weights to pages of 2 MiB, where Linux gives some to those who ask.

    True if some were moved. A step reads all weights once, so most of its time goes into reading
    memory; with larger pages a product of few rows takes a tenth less. Changes no address and no
    bit.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:  # this is not Linux, and the numbers may mean something else
        return False
    try:
        spans, madvise = memory_spans(packed), ctypes.CDLL(None).madvise
    except (AttributeError, OSError, RuntimeError):  # torch or the C library is another one
        return False
    num_moved = 0
    for start, end in spans:
        first, last = math.ceil(start / HUGE_PAGE_BYTES), end // HUGE_PAGE_BYTES
        if first < last:
            address = ctypes.c_void_p(first * HUGE_PAGE_BYTES)
            num_bytes = ctypes.c_size_t((last - first) * HUGE_PAGE_BYTES)
            madvise(address, num_bytes, advice)  # where this fails, all stays as it was
            num_moved += madvise(address, num_bytes, MADV_COLLAPSE) == 0
    return num_moved > 0


def memory_spans(packed: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(start, end) addresses of packed weights; those that nearly touch count as one."""
    spans: list[tuple[int, int]] = []
    for weight in sorted(packed, key=torch.ops.mkldnn.data_ptr):
        start = torch.ops.mkldnn.data_ptr(weight)
        end = start + torch.ops.mkldnn._nbytes(weight)
        if spans and start - spans[-1][1] < MAX_GAP_BYTES:
            start = spans.pop()[0]
        spans.append((start, end))
    return spans


def return_freed_memory() -> None:
    """Gives what was freed back to the system, where the C library lets one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
