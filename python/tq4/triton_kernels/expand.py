"""gather and decompress: codes and norms back to dense vectors (spec: decoding).

Decoded vectors are exact to fp32 rounding: centroids are looked up in fp32, and the rotation multiplies with
fp16 products of fp32 accuracy (common.py).  The norm is applied last: (c * n) @ R = (c @ R) * n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    GROUP_TOKENS,
    bytes_of,
    concatenate,
    find_sequence,
    first_slot,
    group_offsets,
    half_scale,
    interleave,
    load_codes,
    rotate_back_exact,
    token_offsets,
)


@triton.jit
def _store_decoded(
    words,
    norm,
    out_rows,
    valid,
    rotation,
    centroids,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """Decode code words [ROWS, HALF / 4] and norms [ROWS] to the pointers of some rows."""
    dtype: tl.constexpr = out_rows.dtype.element_ty
    byte = bytes_of(words)
    even = tl.load(centroids + (byte >> 4).to(tl.int32))
    odd = tl.load(centroids + (byte & 15).to(tl.int32))
    if rotation is None:
        x = interleave(concatenate(even, odd)) * norm[:, None]
        column = tl.arange(0, 2 * HALF)
        mask = valid[:, None] & (column < D)[None, :]
        tl.store(out_rows[:, None] + column[None, :], x.to(dtype), mask=mask)
    else:
        scale = half_scale(centroids)
        x = concatenate(even, odd) * (1.0 / scale)
        norm = norm * scale
        for first in tl.range(0, 2 * HALF, CHUNK, num_stages=1):
            rotated = rotate_back_exact(x, first, rotation, D, HALF, CHUNK, ROTATION_SCALE) * norm[:, None]
            column = first + tl.arange(0, CHUNK)
            mask = valid[:, None] & (column < D)[None, :]
            tl.store(out_rows[:, None] + column[None, :], rotated.to(dtype), mask=mask)


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "total"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "out_start_loc"],
)
def gather_kernel(
    cache,
    block_table,
    seq_lens,
    out_start_loc,
    k_rotation,
    v_rotation,
    k_centroids,
    v_centroids,
    key,
    value,
    table_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    num_seqs,
    total,
    P: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """Decode TOKENS tokens of one head, keys (program_id(1) = 0) or values (1); tile slots as in prefill.

    Args:
        cache: uint8, described by P.
        block_table: int32 [B, table_stride]; seq_lens int32 [B]; out_start_loc int32 [B + 1].
        k_rotation, v_rotation: fp32 [D, D], or None to stay rotated.
        k_centroids, v_centroids: fp32 [16].
        key, value: [total, NUM_HEADS, D] fp16, bf16 or fp32; strides in elements.
    """
    head = tl.program_id(0) % NUM_HEADS
    slot = tl.program_id(0) // NUM_HEADS
    seq = find_sequence(out_start_loc, slot, num_seqs, 1, TOKENS)
    first_token = (slot - first_slot(out_start_loc, seq, 1, TOKENS)) * TOKENS
    length = tl.load(seq_lens + seq)
    if first_token >= length:
        return
    token = first_token + tl.arange(0, TOKENS)
    out_row = tl.load(out_start_loc + seq) + token
    valid = (token < length) & (out_row < total)
    out_row = out_row.to(tl.int64)
    table = block_table + seq.to(tl.int64) * table_stride
    page, in_page = group_offsets(table, first_token, (length - 1) // GROUP_TOKENS, P, TOKENS)
    codes_at = token_offsets(page, in_page, P.code_token_stride)
    norms_at = token_offsets(page, in_page, P.norm_token_stride) + head * P.norm_head_stride
    codes_base = cache + head * P.code_head_stride
    if tl.program_id(1) == 0:
        words = load_codes(codes_base + P.k_codes, codes_at, D, HALF, P.alignment)
        norm = tl.load((cache + P.k_norms + norms_at).to(tl.pointer_type(tl.float32)))
        rows = key + out_row * key_token_stride + head.to(tl.int64) * key_head_stride
        _store_decoded(words, norm, rows, valid, k_rotation, k_centroids, D, HALF, CHUNK, ROTATION_SCALE)
    else:
        words = load_codes(codes_base + P.v_codes, codes_at, D, HALF, P.alignment)
        norm = tl.load((cache + P.v_norms + norms_at).to(tl.pointer_type(tl.float32)))
        rows = value + out_row * value_token_stride + head.to(tl.int64) * value_head_stride
        _store_decoded(words, norm, rows, valid, v_rotation, v_centroids, D, HALF, CHUNK, ROTATION_SCALE)


@triton.jit(do_not_specialize=["num_rows"])
def decompress_kernel(
    packed,
    norms,
    rotation,
    centroids,
    out,
    num_rows,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Decode packed uint8 [num_rows, D / 2] and norms fp32 [num_rows] to out [num_rows, D] (contiguous)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < num_rows
    at = tl.where(valid, row, 0).to(tl.int64)
    words = load_codes(packed, at * (D // 2), D, HALF, ALIGNMENT)
    norm = tl.load(norms + at)
    _store_decoded(words, norm, out + at * D, valid, rotation, centroids, D, HALF, CHUNK, ROTATION_SCALE)
