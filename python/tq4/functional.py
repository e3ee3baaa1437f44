"""The public functions: thin wrappers that allocate outputs, fill in defaults and call ``torch.ops.tq4``.

All work under ``torch.compile(fullgraph=True)``.  None synchronises with the host, except :func:`gather` when
it has to find out how many rows to return.  Errors common to all of them:

* TypeError: an argument of the wrong type or dtype; ValueError: a wrong shape, stride, device or number.  The
message
  names the argument, what was expected and what came, and nothing has been written.
* RuntimeError: an explicitly requested backend cannot serve these tensors, and why.

Where the last dimension of an *input* is not contiguous it is copied; an ``out`` must be usable as it is.

:func:`store`, :func:`compress` and :func:`decode` hand the ops the signs of a quantiser's Hadamard rotation
where it has one, the others its matrix (:mod:`tq4.rotation`); results do not depend on it beyond rounding.

Symbols: T tokens, B sequences, Hq query heads, Hkv KV heads, D head_dim.  The byte format is specified in
:mod:`tq4.layout`, the arithmetic in :mod:`tq4.backends.reference`.
"""

from __future__ import annotations

import math

import torch

from .cache import PagedCache
from .dispatch import backend_id
from .layout import code_bytes
from .quantizer import Quantizer

Cache = PagedCache | torch.Tensor


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Cache,
    slot_mapping: torch.Tensor,
    quantizer: Quantizer,
    *,
    rotate_k: bool = True,
    rotate_v: bool = True,
    backend: str | None = None,
) -> None:
    """Rotate, quantise and pack new tokens and scatter them into the pages.

    Args:
        key, value: ``[T, Hkv, D]`` fp16, bf16 or fp32, strided.
        cache: a :class:`PagedCache` or its tensor; written.
        slot_mapping: int64 ``[T]``, ``block * block_size + offset``; -1 skips a token.
        quantizer: rotations, codebooks, and whether norms are corrected.
        rotate_k, rotate_v: False where the vectors come rotated already.
        backend: "cuda", "cuda-sm80", "triton" or "reference" instead of the one in force.
    """
    key = _input("key", key)
    value = _input("value", value)
    shape = key.shape
    tensor, _ = _cache(cache, shape[1] if len(shape) == 3 else None)
    _head_dim("key", key, quantizer)
    k_rotation, v_rotation = _rotations(quantizer, signs=True)
    torch.ops.tq4.store.default(
        key,
        value,
        tensor,
        _tensor("slot_mapping", slot_mapping),
        k_rotation if rotate_k else None,
        v_rotation if rotate_v else None,
        quantizer.k_centroids,
        quantizer.k_boundaries,
        quantizer.v_centroids,
        quantizer.v_boundaries,
        quantizer.norm_correction,
        backend_id(backend),
    )


