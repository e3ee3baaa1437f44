"""Validation of op arguments, before anything is launched or written.

One function for each op, called by the op itself, so that callers of ``torch.ops.tq4`` get it too.  Each
raises a TypeError (wrong dtype) or a ValueError (anything else) that names the argument, what was expected
and what came.

The checks look at metadata only (dtype, shape, strides, device): no tensor operation, no synchronisation, a
few microseconds.  Contents (block_table, slot_mapping, lengths, signs, key codes) are checked as well where
that is free, on CPU tensors, and on CUDA tensors with ``TQ4_DEBUG=1``, which synchronises.

The checks run in every call, so they find the usual, good case with as few reads of a tensor as possible
(each takes 0.05 to 0.25 us; ``stride()[-1]`` half of ``stride(-1)``) and look for what is wrong only
otherwise.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from . import dispatch
from .codebook import MAX_KEY_CODE
from .layout import ALIGNMENT, HEAD_DIMS, NUM_BOUNDARIES, NUM_CENTROIDS, PageView, page_view
from .rotation import has_hadamard

_INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_QUERY_DTYPES = (torch.float16, torch.bfloat16)


def check_store(
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
) -> PageView:
    """Validate the arguments of torch.ops.tq4.store.

    Returns:
        The view of the cache.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, device, or (CPU or TQ4_DEBUG=1) sign or slot.
    """
    device = key.device
    tokens, heads, dim = _vectors("key", key, _INPUT_DTYPES)
    _like("value", value, key, "key")
    _last_contiguous("value", value)
    view = _cache(cache, heads, dim)
    _exact("slot_mapping", slot_mapping, torch.int64, (tokens,), "[num_tokens]")
    _rotations("k_rotation", k_rotation, "v_rotation", v_rotation, dim)
    _table("k_centroids", k_centroids, NUM_CENTROIDS)
    _table("k_boundaries", k_boundaries, NUM_BOUNDARIES)
    _table("v_centroids", v_centroids, NUM_CENTROIDS)
    _table("v_boundaries", v_boundaries, NUM_BOUNDARIES)
    _devices(
        device,
        "key",
        (
            ("value", value),
            ("cache", cache),
            ("slot_mapping", slot_mapping),
            ("k_rotation", k_rotation),
            ("v_rotation", v_rotation),
            ("k_centroids", k_centroids),
            ("k_boundaries", k_boundaries),
            ("v_centroids", v_centroids),
            ("v_boundaries", v_boundaries),
        ),
    )
    if _contents(device):
        _signs("k_rotation", k_rotation)
        _signs("v_rotation", v_rotation)
        _slots(slot_mapping, view)
    return view


def check_gather(
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
) -> PageView:
    """Validate the arguments of torch.ops.tq4.gather.

    Returns:
        The view of the cache.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, device, or (CPU or TQ4_DEBUG=1) sign, block, length
            or start.
    """
    device = cache.device
    total, heads, dim = _vectors("key", key, _INPUT_DTYPES)
    _like("value", value, key, "key")
    _writable_rows("key", key)
    _writable_rows("value", value)
    view = _cache(cache, heads, dim)
    seqs = _sequences(block_table, seq_lens)
    _starts("out_start_loc", out_start_loc, seqs)
    _rotations("k_rotation", k_rotation, "v_rotation", v_rotation, dim)
    _table("k_centroids", k_centroids, NUM_CENTROIDS)
    _table("v_centroids", v_centroids, NUM_CENTROIDS)
    _devices(
        device,
        "cache",
        (
            ("block_table", block_table),
            ("seq_lens", seq_lens),
            ("out_start_loc", out_start_loc),
            ("k_rotation", k_rotation),
            ("v_rotation", v_rotation),
            ("k_centroids", k_centroids),
            ("v_centroids", v_centroids),
            ("key", key),
            ("value", value),
        ),
    )
    if _contents(device):
        _signs("k_rotation", k_rotation)
        _signs("v_rotation", v_rotation)
        lengths = _lengths(block_table, seq_lens, view)
        starts = out_start_loc.tolist()
        _monotonic("out_start_loc", starts, total, "rows of key")
        for i, length in enumerate(lengths):
            if starts[i + 1] - starts[i] < length:
                raise ValueError(
                    f"out_start_loc: expected room for the {length} tokens of sequence {i}, got "
                    f"{starts[i + 1] - starts[i]} rows ({starts[i]} .. {starts[i + 1]})"
                )
    return view


def check_compress(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
) -> None:
    """Validate the arguments of torch.ops.tq4.compress.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, device, or (CPU or TQ4_DEBUG=1) sign.
    """
    device = x.device
    tokens, heads, dim = _vectors("x", x, _INPUT_DTYPES)
    _rotation("rotation", rotation, dim)
    _table("centroids", centroids, NUM_CENTROIDS)
    _table("boundaries", boundaries, NUM_BOUNDARIES)
    _packed_pair(packed, norms, (tokens, heads, dim))
    _devices(
        device,
        "x",
        (
            ("rotation", rotation),
            ("centroids", centroids),
            ("boundaries", boundaries),
            ("packed", packed),
            ("norms", norms),
        ),
    )
    if _contents(device):
        _signs("rotation", rotation)


def check_decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Validate the arguments of torch.ops.tq4.decompress.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, device, or (CPU or TQ4_DEBUG=1) sign.
    """
    device = packed.device
    tokens, heads, dim = _vectors("out", out, _INPUT_DTYPES)
    _contiguous("out", out)
    _rotation("rotation", rotation, dim)
    _table("centroids", centroids, NUM_CENTROIDS)
    _packed_pair(packed, norms, (tokens, heads, dim))
    _devices(
        device,
        "packed",
        (("norms", norms), ("rotation", rotation), ("centroids", centroids), ("out", out)),
    )
    if _contents(device):
        _signs("rotation", rotation)


