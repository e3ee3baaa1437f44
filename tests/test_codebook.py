"""Centroids, boundaries, int8 codes: against known values, other quadrature and a finer search."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tq4 import codebook

# J. Max, "Quantizing for minimum distortion" (1960), table I, N = 16: N(0, 1), positive half.
MAX_CENTROIDS = (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733)
MAX_BOUNDARIES = (0.2582, 0.5224, 0.7996, 1.099, 1.437, 1.844, 2.401)
# 20.22 dB; the table prints 0.009497, its centroids being rounded to four digits.
MAX_ERROR = 0.009501


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_known_gaussian_values(head_dim):
    points = [c * math.sqrt(head_dim) for c in codebook.centroids(head_dim)]
    edges = [b * math.sqrt(head_dim) for b in codebook.boundaries(codebook.centroids(head_dim))]
    assert points[8:] == pytest.approx(MAX_CENTROIDS, abs=5e-4)
    assert edges[8:] == pytest.approx(MAX_BOUNDARIES, abs=5e-4)


def test_known_gaussian_distortion():
    head_dim = 128
    points = codebook.centroids(head_dim)
    weights = codebook.cell_probabilities(points, head_dim)
    # For a Lloyd-Max quantiser E[(X - c)^2] = E[X^2] - E[c^2].
    error = 1.0 - head_dim * sum(w * c * c for w, c in zip(weights, points, strict=True))
    assert error == pytest.approx(MAX_ERROR, abs=1e-6)


@pytest.mark.parametrize("head_dim", (8, 16, 32, 64, 128))
def test_symmetric_and_ascending(head_dim):
    points = codebook.centroids(head_dim)
    assert len(points) == 16 and all(a < b for a, b in pairwise(points))
    assert all(a == -b for a, b in zip(points, reversed(points), strict=True))
    assert codebook.boundaries(points)[7] == 0.0
    assert sum(codebook.cell_probabilities(points, head_dim)) == pytest.approx(1.0, abs=1e-14)


def density(head_dim: int):
    """The density of a coordinate, written down again: Gaussian from 64 dimensions, the sphere's below."""
    if head_dim >= 64:
        return lambda x: math.sqrt(head_dim / (2 * math.pi)) * math.exp(-head_dim * x * x / 2), math.inf
    beta = math.exp(math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2)) / math.sqrt(math.pi)
    return lambda x: beta * max(0.0, 1 - x * x) ** ((head_dim - 3) / 2), 1.0


@pytest.mark.parametrize("head_dim", (8, 32, 64, 128))
def test_lloyd_max_conditions_by_independent_quadrature(head_dim):
    integrate = pytest.importorskip("scipy.integrate")
    pdf, upper = density(head_dim)
    points = codebook.centroids(head_dim)
    weights = codebook.cell_probabilities(points, head_dim)
    edges = (-upper, *codebook.boundaries(points), upper)
    for point, weight, (low, high) in zip(points, weights, pairwise(edges), strict=True):
        mass = integrate.quad(pdf, low, high, epsabs=1e-14)[0]
        moment = integrate.quad(lambda x: x * pdf(x), low, high, epsabs=1e-14)[0]
        assert weight == pytest.approx(mass, abs=1e-10)
        assert point == pytest.approx(moment / mass, abs=1e-9)


def test_results_are_cached():
    assert codebook.centroids(128) is codebook.centroids(128)
    values = codebook.centroids(128)
    assert codebook.int8_codes(values, 128) is codebook.int8_codes(values, 128)


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_int8_codes_of_the_gaussian_codebook(head_dim):
    values = codebook.centroids(head_dim)
    found = codebook.int8_codes(values, head_dim)
    half = (5, 15, 25, 36, 48, 62, 79, 104)
    assert found.codes == (*(-k for k in reversed(half)), *half)
    # In units of the coordinates' deviation the error is 0.318 %.
    assert found.relative_rms_error == pytest.approx(0.00319, abs=2e-5)
    assert found.scale * math.sqrt(head_dim) == pytest.approx(0.026168, abs=1e-5)


def scaled_error(values: tuple[float, ...], head_dim: int, top: float) -> float:
    """Relative rms error with the largest centroid at ``top`` steps, after least squares."""
    weights = codebook.cell_probabilities(values, head_dim)
    largest = max(map(abs, values))
    codes = [max(-126, min(126, round(v / largest * top))) for v in values]
    triples = list(zip(weights, values, codes, strict=True))
    scale = sum(w * v * k for w, v, k in triples) / sum(w * k * k for w, _, k in triples)
    error = sum(w * (v - scale * k) ** 2 for w, v, k in triples)
    return math.sqrt(error / sum(w * v * v for w, v, _ in triples))


EXACT_WITH_127 = (-127, -109, -94, -76, -61, -43, -27, -9, 11, 26, 44, 60, 77, 92, 110, 127)
CUSTOM = {
    "uniform": tuple((i - 7.5) / 40 for i in range(16)),
    "asymmetric": tuple(-0.2 + 0.03 * i + 0.0007 * i * i for i in range(16)),
    "positive": tuple(0.001 + 0.02 * i for i in range(16)),
    "large": tuple((i - 7.5) * 10.0 for i in range(16)),
    "exact with 127": tuple(k / 1000 for k in EXACT_WITH_127),
}


@pytest.mark.parametrize("values", [codebook.centroids(128), *CUSTOM.values()], ids=["gaussian", *CUSTOM])
def test_searched_scale_is_the_best(values):
    found = codebook.int8_codes(values, 128)
    assert len(found.codes) == 16 and max(map(abs, found.codes)) <= codebook.MAX_KEY_CODE == 126
    finer = min(scaled_error(values, 128, 64 + 62 * i / 4000) for i in range(4001))
    assert found.relative_rms_error <= finer * 1.02
    assert found.relative_rms_error <= scaled_error(values, 128, 126.0)


def test_uniform_codebook_is_represented_exactly():
    found = codebook.int8_codes(CUSTOM["uniform"], 128)
    assert found.relative_rms_error < 1e-6


@pytest.mark.parametrize("bad", (0, 2, 9, 65, -128))
def test_bad_head_dim(bad):
    with pytest.raises(ValueError, match="head_dim"):
        codebook.centroids(bad)


@pytest.mark.parametrize("bad", ((0.0,) * 16, (0.1,) * 15, (*range(15), math.nan)))
def test_bad_centroids(bad):
    with pytest.raises(ValueError, match="values"):
        codebook.int8_codes(tuple(map(float, bad)), 128)
