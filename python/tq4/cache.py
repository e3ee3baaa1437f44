"""The paged cache: one uint8 tensor, its layout, its byte counts and a host-side list of free blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .layout import (
    BLOCK_SIZE_MULTIPLE,
    HEAD_DIMS,
    TOKEN_MAJOR,
    PageView,
    cache_shape,
    layout_of,
    page_view,
    token_bytes,
)

_FP16_BYTES = 2


class PagedCache:
    """A TQ4 cache of ``num_blocks`` pages of ``block_size`` tokens, zero-initialised.

    Args:
        num_blocks: pages.
        num_kv_heads: Hkv.
        head_dim: D, one of 64, 96, 128, 256.
        block_size: tokens a page, a multiple of 16.
        layout: "token_major" (``[num_blocks, block_size, Hkv * (D + 8)]``) or "head_major"
            (``[num_blocks, Hkv, block_size, D + 8]``); see :mod:`tq4.layout`.
        device: of the tensor; default: the CPU.

    Attributes:
        tensor: the uint8 cache tensor, as the ops take it.
        num_blocks, num_kv_heads, head_dim, block_size, layout: as given.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        layout: str = TOKEN_MAJOR,
        device: torch.device | str | int | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        if num_kv_heads < 1:
            raise ValueError(f"num_kv_heads: expected at least 1, got {num_kv_heads}")
        if block_size < 1 or block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block_size: expected a positive multiple of {BLOCK_SIZE_MULTIPLE}, got {block_size}"
            )
        _check_head_dim(head_dim)
        shape = cache_shape(layout, num_blocks, num_kv_heads, head_dim, block_size)
        tensor = torch.zeros(shape, dtype=torch.uint8, device="cpu" if device is None else device)
        self._adopt(tensor, num_kv_heads, head_dim)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, num_kv_heads: int, head_dim: int) -> PagedCache:
        """Wrap a cache tensor that something else (an engine) allocated; nothing is copied.

        Args:
            tensor: uint8, 3-D token-major or 4-D head-major, possibly a strided view with padded rows.
            num_kv_heads: Hkv.
            head_dim: D.

        Raises:
            TypeError: not uint8.
            ValueError: shape or strides do not fit the layout.
        """
        _check_head_dim(head_dim)
        if tensor.dtype != torch.uint8:
            raise TypeError(f"tensor: expected dtype uint8, got {str(tensor.dtype).removeprefix('torch.')}")
        self = object.__new__(cls)
        self._adopt(tensor, num_kv_heads, head_dim)
        return self

    def _adopt(self, tensor: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
        view = page_view(tensor, num_kv_heads, head_dim)
        self.tensor = tensor
        self.layout = layout_of(tensor)
        self.num_blocks = view.num_blocks
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = view.block_size
        self._free = list(range(view.num_blocks - 1, -1, -1))
        self._used = [False] * view.num_blocks

    @property
    def view(self) -> PageView:
        """Where the four fields lie."""
        return page_view(self.tensor, self.num_kv_heads, self.head_dim)

    @property
    def device(self) -> torch.device:
        """Where the tensor lives."""
        return self.tensor.device

    @property
    def num_tokens(self) -> int:
        """Tokens the cache has room for."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of all tokens (without a padded tensor's padding)."""
        return self.num_tokens * token_bytes(self.num_kv_heads, self.head_dim)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes that K and V of as many tokens take in fp16."""
        return self.num_tokens * self.num_kv_heads * self.head_dim * 2 * _FP16_BYTES

    @property
    def num_free_blocks(self) -> int:
        """Blocks that :meth:`allocate` can still hand out."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take blocks from the free list; all or nothing.

        Args:
            count: blocks wanted.

        Returns:
            Block numbers.

        Raises:
            ValueError: a negative count.
            MemoryError: fewer blocks are free; nothing is taken.
        """
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        if count > len(self._free):
            raise MemoryError(
                f"the cache is full: {count} blocks wanted, {len(self._free)} of {self.num_blocks} free"
            )
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._used[block] = True
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; their bytes stay as they are.

        Raises:
            ValueError: a block that is not allocated, or one named twice; nothing is given back.
        """
        numbers = list(blocks)
        for i, block in enumerate(numbers):
            if not 0 <= block < self.num_blocks or not self._used[block] or block in numbers[:i]:
                raise ValueError(f"blocks: expected distinct allocated blocks, got {block}")
        for block in numbers:
            self._used[block] = False
        self._free.extend(reversed(numbers))

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> torch.Tensor:
        """slot_mapping of tokens start .. stop - 1 of a sequence that owns ``blocks``.

        Returns:
            int64 ``[stop - start]`` on the cache's device.

        Raises:
            ValueError: the blocks have no room for token ``stop - 1``.
        """
        if not 0 <= start <= stop <= len(blocks) * self.block_size:
            raise ValueError(
                f"stop: expected 0 <= start <= stop <= {len(blocks) * self.block_size} ({len(blocks)} "
                f"blocks of {self.block_size}), got {start} .. {stop}"
            )
        tokens = torch.arange(start, stop, device="cpu")
        table = torch.tensor(list(blocks), dtype=torch.int64, device="cpu")
        slots = table[tokens // self.block_size] * self.block_size + tokens % self.block_size
        return slots.to(self.device)

    def block_table(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """block_table of some sequences' blocks.

        Returns:
            int32 ``[len(sequences), longest]`` on the cache's device; unused entries are -1 and never read.
        """
        longest = max((len(blocks) for blocks in sequences), default=0)
        rows = [[*blocks, *[-1] * (longest - len(blocks))] for blocks in sequences]
        table = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(len(rows), longest)
        return table.to(self.device)

    def __repr__(self) -> str:
        return (
            f"PagedCache(num_blocks={self.num_blocks}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, block_size={self.block_size}, layout={self.layout!r}, "
            f"device={self.device})"
        )


def _check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
