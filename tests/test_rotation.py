"""Rotations, and the quantiser that holds them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tq4
from tq4 import codebook
from tq4.layout import HEAD_DIMS
from tq4.rotation import as_matrix, from_signs, haar, hadamard, hadamard_signs, make_rotation, signs_of


def orthogonality(matrix: torch.Tensor) -> float:
    wide = matrix.double()
    return float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ("haar", "hadamard"))
def test_orthogonal(kind, head_dim):
    rotation = make_rotation(kind, head_dim)
    assert rotation.dtype == torch.float32 and rotation.is_contiguous() and rotation.device.type == "cpu"
    assert orthogonality(rotation) < 2e-6


@pytest.mark.parametrize("head_dim", (64, 128))
def test_haar_is_the_specified_matrix_bit_for_bit(head_dim):
    generator = torch.Generator("cpu").manual_seed(42)
    q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
    signs = torch.sign(torch.diag(r))
    signs[signs == 0] = 1
    assert torch.equal(haar(head_dim), q * signs[None, :])


def test_haar_values_of_seed_42():
    # The draw itself is bit-stable in torch; QR is LAPACK's, so a few ulp.
    rotation = haar(128)
    assert rotation[0, :4].tolist() == pytest.approx(HAAR_128_ROW_0, abs=2e-6)


HAAR_128_ROW_0 = [0.17488539, 0.12072659, 0.08546747, -0.14556690]


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_hadamard_entries_are_exactly_plus_minus_one_over_root_d(head_dim):
    rotation = hadamard(head_dim)
    assert torch.equal(rotation.abs(), torch.full_like(rotation, 1 / math.sqrt(head_dim)))
    # Dividing out the column signs leaves Sylvester's matrix: H[i, j] = (-1)^popcount(i & j).
    signs = torch.sign(rotation[0])
    sylvester = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(head_dim)] for i in range(head_dim)]
    )
    assert torch.equal(torch.sign(rotation) * signs, sylvester)
    assert 0 < int((signs < 0).sum()) < head_dim, "the signs are random"


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_signs_and_matrix_are_the_same_rotation(head_dim):
    signs, matrix = hadamard_signs(head_dim, 7), hadamard(head_dim, 7)
    assert signs.dtype == torch.float32 and signs.shape == (head_dim,) and signs.abs().eq(1).all()
    assert torch.equal(from_signs(signs), matrix) and torch.equal(signs_of(matrix), signs)
    # By doubling, as Sylvester has it, and one product with the signs.
    dense = torch.ones(1, 1)
    while len(dense) < head_dim:
        dense = torch.cat([torch.cat([dense, dense], 1), torch.cat([dense, -dense], 1)])
    assert torch.equal(matrix, dense * signs * torch.tensor(1 / math.sqrt(head_dim)))
    assert as_matrix(matrix) is matrix and as_matrix(None) is None
    assert torch.equal(as_matrix(signs), matrix)


def test_what_has_no_signs():
    matrix = hadamard(64)
    flipped, scaled, order = matrix.clone(), matrix * (1 + 2**-23), matrix[torch.randperm(64)]
    flipped[5, 9] *= -1
    for other in (flipped, scaled, order, haar(64), haar(96), torch.eye(64), torch.zeros(64, 64)):
        assert signs_of(other) is None
    with pytest.raises(ValueError, match="head_dim: expected a power of two"):
        hadamard_signs(96)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_signs_on_a_gpu(head_dim):
    """The same bits, and the kernels of a captured expansion are all in the graph."""
    signs = hadamard_signs(head_dim).cuda()
    assert torch.equal(from_signs(signs).cpu(), hadamard(head_dim))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matrix = as_matrix(signs)
    signs.copy_(hadamard_signs(head_dim, 7))
    graph.replay()
    assert torch.equal(matrix.cpu(), hadamard(head_dim, 7))


def test_seeds():
    for make in (haar, hadamard):
        assert torch.equal(make(64), make(64, 42))
        assert not torch.equal(make(64), make(64, 43))


def test_rotations_ignore_torch_defaults_and_leave_the_generator_alone():
    expected = haar(64), hadamard(64)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = haar(64), hadamard(64)
            quantizer = tq4.Quantizer(64)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert quantizer.device.type == "cpu" and quantizer.k_centroids.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_96_dimensions_fall_back_to_haar():
    assert torch.equal(make_rotation("hadamard", 96), haar(96))
    with pytest.raises(ValueError, match="head_dim: expected a power of two"):
        hadamard(96)


def test_rotation_spreads_an_outlier_channel():
    x = torch.zeros(1, 128)
    x[0, 5] = 100.0
    for kind in ("haar", "hadamard"):
        y = x @ make_rotation(kind, 128).T
        assert float(y.abs().max()) < 45.0


def test_unknown_kind():
    with pytest.raises(ValueError, match="rotation: expected one of"):
        make_rotation("fourier", 64)


# ---- The quantiser.


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantizer_defaults(head_dim):
    quantizer = tq4.Quantizer(head_dim)
    assert torch.equal(quantizer.k_rotation, make_rotation("hadamard", head_dim))
    assert quantizer.v_rotation is quantizer.k_rotation
    values = torch.tensor(codebook.centroids(head_dim), dtype=torch.float32)
    assert torch.equal(quantizer.k_centroids, values) and torch.equal(quantizer.v_centroids, values)
    assert quantizer.k_boundaries.shape == (15,) and float(quantizer.k_boundaries[7]) == 0.0
    assert quantizer.k_codes.dtype == torch.int8 and isinstance(quantizer.k_code_scale, float)
    recovered = quantizer.k_codes.float() * quantizer.k_code_scale
    assert float((recovered - values).norm() / values.norm()) < 5e-3


def test_quantizer_options():
    matrix = haar(64, 7)
    quantizer = tq4.Quantizer(64, rotation="haar", v_rotation=matrix.double(), seed=3, norm_correction=True)
    assert torch.equal(quantizer.k_rotation, haar(64, 3)) and torch.equal(quantizer.v_rotation, matrix)
    assert quantizer.norm_correction
    plain = tq4.Quantizer(64, rotation=None)
    assert plain.k_rotation is None and plain.v_rotation is None
    only_k = tq4.Quantizer(64, v_rotation=None)
    assert only_k.k_rotation is not None and only_k.v_rotation is None
    values = [(i - 8) / 50 for i in range(16)]
    custom = tq4.Quantizer(64, k_centroids=values, v_centroids=torch.tensor(values) * 2)
    assert custom.k_centroids.tolist() == pytest.approx(values)
    assert custom.v_centroids.tolist() == pytest.approx([2 * v for v in values])
    assert custom.k_boundaries.tolist() == pytest.approx([v + 0.01 for v in values[:15]])
    assert custom.k_codes.float() * custom.k_code_scale == pytest.approx(torch.tensor(values), abs=1e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_quantizer_has_the_signs_of_hadamard_rotations(head_dim):
    quantizer = tq4.Quantizer(head_dim, seed=5)
    if head_dim == 96:
        assert quantizer.k_signs is None and quantizer.v_signs is None
        return
    assert torch.equal(quantizer.k_signs, hadamard_signs(head_dim, 5))
    assert quantizer.v_signs is quantizer.k_signs
    # Known by its entries.
    given = tq4.Quantizer(head_dim, rotation="haar", v_rotation=hadamard(head_dim, 7).double())
    assert given.k_signs is None and torch.equal(given.v_signs, hadamard_signs(head_dim, 7))
    assert tq4.Quantizer(head_dim, rotation=None).k_signs is None
    # The matrix is found, not made again, by copies too.
    for other in (quantizer, given, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(given))):
        assert as_matrix(other.v_signs) is other.v_rotation


def test_quantizer_of_fake_tensors():
    with FakeTensorMode():
        quantizer = tq4.Quantizer(64)
    assert quantizer.k_signs.shape == (64,) and quantizer.k_rotation.shape == (64, 64)
    assert torch.equal(tq4.Quantizer(64).k_rotation, hadamard(64)), "nothing fake was kept"


def test_quantizer_moves():
    quantizer = tq4.Quantizer(64)
    assert quantizer.to("cpu") is quantizer
    moved = quantizer.to("meta")
    assert moved is not quantizer and moved.device.type == "meta" and quantizer.device.type == "cpu"
    assert moved.v_rotation is moved.k_rotation and moved.k_code_scale == quantizer.k_code_scale
    assert moved.v_signs is moved.k_signs and moved.k_signs.device.type == "meta"
    assert as_matrix(moved.k_signs) is moved.k_rotation


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 80}, ValueError, "head_dim: expected one of"),
        ({"rotation": "fourier"}, ValueError, "rotation: expected"),
        ({"rotation": 3}, TypeError, "rotation: expected a name"),
        ({"rotation": torch.eye(128)}, ValueError, "rotation: expected shape"),
        ({"rotation": torch.ones(64, 64)}, ValueError, "rotation: expected an orthogonal"),
        ({"rotation": torch.full((64, 64), math.nan)}, ValueError, "rotation: expected an orthogonal"),
        ({"v_rotation": torch.zeros(64, 64)}, ValueError, "v_rotation: expected an orthogonal"),
        ({"rotation": torch.eye(64, dtype=torch.int64)}, TypeError, "rotation: expected a name"),
        ({"k_centroids": [0.1] * 16}, ValueError, "k_centroids: expected finite, strictly ascending"),
        ({"k_centroids": list(range(15))}, ValueError, "k_centroids: expected 16"),
        ({"v_centroids": [*range(15), math.inf]}, ValueError, "v_centroids: expected finite"),
    ],
)
def test_bad_quantizers(arguments, error, message):
    with pytest.raises(error, match=message):
        tq4.Quantizer(**{"head_dim": 64, **arguments})
