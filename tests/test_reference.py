"""The reference backend against a scalar encoder, attention by brute force, and its own error budget."""

from __future__ import annotations

import math

import pytest
import torch

import tq4
from support import (
    TOLERANCES,
    Bound,
    assert_close,
    assert_lse_close,
    assert_norms_equal,
    brute_force,
    cache_fields,
    make_case,
    poisoned_cache,
    real_qkv,
    relative_error,
    vectors,
)
from tq4.backends import reference
from tq4.layout import HEAD_DIMS, HEAD_MAJOR, LAYOUTS, TOKEN_MAJOR

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# ---- Encoding and decoding.


def test_encode_is_the_specification():
    x = torch.randn(7, 3, 64)
    quantizer = tq4.Quantizer(64)
    codes, norms = reference.encode(x, quantizer.k_rotation, quantizer.k_centroids, quantizer.k_boundaries)
    for row, code, norm in zip(x.view(-1, 64), codes.view(-1, 32), norms.view(-1), strict=True):
        assert float(norm) == pytest.approx(float(row.double().norm()), rel=1e-7)
        y = quantizer.k_rotation.double() @ (row.double() / (row.double().norm() + 1e-10))
        for j in range(32):
            high, low = int(code[j]) >> 4, int(code[j]) & 15
            for index, value in ((high, y[2 * j]), (low, y[2 * j + 1])):
                assert index == int((quantizer.k_boundaries.double() < value).sum())


def test_a_coordinate_on_a_boundary_is_not_above_it():
    centroids = torch.arange(16) - 7.5
    boundaries = torch.arange(1, 16) - 8.0
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([3.0, 4.0, 0.0])
    codes, norms = reference.encode(x / 5, None, centroids, boundaries)
    index = reference.unpack(codes)[0]
    # y = 0.6, 0.8 are above the boundary 0, and 0 itself is not
    assert index[:3].tolist() == [8, 8, 7] and float(norms) == pytest.approx(1.0)


def test_unpack_takes_the_even_dimension_from_the_high_nibble():
    assert reference.unpack(torch.tensor([0x3A, 0xF0], dtype=torch.uint8)).tolist() == [3, 10, 15, 0]


@pytest.mark.parametrize("norm_correction", (False, True))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_zero_vectors_stay_zero(head_dim, norm_correction):
    quantizer = tq4.Quantizer(head_dim, norm_correction=norm_correction)
    packed, norms = tq4.compress(torch.zeros(2, 1, head_dim), quantizer)
    assert not norms.any()
    assert not tq4.decompress(packed, norms, quantizer).any()


def test_zero_vectors_stay_zero_with_a_centroid_at_zero():
    # Every coordinate decodes to exactly 0, so norm correction must not divide by the decoded length.
    quantizer = tq4.Quantizer(64, k_centroids=[i - 7.0 for i in range(16)], norm_correction=True)
    packed, norms = tq4.compress(torch.zeros(1, 1, 64), quantizer)
    assert norms.item() == 0.0 and not tq4.decompress(packed, norms, quantizer).any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_norm_correction_gives_decoded_vectors_the_original_norm(head_dim):
    x = vectors("outlier", 20, 2, head_dim, torch.float32, torch.Generator().manual_seed(1))
    plain, corrected = tq4.Quantizer(head_dim), tq4.Quantizer(head_dim, norm_correction=True)
    a, b = tq4.compress(x, plain), tq4.compress(x, corrected)
    assert torch.equal(a[0], b[0])
    decoded = tq4.decompress(*b, corrected, dtype=torch.float32)
    assert torch.allclose(decoded.norm(dim=-1), x.norm(dim=-1), rtol=2e-6)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rotation", ("hadamard", "haar"))
def test_compression_error_is_that_of_lloyd_max(head_dim, rotation):
    # 0.0095 of the energy: 0.0975 relative
    x = torch.randn(200, 2, head_dim)
    quantizer = tq4.Quantizer(head_dim, rotation=rotation)
    decoded = tq4.decompress(*tq4.compress(x, quantizer), quantizer, dtype=torch.float32)
    assert 0.085 < relative_error(decoded, x) < 0.105
    # Rotated space holds the same vectors, rotated.
    rotated = tq4.decompress(*tq4.compress(x, quantizer), quantizer, dtype=torch.float32, rotate=False)
    assert relative_error(rotated @ quantizer.k_rotation, decoded) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_input_is_taken_as_it_is(dtype):
    x = torch.randn(20, 2, 128).to(dtype)
    quantizer = tq4.Quantizer(128)
    rotated = x.float() @ quantizer.k_rotation.T
    a, b = tq4.compress(x, quantizer), tq4.compress(rotated, quantizer, rotate=False)
    assert (a[0] != b[0]).float().mean() < 1e-2
    assert torch.allclose(a[1], b[1], rtol=1e-5)


