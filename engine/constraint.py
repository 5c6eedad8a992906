"""What a text may be, in the tokens of one model: backends make constraints, masks.py asks them."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenMask:
    """What may come after a text.

    bias: (vocab,) float32, to be added to logits: 0, or minus infinity for the tokens that may not,
        those that end a text among them. (To add takes a tenth of the time of `masked_fill_`.)
    can_end: whether the text is one that was asked for, so that it may end there.
    """

    bias: Tensor
    can_end: bool


class TextMatcher(Protocol):
    """Follows one text. What it says depends on the tokens that it is given and on nothing else:
    a text may be taken back and go on otherwise. Used by one thread at a time.

    Both raise ConstraintFailed.
    """

    def mask(self, token_ids: SequenceOf[int]) -> TokenMask:
        """What may come after these tokens."""

    def is_complete(self, token_ids: SequenceOf[int]) -> bool:
        """Whether nothing may come after these tokens."""


class Constraint(Protocol):
    """What the texts of a request may be."""

    def start(self) -> TextMatcher:
        """One for a text that has not begun."""
