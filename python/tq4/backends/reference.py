"""The reference backend: every op in plain torch, on any device, written to be read rather than to be fast.

It is the numeric contract in executable form and what CPU tensors get.  A query walks the same seven steps
here, in the Triton and in the CUDA kernels:

    [1] rotate      q_rot = q @ R.T
    [2] quantise    q8, s_q (INT8 mode), one scale per row
    [3] scores      S = q_rot . K'        (INT8: q8 . k8, times the scales and the key's norm)
    [4] mask        soft cap, length, causal, window
    [5] softmax     over the whole row at once
    [6] values      O = P V'
    [7] rotate back out = O @ R

Unlike the kernels it synchronises with the host (it reads lengths and tables), so it cannot be captured in a
CUDA graph.  Rotations are computed in float64 and rounded to fp32 once, so that results do not depend on TF32
settings.

Symbols: T tokens, B sequences, Hq query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layout import NORM_BYTES, NORM_EPSILON, PageView, code_bytes, page_view
from ..rotation import as_matrix

#: Largest number of elements of a score matrix, and of the keys decoded at once: bounds the memory of a call.
MAX_ELEMENTS = 1 << 24

_MAX_CODE = 127.0


@dataclass(frozen=True)
class _Fields:
    """The four fields of a cache as uint8 views, [num_blocks, block_size, Hkv, bytes]."""

    k_codes: torch.Tensor
    k_norms: torch.Tensor
    v_codes: torch.Tensor
    v_norms: torch.Tensor


def _fields(cache: torch.Tensor, view: PageView) -> _Fields:
    def field(offset: int, token_stride: int, head_stride: int, size: int) -> torch.Tensor:
        shape = (view.num_blocks, view.block_size, view.num_kv_heads, size)
        strides = (view.block_stride, token_stride, head_stride, 1)
        return cache.as_strided(shape, strides, cache.storage_offset() + offset)

    codes = code_bytes(view.head_dim)
    code_strides = (view.code_token_stride, view.code_head_stride, codes)
    norm_strides = (view.norm_token_stride, view.norm_head_stride, NORM_BYTES)
    return _Fields(
        field(view.k_codes, *code_strides),
        field(view.k_norms, *norm_strides),
        field(view.v_codes, *code_strides),
        field(view.v_norms, *norm_strides),
    )


def _rotate(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rows of x times ``rotation.T``, fp32."""
    matrix = as_matrix(rotation)
    return x.float() if matrix is None else (x.double() @ matrix.double().T).float()