def gather(
    cache: Cache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    quantizer: Quantizer,
    *,
    num_kv_heads: int | None = None,
    rotate_k: bool = True,
    rotate_v: bool = True,
    dtype: torch.dtype = torch.float16,
    total: int | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the pages of some sequences to dense K and V, one sequence after the other.

    Args:
        cache: a :class:`PagedCache` or its tensor.
        block_table: int32 ``[B, max_blocks]``.
        seq_lens: int32 ``[B]``.
        quantizer: rotations and codebooks.
        num_kv_heads: Hkv; needed for a raw token-major tensor.
        rotate_k, rotate_v: False leaves the vectors in rotated space.
        dtype: fp16, bf16 or fp32, of the result.
        total: rows of the result, at least the sum of seq_lens; None synchronises with the host to sum them.
        out: ``(key, value)`` to write into, each ``[total, Hkv, D]``.
        backend: instead of the one in force.

    Returns:
        key and value ``[total, Hkv, D]``; sequence s begins at row ``seq_lens[:s].sum()``.  Rows after the
        last sequence are not written.
    """
    seq_lens = _tensor("seq_lens", seq_lens)
    tensor, heads = _cache(cache, num_kv_heads)
    if out is None:
        rows = int(seq_lens.sum()) if total is None else total
        empty = torch.empty((rows, heads, quantizer.head_dim), dtype=dtype, device=tensor.device)
        out = (empty, torch.empty_like(empty))
    key, value = _tensor("out", out[0]), _tensor("out", out[1])
    _head_dim("out", key, quantizer)
    if key.dim() == 3 and (key.shape[1] != heads or (total is not None and key.shape[0] != total)):
        raise ValueError(
            f"out: expected shape [{'total' if total is None else total}, {heads}, {quantizer.head_dim}], "
            f"got {list(key.shape)}"
        )
    starts = torch.constant_pad_nd(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    torch.ops.tq4.gather.default(
        tensor,
        _tensor("block_table", block_table),
        seq_lens,
        starts,
        quantizer.k_rotation if rotate_k else None,
        quantizer.v_rotation if rotate_v else None,
        quantizer.k_centroids,
        quantizer.v_centroids,
        key,
        value,
        backend_id(backend),
    )
    return key, value


def compress(
    x: torch.Tensor,
    quantizer: Quantizer,
    *,
    which: str = "k",
    rotate: bool = True,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode vectors without a cache.

    Args:
        x: ``[N, H, D]`` fp16, bf16 or fp32.
        quantizer: rotations, codebooks, and whether norms are corrected.
        which: "k" or "v": whose rotation and codebook.
        rotate: False where x comes rotated already.
        out: ``(packed, norms)`` to write into.
        backend: instead of the one in force.

    Returns:
        packed uint8 ``[N, H, D / 2]`` and norms fp32 ``[N, H, 1]``.
    """
    x = _input("x", x)
    _head_dim("x", x, quantizer)
    rotation, centroids, boundaries = _side(quantizer, which, signs=True)
    if out is None:
        shape = x.shape[:-1]
        packed = torch.empty((*shape, code_bytes(quantizer.head_dim)), dtype=torch.uint8, device=x.device)
        norms = torch.empty((*shape, 1), dtype=torch.float32, device=x.device)
    else:
        packed, norms = _tensor("out", out[0]), _tensor("out", out[1])
    torch.ops.tq4.compress.default(
        x,
        rotation if rotate else None,
        centroids,
        boundaries,
        packed,
        norms,
        quantizer.norm_correction,
        backend_id(backend),
    )
    return packed, norms


def decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    quantizer: Quantizer,
    *,
    which: str = "k",
    dtype: torch.dtype = torch.float16,
    rotate: bool = True,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Decode vectors made by :func:`compress`.

    Args:
        packed: uint8 ``[N, H, D / 2]``.
        norms: fp32 ``[N, H, 1]``.
        quantizer: rotations and codebooks.
        which: "k" or "v": whose rotation and codebook.
        dtype: fp16, bf16 or fp32, of the result.
        rotate: False leaves the vectors in rotated space.
        out: contiguous ``[N, H, D]`` to write into (its dtype counts).
        backend: instead of the one in force.

    Returns:
        ``[N, H, D]``.
    """
    packed = _tensor("packed", packed).contiguous()
    norms = _tensor("norms", norms).contiguous()
    rotation, centroids, _ = _side(quantizer, which, signs=False)
    if out is None:
        out = torch.empty((*packed.shape[:-1], quantizer.head_dim), dtype=dtype, device=packed.device)
    torch.ops.tq4.decompress.default(
        packed,
        norms,
        rotation if rotate else None,
        centroids,
        _tensor("out", out),
        backend_id(backend),
    )
    return out


def prefill(
    q: torch.Tensor,
    cache: Cache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    quantizer: Quantizer,
    *,
    num_kv_heads: int | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    rotate_q: bool = True,
    rotate_out: bool = True,
    int8: bool = True,
    max_query_len: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a variable-length batch of queries over their sequences' compressed pages.

    The keys of a sequence, its queries' own included, must have been stored before.  With L keys and T
    queries in a sequence, query t sits at position ``L - T + t`` (chunked and prefix-cached prefill need
    nothing else).

    Memory: where 512 or more query rows (``max_query_len * Hq / Hkv``) share keys, the CUDA backend unpacks
    each tile of keys once into a workspace of at most 512 MiB from torch's allocator (beside the quantised
    queries, ``T * Hq * (D + 4)`` bytes), in passes where more keys than that are in the call.
    ``TQ4_PREFILL_UNPACK=in_kernel`` never does, ``ahead`` always, whatever the rows.

    Sequences of few query tokens (up to 16 query rows sharing keys, and always a single token) take the
    kernels of :func:`decode` within the same call, so that decoding sequences beside a chunk of a prompt are
    as fast as in a decode.  So do up to 64 rows where ``max_query_len`` says that no sequence has more, as
    when drafts are verified (on other devices than Hopper: INT8 and D up to 128 only).
    ``TQ4_PREFILL_SHORT=prefill`` keeps all in the prefill kernels.

    Args:
        q: ``[T, Hq, D]`` fp16 or bf16, strided.  Rows past ``query_start_loc[B]`` are padding.
        cache: a :class:`PagedCache` or its tensor.
        block_table: int32 ``[B, max_blocks]``; entries past a sequence's last page are never used.
        seq_lens: int32 ``[B]``, keys of each sequence, this call's included.
        query_start_loc: int32 ``[B + 1]``, first row of q of each sequence, and the end.
        quantizer: rotations and codebooks.
        num_kv_heads: Hkv; needed for a raw token-major tensor.
        sm_scale: factor of the scores; default ``1 / sqrt(D)``.
        causal: a query sees keys up to its own position.
        window: how many keys to the (left, right) of its position a query sees besides the one at it; -1
            unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 = none.
        sinks: fp32 ``[Hq]``, a logit for each head that joins the softmax's denominator.
        rotate_q: False where q comes rotated already.
        rotate_out: False leaves the output in rotated space.
        int8: quantise q and use int8 keys (spec: the INT8 recipe); False is more exact and slower.
        max_query_len: upper bound of the queries of one sequence; None = unknown.
        out: ``[T, Hq, D]`` of q's dtype to write into.
        return_lse: also return the log-sum-exp of the scores.
        backend: instead of the one in force.

    Returns:
        out ``[T, Hq, D]``, or ``(out, lse)`` with lse fp32 ``[Hq, T]``, natural logarithm.  A query that sees
        no key has output 0 and LSE -inf (its sink's logit where there are sinks).  Padding rows are not
        written.
    """
    return _attention(
        torch.ops.tq4.prefill.default,
        False,
        q,
        cache,
        block_table,
        seq_lens,
        _tensor("query_start_loc", query_start_loc),
        quantizer,
        num_kv_heads,
        sm_scale,
        causal,
        window,
        softcap,
        sinks,
        rotate_q,
        rotate_out,
        int8,
        -1 if max_query_len is None else max_query_len,
        out,
        return_lse,
        backend,
    )


def decode(
    q: torch.Tensor,
    cache: Cache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    quantizer: Quantizer,
    *,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int = 1,
    num_kv_heads: int | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    rotate_q: bool = True,
    rotate_out: bool = True,
    int8: bool = True,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one to a few query tokens a sequence, split over the keys.

    The same as :func:`prefill` in every respect but speed, and in three arguments.

    Args:
        query_start_loc: int32 ``[B + 1]``, or None for exactly one token a sequence (T = B).
        max_query_len: upper bound of the query tokens of one sequence.
        int8: True follows the INT8 recipe.  False is the exact mode: scores by fp16 products, or, on Hopper
            where pages can be bulk copied (all that a :class:`PagedCache` allocates but for odd numbers of
            KV heads), by INT8 products of two terms each, code and residual, for q and for keys: no less
            exact than fp16, and about a fifth slower than the INT8 recipe, not two and a half times.

    Returns:
        As :func:`prefill`.
    """
    return _attention(
        torch.ops.tq4.decode.default,
        True,
        q,
        cache,
        block_table,
        seq_lens,
        query_start_loc,
        quantizer,
        num_kv_heads,
        sm_scale,
        causal,
        window,
        softcap,
        sinks,
        rotate_q,
        rotate_out,
        int8,
        max_query_len,
        out,
        return_lse,
        backend,
    )


def _attention(
    op: torch._ops.OpOverload,
    signs: bool,
    q: torch.Tensor,
    cache: Cache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    quantizer: Quantizer,
    num_kv_heads: int | None,
    sm_scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: torch.Tensor | None,
    rotate_q: bool,
    rotate_out: bool,
    int8: bool,
    max_query_len: int,
    out: torch.Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    q = _input("q", q)
    _head_dim("q", q, quantizer)
    tensor, heads = _cache(cache, num_kv_heads)
    if out is None:
        out = _empty_like(q)
    lse = None
    if return_lse:
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    q_rotation, out_rotation = _rotations(quantizer, signs)
    op(
        q,
        tensor,
        _tensor("block_table", block_table),
        _tensor("seq_lens", seq_lens),
        query_start_loc,
        q_rotation if rotate_q else None,
        out_rotation if rotate_out else None,
        quantizer.k_centroids,
        quantizer.k_codes,
        quantizer.k_code_scale,
        quantizer.v_centroids,
        _tensor("out", out),
        lse,
        sinks,
        heads,
        1.0 / math.sqrt(quantizer.head_dim) if sm_scale is None else float(sm_scale),
        causal,
        window[0],
        window[1],
        softcap,
        max_query_len,
        int8,
        backend_id(backend),
    )
    return out if lse is None else (out, lse)


# ---- The pieces.


def _tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def _input(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor with a contiguous last dimension, copied if need be."""
    tensor = _tensor(name, value)
    strides = tensor.stride()
    return tensor if not strides or strides[-1] == 1 else tensor.contiguous()


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A plain, contiguous tensor of the same shape, dtype and device."""
    if type(tensor) is torch.Tensor:
        # Half the time of torch.empty.  Of a subclass it would make another of the subclass.
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _head_dim(name: str, tensor: torch.Tensor, quantizer: Quantizer) -> None:
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"quantizer: expected a tq4.Quantizer, got {type(quantizer).__name__}")
    shape = tensor.shape
    if len(shape) != 3 or shape[2] != quantizer.head_dim:
        raise ValueError(
            f"{name}: expected shape [tokens, heads, {quantizer.head_dim}] (the quantizer's head_dim), got "
            f"{list(shape)}"
        )


def _cache(cache: Cache, num_kv_heads: int | None) -> tuple[torch.Tensor, int]:
    """The tensor and the number of KV heads of a cache argument."""
    if isinstance(cache, PagedCache):
        if num_kv_heads is not None and num_kv_heads != cache.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected {cache.num_kv_heads}, that of the cache, got {num_kv_heads}"
            )
        return cache.tensor, cache.num_kv_heads
    if not isinstance(cache, torch.Tensor):
        raise TypeError(f"cache: expected a PagedCache or a torch.Tensor, got {type(cache).__name__}")
    if num_kv_heads is None:
        if cache.dim() != 4:
            raise ValueError("num_kv_heads: expected a number, since the cache is a raw token-major tensor")
        num_kv_heads = cache.shape[1]
    return cache, num_kv_heads


def _rotations(quantizer: Quantizer, signs: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rotations of K and V; where ``signs``, as signs if they have some."""
    k, v = quantizer.k_rotation, quantizer.v_rotation
    if signs:
        k = k if quantizer.k_signs is None else quantizer.k_signs
        v = v if quantizer.v_signs is None else quantizer.v_signs
    return k, v


def _side(
    quantizer: Quantizer, which: str, signs: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Rotation, centroids and boundaries of K or V."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"quantizer: expected a tq4.Quantizer, got {type(quantizer).__name__}")
    k_rotation, v_rotation = _rotations(quantizer, signs)
    if which == "k":
        return k_rotation, quantizer.k_centroids, quantizer.k_boundaries
    if which == "v":
        return v_rotation, quantizer.v_centroids, quantizer.v_boundaries
    raise ValueError(f"which: expected 'k' or 'v', got {which!r}")
