"""TQ4 in Hugging Face transformers (>= 5.17): a cache, an attention function, and folding.

Importing this module registers the attention function "tq4"::

    from tq4.integrations.transformers import TQ4Cache

    model.set_attn_implementation("tq4")
    model.generate(**inputs, past_key_values=TQ4Cache(model.config))

``tq4`` itself does not need transformers: ``pip install tq4[transformers]``.
"""

from __future__ import annotations

from importlib import metadata

_NEEDED = (5, 17)


def _check_version() -> None:
    """Raises ImportError without transformers, or with one whose cache interface is another."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(
            "tq4.integrations.transformers needs transformers >= 5.17: pip install tq4[transformers]"
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < _NEEDED:
        raise ImportError(f"tq4.integrations.transformers needs transformers >= 5.17, {version} is installed")


_check_version()

from .attention import attention, dense_attention, mask, register  # noqa: E402
from .cache import CompressedKV, TQ4Cache, TQ4Layer  # noqa: E402
from .folding import fold_rotation  # noqa: E402

register()

__all__ = [
    "CompressedKV",
    "TQ4Cache",
    "TQ4Layer",
    "attention",
    "dense_attention",
    "fold_rotation",
    "mask",
    "register",
]
