"""``prefill`` on every backend: masks, shapes, layouts, poison, strange inputs, outliers and real data."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
import torch

import tq4
from support import brute_force, real_qkv
from support_attention import (
    BFLOAT16,
    FLOAT16,
    Case,
    Target,
    answer,
    build,
    decode,
    judge,
    on_cases,
    on_targets,
    pairwise,
    poisoned_out,
    run,
    solved,
    verify,
)

on_prefill_cases = functools.partial(on_cases, prefill=True)
on_prefill_targets = functools.partial(on_targets, prefill=True)

# ----------------------------------------------------------------------- every mask option, by brute force

_RAGGED = dict(seq_lens=(0, 1, 15, 16, 17, 35), query_lens=(2, 1, 6, 0, 20, 7))
_SMALL = Case(head_dim=64, kv_heads=2, group=2, **_RAGGED)
MASK_CASES = [
    _SMALL,
    _SMALL.but(causal=False),
    _SMALL.but(window=(4, -1)),
    _SMALL.but(window=(0, 0)),
    _SMALL.but(causal=False, window=(9, 3)),
    _SMALL.but(causal=False, window=(-1, 2)),
    _SMALL.but(causal=False, window=(2, 0), seq_lens=(40, 40), query_lens=(3, 40)),
    _SMALL.but(softcap=1.5),
    _SMALL.but(softcap=30.0, window=(7, -1), dtype=BFLOAT16),
    _SMALL.but(sinks=True),
    _SMALL.but(sinks=True, causal=False, window=(3, 3), softcap=5.0),
    _SMALL.but(sm_scale=0.4),
    _SMALL.but(rotation=None),
    _SMALL.but(rotation="haar", norm_correction=True),
    _SMALL.but(kv_heads=1, group=7),
    _SMALL.but(kv_heads=3, group=1, layout="head_major"),
    _SMALL.but(head_dim=96, row_padding=20, padding_rows=3, strided=True, interleaved=True),
]
MASK_CASES += [case.but(int8=False) for case in MASK_CASES[::3]]


@pytest.mark.parametrize("case", [c for c in MASK_CASES if c.int8], ids=str)
def test_answers_are_brute_force(case: Case) -> None:
    """The dense answers that all backends are held against, and the reference, against the naive loop."""
    problem = build(case)
    quant = problem.quantizer
    keys, values = (
        (x if rotation is None else x @ rotation.double()).split(list(case.seq_lens))
        for x, rotation in (
            (decode(problem.k_index, problem.k_norm, quant.k_centroids, torch.float64), quant.k_rotation),
            (decode(problem.v_index, problem.v_norm, quant.v_centroids, torch.float64), quant.v_rotation),
        )
    )
    masks = dict(causal=case.causal, window=case.window, softcap=case.softcap, sinks=problem.sinks)
    want, want_lse = brute_force(problem.q, keys, values, case.query_lens, sm_scale=case.sm_scale, **masks)
    reference = tq4.reference.attention(
        problem.q,
        problem.cache,
        problem.block_table,
        problem.seq_lens,
        problem.query_start_loc,
        q_rotation=quant.k_rotation,
        out_rotation=quant.v_rotation,
        k_centroids=quant.k_centroids,
        v_centroids=quant.v_centroids,
        num_kv_heads=case.kv_heads,
        sm_scale=case.sm_scale,
        dtype=torch.float64,
        **masks,
    )
    for who, (out, lse) in {"answer": answer(problem, dtype=torch.float64), "reference": reference}.items():
        assert (out - want).abs().max() < 1e-6, who
        torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


@on_prefill_cases(cpu=MASK_CASES, gpu=MASK_CASES[::2], gpu_all=MASK_CASES[1::2])
def test_masks(case: Case, target: Target) -> None:
    verify(case, target)


# ------------------------------------------------------------------------------- shapes, layouts and lengths

_MASKS = (
    {},
    {},
    {"causal": False},
    {"window": (100, -1)},
    {"window": (17, -1), "sinks": True},
    {"causal": False, "window": (33, 20), "softcap": 20.0},
    {"softcap": 50.0, "sinks": True},
)


def ragged_case(index: int, row: dict, longest: int = 3500, most_queries: int = 130) -> Case:
    """Lengths around a page and one long, for a row of shape options; the other options follow the index."""
    rng = random.Random(index)
    page = row["page"]
    long = rng.randint(longest // 4, longest)
    queries = rng.randint(1, min(long, most_queries))
    if index % 5 == 0:
        long = queries = min(long, longest // 3)  # a whole prompt
    lens = [(0, 2), (1, 1), (page - 1, page - 1), (page, 5), (page + 1, page + 1), (long, queries), (7, 9)]
    rng.shuffle(lens)
    options = dict(
        kv_heads=(1, 2, 3)[index % 3],
        rotation=("hadamard", None, "haar")[index // 2 % 3],
        int8=index % 4 != 3,
        strided=index % 2 == 1,
        padding_rows=index % 3,
        interleaved=index % 7 == 0,
        row_padding=8 if row["layout"] == "token_major" and index % 5 == 1 else 0,
        seed=index,
        **_MASKS[index % len(_MASKS)],
    )
    options.update(row)
    return Case(seq_lens=tuple(n for n, _ in lens), query_lens=tuple(t for _, t in lens), **options)


_AXES = dict(
    head_dim=(64, 96, 128, 256),
    dtype=(FLOAT16, BFLOAT16),
    group=(1, 2, 4, 7, 8),
    page=(16, 32, 64, 128),
    layout=("token_major", "head_major"),
)
_PRODUCT = [dict(zip(_AXES, values, strict=True)) for values in itertools.product(*_AXES.values())]
_FEW = pairwise(**{**_AXES, "group": (1, 4, 7)}, int8=(True, False))
MATRIX = [ragged_case(i, row) for i, row in enumerate(_PRODUCT)]
MATRIX_FEW = [ragged_case(1000 + i, row) for i, row in enumerate(_FEW)]
MATRIX_CPU = [
    ragged_case(2000 + i, {**row, "kv_heads": 1 + i % 2}, longest=70, most_queries=30)
    for i, row in enumerate(pairwise(seed=1, **{**_AXES, "page": (16, 32), "group": (1, 3)}))
]


@on_prefill_cases(cpu=MATRIX_CPU, gpu=MATRIX_FEW, gpu_all=MATRIX)
def test_matrix(case: Case, target: Target) -> None:
    """D x dtype x group x page x layout, lengths 0, 1, page - 1, page, page + 1, thousands; all poisoned."""
    verify(case, target)


_LARGE = Case(head_dim=128, kv_heads=2, group=4, seq_lens=(2048, 777), query_lens=(512, 777))


@on_prefill_cases(
    gpu=[
        _LARGE,
        _LARGE.but(data="outlier"),
        _LARGE.but(data="outlier", rotation=None),
        _LARGE.but(data="outlier", int8=False),
        _LARGE.but(data="outlier", dtype=BFLOAT16, rotation="haar"),
        _LARGE.but(kv_heads=8, group=4, seq_lens=(4096,), query_lens=(4096,)),
        _LARGE.but(kv_heads=1, group=71, seq_lens=(600,), query_lens=(200,)),
    ],
    cpu=[_LARGE.but(seq_lens=(150,), query_lens=(60,), data="outlier")],
)
def test_large_and_outliers(case: Case, target: Target) -> None:
    """Rows x20 and a channel x10 must not cost the other rows their precision."""
    verify(case, target)


# ------------------------------------------------------------------------------------------------ real data


_REAL = Case(head_dim=128, kv_heads=2, group=4, seq_lens=(2048,), query_lens=(2048,), data="real")


@on_prefill_cases(
    gpu=[
        _REAL,
        _REAL.but(rotation=None),
        _REAL.but(rotation="haar", dtype=BFLOAT16, layout="head_major", page=64),
        _REAL.but(int8=False),
        _REAL.but(query_lens=(100,)),
    ],
    cpu=[
        _REAL.but(seq_lens=(192,), query_lens=(48,)),
        _REAL.but(seq_lens=(192,), query_lens=(48,), int8=False),
    ],
)
def test_real_data(case: Case, target: Target) -> None:
    target.require()
    x = real_qkv()
    n, t = case.seq_lens[0], case.query_lens[0]
    problem = build(case, target.device, qkv=(x["q"][n - t : n], x["k"][:n], x["v"][:n]))
    modes = ("exact", "recipe", "residual") if case.int8 else ("exact",)
    out, lse = run(problem, target.backend)
    judge(problem, {mode: answer(problem, mode) for mode in modes}, out, lse, f"prefill {target}")


# --------------------------------------------------------------------------------------------- strange input

_MIXED = Case(head_dim=64, seq_lens=(40, 17, 33), query_lens=(40, 3, 9), group=3)
_MIXED_GPU = _MIXED.but(head_dim=128, seq_lens=(900, 17, 333), query_lens=(300, 3, 120), group=4)


@on_prefill_cases(cpu=[_MIXED], gpu=[_MIXED_GPU, _MIXED_GPU.but(dtype=BFLOAT16, int8=False)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_query_rows_stay_alone(case: Case, target: Target, bad: float) -> None:
    """NaN or infinity in a query row (one token, one head) changes no other row."""
    target.require()
    problem = build(case, target.device)
    answers = {mode: answer(problem, mode) for mode in ("exact", "recipe", "residual")}
    hurt = [
        (0, 0),
        (5, case.group),
        (case.query_lens[0] + 1, 1),
        (problem.num_tokens - 1, case.group * 2 - 1),
    ]
    healthy = problem.q.clone()
    for token, head in hurt:
        problem.q[token, head, 3 : 3 + 5] = bad
    out, lse = run(problem, target.backend)
    for token, head in hurt:  # the rows themselves may hold anything: put their answer there
        out[token, head] = answers["exact"][0][token, head]
        lse[head, token] = answers["exact"][1][head, token]
    problem.q = healthy
    judge(problem, answers, out, lse, f"prefill {target}")


@on_prefill_cases(
    cpu=[_MIXED],
    gpu=[_MIXED_GPU, _MIXED_GPU.but(layout="head_major"), _MIXED_GPU.but(int8=False, window=(50, -1))],
)
def test_block_table_garbage_is_never_followed(case: Case, target: Target) -> None:
    """Entries past a sequence's last page lie far outside the cache."""
    target.require()
    problem = build(case, target.device, wild_table=True)
    answers = {mode: answer(problem, mode) for mode in ("exact", "recipe", "residual")}
    out, lse = run(problem, target.backend)
    judge(problem, answers, out, lse, f"prefill {target}")


