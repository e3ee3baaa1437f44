"""TQ4: attention over a 4-bit TurboQuant key/value cache.

Four operations (store, gather, prefill, decode) on a paged cache of 4-bit codes and fp32 norms, and the
unpaged pair compress / decompress, each by CUDA kernels, Triton kernels or plain torch::

    quantizer = tq4.Quantizer(128, device="cuda")
    cache = tq4.PagedCache(num_blocks=1024, num_kv_heads=8, head_dim=128, device="cuda")
    tq4.store(key, value, cache, slot_mapping, quantizer)
    out = tq4.prefill(q, cache, block_table, seq_lens, query_start_loc, quantizer)

The same operations are ``torch.ops.tq4.*``; the backend is chosen by :func:`set_backend`, :func:`backend`, an
argument of each function, or the environment variable ``TQ4_BACKEND``.
"""

from . import ops  # noqa: F401  (registers torch.ops.tq4)
from .backends import reference
from .cache import PagedCache
from .dispatch import available_backends, backend, get_backend, set_backend
from .functional import compress, decode, decompress, gather, prefill, store
from .quantizer import Quantizer

__all__ = [
    "PagedCache",
    "Quantizer",
    "available_backends",
    "backend",
    "compress",
    "decode",
    "decompress",
    "gather",
    "get_backend",
    "prefill",
    "reference",
    "set_backend",
    "store",
]
