"""Activations whose bits do not depend on where in a tensor a row lies."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import (
    ClippedGELUActivation,
    GELUActivation,
    GELUTanh,
    MishActivation,
    QuickGELUActivation,
    SiLUActivation,
    SqrtSoftplusActivation,
)

BLOCK = 64  # numbers: a multiple of what torch computes at a time, on every processor


class RowwiseActivation(nn.Module):
    """What an activation gives, a row's bits the same wherever it lies: (…) to (…), any dtype.

    torch computes some numbers at a time, and those that are left at the end of a tensor, or of a
    thread's part of it, in another way, which may differ in the last bit. Where a part would not
    end with a whole block, zeros are put behind the numbers until every part does.
    """

    UNDIVIDED = 32_768  # so many numbers at most are one thread's (at::internal::GRAIN_SIZE)

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def num_parts(self, num_numbers: int) -> int:
        """Into how many parts of one size torch divides so many numbers among its threads."""
        return min(torch.get_num_threads(), math.ceil(num_numbers / self.UNDIVIDED))

    def forward(self, x: Tensor) -> Tensor:
        num_numbers = x.numel()
        missing = -num_numbers % (BLOCK * self.num_parts(num_numbers))
        if not missing:
            activated: Tensor = self.activation(x.contiguous())
            return activated
        padded = self.activation(F.pad(x.reshape(-1), (0, missing)))
        return padded[:num_numbers].view(x.shape)


class RowwiseGelu(RowwiseActivation):
    """The same for GELU, which torch divides by a rule of its own."""

    UNDIVIDED = 16_384  # GELU_MIN_ELEMENTS_FOR_MULTI_THREADING

    def num_parts(self, num_numbers: int) -> int:
        return 1 if num_numbers <= self.UNDIVIDED else torch.get_num_threads()


# What other activations are made of, such as tanh, exp, erf and products, torch computes in one way
# throughout.
ROWWISE: dict[type[nn.Module], type[RowwiseActivation]] = {
    nn.GELU: RowwiseGelu,
    GELUActivation: RowwiseGelu,
    GELUTanh: RowwiseGelu,
    ClippedGELUActivation: RowwiseGelu,
    nn.SiLU: RowwiseActivation,
    SiLUActivation: RowwiseActivation,
    QuickGELUActivation: RowwiseActivation,
    MishActivation: RowwiseActivation,
    SqrtSoftplusActivation: RowwiseActivation,
    nn.Sigmoid: RowwiseActivation,
}


def make_activations_rowwise(model: PreTrainedModel) -> None:
    """Replaces a model's activations in place; may be called again."""
    for module in list(model.modules()):
        if isinstance(module, RowwiseActivation):
            continue
        for name, child in list(module.named_children()):
            if rowwise := ROWWISE.get(type(child)):
                setattr(module, name, rowwise(child))