def check_attention(
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
    window_left: int,
    window_right: int,
    softcap: float,
    max_query_len: int,
) -> PageView:
    """Validate the arguments of torch.ops.tq4.prefill and torch.ops.tq4.decode.

    ``query_start_loc`` None means one query token a sequence.

    Returns:
        The view of the cache.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, stride, device or number, or (CPU or TQ4_DEBUG=1) sign, key code, block,
            length or start.  A key code beyond 126 that goes unchecked gives NaN in CUDA decode.
    """
    device = q.device
    tokens, heads, dim = _vectors("q", q, _QUERY_DTYPES)
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads: expected at least 1, got {num_kv_heads}")
    if heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of the {heads} query heads of q, got {num_kv_heads}"
        )
    view = _cache(cache, num_kv_heads, dim)
    seqs = _sequences(block_table, seq_lens)
    if query_start_loc is None:
        if tokens != seqs:
            raise ValueError(
                f"q: expected one token for each of the {seqs} sequences (query_start_loc is None), got "
                f"{tokens}"
            )
    else:
        _starts("query_start_loc", query_start_loc, seqs)
    _rotations("q_rotation", q_rotation, "out_rotation", out_rotation, dim)
    _table("k_centroids", k_centroids, NUM_CENTROIDS)
    _table("k_codes", k_codes, NUM_CENTROIDS, torch.int8)
    _table("v_centroids", v_centroids, NUM_CENTROIDS)
    _like("out", out, q, "q")
    _writable_rows("out", out)
    if lse is not None:
        _exact("lse", lse, torch.float32, (heads, tokens), "[num_q_heads, num_tokens]")
    if sinks is not None:
        _exact("sinks", sinks, torch.float32, (heads,), "[num_q_heads]")
    _devices(
        device,
        "q",
        (
            ("cache", cache),
            ("block_table", block_table),
            ("seq_lens", seq_lens),
            ("query_start_loc", query_start_loc),
            ("q_rotation", q_rotation),
            ("out_rotation", out_rotation),
            ("k_centroids", k_centroids),
            ("k_codes", k_codes),
            ("v_centroids", v_centroids),
            ("out", out),
            ("lse", lse),
            ("sinks", sinks),
        ),
    )
    if tokens and out.data_ptr() == q.data_ptr():
        raise ValueError("out: expected memory of its own, got the memory of q")
    _positive("k_code_scale", k_code_scale)
    _positive("sm_scale", sm_scale)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0 (0 = none), got {softcap}")
    if window_left < -1:
        raise ValueError(f"window_left: expected -1 (unlimited) or more, got {window_left}")
    if window_right < -1:
        raise ValueError(f"window_right: expected -1 (unlimited) or more, got {window_right}")
    if max_query_len < -1 or (max_query_len == -1 and query_start_loc is None):
        raise ValueError(f"max_query_len: expected a number of tokens (-1 = unknown), got {max_query_len}")
    if _contents(device):
        _signs("q_rotation", q_rotation)
        _signs("out_rotation", out_rotation)
        _key_codes("k_codes", k_codes)
        _lengths(block_table, seq_lens, view)
        if query_start_loc is not None:
            starts = query_start_loc.tolist()
            _monotonic("query_start_loc", starts, tokens, "tokens of q")
            longest = max(b - a for a, b in pairwise(starts))
            if 0 <= max_query_len < longest:
                raise ValueError(
                    f"max_query_len: expected at least {longest}, the longest query of query_start_loc, got "
                    f"{max_query_len}"
                )
    return view


# ---- The pieces.


