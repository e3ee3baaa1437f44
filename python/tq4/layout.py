"""The byte layout of the TQ4 paged cache: its single owner.

Every byte offset of the format is computed here and nowhere else.  The C++ header ``csrc/layout.h``
holds the same formulas; it is *generated* from the functions of this module (they are evaluated once
with symbols instead of integers) and checked in::

    python -m tq4.layout --header > csrc/layout.h

Triton kernels receive the numbers of a :class:`PageView` as launch arguments.

This module uses the standard library only, so that a build can run it as a plain file
(``python python/tq4/layout.py --header``) before torch is installed.

One encoded vector (one token, one KV head, K or V) is ``head_dim / 2`` code bytes and one
little-endian fp32 norm.  Byte ``j`` of the codes holds the index of dimension ``2j`` in its high nibble
and of dimension ``2j + 1`` in its low nibble.

Two page layouts exist; which one a cache tensor has is told by its rank.

``token_major`` (rank 3, ``[num_blocks, block_size, row_bytes]``), one row a token, rows may be padded::

    | K codes: Hkv * D/2 | K norms: Hkv * 4 | V codes: Hkv * D/2 | V norms: Hkv * 4 | padding |

``head_major`` (rank 4, ``[num_blocks, Hkv, block_size, D + 8]``), ``block_size * (D + 8)`` contiguous
bytes for one (block, head), codes first so that they stay aligned, norms after::

    | K codes: block_size * D/2 | V codes: block_size * D/2 | K norms: block_size * 4 | V norms: same |

In ``head_major`` a token's bytes are therefore NOT the ``D + 8`` bytes of one row of the tensor: the last
two dimensions only say how many bytes a (block, head) owns.

Symbols: D head_dim, Hkv KV heads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

#: Head dimensions every backend supports.
HEAD_DIMS = (64, 96, 128, 256)
#: Number of centroids of a codebook (4 bits).
NUM_CENTROIDS = 16
#: Number of decision boundaries between the centroids.
NUM_BOUNDARIES = NUM_CENTROIDS - 1
#: Bytes of one norm (fp32, little-endian).
NORM_BYTES = 4
#: Dimensions per code byte.
DIMS_PER_BYTE = 2
#: block_size must be a multiple of this.
BLOCK_SIZE_MULTIPLE = 16
#: Base address, offsets and strides are multiples of this many bytes.
ALIGNMENT = 4
#: Added to the norm before dividing by it (spec: encoding, step 2).
NORM_EPSILON = 1e-10

TOKEN_MAJOR = "token_major"
HEAD_MAJOR = "head_major"
LAYOUTS = (TOKEN_MAJOR, HEAD_MAJOR)

_INT32_MAX = 2**31 - 1


class StridedTensor(Protocol):
    """What :func:`page_view` needs of a tensor: sizes and strides (a torch tensor has them)."""

    @property
    def shape(self) -> Sequence[int]: ...

    def stride(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class PageView:
    """Where the four fields of (block, token, KV head) lie; the fields of ``PageView`` in csrc/params.h.

    All offsets and strides are bytes, relative to the first byte of the cache tensor::

        K codes  block * block_stride + k_codes + token * code_token_stride + head * code_head_stride
        K norm   block * block_stride + k_norms + token * norm_token_stride + head * norm_head_stride

    and V alike.  Offsets inside one block fit in 32 bits; ``block * block_stride`` needs 64.
    """

    block_stride: int
    k_codes: int
    k_norms: int
    v_codes: int
    v_norms: int
    code_token_stride: int
    code_head_stride: int
    norm_token_stride: int
    norm_head_stride: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int


# ---- The formulas.  Arguments are ints, or symbols when the C++ header is generated: only +, * and // by a
# ---- constant may be used.  `codes` is code_bytes(head_dim).


def code_bytes(head_dim: Any) -> Any:
    """Code bytes of one encoded vector: D / 2."""
    return head_dim // DIMS_PER_BYTE


def vector_bytes(head_dim: Any) -> Any:
    """Bytes of K and V of one (token, KV head): D + 8."""
    return code_bytes(head_dim) * 2 + 2 * NORM_BYTES


def token_bytes(num_kv_heads: Any, head_dim: Any) -> Any:
    """Used bytes of one token over all KV heads: Hkv * (D + 8)."""
    return num_kv_heads * vector_bytes(head_dim)


def head_page_bytes(block_size: Any, head_dim: Any) -> Any:
    """Bytes of one (block, KV head) of the head-major layout: block_size * (D + 8)."""
    return block_size * vector_bytes(head_dim)


def _token_major_fields(num_kv_heads: Any, block_size: Any, codes: Any, row_stride: Any) -> dict[str, Any]:
    k_norms = num_kv_heads * codes
    v_codes = num_kv_heads * (codes + NORM_BYTES)
    v_norms = num_kv_heads * (codes * 2 + NORM_BYTES)
    return {
        "k_codes": 0,
        "k_norms": k_norms,
        "v_codes": v_codes,
        "v_norms": v_norms,
        "code_token_stride": row_stride,
        "code_head_stride": codes,
        "norm_token_stride": row_stride,
        "norm_head_stride": NORM_BYTES,
    }


def _head_major_fields(num_kv_heads: Any, block_size: Any, codes: Any, head_stride: Any) -> dict[str, Any]:
    v_codes = block_size * codes
    k_norms = block_size * (codes * 2)
    v_norms = block_size * (codes * 2 + NORM_BYTES)
    return {
        "k_codes": 0,
        "k_norms": k_norms,
        "v_codes": v_codes,
        "v_norms": v_norms,
        "code_token_stride": codes,
        "code_head_stride": head_stride,
        "norm_token_stride": NORM_BYTES,
        "norm_head_stride": head_stride,
    }


# ---- Views of tensors.


def layout_of(cache: StridedTensor) -> str:
    """``"token_major"`` for a rank-3 cache, ``"head_major"`` for rank 4.

    Raises:
        ValueError: any other rank.
    """
    return _layout_of_rank(len(cache.shape))


def _layout_of_rank(rank: int) -> str:
    if rank == 3:
        return TOKEN_MAJOR
    if rank == 4:
        return HEAD_MAJOR
    raise ValueError(
        "cache: expected a 3-D token-major tensor [num_blocks, block_size, row_bytes] or a 4-D head-major "
        f"tensor [num_blocks, num_kv_heads, block_size, head_dim + 8], got {rank} dimensions"
    )


def cache_shape(
    layout: str, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[int, ...]:
    """Shape of a freshly allocated uint8 cache tensor without padding.

    Raises:
        ValueError: unknown layout.
    """
    if layout == TOKEN_MAJOR:
        return (num_blocks, block_size, token_bytes(num_kv_heads, head_dim))
    if layout == HEAD_MAJOR:
        return (num_blocks, num_kv_heads, block_size, vector_bytes(head_dim))
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def page_view(cache: StridedTensor, num_kv_heads: int, head_dim: int) -> PageView:
    """Describe a cache tensor (uint8) to a kernel.

    Args:
        cache: ``[num_blocks, block_size, row_bytes]`` (token-major) or
            ``[num_blocks, Hkv, block_size, D + 8]`` (head-major), possibly a strided view.
        num_kv_heads: Hkv.
        head_dim: D, even.

    Returns:
        The offsets and strides, in bytes.

    Raises:
        ValueError: naming ``cache``, when shape or strides do not fit the layout or overlap, when block_size
            is not a multiple of 16, or when a stride is not a multiple of 4 bytes.
    """
    shape, strides = cache.shape, cache.stride()
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):  # a torch tensor's are
        shape, strides = tuple(shape), tuple(strides)
    return _page_view(shape, strides, num_kv_heads, head_dim)


@lru_cache(maxsize=4096)  # called for every op; a process has few distinct caches
def _page_view(
    shape: tuple[int, ...], strides: tuple[int, ...], num_kv_heads: int, head_dim: int
) -> PageView:
    layout = _layout_of_rank(len(shape))
    num_blocks = shape[0]
    # The stride of a dimension of size one is arbitrary and never used: replace it by the packed one.
    if layout == TOKEN_MAJOR:
        block_size, row_bytes = shape[1], shape[2]
        unit = token_bytes(num_kv_heads, head_dim)
        if row_bytes < unit:
            raise ValueError(
                f"cache: expected a last dimension of at least num_kv_heads * (head_dim + 8) = {unit} "
                f"bytes for {num_kv_heads} KV heads of dimension {head_dim}, got {row_bytes}"
            )
        if strides[2] != 1:
            raise ValueError(f"cache: expected a contiguous last dimension (stride 1), got {strides[2]}")
        units, inner = block_size, strides[1]
        fields = _token_major_fields(num_kv_heads, block_size, code_bytes(head_dim), inner)
    else:
        block_size = shape[2]
        vector = vector_bytes(head_dim)
        if shape[1] != num_kv_heads or shape[3] != vector:
            raise ValueError(
                f"cache: expected shape [num_blocks, {num_kv_heads}, block_size, {vector}] for "
                f"{num_kv_heads} KV heads of dimension {head_dim}, got {list(shape)}"
            )
        if strides[3] != 1 or strides[2] != vector:
            raise ValueError(
                f"cache: expected the last two dimensions contiguous (strides {vector}, 1), got "
                f"{strides[2]}, {strides[3]}"
            )
        unit = head_page_bytes(block_size, head_dim)
        units, inner = num_kv_heads, strides[1] if num_kv_heads > 1 else unit
        fields = _head_major_fields(num_kv_heads, block_size, code_bytes(head_dim), inner)
    if block_size <= 0 or block_size % BLOCK_SIZE_MULTIPLE:
        raise ValueError(
            f"cache: expected a block_size that is a multiple of {BLOCK_SIZE_MULTIPLE}, got {block_size}"
        )
    span = inner * (units - 1) + unit  # bytes from the first to the last of one block
    block_stride = strides[0] if num_blocks > 1 else inner * units
    if inner % ALIGNMENT or block_stride % ALIGNMENT:
        raise ValueError(
            f"cache: expected strides that are multiples of {ALIGNMENT} bytes, got stride(0) = "
            f"{block_stride}, stride(1) = {inner}"
        )
    # Blocks one after the other, or interleaved: all blocks of one unit (row or head), then the next unit's.
    after = block_stride >= span and inner >= unit
    interleaved = block_stride >= unit and inner >= block_stride * (num_blocks - 1) + unit
    if not (after or interleaved):
        raise ValueError(
            f"cache: expected bytes that do not overlap ({units} times {unit} a block), got stride(0) = "
            f"{block_stride}, stride(1) = {inner}"
        )
    if span > _INT32_MAX or num_blocks > _INT32_MAX:
        raise ValueError(
            "cache: expected one block to span less than 2**31 bytes and fewer than 2**31 blocks, got "
            f"{span} bytes and {num_blocks} blocks"
        )
    return PageView(
        block_stride=block_stride,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **fields,
    )


# ---- The generated C++ header.


class _Symbol:
    """A C++ expression; records the arithmetic that the formulas above do on it."""

    def __init__(self, text: str, atom: bool = True) -> None:
        self.text = text
        self.atom = atom

    def _operand(self) -> str:
        return self.text if self.atom else f"({self.text})"

    @staticmethod
    def _lift(other: _Symbol | int) -> _Symbol:
        return other if isinstance(other, _Symbol) else _Symbol(str(other))

    def __add__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(f"{self.text} + {self._lift(other).text}", atom=False)

    def __mul__(self, other: _Symbol | int) -> _Symbol:
        return _Symbol(f"{self._operand()} * {self._lift(other)._operand()}", atom=False)

    def __rmul__(self, other: int) -> _Symbol:
        return self._lift(other) * self

    def __floordiv__(self, other: int) -> _Symbol:
        return _Symbol(f"{self._operand()} / {other}", atom=False)


_HEADER = """\
// Generated by `python -m tq4.layout --header` from python/tq4/layout.py, the owner of the byte
// layout.  Do not edit: change layout.py, regenerate, and commit both.
//
// Builds the PageView of csrc/params.h for the two page layouts.  Sizes, offsets and strides are
// bytes.  Byte j of a vector's codes holds dimension 2j in the HIGH nibble, 2j + 1 in the low one.
#pragma once
#include <cstdint>

