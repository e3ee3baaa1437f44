"""Which backend runs an op.

Order of precedence: the ``backend`` argument of a call, the innermost :func:`backend` context,
:func:`set_backend`, the environment variable ``TQ4_BACKEND``, automatic.  An explicit request that cannot be
met raises and says why; it never falls back.

Automatic means: CPU tensors use ``reference``; CUDA tensors use ``cuda`` if the extension is loaded and has
code for this GPU, else ``triton``, else ``reference``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .environment import variable

#: Backend names; the index is the ``backend`` argument of the torch.ops.tq4 ops.
BACKENDS = ("auto", "cuda", "cuda-sm80", "triton", "reference")
AUTO, CUDA, CUDA_SM80, TRITON, REFERENCE = range(5)

#: Lowest compute capability with int8 mma.sync m16n8k32 and cp.async.
MIN_CAPABILITY = (8, 0)

_ENV = "TQ4_BACKEND"
_override: int | None = None
_context: ContextVar[int | None] = ContextVar("tq4_backend", default=None)


def backend_id(name: str | None) -> int:
    """The op argument for a backend name; None and "auto" are 0 (decided when the op runs).

    Raises:
        ValueError: unknown name.
    """
    if name is None:
        return AUTO
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS.index(name)


def set_backend(name: str | None) -> None:
    """Choose the backend for the whole process.

    Args:
        name: one of :data:`BACKENDS`; ``"auto"`` overrides ``TQ4_BACKEND``, None returns to it.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot work on this machine, and why.
    """
    global _override
    _override = None if name is None else _checked_id(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, for this thread (or async task) only.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot work on this machine, and why.
    """
    token = _context.set(_checked_id(name))
    try:
        yield
    finally:
        _context.reset(token)


def get_backend() -> str:
    """The name in force where no ``backend`` argument is given ("auto": decided per call)."""
    return BACKENDS[_current()[0]]


def available_backends() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it can run here (on the current CUDA device, if any), and why (not)."""
    return {name: availability(name, _device_for(name)) for name in BACKENDS if name != "auto"}


def availability(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend can run on tensors of ``device``, and the reason.

    Raises:
        ValueError: unknown name.
    """
    number = backend_id(name)
    return (True, "chosen by device") if number == AUTO else _availability_now(number, device)


def _availability_now(number: int, device: torch.device) -> tuple[bool, str]:
    """Of a backend by its number, on the current GPU where the device is just "cuda"."""
    if device_type(device) == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    # Triton's alone depends on the variable.
    interpret = (variable("TRITON_INTERPRET") or "0") if number == TRITON else "0"
    return _availability(number, device, interpret)


def resolve(number: int, device: torch.device) -> tuple[ModuleType, dict[str, Any]]:
    """The backend module that serves an op call, and extra keyword arguments for it.

    Args:
        number: the op's ``backend`` argument.
        device: of the op's tensors.

    Raises:
        ValueError: ``number`` out of range, or an unknown name in ``TQ4_BACKEND``.
        RuntimeError: an explicitly requested backend cannot serve this device; says who asked and why not.
    """
    source = "the backend argument"
    if number == AUTO:
        number, source = _current()
    elif not 0 <= number < len(BACKENDS):
        raise ValueError(f"backend: expected 0 .. {len(BACKENDS) - 1} ({', '.join(BACKENDS)}), got {number}")
    if number == AUTO:
        number = _automatic(device)
    else:
        ok, reason = availability(BACKENDS[number], device)
        if not ok:
            raise RuntimeError(
                f"backend {BACKENDS[number]!r} was requested by {source} but cannot run on {device}: {reason}"
            )
    return _module(number), ({"path": 1} if number == CUDA_SM80 else {})


def debug() -> bool:
    """Whether ``TQ4_DEBUG`` asks for checks of tensor contents (they synchronise with the device)."""
    return variable("TQ4_DEBUG") not in (None, "", "0")


@cache
def device_type(device: torch.device) -> str:
    """``device.type``, of which torch makes a new string (0.4 us) whenever it is read."""
    return device.type


def _current() -> tuple[int, str]:
    chosen = _context.get()
    if chosen is not None:
        return chosen, "tq4.backend()"
    if _override is not None:
        return _override, "tq4.set_backend()"
    name = variable(_ENV)
    if not name:
        return AUTO, "default"
    if name not in BACKENDS:
        raise ValueError(f"{_ENV}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS.index(name), f"the environment variable {_ENV}"


def _checked_id(name: str) -> int:
    if name is None:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got None")
    number = backend_id(name)
    ok, reason = availability(name, _device_for(name))
    if not ok:
        raise RuntimeError(f"backend {name!r} cannot run on this machine: {reason}")
    return number


def _device_for(name: str) -> torch.device:
    """The device that says most about whether a backend can run on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() or name.startswith("cuda") else "cpu")


def _automatic(device: torch.device) -> int:
    if device_type(device) == "cuda":
        for number in (CUDA, TRITON):
            if _availability_now(number, device)[0]:
                return number
    return REFERENCE


@cache
def _availability(number: int, device: torch.device, interpret: str) -> tuple[bool, str]:
    if number == REFERENCE:
        return True, "plain torch, any device"
    if number == TRITON:
        return _triton_availability(device, interpret == "1")
    return _module(CUDA).availability(device)


def _triton_availability(device: torch.device, interpret: bool) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed"
    if device.type == "cpu":
        if interpret:
            return True, "CPU, by Triton's interpreter (TRITON_INTERPRET=1): slow, for tests"
        return False, "Triton needs a CUDA device (or TRITON_INTERPRET=1 for its CPU interpreter)"
    if device.type != "cuda":
        return False, f"Triton kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return False, f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.0"
    return True, f"compute capability {capability[0]}.{capability[1]}"


_MODULES = {
    number: f"{__package__}.backends.{name}"
    for number, name in ((CUDA, "cuda"), (CUDA_SM80, "cuda"), (TRITON, "triton"), (REFERENCE, "reference"))
}
#: Modules whose import has ended; before, another thread's may be found half made in sys.modules.
_imported: set[str] = set()


def _module(number: int) -> ModuleType:
    name = _MODULES[number]
    if name in _imported and name in sys.modules:
        return sys.modules[name]
    module = importlib.import_module(name)
    _imported.add(name)
    return module
