"""How a model of transformers comes to attend over the engine's cache.

In every layer transformers calls an attention function, and once a pass, for each kind of mask
that a model has, a mask function. Both are registered here as "engine_cache". What a mask shows
is a function of positions alone, so each row of a pass gets the one that belongs to its own.

Some older models compute attention by themselves. For those of SUPPLIED, their layers are given
the engine's instead.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.cache import KVCache, Visibility

# Arguments that say again what the mask or the cache say, or nothing about a causal model.
IGNORED_ARGUMENTS = {"sliding_window", "position_ids", "dropout"}


def _cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | None,
    *,
    kv_cache: KVCache | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    query_scale: Callable[[Tensor], Tensor] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer: (1, heads, rows, dim) in,
    (1, rows, heads, dim) out.

    query_scale: a factor for each query, from positions (rows,).
    Raises ValueError for an argument whose meaning is not known, and for sizes that the cache has
    no room for.
    """
    if kv_cache is None:
        raise ValueError(
            f"{type(module).__name__} is not given what its model is called with, as the cache is"
        )
    for name, argument in others.items():
        if (isinstance(argument, Tensor) or argument) and name not in IGNORED_ARGUMENTS:
            raise ValueError(f"{type(module).__name__} needs {name}, which is not served")
    if is_causal is False:
        raise ValueError(f"{type(module).__name__} is not causal (is_causal=False)")
    if isinstance(attention_mask, Tensor):
        raise ValueError(f"{type(module).__name__} gives an attention_mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    value_dim = value.shape[-1]
    query, key, value = _fitted(module, query, key, value, kv_cache)
    query, keys_values = query[0].transpose(0, 1), torch.cat((key, value)).permute(2, 0, 1, 3)
    if query_scale:
        query = (query * query_scale(kv_cache.positions)[:, None, None]).to(query.dtype)
    layer = cast(int, module.layer_idx)
    attended = kv_cache.attend(
        layer, query, keys_values, scale, visible=attention_mask, softcap=softcap, sinks=s_aux
    )
    return attended[None, ..., :value_dim], None


def _fitted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cache: KVCache
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (1, heads, rows, dim) each, of the cache's size.

    The cache has one size for all layers, and for keys and values; in some layers, and of latent
    attention the values, are smaller. They get zeros behind their numbers, which change no product,
    and each head of keys is there several times.
    Raises ValueError for what is larger, and for keys of other tokens than the queries'.
    """
    _, num_kv_heads, head_dim = cache.shape
    num_heads = num_kv_heads * cache.group_size
    is_smaller = max(key.shape[-1], value.shape[-1]) <= head_dim and not (
        num_kv_heads % key.shape[1]
    )
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{type(module).__name__} has keys of other tokens than those of the pass")
    if query.shape[1] != num_heads or not is_smaller:
        raise ValueError(
            f"{type(module).__name__} has {query.shape[1]} heads of queries and {key.shape[1]} of "
            f"keys, of {key.shape[-1]} numbers, where the configuration has {num_heads} and "
            f"{num_kv_heads} of {head_dim}"
        )
    if key.shape[1] < num_kv_heads:
        num_times = num_kv_heads // key.shape[1]
        key, value = (each.repeat_interleave(num_times, dim=1) for each in (key, value))
    query, key, value = (
        F.pad(each, (0, head_dim - each.shape[-1])) if each.shape[-1] < head_dim else each
        for each in (query, key, value)
    )
    return query, key, value


def _visibility(*, mask_function: Callable[..., Tensor], **_: Any) -> Visibility | None:
    """What transformers calls to make a mask: None if it is the plain causal one.

    Raises ValueError for a mask that shows what is to come.
    """
    if mask_function is causal_mask_function:
        return None
    visible, zero = PositionMask(mask_function), torch.tensor(0)
    if visible(zero, zero + 1):
        raise ValueError("a model that sees the tokens to come is not causal")
    return visible


class PositionMask:
    """Which keys a query sees, from their positions.

    mask_function: as transformers has it, of batch, head, query and key.
    Raises ValueError where a model's code takes it for a tensor.
    """

    def __init__(self, mask_function: Callable[..., Tensor]):
        self.mask_function = mask_function

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        # Of one sequence, and the same for all heads.
        first = torch.tensor(0, device=key_positions.device)
        return self.mask_function(first, first, query_positions, key_positions)

    def __getattr__(self, name: str) -> None:
        raise ValueError("it makes a mask of its own out of the one for its positions")

    __getitem__ = __getattr__


ALL_ATTENTION_FUNCTIONS.register("engine_cache", _cached_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("engine_cache", _visibility)


def refuse_other_attention(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose attention cannot be the engine's."""
    name = type(model).__name__
    if not (model._supports_attention_backend or name in SUPPLIED):
        raise ValueError(f"{name} does not let its attention be replaced")
    if "indexed_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ValueError(f"{name} chooses by an index which tokens each one sees: not served")


def supply_attention(model: PreTrainedModel, cache: KVCache) -> None:
    """Changes what a model would compute for a sequence by itself, so that rows of many may pass.

    May be called again, with another cache.
    """
    if supply := SUPPLIED.get(type(model).__name__):
        model.config._attn_implementation = "engine_cache"  # for the masks
        supply(model, cache)
    else:
        model.set_attn_implementation("engine_cache")
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            _choose_rope_by_row(module, cache)


def _choose_rope_by_row(rotary: Any, cache: KVCache) -> None:
    """Lets each row have the frequencies for the length of its own sequence.

    transformers takes those for the longest of all.
    """
    original: int = rotary.config.rope_parameters["original_max_position_embeddings"]
    cache.rope_switch_tokens = original
    compute = inspect.unwrap(type(rotary).forward)
    type(rotary).forward(  # makes the long ones
        rotary, torch.zeros(1, device=cache.device), torch.tensor([[original]], device=cache.device)
    )
    frequencies = (rotary.original_inv_freq, rotary.long_inv_freq)

    def forward(hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        is_long = (cache.sequence_lengths() > original)[None, :, None]
        turned = []
        for inv_freq in frequencies:
            rotary.inv_freq = inv_freq
            turned.append(compute(rotary, hidden, position_ids))
        short, long = turned
        return tuple(torch.where(is_long, *each) for each in zip(long, short, strict=True))

    rotary.forward = forward


# Models whose layers are given the engine's attention, by the names of their classes. Each function
# imports its own model's module: all of them together would make every start a hundredth longer.


def _attend(
    cache: KVCache,
    layer: int,
    scale: float,
    visible: Visibility | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
) -> tuple[Tensor, None]:
    """(1, heads, rows, dim) in and out."""
    query, key, value = query.to(value.dtype), key.to(value.dtype), value
    keys_values = torch.cat((key, value)).permute(2, 0, 1, 3)
    attended = cache.attend(layer, query[0].transpose(0, 1), keys_values, scale, visible=visible)
    return attended.transpose(0, 1)[None], None


def _supply_gpt_neo(model: PreTrainedModel, cache: KVCache) -> None:
    is_in_window = sliding_window_overlay(model.config.window_size)

    def local(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        is_past = key_positions <= query_positions
        return is_past & is_in_window(0, 0, query_positions, key_positions)

    for layer, block in enumerate(model.transformer.h):
        attention = block.attn.attention
        visible = local if attention.attention_type == "local" else None
        attention._attn = partial(_attend, cache, layer, 1.0, visible)


def _supply_gptj(model: PreTrainedModel, cache: KVCache) -> None:
    """Also CodeGen's."""
    for layer, block in enumerate(model.transformer.h):
        block.attn._attn = partial(_attend, cache, layer, 1 / block.attn.scale_attn, None)


def _supply_stablelm(model: PreTrainedModel, cache: KVCache) -> None:
    """Also Nemotron's. Its layers do not hand on what the model is called with."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.forward = partial(type(attention).forward, attention, kv_cache=cache)


def _supply_llama4(model: PreTrainedModel, cache: KVCache) -> None:
    """It takes the number of a row for a position where it scales queries."""

    def query_scale(attention: Any, positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1) / attention.floor_scale)
        return torch.log1p(steps) * attention.attn_scale + 1

    for layer in model.model.layers:
        attention = layer.self_attn
        if model.config.attn_temperature_tuning and not attention.use_rope:
            attention.attn_temperature_tuning = False
            attention.forward = partial(
                type(attention).forward, attention, query_scale=partial(query_scale, attention)
            )


def _supply_bloom(model: PreTrainedModel, cache: KVCache) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    ones = torch.ones(1, cache.max_model_len, device=cache.device)
    biases = build_alibi_tensor(ones, model.config.n_head, model.dtype)[:, 0]
    cache.position_bias = lambda positions, keys: biases[:, : len(keys)]

    def forward(attention: Any, hidden: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        heads = attention._reshape(attention.query_key_value(hidden))
        scale = attention.inv_norm_factor
        attended, _weights = _attend(cache, attention.layer_idx, scale, None, *heads)
        return attention.dense(attention._merge_heads(attended[0])) + residual, None

    for block in model.transformer.h:
        block.self_attention.forward = partial(forward, block.self_attention)


def _supply_falcon(model: PreTrainedModel, cache: KVCache) -> None:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    config = model.config
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    if config.alibi:
        ones = torch.ones(1, cache.max_model_len, dtype=torch.long, device=cache.device)
        biases = build_alibi_tensor(ones, config.num_attention_heads, model.dtype)[:, 0]
        biases = biases / math.sqrt(config.hidden_size // config.num_attention_heads)
        cache.position_bias = lambda positions, keys: biases[:, : len(keys)]

    def forward(
        attention: Any,
        hidden: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, None]:
        heads = attention._split_heads(attention.query_key_value(hidden))
        query, key, value = (each.transpose(1, 2) for each in heads)
        if not config.alibi:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        # With its new architecture, each head of keys is there for each of its queries.
        group = key.shape[1] // cache.num_kv_heads
        attended, _weights = _attend(
            cache, attention.layer_idx, scale, None, query, key[:, ::group], value[:, ::group]
        )
        return attention.dense(attended.transpose(1, 2).reshape(hidden.shape)), None

    for block in model.transformer.h:
        block.self_attention.forward = partial(forward, block.self_attention)


def _supply_mpt(model: PreTrainedModel, cache: KVCache) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    body, config = model.transformer, model.config
    # Of two positions, the first is a token away from the last.
    slopes = -build_mpt_alibi_tensor(config.n_heads, 2, device=cache.device)[:, 0, :1]
    cache.position_bias = lambda positions, keys: slopes * (keys - positions)

    def attend(attention: Any, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        projected = attention.Wqkv(hidden)
        if clip := attention.clip_qkv:
            projected = projected.clamp(-clip, clip)
        heads = projected.view(1, -1, 3, config.n_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        layer, scale = attention.layer_idx, attention.softmax_scale
        attended, _weights = _attend(cache, layer, scale, None, *heads)
        return attention.out_proj(attended.transpose(1, 2).reshape(hidden.shape)), None

    def forward(input_ids: Tensor, **_: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        """What transformers' own does, without its mask and biases for all positions."""
        hidden = body.wte(input_ids)
        for block in body.blocks:
            hidden, _weights = block(hidden, position_bias=None, attention_mask=None)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=body.norm_f(hidden))

    for block in body.blocks:
        block.attn.forward = partial(attend, block.attn)
    body.forward = forward


SUPPLIED: dict[str, Callable[[PreTrainedModel, KVCache], None]] = {
    "BloomForCausalLM": _supply_bloom,
    "CodeGenForCausalLM": _supply_gptj,
    "FalconForCausalLM": _supply_falcon,
    "GPTJForCausalLM": _supply_gptj,
    "GPTNeoForCausalLM": _supply_gpt_neo,
    "Llama4ForCausalLM": _supply_llama4,
    "MptForCausalLM": _supply_mpt,
    "NemotronForCausalLM": _supply_stablelm,
    "StableLmForCausalLM": _supply_stablelm,
}
