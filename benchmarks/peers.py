"""What a user would pick instead: torch SDPA, FlashInfer, turboquant-vllm.

Every maker takes a workload and its queries and returns a ``Contender``.  A peer that is not installed, or
cannot do the workload, raises ``UnavailableError`` and is reported, never skipped in silence.  FlashInfer
compiles its kernels on first use, which takes minutes; ``bench.py --no-flashinfer`` leaves it out.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from workloads import Contender, Tq4Inputs, Workload, page_table

Maker = Callable[[Workload, torch.Tensor], Contender]


class UnavailableError(RuntimeError):
    """The peer is not installed here or does not do this workload."""


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation is as missing as none
        raise UnavailableError(f"{module.split('.')[0]} cannot be imported ({error})") from error


# --------------------------------------------------------------------------------------------- torch SDPA


def sdpa(impl: str, backend: SDPBackend) -> Maker:
    """Dense attention by torch.  Chunks need the bottom-right mask, which only FlashAttention has."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        if not work.uniform:
            raise UnavailableError("dense attention takes equal lengths only")
        b, t, n = work.batch, work.q_lens[0], work.kv_lens[0]
        chunked = 1 < t < n
        if chunked and backend is not SDPBackend.FLASH_ATTENTION:
            raise UnavailableError("no bottom-right causal mask")
        gen = torch.Generator(q.device).manual_seed(7)
        k, v = (
            torch.randn(b, work.hkv, n, work.d, generator=gen, device=q.device, dtype=q.dtype)
            for _ in range(2)
        )
        qh = q.view(b, t, work.hq, work.d).transpose(1, 2).contiguous()

        def call() -> torch.Tensor:
            if chunked:  # is_causal of the public function is top-left; the kernel itself is bottom-right
                return torch.ops.aten._scaled_dot_product_flash_attention(qh, k, v, 0.0, True, False)[0]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(qh, k, v, is_causal=t > 1, enable_gqa=True)

        return Contender(
            impl,
            call,
            dense=lambda seq: (k[seq].transpose(0, 1), v[seq].transpose(0, 1)),
            tolerance=1e-2,
            read_bytes=work.kv_bytes(4 * work.d),
            tokens=lambda out: out.transpose(1, 2).reshape(b * t, work.hq, work.d),
        )

    return make


# --------------------------------------------------------------------------------------------- FlashInfer


