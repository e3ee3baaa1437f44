"""tq4.compat.turboquant_vllm: signatures, bytes, `out`, derived data, the package itself if installed."""

from __future__ import annotations

import gc
import inspect

import pytest
import torch

import tq4
from support import Bound, assert_close, assert_codes_equal, assert_norms_equal, brute_force, make_case
from tq4 import codebook
from tq4.backends import reference
from tq4.compat import turboquant_vllm as compat

D = 128


def arguments_of(case) -> tuple:
    """What both attention functions take after q."""
    quantizer = case.quantizer
    tables = (case.cache, case.block_table, case.seq_lens, quantizer.k_centroids, quantizer.k_rotation)
    return (*tables, case.num_kv_heads, D, 16)


def prefill_case(kv_len: int = 40, q_len: int = 12, **options):
    return make_case(kv_lens=(kv_len,), q_lens=(q_len,), rotation="haar", row_padding=8, **options)


def halves(rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rotation.T[:, 0::2].contiguous(), rotation.T[:, 1::2].contiguous()


def test_signatures():
    attention = "q kv_cache block_table seq_lens centroids rotation num_kv_heads head_dim block_size".split()
    attention += ["sm_scale", "out"]
    for name, names, optional in (
        ("fused_paged_tq4_int8_prefill", attention, {"sm_scale": None, "out": None}),
        ("fused_paged_tq4_decode", attention, {"sm_scale": None, "out": None}),
        ("tq4_compress", ["x", "rotation_T_even", "rotation_T_odd", "boundaries", "out"], {"out": None}),
        (
            "tq4_decompress",
            ["packed", "norms", "centroids", "dtype", "out"],
            {"dtype": torch.float16, "out": None},
        ),
    ):
        parameters = inspect.signature(getattr(compat, name)).parameters
        assert list(parameters) == names
        defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
        assert defaults == optional


# ---- Attention.


@pytest.mark.parametrize("lengths", ((40, 40), (40, 12), (17, 1), (3, 5)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_prefill_is_bottom_right_causal_in_original_space(dtype, lengths):
    case = prefill_case(*lengths, dtype=dtype)
    out = compat.fused_paged_tq4_int8_prefill(case.q, *arguments_of(case))
    assert out.dtype == dtype and out.shape == case.q.shape
    assert torch.equal(out, case.attend("reference"))
    key, value = tq4.gather(
        case.cache, case.block_table, case.seq_lens, case.quantizer, num_kv_heads=2, dtype=torch.float32
    )
    expected, _ = brute_force(case.q, [key], [value], case.q_lens)
    assert_close(out, expected, Bound(1.5e-2))


@pytest.mark.parametrize("sm_scale", (None, 0.2))
def test_decode_is_one_token_of_each_sequence(sm_scale):
    case = make_case(kv_lens=(40, 1, 16, 0), q_lens=(1, 1, 1, 1), rotation="haar")
    out = compat.fused_paged_tq4_decode(case.q, *arguments_of(case), sm_scale)
    expected, _ = case.exact(sm_scale=sm_scale)
    assert_close(out, expected, "fp16")
    assert not out[3].any()


@pytest.mark.parametrize("function", ("fused_paged_tq4_int8_prefill", "fused_paged_tq4_decode"))
def test_out_is_written_and_returned(function):
    case = prefill_case(q_len=1)
    run = getattr(compat, function)
    expected = run(case.q, *arguments_of(case))
    wide = torch.zeros(1, 8, 2 * D, dtype=torch.float16)
    for out in (
        torch.empty_like(case.q),
        wide[:, ::2, ::2],  # strided
        torch.empty_like(case.q, dtype=torch.float32),
        case.q.clone(),
    ):
        assert run(case.q, *arguments_of(case), out=out) is out
        assert torch.equal(out.half(), expected)
    # The original copies its result at the end, so out may be q.
    q = case.q.clone()
    assert run(q, *arguments_of(case), out=q) is q and torch.equal(q, expected)
    with pytest.raises(ValueError, match="^out: expected shape"):
        run(case.q, *arguments_of(case), out=torch.empty(1, 3, D, dtype=torch.float16))


def test_prefill_takes_one_sequence():
    case = make_case(kv_lens=(20, 20), q_lens=(2, 2))
    arguments = list(arguments_of(case))
    with pytest.raises(ValueError, match="^seq_lens: expected a single sequence, got 2"):
        compat.fused_paged_tq4_int8_prefill(case.q, *arguments)
    arguments[2] = case.seq_lens[:1]
    with pytest.raises(ValueError, match="^block_table: expected a single sequence, got 2"):
        compat.fused_paged_tq4_int8_prefill(case.q, *arguments)


@pytest.mark.parametrize(
    ("index", "bad", "message"),
    [
        (6, 64, "^q: expected shape"),
        (7, 32, "^kv_cache: expected shape"),
        (5, 3, "^num_kv_heads: expected a divisor"),
        (3, torch.zeros(8), "^centroids: expected shape"),
        (4, torch.zeros(64, 64), "^q_rotation: expected shape"),
    ],
)
def test_bad_arguments(index, bad, message):
    case = prefill_case()
    arguments = list(arguments_of(case))
    arguments[index] = bad
    out = torch.full_like(case.q, 7.0)
    with pytest.raises(ValueError, match=message):
        compat.fused_paged_tq4_int8_prefill(case.q, *arguments, out=out)
    assert (out == 7.0).all()


def test_non_contiguous_arguments():
    case = prefill_case(strided_q=True)
    arguments = list(arguments_of(case))
    expected = compat.fused_paged_tq4_int8_prefill(case.q, *arguments)
    arguments[4] = arguments[4].T.contiguous().T
    swapped = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(compat.fused_paged_tq4_int8_prefill(swapped, *arguments), expected)


# ---- Compress and decompress.


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_compress_and_decompress(dtype):
    quantizer = tq4.Quantizer(D, rotation="haar")
    x = torch.randn(9, 2, D).to(dtype)
    packed, norms = compat.tq4_compress(x, *halves(quantizer.k_rotation), quantizer.k_boundaries)
    assert packed.shape == (9, 2, D // 2) and packed.dtype == torch.uint8
    assert norms.shape == (9, 2, 1) and norms.dtype == torch.float32
    a, b = tq4.compress(x, quantizer)
    assert torch.equal(packed, a) and torch.equal(norms, b)
    y = compat.tq4_decompress(packed, norms, quantizer.k_centroids, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, tq4.decompress(a, b, quantizer, dtype=dtype, rotate=False))
    assert compat.tq4_decompress(packed, norms, quantizer.k_centroids).dtype == torch.float16


def test_compress_into_buffers():
    quantizer = tq4.Quantizer(D, rotation="haar")
    x = torch.randn(9, 2, D)
    arguments = (x, *halves(quantizer.k_rotation), quantizer.k_boundaries)
    expected = compat.tq4_compress(*arguments)
    # The original writes flat buffers as well as shaped ones.
    for shapes in (((9, 2, D // 2), (9, 2, 1)), ((18, D // 2), (18,))):
        out = torch.zeros(shapes[0], dtype=torch.uint8), torch.zeros(shapes[1])
        packed, norms = compat.tq4_compress(*arguments, out=out)
        assert packed is out[0] and norms is out[1]
        assert torch.equal(packed.view_as(expected[0]), expected[0])
        assert torch.equal(norms.view_as(expected[1]), expected[1])
    with pytest.raises(ValueError, match=r"^out\[0\]: expected"):
        compat.tq4_compress(*arguments, out=(torch.zeros(3, dtype=torch.uint8), torch.zeros(18)))
    flat = torch.zeros(18, D)
    assert compat.tq4_decompress(*expected, quantizer.k_centroids, out=flat) is flat
    assert torch.equal(
        flat.view(9, 2, D), tq4.decompress(*expected, quantizer, rotate=False, dtype=torch.float32)
    )


def test_compress_checks_the_halves():
    quantizer = tq4.Quantizer(D, rotation="haar")
    even, odd = halves(quantizer.k_rotation)
    x = torch.randn(1, 1, D)
    with pytest.raises(ValueError, match=r"^rotation_T_even: expected shape \[D, D / 2\]"):
        compat.tq4_compress(x, even.T, odd, quantizer.k_boundaries)
    with pytest.raises(TypeError, match="^rotation_T_odd: expected dtype float32"):
        compat.tq4_compress(x, even, odd.half(), quantizer.k_boundaries)
    with pytest.raises(ValueError, match=r"^boundaries: expected shape \[15\]"):
        compat.tq4_compress(x, even, odd, quantizer.k_boundaries[:7])
    with pytest.raises(ValueError, match="^norms: expected 1 elements"):
        compat.tq4_decompress(torch.zeros(1, 1, 64, dtype=torch.uint8), torch.ones(2), quantizer.k_centroids)


# ---- Derived data.


def test_codes_are_derived_once_and_again_after_a_change(monkeypatch):
    centroids = tq4.Quantizer(D).k_centroids.clone()
    calls = []
    original = codebook.int8_codes
    monkeypatch.setattr(codebook, "int8_codes", lambda *a: calls.append(a) or original(*a))
    first = compat._codes(centroids, D)
    assert compat._codes(centroids, D) is first and len(calls) == 1
    centroids.mul_(2.0)
    second = compat._codes(centroids, D)
    assert len(calls) == 2 and second[1] == pytest.approx(2 * first[1], rel=1e-2)
    other = centroids.clone()
    compat._codes(other, D)
    assert len(calls) == 3
    # New memory under the same object counts as a change.
    other.data = torch.linspace(-0.2, 0.2, 16)
    compat._codes(other, D)
    assert len(calls) == 4


def test_derived_data_dies_with_its_tensor():
    rotation = tq4.Quantizer(D, rotation="haar").k_rotation
    before = len(compat._rotations._entries)
    even, odd = halves(rotation)
    assert torch.equal(compat._rotations(even, odd), rotation)
    assert compat._rotations(even, odd) is compat._rotations(even, odd)
    assert len(compat._rotations._entries) == before + 1
    del even
    gc.collect()
    assert len(compat._rotations._entries) == before
    del odd
    gc.collect()
    assert len(compat._rotations._entries) == before


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        centroids = torch.tensor(codebook.centroids(D), dtype=torch.float32)
        assert compat._codes(centroids, D) is compat._codes(centroids, D)


# ---- The package itself.


def test_bytes_are_those_of_the_package():
    """Compress on the CPU with both and compare; the package is no dependency, so this mostly skips."""
    original = pytest.importorskip("turboquant_vllm.triton.tq4_compress")
    quantizer = tq4.Quantizer(D, rotation="haar")
    x = torch.randn(64, 2, D)
    even, odd = halves(quantizer.k_rotation)
    a = original.tq4_compress(x, even, odd, quantizer.k_boundaries)
    b = compat.tq4_compress(x, even, odd, quantizer.k_boundaries)
    assert_codes_equal(b[0], a[0], x, quantizer.k_rotation, quantizer.k_boundaries)
    assert_norms_equal(b[1], a[1])


def test_packed_order_is_the_packages():
    # (index of 2j) << 4 | (index of 2j + 1), and the same back.
    centroids = torch.linspace(-0.3, 0.3, 16)
    packed = torch.arange(32, dtype=torch.uint8).reshape(1, 1, 32)
    out = compat.tq4_decompress(packed, torch.ones(1, 1, 1), centroids, torch.float32)
    index = reference.unpack(packed)[0, 0]
    assert index[:4].tolist() == [0, 0, 0, 1] and index[-2:].tolist() == [1, 15]
    assert torch.equal(out[0, 0], centroids[index])
