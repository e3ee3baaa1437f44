"""Rotate and quantise queries: steps [1] and [2] of attention, once per query row, ahead of the main kernels.

A query row is used by one prefill tile and by every key split of a decode, and a rotation matrix costs far
more to load than a row; so this is a launch of its own that leaves rows ready for the tensor cores:

    INT8   q8 = round(q_rot / s) in [-127, 127], s = max|q_rot| / 127 for each row     row_scale = s
    fp16   q_rot / p, p the power of two with max|q_rot| in [p, 2p)                    row_scale = p

The power of two keeps bf16 queries of any magnitude inside fp16's range and costs no accuracy.  Columns are
in the "even | odd" order of common.py, padding columns are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import MAGIC, power_of_two, rotate_rows


@triton.jit
def prepare_rows(
    row,
    valid,
    token,
    q,
    rotation,
    rotated,
    row_scale,
    q_token_stride,
    q_head_stride,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INT8: tl.constexpr,
):
    """Some rows, row r being head r % NUM_HEADS of its token.

    Args:
        row: int32 [ROWS], places in rotated and row_scale; token: int32 [ROWS], where valid.
        q: [num_tokens, NUM_HEADS, D] fp16 or bf16; strides in elements.
        rotation: fp32 [D, D] or None (q is rotated already).
        rotated: [num_rows, 2 * HALF] int8 (INT8) or fp16, contiguous.
        row_scale: fp32 [num_rows]; NaN for a row with a NaN or an infinity.
    """
    head = (row % NUM_HEADS).to(tl.int64)
    # [1] rotate
    q_rows = q + token.to(tl.int64) * q_token_stride + head * q_head_stride
    x = rotate_rows(q_rows, valid, rotation, D, HALF, CHUNK, ROTATION_SCALE)
    # [2] quantise
    largest = tl.max(tl.abs(x), 1)
    if INT8:
        # Correctly rounded quotients: rows of fp16 values hit exact ties, which products with a reciprocal
        # would break either way.
        scale = tl.math.div_rn(largest, 127.0)
        divisor = tl.where(scale > 0.0, scale, 1.0)
        quotient = tl.math.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
        # Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low byte.
        codes = (quotient + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        scale = power_of_two(largest)
        codes = (x * (1.0 / scale)[:, None]).to(tl.float16)
    # The maximum ignores NaNs and integers cannot hold them: carry them in the scale, for this row only.
    # (Not x - x != 0: x is a product, and the compiler may fuse the subtraction into it.)
    bad = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    scale = tl.where(bad > 0, float("nan"), scale)
    column = tl.arange(0, 2 * HALF)
    tl.store(rotated + row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :], codes, mask=valid[:, None])
    tl.store(row_scale + row, scale, mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def queries_kernel(
    q,
    rotation,
    rotated,
    row_scale,
    num_rows,
    q_token_stride,
    q_head_stride,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INT8: tl.constexpr,
):
    """All rows, row r being token r // NUM_HEADS, on a grid of ceil(num_rows / ROWS) programs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    prepare_rows(
        row,
        row < num_rows,
        row // NUM_HEADS,
        q,
        rotation,
        rotated,
        row_scale,
        q_token_stride,
        q_head_stride,
        NUM_HEADS,
        D,
        HALF,
        CHUNK,
        ROTATION_SCALE,
        INT8,
    )
