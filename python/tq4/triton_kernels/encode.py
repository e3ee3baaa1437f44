"""store and compress: rotate, quantise and pack vectors (spec: encoding one vector).

A program encodes ROWS vectors, row r being token r // NUM_HEADS and head r % NUM_HEADS:

    norm        n = ||x||, summed after scaling by a power of two so that no square over- or underflows
    rotate      y = x @ R^T / (n + 1e-10), fp16 products with fp32 accuracy (common.py)
    index       number of boundaries below y: bisection by selects, four comparisons instead of fifteen
    pack        even dimension in the high nibble
    scatter     to the page slot of the token (store), or densely (compress)

Nothing crosses rows, so a NaN or an infinity stays with its vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import power_of_two, rotate_rows


@triton.jit
def _index(y, boundaries):
    """Number of the 15 ascending boundaries below y, 0 for NaN; int32 of y's shape."""
    b0 = tl.load(boundaries)
    b1 = tl.load(boundaries + 1)
    b2 = tl.load(boundaries + 2)
    b3 = tl.load(boundaries + 3)
    b4 = tl.load(boundaries + 4)
    b5 = tl.load(boundaries + 5)
    b6 = tl.load(boundaries + 6)
    b7 = tl.load(boundaries + 7)
    b8 = tl.load(boundaries + 8)
    b9 = tl.load(boundaries + 9)
    b10 = tl.load(boundaries + 10)
    b11 = tl.load(boundaries + 11)
    b12 = tl.load(boundaries + 12)
    b13 = tl.load(boundaries + 13)
    b14 = tl.load(boundaries + 14)
    bit3 = y > b7
    c0 = tl.where(bit3, b8, b0)
    c1 = tl.where(bit3, b9, b1)
    c2 = tl.where(bit3, b10, b2)
    c3 = tl.where(bit3, b11, b3)
    c4 = tl.where(bit3, b12, b4)
    c5 = tl.where(bit3, b13, b5)
    c6 = tl.where(bit3, b14, b6)
    bit2 = y > c3
    c0 = tl.where(bit2, c4, c0)
    c1 = tl.where(bit2, c5, c1)
    c2 = tl.where(bit2, c6, c2)
    bit1 = y > c1
    bit0 = y > tl.where(bit1, c2, c0)
    return tl.where(bit3, 8, 0) + tl.where(bit2, 4, 0) + tl.where(bit1, 2, 0) + tl.where(bit0, 1, 0)