# ---- Store and gather.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_round_trip(head_dim, dtype, layout):
    case = make_case(
        head_dim=head_dim,
        kv_lens=(37, 0, 1, 16, 15, 17),
        q_lens=(0,) * 6,
        layout=layout,
        dtype=dtype,
        row_padding=8,
    )
    for rotate in (True, False):
        key, value = tq4.gather(
            case.cache,
            case.block_table,
            case.seq_lens,
            case.quantizer,
            num_kv_heads=2,
            dtype=torch.float32,
            rotate_k=rotate,
            rotate_v=rotate,
        )
        for x, y, which in ((case.key, key, "k"), (case.value, value, "v")):
            packed, norms = tq4.compress(x, case.quantizer, which=which)
            expected = tq4.decompress(
                packed, norms, case.quantizer, which=which, dtype=torch.float32, rotate=rotate
            )
            assert torch.equal(y, expected)
            if rotate:
                assert relative_error(y, x) < 0.105


@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_writes_the_slots_and_nothing_else(layout):
    quantizer = tq4.Quantizer(64)
    cache = poisoned_cache(4, 2, 64, 16, layout, row_padding=12)
    slots = torch.tensor([17, -1, 63, 0])
    key, value = torch.randn(2, 4, 2, 64)
    tq4.store(key, value, cache, slots, quantizer)
    fields = cache_fields(cache, 2, 64)
    written = torch.zeros(64, dtype=torch.bool)
    written[[17, 63, 0]] = True
    for name, field in fields.items():
        flat = field.flatten(0, 1)
        if name.endswith("norms"):
            assert flat[~written].isnan().all() and not flat[written].isnan().any()
        else:
            assert (flat[~written] == 0xFF).all()
    total = cache.untyped_storage().nbytes()
    whole = cache.as_strided((total,), (1,), 0)
    # 3 tokens of 2 heads; a byte that happens to be 0xFF may have been written too
    assert int((whole != 0xFF).sum()) <= 3 * 2 * 72
    for token, slot in ((0, 17), (2, 63), (3, 0)):
        packed, norms = tq4.compress(key[token : token + 1], quantizer)
        assert torch.equal(fields["k_codes"].flatten(0, 1)[slot], packed[0])
        assert_norms_equal(fields["k_norms"].flatten(0, 1)[slot], norms[0, :, 0])


def test_store_takes_strided_input_and_different_sides():
    quantizer = tq4.Quantizer(64, v_rotation="haar", v_centroids=[(i - 7.5) / 25 for i in range(16)])
    fused = torch.randn(20, 6, 64)
    key, value = fused[:, 0::3], fused[:, 1::3]
    cache = tq4.PagedCache(4, 2, 64)
    tq4.store(key, value, cache, cache.slots([3, 1], 0, 20), quantizer, rotate_v=False)
    table, lens = cache.block_table([[3, 1]]), torch.tensor([20], dtype=torch.int32)
    k, v = tq4.gather(cache, table, lens, quantizer, dtype=torch.float32, rotate_v=False)
    assert torch.equal(
        k, tq4.decompress(*tq4.compress(key.contiguous(), quantizer), quantizer, dtype=torch.float32)
    )
    assert relative_error(v, value) < 0.13
    # A last dimension that is not contiguous is copied.
    other = tq4.PagedCache(4, 2, 64)
    swapped = key.transpose(1, 2).contiguous().transpose(1, 2)
    tq4.store(swapped, value, other, other.slots([3, 1], 0, 20), quantizer, rotate_v=False)
    assert torch.equal(other.tensor, cache.tensor)


def test_store_of_nan_touches_its_own_token_only():
    quantizer = tq4.Quantizer(64)
    key = torch.randn(16, 2, 64)
    clean, dirty = tq4.PagedCache(1, 2, 64), tq4.PagedCache(1, 2, 64)
    slots = torch.arange(16)
    tq4.store(key, key, clean, slots, quantizer)
    bad = key.clone()
    bad[5, 1, 3] = math.nan
    bad[6, 0, 0] = math.inf
    tq4.store(bad, bad, dirty, slots, quantizer)
    good = [t for t in range(16) if t not in (5, 6)]
    assert torch.equal(clean.tensor[:, good], dirty.tensor[:, good])