#include "params.h"

namespace tq4 {{

inline constexpr int kNumCentroids = {num_centroids};
inline constexpr int kNumBoundaries = {num_boundaries};
inline constexpr int kNormBytes = {norm_bytes};
inline constexpr int kDimsPerByte = {dims_per_byte};
inline constexpr int kBlockSizeMultiple = {block_size_multiple};
inline constexpr int kCacheAlignment = {alignment};  // base, offsets and strides
inline constexpr float kNormEpsilon = {norm_epsilon}f;
inline constexpr int kHeadDims[] = {{{head_dims}}};

constexpr bool is_supported_head_dim(int64_t head_dim) {{
  for (int supported : kHeadDims) {{
    if (head_dim == supported) return true;
  }}
  return false;
}}

// Code bytes of one encoded vector.
constexpr int64_t code_bytes(int64_t head_dim) {{ return {code_bytes}; }}

// K and V of one (token, KV head).
constexpr int64_t vector_bytes(int64_t head_dim) {{ return {vector_bytes}; }}

// One token over all KV heads; a token-major row has at least this many bytes.
constexpr int64_t token_bytes(int64_t num_kv_heads, int64_t head_dim) {{
  return {token_bytes};
}}

// One (block, KV head) of the head-major layout, contiguous.
constexpr int64_t head_page_bytes(int64_t block_size, int64_t head_dim) {{
  return {head_page_bytes};
}}
{views}
}}  // namespace tq4
"""

_VIEW = """
// {comment}
constexpr PageView {name}(uint8_t* base, int64_t num_blocks, int64_t num_kv_heads,
                          int64_t block_size, int64_t head_dim, int64_t block_stride,
                          int64_t {inner}) {{
  const int64_t codes = code_bytes(head_dim);
  PageView view{{}};
  view.base = base;
{body}
  return view;
}}
"""


def _view_function(name: str, comment: str, formulas: Any, inner: str) -> str:
    fields = formulas(_Symbol("num_kv_heads"), _Symbol("block_size"), _Symbol("codes"), _Symbol(inner))
    lines = ["  view.block_stride = block_stride;"]
    for field, value in fields.items():
        text = f"static_cast<int32_t>({value.text})" if isinstance(value, _Symbol) else str(value)
        lines.append(f"  view.{field} = {text};")
    for field in ("num_blocks", "block_size", "num_kv_heads", "head_dim"):
        lines.append(f"  view.{field} = static_cast<int32_t>({field});")
    indent = " " * (len("constexpr PageView (") + len(name))
    text = _VIEW.format(name=name, comment=comment, inner=inner, body="\n".join(lines))
    return text.replace(" " * 26, indent)


def cpp_header() -> str:
    """The text of ``csrc/layout.h``."""
    heads, block, dim = _Symbol("num_kv_heads"), _Symbol("block_size"), _Symbol("head_dim")
    views = _view_function(
        "token_major_view",
        "[num_blocks, block_size, row_bytes]: row_stride is the tensor's stride(1).",
        _token_major_fields,
        "row_stride",
    ) + _view_function(
        "head_major_view",
        "[num_blocks, num_kv_heads, block_size, D + 8]: head_stride is the tensor's stride(1).",
        _head_major_fields,
        "head_stride",
    )
    return _HEADER.format(
        num_centroids=NUM_CENTROIDS,
        num_boundaries=NUM_BOUNDARIES,
        norm_bytes=NORM_BYTES,
        dims_per_byte=DIMS_PER_BYTE,
        block_size_multiple=BLOCK_SIZE_MULTIPLE,
        alignment=ALIGNMENT,
        norm_epsilon=NORM_EPSILON,
        head_dims=", ".join(map(str, HEAD_DIMS)),
        code_bytes=code_bytes(dim).text,
        vector_bytes=vector_bytes(dim).text,
        token_bytes=token_bytes(heads, dim).text,
        head_page_bytes=head_page_bytes(block, dim).text,
        views=views,
    )


def main(argv: list[str] | None = None) -> int:
    """Command line: ``--header`` prints csrc/layout.h."""
    parser = argparse.ArgumentParser(prog="python -m tq4.layout", description="TQ4 cache byte layout")
    parser.add_argument("--header", action="store_true", required=True, help="print csrc/layout.h")
    parser.parse_args(argv)
    sys.stdout.write(cpp_header())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
