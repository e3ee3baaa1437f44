"""What is timed: shapes, operation counts, TQ4 inputs, and the check that a call gives the right answer."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import tq4

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class WrongResultError(RuntimeError):
    """A call under test does not compute what it is timed for."""


@dataclass(frozen=True)
class Workload:
    """One attention problem: ``q_lens[i]`` query tokens at the end of ``kv_lens[i]`` keys, causal."""

    op: str
    hq: int
    hkv: int
    d: int
    dtype: str
    page: int
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def batch(self) -> int:
        return len(self.kv_lens)

    @property
    def uniform(self) -> bool:
        return len(set(self.kv_lens)) == 1 and len(set(self.q_lens)) == 1

    @property
    def graph(self) -> bool:
        """Whether it is timed as a replayed CUDA graph: where a launch from Python could be what takes time.

        Serving engines replay decode from graphs for that reason.
        """
        return self.op in ("decode", "step", "store") or sum(self.q_lens) <= 4096

    @property
    def flops(self) -> float:
        """Causal attention: 4 Hq D operations for each visible (query, key) pair, half of the last square."""
        pairs = sum(t * (n - t) + t * t / 2 for t, n in zip(self.q_lens, self.kv_lens, strict=True))
        return 4 * self.hq * self.d * pairs

    def kv_bytes(self, bytes_per_token_head: float) -> float:
        """Bytes of K and V that a decode must read."""
        return sum(self.kv_lens) * self.hkv * bytes_per_token_head

    @property
    def label(self) -> str:
        def text(lens: tuple[int, ...]) -> str:
            return str(lens[0]) if len(set(lens)) == 1 else f"{min(lens)}..{max(lens)}"

        heads = f"{self.hq}/{self.hkv} D{self.d} {self.dtype}"
        return f"{heads} B={self.batch} q={text(self.q_lens)} kv={text(self.kv_lens)}"

    def row(self, impl: str, ms: float, **rate: Any) -> dict[str, Any]:
        """A row of the record."""
        return dict(
            op=self.op,
            impl=impl,
            hq=self.hq,
            hkv=self.hkv,
            d=self.d,
            dtype=self.dtype,
            batch=self.batch,
            q_len=max(self.q_lens),
            kv_len=max(self.kv_lens),
            page=self.page,
            ms=round(ms, 5),
            **rate,
            **({} if self.uniform else {"kv_tokens": sum(self.kv_lens)}),
            **self.extra,
        )


def prefill_workloads(hq: int, hkv: int, d: int, dtype: str, page: int, lengths: list[int]) -> list[Workload]:
    return [Workload("prefill", hq, hkv, d, dtype, page, (n,), (n,)) for n in lengths]


def chunk_workloads(hq: int, hkv: int, d: int, dtype: str, page: int, lengths: list[int]) -> list[Workload]:
    """2048 new tokens (a quarter of a shorter context) at the end of the context."""
    return [Workload("chunk", hq, hkv, d, dtype, page, (min(2048, max(n // 4, 1)),), (n,)) for n in lengths]


def varlen_workloads(hq: int, hkv: int, d: int, dtype: str, page: int, longest: int) -> list[Workload]:
    """16 sequences prefilled in one call, lengths log-uniform from 128 (longest / 8 if that is less)."""
    rng = random.Random(0)
    low = math.log(min(128, max(longest // 8, 1)))
    lens = tuple(round(math.exp(rng.uniform(low, math.log(longest)))) for _ in range(16))
    return [Workload("varlen", hq, hkv, d, dtype, page, lens, lens)]


def mixed_workloads(hq: int, hkv: int, d: int, dtype: str, page: int, longest: int) -> list[Workload]:
    """A step of continuous batching: a chunk as in ``chunk_workloads`` beside 63 sequences that decode a
    token each, with a quarter of its keys."""
    q = (1,) * 63 + (min(2048, max(longest // 4, 1)),)
    kv = (max(longest // 4, 1),) * 63 + (longest,)
    return [Workload("mixed", hq, hkv, d, dtype, page, q, kv)]


def decode_workloads(
    hq: int,
    hkv: int,
    d: int,
    dtype: str,
    page: int,
    sizes: list[tuple[int, int, int]],
    op: str = "decode",
    sweep: bool = False,
) -> list[Workload]:
    """``sizes`` are (batch, kv_len, q_len); rows of a ``sweep`` are for the plot, not for the table."""
    extra = {"sweep": True} if sweep else {}
    return [Workload(op, hq, hkv, d, dtype, page, (t,) * b, (n,) * b, extra) for b, n, t in sizes]


def mixed_decode_workload(hq: int, hkv: int, d: int, dtype: str, page: int, scale: int = 1) -> Workload:
    """One long sequence beside 63 short ones."""
    kv = (100_000 // scale,) + (500 // scale,) * 63
    return Workload("decode", hq, hkv, d, dtype, page, (1,) * 64, kv)


# --------------------------------------------------------------------------------------------- contenders


@dataclass
class Contender:
    """Something that answers a workload.

    call: does the timed work and returns its output; tokens: that output as [sum q_len, Hq, D];
    dense: K and V [kv_len, Hkv, D] of one sequence in the space of q; tolerance: the relative error against
    exact attention over ``dense`` that its own precision explains; read_bytes: bytes of K and V it reads.
    """

    impl: str
    call: Callable[[], Any]
    dense: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    tolerance: float
    read_bytes: float
    tokens: Callable[[Any], torch.Tensor] = lambda out: out


def check(contender: Contender, work: Workload, q: torch.Tensor) -> float:
    """Compare a few query rows of a few heads with exact attention; returns the relative error.

    Raises:
        WrongResultError: the error is above the contender's tolerance, or not a number.
    """
    got = contender.tokens(contender.call())
    if got.shape != q.shape:
        raise WrongResultError(f"output shape {tuple(got.shape)}, expected {tuple(q.shape)}")
    starts = list(itertools.accumulate(work.q_lens, initial=0))
    longest = max(range(work.batch), key=lambda i: work.kv_lens[i])
    group = work.hq // work.hkv
    wrong = total = 0.0
    for seq in sorted({0, longest, work.batch - 1}):
        t, n = work.q_lens[seq], work.kv_lens[seq]
        k, v = contender.dense(seq)
        rows = sorted({0, t // 3, t // 2, max(t - 2, 0), t - 1})
        for head in sorted({0, work.hq // 2, work.hq - 1}):
            keys, values = k[:, head // group].float(), v[:, head // group].float()
            mine = q[[starts[seq] + r for r in rows], head].float()
            scores = mine @ keys.T / math.sqrt(work.d)
            last = torch.tensor([n - t + r for r in rows], device=q.device)
            scores.masked_fill_(torch.arange(n, device=q.device) > last[:, None], -math.inf)
            want = scores.softmax(-1) @ values
            have = got[[starts[seq] + r for r in rows], head].float()
            wrong += (have - want).square().sum().item()
            total += want.square().sum().item()
    error = math.sqrt(wrong / total)
    if not error <= contender.tolerance:
        raise WrongResultError(f"relative error {error:.3g}, allowed {contender.tolerance:g}")
    return error


# ------------------------------------------------------------------------------------------------- inputs

# Relative error against exact attention over the same bytes: the contract's 5e-3 for INT8 on Gaussian data,
# doubled because the check looks at a few rows only, and the rounding of a bf16 output.
_TQ4_TOLERANCE = 2 * 5e-3 + 2**-8


def make_queries(work: Workload, device: str) -> torch.Tensor:
    gen = torch.Generator(device).manual_seed(1)
    return torch.randn(sum(work.q_lens), work.hq, work.d, generator=gen, device=device).to(DTYPES[work.dtype])


def page_table(work: Workload, device: str) -> tuple[torch.Tensor, list[list[int]], int]:
    """Shuffled pages: (block_table int32 [B, max], the same as lists, number of blocks)."""
    counts = [-(-n // work.page) for n in work.kv_lens]
    total = sum(counts)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(2)).tolist()
    starts = list(itertools.accumulate(counts, initial=0))
    lists = [order[a:b] for a, b in itertools.pairwise(starts)]
    table = torch.zeros(work.batch, max(counts), dtype=torch.int32)
    for row, blocks in zip(table, lists, strict=True):
        row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return table.to(device), lists, total


class Tq4Inputs:
    """A TQ4 cache filled with stored Gaussian keys and values, and what the attention operations take."""

    def __init__(self, work: Workload, device: str, layout: str) -> None:
        self.work = work
        self.quantizer = tq4.Quantizer(work.d, device=device)
        self.block_table, self._blocks, total = page_table(work, device)
        self.cache = tq4.PagedCache(
            total, work.hkv, work.d, block_size=work.page, layout=layout, device=device
        )
        i32 = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        self.seq_lens = i32(work.kv_lens)
        self.query_start_loc = i32(list(itertools.accumulate(work.q_lens, initial=0)))
        gen = torch.Generator(device).manual_seed(3)
        for slots in torch.arange(total * work.page, device=device).split(1 << 15):
            k, v = torch.randn(2, len(slots), work.hkv, work.d, generator=gen, device=device).half()
            tq4.store(k, v, self.cache, slots, self.quantizer)

    @functools.lru_cache(maxsize=3)  # noqa: B019 (an Inputs lives as long as one workload)
    def dense(self, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        one = slice(seq, seq + 1)
        return tq4.gather(
            self.cache,
            self.block_table[one],
            self.seq_lens[one],
            self.quantizer,
            dtype=torch.float32,
            total=self.work.kv_lens[seq],
            backend="reference",
        )

    def attention(self, op: str, q: torch.Tensor, backend: str, impl: str, int8: bool = True) -> Contender:
        """The whole operation, rotations included, through the public function."""
        work = self.work
        out = torch.empty_like(q)
        if op == "prefill":

            def call() -> torch.Tensor:
                return tq4.prefill(
                    q,
                    self.cache,
                    self.block_table,
                    self.seq_lens,
                    self.query_start_loc,
                    self.quantizer,
                    max_query_len=max(work.q_lens),
                    out=out,
                    int8=int8,
                    backend=backend,
                )

        else:
            single = max(work.q_lens) == 1

            def call() -> torch.Tensor:
                return tq4.decode(
                    q,
                    self.cache,
                    self.block_table,
                    self.seq_lens,
                    self.quantizer,
                    query_start_loc=None if single else self.query_start_loc,
                    max_query_len=max(work.q_lens),
                    out=out,
                    int8=int8,
                    backend=backend,
                )

        return Contender(impl, call, self.dense, _TQ4_TOLERANCE, work.kv_bytes(work.d + 8))

    def step(self, q: torch.Tensor, backend: str, impl: str) -> Contender:
        """One decode step: store the newest tokens' K and V, then attend."""
        work = self.work
        gen = torch.Generator(q.device).manual_seed(6)
        k, v = torch.randn(2, q.shape[0], work.hkv, work.d, generator=gen, device=q.device).to(q.dtype)
        slots = [
            blocks[at // work.page] * work.page + at % work.page
            for blocks, t, n in zip(self._blocks, work.q_lens, work.kv_lens, strict=True)
            for at in range(n - t, n)
        ]
        slots = torch.tensor(slots, device=q.device)
        contender = self.attention("decode", q, backend, impl)
        decode = contender.call

        def call() -> torch.Tensor:
            tq4.store(k, v, self.cache, slots, self.quantizer, backend=backend)
            return decode()

        contender.call = call
        return contender


class Copies:
    """``times`` copies of tensors of its own each, that read and write ``moved`` bytes together."""

    def __init__(self, moved: int, times: int, device: str) -> None:
        size = max(1, moved // 2)
        self._sources = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(times)]
        self._targets = [torch.empty_like(source) for source in self._sources]

    def one(self) -> None:
        self._targets[0].copy_(self._sources[0])

    def all(self) -> None:
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source)