@on_prefill_targets()
def test_no_keys_and_no_queries(target: Target) -> None:
    """Sequences without keys give zeros and -inf (or the sink); no tokens at all is no error."""
    target.require()
    for sinks in (False, True):
        problem = build(Case(seq_lens=(0, 0), query_lens=(3, 1), sinks=sinks), target.device)
        out, lse = run(problem, target.backend)
        assert torch.equal(out, torch.zeros_like(out))
        want = problem.sinks[:, None].expand(4, 4) if sinks else torch.full_like(lse, -math.inf)
        torch.testing.assert_close(lse, want, rtol=1e-6, atol=1e-6)
    problem = build(Case(seq_lens=(5, 20), query_lens=(0, 0)), target.device)
    out, lse = run(problem, target.backend)
    assert out.shape[0] == 0 and lse.shape[1] == 0


@on_prefill_targets()
def test_lse_rows_of_padding_are_untouched(target: Target) -> None:
    """The op itself, with an LSE of its own: columns of padding rows keep their bits."""
    target.require()
    case = Case(seq_lens=(20, 9), query_lens=(4, 2), padding_rows=3)
    problem, answers = solved(case, target.device)
    quant, out = problem.quantizer, poisoned_out(problem)
    lse = torch.full((4, 9), math.nan, device=target.device)
    torch.ops.tq4.prefill(
        problem.q,
        problem.cache,
        problem.block_table,
        problem.seq_lens,
        problem.query_start_loc,
        quant.k_rotation,
        quant.v_rotation,
        quant.k_centroids,
        quant.k_codes,
        quant.k_code_scale,
        quant.v_centroids,
        out,
        lse,
        None,
        case.kv_heads,
        case.scale,
        backend=("auto", "cuda", "cuda-sm80", "triton", "reference").index(target.backend),
    )
    assert out[6:].isnan().all() and lse[:, 6:].isnan().all()
    judge(problem, answers, out[:6], lse[:, :6], f"torch.ops.tq4.prefill {target}")


