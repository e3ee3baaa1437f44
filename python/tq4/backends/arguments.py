"""The arguments of the attention ops as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..quantizer import Quantizer


@dataclass
class Attention:
    """Arguments of ``torch.ops.tq4.prefill`` and ``decode``, under the names of their schema.

    Symbols: T tokens, B sequences, Hq query heads, Hkv KV heads, D head_dim.

    Attributes:
        q, out: fp16 or bf16 ``[T, Hq, D]``.
        cache: uint8 pages.
        block_table: int32 ``[B, columns]``.
        seq_lens: int32 ``[B]``.
        query_start_loc: int32 ``[B + 1]``; None in decode: one token a sequence.
        q_rotation, out_rotation: fp32 ``[D, D]``, or the signs ``[D]`` of a Hadamard rotation, or None.
        k_centroids, v_centroids: fp32 ``[16]``.
        k_codes, k_code_scale: int8 ``[16]`` and its scale, for INT8 scores.  Codes are in [-126, 126], as the
            tables of the CUDA decode kernels hold no larger ones: from those it makes NaN.
        lse: fp32 ``[Hq, T]`` or None.
        sinks: fp32 ``[Hq]`` or None.
        num_kv_heads: Hkv.
        sm_scale, causal, window_left, window_right, softcap, int8: as in :func:`tq4.prefill`.
        max_query_len: at least the query tokens of every sequence; negative: unknown.
    """

    q: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    q_rotation: torch.Tensor | None
    out_rotation: torch.Tensor | None
    k_centroids: torch.Tensor
    k_codes: torch.Tensor
    k_code_scale: float
    v_centroids: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    sinks: torch.Tensor | None
    num_kv_heads: int
    sm_scale: float
    causal: bool = True
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    max_query_len: int = -1
    int8: bool = True

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None,
        quantizer: Quantizer,
        num_kv_heads: int,
        **options: Any,
    ) -> Attention:
        """With a quantiser's tables (rotations as matrices), an uninitialised ``out``, and the default scale
        of the scores."""
        defaults = {"out": torch.empty_like(q), "lse": None, "sinks": None, "sm_scale": q.shape[-1] ** -0.5}
        return cls(
            q,
            cache,
            block_table,
            seq_lens,
            query_start_loc,
            quantizer.k_rotation,
            quantizer.v_rotation,
            quantizer.k_centroids,
            quantizer.k_codes,
            quantizer.k_code_scale,
            quantizer.v_centroids,
            num_kv_heads=num_kv_heads,
            **(defaults | options),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.q.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return self.seq_lens.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def longest(self) -> int:
        """No sequence has more query tokens."""
        if self.query_start_loc is None:
            return 1
        return self.num_tokens if self.max_query_len < 0 else min(self.max_query_len, self.num_tokens)

    @property
    def visible_right(self) -> int:
        """window_right with the causal mask in it."""
        return 0 if self.causal else self.window_right
