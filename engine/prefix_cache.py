"""Keys and values of how recent prompts began, for those that begin in the same way."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from engine.cache import PREFIX_BLOCK_TOKENS, KVCache, reserved_zeros
from engine.request import CacheSalt, PositionLogprobs

# A block's name: the number of the block before it, or the salt of the first one, and its own token
# ids. Names are compared, not their hashes alone, so no two beginnings are taken for one.
Name = tuple[int | CacheSalt, tuple[int, ...]]


# How many likeliest tokens go with each log probability, and whether the token's rank does.
ScoresKind = tuple[int, bool]


@dataclass(frozen=True, slots=True)
class BlockScores:
    """Log probabilities of a block's tokens, and what those of the token behind it follow from."""

    kind: ScoresKind
    logprobs: list[PositionLogprobs]  # a prompt's first token has none
    last_hidden: Tensor  # (hidden_size,): what the output layer gets of the block's last token


@dataclass(slots=True)
class Block:
    """PREFIX_BLOCK_TOKENS tokens of a prompt, after all those that come before them."""

    number: int  # no other block has it, now or later
    place: int  # in the memory
    scores: BlockScores | None = None  # of the last prompt that was scored and has the block


class PrefixCache:
    """The beginnings of prompts, in blocks of whole layers, of which the least recently used leave
    first when there is no room: of one prompt those behind before those they follow on.

    cache: whose rows blocks come from and go to. max_bytes: of memory, which is taken as it is
    needed and then kept.
    Raises ValueError where not one block has room.
    """

    def __init__(self, cache: KVCache, max_bytes: int):
        self.cache = cache
        _, heads, head_dim = cache.shape
        size = (len(cache.layers), 2, heads, PREFIX_BLOCK_TOKENS, head_dim)
        dtype = cache.vectors[0].dtype
        block_bytes = math.prod(size) * dtype.itemsize
        self.num_blocks = max_bytes // block_bytes
        if not self.num_blocks:
            raise ValueError(f"{PREFIX_BLOCK_TOKENS} tokens take {block_bytes} bytes")
        reserved = reserved_zeros(self.num_blocks * math.prod(size), dtype, cache.device)
        self.vectors = reserved.view(self.num_blocks, *size)
        self.free_places = list(reversed(range(self.num_blocks)))
        self.numbers = itertools.count()
        self.blocks: OrderedDict[Name, Block] = OrderedDict()  # the least recently used one first

    def num_cached_tokens(
        self, token_ids: SequenceOf[int], cache_salt: CacheSalt, kind: ScoresKind | None = None
    ) -> int:
        """Of a prompt, how many tokens need not be computed: never all, as the last one's logits
        are needed.

        cache_salt: a prompt finds what was stored with the same one. kind: of the log probabilities
        that its tokens need; None where they need none.
        """
        num_blocks = (len(token_ids) - 1) // PREFIX_BLOCK_TOKENS
        found = list(self._find(token_ids, cache_salt, num_blocks).values())
        if kind is not None:
            found = list(itertools.takewhile(lambda block: _has_scores(block, kind), found))
        return len(found) * PREFIX_BLOCK_TOKENS

    def scores(
        self, token_ids: SequenceOf[int], cache_salt: CacheSalt, num_tokens: int
    ) -> list[BlockScores]:
        """Of a prompt's first blocks: for as many tokens as `num_cached_tokens` says."""
        found = self._find(token_ids, cache_salt, num_tokens // PREFIX_BLOCK_TOKENS)
        return [block.scores for block in found.values() if block.scores]

    def load(
        self, token_ids: SequenceOf[int], cache_salt: CacheSalt, num_tokens: int, row: int
    ) -> None:
        """Gives a cache row the prompt's first tokens: as many as `num_cached_tokens` says."""
        num_blocks = num_tokens // PREFIX_BLOCK_TOKENS
        found = self._find(token_ids, cache_salt, num_blocks)
        assert len(found) == num_blocks
        for at, block in enumerate(found.values()):
            tokens = slice(at * PREFIX_BLOCK_TOKENS, (at + 1) * PREFIX_BLOCK_TOKENS)
            for layer, stored in zip(self.cache.layers, self.vectors[block.place], strict=True):
                layer[:, row, :, tokens] = stored

    def store(
        self,
        token_ids: SequenceOf[int],
        cache_salt: CacheSalt,
        row: int,
        scores: Mapping[int, BlockScores] | None = None,
    ) -> None:
        """Keeps the whole blocks of a prompt, whose keys and values a cache row has; and the scores
        of those that have some, by their number in the prompt."""
        num_blocks = min(len(token_ids) // PREFIX_BLOCK_TOKENS, self.num_blocks)
        found = self._find(token_ids, cache_salt, num_blocks)
        self._touch(found)
        for at in range(len(found), num_blocks):
            before = next(reversed(found.values())).number if found else cache_salt
            name = (before, _token_ids_of_block(token_ids, at))
            place = self._take_place()
            tokens = slice(at * PREFIX_BLOCK_TOKENS, (at + 1) * PREFIX_BLOCK_TOKENS)
            for layer, stored in zip(self.cache.layers, self.vectors[place], strict=True):
                stored[:] = layer[:, row, :, tokens]
            found[name] = self.blocks[name] = Block(next(self.numbers), place)
        for at, block in enumerate(found.values()):
            if scores and at in scores:
                block.scores = scores[at]
        self._touch(found)

    def _find(
        self, token_ids: SequenceOf[int], cache_salt: CacheSalt, num_blocks: int
    ) -> dict[Name, Block]:
        """The known ones of a prompt's first blocks, in order."""
        found: dict[Name, Block] = {}
        before: int | CacheSalt = cache_salt
        for at in range(num_blocks):
            name = (before, _token_ids_of_block(token_ids, at))
            block = self.blocks.get(name)
            if block is None:
                break
            found[name] = block
            before = block.number
        return found

    def _touch(self, found: dict[Name, Block]) -> None:
        """Makes them the most recently used ones, each after those that follow on it: so none
        leaves before these, without which nobody would find them."""
        for name in reversed(found):
            self.blocks.move_to_end(name)

    def _take_place(self) -> int:
        if self.free_places:
            return self.free_places.pop()
        _, block = self.blocks.popitem(last=False)
        return block.place


def split_scores(
    logprobs: list[PositionLogprobs], kind: ScoresKind, hidden: Tensor
) -> dict[int, BlockScores]:
    """Scores of a prompt's whole blocks, by their number in it.

    logprobs: of all its tokens but the first. hidden: (num_rows, hidden_size), what the output
    layer gets of its last tokens; blocks that end before them are left out.
    """
    num_tokens = len(logprobs) + 1
    first = num_tokens - len(hidden)  # the first row's token
    scores = {}
    for at in range(math.ceil(first / PREFIX_BLOCK_TOKENS), num_tokens // PREFIX_BLOCK_TOKENS):
        start, end = at * PREFIX_BLOCK_TOKENS, (at + 1) * PREFIX_BLOCK_TOKENS
        of_block = logprobs[max(0, start - 1) : end - 1]
        scores[at] = BlockScores(kind, of_block, hidden[end - 1 - first].clone())
    return scores


def _has_scores(block: Block, kind: ScoresKind) -> bool:
    return block.scores is not None and block.scores.kind == kind


def _token_ids_of_block(token_ids: SequenceOf[int], at: int) -> tuple[int, ...]:
    return tuple(token_ids[at * PREFIX_BLOCK_TOKENS : (at + 1) * PREFIX_BLOCK_TOKENS])
