"""``gather``, ``compress`` and ``decompress`` on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import tq4
from support import OUTPUT_ROUNDING, relative_error
from support_attention import (
    BFLOAT16,
    DTYPE_NAMES,
    FLOAT16,
    FLOAT32,
    Case,
    Target,
    build,
    decode,
    encode,
    new_cache,
    on_cases,
    on_targets,
    pack,
    pairwise,
    quantizer,
    read_tokens,
    unpack,
)

_AXES = dict(
    head_dim=(64, 96, 128, 256),
    kv_heads=(1, 2, 3, 8),
    dtype=(FLOAT16, BFLOAT16, FLOAT32),
    page=(16, 32, 64, 128),
    layout=("token_major", "head_major"),
    rotation=("hadamard", "haar", None),
    interleaved=(False, True),
)


def _case(index: int, row: dict, lens: tuple[int, ...]) -> Case:
    padding = 12 if index % 3 == 0 and row["layout"] == "token_major" else 0
    return Case(seq_lens=lens, query_lens=(0,) * len(lens), row_padding=padding, seed=index, **row)


_ROWS = pairwise(**_AXES)
CASES = [
    _case(i, row, (0, 1, row["page"] - 1, row["page"], row["page"] + 1, 1500 + i, 0, 3))
    for i, row in enumerate(_ROWS)
]
CASES_CPU = [
    _case(i, {**row, "page": min(row["page"], 32), "kv_heads": 1 + i % 2}, (0, 1, 15 + i % 3, 0, 33))
    for i, row in enumerate(_ROWS)
]


def hold(got: torch.Tensor, want: torch.Tensor, who: str) -> None:
    """Relative error at most fp32's over a rotation, and the output's own rounding."""
    error = relative_error(got, want)
    bound = 2e-6 + OUTPUT_ROUNDING[got.dtype]
    if not error <= bound:
        pytest.fail(f"{who}: relative error {error:.3g} > {bound:.3g}", pytrace=False)


@on_cases(cpu=CASES_CPU, gpu=CASES[::2], gpu_all=CASES[1::2])
def test_gather(case: Case, target: Target) -> None:
    """Pages back to dense K and V, every other case rotated still; rows past the end keep their poison."""
    target.require()
    rotate = case.seed // 2 % 2 == 0
    problem = build(case, target.device, wild_table=True)
    quant, total = problem.quantizer, sum(case.seq_lens)
    out = [
        torch.full(
            (total + 2, case.kv_heads, case.head_dim), math.nan, dtype=case.dtype, device=target.device
        )
        for _ in range(2)
    ]
    tq4.gather(
        problem.cache,
        problem.block_table,
        problem.seq_lens,
        quant,
        num_kv_heads=case.kv_heads,
        rotate_k=rotate,
        rotate_v=rotate,
        out=tuple(out),
        backend=target.backend,
    )
    for name, got, index, norm, rotation, centroids in (
        ("key", out[0], problem.k_index, problem.k_norm, quant.k_rotation, quant.k_centroids),
        ("value", out[1], problem.v_index, problem.v_norm, quant.v_rotation, quant.v_centroids),
    ):
        want = decode(index, norm, centroids, torch.float64)
        if rotate and rotation is not None:
            want = want @ rotation.double()
        hold(got[:total], want, f"gather {target} {case}: {name}")
        assert got[total:].isnan().all(), "gather wrote rows past the last sequence"


@on_targets()
def test_gather_allocates_and_rotates_separately(target: Target) -> None:
    target.require()
    case = Case(head_dim=64, seq_lens=(20, 5), query_lens=(0, 0))
    problem = build(case, target.device)
    quant = problem.quantizer
    args = (problem.cache, problem.block_table, problem.seq_lens, quant)
    k, v = tq4.gather(*args, num_kv_heads=2, rotate_k=False, dtype=FLOAT32, backend=target.backend)
    assert k.shape == v.shape == (25, 2, 64)
    hold(k, decode(problem.k_index, problem.k_norm, quant.k_centroids), f"gather {target}: key")
    want = decode(problem.v_index, problem.v_norm, quant.v_centroids) @ quant.v_rotation
    hold(v, want, f"gather {target}: value")


@on_targets()
def test_gather_of_nothing(target: Target) -> None:
    target.require()
    problem = build(Case(seq_lens=(0, 0), query_lens=(0, 0)), target.device)
    k, v = tq4.gather(
        problem.cache,
        problem.block_table,
        problem.seq_lens,
        problem.quantizer,
        num_kv_heads=2,
        total=0,
        backend=target.backend,
    )
    assert k.shape == v.shape == (0, 2, 64)


@on_targets()
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_store_then_gather(target: Target, head_dim: int) -> None:
    """The round trip loses what 4 bits lose: 9.7 % of Gaussian vectors."""
    target.require()
    gen = torch.Generator().manual_seed(0)
    tokens = 200 if target.device == "cuda" else 30
    k, v = torch.randn(2, tokens, 2, head_dim, generator=gen).half().to(target.device)
    quant = quantizer(head_dim, "hadamard", target.device)
    cache = tq4.PagedCache(-(-tokens // 16), 2, head_dim, device=target.device)
    blocks = cache.allocate(cache.num_blocks)
    tq4.store(k, v, cache, cache.slots(blocks, 0, tokens), quant, backend=target.backend)
    lens = torch.tensor([tokens], dtype=torch.int32, device=target.device)
    got = tq4.gather(cache, cache.block_table([blocks]), lens, quant, dtype=FLOAT32, backend=target.backend)
    for x, y in zip((k, v), got, strict=True):
        assert 0.085 < relative_error(y, x.float()) < 0.105


_UNPAGED = pairwise(
    head_dim=(64, 96, 128, 256),
    dtype=(FLOAT16, BFLOAT16, FLOAT32),
    rotation=("hadamard", "haar", None),
    heads=(1, 3),
    norm_correction=(False, True),
    which=("k", "v"),
)


@pytest.mark.parametrize(
    "row", _UNPAGED, ids=lambda r: "-".join(DTYPE_NAMES.get(r[n]) or str(r[n]) for n in sorted(r))
)
@on_targets()
def test_compress_and_decompress(target: Target, row: dict) -> None:
    """The unpaged pair: the format's codes and norms, and back."""
    target.require()
    d, heads, which = row["head_dim"], row["heads"], row["which"]
    tokens = 300 if target.device == "cuda" else 7
    gen = torch.Generator().manual_seed(1)
    wide = torch.randn(tokens, heads + 1, d, generator=gen).to(row["dtype"]).to(target.device)
    x = wide[:, :heads]  # strided
    quant = quantizer(d, row["rotation"], target.device, row["norm_correction"])
    rotation, centroids, boundaries = (
        getattr(quant, f"{which}_{n}") for n in ("rotation", "centroids", "boundaries")
    )
    packed, norms = tq4.compress(x, quant, which=which, backend=target.backend)
    assert packed.shape == (tokens, heads, d // 2) and norms.shape == (tokens, heads, 1)
    index, norm, y = encode(x, rotation, centroids, boundaries, row["norm_correction"], torch.float64)
    near = ((y[..., None] - boundaries.double()).abs() <= 1e-5).any(-1)
    assert ((unpack(packed) == index) | near).all()
    clean = ~near.any(-1)
    torch.testing.assert_close(norms[..., 0].double()[clean], norm[clean], rtol=1e-6, atol=0)
    for dtype in (FLOAT16, BFLOAT16, FLOAT32):
        got = tq4.decompress(packed, norms, quant, which=which, dtype=dtype, backend=target.backend)
        want = decode(unpack(packed), norms[..., 0], centroids, torch.float64)
        if rotation is not None:
            want = want @ rotation.double()
        hold(got, want, f"decompress {target}")
    stay = tq4.decompress(
        packed, norms, quant, which=which, dtype=FLOAT32, rotate=False, backend=target.backend
    )
    hold(stay, decode(unpack(packed), norms[..., 0], centroids), f"decompress {target}: rotated")


@on_targets()
def test_compress_is_what_store_writes(target: Target) -> None:
    """The paged and the unpaged encoding of a backend give the same bytes."""
    target.require()
    case = Case(head_dim=128, kv_heads=2)
    quant = quantizer(128, "hadamard", target.device)
    gen = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, 16, 2, 128, generator=gen).half().to(target.device)
    cache = new_cache(case, 1, target.device)
    slots = torch.arange(16, device=target.device)
    tq4.store(k, v, cache, slots, quant, backend=target.backend)
    k_index, k_norm, v_index, v_norm = read_tokens(cache, slots, 2, 128)
    for which, x, index, norm in (("k", k, k_index, k_norm), ("v", v, v_index, v_norm)):
        packed, norms = tq4.compress(x, quant, which=which, backend=target.backend)
        assert torch.equal(packed, pack(index)) and torch.equal(norms[..., 0], norm)


@on_targets()
def test_zero_vectors(target: Target) -> None:
    target.require()
    quant = quantizer(64, "hadamard", target.device)
    x = torch.zeros(3, 1, 64, dtype=FLOAT16, device=target.device)
    packed, norms = tq4.compress(x, quant, backend=target.backend)
    assert (norms == 0).all()
    assert (tq4.decompress(packed, norms, quant, backend=target.backend) == 0).all()
