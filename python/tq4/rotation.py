"""Rotations: fixed orthogonal matrices [D, D] that spread a vector's energy evenly over its coordinates.

A row vector x is rotated by ``x @ R.T`` and rotated back by ``y @ R``.  Both constructions depend on nothing
but ``head_dim`` and ``seed``, run on the CPU in fp32, and ignore torch's default device and dtype.

A randomised Hadamard rotation ``R = H diag(s) / sqrt(D)`` is known by its signs s, and the ops take either:
fp32 ``[D, D]``, or the signs, fp32 ``[D]``.  Kernels with a fast transform read D signs instead of D * D
entries; :func:`as_matrix` serves the others.
"""

from __future__ import annotations

import math

import torch

#: Names accepted by :func:`make_rotation`.
KINDS = ("hadamard", "haar")


def haar(head_dim: int, seed: int = 42) -> torch.Tensor:
    """A Haar-distributed rotation: QR of a seeded Gaussian matrix, signs fixed by R's diagonal.

    With ``seed=42`` the matrix is the one that the turboquant-vllm package makes (spec: the codebook).

    Args:
        head_dim: D.
        seed: of a CPU generator.

    Returns:
        fp32 ``[D, D]`` on the CPU, contiguous.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, device="cpu", dtype=torch.float32)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.sign(torch.diagonal(r))
    signs[signs == 0] = 1.0
    return (q * signs).contiguous()


def has_hadamard(head_dim: int) -> bool:
    """Whether there is a Hadamard rotation of this size: D is a power of two."""
    return head_dim > 0 and head_dim & (head_dim - 1) == 0


def hadamard(head_dim: int, seed: int = 42) -> torch.Tensor:
    """A randomised Hadamard rotation ``H diag(s) / sqrt(D)``: every entry is +-1/sqrt(D).

    H is Sylvester's Hadamard matrix and s are seeded random signs.

    Args:
        head_dim: D, a power of two.
        seed: of a CPU generator that draws the signs.

    Returns:
        fp32 ``[D, D]`` on the CPU, contiguous.

    Raises:
        ValueError: ``head_dim`` is not a power of two.
    """
    return from_signs(hadamard_signs(head_dim, seed))


def hadamard_signs(head_dim: int, seed: int = 42) -> torch.Tensor:
    """The signs s of :func:`hadamard`: fp32 ``[D]`` of +1 and -1 on the CPU.

    Raises:
        ValueError: ``head_dim`` is not a power of two.
    """
    if not has_hadamard(head_dim):
        raise ValueError(f"head_dim: expected a power of two for a Hadamard rotation, got {head_dim}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (head_dim,), generator=generator, device="cpu").to(torch.float32) * 2 - 1


def from_signs(signs: torch.Tensor) -> torch.Tensor:
    """The rotation ``H diag(s) / sqrt(D)`` of some signs, bitwise the same on every device.

    Nothing is cached, copied from the host or waited for: a matrix first made while a CUDA graph is captured
    has no contents before the replay.

    Args:
        signs: fp32 ``[D]`` of +1 and -1, D a power of two.

    Returns:
        fp32 ``[D, D]`` on the device of ``signs``, contiguous.
    """
    head_dim = signs.shape[0]
    index = torch.arange(head_dim, device=signs.device)
    # H[i, j] = (-1)^popcount(i & j); the parity of the bits is folded into the lowest.
    parity = index[:, None] & index
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    # One rounding of 1/sqrt(D), then only signs: the magnitudes are exactly equal.
    scaled = signs * (1.0 / math.sqrt(head_dim))
    return torch.where((parity & 1).bool(), -scaled, scaled)


def signs_of(matrix: torch.Tensor) -> torch.Tensor | None:
    """The signs of a matrix that is bitwise a randomised Hadamard rotation, None of any other.

    Args:
        matrix: fp32 ``[D, D]`` on the CPU.
    """
    if not has_hadamard(matrix.shape[0]):
        return None
    # The first row of H is all ones.
    ones = torch.ones(matrix.shape[0], dtype=torch.float32, device="cpu")
    signs = torch.where(matrix[0] < 0.0, -ones, ones)
    return signs if torch.equal(matrix, from_signs(signs)) else None


def attach(signs: torch.Tensor, matrix: torch.Tensor) -> None:
    """Let :func:`as_matrix` find the matrix of these signs instead of making it; neither may be written."""
    signs._tq4_matrix = matrix


def as_matrix(rotation: torch.Tensor | None) -> torch.Tensor | None:
    """A rotation argument of an op as a matrix, for the kernels that take no signs.

    The signs of a :class:`tq4.Quantizer` have their matrix with them; others are expanded by a few small
    kernels in each call.
    """
    if rotation is None or rotation.dim() != 1:
        return rotation
    matrix = getattr(rotation, "_tq4_matrix", None)
    return from_signs(rotation) if matrix is None else matrix


def make_rotation(kind: str, head_dim: int, seed: int = 42) -> torch.Tensor:
    """The rotation of a given kind; ``"hadamard"`` falls back to Haar where D is not a power of two (D = 96).

    Args:
        kind: ``"hadamard"`` or ``"haar"``.
        head_dim: D.
        seed: of a CPU generator.

    Returns:
        fp32 ``[D, D]`` on the CPU.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "haar" or (kind == "hadamard" and not has_hadamard(head_dim)):
        return haar(head_dim, seed)
    if kind == "hadamard":
        return hadamard(head_dim, seed)
    raise ValueError(f"rotation: expected one of {KINDS}, None or a tensor, got {kind!r}")
