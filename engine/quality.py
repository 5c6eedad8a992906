"""Whether int8 keeps a model's quality: measured on the loaded model, with a short text."""

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.kernels import Kernel
from engine.weights import pack_layers, put_back

logger = logging.getLogger("engine")

MOST_LOSS = 0.01  # of bits per byte, as a part of them: less is not felt
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


@torch.inference_mode()
def measure_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = TEXT
) -> Quality:
    """Of a model that transformers runs: before its attention is replaced."""
    token_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    token_ids = token_ids[:, : model.config.get_text_config().max_position_embeddings]
    logits = model(token_ids, use_cache=False).logits[0, :-1].float()
    loss = F.cross_entropy(logits, token_ids[0, 1:], reduction="sum").item()
    num_bytes = len(tokenizer.decode(token_ids[0, 1:]).encode())
    return Quality(loss / math.log(2) / num_bytes, logits.argmax(dim=-1))


def keeps_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kernel: Kernel
) -> bool:
    """Whether a model computed by this kernel loses at most MOST_LOSS. Its layers then are packed;
    else they are what they were. A line in the log has the figures."""
    before = measure_quality(model, tokenizer)
    replaced = pack_layers(model, kernel)
    after = measure_quality(model, tokenizer)
    is_kept = after.bits_per_byte <= before.bits_per_byte * (1 + MOST_LOSS)  # False for NaN
    if not is_kept:
        put_back(replaced)
    logger.log(
        logging.INFO if is_kept else logging.WARNING,
        "%s: %.4f bits per byte, %.4f before, %.1f%% of the likeliest tokens the same: %s",
        kernel.name,
        after.bits_per_byte,
        before.bits_per_byte,
        100 * after.agreement(before),
        "it is used" if is_kept else "it is not used",
    )
    return is_kept
