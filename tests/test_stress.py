"""Caches beyond 2^31 bytes, and random problems of every shape.

The fuzz tests draw TQ4_FUZZ problems (default 100) from the seed TQ4_FUZZ_SEED (default: a fresh one); every
failure names the seed and the problem's number, which together repeat it.
"""

from __future__ import annotations

import functools
import os
import random

import pytest
import torch

import sanitize
import tq4
from support_attention import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GPU_TARGETS,
    MODES,
    Case,
    Target,
    answer,
    build,
    hold_tokens,
    judge,
    new_cache,
    on_targets,
    quantizer,
    run,
)
from tq4 import layout

# --------------------------------------------------------------------------------------------- large caches


@functools.lru_cache(maxsize=1)
def _two_gigabytes() -> torch.Tensor:
    return torch.full(((1 << 31) + (1 << 28),), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("target", GPU_TARGETS, ids=str)
@pytest.mark.parametrize("layout_name", ["token_major", "head_major"])
def test_offsets_beyond_2_31_bytes(target: Target, layout_name: str) -> None:
    """Pages at both ends of a cache of 2.4 GB, through all four operations."""
    target.require()
    d, hkv, page, lens = 128, 8, 16, (200, 33, 70)
    case = Case(head_dim=d, kv_heads=hkv, group=2, layout=layout_name, seq_lens=lens, query_lens=(40, 1, 3))
    flat = _two_gigabytes()
    flat.fill_(0xFF)
    block_bytes = page * layout.token_bytes(hkv, d)
    num_blocks = flat.numel() // block_bytes
    cache = flat[: num_blocks * block_bytes].view(layout.cache_shape(layout_name, num_blocks, hkv, d, page))
    assert (num_blocks - 1) * block_bytes > 2**31
    # from the last block down, from the first up, and from where the offset passes 2^31
    turn = 2**31 // block_bytes
    ends = range(num_blocks - 1, num_blocks - 10, -1), range(9), range(turn - 4, turn + 5)
    ids = [block for three in zip(*ends, strict=True) for block in three]
    problem = build(case, "cuda", block_ids=ids, cache=cache)
    for op in ("prefill", "decode"):
        out, lse = run(problem, target.backend, op)
        judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"{op} {target}, 2.4 GB")
    key, value = torch.randn(2, sum(lens), hkv, d, device="cuda").half()
    tq4.store(key, value, cache, problem.slots, problem.quantizer, backend=target.backend)
    hold_tokens(cache, problem.slots, key, value, problem.quantizer, f"store {target}, 2.4 GB")
    got = tq4.gather(
        cache,
        problem.block_table,
        problem.seq_lens,
        problem.quantizer,
        num_kv_heads=hkv,
        dtype=FLOAT32,
        backend=target.backend,
    )
    for x, y in zip((key, value), got, strict=True):
        assert 0.08 < ((x - y).norm() / x.norm()).item() < 0.11


# ----------------------------------------------------------------------------------------------------- fuzz


def _seed() -> int:
    return int(os.environ.get("TQ4_FUZZ_SEED") or random.SystemRandom().randrange(1 << 31))


