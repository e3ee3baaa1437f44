"""The quantiser: rotations, codebooks and int8 codes of one head dimension, made once as device tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from . import codebook
from .layout import HEAD_DIMS, NUM_CENTROIDS
from .rotation import attach, hadamard_signs, has_hadamard, make_rotation, signs_of

Rotation = str | torch.Tensor | None
Centroids = Sequence[float] | torch.Tensor | None

_SAME = "same"


class Quantizer:
    """Everything the ops need besides the data, made on the host once; calls then never synchronise.

    Args:
        head_dim: D, one of 64, 96, 128, 256.
        rotation: of K (and q): "hadamard" (Haar where D is not a power of two), "haar" (with seed 42 the
            matrix of the turboquant-vllm package), None (keys and queries come already rotated), or an
            orthogonal fp32 [D, D].
        v_rotation: of V (and the output); the same choices; default: the rotation of K.
        seed: of the rotations.
        k_centroids, v_centroids: 16 finite, strictly ascending values in units of a unit vector's
            coordinates; default: Lloyd-Max (:mod:`tq4.codebook`).
        norm_correction: store norms that give decoded vectors the norm of the originals.
        device: where the tensors live; default: the CPU.

    Attributes:
        k_rotation, v_rotation: fp32 ``[D, D]`` or None; a row vector is rotated by ``x @ R.T``.
        k_signs, v_signs: fp32 ``[D]``, the signs of a rotation that is a randomised Hadamard matrix, however
            it was given; None of any other.  The ops take them in place of the matrix (:mod:`tq4.rotation`).
        k_centroids, v_centroids: fp32 ``[16]``.
        k_boundaries, v_boundaries: fp32 ``[15]``, midpoints of the centroids.
        k_codes: int8 ``[16]``, in [-126, 126] (:data:`tq4.codebook.MAX_KEY_CODE`); ``k_centroids ~= k_codes
            * k_code_scale``.
        k_code_scale: float.

    The tensors are shared with the ops' callers and never to be written.

    Raises:
        ValueError: naming the argument.
        TypeError: a rotation that is neither a name, a floating tensor nor None.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        rotation: Rotation = "hadamard",
        v_rotation: Rotation = _SAME,
        seed: int = 42,
        k_centroids: Centroids = None,
        v_centroids: Centroids = None,
        norm_correction: bool = False,
        device: torch.device | str | int | None = None,
    ) -> None:
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
        self.head_dim = head_dim
        self.norm_correction = bool(norm_correction)
        k_rot = _rotation_tensors("rotation", rotation, head_dim, seed)
        same = isinstance(v_rotation, str) and v_rotation == _SAME
        v_rot = k_rot if same else _rotation_tensors("v_rotation", v_rotation, head_dim, seed)
        k_values = _centroid_values("k_centroids", k_centroids, head_dim)
        v_values = _centroid_values("v_centroids", v_centroids, head_dim)
        codes = codebook.int8_codes(k_values, head_dim)
        self.k_code_scale = codes.scale
        self.k_rotation, self.k_signs = k_rot
        self.v_rotation, self.v_signs = v_rot
        self.k_centroids = _fp32(k_values)
        self.k_boundaries = _fp32(codebook.boundaries(k_values))
        self.v_centroids = _fp32(v_values)
        self.v_boundaries = _fp32(codebook.boundaries(v_values))
        self.k_codes = torch.tensor(codes.codes, dtype=torch.int8, device="cpu")
        self._move(torch.device("cpu" if device is None else device))

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.k_centroids.device

    def to(self, device: torch.device | str | int) -> Quantizer:
        """This quantiser on another device (itself when it is there already)."""
        target = torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if target == self.device:
            return self
        other = object.__new__(Quantizer)
        other.__dict__.update(self.__dict__)
        other._move(target)
        return other

    def _move(self, device: torch.device) -> None:
        shared = self.v_rotation is self.k_rotation
        for name, value in list(self.__dict__.items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        if shared:
            self.v_rotation, self.v_signs = self.k_rotation, self.k_signs
        for signs, matrix in ((self.k_signs, self.k_rotation), (self.v_signs, self.v_rotation)):
            if signs is not None:
                attach(signs, matrix)

    def __repr__(self) -> str:
        return (
            f"Quantizer(head_dim={self.head_dim}, rotates_k={self.k_rotation is not None}, "
            f"rotates_v={self.v_rotation is not None}, norm_correction={self.norm_correction}, "
            f"device={self.device})"
        )


def _fp32(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _rotation_tensors(
    name: str, rotation: Rotation, head_dim: int, seed: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The matrix, and its signs where it is a randomised Hadamard rotation."""
    if rotation is None:
        return None, None
    if isinstance(rotation, str):
        # By its name, not its entries, which fake tensors do not have.
        named = rotation == "hadamard" and has_hadamard(head_dim)
        signs = hadamard_signs(head_dim, seed) if named else None
        return make_rotation(rotation, head_dim, seed), signs
    if not isinstance(rotation, torch.Tensor) or not rotation.is_floating_point():
        raise TypeError(f"{name}: expected a name, a floating-point tensor or None, got {rotation!r}")
    if tuple(rotation.shape) != (head_dim, head_dim):
        raise ValueError(f"{name}: expected shape [{head_dim}, {head_dim}], got {list(rotation.shape)}")
    matrix = rotation.detach().to("cpu", torch.float32).contiguous()
    wide = matrix.double()
    error = float((wide @ wide.T - torch.eye(head_dim, dtype=torch.float64, device="cpu")).abs().max())
    if not error < 1e-3:
        raise ValueError(f"{name}: expected an orthogonal matrix, got |R R^T - I| up to {error:.3g}")
    return matrix, signs_of(matrix)


def _centroid_values(name: str, values: Centroids, head_dim: int) -> tuple[float, ...]:
    if values is None:
        return codebook.centroids(head_dim)
    numbers = (
        values.detach().to("cpu", torch.float64).tolist()
        if isinstance(values, torch.Tensor)
        else list(values)
    )
    if len(numbers) != NUM_CENTROIDS:
        raise ValueError(f"{name}: expected {NUM_CENTROIDS} values, got {len(numbers)}")
    numbers = [float(number) for number in numbers]
    if not all(map(math.isfinite, numbers)) or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(f"{name}: expected finite, strictly ascending values, got {numbers}")
    return tuple(numbers)
