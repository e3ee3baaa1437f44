"""The CUDA extension: loads ``tq4/_C*.so`` when first needed and calls torch.ops.tq4_cuda.

The library is never loaded on a CPU-only torch: it refers to a symbol of libtorch_cuda.so.  A failure to load
is remembered as a reason, never raised on import.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..rotation import as_matrix
from .choices import choice, decodes_short_queries

_PACKAGE = Path(__file__).resolve().parent.parent
_MIN_MAJOR = 8


@lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """What the build recorded in ``_build_info.json`` ("archs", "nvcc", "reason"); empty when unknown."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def built_archs() -> tuple[str, ...]:
    """Architectures the extension was compiled for, such as ("8.0", "9.0a"); empty when unknown."""
    archs = build_info().get("archs", ())
    return tuple(str(arch) for arch in archs) if isinstance(archs, (list, tuple)) else ()


@lru_cache(maxsize=1)
def load() -> tuple[bool, str]:
    """Load the extension once.

    Returns:
        (True, path of the library) or (False, why not).
    """
    libraries = sorted([*_PACKAGE.glob("_C*.so"), *_PACKAGE.glob("_C*.pyd")])
    if not libraries:
        reason = build_info().get("reason") or "no tq4/_C*.so"
        return False, (
            f"this installation has no CUDA extension ({reason}); install again where nvcc >= 12.8 is, with "
            "TQ4_BUILD_CUDA=1 to make a missing nvcc an error"
        )
    if torch.version.cuda is None:
        return False, f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return False, f"{libraries[0].name} does not load: {error}"
    return True, str(libraries[0])


def covers(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs`` runs on a GPU of this compute capability.

    A cubin runs on its own major version at its own or a later minor one; an ``a`` cubin only on exactly its
    own; PTX on anything later.
    """
    for arch in archs:
        text = arch.removesuffix("+PTX")
        exact = text[-1:].isalpha()
        try:
            major, minor = (int(part) for part in text.rstrip("abcdefghijklmnopqrstuvwxyz").split("."))
        except ValueError:
            continue
        if (major, minor) == capability:
            return True
        if not exact and major == capability[0] and minor <= capability[1]:
            return True
        if not exact and arch.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def availability(device: torch.device) -> tuple[bool, str]:
    """Whether this backend can serve tensors of ``device``, and why (not)."""
    if device.type != "cuda":
        return False, f"the CUDA extension needs CUDA tensors, not {device.type}"
    ok, reason = load()
    if not ok:
        return False, reason
    capability = torch.cuda.get_device_capability(device)
    name = f"{capability[0]}.{capability[1]}"
    if capability[0] < _MIN_MAJOR:
        return False, f"compute capability {name} is below {_MIN_MAJOR}.0"
    archs = built_archs()
    if archs and not covers(archs, capability):
        return False, f"built for {', '.join(archs)}, which does not include this GPU's {name}"
    return (
        True,
        f"compute capability {name}, built for {', '.join(archs) if archs else 'unrecorded architectures'}",
    )


def _vectorised(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a packed copy where its rows do not start at multiples of 16 bytes.

    The kernels read and write rows with 16-byte instructions; views at odd offsets are rare enough to copy.
    """
    if tensor.data_ptr() % 16 == 0:
        step = 16 // tensor.itemsize
        for stride in tensor.stride()[:-1]:
            if stride % step:
                break
        else:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _rotation(rotation: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix or signs, for the kernels that take either (store, compress, decode).

    Either is contiguous, so that all rows are at multiples of 16 bytes if the first is.
    """
    return rotation if rotation is None or rotation.data_ptr() % 16 == 0 else _vectorised(rotation)


def _matrix(rotation: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix, for the others."""
    return _rotation(as_matrix(rotation))


def _copy_back(target: torch.Tensor, written: torch.Tensor) -> None:
    if written is not target:
        target.copy_(written)


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
    path: int = 0,
) -> None:
    """torch.ops.tq4.store by the extension; one kernel serves every architecture, whatever the path."""
    torch.ops.tq4_cuda.store.default(
        _vectorised(key),
        _vectorised(value),
        cache,
        slot_mapping,
        _rotation(k_rotation),
        _rotation(v_rotation),
        k_centroids,
        k_boundaries,
        v_centroids,
        v_boundaries,
        norm_correction,
    )


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
    path: int = 0,
) -> None:
    """torch.ops.tq4.gather by the extension; one kernel serves every architecture, whatever the path."""
    fast_key, fast_value = _vectorised(key), _vectorised(value)
    torch.ops.tq4_cuda.gather.default(
        cache,
        block_table,
        seq_lens,
        out_start_loc,
        _matrix(k_rotation),
        _matrix(v_rotation),
        k_centroids,
        v_centroids,
        fast_key,
        fast_value,
    )
    _copy_back(key, fast_key)
    _copy_back(value, fast_value)


