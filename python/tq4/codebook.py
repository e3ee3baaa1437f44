"""Codebooks: Lloyd-Max centroids, decision boundaries, and int8 codes for the INT8 recipe.

A rotated unit vector's coordinates are nearly N(0, 1/D) for D >= 64 (TurboQuant, arXiv 2504.19874, section
3.1); for smaller D the exact density of a coordinate of a point on the unit sphere, proportional to
``(1 - x^2)^((D - 3) / 2)``, is used.  The 16 centroids minimise the mean squared error under that density.

Everything here is computed once on the host in float64 with the standard library and cached; nothing needs
scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from .layout import NUM_CENTROIDS

#: Smallest head_dim for which a coordinate counts as Gaussian (spec: the codebook).
GAUSSIAN_MIN_DIM = 64
#: Number of trial scales of :func:`int8_codes`.
NUM_SCALE_CANDIDATES = 1000
#: Largest magnitude of an int8 code of a key centroid: the decode kernels split their table of codes in two
#: halves, and one more must still fit in a byte.
MAX_KEY_CODE = 126

_MAX_ITERATIONS = 100_000
_QUADRATURE_ORDER = 48


@dataclass(frozen=True)
class Int8Codes:
    """int8 codes of a codebook: ``centroids[i] ~= codes[i] * scale``.

    Attributes:
        codes: 16 integers in [-126, 126] (:data:`MAX_KEY_CODE`).
        scale: step between neighbouring codes, in units of the centroids.
        relative_rms_error: rms of ``centroid - code * scale`` over rms of the centroids, both under the
            probabilities of the cells.
    """

    codes: tuple[int, ...]
    scale: float
    relative_rms_error: float


class _Gaussian:
    """N(0, 1/dim)."""

    def __init__(self, dim: int) -> None:
        self.sigma = 1.0 / math.sqrt(dim)
        self.upper = math.inf

    def mass(self, low: float, high: float) -> float:
        """P(low < X < high); erfc keeps the tails accurate (low >= 0)."""
        scale = self.sigma * math.sqrt(2.0)
        return 0.5 * (math.erfc(low / scale) - math.erfc(high / scale))

    def moment(self, low: float, high: float) -> float:
        """E[X; low < X < high]."""

        def density(x: float) -> float:
            return math.exp(-0.5 * (x / self.sigma) ** 2) / (self.sigma * math.sqrt(2.0 * math.pi))

        return self.sigma**2 * (density(low) - density(high))


class _Sphere:
    """One coordinate of a uniform point on the unit sphere in ``dim`` dimensions."""

    def __init__(self, dim: int) -> None:
        self.sigma = 1.0 / math.sqrt(dim)
        self.upper = 1.0
        self.power = (dim - 3) / 2.0
        self.norm = math.gamma(dim / 2.0) / (math.sqrt(math.pi) * math.gamma((dim - 1) / 2.0))

    def mass(self, low: float, high: float) -> float:
        """P(low < X < high) by Gauss-Legendre quadrature (the density is smooth enough from 8 dimensions)."""
        high = min(high, self.upper)
        half, middle = (high - low) / 2.0, (high + low) / 2.0
        total = 0.0
        for node, weight in _gauss_legendre(_QUADRATURE_ORDER):
            x = middle + half * node
            total += weight * (1.0 - x * x) ** self.power
        return self.norm * half * total

    def moment(self, low: float, high: float) -> float:
        """E[X; low < X < high], in closed form."""
        high = min(high, self.upper)
        power = self.power + 1.0
        return self.norm * ((1.0 - low * low) ** power - (1.0 - high * high) ** power) / (2.0 * power)


@lru_cache(maxsize=4)
def _gauss_legendre(order: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [-1, 1]: Newton's iteration on the Legendre recurrence."""
    rule = []
    for i in range(order):
        x = math.cos(math.pi * (i + 0.75) / (order + 0.5))
        slope = 1.0
        for _ in range(100):
            previous, value = 1.0, x
            for degree in range(2, order + 1):
                previous, value = value, ((2 * degree - 1) * x * value - (degree - 1) * previous) / degree
            slope = order * (x * value - previous) / (x * x - 1.0)
            step = value / slope
            x -= step
            if abs(step) < 1e-16:
                break
        rule.append((x, 2.0 / ((1.0 - x * x) * slope * slope)))
    return tuple(rule)


def _density(head_dim: int) -> _Gaussian | _Sphere:
    if head_dim < 8 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number of at least 8, got {head_dim}")
    return _Gaussian(head_dim) if head_dim >= GAUSSIAN_MIN_DIM else _Sphere(head_dim)


