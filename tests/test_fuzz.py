"""Random shapes against the dense answers: up to 1,000 problems or 60 s, on every kernel of the extension.

TQ4_FUZZ_CASES and TQ4_FUZZ_SECONDS set other bounds, TQ4_FUZZ_SEED repeats a run: a failure names the seed,
the number of the problem and the problem itself.  tests/test_stress.py draws fewer, larger problems.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter

import pytest
import torch

from support_attention import CUDA_TARGETS, MODES, UNPACK_TARGETS, Case, answer, build, judge, run
from support_fuzz import fuzz_seed, random_case

_LONGEST = 700  # keys of a sequence
_MOST_QUERIES = 90  # of a sequence
_MOST_SCORES = 2_000_000  # (query head, query, key) of a problem: a few milliseconds of dense answers
_GROUPS = (1, 2, 3, 4, 5, 7, 8)


def small_case(rng: random.Random, op: str) -> Case:
    """A random problem whose dense answers take milliseconds."""
    while True:
        case = random_case(rng, op, _LONGEST, _GROUPS)
        case = case.but(
            seq_lens=tuple(min(n, _LONGEST) for n in case.seq_lens),
            query_lens=tuple(min(t, _MOST_QUERIES) for t in case.query_lens),
        )
        pairs = sum(n * t for n, t in zip(case.seq_lens, case.query_lens, strict=True))
        if pairs * case.kv_heads * case.group <= _MOST_SCORES:
            return case


def settings() -> tuple[int, float, int]:
    """(most cases, most seconds, seed)."""
    cases = int(os.environ.get("TQ4_FUZZ_CASES", "1000"))
    seconds = float(os.environ.get("TQ4_FUZZ_SECONDS", "60"))
    return cases, seconds, fuzz_seed()


def hold(case: Case, op: str, targets, who: str) -> None:
    """Every target on one problem; what is raised names the problem."""
    problem = build(case, targets[0].device)
    answers = {mode: answer(problem, mode) for mode in (MODES if case.int8 else ("exact",))}
    for target in targets:
        name = f"{who}: {op} {target} {case!r}"
        with target.chosen():
            try:
                out, lse = run(problem, target.backend, op)
            except Exception as error:
                raise AssertionError(f"{name} raised {type(error).__name__}: {error}") from error
        judge(problem, answers, out, lse, name)


@pytest.mark.gpu
def test_a_thousand_random_shapes() -> None:
    """Prefill three times out of four, by all its kernels; decode else."""
    for target in CUDA_TARGETS:
        target.require()
    most, seconds, seed = settings()
    rng = random.Random(seed)
    count, calls = 0, Counter()
    began = time.monotonic()
    try:
        while count < most and time.monotonic() - began < seconds:
            op = "decode" if count % 4 == 3 else "prefill"
            case = small_case(rng, op)
            tiles = UNPACK_TARGETS if op == "prefill" and case.int8 else ()
            targets = (*CUDA_TARGETS, *tiles)
            hold(case, op, targets, f"TQ4_FUZZ_SEED={seed} problem {count}")
            count += 1
            calls.update(f"{op} {target}" for target in targets)
    finally:
        asked = ", ".join(f"{n} {name}" for name, n in sorted(calls.items()))
        spent = time.monotonic() - began
        print(f"\nTQ4_FUZZ_SEED={seed}: {count} problems right in {spent:.1f} s ({asked})")
    assert count > 0
    torch.cuda.synchronize()


def test_problems_are_small_varied_and_repeatable() -> None:
    """What the fuzz test draws: every option occurs, every size is bounded, a seed gives the same again."""
    first, again = (
        [small_case(rng, ("prefill", "decode")[i % 4 == 3]) for i in range(600)]
        for rng in (random.Random(5), random.Random(5))
    )
    assert first == again
    for case in first:
        assert max(case.seq_lens) <= _LONGEST and max(case.query_lens) <= _MOST_QUERIES
        assert math.prod((case.head_dim, case.kv_heads, sum(case.seq_lens))) < 20_000_000
    for name, values in dict(
        head_dim={64, 96, 128, 256},
        group=set(_GROUPS),
        page={16, 32, 48, 64, 128},
        layout={"token_major", "head_major"},
        dtype={torch.float16, torch.bfloat16},
        rotation={"hadamard", "haar", None},
        causal={True, False},
        sinks={True, False},
        int8={True, False},
        softcap={0.0, 5.0, 40.0},
        strided={True, False},
        interleaved={True, False},
        padding_rows={0, 1, 5},
    ).items():
        assert {getattr(case, name) for case in first} == values, name
    assert any(case.window[0] >= 0 and case.window[1] < 0 for case in first)
    assert any(case.window[0] >= 0 and case.window[1] >= 0 for case in first)
    assert any(0 in case.seq_lens for case in first) and any(0 in case.query_lens for case in first)
    assert max(max(case.seq_lens) for case in first) > 600
