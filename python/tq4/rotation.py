"""Rotations: fixed orthogonal matrices [D, D] that spread a vector's energy evenly over its coordinates.

A row vector x is rotated by ``x @ R.T`` and rotated back by ``y @ R``.  Both constructions depend on nothing
but ``head_dim`` and ``seed``, run on the CPU in fp32, and ignore torch's default device and dtype.
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
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim: expected a power of two for a Hadamard rotation, got {head_dim}")
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while matrix.shape[0] < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(0, 2, (head_dim,), generator=generator, device="cpu").to(torch.float32) * 2 - 1
    # One rounding of 1/sqrt(D), then only signs: the magnitudes are exactly equal.
    scale = torch.tensor(1.0 / math.sqrt(head_dim), dtype=torch.float32, device="cpu")
    return (matrix * signs * scale).contiguous()


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
    if kind == "haar" or (kind == "hadamard" and head_dim & (head_dim - 1)):
        return haar(head_dim, seed)
    if kind == "hadamard":
        return hadamard(head_dim, seed)
    raise ValueError(f"rotation: expected one of {KINDS}, None or a tensor, got {kind!r}")