@triton.jit
def _encode(
    rows,
    valid,
    rotation,
    centroids,
    boundaries,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """Codes uint8 [ROWS, HALF] and norms fp32 [ROWS] of the rows at some pointers (fp16, bf16 or fp32)."""
    natural = tl.arange(0, 2 * HALF)
    x = tl.load(rows[:, None] + natural[None, :], mask=valid[:, None] & (natural < D)[None, :], other=0.0).to(
        tl.float32
    )
    scale = power_of_two(tl.max(tl.abs(x), 1))
    x = x * (1.0 / scale)[:, None]
    norm = tl.sqrt_rn(tl.sum(x * x, 1)) * scale
    y = rotate_rows(rows, valid, rotation, D, HALF, CHUNK, ROTATION_SCALE)
    index = _index(y * (1.0 / (norm + EPSILON))[:, None], boundaries)
    even, odd = tl.split(tl.permute(tl.reshape(index, (rows.shape[0], 2, HALF)), (0, 2, 1)))
    codes = (even * 16 + odd).to(tl.uint8)
    if CORRECTION:
        inside = (tl.arange(0, HALF) < D // 2)[None, :]
        c_even = tl.where(inside, tl.load(centroids + even), 0.0)
        c_odd = tl.where(inside, tl.load(centroids + odd), 0.0)
        length = tl.sqrt_rn(tl.sum(c_even * c_even + c_odd * c_odd, 1))
        # All coordinates at a centroid of zero decode to zero whatever the norm: store zero, not 0 / 0.
        norm = tl.where(length > 0.0, tl.div_rn(norm, tl.where(length > 0.0, length, 1.0)), 0.0)
    return codes, norm


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slot_mapping"])
def store_kernel(
    key,
    value,
    cache,
    slot_mapping,
    k_rotation,
    v_rotation,
    k_centroids,
    k_boundaries,
    v_centroids,
    v_boundaries,
    num_rows,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    P: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """Encode keys (program_id(1) = 0) or values (1) of new tokens into the pages.

    Args:
        key, value: [num_tokens, NUM_HEADS, D] fp16, bf16 or fp32; strides in elements.
        cache: uint8, described by P.
        slot_mapping: int64 [num_tokens], block * block_size + offset; negative = skip.
        k_rotation, v_rotation: fp32 [D, D] or None (rotated already).
        k_centroids, v_centroids: fp32 [16]; k_boundaries, v_boundaries: fp32 [15], ascending.
        num_rows: num_tokens * NUM_HEADS.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // NUM_HEADS
    head = (row % NUM_HEADS).to(tl.int64)
    slot = tl.load(slot_mapping + token, mask=row < num_rows, other=-1)
    valid = slot >= 0
    token = token.to(tl.int64)
    page = (slot // P.block_size) * P.block_stride
    offset = slot % P.block_size
    codes_at = page + offset * P.code_token_stride + head * P.code_head_stride
    norms_at = page + offset * P.norm_token_stride + head * P.norm_head_stride
    if tl.program_id(1) == 0:
        rows = key + token * key_token_stride + head * key_head_stride
        codes, norm = _encode(
            rows,
            valid,
            k_rotation,
            k_centroids,
            k_boundaries,
            D,
            HALF,
            CHUNK,
            ROTATION_SCALE,
            EPSILON,
            CORRECTION,
        )
        _scatter(
            codes, norm, cache + P.k_codes, codes_at, cache + P.k_norms, norms_at, valid, P.alignment, D, HALF
        )
    else:
        rows = value + token * value_token_stride + head * value_head_stride
        codes, norm = _encode(
            rows,
            valid,
            v_rotation,
            v_centroids,
            v_boundaries,
            D,
            HALF,
            CHUNK,
            ROTATION_SCALE,
            EPSILON,
            CORRECTION,
        )
        _scatter(
            codes, norm, cache + P.v_codes, codes_at, cache + P.v_norms, norms_at, valid, P.alignment, D, HALF
        )


@triton.jit
def _scatter(
    codes,
    norm,
    codes_base,
    codes_at,
    norms_base,
    norms_at,
    valid,
    ALIGNMENT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write codes [ROWS, HALF] (the first D / 2 columns) and norms [ROWS] at byte offsets from two bases."""
    byte = tl.arange(0, HALF)
    address = tl.multiple_of(codes_base + codes_at, ALIGNMENT)
    tl.store(address[:, None] + byte[None, :], codes, mask=valid[:, None] & (byte < D // 2)[None, :])
    tl.store((norms_base + norms_at).to(tl.pointer_type(tl.float32)), norm, mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def compress_kernel(
    x,
    rotation,
    centroids,
    boundaries,
    packed,
    norms,
    num_rows,
    token_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """Encode x [N, NUM_HEADS, D] into contiguous packed uint8 [num_rows, D / 2] and norms fp32 [num_rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    token = (row // NUM_HEADS).to(tl.int64)
    head = (row % NUM_HEADS).to(tl.int64)
    rows = x + token * token_stride + head * head_stride
    codes, norm = _encode(
        rows, valid, rotation, centroids, boundaries, D, HALF, CHUNK, ROTATION_SCALE, EPSILON, CORRECTION
    )
    byte = tl.arange(0, HALF)
    address = packed + row.to(tl.int64)[:, None] * (D // 2) + byte[None, :]
    tl.store(address, codes, mask=valid[:, None] & (byte < D // 2)[None, :])
    tl.store(norms + row, norm, mask=valid)
