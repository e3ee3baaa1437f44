"""The Triton backend: the ops on any NVIDIA GPU from sm_80 on, without a compiler at install time.

Each op builds its :class:`Launch` objects (kernel, grid, arguments) from host-known shapes only and runs
them: nothing here reads a CUDA tensor, so every op can be captured in a CUDA graph.  On CPU tensors the same
kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), which the tests use.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import triton

from ..layout import ALIGNMENT as WORD_BYTES
from ..layout import NORM_EPSILON, PageView, code_bytes, page_view
from ..rotation import as_matrix
from ..triton_kernels.common import Pages
from ..triton_kernels.configs import (
    MAX_DECODE_ROWS,
    DecodeConfig,
    PrefillConfig,
    decode_config,
    encode_config,
    expand_config,
    prefill_config,
    queries_config,
    short_query_len,
)
from ..triton_kernels.decode import combine_kernel, prepare_kernel, split_kernel
from ..triton_kernels.encode import compress_kernel, store_kernel
from ..triton_kernels.expand import decompress_kernel, gather_kernel
from ..triton_kernels.prefill import prefill_kernel
from ..triton_kernels.queries import queries_kernel
from .arguments import Attention
from .choices import decodes_short_queries

#: What the interpreter pretends to be: few multiprocessors, so that tests with few keys split them.
_INTERPRETED_CAPABILITY = (8, 0)
_INTERPRETED_SMS = 2


@dataclass
class Launch:
    """One kernel launch: what to run, on how many programs, with which arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def _run(device: torch.device, launches: Iterable[Launch]) -> None:
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)


@lru_cache(maxsize=64)
def _cuda_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return _INTERPRETED_CAPABILITY
    return _cuda_capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return _cuda_sms(torch.cuda.current_device() if device.index is None else device.index)


def _options(config: PrefillConfig | DecodeConfig) -> dict[str, Any]:
    """Compiler options of the main kernels."""
    options: dict[str, Any] = {"num_warps": config.num_warps}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return options


def _wgmma(capability: tuple[int, int], block_m: int) -> bool:
    """Whether tl.dot becomes wgmma, which wants the other of the two loops in attention.py."""
    return capability[0] == 9 and block_m >= 64


