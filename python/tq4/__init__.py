"""TQ4: attention over a 4-bit TurboQuant key/value cache.

store -> prefill / decode over compressed pages, gather back, and the unpaged pair compress / decompress, by
CUDA kernels, Triton kernels or plain torch.
"""

from . import ops  # noqa: F401  (registers torch.ops.tq4)
from .backends import reference
from .dispatch import available_backends, backend, get_backend, set_backend
from .quantizer import Quantizer

__all__ = [
    "Quantizer",
    "available_backends",
    "backend",
    "get_backend",
    "reference",
    "set_backend",
]
