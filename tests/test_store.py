"""``store`` on every backend: bytes against an encoding in float64, slots, strides, poison, bad tokens."""

from __future__ import annotations

import math

import pytest
import torch

import tq4
from support import real_qkv
from support_attention import (
    BFLOAT16,
    DTYPE_NAMES,
    FLOAT16,
    FLOAT32,
    GPU_TARGETS,
    POISON,
    Case,
    Target,
    hold_tokens,
    new_cache,
    on_cases,
    on_targets,
    pairwise,
    quantizer,
    read_tokens,
    storage,
    write_tokens,
)
from support_attention import pack as pack_codes


def scattered_slots(tokens: int, case: Case, device: str, skip_every: int = 5) -> tuple[torch.Tensor, int]:
    """Distinct random slots with every ``skip_every``-th -1, and the number of blocks they lie in."""
    blocks = -(-tokens // case.page) + 3
    gen = torch.Generator().manual_seed(case.seed)
    slots = torch.randperm(blocks * case.page, generator=gen)[:tokens]
    if skip_every:
        slots[skip_every - 1 :: skip_every] = -1
    return slots.to(device), blocks


def new_tokens(case: Case, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [tokens, Hkv, D]; strided: slices of one fused projection, with poison around them."""
    gen = torch.Generator().manual_seed(case.seed + 1)
    k, v = (torch.randn(2, tokens, case.kv_heads, case.head_dim, generator=gen) * 3).to(case.dtype).to(device)
    if not case.strided:
        return k, v
    fused = torch.full((tokens, 3 * case.kv_heads, case.head_dim), math.nan, dtype=case.dtype, device=device)
    fused[:, case.kv_heads : 2 * case.kv_heads], fused[:, 2 * case.kv_heads :] = k, v
    return fused[:, case.kv_heads : 2 * case.kv_heads], fused[:, 2 * case.kv_heads :]


def live_bytes(cache, slots, kv_heads: int, head_dim: int) -> torch.Tensor:
    """A mask over the cache's storage: the bytes that tokens in ``slots`` own."""
    mask = torch.zeros_like(storage(cache))
    view = mask.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    count = (len(slots), kv_heads)
    ones = torch.full((*count, head_dim), 15, dtype=torch.uint8, device=cache.device)
    nan = torch.full(count, -1, dtype=torch.int32, device=cache.device).view(FLOAT32)  # four bytes of 0xFF
    write_tokens(view, slots, ones, nan, ones, nan)
    return mask == POISON


_AXES = dict(
    head_dim=(64, 96, 128, 256),
    kv_heads=(1, 2, 3, 8),
    dtype=(FLOAT16, BFLOAT16, FLOAT32),
    page=(16, 32, 64, 128),
    layout=("token_major", "head_major"),
    rotation=("hadamard", "hadamard_matrix", "haar", None),
    strided=(False, True),
    interleaved=(False, True),
    norm_correction=(False, True),
)
CASES = [
    Case(**row, row_padding=12 if i % 3 == 0 and row["layout"] == "token_major" else 0, seed=i)
    for i, row in enumerate(pairwise(**_AXES))
]
CASES_CPU = [c.but(kv_heads=min(c.kv_heads, 3), page=min(c.page, 32)) for c in CASES]


@pytest.mark.parametrize("tokens", [1, 37], ids="t{}".format)
@on_cases(cpu=CASES_CPU, gpu=CASES[::2], gpu_all=CASES[1::2])
def test_bytes(case: Case, target: Target, tokens: int) -> None:
    """Every stored byte is the format's, and no other byte of the allocation changes."""
    target.require()
    quant = quantizer(case.head_dim, case.rotation, target.device, case.norm_correction)
    key, value = new_tokens(case, tokens, target.device)
    slots, blocks = scattered_slots(tokens, case, target.device)
    cache = new_cache(case, blocks, target.device)
    tq4.store(key, value, cache, slots, quant, backend=target.backend)
    kept = slots >= 0
    hold_tokens(cache, slots[kept], key[kept], value[kept], quant, f"store {target} {case}")
    untouched = storage(cache)[~live_bytes(cache, slots[kept], case.kv_heads, case.head_dim)]
    assert (untouched == POISON).all(), "store wrote bytes that belong to no token of the call"


@on_cases(
    gpu=[
        Case(head_dim=128, kv_heads=8, seed=1),
        Case(head_dim=96, kv_heads=3, dtype=BFLOAT16, layout="head_major"),
    ]
)
def test_many_tokens(case: Case, target: Target) -> None:
    target.require()
    quant = quantizer(case.head_dim, case.rotation, target.device)
    key, value = new_tokens(case, 5003, target.device)
    slots, blocks = scattered_slots(5003, case, target.device, skip_every=7)
    cache = new_cache(case, blocks, target.device)
    tq4.store(key, value, cache, slots, quant, backend=target.backend)
    kept = slots >= 0
    hold_tokens(cache, slots[kept], key[kept], value[kept], quant, f"store {target} {case}")


@on_targets()
@pytest.mark.parametrize("layout_name", ["token_major", "head_major"])
def test_bytes_as_drawn(target: Target, layout_name: str) -> None:
    """Where the fields lie, by the format's drawing instead of the layout module."""
    target.require()
    d, hkv, page = 64, 2, 16
    half = d // 2
    case = Case(head_dim=d, kv_heads=hkv, layout=layout_name)
    quant = quantizer(d, "hadamard", target.device)
    key, value = new_tokens(case, 1, target.device)
    cache = new_cache(case, 2, target.device)
    tq4.store(
        key, value, cache, torch.tensor([page + 5], device=target.device), quant, backend=target.backend
    )
    k_index, k_norm, v_index, v_norm = read_tokens(
        cache, torch.tensor([page + 5], device=target.device), hkv, d
    )
    codes = [pack_codes(k_index)[0].cpu(), pack_codes(v_index)[0].cpu()]
    norms = [n[0].cpu().contiguous().view(torch.uint8).view(hkv, 4) for n in (k_norm, v_norm)]
    got = cache[1].cpu()
    if layout_name == "token_major":
        row = torch.cat([codes[0].flatten(), norms[0].flatten(), codes[1].flatten(), norms[1].flatten()])
        assert torch.equal(got[5], row)
        return
    for h in range(hkv):
        want = torch.full((page * (d + 8),), POISON, dtype=torch.uint8)
        for field in range(2):
            at = field * page * half + 5 * half
            want[at : at + half] = codes[field][h]
            at = 2 * page * half + field * page * 4 + 5 * 4
            want[at : at + 4] = norms[field][h]
        assert torch.equal(got[h].flatten(), want)


@on_targets()
@pytest.mark.parametrize("rotate", [(True, False), (False, True), (False, False)], ids=str)
def test_rotations_are_separate(target: Target, rotate: tuple[bool, bool]) -> None:
    target.require()
    case = Case(head_dim=64, kv_heads=2)
    quant = tq4.Quantizer(64, rotation="haar", v_rotation="hadamard", device=target.device)
    key, value = new_tokens(case, 9, target.device)
    slots, blocks = scattered_slots(9, case, target.device)
    cache = new_cache(case, blocks, target.device)
    options = dict(rotate_k=rotate[0], rotate_v=rotate[1])
    tq4.store(key, value, cache, slots, quant, backend=target.backend, **options)
    kept = slots >= 0
    hold_tokens(cache, slots[kept], key[kept], value[kept], quant, f"store {target}", *rotate)


@on_targets()
def test_codebooks_of_k_and_v(target: Target) -> None:
    """Any 16 ascending values, others for K than for V."""
    target.require()
    d = 128
    quant = tq4.Quantizer(
        d,
        k_centroids=[(i - 7) * 0.02 for i in range(16)],
        v_centroids=[math.sinh((i - 8) / 4) / 40 for i in range(16)],
        device=target.device,
    )
    case = Case(head_dim=d, kv_heads=1)
    key, value = new_tokens(case, 20, target.device)
    slots, blocks = scattered_slots(20, case, target.device)
    cache = new_cache(case, blocks, target.device)
    tq4.store(key, value, cache, slots, quant, backend=target.backend)
    kept = slots >= 0
    hold_tokens(cache, slots[kept], key[kept], value[kept], quant, f"store {target}")


@on_targets()
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=DTYPE_NAMES.get)
def test_extremes(target: Target, dtype: torch.dtype) -> None:
    """Zero vectors, single spikes, the smallest and the largest values, equal coordinates."""
    target.require()
    d = 64
    info = torch.finfo(dtype)
    x = torch.zeros(8, 1, d, dtype=dtype)
    x[1, 0, 17] = 5.0
    x[2, 0] = 1.0
    x[3, 0] = -1.0
    x[4, 0] = torch.randn(d).to(dtype) * 1e-4
    x[5, 0, ::2] = 60000.0
    x[6, 0] = torch.randn(d).to(dtype) * (30.0 if dtype == FLOAT16 else 1e15)
    x[7, 0, 3] = info.max if dtype == FLOAT16 else 1e18  # the square of a larger one overflows fp32
    x = x.to(target.device)
    quant = quantizer(d, "haar", target.device)
    case = Case(head_dim=d, kv_heads=1)
    cache = new_cache(case, 1, target.device)
    slots = torch.arange(8, device=target.device)
    tq4.store(x, x.flip(0), cache, slots, quant, backend=target.backend)
    hold_tokens(cache, slots[1:7], x[1:7], x.flip(0)[1:7], quant, f"store {target}")
    k, v = tq4.gather(
        cache,
        torch.zeros(1, 1, dtype=torch.int32, device=target.device),
        torch.tensor([8], dtype=torch.int32, device=target.device),
        quant,
        num_kv_heads=1,
        dtype=FLOAT32,
        backend="reference",
    )
    assert (k[0] == 0).all() and (v[7] == 0).all(), "a zero vector must decode to zeros"
    assert k.isfinite().all() and v.isfinite().all()


@on_targets()
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("layout_name", ["token_major", "head_major"])
def test_bad_tokens_touch_no_other(target: Target, bad: float, layout_name: str) -> None:
    """NaN or infinity in one token (one head of it): every other byte is as without it."""
    target.require()
    case = Case(head_dim=64, kv_heads=2, layout=layout_name)
    quant = quantizer(64, "hadamard", target.device)
    key, value = new_tokens(case, 40, target.device)
    slots, blocks = scattered_slots(40, case, target.device, skip_every=0)
    caches = [new_cache(case, blocks, target.device) for _ in range(2)]
    tq4.store(key, value, caches[0], slots, quant, backend=target.backend)
    key, value = key.clone(), value.clone()
    key[7, 1, 11] = bad
    value[30] = bad
    tq4.store(key, value, caches[1], slots, quant, backend=target.backend)
    owned = live_bytes(caches[0], slots[[7, 30]], 2, 64)
    same = storage(caches[0]) == storage(caches[1])
    assert (same | owned).all()


@on_targets()
def test_nothing_to_store(target: Target) -> None:
    """No tokens, and tokens that are all skipped."""
    target.require()
    case = Case(head_dim=64, kv_heads=2)
    quant = quantizer(64, "hadamard", target.device)
    cache = new_cache(case, 2, target.device)
    for tokens in (0, 3):
        key, value = new_tokens(case, tokens, target.device)
        slots = torch.full((tokens,), -1, device=target.device)
        tq4.store(key, value, cache, slots, quant, backend=target.backend)
    assert (storage(cache) == POISON).all()


@on_targets()
def test_rewriting_a_slot(target: Target) -> None:
    """A second store into the same slots leaves nothing of the first."""
    target.require()
    case = Case(head_dim=64, kv_heads=3)
    quant = quantizer(64, "hadamard", target.device)
    slots, blocks = scattered_slots(20, case, target.device, skip_every=0)
    cache = new_cache(case, blocks, target.device)
    for seed in (1, 2):
        key, value = new_tokens(case.but(seed=seed), 20, target.device)
        tq4.store(key, value, cache, slots, quant, backend=target.backend)
    hold_tokens(cache, slots, key, value, quant, f"store {target}")


@on_targets()
def test_real_keys_and_values(target: Target) -> None:
    target.require()
    x = real_qkv()
    count = 2048 if target.device == "cuda" else 40
    key, value = (x[n][:count].to(target.device) for n in ("k", "v"))
    case = Case(head_dim=128, kv_heads=2)
    quant = quantizer(128, "haar", target.device)
    slots, blocks = scattered_slots(count, case, target.device)
    cache = new_cache(case, blocks, target.device)
    tq4.store(key, value, cache, slots, quant, backend=target.backend)
    kept = slots >= 0
    hold_tokens(cache, slots[kept], key[kept], value[kept], quant, f"store {target}")


@pytest.mark.gpu
@pytest.mark.parametrize("target", GPU_TARGETS, ids=str)
def test_repeats_are_bitwise(target: Target) -> None:
    target.require()
    case = Case(head_dim=128, kv_heads=8, dtype=BFLOAT16)
    quant = quantizer(128, "hadamard", "cuda")
    key, value = new_tokens(case, 3000, "cuda")
    slots, blocks = scattered_slots(3000, case, "cuda")
    results = []
    for _ in range(3):
        cache = new_cache(case, blocks, "cuda")
        tq4.store(key, value, cache, slots, quant, backend=target.backend)
        results.append(storage(cache))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