def _contents(device: torch.device) -> bool:
    """Whether to look into the index tensors: free on the CPU, a synchronisation elsewhere (opt-in)."""
    kind = dispatch.device_type(device)
    if kind == "cpu":
        return True
    if not dispatch.debug():
        return False
    # A copy to the host is not allowed while a CUDA graph is being captured.
    return kind != "cuda" or not torch.cuda.is_current_stream_capturing()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _dtype(name: str, tensor: torch.Tensor, expected: tuple[torch.dtype, ...], note: str = "") -> None:
    if tensor.dtype not in expected:
        raise TypeError(
            f"{name}: expected dtype {_names(expected)}{note}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def _shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {list(expected)}, got {list(tensor.shape)}")


def _like(name: str, tensor: torch.Tensor, other: torch.Tensor, other_name: str) -> None:
    """The dtype and the shape of another."""
    if tensor.dtype is not other.dtype:
        _dtype(name, tensor, (other.dtype,), f" (the dtype of {other_name})")
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name}, {list(other.shape)}, got {list(tensor.shape)}"
        )


def _contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def _last_contiguous(name: str, tensor: torch.Tensor) -> None:
    if tensor.stride()[-1] != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension (stride 1), got strides {list(tensor.stride())}"
        )


def _writable_rows(name: str, tensor: torch.Tensor) -> None:
    """[N, H, D] whose rows do not overlap (an expanded tensor cannot be written)."""
    if tensor.is_contiguous():
        return
    _last_contiguous(name, tensor)
    rows = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        if size > 1
    )
    extent = tensor.shape[-1]
    for stride, size in rows:
        if stride < extent:
            raise ValueError(
                f"{name}: expected rows that do not overlap, got strides {list(tensor.stride())}"
            )
        extent = stride * size


def _vectors(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int, int]:
    """[N, H, D] with a supported D and a contiguous last dimension; returns the sizes."""
    if tensor.dtype not in dtypes:
        _dtype(name, tensor, dtypes)
    shape = tensor.shape
    if len(shape) != 3:
        raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head_dim], got shape {list(shape)}")
    tokens, heads, dim = shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"{name}: expected a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {dim}")
    if heads < 1:
        raise ValueError(f"{name}: expected at least one head, got shape {list(shape)}")
    if tensor.stride()[-1] != 1:
        _last_contiguous(name, tensor)
    return tokens, heads, dim


def _cache(cache: torch.Tensor, num_kv_heads: int, head_dim: int) -> PageView:
    if cache.dtype is not torch.uint8:
        _dtype("cache", cache, (torch.uint8,))
    view = page_view(cache, num_kv_heads, head_dim)
    if cache.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"cache: expected memory aligned to {ALIGNMENT} bytes, got the address {cache.data_ptr():#x}"
        )
    return view


def _sequences(block_table: torch.Tensor, seq_lens: torch.Tensor) -> int:
    if seq_lens.dtype is not torch.int32:
        _dtype("seq_lens", seq_lens, (torch.int32,))
    shape = seq_lens.shape
    if len(shape) != 1:
        raise ValueError(f"seq_lens: expected shape [num_seqs], got {list(shape)}")
    seqs = shape[0]
    if seqs == 0:
        raise ValueError("seq_lens: expected at least one sequence, got an empty batch")
    if not seq_lens.is_contiguous():
        _contiguous("seq_lens", seq_lens)
    if block_table.dtype is not torch.int32:
        _dtype("block_table", block_table, (torch.int32,))
    shape = block_table.shape
    if len(shape) != 2 or shape[0] != seqs:
        raise ValueError(
            f"block_table: expected shape [num_seqs, max_blocks] with num_seqs = {seqs} (seq_lens), got "
            f"{list(shape)}"
        )
    if shape[1] > 1 and block_table.stride()[1] != 1:
        raise ValueError(
            f"block_table: expected a contiguous last dimension, got strides {list(block_table.stride())}"
        )
    return seqs


def _starts(name: str, starts: torch.Tensor, seqs: int) -> None:
    _exact(name, starts, torch.int32, (seqs + 1,), "[num_seqs + 1]")


def _rotations(
    name: str, rotation: torch.Tensor | None, other_name: str, other: torch.Tensor | None, head_dim: int
) -> None:
    """Two rotations; a quantiser often has the same tensor for both."""
    _rotation(name, rotation, head_dim)
    if other is not rotation:
        _rotation(other_name, other, head_dim)


