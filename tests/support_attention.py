"""Attention problems over a poisoned TQ4 cache, and their answers computed without tq4's operations.

A ``Case`` says what is asked (shapes, lengths, masks, layout); ``build`` makes the tensors; ``answer`` solves
it with plain torch on dense keys and values, exactly or by the INT8 recipe; ``run`` asks one backend.  Two
things come from tq4: the codebook and rotations of a ``Quantizer`` (they are inputs of every operation) and
``layout.page_view`` (the byte layout has one owner).  Encoding, decoding, masks, softmax and the recipe are
written again here, so that a mistake in the package cannot cancel itself.

Every byte of a cache that no live token owns is 0xFF: its codes decode to the largest centroid and its norms
are NaN, so a single one that is used shows.  Outputs are filled with NaN before a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Sequence

import pytest
import torch

import tq4
from support import (
    BOUNDARY_SLACK,
    EXACT_BOUND,
    LSE_TOLERANCE,
    NORM_RELATIVE,
    OUTPUT_ROUNDING,
    TOLERANCES,
    relative_error,
)
from tq4 import dispatch, layout

POISON = 0xFF
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_NAMES = {FLOAT16: "f16", BFLOAT16: "bf16", FLOAT32: "f32"}


# ---------------------------------------------------------------------------------------------- targets


@dataclasses.dataclass(frozen=True)
class Target:
    """One backend on one kind of device.

    ``unpack`` asks the CUDA extension for one of its prefill kernels, whatever the shape; None leaves the
    choice alone.  conftest.py makes it for the length of a test with a parameter ``target``, other tests and
    scripts make it with :meth:`chosen`.
    """

    backend: str
    device: str
    unpack: str | None = None

    @property
    def name(self) -> str:
        """What TQ4_TEST_BACKENDS calls it: the backend, and the choice of a kernel if there is one."""
        return self.backend if self.unpack is None else f"{self.backend}-{self.unpack.replace('_', '-')}"

    def __str__(self) -> str:
        return self.name if self.device == "cuda" else f"{self.name}@{self.device}"

    @contextlib.contextmanager
    def chosen(self):
        """The target's prefill kernel for a block, for sequences of few query tokens too."""
        with unpacking(self.unpack), short_queries(None if self.unpack is None else "prefill"):
            yield

    def require(self) -> None:
        """Skip the test when this machine cannot run the target; fail when TQ4_TEST_BACKENDS names it."""
        wanted = [b for b in os.environ.get("TQ4_TEST_BACKENDS", "").split(",") if b]
        if wanted and self.name not in wanted:
            pytest.skip(f"TQ4_TEST_BACKENDS does not name {self.name}")
        problem = None
        if self.device == "cuda" and not torch.cuda.is_available():
            problem = "no CUDA device"
        elif self.device == "cpu" and self.backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
            problem = "Triton runs on CPU tensors only with TRITON_INTERPRET=1"
        else:
            usable, why = dispatch.availability(self.backend, torch.device(self.device))
            if not usable:
                problem = f"backend {self.backend}: {why}"
        if problem is None:
            return
        if wanted:
            pytest.fail(f"{problem}, but TQ4_TEST_BACKENDS asks for it", pytrace=False)
        pytest.skip(problem)


CPU_TARGETS = (Target("reference", "cpu"), Target("triton", "cpu"))
# The CUDA kernels are compiled ahead and take every case; Triton compiles a kernel for most cases and the
# reference is slow, so those two take the short list.
CUDA_TARGETS = (Target("cuda", "cuda"), Target("cuda-sm80", "cuda"))
SHORT_LIST_TARGETS = (Target("triton", "cuda"), Target("reference", "cuda"))
GPU_TARGETS = CUDA_TARGETS + SHORT_LIST_TARGETS
# Small problems would never reach the kernels that read unpacked tiles, nor large ones the others.  Without
# tiles there is one kernel for both backends.
UNPACK_TARGETS = (
    Target("cuda", "cuda", "ahead"),
    Target("cuda-sm80", "cuda", "ahead"),
    Target("cuda-sm80", "cuda", "in_kernel"),
)


