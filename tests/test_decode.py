"""``decode`` on every backend: one to sixteen query tokens, mixed lengths, large batches, long contexts."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import tq4
from support import TOLERANCES, Bound, assert_close, assert_lse_close, real_qkv, relative_error
from support_attention import (
    BFLOAT16,
    FLOAT16,
    MODES,
    Case,
    Target,
    answer,
    build,
    judge,
    on_cases,
    on_targets,
    pairwise,
    run,
    verify,
)
from tq4.backends import cuda

# ----------------------------------------------------------------------------- masks at one and more tokens

_LENGTHS = (0, 1, 15, 16, 17, 40)
_ONE = Case(head_dim=64, kv_heads=2, group=2, seq_lens=_LENGTHS, query_lens=(1,) * 6)
_SOME = _ONE.but(query_lens=(2, 3, 1, 0, 4, 5))
MASK_CASES = [
    _ONE,
    _SOME,
    _ONE.but(window=(5, -1), sinks=True),
    _SOME.but(window=(0, -1)),
    _SOME.but(causal=False),
    _SOME.but(causal=False, window=(9, 1), softcap=4.0),
    _ONE.but(softcap=30.0, dtype=BFLOAT16),
    _SOME.but(sinks=True, sm_scale=0.3),
    _ONE.but(rotation=None, layout="head_major"),
    _SOME.but(rotation="haar", strided=True, padding_rows=2, interleaved=True),
    _ONE.but(kv_heads=1, group=7, head_dim=96, row_padding=12),
    _ONE.but(int8=False),
    _SOME.but(int8=False, softcap=4.0, sinks=True, window=(8, -1)),
]


# On the GPU also with room for long sequences: the kernels for short ones are chosen by the table.
_WIDE_TABLES = [case.but(wide_table=True) for case in MASK_CASES]


@on_cases(
    cpu=MASK_CASES,
    gpu=MASK_CASES[::2] + _WIDE_TABLES[1::2],
    gpu_all=MASK_CASES[1::2] + _WIDE_TABLES[::2],
)
def test_masks(case: Case, target: Target) -> None:
    verify(case, target, "decode")


# ------------------------------------------------------------------------- short contexts on many KV heads

# Shapes that clusters of CTAs take on Hopper: a table with room for no more than 16K tokens, few sequences,
# up to 8 query rows a KV head.  Token-major pages of a multiple of 4 KV heads are copied in boxes, head-major
# ones in runs, others in pieces.
_SHORT = Case(head_dim=128, kv_heads=4, group=4, seq_lens=(700, 0, 1, 90), query_lens=(1,) * 4)
SHORT_CASES = [
    _SHORT,
    _SHORT.but(head_dim=64, page=32, seq_lens=(2000, 33, 17, 16), dtype=BFLOAT16),
    _SHORT.but(query_lens=(2, 1, 0, 2), sinks=True, window=(300, -1)),
    _SHORT.but(query_lens=(2, 2, 1, 1), causal=False, softcap=6.0, dtype=BFLOAT16, data="outlier"),
    _SHORT.but(kv_heads=8, group=1, seq_lens=(5000, 31), query_lens=(1, 4), strided=True, padding_rows=1),
    _SHORT.but(kv_heads=12, group=2, seq_lens=(3000,), query_lens=(1,), rotation=None, row_padding=16),
    _SHORT.but(kv_heads=8, group=8, seq_lens=(16000,), query_lens=(1,), page=128, interleaved=True),
    _SHORT.but(head_dim=64, kv_heads=1, group=8, layout="head_major", page=64, window=(200, -1)),
    _SHORT.but(kv_heads=2, query_lens=(1, 2, 0, 1), dtype=BFLOAT16),
    _SHORT.but(head_dim=64, kv_heads=1, group=7, page=32, seq_lens=(4000, 16, 1, 99), sinks=True),
    _SHORT.but(kv_heads=6, group=2, seq_lens=(900, 64), query_lens=(1, 1), row_padding=4, softcap=9.0),
    _SHORT.but(kv_heads=3, group=2, layout="head_major", page=48, query_lens=(4, 1, 1, 3), sinks=True),
    _SHORT.but(kv_heads=8, seq_lens=(9000, 700), query_lens=(1, 2), dtype=BFLOAT16),  # 16 clusters of 6 CTAs
    _SHORT.but(group=5, seq_lens=(7000, 1, 0, 90, 640), query_lens=(1,) * 5, softcap=9.0),  # 20 of 5
    _SHORT.but(head_dim=64, kv_heads=8, group=3, seq_lens=(6000, 16, 333), query_lens=(1, 2, 1)),  # 24 of 4
]


@on_cases(cpu=SHORT_CASES[2:4], gpu=SHORT_CASES)
def test_short_contexts(case: Case, target: Target) -> None:
    verify(case, target, "decode")


# ------------------------------------------------------------------ more KV heads or rows than warps for them

# A CTA then has some of the heads, copied in boxes from token-major pages, or some of the query rows.
_MANY = Case(head_dim=128, kv_heads=32, group=1, seq_lens=(700, 0, 1, 90), query_lens=(1,) * 4)
MANY_CASES = [
    _MANY,
    _MANY.but(head_dim=96, seq_lens=(40, 17), query_lens=(1, 2), kv_heads=20),
    _MANY.but(head_dim=64, seq_lens=(60, 3), query_lens=(8, 5), kv_heads=8, group=8, sinks=True),
    _MANY.but(head_dim=96, query_lens=(2, 1, 0, 3), sinks=True, window=(300, -1)),
    _MANY.but(head_dim=64, dtype=BFLOAT16, data="outlier", int8=False),
    _MANY.but(head_dim=256, kv_heads=16, group=2, query_lens=(6, 1, 1, 2), interleaved=True),
    _MANY.but(kv_heads=40, page=48, rotation=None, softcap=9.0),
    _MANY.but(kv_heads=18, strided=True, padding_rows=1),
    _MANY.but(kv_heads=24, group=2, query_lens=(8, 1, 3, 2), causal=False, window=(-1, 2)),
    _MANY.but(kv_heads=32, layout="head_major", page=32, int8=False, dtype=BFLOAT16),
    _MANY.but(kv_heads=32, row_padding=16, window=(50, -1), query_lens=(1, 4, 1, 1)),
    _MANY.but(kv_heads=32, row_padding=8, query_lens=(9, 1, 1, 2)),
    _MANY.but(kv_heads=8, group=8, query_lens=(4, 2, 0, 3)),
    _MANY.but(kv_heads=8, group=8, query_lens=(16, 3, 1, 9), row_padding=16, sinks=True),
    _MANY.but(kv_heads=8, group=5, query_lens=(4, 5, 1, 1), int8=False, window=(77, -1)),
    _MANY.but(kv_heads=16, group=12, query_lens=(5, 1, 0, 2), page=128, causal=False, softcap=20.0),
    _MANY.but(head_dim=256, kv_heads=8, group=4, query_lens=(8, 3, 1, 2), dtype=BFLOAT16),
]


@on_cases(cpu=MANY_CASES[1:3], gpu=MANY_CASES)
def test_many_heads_and_rows(case: Case, target: Target) -> None:
    verify(case, target, "decode")


# ------------------------------------------------------------------------------- shapes, layouts and lengths


def decode_case(index: int, row: dict, longest: int = 5000) -> Case:
    """Lengths around a page, two long ones and an empty one; one to a few query tokens each."""
    rng = random.Random(index)
    page, group = row["page"], row["group"]
    lens = [0, 1, page - 1, page, page + 1, rng.randint(longest // 8, longest), rng.randint(1, longest // 3)]
    rng.shuffle(lens)
    most = (1, 1, 2, 4, 16)[index % 5]
    most = max(1, min(most, 64 // group))
    queries = [1] * 7 if most == 1 else [rng.randint(0, most) for _ in lens]
    options = dict(
        kv_heads=(1, 2, 3, 8)[index % 4],
        rotation=("hadamard", "haar", None)[index // 2 % 3],
        int8=index % 4 != 2,
        strided=index % 2 == 1,
        padding_rows=2 if index % 3 == 1 else 0,
        interleaved=index % 7 == 0,
        row_padding=8 if row["layout"] == "token_major" and index % 5 == 2 else 0,
        window=(-1, -1) if index % 3 else (rng.randint(0, 200), -1),
        softcap=20.0 if index % 6 == 5 else 0.0,
        sinks=index % 5 == 3,
        seed=index,
    )
    options.update(row)
    return Case(seq_lens=tuple(lens), query_lens=tuple(queries), **options)


_AXES = dict(
    head_dim=(64, 96, 128, 256),
    dtype=(FLOAT16, BFLOAT16),
    group=(1, 2, 4, 7, 8),
    page=(16, 32, 64, 128),
    layout=("token_major", "head_major"),
)
_PRODUCT = [dict(zip(_AXES, values, strict=True)) for values in itertools.product(*_AXES.values())]
MATRIX = [decode_case(i, row) for i, row in enumerate(_PRODUCT)]
_FEW = pairwise(**{**_AXES, "group": (1, 4, 7)}, int8=(True, False))
MATRIX_FEW = [decode_case(1000 + i, row) for i, row in enumerate(_FEW)]
MATRIX_CPU = [
    decode_case(2000 + i, {**row, "kv_heads": 1 + i % 2}, longest=60)
    for i, row in enumerate(pairwise(seed=1, **{**_AXES, "page": (16, 32), "group": (1, 3)}))
]


# Rotations of q and of the output as the signs of a Hadamard matrix, as the matrix, and one without signs.
FORMS = [
    _SOME.but(head_dim=d, group=g, rotation=r, int8=i8, seq_lens=(300, 1, 17, 5, 16, 40), seed=d)
    for d in (64, 128, 256)
    for g, i8 in ((1, True), (8, True), (4, False))
    for r in ("hadamard", "hadamard_matrix", "haar")
]
FORMS += [form.but(wide_table=True) for form in FORMS if form.rotation == "hadamard"]


@on_cases(
    cpu=[_ONE.but(rotation="hadamard_matrix"), _SOME.but(head_dim=128, kv_heads=1)],
    gpu=FORMS[:6] + FORMS[-3:],
    gpu_all=FORMS[6:-3],
)
def test_rotations(case: Case, target: Target) -> None:
    verify(case, target, "decode")


@on_cases(cpu=MATRIX_CPU, gpu=MATRIX_FEW, gpu_all=MATRIX)
def test_matrix(case: Case, target: Target) -> None:
    verify(case, target, "decode")


def _random_lengths(count: int, longest: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice((0, 1, rng.randint(2, longest))) for _ in range(count))


_WIDE = Case(head_dim=128, kv_heads=8, group=4)
BATCHES = [
    _WIDE.but(seq_lens=(100_000, *[500] * 7, 0, 1), query_lens=(1,) * 10),  # one long beside short ones
    _WIDE.but(seq_lens=(131_072,), query_lens=(1,), kv_heads=2),
    _WIDE.but(seq_lens=(131_072,), query_lens=(1,), kv_heads=2, window=(1000, -1), sinks=True),
    _WIDE.but(seq_lens=_random_lengths(512, 300, 1), query_lens=(1,) * 512, kv_heads=2),
    _WIDE.but(seq_lens=_random_lengths(64, 3000, 2), query_lens=(4,) * 64, kv_heads=2),
    _WIDE.but(seq_lens=_random_lengths(133, 700, 3), query_lens=(1,) * 133, kv_heads=1, group=8),
    _WIDE.but(seq_lens=_random_lengths(5, 4000, 4), query_lens=(16,) * 5, kv_heads=2),
    _WIDE.but(seq_lens=_random_lengths(9, 4000, 5), query_lens=(16,) * 9, kv_heads=1, group=1),
    _WIDE.but(seq_lens=(3,) * 200, query_lens=(1,) * 200),
    _WIDE.but(seq_lens=(0,) * 7, query_lens=(1,) * 7),
]


@on_cases(gpu=BATCHES, cpu=[_WIDE.but(seq_lens=_random_lengths(9, 40, 1), query_lens=(1,) * 9, kv_heads=1)])
def test_batches(case: Case, target: Target) -> None:
    """Splits of the keys that are empty, uneven or many: one of 128K, 512 short ones, sixteen queries."""
    verify(case, target, "decode")


@on_cases(
    cpu=[_SOME],
    gpu=[
        _SOME.but(head_dim=128, seq_lens=(900, 1, 0, 16, 2000), query_lens=(3, 1, 2, 4, 4)),
        _SOME.but(
            head_dim=64, seq_lens=(900, 1, 0, 16, 2000), query_lens=(1, 1, 1, 1, 1), layout="head_major"
        ),
    ],
)
def test_decode_is_prefill(case: Case, target: Target) -> None:
    """Both operations on the same problem: prefill may hand short queries to decode, the answers agree."""
    target.require()
    problem = build(case, target.device)
    answers = {mode: answer(problem, mode) for mode in MODES}
    for op in ("prefill", "decode"):
        out, lse = run(problem, target.backend, op)
        judge(problem, answers, out, lse, f"{op} {target}")


@on_cases(cpu=[_ONE], gpu=[_ONE.but(head_dim=128, seq_lens=(900, 1, 33, 16, 2000, 5))])
def test_block_table_garbage_is_never_followed(case: Case, target: Target) -> None:
    target.require()
    problem = build(case, target.device, wild_table=True)
    answers = {mode: answer(problem, mode) for mode in MODES}
    out, lse = run(problem, target.backend, "decode")
    judge(problem, answers, out, lse, f"decode {target}")


@on_targets()
def test_max_query_len_is_only_a_bound(target: Target) -> None:
    """An upper bound of the query lengths that is larger than any of them changes nothing."""
    target.require()
    case = _SOME.but(kv_heads=1, seq_lens=(17, 3, 40), query_lens=(1, 2, 1))
    problem = build(case, target.device)
    answers = {mode: answer(problem, mode) for mode in MODES}
    for bound in (2, 7, 16):
        out, lse = run(problem, target.backend, "decode", max_query_len=bound)
        judge(problem, answers, out, lse, f"decode {target} max_query_len={bound}")


# ------------------------------------------------------------------------------------------------- accuracy


def _long(data: str) -> Case:
    return Case(head_dim=128, kv_heads=2, group=4, seq_lens=(2048,) * 4, query_lens=(1,) * 4, data=data)


@on_cases(
    cpu=[Case(head_dim=128, group=4, seq_lens=(200, 150), query_lens=(1, 4), data="real")],
    gpu=[
        _long("real"),
        _long("real").but(query_lens=(4,) * 4, layout="head_major"),
        _long("real").but(int8=False),
    ],
)
def test_real_data(case: Case, target: Target) -> None:
    target.require()
    x = real_qkv()
    ends = [2048 - 300 * i for i in range(len(case.seq_lens))]  # a window of the text for each sequence
    parts = [
        (x["q"][e - t : e], x["k"][e - n : e], x["v"][e - n : e])
        for e, n, t in zip(ends, _fit(case, ends), case.query_lens, strict=True)
    ]
    case = case.but(seq_lens=tuple(len(k) for _, k, _ in parts))
    problem = build(case, target.device, qkv=tuple(torch.cat(p) for p in zip(*parts, strict=True)))
    answers = {mode: answer(problem, mode) for mode in MODES}
    out, lse = run(problem, target.backend, "decode")
    judge(problem, answers, out, lse, f"decode {target}")


def _fit(case: Case, ends: list[int]) -> list[int]:
    return [min(n, e) for n, e in zip(case.seq_lens, ends, strict=True)]


@on_cases(cpu=[_ONE.but(data="outlier")], gpu=[_long("outlier"), _long("outlier").but(dtype=BFLOAT16)])
def test_outliers(case: Case, target: Target) -> None:
    verify(case, target, "decode")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "cuda-sm80"])
def test_rounding_the_query_costs_nothing(backend: str) -> None:
    """With at most 8 rows a KV head the residual of q is added: nearer to exact than the plain recipe is."""
    Target(backend, "cuda").require()
    problem = build(_long("gaussian"), "cuda")
    exact, recipe = (answer(problem, mode)[0] for mode in ("exact", "recipe"))
    out, _ = run(problem, backend, "decode")
    error, plain = relative_error(out, exact), relative_error(recipe, exact)
    assert error <= max(0.6 * plain, TOLERANCES["fp16"].total), f"{backend}: {error:.3g}, recipe {plain:.3g}"


# ------------------------------------------------------------------------------------------- the exact mode

_EXACT = Case(head_dim=128, seq_lens=(2048, 1, 0, 700, 33), query_lens=(1,) * 5, int8=False)
EXACT_CASES = [
    _EXACT.but(
        head_dim=row["head_dim"],
        kv_heads=row["kv_heads"],
        group=row["group"],
        query_lens=(1,) * 5 if row["queries"] == 1 else (4, 1, 2, 4, 3),
        layout=row["layout"],
        data=row["data"],
        rotation=row["rotation"],
        seed=index,
    )
    for index, row in enumerate(
        pairwise(
            head_dim=(64, 96, 128, 256),
            kv_heads=(1, 2, 8),
            group=(1, 4, 7, 8),
            queries=(1, 4),
            layout=("token_major", "head_major"),
            data=("gaussian", "outlier"),
            rotation=("hadamard", "hadamard_matrix", "haar", None),
        )
    )
]
EXACT_CASES += [
    _EXACT.but(head_dim=d, group=4, **options)
    for d in (64, 96, 128, 256)
    for options in (
        dict(window=(100, -1), sinks=True),
        dict(softcap=20.0, query_lens=(4, 1, 2, 4, 3), layout="head_major"),
        dict(causal=False, window=(300, 2), softcap=5.0, sinks=True, query_lens=(16, 1, 2, 4, 3)),
    )
]


def _has_bulk_decode(device: str) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0) and "9.0a" in cuda.built_archs()


@pytest.mark.gpu
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_exact_mode(case: Case) -> None:
    """Without INT8, against exact attention: two INT8 terms on Hopper are no worse than fp16 elsewhere."""
    target = Target("cuda", "cuda")
    target.require()
    problem = build(case, "cuda")
    out, lse = run(problem, "cuda", "decode")
    want, want_lse = answer(problem, "exact", torch.float64)
    assert_close(out, want, Bound(1e-3, 5e-3) if _has_bulk_decode("cuda") else "fp16")
    assert_lse_close(lse, want_lse, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("row_padding", [0, 20])
def test_exact_mode_follows_the_pipeline(row_padding: int) -> None:
    """On Hopper it has a kernel of its own where pages can be bulk copied, else the portable one."""
    for backend in ("cuda", "cuda-sm80"):
        Target(backend, "cuda").require()
    problem = build(_EXACT.but(group=4, row_padding=row_padding), "cuda")
    here, portable = (run(problem, backend, "decode")[0] for backend in ("cuda", "cuda-sm80"))
    assert torch.equal(here, portable) == (row_padding > 0 or not _has_bulk_decode("cuda"))


@on_targets()
def test_too_many_rows_is_an_error_or_right(target: Target) -> None:
    """Beyond 64 rows a KV head decode answers rightly or refuses with a ValueError before it writes."""
    target.require()
    problem = build(Case(kv_heads=1, group=16, seq_lens=(40, 20), query_lens=(7, 5)), target.device)
    out = torch.full_like(problem.q, float("nan"))
    try:
        out, lse = run(problem, target.backend, "decode", out=out)
    except ValueError:
        assert out.isnan().all()
        return
    judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"decode {target}")


@on_targets()
def test_paged_cache_object(target: Target) -> None:
    """Through the public objects alone: allocate pages, store, decode; the heads come from the cache."""
    target.require()
    d, lens = 64, (20, 33)
    gen = torch.Generator().manual_seed(0)
    quant = tq4.Quantizer(d, device=target.device)
    cache = tq4.PagedCache(8, 2, d, device=target.device)
    blocks = [cache.allocate(-(-n // 16)) for n in lens]
    slots = torch.cat([cache.slots(b, 0, n) for b, n in zip(blocks, lens, strict=True)])
    k, v = torch.randn(2, sum(lens), 2, d, generator=gen).half().to(target.device)
    q = torch.randn(2, 4, d, generator=gen).half().to(target.device)
    tq4.store(k, v, cache, slots, quant, backend=target.backend)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=target.device)
    out = tq4.decode(q, cache, cache.block_table(blocks), seq_lens, quant, backend=target.backend)
    for i, rows in enumerate(torch.arange(sum(lens)).split(list(lens))):
        keys, values = (x[rows].float().repeat_interleave(2, 1) for x in (k, v))
        p = torch.einsum("hd,lhd->hl", q[i].float(), keys).mul(d**-0.5).softmax(-1)
        want = torch.einsum("hl,lhd->hd", p, values)
        assert relative_error(out[i], want) < 0.25  # 4 bits a coordinate: 0.1 to 0.2
