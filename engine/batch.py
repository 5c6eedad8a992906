"""What goes through the model in one pass."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field


@dataclass(slots=True)
class ForwardBatch:
    """The rows of one forward pass: those of running sequences first, then prompts.

    Row i of the pass is a token: `token_ids[i]` at position `positions[i]` of the
    sequence in cache row `cache_rows[i]`.
    """

    # Of the pass's first rows: cache rows one after the other, each of which has one row here.
    decode_runs: list[range] = field(default_factory=list)
    prompts: list[tuple[int, int]] = field(default_factory=list)  # (first row, num_tokens)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    cache_rows: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)  # rows whose logits are wanted

    def add_run(self, cache_rows: range, token_ids: list[int], positions: list[int]) -> None:
        """A token for each of these cache rows; before any prompt."""
        self.decode_runs.append(cache_rows)
        self.token_ids += token_ids
        self.positions += positions
        self.cache_rows += cache_rows

    def add_prompt(self, token_ids: SequenceOf[int], cache_row: int, start: int = 0) -> None:
        """start: the first one's position, up to which the cache row has the prompt already."""
        self.prompts.append((len(self.token_ids), len(token_ids)))
        self.token_ids += token_ids
        self.positions += range(start, start + len(token_ids))
        self.cache_rows += [cache_row] * len(token_ids)