class _FlashInferPages:
    """An fp16 or fp8 paged cache in FlashInfer's NHD layout and its index arrays."""

    def __init__(self, work: Workload, q: torch.Tensor, kv_dtype: torch.dtype) -> None:
        device = q.device
        table, self.blocks, total = page_table(work, str(device))
        self.work = work
        self.kv = torch.empty(total, 2, work.page, work.hkv, work.d, dtype=kv_dtype, device=device)
        gen = torch.Generator(device).manual_seed(8)
        for at in range(0, total, 4096):
            part = self.kv[at : at + 4096]
            part.copy_(torch.randn(part.shape, generator=gen, device=device))
        i32 = functools.partial(torch.tensor, dtype=torch.int32, device=device)
        self.q_indptr = i32(list(itertools.accumulate(work.q_lens, initial=0)))
        self.kv_indptr = i32(list(itertools.accumulate(map(len, self.blocks), initial=0)))
        self.kv_indices = i32([b for blocks in self.blocks for b in blocks])
        self.last_page_len = i32([(n - 1) % work.page + 1 for n in work.kv_lens])
        self.workspace = torch.empty(512 << 20, dtype=torch.uint8, device=device)

    def dense(self, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = self.kv[self.blocks[seq]].float()  # [pages, 2, page, Hkv, D]
        kv = pages.transpose(0, 1).flatten(1, 2)[:, : self.work.kv_lens[seq]]
        return kv[0], kv[1]


def flashinfer_prefill(impl: str, backend: str) -> Maker:
    """Paged fp16/bf16 attention by FlashInfer's FA2 or FA3 kernels."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        flashinfer = _need("flashinfer")
        pages = _FlashInferPages(work, q, q.dtype)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(pages.workspace, "NHD", backend=backend)
        wrapper.plan(
            pages.q_indptr,
            pages.kv_indptr,
            pages.kv_indices,
            pages.last_page_len,
            work.hq,
            work.hkv,
            work.d,
            work.page,
            causal=True,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
        return Contender(
            impl,
            lambda: wrapper.run(q, pages.kv),
            dense=pages.dense,
            tolerance=1e-2,
            read_bytes=work.kv_bytes(4 * work.d),
        )

    return make


def flashinfer_decode(impl: str, kv_dtype: torch.dtype | None, append: bool = False) -> Maker:
    """Paged decode on tensor cores over fp16/bf16 (``kv_dtype`` None) or fp8 pages.

    Several query tokens a sequence go through its prefill kernel, as FlashInfer's users do.  ``append``: the
    new tokens' K and V are first appended to the pages.
    """

    def make(work: Workload, q: torch.Tensor) -> Contender:
        flashinfer = _need("flashinfer")
        dtype = q.dtype if kv_dtype is None else kv_dtype
        pages = _FlashInferPages(work, q, dtype)
        heads = (work.hq, work.hkv, work.d, work.page)
        types = dict(q_data_type=q.dtype, kv_data_type=dtype)
        index = (pages.kv_indptr, pages.kv_indices, pages.last_page_len)
        if max(work.q_lens) == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                pages.workspace, "NHD", use_tensor_cores=True
            )
            wrapper.plan(*index, *heads, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(pages.workspace, "NHD", backend="fa2")
            wrapper.plan(pages.q_indptr, *index, *heads, causal=True, **types)
        element = torch.empty(0, dtype=dtype).element_size()
        contender = Contender(
            impl,
            lambda: wrapper.run(q, pages.kv),
            dense=pages.dense,
            tolerance=2e-2,
            read_bytes=work.kv_bytes(2 * work.d * element),
        )
        if append:
            fresh = torch.randn(2, q.shape[0], work.hkv, work.d, device=q.device).to(dtype)
            lens = torch.tensor(work.kv_lens, dtype=torch.int32, device=q.device)
            sequence, position = flashinfer.get_batch_indices_positions(pages.q_indptr, lens, q.shape[0])

            def call() -> torch.Tensor:
                flashinfer.append_paged_kv_cache(
                    fresh[0], fresh[1], sequence, position, pages.kv, *_append_index(pages)
                )
                return wrapper.run(q, pages.kv)

            contender.call = call
        return contender

    return make


def _append_index(pages: _FlashInferPages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pages.kv_indices, pages.kv_indptr, pages.last_page_len


# ----------------------------------------------------------------------------------------- turboquant-vllm


def turboquant_vllm(impl: str, kernel: str) -> Maker:
    """The fused Triton kernels of turboquant-vllm over the same byte layout."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        if kernel == "prefill":
            module = _need("turboquant_vllm.triton.fused_paged_tq4_int8_prefill")
            function = module.fused_paged_tq4_int8_prefill
            if work.batch != 1 or work.q_lens != work.kv_lens:
                raise UnavailableError("takes one whole sequence only")
            if work.kv_lens[0] > 16384:
                raise UnavailableError("left out beyond 16K: a run takes a second")
        else:
            function = _need("turboquant_vllm.triton.fused_paged_tq4_attention").fused_paged_tq4_decode
            if max(work.q_lens) > 1:
                raise UnavailableError("takes one query token a sequence only")
        inputs = Tq4Inputs(work, str(q.device), "token_major")
        quant = inputs.quantizer
        # its kernels gather K and V with one codebook and one rotation
        return Contender(
            impl,
            lambda: function(
                q,
                inputs.cache.tensor,
                inputs.block_table,
                inputs.seq_lens,
                quant.k_centroids,
                quant.k_rotation,
                work.hkv,
                work.d,
                work.page,
                sm_scale=1 / math.sqrt(work.d),
            ),
            dense=inputs.dense,
            tolerance=0.1,  # one int8 scale for a tile of queries: 2.7 to 4.5 % on Gaussian data
            read_bytes=work.kv_bytes(work.d + 8),
        )

    return make


# -------------------------------------------------------------------------------------------- the line-up


def peers_of(op: str, flashinfer: bool, turboquant: bool) -> dict[str, Maker]:
    """Makers of the peers of an operation, by the name they have in the record."""
    makers: dict[str, Maker] = {}
    if op in ("prefill", "chunk", "varlen", "mixed"):
        makers["sdpa-cudnn"] = sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)
        makers["sdpa-fa2"] = sdpa("sdpa-fa2", SDPBackend.FLASH_ATTENTION)
        if flashinfer:
            makers["flashinfer-fa3"] = flashinfer_prefill("flashinfer-fa3", "fa3")
            makers["flashinfer-fa2"] = flashinfer_prefill("flashinfer-fa2", "fa2")
        if turboquant and op == "prefill":
            makers["turboquant-vllm"] = turboquant_vllm("turboquant-vllm", "prefill")
    elif op == "decode":
        makers["sdpa-fa2"] = sdpa("sdpa-fa2", SDPBackend.FLASH_ATTENTION)
        if flashinfer:
            makers["flashinfer-16bit"] = flashinfer_decode("flashinfer-16bit", None)
            makers["flashinfer-fp8"] = flashinfer_decode("flashinfer-fp8", torch.float8_e4m3fn)
        if turboquant:
            makers["turboquant-vllm"] = turboquant_vllm("turboquant-vllm", "decode")
    elif op == "step" and flashinfer:
        makers["flashinfer-16bit"] = flashinfer_decode("flashinfer-16bit", None, append=True)
    return makers
