"""What goes through the model in one pass."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


@dataclass(slots=True)
class ForwardBatch:
    """The rows of one forward pass: those of running sequences first, then prompts.

    Row i of the pass is a token: `token_ids[i]` at position `positions[i]` of the
    sequence in cache row `cache_rows[i]`.
    """

    decode_start: int = 0  # running sequences decode_start … decode_end-1 have a row each
    decode_end: int = 0
    prompts: list[tuple[int, int]] = field(default_factory=list)  # (first row, num_tokens)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cache_rows: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)  # rows whose logits are wanted

    def add_prompt(self, token_ids: SequenceOf[int], cache_row: int, start: int = 0) -> None:
        """start: the first one's position, up to which the cache row has the prompt already."""
        self.prompts.append((len(self.token_ids), len(token_ids)))
        self.token_ids += token_ids
        self.positions += range(start, start + len(token_ids))
        self.cache_rows += [cache_row] * len(token_ids)
