"""The memory of keys and values, whatever room the longest sequence needs."""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from engine.batch import ForwardBatch
from engine.cache import KVCache
from tests.support import tiny_llama


def test_cache_keeps_rows_when_its_capacity_changes_and_takes_no_new_memory() -> None:
    """Values that began elsewhere with each capacity would fill memory anew with each."""
    cache = KVCache(tiny_llama(), 3, 256)
    kept = torch.randn(cache.layers[0][:, :2, :, :64].shape)
    cache.layers[0][:, :2, :, :64] = kept
    addresses = []
    for num_tokens in (65, 256, 64):
        cache.resize(num_tokens, 2)
        assert torch.equal(cache.layers[0][:, :2, :, :64], kept)
        addresses.append([half.data_ptr() for half in cache.layers[0]])
    assert addresses == [addresses[0]] * 3


def test_attention_in_blocks_is_that_in_one_piece() -> None:
    """Of a prompt whose first 128 tokens the row has already, too."""
    keys_values, query = torch.randn(200, 2, 2, 8), torch.randn(200, 8, 8)
    attended = []
    for attends_in_blocks, start in ((False, 0), (True, 0), (True, 128)):
        cache = KVCache(tiny_llama(), 3, 256, attends_in_blocks)
        cache.resize(200, 0)
        cache.layers[0][:, 1, :, :start] = keys_values[:start].permute(1, 2, 0, 3)
        batch = ForwardBatch()
        batch.add_prompt([0] * (200 - start), 1, start)
        cache.begin_pass(batch)
        attended.append(cache.attend(0, query[start:], keys_values[start:], 0.5))
    in_one_piece, in_blocks, rest = attended
    assert torch.allclose(in_blocks, in_one_piece, atol=1e-5)
    assert torch.equal(rest, in_blocks[128:])


@pytest.mark.parametrize("max_model_len", [64, 20])
def test_attention_of_short_prompts_is_the_same_in_any_company(max_model_len: int) -> None:
    """They are attended over in groups, by their lengths, beside longer ones and what runs."""
    cache = KVCache(tiny_llama(), 12, max_model_len, attends_in_blocks=True)
    cache.resize(max_model_len, 0)
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))
    lengths = [min(length, max_model_len) for length in (1, 31, 8, 40, 5, 9, 32, 16, 17, 8)]
    query, keys_values = torch.randn(169, 8, 8), torch.randn(169, 2, 2, 8)
    ends = list(itertools.accumulate(lengths, initial=2))
    together = ForwardBatch()
    together.add_run(range(2), [0] * 2, [5, max_model_len - 1])
    for row, length in enumerate(lengths, 2):
        together.add_prompt([0] * length, row)
    cache.begin_pass(together)
    attended = cache.attend(0, query[: ends[-1]], keys_values[: ends[-1]], 0.5)
    for row, (start, end) in enumerate(itertools.pairwise(ends), 2):
        alone = ForwardBatch()
        alone.add_prompt([0] * (end - start), row)
        cache.begin_pass(alone)
        got = cache.attend(0, query[start:end], keys_values[start:end], 0.5)
        assert torch.equal(got, attended[start:end]), end - start
        in_one_piece = cache._attend_prompt(query[start:end], keys_values[start:end], 0.5)
        assert torch.allclose(got, in_one_piece, atol=1e-5)


def test_attention_of_a_row_is_the_same_in_any_company() -> None:
    """Of three heads of ten numbers, outputs do not all begin at a multiple of 16 bytes; where that
    was so, a row's bits depended on its place."""
    num_rows, sizes = 16, {"n_embd": 30, "n_head": 3, "n_layer": 1, "n_positions": 64}
    cache = KVCache(GPT2LMHeadModel(GPT2Config(**sizes)), num_rows, 64)
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))
    query, keys_values = torch.randn(num_rows, 3, 10), torch.randn(num_rows, 2, 3, 10)

    def attend(rows: range) -> torch.Tensor:
        batch = ForwardBatch()
        batch.add_run(rows, [0] * len(rows), [40] * len(rows))
        cache.begin_pass(batch)
        chosen = slice(rows.start, rows.stop)
        return cache.attend(0, query[chosen], keys_values[chosen], 0.5)

    together = attend(range(num_rows))
    alone = [attend(range(row, row + 1)) for row in range(num_rows)]
    assert torch.equal(torch.cat(alone), together)
