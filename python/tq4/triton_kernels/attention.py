"""The loop over keys that prefill and decode share: steps [3] to [6] of attention for one tile of query rows.

Code words of the next tile are fetched into registers before the current one is worked on:

    [3] scores      nibbles -> k8 (or fp16 centroids); S = q . k on tensor cores; norms are column factors
    [4] mask        length, window, diagonal
    [5] softmax     running maximum, base 2
    [6] values      nibbles -> V' = fp16(fp16(c) * n); O += P V'

The int32 accumulator starts at the bits of 12582912.0f, so that the finished sum read as a float is
12582912 + q8 . k8 and one multiply-add by the norm replaces a conversion and a multiplication: conversions
share the narrow pipe of the exponentials.  The rounding of 12582912 * norm is the same for every row of a
column.

Two shapes of the same loop.  With wgmma (sm_90, at least 64 rows) the expanded tile goes to shared memory
right before its product, and masks sit behind a branch.  With mma.sync the compiler chooses operand layouts
by looking backwards from a product: it must find neither the joins of the expansion (it would guess packed
storage, widen the operands and send P through shared memory) nor a branch between the two products (it would
not see that the second follows the first).  So there a tile is expanded one iteration ahead and masks are
always applied.

What only reading the machine code showed (tests/triton_sass.py), for a 128 x 64 step of 8 warps on sm_90:
  - addresses are built from groups of 16 tokens: one page lookup and immediate offsets serve a group; a
    lookup per token costs 300 instructions a thread of 950;
  - code words travel through the loop as 32-bit words: bytes would be split and merged at its edges;
  - queries are read from memory: rotated in the same kernel, the compiler would keep the product in
    registers and shuffle it into operand order in every iteration;
  - one loop with a branch around the masks: with separate loops each norm is loaded in two layouts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    GROUP_TOKENS,
    LOG2E,
    MAGIC,
    MAGIC_BITS,
    byte_table,
    expand_bytes,
    expand_halves,
    expand_values,
    half_scale,
    half_table,
    load_tile,
)


@triton.jit
def key_tables(k_centroids, k_codes, INT8: tl.constexpr, PTX: tl.constexpr):
    """The table that expands key codes, and the factor its entries lack (1 for INT8)."""
    if INT8:
        return 1.0, byte_table(k_codes, PTX)
    else:  # an else, as what follows a return is still compiled
        scale = half_scale(k_centroids)
        return scale, half_table(k_centroids, scale, PTX)


@triton.jit
def score_factors(row_scale, score_scale, softcap, SOFTCAP: tl.constexpr):
    """What :func:`walk_keys` multiplies scores by: factor [ROWS] > 0 and cap."""
    if SOFTCAP:
        # exp2(t * factor) = exp(2 * score / softcap), and cap * tanh(...) is a score times log2(e)
        factor = row_scale * (score_scale * 2.0 * LOG2E / softcap)
        cap = softcap * LOG2E
    else:
        factor = row_scale * (score_scale * LOG2E)
        cap = 0.0
    # A zero row has t = 0, so any factor serves; 0 would turn the -inf of a masked key into NaN.
    return tl.where(factor == 0.0, 1.0, factor), cap


@triton.jit
def _keys(words, k_centroids, k_codes, k_scale, k_table, INT8: tl.constexpr, PTX: tl.constexpr):
    """Keys without their norms, [TOKENS, 2 * HALF]: int8 codes, or fp16 centroids / k_scale."""
    if INT8:
        return expand_bytes(words, k_codes, k_table, PTX)
    else:  # an else, as what follows a return is still compiled
        return expand_halves(words, k_centroids, k_scale, k_table, PTX)


@triton.jit
def _values(words, norm, first, length, v_centroids, v_scale, v_table, PTX: tl.constexpr):
    """V' fp16 [TOKENS, 2 * HALF]; zeros past the sequence's end, where the norms are garbage."""
    norm = tl.where(first + tl.arange(0, words.shape[0]) < length, norm, 0.0)
    return expand_values(words, norm, v_centroids, v_scale, v_table, PTX)


@triton.jit
def _mask(t, first, position, length, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """-inf for the keys (columns, from first on) that a query (rows, at position) does not see."""
    key = first + tl.arange(0, t.shape[1])
    visible = (key < length)[None, :]
    if LEFT:
        visible = visible & (key[None, :] >= (position - window_left)[:, None])
    if RIGHT:
        visible = visible & (key[None, :] <= (position + window_right)[:, None])
    return tl.where(visible, t, float("-inf"))


@triton.jit
def walk_keys(
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
    P: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT8: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WGMMA: tl.constexpr,
    PTX: tl.constexpr,
):
    """Attend to keys first .. stop - 1 (first a multiple of 16, first < stop <= length).

    Args:
        acc, m, l: running output fp32 [ROWS, 2 * HALF], maximum and sum fp32 [ROWS] of the softmax (base 2).
        q: int8 or fp16 [ROWS, 2 * HALF], even | odd.
        factor: fp32 [ROWS] > 0, from (q . k) * norm to a score times log2(e); with SOFTCAP to the exponent
            of exp2(2 log2(e) score / softcap).
        cap: softcap * log2(e), used with SOFTCAP.
        position: int32 [ROWS] of the queries; keys whole_first .. whole_stop - 1 are visible to all of them.
        table: this sequence's row of block_table; head: KV head.
        k_scale, k_table: of key_tables; v_scale, v_table: of half_scale and half_table.

    Returns:
        acc, m, l.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    last_group = (stop - 1) // GROUP_TOKENS
    # Of the first tile; WGMMA expands words to vectors when it needs them, mma.sync one tile ahead.
    k_words, v_words, k_norm, v_norm = load_tile(cache, table, head, first, last_group, P, D, HALF, BLOCK_N)
    if WGMMA:
        k = k_words
        v = v_words
    else:
        k = _keys(k_words, k_centroids, k_codes, k_scale, k_table, INT8, PTX)
        v = _values(v_words, v_norm, first, length, v_centroids, v_scale, v_table, PTX)
    for start in tl.range(first, stop, BLOCK_N, num_stages=1):
        # Fetch the next tile before working on this one; past the end the last group is fetched again.
        next_k_words, next_v_words, next_k_norm, next_v_norm = load_tile(
            cache, table, head, start + BLOCK_N, last_group, P, D, HALF, BLOCK_N
        )
        # [3] scores: t = (q . k) * n_k, still to be multiplied by the row's factor
        if WGMMA:
            keys = _keys(k, k_centroids, k_codes, k_scale, k_table, INT8, PTX)
        else:
            keys = k
        if INT8:
            dots = tl.full((BLOCK_M, BLOCK_N), MAGIC_BITS, tl.int32)
            dots = tl.dot(q, keys.T, dots, out_dtype=tl.int32)
            n = tl.broadcast_to(k_norm[None, :], (BLOCK_M, BLOCK_N))
            shift = tl.broadcast_to((k_norm * -MAGIC)[None, :], (BLOCK_M, BLOCK_N))
            t = tl.fma(dots.to(tl.float32, bitcast=True), n, shift)
        else:
            t = tl.dot(q, keys.T) * k_norm[None, :]
        if SOFTCAP:
            e = tl.math.exp2(t * factor[:, None])
            t = cap - 2.0 * cap / (e + 1.0)
        # [4] mask.  Past the sequence's end t and the norms are garbage: select, never multiply by zero.
        if WGMMA:
            if (start < whole_first) | (start + BLOCK_N > whole_stop):
                t = _mask(t, start, position, length, window_left, window_right, LEFT, RIGHT)
        else:
            t = _mask(t, start, position, length, window_left, window_right, LEFT, RIGHT)
        # [5] softmax, base 2.  The factor is positive: it can be applied after the maximum.
        if SOFTCAP:
            new_m = tl.maximum(m, tl.max(t, 1))
            p = tl.math.exp2(t - new_m[:, None])
        else:
            new_m = tl.maximum(m, tl.max(t, 1) * factor)
            p = tl.math.exp2(t * factor[:, None] - new_m[:, None])
        correction = tl.math.exp2(m - new_m)
        m = new_m
        l = l * correction + tl.sum(p, 1)
        # [6] values
        if WGMMA:
            values = _values(v, v_norm, start, length, v_centroids, v_scale, v_table, PTX)
        else:
            values = v
        acc = tl.dot(p.to(tl.float16), values, acc * correction[:, None])
        k_norm = next_k_norm
        if WGMMA:
            k = next_k_words
            v = next_v_words
            v_norm = next_v_norm
        else:
            k = _keys(next_k_words, k_centroids, k_codes, k_scale, k_table, INT8, PTX)
            v = _values(
                next_v_words, next_v_norm, start + BLOCK_N, length, v_centroids, v_scale, v_table, PTX
            )
    return acc, m, l
