"""Prefill: variable-length batches of queries over paged TQ4.

Work split.  The query heads of a KV head share its keys, so a tile is BLOCK_M rows of one (sequence,
KV head), row r being token r // GROUP and head r % GROUP of the group: any group size fills the tile, and a
token's heads may fall into two tiles.  One program owns one tile and walks its keys BLOCK_N tokens at a time.

    grid      (tile slots) x (KV heads), KV head fastest; the last tiles of a sequence, which see most keys
              under a causal mask, start first
    slots     sequence s owns the slots from  floor(start_s * GROUP / BLOCK_M) + s  on; they never overlap,
              whatever the lengths, so the grid follows from host-known shapes and a program finds its
              sequence by bisection in query_start_loc.  Slots without a tile return at once.

Steps [1] rotate and [2] quantise are queries.py, [3] to [6] the loop of attention.py; [7] rotate back is
here.

Supported: sm_80 and later.  int8 products are IGMMA on sm_90, mma.sync elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import key_tables, score_factors, walk_keys
from .common import (
    GROUP_TOKENS,
    LN2,
    LOG2E,
    LOWEST,
    find_sequence,
    first_slot,
    half_scale,
    half_table,
    store_rotated,
)


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "lse_stride",
        "num_seqs",
        "num_slots",
        "window_left",
        "window_right",
        "short_query_len",
    ],
    # Slices of index tensors start anywhere: not a reason to compile again.
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def prefill_kernel(
    queries,
    row_scale,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    out_rotation,
    k_centroids,
    k_codes,
    v_centroids,
    out,
    lse,
    sinks,
    out_token_stride,
    out_head_stride,
    table_stride,
    lse_stride,
    num_seqs,
    num_slots,
    score_scale,
    softcap,
    window_left,
    window_right,
    short_query_len,
    P: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WGMMA: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of BLOCK_M query rows against its keys; see the head of this file.

    Args:
        queries, row_scale: of queries_kernel: [num_tokens * Hq, 2 * HALF] int8 (INT8) or fp16, fp32
            [num_tokens * Hq].
        cache: uint8, described by P.
        block_table: int32 [B, table_stride]; seq_lens int32 [B]; query_start_loc int32 [B + 1].
        out_rotation: fp32 [D, D] or None.
        k_centroids, v_centroids: fp32 [16]; k_codes int8 [16].
        out: [num_tokens, Hq, D] fp16 or bf16; strides in elements.
        lse: fp32 [Hq, lse_stride] or None; sinks: fp32 [Hq] or None.
        score_scale: sm_scale, times k_code_scale if INT8.
        short_query_len: sequences of up to so many query tokens are left alone.
    """
    # The last slots first: under a causal mask they are the longest.
    program = tl.program_id(0)
    head = program % NUM_KV_HEADS
    slot = num_slots - 1 - program // NUM_KV_HEADS
    seq = find_sequence(query_start_loc, slot, num_seqs, GROUP, BLOCK_M)
    first_row = (slot - first_slot(query_start_loc, seq, GROUP, BLOCK_M)) * BLOCK_M
    start_token = tl.load(query_start_loc + seq)
    num_queries = tl.load(query_start_loc + seq + 1) - start_token
    num_rows = num_queries * GROUP
    if (first_row >= num_rows) | (num_queries <= short_query_len):
        return
    length = tl.load(seq_lens + seq)

    row = first_row + tl.arange(0, BLOCK_M)
    row_valid = row < num_rows
    row_token = row // GROUP
    row_head = head * GROUP + row % GROUP
    token = (start_token + row_token).to(tl.int64)

    # Keys first .. stop - 1 are seen by some row, whole_first .. whole_stop - 1 by all of them.
    position = length - num_queries + row_token
    first_position = length - num_queries + first_row // GROUP
    last_position = length - num_queries + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
    first = 0
    whole_first = 0
    stop = length
    whole_stop = length
    if RIGHT:
        stop = tl.minimum(stop, last_position + window_right + 1)
        whole_stop = tl.minimum(whole_stop, first_position + window_right + 1)
    if LEFT:
        first = tl.maximum(first_position - window_left, 0) // GROUP_TOKENS * GROUP_TOKENS
        whole_first = last_position - window_left

    acc = tl.zeros((BLOCK_M, 2 * HALF), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + row_head, mask=row_valid, other=0.0) * LOG2E
        m = tl.maximum(sink, LOWEST)
        l = tl.math.exp2(sink - m)
    else:
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)

    if stop > first:
        column = tl.arange(0, 2 * HALF)
        q_row = token * (NUM_KV_HEADS * GROUP) + row_head
        q = tl.load(queries + q_row[:, None] * (2 * HALF) + column[None, :], mask=row_valid[:, None], other=0)
        v_scale = half_scale(v_centroids)
        v_table = half_table(v_centroids, v_scale, PTX)
        k_scale, k_table = key_tables(k_centroids, k_codes, INT8, PTX)
        scale = tl.load(row_scale + q_row, mask=row_valid, other=0.0)
        factor, cap = score_factors(scale, score_scale * k_scale, softcap, SOFTCAP)

        table = block_table + seq.to(tl.int64) * table_stride
        acc, m, l = walk_keys(
            acc,
            m,
            l,
            q,
            factor,
            cap,
            position,
            length,
            first,
            stop,
            whole_first,
            whole_stop,
            window_left,
            window_right,
            cache,
            table,
            head,
            k_centroids,
            k_codes,
            k_scale,
            k_table,
            v_centroids,
            v_scale,
            v_table,
            P,
            D,
            HALF,
            BLOCK_N,
            INT8,
            SOFTCAP,
            LEFT,
            RIGHT,
            WGMMA,
            PTX,
        )

    # A row without a visible key (and without a sink) has l = 0: output 0, LSE -inf.
    acc = acc * tl.where(l == 0.0, 0.0, 1.0 / l)[:, None]
    if lse is not None:
        value = tl.where(l == 0.0, float("-inf"), (m + tl.math.log2(l)) * LN2)
        tl.store(lse + row_head.to(tl.int64) * lse_stride + token, value, mask=row_valid)
    # [7] rotate back
    out_rows = out + token * out_token_stride + row_head.to(tl.int64) * out_head_stride
    store_rotated(acc, out_rows, row_valid, out_rotation, D, HALF, CHUNK, ROTATION_SCALE)