@on_prefill_targets()
def test_unknown_max_query_len(target: Target) -> None:
    """Without an upper bound of the query lengths the answer is the same."""
    target.require()
    problem, answers = solved(_MIXED, target.device)
    out, lse = run(problem, target.backend, max_query_len=None)
    judge(problem, answers, out, lse, f"prefill {target}")


@on_prefill_cases(
    cpu=[_MIXED.but(data="outlier", dtype=BFLOAT16)],
    gpu=[_MIXED_GPU.but(data="outlier"), _MIXED_GPU.but(rotation=None, layout="head_major")],
)
def test_separate_k_and_v_codebooks_and_rotations(case: Case, target: Target) -> None:
    """K and V with rotations and codebooks of their own, neither symmetric."""
    target.require()
    d = case.head_dim
    own = tq4.Quantizer(
        d,
        rotation=case.rotation,
        v_rotation="haar",
        seed=7,
        k_centroids=[(i - 7.2) * 2.3 / (8 * d**0.5) for i in range(16)],
        v_centroids=[math.sinh((i - 8) / 5) / d**0.5 for i in range(16)],
        device=target.device,
    )
    problem = build(case, target.device, quant=own)
    answers = {mode: answer(problem, mode) for mode in ("exact", "recipe", "residual")}
    out, lse = run(problem, target.backend)
    judge(problem, answers, out, lse, f"prefill {target}")