def _half(head_dim: int) -> int:
    """D / 2 rounded up to a power of two: the width of a tile's even and odd halves."""
    return triton.next_power_of_2(head_dim // 2)


def _cache_pages(cache: torch.Tensor, num_kv_heads: int, head_dim: int) -> Pages:
    return _pages(page_view(cache, num_kv_heads, head_dim), math.gcd(16, cache.data_ptr()))


@lru_cache(maxsize=64)
def _pages(view: PageView, base_alignment: int) -> Pages:
    codes = (view.block_stride, view.k_codes, view.v_codes, view.code_token_stride, view.code_head_stride)
    return Pages(
        block_size=view.block_size,
        block_stride=view.block_stride,
        k_codes=view.k_codes,
        k_norms=view.k_norms,
        v_codes=view.v_codes,
        v_norms=view.v_norms,
        code_token_stride=view.code_token_stride,
        code_head_stride=view.code_head_stride,
        norm_token_stride=view.norm_token_stride,
        norm_head_stride=view.norm_head_stride,
        alignment=math.gcd(base_alignment, *codes),
    )


def store_launches(
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
    norm_correction: bool,
    capability: tuple[int, int],
) -> list[Launch]:
    """The launch of a store for a compute capability."""
    num_heads, head_dim = key.shape[1:]
    num_rows = slot_mapping.shape[0] * num_heads
    config = encode_config(capability, head_dim, num_rows, key.element_size())
    return [
        Launch(
            store_kernel,
            (triton.cdiv(num_rows, config.rows), 2),
            {
                "key": key,
                "value": value,
                "cache": cache,
                "slot_mapping": slot_mapping,
                "k_rotation": as_matrix(k_rotation),
                "v_rotation": as_matrix(v_rotation),
                "k_centroids": k_centroids,
                "k_boundaries": k_boundaries,
                "v_centroids": v_centroids,
                "v_boundaries": v_boundaries,
                "num_rows": num_rows,
                "key_token_stride": key.stride(0),
                "key_head_stride": key.stride(1),
                "value_token_stride": value.stride(0),
                "value_head_stride": value.stride(1),
                "P": _cache_pages(cache, num_heads, head_dim),
                "NUM_HEADS": num_heads,
                "D": head_dim,
                "HALF": _half(head_dim),
                "ROWS": config.rows,
                "CHUNK": config.chunk,
                "ROTATION_SCALE": math.sqrt(head_dim),
                "EPSILON": NORM_EPSILON,
                "CORRECTION": norm_correction,
            },
            {"num_warps": config.num_warps},
        )
    ]


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
    """torch.ops.tq4.store in Triton."""
    launches = store_launches(
        key,
        value,
        cache,
        slot_mapping,
        k_rotation,
        v_rotation,
        k_centroids,
        k_boundaries,
        v_centroids,
        v_boundaries,
        norm_correction,
        _capability(key.device),
    )
    _run(key.device, launches)


def compress_launches(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    norm_correction: bool,
    capability: tuple[int, int],
) -> list[Launch]:
    """The launch of a compress for a compute capability."""
    num_tokens, num_heads, head_dim = x.shape
    num_rows = num_tokens * num_heads
    config = encode_config(capability, head_dim, num_rows, x.element_size())
    return [
        Launch(
            compress_kernel,
            (triton.cdiv(num_rows, config.rows),),
            {
                "x": x,
                "rotation": as_matrix(rotation),
                "centroids": centroids,
                "boundaries": boundaries,
                "packed": packed,
                "norms": norms,
                "num_rows": num_rows,
                "token_stride": x.stride(0),
                "head_stride": x.stride(1),
                "NUM_HEADS": num_heads,
                "D": head_dim,
                "HALF": _half(head_dim),
                "ROWS": config.rows,
                "CHUNK": config.chunk,
                "ROTATION_SCALE": math.sqrt(head_dim),
                "EPSILON": NORM_EPSILON,
                "CORRECTION": norm_correction,
            },
            {"num_warps": config.num_warps},
        )
    ]


def compress(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    norm_correction: bool = False,
) -> None:
    """torch.ops.tq4.compress in Triton."""
    launches = compress_launches(
        x, rotation, centroids, boundaries, packed, norms, norm_correction, _capability(x.device)
    )
    _run(x.device, launches)


def gather_launches(
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
    capability: tuple[int, int],
) -> list[Launch]:
    """The launch of a gather for a compute capability."""
    total, num_heads, head_dim = key.shape
    num_seqs = seq_lens.shape[0]
    config = expand_config(capability, head_dim)
    num_slots = total // config.rows + num_seqs
    return [
        Launch(
            gather_kernel,
            (num_slots * num_heads, 2),
            {
                "cache": cache,
                "block_table": block_table,
                "seq_lens": seq_lens,
                "out_start_loc": out_start_loc,
                "k_rotation": as_matrix(k_rotation),
                "v_rotation": as_matrix(v_rotation),
                "k_centroids": k_centroids,
                "v_centroids": v_centroids,
                "key": key,
                "value": value,
                "table_stride": block_table.stride(0),
                "key_token_stride": key.stride(0),
                "key_head_stride": key.stride(1),
                "value_token_stride": value.stride(0),
                "value_head_stride": value.stride(1),
                "num_seqs": num_seqs,
                "total": total,
                "P": _cache_pages(cache, num_heads, head_dim),
                "NUM_HEADS": num_heads,
                "D": head_dim,
                "HALF": _half(head_dim),
                "TOKENS": config.rows,
                "CHUNK": config.chunk,
                "ROTATION_SCALE": math.sqrt(head_dim),
            },
            {"num_warps": config.num_warps},
        )
    ]


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
    """torch.ops.tq4.gather in Triton."""
    launches = gather_launches(
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
        _capability(cache.device),
    )
    _run(cache.device, launches)


def decompress_launches(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
    capability: tuple[int, int],
) -> list[Launch]:
    """The launch of a decompress for a compute capability."""
    num_tokens, num_heads, head_dim = out.shape
    num_rows = num_tokens * num_heads
    config = expand_config(capability, head_dim)
    if packed.data_ptr() % WORD_BYTES:
        packed = packed.clone()  # the kernel reads whole words
    return [
        Launch(
            decompress_kernel,
            (triton.cdiv(num_rows, config.rows),),
            {
                "packed": packed,
                "norms": norms,
                "rotation": as_matrix(rotation),
                "centroids": centroids,
                "out": out,
                "num_rows": num_rows,
                "D": head_dim,
                "HALF": _half(head_dim),
                "ROWS": config.rows,
                "CHUNK": config.chunk,
                "ROTATION_SCALE": math.sqrt(head_dim),
                "ALIGNMENT": math.gcd(16, packed.data_ptr(), code_bytes(head_dim)),
            },
            {"num_warps": config.num_warps},
        )
    ]


def decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """torch.ops.tq4.decompress in Triton."""
    launches = decompress_launches(packed, norms, rotation, centroids, out, _capability(out.device))
    _run(out.device, launches)


@dataclass(frozen=True)
class Hardware:
    """What launches of attention depend on: compute capability, multiprocessors, whether inline PTX runs."""

    capability: tuple[int, int]
    num_sms: int
    ptx: bool

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """A device, or Triton's interpreter on a CPU."""
        return cls(_capability(device), _sms(device), device.type == "cuda")


def _rotated_queries(
    q: torch.Tensor,
    rotation: torch.Tensor | None,
    int8: bool,
    capability: tuple[int, int],
    places: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """Workspaces for the rotated and quantised queries of all tokens (or ``places`` of them), and the launch
    that fills them."""
    num_tokens, num_heads, head_dim = q.shape
    half = _half(head_dim)
    num_rows = (num_tokens if places is None else places) * num_heads
    config = queries_config(capability, head_dim)
    rotated = q.new_empty((num_rows, 2 * half), dtype=torch.int8 if int8 else torch.float16)
    row_scale = q.new_empty(num_rows, dtype=torch.float32)
    launch = Launch(
        queries_kernel,
        (triton.cdiv(num_rows, config.rows),),
        {
            "q": q,
            "rotation": as_matrix(rotation),
            "rotated": rotated,
            "row_scale": row_scale,
            "num_rows": num_rows,
            "q_token_stride": q.stride(0),
            "q_head_stride": q.stride(1),
            "NUM_HEADS": num_heads,
            "D": head_dim,
            "HALF": half,
            "ROWS": config.rows,
            "CHUNK": config.chunk,
            "ROTATION_SCALE": math.sqrt(head_dim),
            "INT8": int8,
        },
        {"num_warps": config.num_warps},
    )
    return rotated, row_scale, launch


def _walk_arguments(
    a: Attention,
    rotated: torch.Tensor,
    row_scale: torch.Tensor,
    config: PrefillConfig | DecodeConfig,
    hardware: Hardware,
    short_query_len: int,
) -> dict[str, Any]:
    """What prefill_kernel and split_kernel share: queries, pages, mask and tiles."""
    return {
        "queries": rotated,
        "row_scale": row_scale,
        "cache": a.cache,
        "block_table": a.block_table,
        "seq_lens": a.seq_lens,
        "query_start_loc": a.query_start_loc,
        "k_centroids": a.k_centroids,
        "v_centroids": a.v_centroids,
        "table_stride": a.block_table.stride(0),
        "num_seqs": a.num_seqs,
        "softcap": a.softcap,
        "window_left": a.window_left,
        "window_right": a.visible_right,
        "short_query_len": short_query_len,
        "P": _cache_pages(a.cache, a.num_kv_heads, a.head_dim),
        "D": a.head_dim,
        "HALF": _half(a.head_dim),
        "GROUP": a.group,
        "NUM_KV_HEADS": a.num_kv_heads,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SOFTCAP": a.softcap > 0.0,
        "LEFT": a.window_left >= 0,
        "RIGHT": a.visible_right >= 0,
        "WGMMA": _wgmma(hardware.capability, config.block_m),
        "PTX": hardware.ptx,
    }


def _result_arguments(a: Attention, config: PrefillConfig | DecodeConfig) -> dict[str, Any]:
    """What prefill_kernel and combine_kernel share: where results go, and how they are rotated back."""
    return {
        "out_rotation": as_matrix(a.out_rotation),
        "out": a.out,
        "lse": a.lse,
        "sinks": a.sinks,
        "out_token_stride": a.out.stride(0),
        "out_head_stride": a.out.stride(1),
        "lse_stride": a.num_tokens,
        "CHUNK": config.chunk,
        "ROTATION_SCALE": math.sqrt(a.head_dim),
    }


def prefill_launches(a: Attention, hardware: Hardware, short_query_len: int = 0) -> list[Launch]:
    """The launches of a prefill: queries, prefill.

    Args:
        a: with query_start_loc.
        hardware: to launch on.
        short_query_len: sequences of up to so many query tokens are left alone.
    """
    config = prefill_config(hardware.capability, a.head_dim, a.longest * a.group)
    num_slots = a.num_tokens * a.group // config.block_m + a.num_seqs
    rotated, row_scale, rotate = _rotated_queries(a.q, a.q_rotation, a.int8, hardware.capability)
    attend = Launch(
        prefill_kernel,
        (num_slots * a.num_kv_heads,),
        _walk_arguments(a, rotated, row_scale, config, hardware, short_query_len)
        | _result_arguments(a, config)
        | {
            "k_codes": a.k_codes,
            "num_slots": num_slots,
            "score_scale": a.sm_scale * a.k_code_scale if a.int8 else a.sm_scale,
            "INT8": a.int8,
        },
        _options(config),
    )
    return [rotate, attend]


def prefill(**arguments: Any) -> None:
    """torch.ops.tq4.prefill in Triton, of :class:`Attention`'s fields; sequences of few query tokens take the
    decode kernels."""
    a = Attention(**arguments)
    hardware = Hardware.of(a.q.device)
    longest = a.longest
    short = short_query_len(a.group) if decodes_short_queries() else 0
    # Lengths are on the device: which sequences are short, the kernels find out.
    all_short = short > 0 and longest <= short
    some_short = 0 < short < longest and 1 < a.num_seqs and a.num_tokens < a.num_seqs * longest
    launches: list[Launch] = []
    if some_short:
        launches += decode_launches(replace(a, max_query_len=short), hardware, short)
    elif all_short:
        launches += decode_launches(replace(a, max_query_len=max(1, longest)), hardware)
    if not all_short:
        launches += prefill_launches(a, hardware, short if some_short else 0)
    _run(a.q.device, launches)


def decode_launches(a: Attention, hardware: Hardware, short_query_len: int = 0) -> list[Launch]:
    """The launches of a decode: prepare, split, combine.

    Args:
        a: of at most MAX_DECODE_ROWS query rows (max_query_len times the group); int8 is not looked at.
        hardware: to launch on.
        short_query_len: if not 0, sequences of more query tokens are left alone; it is max_query_len then.
    """
    half = _half(a.head_dim)
    max_rows = a.max_query_len * a.group
    config = decode_config(hardware.capability, a.head_dim, max_rows)
    max_shares = max(1, hardware.num_sms * config.programs_per_sm // a.num_kv_heads)
    units = a.seq_lens.new_empty(a.num_seqs + 1)
    partial_rows = (max_shares + a.num_seqs, a.num_kv_heads, max_rows)
    partials = {
        "partial_out": a.q.new_empty((*partial_rows, 2 * half), dtype=torch.float32),
        "partial_sums": a.q.new_empty((*partial_rows, 2), dtype=torch.float32),
        "units": units,
        "max_shares": max_shares,
        "max_rows": max_rows,
        "MIN_UNITS": config.min_units,
    }
    places = a.num_seqs * short_query_len if short_query_len > 0 else None
    rotated, row_scale, rotate = _rotated_queries(a.q, a.q_rotation, False, hardware.capability, places)
    del rotate.arguments["INT8"]
    prepare = Launch(
        prepare_kernel,
        (rotate.grid[0] + 1,),
        rotate.arguments
        | {
            "seq_lens": a.seq_lens,
            "query_start_loc": a.query_start_loc,
            "units": units,
            "num_seqs": a.num_seqs,
            "window_left": a.window_left,
            "short_query_len": short_query_len,
            "BLOCK_N": config.block_n,
            "LEFT": a.window_left >= 0,
        },
        rotate.options,
    )
    split = Launch(
        split_kernel,
        (max_shares * a.num_kv_heads,),
        _walk_arguments(a, rotated, row_scale, config, hardware, short_query_len)
        | partials
        | {"score_scale": a.sm_scale},
        _options(config),
    )
    combine = Launch(
        combine_kernel,
        (a.num_seqs * a.num_kv_heads,),
        _result_arguments(a, config)
        | partials
        | {
            "query_start_loc": a.query_start_loc,
            "num_seqs": a.num_seqs,
            "D": a.head_dim,
            "HALF": half,
            "GROUP": a.group,
            "NUM_KV_HEADS": a.num_kv_heads,
            "BLOCK_M": config.block_m,
        },
        {"num_warps": config.num_warps},
    )
    return [prepare, split, combine]


def decode(**arguments: Any) -> None:
    """torch.ops.tq4.decode in Triton, of :class:`Attention`'s fields.

    Scores are exact whatever ``int8`` says: quantising queries would save nothing here and cost accuracy.
    More query rows than the decode kernels take go to the prefill kernel, in its exact mode as well.
    """
    a = Attention(**({"max_query_len": 1} | arguments))
    a = replace(a, max_query_len=a.longest, int8=False)
    hardware = Hardware.of(a.q.device)
    if a.longest * a.group <= MAX_DECODE_ROWS:
        launches = decode_launches(a, hardware)
    else:
        if a.query_start_loc is None:
            a.query_start_loc = torch.arange(a.num_seqs + 1, dtype=torch.int32, device=a.q.device)
        launches = prefill_launches(a, hardware)
    _run(a.q.device, launches)