@contextlib.contextmanager
def _choosing(variable: str, name: str | None):
    """An environment variable for a block; None leaves it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            patch.setenv(variable, name)
        yield


unpacking = functools.partial(_choosing, "TQ4_PREFILL_UNPACK")
short_queries = functools.partial(_choosing, "TQ4_PREFILL_SHORT")


def refuses_choice(variable: str, name: str, expected: str, *readers: Callable[[], object]) -> None:
    """An unknown choice of prefill kernels is an error of all that read it, with the names that there are."""
    with _choosing(variable, name):
        for read in readers:
            with pytest.raises(ValueError, match=f"{variable}: expected {expected}") as caught:
                read()
            assert repr(name) in str(caught.value)


def on_targets(*, cpu: bool = True, gpu: bool = True, prefill: bool = False):
    """Parametrise a test by ``target`` alone; ``prefill``: also by where prefill unpacks."""
    params = [pytest.param(t, id=str(t)) for t in CPU_TARGETS if cpu]
    gpu_targets = GPU_TARGETS + (UNPACK_TARGETS if prefill else ())
    params += [pytest.param(t, id=str(t), marks=pytest.mark.gpu) for t in gpu_targets if gpu]
    return pytest.mark.parametrize("target", params)


def on_cases(cpu: Sequence = (), gpu: Sequence = (), gpu_all: Sequence = (), *, prefill: bool = False):
    """Parametrise a test by (case, target), case by case, so that cached answers serve all targets.

    ``cpu``: every CPU target.  ``gpu``: every GPU target.  ``gpu_all``: the CUDA backends only.  ``prefill``:
    INT8 cases of both also by where prefill unpacks; fp16 mode has one kernel.
    """
    params = []
    for cases, targets, marks in (
        (cpu, CPU_TARGETS, ()),
        (gpu, GPU_TARGETS, (pytest.mark.gpu,)),
        (gpu_all, CUDA_TARGETS, (pytest.mark.gpu,)),
    ):
        for case in cases:
            asked = UNPACK_TARGETS if prefill and targets is not CPU_TARGETS and case.int8 else ()
            params += [pytest.param(case, t, id=f"{case}-{t}", marks=marks) for t in (*targets, *asked)]
    return pytest.mark.parametrize("case,target", params)


def pairwise(seed: int = 0, **axes: Sequence) -> list[dict]:
    """Few rows in which every pair of values of every two axes occurs (greedy, deterministic)."""
    rng = random.Random(seed)
    names = sorted(axes)
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    left = sorted(pairs, key=repr)
    rng.shuffle(left)
    uncovered = dict.fromkeys(left)
    rows = []
    while uncovered:
        (a, x), (b, y) = next(iter(uncovered))
        best, best_gain = None, -1
        for _ in range(40):
            row = {n: rng.choice(axes[n]) for n in names}
            row[a], row[b] = x, y
            gain = sum(p in uncovered for p in itertools.combinations([(n, row[n]) for n in names], 2))
            if gain > best_gain:
                best, best_gain = row, gain
        for p in itertools.combinations([(n, best[n]) for n in names], 2):
            uncovered.pop(p, None)
        rows.append(best)
    return rows


# ------------------------------------------------------------------------------------------------ cases


# Room of a wide block table: more than the kernels for short contexts take (kClusterMostKeys of
# csrc/device/decode_plan.h; test_host_maps.py compares the two).
WIDE_TABLE_TOKENS = 65536


@dataclasses.dataclass(frozen=True)
class Case:
    """What one attention call is asked.  Lengths are per sequence; a query may be longer than its keys."""

    head_dim: int = 64
    kv_heads: int = 2
    group: int = 2
    dtype: torch.dtype = FLOAT16
    page: int = 16
    layout: str = "token_major"
    seq_lens: tuple[int, ...] = (33,)
    query_lens: tuple[int, ...] = (33,)
    rotation: str | None = "hadamard"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    sm_scale: float | None = None
    int8: bool = True
    data: str = "gaussian"  # "outlier": every 37th query row x20, channel 5 of q x10; "real"
    row_padding: int = 0  # bytes after a token's row (token-major only)
    interleaved: bool = (
        False  # the cache is every third block of a larger tensor, as with blocks before layers
    )
    strided: bool = False  # q and out are slices of wider buffers
    padding_rows: int = 0  # rows of q past query_start_loc[-1]
    wide_table: bool = False  # block_table has room for far longer sequences (decode plans for those)
    norm_correction: bool = False
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            f"d{self.head_dim}",
            f"h{self.kv_heads * self.group}x{self.kv_heads}",
            DTYPE_NAMES[self.dtype],
        ]
        parts += [
            f"p{self.page}",
            self.layout.split("_")[0],
            "int8" if self.int8 else "fp16",
            str(self.rotation),
        ]
        parts += [f"kv{_lengths(self.seq_lens)}", f"q{_lengths(self.query_lens)}"]
        parts += [] if self.causal else ["full"]
        parts += [f"w{self.window[0]}.{self.window[1]}"] if self.window != (-1, -1) else []
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        parts += [
            n
            for n in ("sinks", "interleaved", "strided", "wide_table", "norm_correction")
            if getattr(self, n)
        ]
        parts += [f"pad{self.row_padding}"] if self.row_padding else []
        parts += [f"tail{self.padding_rows}"] if self.padding_rows else []
        parts += [f"scale{self.sm_scale:g}"] if self.sm_scale else []
        parts += [self.data] if self.data != "gaussian" else []
        parts += [f"s{self.seed}"] if self.seed else []
        return "-".join(parts)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


def _lengths(lens: tuple[int, ...]) -> str:
    text = ".".join(map(str, lens[:6]))
    return text if len(lens) <= 6 else f"{text}..x{len(lens)}"


@dataclasses.dataclass
class Problem:
    """Tensors of one case.  ``k_index``/``k_norm`` (and v) are the live tokens, dense, in sequence order."""

    case: Case
    quantizer: tq4.Quantizer
    cache: torch.Tensor  # uint8, 3-D token-major or 4-D head-major
    block_table: torch.Tensor  # int32 [B, max_blocks]
    seq_lens: torch.Tensor  # int32 [B]
    query_start_loc: torch.Tensor  # int32 [B + 1]
    q: torch.Tensor  # [T + padding_rows, Hq, D]
    sinks: torch.Tensor | None  # fp32 [Hq]
    k_index: torch.Tensor  # uint8 [sum L, Hkv, D]
    k_norm: torch.Tensor  # fp32 [sum L, Hkv]
    v_index: torch.Tensor
    v_norm: torch.Tensor
    slots: torch.Tensor  # int64 [sum L]: where the live tokens lie

    @property
    def num_tokens(self) -> int:
        return sum(self.case.query_lens)

    def to(self, device: str) -> Problem:
        """The same problem on another device (strided views keep their strides)."""
        moved = {
            f.name: _move(getattr(self, f.name), device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, quantizer=self.quantizer.to(device), **moved)


def _move(t: torch.Tensor, device: str) -> torch.Tensor:
    flat = torch.empty(0, dtype=t.dtype, device=device).set_(t.untyped_storage().to(device=device))
    return flat.as_strided(t.shape, t.stride(), t.storage_offset())


# ------------------------------------------------------------------------------- encoding and the cache


def encode(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    norm_correction: bool = False,
    dtype: torch.dtype = FLOAT32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 1 to 5 of the format for x [..., D]: (index uint8 [..., D], norm [...], y [..., D])."""
    x = x.to(dtype)
    norm = (x * x).sum(-1).sqrt()
    y = x / (norm + 1e-10).unsqueeze(-1)
    if rotation is not None:
        y = y @ rotation.to(dtype).T
    index = torch.zeros_like(y, dtype=torch.uint8)
    for b in boundaries.to(dtype):
        index += y > b
    if norm_correction:
        norm = norm / centroids.to(dtype)[index.long()].norm(dim=-1)
    return index, norm, y


