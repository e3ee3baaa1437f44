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
    CUDA_TARGETS,
    FLOAT16,
    FLOAT32,
    GPU_TARGETS,
    MODES,
    UNPACK_TARGETS,
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
from support_fuzz import fuzz_seed, random_case
from tq4 import layout

# --------------------------------------------------------------------------------------------- large caches


@functools.lru_cache(maxsize=1)
def _two_gigabytes() -> torch.Tensor:
    return torch.full(((1 << 31) + (1 << 28),), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("target", [*GPU_TARGETS, *UNPACK_TARGETS[:2]], ids=str)
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


def _fuzz(target: Target, op: str, count: int, longest: int, **fixed) -> None:
    seed = fuzz_seed()
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
@pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
def test_fuzz(target: Target, op: str, share: float) -> None:
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
    seed = fuzz_seed()
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


@on_targets(prefill=True)
@pytest.mark.sanitizer
def test_reduced_set(target: Target) -> None:
    """What ``python tests/sanitize.py`` runs under compute-sanitizer, without it."""
    target.require()
    assert sanitize.run_all([target.name], target.device) > 0
