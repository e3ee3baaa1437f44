"""PagedCache: sizes, views, the free list, and the index tensors it makes."""

from __future__ import annotations

import pytest
import torch

import tq4
from support import poisoned_cache
from tq4.layout import HEAD_MAJOR, LAYOUTS, TOKEN_MAJOR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes(layout):
    cache = tq4.PagedCache(10, 8, 128, block_size=32, layout=layout)
    assert cache.tensor.dtype == torch.uint8 and not cache.tensor.any() and cache.tensor.is_contiguous()
    assert cache.layout == layout and cache.num_tokens == 320
    assert cache.nbytes == cache.tensor.numel() == 320 * 8 * 136
    assert cache.fp16_nbytes == 320 * 8 * 512
    assert cache.fp16_nbytes / cache.nbytes == pytest.approx(3.76, abs=0.01)
    shape = (10, 32, 1088) if layout == TOKEN_MAJOR else (10, 8, 32, 136)
    assert cache.tensor.shape == shape
    assert cache.view.num_kv_heads == 8 and cache.device.type == "cpu"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engines_tensor(layout):
    tensor = poisoned_cache(6, 2, 64, 16, layout, row_padding=16)
    cache = tq4.PagedCache.from_tensor(tensor, 2, 64)
    assert cache.tensor is tensor and cache.layout == layout
    assert (cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim) == (6, 16, 2, 64)
    assert cache.nbytes == 6 * 16 * 2 * 72 and cache.num_free_blocks == 6
    with pytest.raises(TypeError, match="tensor: expected dtype uint8"):
        tq4.PagedCache.from_tensor(tensor.to(torch.int8), 2, 64)
    with pytest.raises(ValueError, match="^cache: expected"):
        tq4.PagedCache.from_tensor(tensor, 4, 64)


def test_allocation():
    cache = tq4.PagedCache(5, 1, 64)
    first = cache.allocate(2)
    assert first == [0, 1] and cache.allocate(0) == []
    second = cache.allocate(2)
    assert not set(first) & set(second) and cache.num_free_blocks == 1
    with pytest.raises(MemoryError, match="the cache is full: 2 blocks wanted, 1 of 5 free"):
        cache.allocate(2)
    assert cache.num_free_blocks == 1
    cache.free(first)
    assert sorted(cache.allocate(3)) == sorted([*first, 4])
    with pytest.raises(ValueError, match="count: expected at least 0"):
        cache.allocate(-1)


@pytest.mark.parametrize("bad", ([0, 0], [4], [7], [-1], [0, 4]))
def test_bad_frees_change_nothing(bad):
    cache = tq4.PagedCache(5, 1, 64)
    cache.allocate(2)
    with pytest.raises(ValueError, match="blocks: expected distinct allocated blocks"):
        cache.free(bad)
    assert cache.num_free_blocks == 3
    cache.free([0, 1])
    assert cache.num_free_blocks == 5


def test_index_tensors():
    cache = tq4.PagedCache(5, 1, 64)
    slots = cache.slots([3, 1], 14, 20)
    assert slots.dtype == torch.int64 and slots.tolist() == [62, 63, 16, 17, 18, 19]
    assert cache.slots([3, 1], 5, 5).tolist() == []
    with pytest.raises(ValueError, match="stop: expected 0 <= start <= stop <= 32"):
        cache.slots([3, 1], 0, 33)
    table = cache.block_table([[3, 1], [], [2]])
    assert table.dtype == torch.int32 and table.tolist() == [[3, 1], [-1, -1], [2, -1]]
    assert cache.block_table([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks: expected at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected at least 1"),
        ({"head_dim": 80}, "head_dim: expected one of"),
        ({"block_size": 24}, "block_size: expected a positive multiple of 16, got 24"),
        ({"block_size": 0}, "block_size: expected a positive multiple of 16, got 0"),
        ({"layout": "diagonal"}, "layout: expected one of"),
    ],
)
def test_bad_caches(arguments, message):
    with pytest.raises(ValueError, match=message):
        tq4.PagedCache(**{"num_blocks": 2, "num_kv_heads": 1, "head_dim": 64, **arguments})


def test_continuing_sequences_reads_what_was_stored():
    quantizer = tq4.Quantizer(64)
    cache = tq4.PagedCache(8, 2, 64, layout=HEAD_MAJOR)
    key = torch.randn(40, 2, 64)
    blocks: list[int] = []
    for start, stop in ((0, 10), (10, 33), (33, 34), (34, 40)):
        while len(blocks) * cache.block_size < stop:
            blocks += cache.allocate(1)
        tq4.store(key[start:stop], key[start:stop], cache, cache.slots(blocks, start, stop), quantizer)
    lens = torch.tensor([40], dtype=torch.int32)
    k, _ = tq4.gather(cache, cache.block_table([blocks]), lens, quantizer, dtype=torch.float32)
    expected = tq4.decompress(*tq4.compress(key, quantizer), quantizer, dtype=torch.float32)
    assert torch.equal(k, expected)