def decode(index: torch.Tensor, norm: torch.Tensor, centroids: torch.Tensor, dtype=FLOAT32) -> torch.Tensor:
    """Codes [..., D] and norms [...] back to vectors of the rotated space."""
    return centroids.to(dtype)[index.long()] * norm.to(dtype).unsqueeze(-1)


def pack(index: torch.Tensor) -> torch.Tensor:
    """[..., D] codes to [..., D/2] bytes: the even dimension in the high nibble."""
    return (index[..., 0::2] << 4) | index[..., 1::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed >> 4, packed & 15), -1).flatten(-2)


def new_cache(case: Case, num_blocks: int, device: str = "cpu") -> torch.Tensor:
    """A cache of a case's layout whose every byte is poison, the bytes between its rows and blocks too."""
    token_bytes = case.head_dim + 8
    if case.layout == layout.HEAD_MAJOR:
        shape = (num_blocks, case.kv_heads, case.page, token_bytes)
    else:
        shape = (num_blocks, case.page, case.kv_heads * token_bytes + case.row_padding)
    if not case.interleaved:
        return torch.full(shape, POISON, dtype=torch.uint8, device=device)
    return torch.full((shape[0], 3, *shape[1:]), POISON, dtype=torch.uint8, device=device)[:, 1]