def test_gather_by_pieces(monkeypatch):
    case = make_case(kv_lens=(100, 3), q_lens=(0, 0))
    arguments = (case.cache, case.block_table, case.seq_lens, case.quantizer)
    whole = tq4.gather(*arguments, num_kv_heads=2)
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 1)
    pieces = tq4.gather(*arguments, num_kv_heads=2)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])


def test_gather_into_a_larger_output_leaves_the_rest():
    case = make_case(kv_lens=(20,), q_lens=(0,))
    out = torch.full((2, 30, 2, 128), 7.0)
    key, value = tq4.gather(
        case.cache, case.block_table, case.seq_lens, case.quantizer, num_kv_heads=2, out=(out[0], out[1])
    )
    assert key.data_ptr() == out[0].data_ptr() and value.data_ptr() == out[1].data_ptr()
    assert (out[:, 20:] == 7.0).all() and relative_error(out[0, :20], case.key) < 0.105


# ---- Attention against brute force.

OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "left": {"window": (5, -1)},
    "left0": {"window": (0, -1)},
    "window": {"causal": False, "window": (7, 3)},
    "right": {"causal": False, "window": (-1, 2)},
    "right0": {"causal": False, "window": (-1, 0)},
    "causal-right": {"window": (4, 9)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "scale": {"sm_scale": 0.31},
    "all": {"window": (9, -1), "softcap": 3.0, "sinks": True, "sm_scale": 0.2},
}
# keys and queries: prefill, chunk, one token, no query, no key, more queries than keys, page edges
KV_LENS = (19, 33, 17, 8, 0, 3, 16, 1)
Q_LENS = (19, 4, 1, 0, 2, 6, 2, 1)


def options_of(name: str, heads: int) -> dict:
    options = dict(OPTIONS[name])
    if options.get("sinks") is True:
        options["sinks"] = torch.linspace(-2, 3, heads)
    return options


