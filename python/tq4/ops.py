"""The ops: schemas, fakes and kernels of ``torch.ops.tq4`` and the schemas of ``torch.ops.tq4_cuda``.

Schemas are defined here rather than in C++, so that the ops exist (and compile, and fail with a clear
message) on a machine without the extension.  The C++ library only registers implementations in ``tq4_cuda``.

All ops write into their mutable arguments, marked ``(a!)``, and return nothing.  ``backend`` is 0 automatic,
1 cuda, 2 cuda-sm80 (the extension restricted to its portable kernels), 3 triton, 4 reference; see
:mod:`tq4.dispatch`. Each call is validated by :mod:`tq4.checks`, then handed to the module of the backend.

A rotation is fp32 ``[D, D]``, or the signs of a randomised Hadamard rotation, fp32 ``[D]`` with D a power of
two (:mod:`tq4.rotation`), or None where the vectors come rotated already.  Signs are what the CUDA kernels of
store, compress and decode read fastest; every op and backend takes both.

Symbols: T tokens, B sequences, Hq query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from functools import partial

import torch

from . import checks, dispatch

_ATTENTION = (
    "Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, {query_start_loc}, Tensor? q_rotation, "
    "Tensor? out_rotation, Tensor k_centroids, Tensor k_codes, float k_code_scale, Tensor v_centroids, "
    "Tensor(a!) out, Tensor(b!)? lse, Tensor? sinks, int num_kv_heads, float sm_scale, bool causal=True, "
    "int window_left=-1, int window_right=-1, float softcap=0.0, int max_query_len={max_query_len}, "
    "bool int8=True"
)

#: Arguments of each op, without the trailing ``backend`` (tq4) or ``path`` (tq4_cuda).
SCHEMAS = {
    # key, value [T, Hkv, D]; slot_mapping int64 [T]; rotations fp32 [D, D] or [D], or None (already rotated).
    "store": (
        "Tensor key, Tensor value, Tensor(a!) cache, Tensor slot_mapping, Tensor? k_rotation, "
        "Tensor? v_rotation, Tensor k_centroids, Tensor k_boundaries, Tensor v_centroids, "
        "Tensor v_boundaries, bool norm_correction=False"
    ),
    # key, value [total, Hkv, D]; sequence s is written to rows out_start_loc[s] ...
    "gather": (
        "Tensor cache, Tensor block_table, Tensor seq_lens, Tensor out_start_loc, Tensor? k_rotation, "
        "Tensor? v_rotation, Tensor k_centroids, Tensor v_centroids, Tensor(a!) key, Tensor(b!) value"
    ),
    # x [N, H, D]; packed uint8 [N, H, D / 2]; norms fp32 [N, H, 1].
    "compress": (
        "Tensor x, Tensor? rotation, Tensor centroids, Tensor boundaries, Tensor(a!) packed, "
        "Tensor(b!) norms, bool norm_correction=False"
    ),
    "decompress": "Tensor packed, Tensor norms, Tensor? rotation, Tensor centroids, Tensor(a!) out",
    # q, out [T, Hq, D]; lse fp32 [Hq, T]; query_start_loc int32 [B + 1].
    "prefill": _ATTENTION.format(query_start_loc="Tensor query_start_loc", max_query_len=-1),
    "decode": _ATTENTION.format(query_start_loc="Tensor? query_start_loc", max_query_len=1),
}

#: Ops of tq4_cuda with a trailing ``int path=0``: 1 portable kernels only; prefill: + 2 unpack in the kernel,
#: + 4 unpack ahead, + 8 no sequence to the decode kernels.
_WITH_PATH = ("prefill", "decode")

_library = torch.library.Library("tq4", "DEF")
_cuda_library = torch.library.Library("tq4_cuda", "DEF")


def _store(
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
    backend: int = 0,
) -> None:
    tensors = (
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
    )
    checks.check_store(*tensors)
    module, extra = dispatch.resolve(backend, key.device)
    if slot_mapping.shape[0]:
        module.store(*tensors, norm_correction, **extra)


def _gather(
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
    backend: int = 0,
) -> None:
    tensors = (
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
    )
    checks.check_gather(*tensors)
    module, extra = dispatch.resolve(backend, cache.device)
    if key.shape[0]:
        module.gather(*tensors, **extra)


def _compress(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    norm_correction: bool = False,
    backend: int = 0,
) -> None:
    checks.check_compress(x, rotation, centroids, boundaries, packed, norms)
    module, extra = dispatch.resolve(backend, x.device)
    if x.shape[0]:
        module.compress(x, rotation, centroids, boundaries, packed, norms, norm_correction, **extra)


def _decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
    backend: int = 0,
) -> None:
    checks.check_decompress(packed, norms, rotation, centroids, out)
    module, extra = dispatch.resolve(backend, packed.device)
    if out.shape[0]:
        module.decompress(packed, norms, rotation, centroids, out, **extra)


def _attention(
    name: str,
    default_query_len: int,
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
    max_query_len: int | None = None,
    int8: bool = True,
    backend: int = 0,
) -> None:
    # The dispatcher drops trailing arguments that equal the schema's default, and the two ops differ in one.
    if max_query_len is None:
        max_query_len = default_query_len
    if name == "decode" and max_query_len < 1:
        raise ValueError(f"max_query_len: expected at least 1 for decode, got {max_query_len}")
    checks.check_attention(
        q,
        cache,
        block_table,
        seq_lens,
        query_start_loc,
        q_rotation,
        out_rotation,
        k_centroids,
        k_codes,
        k_code_scale,
        v_centroids,
        out,
        lse,
        sinks,
        num_kv_heads,
        sm_scale,
        window_left,
        window_right,
        softcap,
        max_query_len,
    )
    module, extra = dispatch.resolve(backend, q.device)
    if q.shape[0] == 0:
        return
    getattr(module, name)(
        q=q,
        cache=cache,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        q_rotation=q_rotation,
        out_rotation=out_rotation,
        k_centroids=k_centroids,
        k_codes=k_codes,
        k_code_scale=k_code_scale,
        v_centroids=v_centroids,
        out=out,
        lse=lse,
        sinks=sinks,
        num_kv_heads=num_kv_heads,
        sm_scale=sm_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        max_query_len=max_query_len,
        int8=int8,
        **extra,
    )


def _nothing(*args: object, **kwargs: object) -> None:
    """Fake of every op: the results are in the mutated arguments."""


def _register() -> None:
    kernels = {
        "store": _store,
        "gather": _gather,
        "compress": _compress,
        "decompress": _decompress,
        "prefill": partial(_attention, "prefill", -1),
        "decode": partial(_attention, "decode", 1),
    }
    for name, arguments in SCHEMAS.items():
        _library.define(f"{name}({arguments}, int backend=0) -> ()")
        path = ", int path=0" if name in _WITH_PATH else ""
        _cuda_library.define(f"{name}({arguments}{path}) -> ()")
        # One implementation for every device: the backend is chosen inside.
        _library.impl(name, kernels[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"tq4::{name}", _nothing, lib=_library)
        torch.library.register_fake(f"tq4_cuda::{name}", _nothing, lib=_cuda_library)


_register()