def storage(t: torch.Tensor) -> torch.Tensor:
    """All bytes behind a tensor, those that a view leaves out included."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def cache_fields(cache: torch.Tensor, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Writable views of the four fields: codes [blocks, page, Hkv, D/2], norms [blocks, page, Hkv, 4]."""
    view = layout.page_view(cache, kv_heads, head_dim)
    fields = {}
    for name in ("k_codes", "v_codes", "k_norms", "v_norms"):
        codes = name.endswith("codes")
        stride = (
            view.block_stride,
            view.code_token_stride if codes else view.norm_token_stride,
            view.code_head_stride if codes else view.norm_head_stride,
            1,
        )
        size = (view.num_blocks, view.block_size, kv_heads, head_dim // 2 if codes else 4)
        fields[name] = cache.as_strided(size, stride, cache.storage_offset() + getattr(view, name))
    return fields


def _norm_bytes(norm: torch.Tensor) -> torch.Tensor:
    return norm.to(FLOAT32).contiguous().view(torch.uint8).view(*norm.shape, 4)


def write_tokens(cache, slots, k_index, k_norm, v_index, v_norm) -> None:
    """Put encoded tokens [N, Hkv, ...] into their slots."""
    kv_heads, head_dim = k_index.shape[1:]
    page = layout.page_view(cache, kv_heads, head_dim).block_size
    fields = cache_fields(cache, kv_heads, head_dim)
    block, offset = slots // page, slots % page
    for name, value in (
        ("k_codes", pack(k_index)),
        ("k_norms", _norm_bytes(k_norm)),
        ("v_codes", pack(v_index)),
        ("v_norms", _norm_bytes(v_norm)),
    ):
        fields[name][block, offset] = value


def read_tokens(cache, slots, kv_heads: int, head_dim: int):
    """(k_index, k_norm, v_index, v_norm) of the given slots, out of the cache's bytes."""
    page = layout.page_view(cache, kv_heads, head_dim).block_size
    fields = cache_fields(cache, kv_heads, head_dim)
    block, offset = slots // page, slots % page
    got = []
    for codes, norms in (("k_codes", "k_norms"), ("v_codes", "v_norms")):
        got.append(unpack(fields[codes][block, offset]))
        got.append(fields[norms][block, offset].contiguous().view(FLOAT32).squeeze(-1))
    return tuple(got)


def paged_slots(
    seq_lens: Sequence[int], page: int, block_ids: Sequence[int]
) -> tuple[list[list[int]], torch.Tensor]:
    """Hand the blocks out in order: (blocks of each sequence, slot of each token in sequence order)."""
    blocks, slots, at = [], [], 0
    for length in seq_lens:
        count = -(-length // page)
        mine = torch.tensor(block_ids[at : at + count], dtype=torch.int64)
        at += count
        token = torch.arange(length)
        slots.append(mine[token // page] * page + token % page if count else token)
        blocks.append(mine.tolist())
    return blocks, torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)


@functools.lru_cache(maxsize=32)
def quantizer(
    head_dim: int, rotation: str | None, device: str, norm_correction: bool = False
) -> tq4.Quantizer:
    """``"hadamard_matrix"``: as ``"hadamard"``, but the ops get the matrix, not its signs."""
    kind = "hadamard" if rotation == "hadamard_matrix" else rotation
    quant = tq4.Quantizer(head_dim, rotation=kind, device=device, norm_correction=norm_correction)
    if kind != rotation:
        quant.k_signs = quant.v_signs = None
    return quant


def build(
    case: Case,
    device: str = "cpu",
    *,
    spare_blocks: int = 3,
    block_ids: Sequence[int] | None = None,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    wild_table: bool = False,
    quant: tq4.Quantizer | None = None,
    cache: torch.Tensor | None = None,
) -> Problem:
    """Tensors for a case: pages shuffled, spare pages and tails poisoned, block_table padded with garbage.

    The garbage names a poisoned page; with ``wild_table`` it lies outside the cache, so that following it is
    a fault.  ``block_ids`` are handed out in order, of ``cache`` if that is given.  ``qkv`` gives q
    [sum T, Hq, D] and k, v [sum L, Hkv, D] instead of random ones.
    """
    gen = torch.Generator(device).manual_seed(1000 + case.seed)
    order = random.Random(case.seed)
    d, hkv, hq = case.head_dim, case.kv_heads, case.kv_heads * case.group
    total_q, total_k = sum(case.query_lens), sum(case.seq_lens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    if qkv is None:
        q, k, v = normal(total_q, hq, d), normal(total_k, hkv, d), normal(total_k, hkv, d)
        if case.data == "outlier":
            q[::37] *= 20
            q[:, :, 5] *= 10
    else:
        q, k, v = (t.to(device=device, dtype=FLOAT32) for t in qkv)

    needed = sum(-(-n // case.page) for n in case.seq_lens)
    num_blocks = needed + spare_blocks if cache is None else cache.shape[0]
    if block_ids is None:
        block_ids = order.sample(range(num_blocks), num_blocks)
    spare = block_ids[needed]
    blocks, slots = paged_slots(case.seq_lens, case.page, block_ids)
    slots = slots.to(device)

    quant = quant or quantizer(d, case.rotation, device, case.norm_correction)
    ki, kn, _ = encode(k, quant.k_rotation, quant.k_centroids, quant.k_boundaries, case.norm_correction)
    vi, vn, _ = encode(v, quant.v_rotation, quant.v_centroids, quant.v_boundaries, case.norm_correction)
    cache = new_cache(case, num_blocks, device) if cache is None else cache
    write_tokens(cache, slots, ki, kn, vi, vn)

    width = max((len(b) for b in blocks), default=0) + 2
    width = max(width, WIDE_TABLE_TOKENS // case.page) if case.wide_table else width
    garbage = [2**31 - 1, -(2**31), -1, num_blocks] if wild_table else [spare]
    table = [b + [order.choice(garbage) for _ in range(width - len(b))] for b in blocks]

    rows = total_q + case.padding_rows
    q_all = torch.full((rows, hq, d), math.nan, device=device, dtype=case.dtype)
    q_all[:total_q] = q.to(case.dtype)
    if case.strided:  # as if sliced out of a fused qkv projection
        wide = torch.full((rows, hq + 2 * hkv, d), math.nan, device=device, dtype=case.dtype)
        wide[:, :hq] = q_all
        q_all = wide[:, :hq]

    starts = list(itertools.accumulate(case.query_lens, initial=0))
    i32 = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    return Problem(
        case=case,
        quantizer=quant,
        cache=cache,
        block_table=i32(table).reshape(len(table), width),
        seq_lens=i32(case.seq_lens),
        query_start_loc=i32(starts),
        q=q_all,
        sinks=normal(hq) if case.sinks else None,
        k_index=ki,
        k_norm=kn,
        v_index=vi,
        v_norm=vn,
        slots=slots,
    )


# ---------------------------------------------------------------------------------------------- answers


def visible(length: int, queries: int, case: Case, device) -> torch.Tensor:
    """Bool [queries, length]: which keys a query may see.  Query t sits at length - queries + t."""
    position = (torch.arange(queries, device=device) + (length - queries))[:, None]
    key = torch.arange(length, device=device)[None, :]
    left, right = case.window
    seen = torch.ones(queries, length, dtype=torch.bool, device=device)
    if case.causal:
        seen &= key <= position
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


MODES = ("exact", "recipe", "residual")
_MAX_SCORES = 1 << 27  # elements of one score matrix


def answer(
    problem: Problem, mode: str = "exact", dtype: torch.dtype = FLOAT32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], lse [Hq, T]) of a problem, computed in ``dtype``.

    ``exact``: attention over the cache.  ``recipe``: the INT8 recipe, that is int8 queries with one scale a
    row, int8 key codes, P and V' in fp16.  ``residual``: the recipe with queries that were not rounded, which
    is what decode kernels reach that add the int8 residual of q.
    """
    case, quant = problem.case, problem.quantizer
    hq = case.kv_heads * case.group
    out = torch.zeros(problem.num_tokens, hq, case.head_dim, dtype=dtype, device=problem.q.device)
    lse = torch.full((hq, problem.num_tokens), -math.inf, dtype=dtype, device=problem.q.device)
    if problem.sinks is not None:
        lse[:] = problem.sinks.to(dtype)[:, None]
    q_at = k_at = 0
    for length, queries in zip(case.seq_lens, case.query_lens, strict=True):
        keys = slice(k_at, k_at + length)
        if length:
            k, v = _keys_and_values(problem, keys, mode, dtype)
            seen = visible(length, queries, case, problem.q.device)
            step = max(1, _MAX_SCORES // (hq * length))
            for first in range(0, queries, step):
                last = min(first + step, queries)
                rows = slice(q_at + first, q_at + last)
                q = problem.q[rows].to(dtype)
                out[rows], lse[:, rows] = _attend(problem, q, k, v, seen[first:last], mode)
        q_at, k_at = q_at + queries, k_at + length
    if quant.v_rotation is not None:
        out = out @ quant.v_rotation.to(dtype)
    return out, lse


def _keys_and_values(problem: Problem, keys: slice, mode: str, dtype: torch.dtype):
    """K' and V' [L, Hkv, D] of one sequence; outside "exact" from int8 key codes and fp16 values."""
    quant = problem.quantizer
    if mode == "exact":
        return (
            decode(problem.k_index[keys], problem.k_norm[keys], quant.k_centroids, dtype),
            decode(problem.v_index[keys], problem.v_norm[keys], quant.v_centroids, dtype),
        )
    codes = quant.k_codes.to(dtype)[problem.k_index[keys].long()]
    values = decode(problem.v_index[keys], problem.v_norm[keys], quant.v_centroids.half())
    return codes * (problem.k_norm[keys].to(dtype) * quant.k_code_scale).unsqueeze(-1), values.half().to(
        dtype
    )


def _attend(problem: Problem, q, k, v, seen, mode: str):
    """Rotated-space attention of q [T, Hq, D] over one sequence: (out [T, Hq, D], lse [Hq, T])."""
    case, quant, dtype = problem.case, problem.quantizer, q.dtype
    if quant.k_rotation is not None:
        q = q @ quant.k_rotation.to(dtype).T
    if mode == "recipe":
        # In fp32, as the contract says: rows of fp16 values hit exact ties, which a wider quotient breaks.
        q32 = q.float()
        largest = q32.abs().amax(-1, keepdim=True)
        scale = largest / torch.full_like(largest, 127.0)  # a scalar divisor becomes a reciprocal on a GPU
        q = (torch.where(scale > 0, q32 / scale, 0.0).round().clamp(-127, 127) * scale).to(dtype)
    grouped = q.unflatten(1, (case.kv_heads, case.group)).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
    scores = grouped.flatten(1, 2) @ k.permute(1, 2, 0) * case.scale
    scores = scores.unflatten(1, (case.group, -1))  # [Hkv, group, T, L]
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    top = scores.amax(-1, keepdim=True)
    if problem.sinks is not None:
        sink = problem.sinks.to(dtype).view(case.kv_heads, case.group, 1, 1)
        top = torch.maximum(top, sink)
    top = torch.where(top.isneginf(), 0.0, top)  # a row that sees nothing: exp(-inf - 0) = 0
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    if problem.sinks is not None:
        total = total + torch.exp(sink - top)
    if mode != "exact":
        p = p.half().to(dtype)
    o = (p.flatten(1, 2) @ v.transpose(0, 1)).unflatten(1, (case.group, -1))
    o = o / torch.where(total > 0, total, 1.0)
    lse = (top + torch.log(total)).squeeze(-1)
    return o.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


@functools.lru_cache(maxsize=2)
def solved(case: Case, device: str) -> tuple[Problem, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A problem and its answers by mode, kept for the next backend."""
    problem = build(case, device)
    modes = MODES if case.int8 else ("exact",)
    return problem, {mode: answer(problem, mode) for mode in modes}


# ------------------------------------------------------------------------------------------------ calls


def poisoned_out(problem: Problem) -> torch.Tensor:
    """NaN-filled output shaped (and, for a strided case, strided) like q."""
    rows, hq, d = problem.q.shape
    wide = torch.full((rows, hq + 1 if problem.case.strided else hq, d), math.nan, dtype=problem.q.dtype)
    return wide.to(problem.q.device)[:, :hq]


def run(
    problem: Problem, backend: str | None, op: str = "prefill", **changes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask one backend.  Returns (out [T, Hq, D], lse [Hq, T]); fails when a padding row was written."""
    case = problem.case
    out = changes.pop("out", None)
    out = poisoned_out(problem) if out is None else out
    # one token a sequence is asked in decode's short form
    short = op == "decode" and all(n == 1 for n in case.query_lens) and not case.padding_rows
    options = dict(
        num_kv_heads=case.kv_heads,
        sm_scale=case.sm_scale,
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        sinks=problem.sinks,
        int8=case.int8,
        max_query_len=max((1, *case.query_lens)),
        out=out,
        return_lse=True,
        backend=backend,
    )
    options.update(changes)
    args = [problem.q, problem.cache, problem.block_table, problem.seq_lens]
    if op == "prefill":
        args.append(problem.query_start_loc)
    elif not short:
        options["query_start_loc"] = problem.query_start_loc
    got, lse = getattr(tq4, op)(*args, problem.quantizer, **options)
    assert got.data_ptr() == out.data_ptr(), f"{op}: out= was not written in place"
    tokens = problem.num_tokens
    assert out[tokens:].isnan().all(), f"{op} wrote rows past query_start_loc[-1]"
    return out[:tokens], lse[:, :tokens]


# ---------------------------------------------------------------------------------------------- verdicts


def score_sizes(problem: Problem) -> torch.Tensor:
    """[Hq, T]: about how large the scores of a query are, the unit in which an error of its LSE is judged."""
    case = problem.case
    norms = torch.stack(
        [
            n.square().mean().sqrt() if n.numel() else n.sum()
            for n in problem.k_norm.split(list(case.seq_lens))
        ]
    )
    per_token = norms.repeat_interleave(torch.tensor(case.query_lens, device=norms.device))
    lengths = problem.q[: problem.num_tokens].to(FLOAT32).norm(dim=-1)
    return (lengths * per_token[:, None]).T * case.scale / math.sqrt(case.head_dim)


def judge(
    problem: Problem,
    answers: dict[str, tuple[torch.Tensor, torch.Tensor]],
    out: torch.Tensor,
    lse: torch.Tensor,
    who: str,
) -> None:
    """Hold a backend's (out, lse) against the answers by the table of tolerances.

    In INT8 mode a backend may answer any row by the recipe, with the residual of q, or exactly (decode, and
    prefill where it hands short queries to decode): each row is held against the answer it is nearest to, by
    the bound of that answer.
    """
    case = problem.case
    rounding = OUTPUT_ROUNDING[out.dtype]
    failures = []

    def hold(name: str, error: float, bound: float) -> None:
        if not error <= bound:
            failures.append(f"{name} {error:.3g} > {bound:.3g}")

    exact, exact_lse = answers["exact"]
    bounds = {"exact": "fp16"}
    if case.int8:
        recipe = "recipe" if case.rotation is None else "recipe-rotated"
        bounds = {"recipe": recipe, "residual": recipe, "exact": "fp16"}
        # Against exact attention a backend may be as wrong as the recipe itself is on this very problem.
        own = relative_error(answers["recipe"][0], exact)
        limit = max(TOLERANCES[EXACT_BOUND[case.data]].total, 1.1 * own)
        hold("error vs exact", relative_error(out, exact), limit + rounding)
    off = torch.stack([(out.to(FLOAT32) - answers[mode][0]).norm(dim=-1) for mode in bounds])
    nearest = off.nan_to_num(math.inf).argmin(0)
    want = torch.stack([answers[mode][0] for mode in bounds])
    want = want.gather(0, nearest[None, ..., None].expand_as(out[None]))[0]
    # The bounds of the answers that rows are near to, in the shares that those rows have in the result.
    limits = [TOLERANCES[name] for name in bounds.values()]
    energy = want.square().sum(-1)
    shares = [energy[nearest == i].sum().item() for i in range(len(limits))]
    total = math.sqrt(
        sum(share * b.total**2 for share, b in zip(shares, limits, strict=True)) / (sum(shares) or 1)
    )
    per_row = torch.tensor([b.row or 10 * b.total for b in limits], device=out.device)[nearest] + rounding
    hold("error", relative_error(out, want), total + rounding)
    size = want.norm(dim=-1)
    worst = (out.to(FLOAT32) - want).norm(dim=-1) / torch.where(size > 0, size, 1e-30) / per_row
    hold(
        "worst row, in units of its bound,",
        worst.nan_to_num(math.inf).amax().item() if worst.numel() else 0.0,
        1.0,
    )

    empty = exact_lse.isneginf()
    if not torch.equal(lse.isneginf(), empty):
        failures.append(f"LSE: {int((lse.isneginf() ^ empty).sum())} wrong -inf")
    unit = 1 + score_sizes(problem)
    off = torch.stack([(lse - answers[mode][1]).abs() / LSE_TOLERANCE[name] for mode, name in bounds.items()])
    off = torch.where(empty, 0.0, off.amin(0) / unit).nan_to_num(math.inf)
    hold("LSE, in units of its tolerance,", off.amax().item() if off.numel() else 0.0, 1.0)
    if failures:
        pytest.fail(f"{who} {case}: {'; '.join(failures)}", pytrace=False)


def verify(case: Case, target: Target, op: str = "prefill") -> None:
    """Build, solve, run and judge one case."""
    target.require()
    problem, answers = solved(case, target.device)
    out, lse = run(problem, target.backend, op)
    judge(problem, answers, out, lse, f"{op} {target}")


def hold_tokens(
    cache, slots, key, value, quant, who: str, rotate_k: bool = True, rotate_v: bool = True
) -> None:
    """The bytes of ``slots`` against steps 1 to 5 of the format in float64.

    An index may differ by one where the rotated coordinate lies within 1e-5 of the boundary between the two;
    a corrected norm is judged by the indices that were stored.
    """
    kv_heads, head_dim = key.shape[1:]
    k_index, k_norm, v_index, v_norm = read_tokens(cache, slots, kv_heads, head_dim)
    for name, x, index, norm, rotation, centroids, boundaries in (
        (
            "key",
            key,
            k_index,
            k_norm,
            quant.k_rotation if rotate_k else None,
            quant.k_centroids,
            quant.k_boundaries,
        ),
        (
            "value",
            value,
            v_index,
            v_norm,
            quant.v_rotation if rotate_v else None,
            quant.v_centroids,
            quant.v_boundaries,
        ),
    ):
        want, want_norm, y = encode(x, rotation, centroids, boundaries, dtype=torch.float64)
        low, high = torch.minimum(index, want), torch.maximum(index, want)
        boundary = boundaries.double()[low.long().clamp(max=14)]
        excused = (high - low == 1) & ((y - boundary).abs() <= BOUNDARY_SLACK)
        wrong = (index != want) & ~excused
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            pytest.fail(
                f"{who}: {name}: {int(wrong.sum())} of {wrong.numel()} indices differ, first at {at}: "
                f"{int(index[tuple(at)])}, expected {int(want[tuple(at)])} for y = {y[tuple(at)].item():.7g}",
                pytrace=False,
            )
        if quant.norm_correction:
            length = centroids.double()[index.long()].norm(dim=-1)
            want_norm = torch.where(length > 0, want_norm / length, 0.0)
        off = (norm.double() - want_norm).abs()
        allowed = NORM_RELATIVE * want_norm + 1e-38  # below that fp32 has fewer bits
        if not (off <= allowed).all():
            pytest.fail(
                f"{who}: {name}: norms off by {(off / want_norm).max().item():.3g} relative", pytrace=False
            )