def random_case(
    rng: random.Random, op: str, longest: int, heads: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 12)
) -> Case:
    """Any problem the operations accept, small enough for a quick answer."""
    group = rng.choice(heads)
    batch = rng.choice((1, 1, 2, 3, 5, 9))
    page = rng.choice((16, 16, 32, 48, 64, 128))
    lens, queries = [], []
    for _ in range(batch):
        n = rng.choice(
            (0, 1, page, rng.randint(1, longest), rng.randint(1, longest), rng.randint(1, 3 * page))
        )
        if op == "decode":
            t = rng.randint(0, max(1, min(16, 64 // group)))
        else:
            t = rng.choice((0, 1, n, rng.randint(0, max(1, n)), rng.randint(0, 140)))
        lens.append(n)
        queries.append(min(t, 400))
    causal = rng.random() < 0.8
    window = (-1, -1)
    if rng.random() < 0.4:
        window = (
            rng.choice((-1, 0, rng.randint(0, longest))),
            -1 if causal else rng.choice((-1, 0, rng.randint(0, 60))),
        )
    token_major = rng.random() < 0.5
    return Case(
        head_dim=rng.choice((64, 96, 128, 128, 256)),
        kv_heads=rng.choice((1, 1, 2, 3, 4, 8)),
        group=group,
        dtype=rng.choice((FLOAT16, BFLOAT16)),
        page=page,
        layout="token_major" if token_major else "head_major",
        seq_lens=tuple(lens),
        query_lens=tuple(queries),
        rotation=rng.choice(("hadamard", "haar", None)),
        causal=causal,
        window=window,
        softcap=rng.choice((0.0, 0.0, 5.0, 40.0)),
        sinks=rng.random() < 0.3,
        sm_scale=rng.choice((None, None, 0.05, 0.2)),
        int8=rng.random() < 0.75,
        row_padding=rng.choice((0, 0, 4, 20, 64)) if token_major else 0,
        interleaved=rng.random() < 0.2,
        strided=rng.random() < 0.3,
        padding_rows=rng.choice((0, 0, 1, 5)),
        norm_correction=rng.random() < 0.2,
        seed=rng.randrange(1 << 30),
    )


def _fuzz(target: Target, op: str, count: int, longest: int, **fixed) -> None:
    seed = _seed()
    print(f"TQ4_FUZZ_SEED={seed}")
    rng = random.Random(seed)
    for number in range(count):
        case = random_case(rng, op, longest).but(**fixed)
        problem = build(case, target.device)
        answers = {mode: answer(problem, mode) for mode in (MODES if case.int8 else ("exact",))}
        who = f"TQ4_FUZZ_SEED={seed} problem {number}: {op} {target}"
        try:
            out, lse = run(problem, target.backend, op)
        except Exception as error:
            raise AssertionError(f"{who} {case!r} raised {type(error).__name__}: {error}") from error
        judge(problem, answers, out, lse, who)


def _count(share: float) -> int:
    return max(1, round(int(os.environ.get("TQ4_FUZZ", "100")) * share))


@pytest.mark.gpu
@pytest.mark.parametrize("op,share", [("prefill", 0.6), ("decode", 0.4)], ids=["prefill", "decode"])
@pytest.mark.parametrize("backend", ["cuda", "cuda-sm80"])
def test_fuzz(backend: str, op: str, share: float) -> None:
    target = Target(backend, "cuda")
    target.require()
    _fuzz(target, op, _count(share), 3000)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_fuzz_triton(op: str) -> None:
    """Triton compiles a kernel for each combination of options: those are fixed, the lengths are not."""
    target = Target("triton", "cuda")
    target.require()
    fixed = dict(
        head_dim=128,
        group=4,
        dtype=FLOAT16,
        page=16,
        layout="token_major",
        rotation="hadamard",
        causal=True,
        window=(-1, -1),
        softcap=0.0,
        sinks=False,
        int8=True,
        row_padding=0,
        interleaved=False,
        kv_heads=2,
    )
    _fuzz(target, op, _count(0.2), 3000, **fixed)


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_fuzz_reference(op: str) -> None:
    """The same problems, small, through the reference on the CPU."""
    target = Target("reference", "cpu")
    target.require()
    _fuzz(target, op, 12, 100)


@pytest.mark.gpu
@pytest.mark.parametrize("target", GPU_TARGETS, ids=str)
def test_fuzz_store(target: Target) -> None:
    """Random shapes of store; Triton gets few, for it compiles them."""
    target.require()
    seed = _seed()
    print(f"TQ4_FUZZ_SEED={seed}")
    rng = random.Random(seed)
    for number in range(_count(0.05 if target.backend == "triton" else 0.5)):
        case = random_case(rng, "prefill", 10)
        dtype, tokens = rng.choice((FLOAT16, BFLOAT16, FLOAT32)), rng.choice((1, 3, 64, rng.randint(1, 2000)))
        quant = quantizer(case.head_dim, case.rotation, "cuda", case.norm_correction)
        blocks = -(-tokens // case.page) + 1
        cache = new_cache(case, blocks, "cuda")
        slots = torch.randperm(blocks * case.page, device="cuda")[:tokens]
        slots[torch.rand(tokens, device="cuda") < 0.1] = -1
        key, value = (torch.randn(2, tokens, case.kv_heads, case.head_dim, device="cuda") * 10).to(dtype)
        tq4.store(key, value, cache, slots, quant, backend=target.backend)
        kept = slots >= 0
        who = f"TQ4_FUZZ_SEED={seed} problem {number}: store {target} {case}"
        hold_tokens(cache, slots[kept], key[kept], value[kept], quant, who)


# ------------------------------------------------------------------------------------------------ sanitizer


@on_targets()
@pytest.mark.sanitizer
def test_reduced_set(target: Target) -> None:
    """What ``python tests/sanitize.py`` runs under compute-sanitizer, without it."""
    target.require()
    assert sanitize.run_all([target.backend], target.device) > 0