def _rotation(name: str, rotation: torch.Tensor | None, head_dim: int) -> None:
    """A matrix, or the signs of a Hadamard rotation."""
    if rotation is None:
        return
    vector = rotation.ndim == 1
    signs = vector and has_hadamard(head_dim)
    shape = (head_dim,) if signs else (head_dim, head_dim)
    if rotation.dtype is torch.float32 and rotation.shape == shape and rotation.is_contiguous():
        return
    _dtype(name, rotation, (torch.float32,))
    if vector and not signs:
        raise ValueError(
            f"{name}: expected a matrix [head_dim, head_dim] = {list(shape)}, as only powers of two have "
            f"Hadamard rotations, which signs stand for, got {list(rotation.shape)}"
        )
    _shape(name, rotation, shape, "[head_dim]" if signs else "[head_dim, head_dim]")
    _contiguous(name, rotation)


def _table(name: str, table: torch.Tensor, size: int, dtype: torch.dtype = torch.float32) -> None:
    if not (table.dtype is dtype and table.shape == (size,) and table.is_contiguous()):
        _exact(name, table, dtype, (size,), f"[{size}]")


def _exact(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], meaning: str) -> None:
    """A contiguous tensor of one dtype and shape."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous():
        return
    _dtype(name, tensor, (dtype,))
    _shape(name, tensor, shape, meaning)
    _contiguous(name, tensor)


def _packed_pair(packed: torch.Tensor, norms: torch.Tensor, shape: tuple[int, int, int]) -> None:
    tokens, heads, dim = shape
    _exact("packed", packed, torch.uint8, (tokens, heads, dim // 2), "[N, H, D / 2]")
    _exact("norms", norms, torch.float32, (tokens, heads, 1), "[N, H, 1]")


def _devices(
    device: torch.device, reference_name: str, tensors: tuple[tuple[str, torch.Tensor | None], ...]
) -> None:
    for name, tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name}: expected device {device} (that of {reference_name}), got {tensor.device}"
            )


def _positive(name: str, number: float) -> None:
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {number}")


# ---- Contents.


def _signs(name: str, rotation: torch.Tensor | None) -> None:
    if rotation is None or rotation.dim() != 1:
        return
    bad = (rotation.abs() != 1.0).nonzero()
    if bad.shape[0]:
        index = int(bad[0, 0])
        raise ValueError(f"{name}: expected signs +1 or -1, got {float(rotation[index])} at index {index}")


def _key_codes(name: str, codes: torch.Tensor) -> None:
    for index, code in enumerate(codes.tolist()):
        if abs(code) > MAX_KEY_CODE:
            raise ValueError(
                f"{name}: expected codes -{MAX_KEY_CODE} .. {MAX_KEY_CODE}, got {code} at index {index}"
            )


def _monotonic(name: str, starts: list[int], limit: int, of: str) -> None:
    if starts[0] != 0:
        raise ValueError(f"{name}: expected to start with 0, got {starts[0]}")
    for i, (a, b) in enumerate(pairwise(starts)):
        if b < a:
            raise ValueError(f"{name}: expected non-decreasing entries, got {a} then {b} at index {i + 1}")
    if starts[-1] > limit:
        raise ValueError(f"{name}: expected a last entry of at most {limit} ({of}), got {starts[-1]}")


def _lengths(block_table: torch.Tensor, seq_lens: torch.Tensor, view: PageView) -> list[int]:
    lengths = seq_lens.tolist()
    columns = block_table.shape[1]
    for i, length in enumerate(lengths):
        if not 0 <= length <= columns * view.block_size:
            raise ValueError(
                f"seq_lens: expected 0 .. {columns * view.block_size} ({columns} blocks of {view.block_size} "
                f"in block_table), got {length} for sequence {i}"
            )
    pages = (seq_lens + (view.block_size - 1)) // view.block_size
    used = torch.arange(columns, device=block_table.device) < pages[:, None]
    bad = (used & ((block_table < 0) | (block_table >= view.num_blocks))).nonzero()
    if bad.shape[0]:
        seq, column = bad[0].tolist()
        raise ValueError(
            f"block_table: expected blocks 0 .. {view.num_blocks - 1}, got "
            f"{int(block_table[seq, column])} at [{seq}, {column}]"
        )
    return lengths


def _slots(slot_mapping: torch.Tensor, view: PageView) -> None:
    limit = view.num_blocks * view.block_size
    bad = ((slot_mapping < -1) | (slot_mapping >= limit)).nonzero()
    if bad.shape[0]:
        index = int(bad[0, 0])
        raise ValueError(
            f"slot_mapping: expected -1 (skip) or a slot 0 .. {limit - 1}, got {int(slot_mapping[index])} at "
            f"index {index}"
        )
    kept = slot_mapping[slot_mapping >= 0].sort().values
    same = (kept[1:] == kept[:-1]).nonzero()
    if same.shape[0]:
        raise ValueError(
            f"slot_mapping: expected distinct slots, got slot {int(kept[int(same[0, 0])])} twice"
        )
