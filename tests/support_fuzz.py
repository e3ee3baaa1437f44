"""Random attention problems, for the tests that draw many of them."""

from __future__ import annotations

import os
import random

from support_attention import BFLOAT16, FLOAT16, Case


def fuzz_seed() -> int:
    """TQ4_FUZZ_SEED, or a fresh one."""
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