def compress(
    x: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    boundaries: torch.Tensor,
    packed: torch.Tensor,
    norms: torch.Tensor,
    norm_correction: bool = False,
    path: int = 0,
) -> None:
    """torch.ops.tq4.compress by the extension; one kernel serves every architecture, whatever the path."""
    fast_packed = _vectorised(packed)
    torch.ops.tq4_cuda.compress.default(
        _vectorised(x), _rotation(rotation), centroids, boundaries, fast_packed, norms, norm_correction
    )
    _copy_back(packed, fast_packed)


def decompress(
    packed: torch.Tensor,
    norms: torch.Tensor,
    rotation: torch.Tensor | None,
    centroids: torch.Tensor,
    out: torch.Tensor,
    path: int = 0,
) -> None:
    """torch.ops.tq4.decompress by the extension; one kernel serves every architecture, whatever the path."""
    fast_out = _vectorised(out)
    torch.ops.tq4_cuda.decompress.default(_vectorised(packed), norms, _matrix(rotation), centroids, fast_out)
    _copy_back(out, fast_out)


#: Where prefill unpacks K and V, by TQ4_PREFILL_UNPACK; its part of the op's ``path``.
_UNPACK = {"auto": 0, "in_kernel": 2, "ahead": 4}
#: The part of ``path`` that keeps sequences of few query tokens from the decode kernels.
_NO_DECODE = 8


def _unpack() -> int:
    return _UNPACK[choice("TQ4_PREFILL_UNPACK", _UNPACK)]


def prefill(**arguments: Any) -> None:
    """torch.ops.tq4.prefill by the extension; ``path=1`` restricts it to the portable kernels."""
    short = 0 if decodes_short_queries() else _NO_DECODE
    arguments["path"] = arguments.get("path", 0) + _unpack() + short
    _attend(torch.ops.tq4_cuda.prefill.default, arguments, _matrix)


def decode(**arguments: Any) -> None:
    """torch.ops.tq4.decode by the extension; ``path=1`` restricts it to the portable kernels."""
    arguments.setdefault("max_query_len", 1)
    _attend(torch.ops.tq4_cuda.decode.default, arguments, _rotation)


def _attend(
    op: torch._ops.OpOverload,
    arguments: dict[str, Any],
    rotation: Callable[[torch.Tensor | None], torch.Tensor | None],
) -> None:
    """The op, of aligned tensors, in the order of its schema: the dispatcher takes twice as long (5 us more)
    to match keywords."""
    out = arguments["out"]
    fast_out = _vectorised(out)
    op(
        _vectorised(arguments["q"]),
        arguments["cache"],
        arguments["block_table"],
        arguments["seq_lens"],
        arguments["query_start_loc"],
        rotation(arguments["q_rotation"]),
        rotation(arguments["out_rotation"]),
        arguments["k_centroids"],
        arguments["k_codes"],
        arguments["k_code_scale"],
        arguments["v_centroids"],
        fast_out,
        arguments["lse"],
        arguments["sinks"],
        arguments["num_kv_heads"],
        arguments["sm_scale"],
        arguments.get("causal", True),
        arguments.get("window_left", -1),
        arguments.get("window_right", -1),
        arguments.get("softcap", 0.0),
        arguments.get("max_query_len", -1),
        arguments.get("int8", True),
        arguments.get("path", 0),
    )
    _copy_back(out, fast_out)
