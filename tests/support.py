"""The tests' tool kit: how results are compared, and how caches with traps in them are made.

Nothing here is used by the package.  The comparison has one table of tolerances (from the specification), the
cases come with every trap that the format allows: shuffled pages, unused pages and the tail of the last page
full of 0xFF (NaN norms), entries of block_table past a sequence's last page that point nowhere, padded query
rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as memoise
from pathlib import Path

import pytest
import torch

import tq4
from tq4.backends import reference
from tq4.layout import HEAD_MAJOR, TOKEN_MAJOR, cache_shape, page_view, token_bytes, vector_bytes

ROOT = Path(__file__).resolve().parent.parent

# ---- Comparison.


@dataclass(frozen=True)
class Bound:
    """Largest relative error of the whole result, and of any single row (None: not bounded)."""

    total: float
    row: float | None = None


#: The tolerances of the specification.
TOLERANCES = {
    # INT8 backends against the INT8 recipe in plain torch, same bytes, q already rotated
    "recipe": Bound(1e-3, 1e-2),
    # the same with the rotation done inside: its rounding moves some q8 by one
    "recipe-rotated": Bound(3e-3, 3e-2),
    # INT8 against exact attention over the same cache
    "exact-gaussian": Bound(5e-3),
    "exact-real": Bound(8e-3),
    "exact-outlier": Bound(1.5e-2),
    # exact mode (int8=False: fp16, or decode's two INT8 terms) against exact attention
    "fp16": Bound(2e-3),
}
#: Rounding of an output to its dtype, allowed on top of every bound: half a unit in the last place.
OUTPUT_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}
#: LSE, relative to 1 + the size of the scores: against the recipe, and against exact attention.
LSE_TOLERANCE = {"recipe": 2e-3, "recipe-rotated": 1e-2, "fp16": 5e-3, "exact": 5e-2}
#: Indices may differ where a coordinate is this close to a boundary; norms by this much, relative.
BOUNDARY_SLACK = 1e-5
NORM_RELATIVE = 1e-6

#: The bound that applies to INT8 against exact attention, by kind of data.
EXACT_BOUND = {"gaussian": "exact-gaussian", "real": "exact-real", "outlier": "exact-outlier"}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the expected result; inf where actual is not finite."""
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    if not math.isfinite(float(difference)):
        return math.inf
    if float(scale) == 0.0:
        return 0.0 if float(difference) == 0.0 else math.inf
    return float(difference / scale)


