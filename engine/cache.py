"""Keys and values of the running sequences, and attention over them."""

import itertools
import math
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from engine.batch import ForwardBatch

KEY_BLOCK_TOKENS = 64  # a row has room for so many tokens, or for twice as many, or …
# Kernels that sum more keys than this do it in an order that depends on the capacity.
SUMMED_KEYS = 128
ALIGNED_NUMBERS = 4  # of float32: 16 bytes
# Of a prompt whose attention is computed in one order, whatever of it is found computed: a pass has
# so many of its tokens together, and so many, or a multiple of that, may have been found.
PREFIX_BLOCK_TOKENS = 32
# Of shorter prompts, those up to each of these lengths are attended over together: the same kernels
# on the same sizes, whatever the others are.
GROUPED_TOKENS = (8, 16, 32)
# Of a prompt whose attention is computed step by step: its weights take heads * keys * so much.
PIECE_TOKENS = 128

# Which keys a query sees, True or False, from positions that broadcast together. Not a mask: a
# pass needs it for each of its rows.
Visibility = Callable[[Tensor, Tensor], Tensor]
# What is added to a weight, for each head: (rows, 1, 1) and (keys,) to (rows or 1, heads, keys).
PositionBias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Short prompts of a pass."""

    prompts: list[tuple[int, int]]  # (first row, num_tokens)
    rows: Tensor  # (prompts, length) of the pass: behind a prompt's own, its last one again
    mask: Tensor  # (prompts * kv_heads, queries a key * length, length), to be added to weights


class KVCache:
    """Keys and values of every running sequence: (2, rows, kv_heads, capacity, head_dim) a layer.

    One row more than there can be sequences: the last takes the rows of padding. The
    capacity in tokens follows the longest running sequence, so that `attend` reads tensors
    without holes. The memory for max_model_len is reserved, and used as far as it is needed:
    keys from its beginning on, values from its middle on. All layers have the size of the largest.
    attends_in_blocks: whether a prompt is attended over in blocks of PREFIX_BLOCK_TOKENS, so that
    it may begin with what its row holds.
    Raises ValueError for a model whose layers differ in their number of heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        max_model_len: int,
        attends_in_blocks: bool = False,
    ):
        config = model.config.get_text_config()
        heads, self.num_kv_heads, head_dim = _head_sizes(config)
        self.group_size = heads // self.num_kv_heads
        self.shape = (num_rows + 1, self.num_kv_heads, head_dim)
        self.device = model.device
        self.position_bias: PositionBias | None = None
        # A sequence that becomes longer than this has other keys from its beginning on.
        self.rope_switch_tokens: int | None = None
        self.attends_in_blocks = attends_in_blocks
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.capacity = 0
        size = 2 * math.prod(self.shape) * max_model_len
        layers = range(config.num_hidden_layers)
        reserved = [reserved_zeros(size, model.dtype, model.device) for _ in layers]
        self.vectors = [each.view(-1, head_dim) for each in reserved]
        self.layers = reserved  # `resize` gives them their shape
        self.resize(1, 0)
        if attends_in_blocks:
            self.block_mask = _block_mask(max_model_len, model.dtype, model.device)

    def resize(self, num_tokens: int, num_rows: int) -> None:
        """Makes room for sequences of `num_tokens`, keeping the first `num_rows` rows."""
        capacity = KEY_BLOCK_TOKENS
        while capacity < num_tokens:
            capacity *= 2
        capacity = min(capacity, self.max_model_len)
        if capacity == self.capacity:
            return
        kept_tokens = min(capacity, self.capacity)
        rows, heads, head_dim = self.shape
        views = []
        for vectors, old in zip(self.vectors, self.layers, strict=True):
            kept = old[:, :num_rows, :, :kept_tokens].clone() if num_rows else None
            new = vectors.view(2, -1, head_dim)[:, : rows * heads * capacity]
            new = new.view(2, rows, heads, capacity, head_dim)
            if kept is not None:
                new[:, :num_rows, :, :kept_tokens] = kept
            views.append(new)
        self.layers, self.capacity = views, capacity
        # Each step needs these views. Many small calls take a part of its time, so make them once.
        self.transposed_keys = [layer[0].flatten(0, 1).transpose(1, 2) for layer in views]
        self.values = [layer[1].flatten(0, 1) for layer in views]

    def begin_pass(self, batch: ForwardBatch) -> None:
        """Says what `attend` will be called for until the next call."""
        device, kv_heads = self.device, self.num_kv_heads
        self.prompts, self.num_decode = batch.prompts, sum(map(len, batch.decode_runs))
        ends = list(itertools.accumulate(map(len, batch.decode_runs)))
        # Of each run: its rows of the pass, and its heads in the cache.
        self.decode_runs = [
            (slice(end - len(run), end), slice(run.start * kv_heads, run.stop * kv_heads))
            for run, end in zip(batch.decode_runs, ends, strict=True)
        ]
        self.prompt_groups = self._prompt_groups(batch)
        grouped = {prompt for group in self.prompt_groups for prompt in group.prompts}
        self.single_prompts = [prompt for prompt in self.prompts if prompt not in grouped]
        self.prompt_places = [
            (batch.cache_rows[first], batch.positions[first]) for first, _ in self.single_prompts
        ]
        self.attended_rows = self._attended_rows() if self.prompt_groups else None
        self.positions = torch.tensor(batch.positions, device=device)
        # (rows, 2, kv_heads): which of a layer's `vectors` a row's keys and values become.
        heads = torch.tensor(batch.cache_rows, device=device)[:, None] * kv_heads
        heads = heads + torch.arange(kv_heads, device=device)
        places = heads * self.capacity + self.positions[:, None]
        self.places = torch.stack((places, places + len(self.vectors[0]) // 2), dim=1)
        self.decode_masks: dict[Visibility | None, list[Tensor]] = {}

    def _prompt_groups(self, batch: ForwardBatch) -> list[PromptGroup]:
        """Whole prompts that are shorter than a block. One of a block's length is left out: the
        prefix cache keeps it, so it has to be computed as the first block of a longer prompt is."""
        if not self.attends_in_blocks:
            return []
        short = [
            (first, length)
            for first, length in batch.prompts
            if length < PREFIX_BLOCK_TOKENS and not batch.positions[first]
        ]
        groups: list[PromptGroup] = []
        for shorter, most in itertools.pairwise((0, *GROUPED_TOKENS)):
            prompts = [prompt for prompt in short if shorter < prompt[1] <= most]
            if prompts:
                firsts, lengths = torch.tensor(prompts, device=self.device)[:, :, None].unbind(1)
                rows = firsts + torch.arange(most, device=self.device).minimum(lengths - 1)
                mask = self.vectors[0].new_full((most, most), -math.inf).triu(1)
                mask = mask.repeat(self.group_size, 1)
                mask = mask.expand(len(prompts) * self.num_kv_heads, -1, -1)
                groups.append(PromptGroup(prompts, rows, mask))
        return groups

    def _attended_rows(self) -> Tensor:
        """(rows,): at which place each row of the pass is among what `attend` computes, where the
        groups come last and have padding between their prompts."""
        places = list(range(self.num_decode))
        at_rows = places.copy()
        end = self.num_decode
        for first, length in self.single_prompts:
            at_rows += range(first, first + length)
            places += range(end, end + length)
            end += length
        for group in self.prompt_groups:
            for first, length in group.prompts:
                at_rows += range(first, first + length)
                places += range(end, end + length)
                end += group.rows.shape[1]
        attended_rows = torch.empty(len(places), dtype=torch.long)
        attended_rows[torch.tensor(at_rows)] = torch.tensor(places)
        return attended_rows.to(self.device)

    def sequence_lengths(self) -> Tensor:
        """(rows,) tokens of each row's sequence, in this pass."""
        lengths = self.positions + 1
        for first, length in self.prompts:
            lengths[first : first + length] = self.positions[first] + length
        return lengths

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys_values: Tensor,
        scale: float,
        *,
        visible: Visibility | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Stores keys and values of all rows, (rows, 2, kv_heads, head_dim), then attends:
        queries (rows, heads, head_dim) to as many outputs.

        visible: None for all tokens up to the query's own. softcap: what products stay below.
        sinks: (heads,) weights, before softmax, of a key more, whose value is zero.
        """
        self.vectors[layer][self.places] = keys_values
        is_plain = softcap is None and sinks is None
        parts = []
        for (rows, heads), mask in zip(self.decode_runs, self._decode_masks(visible), strict=True):
            decode = query[rows]
            parts.append(self._attend_decode(layer, heads, decode, scale, mask, softcap, sinks))
        for at, (first, length) in enumerate(self.single_prompts):
            prompt = query[first : first + length], keys_values[first : first + length]
            if is_plain and visible is None and self.position_bias is None:
                if self.attends_in_blocks:
                    parts += self._attend_blocks(layer, prompt[0], *self.prompt_places[at], scale)
                else:
                    parts.append(self._attend_prompt(*prompt, scale))
            else:
                parts.append(self._attend_in_pieces(*prompt, scale, visible, softcap, sinks))
        for group in self.prompt_groups:
            prompts = query[group.rows], keys_values[group.rows]
            parts.append(self._attend_group(*prompts, group.mask, scale))
        attended = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        return attended if self.attended_rows is None else attended[self.attended_rows]

    def _decode_masks(self, visible: Visibility | None) -> list[Tensor]:
        """(rows * kv_heads, queries a key, capacity) of each run, made once a pass."""
        if visible not in self.decode_masks:
            mask = self._mask(self.positions[: self.num_decode], self.capacity, visible)
            mask = mask.expand(-1, self.num_kv_heads * self.group_size, -1)
            mask = mask.unflatten(1, (self.num_kv_heads, self.group_size))
            self.decode_masks[visible] = [
                mask[rows].flatten(0, 1) for rows, _heads in self.decode_runs
            ]
        return self.decode_masks[visible]

    def _mask(self, positions: Tensor, num_keys: int, visible: Visibility | None) -> Tensor:
        """(rows, heads or 1, num_keys) to be added to weights before softmax: -inf for a key that
        the query at this position does not see."""
        keys = torch.arange(num_keys, device=self.device)
        if visible is None:
            is_hidden = keys > positions[:, None]
        else:
            is_hidden = ~visible(positions[:, None], keys)
        mask = torch.zeros(is_hidden.shape, dtype=self.vectors[0].dtype, device=self.device)[
            :, None
        ]
        if self.position_bias:
            mask = mask + self.position_bias(positions[:, None, None], keys).to(mask.dtype)
        return mask.masked_fill_(is_hidden[:, None], -math.inf)

    def _attend_decode(
        self,
        layer: int,
        heads: slice,
        query: Tensor,
        scale: float,
        mask: Tensor,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """One query a sequence, over all that its cache row holds.

        Plain products: on some CPUs the fused kernel gives a row other bits in other company,
        and for one query a row it is no faster. So do these for several queries a row, which is
        why what is drafted for a sequence comes here a token at a time.
        """
        grouped = query.reshape(-1, self.group_size, query.shape[-1])
        keys, values = self.transposed_keys[layer][heads], self.values[layer][heads]
        if sinks is not None:
            sinks = sinks.view(1, self.num_kv_heads, self.group_size, 1)
            sinks = sinks.expand(len(query), -1, -1, -1).flatten(0, 1)
        weights = _weights(grouped, keys, scale, mask, softcap, sinks)
        # Of outputs that begin in other places, some kernels sum the numbers in another order.
        if missing := -values.shape[-1] % ALIGNED_NUMBERS:
            values = F.pad(values, (0, missing))
        if self.group_size > 1 and weights.dtype == torch.float32:
            # One query a key is summed in one order anyway, and pieces take twice the time.
            pieces = (weights.split(SUMMED_KEYS, -1), values.split(SUMMED_KEYS, -2))
            attended = reduce(torch.add, map(torch.bmm, *pieces))
        else:
            attended = torch.bmm(weights, values)
        return attended[..., : query.shape[-1]].reshape(query.shape)

    def _attend_prompt(self, query: Tensor, keys_values: Tensor, scale: float) -> Tensor:
        """A whole prompt over itself: each token sees those before it."""
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None].contiguous(),
            keys_values[:, 0].transpose(0, 1)[None].contiguous(),
            keys_values[:, 1].transpose(0, 1)[None].contiguous(),
            is_causal=True,
            scale=scale,
            enable_gqa=self.group_size > 1,
        )
        return attended[0].transpose(0, 1)

    def _attend_group(
        self, query: Tensor, keys_values: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """Several prompts, each over itself: (prompts, length, heads, head_dim) to
        (prompts * length, heads, head_dim)."""
        num_prompts, length, heads, head_dim = query.shape
        batch = num_prompts * self.num_kv_heads
        # (batch, queries a key * length, head_dim), heads before tokens.
        grouped = query.transpose(1, 2).reshape(batch, -1, head_dim)
        keys, values = keys_values.permute(2, 0, 3, 1, 4).reshape(2, batch, length, head_dim)
        weights = _weights(grouped, keys.transpose(1, 2), scale, mask, None, None)
        attended = torch.bmm(weights, values).view(num_prompts, heads, length, head_dim)
        return attended.transpose(1, 2).flatten(0, 1)

    def _attend_blocks(
        self, layer: int, query: Tensor, row: int, start: int, scale: float
    ) -> list[Tensor]:
        """A prompt from position `start` on, a multiple of PREFIX_BLOCK_TOKENS, over all that its
        cache row holds of it: for each block of queries (rows, heads, head_dim).

        The fused kernel sums in an order that depends on the numbers of queries and of keys. A
        block's are always the same, so its bits do not tell where a pass began.
        """
        keys, values = self.layers[layer][:, row, None]
        attended = []
        for block in query.split(PREFIX_BLOCK_TOKENS):
            end = start + len(block)
            is_first = start == 0
            mask = None if is_first else self.block_mask[-len(block) :, -end:]
            attended.append(
                F.scaled_dot_product_attention(
                    block.transpose(0, 1)[None].contiguous(),
                    keys[:, :, :end],
                    values[:, :, :end],
                    attn_mask=mask,
                    is_causal=is_first,
                    scale=scale,
                    enable_gqa=self.group_size > 1,
                )
            )
            start = end
        return [block[0].transpose(0, 1) for block in attended]

    def _attend_in_pieces(
        self,
        query: Tensor,
        keys_values: Tensor,
        scale: float,
        visible: Visibility | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """A whole prompt over itself where the fused kernel does not serve. PIECE_TOKENS at a
        time, as the weights of a long prompt take much memory."""
        num_tokens, _, head_dim = query.shape
        transposed_keys, values = (
            keys_values[:, 0].permute(1, 2, 0),
            keys_values[:, 1].transpose(0, 1),
        )
        parts = []
        for start in range(0, num_tokens, PIECE_TOKENS):
            end = min(start + PIECE_TOKENS, num_tokens)
            mask = self._mask(torch.arange(start, end, device=self.device), end, visible)
            # (kv_heads, queries a key * rows, …), heads before rows.
            grouped = query[start:end].transpose(0, 1).reshape(self.num_kv_heads, -1, head_dim)
            mask = mask.transpose(0, 1).expand(len(values) * self.group_size, -1, -1)
            mask = mask.reshape(self.num_kv_heads, -1, end)
            column = sinks
            if column is not None:
                column = column.view(self.num_kv_heads, self.group_size, 1, 1)
                column = column.expand(-1, -1, end - start, -1).flatten(1, 2)
            weights = _weights(grouped, transposed_keys[:, :, :end], scale, mask, softcap, column)
            attended = torch.bmm(weights, values[:, :end])
            parts.append(attended.reshape(-1, end - start, head_dim).transpose(0, 1))
        return torch.cat(parts)

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Gives `target` the first `num_tokens` positions of `source`."""
        for layer in self.layers:
            layer[:, target, :, :num_tokens] = layer[:, source, :, :num_tokens]

    def clear_row(self, row: int) -> None:
        """Leaves no NaN in a row: one that no query sees counts too, as zero times NaN is NaN."""
        for layer in self.layers:
            layer[:, row] = 0


def _block_mask(max_model_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(PREFIX_BLOCK_TOKENS, max_model_len) to be added to weights: its last rows and columns are
    what the last queries of a text see of its last tokens, none of those that come after them."""
    is_hidden = torch.ones(PREFIX_BLOCK_TOKENS, max_model_len, dtype=torch.bool, device=device)
    is_hidden = is_hidden.triu(max_model_len - PREFIX_BLOCK_TOKENS + 1)
    return torch.zeros(is_hidden.shape, dtype=dtype, device=device).masked_fill_(
        is_hidden, -math.inf
    )


def _weights(
    query: Tensor,
    transposed_keys: Tensor,
    scale: float,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(batch, queries, keys), those of all keys and of the sink adding up to one.

    sinks: (batch, queries, 1). It stands before the keys: behind them, where it is added would
    depend on the cache's capacity.
    """
    if softcap is None:
        weights = torch.baddbmm(mask, query, transposed_keys, alpha=scale)
    else:
        products = torch.bmm(query, transposed_keys).mul_(scale / softcap)
        weights = products.tanh_().mul_(softcap).add_(mask)
    if sinks is None:
        return torch.softmax(weights, dim=-1)
    weights = torch.softmax(torch.cat((sinks.to(weights.dtype), weights), dim=-1), dim=-1)
    return weights[..., 1:].contiguous()


def _head_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """(heads of queries, heads of keys, numbers in each): the most that a layer has."""
    layers = config.per_layer_config if getattr(config, "per_layer_attributes", None) else [config]
    heads = {each.num_attention_heads for each in layers}
    if len(heads) > 1:
        raise ValueError("its layers differ in num_attention_heads, and the cache has one size")
    num_kv_heads = max(_num_kv_heads(each) for each in layers)
    return heads.pop(), num_kv_heads, max(_head_dim(each) for each in layers)


def _head_dim(config: PretrainedConfig) -> int:
    """Of keys or values, whichever are larger. With latent attention, `head_dim` is the part of a
    key that has a position."""
    names = ("head_dim", "qk_head_dim", "v_head_dim")
    named = [dim for name in names if (dim := getattr(config, name, None))]
    return max(named) if named else config.hidden_size // config.num_attention_heads


def _num_kv_heads(config: PretrainedConfig) -> int:
    heads: int = config.num_attention_heads
    if getattr(config, "new_decoder_architecture", False):  # Falcon's
        return config.num_kv_heads
    if hasattr(config, "multi_query"):  # Falcon's and GPT-BigCode's
        return 1 if config.multi_query else heads
    return getattr(config, "num_key_value_heads", None) or heads


def reserved_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,) zeros that, on a CPU, take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = size * dtype.itemsize
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=dtype)