class StoreInputs:
    """New tokens for ``store`` and a cache with room for them."""

    def __init__(
        self, tokens: int, hkv: int, d: int, dtype: str, page: int, layout: str, device: str
    ) -> None:
        gen = torch.Generator(device).manual_seed(4)
        self.tokens, self.hkv, self.d = tokens, hkv, d
        self.quantizer = tq4.Quantizer(d, device=device)
        self.key, self.value = torch.randn(2, tokens, hkv, d, generator=gen, device=device).to(DTYPES[dtype])
        blocks = -(-tokens // page)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(5)).to(device)
        at = torch.arange(tokens, device=device)
        self.slots = order[at // page] * page + at % page
        self.block_table = order[None].int()
        options = dict(block_size=page, layout=layout, device=device)
        self.cache, self._expected = (tq4.PagedCache(blocks, hkv, d, **options) for _ in range(2))

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written: K and V in, codes and norms out."""
        vectors = self.tokens * self.hkv
        return vectors * (2 * self.d * self.key.element_size() + self.d + 8)

    def call(self, backend: str) -> None:
        tq4.store(self.key, self.value, self.cache, self.slots, self.quantizer, backend=backend)

    def check(self, backend: str, impl: str) -> None:
        """Compare the decoded tokens with those that the reference stores.

        Raises:
            WrongResultError: they differ by more than codes at a boundary explain.
        """
        self.cache.tensor.zero_()
        self.call(backend)
        tq4.store(self.key, self.value, self._expected, self.slots, self.quantizer, backend="reference")
        some = min(self.tokens, 4096)
        lens = torch.tensor([some], dtype=torch.int32, device=self.slots.device)
        got, want = (
            tq4.gather(
                cache,
                self.block_table,
                lens,
                self.quantizer,
                rotate_k=False,
                rotate_v=False,
                dtype=torch.float32,
                total=some,
                backend="reference",
            )
            for cache in (self.cache, self._expected)
        )
        for name, a, b in zip(("key", "value"), got, want, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if not error <= 5e-3:
                raise WrongResultError(f"{impl}: stored {name} differs from the reference by {error:.3g}")
