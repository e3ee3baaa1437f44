"""Which pages hold which sequence: the bookkeeping that all TQ4 layers of a model share.

One :class:`Paging` serves every layer, because all layers hold the same tokens: a page number means the same
tokens in each layer's own pool.  The host knows the number of columns (tokens including padding), hence how
many pages each sequence may need, without asking the device; the exact number of tokens of each sequence,
which padding makes smaller, lives on the device only.  A decoding step therefore never waits for the GPU.

Padding never enters the pages: a token whose attention mask is 0 gets slot -1, and the next token takes its
place.  A sequence with left padding is thus stored as if it had been alone.

Beams share the pages that both have filled; the page a sequence will write next is always its own, and is
copied when a reordering or a crop would make two sequences share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Tokens for which pages are set aside ahead of need, so that the block table is sent to the device rarely.
RESERVE_TOKENS = 256
#: Growth of the pools when the pages run out; each growth copies what is stored once.
GROWTH = 1.5


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward call go, and what their queries see; on one device.

    Attributes:
        block_table: int32 ``[B, pages]``.
        seq_lens: int32 ``[B]``, tokens of each sequence including this call's.
        slots: int64 ``[B * T]``, slot of each new token, -1 for padding.
        query_start_loc: int32 ``[B + 1]``: T queries for each sequence.
        order: int64 ``[B * T]`` or None: the rows of q in the order in which each sequence's padding comes
            first, where the mask has other holes than left padding.
        first: these are the first tokens of the sequences.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    order: torch.Tensor | None
    first: bool


@dataclass
class _OnDevice:
    """What one device knows: lengths, the last mask, the block table, the current step."""

    lens: torch.Tensor | None = None  # int32 [B]; None: every column is a token
    mask: torch.Tensor | None = None  # bool [B, columns], the mask that lens was made with
    table: torch.Tensor | None = None
    table_version: int = -1
    step: Step | None = None
    step_number: int = -1
    flag: torch.Tensor | None = None  # bool [], on the host (pinned): a mask changed its mind about the past


class Paging:
    """Pages, lengths and slots of a batch of sequences.

    Args:
        page_size: tokens a page.
        max_length: most tokens of a sequence (padding included), whose pages are then set aside at once;
            None: the pools grow.

    Attributes:
        length: columns so far, padding included.
        num_blocks: pages that each layer's pool must have.
        table: int32 ``[B, pages]`` on the host.
    """

    def __init__(self, page_size: int, max_length: int | None) -> None:
        self.page_size = page_size
        self.max_length = max_length
        self.num_blocks = 0
        self.reset()

    def reset(self) -> None:
        """Forget every sequence; the pages stay."""
        self.length = 0
        self.table: torch.Tensor | None = None
        self._shared = False
        self._free = torch.arange(self.num_blocks, dtype=torch.int32, device="cpu")
        self._table_version = 0
        self._step_number = 0
        self._query_len = 0
        self._devices: dict[torch.device, _OnDevice] = {}

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first tokens."""
        return 0 if self.table is None else self.table.shape[0]

    # ---- Adding tokens.

    def advance(self, batch: int, tokens: int) -> None:
        """Make room for ``tokens`` more columns of each of ``batch`` sequences (host only).

        Raises:
            ValueError: another batch size than before, or more than max_length tokens.
        """
        if self.table is None:
            self.table = torch.empty(batch, 0, dtype=torch.int32, device="cpu")
        elif batch != self.batch:
            raise ValueError(
                f"past_key_values: the TQ4Cache holds {self.batch} sequences, got a batch of {batch}; "
                "reset() "
                "it, or use batch_repeat_interleave / batch_select_indices"
            )
        length = self.length + tokens
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"max_length: the TQ4Cache holds up to {self.max_length} tokens, got {length}")
        for state in self._devices.values():
            _raise_if_flagged(state)
        self.length = length
        self._query_len = tokens
        self._step_number += 1
        pages = -(-length // self.page_size)
        if pages > self.table.shape[1]:
            wanted = length + RESERVE_TOKENS if self.max_length is None else self.max_length
            pages = -(-wanted // self.page_size)
            new = self._take(batch * (pages - self.table.shape[1])).view(batch, -1)
            self._set_table(torch.cat([self.table, new], 1))

    def step(self, mask: torch.Tensor | None, device: torch.device) -> Step:
        """The step that :meth:`advance` began, as tensors of a device; computed once for all its layers.

        Args:
            mask: bool ``[B, length]``, which columns are tokens; None: all.
            device: of the result (and of the mask).

        Raises:
            ValueError: a mask of another shape, or one that contradicts what is stored.
        """
        state = self._devices.setdefault(device, _OnDevice())
        if state.step is not None and state.step_number == self._step_number:
            return state.step
        table = self._device_table(state, device)
        tokens = self._query_len
        past = self.length - tokens
        order = None
        if mask is None:
            positions = torch.arange(past, self.length, device=device)
            slots = table.index_select(1, positions // self.page_size).long() * self.page_size
            slots += positions % self.page_size
            seq_lens = torch.full((self.batch,), self.length, dtype=torch.int32, device=device)
            if state.lens is not None:
                self._flag(state, (state.lens != past).any())
            state.lens = state.mask = None
        else:
            if mask.dim() != 2 or tuple(mask.shape) != (self.batch, self.length):
                raise ValueError(
                    f"attention_mask: expected shape [{self.batch}, {self.length}] (all tokens of the cache "
                    "and of "
                    f"this call), got {list(mask.shape)}"
                )
            before = state.lens
            if before is None:
                before = torch.full((self.batch,), past, dtype=torch.int32, device=device)
            valid = mask[:, past:]
            if tokens == 1:
                seq_lens = before + valid[:, 0]
                positions = before[:, None]
            else:
                counted = valid.cumsum(1, dtype=torch.int32)
                seq_lens = before + counted[:, -1]
                positions = (before[:, None] + counted - 1).clamp_(min=0)
                order = self._order(valid)
            pages = table.gather(1, (positions // self.page_size).long())
            slots = pages.long() * self.page_size + positions % self.page_size
            slots = torch.where(valid, slots, -1)
            self._flag(state, (mask.sum(1, dtype=torch.int32) != seq_lens).any())
            state.lens, state.mask = seq_lens, mask
        starts = torch.arange(0, (self.batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
        state.step = Step(table, seq_lens, slots.flatten(), starts, order, past == 0)
        state.step_number = self._step_number
        return state.step

    @staticmethod
    def _order(valid: torch.Tensor) -> torch.Tensor | None:
        """Rows of q such that each sequence's padding precedes its tokens; None where it does already.

        Query t of T sits at position L - T + t, so the tokens must be the last of the T.  Asks the device: a
        padded prefill waits for it once.
        """
        if bool((valid[:, 1:] >= valid[:, :-1]).all()):
            return None
        batch, tokens = valid.shape
        order = valid.byte().argsort(dim=1, stable=True)
        order += torch.arange(0, batch * tokens, tokens, device=valid.device)[:, None]
        return order.flatten()

    @staticmethod
    def _flag(state: _OnDevice, wrong: torch.Tensor) -> None:
        """Note, without waiting, whether a mask contradicts the masks under which tokens were stored.

        On the CPU a contradiction raises at once, on a GPU at the next step or the one after.
        """
        if wrong.device.type == "cpu":
            state.flag = wrong
            _raise_if_flagged(state)
            return
        if state.flag is None:
            state.flag = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=wrong.is_cuda)
        _raise_if_flagged(state)
        state.flag.copy_(wrong, non_blocking=True)

    # ---- Rearranging sequences.

    def crop(self, length: int) -> list[tuple[int, int]]:
        """Keep the first ``length`` columns.

        Returns:
            Pages to copy in every pool, as (from, to).
        """
        removed = self.length - length
        for state in self._devices.values():
            if state.mask is not None:
                state.lens = state.lens - state.mask[:, length:].sum(1, dtype=torch.int32)
                state.mask = state.mask[:, :length]
            state.step = None
        self.length = length
        if removed and self._shared:
            return self._own_next_pages(self._lengths())
        return []

    def reorder(self, indices: torch.Tensor) -> list[tuple[int, int]]:
        """New sequence i is old sequence ``indices[i]``; any number of them.

        Waits for the device once, to learn the indices (and the lengths, where there is padding).

        Returns:
            Pages to copy in every pool, as (from, to).
        """
        if self.table is None:
            return []
        tracked = next((state.lens for state in self._devices.values() if state.lens is not None), None)
        if tracked is None:
            rows = indices.tolist()
            lengths = [self.length] * len(rows)
        else:
            both = torch.cat([indices.to(tracked.device, torch.int64), tracked.long()]).tolist()
            rows, old = both[: indices.numel()], both[indices.numel() :]
            lengths = [old[row] for row in rows]
        if rows == list(range(self.batch)):
            return []
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")
        for device, state in self._devices.items():
            if state.lens is not None:
                there = index.to(device, non_blocking=True)
                state.lens = state.lens.index_select(0, there)
                state.mask = state.mask.index_select(0, there)
            state.step = None
        self._set_table(self.table.index_select(0, index))
        self._find_free()
        return self._own_next_pages(lengths)

    def _lengths(self) -> list[int]:
        for state in self._devices.values():
            if state.lens is not None:
                return state.lens.tolist()
        return [self.length] * self.batch

    def _own_next_pages(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Give every sequence pages of its own from the one it writes next; the filled ones stay shared."""
        table = self.table.clone()
        uses = torch.bincount(table.flatten(), minlength=self.num_blocks)
        column = torch.arange(table.shape[1], device="cpu")
        next_page = torch.tensor(lengths, device="cpu") // self.page_size
        writes = column >= next_page[:, None]
        conflicts = (writes & (uses[table.long()] > 1)).nonzero().tolist()
        new = iter(self._take(len(conflicts)).tolist())
        uses = uses.tolist() + [0] * (self.num_blocks - uses.numel())
        copies = []
        for row, page in conflicts:
            source = int(table[row, page])
            if uses[source] == 1:
                continue  # the others have left it to this one
            uses[source] -= 1
            target = next(new)
            if page == lengths[row] // self.page_size and lengths[row] % self.page_size:
                copies.append((source, target))
            table[row, page] = target
        if conflicts:
            self._set_table(table)
        self._find_free()
        return copies

    # ---- Pages.

    def _take(self, count: int) -> torch.Tensor:
        """Free pages; more of them are invented when too few are left (the pools follow)."""
        missing = count - self._free.numel()
        if missing > 0:
            total = self.num_blocks + missing
            if self.max_length is None:
                total = max(total, int(self.num_blocks * GROWTH))
            more = torch.arange(self.num_blocks, total, dtype=torch.int32, device="cpu")
            self._free = torch.cat([self._free, more])
            self.num_blocks = total
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _find_free(self) -> None:
        uses = torch.bincount(self.table.flatten(), minlength=self.num_blocks)
        self._free = (uses == 0).nonzero()[:, 0].int()
        self._shared = bool((uses > 1).any())

    def _set_table(self, table: torch.Tensor) -> None:
        self.table = table.contiguous()
        self._table_version += 1

    def _device_table(self, state: _OnDevice, device: torch.device) -> torch.Tensor:
        if state.table is None or state.table_version != self._table_version:
            host = self.table.pin_memory() if device.type == "cuda" else self.table
            state.table = host.to(device, non_blocking=True)
            state.table_version = self._table_version
        return state.table


def _raise_if_flagged(state: _OnDevice) -> None:
    if state.flag is not None and bool(state.flag):
        raise ValueError(
            "attention_mask: the mask of tokens that are in the TQ4Cache already has changed (or is gone); "
            "padding "
            "is not stored, so their mask must stay what it was"
        )