@lru_cache(maxsize=32)
def centroids(head_dim: int) -> tuple[float, ...]:
    """The 16 Lloyd-Max centroids for one coordinate of a rotated unit vector, ascending and symmetric.

    Lloyd's iteration in float64 on the positive half (each centroid is the mean of its cell, each boundary
    the midpoint of its neighbours) until nothing moves; symmetry is then exact by construction.

    Args:
        head_dim: D, even, at least 8.

    Raises:
        ValueError: naming ``head_dim``.
    """
    density = _density(head_dim)
    half = NUM_CENTROIDS // 2
    reach = min(3.0 * density.sigma, density.upper)
    points = [reach * (i + 0.5) / half for i in range(half)]
    tolerance = 1e-15 * density.sigma
    for _ in range(_MAX_ITERATIONS):
        edges = [0.0, *((a + b) / 2.0 for a, b in pairwise(points)), density.upper]
        means = [density.moment(a, b) / density.mass(a, b) for a, b in pairwise(edges)]
        shift = max(abs(a - b) for a, b in zip(points, means, strict=True))
        points = means
        if shift < tolerance:
            break
    return (*(-p for p in reversed(points)), *points)


def boundaries(values: Sequence[float]) -> tuple[float, ...]:
    """The 15 midpoints of neighbouring centroids: the nearest-centroid decision boundaries.

    Args:
        values: 16 ascending centroids.
    """
    return tuple((a + b) / 2.0 for a, b in pairwise(values))


def cell_probabilities(values: Sequence[float], head_dim: int) -> tuple[float, ...]:
    """Probability of each of the 16 cells of a codebook for a coordinate of a rotated unit vector.

    Args:
        values: 16 ascending centroids.
        head_dim: D.
    """
    density = _density(head_dim)
    edges = [-math.inf, *boundaries(values), math.inf]

    def below(x: float) -> float:
        """P(X < x), from the half-line's masses."""
        if x <= -density.upper:
            return 0.0
        if x >= density.upper:
            return 1.0
        return 0.5 + math.copysign(density.mass(0.0, abs(x)), x)

    return tuple(max(below(b) - below(a), 0.0) for a, b in pairwise(edges))


@lru_cache(maxsize=64)
def int8_codes(values: tuple[float, ...], head_dim: int) -> Int8Codes:
    """int8 codes and their scale for 16 centroids (spec: the INT8 recipe, keys).

    For each of about 1000 trial scales the centroids are rounded to integers and the scale is refitted by
    least squares under the cell probabilities; the codes with the smallest error win.  The Gaussian codebook
    gets +-{5, 15, 25, 36, 48, 62, 79, 104} with a relative rms error of 0.32 %, where scaling the largest
    centroid to 127 has 0.57 %.

    Args:
        values: 16 finite, ascending centroids, not all zero.
        head_dim: D, for the cell probabilities.

    Returns:
        The codes, the scale and the error.
    """
    if len(values) != NUM_CENTROIDS or not all(map(math.isfinite, values)):
        raise ValueError(f"values: expected {NUM_CENTROIDS} finite numbers, got {list(values)}")
    largest = max(map(abs, values))
    if largest == 0.0:
        raise ValueError("values: expected at least one centroid other than zero")
    weights = cell_probabilities(values, head_dim)
    energy = sum(w * v * v for w, v in zip(weights, values, strict=True))
    best: Int8Codes | None = None
    for i in range(NUM_SCALE_CANDIDATES):
        # Trial: the largest centroid becomes 64 .. 126 steps (fewer steps cannot be finer).
        top = 64.0 + (MAX_KEY_CODE - 64.0) * i / (NUM_SCALE_CANDIDATES - 1)
        codes = tuple(max(-MAX_KEY_CODE, min(MAX_KEY_CODE, round(v / largest * top))) for v in values)
        square = sum(w * k * k for w, k in zip(weights, codes, strict=True))
        if square == 0.0:
            continue
        scale = sum(w * v * k for w, v, k in zip(weights, values, codes, strict=True)) / square
        error = sum(w * (v - scale * k) ** 2 for w, v, k in zip(weights, values, codes, strict=True))
        relative = math.sqrt(error / energy)
        if best is None or relative < best.relative_rms_error:
            best = Int8Codes(codes, scale, relative)
    if best is None:
        raise ValueError(f"values: every cell of {list(values)} that rounds to a code has probability zero")
    return best
