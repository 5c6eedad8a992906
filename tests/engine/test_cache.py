"""The memory of keys and values, whatever room the longest sequence needs."""

import torch

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
