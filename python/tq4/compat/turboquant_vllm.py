"""The kernel functions of the turboquant-vllm package (1.5.0), same signatures, bytes and semantics.

Replace ``from turboquant_vllm.triton... import fused_paged_tq4_decode`` by
``from tq4.compat.turboquant_vllm import fused_paged_tq4_decode``, and alike for the other three.  Caches
written by either package are read by the other.  Differences, all deliberate:

* Prefill queries are bottom-right causal: with L keys and T queries, query t sees keys up to ``L - T + t``,
so that
  chunked prefill is right.  (The original masks as if T were L.)
* A float tensor is rotated in fp32 throughout; the original rounds rotated queries to q's dtype first.
* Bad arguments raise ValueError or TypeError where the original asserts; head_dim is 64, 96, 128 or 256,
block_size a
  multiple of 16, and there are 16 centroids and 15 boundaries.
* CPU tensors work in all four (reference backend).

As in the original, prefill multiplies queries and keys in int8 and decode in fp16.

These functions take plain tensors where this project's own take a :class:`tq4.Quantizer`, so what a quantiser
prepares is derived from the tensors: the int8 codes of ``centroids``, R from the even and odd columns of its
transpose. That is done on the host at the first call with a tensor, and synchronises then; the result is kept
for as long as the tensor lives and is reused while the tensor is the same object with the same memory and
version, so later calls do not synchronise (and can be captured in a CUDA graph).  A tensor made under
``torch.inference_mode`` has no version: writing into such a tensor in place goes unnoticed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import codebook
from ..functional import _input, _tensor
from ..layout import NUM_CENTROIDS, code_bytes

__all__ = [
    "fused_paged_tq4_decode",
    "fused_paged_tq4_int8_prefill",
    "tq4_compress",
    "tq4_decompress",
]


class _Derived:
    """Values computed from tensors, kept while the tensors live and are unchanged."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._entries: dict[tuple[int, ...], tuple[tuple[Any, ...], tuple[Any, ...], Any]] = {}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        key = tuple(id(tensor) for tensor in tensors)
        state = tuple(
            (tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors
        )
        entry = self._entries.get(key)
        if entry is not None and entry[1] == state:
            # The same id is the same object only while that object lives.
            if all(ref() is tensor for ref, tensor in zip(entry[0], tensors, strict=True)):
                return entry[2]
        value = self._compute(*tensors)

        def forget(_: object) -> None:
            current = self._entries.get(key)
            if current is not None and any(ref() is None for ref in current[0]):
                self._entries.pop(key, None)

        references = tuple(weakref.ref(tensor, forget) for tensor in tensors)
        self._entries[key] = (references, state, value)
        return value


def _codes_of(centroids: torch.Tensor) -> dict[int, tuple[torch.Tensor, float]]:
    """A table head_dim -> (int8 codes on the device, scale), filled by :func:`_codes`."""
    if centroids.dtype != torch.float32:
        raise TypeError(f"centroids: expected dtype float32, got {centroids.dtype}")
    if tuple(centroids.shape) != (NUM_CENTROIDS,):
        raise ValueError(f"centroids: expected shape [{NUM_CENTROIDS}], got {list(centroids.shape)}")
    return {}


_code_tables = _Derived(_codes_of)


def _codes(centroids: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """int8 codes and scale of a centroid tensor; copies it to the host once."""
    table = _code_tables(centroids)
    if head_dim not in table:
        found = codebook.int8_codes(tuple(centroids.double().tolist()), head_dim)
        codes = torch.tensor(found.codes, dtype=torch.int8).to(centroids.device)
        table[head_dim] = (codes, found.scale)
    return table[head_dim]


def _join_rotation(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """R ``[D, D]`` from the even and odd columns of ``R.T``, each ``[D, D / 2]``."""
    for name, half in (("rotation_T_even", even), ("rotation_T_odd", odd)):
        if half.dtype != torch.float32:
            raise TypeError(f"{name}: expected dtype float32, got {half.dtype}")
        if half.dim() != 2 or half.shape[0] != 2 * half.shape[1] or half.shape != even.shape:
            raise ValueError(f"{name}: expected shape [D, D / 2], got {list(half.shape)}")
    if even.device != odd.device:
        raise ValueError(f"rotation_T_odd: expected device {even.device}, got {odd.device}")
    return torch.stack([even, odd], -1).flatten(1).T.contiguous()


_rotations = _Derived(_join_rotation)
#: Centroids that an op's schema asks for and compression without norm correction does not use.
_unused_centroids = _Derived(lambda boundaries: boundaries.new_zeros(NUM_CENTROIDS, dtype=torch.float32))


# ---- Attention.


def fused_paged_tq4_int8_prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last queries of ONE sequence over its compressed pages, by the INT8 recipe.

    Args:
        q: ``[num_tokens, Hq, D]`` fp16 or bf16, in original space; the sequence's last tokens.
        kv_cache: uint8 ``[num_blocks, block_size, >= Hkv * (D + 8)]``, token-major.
        block_table: int32 ``[1, max_blocks]``.
        seq_lens: int32 ``[1]``, keys including those of q.
        centroids: fp32 ``[16]``, of K and V.
        rotation: fp32 ``[D, D]``, of K and V.
        num_kv_heads, head_dim, block_size: Hkv, D, tokens a page.
        sm_scale: default ``1 / sqrt(D)``.
        out: ``[num_tokens, Hq, D]`` to write the result into.

    Returns:
        ``[num_tokens, Hq, D]`` in original space; ``out`` itself if given.

    Raises:
        ValueError: more than one sequence; a wrong shape, stride or device.
        TypeError: a wrong dtype.
    """
    for name, tensor, count in (
        ("seq_lens", seq_lens, seq_lens.numel()),
        ("block_table", block_table, block_table.shape[0]),
    ):
        if count != 1:
            raise ValueError(
                f"{name}: expected a single sequence, got {count} (shape {list(tensor.shape)}); tq4.prefill "
                "takes batches"
            )
    return _attention(
        q,
        kv_cache,
        block_table,
        seq_lens,
        centroids,
        rotation,
        num_kv_heads,
        head_dim,
        block_size,
        sm_scale,
        out,
        decode=False,
    )


def fused_paged_tq4_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token a sequence over its compressed pages.

    Args:
        q: ``[num_seqs, Hq, D]`` fp16 or bf16, in original space.
        kv_cache: uint8 ``[num_blocks, block_size, >= Hkv * (D + 8)]``, token-major.
        block_table: int32 ``[num_seqs, max_blocks]``.
        seq_lens: int32 ``[num_seqs]``, keys including that of q.
        centroids, rotation, num_kv_heads, head_dim, block_size, sm_scale, out: as
            :func:`fused_paged_tq4_int8_prefill`.

    Returns:
        ``[num_seqs, Hq, D]`` in original space; ``out`` itself if given.

    Raises:
        ValueError: a wrong shape, stride or device.
        TypeError: a wrong dtype.
    """
    return _attention(
        q,
        kv_cache,
        block_table,
        seq_lens,
        centroids,
        rotation,
        num_kv_heads,
        head_dim,
        block_size,
        sm_scale,
        out,
        decode=True,
    )


def _attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    sm_scale: float | None,
    out: torch.Tensor | None,
    decode: bool,
) -> torch.Tensor:
    q = _input("q", q)
    if q.dim() != 3 or q.shape[2] != head_dim:
        raise ValueError(f"q: expected shape [tokens, heads, {head_dim}] (head_dim), got {list(q.shape)}")
    if kv_cache.dim() != 3 or kv_cache.shape[1] != block_size:
        raise ValueError(
            f"kv_cache: expected shape [num_blocks, {block_size}, row_bytes] (block_size), got "
            f"{list(kv_cache.shape)}"
        )
    if out is not None and out.shape != q.shape:
        raise ValueError(f"out: expected shape {list(q.shape)}, that of q, got {list(out.shape)}")
    if out is not None and out.device != q.device:
        raise ValueError(f"out: expected device {q.device}, that of q, got {out.device}")
    # As the original, out may have any dtype and strides, or be q: where the kernel cannot write it, copy.
    compiling = torch.compiler.is_compiling()
    direct = (
        out is not None
        and not compiling
        and out.dtype == q.dtype
        and out.is_contiguous()
        and out.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    )
    result = out if direct else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
    arguments = (
        q,
        kv_cache,
        block_table,
        seq_lens.reshape(-1),
        centroids,
        rotation.contiguous(),
        result,
        num_kv_heads,
        scale,
        decode,
    )
    if compiling:
        torch.ops.tq4_compat.attention(*arguments)
    else:
        _run_attention(*arguments)
    # As the original: the result is made on its own and copied, so out may have any dtype and strides, or be
    # q.
    return result if out is None else out.copy_(result)


def _run_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    out: torch.Tensor,
    num_kv_heads: int,
    sm_scale: float,
    decode: bool,
) -> None:
    codes, code_scale = _codes(centroids, q.shape[2])
    tokens = q.shape[0]
    if decode:
        op, starts = torch.ops.tq4.decode, None
    else:
        # [0, tokens] made on the device: a copy from the host would wait for the stream.
        op, starts = torch.ops.tq4.prefill, torch.arange(2, dtype=torch.int32, device=q.device) * tokens
    op(
        q,
        kv_cache,
        block_table,
        seq_lens,
        starts,
        rotation,
        rotation,
        centroids,
        codes,
        code_scale,
        centroids,
        out,
        None,
        None,
        num_kv_heads,
        sm_scale,
        max_query_len=1 if decode else tokens,
        int8=not decode,
    )


# ---- Unpaged.


def tq4_compress(
    x: torch.Tensor,
    rotation_T_even: torch.Tensor,
    rotation_T_odd: torch.Tensor,
    boundaries: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode vectors: norm, rotation, 4-bit indices, packed nibbles (even dimension high).

    Args:
        x: ``[N, H, D]`` fp16, bf16 or fp32.
        rotation_T_even, rotation_T_odd: fp32 ``[D, D / 2]``, even and odd columns of ``rotation.T``.
        boundaries: fp32 ``[15]``.
        out: ``(packed, norms)`` to write into; uint8 and fp32 of the results' element counts.

    Returns:
        packed uint8 ``[N, H, D / 2]`` and norms fp32 ``[N, H, 1]``; the tensors of ``out`` if given.

    Raises:
        ValueError: a wrong shape, stride or device.
        TypeError: a wrong dtype.
    """
    x = _input("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [N, H, D], got {list(x.shape)}")
    tokens, heads, dim = x.shape
    shapes = ((tokens, heads, code_bytes(dim)), (tokens, heads, 1))
    if out is None:
        packed = torch.empty(shapes[0], dtype=torch.uint8, device=x.device)
        norms = torch.empty(shapes[1], dtype=torch.float32, device=x.device)
    else:
        packed, norms = (
            _buffer(name, buffer, shape)
            for name, buffer, shape in zip(("out[0]", "out[1]"), out, shapes, strict=True)
        )
    arguments = (x, rotation_T_even, rotation_T_odd, boundaries, packed, norms)
    if torch.compiler.is_compiling():
        torch.ops.tq4_compat.compress(*arguments)
    else:
        _run_compress(*arguments)
    return (packed, norms) if out is None else (out[0], out[1])


def _run_compress(
    x: torch.Tensor,
    rotation_T_even: torch.Tensor,
    rotation_T_odd: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    rotation = _rotations(rotation_T_even, rotation_T_odd)
    torch.ops.tq4.compress(x, rotation, _unused_centroids(boundaries), boundaries, packed, norms)


def tq4_decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    dtype: torch.dtype = torch.float16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode vectors; the result stays in rotated space.

    Args:
        packed: uint8 ``[N, H, D / 2]``.
        norms: fp32, ``N * H`` elements.
        centroids: fp32 ``[16]``.
        dtype: fp16, bf16 or fp32, of the result.
        out: of the result's element count, to write into; its dtype counts.

    Returns:
        ``[N, H, D]``, rotated; ``out`` itself if given.

    Raises:
        ValueError: a wrong shape, stride or device.
        TypeError: a wrong dtype.
    """
    packed = _tensor("packed", packed).contiguous()
    if packed.dim() != 3:
        raise ValueError(f"packed: expected shape [N, H, D / 2], got {list(packed.shape)}")
    tokens, heads, half = packed.shape
    if norms.numel() != tokens * heads:
        raise ValueError(
            f"norms: expected {tokens * heads} elements [N, H, 1], got shape {list(norms.shape)}"
        )
    shape = (tokens, heads, 2 * half)
    result = (
        torch.empty(shape, dtype=dtype, device=packed.device) if out is None else _buffer("out", out, shape)
    )
    torch.ops.tq4.decompress(packed, norms.reshape(tokens, heads, 1), None, centroids, result)
    return result if out is None else out


def _buffer(name: str, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A caller's buffer seen in another shape of as many elements."""
    if _tensor(name, buffer).numel() != math.prod(shape):
        raise ValueError(f"{name}: expected {list(shape)} elements, got shape {list(buffer.shape)}")
    if not buffer.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(buffer.stride())}")
    return buffer.view(shape)


# ---- Ops of their own for torch.compile: what is derived from tensors cannot be traced.

_library = torch.library.Library("tq4_compat", "DEF")
_library.define(
    "attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor centroids, "
    "Tensor rotation, Tensor(a!) out, int num_kv_heads, float sm_scale, bool decode) -> ()"
)
_library.define(
    "compress(Tensor x, Tensor rotation_T_even, Tensor rotation_T_odd, Tensor boundaries, Tensor(a!) packed, "
    "Tensor(b!) norms) -> ()"
)
for _name, _kernel in (("attention", _run_attention), ("compress", _run_compress)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tq4_compat::{_name}", lambda *arguments: None, lib=_library)
