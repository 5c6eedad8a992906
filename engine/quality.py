"""Whether int8 keeps a model's quality: measured on the loaded model, with a short text."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.batch import ForwardBatch
from engine.kernels import Kernel
from engine.model_check import num_parameters, own_logits
from engine.model_runner import ModelRunner
from engine.weights import cast_parameters, pack_layers, put_back, return_freed_memory

logger = logging.getLogger("engine")

MOST_LOSS = 0.01  # of bits per byte, as a part of them: less is not felt
# Tokens times parameters that go through the model each time, if MIN_TOKENS do not take more: at
# 5e8 parameters, 200 tokens.
MAX_WORK = 1e11
MIN_TOKENS = 64
TEXT = """\
The river rises among low hills, where rain falls for two hundred days a year, and runs north for
ninety miles before it meets the sea. In 1838 a surveyor named Thomas Hale measured it from
source to mouth. "It took me eleven weeks," he wrote to his sister, "and I lost one boot, two
notebooks and most of my patience." His map was used for sixty years. Each town along the banks
had a mill, a bridge and an opinion about the next town; the mills have gone, and of the bridges
only three are older than the railway. If you walk there today, start early, take the eastern
path, and do not trust the signs. Fish are said to be coming back: salmon in spring, eels in
autumn, and, once, a seal that stayed until the children had given it a name."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts a text."""

    bits_per_byte: float
    greedy_token_ids: Tensor  # (num_tokens,): the likeliest at each position

    def agreement(self, other: "Quality") -> float:
        """The part of positions at which both have the same likeliest token."""
        return (self.greedy_token_ids == other.greedy_token_ids).float().mean().item()


class QualityTrial:
    """A text, and how well a model predicts it before its weights are quantized.

    model: as it was loaded; nothing of it may have been changed yet.
    max_model_len: tokens that a text may have.
    Raises ValueError for a model that fails by itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
        text: str = TEXT,
    ):
        self.model, self.tokenizer = model, tokenizer
        most_tokens = max(MIN_TOKENS, int(MAX_WORK / num_parameters(model)))
        self.token_ids: list[int] = tokenizer(text)["input_ids"][: min(most_tokens, max_model_len)]
        with torch.no_grad():  # as in `ModelCheck`
            self.before = self._quality(own_logits(model, self.token_ids, len(self.token_ids)))

    @torch.inference_mode()
    def measure(self, runner: ModelRunner) -> Quality:
        """The same of a runner."""
        runner.cache.resize(len(self.token_ids), 0)
        batch = ForwardBatch(logit_rows=list(range(len(self.token_ids))))
        batch.add_prompt(self.token_ids, runner.cache.padding_row)
        return self._quality(runner.run(batch))

    def _quality(self, logits: Tensor) -> Quality:
        """Of logits (num_tokens, vocab) float32."""
        next_token_ids = torch.tensor(self.token_ids[1:], device=logits.device)
        loss = F.cross_entropy(logits[:-1], next_token_ids, reduction="sum").item()
        num_bytes = len(self.tokenizer.decode(self.token_ids[1:]).encode())
        return Quality(loss / math.log(2) / num_bytes, logits[:-1].argmax(dim=-1))

    def choose_runner(
        self,
        new_runner: Callable[..., ModelRunner],
        int8: Kernel,
        otherwise: Kernel,
        dtype: torch.dtype,
    ) -> ModelRunner:
        """A runner of the int8 kernel, or if that loses more than MOST_LOSS, of the other one.

        new_runner: makes one for a `kernel`. dtype: of the other one.
        """
        replaced = pack_layers(self.model, int8)
        runner = new_runner(kernel=int8)
        after = self.measure(runner)
        is_kept = after.bits_per_byte <= self.before.bits_per_byte * (1 + MOST_LOSS)  # not for NaN
        logger.log(
            logging.INFO if is_kept else logging.WARNING,
            "%s: %.4f bits per byte, %.4f before, %.1f%% of the likeliest tokens the same: %s",
            int8.name,
            after.bits_per_byte,
            self.before.bits_per_byte,
            100 * after.agreement(self.before),
            "it is used" if is_kept else "it is not used",
        )
        if not is_kept:
            put_back(replaced)
            cast_parameters(self.model, dtype)
            return new_runner(kernel=otherwise)
        del replaced  # the model's own weights
        return_freed_memory()
        return runner