def worst_row(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of one row (last dimension); a row that should be 0 must be exactly 0."""
    wide = expected.double().flatten(0, -2)
    difference = (actual.double().flatten(0, -2) - wide).norm(dim=-1)
    scale = wide.norm(dim=-1)
    ratio = torch.where(scale > 0, difference / scale, torch.where(difference > 0, math.inf, 0.0))
    ratio = torch.where(ratio.isfinite(), ratio, math.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: str | Bound) -> None:
    """Fail unless the relative error (total and, if bounded, of each row) is within a bound of TOLERANCES."""
    limit = TOLERANCES[bound] if isinstance(bound, str) else bound
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    total, row = relative_error(actual, expected), worst_row(actual, expected)
    assert total <= limit.total, (
        f"{bound}: relative error {total:.2e} > {limit.total:.0e} (worst row {row:.2e})"
    )
    assert limit.row is None or row <= limit.row, f"{bound}: worst row {row:.2e} > {limit.row:.0e}"


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: str | float) -> None:
    """Fail unless LSEs agree: -inf exactly where expected, the rest within tolerance * (1 + |expected|)."""
    limit = LSE_TOLERANCE[tolerance] if isinstance(tolerance, str) else tolerance
    empty = expected == -math.inf
    assert torch.equal(actual == -math.inf, empty), "LSE: -inf in the wrong rows"
    difference = (actual.double() - expected.double())[~empty].abs() / (1 + expected.double()[~empty].abs())
    assert difference.isfinite().all(), "LSE: not finite"
    worst = float(difference.max()) if difference.numel() else 0.0
    assert worst <= limit, f"LSE differs by {worst:.2e} > {limit:.0e}"


def assert_codes_equal(
    actual: torch.Tensor,
    expected: torch.Tensor,
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    boundaries: torch.Tensor,
) -> None:
    """Fail unless packed codes are equal except where a coordinate is within BOUNDARY_SLACK of a boundary.

    Args:
        actual, expected: uint8 ``[..., D / 2]``.
        x: the encoded vectors ``[..., D]``.
        rotation: fp32 ``[D, D]`` or None.
        boundaries: fp32 ``[15]``.
    """
    wide = x.double()
    y = wide / (wide.norm(dim=-1, keepdim=True) + 1e-10)
    if rotation is not None:
        y = y @ rotation.double().T
    near = ((y[..., None] - boundaries.double()).abs() <= BOUNDARY_SLACK).any(-1)
    a, b = reference.unpack(actual), reference.unpack(expected)
    assert bool((near | (a == b)).all()), (
        f"{int((~near & (a != b)).sum())} indices differ away from a boundary"
    )
    assert int((a - b).abs().max() if a.numel() else 0) <= 1, "an index differs by more than one"


def assert_norms_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless fp32 norms agree to NORM_RELATIVE."""
    difference = (actual.double() - expected.double()).abs()
    relative = difference / expected.double().abs().clamp_min(1e-30)
    assert bool((difference <= NORM_RELATIVE * expected.double().abs()).all()), (
        f"norms differ by up to {float(relative.max()):.2e} relative"
    )


# ---- Data.


def real_qkv() -> dict[str, torch.Tensor]:
    """Real post-RoPE q ``[2048, 8, 128]`` and k, v ``[2048, 2, 128]`` (fp16) of a trained model."""
    return dict(_load_qkv())


@memoise
def _load_qkv() -> dict[str, torch.Tensor]:
    folders = [ROOT.parent / "shared" / "data", ROOT / "shared" / "data"]
    if os.environ.get("TQ4_DATA_DIR"):
        folders.insert(0, Path(os.environ["TQ4_DATA_DIR"]))
    for folder in folders:
        path = folder / "qkv_layer3.safetensors"
        if path.is_file():
            from safetensors.torch import load_file

            return load_file(path)
    pytest.skip("no real q, k, v: neither TQ4_DATA_DIR nor ../shared/data has qkv_layer3.safetensors")


def vectors(
    kind: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Test vectors ``[tokens, heads, head_dim]`` on the CPU.

    Args:
        kind: "gaussian", or "outlier": Gaussian with every 37th token times 20 and one channel times 10.
    """
    x = torch.randn(tokens, heads, head_dim, generator=generator)
    if kind == "outlier":
        x[::37] *= 20.0
        x[:, :, 5] *= 10.0
    elif kind != "gaussian":
        raise ValueError(f"kind: expected gaussian or outlier, got {kind!r}")
    return x.to(dtype)


# ---- Cases.


@dataclass
class Case:
    """A batch of queries over a TQ4 cache: everything that the ops take, and what the cache was made from."""

    quantizer: tq4.Quantizer
    q: torch.Tensor  # [T, Hq, D]
    key: torch.Tensor  # [sum of kv_lens, Hkv, D], sequence after sequence
    value: torch.Tensor
    cache: torch.Tensor  # uint8, filled by the reference backend
    slot_mapping: torch.Tensor  # int64 [sum of kv_lens]
    block_table: torch.Tensor  # int32 [B, max_blocks]
    seq_lens: torch.Tensor  # int32 [B]
    query_start_loc: torch.Tensor  # int32 [B + 1]
    num_kv_heads: int
    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def attend(self, backend: str | None = None, op: str = "prefill", **options):
        """tq4.prefill or tq4.decode on this case; decode always gets query_start_loc."""
        merged = {"num_kv_heads": self.num_kv_heads, **self.options, **options}
        q = merged.pop("q", self.q)
        if op == "prefill":
            return tq4.prefill(
                q,
                self.cache,
                self.block_table,
                self.seq_lens,
                self.query_start_loc,
                self.quantizer,
                backend=backend,
                **merged,
            )
        merged.setdefault("query_start_loc", self.query_start_loc)
        merged.setdefault("max_query_len", max(1, *self.q_lens))
        return tq4.decode(
            q, self.cache, self.block_table, self.seq_lens, self.quantizer, backend=backend, **merged
        )

    def exact(self, **options):
        """Exact attention over this case's cache, float64: (out, lse), without the padding rows."""
        merged = {**self.options, **options}
        for name in ("int8", "return_lse", "backend", "max_query_len", "out"):
            merged.pop(name, None)
        quantizer = self.quantizer
        q = merged.pop("q", self.q)
        rotate_q, rotate_out = merged.pop("rotate_q", True), merged.pop("rotate_out", True)
        return reference.attention(
            q,
            self.cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            q_rotation=quantizer.k_rotation if rotate_q else None,
            out_rotation=quantizer.v_rotation if rotate_out else None,
            k_centroids=quantizer.k_centroids,
            v_centroids=quantizer.v_centroids,
            num_kv_heads=self.num_kv_heads,
            dtype=torch.float64,
            **merged,
        )

    @property
    def num_tokens(self) -> int:
        """Rows of q that belong to a sequence (the rest is padding)."""
        return sum(self.q_lens)


def make_case(
    *,
    head_dim: int = 128,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    kv_lens: Sequence[int] = (37,),
    q_lens: Sequence[int] | None = None,
    block_size: int = 16,
    layout: str = TOKEN_MAJOR,
    dtype: torch.dtype = torch.float16,
    data: str = "gaussian",
    rotation: str | None = "hadamard",
    norm_correction: bool = False,
    padding_rows: int = 0,
    row_padding: int = 0,
    spare_blocks: int = 3,
    strided_q: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """A case with every trap: shuffled pages, poisoned spare pages and tails, garbage in block_table.

    Args:
        kv_lens: keys of each sequence; 0 is allowed.
        q_lens: queries of each sequence; default: as many as keys.
        data: "gaussian", "outlier" (of q, see :func:`vectors`) or "real" (:func:`real_qkv`; fixes the heads
            and head_dim).
        padding_rows: rows of q after the last sequence's.
        row_padding: unused bytes after each token (token-major) or block (head-major), left at 0xFF.
        spare_blocks: blocks that no sequence owns.
        strided_q: q is a slice of a wider tensor.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    q_lens = tuple(kv_lens if q_lens is None else q_lens)
    kv_lens = tuple(kv_lens)
    total_q, total_kv = sum(q_lens), sum(kv_lens)
    if data == "real":
        real = real_qkv()
        num_q_heads, num_kv_heads, head_dim = real["q"].shape[1], real["k"].shape[1], real["q"].shape[2]
        assert total_kv <= real["k"].shape[0] and total_q <= real["q"].shape[0], (
            "more tokens than the data has"
        )
        key, value = real["k"][:total_kv].to(dtype), real["v"][:total_kv].to(dtype)
        # The queries of a sequence sit at its end.
        ends = torch.tensor(kv_lens).cumsum(0).tolist()
        rows = [torch.arange(end - n, end).clamp_min(0) for end, n in zip(ends, q_lens, strict=True)]
        q = real["q"][torch.cat(rows)].to(dtype)
    else:
        q = vectors(data, total_q, num_q_heads, head_dim, dtype, generator)
        key = vectors("gaussian", total_kv, num_kv_heads, head_dim, dtype, generator)
        value = vectors("gaussian", total_kv, num_kv_heads, head_dim, dtype, generator)
    if padding_rows:
        q = torch.cat([q, torch.full((padding_rows, num_q_heads, head_dim), math.nan, dtype=dtype)])
    if strided_q:
        wide = torch.full((q.shape[0], num_q_heads + 1, head_dim + 16), math.nan, dtype=dtype)
        wide[:, :num_q_heads, :head_dim] = q
        q = wide.to(device)[:, :num_q_heads, :head_dim]

    pages = [-(-length // block_size) for length in kv_lens]
    num_blocks = sum(pages) + spare_blocks
    order = torch.randperm(num_blocks, generator=generator).tolist()
    cache = poisoned_cache(num_blocks, num_kv_heads, head_dim, block_size, layout, row_padding, device)
    # Garbage past the end: a block that would fault or alias if it were looked at.
    columns = max(pages, default=0) + 2
    garbage = torch.tensor([2**31 - 1, -(2**31), num_blocks, -1, 0], dtype=torch.int64)
    picks = torch.randint(0, len(garbage), (len(kv_lens), columns), generator=generator)
    block_table = garbage[picks].to(torch.int32)
    slots, used = [], 0
    for seq, (length, count) in enumerate(zip(kv_lens, pages, strict=True)):
        blocks = torch.tensor(order[used : used + count], dtype=torch.int64)
        used += count
        block_table[seq, :count] = blocks.to(torch.int32)
        tokens = torch.arange(length)
        slots.append(blocks[tokens // block_size] * block_size + tokens % block_size)
    slot_mapping = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
    quantizer = tq4.Quantizer(head_dim, rotation=rotation, norm_correction=norm_correction, device=device)
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    case = Case(
        quantizer=quantizer,
        q=q if strided_q else q.to(device),
        key=key.to(device),
        value=value.to(device),
        cache=cache,
        slot_mapping=slot_mapping.to(device),
        block_table=block_table.to(device),
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32).to(device),
        query_start_loc=starts.to(device),
        num_kv_heads=num_kv_heads,
        kv_lens=kv_lens,
        q_lens=q_lens,
    )
    tq4.store(case.key, case.value, cache, case.slot_mapping, quantizer, backend="reference")
    return case


def poisoned_cache(
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    layout: str = TOKEN_MAJOR,
    row_padding: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A cache tensor full of 0xFF: every norm is a NaN.

    ``row_padding`` bytes follow each token's row (token-major) or each block (head-major), so that the tensor
    is a strided view or has a wider last dimension.
    """
    if layout == TOKEN_MAJOR:
        shape = (num_blocks, block_size, token_bytes(num_kv_heads, head_dim) + row_padding)
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    assert layout == HEAD_MAJOR
    shape = cache_shape(layout, num_blocks, num_kv_heads, head_dim, block_size)
    block = num_kv_heads * block_size * vector_bytes(head_dim)
    flat = torch.full((num_blocks, block + row_padding), 0xFF, dtype=torch.uint8, device=device)
    return flat[:, :block].unflatten(1, shape[1:])


def cache_fields(cache: torch.Tensor, num_kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Codes uint8 ``[num_blocks, block_size, Hkv, D / 2]`` and norms fp32 of the same first dimensions."""
    fields = reference._fields(cache, page_view(cache, num_kv_heads, head_dim))
    return {
        "k_codes": fields.k_codes,
        "v_codes": fields.v_codes,
        "k_norms": fields.k_norms.contiguous().view(torch.float32)[..., 0],
        "v_norms": fields.v_norms.contiguous().view(torch.float32)[..., 0],
    }


# ---- Attention by brute force.


def brute_force(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    q_lens: Sequence[int],
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention one query at a time over dense keys, float64; shares no code with the package.

    Args:
        q: ``[T, Hq, D]``.
        keys, values: for each sequence ``[L, Hkv, D]``.
        q_lens: queries of each sequence.

    Returns:
        out ``[T, Hq, D]`` and lse ``[Hq, T]``.
    """
    heads, dim = q.shape[1:]
    total = sum(q_lens)
    scale = dim**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(total, heads, dim, dtype=torch.float64)
    lse = torch.full((heads, total), -math.inf, dtype=torch.float64)
    row = 0
    for k, v, count in zip(keys, values, q_lens, strict=True):
        length, kv_heads = k.shape[:2]
        for t in range(count):
            position = length - count + t
            for h in range(heads):
                head = h // (heads // kv_heads)
                terms = []
                for j in range(length):
                    if causal and j > position:
                        continue
                    if window[0] >= 0 and j < position - window[0]:
                        continue
                    if window[1] >= 0 and j > position + window[1]:
                        continue
                    score = float(q[row, h].double() @ k[j, head].double()) * scale
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    terms.append((score, j))
                logits = [score for score, _ in terms]
                if sinks is not None:
                    logits.append(float(sinks[h]))
                if not logits:
                    continue
                top = max(logits)
                denominator = sum(math.exp(logit - top) for logit in logits)
                lse[h, row] = top + math.log(denominator)
                for score, j in terms:
                    out[row, h] += math.exp(score - top) / denominator * v[j, head].double()
            row += 1
    return out, lse
