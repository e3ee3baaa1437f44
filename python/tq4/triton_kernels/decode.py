"""Decode: one to a few query tokens a sequence, split over the keys.

Three launches, with grids from host-known shapes:

    prepare     program 0 turns the device's lengths into cumulative work units; the others rotate queries
    split       a fixed number of programs share all units of a KV head equally, whatever the lengths
    combine     one program for each (sequence, KV head) adds up its partial results and rotates back

Work units.  Sequence s is worth  tiles(s) + 1  units, a tile being BLOCK_N visible keys and the one unit the
cost of starting on a sequence; empty queries are worth none.  With W units in all and E shares, share i of
every KV head walks the units [i W / E, (i + 1) W / E): a long sequence is cut into many shares, short ones
are packed into one.  The heads of one share run side by side, so that the pages they have in common are read
once into the L2 cache.  E is the number of programs the GPU holds, or less where shares would get too small.

Partial results of (share i, sequence s) go to slot i + s: walking the units in order, either the share or the
sequence advances from one piece of work to the next, so slots never collide and those of one sequence are
neighbours.  Every sum has a fixed order: results repeat bitwise.

All query rows of a KV head (its query heads times the query tokens) form one tile and read each key once.
Scores are exact: fp16 queries against fp16 centroids, as in prefill's fp16 mode, because a decode is bound by
memory and by expanding nibbles, not by products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import key_tables, score_factors, walk_keys
from .common import GROUP_TOKENS, LN2, LOG2E, LOWEST, half_scale, half_table, store_rotated
from .queries import prepare_rows

#: Sequences handled at a time where lengths are summed or searched.
SEQUENCES = tl.constexpr(256)


@triton.jit
def _query_count(query_start_loc, seq, mask):
    """Query tokens of some sequences (1 each where query_start_loc is None)."""
    if query_start_loc is None:
        return mask.to(tl.int32)
    else:
        start = tl.load(query_start_loc + seq, mask=mask, other=0)
        return tl.load(query_start_loc + seq + 1, mask=mask, other=0) - start


@triton.jit
def _query_tokens(row, valid, query_start_loc, short_query_len, NUM_HEADS: tl.constexpr):
    """Tokens of some rows of the rotated queries, and which of the rows there are.

    Rows are NUM_HEADS a token, of all tokens in turn; with short_query_len > 0 there are so many places for
    each sequence, which a sequence of more query tokens leaves empty.
    """
    token = row // NUM_HEADS
    if query_start_loc is not None:
        if short_query_len > 0:
            seq = token // short_query_len
            query = token - seq * short_query_len
            count = _query_count(query_start_loc, seq, valid)
            valid = valid & (query < count) & (count <= short_query_len)
            token = tl.load(query_start_loc + seq, mask=valid, other=0) + query
    return token, valid


@triton.jit
def _first_key(length, num_queries, window_left, LEFT: tl.constexpr):
    """The first key that the first query sees, rounded down to a token group."""
    if LEFT:
        return tl.maximum(length - num_queries - window_left, 0) // GROUP_TOKENS * GROUP_TOKENS
    else:
        return tl.zeros_like(length)


@triton.jit
def _num_shares(total_units, max_shares, MIN_UNITS: tl.constexpr):
    return tl.minimum(max_shares, tl.maximum(total_units // MIN_UNITS, 1))


@triton.jit
def _plan(
    seq_lens,
    query_start_loc,
    units,
    num_seqs,
    window_left,
    short_query_len,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
):
    """units[s] = work units of the sequences before s, int32 [num_seqs + 1].

    With short_query_len > 0 a sequence of more query tokens has none: it is left alone.
    """
    tl.store(units, 0)
    total = 0
    for first in tl.range(0, num_seqs, SEQUENCES, num_stages=1):
        seq = first + tl.arange(0, SEQUENCES)
        mask = seq < num_seqs
        length = tl.load(seq_lens + seq, mask=mask, other=0)
        num_queries = _query_count(query_start_loc, seq, mask)
        keys = tl.maximum(length - _first_key(length, num_queries, window_left, LEFT), 0)
        taken = (num_queries > 0) & ((num_queries <= short_query_len) | (short_query_len == 0))
        worth = tl.where(taken, (keys + BLOCK_N - 1) // BLOCK_N + 1, 0)
        tl.store(units + 1 + seq, total + tl.cumsum(worth, 0), mask=mask)
        total += tl.sum(worth, 0)


@triton.jit(
    do_not_specialize=["num_rows", "num_seqs", "window_left", "short_query_len"],
    do_not_specialize_on_alignment=["seq_lens", "query_start_loc"],
)
def prepare_kernel(
    q,
    rotation,
    rotated,
    row_scale,
    seq_lens,
    query_start_loc,
    units,
    num_rows,
    q_token_stride,
    q_head_stride,
    num_seqs,
    window_left,
    short_query_len,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Program 0: cumulative work units; program i: rows (i - 1) * ROWS on of the queries (see queries.py)."""
    program = tl.program_id(0)
    if program == 0:
        _plan(seq_lens, query_start_loc, units, num_seqs, window_left, short_query_len, BLOCK_N, LEFT)
    else:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)
        token, valid = _query_tokens(row, row < num_rows, query_start_loc, short_query_len, NUM_HEADS)
        prepare_rows(
            row,
            valid,
            token,
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
            False,
        )


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "num_seqs",
        "max_shares",
        "max_rows",
        "window_left",
        "window_right",
        "short_query_len",
    ],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def split_kernel(
    queries,
    row_scale,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    units,
    k_centroids,
    v_centroids,
    partial_out,
    partial_sums,
    table_stride,
    num_seqs,
    max_shares,
    max_rows,
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
    MIN_UNITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WGMMA: tl.constexpr,
    PTX: tl.constexpr,
):
    """One share of the work units of one KV head.

    Args:
        queries, row_scale: fp16 [num_rows, 2 * HALF] and fp32 [num_rows], of prepare_kernel; see
            _query_tokens.
        cache: uint8, described by P.
        block_table: int32 [B, table_stride]; seq_lens int32 [B]; query_start_loc int32 [B + 1] or None.
        units: int32 [B + 1].
        k_centroids, v_centroids: fp32 [16].
        partial_out: fp32 [max_shares + B, Hkv, max_rows, 2 * HALF]; partial_sums: fp32 [.., .., .., 2],
            maximum (base 2) and sum of a row's softmax.
        max_rows: query rows of a sequence and KV head, at most.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    share = tl.program_id(0) // NUM_KV_HEADS
    total_units = tl.load(units + num_seqs).to(tl.int64)
    num_shares = _num_shares(total_units, max_shares, MIN_UNITS)
    if share >= num_shares:
        return
    unit = share * total_units // num_shares
    last_unit = (share + 1) * total_units // num_shares

    # The sequence of the first unit: as many as have all their units before or at it.
    seq = 0
    for first in tl.range(0, num_seqs, SEQUENCES, num_stages=1):
        other = first + tl.arange(0, SEQUENCES)
        ends = tl.load(units + 1 + other, mask=other < num_seqs, other=2147483647)
        seq += tl.sum((ends <= unit).to(tl.int32), 0)

    v_scale = half_scale(v_centroids)
    v_table = half_table(v_centroids, v_scale, PTX)
    k_scale, k_table = key_tables(k_centroids, k_centroids, False, PTX)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, 2 * HALF)
    while unit < last_unit:
        seq_unit = tl.load(units + seq).to(tl.int64)
        stop_unit = tl.minimum(tl.load(units + seq + 1).to(tl.int64), last_unit)
        length = tl.load(seq_lens + seq)
        if query_start_loc is None:
            start_token = seq
            num_queries = 1
        else:
            start_token = tl.load(query_start_loc + seq)
            num_queries = tl.load(query_start_loc + seq + 1) - start_token
        if stop_unit > unit:
            row_token = row // GROUP
            row_valid = (row < num_queries * GROUP) & (row < max_rows)
            first_place = tl.where(short_query_len > 0, seq * short_query_len, start_token)
            q_row = (first_place + row_token).to(tl.int64) * (NUM_KV_HEADS * GROUP)
            q_row += head * GROUP + row % GROUP
            q = tl.load(
                queries + q_row[:, None] * (2 * HALF) + column[None, :], mask=row_valid[:, None], other=0.0
            )
            scale = tl.load(row_scale + q_row, mask=row_valid, other=0.0)
            factor, cap = score_factors(scale, score_scale * k_scale, softcap, SOFTCAP)

            # Units to keys.  The first unit of a sequence is its starting cost and has no keys.
            first_key = _first_key(length, num_queries, window_left, LEFT)
            first = first_key + (tl.maximum(unit - seq_unit - 1, 0)).to(tl.int32) * BLOCK_N
            stop = tl.minimum(first_key + (stop_unit - seq_unit - 1).to(tl.int32) * BLOCK_N, length)
            acc = tl.zeros((BLOCK_M, 2 * HALF), tl.float32)
            m = tl.full((BLOCK_M,), LOWEST, tl.float32)
            l = tl.zeros((BLOCK_M,), tl.float32)
            if stop > first:
                position = length - num_queries + row_token
                whole_first = 0
                whole_stop = length
                if LEFT:
                    whole_first = length - 1 - window_left
                if RIGHT:
                    whole_stop = tl.minimum(length, length - num_queries + window_right + 1)
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
                    block_table + seq.to(tl.int64) * table_stride,
                    head,
                    k_centroids,
                    k_centroids,
                    k_scale,
                    k_table,
                    v_centroids,
                    v_scale,
                    v_table,
                    P,
                    D,
                    HALF,
                    BLOCK_N,
                    False,
                    SOFTCAP,
                    LEFT,
                    RIGHT,
                    WGMMA,
                    PTX,
                )
            slot = ((share + seq).to(tl.int64) * NUM_KV_HEADS + head) * max_rows + row
            tl.store(partial_out + slot[:, None] * (2 * HALF) + column[None, :], acc, mask=row_valid[:, None])
            tl.store(partial_sums + slot * 2, m, mask=row_valid)
            tl.store(partial_sums + slot * 2 + 1, l, mask=row_valid)
        unit = stop_unit
        seq += 1


@triton.jit(
    do_not_specialize=["lse_stride", "num_seqs", "max_shares", "max_rows"],
    do_not_specialize_on_alignment=["query_start_loc"],
)
def combine_kernel(
    partial_out,
    partial_sums,
    units,
    query_start_loc,
    out_rotation,
    out,
    lse,
    sinks,
    out_token_stride,
    out_head_stride,
    lse_stride,
    num_seqs,
    max_shares,
    max_rows,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MIN_UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """Merge the partial results of one sequence and KV head, and rotate back.

    Args:
        partial_out, partial_sums, units: as in split_kernel.
        out_rotation: fp32 [D, D] or None.
        out: [num_tokens, Hq, D] fp16 or bf16; strides in elements.
        lse: fp32 [Hq, lse_stride] or None; sinks: fp32 [Hq] or None.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    seq = tl.program_id(0) // NUM_KV_HEADS
    first_unit = tl.load(units + seq).to(tl.int64)
    stop_unit = tl.load(units + seq + 1).to(tl.int64)
    if stop_unit == first_unit:
        return  # no query tokens
    total_units = tl.load(units + num_seqs).to(tl.int64)
    num_shares = _num_shares(total_units, max_shares, MIN_UNITS)
    # Unit u belongs to the last share i with i W / E <= u, that is i <= ((u + 1) E - 1) / W.
    first_share = (((first_unit + 1) * num_shares - 1) // total_units).to(tl.int32)
    last_share = ((stop_unit * num_shares - 1) // total_units).to(tl.int32)

    if query_start_loc is None:
        start_token = seq
        num_queries = 1
    else:
        start_token = tl.load(query_start_loc + seq)
        num_queries = tl.load(query_start_loc + seq + 1) - start_token
    row = tl.arange(0, BLOCK_M)
    row_valid = (row < num_queries * GROUP) & (row < max_rows)
    row_head = head * GROUP + row % GROUP
    token = (start_token + row // GROUP).to(tl.int64)
    column = tl.arange(0, 2 * HALF)

    acc = tl.zeros((BLOCK_M, 2 * HALF), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + row_head, mask=row_valid, other=0.0) * LOG2E
        m = tl.maximum(sink, LOWEST)
        l = tl.math.exp2(sink - m)
    else:
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
    for share in tl.range(first_share, last_share + 1, num_stages=4):
        slot = ((share + seq).to(tl.int64) * NUM_KV_HEADS + head) * max_rows + row
        part_m = tl.load(partial_sums + slot * 2, mask=row_valid, other=LOWEST)
        part_l = tl.load(partial_sums + slot * 2 + 1, mask=row_valid, other=0.0)
        part = tl.load(
            partial_out + slot[:, None] * (2 * HALF) + column[None, :], mask=row_valid[:, None], other=0.0
        )
        new_m = tl.maximum(m, part_m)
        old_weight = tl.math.exp2(m - new_m)
        weight = tl.math.exp2(part_m - new_m)
        acc = acc * old_weight[:, None] + part * weight[:, None]
        l = l * old_weight + part_l * weight
        m = new_m

    # A row without a visible key (and without a sink) has l = 0: output 0, LSE -inf.
    acc = acc * tl.where(l == 0.0, 0.0, 1.0 / l)[:, None]
    if lse is not None:
        value = tl.where(l == 0.0, float("-inf"), (m + tl.math.log2(l)) * LN2)
        tl.store(lse + row_head.to(tl.int64) * lse_stride + token, value, mask=row_valid)
    # [7] rotate back
    out_rows = out + token * out_token_stride + row_head.to(tl.int64) * out_head_stride
    store_rotated(acc, out_rows, row_valid, out_rotation, D, HALF, CHUNK, ROTATION_SCALE)