def _rotate_back(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rows of x times ``rotation``, in the dtype of x."""
    matrix = as_matrix(rotation)
    return x if matrix is None else (x.double() @ matrix.double()).to(x.dtype)


# ---- One vector.


def encode(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    norm_correction: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode vectors (spec: encoding one vector).

    Args:
        x: ``[..., D]``, any floating dtype.
        rotation: fp32 ``[D, D]``, or the signs ``[D]`` of a Hadamard one, or None (x is rotated already).
        centroids: fp32 ``[16]``.
        boundaries: fp32 ``[15]``.
        norm_correction: store the norm that gives the decoded vector the norm of x.

    Returns:
        uint8 codes ``[..., D / 2]`` and fp32 norms ``[...]``.
    """
    norms = x.double().square().sum(-1).sqrt().float()
    y = _rotate(x.float() / (norms + NORM_EPSILON)[..., None], rotation)
    index = torch.zeros(y.shape, dtype=torch.uint8, device=x.device)
    for boundary in boundaries:
        index += y > boundary  # the number of boundaries below y; NaN is above none
    codes = (index[..., 0::2] << 4) | index[..., 1::2]
    if norm_correction:
        length = centroids[index.int()].double().square().sum(-1).sqrt().float()
        # All coordinates at a centroid of zero decode to zero whatever the norm: store zero, not 0 / 0.
        norms = torch.where(length > 0, norms / length, torch.zeros_like(norms))
    return codes, norms


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """Indices 0..15 as int32 ``[..., D]`` of code bytes ``[..., D / 2]``; even ones are high nibbles."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2).int()


def decode_vectors(
    codes: torch.Tensor, norms: torch.Tensor, rotation: torch.Tensor | None, centroids: torch.Tensor
) -> torch.Tensor:
    """Decode vectors (spec: decoding).

    Args:
        codes: uint8 ``[..., D / 2]``.
        norms: fp32 ``[...]``.
        rotation: fp32 ``[D, D]``, or the signs ``[D]`` of a Hadamard one, or None to stay in rotated space.
        centroids: fp32 ``[16]``.

    Returns:
        fp32 ``[..., D]``.
    """
    return _rotate_back(centroids[unpack(codes)] * norms[..., None], rotation)


# ---- The ops.


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_rotation: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    k_centroids: torch.Tensor,
    k_boundaries: torch.Tensor,
    v_centroids: torch.Tensor,
    v_boundaries: torch.Tensor,
    norm_correction: bool = False,
) -> None:
    """torch.ops.tq4.store: encode key and value ``[T, Hkv, D]`` into the slots of slot_mapping ``[T]``."""
    view = page_view(cache, key.shape[1], key.shape[2])
    fields = _fields(cache, view)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    at = (slots // view.block_size, slots % view.block_size)
    for x, rotation, centroids, boundaries, code_field, norm_field in (
        (key, k_rotation, k_centroids, k_boundaries, fields.k_codes, fields.k_norms),
        (value, v_rotation, v_centroids, v_boundaries, fields.v_codes, fields.v_norms),
    ):
        codes, norms = encode(x[kept], rotation, centroids, boundaries, norm_correction)
        code_field[at] = codes
        norm_field[at] = norms[..., None].view(torch.uint8)


def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out_start_loc: torch.Tensor,
    k_rotation: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    k_centroids: torch.Tensor,
    v_centroids: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """torch.ops.tq4.gather: decode the sequences' pages into key and value ``[total, Hkv, D]``."""
    view = page_view(cache, key.shape[1], key.shape[2])
    fields = _fields(cache, view)
    step = max(view.block_size, MAX_ELEMENTS // (view.num_kv_heads * view.head_dim))
    step -= step % view.block_size
    for seq, (length, start) in enumerate(zip(seq_lens.tolist(), out_start_loc.tolist(), strict=False)):
        for first in range(0, length, step):
            rows = slice(start + first, start + min(first + step, length))
            pages = _pages(block_table[seq], first, min(first + step, length), view)
            size = rows.stop - rows.start
            k = decode_vectors(*_read(fields.k_codes, fields.k_norms, pages, size), k_rotation, k_centroids)
            v = decode_vectors(*_read(fields.v_codes, fields.v_norms, pages, size), v_rotation, v_centroids)
            key[rows] = k.to(key.dtype)
            value[rows] = v.to(value.dtype)


def compress(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    norm_correction: bool = False,
) -> None:
    """torch.ops.tq4.compress: x ``[N, H, D]`` into packed ``[N, H, D / 2]`` and norms ``[N, H, 1]``."""
    codes, lengths = encode(x, rotation, centroids, boundaries, norm_correction)
    packed.copy_(codes)
    norms.copy_(lengths[..., None])


def decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """torch.ops.tq4.decompress: packed ``[N, H, D / 2]``, norms ``[N, H, 1]`` into out ``[N, H, D]``."""
    out.copy_(decode_vectors(packed, norms[..., 0], rotation, centroids))


def prefill(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    q_rotation: torch.Tensor | None,
    out_rotation: torch.Tensor | None,
    k_centroids: torch.Tensor,
    k_codes: torch.Tensor,
    k_code_scale: float,
    v_centroids: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    num_kv_heads: int,
    sm_scale: float,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    max_query_len: int = -1,
    int8: bool = True,
) -> None:
    """torch.ops.tq4.prefill: attention of q ``[T, Hq, D]`` over the sequences' pages, into out and lse.

    ``int8`` selects the INT8 recipe; without it the arithmetic is exact (fp32) up to the cache's own error.
    """
    result, result_lse = attention(
        q,
        cache,
        block_table,
        seq_lens,
        query_start_loc,
        q_rotation=q_rotation,
        out_rotation=out_rotation,
        k_centroids=k_centroids,
        v_centroids=v_centroids,
        num_kv_heads=num_kv_heads,
        sm_scale=sm_scale,
        causal=causal,
        window=(window_left, window_right),
        softcap=softcap,
        sinks=sinks,
        int8=(k_codes, k_code_scale) if int8 else None,
        # fp32 products may be TF32 on a GPU; float64 ones never are.
        dtype=torch.float64 if q.is_cuda and not int8 else torch.float32,
    )
    # Rows past query_start_loc[B] are padding and stay as they are.
    rows = result.shape[0]
    out[:rows] = result.to(out.dtype)
    if lse is not None:
        lse[:, :rows] = result_lse.to(lse.dtype)


#: torch.ops.tq4.decode: the same arithmetic (query_start_loc None: one token a sequence).
decode = prefill


def attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None = None,
    *,
    q_rotation: torch.Tensor | None,
    out_rotation: torch.Tensor | None,
    k_centroids: torch.Tensor,
    v_centroids: torch.Tensor,
    num_kv_heads: int,
    sm_scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    int8: tuple[torch.Tensor, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a TQ4 cache, exact or by the INT8 recipe (spec: attention over the cache).

    Args:
        q: ``[T, Hq, D]``, any floating dtype.
        cache: uint8 ``[num_blocks, block_size, >= Hkv * (D + 8)]`` or ``[num_blocks, Hkv, block_size, D +
            8]``.
        block_table: int32 ``[B, max_blocks]``; entries past a sequence's last page are never used.
        seq_lens: int32 ``[B]``, keys of each sequence including those of its queries.
        query_start_loc: int32 ``[B + 1]``, or None for one query a sequence.
        q_rotation: fp32 ``[D, D]``, or the signs ``[D]`` of a Hadamard one, or None when q is rotated
            already.
        out_rotation: the same, or None to leave the output rotated.
        k_centroids, v_centroids: fp32 ``[16]``.
        num_kv_heads: Hkv.
        sm_scale: factor of the scores; default ``1 / sqrt(D)``.
        causal: bottom-right causal mask.
        window: visible keys to the (left, right) of a query's position; -1 unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 = none.
        sinks: fp32 ``[Hq]``, logits added to the denominator.
        int8: ``(k_codes, k_code_scale)`` for the INT8 recipe; None for exact attention in ``dtype``.
        dtype: torch.float32 or torch.float64, of the exact computation.

    Returns:
        ``(out [n, Hq, D], lse [Hq, n])`` in ``dtype``, n = query_start_loc[B] (rows after it are padding).
    """
    num_tokens, num_q_heads, head_dim = q.shape
    view = page_view(cache, num_kv_heads, head_dim)
    fields = _fields(cache, view)
    q_rotation, out_rotation = as_matrix(q_rotation), as_matrix(out_rotation)
    lengths = seq_lens.tolist()
    starts = list(range(len(lengths) + 1)) if query_start_loc is None else query_start_loc.tolist()
    scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else sm_scale
    group = num_q_heads // num_kv_heads
    total = min(starts[-1], num_tokens)
    compute = torch.float32 if int8 is not None else dtype
    out = torch.zeros(total, num_q_heads, head_dim, dtype=compute, device=q.device)
    lse = torch.full((num_q_heads, total), -math.inf, dtype=compute, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(compute)[:, None]
    for seqs, length, tokens, count in _alike(lengths, starts, total, num_kv_heads * head_dim, num_q_heads):
        first_rows = torch.tensor([starts[seq] for seq in seqs], device=q.device)
        places = first_rows[:, None] + torch.arange(count, device=q.device)  # in q: [sequences, count]
        pages = _pages(block_table[seqs], 0, length, view)
        heads_at_once = max(1, min(num_kv_heads, MAX_ELEMENTS // (len(seqs) * length * head_dim)))
        for first in range(0, num_kv_heads, heads_at_once):
            heads = slice(first, min(first + heads_at_once, num_kv_heads))
            k_index, k_norms = _keys(fields.k_codes, fields.k_norms, pages, length, heads)
            v_index, v_norms = _keys(fields.v_codes, fields.v_norms, pages, length, heads)
            if int8 is None:
                keys = k_centroids.to(compute)[k_index] * k_norms.to(compute)[..., None]
                values = v_centroids.to(compute)[v_index] * v_norms.to(compute)[..., None]
            else:
                keys = int8[0].to(compute)[k_index]
                values = (v_centroids.half().float()[v_index] * v_norms[..., None]).half().float()
            rows_at_once = max(1, MAX_ELEMENTS // (k_norms.numel() * group))
            for row in range(0, count, rows_at_once):
                rows = places[:, row : row + rows_at_once]
                q_heads = slice(heads.start * group, heads.stop * group)
                # [sequences, heads, group, rows, D]: query head h reads KV head h // group.
                queries = q[rows][:, :, q_heads].transpose(1, 2).unflatten(1, (-1, group))
                # [1] rotate
                if q_rotation is None:
                    queries = queries.to(compute)
                else:
                    queries = (queries.double() @ q_rotation.double().T).to(compute)
                # [2] quantise, [3] scores
                if int8 is None:
                    scores = (queries @ keys[:, :, None].transpose(-1, -2)) * scale
                else:
                    codes, steps = quantise_queries(queries)
                    # |q8 . k8| <= 127 * 126 * 256 < 2^24: exact in fp32 (and in TF32 with fp32 accumulation).
                    dots = codes @ keys[:, :, None].transpose(-1, -2)
                    scores = dots * (steps * (int8[1] * scale))[..., None] * k_norms[:, :, None, None]
                # [4] mask
                if softcap > 0.0:
                    scores = softcap * torch.tanh(scores / softcap)
                positions = torch.arange(row, row + rows.shape[1], device=q.device) + length - tokens
                visible = _visible(positions, length, causal, window)
                scores = scores.masked_fill(~visible, -math.inf)
                # [5] softmax
                sink = None if sinks is None else sinks[q_heads].to(compute).view(-1, group, 1)
                p, row_lse, denominator = _softmax(scores, sink)
                # [6] values
                if int8 is not None:
                    p = p.half().float()
                o = (p @ values[:, :, None]) / denominator[..., None]
                # [7] rotate back
                o = _rotate_back(o, out_rotation)
                out[rows, q_heads] = o.flatten(1, 2).transpose(1, 2)
                lse[q_heads, rows] = row_lse.flatten(1, 2).transpose(0, 1)
    return out.to(dtype), lse.to(dtype)


def quantise_queries(q_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scale of each query row (spec: the INT8 recipe).

    Args:
        q_rot: fp32 ``[..., D]``, rotated.

    Returns:
        Integers in [-127, 127] as fp32 ``[..., D]``, and fp32 scales ``[...]`` (0 for a zero row; NaN for a
        row with a NaN, which then spreads to that row's result and no further).
    """
    # Divided by a tensor: torch turns a scalar divisor into a product with its reciprocal on a GPU, and rows
    # of fp16 values hit exact ties that the last bit of the scale decides.
    largest = q_rot.abs().amax(-1)
    steps = largest / torch.full_like(largest, _MAX_CODE)
    safe = torch.where(steps > 0, steps, torch.ones_like(steps))  # a NaN row has codes 0 and scale NaN
    codes = torch.round(q_rot / safe[..., None]).clamp(-_MAX_CODE, _MAX_CODE).nan_to_num(0.0)
    return codes, steps


def _softmax(
    scores: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised probabilities ``exp(s - m)``, LSE and denominator of each row; masked scores are -inf.

    A row without a visible key has probabilities 0 and denominator 1, so that its output is 0 rather than
    NaN; its LSE is -inf, or the sink logit where there is one.
    """
    m = scores.amax(-1)
    if sink is not None:
        m = torch.maximum(m, sink)
    finite = torch.where(m == -math.inf, torch.zeros_like(m), m)
    p = torch.exp(scores - finite[..., None])
    total = p.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - finite)
    lse = torch.log(total) + finite
    return p, lse, torch.where(total == 0, torch.ones_like(total), total)


def _visible(positions: torch.Tensor, length: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """bool ``[rows, length]``: which keys the query at each position sees."""
    left, right = window
    if causal:
        right = 0
    keys = torch.arange(length, device=positions.device)
    visible = torch.ones(positions.shape[0], length, dtype=torch.bool, device=positions.device)
    if left >= 0:
        visible &= keys >= positions[:, None] - left
    if right >= 0:
        visible &= keys <= positions[:, None] + right
    return visible


def _alike(
    lengths: list[int], starts: list[int], total: int, key_elements: int, num_q_heads: int
) -> Iterator[tuple[list[int], int, int, int]]:
    """Sequences with as many keys and queries as each other, so many together as MAX_ELEMENTS allows.

    Decoding a batch otherwise takes the same small steps for each of its sequences.

    Args:
        lengths, starts: seq_lens and query_start_loc.
        total: rows of q.
        key_elements: of one token's keys.
        num_q_heads: Hq.

    Yields:
        The sequences, their keys, their queries, and how many of these are within ``total``.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for seq, length in enumerate(lengths):
        start, stop = starts[seq], starts[seq + 1]
        if length > 0 and min(stop, total) > start:
            groups.setdefault((length, stop - start, min(stop, total) - start), []).append(seq)
    for (length, tokens, count), seqs in groups.items():
        at_once = max(1, MAX_ELEMENTS // (length * max(key_elements, num_q_heads * count)))
        for first in range(0, len(seqs), at_once):
            yield seqs[first : first + at_once], length, tokens, count


def _pages(rows: torch.Tensor, first: int, stop: int, view: PageView) -> torch.Tensor:
    """Blocks that hold tokens first .. stop - 1 of some sequences (first is a multiple of block_size)."""
    return rows[..., first // view.block_size : -(-stop // view.block_size)].long()


def _read(
    codes: torch.Tensor, norms: torch.Tensor, pages: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[..., size, Hkv, D / 2]`` and norms ``[..., size, Hkv]`` of the first tokens of some pages.

    The rest of the last page is dropped before anything is computed from it: its bytes are garbage.
    """
    code_rows = codes[pages].flatten(-4, -3)[..., :size, :, :]
    norm_rows = norms[pages].flatten(-4, -3)[..., :size, :, :].contiguous().view(torch.float32)[..., 0]
    return code_rows, norm_rows


def _keys(
    codes: torch.Tensor, norms: torch.Tensor, pages: torch.Tensor, length: int, heads: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ``[..., heads, length, D]`` and norms ``[..., heads, length]`` of sequences."""
    code_rows, norm_rows = _read(codes[:, :, heads], norms[:, :, heads], pages, length)
    return unpack(code_rows.transpose(-3, -2)), norm_rows.transpose(-2, -1)