def dense(case, rotation: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Decoded keys and values of each sequence in original space, from the stored vectors."""
    keys, values = [], []
    quantizer = case.quantizer
    for x, which, parts in ((case.key, "k", keys), (case.value, "v", values)):
        packed, norms = tq4.compress(x, quantizer, which=which)
        y = tq4.decompress(packed, norms, quantizer, which=which, dtype=torch.float32, rotate=rotation)
        parts.extend(y.split(case.kv_lens))
    return keys, values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_mask_option_against_brute_force(name, layout):
    case = make_case(
        head_dim=64,
        num_q_heads=4,
        num_kv_heads=2,
        kv_lens=KV_LENS,
        q_lens=Q_LENS,
        layout=layout,
        padding_rows=2,
    )
    case.options = options_of(name, 4)
    expected, expected_lse = brute_force(case.q, *dense(case), Q_LENS, **case.options)
    out, lse = case.exact()
    # The rotation is orthogonal to fp32 only.
    assert_close(out, expected, Bound(1e-6, 1e-5))
    assert_lse_close(lse, expected_lse, 1e-5)
    rows = case.num_tokens
    for op in ("prefill", "decode"):
        actual, actual_lse = case.attend("reference", op, int8=False, return_lse=True)
        assert_close(actual[:rows], expected, "fp16")
        assert_lse_close(actual_lse[:, :rows], expected_lse, 1e-4)
        actual, actual_lse = case.attend("reference", op, return_lse=True)
        # A row over few keys averages less: bound the whole, and each row loosely.
        assert_close(actual[:rows], expected, Bound(1.5e-2, 6e-2))
        assert_lse_close(actual_lse[:, :rows], expected_lse, "exact")


@pytest.mark.parametrize("heads", ((1, 1), (7, 1), (6, 3), (16, 2)), ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_heads_and_dimensions(head_dim, heads):
    case = make_case(
        head_dim=head_dim,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        kv_lens=(18,),
        q_lens=(3,),
        strided_q=True,
    )
    expected, expected_lse = brute_force(case.q, *dense(case), (3,))
    out, lse = case.exact()
    assert_close(out, expected, Bound(1e-6, 1e-5))
    assert_lse_close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_no_rotation_means_rotated_space(dtype):
    case = make_case(kv_lens=(40,), q_lens=(9,), dtype=dtype)
    rotated = (case.q.float() @ case.quantizer.k_rotation.T).to(dtype)
    keys, values = dense(case, rotation=False)
    expected, _ = brute_force(rotated, keys, values, (9,))
    flags = {"rotate_q": False, "rotate_out": False}
    assert_close(case.exact(q=rotated, **flags)[0], expected, Bound(1e-6, 1e-5))
    limit = Bound(2e-3) if dtype == torch.float16 else Bound(5e-3)
    assert_close(case.attend("reference", q=rotated, int8=False, **flags), expected, limit)


def test_decode_without_query_start_loc_is_one_token_a_sequence():
    case = make_case(kv_lens=(40, 7, 0), q_lens=(1, 1, 1))
    a = case.attend("reference", "decode", return_lse=True)
    b = case.attend("reference", "decode", return_lse=True, query_start_loc=None)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_layouts_and_page_sizes_agree_exactly():
    results = []
    for layout in LAYOUTS:
        for block_size in (16, 32, 64, 128):
            case = make_case(kv_lens=(150, 31), q_lens=(3, 31), layout=layout, block_size=block_size)
            results.append(case.attend("reference", return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_processing_in_pieces_changes_nothing(monkeypatch):
    """Rows, heads, and sequences of equal lengths, which otherwise are taken together."""
    case = make_case(kv_lens=(20, 17, 20, 20, 17, 20), q_lens=(20, 5, 20, 20, 5, 3))
    whole = [case.attend("reference", int8=int8, return_lse=True) for int8 in (True, False)]
    for limit in (1, 1000, 6000, 12000):
        monkeypatch.setattr(reference, "MAX_ELEMENTS", limit)
        for int8, (out, lse) in zip((True, False), whole, strict=True):
            piece, piece_lse = case.attend("reference", int8=int8, return_lse=True)
            assert_close(piece, out, Bound(1e-4, 1e-3))
            assert_lse_close(piece_lse, lse, 1e-5)


def test_padding_rows_are_left_alone():
    case = make_case(kv_lens=(20, 9), q_lens=(5, 2), padding_rows=4)
    out = torch.full_like(case.q, 7.0)
    assert case.attend("reference", out=out) is out
    assert (out[7:] == 7.0).all() and out[:7].isfinite().all()


@pytest.mark.parametrize("int8", (True, False))
def test_nan_queries_affect_their_own_rows_only(int8):
    case = make_case(kv_lens=(40,), q_lens=(10,))
    clean, clean_lse = case.attend("reference", int8=int8, return_lse=True)
    q = case.q.clone()
    q[3, 1, 5] = math.nan
    q[4, 2, 5] = math.inf
    out, lse = case.attend("reference", q=q, int8=int8, return_lse=True)
    bad = torch.zeros(10, 4, dtype=torch.bool)
    bad[3, 1] = bad[4, 2] = True
    assert torch.equal(out[~bad], clean[~bad]) and torch.equal(lse.T[~bad], clean_lse.T[~bad])
    assert out[3, 1].isnan().all()


def test_rows_without_keys():
    case = make_case(kv_lens=(0, 4), q_lens=(2, 6))
    for op in ("prefill", "decode"):
        out, lse = case.attend("reference", op, return_lse=True)
        # The second sequence has 6 queries for 4 keys: its first two come before any key.
        assert not out[:4].any() and (lse[:, :4] == -math.inf).all()
        assert out[4:].any(-1).all() and lse[:, 4:].isfinite().all()
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        out, lse = case.attend("reference", op, return_lse=True, sinks=sinks)
        assert not out[:4].any() and torch.equal(lse[:, :4], sinks[:, None].expand(4, 4))


# ---- The INT8 recipe.


def test_query_codes_round_half_to_even_and_have_one_scale_a_row():
    q = torch.zeros(3, 64)
    q[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5])
    q[2] = 1e-3
    q[2, 0] = 1000.0
    codes, scales = reference.quantise_queries(q)
    assert codes[0, :5].tolist() == [127, 0, 2, -2, -126] and scales.tolist()[0] == 1.0
    assert not codes[1].any() and scales[1] == 0.0
    assert codes[2, 0] == 127 and not codes[2, 1:].any()
    assert codes.abs().max() <= 127


def test_the_recipe_one_number_at_a_time():
    case = make_case(head_dim=64, num_q_heads=2, num_kv_heads=1, kv_lens=(21,), q_lens=(3,))
    quantizer = case.quantizer
    out, lse = case.attend("reference", return_lse=True, rotate_q=False, rotate_out=False)
    packed, norms = tq4.compress(case.key, quantizer)
    v_packed, v_norms = tq4.compress(case.value, quantizer, which="v")
    k_index, v_index = reference.unpack(packed)[:, 0].long(), reference.unpack(v_packed)[:, 0].long()
    for t in range(3):
        for h in range(2):
            row = case.q[t, h].float()
            step = row.abs().max() / 127
            q8 = torch.round(row / step).clamp(-127, 127).int()
            scores = []
            for j in range(21 - 3 + t + 1):
                dot = int((q8 * quantizer.k_codes[k_index[j]].int()).sum())
                scores.append(dot * float(step) * quantizer.k_code_scale * float(norms[j, 0, 0]) / 8.0)
            s = torch.tensor(scores, dtype=torch.float64)
            p = (s - s.max()).exp()
            expected = torch.zeros(64, dtype=torch.float64)
            for j in range(len(scores)):
                v = (quantizer.v_centroids[v_index[j]].half() * v_norms[j, 0, 0]).half()
                expected += p[j].half().double() * v.double()
            assert relative_error(out[t, h], expected / p.sum()) < 1e-3
            assert float(lse[h, t]) == pytest.approx(float(s.logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize("data", ("gaussian", "outlier", "real"))
def test_int8_error_is_that_of_rounding_queries_and_keys(data):
    """Nothing is lost beyond what the codes lose: exact attention of the decoded codes agrees."""
    lengths, q_lens = ((300, 100), (100, 100)) if data != "real" else ((1024,), (256,))
    case = make_case(kv_lens=lengths, q_lens=q_lens, data=data, num_q_heads=8, num_kv_heads=2)
    quantizer = case.quantizer
    out, lse = case.attend("reference", return_lse=True, rotate_out=False)
    q = case.q.double() @ quantizer.k_rotation.double().T
    steps = q.abs().amax(-1, keepdim=True) / 127
    expected, expected_lse = reference.attention(
        (q / steps).round() * steps,
        case.cache,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        q_rotation=None,
        out_rotation=None,
        k_centroids=quantizer.k_codes.double() * quantizer.k_code_scale,
        v_centroids=quantizer.v_centroids,
        num_kv_heads=2,
        dtype=torch.float64,
    )
    assert_close(out, expected, "recipe-rotated")
    assert_lse_close(lse, expected_lse, "recipe-rotated")


# What the recipe loses on this data.  On unit Gaussian q and K the rounding of q alone is 0.64 % of a score.
MEASURED = {"gaussian": Bound(7e-3), "outlier": Bound(2.5e-2), "real": TOLERANCES["exact-real"]}


@pytest.mark.parametrize("data", MEASURED)
def test_int8_error_against_exact_attention(data):
    lengths, q_lens = ((300, 100), (300, 100)) if data != "real" else ((1024,), (512,))
    case = make_case(kv_lens=lengths, q_lens=q_lens, data=data, num_q_heads=8, num_kv_heads=2)
    expected, _ = case.exact()
    assert_close(case.attend("reference"), expected, MEASURED[data])
    assert_close(case.attend("reference", int8=False), expected, "fp16")


def test_real_data_error_of_the_format_itself():
    """Attention over the cache against unquantised attention: 0.126, or 0.113 with norm correction."""
    real = real_qkv()
    q, k, v = (real[name].float().transpose(0, 1)[None] for name in "qkv")
    dense_out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = dense_out[0].transpose(0, 1)
    for norm_correction, error in ((False, 0.126), (True, 0.113)):
        case = make_case(kv_lens=(2048,), data="real", norm_correction=norm_correction, rotation="haar")
        out = case.attend("reference", int8=False)
        assert relative_error(out, expected) == pytest.approx(error, abs=0.006)


@pytest.mark.parametrize("layout", (TOKEN_MAJOR, HEAD_MAJOR))
def test_large_offsets_are_64_bit(layout):
    # A view of 2 GiB + of virtual memory that is never touched outside two pages.
    if layout == TOKEN_MAJOR:
        whole = torch.empty(2**21 + 1, 16, 72, dtype=torch.uint8)
    else:
        whole = torch.empty(2**21 + 1, 1, 16, 72, dtype=torch.uint8)
    quantizer = tq4.Quantizer(64)
    x = torch.randn(16, 1, 64)
    last = 2**21
    tq4.store(x, x, whole, torch.arange(16) + last * 16, quantizer)
    lens = torch.tensor([16], dtype=torch.int32)
    key, _ = tq4.gather(
        whole, torch.tensor([[last]], dtype=torch.int32), lens, quantizer, num_kv_heads=1, dtype=torch.float32
    )
    assert torch.equal(key, tq4.decompress(*tq4.compress(x, quantizer), quantizer, dtype=torch.float32))
