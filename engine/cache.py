"""Keys and values of the running sequences, and attention over them."""

import math
import mmap
import sys
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.batch import ForwardBatch

KEY_BLOCK_TOKENS = 64  # a row has room for so many tokens, or for twice as many, or …
# Kernels that sum more keys than this do it in an order that depends on the capacity.
SUMMED_KEYS = 128


class KVCache:
    """Keys and values of every running sequence: (2, rows, kv_heads, capacity, head_dim) a layer.

    One row more than there can be sequences: the last takes the rows of padding. The
    capacity in tokens follows the longest running sequence, so that `attend` reads tensors
    without holes. The memory for max_model_len is reserved, and used as far as it is needed:
    keys from its beginning on, values from its middle on.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_model_len: int):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.group_size = heads // kv_heads
        self.shape = (num_rows + 1, kv_heads, head_dim)
        self.padding_row = num_rows
        self.max_model_len = max_model_len
        self.capacity = 0
        size = 2 * math.prod(self.shape) * max_model_len
        layers = range(config.num_hidden_layers)
        reserved = [_reserved_zeros(size, model.dtype, model.device) for _ in layers]
        self.vectors = [each.view(-1, head_dim) for each in reserved]
        self.layers = reserved  # `resize` gives them their shape
        self.resize(1, 0)

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
        device, kv_heads = self.vectors[0].device, self.shape[1]
        self.prompts, self.num_decode = batch.prompts, batch.decode_end - batch.decode_start
        self.decode_heads = slice(batch.decode_start * kv_heads, batch.decode_end * kv_heads)
        self.positions = torch.tensor(batch.positions, device=device)
        # (rows, 2, kv_heads): which of a layer's `vectors` a row's keys and values become.
        heads = torch.tensor(batch.cache_rows, device=device)[:, None] * kv_heads
        heads = heads + torch.arange(kv_heads, device=device)
        places = heads * self.capacity + self.positions[:, None]
        self.places = torch.stack((places, places + len(self.vectors[0]) // 2), dim=1)
        decode_positions = self.positions[: self.num_decode]
        is_hidden = torch.arange(self.capacity, device=device) > decode_positions[:, None]
        mask = torch.zeros(is_hidden.shape, dtype=self.vectors[0].dtype, device=device)
        mask.masked_fill_(is_hidden, -math.inf)
        mask = mask[:, None, None].expand(-1, kv_heads, self.group_size, -1)
        self.mask = mask.flatten(0, 1)

    def attend(self, layer: int, query: Tensor, keys_values: Tensor, scale: float) -> Tensor:
        """Stores keys and values of all rows, (rows, 2, kv_heads, head_dim), then attends:
        queries (rows, heads, head_dim) to as many outputs."""
        self.vectors[layer][self.places] = keys_values
        parts = []
        if self.num_decode:
            parts.append(self._attend_decode(layer, query[: self.num_decode], scale))
        for first, length in self.prompts:
            prompt = slice(first, first + length)
            parts.append(self._attend_prompt(query[prompt], keys_values[prompt], scale))
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    def _attend_decode(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """One query a sequence, over all that its cache row holds.

        Plain products: on some CPUs the fused kernel gives a row other bits in other company,
        and for one query a row it is no faster.
        """
        grouped = query.reshape(-1, self.group_size, query.shape[-1])
        keys = self.transposed_keys[layer][self.decode_heads]
        values = self.values[layer][self.decode_heads]
        weights = torch.softmax(torch.baddbmm(self.mask, grouped, keys, alpha=scale), dim=-1)
        if self.group_size > 1 and weights.dtype == torch.float32:
            # One query a key is summed in one order anyway, and pieces take twice the time.
            pieces = (weights.split(SUMMED_KEYS, -1), values.split(SUMMED_KEYS, -2))
            attended = reduce(torch.add, map(torch.bmm, *pieces))
        else:
            attended = torch.bmm(weights, values)
        return attended.view(query.shape)

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

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Gives `target` the first `num_tokens` positions of `source`."""
        for layer in self.layers:
            layer[:, target, :, :num_tokens] = layer[:, source, :, :num_tokens]


def _reserved_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,) zeros that, on a CPU, take no memory before they are written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = size * dtype.itemsize
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=dtype)


def _cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    kv_cache: KVCache,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer: (1, heads, rows, dim) in,
    (1, rows, heads, dim) out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, keys_values = query[0].transpose(0, 1), torch.cat((key, value)).permute(2, 0, 1, 3)
    return kv_cache.attend(cast(int, module.layer_idx), query, keys_values, scale)[None], None


ALL_ATTENTION_FUNCTIONS.register("engine_cache", _cached_attention)
